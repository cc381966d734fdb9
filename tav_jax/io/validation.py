"""Checks of the arrays and numbers that a caller passes."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8

from tav_jax.config import RANGES, check_choice, check_size, check_window
from tav_jax.diffusion.windows import Window, check_length
from tav_jax.errors import InputError, short_repr
from tav_jax.io.decoding import MAX_FPS, MIN_FPS
from tav_jax.io.video import Clip, load_video

Values = Array | np.ndarray
Frames = Clip | UInt8[np.ndarray, "F H W 3"] | str | Path  # a path is that of a video or a directory of images


def dtype(value: Any) -> str:
    """The name of a dtype, given as a name or as a dtype of JAX, numpy or torch. Must be one of `config.DTYPES`."""
    if type(value).__module__ == "torch":
        value = str(value).removeprefix("torch.")
    if not isinstance(value, str) and value is not None:  # numpy takes None for float64
        with contextlib.suppress(TypeError):
            value = np.dtype(value).name
    check_choice("model.dtype", value)
    # The attention of jax.nn has no float16 elsewhere (jax 0.12): it would fail when it is compiled.
    if value == "float16" and (platform := jax.default_backend()) != "gpu":
        raise InputError(
            f"dtype is float16, which needs a GPU, and the platform is {platform}; use bfloat16 or float32"
        )
    return str(value)


def seed(value: Any) -> int:
    low, high = RANGES["seed"]
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise InputError(f"seed is {short_repr(value)}; it must be a whole number from {low} to {high}")
    return int(value)


def random_key(value: Any) -> Key[Array, ""]:
    """The key of a seed, or a key of `jax.random` as it is."""
    if isinstance(value, jax.Array) and value.ndim == 0 and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return value
    if isinstance(value, Values) and value.dtype == np.uint32 and value.shape == (2,):  # jax.random.PRNGKey
        return jax.random.wrap_key_data(jnp.asarray(value))
    if type(value).__module__.startswith(("torch", "numpy.random")):
        kind = f"{type(value).__module__}.{type(value).__name__}"
        raise InputError(f"seed is a {kind}, whose numbers JAX cannot draw; give a whole number or a jax.random.key")
    return jax.random.key(seed(value))


def opened(clip: Any) -> Any:
    """The clip at a path; other values as they are."""
    return load_video(clip) if isinstance(clip, str | Path) else clip


def frames(clip: Frames, factor: int) -> UInt8[np.ndarray, "F H W 3"]:
    """The frames of a clip, whose height and width must be multiples of `factor`."""
    clip = opened(clip)
    array = np.asarray(clip.frames if isinstance(clip, Clip) else clip)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise InputError(f"the frames are {array.dtype} {list(array.shape)}; expected uint8 [frames, height, width, 3]")
    if not len(array):
        raise InputError("the clip has 0 frames; at least 1 is needed")
    check_size(array.shape[1], array.shape[2], factor)
    return array


def latents(values: Values, channels: int, *, prompts: int = 1) -> Float[Array, "n F h w c"]:
    """Latents of one clip or, with several prompts, of one clip for each prompt."""
    array = jnp.asarray(values, jnp.float32)
    fits = array.ndim == 5 and array.shape[0] in (1, prompts) and array.shape[-1] == channels
    if not fits or 0 in array.shape:
        expected = f"[{'1' if prompts == 1 else f'1 or {prompts}'}, frames, height, width, {channels}]"
        raise InputError(f"the latents are {list(array.shape)}; expected {expected}, with no empty axis")
    return array


def requested_shape(latents: Array, frames: int | None, size: tuple[int, int] | None, factor: int) -> None:
    """Frames and size that are given beside latents must be those of the latents."""
    _, count, height, width, _ = latents.shape
    for name, given, value in (("frames", frames, count), ("size", size, (height * factor, width * factor))):
        if given is not None and given != value:
            raise InputError(f"{name} is {given!r} and the latents are of {name} {value}; leave {name} out")


def trajectory(values: Values) -> Float[Array, "K 1 F h w c"]:
    """The trajectory of an inversion."""
    array = jnp.asarray(values, jnp.float32)
    if array.ndim != 6 or array.shape[1] != 1 or 0 in array.shape:
        expected = "[steps + 1, 1, frames, height, width, channels], as invert(..., return_trajectory=True) returns it"
        raise InputError(f"source is {list(array.shape)}; expected {expected}")
    return array


def trajectory_of(values: Values, latents: Array, steps: int) -> Float[Array, "K 1 F h w c"]:
    """The trajectory of an inversion in `steps` steps, of the clip that `latents` are of."""
    array = trajectory(values)
    if array.shape[0] != steps + 1:
        raise InputError(
            f"source is the trajectory of an inversion in {array.shape[0] - 1} steps and inversion_steps is {steps}; "
            f"give inversion_steps={array.shape[0] - 1}, or invert in {steps} steps"
        )
    if array.shape[2:] != latents.shape[1:]:
        raise InputError(
            f"source is of latents {list(array.shape[2:])} and the latents are {list(latents.shape[1:])}; "
            "give both of the same clip, or leave latents out"
        )
    return array


def mask(values: Values, latents: Array, factor: int) -> Float[Array, "1 F h w 1"]:
    """A mask at the size of the latents, 1 where an edit may change the source. Given as [F, h, w] of latents or
    [F, H, W] of pixels, or without F for all frames alike; pixels are averaged."""
    array = np.asarray(values)
    scale = 255.0 if array.dtype == np.uint8 and array.max(initial=0) > 1 else 1.0
    array = array.astype(np.float32) / scale
    frames, height, width = latents.shape[1:4]
    small, large = (height, width), (height * factor, width * factor)
    fits = array.ndim in (2, 3) and array.shape[-2:] in (small, large) and array.shape[:-2] in ((), (frames,))
    if not fits:
        raise InputError(
            f"the mask is {list(array.shape)}; for this clip it must be {[frames, *large]} (pixels) or "
            f"{[frames, *small]} (latents), or one of them without the number of frames"
        )
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise InputError("the mask has values outside 0 to 1; give True and False, 0 to 1, or uint8 from 0 to 255")
    if array.shape[-2:] == large and factor > 1:
        array = array.reshape(*array.shape[:-2], height, factor, width, factor).mean(axis=(-3, -1))
    return jnp.broadcast_to(jnp.asarray(array), (frames, height, width))[None, ..., None]


def sampled_shape(frames: Any, size: Any, source: Sequence[int] | None, factor: int) -> tuple[int, int, int]:
    """The shape (frames, height, width) of new latents. Frames and size, in pixels, are by default the source's."""
    if source is not None:
        frames, size = source[0] if frames is None else frames, source[1:3] if size is None else size
    if frames is None or size is None:
        raise InputError("without latents, frames= and size=(height, width) say what to sample; give both")
    if frames < 1:
        raise InputError(f"frames is {frames}; at least 1 is needed")
    height, width = size
    check_size(height, width, factor)
    return frames, height // factor, width // factor


def iterations(count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 100:
        raise InputError(f"iterations is {count!r}; it must be a whole number from 1 (DDIM) to 100, 3 to 5 are usual")


def share(name: str, value: float) -> None:
    """A share of the steps."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{name} is {value!r}; it must be from 0 (no step) to 1 (all steps)")


def window(value: Any, clip_frames: int) -> Window | None:
    """The windows (frames, stride) of a clip; None if there are none, or if one is the whole clip."""
    value = () if value is None else value
    check_window(value)
    check_length(value, clip_frames)
    return Window(*value) if value and value[0] < clip_frames else None


def training_window(frames: Any, clip_frames: int) -> int:
    """The frames of a window to train on; 0 for the whole clip."""
    _in_range("window", frames, "train.window")
    check_length(frames, clip_frames)
    return frames if frames < clip_frames else 0


def feature_reuse(interval: Any) -> None:
    _in_range("feature_reuse", interval, "edit.feature_reuse")


def _in_range(name: str, value: Any, setting: str) -> None:
    low, high = RANGES[setting]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} is {short_repr(value)}; it must be a whole number from {low} to {high}")


def steps(count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"steps is {count!r}; it must be a whole number, 1 or more")


def fps(value: float | None) -> None:
    """The frame rate of edits; None for the source's."""
    if value is not None and not (isinstance(value, int | float) and MIN_FPS <= value <= MAX_FPS):
        raise InputError(f"fps is {value!r}; it must be between {float(MIN_FPS)} and {MAX_FPS}")


def strength(value: float, *, from_clip: bool) -> None:
    """The share of steps that use the prompt. Below 1, sampling must start from the inverted latents of a clip."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InputError(f"strength is {value!r}; it must be above 0 and at most 1")
    if value < 1 and not from_clip:
        raise InputError(f"strength is {value}, but there is no clip to keep; give its inverted latents, or strength=1")


def replayed_steps(timesteps: np.ndarray, noise: Array, latents: Array, train_timesteps: int) -> None:
    """One timestep and one noise array for each training step."""
    expected = (len(timesteps), *latents.shape[1:])
    if noise.shape != expected:
        given = f"{len(timesteps)} timesteps and these latents"
        raise InputError(f"noise is {list(noise.shape)}; for {given} it must be {list(expected)}")
    if len(timesteps) and not 0 <= timesteps.min() <= timesteps.max() < train_timesteps:
        found = f"{timesteps.min()} to {timesteps.max()}"
        raise InputError(f"timesteps are {found}; they must be within 0 to {train_timesteps - 1}")

"""Checks of the arrays and numbers that a caller passes."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from tav_jax.config import check_size
from tav_jax.errors import InputError
from tav_jax.io.video import Clip

Values = Array | np.ndarray
Frames = Clip | UInt8[np.ndarray, "F H W 3"]


def frames(clip: Frames, factor: int) -> UInt8[np.ndarray, "F H W 3"]:
    """The frames of a clip, whose height and width must be multiples of `factor`."""
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


def steps(count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"steps is {count!r}; it must be a whole number, 1 or more")


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

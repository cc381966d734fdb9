"""What a caller hands over, checked: each says what it was, what it may be, and what mends it."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from tav_jax.errors import InputError
from tav_jax.video import Clip

Given = Array | np.ndarray
Frames = Clip | UInt8[np.ndarray, "F H W 3"]


def size(height: int, width: int, factor: int) -> None:
    """The autoencoder takes sides that are multiples of its factor."""
    for name, value in (("height", height), ("width", width)):
        if value < factor or value % factor:
            below = value // factor * factor
            mend = f"{below} or {below + factor}" if below else f"{factor}"
            raise InputError(f"{name} {value} is not a multiple of {factor}; use {mend}")


def frames(clip: Frames, factor: int) -> UInt8[np.ndarray, "F H W 3"]:
    pictures = np.asarray(clip.frames if isinstance(clip, Clip) else clip)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise InputError(
            f"the frames are {pictures.dtype} {list(pictures.shape)}; expected uint8 [frames, height, width, 3]"
        )
    if not len(pictures):
        raise InputError("the clip has 0 frames; at least 1 is needed")
    height, width = pictures.shape[1:3]
    size(height, width, factor)
    return pictures


def latents(given: Given, channels: int, *, starts: int = 1) -> Float[Array, "n F h w c"]:
    """Those of one clip or, where there are several prompts, one start for each of them."""
    array = jnp.asarray(given, jnp.float32)
    fits = array.ndim == 5 and array.shape[0] in (1, starts) and array.shape[-1] == channels
    if not fits or 0 in array.shape:
        first = "1" if starts == 1 else f"1 or {starts}"
        raise InputError(
            f"the latents are {list(array.shape)}; expected [{first}, frames, height, width, {channels}], all above 0"
        )
    return array


def steps(count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"steps is {count!r}; it must be a whole number, 1 or more")


def strength(share: float, *, of_a_clip: bool) -> None:
    """The share of the steps that a prompt leads; the others need a clip to go back to."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise InputError(f"strength is {share!r}; give a share of the steps, above 0 and up to 1")
    if share < 1 and not of_a_clip:
        raise InputError(f"strength is {share}, but there is no clip to keep; give its inversion as latents, or 1")


def replayed(times: np.ndarray, noise: Array, of: Array, train_steps: int) -> None:
    """Timesteps and noise for training steps on these latents."""
    if noise.shape != (len(times), *of.shape[1:]):
        raise InputError(
            f"noise is {list(noise.shape)}; for {len(times)} timesteps and these latents it must be "
            f"{[len(times), *of.shape[1:]]}"
        )
    if len(times) and not 0 <= times.min() <= times.max() < train_steps:
        raise InputError(
            f"timesteps go from {times.min()} to {times.max()}; they must be within 0 to {train_steps - 1}"
        )

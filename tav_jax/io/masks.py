"""Masks that a user gives: an image or a video, white where an edit may change the source."""

from typing import Any

import numpy as np
from jaxtyping import Float

from tav_jax.errors import InputError
from tav_jax.io.video import load_video

MAX_ASPECT_ERROR = 0.02


def load_mask(path: str, clip: Any, frames: int) -> Float[np.ndarray, "F H W"]:
    """The mask for a clip of so many frames, read with the settings `clip` of a run's config: 0 to 1.

    It is resized and cropped as the clip is. An image holds for all frames. A video has a frame for each frame of the
    clip or, if it has more, for each frame of the file that the clip is from.
    """
    size = (clip.height, clip.width)
    _check_aspect(path, clip)
    mask = load_video(path, size=size, fit=clip.fit).frames
    count = len(mask)
    if count == 1:
        mask = np.broadcast_to(mask, (frames, *mask.shape[1:]))
    elif count != frames:
        mask = mask[clip.start :: clip.stride][:frames]
    if len(mask) != frames:
        raise InputError(
            f"the mask {path} has {count} frames; it must be an image, or have {frames} frames as the clip has, or as "
            "many as the clip's file"
        )
    return mask.mean(axis=-1, dtype=np.float32) / 255


def _check_aspect(path: str, clip: Any) -> None:
    """Refuse a mask whose aspect ratio is neither that of the clip's file nor that of the clip after resizing."""
    height, width = load_video(path, frames=1).frames.shape[1:3]
    original = load_video(clip.path, frames=1).frames.shape[1:3]
    allowed = [original, (clip.height, clip.width)]
    if not any(abs(width * h / (height * w) - 1) < MAX_ASPECT_ERROR for h, w in allowed):
        sizes = " or ".join(f"{w}×{h}" for h, w in dict.fromkeys(allowed))
        raise InputError(f"the mask {path} is {width}×{height}; draw it at the size of the clip, {sizes}")

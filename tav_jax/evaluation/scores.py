"""Scores of an edited clip: with a CLIP model, with PickScore, and without weights.

`clip_text`, `clip_frame` and `pick` are those of the LOVEU-TGVE 2023 challenge, which resizes frames to 480×480 before
the model's own preprocessing. Embeddings have length one, so that a cosine is a scalar product.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Num, UInt8
from PIL import Image

from tav_jax.errors import InputError, short_repr
from tav_jax.io.clip import ClipEncoder, load_clip
from tav_jax.io.video import Clip, load_video

SIDE = 480  # pixels
PICK_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the tokenizer and the preprocessing of PickScore


@dataclass(frozen=True)
class Scores:
    """Scores of one clip. A score is None if what it needs was not given, or if a clip of one frame has none."""

    clip_text: float | None = None
    clip_frame: float | None = None
    pick: float | None = None
    temporal_consistency: float | None = None
    frame_accuracy: float | None = None
    flicker: float | None = None
    background_psnr: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The scores that are not None, as in JSON, which has no number for infinity."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: value if math.isfinite(value) else "Infinity" for name, value in values.items()}


def score(
    frames: Any,
    prompt: str | None,
    clip: str | Path | ClipEncoder | None = None,
    *,
    pick: str | Path | ClipEncoder | None = None,
    source_prompt: str | None = None,
    source: Any = None,
    mask: Any = None,
) -> Scores:
    """Score an edited clip.

    Args:
        frames: uint8 `[F, H, W, 3]`, a `Clip` or an `Edit`, or the path of a video or of a directory of images.
        prompt: the prompt of the edit, which may be empty; None for the scores that need none.
        clip: directory or hub id of a CLIP model, or a loaded one (`tav_jax.io.clip.load_clip`).
        pick: the same for PickScore, `"yuvalkirstain/PickScore_v1"`.
        source_prompt: the prompt of the source, for `frame_accuracy`.
        source: the clip that was edited, as `frames`, for `background_psnr`.
        mask: `[F, H, W]` or `[H, W]` from 0 to 1, which is 1 where the edit may differ from the source.
    """
    frames = _as_frames(frames, "frames")
    if (source is None) != (mask is None):
        raise InputError("background_psnr needs both source and mask; give both or neither")
    values: dict[str, float | None] = {"flicker": flicker(frames)}
    if source is not None:
        source = _as_frames(source, "source")
        values["background_psnr"] = background_psnr(frames, source, _as_mask(mask, frames, source))
    encoder = load_clip(clip) if isinstance(clip, str | Path) else clip
    pick_encoder = load_pick(pick) if isinstance(pick, str | Path) else pick
    resized = _resize(frames)
    if encoder is not None:
        images = encoder.embed_frames(resized)
        values |= {"clip_frame": clip_frame(images), "temporal_consistency": temporal_consistency(images)}
        if prompt is not None:
            text = encoder.embed_text(prompt)
            values["clip_text"] = clip_text(images, text)
            if source_prompt is not None:
                values["frame_accuracy"] = frame_accuracy(images, text, encoder.embed_text(source_prompt))
    if pick_encoder is not None and prompt is not None:
        images, text = pick_encoder.embed_frames(resized), pick_encoder.embed_text(prompt)
        values["pick"] = pick_score(images, text, pick_encoder.logit_scale)
    return Scores(**values)


def load_pick(source: str | Path) -> ClipEncoder:
    return load_clip(source, processor=PICK_PROCESSOR)


# ------------------------------------------------------------------------------------------------------------- formulas


def clip_text(images: Float[np.ndarray, "F D"], text: Float[np.ndarray, "D"]) -> float:
    """Mean over frames of 100·cos(frame, text)."""
    return 100 * float((images @ text).mean())


def clip_frame(images: Float[np.ndarray, "F D"]) -> float | None:
    """Mean of cos(frame i, frame j) over all ordered pairs i ≠ j. None for one frame, which has no pairs."""
    count = len(images)
    cosines = images @ images.T  # [F, F]
    return float((cosines.sum() - np.trace(cosines)) / (count * (count - 1))) if count > 1 else None


def temporal_consistency(images: Float[np.ndarray, "F D"]) -> float | None:
    """Mean cos of consecutive frames (Tem-Con of FateZero). None for one frame."""
    return float((images[1:] * images[:-1]).sum(axis=1).mean()) if len(images) > 1 else None


def frame_accuracy(
    images: Float[np.ndarray, "F D"], text: Float[np.ndarray, "D"], source_text: Float[np.ndarray, "D"]
) -> float:
    """The share of frames that are nearer to the edit's prompt than to the source's (Frame-Acc of FateZero)."""
    return float((images @ text > images @ source_text).mean())


def pick_score(images: Float[np.ndarray, "F D"], text: Float[np.ndarray, "D"], logit_scale: float) -> float:
    """Mean over frames of exp(logit_scale)·cos(frame, text)."""
    return math.exp(logit_scale) * float((images @ text).mean())


def flicker(frames: UInt8[np.ndarray, "F H W 3"]) -> float | None:
    """(255 − mean |difference of consecutive frames|) / 255 (temporal flickering of VBench). None for one frame."""
    if len(frames) == 1:
        return None
    changes = [np.abs(a.astype(np.int16) - b).mean() for a, b in zip(frames[1:], frames[:-1], strict=True)]
    return float((255 - np.mean(changes)) / 255)


def background_psnr(
    frames: UInt8[np.ndarray, "F H W 3"], source: UInt8[np.ndarray, "F H W 3"], mask: Float[np.ndarray, "F H W"]
) -> float | None:
    """10·log₁₀(255² / MSE) in dB, with the squared error weighted by 1 − mask: infinite if the background is the
    source's. None if the mask is 1 everywhere."""
    error = weight = 0.0
    for frame, original, shown in zip(frames, source, mask, strict=True):
        outside = 1 - shown.astype(np.float64)
        squared = (frame.astype(np.float64) - original) ** 2
        error, weight = error + float((squared.mean(axis=-1) * outside).sum()), weight + float(outside.sum())
    if not weight:
        return None
    return 10 * math.log10(255**2 * weight / error) if error else math.inf


# ------------------------------------------------------------------------------------------------------------ arguments


def _resize(frames: UInt8[np.ndarray, "F H W 3"]) -> UInt8[np.ndarray, "F h w 3"]:
    images = (Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for frame in frames)
    return np.stack([np.asarray(image) for image in images])


def _as_frames(value: Any, name: str) -> UInt8[np.ndarray, "F H W 3"]:
    if isinstance(value, str | Path):
        value = load_video(value, multiple=1)
    frames = value.frames if isinstance(value, Clip) else value
    shape, dtype = getattr(frames, "shape", None), getattr(frames, "dtype", None)
    if shape is None or len(shape) != 4 or shape[-1] != 3 or not all(shape) or dtype != np.uint8:
        got = short_repr(value) if shape is None else f"{dtype} {list(shape)}"
        raise InputError(f"{name} are {got}; give uint8 [F, H, W, 3], a Clip, or the path of a video")
    return np.asarray(frames)


def _as_mask(mask: Any, frames: Num[np.ndarray, "F H W 3"], source: np.ndarray) -> Float[np.ndarray, "F H W"]:
    if source.shape != frames.shape:
        raise InputError(f"source has the shape {list(source.shape)} and frames {list(frames.shape)}; they must agree")
    mask, shape = np.asarray(mask), frames.shape[:3]
    if mask.shape not in (shape, shape[1:]):
        raise InputError(f"mask has the shape {list(mask.shape)}; it must be {list(shape)} or {list(shape[1:])}")
    if not (np.issubdtype(mask.dtype, np.number) or mask.dtype == bool) or not 0 <= mask.min() <= mask.max() <= 1:
        raise InputError(f"mask is {mask.dtype} from {mask.min()} to {mask.max()}; its values must be from 0 to 1")
    return np.broadcast_to(mask.astype(np.float32), shape)

"""Checks for NaN and infinite values. They precede saving."""

import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from tav_jax.errors import NotFiniteError

MAX_CLIPPED = 0.98  # share of black and white pixel values above which a video is probably useless
ADVICE = (
    "no checkpoint contains it. Use a lower train.learning_rate or model.dtype=float32 in another --workdir; "
    "`tav train --debug-nans` finds the operation."
)


class ClippedVideoWarning(UserWarning):
    """Nearly all pixels of a sampled clip are black or white."""


@jax.jit
def _all_finite(arrays: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()


def all_finite(tree: Any) -> bool:
    arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return not arrays or bool(_all_finite(arrays))


def check_inputs(latents: Any, text: Any, dtype: str) -> None:
    """Refuse latents or text embeddings to train on that are not finite."""
    inputs = (("the clip's latents", latents, "VAE"), ("the text embeddings", text, "text encoder"))
    for name, values, network in inputs:
        if not all_finite(values):
            raise NotFiniteError(
                f"{name} are not finite: the {network} overflows in {dtype} or its weights are damaged; use "
                "model.dtype=float32, or download the model again."
            )


def check_metrics(step: int, values: Mapping[str, float], advice: str = ADVICE) -> None:
    """Refuse a loss or gradient norm that is not finite."""
    for name, value in values.items():
        if not np.isfinite(value):
            raise NotFiniteError(f"{name} is {value} at step {step}; {advice}")


def check_state(step: int, state: Any, advice: str = ADVICE) -> None:
    """Refuse to save or use weights or optimizer state that are not finite."""
    if not all_finite(state):
        raise NotFiniteError(f"the weights or the optimizer state are not finite after step {step}; {advice}")


def check_latents(source: str, latents: Any, dtype: str) -> None:
    """Refuse a result of inversion, sampling or decoding that is not finite."""
    if not all_finite(latents):
        fix = "use other weights" if dtype == "float32" else "use dtype float32 or other weights"
        raise NotFiniteError(f"{source} gave values that are not finite; {fix}")


def clipped_share(frames: UInt8[np.ndarray, "F H W 3"]) -> float:
    """The share of pixel values that are 0 or 255."""
    return float(((frames == 0) | (frames == 255)).mean())


def warn_if_clipped(frames: UInt8[np.ndarray, "F H W 3"], prompt: str) -> None:
    if (share := clipped_share(frames)) > MAX_CLIPPED:
        message = (
            f"{share:.0%} of the pixel values sampled for {prompt!r} are 0 or 255. Lower the guidance, or check "
            "whether the training loss has diverged."
        )
        warnings.warn(ClippedVideoWarning(message), stacklevel=3)


def from_debug_nans(error: FloatingPointError, step: int | None = None) -> NotFiniteError:
    """Shorten an error of `jax_debug_nans` to one sentence with the innermost line of this package in its traceback."""
    package = Path(__file__).parents[1]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(package)]
    where = ""
    if frames:
        last = frames[-1]
        where = f", at {Path(last.filename).relative_to(package.parent)}:{last.lineno}: `{last.line}`"
    message = (str(error).strip().splitlines() or ["a value that is not finite"])[0].rstrip(".")
    return NotFiniteError(f"{f'step {step}' if step else 'before the first step'}: {message}{where}")

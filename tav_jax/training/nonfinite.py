"""Checks for NaN and infinite values, made before anything is saved."""

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

MAX_CLIPPED = 0.98  # of the pixel values; more is hardly an image
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
    """What a run trains on, before its first step."""
    for name, values, network in (
        ("the clip's latents", latents, "VAE"),
        ("the text embeddings", text, "text encoder"),
    ):
        if not all_finite(values):
            raise NotFiniteError(
                f"{name} are not finite: the {network} overflows in {dtype} or its weights are damaged; use "
                "model.dtype=float32, or download the model again."
            )


def check_metrics(step: int, values: Mapping[str, float]) -> None:
    """The loss and gradient norm of a step."""
    for name, value in values.items():
        if not np.isfinite(value):
            raise NotFiniteError(f"{name} is {value} at step {step}; {ADVICE}")


def check_state(step: int, state: Any) -> None:
    """Everything that a checkpoint stores."""
    if not all_finite(state):
        raise NotFiniteError(f"the weights or the optimizer state are not finite after step {step}; {ADVICE}")


def check_latents(source: str, latents: Any, dtype: str) -> None:
    """The result of inversion, sampling or decoding."""
    if not all_finite(latents):
        wider = "" if dtype == "float32" else " in dtype float32, or"
        raise NotFiniteError(f"{source} gave values that are not finite; try again{wider} with other weights.")


def clipped_share(frames: UInt8[np.ndarray, "F H W 3"]) -> float:
    """The share of pixel values that are 0 or 255."""
    return float(((frames == 0) | (frames == 255)).mean())


def warn_if_clipped(frames: UInt8[np.ndarray, "F H W 3"], prompt: str) -> None:
    if (share := clipped_share(frames)) > MAX_CLIPPED:
        warnings.warn(
            ClippedVideoWarning(
                f"{share:.0%} of the pixel values sampled for {prompt!r} are 0 or 255. Lower the guidance, or check "
                "whether the training loss has diverged."
            ),
            stacklevel=3,
        )


def from_debug_nans(error: FloatingPointError, step: int | None = None) -> NotFiniteError:
    """The error of `jax_debug_nans` as one sentence with the line of this package that it points to."""
    package = Path(__file__).parents[1]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(package)]
    where = ""
    if frames:
        last = frames[-1]
        where = f", at {Path(last.filename).relative_to(package.parent)}:{last.lineno}: `{last.line}`"
    message = (str(error).strip().splitlines() or ["a value that is not finite"])[0].rstrip(".")
    return NotFiniteError(f"{f'step {step}' if step else 'before the first step'}: {message}{where}")

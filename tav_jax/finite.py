"""Numbers that have run away: found before they are kept, with the step and what the cause is likely to be."""

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

USUAL_RATE = 3e-5
FLAT = 0.98  # of the pixels at either end: no longer a picture


class FlatPicture(UserWarning):
    """A sampled clip is black, or white, or both, and nothing else."""


@jax.jit
def _finite(arrays: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()


def all_finite(tree: Any) -> bool:
    arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return not arrays or bool(_finite(arrays))


def check_inputs(latents: Any, text: Any, dtype: str) -> None:
    """What a run learns from, before its first step."""
    for what, values, network in (
        ("the clip's latents", latents, "VAE"),
        ("the prompt's states", text, "text encoder"),
    ):
        if not all_finite(values):
            raise NotFiniteError(
                f"{what} are not finite: {_narrow(dtype, f'the {network} ')}{network} weights that are damaged. "
                f"{_wider(dtype)}Otherwise download the model again."
            )


def check_report(step: int, values: Mapping[str, float], *, dtype: str, learning_rate: float) -> None:
    """A step's loss and gradient norm."""
    for name, value in values.items():
        if not np.isfinite(value):
            what = name.replace("_", " ").replace("grad ", "gradient's ")
            raise NotFiniteError(f"the {what} of step {step} is {value}: {_cause(step, dtype, learning_rate)}")


def check_learner(step: int, learner: Any, *, dtype: str, learning_rate: float) -> None:
    """Everything that a checkpoint would keep."""
    if not all_finite(learner):
        raise NotFiniteError(
            f"what was learned by step {step} is not finite any more: {_cause(step, dtype, learning_rate)}"
        )


def _cause(step: int, dtype: str, learning_rate: float) -> str:
    kept = "No checkpoint has it; " if step > 1 else ""
    look = f"{kept}`tav train --debug-nans` finds the operation."
    if dtype == "float16":
        return (
            f"float16 ends at 65504, and something went beyond. Take model.dtype=bfloat16 or float32, in another "
            f"--workdir. {look}"
        )
    if step == 1:  # nothing has been learned that could be wrong
        return f"the base model's UNet is likely to be damaged; download it again. {look}"
    if learning_rate > 3 * USUAL_RATE:
        return (
            f"the learning rate of {learning_rate:g} is likely to be too high ({USUAL_RATE:g} is usual). Take a lower "
            f"train.learning_rate, in another --workdir. {look}"
        )
    return f"a lower train.learning_rate or model.dtype=float32, in another --workdir, is likely to mend it. {look}"


def _narrow(dtype: str, of: str) -> str:
    return f"{of}went beyond float16's 65504, or it has " if dtype == "float16" else "most likely the model has "


def _wider(dtype: str) -> str:
    return "Take model.dtype=bfloat16 or float32. " if dtype == "float16" else ""


def check_walk(what: str, latents: Any, dtype: str) -> None:
    """What came of an inversion or a sampling."""
    if not all_finite(latents):
        wider = "take dtype bfloat16 or float32" if dtype == "float16" else "the weights are likely to be damaged"
        raise NotFiniteError(f"{what} gave latents that are not finite, so there is no picture to show; {wider}.")


def flatness(frames: UInt8[np.ndarray, "F H W 3"]) -> float:
    """The share of values that are quite black or quite white."""
    return float(((frames == 0) | (frames == 255)).mean())


def warn_if_flat(frames: UInt8[np.ndarray, "F H W 3"], prompt: str) -> None:
    if (share := flatness(frames)) > FLAT:
        warnings.warn(
            FlatPicture(
                f"{share:.0%} of what was sampled for {prompt!r} is quite black or quite white. Lower the guidance, or "
                "look whether the tuning's loss ran away."
            ),
            stacklevel=3,
        )


def operation(error: FloatingPointError, step: int | None = None) -> NotFiniteError:
    """Where `--debug-nans` stopped, in words."""
    ours = Path(__file__).parent
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(ours)]
    where = ""
    if frames:
        last = frames[-1]
        where = f", at {Path(last.filename).relative_to(ours.parent)}:{last.lineno}: `{last.line}`"
    said = (str(error).strip().splitlines() or ["a number that is not finite"])[0].rstrip(".")
    return NotFiniteError(f"{f'step {step}' if step else 'before the first step'}: {said}{where}")

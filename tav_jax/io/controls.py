"""From the arguments of `TuneAVideo.sample` to the arrays of two-branch editing."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float

from tav_jax.diffusion.alignment import TokenizedPrompt
from tav_jax.diffusion.editing import Editing, StepControls, make_editing, step_controls
from tav_jax.diffusion.schedule import NoiseSchedule
from tav_jax.errors import InputError, short_repr
from tav_jax.io import validation
from tav_jax.io.validation import Values


class EditControls(NamedTuple):
    """The controls of two-branch editing, as a caller gives them; see `TuneAVideo.sample`."""

    source: Any  # the trajectory of the inversion; None: no second branch
    source_prompt: str
    self_attention_steps: float
    feature_steps: float
    cross_attention_steps: float
    blend_start: float
    equalizer: Mapping[str, float]
    blend_words: Sequence[str]
    mask: Values | None

    @property
    def shares(self) -> dict[str, float]:
        names = ("self_attention_steps", "feature_steps", "cross_attention_steps", "blend_start")
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        for name, value in self.shares.items():
            validation.share(name, value)
        if self.source is None and (self.equalizer or self.blend_words or self.mask is not None):
            raise InputError(
                "equalizer, blend_words and mask need source=, the trajectory of the inversion: "
                "tav.invert(clip, return_trajectory=True)"
            )
        if not isinstance(self.equalizer, Mapping):
            raise InputError(f"equalizer is {short_repr(self.equalizer)}; it must be like {{'word': 2.0}}")
        if isinstance(self.blend_words, str):
            raise InputError(
                f"blend_words is {self.blend_words!r}; it must be a list of words, ({self.blend_words!r},)"
            )

    def prepare(
        self,
        latents: Float[Array, "n F h w c"],
        words: Sequence[TokenizedPrompt],
        schedule: NoiseSchedule,
        *,
        steps: int,
        inversion_steps: int,
        factor: int,
    ) -> tuple[Editing, StepControls]:
        """`words`: the source prompt and the prompts. `factor`: the VAE's down-sampling factor."""
        trajectory = validation.trajectory_of(self.source, latents, inversion_steps)
        trajectory = trajectory[schedule.trajectory_indices(steps, inversion_steps)]
        mask = validation.mask(np.ones(latents.shape[1:4]) if self.mask is None else self.mask, latents, factor)
        options = {"equalizer": self.equalizer, "blend_words": self.blend_words}
        return make_editing(words[0], words[1:], mask, **options), step_controls(trajectory, **self.shares)

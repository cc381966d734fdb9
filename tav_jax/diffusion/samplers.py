"""Samplers, and the loop that runs one.

A sampler has two methods, `init` and `step`. Its state is a pytree that holds the latents and, for a multistep method,
results of earlier steps. The state is the carry of a `lax.scan`, and is passed from chunk to chunk when the loop is run
in chunks.

To add a sampler, write a class with `init` and `step` in a file of its own and name it in `SAMPLERS` of `config.py`, or
pass an instance to `TuneAVideo.sample(sampler=...)` (`examples/custom_sampler.py`).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

from tav_jax.config import SAMPLERS, check_choice
from tav_jax.diffusion.schedule import Prediction, Steps, ddim_step

# (latents, one step of Steps, carry) → (predicted noise or velocity, carry). The carry is a pytree of what a denoiser
# keeps from step to step; None if it keeps nothing.
Denoiser = Callable[[Float[Array, "B F h w c"], Steps, Any], tuple[Float[Array, "B F h w c"], Any]]
# (latents after a step, the step, the denoiser's carry) → latents.
AfterStep = Callable[[Float[Array, "B F h w c"], Steps, Any], Float[Array, "B F h w c"]]


@runtime_checkable
class Sampler(Protocol):
    """A sampling method. Its state is a NamedTuple with a field `latents`. Samplers are static arguments of a jitted
    function: they must be hashable, and equal only if they behave the same."""

    def init(self, latents: Float[Array, "B F h w c"]) -> Any:
        """The state before the first step."""
        ...

    def step(self, state: Any, model_output: Float[Array, "B F h w c"], step: Steps, prediction: Prediction) -> Any:
        """The state after one step from `step.alpha` to `step.next_alpha`. `model_output` is the network's prediction
        for `state.latents` at `step.timestep`."""
        ...


class DDIMState(NamedTuple):
    latents: Float[Array, "B F h w c"]


@dataclass(frozen=True)
class DDIM:
    """Deterministic DDIM (η = 0)."""

    def init(self, latents: Float[Array, "B F h w c"]) -> DDIMState:
        return DDIMState(latents)

    def step(
        self, state: DDIMState, model_output: Float[Array, "B F h w c"], step: Steps, prediction: Prediction
    ) -> DDIMState:
        return DDIMState(ddim_step(state.latents, model_output, step.alpha, step.next_alpha, prediction))


def get_sampler(sampler: "str | Sampler") -> Sampler:
    """The sampler that `config.SAMPLERS` lists under a name; an instance is returned unchanged."""
    if not isinstance(sampler, str):
        return sampler
    check_choice("edit.sampler", sampler)
    module, name = SAMPLERS[sampler].rsplit(".", 1)
    return getattr(importlib.import_module(module), name)()


def stateless(function: Callable[[Float[Array, "B F h w c"], Steps], Float[Array, "B F h w c"]]) -> Denoiser:
    """A denoiser that keeps nothing, from a function of latents and step."""
    return lambda latents, step, carry: (function(latents, step), carry)


class LoopState(NamedTuple):
    """The carry of the loop."""

    sampler: Any
    denoiser: Any = None

    @property
    def latents(self) -> Float[Array, "B F h w c"]:
        return self.sampler.latents


def run_sampler(
    sampler: Sampler,
    denoise: Denoiser,
    state: LoopState,
    steps: Steps,
    prediction: Prediction,
    *,
    after_step: AfterStep | None = None,
    trajectory: bool = False,
) -> tuple[LoopState, Float[Array, "N B F h w c"] | None]:
    """The state after the last step and, with `trajectory`, the latents after each step.

    With `NoiseSchedule.sampling_steps`, this is sampling; DDIM with `NoiseSchedule.inversion_steps` is DDIM inversion.
    """

    def body(state: LoopState, step: Steps):
        output, carry = denoise(state.latents, step, state.denoiser)
        new = sampler.step(state.sampler, output, step, prediction)
        if after_step is not None:
            new = new._replace(latents=after_step(new.latents, step, carry))
        return LoopState(new, carry), new.latents if trajectory else None

    return jax.lax.scan(body, state, steps)

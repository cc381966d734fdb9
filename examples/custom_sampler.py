"""A sampler from outside the package: the two-step Adams–Bashforth method for the predicted noise.

    python examples/custom_sampler.py      # on the demo model

A sampler is a class with `init` and `step`. Its state is any pytree with the current latents as `state.latents`; a
multistep method keeps earlier predictions in it. The state is the carry of the jitted loop, and is passed on when the
loop runs in chunks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tav_jax import Clip, TuneAVideo
from tav_jax.demo.edits import FPS, MODEL, source_clip
from tav_jax.diffusion.schedule import predicted_x0_and_noise


class AdamsBashforthState(NamedTuple):
    latents: jax.Array  # [B, F, h, w, 4]
    noise: jax.Array  # ε of the previous step, the same shape
    h: jax.Array  # the previous step size, in σ


class AdamsBashforth(NamedTuple):
    """With `y = x/√ᾱ` and `σ = √(1−ᾱ)/√ᾱ`, DDIM is Euler's method for `dy/dσ = ε`: `y' = y + h·ε` with `h = σ' − σ`.

    The two-step method is `y' = y + h·(ε + (ε − ε_previous)·h / (2·h_previous))`. `h_previous` starts at infinity, so
    the first step is a DDIM step. Samplers are static arguments of `jit`, so they must be hashable, as a NamedTuple is.
    """

    def init(self, latents):
        return AdamsBashforthState(latents, jnp.zeros_like(latents), jnp.float32(jnp.inf))

    def step(self, state, model_output, step, prediction):
        x0, noise = predicted_x0_and_noise(state.latents, model_output, step.alpha, prediction)
        sigma, next_sigma = (jnp.sqrt(1 - alpha) / jnp.sqrt(alpha) for alpha in (step.alpha, step.next_alpha))
        h = next_sigma - sigma
        slope = noise + (noise - state.noise) * h / (2 * state.h)
        y = x0 + sigma * noise
        return AdamsBashforthState(jnp.sqrt(step.next_alpha) * (y + h * slope), noise, h)


def main() -> None:
    tav = TuneAVideo.from_pretrained(MODEL, dtype="float32")
    noise = tav.invert(Clip(source_clip(None, frames=8).frames, FPS), steps=50)
    for name, sampler in (("ddim", "ddim"), ("adams-bashforth", AdamsBashforth())):
        options = {"steps": 25, "inversion_steps": 50, "strength": 0.6}
        edit = tav.sample("a blue star on sand", latents=noise, sampler=sampler, **options)
        print("wrote", edit.save(f"{name}.gif"))


if __name__ == "__main__":
    main()

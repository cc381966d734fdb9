"""DDIM inversion by fixed-point iteration (AIDI, arXiv 2309.04907).

DDIM inversion goes from latents z at one ᾱ to x at a smaller one with the noise predicted for z, although the step back
will use the noise predicted for x. Fixed-point iteration solves `x = step(z, ε(x, t))`: it starts from x = z and
repeats `x ← step(z, ε(x, t))`. One iteration is DDIM inversion.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tav_jax.diffusion.samplers import Denoiser
from tav_jax.diffusion.schedule import Prediction, ddim_step


class FixedPointState(NamedTuple):
    iterations: Int[Array, ""]
    residuals: Float[Array, "N"]  # of each step: the norm of the last change of x, relative to the norm of x

    @classmethod
    def initial(cls, iterations: int, steps: int) -> "FixedPointState":
        return cls(jnp.int32(iterations), jnp.zeros(steps, jnp.float32))


def fixed_point_iteration(denoise: Denoiser, prediction: Prediction) -> Denoiser:
    """The prediction of the last iteration. For DDIM inversion; `denoise` keeps no carry."""

    def iterated(latents, step, carry: FixedPointState):
        def body(_, values):
            x, _, _ = values
            output, _ = denoise(x, step, None)
            new = ddim_step(latents, output, step.alpha, step.next_alpha, prediction)
            return new, output, jnp.linalg.norm(jnp.ravel(new - x)) / jnp.linalg.norm(jnp.ravel(new))

        start = (latents, jnp.zeros_like(latents), jnp.float32(0))
        _, output, residual = jax.lax.fori_loop(0, carry.iterations, body, start)
        return output, carry._replace(residuals=carry.residuals.at[step.step].set(residual))

    return iterated

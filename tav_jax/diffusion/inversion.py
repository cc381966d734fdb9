"""DDIM inversion by fixed-point iteration (AIDI, arXiv 2309.04907).

DDIM inversion goes from latents z at one ᾱ to x at a smaller one with the prediction for z, although the step back will
use the prediction for x. Fixed-point iteration finds the x from which the step back leads to z: it starts from x = z
and repeats `x ← the start from which a step with the prediction for x leads to z`. For a network that predicts ε, one
iteration is DDIM inversion.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tav_jax.diffusion.samplers import Denoiser
from tav_jax.diffusion.schedule import Prediction, ddim_start, predicted_x0_and_noise, training_target


class FixedPointState(NamedTuple):
    iterations: Int[Array, ""]
    residuals: Float[Array, "N"]  # of each step: the norm of the last change of x, relative to the norm of x

    @classmethod
    def initial(cls, iterations: int, steps: int) -> "FixedPointState":
        return cls(jnp.int32(iterations), jnp.zeros(steps, jnp.float32))


def fixed_point_iteration(denoise: Denoiser, prediction: Prediction) -> Denoiser:
    """The prediction for z with which the DDIM step goes to the x of the last iteration. For DDIM inversion; `denoise`
    keeps no carry."""

    def iterated(latents, step, carry: FixedPointState):
        def body(_, values):
            x, _, _ = values
            output, _ = denoise(x, step, None)
            new = ddim_start(latents, output, step.next_alpha, step.alpha, prediction)
            return new, output, jnp.linalg.norm(jnp.ravel(new - x)) / jnp.linalg.norm(jnp.ravel(new))

        start = (latents, jnp.zeros_like(latents), jnp.float32(0))
        x, output, residual = jax.lax.fori_loop(0, carry.iterations, body, start)
        # Of x0 and ε at x; at z, they have another velocity.
        x0, noise = predicted_x0_and_noise(x, output, step.next_alpha, prediction)
        carry = carry._replace(residuals=carry.residuals.at[step.step].set(residual))
        return jnp.asarray(training_target(x0, noise, step.alpha, prediction)), carry

    return iterated

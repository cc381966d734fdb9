"""DPM-Solver++(2M) (arXiv 2211.01095): a second-order multistep solver on x0 predictions, deterministic.

With α = √ᾱ, σ = √(1 − ᾱ) and λ = log(α/σ), a step from timestep s0 to t, with the x0 predictions m0 at s0 and m1 at
the timestep before it, s1:

    h = λ_t − λ_s0,  r = (λ_s0 − λ_s1) / h,  D = m0 + (m0 − m1) / (2r)
    x_t = (σ_t / σ_s0) · x − α_t · (e^−h − 1) · D

The first and the last step (the last two with fewer than 15 steps) use D = m0, which is a DDIM step.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from tav_jax.diffusion.schedule import Alpha, Prediction, Steps, ddim_step, predicted_x0_and_noise

LOWER_ORDER_BELOW = 15  # steps


class DPMSolverState(NamedTuple):
    latents: Float[Array, "B F h w c"]
    previous_x0: Float[Array, "B F h w c"]
    previous_lambda: Float[Array, ""]


def log_snr(alpha: Alpha) -> Float[Array, ""]:
    """λ = log(√ᾱ / √(1 − ᾱ))"""
    return 0.5 * (jnp.log(alpha) - jnp.log1p(-alpha))


@dataclass(frozen=True)
class DPMSolverPP2M:
    def init(self, latents: Float[Array, "B F h w c"]) -> DPMSolverState:
        return DPMSolverState(latents, jnp.zeros_like(latents), jnp.float32(0))

    def step(
        self, state: DPMSolverState, model_output: Float[Array, "B F h w c"], step: Steps, prediction: Prediction
    ) -> DPMSolverState:
        x0, _ = predicted_x0_and_noise(state.latents, model_output, step.alpha, prediction)
        lam = log_snr(step.alpha)
        total = step.step + step.remaining + 1
        last = step.remaining < jnp.where(total < LOWER_ORDER_BELOW, 2, 1)
        first_order = (step.step == 0) | last
        # λ is infinite at ᾱ = 1, which only a first-order step can reach: there, h is replaced by 0 and not used.
        h = log_snr(jnp.where(first_order, step.alpha, step.next_alpha)) - lam
        inverse_r = jnp.where(first_order, 0.0, h / jnp.where(first_order, 1.0, lam - state.previous_lambda))
        correction = (x0 - state.previous_x0) * inverse_r / 2  # D − m0
        # x_t = (σ_t/σ_s0)·x − α_t(e^−h − 1)·m0 is the DDIM step; the same factor multiplies the correction.
        factor = -jnp.sqrt(step.next_alpha) * jnp.expm1(-h)
        latents = ddim_step(state.latents, model_output, step.alpha, step.next_alpha, prediction)
        return DPMSolverState(latents + factor * correction, jnp.asarray(x0), lam)

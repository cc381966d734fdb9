"""DPM-Solver++(2M) against diffusers' DPMSolverMultistepScheduler on shared timesteps."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_diffusion import STABLE_DIFFUSION, schedule

from tav_jax.diffusion.dpm_solver import DPMSolverPP2M
from tav_jax.diffusion.samplers import DDIM, run_sampler


def latents() -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 3, 4)), jnp.float32)


def network(x, t):
    """Smooth, and different at every timestep; for numpy, torch and JAX arrays."""
    return 0.3 * x + 0.1 * x * (t / 1000.0) ** 2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 15, 20, 25, 50])
def test_equals_diffusers(steps, prediction):
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers on CPU torch, is not installed")
    torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    s = schedule(prediction)
    table = s.sampling_steps(steps)
    theirs = diffusers.DPMSolverMultistepScheduler(
        **{k: v for k, v in STABLE_DIFFUSION.items() if k != "set_alpha_to_one"},
        prediction_type=prediction,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        euler_at_final=True,
        final_sigmas_type="sigma_min",
        timestep_spacing="leading",
        steps_offset=1,
    )
    theirs.set_timesteps(timesteps=table.timestep.tolist())
    # The scheduler ends at the smallest sigma of training, which is the level below the first timestep here.
    x = torch.tensor(np.asarray(latents()))
    for t in theirs.timesteps:
        x = theirs.step(network(x, float(t)), t, x).prev_sample
    state, _ = run_sampler(
        DPMSolverPP2M(),
        lambda x, step: network(x, step.timestep.astype(jnp.float32)),
        DPMSolverPP2M().init(latents()),
        table,
        prediction,
    )
    np.testing.assert_allclose(state.latents, x.numpy(), rtol=1e-4, atol=1e-4)

"""DPM-Solver++(2M): against the formula in float64, and against diffusers on shared timesteps."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_diffusion import STABLE_DIFFUSION, ddim, schedule

from tav_jax.diffusion.dpm_solver import DPMSolverPP2M
from tav_jax.diffusion.samplers import DDIM, LoopState, run_sampler, stateless


def latents() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 2, 3, 3, 4)).astype(np.float32)


def network(x, t):
    """Smooth in x and t; for numpy, torch and JAX arrays."""
    return 0.3 * x + 0.1 * x * (t / 1000.0) ** 2


def ours(table, prediction: str) -> np.ndarray:
    sampler = DPMSolverPP2M()

    def denoise(x, step):
        return network(x, step.timestep.astype(jnp.float32))

    state, _ = run_sampler(
        sampler, stateless(denoise), LoopState(sampler.init(jnp.asarray(latents()))), table, prediction
    )
    return np.asarray(state.latents)


def formula(table, prediction: str) -> np.ndarray:
    """The definition, in float64; λ of ᾱ = 1 is infinite and e^−h is then 0."""
    x, steps, m1, lambda1 = latents().astype(np.float64), len(table.timestep), None, None
    lower_order = {0, steps - 1} | ({steps - 2} if steps < 15 else set())
    for i in range(steps):
        a, a_next = float(table.alpha[i]), float(table.next_alpha[i])
        output = network(x, float(table.timestep[i]))
        signal, noise = np.sqrt(a), np.sqrt(1 - a)
        m0 = (x - noise * output) / signal if prediction == "epsilon" else signal * x - noise * output
        lambda0 = np.log(signal / noise)
        lambda_next = np.inf if a_next == 1 else np.log(np.sqrt(a_next) / np.sqrt(1 - a_next))
        h = lambda_next - lambda0
        d = m0 if i in lower_order else m0 + (m0 - m1) / (2 * (lambda0 - lambda1) / h)
        x = np.sqrt(1 - a_next) / noise * x - np.sqrt(a_next) * np.expm1(-h) * d
        m1, lambda1 = m0, lambda0
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("steps", "inversion"), [(1, 1), (2, 2), (3, 3), (8, 8), (14, 14), (15, 15), (20, 50), (50, 50)]
)
@pytest.mark.parametrize("to_one", [False, True])
def test_equals_the_formula(steps, inversion, prediction, to_one):
    table = schedule(prediction, set_alpha_to_one=to_one).sampling_steps(steps, inversion)
    np.testing.assert_allclose(ours(table, prediction), formula(table, prediction), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [15, 20, 25, 50])
def test_equals_diffusers(steps, prediction):
    """`euler_at_final` makes the last step first order, as here. The final sigma is that of the first timestep."""
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers on CPU torch, is not installed")
    torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    table = schedule(prediction).sampling_steps(steps)
    theirs = diffusers.DPMSolverMultistepScheduler(
        **{k: v for k, v in STABLE_DIFFUSION.items() if k != "set_alpha_to_one"},
        prediction_type=prediction,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        euler_at_final=True,
        final_sigmas_type="sigma_min",
    )
    theirs.set_timesteps(timesteps=table.timestep.tolist())
    x = torch.tensor(latents())
    for t in theirs.timesteps:
        x = theirs.step(network(x, float(t)), t, x).prev_sample
    np.testing.assert_allclose(ours(table, prediction), x.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_are_ddim(steps):
    """All steps are first order."""
    table = schedule().sampling_steps(steps)
    expected = ddim(lambda x, t: network(x, t.astype(jnp.float32)), latents(), table)
    np.testing.assert_allclose(ours(table, "epsilon"), expected, rtol=1e-6, atol=1e-6)


def test_20_steps_are_closer_than_50_of_ddim():
    """For data N(m, σ²) the ODE's solution is known: (x − √ᾱ·m) / √(ᾱσ² + 1 − ᾱ) is constant."""
    s, m, sigma = schedule(), 0.7, 0.5

    def scale(alpha):
        return np.sqrt(alpha * sigma**2 + 1 - alpha)

    def denoise(x, step):
        return jnp.sqrt(1 - step.alpha) * (x - jnp.sqrt(step.alpha) * m) / (step.alpha * sigma**2 + 1 - step.alpha)

    def error(sampler, steps):
        table = s.sampling_steps(steps, 50)
        state, _ = run_sampler(
            sampler, stateless(denoise), LoopState(sampler.init(jnp.asarray(latents()))), table, "epsilon"
        )
        first, last = float(table.alpha[0]), float(table.next_alpha[-1])
        exact = np.sqrt(last) * m + scale(last) * (latents() - np.sqrt(first) * m) / scale(first)
        return np.abs(np.asarray(state.latents) - exact).max()

    assert error(DPMSolverPP2M(), 20) < error(DDIM(), 50) / 2


@pytest.mark.slow
def test_sampling_in_chunks_and_with_guidance(case):
    """Both prediction types, through the pipeline: chunks give the same trajectory, and strength starts a new loop."""
    tav, options = case.tav, {"sampler": "dpm++2m", "guidance": 3.0, "return_trajectory": True}
    noise = tav.invert(case.latents, steps=8)
    whole = tav.sample("red", latents=noise, steps=4, inversion_steps=8, **options)
    chunks = tav.sample("red", latents=noise, steps=4, inversion_steps=8, progress=lambda done: None, **options)
    np.testing.assert_allclose(chunks.trajectory, whole.trajectory, rtol=1e-4, atol=1e-4)
    ddim_edit = tav.sample("red", latents=noise, steps=4, inversion_steps=8, guidance=3.0)
    assert np.abs(whole.latents - ddim_edit.latents).max() > 1e-3
    kept = tav.sample("red", latents=noise, steps=8, strength=0.5, **options)
    assert kept.trajectory.shape == (8, *case.latents.shape)
    assert np.isfinite(kept.trajectory).all()

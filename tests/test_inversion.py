"""Fixed-point inversion: closed forms, residuals, and the way back on the demo model."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refusal
from test_diffusion import schedule

from tav_jax import InputError, TuneAVideo
from tav_jax.demo.edits import MODEL
from tav_jax.demo.world import DemoClip
from tav_jax.diffusion import programs
from tav_jax.diffusion.inversion import FixedPointState, fixed_point_iteration
from tav_jax.diffusion.samplers import DDIM, LoopState, run_sampler, stateless
from tav_jax.diffusion.schedule import ddim_start, ddim_step, velocity
from tav_jax.errors import NotFiniteError

PREDICTIONS = ("epsilon", "v_prediction")


def normal(*shape: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def denoiser(prediction: str):
    """A smooth prediction that depends on x and on the level: the optimal one for data N(0.3, 0.5²), and a wave."""
    s = schedule(prediction)

    def predict(x, step):
        alpha = jnp.asarray(s.alphas_cumprod)[step.timestep]
        variance = alpha * 0.25 + 1 - alpha
        noise = jnp.sqrt(1 - alpha) * (x - jnp.sqrt(alpha) * 0.3) / variance + 0.1 * jnp.sin(x)
        x0 = (x - jnp.sqrt(1 - alpha) * noise) / jnp.sqrt(alpha)
        return noise if prediction == "epsilon" else velocity(x0, noise, alpha)

    return stateless(predict)


def invert(x, steps: int, prediction: str, iterations: int | None):
    """The noise and the residuals; `iterations` None: plain DDIM."""
    denoise, carry = denoiser(prediction), None
    if iterations is not None:
        denoise, carry = fixed_point_iteration(denoise, prediction), FixedPointState.initial(iterations, steps)
    table = schedule(prediction).inversion_steps(steps)
    state, _ = run_sampler(DDIM(), denoise, LoopState(DDIM().init(x), carry), table, prediction)
    return state.latents, None if carry is None else state.denoiser.residuals


def way_back(noise, steps: int, prediction: str):
    table = schedule(prediction).sampling_steps(steps)
    return run_sampler(DDIM(), denoiser(prediction), LoopState(DDIM().init(noise)), table, prediction)[0].latents


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [(1, 0), (41, 21), (501, 401), (981, 881)])
def test_the_start_of_a_ddim_step_is_its_inverse(prediction, t):
    alpha, next_alpha = schedule().alphas_cumprod[list(t)]
    x, output = normal(1, 2, 3, 3, 4), normal(1, 2, 3, 3, 4, seed=1)
    z = ddim_step(x, output, alpha, next_alpha, prediction)
    np.testing.assert_allclose(ddim_start(z, output, alpha, next_alpha, prediction), x, atol=2e-5)
    if prediction == "epsilon":  # the inversion step
        back = ddim_step(z, output, next_alpha, alpha, prediction)
        np.testing.assert_allclose(ddim_start(z, output, alpha, next_alpha, prediction), back, atol=2e-5)


def test_one_iteration_is_ddim_inversion():
    x = normal(1, 2, 4, 4, 4)
    (ddim, _), (one, _) = invert(x, 10, "epsilon", None), invert(x, 10, "epsilon", 1)
    np.testing.assert_allclose(one, ddim, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [10, 50])
def test_residuals_fall_and_the_way_back_is_exact(prediction, steps):
    x = normal(1, 2, 4, 4, 4)
    noise, _ = invert(x, steps, prediction, None)
    plain = np.abs(way_back(noise, steps, prediction) - x).max()
    residuals, errors = [], []
    for iterations in (2, 4, 8, 60):
        noise, residual = invert(x, steps, prediction, iterations)
        residuals.append(residual.max())
        errors.append(np.abs(way_back(noise, steps, prediction) - x).max())
    assert all(b < a or b < 1e-6 for a, b in itertools.pairwise(residuals)), residuals
    assert errors[1] <= plain / 3
    assert errors[-1] <= 2e-4, errors  # rounding, amplified by the steps back
    assert residuals[-1] <= 1e-6


def test_residuals_survive_chunks():
    x, table = normal(1, 2, 4, 4, 4), schedule().inversion_steps(10)
    denoise = fixed_point_iteration(denoiser("epsilon"), "epsilon")
    state = LoopState(DDIM().init(x), FixedPointState.initial(3, 10))
    for part in programs.in_chunks(table, 5):
        state, _ = run_sampler(DDIM(), denoise, state, part, "epsilon")
    noise, residuals = invert(x, 10, "epsilon", 3)
    np.testing.assert_allclose(state.latents, noise, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.denoiser.residuals, residuals, rtol=1e-4, atol=1e-8)
    assert (residuals > 0).all()


# ------------------------------------------------------------------------------------------------- with a network


@pytest.mark.parametrize("count", [0, -1, 101, True])
def test_bad_iterations_are_refused(sd1, count):
    message = refusal(InputError, sd1.tav.invert, sd1.latents, steps=2, iterations=count)
    assert message.startswith(f"iterations is {count!r}; it must be a whole number from 1 (DDIM) to 100")


@pytest.mark.slow
def test_inversion_with_iterations(sd1):
    """One is DDIM inversion, bit for bit; other counts compile nothing; residuals fall; NaN is refused."""
    tav, latents = sd1.tav, sd1.latents[:, :2, :8, :8]
    plain = tav.invert(latents, steps=4)
    assert np.array_equal(tav.invert(latents, steps=4, iterations=1), plain)
    assert tav.inversion_residuals is None
    two = tav.invert(latents, steps=4, iterations=2, return_trajectory=True)
    residuals = [np.asarray(tav.inversion_residuals)]
    assert two.shape == (5, *latents.shape)
    assert np.array_equal(two[0], latents)
    compiled = programs.denoise_loop._cache_size()
    for iterations in (4, 8):
        path = tav.invert(latents, steps=4, iterations=iterations, return_trajectory=True)
        residuals.append(np.asarray(tav.inversion_residuals))
    assert programs.denoise_loop._cache_size() == compiled
    assert residuals[0].shape == (4,)
    assert residuals[0].max() > residuals[1].max() > residuals[2].max()
    assert np.abs(path - two).max() > 0
    with pytest.raises(NotFiniteError, match="inversion"):
        tav.invert(latents.copy() * np.nan, steps=4, iterations=8, return_trajectory=True)
    tav.invert(latents, steps=4)
    assert tav.inversion_residuals is None


@pytest.mark.slow
def test_the_way_back_of_the_demo_model_is_three_times_closer():
    """With its own caption and without guidance: the last latents of sampling against those of the clip."""
    tav = TuneAVideo.from_pretrained(MODEL, dtype="float32")
    clip = DemoClip.sample(1)
    latents, caption = tav.encode_video(clip.frames), clip.scene.caption

    def error(iterations: int) -> float:
        noise = tav.invert(latents, steps=10, prompt=caption, iterations=iterations)
        back = tav.sample(caption, latents=noise, steps=10, guidance=1.0).latents
        return float(jnp.linalg.norm((back - latents).ravel()))

    assert 3 * error(5) <= error(1)

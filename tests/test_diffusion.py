"""Noise schedule, DDIM steps, samplers and guidance, against Diffusers' schedulers and closed forms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tav_jax.config import SAMPLERS
from tav_jax.diffusion.guidance import classifier_free_guidance
from tav_jax.diffusion.network import NetworkOutput
from tav_jax.diffusion.programs import chunk_size, in_chunks
from tav_jax.diffusion.samplers import DDIM, LoopState, Sampler, get_sampler, run_sampler, stateless
from tav_jax.diffusion.schedule import NoiseSchedule, Steps, add_noise, ddim_step, prompted_steps, velocity
from tav_jax.errors import InputError, WeightsError
from tav_jax.models import Conditioning

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
}


def schedule(prediction: str = "epsilon", **changes) -> NoiseSchedule:
    return NoiseSchedule.from_config({**STABLE_DIFFUSION, "prediction_type": prediction, **changes})


def ddim(denoise, latents, steps: Steps, prediction: str = "epsilon") -> np.ndarray:
    """The last latents of a DDIM loop; `denoise` takes latents and a timestep."""
    state, denoiser = LoopState(DDIM().init(jnp.asarray(latents))), stateless(lambda x, step: denoise(x, step.timestep))
    state, _ = run_sampler(DDIM(), denoiser, state, steps, prediction)
    return np.asarray(state.latents)


# ----------------------------------------------------------------------------------------------- against Diffusers


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400},
        {"trained_betas": [0.1, 0.2, 0.3]},
        {"beta_end": 0.013, "num_train_timesteps": 999},
    ],
)
def test_alphas_cumprod_equal_diffusers(changes):
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers on CPU torch, is not installed")
    pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    theirs = diffusers.DDIMScheduler(**{**STABLE_DIFFUSION, **changes}).alphas_cumprod.numpy()
    assert np.array_equal(schedule(**changes).alphas_cumprod, theirs)


@pytest.mark.parametrize("steps", [1, 7, 10, 13, 50, 333, 500, 999])
@pytest.mark.parametrize("to_one", [False, True])
def test_timesteps_and_alphas_equal_diffusers(steps, to_one):
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers on CPU torch, is not installed")
    theirs = diffusers.DDIMScheduler(
        **{**STABLE_DIFFUSION, "set_alpha_to_one": to_one}, clip_sample=False, steps_offset=1
    )
    theirs.set_timesteps(steps)
    ours = schedule(set_alpha_to_one=to_one)
    table = ours.sampling_steps(steps)
    assert np.array_equal(table.timestep, theirs.timesteps.numpy())
    final = 1.0 if to_one else ours.alphas_cumprod[0]
    for t, alpha, next_alpha in zip(table.timestep, table.alpha, table.next_alpha, strict=True):
        assert alpha == ours.alphas_cumprod[t]
        previous = t - 1000 // steps
        assert next_alpha == (ours.alphas_cumprod[previous] if previous >= 0 else np.float32(final))
    inversion = ours.inversion_steps(steps)
    assert np.array_equal(inversion.timestep, table.timestep[::-1])
    assert np.array_equal(inversion.alpha, table.next_alpha[::-1])
    assert np.array_equal(inversion.next_alpha, table.alpha[::-1])
    for one in (table, inversion):
        assert np.array_equal(one.step, np.arange(steps))
        assert np.array_equal(one.remaining, np.arange(steps)[::-1])


@pytest.mark.parametrize(("steps", "first"), [(50, 981), (7, 853), (13, 913), (999, 999), (1, 1)])
def test_first_and_last_timestep(steps, first):
    t = schedule().sampling_steps(steps).timestep
    assert (t[0], t[-1], len(t)) == (first, 1, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_ddim_step_equals_diffusers(prediction):
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers on CPU torch, is not installed")
    torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    theirs = diffusers.DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, steps_offset=1, prediction_type=prediction)
    theirs.set_timesteps(10)
    rng = np.random.default_rng(0)
    x, out = rng.normal(size=(2, 1, 2, 3, 4, 4)).astype(np.float32)
    table = schedule(prediction).sampling_steps(10)
    for t, alpha, next_alpha in zip(table.timestep, table.alpha, table.next_alpha, strict=True):
        expected = theirs.step(torch.tensor(out), int(t), torch.tensor(x)).prev_sample.numpy()
        np.testing.assert_allclose(ddim_step(x, out, alpha, next_alpha, prediction), expected, rtol=1e-5, atol=1e-5)


def test_noise_and_velocity_equal_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers on CPU torch, is not installed")
    torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    theirs = diffusers.DDPMScheduler(**{k: v for k, v in STABLE_DIFFUSION.items() if k != "set_alpha_to_one"})
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 1, 2, 3, 4, 4)).astype(np.float32)
    for t in (0, 321, 999):
        alpha, args = schedule().alphas_cumprod[t], (torch.tensor(x0), torch.tensor(noise), torch.tensor([t]))
        np.testing.assert_allclose(add_noise(x0, noise, alpha), theirs.add_noise(*args), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(velocity(x0, noise, alpha), theirs.get_velocity(*args), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------- fewer sampling than inversion steps


@pytest.mark.parametrize(
    ("inversion", "sampling", "expected"),
    [
        (50, 25, list(range(981, 0, -40))),
        (50, 1, [981]),
        (10, 4, [901, 701, 401, 101]),  # indices round(2.5, 5, 7.5, 10) − 1 = 1, 4, 7, 9
        (10, 10, list(range(901, 0, -100))),
    ],
)
def test_sampling_timesteps_are_a_subset_of_the_inversions(inversion, sampling, expected):
    s = schedule()
    table, inverted = s.sampling_steps(sampling, inversion), s.inversion_steps(inversion)
    assert table.timestep.tolist() == expected
    assert set(table.timestep) <= set(inverted.timestep)
    # The latents are at the noise level where the inversion ended, and every step ends where the next one begins.
    assert table.alpha[0] == inverted.next_alpha[-1]
    assert np.array_equal(table.next_alpha[:-1], table.alpha[1:])
    assert table.next_alpha[-1] == np.float32(s.final_alpha_cumprod)
    assert np.array_equal(table.alpha, s.alphas_cumprod[table.timestep])


@pytest.mark.parametrize("steps", [7, 50])
def test_equal_numbers_of_steps_change_nothing(steps):
    s = schedule()
    for ours, plain in zip(s.sampling_steps(steps, steps), s.sampling_steps(steps), strict=True):
        assert np.array_equal(ours, plain)


@pytest.mark.parametrize(("inversion", "sampling"), [(50, 25), (50, 13), (20, 7), (9, 2)])
def test_constant_noise_returns_with_fewer_sampling_steps(inversion, sampling):
    """Read at the wrong noise level, the latents would come back scaled."""
    s = schedule()
    x0, eps = (jnp.asarray(x, jnp.float32) for x in np.random.default_rng(0).normal(size=(2, 1, 3, 4, 5, 4)))
    noise = ddim(lambda x, t: eps, x0, s.inversion_steps(inversion))
    back = ddim(lambda x, t: eps, noise, s.sampling_steps(sampling, inversion))
    assert np.abs(back - x0).max() <= 1e-5 * np.abs(x0).max()
    wrong = ddim(lambda x, t: eps, noise, s.sampling_steps(sampling))
    assert np.abs(wrong - x0).max() > 1e-2


def test_more_sampling_than_inversion_steps_are_refused():
    with pytest.raises(InputError, match=r"steps is 51 and the latents were inverted in 50 steps; sample with at most"):
        schedule().sampling_steps(51, 50)


# ------------------------------------------------------------------------------------------------- closed forms


def round_trip(denoise, x0, steps: int, s: NoiseSchedule) -> np.ndarray:
    noise = ddim(denoise, x0, s.inversion_steps(steps), s.prediction)
    return ddim(denoise, noise, s.sampling_steps(steps), s.prediction)


@pytest.mark.parametrize("steps", [1, 7, 50, 999])
@pytest.mark.parametrize("to_one", [False, True])
def test_constant_noise_returns(steps, to_one):
    s = schedule(set_alpha_to_one=to_one)
    x0, eps = np.random.default_rng(0).normal(size=(2, 1, 3, 4, 5, 4)).astype(np.float32)
    x0, eps = jnp.asarray(x0), jnp.asarray(eps)
    back = round_trip(lambda x, t: eps, x0, steps, s)
    assert np.abs(back - x0).max() <= 1e-5 * np.abs(x0).max() * max(1, steps / 50)
    # The end of the inversion in closed form.
    table = s.inversion_steps(steps)
    noise = ddim(lambda x, t: eps, x0, table)
    clean = (x0 - np.sqrt(1 - table.alpha[0]) * eps) / np.sqrt(table.alpha[0])
    expected = np.sqrt(table.next_alpha[-1]) * clean + np.sqrt(1 - table.next_alpha[-1]) * eps
    np.testing.assert_allclose(noise, expected, atol=1e-5 * max(1, steps / 50))


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_constant_noise_returns_as_velocity(steps):
    """The latents are at `alpha` when the network is called: the velocity is √ᾱ·ε − √(1−ᾱ)·x0 at that ᾱ."""
    s = schedule("v_prediction")
    x0, eps = np.random.default_rng(0).normal(size=(2, 1, 3, 4, 5, 4)).astype(np.float32)

    def velocities(table):
        alphas = dict(zip(table.timestep.tolist(), table.alpha.tolist(), strict=True))
        values = jnp.asarray([alphas.get(t, 0.5) for t in range(1000)])
        return lambda x, t: velocity(jnp.asarray(x0), jnp.asarray(eps), values[t])

    inversion, sampling = s.inversion_steps(steps), s.sampling_steps(steps)
    start = add_noise(x0, eps, inversion.alpha[0])
    noise = ddim(velocities(inversion), start, inversion, "v_prediction")
    np.testing.assert_allclose(noise, add_noise(x0, eps, inversion.next_alpha[-1]), atol=1e-5)
    np.testing.assert_allclose(ddim(velocities(sampling), noise, sampling, "v_prediction"), start, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_optimal_denoiser_of_a_gaussian_returns_at_first_order(prediction):
    """For data N(m, s²) the optimal ε is linear in x. DDIM is Euler's method: a round trip's error is O(1/steps)."""
    s, m, sigma = schedule(prediction), 0.7, 0.5

    def denoise(x, t):
        alpha = jnp.asarray(s.alphas_cumprod)[t]
        variance = alpha * sigma**2 + 1 - alpha
        eps = jnp.sqrt(1 - alpha) * (x - jnp.sqrt(alpha) * m) / variance
        x0 = m + jnp.sqrt(alpha) * sigma**2 * (x - jnp.sqrt(alpha) * m) / variance
        return eps if prediction == "epsilon" else velocity(x0, eps, alpha)

    x0 = jnp.asarray(m + sigma * np.random.default_rng(1).normal(size=(1, 2, 4, 4, 4)), jnp.float32)
    error = {n: float(np.abs(round_trip(denoise, x0, n, s) - x0).max()) for n in (25, 50, 100, 200)}
    assert error[200] < 0.05
    for n in (25, 50, 100):
        assert 0.75 <= np.log2(error[n] / error[2 * n]) <= 1.35, error


# ---------------------------------------------------------------------------------------- samplers and guidance


def test_classifier_free_guidance_is_the_formula():
    def network(x, step, conditioning, carry):
        return NetworkOutput(x * conditioning.text[:, :, None, None]), carry + 1

    x, text = jnp.ones((1, 2, 3, 3, 4)), jnp.array([1.0, 3.0])[:, None, None]
    denoise = classifier_free_guidance(network, Conditioning(text), jnp.float32(7.5))
    output, carry = denoise(x, schedule().sampling_steps(5).slice(0, 1), 0)
    np.testing.assert_allclose(output, 1 + 7.5 * (3 - 1))
    assert carry == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_registered_sampler_follows_the_protocol(name):
    """The trajectory ends with the last state; without one nothing is stored."""
    sampler, s = get_sampler(name), schedule()
    assert isinstance(sampler, Sampler)
    assert hash(sampler) == hash(get_sampler(name))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 3, 4)), jnp.float32)
    options = (stateless(lambda x, step: 0.1 * x), LoopState(sampler.init(x)), s.sampling_steps(7), "epsilon")
    state, path = run_sampler(sampler, *options, trajectory=True)
    assert path.shape == (7, *x.shape)
    assert np.array_equal(path[-1], state.latents)
    assert run_sampler(sampler, *options)[1] is None


class Averaging(NamedTuple):
    """A multistep sampler: DDIM along the mean of the last two predictions."""

    class State(NamedTuple):
        latents: jax.Array
        previous: jax.Array

    def init(self, latents):
        return self.State(latents, jnp.zeros_like(latents))

    def step(self, state, model_output, step, prediction):
        average = jnp.where(step.step == 0, model_output, (model_output + state.previous) / 2)
        return self.State(ddim_step(state.latents, average, step.alpha, step.next_alpha, prediction), model_output)


@pytest.mark.parametrize("sampler", [Averaging(), *(get_sampler(name) for name in SAMPLERS)], ids=str)
def test_a_sampler_state_survives_chunks(sampler):
    table = schedule().sampling_steps(12)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 3, 4)), jnp.float32)

    def run(state, steps):
        return run_sampler(sampler, stateless(lambda x, step: jnp.sin(x)), state, steps, "epsilon")[0]

    whole, state = run(LoopState(sampler.init(x)), table), LoopState(sampler.init(x))
    for part in in_chunks(table, chunk_size(12)):
        state = run(state, part)
    for ours, expected in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_an_unknown_sampler_is_refused():
    with pytest.raises(InputError, match=r"sampler is 'euler'; it must be one of ddim"):
        get_sampler("euler")


@pytest.mark.parametrize("steps", [1, 7, 11, 20, 50])
def test_chunks_have_one_size_and_cover_all_steps(steps):
    whole = schedule().sampling_steps(steps)
    chunks = list(in_chunks(whole, chunk_size(steps)))
    assert len({len(chunk.timestep) for chunk in chunks}) == 1  # one program runs all of them
    for i, column in enumerate(whole[:5]):
        assert np.array_equal(np.concatenate([chunk[i] for chunk in chunks]), column)


def test_the_remainder_runs_step_by_step():
    whole = schedule().sampling_steps(50).slice(0, 13)
    chunks = list(in_chunks(whole, 5))
    assert [len(chunk.timestep) for chunk in chunks] == [5, 5, 1, 1, 1]
    assert np.array_equal(np.concatenate([chunk.timestep for chunk in chunks]), whole.timestep)


def test_prompted_steps():
    assert [prompted_steps(50, s) for s in (0.01, 0.25, 0.6, 1.0)] == [1, 12, 30, 50]


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("steps", [0, -1, 1000, True])
def test_a_number_of_steps_out_of_range_is_refused(steps):
    with pytest.raises(InputError, match="1 to 999"):
        schedule().sampling_steps(steps)
    with pytest.raises(InputError, match="1 to 999"):
        schedule().inversion_steps(steps)
    with pytest.raises(InputError, match="1 to 999"):
        schedule().sampling_steps(steps, 50)


def test_unsupported_scheduler_configs_are_refused():
    with pytest.raises(WeightsError, match=r"'cosine'.*scaled_linear"):
        schedule(beta_schedule="cosine")
    with pytest.raises(WeightsError, match=r"'sample'.*epsilon"):
        schedule("sample")
    with pytest.raises(WeightsError, match="rescale_betas_zero_snr"):
        schedule(rescale_betas_zero_snr=True)

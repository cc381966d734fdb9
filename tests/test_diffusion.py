"""NoiseSchedule, one step and the loop, against Diffusers' schedulers and against closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from tav_jax.diffusion.programs import chunk_size, in_chunks
from tav_jax.diffusion.schedule import NoiseSchedule, add_noise, ddim_step, guided, velocity, walk
from tav_jax.errors import InputError, WeightsError

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
}


def schedule(prediction: str = "epsilon", **changes) -> NoiseSchedule:
    return NoiseSchedule.from_config({**STABLE_DIFFUSION, "prediction_type": prediction, **changes})


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
def test_levels_are_those_of_diffusers(changes):
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers on CPU torch, is not installed")
    pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    theirs = diffusers.DDIMScheduler(**{**STABLE_DIFFUSION, **changes}).alphas_cumprod.numpy()
    assert np.array_equal(schedule(**changes).levels, theirs)


@pytest.mark.parametrize("steps", [1, 7, 10, 13, 50, 333, 500, 999])
@pytest.mark.parametrize("to_one", [False, True])
def test_ladders_are_those_of_diffusers(steps, to_one):
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers on CPU torch, is not installed")
    theirs = diffusers.DDIMScheduler(
        **{**STABLE_DIFFUSION, "set_alpha_to_one": to_one}, clip_sample=False, steps_offset=1
    )
    theirs.set_timesteps(steps)
    ours = schedule(set_alpha_to_one=to_one)
    ladder = ours.sampling(steps)
    assert np.array_equal(ladder.timesteps, theirs.timesteps.numpy())
    final = 1.0 if to_one else ours.levels[0]
    for t, start, end in zip(*ladder, strict=True):
        assert start == ours.levels[t]
        assert end == (ours.levels[t - 1000 // steps] if t - 1000 // steps >= 0 else np.float32(final))
    upwards = ours.inversion(steps)
    for down, up in zip(ladder, (upwards.timesteps, upwards.end, upwards.start), strict=True):
        assert np.array_equal(down, up[::-1])


@pytest.mark.parametrize(("steps", "first"), [(50, 981), (7, 853), (13, 913), (999, 999), (1, 1)])
def test_timesteps(steps, first):
    t = schedule().sampling(steps).timesteps
    assert (t[0], t[-1], len(t)) == (first, 1, steps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_step_is_that_of_diffusers(prediction):
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers on CPU torch, is not installed")
    torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    theirs = diffusers.DDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, steps_offset=1, prediction_type=prediction)
    theirs.set_timesteps(10)
    rng = np.random.default_rng(0)
    x, out = rng.normal(size=(2, 1, 2, 3, 4, 4)).astype(np.float32)
    for t, start, end in zip(*schedule(prediction).sampling(10), strict=True):
        step = theirs.step(torch.tensor(out), int(t), torch.tensor(x)).prev_sample.numpy()
        np.testing.assert_allclose(ddim_step(x, out, start, end, prediction), step, rtol=1e-5, atol=1e-5)


def test_noise_and_velocity_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers on CPU torch, is not installed")
    torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    theirs = diffusers.DDPMScheduler(**{k: v for k, v in STABLE_DIFFUSION.items() if k != "set_alpha_to_one"})
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 1, 2, 3, 4, 4)).astype(np.float32)
    for t in (0, 321, 999):
        level, args = schedule().levels[t], (torch.tensor(x0), torch.tensor(noise), torch.tensor([t]))
        np.testing.assert_allclose(add_noise(x0, noise, level), theirs.add_noise(*args), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(velocity(x0, noise, level), theirs.get_velocity(*args), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------- closed forms


def round_trip(denoise, x0, steps: int, s: NoiseSchedule) -> np.ndarray:
    noise, _ = walk(denoise, x0, s.inversion(steps), s.prediction)
    back, _ = walk(denoise, noise, s.sampling(steps), s.prediction)
    return np.asarray(back)


def levels_at(s: NoiseSchedule, t):
    return jnp.asarray(s.levels)[t]


@pytest.mark.parametrize("steps", [1, 7, 50, 999])
@pytest.mark.parametrize("to_one", [False, True])
def test_a_constant_noise_comes_back(steps, to_one):
    s = schedule(set_alpha_to_one=to_one)
    x0, eps = np.random.default_rng(0).normal(size=(2, 1, 3, 4, 5, 4)).astype(np.float32)
    x0, eps = jnp.asarray(x0), jnp.asarray(eps)
    back = round_trip(lambda x, t: eps, x0, steps, s)
    assert np.abs(back - x0).max() <= 1e-5 * np.abs(x0).max() * max(1, steps / 50)
    noise, _ = walk(lambda x, t: eps, x0, s.inversion(steps), "epsilon")
    # The end of an inversion in closed form: x0 is what lies at the first level, seen from the start.
    ladder = s.inversion(steps)
    clean = (x0 - np.sqrt(1 - ladder.start[0]) * eps) / np.sqrt(ladder.start[0])
    expected = np.sqrt(ladder.end[-1]) * clean + np.sqrt(1 - ladder.end[-1]) * eps
    np.testing.assert_allclose(noise, expected, atol=1e-5 * max(1, steps / 50))


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_constant_noise_comes_back_as_velocity(steps):
    """The velocity of a constant noise, at the level where the network is asked to stand.

    A walk stands at `start` when it asks, so the velocity that belongs to x is √ᾱ·ε − √(1−ᾱ)·x0 with that ᾱ, and x0 the
    same all the way.
    """
    s = schedule("v_prediction")
    x0, eps = np.random.default_rng(0).normal(size=(2, 1, 3, 4, 5, 4)).astype(np.float32)

    def along(ladder):
        table = dict(zip(ladder.timesteps.tolist(), ladder.start.tolist(), strict=True))
        start = jnp.asarray([table.get(t, 0.5) for t in range(1000)])
        return lambda x, t: velocity(jnp.asarray(x0), jnp.asarray(eps), start[t])

    up, down = s.inversion(steps), s.sampling(steps)
    begin = add_noise(x0, eps, up.start[0])
    noise, _ = walk(along(up), begin, up, "v_prediction")
    np.testing.assert_allclose(noise, add_noise(x0, eps, up.end[-1]), atol=1e-5)
    back, _ = walk(along(down), noise, down, "v_prediction")
    np.testing.assert_allclose(back, begin, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_exact_denoiser_of_a_gaussian_closes_the_trip_at_first_order(prediction):
    """Data N(m, s²): the best ε is linear in x. DDIM is Euler's method, so the round trip's error falls as 1/steps."""
    s, m, sigma = schedule(prediction), 0.7, 0.5

    def denoise(x, t):
        level = levels_at(s, t)
        variance = level * sigma**2 + 1 - level
        eps = jnp.sqrt(1 - level) * (x - jnp.sqrt(level) * m) / variance
        x0 = m + jnp.sqrt(level) * sigma**2 * (x - jnp.sqrt(level) * m) / variance
        return eps if prediction == "epsilon" else velocity(x0, eps, level)

    x0 = jnp.asarray(m + sigma * np.random.default_rng(1).normal(size=(1, 2, 4, 4, 4)), jnp.float32)
    error = {n: float(np.abs(round_trip(denoise, x0, n, s) - x0).max()) for n in (25, 50, 100, 200)}
    assert error[200] < 0.05
    for n in (25, 50, 100):
        assert 0.75 <= np.log2(error[n] / error[2 * n]) <= 1.35, error


# ------------------------------------------------------------------------------------------------------- the loop


def test_guidance_is_the_formula():
    def denoise(x, t):
        assert x.shape[0] == 2
        return x * jnp.array([1.0, 3.0])[:, None, None, None, None]

    x = jnp.ones((1, 2, 3, 3, 4))
    np.testing.assert_allclose(guided(denoise, jnp.float32(7.5))(x, 5), 1 + 7.5 * (3 - 1))


def test_a_trajectory_ends_where_the_walk_does():
    s = schedule()
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 3, 3, 4)), jnp.float32)
    last, path = walk(lambda x, t: 0.1 * x, x, s.sampling(7), "epsilon", trajectory=True)
    assert path.shape == (7, *x.shape)
    assert np.array_equal(path[-1], last)
    assert walk(lambda x, t: 0.1 * x, x, s.sampling(7), "epsilon")[1] is None


@pytest.mark.parametrize("steps", [1, 7, 11, 20, 50])
def test_a_ladder_in_pieces_is_the_same_ladder(steps):
    whole = schedule().sampling(steps)
    pieces = list(in_chunks(whole, chunk_size(steps)))
    assert len({len(piece.timesteps) for piece in pieces}) == 1  # so one program does for all
    for i, column in enumerate(whole):
        assert np.array_equal(np.concatenate([piece[i] for piece in pieces]), column)


def test_what_is_left_over_is_walked_step_by_step():
    whole = schedule().sampling(50).part(0, 13)
    pieces = list(in_chunks(whole, 5))
    assert [len(piece.timesteps) for piece in pieces] == [5, 5, 1, 1, 1]
    assert np.array_equal(np.concatenate([piece.timesteps for piece in pieces]), whole.timesteps)


@pytest.mark.parametrize("steps", [0, -1, 1000, True])
def test_a_wrong_number_of_steps_is_refused(steps):
    with pytest.raises(InputError, match="1 to 999"):
        schedule().sampling(steps)
    with pytest.raises(InputError, match="1 to 999"):
        schedule().inversion(steps)


def test_what_a_scheduler_config_may_not_say():
    with pytest.raises(WeightsError, match=r"'cosine'.*scaled_linear"):
        schedule(beta_schedule="cosine")
    with pytest.raises(WeightsError, match=r"'sample'.*epsilon"):
        schedule("sample")
    with pytest.raises(WeightsError, match="rescale_betas_zero_snr"):
        schedule(rescale_betas_zero_snr=True)

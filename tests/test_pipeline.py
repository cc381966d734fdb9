"""`TuneAVideo`: results, compilations, and input that is refused."""

import json
import subprocess
import sys
import warnings
from typing import NamedTuple

import numpy as np
import pytest

from tav_jax import Clip, InputError, PromptCut, TuneAVideo, load_video
from tav_jax.diffusion import programs
from tav_jax.diffusion.samplers import DDIM
from tav_jax.distributed import memory
from tav_jax.errors import OutOfMemoryError

pytestmark = pytest.mark.slow  # most of these tests compile a UNet or start processes


@pytest.fixture
def clip(sd1) -> Clip:
    return Clip(sd1.numbers["video_uint8"], 12.5)


def test_the_example_of_the_interface(sd1, clip, tmp_path):
    clip.save(tmp_path / "man.mp4")
    source = load_video(tmp_path / "man.mp4", frames=4, size=(64, 64), start=1)
    tav = sd1.load()
    noise = tav.invert(source, steps=3)
    assert noise.shape == (1, 4, 16, 16, 4)
    edit = tav.sample("blue square is moving", latents=noise, steps=3, guidance=7.5, negative_prompt="red")
    assert edit.frames.shape == (4, 64, 64, 3)
    assert edit.frames.dtype == np.uint8
    assert edit.fps == source.fps == 12.5
    edit.save(tmp_path / "out.mp4")
    edit.save(tmp_path / "out.gif")
    assert len(load_video(tmp_path / "out.mp4").frames) == len(load_video(tmp_path / "out.gif").frames) == 4


def test_several_prompts_are_one_batch_and_the_same_edits(sd1):
    tav, options = sd1.tav, {"latents": sd1.latents, "steps": 3, "guidance": 4.0}
    together = tav.sample(["red", "blue square"], **options)
    for edit, prompt in zip(together, ("red", "blue square"), strict=True):
        alone = tav.sample(prompt, **options)
        assert edit.prompt == prompt
        np.testing.assert_allclose(edit.latents, alone.latents, rtol=1e-4, atol=1e-4)
    assert np.abs(together[0].latents - together[1].latents).max() > 1e-3


def test_a_start_for_each_prompt(sd1):
    tav = sd1.tav
    starts = np.concatenate([tav.noise(seed, *size) for seed, size in ((1, (3, (32, 32))), (2, (3, (32, 32))))])
    together = tav.sample(["blue", "red"], latents=starts, steps=3)
    for i, text in enumerate(["blue", "red"]):
        alone = tav.sample(text, latents=starts[i : i + 1], steps=3)
        np.testing.assert_allclose(together[i].latents, alone.latents, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"latents are \[2, 3, 8, 8, 4\]; expected \[1 or 3, frames"):
        tav.sample(["blue", "red", "green"], latents=starts, steps=3)


def test_other_values_compile_nothing(sd1):
    tav = sd1.tav
    noise = tav.invert(sd1.latents, steps=4)
    tav.sample("red", latents=noise, steps=4, guidance=3.0)
    compiled = programs.denoise_loop._cache_size()
    tav.invert(0.5 * sd1.latents, steps=4, prompt="blue")
    tav.sample("a blue square is moving", latents=2 * noise, steps=4, guidance=12.5, negative_prompt="red")
    assert programs.denoise_loop._cache_size() == compiled


def test_progress_changes_nothing(sd1):
    tav = sd1.tav
    noise = tav.invert(sd1.latents, steps=4)
    whole = tav.sample("red", latents=noise, steps=6, guidance=3.0, return_trajectory=True)
    compiled = programs.denoise_loop._cache_size()
    seen: list[int] = []
    parts = tav.sample("red", latents=noise, steps=6, guidance=3.0, return_trajectory=True, progress=seen.append)
    tav.sample("red", latents=noise, steps=6, guidance=5.0, return_trajectory=True, progress=lambda done: None)
    assert programs.denoise_loop._cache_size() == compiled + 1
    assert seen == [3, 6]
    np.testing.assert_allclose(parts.trajectory, whole.trajectory, rtol=1e-5, atol=1e-5)


def test_guidance_of_one_is_the_conditional_half(sd1):
    tav = sd1.tav
    plain = tav.sample("blue", latents=sd1.latents, steps=3, guidance=1.0, negative_prompt="red")
    off = tav.sample("blue", latents=sd1.latents, steps=3, guidance=0.0)
    nearly = tav.sample("blue", latents=sd1.latents, steps=3, guidance=1.0 + 1e-6)
    assert np.array_equal(plain.latents, off.latents)
    np.testing.assert_allclose(plain.latents, nearly.latents, atol=1e-3)


def test_strength_is_the_share_of_the_steps_that_use_the_prompt(sd1):
    """Three of five steps with the empty prompt, then two guided ones, step by step from the formula."""
    tav, text = sd1.tav, sd1.tav.encode_text(["", "red", "blue"])
    noise = tav.invert(sd1.latents, steps=5)
    edits = tav.sample(["red", "blue"], latents=noise, steps=5, guidance=3.0, strength=0.4, return_trajectory=True)
    back = tav.sample("", latents=noise, steps=5, guidance=1.0, return_trajectory=True).trajectory[:3]
    table = tav.schedule.sampling_steps(5)
    for edit, embedding in zip(edits, (text[1:2], text[2:3]), strict=True):
        np.testing.assert_allclose(edit.trajectory[:3], back, rtol=1e-5, atol=1e-5)
        x = np.asarray(back[-1], np.float64)
        for t, alpha, next_alpha in list(zip(table.timestep, table.alpha, table.next_alpha, strict=True))[3:]:
            without, towards = (np.asarray(tav.unet(x, np.array([t]), w), np.float64) for w in (text[:1], embedding))
            e = without + 3.0 * (towards - without)
            x0 = (x - np.sqrt(1 - alpha) * e) / np.sqrt(alpha)
            x = np.sqrt(next_alpha) * x0 + np.sqrt(1 - next_alpha) * e
        np.testing.assert_allclose(edit.latents, x, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(edit.latents, edit.trajectory[-1])


@pytest.mark.parametrize("progress", [True, False])
def test_another_strength_compiles_nothing(sd1, progress):
    """Chunks of five steps and single steps serve every strength; with progress they are the inversion's."""
    tav, seen = sd1.tav, []
    options = {"steps": 10, "guidance": 3.0, "progress": seen.append if progress else None}
    noise = tav.invert(sd1.latents, steps=10, progress=seen.append)
    for strength in (0.5, 0.7):
        tav.sample("red", latents=noise, strength=strength, **options)
    compiled = programs.denoise_loop._cache_size()
    seen.clear()
    for strength in (0.1, 0.25, 0.6, 0.86):
        tav.sample("blue", latents=noise, strength=strength, **options)
        assert not progress or seen.pop() == 10
    assert programs.denoise_loop._cache_size() == compiled


def test_the_least_strength_is_one_step(sd1):
    back = sd1.tav.sample("", latents=sd1.latents, steps=3, guidance=1.0, return_trajectory=True).trajectory
    edit = sd1.tav.sample("red", latents=sd1.latents, steps=3, strength=0.01, return_trajectory=True)
    np.testing.assert_allclose(edit.trajectory[:2], back[:2], rtol=1e-5, atol=1e-5)
    assert np.abs(edit.latents - back[2]).max() > 1e-4
    only = [sd1.tav.sample("red", latents=sd1.latents, steps=1, strength=strength) for strength in (0.3, 1.0)]
    assert np.array_equal(only[0].latents, only[1].latents)


def test_strength_with_a_start_for_each_prompt(sd1):
    starts = np.concatenate([sd1.tav.noise(seed, 2, (32, 32)) for seed in (1, 2)])
    together = sd1.tav.sample(["blue", "red"], latents=starts, steps=4, strength=0.5)
    for i, text in enumerate(["blue", "red"]):
        alone = sd1.tav.sample(text, latents=starts[i : i + 1], steps=4, strength=0.5)
        np.testing.assert_allclose(together[i].latents, alone.latents, rtol=1e-4, atol=1e-4)


def test_what_cannot_fit_is_refused_before_the_unprompted_steps(sd1, monkeypatch):
    latents = sd1.latents
    workload = sd1.tav.memory_estimator.denoising("", latents, rows=1)
    monkeypatch.setenv(memory.OVERRIDE, str((workload.bytes_needed(workload.shape, 1) + 1000) / 2**30))
    monkeypatch.setattr(programs, "denoise_loop", None)
    with pytest.raises(OutOfMemoryError, match="sampling 5 frames of 64×64 takes"):
        sd1.tav.sample(["red"] * 8, latents=latents, steps=4, strength=0.5)


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5, float("nan")])
def test_a_strength_out_of_range_is_refused(sd1, strength):
    with pytest.raises(InputError, match=f"strength is {strength!r}; it must be above 0 and at most 1"):
        sd1.tav.sample("red", latents=sd1.latents, steps=2, strength=strength)


def test_strength_needs_a_clip(sd1):
    with pytest.raises(InputError, match=r"strength is 0.5, but there is no clip to keep; give its inverted latents"):
        sd1.tav.sample("red", frames=2, size=(32, 32), steps=2, strength=0.5)


def test_fewer_sampling_than_inversion_steps(sd1):
    """The trajectory, step by step, at the timesteps that the rule chooses from the inversion's."""
    tav, text = sd1.tav, sd1.tav.encode_text(["", "red"])
    noise = tav.invert(sd1.latents, steps=10)
    options = {"latents": noise, "guidance": 3.0, "return_trajectory": True}
    edit = tav.sample("red", steps=4, inversion_steps=10, **options)
    alphas, x = tav.schedule.alphas_cumprod.astype(np.float64), np.asarray(noise, np.float64)
    timesteps = [901, 701, 401, 101]
    for t, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        without, towards = (np.asarray(tav.unet(x, np.array([t]), w), np.float64) for w in (text[:1], text[1:]))
        e = without + 3.0 * (towards - without)
        alpha, next_alpha = alphas[t], alphas[following] if following else tav.schedule.final_alpha_cumprod
        x = np.sqrt(next_alpha) * (x - np.sqrt(1 - alpha) * e) / np.sqrt(alpha) + np.sqrt(1 - next_alpha) * e
    np.testing.assert_allclose(edit.latents, x, rtol=1e-4, atol=1e-4)
    plain = tav.sample("red", steps=10, **options)
    assert np.array_equal(plain.trajectory, tav.sample("red", steps=10, inversion_steps=10, **options).trajectory)
    with pytest.raises(InputError, match="steps is 11 and the latents were inverted in 10 steps"):
        tav.sample("red", steps=11, inversion_steps=10, **options)


def test_a_sampler_from_outside_the_package(sd1):
    """An instance is used as it is; equal instances share one program."""

    class HalfSteps(NamedTuple):
        """DDIM along half of the prediction."""

        factor: float = 0.5

        def init(self, latents):
            return DDIM().init(latents)

        def step(self, state, model_output, step, prediction):
            return DDIM().step(state, self.factor * model_output, step, prediction)

    tav, options = sd1.tav, {"latents": sd1.latents, "steps": 4, "guidance": 3.0}
    ddim = tav.sample("red", **options)
    assert np.array_equal(tav.sample("red", sampler=HalfSteps(1.0), **options).latents, ddim.latents)
    half = tav.sample("red", sampler=HalfSteps(), **options)
    assert np.abs(half.latents - ddim.latents).max() > 1e-3
    compiled = programs.denoise_loop._cache_size()
    tav.sample("blue", sampler=HalfSteps(), **options)
    assert programs.denoise_loop._cache_size() == compiled
    with pytest.raises(InputError, match="sampler is 'euler'; it must be one of"):
        tav.sample("red", sampler="euler", **options)


def test_noise_starts_are_reproducible(sd1):
    tav = sd1.load()
    options = {"steps": 2, "frames": 3, "size": (32, 40), "guidance": 1.0}
    first, again, other = (tav.sample("red", seed=seed, **options) for seed in (1, 1, 2))
    assert first.frames.shape == (3, 32, 40, 3)
    assert np.array_equal(first.frames, again.frames)
    assert not np.array_equal(first.frames, other.frames)


def test_invert_takes_a_clip_its_frames_or_its_latents(sd1, clip):
    tav = sd1.load()
    by_clip = tav.invert(clip, steps=2)
    np.testing.assert_allclose(by_clip, tav.invert(clip.frames, steps=2), atol=1e-5)
    np.testing.assert_allclose(by_clip, tav.invert(tav.encode_video(clip), steps=2), atol=1e-5)


def test_a_long_prompt_is_truncated_with_a_warning(sd1):
    words = "red square " * 60 + "never read"
    with pytest.warns(PromptCut, match=r"tokens and the text encoder reads 77; .*never read.* is ignored"):
        sd1.tav.encode_text([words])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd1.tav.encode_text(["red square is moving", ""])


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (np.zeros((3, 62, 64, 3), np.uint8), "height 62 is not a multiple of 4; use 60 or 64"),
        (np.zeros((3, 64, 2, 3), np.uint8), "width 2 is not a multiple of 4; use 4"),
        (np.zeros((0, 64, 64, 3), np.uint8), "0 frames; at least 1"),
    ],
)
def test_frames_that_are_refused(sd1, frames, said):
    for use in (sd1.tav.encode_video, sd1.tav.posterior, sd1.tav.invert):
        with pytest.raises(InputError, match=said):
            use(frames)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps is 0; it must be a whole number from 1 to 999"),
        ({"latents": np.zeros((1, 0, 8, 8, 4), np.float32)}, r"latents are \[1, 0, 8, 8, 4\]"),
        ({"latents": np.zeros((1, 2, 8, 8, 3), np.float32)}, r"expected \[1, frames, height, width, 4\]"),
        ({"frames": 3, "size": (30, 32)}, "height 30 is not a multiple of 4; use 28 or 32"),
        ({"frames": 0, "size": (32, 32)}, "frames is 0; at least 1"),
        ({"frames": 3, "size": (32, 32), "fps": 0}, r"fps is 0; it must be between 0\.01 and 1000"),
        ({}, "frames= and size="),
    ],
)
def test_sampling_options_that_are_refused(sd1, options, said):
    tav = TuneAVideo(sd1.tav.components, "float32")
    with pytest.raises(InputError, match=said):
        tav.sample("red", **options)
    with pytest.raises(InputError, match="list of prompts is empty"):
        tav.sample([], latents=sd1.latents)


def test_a_replay_that_is_refused(sd1):
    noise = np.zeros((2, *sd1.latents.shape[1:]), np.float32)
    with pytest.raises(InputError, match=r"noise is \[2, .*for 1 timesteps"):
        sd1.tav.replay(sd1.latents, "red", timesteps=[5], noise=noise)
    with pytest.raises(InputError, match="timesteps are 5 to 1000; they must be within 0 to 999"):
        sd1.tav.replay(sd1.latents, "red", timesteps=[5, 1000], noise=noise)


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["jax", "flax", "optax", "orbax", "transformers", "av", "imageio", "ml_collections", "torch", "numpy"]
    code = f"import sys, tav_jax; print([m for m in {heavy} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(said.replace("'", '"')) == []


def test_a_replay_of_no_steps_is_empty(sd1):
    noise = np.zeros((0, *sd1.latents.shape[1:]), np.float32)
    result = sd1.load().replay(sd1.latents, "red", timesteps=[], noise=noise)
    assert result.losses.shape == result.grad_norms.shape == (0,)

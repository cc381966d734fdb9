"""The examples run, and the custom sampler is the method that it claims to be."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.custom_sampler import AdamsBashforth
from tav_jax import Clip, load_video
from tav_jax.diffusion.samplers import DDIM, LoopState, Sampler, run_sampler, stateless
from tav_jax.diffusion.schedule import NoiseSchedule
from tests.conftest import difference

EXAMPLES = Path(__file__).parent.parent / "examples"
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": False}


def run(directory: Path, script: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_tune_runs_the_whole_method_on_a_clip(tmp_path, sd1):
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 48, 3), np.uint8)
    Clip(frames, 8.0).save(tmp_path / "clip.mp4")
    options = {"model": sd1.model, "dtype": "float32", "clip": "clip.mp4", "prompt": "a man", "frames": 3, "stride": 2}
    options |= {"tuning-steps": 2, "sampling-steps": 2}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    printed = run(tmp_path, "tune.py", *arguments, "--size", 32, 48, "--edit=a panda", "--edit=a cat")
    assert "mean loss" in printed
    edits = [load_video(tmp_path / "edits" / f"edit-{i}.mp4") for i in range(2)]
    assert [edit.frames.shape for edit in edits] == [(3, 32, 48, 3)] * 2
    assert [edit.fps for edit in edits] == [4.0] * 2


@pytest.mark.slow
def test_the_custom_sampler_runs_on_the_embedded_model(tmp_path):
    printed = run(tmp_path, "custom_sampler.py")
    assert printed.splitlines() == ["wrote ddim.gif", "wrote adams-bashforth.gif"]
    ddim, ours = (load_video(tmp_path / name).frames for name in ("ddim.gif", "adams-bashforth.gif"))
    assert ddim.shape == ours.shape == (8, 64, 64, 3)
    assert (ddim != ours).any()


def test_the_custom_sampler_is_a_sampler():
    assert isinstance(AdamsBashforth(), Sampler)
    assert hash(AdamsBashforth()) == hash(AdamsBashforth())


def test_its_first_step_is_ddim(sd1):
    edits = [
        sd1.tav.sample("a man", latents=sd1.latents, steps=3, sampler=sampler, return_trajectory=True)
        for sampler in (DDIM(), AdamsBashforth())
    ]
    ddim, ours = (np.asarray(edit.trajectory) for edit in edits)
    assert difference(ours[0], ddim[0]) < 1e-5
    assert difference(ours[1], ddim[1]) > 1e-3  # and its second step is not


def test_its_state_survives_a_loop_in_chunks(sd1):
    steps, done = 7, []
    options = {"latents": sd1.latents, "steps": steps, "sampler": AdamsBashforth(), "return_trajectory": True}
    whole = sd1.tav.sample("a man", **options)
    chunked = sd1.tav.sample("a man", **options, progress=done.append)
    assert done == list(range(1, steps + 1))  # seven chunks of one step: all state crosses a chunk's border
    assert difference(chunked.trajectory, whole.trajectory) < 1e-5


def test_its_error_falls_with_the_square_of_the_steps_where_the_solution_is_known():
    """For data from N(0, s²), `ε = y·σ/(s² + σ²)`, and `dy/dσ = ε` is solved by y ∝ √(s² + σ²)."""
    schedule, variance = NoiseSchedule.from_config(SCHEDULE), 0.5**2

    def denoise(latents, step):
        sigma = jnp.sqrt(1 - step.alpha) / jnp.sqrt(step.alpha)
        return latents / jnp.sqrt(step.alpha) * sigma / (variance + sigma**2)

    def spread(alpha: float) -> float:  # of x = √ᾱ·y at a noise level
        return float(np.sqrt(alpha * variance + 1 - alpha))

    def error(sampler, steps: int) -> float:
        table = schedule.sampling_steps(steps)
        start = jax.random.normal(jax.random.key(0), (1, 1, 2, 2, 4)) * spread(table.alpha[0])
        exact = np.asarray(start) * spread(table.next_alpha[-1]) / spread(table.alpha[0])
        state, _ = run_sampler(sampler, stateless(denoise), LoopState(sampler.init(start)), table, "epsilon")
        return difference(state.latents, exact)

    ddim, ours = ([error(sampler, steps) for steps in (25, 50, 100)] for sampler in (DDIM(), AdamsBashforth()))
    assert all(1.7 < coarse / fine < 2.3 for coarse, fine in itertools.pairwise(ddim)), ddim
    assert all(coarse / fine > 3 for coarse, fine in itertools.pairwise(ours)), ours
    assert ours[-1] < ddim[-1] / 10

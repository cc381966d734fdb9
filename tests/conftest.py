"""What the tests share: the reference cases, the difference of two arrays, and a small training run.

The cases in `tests/reference` are tiny pipelines with numbers computed by the official PyTorch implementation.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tiny networks are compiled for longer than they run. With XLA's own settings run: the demo, the notebook, and the
# README's first hour.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
# Programs are compiled once for all tests and processes: many tests use the same ones.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/tav_jax-tests-{os.getuid()}")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import numpy as np
import pytest

from tav_jax import Clip, TuneAVideo
from tav_jax import config as configs
from tav_jax.errors import TavError
from tav_jax.plan import compiler_directory

REFERENCE = Path(__file__).parent / "reference"

with_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu") and not (compiler_directory() / "libtpu").is_dir(),
    reason=f"the TPU compiler is not installed: pip install --target={compiler_directory()} libtpu",
)

CASES = ("sd1", "sd2")


def channels_last(x: np.ndarray) -> np.ndarray:
    """[..., C, F, H, W] → [..., F, H, W, C]"""
    return np.moveaxis(x, -4, -1)


def difference(ours, theirs) -> float:
    """max |ours − theirs| / max |theirs|"""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def refusal(kind: type[TavError], call, *args, **options) -> str:
    """The message of the error that the call raises: printable, on one line, and not too long."""
    with pytest.raises(kind) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 2500
    return message


@dataclass(frozen=True)
class Case:
    """One reference case: its settings, its numbers, its pipeline directory."""

    root: Path

    @cached_property
    def settings(self) -> dict:
        return json.loads((self.root / "case.json").read_text())

    @cached_property
    def numbers(self) -> dict[str, np.ndarray]:
        with np.load(self.root / "reference.npz") as file:
            return dict(file)

    @property
    def model(self) -> Path:
        return self.root / "model"

    @cached_property
    def latents(self) -> np.ndarray:
        return channels_last(self.numbers["latents_scaled_bcfhw"])

    def load(self, dtype: str = "float32", **options) -> TuneAVideo:
        return TuneAVideo.from_pretrained(self.model, dtype=dtype, **options)

    @cached_property
    def tav(self) -> TuneAVideo:
        """The pretrained pipeline, in float32. It is shared: a test must not tune it."""
        return self.load()


@pytest.fixture(scope="module", autouse=True)
def clear_compiled_programs():
    """The programs of all modules together would take many gigabytes; most of them are in the persistent cache."""
    yield
    jax.clear_caches()


_cases = {name: Case(REFERENCE / name) for name in CASES}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return _cases[request.param]


@pytest.fixture
def sd1() -> Case:
    return _cases["sd1"]


@pytest.fixture
def sd2() -> Case:
    return _cases["sd2"]


# ------------------------------------------------------------------------------------------------- a small training run


@pytest.fixture(scope="session")
def square_clip(tmp_path_factory) -> Path:
    """A video of a moving square: 6 frames of 32×40 at 10 frames per second."""
    frames = np.full((6, 32, 40, 3), 60, np.uint8)
    for i, frame in enumerate(frames):
        frame[8:20, 3 + 4 * i : 15 + 4 * i] = (220, 40, 40)
    return Clip(frames, 10.0).save(tmp_path_factory.mktemp("clip") / "square.mp4")


@pytest.fixture(scope="session")
def settings(square_clip) -> Callable:
    """Makes the config of a run of six steps, with changes such as `train__steps=3`."""

    def make(**changes):
        c = configs.get_config()
        c.model.update(path=str(REFERENCE / "sd1/model"), dtype="float32")
        c.clip.update(path=str(square_clip), prompt="red square is moving", frames=3, height=32, width=32)
        c.train.update(steps=6, learning_rate=1e-3, checkpoint_every=2, preview_every=0)
        c.edit.update(steps=2, inversion_steps=2, guidance=3.0, prompts=("blue square",))
        c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
        return c

    return make


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory, settings) -> Path:
    """The directory of an uninterrupted run. Shared: a test that changes it uses `run_copy`."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    output = train(directory, settings())
    assert "Tuning for 6 steps: 0.03 M of 0.39 M parameters, 3 frames of 32×32, float32" in output
    assert str(directory) in output
    return directory


@pytest.fixture
def run_copy(finished_run, tmp_path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def train(directory, config, stop=None) -> str:
    """Start or continue a run. Returns what it prints."""
    from tav_jax.training import loop
    from tav_jax.training.run import Run

    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        loop.train(Run.start_or_continue(str(directory), config), stop)
    return output.getvalue()


def trained(directory, step: int | None = None) -> dict[str, np.ndarray]:
    """The UNet's weights of a run's checkpoint, by default the newest."""
    from tav_jax.io import weights

    return weights.torch_tensors(TuneAVideo.restore(directory, step=step).components.unet, "unet")


def logged(directory) -> list[tuple[int, float]]:
    """(step, loss) of every line in `metrics.jsonl`."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def same_run(one, two) -> bool:
    """Whether two runs have equal losses and bit-equal weights."""
    a, b = trained(one), trained(two)
    return logged(one) == logged(two) and all(np.array_equal(a[name], b[name]) for name in a)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(x.relative_to(directory)): x.read_bytes() for x in directory.rglob("*") if x.is_file()}


@pytest.fixture
def start_python() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts Python processes with `-c`, and kills them at the end of the test."""
    started = []

    def start(code: str, *arguments) -> subprocess.Popen:
        command = [sys.executable, "-u", "-c", code, *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.communicate()


@pytest.fixture
def model(sd1, tmp_path) -> Path:
    """A copy of a pipeline directory, to be modified."""
    shutil.copytree(sd1.model, tmp_path / "model")
    return tmp_path / "model"

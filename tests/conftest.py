"""What all tests share: the reference cases, and how a difference is measured.

The cases in `tests/reference` are tiny pipelines with numbers computed by the official PyTorch implementation.
"""

import importlib.util
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test has compiled, the others find, in whatever process: many take the same programs.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/tav_jax-tests-{os.getuid()}")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import numpy as np
import pytest

from tav_jax import TuneAVideo

REFERENCE = Path(__file__).parent / "reference"

# Where `install_oracle.py` has put the TPU's compiler; a process that shall find it gets this environment.
TPU_COMPILER = Path(sys.prefix) / "tpu-compiler"
LOOKING_THERE = {"PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(TPU_COMPILER))))}
with_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu") and not (TPU_COMPILER / "libtpu").is_dir(),
    reason="the TPU's compiler is not installed: pip install libtpu",
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
        """The pretrained pipeline, in float32. Nobody may tune it: it is shared."""
        return self.load()


@pytest.fixture(scope="module", autouse=True)
def programs_go_with_their_module():
    """A worker that keeps what every file has compiled comes to many gigabytes; the disk has most of it anyway."""
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

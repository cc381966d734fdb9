"""The first hour of a user: a wheel in an empty environment, the demo, and a run on a clip of theirs to its export."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from tav_jax import Clip, load_video
from tests.conftest import REFERENCE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCES = ("tav_jax", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def required(names: Iterable[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that these and their own requirements name, without extras that nothing asks for."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        extras = {"", *wanted.extras}
        if wanted.name.lower() in found and not wanted.extras:
            continue
        found[wanted.name.lower()] = package = metadata.distribution(wanted.name)
        for requirement in map(Requirement, package.requires or ()):
            if not requirement.marker or any(requirement.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(requirement)
    return found


def link(package: metadata.Distribution, directory: Path) -> None:
    """Make an installed package importable from another directory."""
    for name in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
        target = directory / name
        if not target.exists() and not name.endswith(".pth"):
            target.symlink_to(package.locate_file(name))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, source / name)
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={dist}", str(source)]
    subprocess.run(build, check=True)
    [wheel] = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel and what it requires, and nothing else. The requirements are links to the packages
    of this environment, so that no network is needed."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    subprocess.run([*PIP, f"--python={place}/bin/python", "install", "--no-deps", "--no-index", wheel], check=True)
    [site_packages] = place.glob("lib/python*/site-packages")
    [installed] = metadata.distributions(name="tav_jax", path=[str(site_packages)])
    needed = [name for name in installed.requires or () if "extra ==" not in name]
    for package in required(needed).values():
        link(package, site_packages)
    assert not (site_packages / "torch").exists()
    return place


@pytest.fixture(scope="module")
def start(environment, tmp_path_factory) -> Callable[..., subprocess.Popen]:
    """Starts a program of the environment in a directory, without the variables of the tests but for the cache."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("JAX_")}
    variables = {**kept, "PATH": f"{environment}/bin:/usr/bin:/bin", "HOME": str(tmp_path_factory.mktemp("home"))}
    variables["HF_HUB_OFFLINE"] = "1"

    def start(program: str, *arguments, cwd: Path) -> subprocess.Popen:
        command = [environment / "bin" / program, *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=cwd, env=variables, stdout=pipe, stderr=pipe, text=True)

    return start


LOAD = """
import sys
from tav_jax import TuneAVideo
tav = TuneAVideo.from_pretrained(sys.argv[1], dtype="float32")
print(tav.sample("blue square", steps=2, frames=3, size=(32, 32)).frames.shape)
"""


def test_the_first_hour(start, tmp_path):
    work, videos, elsewhere = (tmp_path / name for name in ("work", "my videos", "elsewhere"))
    for directory in (work, videos, elsewhere):
        directory.mkdir()

    def run(program: str, *arguments, cwd: Path = work, status: int = 0) -> str:
        process = start(program, *arguments, cwd=cwd)
        out, err = process.communicate(timeout=900)
        assert process.returncode == status, (arguments, out, err)
        return out

    assert "Everything that is required is installed." in run("tav", "doctor")
    assert "train.learning_rate=3e-05" in run("tav", "train", "--help-config")

    run("tav", "demo", "--out=demo", "--steps=2", "--prompt=a blue star on sand")
    assert (work / "demo/report.html").stat().st_size > 10_000

    frames = np.full((20, 40, 56, 3), 70, np.uint8)
    for i, frame in enumerate(frames):
        frame[10:26, 2 + i : 20 + i] = (40, 200, 90)
    clip = Clip(frames, 15.0).save(videos / "green square.mp4")
    settings = {
        "model.path": REFERENCE / "sd1/model",
        "model.dtype": "float32",
        "clip.path": clip,
        "clip.prompt": "green square is moving",
        "clip.frames": 3,
        "clip.height": 32,
        "clip.width": 32,
        "train.steps": 200,
        "train.preview_every": 0,
        "edit.steps": 2,
        "edit.inversion_steps": 2,
    }
    train = ["train", "--config=man_skiing", "--workdir=runs/mine"]
    train += [word for name, value in settings.items() for word in (f"--config.{name}", value)]
    interrupted, deadline, log = (
        start("tav", *train, cwd=work),
        time.monotonic() + 300,
        work / "runs/mine/metrics.jsonl",
    )
    while not (log.exists() and log.read_text()):
        assert interrupted.poll() is None, interrupted.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    interrupted.send_signal(signal.SIGINT)
    interrupted.communicate(timeout=300)
    assert interrupted.returncode == 75
    assert "Continuing at step" in run("tav", *train)
    assert "is finished" in run("tav", *train)

    prompts = ("blue square is moving", "red square is moving", "green circle is moving")
    run("tav", "edit", f"--workdir={work}/runs/mine", *(f"--prompt={prompt}" for prompt in prompts), cwd=elsewhere)
    edits = work / "runs/mine/edits"
    for prompt in prompts:
        edit = load_video(edits / f"{prompt.replace(' ', '-')}.mp4")
        assert edit.frames.shape == (3, 32, 32, 3)
    assert list(edits.glob("side-by-side-*.mp4"))
    page = (edits / "index.html").read_text()
    assert page.count("data:video/mp4") == 4  # the source and three edits
    assert all(f"--prompt={prompt}" in page for prompt in prompts)

    run("tav", "export", "--workdir=runs/mine", "--out=tuned")
    assert run("python", "-c", LOAD, work / "tuned", cwd=elsewhere).strip() == "(3, 32, 32, 3)"

"""The command `tav`, in its own processes, on real files; the results are checked by decoding them."""

import html
import json
import os
import re
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest
from conftest import REFERENCE

from tav_jax import Clip, TuneAVideo, load_video
from tav_jax.io.side_by_side import GAP
from tav_jax.io.video import Audio

pytestmark = pytest.mark.slow  # most of these tests compile a UNet or start processes

RATE = 16000
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def clip_file(directory):
    """Two seconds of a moving square at 15 frames per second, with a tone from 1.0 s to 1.5 s."""
    frames = np.full((30, 48, 64, 3), 70, np.uint8)
    for i, frame in enumerate(frames):
        frame[10:26, 2 + i : 20 + i] = (40, 200, 90)
    t = np.arange(2 * RATE) / RATE
    tone = np.where((t >= 1.0) & (t < 1.5), 0.5 * np.sin(2 * np.pi * 440 * t), 0).astype(np.float32)
    return Clip(frames, 15.0, Audio(tone[None], RATE, "mono")).save(directory / "source.mp4")


def train_arguments(model, clip_file, workdir, **changes) -> list[str]:
    settings = {
        "model.path": model,
        "model.dtype": "float32",
        "clip.path": clip_file,
        "clip.prompt": "green square is moving",
        "clip.frames": 5,
        "clip.height": 32,
        "clip.width": 48,
        "clip.start": 6,
        "clip.stride": 3,
        "train.steps": 60,
        "train.learning_rate": 0.001,
        "train.checkpoint_every": 5,
        "train.preview_every": 30,
        "edit.prompts": "('blue square',)",
        "edit.steps": 3,
        "edit.inversion_steps": 3,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return ["train", f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in settings.items())]


def tav(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tav_jax", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)


def succeeded(*arguments) -> str:
    done = tav(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*arguments) -> str:
    """The error message of a command that ends with status 2 and one sentence."""
    done = tav(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def workdir(directory, clip_file):
    """A run of 60 steps that was killed after its first checkpoint and continued with the same command."""
    workdir = directory / "run"
    train = train_arguments(REFERENCE / "sd1/model", clip_file, workdir)
    process = subprocess.Popen(
        [sys.executable, "-m", "tav_jax", *train], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 300
    while not any(f.name.isdigit() for f in (workdir / "checkpoints").glob("*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert "Continuing at step" in succeeded(*train)
    assert "is finished" in succeeded(*train)
    return workdir


@pytest.mark.slow
def test_killed_run_continues_with_the_same_command(workdir):
    assert [json.loads(x)["step"] for x in (workdir / "metrics.jsonl").open()] == list(range(1, 61))
    assert (workdir / "previews/step_000060/blue-square.mp4").exists()


@pytest.mark.slow
def test_edit(workdir, tmp_path):
    output = succeeded("edit", "--workdir", workdir, "--prompt", "blue square", "--prompt", "../red 🎿 circle")
    assert "Inverted the clip in 3 steps" in output
    assert output.endswith(f"{workdir}/edits/index.html\n")
    assert sorted(f.name for f in (workdir / "edits").iterdir()) == [
        ".tav-edits.json",
        "blue-square.mp4",
        "index.html",
        "red-circle.mp4",
        "side-by-side-blue-square-red-circle.mp4",
    ]
    check_video(workdir / "edits/blue-square.mp4", frames=5, size=(32, 48), fps=5.0)
    combined = load_video(workdir / "edits/side-by-side-blue-square-red-circle.mp4")
    assert combined.frames.shape[0] == 5
    assert combined.frames.shape[2] == 3 * 48 + 2 * GAP

    edit = ("edit", f"--workdir={workdir}", "--prompt=green")
    options = ("--guidance=3", "--strength=0.5", f"--out={tmp_path}")
    assert "Reusing the inversion" in succeeded(*edit, *options)
    message = refused(*edit, *options)
    assert "/green-guidance3-strength0.5.mp4 exists already; add --force" in message
    page = (tmp_path / "index.html").read_text("utf-8")
    command = f"tav edit --workdir={workdir} --out={tmp_path} --guidance=3.0 --strength=0.5 --prompt=green"
    assert command in html.unescape(page)
    assert re.findall(r'<td data-label="(.*?)">(.*?)</td>', page) == [("guidance", "3"), ("strength", "0.5")]
    assert page.count("<video") == 2


@pytest.mark.slow
def test_edit_with_fewer_steps_than_the_inversion(workdir, tmp_path):
    edit = ("edit", f"--workdir={workdir}", "--prompt=blue square", f"--out={tmp_path}")
    message = refused(*edit, "--steps=4")
    assert "edit.steps is 4 and edit.inversion_steps is 3; sample with at most 3 steps" in message
    assert not list(tmp_path.iterdir())
    succeeded(*edit, "--steps=2")
    tav = TuneAVideo.restore(workdir)
    noise = tav.invert(load_video(workdir.parent / "source.mp4", frames=5, size=(32, 48), start=6, stride=3), steps=3)
    expected = tav.sample("blue square", latents=noise, steps=2, inversion_steps=3)
    other = tav.sample("blue square", latents=noise, steps=2)
    ours = load_video(tmp_path / "blue-square-steps2.mp4").frames.astype(int)
    assert np.abs(ours - expected.frames).mean() < np.abs(ours - other.frames).mean() / 2


@pytest.mark.slow
def test_edit_of_an_earlier_checkpoint(workdir, tmp_path):
    edit = ("edit", f"--workdir={workdir}", "--prompt=blue square")
    assert "/checkpoints has no checkpoint of step 7; it has 55, 60" in refused(*edit, "--step=7", f"--out={tmp_path}")
    assert not list(tmp_path.iterdir())
    for step in (55, 60):
        succeeded(*edit, f"--step={step}", f"--out={tmp_path}")
    earlier, newest = (load_video(tmp_path / f"blue-square-step{step}.mp4").frames for step in (55, 60))
    assert not np.array_equal(earlier, newest)


@pytest.mark.slow
def test_exported_pipeline_is_the_tuned_one(workdir, sd1, tmp_path):
    export = ("export", f"--workdir={workdir}", f"--out={tmp_path / 'export'}")
    succeeded(*export)
    ours, theirs = TuneAVideo.restore(workdir), TuneAVideo.from_pretrained(tmp_path / "export", dtype="float32")
    x, text = sd1.latents, sd1.numbers["emb_prompt"]
    assert np.array_equal(ours.unet(x, np.array([5]), text), theirs.unet(x, np.array([5]), text))
    assert "is not an empty directory" in refused(*export)


def check_video(file, *, frames: int, size: tuple[int, int], fps: float) -> None:
    """Frames 6 to 6 + 5·3 of 15 per second are 0.4 s to 1.4 s, so the tone starts 0.6 s into the edit."""
    with av.open(str(file)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert float(video.average_rate) == pytest.approx(fps)
        decoded = list(container.decode(video))
        assert len(decoded) == frames
        assert (decoded[0].height, decoded[0].width) == size
        assert decoded[0].format.name == "yuv420p"
        container.seek(0)
        sound = np.concatenate([f.to_ndarray().mean(0) for f in container.decode(audio)])
        assert len(sound) / audio.rate == pytest.approx(frames / fps, abs=0.07)  # AAC has blocks of 64 ms here
        loud = np.flatnonzero(np.abs(sound) > 0.2)
        assert loud[0] / audio.rate == pytest.approx(0.6, abs=0.03)
        assert loud[-1] / audio.rate == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip__path": "nowhere.mp4"}, "nowhere.mp4 does not exist"),
        ({"clip__frames": 50}, "has 30 frames"),
        ({"train__stepz": 5}, "train.stepz is not a setting, did you mean train.steps"),
        ({"clip__height": 30}, "clip.height 30 is not a multiple of 8"),
        ({"model__path": "/nowhere/at/all"}, "/nowhere/at/all does not exist"),
        ({"edit__steps": 4}, "edit.steps is 4 and edit.inversion_steps is 3; sample with at most 3 steps"),
    ],
)
def test_bad_setting_gives_one_sentence_and_status_2(sd1, directory, clip_file, changes, message):
    assert message in refused(*train_arguments(sd1.model, clip_file, directory / "refused", **changes))
    assert not (directory / "refused").exists()


def test_files_that_are_not_videos(sd1, directory):
    (directory / "text.mp4").write_text("no video\n" * 50)
    (directory / "empty.mp4").write_bytes(b"")
    for name in ("text.mp4", "empty.mp4"):
        assert name in refused(*train_arguments(sd1.model, directory / name, directory / "refused"))
        assert not (directory / "refused").exists()


def test_help_lists_the_commands_and_imports_nothing_slow():
    code = """
import sys
from tav_jax.cli import main
try:
    main.main(["--help"])
finally:
    assert not {"jax", "numpy", "flax", "transformers", "av", "ml_collections", "absl"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    for word in ("train", "edit", "export", "doctor", "examples:"):
        assert word in done.stdout
    assert "--config.NAME=VALUE" in succeeded("train", "--help")
    assert tav("nonsense").returncode == 2
    assert tav("edit", "--workdir=x", "--bogus").returncode == 2


def test_doctor_finds_everything_that_is_required():
    output = succeeded("doctor")
    assert "Everything that is required is installed." in output
    assert "cpu" in output
    assert "filelock" in output

"""The command `tav` as a person types it: in processes of its own, on real files, its results read back by decoding."""

import json
import os
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from tav_jax import Clip, TuneAVideo, load_video
from tav_jax.io.video import Audio

RATE = 16000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def clip_file(place):
    """Two seconds of a moving square at 15 frames a second, with a tone from 1.0 s to 1.5 s."""
    frames = np.full((30, 48, 64, 3), 70, np.uint8)
    for i, frame in enumerate(frames):
        frame[10:26, 2 + i : 20 + i] = (40, 200, 90)
    t = np.arange(2 * RATE) / RATE
    tone = np.where((t >= 1.0) & (t < 1.5), 0.5 * np.sin(2 * np.pi * 440 * t), 0).astype(np.float32)
    return Clip(frames, 15.0, Audio(tone[None], RATE, "mono")).save(place / "source.mp4")


@pytest.fixture(scope="module")
def environment(place):
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


def line(model, clip_file, workdir, **changes) -> list[str]:
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


def tav(environment, *arguments, cwd=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tav_jax", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=600)


def test_train_kill_continue_edit_export_reload(sd1, place, clip_file, environment):
    workdir = place / "run"
    train = line(sd1.model, clip_file, workdir)

    # Killed once there is a checkpoint, then the same line again.
    process = subprocess.Popen(
        [sys.executable, "-m", "tav_jax", *train], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 300
    while not any(f.name.isdigit() for f in (workdir / "checkpoints").glob("*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read().decode()
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = tav(environment, *train)
    assert done.returncode == 0, done.stderr
    assert "Continuing at step" in done.stdout
    assert [json.loads(x)["step"] for x in (workdir / "metrics.jsonl").open()] == list(range(1, 61))
    assert (workdir / "previews/step_000060/blue-square.mp4").exists()
    again = tav(environment, *train)
    assert (again.returncode, "is finished" in again.stdout) == (0, True)

    # Two prompts, then another that finds the inversion.
    edit = tav(environment, "edit", "--workdir", workdir, "--prompt", "blue square", "--prompt", "../red 🎿 circle")
    assert edit.returncode == 0, edit.stderr
    assert "Inverted the clip in 3 steps" in edit.stdout
    assert sorted(f.name for f in (workdir / "edits").iterdir()) == [
        "blue-square.mp4",
        "red-circle.mp4",
        "side-by-side-blue-square-red-circle.mp4",
    ]
    other = ("--prompt=green", "--guidance=3", "--strength=0.5", f"--out={place / 'out'}")
    more = tav(environment, "edit", f"--workdir={workdir}", *other)
    assert more.returncode == 0, more.stderr
    assert "Reusing the inversion" in more.stdout
    once_more = tav(environment, "edit", f"--workdir={workdir}", "--prompt=green", f"--out={place / 'out'}")
    assert once_more.returncode == 2
    assert "add --force" in once_more.stderr

    check_video(workdir / "edits/blue-square.mp4", frames=5, size=(32, 48), fps=5.0)
    wide = load_video(workdir / "edits/side-by-side-blue-square-red-circle.mp4")
    assert wide.frames.shape[0] == 5
    assert wide.frames.shape[2] == 3 * 48 + 2 * 8

    # Out in the Diffusers layout and in again: the same network.
    export = tav(environment, "export", f"--workdir={workdir}", f"--out={place / 'export'}")
    assert export.returncode == 0, export.stderr
    ours, theirs = TuneAVideo.restore(workdir), TuneAVideo.from_pretrained(place / "export", dtype="float32")
    x, text = sd1.latents, sd1.numbers["emb_prompt"]
    assert np.array_equal(ours.unet(x, np.array([5]), text), theirs.unet(x, np.array([5]), text))
    refused = tav(environment, "export", f"--workdir={workdir}", f"--out={place / 'export'}")
    assert (refused.returncode, "exists already" in refused.stderr) == (2, True)


def check_video(file, *, frames: int, size: tuple[int, int], fps: float) -> None:
    """By decoding: frame 6 to 6 + 5·3 of 15 a second is 0.4 s to 1.4 s, so the tone begins 0.6 s into the edit."""
    with av.open(str(file)) as container:
        video, audio = container.streams.video[0], container.streams.audio[0]
        assert float(video.average_rate) == pytest.approx(fps)
        pictures = list(container.decode(video))
        assert len(pictures) == frames
        assert (pictures[0].height, pictures[0].width) == size
        assert pictures[0].format.name == "yuv420p"
        container.seek(0)
        sound = np.concatenate([f.to_ndarray().mean(0) for f in container.decode(audio)])
        assert len(sound) / audio.rate == pytest.approx(frames / fps, abs=0.07)  # AAC works in blocks of 64 ms here
        loud = np.flatnonzero(np.abs(sound) > 0.2)
        assert loud[0] / audio.rate == pytest.approx(0.6, abs=0.03)
        assert loud[-1] / audio.rate == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clip__path": "nowhere.mp4"}, "nowhere.mp4 does not exist"),
        ({"clip__frames": 50}, "has 30 frames"),
        ({"train__stepz": 5}, "train.stepz is not a setting, did you mean train.steps"),
        ({"clip__height": 30}, "clip.height 30 is not a multiple of 8"),
        ({"model__path": "/nowhere/at/all"}, "/nowhere/at/all does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(sd1, place, clip_file, environment, changes, said):
    done = tav(environment, *line(sd1.model, clip_file, place / "refused", **changes))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (place / "refused").exists()


def test_files_that_are_no_videos(sd1, place, environment):
    (place / "text.mp4").write_text("no video\n" * 50)
    (place / "empty.mp4").write_bytes(b"")
    for name in ("text.mp4", "empty.mp4"):
        done = tav(environment, *line(sd1.model, place / name, place / "refused"))
        assert done.returncode == 2
        assert name in done.stderr
        assert not (place / "refused").exists()


def test_help_says_what_there_is_and_loads_nothing_heavy(environment):
    code = """
import sys
from tav_jax.cli import main
try:
    main.main(["--help"])
finally:
    assert not {"jax", "numpy", "flax", "transformers", "av", "ml_collections", "absl"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for word in ("train", "edit", "export", "doctor", "examples:"):
        assert word in done.stdout
    assert "--config.NAME=VALUE" in tav(environment, "train", "--help").stdout
    assert tav(environment, "nonsense").returncode == 2
    assert tav(environment, "edit", "--workdir=x", "--bogus").returncode == 2


def test_the_doctor_finds_this_machine_in_order(environment):
    done = tav(environment, "doctor")
    assert done.returncode == 0
    assert "Everything that is needed is here." in done.stdout
    assert "cpu" in done.stdout

"""Invalid schedules and videos, randomly damaged files, full disks, and devices with too little memory.

Each is refused with one sentence, in bounded time and memory, and existing files stay unchanged.
"""

import io
import os
import resource
import struct
import subprocess
import time
import zlib
from pathlib import Path

import av
import jax
import numpy as np
import pytest
from conftest import refusal
from flax import nnx
from fuzz import fuzz
from PIL import Image

from tav_jax.diffusion.schedule import NoiseSchedule
from tav_jax.errors import InputError, WeightsError
from tav_jax.io import decoding, video
from tav_jax.io.video import Clip, load_video
from tav_jax.training import train_step
from tav_jax.training.checkpoint import Checkpoints
from tav_jax.training.run import publish_video
from tav_jax.training.run_directory import RunDirectory

pytestmark = pytest.mark.slow  # most of these tests compile a UNet or start processes


def contents(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


@pytest.mark.parametrize(
    "changes",
    [
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": "1000"},
        {"beta_start": -1},
        {"beta_start": float("nan")},
        {"beta_end": "x"},
        {"beta_end": 2.0},
        {"beta_schedule": ["linear"]},
        {"prediction_type": {}},
        {"trained_betas": 3},
        {"trained_betas": [0.5, None]},
        {"trained_betas": [0.1] * 200_000},
        {"trained_betas": [0.9] * 1000},
    ],
)
def test_an_invalid_schedule_is_refused(changes):
    assert "the scheduler's" in refusal(WeightsError, NoiseSchedule.from_config, changes)


# ------------------------------------------------------------------------------------------------------------ videos


def gif(width: int, height: int, frames: int = 1) -> bytes:
    """Frames of 8×8 pixels in a GIF whose header says width × height."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "GIF")
    frame = file.getvalue()[file.getvalue().index(b",", 13) : -1]
    screen = struct.pack("<2H", width, height) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    return b"GIF89a" + screen + (b"!\xf9\x04\0\x05\0\0\0" + frame) * frames + b";"


def test_a_gif_of_a_hundred_thousand_frames(tmp_path):
    (tmp_path / "long.gif").write_bytes(gif(8, 8, 100_000))
    began = time.process_time()
    assert load_video(tmp_path / "long.gif", frames=24, stride=2, start=3).frames.shape == (24, 8, 8, 3)
    assert time.process_time() - began < 5  # only the selected part is decoded


def test_more_frames_than_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_FRAMES", 50)
    (tmp_path / "a.gif").write_bytes(gif(8, 8, 60))
    assert "more than 50 frames to load; set frames" in refusal(InputError, load_video, tmp_path / "a.gif")
    assert len(load_video(tmp_path / "a.gif", frames=50).frames) == 50


def test_headers_with_a_width_of_60000(tmp_path):
    (tmp_path / "a.gif").write_bytes(gif(60_000, 60_000))
    before = memory_peak()
    refusal(InputError, load_video, tmp_path / "a.gif", frames=1, size=(8, 8))
    (tmp_path / "b.gif").write_bytes(gif(16_000, 16_000))
    refusal(InputError, load_video, tmp_path / "b.gif", frames=1, size=(8, 8))
    (tmp_path / "f").mkdir()
    wide = bytearray(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">2I", 60_000, 60_000) + b"\x08\x02\0\0\0")
    wide += struct.pack(">I", zlib.crc32(wide[12:])) + b"\0\0\0\0IEND\xaeB`\x82"
    (tmp_path / "f/1.png").write_bytes(wide)
    refusal(InputError, load_video, tmp_path / "f", size=(8, 8))
    Image.new("1", (9000, 9000)).save(tmp_path / "f/1.png")
    assert "9000×9000 pixels, more than 67 million in all" in refusal(InputError, load_video, tmp_path / "f")
    assert memory_peak() - before < 300 << 20


def memory_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_decoder_has_the_same_size_limit_as_the_header(tmp_path, monkeypatch):
    Clip(np.zeros((3, 64, 64, 3), np.uint8), 8.0).save(tmp_path / "a.mp4")
    monkeypatch.setattr(decoding, "check_frame_size", lambda *_: None)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 64 * 64 - 1)
    refusal(InputError, load_video, tmp_path / "a.mp4")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 256 * 256)
    assert load_video(tmp_path / "a.mp4").frames.shape == (3, 64, 64, 3)


def test_pipes_and_devices_are_refused(tmp_path):
    os.mkfifo(tmp_path / "clip.mp4")
    assert "is a pipe or a device" in refusal(InputError, load_video, tmp_path / "clip.mp4")
    (tmp_path / "f").mkdir()
    os.mkfifo(tmp_path / "f/1.png")
    assert "has no images" in refusal(InputError, load_video, tmp_path / "f")
    assert "contains a NUL character" in refusal(InputError, load_video, "a\0b.mp4")
    assert "is a pipe or a device" in refusal(InputError, load_video, "/dev/zero")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.mp4", "ffconcat version 1.0\nfile real.mp4\n"),
        ("a.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nreal.mp4\n#EXT-X-ENDLIST\n"),
        ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nreal.mp4\n#EXT-X-ENDLIST\n"),
        ("a.sdp", "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"),
        ("a.txt", "a text of some lines\n" * 500),
        ("a.mp4", "a text of some lines\n" * 500),
    ],
)
def test_playlists_are_not_followed(tmp_path, name, text):
    real = Clip(np.zeros((3, 16, 16, 3), np.uint8), 8.0).save(tmp_path / "real.mp4")
    accessed = os.stat(real).st_atime_ns
    (tmp_path / name).write_text(text)
    refusal(InputError, load_video, tmp_path / name)
    assert os.stat(real).st_atime_ns == accessed


def test_image_format_is_detected_from_the_content(tmp_path):
    """Pillow would run an external program for PostScript, whatever the file is called."""
    (tmp_path / "f").mkdir()
    (tmp_path / "f/1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    assert "1.png is not a readable image" in refusal(InputError, load_video, tmp_path / "f")
    Image.new("RGB", (8, 8)).save(tmp_path / "f/1.png", "JPEG")
    assert load_video(tmp_path / "f").frames.shape == (1, 8, 8, 3)


def test_very_low_frame_rates(tmp_path):
    clip = Clip(np.zeros((30, 8, 8, 3), np.uint8), 0.04)
    assert "too long for a GIF" in refusal(InputError, clip.save, tmp_path / "a.gif")
    path = clip.save(tmp_path / "a.mp4")
    assert load_video(path, frames=2, stride=4).fps == pytest.approx(0.01)
    assert "use stride=4 or less" in refusal(InputError, load_video, path, frames=2, stride=5)
    for fps in (0.0, 1e-9, 1001.0, float("nan"), float("inf")):
        assert "fps is " in refusal(InputError, Clip(clip.frames, fps).save, tmp_path / "b.mp4")
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_very_high_frame_rate(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=90_000)
        stream.height = stream.width = 16
        stream.pix_fmt = "yuv420p"
        for i in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 60 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = load_video(tmp_path / "a.mkv", frames=1)
    assert clip.fps <= 1000
    clip.save(tmp_path / "b.mp4")


# ------------------------------------------------------------------------------------------------------ random inputs


@pytest.mark.parametrize(("target", "count"), [("video", 60), ("weights", 24)])
def test_randomly_damaged_files_are_read_or_refused(target, count):
    if target == "weights":
        pytest.importorskip("torch")  # writes the .bin files
    result = fuzz(target, seconds=600, count=count, first=10**6)
    assert result["findings"] == {}
    assert result["tried"] == count
    assert result["refused"] > 0


# ------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a file system of two megabytes requires root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill_disk(place: Path, free: int) -> None:
    """Write a file that leaves `free` bytes of the disk."""
    disk = os.statvfs(place)
    (place / "filler").write_bytes(bytes(max(0, disk.f_bavail * disk.f_bsize - free)))


NOISE = Clip(np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8), 8.0)
STAGES = {
    "config": lambda sd1, run: run.write("config.json", "{}" + " " * 60_000),
    "edit.mp4": lambda sd1, run: publish_video(run, NOISE, "edits/a.mp4"),
    "edit.gif": lambda sd1, run: publish_video(run, NOISE, "edits/a.gif"),
    "clip.mp4": lambda sd1, run: NOISE.save(run.local / "edits/a.mp4"),
    "export": lambda sd1, run: sd1.tav.save_pretrained(run.local / "export"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("free", [0, 16_384])
def test_on_a_full_disk_existing_files_stay_unchanged(sd1, small_disk, stage, free):
    run = RunDirectory(small_disk / "run")
    run.create()
    run.write("config.json", "{}")
    run.write("edits/a.mp4", "before")
    run.write("edits/a.gif", "before")
    fill_disk(small_disk, free)
    before = contents(small_disk)
    assert "could not be written (no space left on device)" in refusal(InputError, STAGES[stage], sd1, run).lower()
    assert contents(small_disk) == before
    assert not [f for f in small_disk.rglob("*") if f.name.startswith(".")]
    (small_disk / "filler").unlink()
    if stage != "export":  # an export is larger than the disk
        STAGES[stage](sd1, run)
        assert contents(small_disk) != before


def test_on_a_full_disk_earlier_checkpoints_stay_valid(sd1, small_disk):
    _, trained, _ = nnx.split(sd1.tav.components.unet, train_step.trainable_filter(), ...)
    state = train_step.TrainState.create(trained)
    checkpoints = Checkpoints(small_disk / "checkpoints")
    checkpoints.save(1, state, {"fingerprint": "x"})
    checkpoints.wait()
    fill_disk(small_disk, 40_000)
    later = train_step.TrainState(jax.tree.map(lambda x: x + 1, state.params), state.opt_state)

    def save():
        checkpoints.save(2, later, {"fingerprint": "x"})
        checkpoints.wait()

    message = refusal(InputError, save)
    assert "the checkpoint of step 2 could not be written" in message
    assert "earlier ones are intact" in message
    again = Checkpoints(small_disk / "checkpoints")
    assert again.newest == 1
    found = again.restore(train_step.TrainState.create(trained)).params
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(state.params), strict=True):
        assert np.array_equal(ours, theirs)

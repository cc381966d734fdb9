"""What others made: weight files that lie, videos that are none, disks that are full, devices that are too small.

Each is refused by one sentence, in little time and memory, and what was there before stays as it was.
"""

import contextlib
import dataclasses
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import time
import zlib
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from fuzz import fuzz
from PIL import Image
from safetensors.numpy import load_file, save_file

from tav_jax.diffusion.schedule import NoiseSchedule, programs
from tav_jax.distributed import memory
from tav_jax.errors import InputError, MissingError, OutOfMemoryError, TavError, WeightsError
from tav_jax.io import decoding, tokenizer, video, weights
from tav_jax.io.diffusers_layout import Layout
from tav_jax.io.tensor_files import HEADER, tensors_in
from tav_jax.io.video import Clip, load_video
from tav_jax.io.weights import TOKENIZER_FILES
from tav_jax.models import VAE
from tav_jax.training import train_step
from tav_jax.training.checkpoint import Checkpoints
from tav_jax.training.loop import publish_video
from tav_jax.training.run_directory import RunDirectory

FILE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(sd1, tmp_path) -> Path:
    """A copy that may be spoiled."""
    shutil.copytree(sd1.model, tmp_path / "model")
    return tmp_path / "model"


def refusal(kind: type[TavError], call, *args, **options) -> str:
    with pytest.raises(kind) as caught:
        call(*args, **options)
    said = str(caught.value)
    assert said.isprintable(), said
    assert len(said) < 2500
    return said


def autoencoder(model: Path) -> VAE:
    """The smallest network of a pipeline, filled."""
    layout = Layout.open(model)
    vae = weights.abstract(VAE, layout.vae, jnp.float32)
    weights.fill(vae, model, "vae", lambda path: jnp.float32)
    return vae


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def write(folder: Path, header, data: bytes = b"", claim: int | None = None) -> Path:
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(told) if claim is None else claim) + told + data)
    return folder


def entry(shape, *place, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(place)}


# --------------------------------------------------------------------------------------------------- weight headers


def test_an_honest_header_is_read(tmp_path):
    """The same writer as below: what it writes is refused for what is wrong with it, and for nothing else."""
    table = {"../../a": entry([2, 2], 0, 16), "b": entry([], 16, 18, dtype="BF16"), "none": entry([0, 3], 18, 18)}
    data = np.arange(4, dtype=np.float32).tobytes() + b"\x80\x3f"
    found = {t.name: t for t in tensors_in(write(tmp_path / "w", {"__metadata__": {"format": "pt"}, **table}, data))}
    assert found["../../a"].read().tolist() == [[0, 1], [2, 3]]  # a name is a name, and never a path
    assert float(found["b"].read()) == 1.0
    assert found["none"].read().shape == (0, 3)


@pytest.mark.parametrize(
    ("header", "data", "claim", "said"),
    [
        ({}, 0, 2**32, "header claims 4294967296 bytes"),
        ({}, 0, 2**63, "header claims 9223372036854775808 bytes"),
        ({}, 0, 3, "header claims 3 bytes and the file has 10"),
        (b"", 0, None, "Expecting value"),
        (b"\xff\xfe{}", 0, None, "utf-8"),
        (b'{"a": ', 0, None, "Expecting value"),
        (b"[" * 50_000, 0, None, "nested too deeply"),
        (b"[]", 0, None, "its header is a list"),
        (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {}}', 4, None, "'a' is given twice"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, 4, None, "'b' begins at 0 where 4 was due"),
        ({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, 8, None, "'b' begins at 4 where 8 was due"),
        ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, None, "'b' begins at 8 where 4 was due"),
        ({"a": entry([4], 0, 16)}, 15, None, "tensors end at"),
        ({"a": entry([4], 0, 16)}, 17, None, "tensors end at"),
        ({"a": entry([3], 0, 16)}, 16, None, r"'a' is F32 \[3\] in 16 bytes"),
        ({"a": entry([10**18], 0, 16)}, 16, None, r"'a' is F32 \[10{18}\] in 16 bytes"),
        ({"a": entry([2**32, 2**32], 0, 0)}, 0, None, r"'a' is F32 \[4294967296, 4294967296\] in 0 bytes"),
        ({"a": entry([10**12], 0, 4 * 10**12)}, 16, None, "tensors end at 4000000000"),
        ({"a": entry([-1], 0, 4)}, 4, None, r"'a' has the shape \[-1\]"),
        ({"a": entry([1.0], 0, 4)}, 4, None, r"'a' has the shape \[1.0\]"),
        ({"a": entry([True], 0, 4)}, 4, None, r"'a' has the shape \[True\]"),
        ({"a": entry([1] * 99, 0, 4)}, 4, None, "'a' has the shape"),
        ({"a": entry([1], -4, 0)}, 4, None, r"'a' lies at \[-4, 0\]"),
        ({"a": entry([1], 4, 0)}, 4, None, r"'a' is F32 \[1\] in -4 bytes"),
        ({"a": entry([1], 0)}, 4, None, r"'a' lies at \[0\]"),
        ({"a": entry([1], 0, 4, dtype="F33")}, 4, None, "'a' is of the unknown type 'F33'"),
        ({"a": entry([1], 0, 4, dtype=["F32"])}, 4, None, "'a' is of the unknown type"),
        ({"a": {"dtype": "F32"}}, 4, None, "'a' has not just"),
        ({"x\ny" * 3000: 3}, 4, None, "has not just"),
    ],
)
def test_a_header_that_lies_is_refused_before_anything_is_read(tmp_path, header, data, claim, said):
    folder = write(tmp_path / "w", header, bytes(data), claim)
    before, began = contents(tmp_path), time.process_time()
    with pytest.raises(WeightsError, match=said) as caught:
        list(tensors_in(folder))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert time.process_time() - began < 5
    assert contents(tmp_path) == before


def test_a_header_of_4_gib_that_is_there_is_not_read(tmp_path):
    folder = tmp_path / "w"
    folder.mkdir()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2**32))
        file.truncate(2**32 + 8)  # sparse: it takes no room
    assert f"more than {HEADER}" in refusal(WeightsError, lambda: list(tensors_in(folder)))


def test_a_million_wrong_names_make_a_short_sentence(model):
    tensors = load_file(model / FILE)
    save_file({**tensors, **{f"no\nsuch{i}": np.zeros(1, np.float32) for i in range(5000)}}, model / FILE)
    said = refusal(WeightsError, autoencoder, model)
    assert "5000 unexpected: 'no\\nsuch0'" in said
    assert "and 4988 more" in said


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: x.astype(np.int64), "1 of a wrong type: encoder.conv_in.bias is I64, expected F64 or F32"),
        (lambda x: np.where(np.arange(len(x)) == 1, np.nan, x), "encoder.conv_in.bias holds values that are no"),
        (lambda x: x.astype(np.float64) + 1e300, "encoder.conv_in.bias holds values that are no"),
    ],
)
def test_values_that_are_no_weights(model, spoil, said):
    tensors = load_file(model / FILE)
    tensors["encoder.conv_in.bias"] = spoil(tensors["encoder.conv_in.bias"])
    save_file(tensors, model / FILE)
    assert said in refusal(WeightsError, autoencoder, model)


@pytest.mark.parametrize(
    "name",
    ["../unet/x.safetensors", "/etc/passwd", "..", ".", "", "a/b", "x\0", "x" * 4000, 3, None, ["a"], {"a": "b"}],
)
def test_an_index_names_only_what_lies_beside_it(tmp_path, name):
    index = write(tmp_path / "vae", {}) / "model.safetensors.index.json"
    (tmp_path / "vae/model.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    said = refusal(WeightsError, lambda: list(tensors_in(tmp_path / "vae")))
    assert "not a file beside it" in said or "is not an index of weight files" in said


@pytest.mark.parametrize("text", ["", "[", "[" * 50_000, "{}", '{"weight_map": []}', '{"weight_map": {}}', "\udcff"])
def test_an_index_that_is_none(tmp_path, text):
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "index.json" in refusal(WeightsError, lambda: list(tensors_in(folder)))


def test_a_link_beside_the_index_is_the_users_own(tmp_path):
    blobs = write(tmp_path / "blobs", {"a": entry([1], 0, 4)}, struct.pack("<f", 7.0))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/one.safetensors").symlink_to(blobs / "model.safetensors")
    (tmp_path / "vae/model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    assert [float(t.read()[0]) for t in tensors_in(tmp_path / "vae")] == [7.0]


# ---------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("unet", {"block_out_channels": [10**9] * 3}),
        ("unet", {"block_out_channels": list(range(8, 8 * 10_000, 8))}),
        ("unet", {"block_out_channels": [1, 1, 1], "norm_num_groups": 1, "attention_head_dim": 1}),
        ("unet", {"layers_per_block": 10**6}),
        ("unet", {"layers_per_block": 0}),
        ("unet", {"layers_per_block": True}),
        ("unet", {"norm_eps": float("inf")}),
        ("unet", {"norm_eps": float("nan")}),
        ("unet", {"norm_eps": -1e-5}),
        ("unet", {"freq_shift": "much"}),
        ("unet", {"freq_shift": 8}),
        ("unet", {"use_linear_projection": "false"}),
        ("unet", {"down_block_types": [[], {}, None]}),
        ("unet", {"attention_head_dim": None}),
        ("vae", {"down_block_types": 3}),
        ("vae", {"scaling_factor": 1e39}),
        ("vae", {"block_out_channels": [8] * 20}),
        ("text_encoder", {"num_hidden_layers": 10**6}),
        ("text_encoder", {"vocab_size": 10**12}),
        ("text_encoder", {"hidden_size": -24}),
        ("text_encoder", {"max_position_embeddings": 10**7}),
        ("text_encoder", {"hidden_act": [[[[1]]]]}),
    ],
)
def test_a_config_that_asks_for_the_absurd(model, part, changes):
    file = model / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    began = time.process_time()
    assert f"{part}/config.json: {next(iter(changes))} is " in refusal(WeightsError, Layout.open, model)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{" + " " * 2**21 + "}", "\udcff", '{"a":1,"a":1}'])
def test_a_config_that_is_made_to_annoy(model, text):
    (model / "unet/config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "unet/config.json is not a readable JSON file" in refusal(WeightsError, Layout.open, model)


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
def test_a_schedule_of_the_absurd(changes):
    assert "the scheduler's" in refusal(WeightsError, NoiseSchedule.from_config, changes)


def test_a_tokenizer_of_another_pipeline_or_of_none(sd1, model):
    tokenizer = tokenizer.load_tokenizer(model / "tokenizer")
    assert tokenizer.tokenize(tokenizer, ["red square"], 77, 530).max() < 530
    said = refusal(WeightsError, tokenizer.tokenize, tokenizer, ["red square"], 77, 300)
    assert "the text encoder has 300 words" in said
    for text in ("\ud800", "x" * 200_000):
        refusal(InputError, tokenizer.tokenize, tokenizer, [text], 77, 530)
    config = json.loads((model / "tokenizer/tokenizer_config.json").read_text())
    for wrong in ([[]], "long", None, {"a": 1}):
        (model / "tokenizer/tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": wrong}))
        with contextlib.suppress(WeightsError):  # None has a meaning there
            tokenizer.tokenize(tokenizer.load_tokenizer(model / "tokenizer"), ["red"], 77, 530)
    (model / "tokenizer/vocab.json").write_text("[" * 100_000)
    assert "not a readable CLIP tokenizer" in refusal(WeightsError, tokenizer.load_tokenizer, model / "tokenizer")


def test_an_export_passes_on_a_tokenizer_and_nothing_beside_it(sd1, tmp_path):
    """A downloaded folder may hold a link to anything; a person who exports it should not publish that."""
    shutil.copytree(sd1.model, tmp_path / "model")
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "model/tokenizer/notes.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "model/tokenizer/folder").mkdir()
    layout = dataclasses.replace(sd1.tav.components.layout, root=tmp_path / "model")
    weights.save(dataclasses.replace(sd1.tav.components, layout=layout), tmp_path / "out")
    written = {file.name for file in (tmp_path / "out/tokenizer").iterdir()}
    assert written == {file.name for file in (sd1.model / "tokenizer").iterdir()} <= set(TOKENIZER_FILES)
    assert not any(data == b"mine" for data in contents(tmp_path / "out").values())


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


# ------------------------------------------------------------------------------------------------- thousands of inputs


@pytest.mark.parametrize(("target", "count"), [("video", 60), ("weights", 24)])
def test_damaged_files_are_read_or_refused(target, count):
    if target == "weights":
        pytest.importorskip("torch")  # writes the pickles among them
    told = fuzz(target, seconds=600, count=count, first=10**6)
    assert told["findings"] == {}
    assert told["tried"] == count
    assert told["refused"] > 0


# ------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, of two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("a disk of two megabytes takes root's rights to mount one")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, free: int) -> None:
    """Leave so many bytes of the disk."""
    room = os.statvfs(place)
    (place / "filler").write_bytes(bytes(max(0, room.f_bavail * room.f_bsize - free)))


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
def test_a_full_disk_keeps_what_was_there(sd1, small_disk, stage, free):
    run = RunDirectory(small_disk / "run").create()
    run.write("config.json", "{}")
    run.write("edits/a.mp4", "before")
    run.write("edits/a.gif", "before")
    fill(small_disk, free)
    before = contents(small_disk)
    assert "could not be written (no space left on device)" in refusal(InputError, STAGES[stage], sd1, run).lower()
    assert contents(small_disk) == before
    assert not [f for f in small_disk.rglob("*") if f.name.startswith(".")]
    (small_disk / "filler").unlink()
    if stage != "export":  # which is larger than the disk
        STAGES[stage](sd1, run)
        assert contents(small_disk) != before


def test_a_full_disk_keeps_the_checkpoint_before(sd1, small_disk):
    _, trained, _ = nnx.split(sd1.tav.components.unet, train_step.trainable_filter(), ...)
    learner = train_step.TrainState.create(trained)
    checkpoints = Checkpoints(small_disk / "checkpoints")
    checkpoints.save(1, learner, {"fingerprint": "x"})
    checkpoints.wait()
    fill(small_disk, 40_000)
    later = train_step.TrainState(jax.tree.map(lambda x: x + 1, learner.params), learner.opt_state)

    def save():
        checkpoints.save(2, later, {"fingerprint": "x"})
        checkpoints.wait()

    said = refusal(InputError, save)
    assert "the checkpoint of step 2 could not be written" in said
    assert "earlier ones are intact" in said
    again = Checkpoints(small_disk / "checkpoints")
    assert again.newest == 1
    found = again.restore(train_step.TrainState.create(trained)).params
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(learner.params), strict=True):
        assert np.array_equal(ours, theirs)


# ------------------------------------------------------------------------------------------------- too little memory

CLIP = Clip(np.zeros((24, 64, 64, 3), np.uint8), 8.0)


def test_what_cannot_fit_is_refused_with_what_would(sd1, monkeypatch):
    """The offers are tried: each fits, and the next larger one does not."""
    tav = sd1.tav
    latents = jnp.zeros((1, 24, 16, 16, 4))
    work = tav.work("tuning on", latents, trained=10_000)
    whole = work.count(work.shape, 1)
    for share in (0.99, 0.7, 0.4):
        room = int(whole * share)
        monkeypatch.setenv(memory.OVERRIDE, str(room / 2**30))
        said = refusal(OutOfMemoryError, memory.check, work)
        assert said.startswith("tuning on 24 frames of 64×64 takes ")
        assert memory.OVERRIDE in said
        frames = int(said.split("use ")[1].split(" frame")[0])
        assert work.count(memory.Shape(frames, 64, 64), 1) <= room < work.count(memory.Shape(frames + 1, 64, 64), 1)
        side = int(said.split(" or ")[1 + ("more on" in said)].split("×")[0])
        assert side % 4 == 0
        assert work.count(memory.Shape(24, side, side), 1) <= room < work.count(memory.Shape(24, side + 4, side + 4), 1)
        devices = int(said.split(" devices")[0].split()[-1])
        assert work.count(work.shape, devices) <= room < work.count(work.shape, devices - 1)
    monkeypatch.setenv(memory.OVERRIDE, str((whole + 1000) / 2**30))
    memory.check(work)


def test_every_job_is_checked_before_it_begins(sd1, monkeypatch):
    tav, latents = sd1.tav, jnp.zeros((1, 24, 16, 16, 4))
    text = tav.encode_text("")
    jobs = {
        "tuning on": lambda: tav.tuning((latents, latents), text),
        "inverting": lambda: tav.invert(latents, steps=2),
        "sampling": lambda: tav.sample("x", latents=latents, steps=2),
        "encoding": lambda: tav.posterior(CLIP),
        "decoding": lambda: tav.decode_video(latents),
    }
    monkeypatch.setenv(memory.OVERRIDE, "0.0001")
    monkeypatch.setattr(tav, "encode_text", lambda _: text)
    for doing, job in jobs.items():
        assert refusal(OutOfMemoryError, job).startswith(f"{doing} 24 frames of 64×64 takes")
    assert "the weights of " in refusal(OutOfMemoryError, sd1.load)


def test_without_remat_remat_is_offered(sd1, monkeypatch):
    latents = jnp.zeros((1, 24, 16, 16, 4))
    plain = sd1.tav.work("tuning on", latents, trained=10_000, remat=False)
    thrifty = sd1.tav.work("tuning on", latents, trained=10_000)
    room = thrifty.count(thrifty.shape, 1)
    assert room < plain.count(plain.shape, 1)
    monkeypatch.setenv(memory.OVERRIDE, str((room + 1000) / 2**30))
    assert 'remat="block"' in refusal(OutOfMemoryError, memory.check, plain)


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), MemoryError()])
def test_memory_that_runs_out_all_the_same_is_one_sentence(sd1, monkeypatch, error):
    def full(*_, **__):
        raise error

    for name in ("denoise_loop", "decode_frames", "encode_frames"):
        monkeypatch.setattr(programs, name, full)
    monkeypatch.setattr(train_step, "tune_step", full)
    tav, latents = sd1.tav, jnp.zeros((1, 24, 16, 16, 4))
    learner, advance = tav.tuning((latents, latents), tav.encode_text(""))
    jobs = {
        "tuning on": lambda: advance(learner, 0),
        "inverting": lambda: tav.invert(latents, steps=2),
        "sampling": lambda: tav.sample("x", latents=latents, steps=2),
        "encoding": lambda: tav.posterior(CLIP),
        "decoding": lambda: tav.decode_video(latents),
    }
    for doing, job in jobs.items():
        said = refusal(OutOfMemoryError, job)
        assert said.startswith(f"memory ran out while {doing} 24 frames of 64×64 on this cpu; use ")


def test_other_errors_of_the_device_pass_through(sd1, monkeypatch):
    def broken(*_, **__):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(programs, "denoise_loop", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        sd1.tav.invert(np.zeros((1, 2, 8, 8, 4), np.float32), steps=2)


@pytest.mark.parametrize("told", ["much", "0", "-3", "nan", "inf"])
def test_a_size_of_memory_that_is_none(monkeypatch, told):
    monkeypatch.setenv(memory.OVERRIDE, told)
    assert memory.OVERRIDE in refusal(InputError, memory.capacity)


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.delenv(memory.OVERRIDE, raising=False)
    (tmp_path / "memory.max").write_text(f"{64 << 20}\n")
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "memory.max", tmp_path / "nowhere"))
    assert memory.capacity() == (64 << 20) // jax.local_device_count()
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.capacity() > 64 << 20


def test_a_folder_without_weights_is_missing(tmp_path):
    (tmp_path / "vae").mkdir()
    os.mkfifo(tmp_path / "vae/model.safetensors")  # which would be waited for
    assert "holds no weights" in refusal(MissingError, lambda: list(tensors_in(tmp_path / "vae")))

"""Fuzzing: thousands of damaged or invalid files, until a time limit.

python tests/fuzz.py weights --minutes=1
python tests/fuzz.py files --minutes=1
python tests/fuzz.py video --minutes=1
python tests/fuzz.py video --seed=4711 --count=1 --keep=found

Each input is generated from its seed alone, so `--seed` reproduces a finding. Inputs are read in a child process, so
that a crash of a C library, an endless loop or an excessive allocation does not end this one. An input may be read, or
refused with one sentence; anything else is a finding, and the exit status is then 1.
"""

import argparse
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from fractions import Fraction
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

SECONDS = 20  # of CPU time per input; the slowest valid one takes a tenth
MEMORY = 1 << 30  # bytes that one input may add; the largest valid one takes a tenth
BATCH = 200  # inputs per process; a new process has a low peak of memory again
REFERENCE = Path(__file__).parent / "reference"
HUGE = (0, 1, -1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**18, 10**30, -(10**18))
ODD = (None, True, "", "../x", "\0", "\n", [], {}, 0.5, -0.0, float("nan"), float("inf"), "F32", [[[[]]]], *HUGE)


def corrupt_bytes(data: bytes, rng: np.random.Generator, most: int = 24) -> bytes:
    """The data with some bytes changed, removed, duplicated or truncated."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 2 + rng.integers(most)))):
        if not data:
            break
        at = int(rng.integers(len(data)) * rng.random() ** rng.integers(3))  # prefers the header
        size = int(rng.integers(1, 64))
        match rng.integers(6):
            case 0 | 1:
                data[at] = rng.integers(256)
            case 2:
                data[at] ^= 1 << rng.integers(8)
            case 3:
                data[at : at + 4] = struct.pack(">I", int(rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 60000])))
            case 4:
                data[at : at + size] = b""
            case 5:
                data[at:at] = data[at : at + size]
    if rng.random() < 0.2:
        del data[int(rng.integers(len(data) + 1)) :]
    return bytes(data)


def corrupt_json(value, rng: np.random.Generator, chance: float):
    """A JSON value with some of its leaves, names and branches replaced by odd values."""
    if rng.random() < chance:
        odd = ODD[rng.integers(len(ODD))]
        return [odd] * int(rng.integers(1, 5)) if rng.random() < 0.2 else odd
    if isinstance(value, dict):
        out = {}
        for name, inner in value.items():
            roll = rng.random()
            if roll < chance / 2:
                continue
            key = name if roll > chance else f"{name}{'../' * int(rng.integers(3))}{rng.integers(9)}"
            out[key] = corrupt_json(inner, rng, chance)
        return out
    if isinstance(value, list):
        return [corrupt_json(inner, rng, chance) for inner in value]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < chance:
        return int(value) + int(rng.integers(-3, 4))
    return value


# --------------------------------------------------------------------------------------------------------- weights


def write_weights(rng: np.random.Generator, directory: Path) -> None:
    """Write a pipeline directory in which one or two files are damaged."""
    shutil.copytree(REFERENCE / str(rng.choice(["sd1", "sd2"])) / "model", directory, dirs_exist_ok=True)
    kinds = [("header", "bytes"), ("header", "index"), ("header", "pickle"), ("config",), ("config",)]
    parts = ("unet", "vae", "text_encoder", "", "")
    for at in rng.permutation(5)[: int(rng.integers(1, 3))]:
        part = directory / parts[at]
        match str(rng.choice(kinds[at])):
            case "header":
                _corrupt_header(rng, next(part.glob("*.safetensors")))
            case "bytes":
                file = next(part.glob("*.safetensors"))
                file.write_bytes(corrupt_bytes(file.read_bytes(), rng))
            case "index":
                _corrupt_index(rng, part)
            case "pickle":
                _corrupt_pickle(rng, part)
            case "config":
                file = rng.choice(sorted(directory.glob("*/*config.json"))[at % 2 :: 2])
                text = json.dumps(corrupt_json(json.loads(file.read_text()), rng, 0.15)).encode()
                file.write_bytes(corrupt_bytes(text, rng, 4) if rng.random() < 0.2 else text)


def _corrupt_header(rng: np.random.Generator, file: Path) -> None:
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = whole[8 : 8 + length], whole[8 + length :]
    match rng.integers(5):
        case 0:  # corrupt a few entries
            table = json.loads(header)
            for name in rng.choice(sorted(table), int(rng.integers(1, 4))):
                table[str(name)] = corrupt_json(table[str(name)], rng, 0.4)
            header = json.dumps(table).encode()
        case 1:  # swap the positions, shapes or dtypes of two tensors
            table = json.loads(header)
            one, two = (str(name) for name in rng.choice(sorted(set(table) - {"__metadata__"}), 2))
            what = str(rng.choice(["shape", "dtype", "data_offsets"]))
            table[one][what], table[two][what] = table[two][what], table[one][what]
            table[one]["dtype"] = str(rng.choice(["F32", "I64", "F8_E4M3", "F4", "BOOL", "BF16", "C64", "F33"]))
            header = json.dumps(table).encode()
        case 2:
            header = corrupt_bytes(header, rng)
        case 3:  # repeat an entry, or put it in another place
            header = header.rstrip()[:-1] + b"," + header[1 : int(rng.integers(2, 400))]
            header = header[: header.rfind(b"}") + 1] + b"}"
        case 4:
            data = corrupt_bytes(data, rng) if rng.random() < 0.5 else data + bytes(int(rng.integers(1, 99)))
    claim = len(header) if rng.random() < 0.9 else int(rng.choice([0, 1, 2**31, 2**32, 2**40, 2**62]))
    file.write_bytes(struct.pack("<Q", claim) + header + data)


def _corrupt_index(rng: np.random.Generator, directory: Path) -> None:
    file = next(directory.glob("*.safetensors"))
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    file.rename(directory / shard)
    names = ["../unet/diffusion_pytorch_model.safetensors", "/etc/passwd", "..", ".", "", "\0", "x" * 5000, shard]
    names += ["config.json", 3, None, [shard], {}, "a/b", "C:\\x", "\ud800", shard + "/"]
    chosen = [names[i] for i in rng.integers(len(names), size=int(rng.integers(0, 4)))]
    table = {"weight_map": {f"t{i}": name for i, name in enumerate([*chosen, shard])}}
    text = json.dumps(corrupt_json(table, rng, 0.1)).encode()
    (directory / "diffusion_pytorch_model.safetensors.index.json").write_bytes(text)


def _corrupt_pickle(rng: np.random.Generator, directory: Path) -> None:
    import torch
    from safetensors.torch import load_file

    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    name = str(rng.choice(sorted(tensors)))
    wrong = {
        "sparse": lambda x: x.to_sparse(),
        "learned": lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x,
        "complex": lambda x: x.to(torch.complex64),
        "meta": lambda x: x.to("meta"),
        "stretched": lambda x: x.reshape(-1)[:1].expand(10**9, 10**9),
        "byte": lambda x: x.to(torch.uint8),
        "nested": lambda x: [x],
        "half": lambda x: x.to(torch.bfloat16),
    }
    tensors[name] = wrong[str(rng.choice(list(wrong)))](tensors[name])
    if rng.random() < 0.1:
        tensors[7] = tensors.pop(name)
    old = bool(rng.random() < 0.5)
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    file.unlink()
    if rng.random() < 0.6:
        file = directory / "pytorch_model.bin"
        file.write_bytes(corrupt_bytes(file.read_bytes(), rng))


def read_weights(directory: Path) -> None:
    """Read the configs and every tensor. For one input in eight, which takes a second, also build the networks."""
    from tav_jax import TuneAVideo
    from tav_jax.diffusion.schedule import NoiseSchedule
    from tav_jax.io.diffusers_layout import Layout
    from tav_jax.io.tensor_files import FLOAT_DTYPES, iter_tensors

    layout = Layout.open(directory)
    NoiseSchedule.from_config(layout.configs["scheduler"])
    parts = ("unet", "vae", "text_encoder")
    found = [(part, tensor) for part in parts for tensor in iter_tensors(directory / part)]
    if sum(math.prod(tensor.shape) for _, tensor in found) % 8 == 0:
        TuneAVideo.from_pretrained(directory, dtype="float32").tokenize(["red square"])
    for _, tensor in found:
        if tensor.dtype in FLOAT_DTYPES and math.prod(tensor.shape) < 10**8:
            assert tensor.read().shape == tensor.shape


# ------------------------------------------------------------------------------------------- single files and LoRA


def write_file(rng: np.random.Generator, directory: Path) -> None:
    """Write a damaged or mislabelled single file, or such a LoRA file."""
    from original_layout import original_tensors
    from safetensors.numpy import save_file

    file = directory / "model.safetensors"
    if rng.random() < 0.5:
        save_file(original_tensors(REFERENCE / "sd1" / "model"), file)
    else:
        layer, tensors = "unet.mid_block.attentions.0.transformer_blocks.0.attn{}.to_{}", {}
        for name in (layer.format(i, kind) for i in (1, 2) for kind in "qkv"):
            tensors[f"{name}.lora_A.weight"] = rng.normal(size=(3, 24 if "2.to_" in name else 32)).astype(np.float32)
            tensors[f"{name}.lora_B.weight"] = np.ones((32, 3), np.float16)
            tensors[f"{name}.alpha"] = np.ones((), np.float32)
        save_file(tensors, file, {"lora_adapter_metadata": '{"unet.lora_alpha": 3}'})
    match rng.integers(3):
        case 0:
            _corrupt_header(rng, file)
        case 1:
            file.write_bytes(corrupt_bytes(file.read_bytes(), rng))
        case 2:
            _corrupt_pickle(rng, directory)
            (directory / "pytorch_model.bin").rename(file)
    file.rename(directory / str(rng.choice(["model.safetensors", "model.ckpt"], p=[0.4, 0.6])))


def read_file(directory: Path) -> None:
    """Load the file, as a model or a LoRA for one."""
    from tav_jax.io import lora, single_file, weights
    from tav_jax.io.tensor_files import iter_file

    (file,) = directory.glob("model.*")
    model = REFERENCE / "sd1" / "model"
    if any("lora_" in tensor.name for tensor in iter_file(file)):
        layout, loras = single_file.open_layout(model), lora.open_loras([file])
    else:
        layout, loras = single_file.open_layout(file, config=model), []
    weights.Components.load(layout, np.float32, float32_filter=lambda path, value: True, loras=loras)


# ----------------------------------------------------------------------------------------------------------- video


def _valid_clips() -> list[tuple[str, bytes]]:
    """The name and content of a small clip in each format, one of them with audio."""
    import av
    from PIL import Image

    from tav_jax import Clip
    from tav_jax.io.video import Audio

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 48, 64, 3), np.uint8)
    frames = np.concatenate([np.roll(image, 2 * i, axis=2) for i in range(12)])
    audio = Audio(np.sin(np.arange(24000) / 9, dtype=np.float32)[None] / 2, 24000, "mono")
    formats = {
        "b.mp4": ("mpeg4", "yuv420p"),
        "hevc.mp4": ("libx265", "yuv420p"),
        "wide.mp4": ("libx264", "yuv420p"),
        "a.mkv": ("ffv1", "yuv420p"),
        "a.webm": ("libvpx", "yuv420p"),
        "vp9.webm": ("libvpx-vp9", "yuv420p"),
        "a.avi": ("mjpeg", "yuvj420p"),
        "a.ts": ("mpeg2video", "yuv420p"),
        "a.mov": ("prores", "yuv422p10le"),
        "a.flv": ("flv1", "yuv420p"),
        "a.asf": ("wmv2", "yuv420p"),
        "huff.avi": ("huffyuv", "yuv422p"),
        "a.apng": ("apng", "rgb24"),
    }
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        files = [Clip(frames, 12.0, audio).save(root / "a.mp4"), Clip(frames, 10.0).save(root / "a.gif")]
        for name, (codec, pix_fmt) in formats.items():
            if codec not in av.codecs_available:
                continue
            with av.open(str(root / name), "w") as container:
                stream = container.add_stream(codec, rate=12)
                stream.height, stream.width, stream.pix_fmt = 48, 64, pix_fmt
                if name == "wide.mp4":
                    stream.codec_context.sample_aspect_ratio = Fraction(64, 45)
                for frame in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
            files.append(root / name)
        for suffix in ("png", "jpg", "webp", "bmp", "tif"):
            Image.fromarray(frames[0]).save(root / f"1.{suffix}")
            files.append(root / f"1.{suffix}")
        return [(file.name, file.read_bytes()) for file in files]


def write_video(rng: np.random.Generator, directory: Path, clips: list = []) -> None:  # noqa: B006
    """Write a video, or a directory with one image, that is damaged or has the wrong suffix."""
    clips += [] if clips else _valid_clips()
    name, data = clips[rng.integers(len(clips))]
    suffix = name[1:] if rng.random() < 0.9 else str(rng.choice([".mp4", ".gif", ".txt", ".mkv", ""]))
    if name.startswith("1."):
        directory /= "clip"
        directory.mkdir()
    if rng.random() < 0.03:
        data = rng.bytes(int(rng.integers(5000))) if rng.random() < 0.5 else data[:12] * 400
    (directory / f"{name[0]}{suffix}").write_bytes(corrupt_bytes(data, rng))


def read_video(directory: Path) -> None:
    from tav_jax import load_video

    (path,) = directory.iterdir()
    size = path.stat().st_size if path.is_file() else 0
    options = [{"frames": 4, "size": (32, 32)}, {"frames": 3, "stride": 3, "start": 1}, {}][size % 3]
    clip = load_video(path, **options)
    assert clip.frames.dtype == np.uint8
    assert clip.frames.ndim == 4
    assert 0 < clip.fps <= 1000
    clip.save(directory / "again.mp4")


# ---------------------------------------------------------------------------------------------------------- the fuzzer

TARGETS = {
    "weights": (write_weights, read_weights),
    "files": (write_file, read_file),
    "video": (write_video, read_video),
}


def _try_input(target: str, seed: int, keep: Path | None) -> str:
    """The result for one input: "read", "refused", or a description of what went wrong."""
    from tav_jax.errors import TavError

    write, read = TARGETS[target]
    scratch = Path(tempfile.mkdtemp(prefix="tav_fuzz_"))
    directory = scratch / "input"
    directory.mkdir()
    try:
        write(np.random.default_rng(seed), directory)
        if keep:
            shutil.copytree(directory, keep / f"{target}-{seed}", dirs_exist_ok=True)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # CPU time, so that a busy machine causes no finding
        try:
            read(directory)
            result = "read"
        except TavError as error:
            message = str(error)
            is_sentence = bool(message) and message.isprintable() and len(message) < 4000
            result = "refused" if is_sentence else f"not one sentence: {message[:300]!r}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if added > MEMORY:
            result = f"{added >> 20} MiB of memory ({result})"
        if time.process_time() - began > SECONDS:
            result = f"too slow ({result})"
        return result
    except BaseException as error:  # every other exception is a finding
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]!r} at {Path(last.filename).name}:{last.lineno}"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _try_inputs(target: str, seeds: range, deadline: float, keep: Path | None, connection) -> None:
    """The child process. Sends (seed, None) before each input and (seed, result) after it."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for seed in seeds:
        if time.time() > deadline:
            return
        connection.send((seed, None))
        connection.send((seed, _try_input(target, seed, keep)))


def fuzz(target: str, *, seconds: float, first: int = 0, count: int | None = None, keep: Path | None = None) -> dict:
    """The number of inputs tried, read and refused, and the findings: seed → what went wrong."""
    deadline = time.time() + seconds
    last = first + count if count is not None else sys.maxsize
    tally: Counter[str] = Counter()
    findings: dict[int, str] = {}
    start, spawn = first, multiprocessing.get_context("spawn")
    while time.time() < deadline and start < last:
        receiver, sender = spawn.Pipe(duplex=False)
        seeds = range(start, min(start + BATCH, last))
        child = spawn.Process(target=_try_inputs, args=(target, seeds, deadline, keep, sender))
        child.start()
        sender.close()
        current = None
        try:
            while True:
                if not receiver.poll(10 * SECONDS):
                    child.kill()
                seed, result = receiver.recv()
                start, current = seed + 1, seed if result is None else None
                if result in ("read", "refused"):
                    tally[result] += 1
                elif result is not None:
                    findings[seed] = result
                    print(f"{target} --seed={seed}: {result}", flush=True)
        except EOFError:
            pass
        child.join()
        if current is not None:
            findings[current] = f"the process ended with {child.exitcode}"
            print(f"{target} --seed={current}: {findings[current]}", flush=True)
    tried = sum(tally.values()) + len(findings)
    return {"tried": tried, **tally, "findings": findings, "next": start}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first input (default: 0)")
    parser.add_argument("--count", type=int, help="number of inputs, instead of --minutes")
    parser.add_argument("--keep", type=Path, help="a directory in which to keep the inputs")
    args = parser.parse_args()
    seconds = args.minutes * 60 if args.count is None else float("inf")
    results = fuzz(args.target, seconds=seconds, first=args.seed, count=args.count, keep=args.keep)
    findings = results.pop("findings")
    print(f"{args.target}: {results}, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

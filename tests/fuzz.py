"""Damaged and invented files by the thousand, until the clock says stop.

python tests/fuzz.py weights --minutes=1
python tests/fuzz.py video --minutes=1
python tests/fuzz.py video --seed=4711 --count=1 --keep=found

Inputs are drawn from their numbers alone, so that a finding is repeated by its `--seed`. They are read in a process of
their own, watched from outside: whatever happens in there (a crash of a C library, a loop, a flood of memory), this one
lives to tell. An input may be read, or be refused by one sentence of ours; anything else is a finding, and the exit
status then is 1.
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
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

SECONDS = 20  # for one input; the slowest honest one takes a tenth
MEMORY = 1 << 30  # bytes that one input may add; the largest honest one takes a tenth
BATCH = 200  # inputs a process; a fresh one then begins, so that its memory says something
REFERENCE = Path(__file__).parent / "reference"
HUGE = (0, 1, -1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**18, 10**30, -(10**18))
ODD = (None, True, "", "../x", "\0", "\n", [], {}, 0.5, -0.0, float("nan"), float("inf"), "F32", [[[[]]]], *HUGE)


def flipped(data: bytes, draw: np.random.Generator, most: int = 24) -> bytes:
    """Some bytes of it changed, cut out, doubled or cut off: the usual ways to be damaged, a few at once."""
    data = bytearray(data)
    for _ in range(int(draw.integers(1, 2 + draw.integers(most)))):
        if not data:
            break
        at = int(draw.integers(len(data)) * draw.random() ** draw.integers(3))  # headers more often than the rest
        size = int(draw.integers(1, 64))
        match draw.integers(6):
            case 0 | 1:
                data[at] = draw.integers(256)
            case 2:
                data[at] ^= 1 << draw.integers(8)
            case 3:
                data[at : at + 4] = struct.pack(">I", int(draw.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 60000])))
            case 4:
                data[at : at + size] = b""
            case 5:
                data[at:at] = data[at : at + size]
    if draw.random() < 0.2:
        del data[int(draw.integers(len(data) + 1)) :]
    return bytes(data)


def distorted(value, draw: np.random.Generator, chance: float):
    """A JSON value with some of its leaves, names and branches replaced by odd ones."""
    if draw.random() < chance:
        odd = ODD[draw.integers(len(ODD))]
        return [odd] * int(draw.integers(1, 5)) if draw.random() < 0.2 else odd
    if isinstance(value, dict):
        out = {}
        for name, inner in value.items():
            roll = draw.random()
            if roll < chance / 2:
                continue
            key = name if roll > chance else f"{name}{'../' * int(draw.integers(3))}{draw.integers(9)}"
            out[key] = distorted(inner, draw, chance)
        return out
    if isinstance(value, list):
        return [distorted(inner, draw, chance) for inner in value]
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < chance:
        return int(value) + int(draw.integers(-3, 4))
    return value


# --------------------------------------------------------------------------------------------------------- weights


def weight_files(draw: np.random.Generator, folder: Path) -> None:
    """A pipeline directory of which one file, or two, are not what they should be."""
    shutil.copytree(REFERENCE / str(draw.choice(["sd1", "sd2"])) / "model", folder, dirs_exist_ok=True)
    kinds = [("header", "bytes"), ("header", "index"), ("header", "pickle"), ("config",), ("config",)]
    parts = ("unet", "vae", "text_encoder", "", "")
    for at in draw.permutation(5)[: int(draw.integers(1, 3))]:
        part = folder / parts[at]
        match str(draw.choice(kinds[at])):
            case "header":
                _spoil_header(draw, next(part.glob("*.safetensors")))
            case "bytes":
                file = next(part.glob("*.safetensors"))
                file.write_bytes(flipped(file.read_bytes(), draw))
            case "index":
                _spoil_index(draw, part)
            case "pickle":
                _spoil_pickle(draw, part)
            case "config":
                file = draw.choice(sorted(folder.glob("*/*config.json"))[at % 2 :: 2])
                told = json.dumps(distorted(json.loads(file.read_text()), draw, 0.15)).encode()
                file.write_bytes(flipped(told, draw, 4) if draw.random() < 0.2 else told)


def _spoil_header(draw: np.random.Generator, file: Path) -> None:
    whole = file.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, data = whole[8 : 8 + length], whole[8 + length :]
    match draw.integers(5):
        case 0:  # one entry, or a few, distorted
            table = json.loads(header)
            for name in draw.choice(sorted(table), int(draw.integers(1, 4))):
                table[str(name)] = distorted(table[str(name)], draw, 0.4)
            header = json.dumps(table).encode()
        case 1:  # two tensors change places, shapes or types
            table = json.loads(header)
            one, two = (str(name) for name in draw.choice(sorted(set(table) - {"__metadata__"}), 2))
            what = str(draw.choice(["shape", "dtype", "data_offsets"]))
            table[one][what], table[two][what] = table[two][what], table[one][what]
            table[one]["dtype"] = str(draw.choice(["F32", "I64", "F8_E4M3", "F4", "BOOL", "BF16", "C64", "F33"]))
            header = json.dumps(table).encode()
        case 2:
            header = flipped(header, draw)
        case 3:  # an entry twice, or in another's place
            header = header.rstrip()[:-1] + b"," + header[1 : int(draw.integers(2, 400))]
            header = header[: header.rfind(b"}") + 1] + b"}"
        case 4:
            data = flipped(data, draw) if draw.random() < 0.5 else data + bytes(int(draw.integers(1, 99)))
    claim = len(header) if draw.random() < 0.9 else int(draw.choice([0, 1, 2**31, 2**32, 2**40, 2**62]))
    file.write_bytes(struct.pack("<Q", claim) + header + data)


def _spoil_index(draw: np.random.Generator, folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    file.rename(folder / shard)
    names = ["../unet/diffusion_pytorch_model.safetensors", "/etc/passwd", "..", ".", "", "\0", "x" * 5000, shard]
    names += ["config.json", 3, None, [shard], {}, "a/b", "C:\\x", "\ud800", shard + "/"]
    chosen = [names[i] for i in draw.integers(len(names), size=int(draw.integers(0, 4)))]
    table = {"weight_map": {f"t{i}": name for i, name in enumerate([*chosen, shard])}}
    told = json.dumps(distorted(table, draw, 0.1)).encode()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_bytes(told)


def _spoil_pickle(draw: np.random.Generator, folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = str(draw.choice(sorted(tensors)))
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
    tensors[name] = wrong[str(draw.choice(list(wrong)))](tensors[name])
    if draw.random() < 0.1:
        tensors[7] = tensors.pop(name)
    old = bool(draw.random() < 0.5)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    file.unlink()
    if draw.random() < 0.6:
        file = folder / "pytorch_model.bin"
        file.write_bytes(flipped(file.read_bytes(), draw))


def read_weights(folder: Path) -> None:
    """Configs and every tensor; of some, for it takes a second, the networks made of them as well."""
    from tav_jax import TuneAVideo
    from tav_jax.diffusion.schedule import NoiseSchedule
    from tav_jax.io.diffusers_layout import Layout
    from tav_jax.io.tensor_files import FLOATS, tensors_in

    layout = Layout.open(folder)
    NoiseSchedule.from_config(layout.configs["scheduler"])
    parts = ("unet", "vae", "text_encoder")
    found = [(part, tensor) for part in parts for tensor in tensors_in(folder / part)]
    if sum(math.prod(tensor.shape) for _, tensor in found) % 8 == 0:
        TuneAVideo.from_pretrained(folder, dtype="float32").tokenize(["red square"])
    for _, tensor in found:
        if tensor.kind in FLOATS and math.prod(tensor.shape) < 10**8:
            assert tensor.read().shape == tensor.shape


# ----------------------------------------------------------------------------------------------------------- video


def _clips() -> list[tuple[str, bytes]]:
    """A small whole clip of each kind, with sound where the kind has any."""
    import av
    from PIL import Image

    from tav_jax import Clip
    from tav_jax.io.video import Audio

    draw = np.random.default_rng(0)
    still = draw.integers(0, 256, (1, 48, 64, 3), np.uint8)
    frames = np.concatenate([np.roll(still, 2 * i, axis=2) for i in range(12)])
    sound = Audio(np.sin(np.arange(24000) / 9, dtype=np.float32)[None] / 2, 24000, "mono")
    made = []
    with tempfile.TemporaryDirectory() as place:
        made += [Clip(frames, 12.0, sound).save(Path(place) / "a.mp4"), Clip(frames, 10.0).save(Path(place) / "a.gif")]
        kinds = {
            "b.mp4": ("mpeg4", "yuv420p"),
            "hevc.mp4": ("libx265", "yuv420p"),
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
        for name, (codec, pixels) in kinds.items():
            if codec not in av.codecs_available:
                continue
            with av.open(str(Path(place) / name), "w") as container:
                stream = container.add_stream(codec, rate=12)
                stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
                for picture in frames:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                container.mux(stream.encode())
            made.append(Path(place) / name)
        for suffix in ("png", "jpg", "webp", "bmp", "tif"):
            Image.fromarray(frames[0]).save(Path(place) / f"1.{suffix}")
            made.append(Path(place) / f"1.{suffix}")
        return [(file.name, file.read_bytes()) for file in made]


def video_files(draw: np.random.Generator, folder: Path, clips: list = []) -> None:  # noqa: B006
    """A clip, or a folder with a picture, that is damaged, or calls itself what it is not."""
    clips += [] if clips else _clips()
    name, data = clips[draw.integers(len(clips))]
    kind = name[1:] if draw.random() < 0.9 else str(draw.choice([".mp4", ".gif", ".txt", ".mkv", ""]))
    if name.startswith("1."):
        folder /= "clip"
        folder.mkdir()
    if draw.random() < 0.03:
        data = draw.bytes(int(draw.integers(5000))) if draw.random() < 0.5 else data[:12] * 400
    (folder / f"{name[0]}{kind}").write_bytes(flipped(data, draw))


def read_video(folder: Path) -> None:
    from tav_jax import load_video

    (path,) = folder.iterdir()
    number = path.stat().st_size if path.is_file() else 0
    wanted = [{"frames": 4, "size": (32, 32)}, {"frames": 3, "stride": 3, "start": 1}, {}][number % 3]
    clip = load_video(path, **wanted)
    assert clip.frames.dtype == np.uint8
    assert clip.frames.ndim == 4
    assert 0 < clip.fps <= 1000
    clip.save(folder / "again.mp4")


# ---------------------------------------------------------------------------------------------------- the machinery

TARGETS = {"weights": (weight_files, read_weights), "video": (video_files, read_video)}


def _one(target: str, seed: int, keep: Path | None) -> str:
    """What came of one input: "read", "refused", or what was wrong."""
    from tav_jax.errors import TavError

    make, read = TARGETS[target]
    place = Path(tempfile.mkdtemp(prefix="tav_fuzz_"))
    folder = place / "input"
    folder.mkdir()
    try:
        make(np.random.default_rng(seed), folder)
        if keep:
            shutil.copytree(folder, keep / f"{target}-{seed}", dirs_exist_ok=True)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor's, so that a busy machine is no finding
        try:
            read(folder)
            result = "read"
        except TavError as error:
            result = "refused" if _is_a_sentence(str(error)) else f"no sentence: {str(error)[:300]!r}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > MEMORY:
            result = f"{grown >> 20} MiB of memory ({result})"
        if time.process_time() - began > SECONDS:
            result = f"too slow ({result})"
        return result
    except BaseException as error:  # a finding, of whatever class
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:200]!r} at {Path(last.filename).name}:{last.lineno}"
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _is_a_sentence(said: str) -> bool:
    return bool(said) and said.isprintable() and len(said) < 4000


def _many(target: str, seeds: range, until: float, keep: Path | None, out) -> None:
    """In a process of its own: says each number before it begins, and what came of it."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for seed in seeds:
        if time.time() > until:
            return
        out.send((seed, None))
        out.send((seed, _one(target, seed, keep)))


def fuzz(target: str, *, seconds: float, first: int = 0, count: int | None = None, keep: Path | None = None) -> dict:
    """How many inputs were tried, read and refused, and the findings: number → what was wrong."""
    until = time.time() + seconds
    last = first + count if count is not None else sys.maxsize
    tally: Counter[str] = Counter()
    findings: dict[int, str] = {}
    start, spawn = first, multiprocessing.get_context("spawn")
    while time.time() < until and start < last:
        ours, theirs = spawn.Pipe(duplex=False)
        work = spawn.Process(target=_many, args=(target, range(start, min(start + BATCH, last)), until, keep, theirs))
        work.start()
        theirs.close()
        current = None
        try:
            while True:
                if not ours.poll(10 * SECONDS):
                    work.kill()
                seed, result = ours.recv()
                start, current = seed + 1, seed if result is None else None
                if result in ("read", "refused"):
                    tally[result] += 1
                elif result is not None:
                    findings[seed] = result
                    print(f"{target} --seed={seed}: {result}", flush=True)
        except EOFError:
            pass
        work.join()
        if current is not None:
            findings[current] = f"the process ended with {work.exitcode}"
            print(f"{target} --seed={current}: {findings[current]}", flush=True)
    tried = sum(tally.values()) + len(findings)
    return {"tried": tried, **tally, "findings": findings, "next": start}


def main() -> int:
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("target", choices=list(TARGETS))
    about.add_argument("--minutes", type=float, default=1.0)
    about.add_argument("--seed", type=int, default=0, help="the first input's number (default: 0)")
    about.add_argument("--count", type=int, help="how many inputs, if not as many as the minutes allow")
    about.add_argument("--keep", type=Path, help="a folder for the inputs, to look at them")
    given = about.parse_args()
    seconds = given.minutes * 60 if given.count is None else float("inf")
    told = fuzz(given.target, seconds=seconds, first=given.seed, count=given.count, keep=given.keep)
    findings = told.pop("findings")
    print(f"{given.target}: {told}, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

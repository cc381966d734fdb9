"""Watch a long `tav train` from outside: does anything grow?

python benchmarks/long_run.py --steps=5000 --out=benchmarks/long_run.svg

The tests' tiny pipeline learns a clip, with a checkpoint every 250 steps and previews every 500. Once a second is
written down: resident memory, open files, steps done, programs compiled. The summary compares the run's second quarter
with its last one, and the picture shows the whole. The exit status is 1 where something grew: memory by more than 2 %
(or 10 MiB), any open file, any program after the first preview, the time of a step by more than a half.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

MODEL = Path(__file__).parent.parent / "tests" / "reference" / "sd1" / "model"
PREVIEWS, CHECKPOINTS = 500, 250
COMPILED = "Finished XLA compilation"


class Look(NamedTuple):
    seconds: float
    memory: float  # MiB
    files: int
    steps: int
    programs: int


def command(clip: Path, workdir: Path, steps: int) -> list[str]:
    settings = {
        "model.path": MODEL,
        "model.dtype": "float32",
        "clip.path": clip,
        "clip.prompt": "a square is moving",
        "clip.frames": 4,
        "clip.height": 32,
        "clip.width": 32,
        "train.steps": steps,
        "train.checkpoint_every": CHECKPOINTS,
        "train.preview_every": PREVIEWS,
        "edit.prompts": ("a blue square",),
        "edit.steps": 4,
        "edit.inversion_steps": 4,
    }
    line = [sys.executable, "-m", "tav_jax", "train", f"--workdir={workdir}"]
    return [*line, *(f"--config.{name}={value}" for name, value in settings.items())]


def write_clip(file: Path) -> Path:
    from tav_jax import Clip

    frames = np.full((4, 32, 32, 3), 60, np.uint8)
    for i, frame in enumerate(frames):
        frame[8:20, 3 + 4 * i : 15 + 4 * i] = (220, 40, 40)
    return Clip(frames, 10.0).save(file)


def look(pid: int, since: float, log: Path, metrics: Path) -> Look:
    status = Path(f"/proc/{pid}/status").read_text()
    memory = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    programs = log.read_text(errors="replace").count(COMPILED)
    return Look(time.time() - since, memory / 1024, len(os.listdir(f"/proc/{pid}/fd")), steps, programs)


def watch(steps: int, place: Path, every: float = 1.0) -> list[Look]:
    log, workdir, looks = place / "log", place / "run", []
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(place / "cache")
    with log.open("wb") as heard:
        line = command(write_clip(place / "clip.mp4"), workdir, steps)
        process = subprocess.Popen(line, env=environment, stdout=heard, stderr=heard)
        started = time.time()
        while process.poll() is None:
            try:
                looks.append(look(process.pid, started, log, workdir / "metrics.jsonl"))
            except (FileNotFoundError, ProcessLookupError, StopIteration):  # it has just ended
                break
            time.sleep(every)
        process.wait()
    if process.returncode:
        raise SystemExit(log.read_text(errors="replace")[-3000:])
    return looks


class Quarter(NamedTuple):
    memory: float
    files: float
    milliseconds: float  # a step, previews and checkpoints included
    programs: int


def quarter(looks: list[Look], number: int, steps: int) -> Quarter:
    inside = [x for x in looks if (number - 1) * steps / 4 <= x.steps <= number * steps / 4 and x.steps > 0]
    first, last = inside[0], inside[-1]
    return Quarter(
        statistics.median(x.memory for x in inside),
        statistics.median(x.files for x in inside),
        1000 * (last.seconds - first.seconds) / max(last.steps - first.steps, 1),
        last.programs,
    )


def grown(early: Quarter, late: Quarter) -> list[str]:
    found = []
    if late.memory > max(1.02 * early.memory, early.memory + 10):
        found.append(f"memory, from {early.memory:.0f} to {late.memory:.0f} MiB")
    if late.files > early.files:
        found.append(f"open files, from {early.files:.0f} to {late.files:.0f}")
    if late.milliseconds > 1.5 * early.milliseconds:
        found.append(f"a step, from {early.milliseconds:.1f} to {late.milliseconds:.1f} ms")
    if late.programs > early.programs:
        found.append(f"compiled programs, from {early.programs} to {late.programs}")
    return found


def picture(looks: list[Look]) -> str:
    """Four curves over the time of the run, each from zero."""
    wide, high, left = 720, 110, 90
    curves = (
        ("memory, MiB", "#d1495b", [x.memory for x in looks]),
        ("open files", "#2e86ab", [float(x.files) for x in looks]),
        ("steps done", "#6a994e", [float(x.steps) for x in looks]),
        ("programs compiled", "#8e6bbf", [float(x.programs) for x in looks]),
    )
    end = looks[-1].seconds
    size = f'viewBox="0 0 {wide} {high * len(curves) + 20}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    parts.append('<rect width="100%" height="100%" fill="white"/>')
    for i, (name, colour, values) in enumerate(curves):
        top, most = i * high + 24, max(values) or 1.0
        height = high - 40
        points = " ".join(
            f"{left + (wide - left - 20) * x.seconds / end:.1f},{top + height * (1 - v / most):.1f}"
            for x, v in zip(looks, values, strict=True)
        )
        parts.append(f'<text x="{left}" y="{top - 8}" fill="#222">{name}</text>')
        parts.append(f'<text x="{left - 8}" y="{top + 5}" text-anchor="end" fill="#555">{most:,.0f}</text>')
        parts.append(f'<text x="{left - 8}" y="{top + height + 4}" text-anchor="end" fill="#555">0</text>')
        below = top + height
        parts.append(f'<line x1="{left}" x2="{wide - 20}" y1="{below}" y2="{below}" stroke="#ccc"/>')
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    bottom = high * len(curves) + 12
    parts.append(f'<text x="{wide - 20}" y="{bottom}" text-anchor="end" fill="#555">{end:.0f} s</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--steps", type=int, default=5000)
    read.add_argument("--out", type=Path, default=Path("long_run.svg"))
    given = read.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        looks = watch(given.steps, Path(scratch))
    early, late = quarter(looks, 2, given.steps), quarter(looks, 4, given.steps)
    given.out.write_text(picture(looks))
    found = grown(early, late)
    told = {"steps": given.steps, "looks": len(looks), "second": early._asdict(), "last": late._asdict()}
    print(json.dumps(told | {"grown": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

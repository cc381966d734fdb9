"""Observe a long `tav train` from outside: does memory, the number of open files or the time of a step grow?

python benchmarks/long_run.py --steps=5000 --out=benchmarks/long_run.svg

The tests' tiny pipeline is tuned with a checkpoint every 250 steps and previews every 500. Once a second resident
memory, open files, finished steps and compiled programs are recorded. The summary compares the second quarter of the
run with the last one, and the plot shows the whole run. The exit status is 1 if something grew: memory by more than 2 %
and 10 MiB, open files, programs after the first previews, or the time of a step by more than half.
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
PREVIEW_EVERY, CHECKPOINT_EVERY = 500, 250
COMPILED = "Finished XLA compilation"  # in JAX's log


class Sample(NamedTuple):
    seconds: float
    memory: float  # MiB
    files: int
    steps: int
    programs: int


def train_command(clip: Path, workdir: Path, steps: int) -> list[str]:
    settings = {
        "model.path": MODEL,
        "model.dtype": "float32",
        "clip.path": clip,
        "clip.prompt": "a square is moving",
        "clip.frames": 4,
        "clip.height": 32,
        "clip.width": 32,
        "train.steps": steps,
        "train.checkpoint_every": CHECKPOINT_EVERY,
        "train.preview_every": PREVIEW_EVERY,
        "edit.prompts": ("a blue square",),
        "edit.steps": 4,
        "edit.inversion_steps": 4,
    }
    options = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "tav_jax", "train", f"--workdir={workdir}", *options]


def write_clip(file: Path) -> Path:
    from tav_jax import Clip

    frames = np.full((4, 32, 32, 3), 60, np.uint8)
    for i, frame in enumerate(frames):
        frame[8:20, 3 + 4 * i : 15 + 4 * i] = (220, 40, 40)
    return Clip(frames, 10.0).save(file)


def take_sample(pid: int, start: float, log: Path, metrics: Path) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text()
    memory = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    programs = log.read_text(errors="replace").count(COMPILED)
    return Sample(time.time() - start, memory / 1024, len(os.listdir(f"/proc/{pid}/fd")), steps, programs)


def observe(steps: int, directory: Path, interval: float = 1.0) -> list[Sample]:
    log, workdir, samples = directory / "log", directory / "run", []
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(directory / "cache")
    with log.open("wb") as output:
        command = train_command(write_clip(directory / "clip.mp4"), workdir, steps)
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        start = time.time()
        while process.poll() is None:
            try:
                samples.append(take_sample(process.pid, start, log, workdir / "metrics.jsonl"))
            except (FileNotFoundError, ProcessLookupError, StopIteration):  # it has just ended
                break
            time.sleep(interval)
        process.wait()
    if process.returncode:
        raise SystemExit(log.read_text(errors="replace")[-3000:])
    return samples


class Quarter(NamedTuple):
    memory: float
    files: float
    milliseconds: float  # per step, with previews and checkpoints
    programs: int


def quarter(samples: list[Sample], number: int, steps: int) -> Quarter:
    inside = [x for x in samples if (number - 1) * steps / 4 <= x.steps <= number * steps / 4 and x.steps > 0]
    first, last = inside[0], inside[-1]
    return Quarter(
        statistics.median(x.memory for x in inside),
        statistics.median(x.files for x in inside),
        1000 * (last.seconds - first.seconds) / max(last.steps - first.steps, 1),
        last.programs,
    )


def growth(early: Quarter, late: Quarter) -> list[str]:
    found = []
    if late.memory > max(1.02 * early.memory, early.memory + 10):
        found.append(f"memory, from {early.memory:.0f} to {late.memory:.0f} MiB")
    if late.files > early.files:
        found.append(f"open files, from {early.files:.0f} to {late.files:.0f}")
    if late.milliseconds > 1.5 * early.milliseconds:
        found.append(f"time of a step, from {early.milliseconds:.1f} to {late.milliseconds:.1f} ms")
    if late.programs > early.programs:
        found.append(f"compiled programs, from {early.programs} to {late.programs}")
    return found


def plot(samples: list[Sample], file: Path) -> None:
    """Four curves over the time of the run."""
    import matplotlib

    matplotlib.use("Agg")
    # Text stays text, and the same data gives the same file.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "long_run"})
    from matplotlib import pyplot as plt

    names = {"memory": "memory, MiB", "files": "open files", "steps": "steps done", "programs": "programs compiled"}
    figure, axes = plt.subplots(len(names), sharex=True, figsize=(7.2, 7), layout="constrained")
    for i, (axis, (field, name)) in enumerate(zip(axes, names.items(), strict=True)):
        axis.plot([x.seconds for x in samples], [getattr(x, field) for x in samples], color=f"C{i}")
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("seconds")
    figure.savefig(file, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--out", type=Path, default=Path("long_run.svg"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        samples = observe(arguments.steps, Path(temporary))
    early, late = quarter(samples, 2, arguments.steps), quarter(samples, 4, arguments.steps)
    plot(samples, arguments.out)
    found = growth(early, late)
    summary = {"steps": arguments.steps, "samples": len(samples), "second": early._asdict(), "last": late._asdict()}
    print(json.dumps(summary | {"growth": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

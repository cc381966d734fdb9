"""Stable Diffusion's programs through the real TPU compiler, at full size, without a TPU.

    pip install libtpu
    python benchmarks/tpu_plan.py            # compiles what benchmarks/plans/ lacks, and prints the table
    python benchmarks/tpu_plan.py --table    # the table alone, of what there is

Each program takes from two minutes (sampling on eight chips) to 25 on one core, and up to 10 GB of memory. A file for
each, so that they can be compiled in pieces; it says with which versions.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parent / "plans"
GB = 1e9


class Job(NamedTuple):
    model: str
    topology: str
    frames: int
    side: int
    function: str
    remat: str = "block"
    level: str = ""  # JAX_OPTIMIZATION_LEVEL

    @property
    def file(self) -> Path:
        remat = "" if self.remat == "block" else f"-{self.remat}"
        level = self.level and f"-{self.level}"
        return FOLDER / f"{self.model}-{self.topology}-{self.frames}x{self.side}-{self.function}{remat}{level}.json"


JOBS = (
    Job("sd1", "v5e-8", 32, 512, "tune"),
    Job("sd1", "v5e-8", 32, 512, "sample"),
    Job("sd1", "v5e-8", 32, 512, "invert"),
    Job("sd1", "v5e-8", 24, 512, "tune"),
    Job("sd1", "v5e-1", 16, 512, "tune"),
    Job("sd1", "v5e-1", 16, 512, "sample"),
    Job("sd1", "v6e-1", 32, 512, "tune"),
    Job("sd1", "v6e-1", 32, 512, "sample"),
    Job("sd1", "v5e-8", 128, 512, "tune"),
    Job("sd1", "v5e-8", 128, 512, "sample"),
    Job("sd2", "v5e-8", 24, 768, "tune"),
    Job("sd2", "v5e-8", 24, 768, "sample"),
    Job("sd1", "v5e-8", 32, 512, "tune", "attention"),
    Job("sd1", "v5e-8", 32, 512, "tune", "none"),
    Job("sd1", "v5e-8", 32, 512, "tune", level="O1"),
)


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("libtpu", "jax", "jaxlib", "flax")}


def compile_(job: Job) -> None:
    clip = {"frames": job.frames, "height": job.side, "width": job.side}
    line = [sys.executable, "-m", "tav_jax", "plan", "--json", "--no-search", f"--topology={job.topology}"]
    line += [f"--function={job.function}", f"--config.model.path={job.model}", f"--config.train.remat={job.remat}"]
    line += [f"--config.clip.{name}={value}" for name, value in clip.items()]
    asked = os.environ | ({"JAX_OPTIMIZATION_LEVEL": job.level} if job.level else {})
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=asked)
    if not done.stdout:
        raise SystemExit(f"{job} could not be compiled; status {done.returncode}")
    about = {"compiled_with": versions(), "on": time.strftime("%Y-%m-%d"), **json.loads(done.stdout)}
    FOLDER.mkdir(exist_ok=True)
    scratch = job.file.with_suffix(".partial")
    scratch.write_text(json.dumps(about, indent=1) + "\n")
    scratch.replace(job.file)


def table() -> str:
    lines = [
        "| | chips | clip | remat | fits | peak | arguments | temporary | code | TFLOP | HBM | touched "
        "| a step, at least | limit | expected | compiled in |",
        "|" + "---|" * 16,
    ]
    for job in JOBS:
        if job.file.exists():
            told = json.loads(job.file.read_text())
            lines.append(_row(job, told["functions"][job.function]))
    return "\n".join(lines) + "\n"


def _row(job: Job, r: dict[str, Any]) -> str:
    steps = r["steps"]
    sizes = (r[f"{name}_bytes"] / GB for name in ("peak", "argument", "temporary", "code"))
    moved = (r["moved_bytes"] / steps / GB, r["touched_bytes"] / steps / GB)
    cells = [
        f"{job.model} {job.function}{job.level and f', {job.level}'}",
        job.topology,
        f"{job.frames} × {job.side}²",
        job.remat if job.function == "tune" else "",
        "yes" if r["fits"] else "**no**",
        *(f"{size:.2f}" for size in sizes),
        f"{r['flops'] / steps / 1e12:.1f}",
        *(f"{size:.1f}" for size in moved),
        f"{r['step_seconds'] * 1e3:.0f} ms",
        r["limit"],
        f"{expected * 1e3:.0f} ms" if (expected := r.get("expected_seconds")) else "",
        f"{r['compile_seconds'] / 60:.1f} min",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--table", action="store_true", help="compile nothing")
    if not read.parse_args().table:
        for job in JOBS:
            if not job.file.exists():
                print(f"compiling {job}", file=sys.stderr, flush=True)
                compile_(job)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())

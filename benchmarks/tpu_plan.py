"""Stable Diffusion's programs at full size, compiled with the TPU compiler, without a TPU.

    pip install --target="$VIRTUAL_ENV/tpu-compiler" libtpu
    python benchmarks/tpu_plan.py            # compiles what is missing in benchmarks/plans/, and prints the table
    python benchmarks/tpu_plan.py --table    # prints the table of the existing plans

Each program takes from two minutes (sampling on eight chips) to 25 on one core, and up to 10 GB of memory. Each has a
file with the versions that it was compiled with, so they can be compiled one by one.
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

PLANS = Path(__file__).parent / "plans"
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
        return PLANS / f"{self.model}-{self.topology}-{self.frames}x{self.side}-{self.function}{remat}{level}.json"


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


def compile_job(job: Job) -> None:
    clip = {"frames": job.frames, "height": job.side, "width": job.side}
    command = [sys.executable, "-m", "tav_jax", "plan", "--json", "--no-search", f"--topology={job.topology}"]
    command += [f"--function={job.function}", f"--config.model.path={job.model}", f"--config.train.remat={job.remat}"]
    command += [f"--config.clip.{name}={value}" for name, value in clip.items()]
    env = os.environ | ({"JAX_OPTIMIZATION_LEVEL": job.level} if job.level else {})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
    if not done.stdout:
        raise SystemExit(f"{job} could not be compiled; status {done.returncode}")
    content = {"compiled_with": versions(), "on": time.strftime("%Y-%m-%d"), **json.loads(done.stdout)}
    PLANS.mkdir(exist_ok=True)
    partial = job.file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(job.file)


def table() -> str:
    lines = [
        "| program | chips | clip | remat | fits | peak, GB | arguments, GB | temporaries, GB | code, GB | TFLOP "
        "| HBM traffic, GB | accessed, GB | step, lower bound | limit | step, estimate | compiled in |",
        "|" + "---|" * 16,
    ]
    for job in JOBS:
        if job.file.exists():
            plan = json.loads(job.file.read_text())
            lines.append(_row(job, plan["functions"][job.function]))
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="compile nothing")
    if not parser.parse_args().table:
        for job in JOBS:
            if not job.file.exists():
                print(f"compiling {job}", file=sys.stderr, flush=True)
                compile_job(job)
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())

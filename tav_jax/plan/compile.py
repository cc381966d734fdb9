"""Compile a program for a TPU, report what it needs, and cache the reports on disk."""

import dataclasses
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from tav_jax.plan import hlo
from tav_jax.plan.chips import Chip, Topology
from tav_jax.plan.programs import Job, Program, build_program, size


@dataclass(frozen=True)
class Report:
    """What one program needs: bytes and FLOPs per chip and call of the program, seconds per step."""

    name: str
    fits: bool
    peak_bytes: int  # the sum of arguments, temporaries, outputs, code and `beside_bytes`
    hbm_bytes: int  # what a chip has
    argument_bytes: int
    temporary_bytes: int = 0
    output_bytes: int = 0  # without those that reuse an argument's memory
    code_bytes: int = 0
    beside_bytes: int = 0  # other arrays of the run that stay on the chip
    flops: float = 0.0
    moved_bytes: float = 0.0  # to and from HBM; equal to `touched_bytes` where the HLO cannot be read
    touched_bytes: float = 0.0  # XLA's "bytes accessed", which includes accesses to VMEM
    seconds: dict[str, float] = field(default_factory=dict)  # lower bounds for compute, memory and interconnect
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    expected_seconds: float = 0.0  # the compiler's estimate of a step's time; 0 if there is none
    steps: int = 1
    job_steps: int = 1
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0
    error: str = ""  # why the program could not be compiled, other than for lack of HBM

    @property
    def limit(self) -> str:
        """Which of `seconds` is the largest."""
        return max(self.seconds, key=self.seconds.__getitem__, default="")

    @property
    def step_seconds(self) -> float:
        """A lower bound for the time of a step, in which compute, memory and interconnect overlap."""
        return max(self.seconds.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        step = self.step_seconds
        return asdict(self) | {"limit": self.limit, "step_seconds": step, "job_seconds": step * self.job_steps}


def compile_program(program: Program, topology: Topology) -> Report:
    """Trace and compile a program. One that does not fit has a report, too."""
    chip, steps, begin = topology.chip, program.steps, time.monotonic()
    with program.context:
        traced = program.function.trace(*program.arguments, **program.options)
        flops = hlo.count_flops(traced.jaxpr) / program.shards
        kernel_seconds = _kernel_seconds(traced.jaxpr, topology.chip) / program.shards
        lowered = traced.lower()
        traced_at = time.monotonic()
        values: dict[str, Any] = {"name": program.name, "steps": steps, "job_steps": program.job_steps, "flops": flops}
        values |= {"hbm_bytes": chip.hbm, "beside_bytes": program.beside_bytes, "trace_seconds": traced_at - begin}
        try:
            compiled = lowered.compile()
        except Exception as error:  # the compiler raises one class for every failure
            values |= {"argument_bytes": size(program.arguments), "compile_seconds": time.monotonic() - traced_at}
            return _failure(str(error), values)
    values["compile_seconds"] = time.monotonic() - traced_at
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    assert cost is not None
    # XLA counts a loop's body once; outside of the loop over the steps there is almost no work.
    touched = cost.get("bytes accessed", 0.0) * steps
    text = hlo_text(compiled)
    moved = hlo.hbm_bytes(text, steps) if text else touched
    collectives = hlo.collectives(text, topology.chips, steps)
    seconds = {
        "compute": flops / chip.flops / steps,
        "memory": moved / chip.bandwidth / steps,
        "interconnect": sum(c.sent_bytes for c in collectives) / chip.ring_bandwidth / steps,
    }
    expected = 0.0
    if chip.clock and (cycles := hlo.estimated_cycles(text, steps)):
        # The compiler does not estimate kernels, whose schedule is known, and collectives: their lower bound is added.
        expected = (cycles / chip.clock + kernel_seconds) / steps + seconds["interconnect"]
    sizes = {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    peak = program.beside_bytes + sum(sizes.values())
    values |= {**sizes, "fits": peak <= chip.hbm, "peak_bytes": peak, "moved_bytes": moved, "touched_bytes": touched}
    return Report(**values, seconds=seconds, expected_seconds=expected, collectives=hlo.total_by_kind(collectives))


def _kernel_seconds(jaxpr: Any, chip: Chip) -> float:
    """Of all Pallas kernels on one chip, from their FLOPs and the speed of their inner loops where it is known."""
    known = sum(hlo.count_flops(jaxpr, {name}) * (1 / share - 1) for name, share in chip.kernels)
    return (hlo.count_flops(jaxpr, hlo.KERNELS) + known) / chip.flops


def hlo_text(compiled: Any) -> str:
    """The HLO of a compiled program; empty if the compiler cannot print it (libtpu 0.0.52 for a v6e)."""
    try:
        return compiled.as_text()
    except Exception as error:
        print(f"the compiler cannot print this program's HLO: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        return ""


# ----------------------------------------------------------------------------------------------------------- failures

UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGTB]?)"
_TEMPORARIES = re.compile(rf"total memory required for HLO temporaries \({_SIZE}\)")
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")


def _failure(message: str, values: dict[str, Any]) -> Report:
    if not (needed := needed_bytes(message, values["argument_bytes"])):
        return Report(**values, fits=False, peak_bytes=0, error=" ".join(message.split())[:500])
    temporary = max(needed - values["argument_bytes"], 0)
    return Report(**values, fits=False, peak_bytes=needed + values["beside_bytes"], temporary_bytes=temporary)


def needed_bytes(message: str, argument_bytes: int) -> int | None:
    """The bytes that a program would need, from the compiler's error message; None if the error is not about HBM."""
    if found := _USED.search(message):
        return int(float(found[1]) * UNITS[found[2]])
    if found := _TEMPORARIES.search(message):
        return int(float(found[1]) * UNITS[found[2]]) + argument_bytes
    return None


# ------------------------------------------------------------------------------------------------------- report cache

PACKAGE = Path(__file__).parent.parent
# The code that defines the programs or reads the compiler's results.
SOURCES = ("models", "kernels", "diffusion", "plan")
SOURCES += ("distributed/sharding.py", "training/train_step.py", "io/weights.py")
VERSIONS = ("jax", "jaxlib", "libtpu", "flax", "optax")


def package_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def optimization_level() -> str:
    """The value of JAX_OPTIMIZATION_LEVEL; empty if it is not set."""
    level = str(jax.config.jax_optimization_level)  # pyright: ignore[reportAttributeAccessIssue]
    return "" if level == "UNKNOWN" else level


def cache_key(job: Job, name: str) -> str:
    """A hash of what a report depends on: the job, the compiler options, the versions and the code."""
    digest = hashlib.sha256(f"{name}\n{job.to_json()}\n{optimization_level()}\n".encode())
    for package in VERSIONS:
        digest.update(f"{package} {package_version(package)}\n".encode())
    for source in SOURCES:
        path = PACKAGE / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(str(file.relative_to(PACKAGE)).encode() + file.read_bytes())
    return digest.hexdigest()[:24]


@dataclass(frozen=True)
class ReportCache:
    """Reports in a directory, one file each: a full-size program takes many minutes to compile."""

    directory: Path
    log: Callable[[str], None] = lambda _: None

    def get(self, job: Job, name: str) -> Report:
        """The cached report of a program or, if there is none, a new one."""
        if (cached := self.load(job, name)) is not None:
            return cached
        remat = f", remat {job.remat}" if name == "tune" else ""
        clip = f"{job.frames} frames of {job.height}×{job.width}"
        self.log(f"compiling {name} for {job.topology.name}: {clip}{remat} …")
        report = compile_program(build_program(job, name), job.topology)
        if not report.error:  # a compiler error may be temporary
            self.save(job, report)
        return report

    def load(self, job: Job, name: str) -> Report | None:
        try:
            stored = json.loads(self._file(job, name).read_text())["report"]
            return Report(**{f.name: stored[f.name] for f in dataclasses.fields(Report)})
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
            return None

    def save(self, job: Job, report: Report) -> None:
        """The file is written under a temporary name and then renamed, so that a cached report is complete."""
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {"job": json.loads(job.to_json()), "report": report.to_dict()}
        with tempfile.NamedTemporaryFile("w", dir=self.directory, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, self._file(job, report.name))

    def _file(self, job: Job, name: str) -> Path:
        return self.directory / f"{cache_key(job, name)}.json"

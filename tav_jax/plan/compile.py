"""Compile one program for a TPU, report what it needs, and cache the report on disk."""

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
from tav_jax.plan.chips import Topology
from tav_jax.plan.programs import Job, Program, build_program


@dataclass(frozen=True)
class Report:
    """What one program needs. Bytes and FLOPs are per chip and for one call of the program, seconds for one step."""

    name: str
    fits: bool
    peak_bytes: int  # the sum of arguments, temporaries, outputs, code and `beside_bytes`
    hbm_bytes: int  # what a chip has
    argument_bytes: int
    temporary_bytes: int = 0
    output_bytes: int = 0  # without those that reuse an argument's memory
    code_bytes: int = 0
    beside_bytes: int = 0  # other arrays that the run keeps on the chip meanwhile
    flops: float = 0.0
    moved_bytes: float = 0.0  # to and from HBM; equal to `touched_bytes` where the HLO cannot be read
    touched_bytes: float = 0.0  # XLA's "bytes accessed", which includes accesses to VMEM
    seconds: dict[str, float] = field(default_factory=dict)  # compute, memory, interconnect: the least of each
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    expected_seconds: float = 0.0  # a step's time as estimated by the compiler; 0 if there is no estimate
    steps: int = 1
    job_steps: int = 1
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0
    error: str = ""  # why the program could not be compiled, other than for lack of HBM

    @property
    def limit(self) -> str:
        """The largest of `seconds`."""
        return max(self.seconds, key=lambda name: self.seconds[name]) if self.seconds else ""

    @property
    def step_seconds(self) -> float:
        """The least time of a step: all else overlaps with its limit."""
        return max(self.seconds.values(), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "limit": self.limit,
            "step_seconds": self.step_seconds,
            "job_seconds": self.step_seconds * self.job_steps,
        }


def compile_program(program: Program, topology: Topology) -> Report:
    """Trace and compile a program. One that needs more memory than a chip has gives a report, too."""
    chip, begin = topology.chip, time.monotonic()
    with program.context:
        traced = program.trace()
        flops = hlo.count_flops(traced.jaxpr) / program.shards
        kernel_flops = hlo.count_flops(traced.jaxpr, hlo.KERNELS) / program.shards
        lowered = traced.lower()
        traced_at = time.monotonic()
        common = {
            "name": program.name,
            "hbm_bytes": chip.hbm,
            "argument_bytes": program.argument_bytes,
            "beside_bytes": program.beside_bytes,
            "flops": flops,
            "steps": program.steps,
            "job_steps": program.job_steps,
            "trace_seconds": traced_at - begin,
        }
        try:
            compiled = lowered.compile()
        except Exception as error:  # the compiler raises one class for every failure
            return _failure(str(error), common, time.monotonic() - traced_at)
    common["compile_seconds"] = time.monotonic() - traced_at
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    assert cost is not None
    # XLA counts a loop's body once; hardly anything happens outside of the loop over the steps.
    touched = cost.get("bytes accessed", 0.0) * program.steps
    text = hlo_text(compiled)
    moved = hlo.hbm_bytes(text, program.steps) if text else touched
    collectives = hlo.collectives(text, topology.chips, program.steps)
    seconds = {
        "compute": flops / chip.flops / program.steps,
        "memory": moved / chip.bandwidth / program.steps,
        "interconnect": sum(c.sent_bytes for c in collectives) / chip.ring_bandwidth / program.steps,
    }
    expected = 0.0
    if chip.clock and (cycles := hlo.estimated_cycles(text, program.steps)):
        # Kernels and collectives have no estimate: their least times are added.
        expected = (cycles / chip.clock + kernel_flops / chip.flops) / program.steps + seconds["interconnect"]
    common["argument_bytes"] = memory.argument_size_in_bytes
    sizes = {
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
    }
    peak = memory.argument_size_in_bytes + program.beside_bytes + sum(sizes.values())
    return Report(
        **common,
        **sizes,
        fits=peak <= chip.hbm,
        peak_bytes=peak,
        moved_bytes=moved,
        touched_bytes=touched,
        seconds=seconds,
        expected_seconds=expected,
        collectives={kind: total._asdict() for kind, total in hlo.total_by_kind(collectives).items()},
    )


def hlo_text(compiled: Any) -> str:
    """The HLO of a compiled program; empty where the compiler cannot print it (libtpu 0.0.52 for a v6e)."""
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


def _failure(message: str, common: dict[str, Any], compile_seconds: float) -> Report:
    needed = needed_bytes(message, common["argument_bytes"])
    return Report(
        **common,
        fits=False,
        peak_bytes=needed + common["beside_bytes"] if needed else 0,
        temporary_bytes=max((needed or 0) - common["argument_bytes"], 0),
        compile_seconds=compile_seconds,
        error="" if needed else " ".join(message.split())[:500],
    )


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
SOURCES = (
    *("models", "kernels", "diffusion", "distributed/sharding.py", "training/train_step.py", "io/weights.py", "plan"),
)
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
    """A hash of everything that a report depends on: the job, the compiler options, the versions and the code."""
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
    """Reports in a directory, one file each. A full-size program takes many minutes to compile."""

    directory: Path
    log: Callable[[str], None] = lambda _: None

    def get(self, job: Job, name: str) -> Report:
        """The cached report of a program or, if there is none, a new one."""
        if (cached := self.load(job, name)) is not None:
            return cached
        self.log(f"compiling {describe(job, name)} …")
        report = compile_program(build_program(job, name), job.topology)
        if not report.error:  # an error of the compiler may be temporary
            self.save(job, report)
        return report

    def load(self, job: Job, name: str) -> Report | None:
        try:
            stored = json.loads(self._file(job, name).read_text())["report"]
            return Report(**{f.name: stored[f.name] for f in dataclasses.fields(Report)})
        except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
            return None

    def save(self, job: Job, report: Report) -> None:
        """Written to a temporary file first, so that a cached report is always complete."""
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {"job": json.loads(job.to_json()), "report": report.to_dict()}
        with tempfile.NamedTemporaryFile("w", dir=self.directory, suffix=".tmp", delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, self._file(job, report.name))

    def _file(self, job: Job, name: str) -> Path:
        return self.directory / f"{cache_key(job, name)}.json"


def describe(job: Job, name: str) -> str:
    remat = f", remat {job.remat}" if name == "tune" else ""
    return f"{name} for {job.topology.name}: {job.frames} frames of {job.height}×{job.width}{remat}"

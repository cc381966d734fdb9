"""One program compiled for a chip, and what the compiler says of it."""

import re
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from tav_jax.plan import collectives, estimate, flops, traffic
from tav_jax.plan.chips import Topology
from tav_jax.plan.functions import Function

UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGTB]?)"
_TEMPORARIES = re.compile(rf"total memory required for HLO temporaries \({_SIZE}\)")
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")


@dataclass(frozen=True)
class Report:
    """Bytes and operations are per chip and for one call of the program, seconds for one step."""

    name: str
    fits: bool
    peak_bytes: int
    hbm_bytes: int
    argument_bytes: int
    temporary_bytes: int = 0
    output_bytes: int = 0  # those that take no argument's place
    code_bytes: int = 0
    beside_bytes: int = 0
    flops: float = 0.0
    moved_bytes: float = 0.0  # between chip and HBM; where the program could not be read, all that was touched
    touched_bytes: float = 0.0  # XLA's "bytes accessed", which counts what stays on the chip, too
    seconds: dict[str, float] = field(default_factory=dict)  # compute, memory, interconnect: each by itself
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    expected_seconds: float = 0.0  # a step's time by the compiler's own reckoning; 0 where it cannot be read
    steps: int = 1
    job_steps: int = 1
    trace_seconds: float = 0.0
    compile_seconds: float = 0.0
    error: str = ""  # of a compiler that gave up for another reason than memory

    @property
    def limit(self) -> str:
        """What takes longest."""
        return max(self.seconds, key=lambda name: self.seconds[name]) if self.seconds else ""

    @property
    def step_seconds(self) -> float:
        """A step's time if all that is not the limit were hidden behind it: no program can be faster."""
        return max(self.seconds.values(), default=0.0)

    def told(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "limit": self.limit,
            "step_seconds": self.step_seconds,
            "job_seconds": self.step_seconds * self.job_steps,
        }


def measure(function: Function, topology: Topology) -> Report:
    begin = time.monotonic()
    with function.running():
        traced = function.trace()
        counted = flops.count(traced.jaxpr) / function.sharing
        in_kernels = flops.count(traced.jaxpr, flops.KERNELS) / function.sharing
        lowered = traced.lower()
        middle = time.monotonic()
        common = {
            "name": function.name,
            "hbm_bytes": topology.chip.hbm,
            "argument_bytes": function.arguments,
            "beside_bytes": function.beside,
            "flops": counted,
            "steps": function.steps,
            "job_steps": function.job_steps,
            "trace_seconds": middle - begin,
        }
        try:
            compiled = lowered.compile()
        except Exception as error:  # the compiler has one class for all its complaints
            return _failed(str(error), common, time.monotonic() - middle)
    taken = time.monotonic() - middle
    memory, told = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None
    assert told is not None
    # XLA counts a loop's body once; outside of the loop over the steps next to nothing happens.
    touched = told.get("bytes accessed", 0.0) * function.steps
    text = _text(compiled)
    moved = traffic.hbm_bytes(text, function.steps) if text else touched
    between = collectives.read(text, topology.chips, function.steps)
    chip = topology.chip
    seconds = {
        "compute": counted / chip.flops / function.steps,
        "memory": moved / chip.bandwidth / function.steps,
        "interconnect": sum(c.sent for c in between) / chip.wire / function.steps,
    }
    expected = 0.0
    if chip.clock and (cycles := estimate.cycles(text, function.steps)):
        # What the compiler has no number for, as fast as it can be.
        expected = (cycles / chip.clock + in_kernels / chip.flops) / function.steps + seconds["interconnect"]
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        + output
        + function.beside
    )
    return Report(
        **common | {"argument_bytes": memory.argument_size_in_bytes},
        fits=peak <= chip.hbm,
        peak_bytes=peak,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=output,
        code_bytes=memory.generated_code_size_in_bytes,
        moved_bytes=moved,
        touched_bytes=touched,
        seconds=seconds,
        expected_seconds=expected,
        collectives={kind: told._asdict() for kind, told in collectives.by_kind(between).items()},
        compile_seconds=taken,
    )


def _text(compiled: Any) -> str:
    """The program's text; none where the compiler cannot write down what it made (libtpu 0.0.52, v6e)."""
    try:
        return compiled.as_text()
    except Exception as error:
        print(f"the compiler cannot show this program: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        return ""


def _failed(message: str, common: dict[str, Any], taken: float) -> Report:
    needed = needed_bytes(message, common["argument_bytes"])
    return Report(
        **common,
        fits=False,
        peak_bytes=(needed or 0) + (common["beside_bytes"] if needed else 0),
        temporary_bytes=max((needed or 0) - common["argument_bytes"], 0),
        compile_seconds=taken,
        error="" if needed else " ".join(message.split())[:500],
    )


def needed_bytes(message: str, arguments: int) -> int | None:
    """How much a program would need, out of the compiler's refusal; None where it was no matter of HBM."""
    if found := _USED.search(message):
        return _bytes(found[1], found[2])
    if found := _TEMPORARIES.search(message):
        return _bytes(found[1], found[2]) + arguments
    return None


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * UNITS[unit])

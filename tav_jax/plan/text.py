"""A compiled program's text, taken apart: its computations, and how often each of them runs."""

import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_WHILE = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|async_execution_thread|branch_computations)=\{?%?([\w.\-]+)")
_FUSED = re.compile(r" (?:fusion|reduce|reduce-window|scatter|sort|map|all-reduce\S*|reduce-scatter\S*)\(")


class Computation(NamedTuple):
    lines: list[str]  # an instruction each
    times: int
    fused: bool  # into one instruction of another, so that what is inside of it goes by no memory


def computations(text: str, loop: int = 1) -> dict[str, Computation]:
    """Those that run. `loop` is the count of a loop that does not tell its own."""
    lines: dict[str, list[str]] = {}
    calls: dict[str, list[tuple[str, int, bool]]] = {}
    here, entry = "", ""
    for line in text.splitlines():
        if (start := _COMPUTATION.match(line)) is not None:
            here = start[2]
            lines[here], calls[here] = [], []
            entry = here if start[1] else entry
        elif here and " = " in line:
            lines[here].append(line)
            if (looping := _WHILE.search(line)) is not None:
                trips = _TRIPS.search(line)
                calls[here].append((looping[2], int(trips[1]) if trips else loop, False))
            elif found := _CALLED.findall(line):
                fused = _FUSED.search(line) is not None
                calls[here] += [(name, 1, fused) for name in found]

    times: dict[str, tuple[int, bool]] = {}
    waiting = [(entry, 1, False)]
    while waiting:
        name, count, fused = waiting.pop()
        if count > times.get(name, (0, False))[0]:
            times[name] = count, fused
            waiting += [(called, count * trips, fused or inner) for called, trips, inner in calls.get(name, ())]
    return {name: Computation(lines[name], *told) for name, told in times.items() if name in lines}


def sized(kind: str, sizes: str) -> int:
    """The bytes of a type such as `bf16[8,4096]`, given in its two parts."""
    bits = BITS.get(kind) or int(re.sub(r"^[a-z]+(\d+).*", r"\1", kind))
    return math.prod(int(n) for n in sizes.split(",") if n) * bits // 8

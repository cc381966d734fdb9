"""What chips tell each other, read from a compiled program's text."""

import math
import re
from typing import NamedTuple

from tav_jax.plan.text import computations, sized

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_COLLECTIVE = re.compile(rf" = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")
_GROUPS = (
    re.compile(r"replica_groups=\[\d+,(\d+)\]"),
    re.compile(r"replica_groups=\{\{([\d,]+)\}"),
    re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}"),
)


class Collective(NamedTuple):
    """One instruction. `bytes`: of its result on one chip. `chips`: that take part. `times`: how often it runs."""

    kind: str
    bytes: int
    chips: int
    times: int

    @property
    def sent(self) -> float:
        """Bytes that each chip sends, in a ring."""
        others = (self.chips - 1) / self.chips
        share = {
            "all-gather": others,
            "all-reduce": 2 * others,
            "all-to-all": others,
            "collective-permute": 1.0,
            "reduce-scatter": self.chips - 1.0,
        }
        return self.times * self.bytes * share[self.kind]


def read(text: str, chips: int, loop: int = 1) -> list[Collective]:
    """Of a program on so many chips. `loop` is the count of a loop that does not tell its own."""
    program = computations(text, loop)
    found = [
        (_collective(line, match, chips), one.times)
        for one in program.values()
        for line in one.lines
        if (match := _COLLECTIVE.search(line)) is not None
    ]
    # An asynchronous one stands in several computations, its beginning, what runs meanwhile and its end, by one number.
    unique = {channel: one._replace(times=times) for (channel, one), times in found}
    return list(unique.values())


def _collective(line: str, found: re.Match[str], chips: int) -> tuple[str, Collective]:
    shapes = [sized(*shape) for shape in _SHAPE.findall(found[1])]
    # What starts an asynchronous one gives (operand, result, flags).
    size = shapes[1] if found[3] and found[2] != "all-reduce" and len(shapes) > 1 else sum(shapes)
    channel = re.search(r"channel_id=(\d+)", line)
    return channel[1] if channel else line, Collective(found[2], size, _participants(line, chips), 1)


def _participants(line: str, chips: int) -> int:
    counted, join_names, meshed = (pattern.search(line) for pattern in _GROUPS)
    if counted:
        return int(counted[1])
    if join_names:
        return len(join_names[1].split(","))
    if meshed:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", meshed[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", meshed[2]) if name in sizes)
    return chips


class Told(NamedTuple):
    """All of one kind: how often, and how much."""

    times: int
    bytes: int


def by_kind(collectives: list[Collective]) -> dict[str, Told]:
    return {
        kind: Told(sum(c.times for c in of_kind), sum(c.times * c.bytes for c in of_kind))
        for kind in KINDS
        if (of_kind := [c for c in collectives if c.kind == kind])
    }

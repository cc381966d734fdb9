"""Bytes between a chip and its HBM, read from a compiled program's text.

The compiler's own count, "bytes accessed", also takes what never leaves the chip: it keeps much of a program's data in
the memory beside the units (VMEM; `S(1)` in the text), fetches ahead into it with asynchronous copies, and counts every
read and write there, too. On the train step that comes to several times what HBM sees.

Here an instruction reads its operands and writes its result, each once, but for what lies in VMEM. Of an operand that
only pieces are taken of, the pieces count. What does not fill its tiles is as large as they are. A kernel of our own
fetches hardly anything twice (frame 0), which is not counted.
"""

import re
from typing import NamedTuple

from tav_jax.plan.text import Computation, computations, sized

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)(?= [a-z])|\S+) ([\w\-]+)\((.*)$")
_TYPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")
_TILED = re.compile(r"^\{([\d,]+):T\(([\d,]+)\)")
_NEAR = re.compile(r"S\([1-9]\d*\)")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")

# What moves nothing itself: names for what is there, control, and the ends of what a `-start` has counted.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
PIECES = {"slice", "dynamic-slice", "gather"}


class Instruction(NamedTuple):
    name: str
    opcode: str
    far: int  # bytes of the result that lie in HBM
    whole: int  # bytes of the result, wherever
    operands: tuple[str, ...]
    parts: tuple[tuple[int, bool], ...]  # of the result: bytes, and whether they are in HBM
    calls: str
    root: bool
    number: int | None  # of a parameter


def hbm_bytes(text: str, loop: int = 1) -> int:
    """`loop` is the count of a loop that does not tell its own."""
    program = computations(text, loop)
    read = {name: _read(one) for name, one in program.items()}
    return sum(
        one.times * sum(_moved(each, read[name], read) for each in read[name].values())
        for name, one in program.items()
        if not one.fused
    )


def _read(computation: Computation) -> dict[str, Instruction]:
    found = {}
    for line in computation.lines:
        if (match := _INSTRUCTION.match(line)) is None:
            continue
        root, name, types, opcode, rest = match.groups()
        parts = tuple(
            (sized(kind, _filled(sizes, layout)), _NEAR.search(layout) is None)
            for kind, sizes, layout in _TYPE.findall(types)
            if kind != "token"
        )
        called = _CALLS.search(rest)
        found[name] = Instruction(
            name,
            opcode,
            sum(size for size, far in parts if far),
            sum(size for size, _ in parts),
            tuple(_NAME.findall(rest.split("), ")[0])),
            parts,
            called[1] if called else "",
            bool(root),
            int(rest.split(")")[0]) if opcode == "parameter" else None,
        )
    return found


def _filled(sizes: str, layout: str) -> str:
    """The sizes with the filling that tiles bring: `77` in tiles of 128 takes as much as 128."""
    if (tiled := _TILED.match(layout)) is None:
        return sizes
    axes, tile = ([int(n) for n in text.split(",")] for text in tiled.groups())
    filled = [int(n) for n in sizes.split(",")]
    for axis, n in zip(axes, reversed(tile), strict=False):  # both begin with what lies closest
        filled[axis] = -(-filled[axis] // n) * n
    return ",".join(map(str, filled))


def _moved(one: Instruction, beside: dict[str, Instruction], all_of: dict[str, dict[str, Instruction]]) -> int:
    if one.opcode in FREE or one.opcode.endswith(("-done", "-update")):
        return 0
    if one.opcode == "copy-start":  # (to, from, flag)
        return sum(size for size, far in one.parts[:2] if far)
    if one.opcode == "slice-start":  # ((from, …), to, …, flags): as much is read as is written
        to = [(size, far) for size, far in one.parts[len(one.operands) :] if size > 4]
        source = any(beside[name].far for name in one.operands if name in beside)
        return sum(size * (far + source) for size, far in to)
    if one.opcode.endswith("-start"):  # (operands, results, flags)
        return one.far
    if one.opcode in PIECES:
        return one.far + (one.whole if _far(one.operands[:1], beside) else 0)
    if one.opcode == "dynamic-update-slice":
        piece = beside[one.operands[1]].whole if one.far and one.operands[1] in beside else 0
        return piece + _far(one.operands[1:2], beside)
    taken, written = _inside(all_of.get(one.calls, {}))
    reading = 0
    for i, name in enumerate(one.operands):
        if name in beside and beside[name].far:
            reading += min(beside[name].far, taken.get(i, beside[name].far))
    return reading + (min(one.far, written) if written is not None else one.far)


def _far(names: tuple[str, ...], beside: dict[str, Instruction]) -> int:
    return sum(beside[name].far for name in names if name in beside)


def _inside(fused: dict[str, Instruction]) -> tuple[dict[int, int], int | None]:
    """Of a fusion: by the number of a parameter the bytes taken of it, where only pieces are; and the bytes written,
    where only a piece of the result is."""
    users: dict[str, list[Instruction]] = {}
    for one in fused.values():
        for name in one.operands:
            users.setdefault(name, []).append(one)
    taken, written = {}, None
    for one in fused.values():
        if one.number is not None and (into := users.get(one.name)):
            first = all(user.operands[0] == one.name and one.name not in user.operands[1:] for user in into)
            if first and all(user.opcode in PIECES for user in into):
                taken[one.number] = sum(user.whole for user in into)
            elif first and all(user.opcode == "dynamic-update-slice" for user in into):
                taken[one.number] = 0  # only its other pieces stay, and those where they are
        if one.root and one.opcode == "dynamic-update-slice" and one.operands[1] in fused:
            written = fused[one.operands[1]].whole
    return taken, written

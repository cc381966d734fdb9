"""The cost of a program: FLOPs from its jaxpr; collectives, HBM traffic and estimated cycles from its compiled HLO.

`trip_count` is that of while loops whose HLO does not state it.
"""

import math
import re
from collections.abc import Set
from typing import Any, NamedTuple

import numpy as np

# -------------------------------------------------------------------------------------------------------------- FLOPs

KERNELS = frozenset({"pallas_call"})
FLOP_PRIMITIVES = KERNELS | {"dot_general", "conv_general_dilated"}


def count_flops(jaxpr: Any, primitives: Set[str] = FLOP_PRIMITIVES) -> float:
    """FLOPs of a traced program on all devices: two for each multiplication of a matrix product or convolution.
    `primitives`: those to count, or names of kernels.

    Includes recomputation for the backward pass and Pallas kernels; XLA's own count omits kernels, and counts the body
    of a loop once. Norms and other element-wise operations, a few per cent, are not counted.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # of a ClosedJaxpr
    return float(sum(_equation_flops(equation, primitives) for equation in jaxpr.eqns))


def _equation_flops(equation: Any, primitives: Set[str]) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name in FLOP_PRIMITIVES and not primitives & {name, parameters.get("name")}:
        return 0.0
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    if name == "scan":
        return parameters["length"] * count_flops(parameters["jaxpr"], primitives)
    if name == "cond":
        return _branch_flops(parameters, primitives)
    if name == "shard_map":  # the jaxpr of one device; along mesh axes that shard no output, devices repeat the work
        specs = [part for spec in parameters["out_specs"] for part in spec if part is not None]
        axes = {axis for part in specs for axis in (part if isinstance(part, tuple) else (part,))}
        devices = math.prod(parameters["mesh"].shape[axis] for axis in axes)
        return devices * count_flops(parameters["jaxpr"], primitives)
    if name == "pallas_call":
        if parameters["cost_estimate"] is not None:
            return float(parameters["cost_estimate"].flops)
        return math.prod(parameters["grid_mapping"].grid) * count_flops(parameters["jaxpr"])
    # jit, checkpoint, custom_vjp_call and others; of a while loop, whose trip count is unknown, one iteration
    for inner in ("jaxpr", "call_jaxpr", "fun_jaxpr", "body_jaxpr"):
        if inner in parameters:
            return count_flops(parameters[inner], primitives)
    return 0.0


def _branch_flops(parameters: Any, primitives: Set[str]) -> float:
    """Of a platform-dependent branch, that for TPUs; otherwise the most expensive branch."""
    branches = parameters["branches"]
    for index, platforms in enumerate(parameters.get("branches_platforms") or ()):
        if platforms is None or "tpu" in platforms:
            return count_flops(branches[index], primitives)
    return max(count_flops(branch, primitives) for branch in branches)


def _convolution_flops(equation: Any) -> float:
    """Multiplications with padding and with the zeros of a dilated input are not counted."""
    p, numbers = equation.params, equation.params["dimension_numbers"]
    image, kernel = (x.aval.shape for x in equation.invars)
    out = equation.outvars[0].aval.shape
    pairs = 1.0  # of an output position and a kernel tap that reads an input value
    for i, axes in enumerate(zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)):
        length, taps, positions = (shape[axis] for shape, axis in zip((image, kernel, out), axes, strict=True))
        index = np.arange(positions)[:, None] * p["window_strides"][i] - p["padding"][i][0]
        index = index + np.arange(taps) * p["rhs_dilation"][i]
        dilation = p["lhs_dilation"][i]
        inside = (index >= 0) & (index < (length - 1) * dilation + 1) & (index % dilation == 0)
        pairs *= np.count_nonzero(inside)
    group_channels = kernel[numbers.rhs_spec[1]]
    return 2.0 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * group_channels * pairs


# ------------------------------------------------------------------------------------------------------- computations

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_WHILE = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|async_execution_thread|branch_computations)=\{?%?([\w.\-]+)")
_FUSING = re.compile(r" (?:fusion|reduce|reduce-window|scatter|sort|map|all-reduce\S*|reduce-scatter\S*)\(")
_TYPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](\{[^}]*\})?")  # dtype, shape and layout
_BITS = {"pred": 8, "bf16": 16}


class Computation(NamedTuple):
    lines: list[str]  # one instruction each
    times: int  # how often it runs
    fused: bool  # called by a fusion or a similar instruction, so that its own instructions do not access HBM


def computations(text: str, trip_count: int = 1) -> dict[str, Computation]:
    """The computations of an HLO module that run, by name."""
    lines: dict[str, list[str]] = {}
    calls: dict[str, list[tuple[str, int, bool]]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        if (start := _COMPUTATION.match(line)) is not None:
            current = start[2]
            lines[current], calls[current] = [], []
            entry = current if start[1] else entry
        elif current and " = " in line:
            lines[current].append(line)
            if (while_loop := _WHILE.search(line)) is not None:
                trips = _TRIP_COUNT.search(line)
                calls[current].append((while_loop[2], int(trips[1]) if trips else trip_count, False))
            elif called := _CALLED.findall(line):
                fused = _FUSING.search(line) is not None
                calls[current] += [(name, 1, fused) for name in called]

    found: dict[str, tuple[int, bool]] = {}
    stack = [(entry, 1, False)]
    while stack:
        name, times, fused = stack.pop()
        if times > found.get(name, (0, False))[0]:
            found[name] = times, fused
            stack += [(called, times * trips, fused or inner) for called, trips, inner in calls.get(name, ())]
    return {name: Computation(lines[name], *rest) for name, rest in found.items() if name in lines}


def _type_bytes(dtype: str, shape: str) -> int:
    """Bytes of a type such as `bf16[8,4096]`, given as `bf16` and `8,4096`."""
    bits = _BITS.get(dtype) or int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
    return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


# ---------------------------------------------------------------------------------------------------- estimated cycles

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def estimated_cycles(text: str, trip_count: int = 1) -> int:
    """The sum of the TPU compiler's own estimates, by which it chooses between programs.

    Most instructions have an estimate, but not asynchronous copies, collectives and Pallas kernels.
    """
    return sum(
        computation.times * sum(int(n) for line in computation.lines for n in _CYCLES.findall(line))
        for computation in computations(text, trip_count).values()
        if not computation.fused
    )


# --------------------------------------------------------------------------------------------------------- collectives

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_COLLECTIVE = re.compile(rf" = (.+?) ({'|'.join(COLLECTIVES)})(-start)?\(")
_GROUP_SIZE = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_GROUP_LIST = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_GROUP_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")


class Collective(NamedTuple):
    """An instruction by which chips communicate."""

    kind: str
    bytes: int  # of its result on one chip
    chips: int  # of a group
    times: int  # how often it runs

    @property
    def sent_bytes(self) -> float:
        """Bytes that each chip sends around a ring."""
        others = (self.chips - 1) / self.chips
        shares = {"all-reduce": 2 * others, "collective-permute": 1.0, "reduce-scatter": self.chips - 1.0}
        return self.times * self.bytes * shares.get(self.kind, others)


def collectives(text: str, chips: int, trip_count: int = 1) -> list[Collective]:
    """The collectives of a program that was compiled for this number of chips."""
    # An asynchronous collective appears in several computations (its start, its end and between) with one channel id.
    by_channel: dict[str, Collective] = {}
    for computation in computations(text, trip_count).values():
        for line in computation.lines:
            if (match := _COLLECTIVE.search(line)) is None:
                continue
            sizes = [_type_bytes(dtype, shape) for dtype, shape, _ in _TYPE.findall(match[1])]
            # An asynchronous start has the type (operand, result, flags), except that of an all-reduce.
            asynchronous = match[3] and match[2] != "all-reduce" and len(sizes) > 1
            channel = re.search(r"channel_id=(\d+)", line)
            by_channel[channel[1] if channel else line] = Collective(
                match[2], sizes[1] if asynchronous else sum(sizes), _group_size(line, chips), computation.times
            )
    return list(by_channel.values())


def _group_size(line: str, chips: int) -> int:
    if match := _GROUP_SIZE.search(line):
        return int(match[1])
    if match := _GROUP_LIST.search(line):
        return len(match[1].split(","))
    if match := _GROUP_MESH.search(line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", match[2]) if name in sizes)
    return chips


def total_by_kind(found: list[Collective]) -> dict[str, dict[str, int]]:
    return {
        kind: {"times": sum(c.times for c in of_kind), "bytes": sum(c.times * c.bytes for c in of_kind)}
        for kind in COLLECTIVES
        if (of_kind := [c for c in found if c.kind == kind])
    }


# --------------------------------------------------------------------------------------------------------- HBM traffic

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)(?= [a-z])|\S+) ([\w\-]+)\((.*)$")
_TILED = re.compile(r"^\{([\d,]+):T\(([\d,]+)\)")
_VMEM = re.compile(r"S\([1-9]\d*\)")  # a memory space other than HBM
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")

# Instructions that move no data
NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}
NO_TRAFFIC |= {"after-all"}
SLICES = {"slice", "dynamic-slice", "gather"}


class Instruction(NamedTuple):
    name: str
    opcode: str
    operands: tuple[str, ...]
    buffers: list[tuple[int, bool]]  # of the result: bytes, and whether they are in HBM
    calls: str
    root: bool
    number: int | None  # of a parameter

    @property
    def total(self) -> int:
        return sum(size for size, _ in self.buffers)

    @property
    def hbm(self) -> int:
        return sum(size for size, in_hbm in self.buffers if in_hbm)


def hbm_bytes(text: str, trip_count: int = 1) -> int:
    """Bytes that a chip moves to and from HBM.

    Each instruction reads its operands and writes its result once, except those in VMEM (`S(1)`). Of an operand that is
    only sliced, the slices are counted; of a tiled layout, the padding, too. The few bytes that a Pallas kernel fetches
    twice are counted once. The compiler's own "bytes accessed" is several times as much: it includes accesses to VMEM.
    """
    program = computations(text, trip_count)
    parsed = {name: _parse(computation) for name, computation in program.items()}
    return sum(
        computation.times * sum(_moved(op, parsed[name], parsed) for op in parsed[name].values())
        for name, computation in program.items()
        if not computation.fused
    )


def _parse(computation: Computation) -> dict[str, Instruction]:
    found = {}
    for line in computation.lines:
        if (match := _INSTRUCTION.match(line)) is None:
            continue
        root, name, types, opcode, rest = match.groups()
        buffers = [
            (_type_bytes(dtype, _pad_to_tiles(shape, layout)), _VMEM.search(layout) is None)
            for dtype, shape, layout in _TYPE.findall(types)
            if dtype != "token"
        ]
        operands, called = tuple(_NAME.findall(rest.split("), ")[0])), _CALLS.search(rest)
        number = int(rest.split(")")[0]) if opcode == "parameter" else None
        found[name] = Instruction(name, opcode, operands, buffers, called[1] if called else "", bool(root), number)
    return found


def _pad_to_tiles(shape: str, layout: str) -> str:
    """The shape with the padding of its tiles: 77 in tiles of 128 becomes 128."""
    if (tiled := _TILED.match(layout)) is None:
        return shape
    axes, tile = ([int(n) for n in group.split(",")] for group in tiled.groups())
    padded = [int(n) for n in shape.split(",")]
    for axis, n in zip(axes, reversed(tile), strict=False):  # both start with the minor-most axis
        padded[axis] = -(-padded[axis] // n) * n
    return ",".join(map(str, padded))


def _moved(op: Instruction, siblings: dict[str, Instruction], parsed: dict[str, dict[str, Instruction]]) -> int:
    """HBM bytes of one instruction; `siblings` are the instructions of its computation."""
    if op.opcode in NO_TRAFFIC or op.opcode.endswith(("-done", "-update")):
        return 0
    if op.opcode == "copy-start":  # (destination, source, flag)
        return sum(size for size, in_hbm in op.buffers[:2] if in_hbm)
    if op.opcode == "slice-start":  # ((source, …), destination, …, flags): reads as much as it writes
        destinations = [(size, in_hbm) for size, in_hbm in op.buffers[len(op.operands) :] if size > 4]
        source_in_hbm = _operand_bytes(op.operands, siblings) > 0
        return sum(size * (in_hbm + source_in_hbm) for size, in_hbm in destinations)
    if op.opcode.endswith("-start"):  # (operands, results, flags)
        return op.hbm
    if op.opcode in SLICES:
        return op.hbm + (op.total if _operand_bytes(op.operands[:1], siblings) else 0)
    if op.opcode == "dynamic-update-slice":
        update = siblings[op.operands[1]].total if op.hbm and op.operands[1] in siblings else 0
        return update + _operand_bytes(op.operands[1:2], siblings)
    read, written = _fusion_traffic(parsed.get(op.calls, {}))
    operands = [(i, siblings[name].hbm) for i, name in enumerate(op.operands) if name in siblings]
    return sum(min(n, read.get(i, n)) for i, n in operands) + (op.hbm if written is None else min(op.hbm, written))


def _operand_bytes(names: tuple[str, ...], siblings: dict[str, Instruction]) -> int:
    return sum(siblings[name].hbm for name in names if name in siblings)


def _fusion_traffic(fused: dict[str, Instruction]) -> tuple[dict[int, int], int | None]:
    """Of a fusion: by number, the bytes read of each parameter that is only sliced; and the bytes written, if its
    result is the update of a slice, otherwise None."""
    users: dict[str, list[Instruction]] = {}
    for op in fused.values():
        for name in op.operands:
            users.setdefault(name, []).append(op)
    read, written = {}, None
    for op in fused.values():
        if op.number is not None and (using := users.get(op.name)):
            first_operand = all(user.operands[0] == op.name and op.name not in user.operands[1:] for user in using)
            if first_operand and all(user.opcode in SLICES for user in using):
                read[op.number] = sum(user.total for user in using)
            elif first_operand and all(user.opcode == "dynamic-update-slice" for user in using):
                read[op.number] = 0  # updated in place
        if op.root and op.opcode == "dynamic-update-slice" and op.operands[1] in fused:
            written = fused[op.operands[1]].total
    return read, written

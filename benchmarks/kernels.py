"""The attention kernels compiled with the TPU compiler: memory, FLOPs and bytes moved, without a TPU.

    pip install --target="$VIRTUAL_ENV/tpu-compiler" libtpu
    python benchmarks/kernels.py --topologies v5e:1x1 v6e:1x1 v5:2x2x1 > kernels.md
    python benchmarks/kernels.py --topologies v5e:1x1 v6e:1x1 --shapes 4096x8x40 --schedule

Temporaries are the compiler's. FLOPs and bytes are computed from the kernels' algorithms, because the compiler does not
analyse kernels: every matrix product, and every block that a grid reads or writes, with the padding of its layout.

With --schedule, the inner loops of the `fused` kernel in the compiler's own schedule: instruction bundles, one a cycle,
for a tile of 512 queries and 512 keys, and FLOP/s relative to the peak (`Chip.kernels` in tav_jax/plan/chips.py).
"""

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tav_jax.plan import prepare_environment

prepare_environment()

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from tav_jax.kernels import frame_attention
from tav_jax.kernels.attention import SPLASH_BLOCK
from tav_jax.kernels.sparse_causal import _padding
from tav_jax.plan.chips import CHIPS, Chip, Topology

KERNELS = ("plain", "splash", "fused")


class Shape(NamedTuple):
    tokens: int
    heads: int
    dim: int


class Work(NamedTuple):
    flops: float
    moved: float  # bytes between the chip and its memory


def work(kernel: str, way: str, shape: Shape, frames: int) -> Work:
    """Of one call in bfloat16. "gradient" is forward and backward."""
    tokens, heads, dim = shape
    backward = way == "gradient"
    # Matrix products per tile: q·k and p·v; in the backward pass q·k again, and one for each of dv, dp, dk, dq.
    products = 2 + 5 * backward
    key_frames = 2 * frames if kernel != "fused" else 2 + 2 * (frames - 2)  # frames 0 and 1 attend to one frame only
    flops = products * 2.0 * key_frames * heads * tokens**2 * dim
    # Bytes of q, k, v or the output of one frame. A head size on the minor-most axis is padded to 128.
    padded = math.ceil(dim / 16) * 16 if kernel == "fused" else math.ceil(dim / 128) * 128
    frame = 2.0 * heads * padded * tokens
    if kernel == "fused":
        moved = frame * (2 * frames + 2 * (frames - 1) + 2)  # q, out; k, v of the previous frames, and of frame 0
        # The gradients of frame 0's keys and values are summed in float32.
        moved += backward * frame * (3 * frames + 2 * (frames - 1) + 2 + 3 * frames + 2 * 2 * 2)
        return Work(flops, moved)
    # Keys and values of two frames are concatenated; in the backward pass their gradients are added.
    concatenation = frame * frames * (8 + 6 * backward)
    if kernel == "splash":
        blocks = max(1, tokens // SPLASH_BLOCK)  # q, k and v are read again for each block of the other
        moved = frame * frames * (2 + 4 * blocks)
        moved += backward * frame * frames * (8 + 2 * blocks * (2 + 2))  # dq is written once for each block of keys
        return Work(flops, moved + concatenation)
    scores = 4.0 * key_frames * heads * tokens**2
    rows = frame * frames * (2 + 4 + backward * (4 + 8))
    return Work(flops, rows + scores * (3 + 6 * backward) + concatenation)


def compiled(kernel: str, way: str, shape: Shape, frames: int, device: Any) -> dict[str, Any]:
    """Inputs and outputs are `[1, F, T, N·D]`, the layout of the projections before and after attention."""
    tokens = jax.ShapeDtypeStruct(
        (1, frames, shape.tokens, shape.heads * shape.dim), jnp.bfloat16, sharding=SingleDeviceSharding(device)
    )

    def forward(*qkv):
        heads = (x.reshape(*x.shape[:-1], shape.heads, shape.dim) for x in qkv)
        return frame_attention(*heads, "sparse-causal", kernel).reshape(tokens.shape)

    def gradient(q, k, v, g):
        return jax.vjp(forward, q, k, v)[1](g)

    started = time.perf_counter()
    function, count = (forward, 3) if way == "forward" else (gradient, 4)
    try:
        program = jax.jit(function).lower(*(tokens,) * count).compile()
    except Exception as error:  # it does not fit
        return {"refused": next((line for line in str(error).splitlines() if "emory" in line), str(error)[:200])}
    return {
        "temporaries": program.memory_analysis().temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - started, 1),
    }


def target(topology: str) -> tuple[Chip, Any]:
    """The chip and a device of a topology by the compiler's name, such as v5e:1x1."""
    name, _, layout = topology.partition(":")
    chip = next(chip for chip in CHIPS.values() if chip.compiler_name == name)
    return chip, Topology(chip, layout).devices()[0]


def inner_loops(bundles: str) -> int:
    """The bundles of the longest innermost loop of a kernel, from the compiler's listing: one bundle a line, with a `>`
    for each loop around it, and LB where a loop begins."""
    loops: list[tuple[str, int]] = []
    for label, depth in re.findall(r"^\s*0x[0-9a-f]+\s+(\w\w)?\s*: (>*)", bundles, re.MULTILINE):
        if label == "LB":
            loops.append((depth, 0))
        if loops and depth == loops[-1][0]:
            loops[-1] = depth, loops[-1][1] + 1
    deepest = max(len(depth) for depth, _ in loops)
    return max(count for depth, count in loops if len(depth) == deepest)


def schedule(a: argparse.Namespace) -> Iterator[str]:
    """The dumps of the compiler are read, whose directory must be set before it is loaded."""
    yield "| chip | tokens × heads × head size | kernel | bundles for 512² | at the peak | share of the peak |"
    yield "|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        for topology in a.topologies:
            chip, device = target(topology)
            for text in a.shapes:
                tokens, _, dim = map(int, text.split("x"))
                before = set(Path(folder).iterdir())
                compiled("fused", "gradient", Shape(tokens, 2, dim), 4, device)
                for name, products in (("forward", 2), ("backward", 5)):
                    files = set(Path(folder).glob(f"*sparse_causal_{name}*[0-9]-final_bundles.txt")) - before
                    count = inner_loops(min(files).read_text()) * (512 / _padding(tokens)[1]) ** 2
                    peak = products * 2 * 512**2 * dim / chip.flops * chip.clock if chip.clock else 0
                    cells = (f"{count:.0f}", *((f"{peak:.0f}", f"{peak / count:.3f}") if peak else ("", "")))
                    yield f"| {' | '.join((topology, text, name, *cells))} |"


def table(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    columns = ("chip", "tokens × heads × head size", "kernel", "pass", "temporaries, MiB", "GFLOP", "traffic, MiB")
    yield f"| {' | '.join((*columns, 'compiled in'))} |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        memory = f"{row['temporaries'] / 2**20:.0f}" if "temporaries" in row else "does not fit"
        seconds = f"{row['compile_seconds']} s" if "compile_seconds" in row else ""
        yield (
            f"| {row['topology']} | {row['shape']} | {row['kernel']} | {row['way']} | {memory} | "
            f"{row['flops'] / 1e9:.0f} | {row['moved'] / 2**20:.0f} | {seconds} |"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=["v5e:1x1"])
    parser.add_argument("--shapes", nargs="+", default=["4096x8x40", "1024x8x80", "9216x5x64"])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each row")
    parser.add_argument("--schedule", action="store_true", help="the inner loops of the fused kernel")
    a = parser.parse_args(argv)
    if a.schedule:
        for line in schedule(a):
            print(line, flush=True)
        return 0

    def rows() -> Iterator[dict[str, Any]]:
        for topology in a.topologies:
            _, device = target(topology)
            for text in a.shapes:
                shape = Shape(*map(int, text.split("x")))
                for kernel in KERNELS:
                    for way in ("forward", "gradient"):
                        case = {"topology": topology, "shape": text, "kernel": kernel, "way": way, "frames": a.frames}
                        print(f"{topology} {text} {kernel} {way}", file=sys.stderr)
                        counts = work(kernel, way, shape, a.frames)._asdict()
                        yield case | counts | compiled(kernel, way, shape, a.frames, device)

    for line in (json.dumps(row) for row in rows()) if a.json else table(rows()):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

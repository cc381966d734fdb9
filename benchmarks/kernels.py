"""The attention kernels through the real TPU compiler: memory, FLOPs and bytes moved, without a TPU.

    pip install libtpu
    python benchmarks/kernels.py --topologies v5e:1x1 v6e:1x1 v5:2x2x1 > kernels.md

Temporaries are the compiler's. FLOPs and bytes are counted from what a kernel does, since the compiler does not look
into them: every product of matrices, every block that a grid fetches or stores, with the filling that a layout brings.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tav_jax.kernels import frame_attention
from tav_jax.kernels.attention import BLOCK

KERNELS = ("plain", "splash", "fused")


class Shape(NamedTuple):
    tokens: int
    heads: int
    dim: int


class Work(NamedTuple):
    flops: float
    moved: float  # bytes between the chip and its memory


def work(kernel: str, way: str, shape: Shape, frames: int) -> Work:
    """Of one call, in bfloat16. "gradient" is forward and backward."""
    tokens, heads, dim = shape
    learned = way == "gradient"
    # Products of a tile: q·k and p·v; in the way back q·k again, and one for each of dv, dp, dk, dq.
    products = 2 + 5 * learned
    seen = 2 * frames if kernel != "fused" else 2 + 2 * (frames - 2)  # in frames; 0 and 1 look at one only
    flops = products * 2.0 * seen * heads * tokens**2 * dim
    # One of q, k, v, …, of one frame. Where the size is the last axis it is filled up to 128.
    filled = math.ceil(dim / 16) * 16 if kernel == "fused" else math.ceil(dim / 128) * 128
    frame = 2.0 * heads * filled * tokens
    if kernel == "fused":
        forward = frame * (2 * frames + 2 * (frames - 1) + 2)  # q, out; k, v of the frames before, and of frame 0
        backward = frame * (3 * frames + 2 * (frames - 1) + 2 + 3 * frames + 2 * 2 * 2)  # frame 0's sums in float32
        return Work(flops, forward + learned * backward)
    # Keys and values of two frames are read and stored side by side; in the way back their gradients are summed up.
    side_by_side = frame * frames * (8 + 6 * learned)
    if kernel == "splash":
        blocks = max(1, tokens // BLOCK)  # everything is fetched again for each block of what it meets
        forward = frame * frames * (2 + 4 * blocks)
        backward = frame * frames * (8 + 2 * blocks * (2 + 2))  # dq is stored in a part for each block of keys
        return Work(flops, forward + learned * backward + side_by_side)
    scores = 4.0 * seen * heads * tokens**2
    rows = frame * frames * (2 + 4 + learned * (4 + 8))
    return Work(flops, rows + scores * (3 + 6 * learned) + side_by_side)


def compiled(kernel: str, way: str, shape: Shape, frames: int, device: Any) -> dict[str, Any]:
    """Inputs and outputs are rows `[F, T, N·D]`, as the projections around an attention make and take them."""
    rows = jax.ShapeDtypeStruct(
        (1, frames, shape.tokens, shape.heads * shape.dim), jnp.bfloat16, sharding=SingleDeviceSharding(device)
    )

    def forward(*qkv):
        heads = (x.reshape(*x.shape[:-1], shape.heads, shape.dim) for x in qkv)
        return frame_attention(*heads, "sparse-causal", kernel).reshape(rows.shape)

    def gradient(q, k, v, g):
        return jax.vjp(forward, q, k, v)[1](g)

    started = time.perf_counter()
    program = jax.jit({"forward": forward, "gradient": gradient}[way])
    try:
        done = program.lower(*(rows,) * (3 if way == "forward" else 4)).compile()
    except Exception as error:  # the compiler refuses what does not fit
        return {"refused": next((line for line in str(error).splitlines() if "emory" in line), str(error)[:200])}
    return {
        "temporaries": done.memory_analysis().temp_size_in_bytes,
        "compile_seconds": round(time.perf_counter() - started, 1),
    }


def table(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    yield "| chip | tokens / heads / size | kernel | | temporaries, MiB | GFLOP | moved, MiB | compiled in |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        memory = f"{row['temporaries'] / 2**20:.0f}" if "temporaries" in row else "does not fit"
        seconds = f"{row['compile_seconds']} s" if "compile_seconds" in row else ""
        yield (
            f"| {row['topology']} | {row['shape']} | {row['kernel']} | {row['way']} | {memory} | "
            f"{row['flops'] / 1e9:.0f} | {row['moved'] / 2**20:.0f} | {seconds} |"
        )


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=["v5e:1x1"])
    parser.add_argument("--shapes", nargs="+", default=["4096x8x40", "1024x8x80", "9216x5x64"])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--json", action="store_true", help="a line for each row, instead of a table")
    a = parser.parse_args(given)

    def rows() -> Iterator[dict[str, Any]]:
        for topology in a.topologies:
            device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
            for text in a.shapes:
                shape = Shape(*map(int, text.split("x")))
                for kernel in KERNELS:
                    for way in ("forward", "gradient"):
                        about = {"topology": topology, "shape": text, "kernel": kernel, "way": way, "frames": a.frames}
                        print(f"{topology} {text} {kernel} {way}", file=sys.stderr)
                        counted = work(kernel, way, shape, a.frames)._asdict()
                        yield about | counted | compiled(kernel, way, shape, a.frames, device)

    for line in (json.dumps(row) for row in rows()) if a.json else table(rows()):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

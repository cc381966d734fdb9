"""What the TPU compiler takes its time for: the UNet's building blocks, each compiled by itself.

    pip install libtpu
    python benchmarks/compile_time.py > benchmarks/compile_time.md

Processor seconds and bytes of code. Six convolutions alike are a chain: the compiler may find what it has done already.
Attention of few tokens (16²) is plain XLA, as in the UNet.
"""

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

from tav_jax.kernels import ENOUGH_TOKENS, attend_frames

LEVELS = ((64, 320, 8), (32, 640, 8), (16, 1280, 8))  # side, channels, heads
FRAMES = 4


class Took(NamedTuple):
    seconds: float
    code: int


def compiled(function: Any, *shapes: tuple[int, ...], device: Any, **options: bool) -> Took:
    where = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=where) for shape in shapes]
    lowered = jax.jit(function).lower(*arguments)
    begin = time.process_time()
    done = lowered.compile(compiler_options=options or None)
    return Took(time.process_time() - begin, done.memory_analysis().generated_code_size_in_bytes)


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def chain(x, *kernels):
    for kernel in kernels:
        x = jax.nn.silu(convolve(x, kernel))
    return x


def attend(q, k, v):
    return attend_frames(q, k, v, "sparse-causal", "fused")


def attend_and_back(q, k, v, g):
    return jax.vjp(attend, q, k, v)[1](g)


def rows(device: Any) -> Iterator[str]:
    def row(name: str, took: Took) -> str:
        print(f"{name}: {took.seconds:.1f} s", file=sys.stderr)
        return f"| {name} | {took.seconds:.1f} s | {(took.code - nothing.code) / 1e6:.2f} MB |"

    nothing = compiled(lambda x: x + 1, (8, 128), device=device)
    yield "| | compiled in | code |"
    yield "|---|---:|---:|"
    for side, channels, heads in LEVELS:
        at = f"{channels} channels at {side}²"
        picture = (FRAMES, side, side, channels)
        qkv = (1, FRAMES, side * side, heads, channels // heads)
        yield row(f"convolution 3 × 3, {at}", compiled(convolve, picture, (3, 3, channels, channels), device=device))
        yield row(f"product of matrices, {at}", compiled(jnp.matmul, picture, (channels, 4 * channels), device=device))
        kernel = "kernel" if side * side >= ENOUGH_TOKENS else "attention, plain"
        yield row(f"sparse-causal {kernel}, {at}", compiled(attend, qkv, qkv, qkv, device=device))
        yield row(f"the same with its gradient, {at}", compiled(attend_and_back, *(qkv,) * 4, device=device))
    picture, kernels = (FRAMES, 32, 32, 640), [(3, 3, 640, 640)] * 6
    ways = {
        "": {},
        ", nothing found again": {"xla_jf_hlo_deduplication": False},
        ", code shared": {"xla_tpu_enable_deduplicated_calls": True},
    }
    for name, options in ways.items():
        yield row(f"six convolutions alike{name}", compiled(chain, picture, *kernels, device=device, **options))


def main() -> int:
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1").devices[0]
    for line in rows(device):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

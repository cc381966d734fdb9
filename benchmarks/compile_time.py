"""What the TPU compiler takes its time for: the UNet's building blocks, each compiled by itself.

    pip install libtpu
    python benchmarks/compile_time.py > benchmarks/compile_time.md

Processor seconds and bytes of code. Six convolutions alike are a chain, and so are two blocks: the compiler may find
what it has done already. Blocks are compiled as a step of tuning has them, computed again for the backward pass.
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
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tav_jax.kernels import MIN_KERNEL_TOKENS, frame_attention
from tav_jax.models import UNetConfig
from tav_jax.models.remat import policy
from tav_jax.models.unet import Parts
from tav_jax.training.train_step import trainable_filter

LEVELS = ((64, 320, 8), (32, 640, 8), (16, 1280, 8))  # side, channels, heads
FRAMES = 4


class Took(NamedTuple):
    seconds: float
    code: int


def compiled(function: Any, *arguments: Any, device: Any, **options: Any) -> Took:
    """Arguments are shapes of bfloat16, or trees of such as say their own type."""
    where = SingleDeviceSharding(device)

    def lies(x: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), x)

    known = [jax.ShapeDtypeStruct(x, jnp.bfloat16) if isinstance(x, tuple) else x for x in arguments]
    lowered = jax.jit(function).lower(*map(lies, known))
    begin = time.process_time()
    done = lowered.compile(compiler_options=options or None)
    return Took(time.process_time() - begin, done.memory_analysis().generated_code_size_in_bytes)


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def chain(x, *kernels):
    for kernel in kernels:
        x = jax.nn.silu(convolve(x, kernel))
    return x


def full_attention(q, k, v):
    return frame_attention(q, k, v, "sparse-causal", "fused")


def attend_and_back(q, k, v, g):
    return jax.vjp(full_attention, q, k, v)[1](g)


def blocks(kind: str, side: int, channels: int, heads: int, count: int) -> tuple[Any, ...]:
    """A chain of resnets or transformers with its gradient, and what it takes."""
    config = UNetConfig(kernel="fused")

    def chain():
        parts = Parts(config, jnp.bfloat16, nnx.Rngs(0))
        make = {
            "resnet": lambda: parts.resnet(channels, channels),
            "transformer": lambda: parts.transformer(channels, heads),
        }
        return nnx.Dict(mid_block=nnx.List([make[kind]() for _ in range(count)]))  # a name that has weights to learn

    graph, trained, frozen = nnx.split(nnx.eval_shape(chain), trainable_filter(), ...)
    trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trained)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), frozen)
    beside = (1, 4 * config.block_out_channels[0]) if kind == "resnet" else (1, 77, config.cross_attention_dim)
    picture = (1, FRAMES, side, side, channels)

    def forward(trained, frozen, x, beside):
        for block in nnx.merge(graph, trained, frozen)["mid_block"]:
            x = policy("block").block(block, x, beside, None)
        return x

    def both(trained, frozen, x, beside, g):
        y, back = jax.vjp(lambda trained, x: forward(trained, frozen, x, beside), trained, x)
        return y, *back(g)

    return both, trained, frozen, picture, beside, picture


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
        kernel = "kernel" if side * side >= MIN_KERNEL_TOKENS else "attention, plain"
        yield row(f"sparse-causal {kernel}, {at}", compiled(full_attention, qkv, qkv, qkv, device=device))
        yield row(f"the same with its gradient, {at}", compiled(attend_and_back, *(qkv,) * 4, device=device))
    picture, kernels = (FRAMES, 32, 32, 640), [(3, 3, 640, 640)] * 6
    ways = {
        "": {},
        ", nothing found again": {"xla_jf_hlo_deduplication": False},
        ", code shared": {"xla_tpu_enable_deduplicated_calls": True},
    }
    for name, options in ways.items():
        yield row(f"six convolutions alike{name}", compiled(chain, picture, *kernels, device=device, **options))
    for side, channels, heads in LEVELS:
        for kind in ("resnet", "transformer"):
            for count, said in ((1, f"a {kind}"), (2, f"two {kind}s")):
                took = compiled(*blocks(kind, side, channels, heads, count), device=device)
                yield row(f"{said} with gradient, {channels} channels at {side}²", took)
    jax.config.update("jax_optimization_level", "O1")
    took = compiled(*blocks("transformer", *LEVELS[0], 1), device=device)
    yield row(f"a transformer with gradient, {LEVELS[0][1]} channels at {LEVELS[0][0]}², `O1`", took)


def main() -> int:
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1").devices[0]
    for line in rows(device):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compile times of the UNet's building blocks, each compiled by itself with the TPU compiler.

    pip install --target="$VIRTUAL_ENV/tpu-compiler" libtpu
    python benchmarks/compile_time.py > benchmarks/compile_time.md

Processor seconds and bytes of code. Chains of equal convolutions and blocks show whether the compiler reuses what it
has compiled before. Blocks are compiled with their gradient and recomputed for the backward pass, as in a training
step. Attention of few tokens (16²) is plain XLA, as in the UNet.
"""

import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from tav_jax.plan import prepare_environment

prepare_environment()

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from tav_jax.kernels import MIN_KERNEL_TOKENS, frame_attention
from tav_jax.models import Conditioning, UNetConfig
from tav_jax.models.remat import policy
from tav_jax.models.unet import Layers
from tav_jax.training.train_step import trainable_filter

LEVELS = ((64, 320, 8), (32, 640, 8), (16, 1280, 8))  # side, channels, heads
FRAMES = 4


class Compilation(NamedTuple):
    seconds: float
    code: int


def compile_function(function: Any, *arguments: Any, device: Any, **options: Any) -> Compilation:
    """Arguments are shapes of bfloat16 arrays, or pytrees of `ShapeDtypeStruct`."""
    sharding = SingleDeviceSharding(device)

    def place(x: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), x)

    shapes = [jax.ShapeDtypeStruct(x, jnp.bfloat16) if isinstance(x, tuple) else x for x in arguments]
    lowered = jax.jit(function).lower(*map(place, shapes))
    begin = time.process_time()
    program = lowered.compile(compiler_options=options or None)
    return Compilation(time.process_time() - begin, program.memory_analysis().generated_code_size_in_bytes)


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def chain(x, *kernels):
    for kernel in kernels:
        x = jax.nn.silu(convolve(x, kernel))
    return x


def full_attention(q, k, v):
    return frame_attention(q, k, v, "sparse-causal", "fused")


def attention_gradient(q, k, v, g):
    return jax.vjp(full_attention, q, k, v)[1](g)


def blocks(kind: str, side: int, channels: int, heads: int, count: int) -> tuple[Any, ...]:
    """A chain of resnets or transformers with its gradient, and the function's arguments."""
    config = UNetConfig(kernel="fused")

    def chain():
        layers = Layers(config, jnp.bfloat16, nnx.Rngs(0))
        make = {
            "resnet": lambda: layers.resnet(channels, channels),
            "transformer": lambda: layers.transformer(channels, heads),
        }
        return nnx.Dict(mid_block=nnx.List([make[kind]() for _ in range(count)]))  # a name with trainable layers

    graph, trained, frozen = nnx.split(nnx.eval_shape(chain), trainable_filter(), ...)
    trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trained)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), frozen)
    time_or_text = (1, 4 * config.block_out_channels[0]) if kind == "resnet" else (1, 77, config.cross_attention_dim)
    image = (1, FRAMES, side, side, channels)

    def forward(trained, frozen, x, time_or_text):
        rest = (time_or_text,) if kind == "resnet" else (Conditioning(time_or_text),)
        for block in nnx.merge(graph, trained, frozen)["mid_block"]:
            x = policy("block").block(block, x, *rest)
        return x

    def with_gradient(trained, frozen, x, time_or_text, g):
        y, vjp = jax.vjp(lambda trained, x: forward(trained, frozen, x, time_or_text), trained, x)
        return y, *vjp(g)

    return with_gradient, trained, frozen, image, time_or_text, image


def rows(device: Any) -> Iterator[str]:
    def row(name: str, done: Compilation) -> str:
        print(f"{name}: {done.seconds:.1f} s", file=sys.stderr)
        return f"| {name} | {done.seconds:.1f} s | {(done.code - empty.code) / 1e6:.2f} MB |"

    def compiled(*arguments: Any, **options: Any) -> Compilation:
        return compile_function(*arguments, device=device, **options)

    empty = compiled(lambda x: x + 1, (8, 128))
    yield "# Compile times of the UNet's parts on a v5e"
    yield ""
    yield "Each part is compiled by itself, without a TPU; times are processor seconds."
    yield "`benchmarks/compile_time.py` writes this table; [`TPU_PLAN.md`](TPU_PLAN.md) interprets it."
    yield ""
    yield "| program | compiled in | code |"
    yield "|---|---:|---:|"
    for side, channels, heads in LEVELS:
        level = f"{channels} channels at {side}²"
        image = (FRAMES, side, side, channels)
        qkv = (1, FRAMES, side * side, heads, channels // heads)
        yield row(f"3 × 3 convolution, {level}", compiled(convolve, image, (3, 3, channels, channels)))
        yield row(f"matrix product, {level}", compiled(jnp.matmul, image, (channels, 4 * channels)))
        kernel = "kernel" if side * side >= MIN_KERNEL_TOKENS else "attention, plain"
        yield row(f"sparse-causal {kernel}, {level}", compiled(full_attention, qkv, qkv, qkv))
        yield row(f"the same with its gradient, {level}", compiled(attention_gradient, *(qkv,) * 4))
    image, kernels = (FRAMES, 32, 32, 640), [(3, 3, 640, 640)] * 6
    variants = {
        "": {},
        ", without deduplication": {"xla_jf_hlo_deduplication": False},
        ", with shared code": {"xla_tpu_enable_deduplicated_calls": True},
    }
    for name, options in variants.items():
        yield row(f"six equal convolutions{name}", compiled(chain, image, *kernels, **options))
    for side, channels, heads in LEVELS:
        for kind in ("resnet", "transformer"):
            for count, name in ((1, f"one {kind}"), (2, f"two {kind}s")):
                done = compiled(*blocks(kind, side, channels, heads, count))
                yield row(f"{name} with gradient, {channels} channels at {side}²", done)
    jax.config.update("jax_optimization_level", "O1")
    done = compiled(*blocks("transformer", *LEVELS[0], 1))
    yield row(f"one transformer with gradient, {LEVELS[0][1]} channels at {LEVELS[0][0]}², `O1`", done)


def main() -> int:
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1").devices[0]
    for line in rows(device):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

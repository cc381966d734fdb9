"""Time on the host to call a jitted function with the arguments of a tuning step or of a denoising loop.

    python benchmarks/host.py

The arguments have the structure of Stable Diffusion 1.4's, with one element in each array, and the function returns
one of them: what remains is the time to flatten and hash the arguments and to dispatch. Processor milliseconds per
call, the least of 30: for modules as they are, and flattened once (`tav_jax/models/arguments.py`).
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tav_jax.io import weights
from tav_jax.models import UNet, UNetConfig
from tav_jax.models.arguments import FlatTree, Static
from tav_jax.training import train_step


def milliseconds(function: Any, *arguments: Any) -> float:
    times = []
    for _ in range(31):
        begin = time.process_time()
        jax.block_until_ready(function(*arguments))
        times.append(time.process_time() - begin)
    return 1000 * min(times)


def main() -> None:
    unet = weights.abstract(UNet, UNetConfig.sd1(), jnp.bfloat16)
    unet = jax.tree.map(lambda x: jnp.zeros(1, x.dtype), unet)
    graph, trained, frozen = nnx.split(unet, train_step.trainable_filter(), ...)
    state = train_step.TrainState.create(trained)
    step = jax.jit(lambda graph, state, frozen: jax.tree.leaves(state)[0], static_argnums=0)
    loop = jax.jit(lambda unet: jax.tree.leaves(unet)[0])
    print("| call | arrays | as modules, ms | flattened once, ms |\n|---|---|---|---|")
    for name, call, before, after in (
        ("tuning step", step, (graph, state, frozen), (Static(graph), state, FlatTree(frozen))),
        ("denoising loop", loop, (unet,), (FlatTree(unet),)),
    ):
        count = len(jax.tree.leaves(before[-2:]))
        print(f"| {name} | {count} | {milliseconds(call, *before):.2f} | {milliseconds(call, *after):.2f} |")


if __name__ == "__main__":
    main()

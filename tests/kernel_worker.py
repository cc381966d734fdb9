"""Run by `test_kernels.py` in a process of its own, which has as many virtual devices as the mesh needs."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from tav_jax.distributed import sharding
from tav_jax.distributed.sharding import CLIP, constrain
from tav_jax.kernels import frame_attention


def main(data: int, frames: int, batch: int) -> None:
    arrays = [jax.random.normal(jax.random.key(i), (batch, 2 * frames, 70, 2, 16)) for i in range(4)]

    def output_and_gradients(kernel):
        def run(q, k, v, g):
            q, k, v, g = (constrain(x, CLIP) for x in (q, k, v, g))
            out, back = jax.vjp(lambda *x: frame_attention(*x, "sparse-causal", kernel), q, k, v)
            return tuple(constrain(x, CLIP) for x in (out, *back(g)))

        return jax.jit(run)

    plain = output_and_gradients("plain")(*arrays)
    with sharding.use_mesh(sharding.make_mesh((data, frames))):
        placed = [jax.jit(lambda x: constrain(x, CLIP))(x) for x in arrays]
        sharded = output_and_gradients("interpret")
        ours = sharded(*placed)
        text = sharded.lower(*placed).compile().as_text()
    kinds = re.findall(r"(all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-start)?\(", text)
    errors = [float(jnp.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(ours, plain, strict=True)]
    print(json.dumps({"errors": errors, "collectives": sorted(set(kinds))}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

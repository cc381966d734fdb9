"""JAX's own flash attention for TPUs, over full (unmasked) attention of any length."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LANES, BLOCK = 128, 1024


def _filled(tokens: int) -> tuple[int, int]:
    """The length that so many tokens are filled up to, and the block that divides it."""
    block = min(BLOCK, -(-tokens // LANES) * LANES)
    return -(-tokens // block) * block, block


def splash(
    q: Float[Array, "B F T N D"], k: Float[Array, "B F S N D"], v: Float[Array, "B F S N D"], *, interpret: bool = False
) -> Float[Array, "B F T N D"]:
    """`softmax(q kᵀ / √d) v` for every frame."""
    from jax.experimental.pallas.ops.tpu import splash_attention as sa  # loads slowly

    (b, f, t, n, d), s = q.shape, k.shape[2]
    (queries, q_block), (keys, k_block) = _filled(t), _filled(s)

    def heads(x, tokens):
        x = jnp.swapaxes(x.reshape(b * f, -1, n, d), 1, 2)  # [B·F, N, T, D]
        return jnp.pad(x, ((0, 0), (0, 0), (0, tokens - x.shape[2]), (0, 0)))

    half = max(block for block in (128, 256, 512) if k_block % block == 0)
    sizes = sa.BlockSizes(
        block_q=q_block,
        block_kv=k_block,
        block_kv_compute=half,
        block_q_dkv=q_block,
        block_kv_dkv=k_block,
        block_kv_dkv_compute=half,
        use_fused_bwd_kernel=True,
    )
    mask = sa.MultiHeadMask([sa.FullMask((queries, keys))] * n)
    run = sa.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    # What only fills up belongs to another segment than what is real, and is not seen.
    segments = sa.SegmentIds(q=jnp.zeros(queries, jnp.int32), kv=jnp.asarray((np.arange(keys) >= s).astype(np.int32)))
    scaled = (heads(q, queries) / math.sqrt(d)).astype(q.dtype)
    out: Any = jax.vmap(run, in_axes=(0, 0, 0, None))(
        scaled, heads(k, keys), heads(v, keys), segments if keys != s else None
    )
    return jnp.swapaxes(out[:, :, :t], 1, 2).reshape(b, f, t, n, d)

"""One door for all attention: `softmax(q kᵀ / √d) v`.

Shapes: q `[..., T, N, D]`, k and v `[..., S, N, D]`; T queries, S keys, N heads of size D.
"""

import math

import jax
from jaxtyping import Array, Bool, Float

# The scores of many frames at once would be the peak of the whole network (2 GB a frame at 512²), so they are made a
# few frames at a time, and made again for the backward pass.
SCORES_AT_ONCE = 2**30  # bytes


def frames_at_once(queries: int, keys: int, heads: int) -> int:
    """How many attentions of this size have their scores in memory together."""
    return max(1, SCORES_AT_ONCE // (4 * queries * keys * heads))


def attend(
    q: Float[Array, "*batch T N D"],
    k: Float[Array, "*batch S N D"],
    v: Float[Array, "*batch S N D"],
    seen: Bool[Array, "S"] | None = None,
    *,
    fast: bool = False,
) -> Float[Array, "*batch T N D"]:
    """Full attention over the keys (over those that are `seen`, if given); every leading axis is a batch.

    Scores and softmax are in float32 whatever the input's type, which also is what a Stable Diffusion 2.1 config
    asks for with `upcast_attention`. `fast` is for NVIDIA GPUs: cuDNN's kernel, for shapes and types that it takes.
    """
    batch = q.shape[:-3]
    if fast and seen is None and q.dtype.itemsize == 2 and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0:
        four = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))  # [n, T or S, N, D]
        return jax.nn.dot_product_attention(*four, implementation="cudnn").reshape(q.shape)
    flat = math.prod(batch)
    q, k, v = (x.reshape(flat, *x.shape[-3:]) for x in (q, k, v))  # [n, T or S, N, D]
    mask = None if seen is None else seen[None, None, None]  # [1, 1, 1, S]
    group = frames_at_once(q.shape[1], k.shape[1], q.shape[2])
    if group >= flat:
        out = jax.nn.dot_product_attention(q, k, v, mask=mask)  # [n, T, N, D]
    else:
        one = jax.checkpoint(lambda qkv: jax.nn.dot_product_attention(*qkv, mask=mask))
        out = jax.lax.map(one, (q, k, v), batch_size=group)
    return out.reshape(*batch, *out.shape[-3:])

"""One door for all attention: `softmax(q kᵀ / √d) v`.

Shapes: q `[..., T, N, D]`, k and v `[..., S, N, D]`; T queries, S keys, N heads of size D.
"""

import math

import jax
from jaxtyping import Array, Float


def attend(
    q: Float[Array, "*batch T N D"], k: Float[Array, "*batch S N D"], v: Float[Array, "*batch S N D"]
) -> Float[Array, "*batch T N D"]:
    """Full attention over the last token axis; every leading axis is a batch.

    Scores and softmax are in float32 whatever the input's type, which also is what a Stable Diffusion 2.1 config
    asks for with `upcast_attention`.
    """
    batch = q.shape[:-3]
    flat = math.prod(batch)
    q, k, v = (x.reshape(flat, *x.shape[-3:]) for x in (q, k, v))  # [n, T or S, N, D]
    out = jax.nn.dot_product_attention(q, k, v)  # [n, T, N, D]
    return out.reshape(*batch, *out.shape[-3:])

"""Attention, `softmax(q kᵀ / √d) v`, and spatial attention between the frames of a clip.

Shapes: q `[..., T, N, D]`, k and v `[..., S, N, D]` with T queries, S keys and N heads of size D. The kernels for
spatial attention:

| name        | runs on    | implementation                                                                        |
|-------------|------------|---------------------------------------------------------------------------------------|
| `plain`     | everywhere | XLA                                                                                   |
| `fused`     | TPU        | the Pallas kernel in `sparse_causal.py`, which reads the keys of both frames in place |
| `splash`    | TPU        | JAX's splash attention on concatenated keys and values                                |
| `cudnn`     | NVIDIA GPU | cuDNN's fused attention: from Ampere on, 16-bit types, head size at most 128          |
| `interpret` | everywhere | the `fused` kernel in Pallas' interpreter: for tests, exact and very slow             |

A shape that a kernel does not support is computed by XLA.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from tav_jax.config import Kernel, SpatialAttention, check_choice
from tav_jax.distributed.sharding import CLIP, map_shards, mesh_axes
from tav_jax.errors import InputError
from tav_jax.kernels.sparse_causal import RESIDUALS, fits, sparse_causal

EVERYWHERE = ("cpu", "gpu", "tpu")
RUNS_ON = {"plain": EVERYWHERE, "fused": ("tpu",), "splash": ("tpu",), "cudnn": ("gpu",), "interpret": EVERYWHERE}
FASTEST: dict[str, Kernel] = {"tpu": "fused", "gpu": "cudnn"}
CUDNN_CAPABILITY = 8.0  # the lowest for which cuDNN has fused attention

# With fewer tokens, the scores are small and most of a kernel's block would be padding.
MIN_KERNEL_TOKENS = 512

# The scores of all frames would be the largest array of the network (2 GB a frame at 512²). They are computed for as
# many frames at a time as fit into this size, and recomputed in the backward pass.
MAX_SCORE_BYTES = 2**30

OUTPUT = "attention"  # the `checkpoint_name` of the result, where it is not one of a kernel's residuals

SPLASH_LANES, SPLASH_BLOCK = 128, 1024


def choose_kernel(name: str, platform: str, device: Any = None) -> Kernel:
    """The kernel to use on a platform: the fastest one for "auto", else the named one. `device`: one of the platform's,
    by default the first one here."""
    capability = _cuda_capability(device) if platform == "gpu" else CUDNN_CAPABILITY
    if name == "auto":
        return FASTEST.get(platform, "plain") if capability >= CUDNN_CAPABILITY else "plain"
    check_choice("model.kernel", name)
    if platform not in RUNS_ON[name]:
        supported = [kernel for kernel in RUNS_ON if platform in RUNS_ON[kernel] and kernel != "interpret"]
        raise InputError(
            f"attention kernel {name!r} runs on {' and '.join(RUNS_ON[name])} only, and this is {platform}; use "
            f"auto or {' or '.join(supported)}"
        )
    if name == "cudnn" and capability < CUDNN_CAPABILITY:
        raise InputError(
            f"attention kernel 'cudnn' needs an NVIDIA GPU of compute capability {CUDNN_CAPABILITY} or higher, such as "
            f"an A100, and this one has {capability}; use auto or plain"
        )
    return name  # pyright: ignore[reportReturnType]


def _cuda_capability(device: Any) -> float:
    """Of an NVIDIA GPU, such as 8.0; 0 for any other device."""
    try:
        return float((device or jax.local_devices()[0]).compute_capability)
    except (AttributeError, ValueError):  # of AMD GPUs it is a name
        return 0.0


def attention_batch_size(queries: int, keys: int, heads: int) -> int:
    """How many frames' scores are computed at a time."""
    return max(1, MAX_SCORE_BYTES // (4 * queries * keys * heads))


def full_attention(
    q: Float[Array, "*batch T N D"],
    k: Float[Array, "*batch S N D"],
    v: Float[Array, "*batch S N D"],
    key_mask: Bool[Array, "S"] | None = None,
    *,
    cudnn: bool = False,
) -> Float[Array, "*batch T N D"]:
    """Attention over all keys, or over those where `key_mask` is true. Every leading axis is a batch axis.

    Scores and softmax are in float32 for any dtype of the input, as Stable Diffusion 2.1's `upcast_attention` requires.
    With `cudnn`, cuDNN's kernel is used for the shapes and dtypes that it supports.
    """
    shape = q.shape
    q, k, v = (x.reshape(math.prod(shape[:-3]), *x.shape[-3:]) for x in (q, k, v))  # [n, T or S, N, D]
    mask = None if key_mask is None else key_mask[None, None, None]  # [1, 1, 1, S]
    batch_size = attention_batch_size(q.shape[1], k.shape[1], q.shape[2])
    if cudnn and mask is None and q.dtype.itemsize == 2 and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0:
        out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    elif batch_size >= len(q):
        out = jax.nn.dot_product_attention(q, k, v, mask=mask)  # [n, T, N, D]
    else:
        attend = jax.checkpoint(lambda qkv: jax.nn.dot_product_attention(*qkv, mask=mask))
        out = jax.lax.map(attend, (q, k, v), batch_size=batch_size)
    return checkpoint_name(out.reshape(shape), OUTPUT)


def key_frames(x: Float[Array, "B F T N D"], attention: SpatialAttention) -> Float[Array, "B F S N D"]:
    """The keys (or values) of the frames that each frame attends to.

    With "sparse-causal", frame 0 and the previous frame (for frames 0 and 1, frame 0 twice), so that S = 2T: only frame
    0 attends to itself. The ablations: with "first-frame", frame 0; with "per-frame", the frame itself, as in the 2D
    network.
    """
    if attention == "per-frame":
        return x
    first = jnp.broadcast_to(x[:, :1], x.shape)  # [B, F, T, N, D]
    if attention == "first-frame":
        return first
    previous = jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)  # [B, F, T, N, D]
    return jnp.concatenate([first, previous], axis=2)  # [B, F, 2T, N, D]


def frame_attention(
    q: Float[Array, "B F T N D"],
    k: Float[Array, "B F U N D"],
    v: Float[Array, "B F U N D"],
    attention: SpatialAttention,
    kernel: Kernel = "plain",
) -> Float[Array, "B F T N D"]:
    """Spatial attention: the queries of each frame over the keys and values of its key frames."""
    tokens, _, dim = q.shape[2:]
    call = functools.partial(map_shards, specs=(CLIP,) * 3)
    if kernel == "interpret" or tokens >= MIN_KERNEL_TOKENS:
        if kernel in ("fused", "interpret") and attention == "sparse-causal" and fits(tokens, dim, q.dtype.itemsize):
            size = mesh_axes().get("frames")
            axis = "frames" if size and q.shape[1] % size == 0 else None
            return call(functools.partial(sparse_causal, axis=axis, interpret=kernel == "interpret"), q, k, v)
        if kernel in ("fused", "splash"):
            return call(splash, q, key_frames(k, attention), key_frames(v, attention))
    plain = functools.partial(full_attention, cudnn=kernel == "cudnn")
    return call(plain, q, key_frames(k, attention), key_frames(v, attention))


def splash(
    q: Float[Array, "B F T N D"], k: Float[Array, "B F S N D"], v: Float[Array, "B F S N D"], *, interpret: bool = False
) -> Float[Array, "B F T N D"]:
    """JAX's splash attention, without a mask, for each frame."""
    from jax.experimental.pallas.ops.tpu import splash_attention as sa  # slow to import

    (b, f, t, n, d), s = q.shape, k.shape[2]
    (queries, q_block), (keys, k_block) = _splash_padding(t), _splash_padding(s)

    def to_heads(x, tokens):
        x = jnp.swapaxes(x.reshape(b * f, -1, n, d), 1, 2)  # [B·F, N, T, D]
        return jnp.pad(x, ((0, 0), (0, 0), (0, tokens - x.shape[2]), (0, 0)))

    compute = max(block for block in (128, 256, 512) if k_block % block == 0)
    sizes = sa.BlockSizes(
        block_q=q_block,
        block_kv=k_block,
        block_kv_compute=compute,
        block_q_dkv=q_block,
        block_kv_dkv=k_block,
        block_kv_dkv_compute=compute,
        use_fused_bwd_kernel=True,
    )
    mask = sa.MultiHeadMask([sa.FullMask((queries, keys))] * n)
    names: Any = {"residual_checkpoint_name": RESIDUALS}
    kernel = sa.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret, **names)
    # Padded keys have another segment id, so that no query attends to them.
    segments = sa.SegmentIds(q=jnp.zeros(queries, jnp.int32), kv=jnp.asarray((np.arange(keys) >= s).astype(np.int32)))
    scaled = (to_heads(q, queries) / math.sqrt(d)).astype(q.dtype)  # splash attention does not scale
    out: Any = jax.vmap(kernel, in_axes=(0, 0, 0, None))(
        scaled, to_heads(k, keys), to_heads(v, keys), segments if keys != s else None
    )
    return jnp.swapaxes(out[:, :, :t], 1, 2).reshape(b, f, t, n, d)


def _splash_padding(tokens: int) -> tuple[int, int]:
    """The padded length of so many tokens, and the block size that divides it."""
    block = min(SPLASH_BLOCK, -(-tokens // SPLASH_LANES) * SPLASH_LANES)
    return -(-tokens // block) * block, block

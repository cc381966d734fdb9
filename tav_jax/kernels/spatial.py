"""Attention of frames to frames: what each frame looks at, and which kernel computes it.

`[B, F, T, N, D]`: T tokens, N heads of size D. The kernels:

plain      XLA. Everywhere.
fused      our own, for sparse-causal attention on TPUs: reads both frames where they are (`sparse_causal.py`).
splash     JAX's own for TPUs, on keys and values laid side by side.
cudnn      on NVIDIA GPUs, in half precision and heads of at most 128.
interpret  the fused one without a TPU, for tests: exact and very slow.

A kernel that cannot take a shape leaves it to plain XLA, which is as fast where there are few tokens.
"""

import functools
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from tav_jax.kernels.attend import attend
from tav_jax.kernels.sparse_causal import fits, sparse_causal
from tav_jax.kernels.splash import splash
from tav_jax.sharding import CLIP, axes, on_each_device

SpatialAttention = Literal["sparse-causal", "first-frame", "per-frame"]
Kernel = Literal["plain", "fused", "splash", "cudnn", "interpret"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)
RUNS_ON = {"plain": ("cpu", "gpu", "tpu"), "fused": ("tpu",), "splash": ("tpu",), "cudnn": ("gpu",)}
RUNS_ON["interpret"] = RUNS_ON["plain"]
BEST: dict[str, Kernel] = {"tpu": "fused", "gpu": "cudnn"}

# With fewer, scores are small and a kernel's blocks mostly filling.
ENOUGH_TOKENS = 512


class KernelError(ValueError):
    """A kernel was asked for where it cannot run."""


def choose(wanted: str, platform: str) -> Kernel:
    """The kernel for a platform: the best there is for "auto", else the one that is wanted."""
    if wanted == "auto":
        return BEST.get(platform, "plain")
    if wanted not in KERNELS:
        raise KernelError(f"attention kernel {wanted!r} is not one of auto, {', '.join(KERNELS)}")
    if platform not in RUNS_ON[wanted]:
        able = [name for name in KERNELS if platform in RUNS_ON[name] and name != "interpret"]
        raise KernelError(
            f"attention kernel {wanted!r} runs on {' and '.join(RUNS_ON[wanted])} only, and this is {platform}; use "
            f"auto or {' or '.join(able)}"
        )
    return wanted  # type: ignore[return-value]


def frames_seen(x: Float[Array, "B F T N D"], sees: SpatialAttention) -> Float[Array, "B F S N D"]:
    """The keys (or values) that each frame's queries look at.

    sparse-causal: frame 0 and the frame before (frame 0 again for frames 0 and 1), so S = 2T. A frame does not see
    itself, but for frame 0. The two ablations see frame 0 only, or only the frame itself, as the 2D network does.
    """
    if sees == "per-frame":
        return x
    first = jnp.broadcast_to(x[:, :1], x.shape)  # [B, F, T, N, D]
    if sees == "first-frame":
        return first
    before = jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)  # [B, F, T, N, D]
    return jnp.concatenate([first, before], axis=2)  # [B, F, 2T, N, D]


def attend_frames(
    q: Float[Array, "B F T N D"],
    k: Float[Array, "B F U N D"],
    v: Float[Array, "B F U N D"],
    sees: SpatialAttention,
    kernel: Kernel = "plain",
) -> Float[Array, "B F T N D"]:
    """Each frame's queries over the keys and values of the frames that it sees."""
    tokens, _, dim = q.shape[2:]
    each = functools.partial(on_each_device, specs=(CLIP,) * 3)
    if kernel == "interpret" or tokens >= ENOUGH_TOKENS:
        if kernel in ("fused", "interpret") and sees == "sparse-causal" and fits(tokens, dim, q.dtype.itemsize):
            over = axes().get("frames")
            axis = "frames" if over and q.shape[1] % over == 0 else None
            return each(functools.partial(sparse_causal, axis=axis, interpret=kernel == "interpret"), q, k, v)
        if kernel in ("fused", "splash"):
            return each(splash, q, frames_seen(k, sees), frames_seen(v, sees))
    plain = functools.partial(attend, fast=kernel == "cudnn")
    return each(plain, q, frames_seen(k, sees), frames_seen(v, sees))

"""Convolutional layers that the UNet and the VAE share.

Inputs are `[..., H, W, C]`. A convolution treats all leading axes as batch axes, so that a 3×3 kernel of the 2D network
is used as the 1×3×3 kernel of the video network.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tav_jax.distributed.sharding import CLIP, REPLICATED, map_shards
from tav_jax.models.conditioning import Conditioning
from tav_jax.models.controls import take_from_source
from tav_jax.models.norms import group_norm, group_norm_mask

# One number for all sides, or (before, after) for each axis.
Padding = int | Sequence[tuple[int, int]]


class Conv(nnx.Conv):
    """`nnx.Conv`, run under `shard_map` for a clip `[B, F, H, W, C]`: XLA's convolution has a single batch axis, and
    merging the sharded axes B and F into it would gather the clip on every device."""

    def __call__(self, inputs: Float[Array, "*b h w cin"], *rest: Any, **options: Any) -> Float[Array, "*b h2 w2 cout"]:
        if inputs.ndim < 5:
            return super().__call__(inputs, *rest, **options)
        graph, weights = nnx.split(self)

        def convolve(x, weights):
            return nnx.Conv.__call__(nnx.merge(graph, weights), x, *rest, **options)

        return map_shards(convolve, inputs, weights, specs=(CLIP, REPLICATED))


def conv(cin: int, cout: int, size: int = 3, *, stride: int = 1, padding: Padding | None = None, dtype, rngs) -> Conv:
    padding = size // 2 if padding is None else padding  # as in torch; XLA's "SAME" differs at stride 2
    return Conv(cin, cout, (size, size), strides=stride, padding=padding, dtype=dtype, rngs=rngs)


class ResnetBlock(nnx.Module):
    """norm → silu → conv, plus the time embedding, norm → silu → conv, plus the shortcut."""

    def __init__(
        self,
        cin: int,
        cout: int,
        *,
        groups: int,
        epsilon: float,
        time_dim: int | None = None,
        controlled: bool = False,
        dtype,
        rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        self.controlled = controlled  # whether every row may use the source's residual
        self.norm1 = group_norm(cin, groups, epsilon, **kw)
        self.conv1 = conv(cin, cout, **kw)
        if time_dim is not None:
            self.time_emb_proj = nnx.Linear(time_dim, cout, **kw)
        self.norm2 = group_norm(cout, groups, epsilon, **kw)
        self.conv2 = conv(cout, cout, **kw)
        if cin != cout:
            self.conv_shortcut = conv(cin, cout, 1, **kw)

    def __call__(
        self,
        x: Float[Array, "B *rest cin"],
        time: Float[Array, "B time_dim"] | None = None,
        conditioning: Conditioning | None = None,
    ) -> Float[Array, "B *rest cout"]:
        frame_mask = conditioning.frame_mask if conditioning else None
        h = self.conv1(nnx.silu(self.norm1(x, mask=group_norm_mask(frame_mask, x))))  # [B, ..., H, W, cout]
        if time is not None:
            t = self.time_emb_proj(nnx.silu(time))  # [B, cout]
            h = h + t.reshape(t.shape[0], *(1,) * (h.ndim - 2), t.shape[-1])
        h = self.conv2(nnx.silu(self.norm2(h, mask=group_norm_mask(frame_mask, h))))
        if self.controlled and conditioning is not None and (controls := conditioning.controls) is not None:
            h = take_from_source(h, controls.features, controls.rows)
        if hasattr(self, "conv_shortcut"):
            x = self.conv_shortcut(x)
        return x + h


class Downsample(nnx.Module):
    """Halve H and W with a strided convolution. The UNet pads all sides by one, the VAE the bottom and the right."""

    def __init__(self, channels: int, *, padding: Padding = 1, dtype, rngs):
        self.conv = conv(channels, channels, stride=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*lead h w c"]) -> Float[Array, "*lead h2 w2 c"]:
        return self.conv(x)


def resize_nearest(x: Float[Array, "*lead h w c"], size: tuple[int, int]) -> Float[Array, "*lead h2 w2 c"]:
    """Nearest-neighbor resize with torch's source index, `i · in // out`."""
    for axis, out in zip((-3, -2), size, strict=True):
        source = x.shape[axis]
        if out == 2 * source:
            x = jnp.repeat(x, 2, axis=axis)  # the usual case; cheaper than a gather
        elif out != source:
            x = jnp.take(x, jnp.arange(out) * source // out, axis=axis)
    return x


class Upsample(nnx.Module):
    """Nearest-neighbor resize to `size`, by default twice H and W, and a convolution."""

    def __init__(self, channels: int, *, dtype, rngs):
        self.conv = conv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "*lead h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "*lead h2 w2 c"]:
        return self.conv(resize_nearest(x, size or (2 * x.shape[-3], 2 * x.shape[-2])))

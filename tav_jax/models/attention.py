"""The transformer of the video UNet: sparse-causal, cross and temporal attention.

Tokens are `[B, F, T, C]` with T = H·W; split into heads they are `[B, F, T, N, D]`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tav_jax.config import Kernel, SpatialAttention
from tav_jax.distributed.sharding import CLIP, FRAMES, PROMPTS, REPLICATED, constrain, map_shards
from tav_jax.kernels import frame_attention, full_attention
from tav_jax.models.conditioning import Conditioning
from tav_jax.models.controls import AttentionControls, controlled_cross_attention, take_from_source
from tav_jax.models.norms import group_norm, layer_norm
from tav_jax.models.resnet import Conv

# torch's default for a linear layer: uniform in ±1/√fan_in, which has a third of the variance of Flax's default.
torch_default = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Attention(nnx.Module):
    """The four projections of an attention layer, and the three ways in which the video UNet uses one."""

    def __init__(self, dim: int, context_dim: int, heads: int, *, zero_output: bool = False, dtype, rngs):
        kw = {"dtype": dtype, "rngs": rngs, "kernel_init": torch_default}
        self.heads = heads
        self.to_q = nnx.Linear(dim, dim, use_bias=False, **kw)
        self.to_k = nnx.Linear(context_dim, dim, use_bias=False, **kw)
        self.to_v = nnx.Linear(context_dim, dim, use_bias=False, **kw)
        if zero_output:
            kw["kernel_init"] = nnx.initializers.zeros_init()
        self.to_out = nnx.List([nnx.Linear(dim, dim, **kw)])

    def project(self, x: Float[Array, "*b T c"], context: Float[Array, "*b2 S e"]):
        """Queries of x, keys and values of the context, split into heads `[..., N, D]`."""
        projected = (self.to_q(x), self.to_k(context), self.to_v(context))
        return tuple(y.reshape(*y.shape[:-1], self.heads, y.shape[-1] // self.heads) for y in projected)

    def output(self, x: Float[Array, "*b T N D"]) -> Float[Array, "*b T c"]:
        return self.to_out[0](x.reshape(*x.shape[:-2], -1))

    def spatial(
        self,
        x: Float[Array, "B F T c"],
        attention: SpatialAttention,
        kernel: Kernel = "plain",
        controls: AttentionControls | None = None,
    ) -> Float[Array, "B F T c"]:
        """Every frame attends to its key frames: frame 0 and the previous frame in sparse-causal attention. With
        `controls`, every row may use the queries and keys of the source."""
        q, k, v = self.project(x, x)  # [B, F, T, N, D]
        if controls is not None:
            q, k = (take_from_source(y, controls.self_attention, controls.rows) for y in (q, k))
        return self.output(frame_attention(q, k, v, attention, kernel))

    def cross(self, x: Float[Array, "B F T c"], conditioning: Conditioning) -> Float[Array, "B F T c"]:
        """Every token attends to the text embeddings, which all frames share."""
        # Frames are folded into the query axis, so that keys and values need not be repeated for every frame.
        b, f, t, c = x.shape
        if conditioning.controls is not None:
            q, k, v = self.project(x, conditioning.text)  # [B, F, T, N, D], [B, L, N, D]
            specs = (FRAMES, REPLICATED, REPLICATED, REPLICATED)
            x, maps = map_shards(controlled_cross_attention, q, k, v, conditioning.controls, specs=specs)
            self.word_maps = nnx.Intermediate(maps)  # [M, F, T]; the caller removes it with nnx.pop
            return self.output(x)
        q, k, v = self.project(x.reshape(b, f * t, c), conditioning.text)  # [B, F·T, N, D], [B, L, N, D]
        return self.output(map_shards(full_attention, q, k, v, specs=(CLIP, PROMPTS, PROMPTS))).reshape(b, f, t, c)

    def temporal(self, x: Float[Array, "B F T c"], conditioning: Conditioning) -> Float[Array, "B F T c"]:
        """Every position attends to itself in all frames but padding: not causal, without position encoding."""
        # On a mesh, positions are sharded in here and frames outside, which costs two all-to-alls. Without constraints
        # XLA gathers the clip on every device. Without the constraint on the input, the sharding over positions
        # propagates backwards through the network, and the keys of every block are gathered.
        x = constrain(jnp.swapaxes(constrain(x, CLIP), 1, 2), CLIP)  # [B, T, F, C]
        mask = () if conditioning.frame_mask is None else (conditioning.frame_mask,)
        qkv = self.project(x, x)  # [B, T, F, N, D]
        x = map_shards(full_attention, *qkv, *mask, specs=(CLIP, CLIP, CLIP, REPLICATED)[: 3 + len(mask)])
        x = constrain(self.output(x), CLIP)
        return constrain(jnp.swapaxes(x, 1, 2), CLIP)  # [B, F, T, C]


@jax.custom_jvp
def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The exact GELU, x · Φ(x) with Φ(x) = (1 + erf(x/√2)) / 2, computed in float32. `jax.nn.gelu` uses erfc, which is
    several times as expensive on a TPU. The derivative, Φ(x) + x · φ(x), is stored in the dtype of x."""
    y = x.astype(jnp.float32)
    return (y * _normal_cdf(y)).astype(x.dtype)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y = x.astype(jnp.float32)
    derivative = _normal_cdf(y) + y * jnp.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
    return gelu(x), derivative.astype(x.dtype) * dx


def _normal_cdf(y: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(y * math.sqrt(0.5)))


class FeedForward(nnx.Module):
    """GEGLU with the exact (erf) GELU, and the output projection."""

    def __init__(self, dim: int, *, dtype, rngs):
        self.proj_in = nnx.Linear(dim, 8 * dim, dtype=dtype, rngs=rngs)
        self.proj_out = nnx.Linear(4 * dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        value, gate = jnp.split(self.proj_in(x), 2, axis=-1)  # [..., 4C] each
        return self.proj_out(value * gelu(gate))


class TransformerBlock(nnx.Module):
    """Spatial attention, cross-attention, feed-forward, temporal attention: each with its own norm and residual."""

    def __init__(
        self,
        dim: int,
        text_dim: int,
        heads: int,
        *,
        spatial_attention: SpatialAttention,
        temporal_attention: bool,
        kernel: Kernel,
        controlled: bool,
        dtype,
        rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        self.controlled = controlled  # whether controls apply to spatial attention
        self.spatial_attention: SpatialAttention = spatial_attention
        self.temporal_attention = temporal_attention
        self.kernel: Kernel = kernel
        self.norm1 = layer_norm(dim, **kw)
        self.attn1 = Attention(dim, dim, heads, **kw)
        self.norm2 = layer_norm(dim, **kw)
        self.attn2 = Attention(dim, text_dim, heads, **kw)
        self.norm3 = layer_norm(dim, **kw)
        self.ff = FeedForward(dim, **kw)
        self.norm_temp = layer_norm(dim, **kw)
        # Zero weights and bias of the output: for a single frame, the inflated network equals the 2D network.
        self.attn_temp = Attention(dim, dim, heads, zero_output=True, **kw)

    def __call__(self, x: Float[Array, "B F T c"], conditioning: Conditioning) -> Float[Array, "B F T c"]:
        controls = conditioning.controls if self.controlled else None
        x = x + self.attn1.spatial(self.norm1(x), self.spatial_attention, self.kernel, controls)
        x = x + self.attn2.cross(self.norm2(x), conditioning)
        x = x + self.ff(self.norm3(x))
        if self.temporal_attention:
            x = x + self.attn_temp.temporal(self.norm_temp(x), conditioning)
        return x


class Transformer(nnx.Module):
    """Latents to tokens, one transformer block, and back, with a residual. The group norm is per frame. `attention`:
    the options of `TransformerBlock`."""

    def __init__(
        self,
        dim: int,
        text_dim: int,
        heads: int,
        *,
        groups: int,
        linear_projection: bool,
        dtype,
        rngs,
        **attention: Any,
    ):
        kw = {"dtype": dtype, "rngs": rngs}

        def projection():  # the same arithmetic; the 1×1 convolution keeps the tensor shapes of Stable Diffusion 1.x
            return nnx.Linear(dim, dim, **kw) if linear_projection else Conv(dim, dim, (1, 1), **kw)

        self.norm = group_norm(dim, groups, 1e-6, **kw)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List([TransformerBlock(dim, text_dim, heads, **attention, **kw)])
        self.proj_out = projection()

    def __call__(self, x: Float[Array, "B F H W c"], conditioning: Conditioning) -> Float[Array, "B F H W c"]:
        b, f, h, w, c = x.shape
        tokens = self.proj_in(jax.vmap(self.norm)(x)).reshape(b, f, h * w, c)  # [B, F, T, C]
        for block in self.transformer_blocks:
            tokens = block(tokens, conditioning)
        return x + self.proj_out(tokens.reshape(x.shape))

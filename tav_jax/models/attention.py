"""The transformer of the video UNet: sparse-causal, cross, and temporal attention.

Tokens are `[B, F, T, C]` with T = H·W; split into heads they are `[B, F, T, N, D]`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from tav_jax.kernels import Kernel, SpatialAttention, attend, attend_frames
from tav_jax.models.norms import group_norm, layer_norm
from tav_jax.models.remat import name_attention
from tav_jax.models.resnet import Conv
from tav_jax.sharding import CLIP, EVERYWHERE, PROMPTS, on_each_device, pin

# torch's default for a linear layer: uniform within ±1/√fan_in, a third of the variance that Flax would take.
torch_default = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Attention(nnx.Module):
    """The four projections. Which tokens meet which is the caller's choice."""

    def __init__(self, dim: int, context_dim: int, heads: int, *, zero_out: bool = False, dtype, rngs):
        kw = {"dtype": dtype, "rngs": rngs, "kernel_init": torch_default}
        self.heads = heads
        self.to_q = nnx.Linear(dim, dim, use_bias=False, **kw)
        self.to_k = nnx.Linear(context_dim, dim, use_bias=False, **kw)
        self.to_v = nnx.Linear(context_dim, dim, use_bias=False, **kw)
        if zero_out:
            kw["kernel_init"] = nnx.initializers.zeros_init()
        self.to_out = nnx.List([nnx.Linear(dim, dim, **kw)])

    def project(self, x: Float[Array, "*b T c"], context: Float[Array, "*b2 S e"]):
        """Queries of x, keys and values of the context, in heads `[..., N, D]`."""
        return tuple(
            y.reshape(*y.shape[:-1], self.heads, y.shape[-1] // self.heads)  # [..., N, D]
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )

    def join(self, x: Float[Array, "*b T N D"]) -> Float[Array, "*b T c"]:
        return self.to_out[0](name_attention(x.reshape(*x.shape[:-2], -1)))

    def spatial(
        self, x: Float[Array, "B F T c"], sees: SpatialAttention, kernel: Kernel = "plain"
    ) -> Float[Array, "B F T c"]:
        q, k, v = self.project(x, x)  # [B, F, T, N, D]
        return self.join(attend_frames(q, k, v, sees, kernel))

    def cross(self, x: Float[Array, "B F T c"], text: Float[Array, "B L e"]) -> Float[Array, "B F T c"]:
        # All frames share the text: fold them into the query axis instead of repeating keys and values.
        b, f, t, c = x.shape
        q, k, v = self.project(x.reshape(b, f * t, c), text)  # [B, F·T, N, D], [B, L, N, D]
        return self.join(on_each_device(attend, q, k, v, specs=(CLIP, PROMPTS, PROMPTS))).reshape(b, f, t, c)

    def temporal(self, x: Float[Array, "B F T c"], real: Bool[Array, "F"] | None = None) -> Float[Array, "B F T c"]:
        """Each position looks at itself in all (real) frames: not causal, no position encoding."""
        # Over a mesh every device takes some positions in all frames, and gives them back: two all-to-alls, where the
        # compiler by itself would gather the whole clip on every device. What comes in is pinned as well, or the spread
        # over positions would run backwards from here through the network, and every block's keys would be gathered.
        x = pin(jnp.swapaxes(pin(x, CLIP), 1, 2), CLIP)  # [B, T, F, C]
        seen = () if real is None else (real,)
        qkv = self.project(x, x)  # [B, T, F, N, D]
        x = on_each_device(attend, *qkv, *seen, specs=(CLIP, CLIP, CLIP, EVERYWHERE)[: 3 + len(seen)])
        x = pin(self.join(x), CLIP)
        return pin(jnp.swapaxes(x, 1, 2), CLIP)  # [B, F, T, C]


class FeedForward(nnx.Module):
    """GEGLU with the exact (erf) GELU, and a projection back."""

    def __init__(self, dim: int, *, dtype, rngs):
        self.proj_in = nnx.Linear(dim, 8 * dim, dtype=dtype, rngs=rngs)
        self.proj_out = nnx.Linear(4 * dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        value, gate = jnp.split(self.proj_in(x), 2, axis=-1)  # [..., 4C] each
        return self.proj_out(value * jax.nn.gelu(gate, approximate=False))


class TransformerBlock(nnx.Module):
    """x += spatial, x += text, x += feed-forward, x += temporal; in this order, each after its own norm."""

    def __init__(
        self,
        dim: int,
        text_dim: int,
        heads: int,
        *,
        spatial: SpatialAttention,
        temporal: bool,
        kernel: Kernel = "plain",
        dtype,
        rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        self.sees: SpatialAttention = spatial
        self.kernel: Kernel = kernel
        self.temporal = temporal
        self.norm1 = layer_norm(dim, **kw)
        self.attn1 = Attention(dim, dim, heads, **kw)
        self.norm2 = layer_norm(dim, **kw)
        self.attn2 = Attention(dim, text_dim, heads, **kw)
        self.norm3 = layer_norm(dim, **kw)
        self.ff = FeedForward(dim, **kw)
        self.norm_temp = layer_norm(dim, **kw)
        # With a zero output, bias included, one frame through the inflated network is the 2D network exactly.
        self.attn_temp = Attention(dim, dim, heads, zero_out=True, **kw)

    def __call__(
        self, x: Float[Array, "B F T c"], text: Float[Array, "B L e"], real: Bool[Array, "F"] | None = None
    ) -> Float[Array, "B F T c"]:
        x = x + self.attn1.spatial(self.norm1(x), self.sees, self.kernel)
        x = x + self.attn2.cross(self.norm2(x), text)
        x = x + self.ff(self.norm3(x))
        if self.temporal:
            x = x + self.attn_temp.temporal(self.norm_temp(x), real)
        return x


class Transformer(nnx.Module):
    """A picture-to-tokens projection around one transformer block; its group norm is per frame."""

    def __init__(
        self,
        dim: int,
        text_dim: int,
        heads: int,
        *,
        groups: int,
        linear_projection: bool,
        spatial: SpatialAttention,
        temporal: bool,
        kernel: Kernel = "plain",
        dtype,
        rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}

        def projection():  # the same arithmetic; the 1×1 convolution keeps Stable Diffusion 1's tensor shapes
            return nnx.Linear(dim, dim, **kw) if linear_projection else Conv(dim, dim, (1, 1), **kw)

        self.norm = group_norm(dim, groups, 1e-6, **kw)
        self.proj_in = projection()
        self.transformer_blocks = nnx.List(
            [TransformerBlock(dim, text_dim, heads, spatial=spatial, temporal=temporal, kernel=kernel, **kw)]
        )
        self.proj_out = projection()

    def __call__(
        self, x: Float[Array, "B F H W c"], text: Float[Array, "B L e"], real: Bool[Array, "F"] | None = None
    ) -> Float[Array, "B F H W c"]:
        b, f, h, w, c = x.shape
        tokens = jax.vmap(self.norm)(x)  # statistics of each frame alone
        tokens = self.proj_in(tokens).reshape(b, f, h * w, c)  # [B, F, T, C]
        for block in self.transformer_blocks:
            tokens = block(tokens, text, real)
        return x + self.proj_out(tokens.reshape(x.shape))

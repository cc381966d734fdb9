"""The autoencoder of Stable Diffusion, which works on single frames: `[N, H, W, 3]` ⇄ `[N, h, w, 4]`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from tav_jax.kernels import full_attention
from tav_jax.models.norms import group_norm
from tav_jax.models.resnet import Downsample, ResnetBlock, Upsample, conv

EPSILON = 1e-6  # of all group norms here; the UNet's is 1e-5


@dataclass(frozen=True)
class VAEConfig:
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def downsampling(self) -> int:
        """Pixels per latent along one side: 8 for Stable Diffusion."""
        return 2 ** (len(self.block_out_channels) - 1)


class Posterior(NamedTuple):
    """The encoder's Gaussian, before scaling."""

    mean: Float[Array, "N h w c"]
    std: Float[Array, "N h w c"]


class VAEAttention(nnx.Module):
    """Self-attention over one frame, with a single head and a residual connection."""

    def __init__(self, dim: int, groups: int, *, dtype, rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.group_norm = group_norm(dim, groups, EPSILON, **kw)
        self.to_q = nnx.Linear(dim, dim, **kw)
        self.to_k = nnx.Linear(dim, dim, **kw)
        self.to_v = nnx.Linear(dim, dim, **kw)
        self.to_out = nnx.List([nnx.Linear(dim, dim, **kw)])

    def __call__(self, x: Float[Array, "N h w c"]) -> Float[Array, "N h w c"]:
        n, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(n, h * w, 1, c)  # [N, T, 1, C]: one head
        out = full_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out).reshape(n, h, w, c)


class MidBlock(nnx.Module):
    def __init__(self, dim: int, groups: int, **kw):
        self.resnets = nnx.List([ResnetBlock(dim, dim, groups=groups, epsilon=EPSILON, **kw) for _ in range(2)])
        self.attentions = nnx.List([VAEAttention(dim, groups, **kw)])

    def __call__(self, x: Float[Array, "N h w c"]) -> Float[Array, "N h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nnx.Module):
    """The resnets of one resolution, and the downsampler or upsampler to the next one."""

    def __init__(self, cin: int, cout: int, layers: int, groups: int, resize: str, last: bool, **kw):
        self.resnets = nnx.List(
            [ResnetBlock(cin if i == 0 else cout, cout, groups=groups, epsilon=EPSILON, **kw) for i in range(layers)]
        )
        if resize == "down":
            padding = ((0, 1), (0, 1))  # bottom and right only
            self.downsamplers = nnx.List([] if last else [Downsample(cout, padding=padding, **kw)])
        else:
            self.upsamplers = nnx.List([] if last else [Upsample(cout, **kw)])
        self.resize = resize

    def __call__(self, x: Float[Array, "N h w c"]) -> Float[Array, "N h2 w2 c2"]:
        for resnet in self.resnets:
            x = resnet(x)
        for resize in self.downsamplers if self.resize == "down" else self.upsamplers:
            x = resize(x)
        return x


def levels(widths: Sequence[int], layers: int, groups: int, resize: str, **kw) -> list[Level]:
    inputs, last = (widths[0], *widths), len(widths) - 1
    return [Level(inputs[i], cout, layers, groups, resize, i == last, **kw) for i, cout in enumerate(widths)]


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, **kw):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv(config.in_channels, widths[0], **kw)
        self.down_blocks = nnx.List(levels(widths, config.layers_per_block, groups, "down", **kw))
        self.mid_block = MidBlock(widths[-1], groups, **kw)
        self.conv_norm_out = group_norm(widths[-1], groups, EPSILON, **kw)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, **kw)

    def __call__(self, x: Float[Array, "N H W c"]) -> Float[Array, "N h w c2"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, **kw):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = conv(config.latent_channels, widths[0], **kw)
        self.mid_block = MidBlock(widths[0], groups, **kw)
        self.up_blocks = nnx.List(levels(widths, config.layers_per_block + 1, groups, "up", **kw))
        self.conv_norm_out = group_norm(widths[-1], groups, EPSILON, **kw)
        self.conv_out = conv(widths[-1], config.out_channels, **kw)

    def __call__(self, x: Float[Array, "N h w c"]) -> Float[Array, "N H W c2"]:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """Pixels are in [−1, 1]. Latents are not scaled: the caller applies `config.scaling_factor`."""

    def __init__(self, config: VAEConfig, *, dtype=jnp.float32, rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.config = config
        self.encoder = Encoder(config, **kw)
        self.quant_conv = conv(2 * config.latent_channels, 2 * config.latent_channels, 1, **kw)
        self.post_quant_conv = conv(config.latent_channels, config.latent_channels, 1, **kw)
        self.decoder = Decoder(config, **kw)

    def encode(self, pixels: Float[Array, "N H W 3"]) -> Posterior:
        moments = self.quant_conv(self.encoder(pixels)).astype(jnp.float32)  # [N, h, w, 2c]
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0)))

    def decode(self, latents: Float[Array, "N h w c"]) -> Float[Array, "N H W 3"]:
        return self.decoder(self.post_quant_conv(latents))

"""The video UNet in one file: its config with presets, time embedding, blocks, network."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from tav_jax.config import Kernel, SpatialAttention
from tav_jax.distributed.sharding import pad_frames, unpad_frames
from tav_jax.models.attention import Transformer
from tav_jax.models.conditioning import Conditioning
from tav_jax.models.norms import group_norm, group_norm_mask
from tav_jax.models.remat import policy
from tav_jax.models.resnet import Downsample, ResnetBlock, Upsample, conv


def level_size(height: int, width: int, level: int) -> tuple[int, int]:
    """Height and width at a level of the UNet, for latents of this size."""
    return -(-height // 2**level), -(-width // 2**level)


@dataclass(frozen=True)
class UNetConfig:
    """Sizes and options. A tuple has one entry per level, from high to low resolution."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    down_attention: tuple[bool, ...] = (True, True, True, False)  # levels with transformers
    up_attention: tuple[bool, ...] = (False, True, True, True)  # from low to high resolution
    heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    spatial_attention: SpatialAttention = "sparse-causal"
    temporal_attention: bool = True
    kernel: Kernel = "plain"  # for spatial attention

    def word_map_level(self, height: int, width: int) -> int:
        """The level whose cross-attention maps show where words are: that of a quarter of the latents' side or, if its
        maps are smaller than 8×8 or it has no attention, one of a higher resolution."""
        levels = [i for i in range(3) if i < len(self.down_attention) and self.down_attention[i]]
        large = [i for i in levels if min(level_size(height, width, i)) >= 8]
        return max(large, default=min(levels, default=0))

    @classmethod
    def sd1(cls) -> "UNetConfig":
        return cls()

    @classmethod
    def sd2(cls) -> "UNetConfig":
        return cls(heads=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True)


def timestep_embedding(t: Num[Array, "B"], dim: int, flip_sin_to_cos: bool, shift: int) -> Float[Array, "B dim"]:
    """Sinusoidal embedding, in float32: at t ≈ 1000, a frequency rounded to 16 bits would give another angle."""
    half = dim // 2
    frequency = np.exp(-math.log(10000) * np.arange(half, dtype=np.float32) / np.float32(half - shift))
    angle = t.astype(jnp.float32)[:, None] * frequency  # [B, dim/2]
    parts = [jnp.cos(angle), jnp.sin(angle)] if flip_sin_to_cos else [jnp.sin(angle), jnp.cos(angle)]
    return jnp.pad(jnp.concatenate(parts, axis=-1), ((0, 0), (0, dim % 2)))


class TimeEmbedding(nnx.Module):
    def __init__(self, cin: int, dim: int, *, dtype, rngs):
        self.linear_1 = nnx.Linear(cin, dim, dtype=dtype, rngs=rngs)
        self.linear_2 = nnx.Linear(dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B cin"]) -> Float[Array, "B dim"]:
        return self.linear_2(nnx.silu(self.linear_1(x)))


class Layers:
    """Builds the resnets and transformers of one network, which differ only in widths and heads."""

    def __init__(self, config: UNetConfig, dtype, rngs):
        self.config, self.kw = config, {"dtype": dtype, "rngs": rngs}

    def resnet(self, cin: int, cout: int, *, controlled: bool = False) -> ResnetBlock:
        c, time_dim = self.config, 4 * self.config.block_out_channels[0]
        options = {"groups": c.norm_num_groups, "epsilon": c.norm_eps, "time_dim": time_dim, "controlled": controlled}
        return ResnetBlock(cin, cout, **options, **self.kw)

    def transformer(self, dim: int, heads: int, *, controlled: bool = False) -> Transformer:
        c = self.config
        return Transformer(
            dim,
            c.cross_attention_dim,
            heads,
            groups=c.norm_num_groups,
            linear_projection=c.use_linear_projection,
            spatial_attention=c.spatial_attention,
            temporal_attention=c.temporal_attention,
            kernel=c.kernel,
            controlled=controlled,
            **self.kw,
        )


class DownBlock(nnx.Module):
    def __init__(self, layers: Layers, cin: int, cout: int, *, depth: int, heads: int | None, last: bool):
        self.resnets = nnx.List([layers.resnet(cin if i == 0 else cout, cout) for i in range(depth)])
        self.attentions = nnx.List([layers.transformer(cout, heads) for _ in range(depth)] if heads else [])
        self.downsamplers = nnx.List([] if last else [Downsample(cout, **layers.kw)])

    def __call__(self, x, time, conditioning: Conditioning, *, run):
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = run(resnet, x, time, conditioning)
            if self.attentions:
                x = run(self.attentions[i], x, conditioning)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)  # [B, F, H/2, W/2, C]
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    def __init__(self, layers: Layers, dim: int, heads: int):
        self.resnets = nnx.List([layers.resnet(dim, dim) for _ in range(2)])
        self.attentions = nnx.List([layers.transformer(dim, heads)])

    def __call__(self, x, time, conditioning: Conditioning, *, run):
        x = run(self.resnets[0], x, time, conditioning)
        x = run(self.attentions[0], x, conditioning)
        return run(self.resnets[1], x, time, conditioning)


class UpBlock(nnx.Module):
    """`skip_dims`: channels of the skip connections, in the order in which they are consumed. `index`: of this block,
    on which it depends what two-branch editing controls (as in Plug-and-Play)."""

    def __init__(
        self,
        layers: Layers,
        cin: int,
        cout: int,
        *,
        index: int,
        skip_dims: list[int],
        heads: int | None,
        last: bool,
    ):
        resnets, attentions = [], []
        for i, skip in enumerate(skip_dims):
            features, queries = (index, i) == (1, 1), (index, i) >= (1, 1)
            resnets.append(layers.resnet((cin if i == 0 else cout) + skip, cout, controlled=features))
            if heads:
                attentions.append(layers.transformer(cout, heads, controlled=queries))
        self.resnets, self.attentions = nnx.List(resnets), nnx.List(attentions)
        self.upsamplers = nnx.List([] if last else [Upsample(cout, **layers.kw)])

    def __call__(self, x, time, conditioning: Conditioning, skips, *, run, size, layers: slice = slice(None)):
        for i, skip in zip(range(len(self.resnets))[layers], skips, strict=True):
            x = jnp.concatenate([x, skip], axis=-1)
            x = run(self.resnets[i], x, time, conditioning)
            if self.attentions:
                x = run(self.attentions[i], x, conditioning)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class UNet(nnx.Module):
    def __init__(self, config: UNetConfig, *, dtype=jnp.float32, rngs):
        c, kw = config, {"dtype": dtype, "rngs": rngs}
        layers, widths = Layers(c, dtype, rngs), c.block_out_channels
        levels = len(widths)
        self.config = config
        self.conv_in = conv(c.in_channels, widths[0], **kw)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0], **kw)

        skip_dims, cin, down = [widths[0]], widths[0], []
        for i, cout in enumerate(widths):
            last = i == levels - 1
            heads = c.heads[i] if c.down_attention[i] else None
            down.append(DownBlock(layers, cin, cout, depth=c.layers_per_block, heads=heads, last=last))
            skip_dims += [cout] * (c.layers_per_block + (not last))
            cin = cout
        self.down_blocks = nnx.List(down)
        self.mid_block = MidBlock(layers, cin, c.heads[-1])

        up = []
        for i, cout in enumerate(reversed(widths)):
            heads = c.heads[levels - 1 - i] if c.up_attention[i] else None
            consumed = [skip_dims.pop() for _ in range(c.layers_per_block + 1)]
            options = {"index": i, "heads": heads, "last": i == levels - 1}
            up.append(UpBlock(layers, cin, cout, skip_dims=consumed, **options))
            cin = cout
        self.up_blocks = nnx.List(up)

        self.conv_norm_out = group_norm(widths[0], c.norm_num_groups, c.norm_eps, **kw)
        self.conv_out = conv(widths[0], c.out_channels, **kw)

    def __call__(
        self,
        latents: Float[Array, "B F H W cin"],
        timesteps: Num[Array, "B"],
        conditioning: Conditioning,
        *,
        remat: str | bool = "none",
        return_features: bool = False,
    ) -> Any:
        """The predicted noise (or velocity), [B, F, H, W, cout]. `remat`: what is kept for the backward pass, see
        `models/remat.py`.

        With `return_features`, also the input of the last layer (the last resnet and transformer of the last up block).
        If the conditioning has such `features`, of an earlier step, only `conv_in`, this layer and `conv_out` are
        computed: the only skip connection of this layer is the output of `conv_in`.
        """
        c, run = self.config, policy(remat)
        time = timestep_embedding(timesteps, c.block_out_channels[0], c.flip_sin_to_cos, c.freq_shift)
        time = self.time_embedding(time)  # [B, 4·C0]

        frames = latents.shape[1]
        latents, frame_mask = pad_frames(latents, conditioning.frame_mask)
        conditioning = conditioning._replace(frame_mask=frame_mask)
        x = self.conv_in(latents)  # [B, F, H, W, C0]
        if (features := conditioning.features) is None:
            skips = [x]
            for block in self.down_blocks:
                x, outputs = run.level(block, x, time, conditioning, run=run.block)
                skips += outputs
            x = self.mid_block(x, time, conditioning, run=run.block)
            for i, block in enumerate(self.up_blocks, 1):
                consumed = [skips.pop() for _ in block.resnets]
                # Up to the size of the next skip connection: twice this one, or one less where that size is odd.
                options = {"run": run.block, "size": skips[-1].shape[-3:-1] if skips else None}
                if return_features and i == len(self.up_blocks):
                    features = x = block(x, time, conditioning, consumed[:-1], layers=slice(-1), **options)
                    consumed, options["layers"] = consumed[-1:], slice(-1, None)
                x = run.level(block, x, time, conditioning, consumed, **options)
        else:
            last = {"run": run.block, "size": None, "layers": slice(-1, None)}
            x = self.up_blocks[-1](features, time, conditioning, [x], **last)
        x = self.conv_norm_out(x, mask=group_norm_mask(frame_mask, x))
        x = unpad_frames(self.conv_out(nnx.silu(x)), frames)  # [B, F, H, W, out]
        return (x, features) if return_features else x

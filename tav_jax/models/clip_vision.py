"""CLIP: a vision tower beside the text encoder, and projections of both into one space.

Images `[n, H, W, 3]` and token ids `[n, L]` → embeddings `[n, D]`. Sizes are those of ViT-L/14; ViT-B/32 and ViT-H/14
differ in their configs only.
"""

from dataclasses import dataclass, field

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tav_jax.models.clip_text import ClipText, ClipTextConfig, Encoder, EncoderConfig
from tav_jax.models.norms import layer_norm


@dataclass(frozen=True)
class ClipVisionConfig(EncoderConfig):
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14


@dataclass(frozen=True)
class ClipConfig:
    text: ClipTextConfig = field(default_factory=ClipTextConfig)
    vision: ClipVisionConfig = field(default_factory=ClipVisionConfig)
    projection_dim: int = 768


class VisionEmbeddings(nnx.Module):
    """A class embedding and one embedding for each patch of an image."""

    def __init__(self, c: ClipVisionConfig, *, dtype, rngs):
        patch, patches = (c.patch_size, c.patch_size), (c.image_size // c.patch_size) ** 2
        kw = {"dtype": dtype, "rngs": rngs}
        self.class_embedding = nnx.Param(jnp.zeros(c.hidden_size))
        self.patch_embedding = nnx.Conv(3, c.hidden_size, patch, patch, padding="VALID", use_bias=False, **kw)
        self.position_embedding = nnx.Embed(patches + 1, c.hidden_size, **kw)

    def __call__(self, images: Float[Array, "n H W 3"]) -> Float[Array, "n T D"]:
        x = self.patch_embedding(images)  # [n, H/patch, W/patch, D]
        x = x.reshape(len(x), -1, x.shape[-1])  # [n, T - 1, D]
        first = jnp.broadcast_to(self.class_embedding[...], (len(x), 1, x.shape[-1])).astype(x.dtype)
        x = jnp.concatenate([first, x], axis=1)  # [n, T, D]
        return x + self.position_embedding(jnp.arange(x.shape[1]))


class ClipVision(nnx.Module):
    """The class embedding after the last layer and a norm."""

    def __init__(self, config: ClipVisionConfig, *, dtype=jnp.float32, rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.embeddings = VisionEmbeddings(config, **kw)
        self.pre_layrnorm = layer_norm(config.hidden_size, config.layer_norm_eps, **kw)  # spelled as in the weights
        self.encoder = Encoder(config, **kw)
        self.post_layernorm = layer_norm(config.hidden_size, config.layer_norm_eps, **kw)

    def __call__(self, images: Float[Array, "n H W 3"]) -> Float[Array, "n D"]:
        x = self.encoder(self.pre_layrnorm(self.embeddings(images)))  # [n, T, D]
        return self.post_layernorm(x[:, 0])


class ClipModel(nnx.Module):
    """Embeddings of length one. A score is their scalar product, in PickScore times `exp(logit_scale)`."""

    def __init__(self, config: ClipConfig, *, dtype=jnp.float32, rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.config = config
        self.text_model = ClipText(config.text, **kw)
        self.vision_model = ClipVision(config.vision, **kw)
        self.text_projection = nnx.Linear(config.text.hidden_size, config.projection_dim, use_bias=False, **kw)
        self.visual_projection = nnx.Linear(config.vision.hidden_size, config.projection_dim, use_bias=False, **kw)
        self.logit_scale = nnx.Param(jnp.zeros(()))

    def embed_images(self, images: Float[Array, "n H W 3"]) -> Float[Array, "n D"]:
        return _unit(self.visual_projection(self.vision_model(images)))

    def embed_texts(self, ids: Int[Array, "n L"], end: Int[Array, "n"]) -> Float[Array, "n D"]:
        """`end` is the position of the end token of each text, whose hidden state is projected."""
        hidden = self.text_model(ids)  # [n, L, D]
        return _unit(self.text_projection(hidden[jnp.arange(len(ids)), end]))


def _unit(x: Float[Array, "n D"]) -> Float[Array, "n D"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

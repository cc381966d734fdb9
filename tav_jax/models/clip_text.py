"""The text encoders of Stable Diffusion: CLIP ViT-L/14 (1.x) and OpenCLIP-H (2.x). Token ids `[n, L]` → `[n, L, D]`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from tav_jax.models.norms import layer_norm


@dataclass(frozen=True)
class EncoderConfig:
    """The layers of a text encoder or of a vision tower."""

    causal: ClassVar[bool] = False

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5


@dataclass(frozen=True)
class ClipTextConfig(EncoderConfig):
    causal: ClassVar[bool] = True

    vocab_size: int = 49408
    max_position_embeddings: int = 77

    @classmethod
    def sd1(cls) -> "ClipTextConfig":
        return cls()

    @classmethod
    def sd2(cls) -> "ClipTextConfig":
        """OpenCLIP-H without its last layer: Stable Diffusion 2 uses the output of the one before."""
        return cls(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
        )


class SelfAttention(nnx.Module):
    def __init__(self, dim: int, heads: int, causal: bool, **kw):
        self.heads, self.causal = heads, causal
        self.q_proj = nnx.Linear(dim, dim, **kw)
        self.k_proj = nnx.Linear(dim, dim, **kw)
        self.v_proj = nnx.Linear(dim, dim, **kw)
        self.out_proj = nnx.Linear(dim, dim, **kw)

    def __call__(self, x: Float[Array, "n L D"]) -> Float[Array, "n L D"]:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (y.reshape(*y.shape[:-1], self.heads, -1) for y in projected)  # [n, L, N, d]
        return self.out_proj(jax.nn.dot_product_attention(q, k, v, is_causal=self.causal).reshape(x.shape))


class MLP(nnx.Module):
    def __init__(self, dim: int, inner: int, act: str, **kw):
        self.act = act
        self.fc1 = nnx.Linear(dim, inner, **kw)
        self.fc2 = nnx.Linear(inner, dim, **kw)

    def __call__(self, x: Float[Array, "n L D"]) -> Float[Array, "n L D"]:
        x = self.fc1(x)  # [n, L, inner]
        x = x * jax.nn.sigmoid(1.702 * x) if self.act == "quick_gelu" else jax.nn.gelu(x, approximate=False)
        return self.fc2(x)


class Layer(nnx.Module):
    def __init__(self, c: EncoderConfig, **kw):
        self.layer_norm1 = layer_norm(c.hidden_size, c.layer_norm_eps, **kw)
        self.self_attn = SelfAttention(c.hidden_size, c.num_attention_heads, c.causal, **kw)
        self.layer_norm2 = layer_norm(c.hidden_size, c.layer_norm_eps, **kw)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, c.hidden_act, **kw)

    def __call__(self, x: Float[Array, "n L D"]) -> Float[Array, "n L D"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nnx.Module):
    def __init__(self, c: ClipTextConfig, **kw):
        self.token_embedding = nnx.Embed(c.vocab_size, c.hidden_size, **kw)
        self.position_embedding = nnx.Embed(c.max_position_embeddings, c.hidden_size, **kw)

    def __call__(self, ids: Int[Array, "n L"]) -> Float[Array, "n L D"]:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class Encoder(nnx.Module):
    def __init__(self, c: EncoderConfig, **kw):
        self.layers = nnx.List([Layer(c, **kw) for _ in range(c.num_hidden_layers)])

    def __call__(self, x: Float[Array, "n L D"]) -> Float[Array, "n L D"]:
        for layer in self.layers:
            x = layer(x)
        return x


class ClipText(nnx.Module):
    """The last hidden state after the final norm, which Stable Diffusion uses. Padding is not masked."""

    def __init__(self, config: ClipTextConfig, *, dtype=jnp.float32, rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.config = config
        self.embeddings = Embeddings(config, **kw)
        self.encoder = Encoder(config, **kw)
        self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, **kw)

    def __call__(self, ids: Int[Array, "n L"]) -> Float[Array, "n L D"]:
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))

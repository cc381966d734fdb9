"""Guidance: from the predictions of several rows of a batch to one prediction."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from tav_jax.diffusion.samplers import Denoiser


def classifier_free_guidance(denoise: Denoiser, scale: Float[Array, ""]) -> Denoiser:
    """`ε = ε_uncond + scale · (ε_cond − ε_uncond)`, from one call on both rows.

    `denoise` is called on the latents twice, for the text embeddings [unconditional; conditional].
    """

    def guided(latents, step):
        unconditional, conditional = jnp.split(denoise(jnp.concatenate([latents, latents]), step), 2)
        return unconditional + scale * (conditional - unconditional)

    return guided

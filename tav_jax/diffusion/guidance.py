"""Guidance: from the predictions of several rows of a batch to one prediction."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from tav_jax.diffusion.network import Network
from tav_jax.diffusion.samplers import Denoiser
from tav_jax.models import Conditioning


def guide(
    unconditional: Float[Array, "*s"], conditional: Float[Array, "*s"], scale: Float[Array, ""]
) -> Float[Array, "*s"]:
    """`ε = ε_uncond + scale · (ε_cond − ε_uncond)`"""
    return unconditional + scale * (conditional - unconditional)


def without_guidance(network: Network, conditioning: Conditioning) -> Denoiser:
    """The prediction for the conditioning, one row for each row of the latents."""

    def denoise(latents, step, carry):
        output, carry = network(latents, step, conditioning, carry)
        return output.prediction, carry

    return denoise


def classifier_free_guidance(network: Network, conditioning: Conditioning, scale: Float[Array, ""]) -> Denoiser:
    """Guidance from one call on the rows [unconditional; conditional]: the conditioning has twice as many rows as the
    latents."""

    def denoise(latents, step, carry):
        output, carry = network(jnp.concatenate([latents, latents]), step, conditioning, carry)
        unconditional, conditional = jnp.split(output.prediction, 2)
        return guide(unconditional, conditional, scale), carry

    return denoise

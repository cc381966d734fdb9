"""The networks. They do not depend on files, run configs or the command line.

Arrays are channels-last. Parameter paths follow Diffusers' names: `attn1.to_q` is the query projection of the spatial
attention.
"""

from tav_jax.models.clip_text import ClipText, ClipTextConfig
from tav_jax.models.clip_vision import ClipConfig, ClipModel, ClipVisionConfig
from tav_jax.models.conditioning import Conditioning
from tav_jax.models.controls import AttentionControls
from tav_jax.models.unet import UNet, UNetConfig
from tav_jax.models.vae import VAE, VAEConfig

__all__ = [
    "VAE",
    "AttentionControls",
    "ClipConfig",
    "ClipModel",
    "ClipText",
    "ClipTextConfig",
    "ClipVisionConfig",
    "Conditioning",
    "UNet",
    "UNetConfig",
    "VAEConfig",
]

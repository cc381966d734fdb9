"""The networks, and nothing else: no files, no configs of runs, no command line.

Arrays are channels-last everywhere. Parameter paths follow Diffusers' names, so that `attn1.to_q` is found at once.
"""

from tav_jax.models.clip_text import ClipText, ClipTextConfig
from tav_jax.models.unet import UNet, UNetConfig
from tav_jax.models.vae import VAE, VAEConfig

__all__ = ["VAE", "ClipText", "ClipTextConfig", "UNet", "UNetConfig", "VAEConfig"]

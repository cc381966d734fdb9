"""Accelerator kernels and the choice between them."""

from tav_jax.kernels.attend import attend, frames_at_once

__all__ = ["attend", "frames_at_once"]

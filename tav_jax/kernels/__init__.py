"""Accelerator kernels and the choice between them."""

from tav_jax.kernels.attend import attend

__all__ = ["attend"]

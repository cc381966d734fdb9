"""Attention kernels, and the choice between them."""

from tav_jax.kernels.attention import (
    MIN_KERNEL_TOKENS,
    OUTPUT,
    RESIDUALS,
    attention_batch_size,
    choose_kernel,
    frame_attention,
    full_attention,
)

__all__ = [
    "MIN_KERNEL_TOKENS",
    "OUTPUT",
    "RESIDUALS",
    "attention_batch_size",
    "choose_kernel",
    "frame_attention",
    "full_attention",
]

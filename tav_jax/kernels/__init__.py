"""Attention kernels, and the choice between them."""

from tav_jax.kernels.attention import (
    MIN_KERNEL_TOKENS,
    Kernel,
    SpatialAttention,
    attention_batch_size,
    choose_kernel,
    frame_attention,
    full_attention,
    key_frames,
)

__all__ = [
    "MIN_KERNEL_TOKENS",
    "Kernel",
    "SpatialAttention",
    "attention_batch_size",
    "choose_kernel",
    "frame_attention",
    "full_attention",
    "key_frames",
]

"""Accelerator kernels and the choice between them."""

from tav_jax.kernels.attend import attend, frames_at_once
from tav_jax.kernels.spatial import (
    ENOUGH_TOKENS,
    KERNELS,
    Kernel,
    KernelError,
    SpatialAttention,
    attend_frames,
    choose,
    frames_seen,
)

__all__ = [
    "ENOUGH_TOKENS",
    "KERNELS",
    "Kernel",
    "KernelError",
    "SpatialAttention",
    "attend",
    "attend_frames",
    "choose",
    "frames_at_once",
    "frames_seen",
]

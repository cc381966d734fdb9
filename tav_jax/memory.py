"""How much memory tuning and sampling will take: counted from the shapes, before anything is compiled."""

import os
from typing import NamedTuple

import jax

from tav_jax.kernels import ENOUGH_TOKENS, frames_at_once
from tav_jax.models import UNetConfig


class Need(NamedTuple):
    """Bytes."""

    weights: int
    tuning: int
    sampling: int  # one prompt, with guidance


def _attention(config: UNetConfig, frames: int, height: int, width: int, batch: int) -> int:
    """The scores of the largest attention, float32 and once more for the softmax."""
    largest = 0
    for level, (heads, has) in enumerate(zip(config.heads, config.down_attention, strict=True)):
        tokens = -(-height // 2**level) * -(-width // 2**level)
        if config.kernel != "plain" and tokens >= ENOUGH_TOKENS:
            continue  # a kernel that keeps its scores on the chip
        keys = 2 * tokens if config.spatial_attention == "sparse-causal" else tokens
        together = min(batch * frames, frames_at_once(tokens, keys, heads))
        largest = max(largest, has * together * heads * tokens * keys)
    return 2 * 4 * largest


def need(config: UNetConfig, frames: int, height: int, width: int, *, frozen: int, trained: int, itemsize: int) -> Need:
    """For latents of `height` × `width`, `frozen` bytes of weights and `trained` parameters.

    Tuning keeps the input of every block (two a layer, down and up) and works on one block at a time; its trained part
    is there in float32 with a gradient and two moments.
    """
    pixels = frames * height * width
    widths, layers = config.block_out_channels, config.layers_per_block
    kept = sum(2 * (2 * layers + 1) * c * (pixels >> (2 * level)) for level, c in enumerate(widths))
    working = 12 * 2 * widths[0] * pixels  # the widest feed-forward and its gradient, at full resolution
    scores = _attention(config, frames, height, width, 1)
    weights = frozen + 4 * trained
    return Need(
        weights=weights,
        tuning=weights + 12 * trained + itemsize * (kept + working) + 2 * scores,
        sampling=itemsize * 2 * (kept // 2 + working // 2) + _attention(config, frames, height, width, 2),
    )


def available() -> int | None:
    """Bytes that the first device can still give, or None where it does not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def prompts_at_once(wanted: int, each: int) -> int:
    """How many prompts are sampled as one batch: all, or as many as four fifths of the free memory hold."""
    free = available()
    return wanted if free is None else max(1, min(wanted, int(0.8 * free) // max(each, 1)))

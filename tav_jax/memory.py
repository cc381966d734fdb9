"""How much memory the work will take: counted from the shapes, before anything is compiled, and held against what there
is. The counts are of what must be there at once, so they are rather too low than too high: what is refused cannot fit.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from tav_jax.errors import InputError, ShortOfMemoryError, brief
from tav_jax.kernels import ENOUGH_TOKENS, frames_at_once
from tav_jax.models import UNetConfig, VAEConfig

CGROUP = Path("/sys/fs/cgroup")
LIMITS = (CGROUP / "memory.max", CGROUP / "memory/memory.limit_in_bytes")  # of a container, new and old
OVERRIDE = "TAV_MEMORY_GIB"  # of one device, for those who know better
GIB = 2**30


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


def need(
    config: UNetConfig,
    frames: int,
    height: int,
    width: int,
    *,
    frozen: int,
    trained: int,
    itemsize: int,
    remat: bool = True,
) -> Need:
    """For latents of `height` × `width`, `frozen` bytes of weights and `trained` parameters.

    Tuning keeps the input of every block (two a layer, down and up) and works on one block at a time; its trained part
    is there in float32 with a gradient and two moments, besides the model's own. Without `remat` all that a block
    computes is kept: some 30 arrays of its width in a transformer, 6 in a resnet.
    """
    pixels = frames * height * width
    widths, layers = config.block_out_channels, config.layers_per_block
    kept = sum(2 * (2 * layers + 1) * c * (pixels >> (2 * level)) for level, c in enumerate(widths))
    working = 12 * 2 * widths[0] * pixels  # the widest feed-forward and its gradient, at full resolution
    scores = _attention(config, frames, height, width, 1)
    weights = frozen + 4 * trained
    return Need(
        weights=weights,
        tuning=weights + 16 * trained + itemsize * ((kept if remat else 18 * kept) + working) + 2 * scores,
        sampling=itemsize * 2 * (kept // 2 + working // 2) + _attention(config, frames, height, width, 2),
    )


def autoencoding(config: VAEConfig, group: int, height: int, width: int, itemsize: int) -> int:
    """Bytes for `group` pictures of `height` × `width` at once: the input, the output and the shortcut of a residual
    block at full resolution, or the scores of the attention over a whole latent picture."""
    factor = config.downsampling
    tokens = (height // factor) * (width // factor)
    scores = 2 * 4 * tokens * tokens * min(group, frames_at_once(tokens, tokens, 1))
    return max(3 * itemsize * group * height * width * config.block_out_channels[0], scores)


# ------------------------------------------------------------------------------------------------- what there is


def capacity() -> int | None:
    """Bytes that one device has in all, or None where it does not say. A machine's memory is its CPU devices' share."""
    if told := os.environ.get(OVERRIDE):
        try:
            if 0 < float(told) < 1e9:
                return int(float(told) * GIB)
        except ValueError:
            pass
        raise InputError(f"{OVERRIDE} is {brief(told)}; it must be a number of GiB above 0, such as 15.5")
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if jax.default_backend() != "cpu":
        return None
    machine = [size for size in (_pages("SC_PHYS_PAGES"), *map(_number, LIMITS)) if size]
    return min(machine) // jax.local_device_count() if machine else None


def available() -> int | None:
    """Bytes that the first device can still give, or None where it does not say."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return _pages("SC_AVPHYS_PAGES")


def _pages(name: str) -> int | None:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None


def prompts_at_once(wanted: int, each: int) -> int:
    """How many prompts are sampled as one batch: all, or as many as four fifths of the free memory hold."""
    free = available()
    return wanted if free is None else max(1, min(wanted, int(0.8 * free) // max(each, 1)))


# ------------------------------------------------------------------------------------------------- what does not fit


class Shape(NamedTuple):
    """Of a clip, in pixels."""

    frames: int
    height: int
    width: int


class Work(NamedTuple):
    """Something that must fit: what it is called, on what clip, over how many devices its frames are spread, what one
    of them then holds (for any clip, any number of devices), and of what its sides are multiples."""

    doing: str
    shape: Shape
    devices: int
    count: Callable[[Shape, int], int]
    step: int
    with_remat: Callable[[Shape, int], int] | None = None  # the count with remat="block", where it is "none"

    def __str__(self) -> str:
        frames, height, width = self.shape
        return f"{self.doing} {frames} frame{'s' * (frames > 1)} of {height}×{width}"


def check(work: Work) -> None:
    """Refuse what one device cannot hold."""
    room = capacity()
    if room is not None and (needed := work.count(work.shape, work.devices)) > room:
        raise ShortOfMemoryError(
            f"{work} takes {needed / GIB:.2f} GiB or more on each device and {_device()} has {room / GIB:.2f}; "
            f"{mends(work, room)}, or set {OVERRIDE} if a device has more"
        )


@contextlib.contextmanager
def shortage(work: Work) -> Iterator[None]:
    """Memory that runs out all the same, because the count was too low or others use the device, is said alike."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if isinstance(error, ShortOfMemoryError):
            raise
        room = int(0.75 * work.count(work.shape, work.devices))  # some way below what did not do
        raise ShortOfMemoryError(f"memory ran out while {work} on {_device()}; {mends(work, room)}") from error


@contextlib.contextmanager
def guarded(work: Work) -> Iterator[None]:
    check(work)
    with shortage(work):
        yield


def _device() -> str:
    return f"this {jax.devices()[0].device_kind}"


def mends(work: Work, room: int) -> str:
    """Each single change with which `room` bytes do, counted like the need itself."""
    shape, step = work.shape, work.step

    def fits(frames: int, share: float, devices: int) -> bool:
        return work.count(Shape(frames, *_scaled(shape, share, step)), devices) <= room

    found = []
    if frames := _largest(shape.frames - 1, lambda n: fits(n, 1.0, work.devices)):
        found.append(f"{frames} frame{'s' * (frames > 1)}")
    sides = max(shape.height, shape.width) // step
    if side := _largest(sides - 1, lambda n: fits(shape.frames, n / sides, work.devices)):
        found.append("{}×{}".format(*_scaled(shape, side / sides, step)))
    if devices := next((n for n in range(work.devices + 1, shape.frames + 1) if fits(shape.frames, 1.0, n)), 0):
        found.append(f"{devices} devices")
    if work.with_remat and work.with_remat(shape, work.devices) <= room:
        found.append('remat="block"')
    return f"use {' or '.join(found)}" if found else "use a machine with more memory"


def _scaled(shape: Shape, share: float, step: int) -> tuple[int, int]:
    height, width = (max(step, int(side * share + 1e-6) // step * step) for side in shape[1:])
    return height, width


def _largest(most: int, good: Callable[[int], bool]) -> int:
    """The largest number up to `most` that is good, where all below a good one are good, too; 0 if none is."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low

"""Memory: what a computation needs, estimated from shapes before anything is compiled, against what a device has.

The estimates count only what must exist at the same time, so they are too low rather than too high: what is refused
cannot fit. Where a program has been compiled, its own `memory_analysis()` is exact (`tav plan`).
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from tav_jax.errors import InputError, OutOfMemoryError, short_repr
from tav_jax.kernels import MIN_KERNEL_TOKENS, attention_batch_size
from tav_jax.models import UNetConfig, VAEConfig

CGROUP = Path("/sys/fs/cgroup")
LIMITS = (CGROUP / "memory.max", CGROUP / "memory/memory.limit_in_bytes")  # of a container, cgroup v2 and v1
OVERRIDE = "TAV_MEMORY_GIB"  # environment variable: the memory of one device
GIB = 2**30


# ------------------------------------------------------------------------------------------------------------ estimates


class UNetMemory(NamedTuple):
    """Bytes."""

    weights: int
    tuning: int
    sampling: int  # one prompt with guidance


def _attention_bytes(config: UNetConfig, frames: int, height: int, width: int, batch: int) -> int:
    """The scores of the largest attention in float32, and their softmax."""
    largest = 0
    for level, (heads, has) in enumerate(zip(config.heads, config.down_attention, strict=True)):
        tokens = -(-height // 2**level) * -(-width // 2**level)
        if config.kernel != "plain" and tokens >= MIN_KERNEL_TOKENS:
            continue  # a fused kernel does not store scores
        keys = 2 * tokens if config.spatial_attention == "sparse-causal" else tokens
        simultaneous = min(batch * frames, attention_batch_size(tokens, keys, heads))
        largest = max(largest, has * simultaneous * heads * tokens * keys)
    return 2 * 4 * largest


def unet_memory(
    config: UNetConfig,
    frames: int,
    height: int,
    width: int,
    *,
    frozen: int,
    trained: int,
    itemsize: int,
    remat: bool = True,
) -> UNetMemory:
    """For latents of `height` × `width`, `frozen` bytes of weights and `trained` parameters.

    With remat, tuning keeps the input of every block (two a layer, down and up) and the intermediates of one block at a
    time; without it, all intermediates: about 30 arrays of a transformer's width, 6 of a resnet's. Trained parameters
    exist in the model and in float32 with a gradient and two moments.
    """
    pixels = frames * height * width
    widths, layers = config.block_out_channels, config.layers_per_block
    block_inputs = sum(2 * (2 * layers + 1) * c * (pixels >> (2 * level)) for level, c in enumerate(widths))
    working = 12 * 2 * widths[0] * pixels  # the widest feed-forward and its gradient, at full resolution
    scores = _attention_bytes(config, frames, height, width, 1)
    weights = frozen + 4 * trained
    kept = block_inputs if remat else 18 * block_inputs
    return UNetMemory(
        weights=weights,
        tuning=weights + 16 * trained + itemsize * (kept + working) + 2 * scores,
        sampling=itemsize * 2 * (block_inputs // 2 + working // 2) + _attention_bytes(config, frames, height, width, 2),
    )


def vae_memory(config: VAEConfig, batch_size: int, height: int, width: int, itemsize: int) -> int:
    """Bytes for a batch of frames: input, output and shortcut of a residual block at full resolution, or the scores of
    the attention over all latents of a frame."""
    factor = config.downsampling
    tokens = (height // factor) * (width // factor)
    scores = 2 * 4 * tokens * tokens * min(batch_size, attention_batch_size(tokens, tokens, 1))
    return max(3 * itemsize * batch_size * height * width * config.block_out_channels[0], scores)


class Shape(NamedTuple):
    """Of a clip, in pixels."""

    frames: int
    height: int
    width: int


class Workload(NamedTuple):
    """A computation that must fit: its name, its clip, the devices that share its frames, the bytes per device for any
    clip and number of devices, and what a side must be a multiple of."""

    name: str
    shape: Shape
    devices: int
    bytes_needed: Callable[[Shape, int], int]
    multiple: int
    bytes_with_remat: Callable[[Shape, int], int] | None = None  # with remat="block", where it is "none"

    def __str__(self) -> str:
        frames, height, width = self.shape
        return f"{self.name} {frames} frame{'s' * (frames > 1)} of {height}×{width}"


@dataclass(frozen=True)
class Estimator:
    """Estimates for one pipeline on one mesh."""

    unet: UNetConfig
    vae: VAEConfig
    weights: int  # bytes of the UNet's weights
    itemsize: int  # bytes of the model's dtype
    mesh: Mesh | None

    @classmethod
    def of(cls, unet: Any, vae: Any, dtype: Any, mesh: Mesh | None) -> "Estimator":
        weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(unet)))
        return cls(unet.config, vae.config, weights, dtype.itemsize, mesh)

    def _axis(self, name: str) -> int:
        return self.mesh.shape[name] if self.mesh else 1

    def _unet_memory(self, shape: Shape, devices: int, trained: int = 0, **options: Any) -> UNetMemory:
        factor = self.vae.downsampling
        frames, height, width = (
            -(-side // divisor) for side, divisor in zip(shape, (devices, factor, factor), strict=True)
        )
        held = {"frozen": self.weights - 4 * trained, "trained": trained, "itemsize": self.itemsize}
        return unet_memory(self.unet, frames, height, width, **{**held, **options})

    def _workload(self, name: str, latents: Any, needed: Callable[..., int], **more: Any) -> Workload:
        _, frames, height, width, _ = latents.shape
        factor = self.vae.downsampling
        shape = Shape(frames, height * factor, width * factor)
        return Workload(name, shape, self._axis("frames"), needed, factor, **more)

    def tuning(self, latents: Any, parameters: int, *, remat: str, fsdp: bool) -> Workload:
        """A training step of so many trained parameters."""
        trained = parameters // (self.mesh.size if fsdp and self.mesh else 1)

        def needed(shape: Shape, devices: int, remat: bool = remat != "none") -> int:
            return self._unet_memory(shape, devices, trained, remat=remat).tuning

        with_remat = functools.partial(needed, remat=True) if remat == "none" else None
        return self._workload("tuning on", latents, needed, bytes_with_remat=with_remat)

    def denoising(self, name: str, latents: Any, rows: int) -> Workload:
        """A step of inversion or sampling with so many rows of text embeddings."""

        def needed(shape: Shape, devices: int) -> int:
            memory = self._unet_memory(shape, devices)
            return memory.weights + memory.sampling * -(-rows // self._axis("data")) // 2

        return self._workload(name, latents, needed)

    def prompt_bytes(self, latents: Any) -> int:
        """What each additional prompt of a batch takes on a device."""
        workload = self.denoising("", latents, rows=2)
        return self._unet_memory(workload.shape, workload.devices, frozen=0).sampling // self._axis("data")

    def autoencoding(self, name: str, shape: Shape, batch_size: Callable[[int, int, int], int]) -> Workload:
        """Encoding or decoding, `batch_size(frames, height, width)` frames at a time on all devices together."""

        def needed(shape: Shape, devices: int) -> int:
            batch = -(-batch_size(*shape) // (self.mesh.size if self.mesh else 1))
            return vae_memory(self.vae, batch, shape.height, shape.width, self.itemsize)

        return Workload(name, shape, 1, needed, self.vae.downsampling)


# ------------------------------------------------------------------------------------------------------------- capacity


def capacity() -> int | None:
    """Total bytes of one device, None where it is unknown. CPU devices share the machine's memory."""
    if value := os.environ.get(OVERRIDE):
        try:
            if 0 < float(value) < 1e9:
                return int(float(value) * GIB)
        except ValueError:
            pass
        raise InputError(f"{OVERRIDE} is {short_repr(value)}; it must be a number of GiB above 0, such as 15.5")
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if jax.default_backend() != "cpu":
        return None
    machine = [size for size in (_sysconf_bytes("SC_PHYS_PAGES"), *map(_read_number, LIMITS)) if size]
    return min(machine) // jax.local_device_count() if machine else None


def available() -> int | None:
    """Free bytes of the first device, None where they are unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return _sysconf_bytes("SC_AVPHYS_PAGES")


def _sysconf_bytes(name: str) -> int | None:
    try:
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _read_number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max" means no limit
        return None


def prompt_batch_size(prompts: int, bytes_each: int) -> int:
    """How many prompts are sampled as one batch: all, or as many as four fifths of the free memory hold."""
    free = available()
    return prompts if free is None else max(1, min(prompts, int(0.8 * free) // max(bytes_each, 1)))


# --------------------------------------------------------------------------------------------------------------- checks


def check(workload: Workload) -> None:
    """Refuse what one device cannot hold."""
    total = capacity()
    if total is not None and (needed := workload.bytes_needed(workload.shape, workload.devices)) > total:
        raise OutOfMemoryError(
            f"{workload} takes {needed / GIB:.2f} GiB or more on each device and {_device()} has {total / GIB:.2f}; "
            f"{suggestions(workload, total)}, or set {OVERRIDE} if a device has more"
        )


@contextlib.contextmanager
def out_of_memory_errors(workload: Workload) -> Iterator[None]:
    """Turn an allocation failure inside into an error with suggestions: the estimate may be too low, and other programs
    may use the device."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if isinstance(error, OutOfMemoryError):
            raise
        limit = int(0.75 * workload.bytes_needed(workload.shape, workload.devices))  # below what has just failed
        raise OutOfMemoryError(
            f"memory ran out while {workload} on {_device()}; {suggestions(workload, limit)}"
        ) from error


@contextlib.contextmanager
def checked(workload: Workload) -> Iterator[None]:
    check(workload)
    with out_of_memory_errors(workload):
        yield


def _device() -> str:
    return f"this {jax.devices()[0].device_kind}"


def suggestions(workload: Workload, limit: int) -> str:
    """Every single change with which the estimate is at most `limit` bytes."""
    shape, multiple = workload.shape, workload.multiple

    def fits(frames: int, scale: float, devices: int) -> bool:
        return workload.bytes_needed(Shape(frames, *_scaled(shape, scale, multiple)), devices) <= limit

    found = []
    if frames := _largest(shape.frames - 1, lambda n: fits(n, 1.0, workload.devices)):
        found.append(f"{frames} frame{'s' * (frames > 1)}")
    sides = max(shape.height, shape.width) // multiple
    if side := _largest(sides - 1, lambda n: fits(shape.frames, n / sides, workload.devices)):
        found.append("{}×{}".format(*_scaled(shape, side / sides, multiple)))
    counts = range(workload.devices + 1, shape.frames + 1)
    if devices := next((n for n in counts if fits(shape.frames, 1.0, n)), 0):
        found.append(f"{devices} devices")
    if workload.bytes_with_remat and workload.bytes_with_remat(shape, workload.devices) <= limit:
        found.append('remat="block"')
    return f"use {' or '.join(found)}" if found else "use a machine with more memory"


def _scaled(shape: Shape, scale: float, multiple: int) -> tuple[int, int]:
    height, width = (max(multiple, int(side * scale + 1e-6) // multiple * multiple) for side in shape[1:])
    return height, width


def _largest(most: int, accept: Callable[[int], bool]) -> int:
    """The largest number up to `most` that is accepted, by bisection; 0 if there is none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if accept(middle) else (low, middle - 1)
    return low

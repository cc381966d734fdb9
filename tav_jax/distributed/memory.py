"""Memory: what a computation needs, estimated from shapes before it is compiled, and what a device has.

The estimates are lower bounds, because they count only arrays that must exist at the same time: a computation that is
refused cannot fit. The memory of a compiled program is known exactly (`tav plan`).
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from tav_jax.diffusion.windows import CONTEXT, Window, windows_at_a_time
from tav_jax.errors import InputError, OutOfMemoryError, short_repr
from tav_jax.kernels import MIN_KERNEL_TOKENS, attention_batch_size
from tav_jax.models import UNetConfig, VAEConfig

CGROUP = Path("/sys/fs/cgroup")
LIMITS = (CGROUP / "memory.max", CGROUP / "memory/memory.limit_in_bytes")  # of a container, cgroup v2 and v1
OVERRIDE = "TAV_MEMORY_GIB"  # environment variable: the memory of one device
GIB = 2**30

# What a program takes relative to its estimate, at most. Stable Diffusion's training steps, compiled for TPUs, take
# 1.08 to 1.48 times the estimate, and 1.17 times without remat (benchmarks/TPU_PLAN.md). A CPU's memory is shared with
# other programs, and with the compiler.
MARGIN, CPU_MARGIN = 1.5, 3.0

# What remat policies store, relative to the inputs of all blocks: without remat, all intermediates, which are about 30
# arrays of a transformer's width and 6 of a resnet's; by level, the skip connections.
STORED = {"none": 18.0, "level": 0.5}


# ------------------------------------------------------------------------------------------------------------ estimates


class Shape(NamedTuple):
    """The size of a clip: its number of frames, and its height and width in pixels."""

    frames: int
    height: int
    width: int


class Workload(NamedTuple):
    """A computation that must fit on its devices."""

    name: str
    shape: Shape
    devices: int  # that the frames are sharded over
    bytes_needed: Callable[[Shape, int], int]  # per device, for any clip and number of devices
    multiple: int  # height and width are multiples of it
    bytes_with_remat: int | None = None  # per device, for remat="none": what remat="block" needs

    def __str__(self) -> str:
        frames, height, width = self.shape
        return f"{self.name} {frames} frame{'s' * (frames > 1)} of {height}×{width}"


def _input_shape(shape: Shape, window: int) -> Shape:
    """The input of the UNet: the clip, or a window with its context."""
    return shape._replace(frames=min(shape.frames, window) + CONTEXT) if window else shape


@dataclass(frozen=True)
class Estimator:
    """Memory estimates for one pipeline on one mesh."""

    unet: UNetConfig
    vae: VAEConfig
    weights: int  # bytes of the UNet's weights
    itemsize: int  # bytes of the model's dtype
    mesh: AbstractMesh | Mesh | None

    @classmethod
    def of(cls, unet: Any, vae: Any, dtype: Any, mesh: Mesh | None) -> "Estimator":
        weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(unet)))
        return cls(unet.config, vae.config, weights, dtype.itemsize, mesh)

    def tuning(self, latents: Any, parameters: int, *, remat: str, fsdp: bool, window: int = 0) -> Workload:
        """A training step of a model with this number of trained parameters, on the clip or on a window of it."""
        trained = parameters // (self.mesh.size if fsdp and self.mesh else 1)

        def needed(shape: Shape, devices: int, remat: str = remat) -> int:
            return self._tuning_bytes(_input_shape(shape, window), devices, trained, remat)

        workload = self._unet_workload("tuning on", latents, needed, window)
        if remat != "none":
            return workload
        return workload._replace(bytes_with_remat=needed(workload.shape, workload.devices, "block"))

    def denoising(self, name: str, latents: Any, rows: int, window: Window | None = None) -> Workload:
        """A step of inversion or sampling with this number of text embeddings, on the clip or in windows."""
        frames = window.frames if window else 0
        if window:
            rows *= windows_at_a_time(rows, self._axis("data"))

        def needed(shape: Shape, devices: int) -> int:
            sampling = self._sampling_bytes(_input_shape(shape, frames), devices)
            return self.weights + sampling * -(-rows // self._axis("data")) // 2

        return self._unet_workload(name, latents, needed, frames)

    def prompt_bytes(self, latents: Any, window: Sequence[int] = ()) -> int:
        """Bytes per device for each additional prompt of a batch."""
        shape = self._clip_shape(latents)
        frames = window[0] if window and window[0] < shape.frames else 0
        return self._sampling_bytes(_input_shape(shape, frames), self._axis("frames")) // self._axis("data")

    def autoencoding(self, name: str, shape: Shape, batch_size: Callable[[int, int, int], int]) -> Workload:
        """Encoding or decoding, `batch_size(frames, height, width)` frames at a time on all devices together."""

        def needed(shape: Shape, devices: int) -> int:
            return self._vae_bytes(-(-batch_size(*shape) // (self.mesh.size if self.mesh else 1)), shape)

        return Workload(name, shape, 1, needed, self.vae.downsampling)

    def _axis(self, name: str) -> int:
        return self.mesh.shape[name] if self.mesh else 1

    def _clip_shape(self, latents: Any) -> Shape:
        _, frames, height, width, _ = latents.shape
        return Shape(frames, height * self.vae.downsampling, width * self.vae.downsampling)

    def _unet_workload(self, name: str, latents: Any, needed: Callable[[Shape, int], int], window: int) -> Workload:
        shape = self._clip_shape(latents)
        if window:
            name, shape = f"{name} windows of", shape._replace(frames=window)
        return Workload(name, shape, self._axis("frames"), needed, self.vae.downsampling)

    def _latents(self, shape: Shape, devices: int) -> tuple[int, int, int]:
        """Frames, height and width of the latents on one device."""
        factor = self.vae.downsampling
        return -(-shape.frames // devices), -(-shape.height // factor), -(-shape.width // factor)

    def _activations(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Numbers of values: the inputs of all blocks (two a layer, down and up), and the hidden layer of the widest
        feed-forward with its gradient, at full resolution."""
        widths, pixels = self.unet.block_out_channels, frames * height * width
        blocks = 2 * (2 * self.unet.layers_per_block + 1)
        return sum(blocks * c * (pixels >> (2 * level)) for level, c in enumerate(widths)), 12 * 2 * widths[0] * pixels

    def _tuning_bytes(self, shape: Shape, devices: int, trained: int, remat: str) -> int:
        """A training step stores what STORED says, and the intermediates of one block. Each trained parameter has a new
        value, a gradient and two moments in float32."""
        latents = self._latents(shape, devices)
        block_inputs, feed_forward = self._activations(*latents)
        stored = int(STORED.get(remat, 1) * block_inputs)
        scores = self._attention_bytes(*latents, batch=1)
        return self.weights + 16 * trained + self.itemsize * (stored + feed_forward) + 2 * scores

    def _sampling_bytes(self, shape: Shape, devices: int) -> int:
        """For one prompt with guidance, without the weights."""
        latents = self._latents(shape, devices)
        block_inputs, feed_forward = self._activations(*latents)
        return self.itemsize * 2 * (block_inputs // 2 + feed_forward // 2) + self._attention_bytes(*latents, batch=2)

    def _attention_bytes(self, frames: int, height: int, width: int, *, batch: int) -> int:
        """The scores of the largest attention in float32, and their softmax."""
        config, largest = self.unet, 0
        for level, (heads, has_attention) in enumerate(zip(config.heads, config.down_attention, strict=True)):
            tokens = -(-height // 2**level) * -(-width // 2**level)
            if not has_attention or (config.kernel != "plain" and tokens >= MIN_KERNEL_TOKENS):
                continue  # a fused kernel does not store scores
            keys = 2 * tokens if config.spatial_attention == "sparse-causal" else tokens
            simultaneous = min(batch * frames, attention_batch_size(tokens, keys, heads))
            largest = max(largest, simultaneous * heads * tokens * keys)
        return 2 * 4 * largest

    def _vae_bytes(self, frames: int, shape: Shape) -> int:
        """For a batch of frames: input, output and shortcut of a residual block at full resolution, or the scores of
        the attention over all latents of a frame."""
        _, height, width = shape
        tokens = (height // self.vae.downsampling) * (width // self.vae.downsampling)
        scores = 2 * 4 * tokens * tokens * min(frames, attention_batch_size(tokens, tokens, 1))
        return max(3 * self.itemsize * frames * height * width * self.vae.block_out_channels[0], scores)


# ------------------------------------------------------------------------------------------------------------- capacity


def capacity() -> int | None:
    """Total bytes of one device, None if unknown. CPU devices share the machine's memory."""
    if value := os.environ.get(OVERRIDE):
        try:
            if 0 < float(value) < 1e9:
                return int(float(value) * GIB)
        except ValueError:
            pass
        raise InputError(f"{OVERRIDE} is {short_repr(value)}; it must be a number of GiB above 0, such as 15.5")
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    if jax.default_backend() != "cpu":
        return None
    limits = [size for size in (_sysconf_bytes("SC_PHYS_PAGES"), *map(_read_number, LIMITS)) if size]
    return min(limits) // jax.local_device_count() if limits else None


def margin() -> float:
    """What a program may take on this platform, relative to its estimate."""
    return CPU_MARGIN if jax.default_backend() == "cpu" else MARGIN


def available() -> int | None:
    """Free bytes of the first device, None if unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
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
    """How many prompts are sampled as one batch: all, or as many as fit into four fifths of the free memory."""
    free = available()
    return prompts if free is None else max(1, min(prompts, int(0.8 * free) // max(bytes_each, 1)))


# --------------------------------------------------------------------------------------------------------------- checks


def choose_remat(
    estimate: Callable[[str], Workload], total: int | None, margin: float, anywhere: Callable[[bool], bool] = bool
) -> str:
    """The remat policy for `auto`, from the estimate for each policy: `none` if it fits into `total` bytes with a
    margin, else `block`, or `level` where the lower bound for `block` does not fit. `anywhere`: whether a flag is true
    in any process, so that all choose the same."""

    def exceeds(remat: str, factor: float) -> bool:
        workload = estimate(remat)
        return total is not None and factor * workload.bytes_needed(workload.shape, workload.devices) > total

    if not anywhere(total is None or exceeds("none", margin)):
        return "none"
    return "level" if anywhere(exceeds("block", 1)) else "block"


def check(workload: Workload) -> None:
    """Raise an error with suggestions if the estimate exceeds the memory of a device."""
    total = capacity()
    if total is not None and (needed := workload.bytes_needed(workload.shape, workload.devices)) > total:
        raise OutOfMemoryError(
            f"{workload} takes {needed / GIB:.2f} GiB or more on each device and this {jax.devices()[0].device_kind} "
            f"has {total / GIB:.2f}; {suggestions(workload, total)}, or set {OVERRIDE} if a device has more"
        )


@contextlib.contextmanager
def out_of_memory_errors(workload: Workload) -> Iterator[None]:
    """Turn an allocation failure into an error with suggestions: the estimate may be too low, and other programs may
    use the device."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        if isinstance(error, OutOfMemoryError):
            raise
        limit = int(0.75 * workload.bytes_needed(workload.shape, workload.devices))  # below what has just failed
        raise OutOfMemoryError(
            f"memory ran out while {workload} on this {jax.devices()[0].device_kind}; {suggestions(workload, limit)}"
        ) from error


@contextlib.contextmanager
def checked(workload: Workload) -> Iterator[None]:
    """`check`, then run the body with `out_of_memory_errors`."""
    check(workload)
    with out_of_memory_errors(workload):
        yield


def suggestions(workload: Workload, limit: int) -> str:
    """The changes that each reduce the estimate to at most `limit` bytes."""
    shape, multiple = workload.shape, workload.multiple
    sides = max(shape.height, shape.width) // multiple

    def scaled(side: int) -> tuple[int, int]:
        height, width = (max(multiple, int(n * side / sides + 1e-6) // multiple * multiple) for n in shape[1:])
        return height, width

    def fits(frames: int = shape.frames, side: int = sides, devices: int = workload.devices) -> bool:
        return workload.bytes_needed(Shape(frames, *scaled(side)), devices) <= limit

    found = []
    if frames := _largest(shape.frames - 1, lambda n: fits(frames=n)):
        found.append(f"{frames} frame{'s' * (frames > 1)}")
    if side := _largest(sides - 1, lambda n: fits(side=n)):
        found.append("{}×{}".format(*scaled(side)))
    if devices := next((n for n in range(workload.devices + 1, shape.frames + 1) if fits(devices=n)), 0):
        found.append(f"{devices} devices")
    if workload.bytes_with_remat is not None and workload.bytes_with_remat <= limit:
        found.append('remat="block"')
    return f"use {' or '.join(found)}" if found else "use a machine with more memory"


def _largest(upper: int, accept: Callable[[int], bool]) -> int:
    """The largest number from 1 to `upper` that is accepted, by bisection; 0 if there is none."""
    low, high = 0, upper
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if accept(middle) else (low, middle - 1)
    return low

"""The device mesh, its axes `data` and `frames`, and the sharding of every array on it.

Weights are replicated. The frames of a clip are sharded over `frames`; prompts and the rows of guidance over `data`.
If the mesh does not divide the frames of a clip, the clip is padded and masked (`pad_frames`): 24 frames on 16 devices
give the same result as on one. Any other axis that the mesh does not divide is not sharded, because padding by XLA is
inexact: with 6 frames on 4 devices the sample was 3 % off (jax 0.10.2, CPU). Without a mesh these functions add nothing
to a program.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tav_jax.errors import InputError

Tree = TypeVar("Tree")
CLIP = P("data", "frames")  # [B, F, …]
ROWS = P(("data", "frames"))  # [N, …]: independent rows
PROMPTS = P("data")  # [B, …]
FRAMES = P(None, "frames")  # [B, F, …] with all rows on each device
REPLICATED = P()
DEFAULT_FRAMES = 24


def default_mesh_shape(devices: int, frames: int = DEFAULT_FRAMES) -> tuple[int, int]:
    """(data, frames) for a number of devices. `frames` is as large as possible, because tuning has nothing else to
    shard; `data` takes the rest."""
    along_frames = max(n for n in range(1, devices + 1) if devices % n == 0 and n <= max(frames, 1))
    return devices // along_frames, along_frames


def mesh_shape(shape: tuple[int, int] | None, devices: int, frames: int = DEFAULT_FRAMES) -> tuple[int, int]:
    """(data, frames) with the zeros of `shape` replaced: they stand for as many as there are devices."""
    data, along_frames = shape or (0, 0)
    if not data and not along_frames:
        return default_mesh_shape(devices, frames)
    data = data or max(1, devices // along_frames)
    return data, along_frames or max(1, devices // data)


def make_mesh(
    shape: tuple[int, int] | None = None, *, frames: int = DEFAULT_FRAMES, devices: Sequence[Any] | None = None
) -> Mesh | None:
    """The mesh (data, frames) on the first devices, or None for a single device. `shape`: see `mesh_shape`."""
    devices = jax.devices() if devices is None else devices
    data, along_frames = mesh_shape(shape, len(devices), frames)
    name, size = f"a mesh of {data} × {along_frames} (data × frames)", data * along_frames
    if size > len(devices):
        raise InputError(
            f"{name} needs {size} devices and there {'is' if len(devices) == 1 else 'are'} {len(devices)}; "
            "make mesh.data × mesh.frames at most that"
        )
    if idle := {device.process_index for device in devices} - {device.process_index for device in devices[:size]}:
        raise InputError(
            f"{name} uses {size} of {len(devices)} devices, and none of process "
            f"{', '.join(map(str, sorted(idle)))}; make mesh.data × mesh.frames {len(devices)}"
        )
    if size == 1:
        return None
    return Mesh(
        _device_grid((data, along_frames), devices[:size]),
        ("data", "frames"),
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def _device_grid(shape: tuple[int, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in an order in which neighbours along an axis are neighbours on the chips' network, if there is one:
    keys and values of the previous frame are sent to the next device."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):  # not a whole slice, or a shape without such an order
        return np.array(devices).reshape(shape)


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """A context in which jitted functions run on this mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def mesh_axes() -> dict[str, int]:
    """Axis sizes of the mesh that is set while a function is traced; empty without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(mesh.shape)


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """`with_sharding_constraint` under a mesh, x itself without one."""
    sizes = mesh_axes()
    return jax.lax.with_sharding_constraint(x, _divisible(x, spec, sizes)) if sizes else x


def _divisible(x: Any, spec: P, sizes: dict[str, int]) -> P:
    """The spec, with None for each array axis that its mesh axes do not divide."""

    def size(names: Any) -> int:
        return math.prod(sizes[name] for name in (names if isinstance(names, tuple) else (names,)))

    return P(*(names if names and x.shape[axis] % size(names) == 0 else None for axis, names in enumerate(spec)))


def map_shards(function: Callable[..., Any], *arrays: Any, specs: Sequence[P]) -> Any:
    """`jax.shard_map` of a function; the arrays of the result are sharded like the first argument. A pytree in the
    arguments must be replicated.

    Used where XLA cannot partition an operation (a custom kernel) or partitions it badly: for a reshape that merges two
    sharded axes, `[B, T, …]` to `[B·T, …]` as in attention and convolutions, XLA gathers both (jax 0.10.2). On a TPU,
    that is the whole clip in every layer.
    """
    sizes = mesh_axes()
    if not sizes:
        return function(*arrays)
    specs = tuple(_divisible(x, spec, sizes) for x, spec in zip(arrays, specs, strict=True))
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def pad_frames(clip: jax.Array, frame_mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
    """Repeat the last frame of a clip until the mesh divides the number of frames. Returns the clip [B, F, …] and the
    frame mask [F], which is False for padding and where the given one is; without padding, the given one."""
    frames = clip.shape[1]
    missing = -frames % mesh_axes().get("frames", 1)
    if not missing:
        return constrain(clip, CLIP), frame_mask
    padded = jnp.pad(clip, ((0, 0), (0, missing), *((0, 0),) * (clip.ndim - 2)), mode="edge")
    mask = jnp.ones(frames, bool) if frame_mask is None else frame_mask
    return constrain(padded, CLIP), jnp.pad(mask, (0, missing))


def unpad_frames(clip: jax.Array, frames: int) -> jax.Array:
    """The first `frames` frames."""
    return constrain(clip, CLIP) if clip.shape[1] == frames else constrain(clip, REPLICATED)[:, :frames]


def device_put(tree: Tree, mesh: Mesh | None, *, fsdp: bool = False) -> Tree:
    """The arrays of a pytree on the mesh, replicated or, with `fsdp`, sharded over all devices."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, fsdp_spec(x, mesh) if fsdp else REPLICATED)), tree)


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
    local = not isinstance(x, jax.Array) or x.is_fully_addressable
    if sharding.is_fully_addressable or not local:
        return jax.device_put(x, sharding)
    # On a mesh of several processes, each process writes to its own devices. `jax.device_put` would first send every
    # array to all processes, to check that they are equal; `TuneAVideo` compares the weights' fingerprints instead.
    shards = sharding.addressable_devices_indices_map(x.shape)
    arrays = [jax.device_put(x if sharding.is_fully_replicated else x[part], device) for device, part in shards.items()]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, arrays)


def fsdp_spec(x: Any, mesh: Any) -> P:
    """Shard the longest axis that the number of devices divides; replicate the array if there is none."""
    count = math.prod(mesh.shape.values())
    divisible = [axis for axis, n in enumerate(x.shape) if n and n % count == 0]
    if not divisible:
        return REPLICATED
    longest = max(divisible, key=lambda axis: x.shape[axis])
    return P(*(None,) * longest, ("data", "frames"))


def constrain_fsdp(tree: Tree) -> Tree:
    """Inside a jitted function: constrain the arrays of a pytree to the sharding of `device_put(..., fsdp=True)`."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, fsdp_spec(x, mesh)), tree)

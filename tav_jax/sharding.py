"""Where each array lives: the mesh of devices, its axes `data` and `frames`, and the pins that keep arrays in place.

Weights are on every device. A clip's frames are spread over `frames`, prompts and the halves of guidance over `data`.
Frames that do not divide are filled up and masked (`fill_up`), so 24 of them run on 16 devices with the same result;
any other axis that does not divide is not spread. The compiler could pad by itself, but asked to spread 6 frames over 4
devices it gave a sample that was 3 % off (jax 0.10.2, CPU). Without a mesh nothing here leaves a trace in a program.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = TypeVar("Tree")
CLIP = P("data", "frames")  # [B, F, …]
ROWS = P(("data", "frames"))  # [N, …]: rows that have nothing to do with each other
PROMPTS = P("data")  # [B, …]
EVERYWHERE = P()
USUAL_FRAMES = 24


class MeshError(ValueError):
    """A mesh was asked for that is larger than the machine, or that leaves a process without work."""


def good_shape(devices: int, frames: int = USUAL_FRAMES) -> tuple[int, int]:
    """(data, frames) for so many devices: as many as the clip has frames to fill go over the frames, since tuning has
    nothing else to spread; what is left goes over prompts and the halves of guidance."""
    over_frames = max(n for n in range(1, devices + 1) if devices % n == 0 and n <= max(frames, 1))
    return devices // over_frames, over_frames


def make(
    shape: tuple[int, int] | None = None, *, frames: int = USUAL_FRAMES, devices: Sequence[Any] | None = None
) -> Mesh | None:
    """The mesh on the first devices; None where that is a single one. A 0 in `shape` is filled with what there is."""
    devices = jax.devices() if devices is None else devices
    data, over_frames = shape or (0, 0)
    if not data and not over_frames:
        data, over_frames = good_shape(len(devices), frames)
    data = data or max(1, len(devices) // over_frames)
    over_frames = over_frames or max(1, len(devices) // data)
    wanted = data * over_frames
    if wanted > len(devices):
        raise MeshError(
            f"a mesh of {data} × {over_frames} (data × frames) needs {wanted} devices and there "
            f"{'is' if len(devices) == 1 else 'are'} {len(devices)}"
        )
    if idle := {device.process_index for device in devices} - {device.process_index for device in devices[:wanted]}:
        raise MeshError(
            f"a mesh of {data} × {over_frames} (data × frames) has {wanted} of {len(devices)} devices, and process "
            f"{', '.join(map(str, sorted(idle)))} has none of them"
        )
    if wanted == 1:
        return None
    grid = np.array(devices[:wanted]).reshape(data, over_frames)
    return Mesh(grid, ("data", "frames"), axis_types=(AxisType.Auto, AxisType.Auto))


@contextlib.contextmanager
def on(mesh: Mesh | None) -> Iterator[None]:
    """Programs that are called inside run on this mesh."""
    if mesh is None:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def axes() -> dict[str, int]:
    """The sizes of the mesh that the program now being traced will run on; none without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return {} if mesh.empty else dict(mesh.shape)


def pin(x: jax.Array, spec: P) -> jax.Array:
    """Under a mesh, x spread as `spec` says: the compiler would else choose, and gather what fits in no memory."""
    sizes = axes()
    return jax.lax.with_sharding_constraint(x, _fitting(x, spec, sizes)) if sizes else x


def _fitting(x: Any, spec: P, sizes: dict[str, int]) -> P:
    """The spec without the axes that do not divide."""

    def size(names: Any) -> int:
        return math.prod(sizes[name] for name in (names if isinstance(names, tuple) else (names,)))

    return P(*(names if names and x.shape[axis] % size(names) == 0 else None for axis, names in enumerate(spec)))


def on_each_device(function: Callable[..., jax.Array], *arrays: Any, specs: Sequence[P]) -> jax.Array:
    """`function` of the part of each array that a device has; its result is spread as the first one is. A tree of
    arrays can only be everywhere.

    For what the compiler cannot cut into parts, as kernels, or would not, as attention: where two spread axes are made
    one, `[B, T, …]` to `[B·T, …]`, it gathers them first (jax 0.10.2), on a TPU all of a clip at every layer.
    """
    sizes = axes()
    if not sizes:
        return function(*arrays)
    parts = tuple(_fitting(x, spec, sizes) for x, spec in zip(arrays, specs, strict=True))
    return jax.shard_map(function, in_specs=parts, out_specs=parts[0], check_vma=False)(*arrays)


def fill_up(clip: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """A clip [B, F, …] with as many copies of its last frame as the mesh needs, and which are real (None: all)."""
    frames = clip.shape[1]
    missing = -frames % axes().get("frames", 1)
    if not missing:
        return pin(clip, CLIP), None
    filled = jnp.pad(clip, ((0, 0), (0, missing), *((0, 0),) * (clip.ndim - 2)), mode="edge")
    return pin(filled, CLIP), jnp.arange(frames + missing) < frames


def cut_back(clip: jax.Array, frames: int) -> jax.Array:
    """The other way: what was filled up is dropped."""
    if clip.shape[1] == frames:
        return pin(clip, CLIP)
    return pin(clip, EVERYWHERE)[:, :frames]


def place(tree: Tree, mesh: Mesh | None, *, spread: bool = False) -> Tree:
    """The arrays of a tree on the mesh: whole on every device or, with `spread`, in parts."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: _put(x, NamedSharding(mesh, parts(x, mesh) if spread else EVERYWHERE)), tree)


def _put(x: Any, where: NamedSharding) -> jax.Array:
    here = not isinstance(x, jax.Array) or x.is_fully_addressable
    if where.is_fully_addressable or not here:
        return jax.device_put(x, where)
    # Of a mesh that goes beyond this process, each process fills its own devices. JAX would first send every array
    # around, to see that all processes hold the same; `TuneAVideo` compares their fingerprints instead.
    mine = where.addressable_devices_indices_map(x.shape)
    pieces = [jax.device_put(x if where.is_fully_replicated else x[part], device) for device, part in mine.items()]
    return jax.make_array_from_single_device_arrays(x.shape, where, pieces)


def parts(x: Any, mesh: Any) -> P:
    """How an array of weights is cut over all devices: along its longest axis that divides, or not at all."""
    count = math.prod(mesh.shape.values())
    fitting = [axis for axis in range(x.ndim) if x.shape[axis] % count == 0 and x.shape[axis]]
    if not fitting:
        return EVERYWHERE
    longest = max(fitting, key=lambda axis: x.shape[axis])
    return P(*(None,) * longest, ("data", "frames"))


def pin_parts(tree: Tree) -> Tree:
    """Inside a program: keep the arrays of a tree in the parts that `place` would cut them into."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, parts(x, mesh)), tree)

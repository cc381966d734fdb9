"""The programs of a run, with shapes in place of arrays: the very functions that a run calls, as it calls them."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from tav_jax.diffusion import programs
from tav_jax.diffusion.samplers import DDIM, DDIMState
from tav_jax.diffusion.schedule import Steps
from tav_jax.distributed import sharding
from tav_jax.errors import InputError
from tav_jax.io import weights
from tav_jax.models import VAE, ClipText, Conditioning, UNet
from tav_jax.plan.job import Job
from tav_jax.training import train_step

NAMES = ("tune", "invert", "sample", "encode", "decode")
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}


class Function(NamedTuple):
    name: str
    trace: Callable[[], Any]  # gives jax's Traced; to be called, and the result compiled, while `running`
    running: Callable[[], AbstractContextManager[None]]
    arguments: int  # bytes, per chip
    beside: int  # bytes on each chip that a run keeps meanwhile and that are no argument
    steps: int  # steps in one call of the program
    job_steps: int  # steps in the whole job: all of the inversion, but one of tuning
    sharing: int  # chips that share the work; the others do the same as these


class Place:
    """Shapes of arrays that lie on the planned devices."""

    def __init__(self, job: Job):
        devices = job.topology.devices()
        self.mesh: Mesh | None = sharding.make_mesh(job.mesh, frames=job.frames, devices=devices)
        self.one = SingleDeviceSharding(devices[0])

    def shape(self, shape: tuple[int, ...], dtype: Any = jnp.float32, *, spread: bool = False) -> Any:
        where = self.one
        if self.mesh is not None:
            plain = jax.ShapeDtypeStruct(shape, dtype)
            where = NamedSharding(self.mesh, sharding.fsdp_spec(plain, self.mesh) if spread else sharding.REPLICATED)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def tree(self, tree: Any, dtype: Any = None, *, spread: bool = False) -> Any:
        return jax.tree.map(lambda x: self.shape(x.shape, dtype or x.dtype, spread=spread), tree)

    def sharing(self, batch: int) -> int:
        """How many chips have work of their own when so many clips are run at once."""
        axes = dict(self.mesh.shape) if self.mesh else {}
        data = axes.get("data", 1)
        return axes.get("frames", 1) * (data if batch % data == 0 else 1)


def size(tree: Any) -> int:
    """Bytes on one chip."""

    def of(x) -> int:
        return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

    return sum(of(x) for x in jax.tree.leaves(tree))


def functions(job: Job, wanted: tuple[str, ...]) -> Iterator[Function]:
    """Those that are wanted, in the order in which a run comes to them."""
    dtype, place = DTYPES[job.dtype], Place(job)
    unet = weights.abstract(UNet, job.shapes.unet, dtype)
    graph, trained, frozen = nnx.split(unet, train_step.trainable_filter(job.trainable), ...)
    if not jax.tree.leaves(trained):
        raise InputError(f"train.trainable is {job.trainable!r}; no layer of this model has such a name")
    trained, frozen = place.tree(trained, jnp.float32), place.tree(frozen, dtype)
    vae = _whole(place, VAE, job.shapes.vae, dtype)
    others = size(vae) + size(_whole(place, ClipText, job.shapes.text, dtype))
    learner = place.tree(jax.eval_shape(train_step.TrainState.create, trained), spread=job.fsdp)
    # Previews keep Adam's moments waiting; `tav edit` has no learner, but the VAE and the text encoder.
    waiting = max(others, size(learner.opt_state) if job.previews else 0)

    down = job.shapes.vae.downsampling
    latents = place.shape((1, job.frames, job.height // down, job.width // down, job.shapes.unet.in_channels))
    text = (job.shapes.text.max_position_embeddings, job.shapes.unet.cross_attention_dim)
    group = programs.vae_batch_size(job.frames, job.height, job.width, place.mesh)

    def running():
        return programs.numerics(dtype, place.mesh)

    def make(name: str, program: Any, arguments: tuple, options: dict, beside: int, steps=1, job_steps=1, batch=1):
        def trace():
            return program.trace(*arguments, **options)

        known = [x for x in jax.tree.leaves(arguments) if isinstance(x, jax.ShapeDtypeStruct)]
        return Function(name, trace, running, size(known), beside, steps, job_steps, place.sharing(batch))

    def tune():
        key = jax.eval_shape(lambda: jax.random.key(0))
        arguments = (
            graph,
            learner,
            frozen,
            place.shape(key.shape, key.dtype),
            place.shape((), jnp.int32),
            latents,
            latents,
            Conditioning(place.shape((1, *text))),
            place.shape((job.shapes.train_steps,)),
            place.tree(train_step.Hyperparameters(*(jnp.float32(0) for _ in train_step.Hyperparameters._fields))),
        )
        options = {"prediction": job.shapes.prediction, "remat": job.remat, "fsdp": job.fsdp}
        return make("tune", train_step.tune_step, arguments, options, 0)  # all else waits in the host's memory

    def walk(name: str, count: int, guidance: bool):
        steps = programs.chunk_size(count)
        arguments = (
            nnx.merge(graph, trained, frozen),
            DDIMState(latents),
            Conditioning(place.shape((2 if guidance else 1, *text))),
            _steps(steps, place.shape),
            place.shape(()),
        )
        options = {
            "sampler": DDIM(),
            "prediction": job.shapes.prediction,
            "use_guidance": guidance,
            "trajectory": False,
        }
        batch = 2 if guidance else 1
        return make(name, programs.denoise_loop, arguments, options, waiting, steps, count, batch)

    def encode():
        frames = place.shape((job.frames, job.height, job.width, 3), jnp.uint8)
        rest = size(trained) + size(frozen) + others - size(vae)
        return make("encode", programs.encode_frames, (vae, frames), {"batch_size": group}, rest, batch=group)

    def decode():
        rest = size(trained) + size(frozen) + waiting
        return make("decode", programs.decode_frames, (vae, latents), {"batch_size": group}, rest, batch=group)

    kinds = {
        "tune": tune,
        "invert": lambda: walk("invert", job.inversion_steps, False),
        "sample": lambda: walk("sample", job.edit_steps, job.guidance),
        "encode": encode,
        "decode": decode,
    }
    return (kinds[name]() for name in NAMES if name in wanted)


def _whole(place: Place, build: Any, config: Any, dtype: Any) -> Any:
    module = weights.abstract(build, config, dtype)
    return nnx.merge(nnx.graphdef(module), place.tree(nnx.state(module), dtype))


def _steps(count: int, of: Callable[[tuple[int, ...], Any], Any]) -> Steps:
    dtypes = {"alpha": jnp.float32, "next_alpha": jnp.float32}
    return Steps(*(of((count,), dtypes.get(name, jnp.int32)) for name in Steps._fields))

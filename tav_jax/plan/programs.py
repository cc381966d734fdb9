"""The programs of a run: a `Job`, read from a config, and the jitted functions that it calls, with shapes in place of
arrays. They need no weights, no clip and no network connection."""

import json
import math
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, SingleDeviceSharding

from tav_jax.config import check_size, has_source_branch
from tav_jax.diffusion import programs
from tav_jax.diffusion.editing import Editing, StepControls
from tav_jax.diffusion.samplers import DDIM, LoopState, get_sampler
from tav_jax.diffusion.schedule import Prediction, Steps, prompted_steps
from tav_jax.diffusion.windows import Window, check_length, windows_at_a_time
from tav_jax.distributed import memory, sharding
from tav_jax.errors import InputError, short_repr
from tav_jax.io import diffusers_layout, single_file, weights
from tav_jax.kernels import choose_kernel
from tav_jax.models import VAE, ClipText, ClipTextConfig, Conditioning, UNet, UNetConfig, VAEConfig
from tav_jax.plan.chips import Topology
from tav_jax.training import train_step

STEPS_DTYPES = {
    **{"timestep": jnp.int32, "alpha": jnp.float32, "next_alpha": jnp.float32},
    **{"step": jnp.int32, "remaining": jnp.int32},
}
NAMES = ("tune", "invert", "sample", "encode", "decode")  # in the order in which a run calls them

# Parts of a model's name that select a preset
PRESETS = {"sd2": ("sd2", "stable-diffusion-2"), "sd1": ("sd1", "stable-diffusion-v1", "stable-diffusion-1")}


@dataclass(frozen=True)
class ModelShapes:
    unet: UNetConfig
    vae: VAEConfig
    text: ClipTextConfig
    prediction: Prediction = "epsilon"
    train_timesteps: int = 1000


@dataclass(frozen=True)
class Job:
    """What the compiled programs depend on, except the code."""

    model: ModelShapes
    topology: Topology
    frames: int
    height: int
    width: int
    dtype: str
    trainable: tuple[str, ...]
    remat: str
    mesh: tuple[int, int]
    fsdp: bool
    sampler: str
    sampling_steps: int
    inversion_steps: int
    guidance: bool
    previews: bool
    window: tuple[int, ...] = ()  # of sampling and inversion
    train_window: int = 0
    source_branch: bool = False  # two-branch editing: sampling has a row for the source
    feature_reuse: int = 1

    def replace(self, **changes: Any) -> "Job":
        return replace(self, **changes)

    @property
    def frames_per_chip(self) -> int:
        """Frames on the chip that has most of them, of the clip or of a window."""
        _, along_frames = sharding.mesh_shape(self.mesh, self.topology.chips, self.frames)
        return -(-min(self.frames, (*self.window, self.frames)[0]) // along_frames)

    def to_json(self) -> str:
        """Equal jobs give equal texts."""
        return json.dumps(asdict(self), sort_keys=True)


def read_job(config: Any, topology: Topology) -> Job:
    """The job of a config on a topology."""
    model, clip = _model_shapes(config), config.clip
    if not clip.frames:
        raise InputError(
            "clip.frames is 0, which means all frames of the clip; `tav plan` does not read it, so give their number "
            "with --config.clip.frames"
        )
    check_size(clip.height, clip.width, model.vae.downsampling, prefix="clip.")
    check_length(config.edit.window, clip.frames, "edit.window")
    check_length(config.train.window, clip.frames, "train.window")
    job = Job(
        model=model,
        topology=topology,
        frames=clip.frames,
        height=clip.height,
        width=clip.width,
        dtype=config.model.dtype,
        trainable=tuple(config.train.trainable),
        remat=config.train.remat,
        mesh=(config.mesh.data, config.mesh.frames),
        fsdp=config.mesh.fsdp,
        sampler=config.edit.sampler,
        sampling_steps=prompted_steps(config.edit.steps, config.edit.strength),
        inversion_steps=config.edit.inversion_steps,
        guidance=config.edit.guidance > 1,
        previews=bool(config.train.preview_every and config.edit.prompts),
        window=tuple(config.edit.window),
        train_window=config.train.window,
        source_branch=has_source_branch(config.edit),
        feature_reuse=config.edit.feature_reuse,
    )
    return job.replace(remat=_choose_remat(job)) if job.remat == "auto" else job


def _choose_remat(job: Job) -> str:
    """As `Trainer` chooses it on a chip with this memory."""
    dtype, factor = getattr(jnp, job.dtype), job.model.vae.downsampling
    _, trained, frozen = nnx.split(
        weights.abstract(UNet, job.model.unet, dtype), train_step.trainable_filter(job.trainable), ...
    )
    parameters, others = (sum(x.size for x in jax.tree.leaves(part)) for part in (trained, frozen))
    shape = sharding.mesh_shape(job.mesh, job.topology.chips, job.frames)
    itemsize = jnp.dtype(dtype).itemsize
    estimator = memory.Estimator(
        job.model.unet,
        job.model.vae,
        (parameters + others) * itemsize,
        itemsize,
        AbstractMesh(shape, ("data", "frames")),
    )
    latents = jax.ShapeDtypeStruct((1, job.frames, job.height // factor, job.width // factor, 4), dtype)
    options = {"fsdp": job.fsdp, "window": job.train_window if job.train_window < job.frames else 0}

    def estimate(remat: str) -> memory.Workload:
        return estimator.tuning(latents, parameters, remat=remat, **options)

    return memory.choose_remat(estimate, job.topology.chip.hbm, memory.MARGIN)


def _model_shapes(config: Any) -> ModelShapes:
    """Shapes from the configs in a pipeline directory, or from a preset by the model's name."""
    options = {name: config.model[name] for name in ("spatial_attention", "temporal_attention")}
    options["kernel"] = choose_kernel(config.model.kernel, "tpu")
    if single_file.is_single_file(config.model.path):
        configs = single_file.read_configs(*(config.model[name] for name in ("path", "config", "prediction")))
        path = Path(config.model.config or config.model.path)
        return _shapes({part: (value, path / part) for part, value in configs.items()}, options)
    root = Path(config.model.path).expanduser()
    if (root / "unet" / diffusers_layout.CONFIGS["unet"]).is_file():
        return _directory_shapes(root, options)
    name = config.model.path.lower()
    if any(part in name for part in PRESETS["sd2"]):
        # v2.1's prediction; the base models of 2.x predict ε, with programs of the same cost
        return ModelShapes(replace(UNetConfig.sd2(), **options), VAEConfig(), ClipTextConfig.sd2(), "v_prediction")
    if any(part in name for part in PRESETS["sd1"]):
        return ModelShapes(replace(UNetConfig.sd1(), **options), VAEConfig(), ClipTextConfig.sd1())
    raise InputError(
        f"model.path is {short_repr(config.model.path)}, which is neither a pipeline directory nor a model with known "
        "shapes; use --config.model.path=sd1 (Stable Diffusion 1.x), sd2 (2.x), a directory or a file"
    )


def _directory_shapes(root: Path, options: dict[str, Any]) -> ModelShapes:
    paths = {part: root / part / file for part, file in diffusers_layout.CONFIGS.items() if part != "tokenizer"}
    for path in paths.values():
        if not path.is_file():
            raise InputError(f"{path} does not exist; a pipeline directory has a config for each of its parts")
    return _shapes({part: (diffusers_layout.read_json(path), path) for part, path in paths.items()}, options)


def _shapes(configs: dict[str, tuple[dict[str, Any], Path]], options: dict[str, Any]) -> ModelShapes:
    scheduler, _ = configs["scheduler"]
    return ModelShapes(
        diffusers_layout.unet_config(*configs["unet"], **options),
        diffusers_layout.vae_config(*configs["vae"]),
        diffusers_layout.text_config(*configs["text_encoder"]),
        scheduler.get("prediction_type", "epsilon"),
        scheduler.get("num_train_timesteps", 1000),
    )


# ----------------------------------------------------------------------------------------------------------- programs


class Program(NamedTuple):
    """A jitted function and the shapes of its arguments. Trace and compile it inside `context`."""

    name: str
    function: Any  # jitted
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # static
    context: AbstractContextManager[None]
    beside_bytes: int  # on each chip: other arrays of the run that stay there
    steps: int  # in one call of the program
    job_steps: int  # in the job: all of an inversion or a sample, but one training step
    shards: int  # chips that share the work; all others repeat it


def size(tree: Any) -> int:
    """Bytes of a pytree of shapes on one chip."""
    leaves = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.ShapeDtypeStruct)]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


class Shapes:
    """Shapes of arrays on the devices of a job's topology, replicated or, with `fsdp`, sharded over all of them."""

    def __init__(self, job: Job):
        devices = job.topology.devices()
        self.mesh: Mesh | None = sharding.make_mesh(job.mesh, frames=job.frames, devices=devices)
        self.one_device = SingleDeviceSharding(devices[0])

    def array(self, shape: tuple[int, ...], dtype: Any = jnp.float32, *, fsdp: bool = False) -> Any:
        x = jax.ShapeDtypeStruct(shape, dtype, sharding=self.one_device)
        if self.mesh is None:
            return x
        spec = sharding.fsdp_spec(x, self.mesh) if fsdp else sharding.REPLICATED
        return x.update(sharding=NamedSharding(self.mesh, spec))

    def tree(self, tree: Any, dtype: Any = None, *, fsdp: bool = False) -> Any:
        return jax.tree.map(lambda x: self.array(x.shape, dtype or x.dtype, fsdp=fsdp), tree)

    def network(self, build: Any, config: Any, dtype: Any) -> Any:
        module = weights.abstract(build, config, dtype)
        return nnx.merge(nnx.graphdef(module), self.tree(nnx.state(module), dtype))

    def shards(self, batch: int) -> int:
        """The number of chips that share the work on a batch of clips."""
        data, frames = self.mesh.shape.values() if self.mesh else (1, 1)
        return frames * (data if batch % data == 0 else 1)


def build_program(job: Job, name: str) -> Program:
    """The program with a name of NAMES, as `TuneAVideo` calls it for this job."""
    dtype, shapes, model = getattr(jnp, job.dtype), Shapes(job), job.model
    unet = weights.abstract(UNet, model.unet, dtype)
    graph, trained, frozen = nnx.split(unet, train_step.trainable_filter(job.trainable), ...)
    if not jax.tree.leaves(trained):
        raise InputError(f"train.trainable is {short_repr(job.trainable)}; no layer of this model has such a name")
    trained, frozen = shapes.tree(trained, jnp.float32), shapes.tree(frozen, dtype)
    vae = shapes.network(VAE, model.vae, dtype)
    text_bytes = size(shapes.network(ClipText, model.text, dtype))
    state = shapes.tree(jax.eval_shape(train_step.TrainState.create, trained), fsdp=job.fsdp)
    # Besides the UNet, `tav edit` keeps the VAE and the text encoder on the chips, and a preview during tuning the
    # optimizer state.
    other_bytes = max(size(vae) + text_bytes, size(state.opt_state) if job.previews else 0)

    factor = model.vae.downsampling
    latents = shapes.array((1, job.frames, job.height // factor, job.width // factor, model.unet.in_channels))
    text = (model.text.max_position_embeddings, model.unet.cross_attention_dim)
    vae_batch = programs.vae_batch_size(job.frames, job.height, job.width, shapes.mesh)

    def program(function, arguments, options, beside=0, steps=1, job_steps=1, batch=1) -> Program:
        context = programs.jit_context(dtype, shapes.mesh)
        return Program(name, function, arguments, options, context, beside, steps, job_steps, shapes.shards(batch))

    def denoise(count: int, guidance: bool, sampler: Any, *, source: bool = False, feature_reuse: int = 1) -> Program:
        steps, rows = programs.chunk_size(count), (2 if guidance else 1) + source
        window = Window(*job.window) if job.window and job.window[0] < job.frames else None
        data = shapes.mesh.shape["data"] if shapes.mesh else 1
        batch = rows * windows_at_a_time(rows, data) if window else rows
        table: dict[str, Any] = {name: shapes.array((steps,), dtype) for name, dtype in STEPS_DTYPES.items()}
        state, editing = LoopState(shapes.tree(jax.eval_shape(sampler.init, latents))), None
        if source:
            editing, controls = _editing_shapes(shapes, latents.shape, text[0], steps)
            carry = jax.eval_shape(lambda: editing.initial_state(model.unet))
            table, state = table | {"controls": controls}, state._replace(denoiser=shapes.tree(carry))
        arguments = (
            nnx.merge(graph, trained, frozen),
            state,
            Conditioning(shapes.array((rows, *text))),
            Steps(**table),
            shapes.array(()),
            editing,
        )
        network = {"use_guidance": guidance, "window": window, "feature_reuse": feature_reuse}
        options = {"sampler": sampler, "prediction": model.prediction, "trajectory": False, **network}
        if feature_reuse > 1:
            with programs.jit_context(dtype, shapes.mesh):
                cache = jax.eval_shape(lambda *a: programs.empty_cache(*a, **network), *arguments)
            arguments = (arguments[0], state._replace(denoiser=shapes.tree(cache)), *arguments[2:])
        return program(programs.denoise_loop, arguments, options, other_bytes, steps, count, batch)

    if name == "tune":
        key = jax.eval_shape(lambda: jax.random.key(0))
        arguments = (
            graph,
            state,
            frozen,
            shapes.array(key.shape, key.dtype),
            shapes.array((), jnp.int32),
            latents,
            latents,
            Conditioning(shapes.array((1, *text))),
            shapes.array((model.train_timesteps,)),
            train_step.Hyperparameters(*(shapes.array(()) for _ in train_step.Hyperparameters._fields)),
        )
        window = job.train_window if job.train_window < job.frames else 0
        options = {"prediction": model.prediction, "remat": job.remat, "fsdp": job.fsdp, "window": window}
        return program(train_step.tune_step, arguments, options)  # everything else is in host memory
    if name == "invert":
        return denoise(job.inversion_steps, False, DDIM())
    if name == "sample":
        methods = {"source": job.source_branch, "feature_reuse": job.feature_reuse}
        return denoise(job.sampling_steps, job.guidance, get_sampler(job.sampler), **methods)
    unet_bytes = size(trained) + size(frozen)
    options = {"batch_size": vae_batch}
    if name == "encode":
        frames = shapes.array((job.frames, job.height, job.width, 3), jnp.uint8)
        return program(programs.encode_frames, (vae, frames), options, unet_bytes + text_bytes, batch=vae_batch)
    return program(programs.decode_frames, (vae, latents), options, unet_bytes + other_bytes, batch=vae_batch)


def _editing_shapes(shapes: Shapes, latents: tuple[int, ...], tokens: int, steps: int) -> tuple[Editing, StepControls]:
    """The arrays of two-branch editing of one prompt."""
    editing = Editing(
        mapping=shapes.array((1, tokens, tokens)),
        shared=shapes.array((1, tokens)),
        equalizer=shapes.array((1, tokens)),
        words=shapes.array((2, tokens)),
        word_mask=shapes.array((), jnp.bool_),
        mask=shapes.array((*latents[:-1], 1)),
    )
    switches, source = shapes.array((steps,), jnp.bool_), shapes.array((steps, *latents))
    return editing, StepControls(switches, switches, switches, switches, source, source)

"""What is planned: a model's shapes and a run's settings, read from a config without weights, clip or network."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tav_jax.diffusion.schedule import Prediction, prompted_steps
from tav_jax.errors import InputError
from tav_jax.io import diffusers_layout
from tav_jax.kernels import choose_kernel
from tav_jax.models import ClipTextConfig, UNetConfig, VAEConfig
from tav_jax.plan.chips import Topology

# Parts of names by which the presets' shapes are known.
NAMES = {
    "sd2": ("sd2", "stable-diffusion-2"),
    "sd1": ("sd1", "stable-diffusion-v1", "stable-diffusion-1"),
}


@dataclass(frozen=True)
class Shapes:
    unet: UNetConfig
    vae: VAEConfig
    text: ClipTextConfig
    prediction: Prediction = "epsilon"
    train_steps: int = 1000


@dataclass(frozen=True)
class Job:
    """Everything that a compiled program depends on, but for the code."""

    shapes: Shapes
    topology: Topology
    frames: int
    height: int
    width: int
    dtype: str
    trainable: tuple[str, ...]
    remat: str
    mesh: tuple[int, int]
    fsdp: bool
    edit_steps: int
    inversion_steps: int
    guidance: bool
    previews: bool

    def with_(self, **changes: Any) -> "Job":
        return replace(self, **changes)


def read(config: Any, topology: Topology) -> Job:
    shapes = _shapes(config)
    c = config.clip
    if not c.frames:
        raise InputError("clip.frames is 0, all that the clip has; tav plan sees no clip, give their number")
    factor = shapes.vae.downsampling
    for name in ("height", "width"):
        if c[name] % factor:
            raise InputError(f"clip.{name} {c[name]} is not a multiple of {factor}; use {c[name] // factor * factor}")
    return Job(
        shapes=shapes,
        topology=topology,
        frames=c.frames,
        height=c.height,
        width=c.width,
        dtype=config.model.dtype,
        trainable=tuple(config.train.trainable),
        remat=config.train.remat,
        mesh=(config.mesh.data, config.mesh.frames),
        fsdp=config.mesh.fsdp,
        edit_steps=prompted_steps(config.edit.steps, config.edit.strength),
        inversion_steps=config.edit.inversion_steps,
        guidance=config.edit.guidance > 1,
        previews=bool(config.train.preview_every and config.edit.prompts),
    )


def _shapes(config: Any) -> Shapes:
    """From the configs in a pipeline directory, or by the name of a known model."""
    options = {name: config.model[name] for name in ("spatial_attention", "temporal_attention")}
    options["kernel"] = choose_kernel(config.model.kernel, "tpu")
    root = Path(config.model.path).expanduser()
    if (root / "unet" / diffusers_layout.CONFIGS["unet"]).is_file():
        return _from_directory(root, options)
    name = config.model.path.lower()
    for preset, parts in NAMES.items():
        if any(part in name for part in parts):
            build = {"sd1": (UNetConfig.sd1, ClipTextConfig.sd1), "sd2": (UNetConfig.sd2, ClipTextConfig.sd2)}[preset]
            unet = replace(build[0](), **options)
            # 2.1 predicts velocities; the base models of 2.x do not, and cost the same.
            return Shapes(unet, VAEConfig(), build[1](), "v_prediction" if preset == "sd2" else "epsilon")
    raise InputError(
        f"model.path is {config.model.path!r}, which is no pipeline directory here and no model whose shapes are "
        "known; give --config.model.path=sd1 (Stable Diffusion 1.x), sd2 (2.x) or a directory"
    )


def _from_directory(root: Path, options: dict[str, Any]) -> Shapes:
    def of(part: str) -> tuple[dict[str, Any], Path]:
        path = root / part / diffusers_layout.CONFIGS[part]
        if not path.is_file():
            raise InputError(f"{path} does not exist; a pipeline directory has a config for each of its parts")
        return diffusers_layout.read_json(path), path

    scheduler, _ = of("scheduler")
    return Shapes(
        diffusers_layout.unet_config(*of("unet"), **options),
        diffusers_layout.vae_config(*of("vae")),
        diffusers_layout.text_config(*of("text_encoder")),
        scheduler.get("prediction_type", "epsilon"),
        scheduler.get("num_train_timesteps", 1000),
    )


def as_json(job: Job) -> str:
    """The same text for the same job."""
    return json.dumps(job, default=lambda value: vars(value), sort_keys=True)

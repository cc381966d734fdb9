"""A training run: its directory, its config, its checkpoints."""

import functools
import json
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from tav_jax import config as configs
from tav_jax.distributed import processes, sharding
from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.io.video import Clip, load_video
from tav_jax.io.weights import Components
from tav_jax.training import environment
from tav_jax.training.checkpoint import Checkpoints
from tav_jax.training.run_directory import RunDirectory, file_names
from tav_jax.training.train_step import trainable_filter

SAMPLE_CLIPS = {"data/man-skiing.mp4", "data/car-turn.mp4"}  # of the official repository


def log(*words: Any) -> None:
    """Print a line, from the first process only."""
    if processes.is_primary():
        print(*words, flush=True)


class Run:
    def __init__(self, directory: RunDirectory, config: Any):
        self.directory = directory
        self.config: Any = config
        self.is_training = False  # then this process may remove and rename checkpoints

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        """Opened at first use, because opening creates their directory."""
        t = self.config.train
        checkpoints = Checkpoints(
            self.directory / "checkpoints", keep_newest=t.keep_newest, keep_every=t.keep_every, repair=self.is_training
        )
        for message in checkpoints.messages:
            log(message)
        return checkpoints

    @classmethod
    def start_or_continue(cls, workdir: str, config: Any) -> "Run":
        """A run with this config in this directory. An existing run may differ in `config.MAY_CHANGE` only."""
        config = configs.validate(config)
        if config.edit.prompts and config.train.preview_every:
            configs.check_edit_steps(config.edit)
        processes.check_same({"--workdir": str(workdir), **dict(configs.leaves(config))})
        directory = RunDirectory(workdir).check_writable().check_shared()
        if directory.has_run:
            stored = configs.from_json(directory.read("config.json") or "")
            if changed := configs.differences(stored, config):
                raise InputError(
                    f"{directory} holds a run with another config: {'; '.join(changed)}. Use another --workdir, or the "
                    "old settings."
                )
        return cls(directory, config)

    @classmethod
    def open(cls, workdir: Any) -> "Run":
        """An existing run."""
        processes.check_same({"--workdir": str(workdir)})
        directory = RunDirectory(workdir).check_shared().check_has_run()
        return cls(directory, configs.from_json(directory.read("config.json") or ""))

    def load_weights(self, components: Components, step: int | None, mesh: Mesh | None) -> None:
        """Put the trained weights of a checkpoint, by default the newest, into a pipeline's UNet."""
        self.check_base(components, self.checkpoints.read_metadata(step))
        _, params, _ = nnx.split(components.unet, trainable_filter(self.config.train.trainable), ...)
        self.checkpoints.restore_params(params, step)
        nnx.update(components.unet, sharding.device_put(params, mesh))

    def check_base(self, components: Components, metadata: dict[str, Any]) -> None:
        """Refuse another base model than the one that the run was started on."""
        if metadata["fingerprint"] != components.fingerprint:
            raise WeightsError(
                f"the weights of {self.config.model.path} have changed since this run began (fingerprint "
                f"{components.fingerprint}, then {metadata['fingerprint']}), and {self.directory} holds only the "
                "weights trained on top of them. Restore the old weights, or start again in another --workdir."
            )

    def load_clip(self) -> Clip:
        """The clip that the config names."""
        c = self.config.clip
        if not c.path:
            raise InputError("clip.path is empty; give the clip to learn from, such as --config.clip.path=man.mp4")
        size = (c.height, c.width)
        try:
            return load_video(c.path, frames=c.frames or None, size=size, start=c.start, stride=c.stride, fit=c.fit)
        except MissingError as error:
            if c.path in SAMPLE_CLIPS:
                raise MissingError(
                    f"{c.path} does not exist; it is one of the sample clips of github.com/showlab/Tune-A-Video, in "
                    "data/: download it there, or give your own clip with --config.clip.path=…"
                ) from error
            raise

    def save_metadata(self, more: dict[str, Any]) -> dict[str, Any]:
        """Write config.json and environment.json; the latter keeps the entries of earlier sessions of the run."""
        self.directory.write("config.json", configs.to_json(self.config))
        previous = json.loads(self.directory.read("environment.json") or "{}")
        earlier = previous.pop("earlier", []) + ([previous] if previous else [])
        record = {**environment.describe(), **more, "earlier": earlier}
        self.directory.write("environment.json", json.dumps(record, indent=2) + "\n")
        return {"fingerprint": more["base"], "config": json.loads(configs.to_json(self.config))}

    # ------------------------------------------------------------------------------------------- previews

    def previews_due(self, step: int) -> bool:
        return is_due(step, self.config.train.preview_every) and bool(self.config.edit.prompts)

    def preview_files(self, step: int) -> list[str]:
        return [f"previews/step_{step:06d}/{name}.mp4" for name in file_names(self.config.edit.prompts)]

    def previews_missing(self, step: int) -> bool:
        """Whether the run was stopped after the checkpoint of a step and before its previews. Changed edit settings
        apply from the next previews on."""
        if not step or not self.previews_due(step):
            return False
        stored: Any = configs.from_json(self.directory.read("config.json") or "")
        unchanged = (stored.edit.to_dict(), stored.train.preview_every) == (
            self.config.edit.to_dict(),
            self.config.train.preview_every,
        )
        return unchanged and not all((self.directory / file).exists() for file in self.preview_files(step))


def publish_video(directory: RunDirectory, video: Clip, name: str) -> None:
    """Write a video into a run's directory, from the first process."""
    if processes.is_primary():
        with directory.writing(name) as scratch:
            video.save(scratch)


def sampling_options(edit: Any) -> dict[str, Any]:
    """The arguments of `TuneAVideo.sample` that a config's previews and edits share."""
    return {
        name: edit[name] for name in ("steps", "sampler", "inversion_steps", "guidance", "strength", "negative_prompt")
    }


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def parameter_count(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))

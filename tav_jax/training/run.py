"""A training run: directory, config and checkpoints."""

import functools
import json
import shlex
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from tav_jax import config as configs
from tav_jax.distributed import processes, sharding
from tav_jax.errors import InputError, MissingError, WeightsError, join_names
from tav_jax.io.video import Clip, load_video
from tav_jax.io.weights import Components
from tav_jax.training import derived, environment, source_clip
from tav_jax.training.checkpoint import Checkpoints
from tav_jax.training.run_directory import RunDirectory, file_names
from tav_jax.training.train_step import TrainState, trainable_filter

SAMPLE_CLIPS = ("/data/man-skiing.mp4", "/data/car-turn.mp4")  # in the official repository


def log(*words: Any) -> None:
    """Print a line, above a progress bar if there is one, in process 0 only."""
    if processes.is_primary():
        from tqdm import tqdm

        with tqdm.external_write_mode():
            print(*words, flush=True)


class Run:
    def __init__(self, directory: RunDirectory, config: Any):
        self.directory = directory
        self.config: Any = config
        self.clip_option = "--clip"  # of the command line, for another path of the clip
        self.is_training = False  # True allows this process to remove and rename checkpoints

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        """Opened at first use, because opening creates their directory."""
        t = self.config.train
        if self.is_training and not self.directory.remote:
            processes.run_on_primary(
                "opening the checkpoints", lambda: str(self.directory.make_directory("checkpoints"))
            )
        options = {"keep_newest": t.keep_newest, "keep_every": t.keep_every, "repair": self.is_training}
        checkpoints = Checkpoints(self.directory / "checkpoints", **options)
        for message in checkpoints.messages:
            log(message)
        return checkpoints

    @classmethod
    def start_or_continue(cls, workdir: str, config: Any) -> "Run":
        """A run with this config in this directory. If there is a run already, only the settings in `config.MAY_CHANGE`
        may differ from its own."""
        config = configs.validate(config)
        if config.edit.prompts and config.train.preview_every:
            configs.check_edit_steps(config.edit)
        processes.check_same({"--workdir": str(workdir), **dict(configs.leaves(config))})
        if not config.clip.path:
            raise InputError("clip.path is empty; give the clip to learn from, such as --config.clip.path=man.mp4")
        if config.clip.prompt is None:
            raise InputError(
                "clip.prompt is not set; describe the clip in one sentence, such as --config.clip.prompt='a man is "
                "skiing', or set it to '' to tune on the empty prompt. `tav caption "
                f"{shlex.quote(config.clip.path)}` suggests a sentence."
            )
        config.clip.path = source_clip.absolute(config.clip.path)
        config.model.update(source_clip.absolute_model(config.model))
        if config.edit.mask:
            config.edit.mask = source_clip.absolute(config.edit.mask)
        directory = RunDirectory(workdir)
        processes.run_on_primary("checking the directory", directory.check_writable)
        directory.check_shared()
        if directory.has_run and (changed := configs.differences(directory.read_config(), config)):
            raise InputError(
                f"{directory} holds a run with another config: {'; '.join(changed)}. Use another --workdir, or the old "
                "settings."
            )
        return cls(directory, config)

    @classmethod
    def open(cls, workdir: Any) -> "Run":
        """The run in an existing directory."""
        processes.check_same({"--workdir": str(workdir)})
        directory = RunDirectory(workdir)
        directory.check_shared()
        if not directory.has_run:
            raise MissingError(f"{directory} holds no run (no config.json); give the --workdir of a `tav train`")
        return cls(directory, directory.read_config())

    def load_weights(self, components: Components, step: int | None, mesh: Mesh | None) -> None:
        """Load the trained weights of a checkpoint, by default the newest, into a pipeline's UNet."""
        self.check_base(components, self.checkpoints.read_metadata(step))
        _, params, _ = nnx.split(components.unet, trainable_filter(self.config.train.trainable), ...)
        state = self.checkpoints.restore(TrainState.create(params), step)
        nnx.update(components.unet, sharding.device_put(state.params, mesh))

    def check_base(self, components: Components, metadata: dict[str, Any]) -> None:
        """Refuse a base model that differs from the one that the run started with."""
        if metadata["fingerprint"] != components.fingerprint:
            loras = f" or of {join_names(self.config.model.lora)}" if self.config.model.lora else ""
            raise WeightsError(
                f"the weights of {self.config.model.path}{loras} have changed since this run began (fingerprint "
                f"{components.fingerprint}, then {metadata['fingerprint']}), and {self.directory} holds only the "
                "weights trained on top of them. Restore the old weights, or start again in another --workdir."
            )

    def load_clip(self, recorded: dict[str, Any] | None = None) -> Clip:
        """The clip that the config names. Refuses a clip that differs from the one that a checkpoint has recorded."""
        c, option = self.config.clip, "--config.clip.path" if self.is_training else self.clip_option
        size = (c.height, c.width)
        try:
            clip = load_video(c.path, frames=c.frames or None, size=size, start=c.start, stride=c.stride, fit=c.fit)
        except MissingError as error:
            if recorded:
                raise MissingError(
                    f"{c.path}, the clip that this run was tuned on, does not exist; put it back, or give its new path "
                    f"with {option}=…"
                ) from error
            if c.path.endswith(SAMPLE_CLIPS):
                raise MissingError(
                    f"{c.path} does not exist; download it from the directory data/ of "
                    "github.com/showlab/Tune-A-Video, or give your own clip with --config.clip.path=…"
                ) from error
            raise
        fix = f"give that clip with {option}=…" + ", or use another --workdir" * self.is_training
        if note := source_clip.check(recorded, clip, c.path, fix):
            log(note)
        return clip

    def clip_moved(self, recorded: dict[str, Any] | None) -> bool:
        """Whether the path of the clip differs from that in the run's config.json. Refused if the run has not recorded
        its clip, so that their contents cannot be compared."""
        before = source_clip.absolute(self.directory.read_config().clip.path)
        if before != self.config.clip.path and not recorded:
            raise InputError(
                f"{self.directory} holds a run with another config: clip.path was {before!r} and is "
                f"{self.config.clip.path!r}. Use another --workdir, or the old settings."
            )
        return before != self.config.clip.path

    def save_clip_path(self) -> None:
        """Change the path of the clip in config.json, and nothing else there."""
        config = self.directory.read_config()
        config.clip.path = self.config.clip.path
        self.directory.write("config.json", configs.to_json(config))

    def save_metadata(self, session: dict[str, Any]) -> dict[str, Any]:
        """Write config.json and environment.json, which also keeps the earlier sessions of the run. Returns the
        metadata of its checkpoints. `session` has the base model's fingerprint and the record of the clip."""
        config = configs.to_json(self.config)
        self.directory.write("config.json", config)
        if processes.is_primary():
            previous = derived.read_object(self.directory, "environment.json", log)
            earlier = previous.pop("earlier", [])
            earlier = [*(earlier if isinstance(earlier, list) else [earlier]), *([previous] if previous else [])]
            record = {**environment.describe(), **session, "earlier": earlier}
            self.directory.write("environment.json", json.dumps(record, indent=2) + "\n")
        return {"fingerprint": session["base"], "config": json.loads(config), "clip": session["clip"]}

    def previews_due(self, step: int) -> bool:
        return is_due(step, self.config.train.preview_every) and bool(self.config.edit.prompts)

    def preview_files(self, step: int) -> list[str]:
        return [f"previews/step_{step:06d}/{name}.mp4" for name in file_names(self.config.edit.prompts)]

    def previews_missing(self, step: int) -> bool:
        """Whether the run was stopped between the checkpoint and the previews of a step. If the edit settings have
        changed, they apply to later previews only."""
        if not step or not self.previews_due(step):
            return False
        settings = [(c.edit.to_dict(), c.train.preview_every) for c in (self.directory.read_config(), self.config)]
        exist = [(self.directory / file).exists() for file in self.preview_files(step)]
        return settings[0] == settings[1] and not all(exist)


def publish_video(directory: RunDirectory, video: Clip, name: str) -> None:
    """Write a video into a run's directory, in process 0 only."""
    if processes.is_primary():
        with directory.writing(name) as scratch:
            video.save(scratch)


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

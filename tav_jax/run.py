"""`tav train`, on one page: check, load, encode once, learn, keep, preview."""

import functools
import json
import platform
import sys
import time
from importlib import metadata
from typing import Any

import jax
from flax import nnx

from tav_jax import config as configs
from tav_jax import memory, metrics, processes, prompts, sharding, training
from tav_jax.checkpoint import Checkpoints
from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.pipeline import TuneAVideo
from tav_jax.progress import progress_bar
from tav_jax.video import Clip, load_video
from tav_jax.workdir import Workdir

SAMPLES = {"data/man-skiing.mp4", "data/car-turn.mp4"}  # of the official repository


def say(*words: Any) -> None:
    """To the person at the terminal, or into the log: once, whatever the number of processes."""
    if processes.is_first():
        print(*words, flush=True)


def load_clip(config: Any) -> Clip:
    """The clip that a config names, as it says."""
    c = config.clip
    if not c.path:
        raise InputError("clip.path is empty; give the clip to learn from, such as --config.clip.path=man.mp4")
    try:
        return load_video(
            c.path, frames=c.frames or None, size=(c.height, c.width), start=c.start, stride=c.stride, fit=c.fit
        )
    except MissingError as error:
        if c.path in SAMPLES:
            raise MissingError(
                f"{c.path} does not exist; it is one of the sample clips of github.com/showlab/Tune-A-Video, folder "
                "data/: download it there, or give your own clip with --config.clip.path=…"
            ) from error
        raise


class Run:
    """One training run: its folder, its config, its checkpoints."""

    def __init__(self, workdir: Workdir, config: Any):
        self.workdir = workdir
        self.config: Any = config

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        """Opened when first needed: opening makes their folder."""
        t = self.config.train
        return Checkpoints(self.workdir / "checkpoints", keep_newest=t.keep_newest, keep_every=t.keep_every)

    @classmethod
    def start_or_continue(cls, workdir: str, config: Any) -> "Run":
        """A run of this config in this folder. Of a run that is there already, only what may change may differ."""
        config = configs.validate(config)
        processes.same({"--workdir": str(workdir), **dict(configs.leaves(config))})
        folder = Workdir(workdir).usable().check_shared()
        if folder.has_run:
            kept = configs.from_json(folder.read("config.json") or "")
            if changed := configs.differences(kept, config):
                raise InputError(
                    f"{folder} holds a run of another config: {'; '.join(changed)}. Use another --workdir, or the old "
                    "settings."
                )
        return cls(folder, config)

    @classmethod
    def open(cls, workdir: Any) -> "Run":
        processes.same({"--workdir": str(workdir)})
        folder = Workdir(workdir).check_shared().existing()
        return cls(folder, configs.from_json(folder.read("config.json") or ""))

    # ------------------------------------------------------------------------------------------------- restoring

    def restore(self, step: int | None = None) -> TuneAVideo:
        """The pipeline with the weights of a checkpoint."""
        about = self.checkpoints.about(step)
        tav = TuneAVideo.from_config(self.config)
        self.check_base(tav, about)
        _, trained, _ = nnx.split(tav.parts.unet, training.subset(self.config.train.trainable), ...)
        self.checkpoints.weights(trained, step)
        nnx.update(tav.parts.unet, sharding.place(trained, tav.mesh))
        return tav

    def check_base(self, tav: TuneAVideo, about: dict[str, Any]) -> None:
        if about["fingerprint"] != tav.parts.fingerprint:
            raise WeightsError(
                f"the weights of {self.config.model.path} have changed since this run began (fingerprint "
                f"{tav.parts.fingerprint}, then {about['fingerprint']}), and {self.workdir} holds only what was "
                "learned on top of them. Bring the old weights back, or start again in another --workdir."
            )

    # ------------------------------------------------------------------------------------------------- training

    def train(self) -> None:
        c = self.config
        metrics.check_installed(tensorboard=c.log.tensorboard, wandb=c.log.wandb)
        first = (self.checkpoints.newest or 0) if self.workdir.has_run else 0
        if first >= c.train.steps:
            say(f"{self.workdir} is finished: {first} steps of {c.train.steps}. Edit with `tav edit --workdir=…`.")
            return

        clip = load_clip(c)
        tav = TuneAVideo.from_config(c)
        tav.source = clip
        posterior, text = tav.posterior(clip), tav.encode_text(c.clip.prompt)
        learner, advance = tav.tuning(
            posterior,
            text,
            learning_rate=c.train.learning_rate,
            weight_decay=c.train.weight_decay,
            max_grad_norm=c.train.max_grad_norm,
            seed=c.seed,
            trainable=c.train.trainable,
            remat=c.train.remat,
            fsdp=c.mesh.fsdp,
        )
        say(self.outlook(tav, clip, learner, first))
        if first:
            self.check_base(tav, self.checkpoints.about())
            learner = self.checkpoints.restore(learner)
        tav.offload()

        self.workdir.create()
        self.workdir.write("config.json", configs.to_json(c))
        self.workdir.write("environment.json", json.dumps(environment(), indent=2) + "\n")
        about = {"fingerprint": tav.parts.fingerprint, "config": json.loads(configs.to_json(c))}
        log = metrics.Metrics(self.workdir, first, tensorboard=c.log.tensorboard, wandb=c.log.wandb, config=c.to_dict())
        profiler = Profiler(self.workdir, c.log.profile_step * processes.is_first(), c.log.profile_steps)
        try:
            with progress_bar(c.train.steps, "tuning") as bar:
                bar.update(first)
                for progress in training.loop(advance, learner, first, c.train.steps):
                    done, learner = progress.done, progress.learner
                    for step, report in progress.reports:
                        values = {"loss": float(report.loss), "grad_norm": float(report.grad_norm)}
                        log.write(step, values)
                        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
                        bar.update()
                    profiler.after(done)
                    if due(done, c.train.checkpoint_every) or done == c.train.steps:
                        self.checkpoints.save(done, learner, about)
                        log.publish()
                    if due(done, c.train.preview_every) and c.edit.prompts:
                        tav.adopt(learner)
                        self.preview(tav, posterior[0], done, log)
            self.checkpoints.wait()
        finally:
            profiler.close()
            log.close()
        say(f"Tuned for {c.train.steps} steps. Edit with `tav edit --workdir={self.workdir} --prompt=…`.")

    def outlook(self, tav: TuneAVideo, clip: Clip, learner: training.Learner, first: int) -> str:
        """What will happen, in one line, before anything long begins."""
        c = self.config
        frames, height, width, _ = clip.frames.shape
        trained = sum(x.size for x in jax.tree.leaves(learner.trained))
        weights = jax.tree.leaves(tav.parts.unet)
        need = memory.need(
            tav.parts.unet.config,
            frames,
            height // tav.parts.vae.config.downsampling,
            width // tav.parts.vae.config.downsampling,
            frozen=sum(x.nbytes for x in weights) - 4 * trained,
            trained=trained,
            itemsize=tav.dtype.itemsize,
        )
        device = jax.devices()[0]
        doing = f"Continuing at step {first} of {c.train.steps}" if first else f"Tuning for {c.train.steps} steps"
        return (
            f"{doing}: {trained / 1e6:.2f} M of {sum(x.size for x in weights) / 1e6:.2f} M parameters, "
            f"{frames} frames of {height}×{width}, {c.model.dtype} on {device.device_kind}, about "
            f"{need.tuning / 2**30:.2f} GiB of its memory; results go to {self.workdir}."
        )

    def preview(self, tav: TuneAVideo, latents: jax.Array, step: int, log: metrics.Metrics) -> None:
        """The edit prompts from the inverted clip, with the weights of this moment."""
        e = self.config.edit
        noise = tav.invert(latents, steps=e.inversion_steps)
        for prompt, name in zip(e.prompts, prompts.file_names(e.prompts), strict=True):
            edit = tav.sample(
                prompt, latents=noise, steps=e.steps, guidance=e.guidance, negative_prompt=e.negative_prompt
            )
            file = f"previews/step_{step:06d}/{name}.mp4"
            publish_video(self.workdir, edit, file)
            log.preview(step, name, edit.frames)


def publish_video(workdir: Workdir, video: Any, name: str) -> None:
    """Put a video in its place; of several processes the first one does."""
    if not processes.is_first():
        return
    scratch = workdir.scratch(name)
    try:
        video.save(scratch)
        workdir.publish(scratch, name)
    finally:
        scratch.unlink(missing_ok=True)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def environment() -> dict[str, Any]:
    """What a result depends on besides its config."""
    packages = ("tav_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "av")
    versions: dict[str, str] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            versions[name] = "not installed"
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": versions,
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": processes.count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
    }


class Profiler:
    """A window of steps for JAX's profiler; open the folder with TensorBoard or xprof."""

    def __init__(self, workdir: Workdir, first: int, steps: int):
        self.workdir, self.first, self.last = workdir, first, first + steps
        self.running = False

    def after(self, step: int) -> None:
        if self.first and step == self.first and not self.running:
            jax.profiler.start_trace(str(self.workdir.local / "profile"))
            self.running = True
        elif self.running and step >= self.last:
            self.close()

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.workdir.publish_folder("profile")
            self.running = False

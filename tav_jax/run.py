"""`tav train`, on one page: check, load, encode once, learn, keep, preview."""

import contextlib
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from tav_jax import config as configs
from tav_jax import environment, finite, metrics, processes, prompts, sharding, training
from tav_jax.checkpoint import Checkpoints
from tav_jax.errors import InputError, MissingError, NotFiniteError, StoppedError, WeightsError
from tav_jax.pipeline import TuneAVideo
from tav_jax.progress import progress_bar
from tav_jax.stopping import Stop, told
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
        self.trains = False  # and so may tidy up

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        """Opened when first needed: opening makes their folder."""
        t = self.config.train
        found = Checkpoints(
            self.workdir / "checkpoints", keep_newest=t.keep_newest, keep_every=t.keep_every, tidy=self.trains
        )
        for complaint in found.complaints:
            say(complaint)
        return found

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

    def train(self, stop: Stop | None = None) -> None:
        """To the last step, or until `stop` is asked for: then `StoppedError`."""
        log = self.config.log
        metrics.check_installed(tensorboard=log.tensorboard, wandb=log.wandb)
        with self.workdir.only_one():
            self.workdir.sweep()
            self.trains = True
            try:
                self._train(stop or Stop())
            except FloatingPointError as error:  # with --debug-nans, before there are steps
                raise finite.operation(error) from error

    def _train(self, stop: Stop) -> None:
        c = self.config
        first = (self.checkpoints.newest or 0) if self.workdir.has_run else 0
        owed = processes.from_first("looking for previews", lambda: self.owes_previews(first))
        if first >= c.train.steps and not owed:
            say(f"{self.workdir} is finished: {first} steps of {c.train.steps}. Edit with `tav edit --workdir=…`.")
            return

        clip = load_clip(c)
        tav = TuneAVideo.from_config(c)
        tav.source = clip
        posterior, text = tav.posterior(clip), tav.encode_text(c.clip.prompt)
        finite.check_inputs(posterior, text, c.model.dtype)
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
        say(self.outlook(tav, clip, posterior[0], learner, first))
        if first:
            self.check_base(tav, self.checkpoints.about())
            learner = self.checkpoints.restore(learner)
        tav.offload(c.train.trainable)

        self.workdir.create()
        self.workdir.write("config.json", configs.to_json(c))
        about = {"fingerprint": tav.parts.fingerprint, "config": json.loads(configs.to_json(c))}
        self.note_environment({"began_at": first, "base": tav.parts.fingerprint, "clip": digest(clip)})
        log = metrics.Metrics(self.workdir, first, tensorboard=c.log.tensorboard, wandb=c.log.wandb, config=c.to_dict())
        profiler = Profiler(self.workdir, c.log.profile_step * processes.is_first(), c.log.profile_steps)
        suspects = {"dtype": c.model.dtype, "learning_rate": c.train.learning_rate}
        done, ending = first, False

        def kept(done: int) -> bool:
            return ending or due(done, c.train.checkpoint_every) or done == c.train.steps

        def settle(done: int) -> bool:
            nonlocal ending
            ending = processes.agree(stop.asked)  # all end after the same step
            return kept(done) or self.previews_due(done)

        def keep() -> str:
            """What has been learned so far, on the disk."""
            self.checkpoints.save(done, learner, about)
            self.checkpoints.wait()
            return f"at step {done} of {c.train.steps}"

        def preview() -> None:
            tav.adopt(learner)
            # One process of several cannot write a checkpoint by itself: there, the end comes with the next step.
            with contextlib.nullcontext() if processes.several() else stop.meanwhile(keep):
                self.preview(tav, posterior[0], done, log)

        try:
            if owed:
                preview()
            with progress_bar(c.train.steps, "tuning") as bar:
                bar.update(first)
                for progress in training.loop(advance, learner, first, c.train.steps, settle=settle):
                    stop.steps_begin()
                    done, learner = progress.done, progress.learner
                    for step, report in progress.reports:
                        values = {"loss": float(report.loss), "grad_norm": float(report.grad_norm)}
                        finite.check_report(step, values, **suspects)
                        log.write(step, values)
                        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
                        bar.update()
                    profiler.after(done)
                    if not progress.settled:
                        continue
                    finite.check_learner(done, learner, **suspects)
                    if kept(done):
                        log.publish()
                        self.checkpoints.save(done, learner, about)
                    if ending and done < c.train.steps:
                        raise StoppedError(told(keep()))
                    if self.previews_due(done):
                        preview()
            self.checkpoints.wait()
        except NotFiniteError:
            self.checkpoints.wait()  # the last good one may still be on its way
            raise
        except FloatingPointError as error:  # with --debug-nans
            raise finite.operation(error, done + 1) from error
        finally:
            profiler.close()
            log.close()
        say(f"Tuned for {c.train.steps} steps. Edit with `tav edit --workdir={self.workdir} --prompt=…`.")

    def note_environment(self, more: dict[str, Any]) -> None:
        """What this part of the run is made with, beside what the parts before it were made with."""
        before = json.loads(self.workdir.read("environment.json") or "{}")
        parts = before.pop("earlier", []) + ([before] if before else [])
        now = {**environment.facts(), **more, "earlier": parts}
        self.workdir.write("environment.json", json.dumps(now, indent=2) + "\n")

    def outlook(self, tav: TuneAVideo, clip: Clip, latents: jax.Array, learner: training.Learner, first: int) -> str:
        """What will happen, in one line, before anything long begins."""
        c = self.config
        frames, height, width, _ = clip.frames.shape
        trained = sum(x.size for x in jax.tree.leaves(learner.trained))
        weights = jax.tree.leaves(tav.parts.unet)
        work = tav.tuning_work(latents, trained, remat=c.train.remat, fsdp=c.mesh.fsdp)
        needed = work.count(work.shape, work.devices)
        device = jax.devices()[0]
        doing = f"Continuing at step {first} of {c.train.steps}" if first else f"Tuning for {c.train.steps} steps"
        return (
            f"{doing}: {trained / 1e6:.2f} M of {sum(x.size for x in weights) / 1e6:.2f} M parameters, "
            f"{frames} frames of {height}×{width}, {c.model.dtype} on {device.device_kind}, about "
            f"{needed / 2**30:.2f} GiB of its memory; results go to {self.workdir}."
        )

    def previews_due(self, step: int) -> bool:
        return due(step, self.config.train.preview_every) and bool(self.config.edit.prompts)

    def preview_files(self, step: int) -> list[str]:
        return [f"previews/step_{step:06d}/{name}.mp4" for name in prompts.file_names(self.config.edit.prompts)]

    def owes_previews(self, step: int) -> bool:
        """Was the run stopped between a checkpoint and that step's previews? New wishes begin with the next ones."""
        if not step or not self.previews_due(step):
            return False
        kept: Any = configs.from_json(self.workdir.read("config.json") or "")
        as_before = (kept.edit.to_dict(), kept.train.preview_every) == (
            self.config.edit.to_dict(),
            self.config.train.preview_every,
        )
        return as_before and not all((self.workdir / file).exists() for file in self.preview_files(step))

    def preview(self, tav: TuneAVideo, latents: jax.Array, step: int, log: metrics.Metrics) -> None:
        """The edit prompts from the inverted clip, with the weights of this moment."""
        e = self.config.edit
        try:
            noise = tav.invert(latents, steps=e.inversion_steps)
            for prompt, file in zip(e.prompts, self.preview_files(step), strict=True):
                edit = tav.sample(prompt, latents=noise, **sampling(e))
                publish_video(self.workdir, edit, file)
                log.preview(step, Path(file).stem, edit.frames)
        except NotFiniteError as error:  # the tuning itself is sound
            say(f"There is no preview at step {step}: {error}")


def sampling(edit: Any) -> dict[str, Any]:
    """How a config's edits are sampled, previews and final ones alike."""
    return {name: edit[name] for name in ("steps", "guidance", "strength", "negative_prompt")}


def publish_video(workdir: Workdir, video: Any, name: str) -> None:
    """Put a video in its place; of several processes the first one does."""
    if not processes.is_first():
        return
    with workdir.making(name) as scratch:
        video.save(scratch)


def digest(clip: Clip) -> str:
    return hashlib.blake2b(clip.frames.tobytes(), digest_size=16).hexdigest()


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


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

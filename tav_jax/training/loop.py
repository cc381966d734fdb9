"""The loop of `tav train`, with checkpoints, previews and the profiler."""

import contextlib
import functools
import shlex
from pathlib import Path
from typing import Any

import jax

from tav_jax.diffusion.windows import check_length
from tav_jax.distributed import processes
from tav_jax.errors import NotFiniteError, StoppedError
from tav_jax.io.progress import MeanLoss, counter, progress_bar
from tav_jax.io.video import Clip
from tav_jax.pipeline import TuneAVideo
from tav_jax.training import editing, nonfinite, source_clip
from tav_jax.training.metrics import Metrics, check_installed
from tav_jax.training.preemption import Stop, stop_message
from tav_jax.training.run import Run, is_due, log, publish_video
from tav_jax.training.run_directory import RunDirectory
from tav_jax.training.train_step import Hyperparameters, run_steps
from tav_jax.training.trainer import Trainer


def train(run: Run, stop: Stop | None = None) -> None:
    """Train to the last step. Raises `StoppedError` when `stop` is requested, after the state is saved."""
    check_installed(tensorboard=run.config.log.tensorboard, wandb=run.config.log.wandb)
    with run.directory.lock():
        run.directory.remove_scratch()
        run.is_training = True
        try:
            _train(run, stop or Stop())
        except FloatingPointError as error:  # with --debug-nans, before the first step
            raise nonfinite.from_debug_nans(error) from error


def _train(run: Run, stop: Stop) -> None:
    c = run.config
    first = (run.checkpoints.newest or 0) if run.directory.has_run else 0
    recorded = run.checkpoints.read_metadata().get("clip") if first else None
    check_moved = functools.partial(run.clip_moved, recorded)
    moved = run.directory.has_run and processes.run_on_primary("comparing the path of the clip", check_moved)
    previews_missing = processes.run_on_primary("checking the previews", lambda: run.previews_missing(first))
    finished = first >= c.train.steps and not previews_missing
    previews = c.edit.prompts if c.train.preview_every else ()
    if previews:
        editing.check(c, previews)
    clip = None if finished and not moved else run.load_clip(recorded)
    if clip is None or finished:
        if moved:
            run.save_clip_path()
        total = f" of {c.train.steps}" if first == c.train.steps else f", more than train.steps={c.train.steps}"
        log(f"{run.directory} is finished: {plural(first, 'step')}{total}. Edit with {edit_command(run)}.")
        return

    check_length(c.train.window, len(clip.frames), "train.window")
    if previews:
        check_length(c.edit.window, len(clip.frames), "edit.window")
    mask = editing.mask(c, len(clip.frames)) if previews else None
    tav = TuneAVideo.from_config(c)
    tav.source = clip
    posterior, text = tav.posterior(clip), tav.encode_text(c.clip.prompt)
    nonfinite.check_inputs(posterior, text, c.model.dtype)
    hyper = Hyperparameters(c.train.learning_rate, c.train.weight_decay, c.train.max_grad_norm)
    options = {"seed": c.seed, "trainable": c.train.trainable, "remat": c.train.remat, "fsdp": c.mesh.fsdp}
    options["window"] = c.train.window
    trainer = Trainer(tav, posterior, text, hyper=hyper, **options)
    log(summary(run, trainer, clip, first))
    if first:
        run.check_base(tav.components, run.checkpoints.read_metadata())
        trainer.state = run.checkpoints.restore(trainer.state)
    trainer.offload()

    run.directory.create()
    recorded = {**(recorded or source_clip.describe(clip, c.clip.path)), "path": c.clip.path}
    metadata = run.save_metadata({"began_at": first, "base": tav.components.fingerprint, "clip": recorded})
    metrics = Metrics(run.directory, first, tensorboard=c.log.tensorboard, wandb=c.log.wandb, config=c.to_dict())
    profiler = Profiler(run.directory, c.log.profile_step * processes.is_primary(), c.log.profile_steps)
    done, stopping = first, False

    def checkpoint_due(done: int) -> bool:
        return stopping or is_due(done, c.train.checkpoint_every) or done == c.train.steps

    def needs_all_metrics(done: int) -> bool:  # called after each step but the last, in all processes
        nonlocal stopping
        stopping = processes.stop_at_this_step(done, stop.requested)
        return checkpoint_due(done) or run.previews_due(done)

    def save_now() -> str:
        run.checkpoints.save(done, trainer.state, metadata)
        run.checkpoints.wait()
        return f"at step {done} of {c.train.steps}"

    def preview() -> None:
        trainer.load_into_unet()
        # With several processes a checkpoint is written by all together, so a stop waits for the next step.
        saving = contextlib.nullcontext() if processes.is_multiprocess() else stop.saving_with(save_now)
        with metrics.untimed(), saving:
            write_previews(run, tav, posterior.mean, mask, done, metrics)

    try:
        if previews_missing:
            preview()
        with progress_bar(c.train.steps, "tuning") as bar:
            bar.update(first)
            loss = MeanLoss(bar)
            profiler.after(done, trainer.state)
            steps = run_steps(trainer.step_fn, trainer.state, first, c.train.steps, fetch_all=needs_all_metrics)
            for progress in steps:
                stop.steps_begin()
                done, trainer.state = progress.done, progress.state
                seconds = metrics.seconds_per_step(len(progress.metrics))
                for step, values in progress.metrics:
                    record = {"loss": float(values.loss), "grad_norm": float(values.grad_norm)}
                    nonfinite.check_metrics(step, record)
                    metrics.write(step, {**record, "seconds": seconds})
                    loss.step(record["loss"])
                profiler.after(done, trainer.state)
                if not progress.complete:
                    continue
                with metrics.untimed():
                    nonfinite.check_state(done, trainer.state)
                    if checkpoint_due(done):
                        metrics.publish()
                        run.checkpoints.save(done, trainer.state, metadata)
                if stopping and done < c.train.steps:
                    raise StoppedError(stop_message(save_now()))
                if run.previews_due(done):
                    preview()
        run.checkpoints.wait()
    except NotFiniteError:
        run.checkpoints.wait()  # the last good checkpoint may still be being written
        raise
    except FloatingPointError as error:  # with --debug-nans
        raise nonfinite.from_debug_nans(error, done + 1) from error
    finally:
        profiler.close()
        metrics.close()
    log(f"Tuned for {plural(max(first, c.train.steps), 'step')}. Edit with {edit_command(run)}.")


def edit_command(run: Run) -> str:
    return f"`tav edit --workdir={shlex.quote(str(run.directory))} --prompt=…`"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def summary(run: Run, trainer: Trainer, clip: Clip, first: int) -> str:
    """What is trained on which data, printed before the first step."""
    c, workload = run.config, trainer.workload
    frames, height, width, _ = clip.frames.shape
    total = sum(x.size for x in jax.tree.leaves(trainer.tav.components.unet))
    needed = workload.bytes_needed(workload.shape, workload.devices)
    action = (
        f"Continuing at step {first} of {c.train.steps}" if first else f"Tuning for {plural(c.train.steps, 'step')}"
    )
    return (
        f"{action}: {trainer.parameters / 1e6:.2f} M of {total / 1e6:.2f} M parameters, "
        f"{frames} frames of {height}×{width}, {c.model.dtype} on {jax.devices()[0].device_kind}, about "
        f"{needed / 2**30:.2f} GiB of its memory with remat {trainer.remat}; results go to {run.directory}.\n"
        f"{coverage(clip, c.clip.start, c.clip.stride)}"
    )


def coverage(clip: Clip, start: int, stride: int) -> str:
    """How much of its source a clip covers and, if that is less than 90 %, the stride that covers all of it."""
    frames, seconds = len(clip.frames), len(clip.frames) / clip.fps
    text = f"{plural(frames, 'frame')} at stride {stride}: {seconds:.1f} s"
    if clip.source_frames:
        total = clip.source_frames / (clip.fps * stride)
        text += f" of the clip's {total:.1f} s"
        if (
            seconds < 0.9 * total
            and frames > 1
            and (largest := (clip.source_frames - 1 - start) // (frames - 1)) > stride
        ):
            text += f"; --config.clip.stride={largest} covers all of it" + f" after frame {start}" * (start > 0)
    return text + "."


def write_previews(run: Run, tav: TuneAVideo, latents: jax.Array, mask: Any, step: int, metrics: Metrics) -> None:
    """Sample the edit prompts from the inverted clip with the current weights."""
    settings = run.config.edit
    log(f"Sampling {plural(len(settings.prompts), 'preview')} at step {step}.")
    total = settings.inversion_steps + len(settings.prompts) * settings.steps
    try:
        with progress_bar(total, f"previews of step {step}", leave=False) as bar:
            inverted = tav.invert(latents, progress=counter(bar), **editing.inversion_options(run.config))
            options = editing.sampling_options(run.config, inverted, mask)
            for prompt, file in zip(settings.prompts, run.preview_files(step), strict=True):
                edit = tav.sample(prompt, progress=counter(bar), **options)
                publish_video(run.directory, edit, file)
                metrics.log_preview(step, Path(file).stem, edit.frames)
                log(f"Wrote {run.directory / file}.")
    except NotFiniteError as error:  # the training can continue
        log(f"No preview at step {step}: {error}")


class Profiler:
    """Profiles `count` steps from step `first`, counted from 1, with JAX's profiler. TensorBoard and xprof show the
    result."""

    def __init__(self, directory: RunDirectory, first: int, count: int):
        self.directory, self.first, self.last = directory, first, first + count - 1
        self.running = False

    def after(self, step: int, state: Any) -> None:
        """Called after each step, and before the first one with its number minus one. Steps run asynchronously, so this
        waits for their state."""
        if step + 1 == self.first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.directory.make_directory("profile")))
            self.running = True
        elif step == self.last and self.running:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        if self.running:
            jax.profiler.stop_trace()
            self.directory.publish_directory("profile")
            self.running = False

"""`TuneAVideo`: what a notebook calls.

tav   = TuneAVideo.from_pretrained("stable-diffusion-v1-4")
clip  = load_video("man-skiing.mp4", frames=24, size=(512, 512))
tav.tune(clip, "a man is skiing")
noise = tav.invert(clip)
tav.sample("spider man is skiing on the beach, cartoon style", latents=noise).save("edit.mp4")
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from tav_jax import finite, given, kernels, memory, processes, programs, prompts, sharding, training, weights
from tav_jax.diffusion import Ladder, Schedule
from tav_jax.errors import InputError
from tav_jax.given import Frames, Given
from tav_jax.layout import Layout
from tav_jax.models.remat import called
from tav_jax.progress import Progress, progress_bar, shown
from tav_jax.video import Clip

Advance = Callable[[training.Learner, int], tuple[training.Learner, training.Report]]
DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}


class Tuned(NamedTuple):
    losses: Float[np.ndarray, "N"]
    grad_norms: Float[np.ndarray, "N"]  # before clipping


@dataclass(frozen=True)
class Edit:
    """A sampled clip."""

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: float
    prompt: str
    latents: Float[Array, "1 F h w c"]
    trajectory: Float[Array, "steps 1 F h w c"] | None = None
    audio: Any = None

    def save(self, path: str | Path) -> Path:
        """Write an MP4 or a GIF, by the name's suffix; the source's sound goes along. Of several processes the first
        one writes."""
        return Clip(self.frames, self.fps, self.audio).save(path) if processes.is_first() else Path(path)


class TuneAVideo:
    """One pretrained Stable Diffusion, inflated to video, and everything that can be done with it."""

    def __init__(self, parts: weights.Pipeline, dtype, mesh: Mesh | None = None):
        self.parts = parts
        self.mesh = mesh
        for module in (parts.unet, parts.vae, parts.text_encoder):
            nnx.update(module, sharding.place(nnx.state(module), mesh))
        self.dtype = jnp.dtype(dtype)
        self.schedule = Schedule.from_config(parts.layout.configs["scheduler"])
        self.source: Clip | None = None  # the clip last tuned on or inverted: edits play at its speed, with its sound

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: str = "bfloat16",
        mesh: tuple[int, int] | None = None,
        frames: int = sharding.USUAL_FRAMES,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        spatial_attention: str = "sparse-causal",
        temporal_attention: bool = True,
        kernel: str = "auto",
        trainable: Sequence[str] = training.TRAINABLE,
    ) -> "TuneAVideo":
        """Load a Diffusers-layout directory, a hub id or a bucket path.

        A 2D UNet is inflated, its new temporal layers drawn from `seed`; one that was tuned already, by this or the
        official code, is taken as it is. `dtype` is that of the frozen weights and of the arithmetic; weights that can
        be tuned, those of `trainable`, stay in float32. `mesh` is (data, frames), on the first devices; by default all
        devices are used, shared out as suits a clip of `frames` frames. A `size` (height, width) that the model cannot
        take is refused before its weights are read. `kernel` computes the spatial attention: by
        default the best for these devices, see `tav_jax.kernels`. Where there are several processes, all of them must
        call it, and then everything else, in the same order.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
        kinds = ("sparse-causal", "first-frame", "per-frame")
        if spatial_attention not in kinds:
            raise InputError(f"spatial_attention is {spatial_attention!r}; it must be one of {', '.join(kinds)}")
        processes.join()
        try:
            devices = sharding.make(mesh, frames=frames)
        except sharding.MeshError as error:
            raise InputError(f"{error}; the product of mesh=(data, frames) may be {jax.device_count()}") from error
        try:
            chosen = kernels.choose(kernel, jax.default_backend())
        except kernels.KernelError as error:
            raise InputError(str(error)) from error
        layout = Layout.open(
            source, spatial_attention=spatial_attention, temporal_attention=bool(temporal_attention), kernel=chosen
        )
        if size:
            given.size(*size, layout.vae.downsampling)
        Schedule.from_config(layout.configs["scheduler"])  # refused before gigabytes are read
        parts = weights.Pipeline.load(layout, DTYPES[dtype], exact=training.subset(trainable), seed=seed)
        processes.same({f"the fingerprint of {source}": parts.fingerprint})
        return cls(parts, DTYPES[dtype], devices)

    @classmethod
    def from_config(cls, config: Any) -> "TuneAVideo":
        """As a run's config says."""
        options = {k: config.model[k] for k in ("dtype", "spatial_attention", "temporal_attention", "kernel")}
        return cls.from_pretrained(
            config.model.path,
            mesh=(config.mesh.data, config.mesh.frames),
            frames=config.clip.frames or sharding.USUAL_FRAMES,
            size=(config.clip.height, config.clip.width),
            seed=config.seed,
            trainable=config.train.trainable,
            **options,
        )

    @classmethod
    def restore(cls, workdir: str | Path, *, step: int | None = None) -> "TuneAVideo":
        """From the checkpoint of a training run, by default its newest."""
        from tav_jax.run import Run  # a run needs a pipeline, too

        return Run.open(workdir).restore(step)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write a Diffusers-layout directory with the UNet as it is now, its keys as the official code names them."""
        processes.from_first(f"writing {directory}", lambda: weights.save(self.parts, directory))

    def offload(self, trainable: Sequence[str] = ()) -> None:
        """Move the VAE and the text encoder to the host's memory, and of the UNet what is trained, while a learner has
        its own; a call that needs them takes them along."""
        for module in (self.parts.vae, self.parts.text_encoder):
            nnx.update(module, jax.device_get(nnx.state(module)))
        if trainable:
            unet = self.parts.unet
            nnx.update(unet, jax.device_get(nnx.state(unet, training.subset(trainable))))

    @property
    def _factor(self) -> int:
        """Pixels to a latent's side."""
        return self.parts.vae.config.downsampling

    @property
    def _channels(self) -> int:
        return self.parts.unet.config.in_channels

    # ---------------------------------------------------------------------------------------- text and pictures

    @functools.cached_property
    def tokenizer(self):
        return prompts.load_tokenizer(self.parts.layout.root / "tokenizer")

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "n L"]:
        """Token ids, padded as the model expects; what does not fit is cut, with a warning that says what."""
        encoder = self.parts.layout.text_encoder
        return prompts.tokenize(self.tokenizer, texts, encoder.max_position_embeddings, encoder.vocab_size)

    def encode_text(self, texts: str | Sequence[str]) -> Float[Array, "n L e"]:
        """Text states, one row a prompt."""
        ids = self.tokenize([texts] if isinstance(texts, str) else texts)
        with self._running():
            return programs.encode_text(self.parts.text_encoder, jnp.asarray(ids))

    def encode_video(self, frames: Frames) -> Float[Array, "1 F h w c"]:
        """Scaled latents: the mean of the VAE's posterior."""
        return self.posterior(frames)[0]

    def posterior(self, frames: Frames) -> tuple[Float[Array, "1 F h w c"], Float[Array, "1 F h w c"]]:
        """Mean and standard deviation of the scaled latents: computed once, sampled from at each training step."""
        frames = given.frames(frames, self._factor)
        if processes.several():
            processes.same({"the clip": hashlib.blake2b(frames.tobytes(), digest_size=8).hexdigest()})
        with self._autoencoding("encoding", *frames.shape[:3]), self._running():
            mean, std = programs.encode_frames(
                self.parts.vae, jnp.asarray(frames), group=self._group(len(frames), frames.shape[1:3])
            )
        return mean[None], std[None]  # [1, F, h, w, 4]

    def decode_video(self, latents: Float[Given, "n F h w c"]) -> Float[Array, "n F H W 3"]:
        """Pictures in [0, 1] from scaled latents."""
        factor = self._factor
        size = (latents.shape[2] * factor, latents.shape[3] * factor)
        frames = latents.shape[0] * latents.shape[1]
        group = self._group(frames, size)
        with self._autoencoding("decoding", frames, *size), self._running():
            pictures = programs.decode_frames(self.parts.vae, jnp.asarray(latents, jnp.float32), group=group)
            return jax.block_until_ready(pictures)

    def unet(
        self, latents: Float[Given, "B F h w c"], timesteps: Int[Given, "B"], text: Float[Given, "B L e"]
    ) -> Float[Array, "B F h w c"]:
        """One call of the video UNet."""
        with self._running():
            return programs.call_unet(
                self.parts.unet, jnp.asarray(latents, jnp.float32), jnp.asarray(timesteps), jnp.asarray(text)
            )

    # ---------------------------------------------------------------------------------------------- training

    def tuning(
        self,
        posterior: tuple[Float[Array, "1 F h w c"], Float[Array, "1 F h w c"]],
        text: Float[Array, "1 L e"],
        *,
        learning_rate: float = 3e-5,
        weight_decay: float = 1e-2,
        max_grad_norm: float = 1.0,
        seed: int = 33,
        trainable: Sequence[str] = training.TRAINABLE,
        remat: str | bool = "block",
        fsdp: bool = False,
    ) -> tuple[training.Learner, Advance]:
        """What `training.loop` needs: a fresh learner, and the function that takes it one step on. With `fsdp` what is
        learned, and its moments, are kept in parts over all devices. `remat` is a name of `models/remat.py`."""
        key = jax.random.key(seed)
        mean, std = posterior

        def example_and_step(graph, learner, frozen, step, rest, options):
            return training.tune_step(graph, learner, frozen, key, jnp.int32(step), mean, std, *rest, **options)

        return self._lesson(
            example_and_step,
            mean,
            text,
            (learning_rate, weight_decay, max_grad_norm),
            trainable=trainable,
            remat=remat,
            fsdp=fsdp,
        )

    def _lesson(
        self, take_step, latents, text, hyper, *, trainable: Sequence[str], remat: str | bool, fsdp: bool = False
    ):
        try:
            remat = called(remat)
        except ValueError as error:
            raise InputError(str(error)) from error
        graph, trained, frozen = nnx.split(self.parts.unet, training.subset(trainable), ...)
        learned = sum(x.size for x in jax.tree.leaves(trained))
        work = self.tuning_work(latents, learned, remat=remat, fsdp=fsdp)
        memory.check(work)
        rest = (text, jnp.asarray(self.schedule.levels), training.Hyper(*(jnp.float32(x) for x in hyper)))
        options = {"prediction": self.schedule.prediction, "remat": remat, "fsdp": fsdp}

        def advance(learner: training.Learner, step: int):
            with memory.shortage(work), self._running():
                return take_step(graph, learner, frozen, step, rest, options)

        with memory.shortage(work):
            return sharding.place(training.Learner.create(trained), self.mesh, spread=fsdp), advance

    def adopt(self, learner: training.Learner) -> None:
        """Use what has been learned, for sampling and saving. Good until the learner's next step takes its buffers."""
        nnx.update(self.parts.unet, sharding.place(learner.trained, self.mesh))  # whole, where it lay in parts

    def _learn(self, learner: training.Learner, advance: Advance, steps: int, bar) -> Tuned:
        reports = []
        for progress in training.loop(advance, learner, 0, steps):
            learner = progress.learner
            for _, report in progress.reports:
                bar.set_postfix(loss=f"{report.loss:.4f}", refresh=False)
                bar.update()
                reports.append(report)
        self.adopt(learner)
        return Tuned(np.array([r.loss for r in reports]), np.array([r.grad_norm for r in reports]))

    def tune(
        self,
        clip: Frames,
        prompt: str,
        *,
        steps: int = 500,
        learning_rate: float = 3e-5,
        weight_decay: float = 1e-2,
        max_grad_norm: float = 1.0,
        seed: int = 33,
        trainable: Sequence[str] = training.TRAINABLE,
        remat: str | bool = "block",
        progress: bool | None = None,
    ) -> Tuned:
        """Learn the clip's motion; leaves the UNet tuned. `progress` shows a bar: by default where somebody looks."""
        given.steps(steps)
        learner, advance = self.tuning(
            self.posterior(clip),
            self.encode_text(prompt),
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            seed=seed,
            trainable=trainable,
            remat=remat,
        )
        if isinstance(clip, Clip):
            self.source = clip
        with progress_bar(steps, "tuning", progress) as bar:
            return self._learn(learner, advance, steps, bar)

    def replay(
        self,
        latents: Float[Given, "1 F h w c"],
        prompt: str,
        *,
        timesteps: Int[Given, "N"] | Sequence[int],
        noise: Float[Given, "N F h w c"],
        learning_rate: float = 3e-5,
        weight_decay: float = 1e-2,
        max_grad_norm: float = 1.0,
        trainable: Sequence[str] = training.TRAINABLE,
        remat: str | bool = "block",
    ) -> Tuned:
        """Training steps on given latents, timesteps and noise; leaves the UNet tuned."""
        latents, noise = given.latents(latents, self._channels), jnp.asarray(noise, jnp.float32)
        times = np.asarray(timesteps, np.int32)
        given.replayed(times, noise, latents, self.schedule.train_steps)

        def given_step(graph, learner, frozen, step, rest, options):
            example = training.Example(latents, noise[step][None], jnp.int32(times[step]))
            return training.replay_step(graph, learner, frozen, example, *rest, **options)

        learner, advance = self._lesson(
            given_step,
            latents,
            self.encode_text(prompt),
            (learning_rate, weight_decay, max_grad_norm),
            trainable=trainable,
            remat=remat,
        )
        with progress_bar(len(times), "replay", False) as bar:
            return self._learn(learner, advance, len(times), bar)

    # ------------------------------------------------------------------------------------ inversion and sampling

    def invert(
        self,
        clip: Frames | Float[Given, "1 F h w c"],
        *,
        steps: int = 50,
        prompt: str = "",
        return_trajectory: bool = False,
        progress: Progress = None,
    ) -> Float[Array, "..."]:
        """DDIM inversion: the noise from which sampling finds back to the clip.

        Takes a clip, its frames, or its latents. With `return_trajectory` the latents at all levels, `[steps + 1, 1, F,
        h, w, 4]`, the clip's own first. `progress` is True for a bar, or a function that is called every few steps with
        the number of steps done; with and without are two programs, each compiled once.
        """
        ladder = self.schedule.inversion(steps)
        if isinstance(clip, Clip):
            self.source = clip
        given_frames = isinstance(clip, Clip) or np.asarray(clip).dtype == np.uint8
        latents = self.encode_video(clip) if given_frames else given.latents(clip, self._channels)  # pyright: ignore
        text = self.encode_text(prompt)
        with shown(progress, steps, "inverting") as report:
            last, trajectory = self._walk("inverting", latents, text, ladder, None, return_trajectory, report)
        finite.check_walk("the inversion", last, self.dtype.name)
        return jnp.concatenate([latents[None], trajectory]) if trajectory is not None else last

    def sample(
        self,
        prompt: str | Sequence[str],
        *,
        latents: Float[Given, "n F h w c"] | None = None,
        steps: int = 50,
        guidance: float = 12.5,
        strength: float = 1.0,
        negative_prompt: str = "",
        seed: int = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        return_trajectory: bool = False,
        progress: Progress = None,
    ) -> Any:
        """Edited clips: one `Edit` for a prompt, a list of them for a list of prompts (sampled as one batch).

        Starts from `latents`, usually the inverted clip, for all prompts the same or one for each; or else from noise
        drawn from `seed` for `frames` frames of `size` (height, width). With `guidance` at 1 or below only the
        conditional half is computed. `progress` as for `invert`.

        `strength` is the share of the steps that the prompt leads. Below 1 more of the clip is kept: the noisiest
        steps go back the way that an inversion without a prompt came. Where things are is settled in the first steps,
        what they are in the later ones. Walks are then made of pieces, so that no other strength compiles a walk anew.
        """
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not texts:
            raise InputError("the list of prompts is empty; give at least one (an empty text is a prompt, too)")
        given.strength(strength, of_a_clip=latents is not None)
        ladder = self.schedule.sampling(steps)
        if latents is None:
            latents = self.noise(seed, frames, size)
        else:
            latents = given.latents(latents, self._channels, starts=len(texts))
        use_guidance = guidance > 1
        text = self.encode_text([negative_prompt] * len(texts) * use_guidance + texts)  # [2P or P, L, D]
        memory.check(self.work("sampling", latents, rows=len(text)))  # before the steps that take less
        wordless = steps - programs.led(steps, strength)
        scale, piece = guidance if use_guidance else None, programs.piece_of(steps) if wordless else None
        before = None
        with shown(progress, steps, "sampling") as report:
            if wordless:  # once for all prompts that share a start
                silence, way = self.encode_text([""] * len(latents)), ladder.part(0, wordless)
                latents, before = self._walk("sampling", latents, silence, way, None, return_trajectory, report, piece)
            way, on = ladder.part(wordless, steps), report and (lambda done: report(wordless + done))
            start = _for_each(texts, latents, axis=0)  # [P, F, h, w, 4]
            last, trajectory = self._walk("sampling", start, text, way, scale, return_trajectory, on, piece)
        if before is not None:
            trajectory = jnp.concatenate([_for_each(texts, before, axis=1), trajectory])
        finite.check_walk("sampling", last, self.dtype.name)
        edits = [self._decoded(i, text_of, last, trajectory, fps) for i, text_of in enumerate(texts)]
        return edits[0] if isinstance(prompt, str) else edits

    def _decoded(self, i: int, prompt: str, latents, trajectory, fps: float | None) -> Edit:
        """Of several that were sampled together, one."""
        pixels = np.asarray(self.decode_video(latents[i : i + 1]))[0]  # [F, H, W, 3]
        finite.check_walk("the VAE", pixels, self.dtype.name)
        video = np.rint(pixels * 255).astype(np.uint8)
        finite.warn_if_flat(video, prompt)
        return Edit(
            frames=video,
            fps=fps or (self.source.fps if self.source else 8.0),
            prompt=prompt,
            latents=latents[i : i + 1],
            trajectory=None if trajectory is None else trajectory[:, i : i + 1],
            audio=self.source.audio if self.source else None,
        )

    def _walk(self, doing: str, latents, text, way: Ladder, guidance: float | None, trajectory: bool, on, piece=None):
        """In one program; in several runs of a shorter one where somebody looks on, or `piece` gives its steps."""
        with memory.guarded(self.work(doing, latents, rows=len(text))):
            return jax.block_until_ready(self._steps(latents, text, way, guidance, trajectory, on, piece))

    def _steps(self, latents, text, ladder: Ladder, guidance: float | None, trajectory: bool, progress, piece):
        done, paths, steps = 0, [], len(ladder.timesteps)
        watched = processes.agree(progress is not None)  # all run the same programs, whoever looks
        size = piece or (programs.piece_of(steps) if watched else steps)
        for part in programs.in_pieces(ladder, size):
            with self._running():
                latents, path = programs.walk_latents(
                    self.parts.unet,
                    latents,
                    text,
                    part,
                    jnp.float32(0.0 if guidance is None else guidance),
                    prediction=self.schedule.prediction,
                    use_guidance=guidance is not None,
                    trajectory=trajectory,
                )
            paths.append(path)
            if progress is not None:
                jax.block_until_ready(latents)
                progress(done := done + len(part.timesteps))
        return latents, jnp.concatenate(paths) if trajectory else None

    # ------------------------------------------------------------------------------------------------ checks

    def _running(self) -> contextlib.AbstractContextManager[None]:
        return programs.running(self.dtype, self.mesh)

    def tuning_work(self, latents: Any, learned: int, *, remat: str, fsdp: bool) -> memory.Work:
        mine = learned // (self.mesh.size if fsdp and self.mesh else 1)
        return self.work("tuning on", latents, trained=mine, remat=remat != "none")

    def work(self, doing: str, latents: Any, *, trained: int = 0, remat: bool = True, rows: int = 0) -> memory.Work:
        """Tuning of so many parameters, or a walk with so many rows of text, as something that must fit."""
        _, frames, height, width, _ = latents.shape
        factor, config = self._factor, self.parts.unet.config
        weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(self.parts.unet)))
        over = self.mesh.shape if self.mesh else {"data": 1, "frames": 1}

        def count(shape: memory.Shape, devices: int, remat: bool = remat) -> int:
            mine, h, w = -(-shape.frames // devices), -(-shape.height // factor), -(-shape.width // factor)
            held = {"frozen": weights - 4 * trained, "trained": trained, "itemsize": self.dtype.itemsize}
            needed = memory.need(config, mine, h, w, remat=remat, **held)
            return needed.weights + needed.sampling * -(-rows // over["data"]) // 2 if rows else needed.tuning

        shape = memory.Shape(frames, height * factor, width * factor)
        thrifty = None if remat else functools.partial(count, remat=True)
        return memory.Work(doing, shape, over["frames"], count, factor, thrifty)

    def prompt_bytes(self, latents: Any) -> int:
        """What each further prompt takes of one device's memory while they are sampled together."""
        _, frames, height, width, _ = latents.shape
        over = self.mesh.shape if self.mesh else {"data": 1, "frames": 1}
        mine = -(-frames // over["frames"])
        unet, size = self.parts.unet.config, self.dtype.itemsize
        need = memory.need(unet, mine, height, width, frozen=0, trained=0, itemsize=size)
        return need.sampling // over["data"]

    def _autoencoding(self, doing: str, frames: int, height: int, width: int):
        """The autoencoder takes a few frames at a time, so that their number does not matter."""
        config = self.parts.vae.config

        def count(shape: memory.Shape, devices: int) -> int:
            group = -(-self._group(shape.frames, shape[1:]) // (self.mesh.size if self.mesh else 1))
            return memory.autoencoding(config, group, *shape[1:], self.dtype.itemsize)

        work = memory.Work(doing, memory.Shape(frames, height, width), 1, count, config.downsampling)
        return memory.guarded(work)

    def _group(self, frames: int, size: tuple[int, int]) -> int:
        return programs.group_of(frames, *size, self.mesh)

    def noise(self, seed: int, frames: int | None, size: tuple[int, int] | None) -> Float[Array, "1 F h w c"]:
        """A start without an inversion; frames and size (height, width) are by default the source's."""
        if self.source is not None:
            frames = len(self.source.frames) if frames is None else frames
            size = self.source.frames.shape[1:3] if size is None else size
        if frames is None or size is None:
            raise InputError("without latents, frames= and size=(height, width) say what to sample; give both")
        if frames < 1:
            raise InputError(f"frames is {frames}; at least 1 is needed")
        given.size(*size, self._factor)
        shape = (1, frames, size[0] // self._factor, size[1] // self._factor, self._channels)
        return jax.random.normal(jax.random.key(seed), shape)


def _for_each(texts: Sequence[str], x: Any, *, axis: int) -> Array:
    """One of these for each prompt, where there is one for all."""
    return x if x.shape[axis] == len(texts) else jnp.repeat(x, len(texts), axis=axis)

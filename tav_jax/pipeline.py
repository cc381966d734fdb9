"""`TuneAVideo`: the Python interface.

tav   = TuneAVideo.from_pretrained("CompVis/stable-diffusion-v1-4")
clip  = load_video("man-skiing.mp4", frames=24, size=(512, 512))
tav.tune(clip, "a man is skiing")
noise = tav.invert(clip)
tav.sample("spider man is skiing on the beach, cartoon style", latents=noise).save("edit.mp4")
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tav_jax.config import TRAINABLE, check_choice, check_size
from tav_jax.diffusion import programs
from tav_jax.diffusion.editing import edit_mask
from tav_jax.diffusion.samplers import DDIM, Sampler, get_sampler
from tav_jax.diffusion.schedule import NoiseSchedule, Steps, prompted_steps
from tav_jax.distributed import memory, processes, sharding
from tav_jax.errors import InputError
from tav_jax.io import export, validation
from tav_jax.io.controls import EditControls
from tav_jax.io.diffusers_names import HubOptions, accept_other_names
from tav_jax.io.lora import open_loras
from tav_jax.io.networks import Networks
from tav_jax.io.progress import Progress, reporter
from tav_jax.io.single_file import open_layout
from tav_jax.io.validation import Frames, Values
from tav_jax.io.video import Clip, Edit
from tav_jax.io.weights import Components
from tav_jax.kernels import choose_kernel
from tav_jax.models import Conditioning
from tav_jax.training import nonfinite
from tav_jax.training.train_step import Hyperparameters, Replay, trainable_filter
from tav_jax.training.trainer import Trainer, TuningResult


class TuneAVideo(Networks):
    """A pretrained Stable Diffusion pipeline, inflated to video."""

    def __init__(self, components: Components, dtype: Any, mesh: Mesh | None = None):
        super().__init__(components, dtype, mesh)
        self.tuned_prompt = ""  # the prompt last tuned on
        self.inversion_residuals: Any = None  # [steps], of the last inversion with iterations
        self.source: Clip | None = None  # the clip last tuned on or inverted; edits get its fps and audio

    def __repr__(self) -> str:
        source = f"{self.source!r}, {self.tuned_prompt!r}" if self.source else "none"
        return f"TuneAVideo{self.describe()}\n  source clip: {source}"

    # ------------------------------------------------------------------------------------------- loading and saving

    @classmethod
    @accept_other_names
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: Any = "bfloat16",
        mesh: tuple[int, int] | None = None,
        frames: int = sharding.DEFAULT_FRAMES,
        size: tuple[int, int] | None = None,
        seed: Any = 0,
        spatial_attention: str = "sparse-causal",
        temporal_attention: bool = True,
        kernel: str = "auto",
        trainable: Sequence[str] = TRAINABLE,
        variant: str | None = None,
        config: str | Path = "",
        prediction: str = "",
        lora: Sequence[Any] = (),
        **hub: Unpack[HubOptions],
    ) -> "TuneAVideo":
        """Load a directory in the Diffusers layout, a hub id, a bucket path, or a .safetensors or .ckpt file.

        A 2D UNet is inflated, with new temporal layers initialized from `seed`. A UNet that was tuned by this or the
        official code is loaded as it is. `dtype` is the dtype of the frozen weights and of the arithmetic; the weights
        that `trainable` names stay in float32. `mesh` is (data, frames) on the first devices; the default uses all
        devices and is chosen for a clip of `frames` frames. A `size` (height, width) that the model does not support
        is refused before weights are read. `kernel`: the implementation of spatial attention, see
        `tav_jax.kernels.attention`. `variant`: the weight files to read, such as "fp16"; by default those without a
        variant, if there are any. `config`, for a file: a directory or hub id with what the file does not contain; by
        default Stable Diffusion's own configs. `prediction`: "epsilon" or "v_prediction", for a file of 2.x. `lora`:
        LoRA files with their scales, [("file", 0.8), …], which are merged into the weights.
        `hub`: `revision`, `cache_dir`, `local_files_only`, `force_download` and `token`, as in huggingface_hub. With
        several processes, all must make the same calls in the same order.
        """
        dtype, seed = validation.dtype(dtype), validation.seed(seed)
        check_choice("model.spatial_attention", spatial_attention)
        processes.initialize()
        device_mesh = sharding.make_mesh(mesh, frames=frames)
        loras = open_loras(lora)
        unet = {"spatial_attention": spatial_attention, "temporal_attention": bool(temporal_attention)}
        unet["kernel"] = choose_kernel(kernel, jax.default_backend())
        layout = open_layout(source, config=config, prediction=prediction, variant=variant, hub=hub, **unet)
        if size:
            check_size(*size, layout.vae.downsampling)
        NoiseSchedule.from_config(layout.configs["scheduler"])  # invalid ones are refused before the weights are loaded
        options = {"float32_filter": trainable_filter(trainable), "seed": seed, "variant": variant, "loras": loras}
        components = Components.load(layout, jnp.dtype(dtype), **options)
        processes.check_same({f"the fingerprint of {source}": components.fingerprint})
        return cls(components, dtype, device_mesh)

    @classmethod
    def from_config(cls, config: Any) -> "TuneAVideo":
        """Load the pipeline that a run's config names."""
        options = {name: value for name, value in config.model.items() if name != "path"}
        return cls.from_pretrained(
            config.model.path,
            mesh=(config.mesh.data, config.mesh.frames),
            frames=config.clip.frames or sharding.DEFAULT_FRAMES,
            size=(config.clip.height, config.clip.width),
            seed=config.seed,
            trainable=config.train.trainable,
            **options,
        )

    @classmethod
    def restore(cls, workdir: Any, *, step: int | None = None, run: Any = None) -> "TuneAVideo":
        """Load the pipeline of a training run with the weights of a checkpoint, by default the newest. A `run` that is
        already open is used instead of opening `workdir`."""
        from tav_jax.training.run import Run  # imports Orbax

        run = run or Run.open(workdir)
        run.checkpoints.read_metadata(step)  # a missing checkpoint is found before the base model is loaded
        tav = cls.from_config(run.config)
        run.load_weights(tav.components, step, tav.mesh)
        tav.tuned_prompt = run.config.clip.prompt
        return tav

    def save_pretrained(self, directory: str | Path, *, two_d: bool = False) -> None:
        """Write a directory in the Diffusers layout with the UNet as it is now, under the official code's names, and a
        README.md that says how to load it.

        With `two_d`, write a plain Stable Diffusion that `StableDiffusionPipeline.from_pretrained` of Diffusers loads.
        The temporal layers are dropped: it generates images.
        """
        options = {"tokenizer": self.tokenizer, "prompt": self.tuned_prompt, "two_d": two_d}
        processes.run_on_primary(f"writing {directory}", lambda: export.save(self.components, directory, **options))

    # ------------------------------------------------------------------------------------------- tuning

    @accept_other_names
    def tune(
        self,
        clip: Frames,
        prompt: str,
        *,
        steps: int = 500,
        learning_rate: float = 3e-5,
        weight_decay: float = 1e-2,
        max_grad_norm: float = 1.0,
        seed: Any = 33,
        trainable: Sequence[str] = TRAINABLE,
        remat: str | bool = "auto",
        window: int = 0,
        progress: bool | None = None,
    ) -> TuningResult:
        """Tune the UNet on a clip and its prompt, in place. `window`, for long clips: each step trains on so many
        consecutive frames. `progress` shows a bar, by default when interactive."""
        validation.steps(steps)
        clip, key = validation.opened(clip), validation.random_key(seed)
        posterior, text = self.posterior(clip), self.encode_text(prompt)
        hyper = Hyperparameters(learning_rate, weight_decay, max_grad_norm)
        options = {"seed": key, "trainable": trainable, "remat": remat, "window": window}
        trainer = Trainer(self, posterior, text, hyper=hyper, **options)
        self.tuned_prompt = prompt
        self.source = clip if isinstance(clip, Clip) else None
        return trainer.run(steps, show_bar=progress)

    def replay(
        self,
        latents: Float[Values, "1 F h w c"],
        prompt: str,
        *,
        timesteps: Int[Values, "N"] | Sequence[int],
        noise: Float[Values, "N F h w c"],
        learning_rate: float = 3e-5,
        weight_decay: float = 1e-2,
        max_grad_norm: float = 1.0,
        trainable: Sequence[str] = TRAINABLE,
        remat: str | bool = "block",
    ) -> TuningResult:
        """Tune the UNet in place, one step for each given timestep and noise."""
        latents, noise = validation.latents(latents, self._channels), jnp.asarray(noise, jnp.float32)
        times = np.asarray(timesteps, np.int32)
        validation.replayed_steps(times, noise, latents, self.schedule.train_timesteps)
        data, text = Replay(latents, jnp.asarray(times), noise), self.encode_text(prompt)
        hyper = Hyperparameters(learning_rate, weight_decay, max_grad_norm)
        trainer = Trainer(self, data, text, hyper=hyper, trainable=trainable, remat=remat)
        return trainer.run(len(times), show_bar=False)

    # ------------------------------------------------------------------------------------------- inversion and sampling

    @accept_other_names
    def invert(
        self,
        clip: Frames | Float[Values, "1 F h w c"],
        *,
        steps: int = 50,
        prompt: str = "",
        iterations: int = 1,
        window: Sequence[int] = (),
        return_trajectory: bool = False,
        progress: Progress = None,
    ) -> Float[Array, "..."]:
        """DDIM inversion of a clip, given as frames or latents: the noise from which sampling reconstructs it.

        `iterations` above 1 (3 to 5 are usual) solve each step by fixed-point iteration, which reconstructs the clip
        more exactly; `inversion_residuals` is then how far each step is from a solution. With `return_trajectory`, the
        latents before the first and after every step, `[steps + 1, 1, F, h, w, 4]`: what `sample` takes as `source`.
        `window`: see `sample`.
        `progress`: True for a bar, False for none, a function that is called with the number of steps done, or None for
        a bar when interactive.
        """
        table = self.schedule.inversion_steps(steps)
        validation.iterations(iterations)
        clip = validation.opened(clip)
        self.source = self._source_of(clip)
        if isinstance(clip, Clip) or getattr(clip, "dtype", None) == np.uint8:
            latents = self.encode_video(clip)  # pyright: ignore[reportArgumentType]
        else:
            latents = validation.latents(clip, self._channels)  # pyright: ignore[reportArgumentType]
        conditioning = Conditioning(self.encode_text(prompt))
        with reporter(progress, steps, "inverting") as report:
            windows = validation.window(window, latents.shape[1])
            options = {"sampler": DDIM(), "trajectory": return_trajectory, "iterations": iterations, "window": windows}
            state, trajectory = self._denoise("inverting", latents, conditioning, table, report=report, **options)
        nonfinite.check_latents("the inversion", state.latents, self.dtype.name)
        self.inversion_residuals = state.denoiser.residuals if iterations > 1 else None
        return jnp.concatenate([latents[None], trajectory]) if trajectory is not None else state.latents

    @overload
    def sample(self, prompt: str, **options: Any) -> Edit: ...  # pyright: ignore[reportOverlappingOverload]

    @overload
    def sample(self, prompt: Sequence[str], **options: Any) -> list[Edit]: ...

    @accept_other_names
    def sample(
        self,
        prompt: str | Sequence[str],
        *,
        latents: Float[Values, "n F h w c"] | None = None,
        steps: int = 50,
        sampler: str | Sampler = "ddim",
        inversion_steps: int | None = None,
        guidance: float = 12.5,
        strength: float = 1.0,
        negative_prompt: str = "",
        source: Float[Values, "K 1 F h w c"] | None = None,
        source_prompt: str | None = None,
        self_attention_steps: float = 0.5,
        feature_steps: float = 0.8,
        cross_attention_steps: float = 0.8,
        equalizer: Mapping[str, float] | None = None,
        blend_words: Sequence[str] = (),
        mask: Values | None = None,
        blend_start: float = 0.2,
        window: Sequence[int] = (),
        feature_reuse: int = 1,
        seed: Any = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        fps: float | None = None,
        return_trajectory: bool = False,
        progress: Progress = None,
    ) -> Any:
        """Sample one batch of edited clips: an `Edit` for a single prompt, a list for a list of prompts.

        Starts from `latents`, usually the inverted clip, one for all prompts or one for each; without them, from
        Gaussian noise with this `seed` (or key of `jax.random`), `frames` and `size` (height, width). `inversion_steps`
        is the number of steps in which the latents were inverted, by default `steps`. With `guidance` at 1 or below,
        only the conditional prediction is computed. `sampler` is a name or an instance of
        `tav_jax.diffusion.samplers.Sampler`.

        `strength` is the share of the steps, the last ones, that use the prompt. The steps before them use the empty
        prompt without guidance, which reverses the inversion; they determine the layout, so a smaller strength keeps
        more of the clip. (In Diffusers' image-to-image pipelines, `strength` skips the first steps instead.)

        With `source`, the trajectory of the inversion, editing has two branches (`diffusion/editing.py`): the source is
        denoised beside the edits, with `source_prompt` (by default that of the last tuning). In the first share of the
        steps, the edits take from it queries and keys of spatial attention (`self_attention_steps`), features of the
        decoder (`feature_steps`) and the attention to the prompts' shared words (`cross_attention_steps`). `equalizer`
        has factors on the attention to words. `blend_words`, words of either prompt, and `mask`, of latents or pixels,
        restrict where an edit changes the source, from the share `blend_start` of the steps on. All of them are arrays:
        other values compile nothing.

        `window`, (frames, stride), is for long clips: each step denoises overlapping windows, in the memory of one, and
        averages them (`diffusion/windows.py`; (16, 4) is usual). `feature_reuse` K is for speed: only every K-th step
        computes the whole UNet (`diffusion/feature_reuse.py`; 2 or 3, at a loss of quality).
        `progress` is as for `invert`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise InputError("the list of prompts is empty; give at least one (an empty string is a valid prompt)")
        validation.fps(fps)
        validation.strength(strength, from_clip=not (latents is None and source is None))
        table, sampler = self.schedule.sampling_steps(steps, inversion_steps), get_sampler(sampler)
        source_prompt = self.tuned_prompt if source_prompt is None else source_prompt
        shares = (self_attention_steps, feature_steps, cross_attention_steps, blend_start)
        equalizer = {} if equalizer is None else equalizer
        controls = EditControls(source, source_prompt, *shares, equalizer, blend_words, mask)
        controls.check()
        validation.feature_reuse(feature_reuse)
        if latents is None and source is not None:
            latents = validation.trajectory(source)[-1]
        if latents is None:
            latents = self.noise(seed, frames, size)
        else:
            latents = validation.latents(latents, self._channels, prompts=len(prompts))
            validation.requested_shape(latents, frames, size, self._downsampling)
        windows, scale = validation.window(window, latents.shape[1]), guidance if guidance > 1 else None
        negative = [] if scale is None else [negative_prompt] * len(prompts)
        editing, texts = None, [*negative, *prompts]
        if source is not None:
            words = [self.tokenize_words(text) for text in (source_prompt, *prompts)]
            counts = {"steps": steps, "inversion_steps": inversion_steps or steps}
            editing, by_step = controls.prepare(latents, words, self.schedule, **counts, factor=self._downsampling)
            table, texts = table._replace(controls=by_step), [source_prompt, *texts]
        prompted = Conditioning(self.encode_text(texts))  # [(source,) (P unconditional,) P conditional]
        memory.check(self.memory_estimator.denoising("sampling", latents, len(prompted.text), windows))

        unprompted, before = steps - prompted_steps(steps, strength), None
        # Chunks of one size for both loops, so that another strength does not compile them again.
        chunk = programs.chunk_size(steps) if unprompted else None
        options = {"sampler": sampler, "trajectory": return_trajectory, "chunk": chunk}
        options |= {"window": windows, "feature_reuse": feature_reuse}
        with reporter(progress, steps, "sampling") as report:
            if unprompted:  # computed once for prompts that share their initial latents
                empty = Conditioning(self.encode_text([""] * len(latents)))
                first = table.restart(0, unprompted)._replace(controls=None)
                state, before = self._denoise("sampling", latents, empty, first, report=report, **options)
                latents = state.latents
            options |= {"guidance": scale, "report": report and (lambda done: report(unprompted + done))}
            latents = jnp.broadcast_to(latents, (len(prompts), *latents.shape[1:]))  # [P, F, h, w, 4]
            rest = table.restart(unprompted, steps)
            state, trajectory = self._denoise("sampling", latents, prompted, rest, editing=editing, **options)
            latents, masks = state.latents, None
            if editing is not None:
                masks = np.asarray(edit_mask(state.denoiser.word_maps, editing))[..., 0]
        if before is not None and trajectory is not None:  # [N, P, F, h, w, 4]
            trajectory = jnp.concatenate([jnp.broadcast_to(before, (unprompted, *latents.shape)), trajectory])

        nonfinite.check_latents("sampling", latents, self.dtype.name)
        edits = [self._decode_edit(i, text, latents, trajectory, masks, fps) for i, text in enumerate(prompts)]
        return edits[0] if isinstance(prompt, str) else edits

    def _denoise(self, name: str, latents, conditioning, steps: Steps, *, chunk=None, report=None, **options: Any):
        """The denoising loop: in one call or, to report progress, in chunks."""
        # All processes must run the same programs, even if only one of them reports progress.
        if chunk is None and processes.any_process(report is not None):
            chunk = programs.chunk_size(len(steps.timestep))
        options |= {"prediction": self.schedule.prediction, "chunk": chunk, "report": report}
        workload = self.memory_estimator.denoising(name, latents, len(conditioning.text), options["window"])
        with memory.checked(workload), self.jit_context():
            return programs.run_denoise_loop(self.components.unet, latents, conditioning, steps, **options)

    def _decode_edit(self, i: int, prompt: str, latents, trajectory, masks, fps: float | None) -> Edit:
        pixels = np.asarray(self.decode_video(latents[i : i + 1]))[0]  # [F, H, W, 3]
        nonfinite.check_latents("the VAE", pixels, self.dtype.name)
        frames = np.rint(pixels * 255).astype(np.uint8)
        nonfinite.warn_if_clipped(frames, prompt)
        return Edit(
            frames=frames,
            fps=(self.source.fps if self.source else 8.0) if fps is None else fps,
            prompt=prompt,
            latents=latents[i : i + 1],
            trajectory=None if trajectory is None else trajectory[:, i : i + 1],
            mask=None if masks is None else masks[i],
            audio=self.source.audio if self.source else None,
        )

    def noise(self, seed: Any, frames: int | None, size: tuple[int, int] | None) -> Float[Array, "1 F h w c"]:
        """Standard normal latents. Frames and size (height, width) are by default those of the source clip."""
        source = None if self.source is None else self.source.frames.shape
        frames, height, width = validation.sampled_shape(frames, size, source, self._downsampling)
        return jax.random.normal(validation.random_key(seed), (1, frames, height, width, self._channels))

    # ------------------------------------------------------------------------------------------- internals

    def _source_of(self, clip: Any) -> Clip | None:
        """The clip that inverted values are of: themselves, or the source if they can be its frames or latents."""
        if isinstance(clip, Clip) or self.source is None:
            return clip if isinstance(clip, Clip) else None
        frames, factor, shape = self.source.frames, self._downsampling, np.shape(clip)
        latents = (1, len(frames), frames.shape[1] // factor, frames.shape[2] // factor, self._channels)
        is_source = np.array_equal(clip, frames) if len(shape) == 4 else shape == latents
        return self.source if is_source else None

"""The settings of section `edit` as arguments of `TuneAVideo.invert` and `TuneAVideo.sample`, for `tav edit` and for
previews, and the cache of inversions."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tav_jax import config as configs
from tav_jax.diffusion.alignment import check_words
from tav_jax.distributed import processes
from tav_jax.errors import InputError
from tav_jax.io.masks import load_mask
from tav_jax.io.progress import counter, progress_bar
from tav_jax.io.video import Clip
from tav_jax.training import derived, source_clip
from tav_jax.training.run import Run, log

# The cached trajectory is rounded to this type. Its largest error, 2⁻¹¹ of a value, changes no pixel by more than one
# of 255 levels.
TRAJECTORY_DTYPE = np.float16


def check(config: Any, prompts: Sequence[str], *, inversion: bool = True) -> None:
    """Refuse edit settings that cannot be used with these prompts, before anything is loaded."""
    edit, words = config.edit, configs.equalizer_factors(config.edit.equalizer)
    if inversion:
        configs.check_edit_steps(edit)
    if not configs.has_source_branch(edit):
        return
    if not inversion:
        raise InputError(
            "--no-inversion leaves no source to take attention, features or a background from; leave --no-inversion "
            "out, or the settings that need the source: the shares of steps, equalizer, blend_words and mask"
        )
    if words and not edit.cross_attention_steps:
        raise InputError("equalizer has no effect with cross_attention_steps 0; set it, 0.8 is usual")
    check_words("equalizer", words, prompts)
    check_words("blend_words", edit.blend_words, [config.clip.prompt, *prompts])


def inversion_options(config: Any) -> dict[str, Any]:
    """Arguments of `TuneAVideo.invert`."""
    edit = config.edit
    options = {"steps": edit.inversion_steps, "prompt": edit.inversion_prompt, "iterations": edit.inversion_iterations}
    options["window"] = edit.window
    return options | {"return_trajectory": configs.has_source_branch(edit)}


def mask(config: Any, frames: int) -> Float[np.ndarray, "F H W"] | None:
    """The mask that the config names, if it names one."""
    return load_mask(config.edit.mask, config.clip, frames) if config.edit.mask else None


def sampling_options(config: Any, inverted: Any, mask: Any = None) -> dict[str, Any]:
    """Arguments of `TuneAVideo.sample`, for the result of `TuneAVideo.invert` with `inversion_options`; None without an
    inversion."""
    edit = config.edit
    names = ["steps", "sampler", "guidance", "strength", "negative_prompt", "window", "feature_reuse"]
    options: dict[str, Any] = {}
    if inverted is not None:
        options = {"latents": inverted, "inversion_steps": edit.inversion_steps}
    if inverted is not None and configs.has_source_branch(edit):
        names += ["self_attention_steps", "feature_steps", "cross_attention_steps", "blend_words", "blend_start"]
        options |= {"latents": inverted[-1], "source": inverted, "source_prompt": config.clip.prompt}
        options |= {"equalizer": configs.equalizer_factors(edit.equalizer), "mask": mask}
    return options | {name: edit[name] for name in names}


def invert_cached(run: Run, tav: Any, clip: Clip, step: int | None) -> Any:
    """The inverted clip, or its trajectory, cached in the run's directory. The file name is a hash of all that the
    result depends on."""
    options, edit = inversion_options(run.config), run.config.edit
    trajectory = options["return_trajectory"]
    dependencies = {
        "frames": source_clip.frames_digest(clip),
        "shape": clip.frames.shape,
        "base": tav.components.fingerprint,
        "checkpoint": step,
        "model": run.config.model.to_dict(),
        **options,
    }
    digest = hashlib.blake2b(json.dumps(dependencies, sort_keys=True, default=list).encode(), digest_size=8).hexdigest()
    name = f"inversions/{digest}.safetensors"
    like = jax.eval_shape(lambda: tav.noise(0, len(clip.frames), clip.frames.shape[1:3]))
    shape = (edit.inversion_steps + 1, *like.shape) if trajectory else like.shape
    dtype = np.dtype(TRAJECTORY_DTYPE) if trajectory else like.dtype
    cached = derived.read_array(run.directory, name, shape, dtype)
    if not processes.any_process(cached is None):
        log(f"Reusing the inversion in {run.directory / name}.")
        return jnp.asarray(cached, jnp.float32)
    with progress_bar(edit.inversion_steps, "inverting") as bar:
        inverted = np.asarray(tav.invert(clip, progress=counter(bar), **options)).astype(dtype)
    if processes.is_primary():
        derived.write_array(run.directory, name, inverted)
    log(f"Inverted the clip in {edit.inversion_steps} steps; saved in {run.directory / name}.")
    return jnp.asarray(inverted, jnp.float32)

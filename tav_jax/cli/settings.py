"""Reads the config from `--config=FILE --config.NAME=VALUE …`, and lists the settings."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tav_jax import config
from tav_jax.cli.other_names import read_yaml, suggest
from tav_jax.distributed import processes
from tav_jax.errors import InputError, MissingError, TavError, short_repr

# What `tav train --help-config` prints beside the default; it adds config.CHOICES and config.RANGES.
MEANINGS = {
    "model.path": "a directory, a hub id, a bucket path, or a .safetensors or .ckpt file",
    "model.config": "directory or hub id with what such a file does not contain; by default Stable Diffusion's configs",
    "model.prediction": "what the UNet predicts; needed for a file of Stable Diffusion 2.x",
    "model.lora": "LoRA files with their scales, such as 'style.safetensors=0.8'",
    "model.dtype": "dtype of the frozen weights and the computation; trained weights are float32",
    "model.spatial_attention": "each frame attends to the first and the previous frame, to the first, or to itself",
    "model.temporal_attention": "whether the temporal attention layers are used",
    "model.kernel": "kernel of spatial attention",
    "clip.path": "a video file or a directory of images, local or in a bucket",
    "clip.prompt": "a description of the clip in one sentence; must be set, and may be empty",
    "clip.frames": "number of frames; 0: all",
    "clip.height": "in pixels, a multiple of the VAE's down-sampling factor, 8 for Stable Diffusion",
    "clip.width": "as clip.height",
    "clip.start": "first frame",
    "clip.stride": "distance between frames",
    "clip.fit": "how a clip of another aspect ratio is resized; the official code stretches",
    "train.steps": "steps of AdamW",
    "train.learning_rate": "learning rate of AdamW, constant",
    "train.weight_decay": "weight decay of AdamW",
    "train.max_grad_norm": "gradients are clipped to this global norm",
    "train.trainable": "suffixes of the trained modules' names; with down, mid or up, only in these blocks",
    "train.window": "frames of a random window of the clip that each step trains on; 0: all",
    "train.remat": "rematerialization policy, in order of decreasing memory; auto: none if it fits",
    "train.checkpoint_every": "steps between checkpoints; 0: only at the end",
    "train.keep_newest": "number of newest checkpoints to keep",
    "train.keep_every": "checkpoints at multiples of this step are also kept; 0: none",
    "train.preview_every": "steps between previews, which sample edit.prompts; 0: none",
    "edit.prompts": "prompts of previews, and of `tav edit` without --prompt",
    "edit.negative_prompt": "negative prompt of all edits",
    "edit.steps": "sampling steps, at most edit.inversion_steps",
    "edit.sampler": "sampler; 20 to 25 steps are usual with dpm++2m",
    "edit.guidance": "scale of classifier-free guidance; at 1 or below only the conditional prediction is computed",
    "edit.strength": "fraction of the sampling steps, the last ones, that use the prompt; less keeps more of the clip",
    "edit.inversion_steps": "steps of DDIM inversion",
    "edit.window": "(frames, stride) of overlapping windows for long clips, (16, 4) is usual; (): off",
    "edit.feature_reuse": "compute the whole UNet every so many steps, its last layer in the others; 1: off",
    "edit.inversion_prompt": "prompt of the inversion",
    "edit.inversion_iterations": "fixed-point iterations of each inversion step; 1: DDIM; 3 to 5 reconstruct better",
    "edit.self_attention_steps": "fraction of the steps, the first ones, with the source's spatial attention",
    "edit.feature_steps": "fraction of the steps, the first ones, with the source's decoder features",
    "edit.cross_attention_steps": "fraction of the steps, the first ones, with the source's attention to shared words",
    "edit.equalizer": "factors on the attention to words, such as 'red=2.0', while cross_attention_steps lasts",
    "edit.blend_words": "words of either prompt: only where they are shown may an edit change the source",
    "edit.mask": "an image or a video, white where an edit may change the source",
    "edit.blend_start": "fraction of the steps after which the source is kept outside of blend_words and mask",
    "log.tensorboard": "log to TensorBoard",
    "log.wandb": "log to the W&B project of this name",
    "log.profile_step": "first step that JAX's profiler records; 0: off",
    "log.profile_steps": "number of steps that it records",
    "mesh.data": "devices that prompts and rows of guidance are sharded over; 0: chosen to use all devices",
    "mesh.frames": "devices that the clip's frames are sharded over; 0: chosen to use all devices",
    "mesh.fsdp": "shard trained weights and optimizer state over all devices",
    "seed": "seed of the run",
}


def read_config(arguments: Sequence[str]) -> Any:
    """The validated config. absl and ml_collections parse the overrides."""
    from absl import flags
    from ml_collections import config_flags

    known = dict(config.leaves(config.get_config()))
    options = _options(arguments, known)
    overrides = [(name.removeprefix("config."), value) for name, value in options if name != "config"]
    if problems := config.unknown_settings((name for name, _ in overrides), suggest):
        raise InputError("; ".join(problems))
    path = find_config(next((value for name, value in reversed(options) if name == "config"), ""))
    argv, values = ["tav", *(_override(name, value, known[name]) for name, value in overrides)], flags.FlagValues()
    try:
        if path.endswith((".json", ".yaml", ".yml")):
            is_json = path.endswith(".json")
            stored, note = (config.from_json(Path(path).read_text()), "") if is_json else read_yaml(path)
            if note and processes.is_primary():
                print(note, file=sys.stderr)
            config_flags.DEFINE_config_dict("config", stored, flag_values=values, sys_argv=argv)
        else:
            config_flags.DEFINE_config_file("config", path or config.__file__, flag_values=values, sys_argv=argv)
        values(argv)
        return config.validate(values.config)
    except TavError:
        raise
    except Exception as error:  # of any type: the config file is a program
        message = " ".join(str(error).replace("\\n", " ").replace("\\'", "'").split()) or type(error).__name__
        raise InputError(f"the config cannot be read: {message}") from error


def _options(arguments: Sequence[str], known: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of each option, from `--config.NAME=VALUE`, `--config.NAME VALUE`, and `--config.NAME` alone for a
    setting that is True or False."""
    options, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (name == "config" or name.startswith("config.")):
            raise InputError(f"{word!r} is not an option; settings are --config.NAME=VALUE, with quotes around spaces")
        if not equals:
            is_switch = isinstance(known.get(name.removeprefix("config.")), bool)
            if rest and not rest[0].startswith("--") and (not is_switch or rest[0].lower() in ("true", "false")):
                value = rest.pop(0)
            elif is_switch:
                value = "True"
            else:
                raise InputError(f"{word} has no value; use {word}=VALUE")
        options.append((name, value))
    return options


def _override(name: str, value: str, default: Any) -> str:
    """The option as ml_collections parses it. Accepts `edit.prompts=a man is skiing` for a list of texts, and `1e3` for
    a whole number."""
    if isinstance(default, tuple) and not value.lstrip().startswith(("(", "[", "'", '"')):
        value = f"({value!r},)"
    elif type(default) is int:
        given = value
        try:
            number = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
            value = str(int(number)) if number == int(number) else ""
        except (ValueError, OverflowError):
            value = ""
        if not value:
            raise InputError(f"--config.{name}={short_repr(given)[1:-1]} is not a whole number")
    return f"--config.{name}={value}"


def named_configs() -> dict[str, Path]:
    """The configs that come with the package: in it, or beside it in a checkout."""
    package = Path(config.__file__).parent
    directory = package / "configs"
    if not directory.is_dir() and (package.parent / "pyproject.toml").is_file():
        directory = package.parent / "configs"
    return {file.stem: file for file in sorted(directory.glob("*.py"))}


def find_config(path: str) -> str:
    """The file of `--config`, which is a named config or a path."""
    named = named_configs()
    if file := named.get(path.replace("-", "_")):
        return str(file)
    if path and not os.path.isfile(path.split(":")[0]):
        same = Path(path).stem.replace("-", "_")
        fix = f"use --config={same}, which comes with the package" if same in named else "give a config file"
        raise MissingError(f"{path} does not exist; {fix}, or one of {', '.join(named)}")
    return path


def list_settings() -> str:
    """The table of `--help-config`: every setting with its default, meaning, choices and range."""
    known = dict(config.leaves(config.get_config()))
    lines = ["Settings of `tav train` and `tav plan`, with their defaults, as --config.NAME=VALUE:", ""]
    for name, meaning in MEANINGS.items():
        limits = config.choice_list(name) or " to ".join(map(str, config.RANGES.get(name, ())))
        lines.append(f"  {f'{name}={known[name]!r}':40}  {meaning}{f' ({limits})' if limits else ''}")
    lines += ["", f"Configs that come with the package, as --config=NAME: {', '.join(named_configs())}"]
    return "\n".join(lines)


def silence_background_tracebacks() -> None:
    """Orbax's threads log the traceback of a failed write. `tav` reports the same error in one sentence. Warnings are
    printed."""
    import logging

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_handler().addFilter(lambda record: not record.exc_info and record.levelno < logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook = lambda _: None

"""Names that other code has for our settings: suggestions, and the YAML configs of the official code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tav_jax import config
from tav_jax.errors import InputError, join_names, short_repr

# Settings of the official code's YAML configs and their names here.
OFFICIAL_NAMES = {
    "pretrained_model_path": "model.path",
    "train_data.video_path": "clip.path",
    "train_data.prompt": "clip.prompt",
    "train_data.n_sample_frames": "clip.frames",
    "train_data.height": "clip.height",
    "train_data.width": "clip.width",
    "train_data.sample_start_idx": "clip.start",
    "train_data.sample_frame_rate": "clip.stride",
    "validation_data.prompts": "edit.prompts",
    "validation_data.num_inference_steps": "edit.steps",
    "validation_data.guidance_scale": "edit.guidance",
    "validation_data.num_inv_steps": "edit.inversion_steps",
    "max_train_steps": "train.steps",
    "learning_rate": "train.learning_rate",
    "adam_weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "trainable_modules": "train.trainable",
    "checkpointing_steps": "train.checkpoint_every",
    "validation_steps": "train.preview_every",
    "mixed_precision": "model.dtype",
    "gradient_checkpointing": "train.remat",
    "seed": "seed",
}
# Other words for settings, for suggestions. The section in front of them does not matter.
OTHER_WORDS = {
    "model.path": "name model id base pretrained pretrained_model_name_or_path checkpoint weights ckpt single_file",
    "model.lora": "loras lora_path lora_weights adapter adapters",
    "model.prediction": "prediction_type",
    "model.dtype": "precision",
    "clip.path": "video clip file data source",
    "clip.prompt": "caption text",
    "clip.frames": "num_frames n_frames video_length",
    "clip.start": "start_frame offset",
    "clip.stride": "frame_rate fps frame_stride sample_interval skip",
    "train.steps": "max_steps num_steps num_train_steps iterations epochs num_train_epochs",
    "train.learning_rate": "lr",
    "train.weight_decay": "wd",
    "train.max_grad_norm": "clip_grad grad_clip",
    "train.checkpoint_every": "save_every save_steps",
    "train.preview_every": "validation_every eval_every",
    "edit.guidance": "cfg cfg_scale scale",
    "edit.sampler": "scheduler",
    "edit.inversion_steps": "inv_steps ddim_inv_steps",
    "mesh.data": "dp",
    "log.wandb": "project",
    "seed": "random_seed",
}

# What the official code uses where a file does not say, where that is not our default.
OFFICIAL_DEFAULTS = {"train_data.n_sample_frames": 8, "validation_data.guidance_scale": 7.5}
# Settings that have no counterpart → the only values with which the result is the same.
FIXED = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "gradient_accumulation_steps": 1,
    "lr_scheduler": "constant",
    "scale_lr": False,
}
# Settings that have no counterpart and do not change the tuned model.
IGNORED = {
    "output_dir",
    "resume_from_checkpoint",
    "train_batch_size",  # the data are one clip, so that a batch is one clip
    "lr_warmup_steps",  # has no effect on a constant learning rate
    "use_8bit_adam",
    "enable_xformers_memory_efficient_attention",
}
DTYPES = {"fp16": "bfloat16", "bf16": "bfloat16", "no": "float32"}


def suggest(name: str) -> list[str]:
    """The settings that a name probably means: by spelling, by meaning, or by the name without its section."""
    if typo := config.similar_settings(name, 0.85):
        return typo
    word = name.rpartition(".")[2]
    words = {official.rpartition(".")[2]: setting for official, setting in OFFICIAL_NAMES.items()}
    words |= {other: setting for setting, others in OTHER_WORDS.items() for other in others.split()}
    if setting := OFFICIAL_NAMES.get(name) or words.get(word):
        return [setting]
    same = [known for known, _ in config.leaves(config.get_config()) if known.rpartition(".")[2] == word]
    return same or config.similar_settings(name)


def read_yaml(path: str) -> tuple[Any, str]:
    """A config from a YAML file with our settings or with those of the official code, and a note on what has no
    counterpart here."""
    import yaml

    try:
        table = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not readable YAML: {short_repr(' '.join(str(error).split()))}") from error
    if not isinstance(table, Mapping) or not all(isinstance(name, str) for name in table):
        raise InputError(f"{path} is {short_repr(table)}, expected a table of settings")
    if set(table) <= set(config.get_config()):
        return config.validate(_with_numbers(dict(config.leaves(table)))), ""
    return _from_official(path, dict(config.leaves(table)))


def _from_official(path: str, given: dict[str, Any]) -> tuple[Any, str]:
    for side in ("width", "height"):
        _check_equal(path, given, f"validation_data.{side}", given.get(f"train_data.{side}", 512))
    frames = given.get("train_data.n_sample_frames", OFFICIAL_DEFAULTS["train_data.n_sample_frames"])
    _check_equal(path, given, "validation_data.video_length", frames)
    for name, value in FIXED.items():
        _check_equal(path, given, name, value)
    notes = [f"{name}={given.pop(name)!r}" for name in sorted(IGNORED & set(given))]
    if given.get("mixed_precision", "fp16") == "fp16":
        notes.append("mixed_precision='fp16' (bfloat16 is used)")
    if given.pop("validation_data.use_inv_latent", None) is False:
        notes.append("validation_data.use_inv_latent=False (previews start from the inverted clip)")
    if given.get("gradient_checkpointing", True):
        notes.append("gradient_checkpointing=True (which keeps the official code from training the down blocks)")
    if unknown := sorted(set(given) - set(OFFICIAL_NAMES)):
        raise InputError(f"{path} has {join_names(unknown)}, which is neither a setting of the official code nor ours")
    table: dict[str, Any] = {"clip.fit": "stretch"}
    for name, value in (OFFICIAL_DEFAULTS | given).items():
        table[OFFICIAL_NAMES[name]] = _converted(name, value)
    note = (
        f"{path}: converted from the official code's names; without a counterpart: {', '.join(notes)}" if notes else ""
    )
    return config.validate(_with_numbers(table)), note


def _check_equal(path: str, given: dict[str, Any], name: str, value: Any) -> None:
    """Remove a setting whose only value with the same result is `value`; refuse another value."""
    if name in given and _number(found := given.pop(name), value) != value:
        raise InputError(f"{path}: {name} is {short_repr(found)}; only {value!r} is supported, use that or remove it")


def _converted(name: str, value: Any) -> Any:
    if name == "mixed_precision":
        return DTYPES.get(str(value or "no"), value)
    if name == "gradient_checkpointing":
        return "block" if value else "none"
    return value


def _with_numbers(table: dict[str, Any]) -> dict[str, Any]:
    known = dict(config.leaves(config.get_config()))
    table = {name: value for name, value in table.items() if (name, value) != ("seed", None)}
    return {name: _number(value, known.get(name)) for name, value in table.items()}


def _number(value: Any, default: Any) -> Any:
    """The number in a string where a number is expected: YAML reads 3e-5, without a point, as a string."""
    try:
        return float(value) if type(default) in (int, float) and isinstance(value, str) else value
    except ValueError:
        return value

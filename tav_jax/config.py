"""Every setting of a run: default, type, range and check. Names and limits that several modules use are defined here.

A config file in `configs/` defines a `get_config()` that modifies the one here. A whole config is checked before
anything is loaded.
"""

import contextlib
import difflib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from tav_jax.errors import InputError, is_utf8, join_names, short_repr

if TYPE_CHECKING:
    from ml_collections import ConfigDict

SpatialAttention = Literal["sparse-causal", "first-frame", "per-frame"]
Kernel = Literal["plain", "fused", "splash", "cudnn", "interpret"]
Remat = Literal["none", "products", "attention", "block", "level"]  # from most to least memory

TRAINABLE = ("attn1.to_q", "attn2.to_q", "attn_temp")
UNET_PARTS = ("down", "mid", "up")
DTYPES = ("bfloat16", "float16", "float32")
SAMPLERS = {  # name → class, imported on use
    "ddim": "tav_jax.diffusion.samplers.DDIM",
    "dpm++2m": "tav_jax.diffusion.dpm_solver.DPMSolverPP2M",
}

MAX_SIDE = 8192  # pixels
MAX_LORA_SCALE = 10  # the sign is free
MAX_TEXT, MAX_LIST, MAX_PROBLEMS = 100_000, 10_000, 20  # characters of a string, items of a list, problems in one error


def get_config() -> "ConfigDict":
    """The paper's settings: 24 frames of 512², 500 steps at 3e-5, 50 + 50 DDIM steps, guidance 12.5."""
    from ml_collections import ConfigDict
    from ml_collections.config_dict import placeholder

    return ConfigDict(
        {
            "model": {
                "path": "CompVis/stable-diffusion-v1-4",
                "config": "",
                "prediction": "",
                "lora": (),
                "dtype": "bfloat16",
                "spatial_attention": "sparse-causal",
                "temporal_attention": True,
                "kernel": "auto",
            },
            "clip": {
                "path": "",
                "prompt": placeholder(str),  # None: not set. The empty prompt is valid
                "frames": 24,
                "height": 512,
                "width": 512,
                "start": 0,
                "stride": 1,
                "fit": "crop",
            },
            "train": {
                "steps": 500,
                "learning_rate": 3e-5,
                "weight_decay": 1e-2,
                "max_grad_norm": 1.0,
                "trainable": TRAINABLE,
                "window": 0,
                "remat": "auto",
                "checkpoint_every": 100,
                "keep_newest": 2,
                "keep_every": 0,
                "preview_every": 100,
            },
            "edit": {
                "prompts": (),
                "negative_prompt": "",
                "steps": 50,
                "sampler": "ddim",
                "guidance": 12.5,
                "strength": 1.0,
                "inversion_steps": 50,
                "inversion_prompt": "",
                "inversion_iterations": 1,
                "window": (),
                "feature_reuse": 1,
                # Two-branch editing, which is on if any of these is set:
                "self_attention_steps": 0.0,
                "feature_steps": 0.0,
                "cross_attention_steps": 0.0,
                "equalizer": (),
                "blend_words": (),
                "mask": "",
                "blend_start": 0.2,
            },
            "log": {"tensorboard": False, "wandb": "", "profile_step": 0, "profile_steps": 3},
            "mesh": {"data": 0, "frames": 0, "fsdp": False},
            "seed": 33,
        }
    )


# What may differ when a run continues. With any other difference it is another run.
# The clip may be another file with the same content, see `training/source_clip.py`.
MAY_CHANGE = (
    "clip.path",
    "train.steps",
    "train.preview_every",
    "train.remat",
    "edit.",
    "log.",
    "mesh.",
    "model.kernel",
)

CHOICES: dict[str, tuple[str, ...]] = {
    "model.prediction": ("", "epsilon", "v_prediction"),
    "model.dtype": DTYPES,
    "model.spatial_attention": get_args(SpatialAttention),
    "model.kernel": ("auto", *get_args(Kernel)),
    "clip.fit": ("crop", "stretch"),
    "train.remat": ("auto", *get_args(Remat)),
    "edit.sampler": tuple(SAMPLERS),
}
TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "a string", tuple: "a list of strings"}
# name → (minimum, maximum)
RANGES = {
    **dict.fromkeys(("clip.frames", "train.window"), (0, 10_000)),
    **dict.fromkeys(("clip.start", "train.checkpoint_every", "train.keep_every"), (0, 10_000_000)),
    **dict.fromkeys(("train.preview_every", "log.profile_step"), (0, 10_000_000)),
    "clip.stride": (1, 100_000),
    "train.steps": (1, 10_000_000),
    **dict.fromkeys(("train.learning_rate", "train.weight_decay", "edit.self_attention_steps"), (0.0, 1.0)),
    **dict.fromkeys(("edit.feature_steps", "edit.cross_attention_steps", "edit.blend_start"), (0.0, 1.0)),
    "train.keep_newest": (1, 10_000),
    **dict.fromkeys(("edit.steps", "edit.inversion_steps"), (1, 999)),
    **dict.fromkeys(("edit.feature_reuse", "edit.inversion_iterations"), (1, 100)),
    "edit.guidance": (0.0, 1000.0),
    "edit.strength": (0.01, 1.0),
    "log.profile_steps": (1, 1000),
    **dict.fromkeys(("mesh.data", "mesh.frames"), (0, 65536)),
    "seed": (0, 2**32 - 1),
}


# ------------------------------------------------------------------------------------------------ checks of one value


def choice_list(setting: str) -> str:
    return ", ".join(choice or repr(choice) for choice in CHOICES.get(setting, ()))


def check_choice(setting: str, value: Any) -> None:
    """Refuse a value that is not one of CHOICES[setting]. The error names the Python parameter: no section."""
    if value not in CHOICES[setting]:
        name, choices = setting.split(".")[1], choice_list(setting)
        raise InputError(f"{name} is {short_repr(value)}; it must be one of {choices}")


def remat_name(remat: str | bool) -> str:
    """The policy's name, or `auto`; True and False stand for `block` and `none`."""
    name = {True: "block", False: "none"}[remat] if isinstance(remat, bool) else remat
    check_choice("train.remat", name)
    return name


def check_size(height: Any, width: Any, factor: int | None = None, *, most: int = MAX_SIDE, prefix: str = "") -> None:
    """Refuse sides that are not multiples of the VAE's down-sampling factor. With None, before a model is known, accept
    multiples of 4, the factor of the smallest VAEs; Stable Diffusion's is 8."""
    for name, value in ((f"{prefix}height", height), (f"{prefix}width", width)):
        if problem := _side_problem(name, value, factor, most):
            raise InputError(problem)


def _side_problem(name: str, value: Any, factor: int | None, most: int = MAX_SIDE) -> str | None:
    step = factor or 8
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return f"{name} is {short_repr(value)}; it must be a whole number, a multiple of {step}"
    if value > most:
        return f"{name} is {short_repr(value)}; it must be a multiple of {step}, at most {most}"
    if value < (factor or 4) or value % (factor or 4):
        below = max(value, 0) // step * step
        fix = f"{below} or {below + step}" if below else step
        note = "" if factor else " (of 4 for a VAE with fewer levels than Stable Diffusion's)"
        return f"{name} {short_repr(value)} is not a multiple of {step}{note}; use {fix}"
    return None


def check_window(window: Any, name: str = "window") -> None:
    """Refuse what is neither (frames, stride) nor (), which is none."""
    is_tuple = isinstance(window, tuple | list) and all(type(n) is int for n in window)
    if not is_tuple or len(window) not in (0, 2) or (window and not 1 <= window[1] <= window[0]):
        expected = "(frames, stride) with a stride from 1 to frames, such as (16, 4), or () for none"
        raise InputError(f"{name} is {short_repr(window)}; it must be {expected}")


def check_edit_steps(edit: Any) -> None:
    """The timesteps of sampling are a subset of the inversion's, so there cannot be more of them."""
    if edit.steps > edit.inversion_steps:
        raise InputError(
            f"edit.steps is {edit.steps} and edit.inversion_steps is {edit.inversion_steps}; sample with at most "
            f"{edit.inversion_steps} steps, or raise edit.inversion_steps to {edit.steps}"
        )


def has_source_branch(edit: Any) -> bool:
    """Whether the settings of section `edit` ask for two-branch editing."""
    shares = edit.self_attention_steps + edit.feature_steps + edit.cross_attention_steps
    return bool(shares or edit.equalizer or edit.blend_words or edit.mask)


def equalizer_factors(items: Iterable[str]) -> dict[str, float]:
    """From 'word=2.0' to {'word': 2.0}."""
    factors = {}
    for item in items:
        word, _, factor = item.rpartition("=")
        try:
            factors[word.strip()] = float(factor)
        except ValueError:
            word = ""
        if not word.strip() or not 0 <= factors[word.strip()] <= 1000:
            expected = "a word and a factor from 0 to 1000, such as 'red=2.0'"
            raise InputError(f"equalizer has {short_repr(item)}; it must be {expected}")
    return factors


def lora_files(items: Iterable[Any]) -> list[tuple[str, float]]:
    """(file, scale) of each LoRA, given as 'file', 'file=0.8' or ('file', 0.8)."""
    files = []
    for item in [items] if isinstance(items, str) else items:
        file, scale = item if isinstance(item, tuple | list) and len(item) == 2 else (item, 1.0)
        if isinstance(item, str) and "=" in item:
            with contextlib.suppress(ValueError):  # "=" in the name of a file without a scale
                scale, file = float(item.rpartition("=")[2]), item.rpartition("=")[0]
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        is_file = isinstance(file, str | os.PathLike) and str(file)
        if not (is_file and is_number and abs(scale) <= MAX_LORA_SCALE):
            expected = f"a file and a scale of at most {MAX_LORA_SCALE}, such as 'style.safetensors=0.8'"
            raise InputError(f"lora has {short_repr(item)}; it must be {expected}")
        files.append((str(file), float(scale)))
    return files


# --------------------------------------------------------------------------------------------- checks of a whole config


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its full name: ("train.steps", 500), …"""
    for name, value in config.items():
        if _is_table(value):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (hasattr(value, "items") and hasattr(value, "to_dict"))


def similar_settings(name: str, cutoff: float = 0.5) -> list[str]:
    """The setting with the most similar name, if there is one."""
    return difflib.get_close_matches(name[:100], dict(leaves(get_config())), n=1, cutoff=cutoff)


def unknown_settings(names: Iterable[str], suggest: Callable[[str], list[str]] = similar_settings) -> list[str]:
    """A message for every name that is not a setting, with the settings that are probably meant."""
    known = dict(leaves(get_config()))
    messages = []
    for name in map(str, names):
        if name not in known:
            near = " or ".join(suggest(name))
            messages.append(f"{join_names([name])} is not a setting{f', did you mean {near}' if near else ''}")
    return messages


def validate(config: Any) -> "ConfigDict":
    """The config with its defaults filled in, or one error that names every problem."""
    known = dict(leaves(get_config()))
    if not _is_table(config):
        raise InputError(f"the config is {short_repr(config)}, expected a table of settings as get_config() returns")
    try:
        given = list(leaves(config))
    except (RecursionError, TypeError, KeyError, ValueError) as error:  # dangling or circular references
        raise InputError(f"the config cannot be read ({short_repr(str(error))}); start from get_config()") from error
    problems, values = unknown_settings(name for name, _ in given), {}
    for name, value in given:
        if name not in known or (value is None and known[name] is None):
            continue
        if name == "train.remat":
            value = {"true": "block", "false": "none"}.get(str(value).lower(), value)  # a bool in early versions
        default = "" if known[name] is None else known[name]
        if name == "edit.window":
            values[name] = tuple(value) if isinstance(value, list) else value
        elif (converted := _as_type(value, default)) is None:
            problems.append(f"{name} is {short_repr(value)}, expected {TYPES[type(default)]} such as {default!r}")
        else:
            values[name] = converted
    for name, value in values.items():
        problems += _problems(name, value)
    if problems:
        more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
        raise InputError(f"the config cannot be used: {'; '.join(problems[:MAX_PROBLEMS])}{more}")
    full = get_config()
    full.update_from_flattened_dict({**known, **values})
    return full


def _as_type(value: Any, default: Any) -> Any:
    """The value in the default's type, None where it cannot be converted."""
    if isinstance(default, tuple):
        valid = isinstance(value, tuple | list) and all(isinstance(v, str) for v in value)
        return tuple(value) if valid else None
    if isinstance(default, float) and type(value) is int:
        return float(value) if abs(value) < 10**300 else None
    if type(default) is int and type(value) is float:
        return int(value) if abs(value) < 2**53 and value.is_integer() else None  # 1e3
    return value if type(value) is type(default) else None


def _problems(name: str, value: Any) -> Iterator[str]:
    texts = {str: (value,), tuple: value}.get(type(value), ())
    for text in filter(lambda text: isinstance(text, str), texts):
        # A file name may contain any byte but NUL; a prompt must be valid UTF-8.
        is_path = name.endswith(".path") or name in ("model.config", "model.lora")
        if "\0" in text or (not is_path and not is_utf8(text)):
            yield f"{name} is {short_repr(text)}; it must be valid UTF-8 without NUL"
        elif len(text) > MAX_TEXT:
            yield f"{name} has {len(text)} characters; it must have at most {MAX_TEXT}"
    if len(texts) > MAX_LIST:
        yield f"{name} is a list of {len(texts)}; it must have at most {MAX_LIST}"
    if name in CHOICES and value not in CHOICES[name]:
        yield f"{name} is {short_repr(value)}; it must be one of {choice_list(name)}"
    if name in ("clip.height", "clip.width") and (problem := _side_problem(name, value, None)):
        yield problem
    if name in RANGES:
        minimum, maximum = RANGES[name]
        if not minimum <= value <= maximum:
            yield f"{name} is {short_repr(value)}; it must be {minimum} to {maximum}"
    checks = {"edit.equalizer": equalizer_factors, "edit.window": check_window, "model.lora": lora_files}
    if check := checks.get(name):
        try:
            check(value)
        except InputError as error:
            yield f"{name.partition('.')[0]}.{error}"
    if name == "train.max_grad_norm" and not value > 0:
        yield f"{name} is {value!r}; it must be above 0"
    if name == "train.trainable" and not set(value) - set(UNET_PARTS):
        yield f"{name} is {short_repr(value)}; it must name at least one kind of layer, such as 'attn_temp'"


def to_json(config: Any) -> str:
    return json.dumps(config.to_dict(), indent=2, default=list) + "\n"


def from_json(text: str) -> "ConfigDict":
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = short_repr(str(error))
        raise InputError(f"the config is not readable JSON ({problem}); restore it from a copy") from error
    return validate(table)


def differences(before: Any, now: Any) -> list[str]:
    """The differences that prevent a run started with `before` from being continued with `now`."""
    old = dict(leaves(before))
    return [
        f"{name} was {old[name]!r} and is {value!r}"
        for name, value in leaves(now)
        if value != old[name] and not name.startswith(MAY_CHANGE)
    ]

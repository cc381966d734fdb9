"""The settings of a run: the paper's by default, checked as a whole before anything is loaded.

A config file in `configs/` has a `get_config()` that starts from the one here and changes what it must.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from tav_jax.errors import InputError, brief, is_text, listed


def get_config() -> ConfigDict:
    """The paper's setting: 24 frames of 512², 500 steps at 3e-5, 50 + 50 DDIM steps, guidance 12.5."""
    return ConfigDict(
        {
            "model": {
                "path": "CompVis/stable-diffusion-v1-4",  # a directory, a hub id or a bucket path
                "dtype": "bfloat16",  # of frozen weights and arithmetic; trained weights are float32
                "spatial_attention": "sparse-causal",  # or first-frame, per-frame
                "temporal_attention": True,
                "kernel": "auto",  # of the spatial attention; or plain, fused, splash, cudnn
            },
            "clip": {
                "path": "",
                "prompt": "",
                "frames": 24,  # 0: all that fit
                "height": 512,
                "width": 512,
                "start": 0,
                "stride": 1,
                "fit": "crop",  # or stretch, as the official code does
            },
            "train": {
                "steps": 500,
                "learning_rate": 3e-5,
                "weight_decay": 1e-2,
                "max_grad_norm": 1.0,
                # Suffixes of module names; with any of down, mid, up only in these parts of the UNet.
                "trainable": ("attn1.to_q", "attn2.to_q", "attn_temp"),
                "remat": "block",  # what is kept for the backward pass; see REMAT
                "checkpoint_every": 100,  # 0: only at the end
                "keep_newest": 2,
                "keep_every": 0,  # and every such step for good; 0: none
                "preview_every": 100,  # the edit prompts from the inverted clip; 0: never
            },
            "edit": {
                "prompts": (),
                "negative_prompt": "",
                "steps": 50,
                "guidance": 12.5,
                "strength": 1.0,  # the share of the steps that the prompt leads; less keeps more of the clip
                "inversion_steps": 50,
            },
            "log": {
                "tensorboard": False,
                "wandb": "",  # a project's name
                "profile_step": 0,  # the first step of a profiler window; 0: none
                "profile_steps": 3,
            },
            "mesh": {
                "data": 0,  # devices for prompts and the halves of guidance; 0: what fits
                "frames": 0,  # devices for the clip's frames; 0: what fits
                "fsdp": False,  # keep what is trained, and its moments, in parts over all devices
            },
            "seed": 33,
        }
    )


# What may be different when a run continues; everything else would make it another run.
MAY_CHANGE = ("train.steps", "train.preview_every", "train.remat", "edit.", "log.", "mesh.", "model.kernel")

# From the fastest to the leanest; what each keeps is told in models/remat.py.
REMAT = ("none", "products", "attention", "block", "level")

CHOICES = {
    "model.dtype": ("bfloat16", "float16", "float32"),
    "model.spatial_attention": ("sparse-causal", "first-frame", "per-frame"),
    "model.kernel": ("auto", "plain", "fused", "splash", "cudnn", "interpret"),
    "clip.fit": ("crop", "stretch"),
    "train.remat": REMAT,
}
# name → least, most
RANGES = {
    "clip.frames": (0, 10_000),
    "clip.start": (0, 10_000_000),
    "clip.stride": (1, 100_000),
    "train.steps": (1, 10_000_000),
    "train.learning_rate": (0.0, 1.0),
    "train.weight_decay": (0.0, 1.0),
    "train.checkpoint_every": (0, 10_000_000),
    "train.keep_newest": (1, 10_000),
    "train.keep_every": (0, 10_000_000),
    "train.preview_every": (0, 10_000_000),
    "edit.steps": (1, 999),
    "edit.inversion_steps": (1, 999),
    "edit.guidance": (0.0, 1000.0),
    "edit.strength": (0.01, 1.0),
    "log.profile_step": (0, 10_000_000),
    "log.profile_steps": (1, 1000),
    "mesh.data": (0, 65536),
    "mesh.frames": (0, 65536),
    "seed": (0, 2**32 - 1),
}


LONGEST, LONGEST_LIST, MOST = 100_000, 10_000, 20  # characters of a text, texts of a list, complaints at once


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("train.steps", 500), …"""
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def unknown(names: Iterable[str]) -> list[str]:
    """A complaint about each name that is no setting, with the nearest that is."""
    known = dict(leaves(get_config()))
    complaints = []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name)[:100], known, n=1, cutoff=0.5)
            complaints.append(f"{listed([str(name)])} is not a setting{f', did you mean {near[0]}' if near else ''}")
    return complaints


def validate(config: Any) -> ConfigDict:
    """The config with its defaults filled in, or one error that names everything that is wrong with it."""
    known = dict(leaves(get_config()))
    if not isinstance(config, Mapping | ConfigDict):
        raise InputError(f"the config is {brief(config)}, expected a table of settings as get_config() gives one")
    try:
        told = list(leaves(config))
    except (RecursionError, TypeError, KeyError, ValueError) as error:  # references that lead nowhere, or in a circle
        raise InputError(f"the config cannot be read ({brief(str(error))}); start from get_config()") from error
    problems, given = unknown(name for name, _ in told), {}
    for name, value in told:
        if name not in known:
            continue
        if name == "train.remat":
            value = {"true": "block", "false": "none"}.get(str(value).lower(), value)  # as it was said at first
        if (fitting := _as_type(value, known[name])) is None:
            problems.append(f"{name} is {brief(value)}, expected {_kind(known[name])} such as {known[name]!r}")
        else:
            given[name] = fitting
    for name, value in given.items():
        problems += _problems(name, value)
    if problems:
        more = f"; and {len(problems) - MOST} more" if len(problems) > MOST else ""
        raise InputError(f"the config cannot be used: {'; '.join(problems[:MOST])}{more}")
    full = get_config()
    full.update_from_flattened_dict({**known, **given})
    return full


def _kind(default: Any) -> str:
    kinds = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a list of texts"}
    return kinds[type(default)]


def _as_type(value: Any, default: Any) -> Any:
    """The value in the default's type, or None where it does not fit."""
    if isinstance(default, tuple):
        fits = isinstance(value, tuple | list) and all(isinstance(v, str) for v in value)
        return tuple(value) if fits else None
    if isinstance(default, float) and type(value) is int:
        return float(value) if abs(value) < 10**300 else None
    return value if type(value) is type(default) else None


def _in_words(name: str, value: Any) -> Iterator[str]:
    texts = value if isinstance(value, tuple) else (value,) * isinstance(value, str)
    for text in texts:
        # The name of a file may be any bytes but NUL; words must be words.
        if "\0" in text or (not name.endswith(".path") and not is_text(text)):
            yield f"{name} is {brief(text)}; it must be a text, without NUL and in UTF-8"
        elif len(text) > LONGEST:
            yield f"{name} has {len(text)} characters; it must have at most {LONGEST}"
    if len(texts) > LONGEST_LIST:
        yield f"{name} is a list of {len(texts)}; it must have at most {LONGEST_LIST}"


def _problems(name: str, value: Any) -> Iterator[str]:
    yield from _in_words(name, value)
    if name in CHOICES and value not in CHOICES[name]:
        yield f"{name} is {brief(value)}; it must be one of {', '.join(CHOICES[name])}"
    if name in ("clip.height", "clip.width") and not (8 <= value <= 8192 and value % 4 == 0):
        below = min(max(value // 8 * 8, 8), 8184)
        yield f"{name} {brief(value)} is not a multiple of 8 from 8 to 8192; use {below} or {below + 8}"
    if name in RANGES:
        least, most = RANGES[name]
        if not least <= value <= most:
            yield f"{name} is {brief(value)}; it must be {least} to {most}"
    if name == "train.max_grad_norm" and not value > 0:
        yield f"{name} is {value!r}; it must be above 0"
    if name == "train.trainable" and not set(value) - {"down", "mid", "up"}:
        yield f"{name} is {brief(value)}; it must name at least one kind of layer, such as 'attn_temp'"


def to_json(config: Any) -> str:
    return json.dumps(config.to_dict(), indent=2, default=list) + "\n"


def from_json(text: str) -> ConfigDict:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the config is no readable JSON ({brief(str(error))}); bring the kept one back") from error
    if not isinstance(table, dict):
        raise InputError(f"the config is {brief(table)}, expected a table of settings; bring the kept one back")
    return validate(table)


def differences(before: Any, now: Any) -> list[str]:
    """What keeps `now` from continuing a run that was started with `before`."""
    old = dict(leaves(before))
    return [
        f"{name} was {old[name]!r} and is {value!r}"
        for name, value in leaves(now)
        if value != old[name] and not name.startswith(MAY_CHANGE)
    ]

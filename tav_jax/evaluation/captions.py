"""Captions of clips, by the BLIP and BLIP-2 models of transformers, on the CPU."""

import contextlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

from tav_jax.errors import InputError, MissingError, WeightsError, install_command, short_repr
from tav_jax.evaluation import CAPTION_MODEL
from tav_jax.io.diffusers_layout import hub_problem
from tav_jax.io.video import Clip, load_video

CLASSES = {"blip": "BlipForConditionalGeneration", "blip-2": "Blip2ForConditionalGeneration"}  # by model_type
MAX_TOKENS = 50
HINT = f"Use a BLIP or BLIP-2 model in the layout of transformers, such as {CAPTION_MODEL}."


def caption(clip: Clip | str | Path, model: str | Path = CAPTION_MODEL) -> str:
    """One sentence for a clip, from its middle frame. `model` is a directory or hub id of a BLIP or BLIP-2 model."""
    frame = middle_frame(clip)
    if not importlib.util.find_spec("torch"):
        raise MissingError(f"captions need torch, which is not installed; `{install_command('caption')}`")
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    name = _check_source(str(model))
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # of many types
        raise _unreadable(name, error) from error
    if config.model_type not in CLASSES:
        raise WeightsError(f"{name} is a model of type {short_repr(config.model_type)}. {HINT}")
    dtype = torch.bfloat16 if config.model_type == "blip-2" else torch.float32  # BLIP-2 has 15 GB in float32
    with _quiet():
        try:
            processor = transformers.AutoProcessor.from_pretrained(name)
            network: Any = getattr(transformers, CLASSES[config.model_type]).from_pretrained(name, dtype=dtype)
        except Exception as error:  # of many types
            raise _unreadable(name, error) from error
        inputs = processor(images=frame, return_tensors="pt").to(dtype)
        with torch.inference_mode():
            ids = network.eval().generate(**inputs, max_new_tokens=MAX_TOKENS)
    return " ".join(processor.batch_decode(ids, skip_special_tokens=True)[0].split())


def middle_frame(clip: Clip | str | Path) -> Any:
    """The frame F // 2 of F, as a PIL image."""
    from PIL import Image

    if isinstance(clip, Clip):
        return Image.fromarray(clip.frames[len(clip.frames) // 2])
    first = load_video(clip, frames=1, multiple=1)
    if count := first.source_frames:
        with contextlib.suppress(InputError):  # the file has fewer frames than it says
            return Image.fromarray(load_video(clip, frames=1, start=count // 2, multiple=1).frames[0])
    return middle_frame(load_video(clip, multiple=1))


def _check_source(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise MissingError(f"{name} is neither a directory nor a hub id. {HINT}")
    return name


def _unreadable(name: str, error: Exception) -> Exception:
    if Path(name).is_dir():
        return WeightsError(f"{name} is not a readable model ({short_repr(str(error))}). {HINT}")
    cause = error.__cause__ or error  # transformers wraps the errors of the hub client
    return MissingError(f"{name!r} {hub_problem(name, cause, HINT)}")


@contextlib.contextmanager
def _quiet():
    """transformers logs progress and advice that have no meaning here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

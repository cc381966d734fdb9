"""Scores of edits, captions of clips, and the page that shows edits beside their source."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tav_jax.evaluation.captions import caption
    from tav_jax.evaluation.scores import Scores, score

# Hub ids of the default models
CLIP_MODEL = "openai/clip-vit-large-patch14"
PICK_MODEL = "yuvalkirstain/PickScore_v1"
CAPTION_MODEL = "Salesforce/blip-image-captioning-large"

_MODULES = {"Scores": "scores", "caption": "captions", "score": "scores"}
__all__ = ["CAPTION_MODEL", "CLIP_MODEL", "PICK_MODEL", "Scores", "caption", "score"]


def __getattr__(name: str):
    """Functions are imported at first use, so that the command line can read the constants without JAX."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

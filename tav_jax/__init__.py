"""One-shot video tuning on JAX: one clip and one sentence in, edited clips out."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tav_jax.errors import InputError, MissingError, TavError, WeightsError
    from tav_jax.pipeline import Edit, TuneAVideo
    from tav_jax.prompts import PromptCut
    from tav_jax.video import Clip, load_video

_HOMES = {
    "Clip": "video",
    "Edit": "pipeline",
    "InputError": "errors",
    "MissingError": "errors",
    "PromptCut": "prompts",
    "TavError": "errors",
    "TuneAVideo": "pipeline",
    "WeightsError": "errors",
    "load_video": "video",
}
__all__ = [
    "Clip",
    "Edit",
    "InputError",
    "MissingError",
    "PromptCut",
    "TavError",
    "TuneAVideo",
    "WeightsError",
    "load_video",
]


def __getattr__(name: str):
    """Imported when first used: `import tav_jax` and `tav --help` do not wait for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

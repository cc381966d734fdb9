"""One-shot video tuning on JAX: from one clip and one sentence to edited clips."""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tav_jax.errors import InputError, MissingError, TavError, WeightsError
    from tav_jax.io.tokenizer import PromptCut
    from tav_jax.io.video import Clip, Edit, load_video
    from tav_jax.pipeline import TuneAVideo

_MODULES = {
    **dict.fromkeys(("InputError", "MissingError", "TavError", "WeightsError"), "errors"),
    **dict.fromkeys(("Clip", "Edit", "load_video"), "io.video"),
    "PromptCut": "io.tokenizer",
    "TuneAVideo": "pipeline",
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
    """Public names are imported at first use, so that `import tav_jax` and `tav --help` do not load JAX."""
    if name == "evaluation":  # which is imported with `import tav_jax`, as far as a user can tell
        return import_module(f"{__name__}.evaluation")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

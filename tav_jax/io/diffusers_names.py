"""The names that Diffusers and the official code use for arguments of `TuneAVideo`, and what its other arguments are
here."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypedDict, TypeVar

from tav_jax.errors import ArgumentNameError

# Method → another name → the parameter that means the same.
OTHER_NAMES: dict[str, dict[str, str]] = {
    "from_pretrained": {"torch_dtype": "dtype", "pretrained_model_name_or_path": "source"},
    "tune": {
        "max_train_steps": "steps",
        "adam_weight_decay": "weight_decay",
        "trainable_modules": "trainable",
        "generator": "seed",
    },
    "invert": {"num_inference_steps": "steps", "num_inv_steps": "steps"},
    "sample": {
        "num_inference_steps": "steps",
        "num_inv_steps": "inversion_steps",
        "guidance_scale": "guidance",
        "generator": "seed",
        "num_frames": "frames",
        "video_length": "frames",
    },
}
# Arguments that have no equal here → what to use. A scheduler of Diffusers has other timesteps than ours of that name.
INSTEAD = {
    "scheduler": "sample has sampler='ddim' or 'dpm++2m'",
    "eta": "samplers are deterministic",
    "video": "give sample latents=tav.invert(clip)",
    "image": "give sample latents=tav.invert(clip)",
    "prompt_embeds": "give the prompt as text",
    "negative_prompt_embeds": "give negative_prompt as text",
    "num_images_per_prompt": "give a list of prompts, or call sample with several seeds",
    "num_videos_per_prompt": "give a list of prompts, or call sample with several seeds",
    "callback": "use progress=, a function of the number of steps done",
    "callback_on_step_end": "use progress=, a function of the number of steps done",
    "output_type": "the result has .frames (uint8) and .latents",
    "return_dict": "the result has .frames (uint8) and .latents",
    "device": "use mesh=(data, frames), and JAX_PLATFORMS to choose the platform",
    "device_map": "use mesh=(data, frames), and JAX_PLATFORMS to choose the platform",
    "gradient_checkpointing": "use remat=, which is 'auto' by default",
    "unet": "load one directory with all components",
    "vae": "load one directory with all components",
    "text_encoder": "load one directory with all components",
}


class HubOptions(TypedDict, total=False):
    """Options of `huggingface_hub.snapshot_download`, for a hub id."""

    revision: str | None  # a branch, a tag or a commit
    cache_dir: Any
    local_files_only: bool
    force_download: bool
    token: str | bool | None


P = ParamSpec("P")
R = TypeVar("R")


def accept_other_names(method: Callable[P, R]) -> Callable[P, R]:
    """A method that also takes the names above, and refuses unknown names with the one to use."""
    name, parameters = method.__name__, inspect.signature(method).parameters
    known = {n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD} - {"self", "cls"}
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known |= set(HubOptions.__annotations__)

    @functools.wraps(method)
    def wrapper(*args: P.args, **options: P.kwargs) -> R:
        return method(*args, **_translate(name, known, options))  # pyright: ignore[reportCallIssue]

    return wrapper


def _translate(method: str, known: set[str], options: dict[str, Any]) -> dict[str, Any]:
    """The options under the names of the method's parameters."""
    others, found = OTHER_NAMES[method], {}
    if "size" in known and (sides := {"height", "width"} & set(options)):
        if len(sides) == 1 or "size" in options:
            given = " and ".join(sorted(sides | ({"size"} & set(options))))
            raise ArgumentNameError(f"{method}() got {given}; give size=(height, width) only")
        found["size"] = (options["height"], options["width"])
        options = {name: value for name, value in options.items() if name not in sides}
    for name, value in options.items():
        parameter = name if name in known else others.get(name)
        if parameter is None:
            near = difflib.get_close_matches(name, [*known, *others], n=1)
            help_ = INSTEAD.get(name) or (f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(known))}")
            raise ArgumentNameError(f"{method}() has no argument {name!r}; {help_}")
        if parameter in found:
            raise ArgumentNameError(f"{method}() got {parameter} twice, once as {name}; give {parameter} only")
        found[parameter] = value
    return found

"""Write a pipeline directory in the Diffusers layout: the tuned video pipeline, or its 2D part."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import save_file

from tav_jax.errors import InputError
from tav_jax.io import paths
from tav_jax.io.diffusers_layout import CONFIGS
from tav_jax.io.model_card import Origin, model_card
from tav_jax.io.tokenizer import load_tokenizer, save_tokenizer
from tav_jax.io.weights import TEMPORAL, Components, torch_tensors

CLASSES = {
    True: ("StableDiffusionPipeline", "UNet2DConditionModel"),
    False: ("TuneAVideoPipeline", "UNet3DConditionModel"),
}


def check_target(directory: str | Path) -> Path:
    """The path of a directory to write. Raises `InputError` if it exists and is not an empty directory."""
    target = paths.local_path(directory)
    paths.check_writable(target.parent)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty directory; give another name or remove it first.")
    return target


def save(
    components: Components,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    prompt: str = "",
    two_d: bool = False,
    repository: str = "",
    origin: Origin | None = None,
) -> None:
    """Write a pipeline directory in the Diffusers layout, with the 3D UNet of the official code, which can load it, or
    with `two_d` a plain Stable Diffusion without the temporal layers.

    Everything is written from what was loaded: no file is copied. It is written to a scratch directory beside the
    target, which is then renamed: the target is never incomplete. Modes of files follow the umask.
    """
    target, layout = check_target(directory), components.layout
    tokenizer = tokenizer or load_tokenizer(layout.root / "tokenizer")
    target.parent.mkdir(parents=True, exist_ok=True)
    paths.remove_abandoned(target.parent)
    temporary = contextlib.ExitStack()
    try:
        scratch = temporary.enter_context(paths.scratch_directory(target.parent)) / "pipeline"
        scratch.mkdir()
        mode = scratch.stat().st_mode & 0o666
        for part, config in layout.configs.items():
            (scratch / part).mkdir()
            _write_json(scratch / part / CONFIGS[part], unet_config(config, two_d) if part == "unet" else config)
        save_tokenizer(tokenizer, scratch / "tokenizer")
        _write_json(scratch / "model_index.json", _model_index(layout.configs["scheduler"], two_d))
        name = repository or target.name
        card = model_card(layout.source, layout.root, name, prompt, two_d=two_d, origin=origin or Origin())
        (scratch / "README.md").write_text(card, "utf-8")
        for part in ("unet", "vae", "text_encoder"):
            file = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
            tensors = torch_tensors(getattr(components, part), part, old_vae_names=components.old_vae_names)
            if two_d and part == "unet":
                tensors = {name: x for name, x in tensors.items() if not TEMPORAL.fullmatch(name)}
            save_file(tensors, scratch / part / file, metadata={"format": "pt"})
            (scratch / part / file).chmod(mode)  # safetensors creates files that only their owner can read
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    except (OSError, SafetensorError) as error:
        fix = "free some space or give another directory"
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target} could not be written ({reason}); {fix}") from error
    finally:
        temporary.close()


def unet_config(config: Mapping[str, Any], two_d: bool = False) -> dict[str, Any]:
    """A UNet's config as the official code writes it, or as Diffusers writes that of a 2D UNet."""
    old, new = ("3D", "2D") if two_d else ("2D", "3D")
    blocks = {name: json.loads(json.dumps(config[name]).replace(old, new)) for name in config if "block_type" in name}
    return {**config, **blocks, "_class_name": CLASSES[two_d][1]}


def _model_index(scheduler: Mapping[str, Any], two_d: bool) -> dict[str, Any]:
    pipeline, unet = CLASSES[two_d]
    without = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    return {
        "_class_name": pipeline,
        "_diffusers_version": "0.11.1",
        "scheduler": ["diffusers", scheduler.get("_class_name", "DDIMScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", unet],
        "vae": ["diffusers", "AutoencoderKL"],
        **(without if two_d else {}),
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")

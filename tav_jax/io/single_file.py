"""Stable Diffusion in one file of the original layout, `.safetensors` or `.ckpt`.

The file contains the weights. Sizes, noise schedule and tokenizer are those of a directory in the Diffusers layout, or
by default those of Stable Diffusion 1.x or 2.x, which the width of the text embeddings tells apart.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from tav_jax.config import check_choice
from tav_jax.errors import InputError, MissingError, WeightsError, short_repr
from tav_jax.io import paths
from tav_jax.io.diffusers_layout import CONFIGS, SOURCE_HELP, Layout, hub_files, read_json
from tav_jax.io.original_names import CLIP, OPEN_CLIP, PREFIXES, open_clip_name, unet_name, vae_name
from tav_jax.io.stable_diffusion import STABLE_DIFFUSION, TOKENIZERS
from tav_jax.io.tensor_files import Tensor, iter_file

SUFFIXES = (".safetensors", ".ckpt")
SUPPORTED = "only Stable Diffusion 1.x and 2.x are supported"
# A name that only these files have → what they are. The first row that matches counts.
OTHER_FAMILIES = {
    r".*(lora_(up|down|A|B|mid)\b|lora\.(up|down)\b|hada_w|lokr_w).*": "a LoRA, which is given as `lora` (config: "
    "model.lora) beside a model",
    r"(string_to_param|emb_params|clip_[lg]$).*": "a textual inversion embedding",
    r"(control_model\.|input_hint_block|controlnet_cond_embedding).*": "a ControlNet",
    r"conditioner\.embedders\.1\..*": "Stable Diffusion XL",
    r"conditioner\.embedders\.0\..*": "the refiner of Stable Diffusion XL",
    r"(model\.diffusion_model\.)?joint_blocks\..*": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?(double|single)_(transformer_)?blocks\..*": "Flux, or another transformer",
    r"(model\.diffusion_model\.)?transformer_blocks\..*": "a transformer, such as Stable Diffusion 3 or Flux",
    r".*\bmotion_modules\..*": "a motion module of AnimateDiff",
    r"model\.diffusion_model\.label_emb\..*": "Stable Diffusion XL, or an unCLIP or upscaling model",
    r"depth_model\..*": "a depth-to-image model",
}
CHANNELS = {9: "an inpainting model", 8: "an image-editing model", 7: "an upscaling model", 5: "a depth-to-image model"}
PARTS = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder"}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
# What training writes beside the weights, copies that are their running mean, and layers that are not used.
IGNORED = re.compile(
    r"model_ema\..+|safety_checker\..+|first_stage_model\.(loss|model_ema)\..+|embedding_manager\..+"
    r"|(sqrt_|log_)?(one_minus_)?(recipm?1?_)?alphas_cumprod(_prev)?|posterior_\w+|betas|lvlb_weights|logvar|global_step"
    r"|scale_factor|cond_stage_model\.(model\.)?(logit_scale|text_projection|attn_mask)"
    r"|cond_stage_model\.transformer\.((text_model\.)?embeddings\.position_ids|text_projection\.weight)"
)


def open_layout(
    source: str | Path,
    *,
    config: str | Path = "",
    prediction: str = "",
    variant: str | None = None,
    hub: Mapping[str, Any] | None = None,
    **unet_options,
) -> Layout:
    """Open a directory, a hub id, a bucket path or a single file, before any weight is read. `config` is a directory or
    hub id with what a single file does not contain; `prediction` is "epsilon" or "v_prediction"."""
    if prediction:
        check_choice("model.prediction", prediction)
    if not is_single_file(source):
        if config:
            raise InputError(
                f"config is {short_repr(str(config))} and {source} is not a .safetensors or .ckpt file; leave config "
                "out: a directory has its own"
            )
        layout = Layout.open(source, variant=variant, hub=hub, **unet_options)
        own = layout.configs["scheduler"].get("prediction_type", "epsilon")
        if prediction and prediction != own:
            raise InputError(f"prediction is {prediction!r} and the scheduler of {source} has {own!r}; leave it out")
        return layout
    if variant:
        raise InputError(f"variant is {short_repr(variant)} and {source} is one file; leave variant out")
    file = local_file(source)
    shapes = {tensor.name: tensor.shape for tensor in iter_file(file)}
    check_family(file, shapes)
    name = str(source) if "://" in str(source) else file.name
    if config:
        layout = Layout.open(config, hub=hub, with_weights=False, **unet_options)
        configs = _with_prediction(layout.configs, prediction)
        return replace(layout, configs=configs, source=name, file=file)
    family = find_family(file, shapes, prediction)
    root = _tokenizer(file, family, hub or {})
    tokenizer = {"tokenizer": read_json(root / "tokenizer" / CONFIGS["tokenizer"])}
    configs = _with_prediction({**STABLE_DIFFUSION[family], **tokenizer}, prediction)
    return replace(Layout.of_configs(root, configs, name, **unet_options), file=file)


def is_single_file(source: str | Path) -> bool:
    """Whether a source is meant to be one file: by its suffix, unless it is a directory."""
    name = str(source)
    return name.endswith(SUFFIXES) and ("://" in name or not Path(name).expanduser().is_dir())


def local_file(source: str | Path) -> Path:
    """The path of a file on this machine, downloaded if it is in a bucket."""
    name = str(source)
    if "://" not in name:
        path = Path(name).expanduser()
        if not path.is_file():
            problem = "is a directory, not a file" if path.is_dir() else "does not exist"
            raise MissingError(f"{path} {problem}; give the path of a .safetensors or .ckpt file")
        return path
    paths.check_bucket(name)
    remote = epath.Path(name)
    if not remote.is_file():
        raise MissingError(f"{name} does not exist, or cannot be read from this machine. {SOURCE_HELP}")
    local = paths.temporary_directory() / remote.name
    remote.copy(local)
    return local


def _with_prediction(configs: dict[str, dict[str, Any]], prediction: str) -> dict[str, dict[str, Any]]:
    scheduler = configs["scheduler"]
    return {**configs, "scheduler": {**scheduler, "prediction_type": prediction} if prediction else scheduler}


def _tokenizer(file: Path, family: str, hub: Mapping[str, Any]) -> Path:
    """The hub's directory of the tokenizer, which is not in the file."""
    repository = TOKENIZERS[family]
    try:
        return hub_files(repository, ["tokenizer/*"], {k: v for k, v in hub.items() if k != "revision"})
    except MissingError as error:
        cause = str(error).removesuffix(SOURCE_HELP).rstrip(" .;")
        raise MissingError(
            f"{file} does not contain the tokenizer, which is downloaded from the hub: {cause}. Give a directory that "
            f"contains it as config (config: model.config), for example one that was downloaded elsewhere with `hf "
            f"download {repository} --include '*.json' 'tokenizer/*' --local-dir configs`."
        ) from error


# ---------------------------------------------------------------------------------------------------------- the family


def check_family(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse the files of other models, by their names and shapes."""
    for pattern, family in OTHER_FAMILIES.items():
        if any(re.match(pattern, name) for name in shapes):
            raise WeightsError(f"{file} is {family}; {SUPPORTED}.")
    channels = shapes.get(CONV_IN, (0, 4))[1:2]
    if channels and (kind := CHANNELS.get(channels[0])):
        raise WeightsError(f"{file} is {kind} (its UNet has {channels[0]} input channels); {SUPPORTED}, with 4.")
    found = [part for part, prefix in PREFIXES.items() if any(name.startswith(prefix) for name in shapes)]
    if "unet" not in found and any(name.startswith("model_ema.") for name in shapes):
        raise WeightsError(
            f"{file} has no UNet but its running mean (model_ema.…), which is not read; use the file of this model "
            "with tensors model.diffusion_model.…"
        )
    if not found:
        known = {"encoder.": "a VAE", "decoder.": "a VAE", "text_model.": "a text encoder", "down_blocks.": "a UNet"}
        kind = next((kind for name in shapes for start, kind in known.items() if name.startswith(start)), "")
        what = f"{kind} alone" if kind else f"no Stable Diffusion (no tensor {', '.join(PREFIXES.values())})"
        raise WeightsError(f"{file} is {what}; {SUPPORTED}, in a file or a directory with all parts.")
    if missing := [kind for part, kind in PARTS.items() if part not in found]:
        only = " and ".join(PARTS[part] for part in found)
        raise WeightsError(
            f"{file} has no {' and no '.join(missing)}, only a {only}; use a file of the whole model, or a directory "
            "in the Diffusers layout"
        )


def find_family(file: Path, shapes: Mapping[str, tuple[int, ...]], prediction: str) -> str:
    """sd1 or sd2, by the width of the text embeddings. Stable Diffusion 2.x predicts the noise or the velocity."""
    key = r"model\.diffusion_model\..+\.attn2\.to_k\.weight"
    widths = {shape[-1] for name, shape in shapes.items() if re.fullmatch(key, name) and shape}
    families = {768: "sd1", 1024: "sd2", 2048: "Stable Diffusion XL", 1280: "the refiner of Stable Diffusion XL"}
    family = families.get(next(iter(widths))) if len(widths) == 1 else None
    if family not in STABLE_DIFFUSION:
        found = " and ".join(map(str, sorted(widths))) or "none"
        raise WeightsError(
            f"{file}: the width of the UNet's text embeddings is {found}{f' (as in {family})' if family else ''}, "
            "expected 768 (Stable Diffusion 1.x) or 1024 (2.x). For other sizes give config, a directory with this "
            "model's configs."
        )
    if family == "sd2" and not prediction:
        raise InputError(
            f"{file} is Stable Diffusion 2.x, and a file does not say what its UNet predicts; give prediction, "
            "'v_prediction' for the models of 768 pixels such as 2.1, 'epsilon' for those of 512 such as 2.1-base "
            "(--config.model.prediction=v_prediction)"
        )
    return family


def read_configs(source: str | Path, config: str | Path, prediction: str) -> dict[str, dict[str, Any]]:
    """The configs of a single file's UNet, VAE, text encoder and scheduler, without a tokenizer."""
    file = local_file(source)
    shapes = {tensor.name: tensor.shape for tensor in iter_file(file)}
    check_family(file, shapes)
    configs = Layout.open(config, with_weights=False).configs if config else None
    return _with_prediction(configs or STABLE_DIFFUSION[find_family(file, shapes, prediction)], prediction)


# --------------------------------------------------------------------------------------------------------- the tensors


def iter_component(layout: Layout, part: str, names: Iterable[str]) -> Iterator[Tensor]:
    """The tensors of a component under the given names of Diffusers, and those without such a name under their own."""
    assert layout.file is not None
    table = {tensor.name: tensor for tensor in iter_file(layout.file)}
    used = set()
    for name in names:
        origin, third = _name_in_file(layout, part, name, table)
        if (tensor := table.get(origin)) is None or (third is not None and tensor.shape[0] % 3):
            continue
        used.add(origin)
        yield _convert(tensor, part, third)._replace(name=name, origin=origin)
    others = tuple(prefix for other, prefix in PREFIXES.items() if other != part)
    # Layers of OpenCLIP after the last that is used; Stable Diffusion 2 does not use one of 24.
    unused = f"{OPEN_CLIP}transformer.resblocks.{layout.text_encoder.num_hidden_layers}."
    for name, tensor in table.items():
        belongs = name.startswith(PREFIXES[part]) or (part == "unet" and not name.startswith(others))
        if belongs and name not in used and not IGNORED.fullmatch(name) and not name.startswith(unused):
            yield tensor


def names_in_file(layout: Layout, part: str, names: Iterable[str]) -> list[str]:
    """The names in the file of tensors of a component."""
    assert layout.file is not None
    known = {tensor.name for tensor in iter_file(layout.file)}
    return list(dict.fromkeys(_name_in_file(layout, part, name, known)[0] for name in names))


def _name_in_file(layout: Layout, part: str, name: str, names: Iterable[str]) -> tuple[str, int | None]:
    """The name in the file of a tensor of a component, and which third of it. `names` are those of the file."""
    if part == "unet":
        return PREFIXES[part] + unet_name(name, layout.unet), None
    if part == "vae":
        return PREFIXES[part] + vae_name(name, len(layout.vae.block_out_channels)), None
    if f"{OPEN_CLIP}ln_final.bias" in names:
        origin, third = open_clip_name(name)
        return OPEN_CLIP + origin, third
    bare = CLIP + name.removeprefix("text_model.")  # in files of early versions of transformers
    return bare if bare in names else CLIP + name, None


def _convert(tensor: Tensor, part: str, third: int | None) -> Tensor:
    shape, read = tensor.shape, tensor.read
    if third is not None:
        rows = shape[0] // 3
        return tensor._replace(
            shape=(rows, *shape[1:]), read=lambda: np.ascontiguousarray(read()[third * rows : (third + 1) * rows])
        )
    if part == "vae" and ".attn_1." in tensor.name and shape[2:] == (1, 1):  # a linear layer as a convolution
        return tensor._replace(shape=shape[:2], read=lambda: read()[:, :, 0, 0])
    return tensor

"""LoRA files, merged into the weights that they change: W + scale · alpha / rank · up @ down, in float32.

Layers may have the names of kohya's scripts (`lora_unet_down_blocks_0_…_to_q.lora_down.weight`, also in the original
layout, `lora_unet_input_blocks_1_1_…`), of Diffusers (`unet.….to_q.lora.down.weight`, also
`….processor.to_q_lora.down.weight`) or of PEFT (`unet.….to_q.lora_A.weight`, `base_model.model.…`). All are looked up
with dots as underscores.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tav_jax.config import lora_files
from tav_jax.errors import WeightsError, join_names
from tav_jax.io import single_file
from tav_jax.io.original_names import unet_name
from tav_jax.io.tensor_files import FLOAT_DTYPES, Tensor, iter_file, load_json, metadata, parse_json
from tav_jax.models import UNetConfig

MAX_CONFIG = 1 << 20  # bytes
# Name of a tensor → layer, and what the tensor is.
_TENSOR = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<kohya>down|up)\.weight"
    r"|(?:_lora|\.lora|\.lora_linear_layer)\.(?P<diffusers>down|up)\.weight"
    r"|\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"
    r"|(?:_lora|\.lora|\.lora_linear_layer)?\.(?P<alpha>alpha))"
)
_ROLES = {"A": "down", "B": "up"}
# What is no plain LoRA of Stable Diffusion 1.x or 2.x: the first row of which any name contains a match.
_OTHER_KINDS = {
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"\bhada_w": "a LoHa",
    r"\blokr_w": "a LoKr",
    r"\blora_mid\b": "a LoCon with Tucker decomposition",
    r"\boft_|\bboft_": "an OFT",
    r"\.(diff|diff_b|w_norm|b_norm|on_input)$": "a LyCORIS of another kind than LoRA",
    r"attn_temp|norm_temp|temp_attn|temp_conv|transformer_temp|transformer_in|temporal|motion_module": "a temporal "
    "LoRA such as MotionDirector's (the temporal layers of this model are its own, and learn from the clip)",
    r"(double|single)_(transformer_)?blocks[._]|joint_blocks[._]": "a LoRA for Flux or Stable Diffusion 3",
    r"lora_te[2-9]_|text_encoder_[2-9]|_label_emb_|add_embedding|transformer_blocks[._][1-9]": "a LoRA for Stable "
    "Diffusion XL or 3",
    r"string_to_param|emb_params": "a textual inversion embedding, or contains one",
    r"^(control_model|input_hint_block|lllite)": "a ControlNet",
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.": "a whole model, which is given as model.path",
}


@dataclass
class Layer:
    """The change of one weight."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # down [r, in, …], up [out, r, …], alpha []


@dataclass(frozen=True)
class Update:
    """A layer of a file, with the weight that it changes."""

    file: Path
    down: Tensor
    up: Tensor
    factor: float  # scale · alpha / rank

    def compute(self, shape: tuple[int, ...], digest: Any) -> np.ndarray:
        down, up = (np.ascontiguousarray(tensor.read()) for tensor in (self.down, self.up))
        for data in (down.view(np.uint8).data, up.view(np.uint8).data, repr(self.factor).encode()):
            digest.update(data)
        down, up, rank = down.astype(np.float32), up.astype(np.float32), len(down)
        update = self.factor * (up.reshape(-1, rank) @ down.reshape(rank, -1)).reshape(shape)
        if not np.isfinite(update).all():
            name = self.down.name.removesuffix(".weight")
            raise WeightsError(
                f"{self.file}: {name} has values that are NaN, infinite or too large; download it again."
            )
        return update


class Lora:
    """A LoRA file, whose header is read and checked."""

    def __init__(self, source: str | Path, scale: float):
        self.file, self.scale = single_file.local_file(source), scale
        tensors = list(iter_file(self.file))
        for pattern, kind in _OTHER_KINDS.items():
            if found := [t.name for t in tensors if re.search(pattern, t.name)]:
                raise WeightsError(
                    f"{self.file} is {kind} ({join_names(found[:1])}); only LoRA of the UNet and the text encoder of "
                    "Stable Diffusion 1.x and 2.x is supported."
                )
        self.layers: dict[str, Layer] = {}
        unknown = []
        for tensor in tensors:
            if match := _TENSOR.fullmatch(tensor.name):
                role = match["kohya"] or match["diffusers"] or _ROLES.get(match["peft"]) or "alpha"
                self.layers.setdefault(match["layer"], Layer()).tensors[role] = tensor
            else:
                unknown.append(tensor.name)
        if unknown or not self.layers:
            listed = f"{len(unknown)} unexpected tensors: {join_names(unknown)}" if unknown else "no tensors"
            raise WeightsError(
                f"{self.file} is not a LoRA file in the names of kohya, Diffusers or PEFT: it has {listed}. Use "
                "another file of this LoRA."
            )
        self.settings = _read_settings(self.file)

    def updates(self, targets: Mapping[str, tuple[str, str]], shapes: Mapping[tuple[str, str], tuple[int, ...]]):
        """(component, weight) → update. `targets` has the weight that each name of a layer means."""
        found, unmatched, wrong = {}, [], []
        for name, layer in self.layers.items():
            target = next((targets[key] for key in _keys(name) if key in targets), None)
            if target is None:
                unmatched.append(name)
                continue
            if missing := [role for role in ("down", "up") if role not in layer.tensors]:
                raise WeightsError(f"{self.file}: the layer {name} has no {missing[0]} weight; download it again.")
            if target in found:
                raise WeightsError(f"{self.file} has two layers for {target[1]} of the {target[0]}; use another file.")
            down, up = layer.tensors["down"], layer.tensors["up"]
            shape, rank = shapes[target], down.shape[0] if down.shape else 0
            if not rank or _trim(up.shape) != (shape[0], rank) or _trim((rank, *shape[1:])) != _trim(down.shape):
                wrong.append(
                    f"{down.name} is {list(down.shape)} and {up.name} {list(up.shape)}, and the weight is {list(shape)}"
                )
                continue
            if other := [t for t in layer.tensors.values() if t.dtype not in FLOAT_DTYPES]:
                expected = " or ".join(FLOAT_DTYPES)
                raise WeightsError(f"{self.file}: {other[0].name} is {other[0].dtype}, expected {expected}.")
            if factor := self.scale * self._multiplier(layer, target, rank):
                found[target] = Update(self.file, down, up, factor)
        if wrong:
            more = f" ({len(wrong)} layers do not fit)" if len(wrong) > 1 else ""
            raise WeightsError(f"{self.file}: {wrong[0]}{more}; use a LoRA for this model.")
        if unmatched:
            listed = f"{len(unmatched)} of {len(self.layers)} layers are not in this model: {join_names(unmatched)}"
            raise WeightsError(f"{self.file}: {listed}; use a LoRA for this model.")
        return found

    def _multiplier(self, layer: Layer, target: tuple[str, str], rank: int) -> float:
        """alpha / rank. Without alpha in the file, that in its metadata; without either, 1."""
        if (tensor := layer.tensors.get("alpha")) is not None:
            alpha = tensor.read() if np.prod(tensor.shape) == 1 else None
            if alpha is None or not np.isfinite(alpha).all():
                value = f"of shape {list(tensor.shape)}" if alpha is None else str(alpha.item())
                raise WeightsError(f"{self.file}: {tensor.name} is {value}, expected a finite number.")
            return float(alpha.item()) / rank
        part, module = target[0], target[1].removesuffix(".weight")
        settings = {name.removeprefix(f"{part}."): value for name, value in self.settings.items()}
        patterns = settings.get("alpha_pattern")
        patterns = patterns if isinstance(patterns, dict) else {}
        alpha = next((a for key, a in patterns.items() if f".{module}".endswith(f".{key}")), settings.get("lora_alpha"))
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not np.isfinite(alpha):
            return 1.0
        return alpha / (rank**0.5 if settings.get("use_rslora") is True else rank)


def _read_settings(file: Path) -> dict[str, Any]:
    """The settings of PEFT, which Diffusers writes into the metadata and PEFT into a file beside the weights."""
    text, beside = metadata(file).get("lora_adapter_metadata"), file.with_name("adapter_config.json")
    place = beside if text is None else file
    try:
        if text is None and not (file.stem == "adapter_model" and beside.is_file()):
            return {}
        settings = load_json(beside, MAX_CONFIG) if text is None else parse_json(text.encode())
        if not isinstance(settings, dict):
            raise ValueError
    except (ValueError, OSError) as error:
        raise WeightsError(
            f"{place} has settings of the LoRA that are not readable JSON; download it again."
        ) from error
    if any(value is True for name, value in settings.items() if name.endswith("use_dora")):
        raise WeightsError(f"{place} says that {file.name} is a DoRA (use_dora); only LoRA is supported.")
    return settings


def _trim(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a 1×1 convolution as that of a linear layer."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _keys(layer: str) -> list[str]:
    """The keys of `targets` under which the layer of a file may be."""
    name = layer.removeprefix("base_model.model.").replace(".processor.", ".")
    for prefix, part in (("lora_unet_", "unet"), ("lora_te_", "text_encoder"), ("lora_te1_", "text_encoder")):
        if name.startswith(prefix):
            return [f"{part} {name.removeprefix(prefix)}"]
    flat = name.replace(".", "_")
    for part in ("unet", "text_encoder"):
        if name.startswith(f"{part}."):
            return [f"{part} {flat.removeprefix(f'{part}_')}"]
    return [f"unet {flat}", f"text_encoder {flat}"]


def _targets(weights: Mapping[tuple[str, str], Any], unet: UNetConfig) -> dict[str, tuple[str, str]]:
    """The weight that each name of a layer means, under all names in use, with dots as underscores."""
    targets = {}
    for part, weight in weights:
        module = weight.removesuffix(".weight")
        names = {module}
        if part == "unet":
            names |= {unet_name(weight, unet).removesuffix(".weight"), re.sub(r"to_out\.0$", "to_out", module)}
        else:
            attention = re.sub(r"self_attn\.([qkv])_proj$", r"self_attn.to_\1", module)
            names.add(attention.replace("self_attn.out_proj", "self_attn.to_out"))
            names |= {name.removeprefix("text_model.") for name in names}
        targets |= {f"{part} {name.replace('.', '_')}": (part, weight) for name in names}
    return targets


def open_loras(items: Sequence[Any]) -> list[Lora]:
    """The files of `lora=[("file", scale), "file", …]`, with their headers checked."""
    return [Lora(file, scale) for file, scale in lora_files(items)]


def match(
    loras: Sequence[Lora], shapes: Mapping[tuple[str, str], tuple[int, ...]], unet: UNetConfig
) -> dict[tuple[str, str], list[Update]]:
    """The updates of each weight. `shapes` are those of all kernels, by (component, Diffusers' name)."""
    targets, updates = _targets(shapes, unet), {}
    for lora in loras:
        for target, update in lora.updates(targets, shapes).items():
            updates.setdefault(target, []).append(update)
    return updates


def merge(weight: np.ndarray, updates: Sequence[Update], digest: Any) -> np.ndarray:
    """The weight in float32 with its updates, one after the other. What determines it is added to the digest: the last
    bits of the sum may differ between machines."""
    weight = weight.astype(np.float32)
    for update in updates:
        weight += update.compute(weight.shape, digest)
    return weight

"""CLIP models in the layout of transformers: config.json, weights, preprocessor_config.json and a tokenizer, in one
directory or hub repository."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from tav_jax.errors import MissingError, WeightsError, short_repr
from tav_jax.io import weights
from tav_jax.io.diffusers_layout import (
    MAX_TEXT_LAYERS,
    MAX_VOCABULARY,
    NORM_EPSILONS,
    ConfigReader,
    hub_problem,
    read_json,
    text_config,
)
from tav_jax.io.tokenizer import load_tokenizer, tokenize
from tav_jax.models import ClipConfig, ClipModel, ClipVisionConfig

HINT = "Use a CLIP model in the layout of transformers, such as openai/clip-vit-large-patch14."
HUB_CONFIGS = ("config.json", "*processor_config.json", "tokenizer*", "vocab.json", "merges.txt")
HUB_WEIGHTS = ("model*.safetensors*", "pytorch_model*.bin*")  # the first of which there are files
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the second is that of transformers 5
BATCH = 8  # images; a clip is padded to a multiple of it, so that one program serves all clips
# CLIP's preprocessing, where a directory has no config of it
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """From a frame to the input of a vision tower. Equals transformers' CLIPImageProcessor on Pillow."""

    size: int | tuple[int, int] | None  # of the shorter side, or (height, width); None: unchanged
    crop: tuple[int, int] | None  # of the center
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, frame: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w 3"]:
        height, width = frame.shape[:2]
        if isinstance(self.size, int):
            shorter = min(height, width)
            height, width = (self.size if n == shorter else int(self.size * n / shorter) for n in (height, width))
        elif self.size is not None:
            height, width = self.size
        x = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling(self.resample)))
        if self.crop is not None:
            top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
            x = x[top : top + self.crop[0], left : left + self.crop[1]]
        x = (x.astype(np.float64) * self.scale).astype(np.float32)
        return (x - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)


@dataclass(frozen=True)
class ClipEncoder:
    """A loaded CLIP model. It maps frames and texts to embeddings of length one."""

    source: str
    model: ClipModel
    preprocessing: Preprocessing
    tokenizer: Any
    end_token: int

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale[...].item())

    def embed_frames(self, frames: UInt8[np.ndarray, "F H W 3"]) -> Float[np.ndarray, "F D"]:
        images = np.stack([self.preprocessing(frame) for frame in frames])
        padded = np.pad(images, ((0, -len(images) % BATCH), (0, 0), (0, 0), (0, 0)))
        batches = [_embed_images(self.model, padded[i : i + BATCH]) for i in range(0, len(padded), BATCH)]
        return np.concatenate(batches)[: len(frames)]

    def embed_text(self, text: str) -> Float[np.ndarray, "D"]:
        config = self.model.config.text
        ids = tokenize(self.tokenizer, [text], config.max_position_embeddings, config.vocab_size)
        # As in transformers: configs with the end token 2 are wrong, and mean the token with the largest id.
        end = (ids if self.end_token == 2 else ids == self.end_token).argmax(axis=1).astype(np.int32)
        return np.asarray(_embed_texts(self.model, ids, end))[0]


# The default precision of products is lower on accelerators; the scores should not depend on the machine.
@jax.jit
def _embed_images(model: ClipModel, images: Any) -> jax.Array:
    with jax.default_matmul_precision("float32"):
        return model.embed_images(images)


@jax.jit
def _embed_texts(model: ClipModel, ids: Any, end: Any) -> jax.Array:
    with jax.default_matmul_precision("float32"):
        return model.embed_texts(ids, end)


def load_clip(source: str | Path, processor: str | None = None) -> ClipEncoder:
    """Load a CLIP model in float32 from a directory or hub id. All files are checked before a tensor is read.

    Args:
        processor: hub id of the tokenizer and the preprocessing, if the source has no tokenizer.
    """
    root = _directory(str(source))
    config = _read_config(root)
    clip = _clip_config(config, root / "config.json")
    read = ConfigReader(config.get("text_config") or {}, root / "config.json", HINT)
    end_token = read.integer("eos_token_id", 49407, MAX_VOCABULARY)
    files = root
    if not _has_tokenizer(root):
        if processor is None:
            raise MissingError(f"{root} has no tokenizer (tokenizer.json, or vocab.json and merges.txt). {HINT}")
        copied = f"{root} has no tokenizer; copy that of {processor} into it, or download it with a network"
        files = _from_hub(processor, HUB_CONFIGS, copied)
    has_own = any((root / name).is_file() for name in PREPROCESSORS)
    preprocessing = _preprocessing(root if has_own else files, clip.vision)
    tokenizer = load_tokenizer(files)
    model = weights.abstract(ClipModel, clip, jnp.float32)
    weights.fill(model, weights.Source(weights.Files(root)), "clip", lambda path: jnp.float32)
    return ClipEncoder(str(source), model, preprocessing, tokenizer, end_token)


def _has_tokenizer(root: Path) -> bool:
    return any(all((root / name).is_file() for name in names) for names in VOCABULARIES)


def _directory(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise WeightsError(f"{path} is a file; a CLIP model is a directory or a hub id. {HINT}")
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise MissingError(f"{source} is neither a directory nor a hub id. {HINT}")
    root = Path()
    for pattern in HUB_WEIGHTS:
        root = _from_hub(source, (*HUB_CONFIGS, pattern), HINT)
        if any(root.glob(pattern)):
            break
    return root


def _from_hub(name: str, patterns: tuple[str, ...], source_help: str) -> Path:
    import huggingface_hub  # slow to import

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises many types
        raise MissingError(f"{name!r} {hub_problem(name, error, source_help)}") from error


def _read_config(root: Path) -> dict[str, Any]:
    """config.json of a CLIP model. Older ones repeat values in `text_config_dict`, which take precedence."""
    file = root / "config.json"
    if not file.is_file():
        part = " (it is a pipeline of Diffusers)" if (root / "model_index.json").is_file() else ""
        raise MissingError(f"{root} has no config.json{part}. {HINT}")
    config = read_json(file)
    kind = config.get("model_type")
    for part in ("text_config", "vision_config"):
        values = [config.get(name) or {} for name in (part, f"{part}_dict")]
        if not all(isinstance(value, dict) for value in values):
            raise WeightsError(f"{file}: {part} is not an object; download it again. {HINT}")
        config[part] = {**values[0], **values[1]}
    if kind == "clip_text_model":
        raise WeightsError(f"{root} is a CLIP text encoder without a vision tower. {HINT}")
    if kind != "clip":
        raise WeightsError(f"{root} is a model of type {short_repr(kind)}, not 'clip'. {HINT}")
    return config


def _clip_config(config: Mapping[str, Any], path: Path) -> ClipConfig:
    read = ConfigReader(config["vision_config"], path, HINT)
    read.require(model_type=("clip_vision_model", "clip"), hidden_act=("quick_gelu", "gelu"), num_channels=3)
    width, heads = read.integer("hidden_size", 768), read.integer("num_attention_heads", 12)
    size, patch = read.integer("image_size", 224, 4096), read.integer("patch_size", 32, 4096)
    if width % heads:
        raise read.error("num_attention_heads", heads, f"a divisor of hidden_size, {width}")
    if patch > size:
        raise read.error("patch_size", patch, f"at most image_size, {size}")
    vision = ClipVisionConfig(
        hidden_size=width,
        intermediate_size=read.integer("intermediate_size", 3072),
        num_hidden_layers=read.integer("num_hidden_layers", 12, MAX_TEXT_LAYERS),
        num_attention_heads=heads,
        hidden_act=read.config.get("hidden_act", "quick_gelu"),
        layer_norm_eps=read.number("layer_norm_eps", 1e-5, *NORM_EPSILONS),
        image_size=size,
        patch_size=patch,
    )
    dim = ConfigReader(config, path, HINT).integer("projection_dim", 512)
    return ClipConfig(text_config(config["text_config"], path, HINT), vision, dim)


def _preprocessing(root: Path, vision: ClipVisionConfig) -> Preprocessing:
    file = next((root / name for name in PREPROCESSORS if (root / name).is_file()), root / PREPROCESSORS[0])
    config = read_json(file) if file.is_file() else {}
    config = config.get("image_processor", config)
    read = ConfigReader(config if isinstance(config, dict) else {}, file, HINT)
    on = {name: read.boolean(f"do_{name}", True) for name in ("resize", "center_crop", "rescale", "normalize")}
    size = _size(read, "size", vision.image_size) if on["resize"] else None
    crop = _size(read, "crop_size", vision.image_size) if on["center_crop"] else None
    crop = (crop, crop) if isinstance(crop, int) else crop
    smallest = (size, size) if isinstance(size, int) else size
    if (crop or smallest) != (vision.image_size,) * 2 or (crop and smallest and min(smallest) < max(crop)):
        raise read.error("crop_size", crop, f"images of {vision.image_size} pixels on a side, as image_size says")
    return Preprocessing(
        size,
        crop,
        resample=read.integer("resample", int(Image.Resampling.BICUBIC), 5),
        scale=read.number("rescale_factor", 1 / 255, 1e-6, 1.0) if on["rescale"] else 1.0,
        mean=_channels(read, "image_mean", MEAN) if on["normalize"] else (0.0,) * 3,
        std=_channels(read, "image_std", STD) if on["normalize"] else (1.0,) * 3,
    )


def _size(read: ConfigReader, name: str, default: int) -> int | tuple[int, int]:
    """224, {"shortest_edge": 224} or {"height": 224, "width": 224}."""
    value = read.config.get(name, default)
    values = value if isinstance(value, dict) else {"shortest_edge": value}
    sides = {key: side for key, side in values.items() if side is not None}
    if any(type(side) is not int or not 1 <= side <= 4096 for side in sides.values()):
        sides = {}
    if sides.keys() == {"shortest_edge"}:
        return sides["shortest_edge"]
    if sides.keys() == {"height", "width"}:
        return sides["height"], sides["width"]
    raise read.error(name, value, "a number, shortest_edge, or height and width, from 1 to 4096")


def _channels(read: ConfigReader, name: str, default: tuple[float, ...]) -> tuple[float, ...]:
    value = read.config.get(name, default)
    is_list = isinstance(value, list | tuple) and len(value) == 3
    if not is_list or any(type(x) not in (int, float) or not (name == "image_mean" or x > 0) for x in value):
        raise read.error(name, value, "three numbers")
    return tuple(map(float, value))

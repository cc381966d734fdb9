"""A Stable Diffusion pipeline on disk: where its parts lie, and what their configs mean.

A Diffusers-layout directory has one folder a component (`unet/`, `vae/`, `text_encoder/`, `tokenizer/`, `scheduler/`),
each with a config. `safety_checker/` and `feature_extractor/` are not needed and not looked at.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from tav_jax.errors import MissingError, WeightsError, short_repr
from tav_jax.io.tensor_files import parse
from tav_jax.models import ClipTextConfig, UNetConfig, VAEConfig

CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
# Bounds of what is built: beyond them no network is made, not even one of shapes alone. Stable Diffusion 2.1 has 4
# levels of 2 layers, up to 1280 wide, and a text encoder of 23 layers, 4096 wide inside.
LEVELS, LAYERS, TEXT_LAYERS, WIDTH, WORDS = 8, 8, 64, 16384, 1_000_000
EPSILONS = (1e-12, 0.1)  # what a norm may add to a variance
CONFIG = 1 << 20  # bytes of a config
NEEDED = ("model_index.json", *(f"{part}/*" for part in CONFIGS))
# A hub's repository often holds the same weights several times over. The first of these that has all is fetched.
SMALL = ("model_index.json", "*/*.json", "*/*.txt")
UNUSED = ("safety_checker/*", "feature_extractor/*", "*non_ema*", "*ema_only*")
VARIANTS = (("*/*.safetensors", "*.fp16*"), ("*/*.fp16*.safetensors", "-"), ("*/*.bin", "*.fp16*"))
HOW_TO_GET = (
    "Give a directory in the Diffusers layout, for example one made by "
    "`hf download CompVis/stable-diffusion-v1-4 --local-dir sd14`, a hub id, or a bucket path."
)


@dataclass(frozen=True)
class Layout:
    """A pipeline directory that has every component, and is of a family that we can run."""

    root: Path
    index: dict[str, Any]
    configs: dict[str, dict[str, Any]]
    unet: UNetConfig
    vae: VAEConfig
    text_encoder: ClipTextConfig

    @classmethod
    def open(cls, source: str | Path, **unet_options) -> "Layout":
        """Check a pipeline directory, hub id or bucket path whole, before a single tensor is read."""
        root = _local(source)
        index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
        _refuse_other_families(root, index)
        missing = [f"{part}/{file}" for part, file in CONFIGS.items() if not (root / part / file).is_file()]
        vocabulary = ("tokenizer.json",), ("vocab.json", "merges.txt")
        if not any(all((root / "tokenizer" / file).is_file() for file in files) for files in vocabulary):
            missing += ["tokenizer/vocab.json with merges.txt, or tokenizer.json"]
        if missing:
            raise MissingError(f"{root} has no {', no '.join(missing)}: it is not a whole pipeline. {HOW_TO_GET}")
        configs = {part: read_json(root / part / file) for part, file in CONFIGS.items()}
        unet = unet_config(configs["unet"], root / "unet/config.json", **unet_options)
        vae = vae_config(configs["vae"], root / "vae/config.json")
        text = text_config(configs["text_encoder"], root / "text_encoder/config.json")
        if text.hidden_size != unet.cross_attention_dim:
            raise WeightsError(
                f"{root}: the text encoder gives {text.hidden_size} numbers a token, the UNet's cross_attention_dim is "
                f"{unet.cross_attention_dim}; the two are not from one pipeline. Take both from the same one."
            )
        return cls(root, index, configs, unet, vae, text)


def _local(source: str | Path) -> Path:
    """A directory on this machine with the pipeline in it; fetched first where `source` is a bucket or a hub id."""
    name = str(source)
    if "://" in name:
        return _from_bucket(epath.Path(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise WeightsError(f"{path} is a file; a pipeline is a directory. {HOW_TO_GET}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise MissingError(f"{path} does not exist. {HOW_TO_GET}")
    return _from_hub(name)


def _from_bucket(root: epath.Path) -> Path:
    if not (root / "unet").is_dir():
        raise MissingError(f"{root} has no unet/ folder, or cannot be read from here. {HOW_TO_GET}")
    local = Path(tempfile.mkdtemp(prefix="tav_jax_model_"))
    try:
        for pattern in NEEDED:
            for file in root.glob(pattern):
                inside = Path(str(file)[len(str(root)) :].lstrip("/"))
                if ".." in inside.parts:  # a bucket takes such a name for one like any other
                    raise WeightsError(f"{short_repr(str(file))} leads out of {root}; remove it from there")
                (local / inside).parent.mkdir(parents=True, exist_ok=True)
                file.copy(local / inside)
    except BaseException:
        shutil.rmtree(local, ignore_errors=True)
        raise
    return local


def _from_hub(name: str) -> Path:
    import huggingface_hub  # heavy, and needed only here

    root = Path()
    try:
        for wanted, unwanted in VARIANTS:
            allow, ignore = [*SMALL, wanted], [*UNUSED, unwanted]
            root = Path(huggingface_hub.snapshot_download(name, allow_patterns=allow, ignore_patterns=ignore))
            if all(any((root / part).glob(wanted.split("/")[1])) for part in ("unet", "vae", "text_encoder")):
                break
        return root
    except Exception as error:  # one sentence, whatever the hub client raises: no network, no such id, no permission
        raise MissingError(
            f"{name!r} is no directory here, and as a hub id it could not be fetched ({type(error).__name__}). "
            f"{HOW_TO_GET}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG + 1)
        if len(text) > CONFIG:
            raise ValueError(f"it has more than {CONFIG >> 20} MiB")
        value = parse(text)
    except (ValueError, OSError) as error:
        raise WeightsError(
            f"{path} is not a readable JSON file ({short_repr(str(error))}); download it again."
        ) from error
    if not isinstance(value, dict):
        raise WeightsError(
            f"{path} holds a JSON {type(value).__name__}, not the settings of a model; download it again."
        )
    return value


# --------------------------------------------------------------------------------------------------- families


def _refuse_other_families(root: Path, index: Mapping[str, Any]) -> None:
    family = None
    if "text_encoder_2" in index or (root / "text_encoder_2").is_dir():
        family = "a Stable Diffusion XL or 3 pipeline (it has two text encoders)"
    if "transformer" in index or (root / "transformer").is_dir():
        family = "a transformer pipeline such as Flux or Stable Diffusion 3"
    if family:
        raise WeightsError(f"{root} is {family}; only Stable Diffusion 1.x and 2.x can be tuned. {HOW_TO_GET}")


class _Reader:
    """Reads settings out of one component's config; what cannot be run is refused by file and name."""

    def __init__(self, config: Mapping[str, Any], path: Path):
        self.config, self.path = config, path

    def refuse(self, name: str, value: Any, expected: str) -> WeightsError:
        return WeightsError(
            f"{self.path}: {name} is {short_repr(value)}, expected {expected}. Only Stable Diffusion 1.x and 2.x pipelines "
            "can be tuned; use one of these."
        )

    def only(self, **allowed: Any) -> None:
        """Settings that must have their usual value where they are given at all."""
        for name, value in allowed.items():
            values = value if isinstance(value, tuple) else (value,)
            if name in self.config and self.config[name] not in values:
                raise self.refuse(name, self.config[name], " or ".join(repr(v) for v in values))

    def integer(self, name: str, default: int, limit: int = WIDTH) -> int:
        value = self.config.get(name, default)
        if type(value) is not int or not 1 <= value <= limit:
            raise self.refuse(name, value, f"a whole number from 1 to {limit}")
        return value

    def integers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self.config.get(name, default)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= LEVELS:
            raise self.refuse(name, value, f"a list of 1 to {LEVELS} whole numbers")
        if any(type(v) is not int or not 1 <= v <= WIDTH for v in value):
            raise self.refuse(name, value, f"a list of whole numbers from 1 to {WIDTH}")
        return tuple(value)

    def number(self, name: str, default: float, least: float, most: float) -> float:
        value = self.config.get(name, default)
        if type(value) not in (int, float) or not least <= value <= most:
            raise self.refuse(name, value, f"a number from {least} to {most}")
        return float(value)

    def switch(self, name: str, default: bool) -> bool:
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, value, "true or false")
        return value

    def divides(self, name: str, divisor: int, widths: tuple[int, ...]) -> None:
        if bad := [w for w in widths if w % divisor]:
            raise self.refuse(name, divisor, f"a divisor of every width in {list(widths)}; {bad[0]} does not divide")


def unet_config(config: Mapping[str, Any], path: Path, **options) -> UNetConfig:
    """A 2D UNet's config or that of an inflated one: they differ only in the names of the block types."""
    read = _Reader(config, path)
    read.only(_class_name=("UNet2DConditionModel", "UNet3DConditionModel"))
    channels = read.integer("in_channels", 4)
    if channels != 4:
        kinds = {9: " (an inpainting UNet)", 7: " (an upscaling UNet)", 8: " (an image-editing UNet)"}
        raise read.refuse("in_channels", channels, f"4{kinds.get(channels, '')}")
    read.only(
        act_fn="silu",
        addition_embed_type=None,
        center_input_sample=False,
        class_embed_type=None,
        conv_in_kernel=3,
        conv_out_kernel=3,
        downsample_padding=1,
        dual_cross_attention=False,
        encoder_hid_dim=None,
        encoder_hid_dim_type=None,
        freq_shift=(0, 1),
        mid_block_scale_factor=1,
        mid_block_type=("UNetMidBlock2DCrossAttn", "UNetMidBlock3DCrossAttn"),
        num_class_embeds=None,
        only_cross_attention=False,
        resnet_time_scale_shift="default",
        time_cond_proj_dim=None,
        time_embedding_type="positional",
        transformer_layers_per_block=1,
    )
    widths = read.integers("block_out_channels", (320, 640, 1280, 1280))
    if widths[0] < 4:  # of which the time's sinusoids take half
        raise read.refuse("block_out_channels", list(widths), "4 channels or more at the first level")
    attention = {
        f"{way}_attention": _block_types(read, way, len(widths), default)
        for way, default in (("down", (True, True, True, False)), ("up", (False, True, True, True)))
    }
    # Diffusers' `attention_head_dim` is the number of heads; newer configs may say so in `num_attention_heads`.
    name = "num_attention_heads" if config.get("num_attention_heads") is not None else "attention_head_dim"
    same = isinstance(config.get(name, 8), int)
    heads = (read.integer(name, 8),) * len(widths) if same else read.integers(name, ())
    if len(heads) != len(widths):
        raise read.refuse(name, list(heads), f"one number, or one for each of the {len(widths)} levels")
    if bad := [(n, w) for n, w in zip(heads, widths, strict=True) if w % n]:
        raise read.refuse(name, list(heads), f"divisors of the widths; {bad[0][1]} channels make no {bad[0][0]} heads")
    groups = read.integer("norm_num_groups", 32)
    read.divides("norm_num_groups", groups, widths)
    return UNetConfig(
        in_channels=channels,
        out_channels=read.integer("out_channels", 4),
        block_out_channels=widths,
        layers_per_block=read.integer("layers_per_block", 2, LAYERS),
        heads=heads,
        cross_attention_dim=read.integer("cross_attention_dim", 1280),
        norm_num_groups=groups,
        norm_eps=read.number("norm_eps", 1e-5, *EPSILONS),
        use_linear_projection=read.switch("use_linear_projection", False),
        flip_sin_to_cos=read.switch("flip_sin_to_cos", True),
        freq_shift=int(config.get("freq_shift", 0)),
        **attention,
        **options,
    )


def _block_types(read: _Reader, way: str, levels: int, default: tuple[bool, ...]) -> tuple[bool, ...]:
    """Which levels have attention, from `["CrossAttnDownBlock2D", …, "DownBlock2D"]`."""
    name = f"{way}_block_types"
    plain = f"{way.title()}Block"
    types = read.config.get(name)
    if types is None:
        return default
    known = {f"{prefix}{plain}{d}D": bool(prefix) for prefix in ("CrossAttn", "") for d in (2, 3)}
    if not isinstance(types, list) or len(types) != levels or any(str(t) not in known for t in types):
        raise read.refuse(name, types, f"{levels} of CrossAttn{plain}2D and {plain}2D")
    return tuple(known[t] for t in types)


def vae_config(config: Mapping[str, Any], path: Path) -> VAEConfig:
    read = _Reader(config, path)
    read.only(
        _class_name="AutoencoderKL",
        act_fn="silu",
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        mid_block_add_attention=True,
        shift_factor=None,
        use_post_quant_conv=True,
        use_quant_conv=True,
    )
    widths = read.integers("block_out_channels", (128, 256, 512, 512))
    for way, kind in (("down", "DownEncoderBlock2D"), ("up", "UpDecoderBlock2D")):
        types = config.get(f"{way}_block_types", [kind] * len(widths))
        if types != [kind] * len(widths):
            raise read.refuse(f"{way}_block_types", types, f"{len(widths)} times {kind}")
    groups = read.integer("norm_num_groups", 32)
    read.divides("norm_num_groups", groups, widths)
    return VAEConfig(
        block_out_channels=widths,
        layers_per_block=read.integer("layers_per_block", 2, LAYERS),
        norm_num_groups=groups,
        scaling_factor=read.number("scaling_factor", 0.18215, 1e-4, 1e4),
    )


def text_config(config: Mapping[str, Any], path: Path) -> ClipTextConfig:
    read = _Reader(config, path)
    read.only(model_type=("clip_text_model", "clip"), hidden_act=("quick_gelu", "gelu"))
    width, heads = read.integer("hidden_size", 512), read.integer("num_attention_heads", 8)
    if width % heads:
        raise read.refuse("num_attention_heads", heads, f"a divisor of hidden_size, {width}")
    return ClipTextConfig(
        vocab_size=read.integer("vocab_size", 49408, WORDS),
        hidden_size=width,
        intermediate_size=read.integer("intermediate_size", 2048),
        num_hidden_layers=read.integer("num_hidden_layers", 12, TEXT_LAYERS),
        num_attention_heads=heads,
        max_position_embeddings=read.integer("max_position_embeddings", 77),
        hidden_act=config.get("hidden_act", "quick_gelu"),
        layer_norm_eps=read.number("layer_norm_eps", 1e-5, *EPSILONS),
    )

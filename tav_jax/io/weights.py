"""Diffusers' weights ⇄ our NNX modules, both ways, through one strict table of names each way.

Every tensor of a file must have a place, and every place must be filled with a tensor of its shape; what does not fit
is gathered and reported at once. Tensors are read one at a time, straight into their target type.
"""

import functools
import hashlib
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tav_jax.distributed import memory
from tav_jax.errors import InputError, OutOfMemoryError, WeightsError, join_names
from tav_jax.io.diffusers_layout import CONFIGS, Layout
from tav_jax.io.tensor_files import FLOATS, tensors_in
from tav_jax.models import VAE, ClipText, UNet

# Their name → our path. The first row that matches whole decides; a name that no row matches is an error.
_CONV = r"conv(?:\d|_in|_out|_shortcut)?"
_KERNEL, _SCALE, _BIAS = r"\1.kernel", r"\1.scale", r"\1.bias"
READ: dict[str, list[tuple[str, str]]] = {
    "unet": [
        (r"(.+\.ff)\.net\.0\.proj\.weight", r"\1.proj_in.kernel"),
        (r"(.+\.ff)\.net\.0\.proj\.bias", r"\1.proj_in.bias"),
        (r"(.+\.ff)\.net\.2\.weight", r"\1.proj_out.kernel"),
        (r"(.+\.ff)\.net\.2\.bias", r"\1.proj_out.bias"),
        (r"((?:.+\.)?(?:norm\d?|norm_temp|conv_norm_out))\.weight", _SCALE),
        (rf"((?:.+\.)?(?:{_CONV}|linear_\d|proj_in|proj_out|time_emb_proj|to_[qkv]|to_out\.0))\.weight", _KERNEL),
        (r"(.+)\.bias", _BIAS),
    ],
    "vae": [
        # Two generations of names for the attention: query, key, value, proj_attn and to_q, to_k, to_v, to_out.0.
        *((rf"(.+\.attentions\.0)\.{old}\.weight", rf"\1.{new}.kernel") for old, new in
          (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))),
        *((rf"(.+\.attentions\.0)\.{old}\.bias", rf"\1.{new}.bias") for old, new in
          (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))),
        (r"((?:.+\.)?(?:norm\d|group_norm|conv_norm_out))\.weight", _SCALE),
        (rf"((?:.+\.)?(?:{_CONV}|(?:post_)?quant_conv|to_[qkv]|to_out\.0))\.weight", _KERNEL),
        (r"(.+)\.bias", _BIAS),
    ],
    "text_encoder": [
        (r"(?:text_model\.)?(embeddings\.\w+_embedding)\.weight", r"\1.embedding"),
        (r"(?:text_model\.)?(.+layer_norm\d?)\.weight", _SCALE),
        (r"(?:text_model\.)?(encoder\..+\.(?:[qkv]_proj|out_proj|fc[12]))\.weight", _KERNEL),
        (r"(?:text_model\.)?(.+)\.bias", _BIAS),
    ],
}  # fmt: skip

# Our path → their name.
WRITE: dict[str, list[tuple[str, str]]] = {
    "unet": [
        (r"(.+\.ff)\.proj_in\.kernel", r"\1.net.0.proj.weight"),
        (r"(.+\.ff)\.proj_in\.bias", r"\1.net.0.proj.bias"),
        (r"(.+\.ff)\.proj_out\.kernel", r"\1.net.2.weight"),
        (r"(.+\.ff)\.proj_out\.bias", r"\1.net.2.bias"),
        (r"(.+)\.(?:kernel|scale)", r"\1.weight"),
        (r"(.+)\.bias", _BIAS),
    ],
    "vae": [(r"(.+)\.(?:kernel|scale)", r"\1.weight"), (r"(.+)\.bias", _BIAS)],
    "text_encoder": [
        (r"(.+)\.(?:kernel|scale|embedding)", r"text_model.\1.weight"),
        (r"(.+)\.bias", r"text_model.\1.bias"),
    ],
}
OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

# Buffers without weights, and heads that Stable Diffusion does not use.
IGNORED = {"text_encoder": r"(?:text_model\.)?embeddings\.position_ids|text_projection\.weight"}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json"),
)
# What a 2D UNet cannot have: the inflation adds it.
TEMPORAL = re.compile(r".+\.(?:attn_temp|norm_temp)\..+")


def translate(table: list[tuple[str, str]], name: str) -> str | None:
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


@functools.partial(jax.jit, static_argnames=("kernel", "dtype"))
def _place(x: Any, *, kernel: bool, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """A tensor as our modules hold it, and whether all of it is finite there. torch's kernels are (out, in[, height,
    width]), ours ([height, width,] in, out).

    Done on the device: it is several times faster than in numpy, and half-precision files travel as they are.
    """
    if kernel:
        x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
    x = x.astype(dtype)
    return x, jnp.isfinite(x).all()


def to_torch(x: np.ndarray, path: str) -> np.ndarray:
    """The way back, as a view."""
    if not path.endswith(".kernel"):
        return x
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T


def _torch_shape(shape: tuple[int, ...], path: str) -> tuple[int, ...]:
    return to_torch(np.broadcast_to(np.float32(0), shape), path).shape


# ------------------------------------------------------------------------------------------------------- reading


Module = TypeVar("Module", bound=nnx.Module)


class _OneKey:
    """Stands in for `nnx.Rngs` where no number is ever drawn: its count of draws takes seconds under tracing."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract(build: Callable[..., Module], config: Any, dtype: Any) -> Module:
    """The module with shapes in place of arrays."""
    return nnx.eval_shape(lambda: build(config, dtype=dtype, rngs=_OneKey()))


def flat(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


@dataclass
class Components:
    """The networks of one pipeline directory, filled."""

    layout: Layout
    unet: UNet
    vae: VAE
    text_encoder: ClipText
    old_vae_names: bool  # which of the two generations the files used: they are written as they were read
    fingerprint: str  # of every tensor that was read

    @classmethod
    def load(cls, layout: Layout, dtype, *, float32: Callable[..., bool], seed: int = 0) -> "Components":
        """Read every component in `dtype`; the UNet's weights that the filter `float32` picks stay in float32."""
        unet, vae = abstract(UNet, layout.unet, dtype), abstract(VAE, layout.vae, dtype)
        text_encoder = abstract(ClipText, layout.text_encoder, dtype)
        size = sum(x.size for x in jax.tree.leaves((unet, vae, text_encoder))) * jnp.dtype(dtype).itemsize
        if (room := memory.capacity()) is not None and size > room:
            raise OutOfMemoryError(
                f"the weights of {layout.root} take {size / 2**30:.1f} GiB in {jnp.dtype(dtype)} and a device has "
                f"{room / 2**30:.1f}; use a smaller dtype, a smaller model or a machine with more memory"
            )
        digests = fill(
            unet, layout.root, "unet", lambda path: jnp.float32 if float32(path.split("."), None) else dtype, seed
        )
        of_vae = fill(vae, layout.root, "vae", lambda path: dtype)
        digests |= of_vae | fill(text_encoder, layout.root, "text_encoder", lambda path: dtype)
        old_names = any(name.endswith(".proj_attn.weight") for name in of_vae)
        whole = hashlib.blake2b(
            "".join(f"{name} {digests[name]} " for name in sorted(digests)).encode(), digest_size=16
        )
        return cls(layout, unet, vae, text_encoder, old_names, whole.hexdigest())


def fill(module: nnx.Module, root: Path, part: str, dtype_of: Callable[[str], Any], seed: int = 0) -> dict[str, str]:
    """Put the tensors of `root/part` into an abstract module; a 2D UNet gets temporal layers. Gives their digests."""
    state = nnx.state(module)
    places = flat(state)
    unexpected, misshapen, unfit, found = [], [], [], {}
    for tensor in tensors_in(root / part):
        if part in IGNORED and re.fullmatch(IGNORED[part], tensor.name):
            continue
        path = translate(READ[part], tensor.name)
        if path not in places or path in found:
            unexpected.append(tensor.name)
        elif tensor.shape != (expected := _torch_shape(places[path].shape, path)):
            misshapen.append(f"{tensor.name} is {list(tensor.shape)}, expected {list(expected)}")
            found[path] = tensor
        elif tensor.kind not in FLOATS:
            unfit.append(f"{tensor.name} is {tensor.kind}, expected {' or '.join(FLOATS)}")
            found[path] = tensor
        else:
            found[path] = tensor
    missing = [path for path in places if path not in found]
    inflate = part == "unet" and not any(TEMPORAL.fullmatch(path) for path in found)
    if inflate:
        missing = [path for path in missing if not TEMPORAL.fullmatch(path)]
    _report(root / part, [translate(WRITE[part], path) for path in missing], unexpected, misshapen, unfit)

    digests = {}
    for path, place in places.items():
        dtype = dtype_of(path)
        if path in found:
            raw = np.ascontiguousarray(found[path].read())
            digests[found[path].name] = hashlib.blake2b(raw.view(np.uint8).data, digest_size=16).hexdigest()
            # One at a time, or the raw ones would pile up.
            with np.errstate(over="ignore"):  # told below
                array, finite = jax.block_until_ready(_place(raw, kernel=path.endswith(".kernel"), dtype=dtype))
            if not finite:
                raise WeightsError(
                    f"{root / part}: {found[path].name} holds values that are no numbers, or too large for "
                    f"{jnp.dtype(dtype)}; download the component again, or use dtype float32."
                )
            place.set_value(array)
        else:
            place.set_value(fresh_temporal(path, place.shape, seed).astype(dtype))
    nnx.update(module, state)
    return digests


def _report(folder: Path, *lists: list[Any]) -> None:
    """One error that names everything that does not fit."""
    kinds = ("missing", "unexpected", "of a wrong shape", "of a wrong type")
    problems = [f"{len(names)} {kind}: {join_names(names)}" for kind, names in zip(kinds, lists, strict=True) if names]
    if problems:
        raise WeightsError(
            f"{folder}: the tensors do not fit its config.json: {'; '.join(problems)}. Weights and config must be of "
            "the same model: download the component again."
        )


def fresh_temporal(path: str, shape: tuple[int, ...], seed: int) -> jax.Array:
    """A new temporal layer: queries, keys and values as torch draws them, the output zero, so that nothing changes.

    The official code leaves the output's bias at random, so that its first step is not the 2D network; ours is zero.
    """
    if path.endswith("norm_temp.scale"):
        return jnp.ones(shape)
    if not re.fullmatch(r".+\.attn_temp\.to_[qkv]\.kernel", path):
        return jnp.zeros(shape)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
    limit = shape[0] ** -0.5
    return jax.random.uniform(key, shape, minval=-limit, maxval=limit)


# ------------------------------------------------------------------------------------------------------- writing


def torch_tensors(module: nnx.Module, part: str, *, old_vae_names: bool = False) -> dict[str, np.ndarray]:
    """All weights of a module under Diffusers' names, in torch's order of axes."""
    tensors = {}
    for path, leaf in flat(nnx.state(module)).items():
        name = translate(WRITE[part], path)
        if name is None:
            raise AssertionError(f"no row of the table writes {part} {path}")
        if part == "vae" and old_vae_names:
            name = re.sub(
                r"\.attentions\.0\.(to_[qkv]|to_out\.0)\.", lambda m: f".attentions.0.{OLD_VAE_NAMES[m[1]]}.", name
            )
        tensors[name] = np.ascontiguousarray(to_torch(np.asarray(leaf.get_value()), path))
    return tensors


def inflated_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's config as the official code writes it."""
    three = {name: json.loads(json.dumps(config[name]).replace("2D", "3D")) for name in config if "block_type" in name}
    return {**config, **three, "_class_name": "UNet3DConditionModel"}


def check_target(directory: str | Path) -> Path:
    """Nothing is overwritten: the folder must be empty or new."""
    target = Path(directory).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already and is not an empty folder; give another name or remove it first.")
    return target


def save(pipeline: Components, directory: str | Path) -> None:
    """Write a pipeline directory that this code, the official code and (its 2D part) Diffusers read.

    It is written beside its final place and renamed, so that no half of it is ever found there.
    """
    from safetensors.numpy import save_file

    target = check_target(directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    layout = pipeline.layout
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for part in CONFIGS:
            (scratch / part).mkdir()
        # By name: what else a downloaded folder holds, or links to, is nobody's to pass on.
        for file in (layout.root / "tokenizer" / name for name in TOKENIZER_FILES):
            if file.is_file():
                shutil.copyfile(file, scratch / "tokenizer" / file.name)
        for part, config in layout.configs.items():
            if part != "tokenizer":
                _write_json(scratch / part / CONFIGS[part], inflated_config(config) if part == "unet" else config)
        index = {
            "_class_name": "TuneAVideoPipeline",
            "_diffusers_version": "0.11.1",
            "scheduler": ["diffusers", layout.configs["scheduler"].get("_class_name", "DDIMScheduler")],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet3DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        _write_json(scratch / "model_index.json", index)
        for part, module in (("unet", pipeline.unet), ("vae", pipeline.vae), ("text_encoder", pipeline.text_encoder)):
            file = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
            tensors = torch_tensors(module, part, old_vae_names=pipeline.old_vae_names)
            save_file(tensors, scratch / part / file, metadata={"format": "pt"})
        scratch.chmod(0o755)  # mkdtemp's folders are for their owner alone
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    except OSError as error:
        raise InputError(
            f"{target} could not be written ({error.strerror or error}); make room or give another"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # gone already where all went well


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")

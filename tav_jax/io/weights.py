"""Conversion between Diffusers' weights and the NNX modules, with one table of names for each direction.

Every tensor of a file must belong to a variable, and every variable needs a tensor of its shape. All tensors that do
not match are reported together. Tensors are read one at a time and converted to their target dtype.
"""

import functools
import hashlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tav_jax.distributed import memory
from tav_jax.errors import OutOfMemoryError, WeightsError, join_names
from tav_jax.io import lora, single_file
from tav_jax.io.diffusers_layout import Layout
from tav_jax.io.tensor_files import FLOAT_DTYPES, Tensor, iter_tensors
from tav_jax.models import VAE, ClipText, UNet

# The VAE's attention layers: current name → deprecated name.
OLD_VAE_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

# Diffusers' name → path in the module, by the first row whose pattern matches the whole name. Other names are errors.
_CONV = r"conv(?:\d|_in|_out|_shortcut)?"
_KERNEL, _SCALE, _BIAS = r"\1.kernel", r"\1.scale", r"\1.bias"
FROM_DIFFUSERS: dict[str, list[tuple[str, str]]] = {
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
        *((rf"(.+\.attentions\.0)\.{old}\.weight", rf"\1.{new}.kernel") for new, old in OLD_VAE_NAMES.items()),
        *((rf"(.+\.attentions\.0)\.{old}\.bias", rf"\1.{new}.bias") for new, old in OLD_VAE_NAMES.items()),
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
    "clip": [
        (r"(.+\.embeddings\.(?:token|position)_embedding)\.weight", r"\1.embedding"),
        (r"(.+\.(?:layer_norm\d|(?:final_layer|pre_layr|post_layer)_?norm))\.weight", _SCALE),
        (r"(.+\.(?:patch_embedding|[qkv]_proj|out_proj|fc[12])|(?:text|visual)_projection)\.weight", _KERNEL),
        (r"(.+)\.bias", _BIAS),
        (r"(vision_model\.embeddings\.class_embedding|logit_scale)", r"\1"),
    ],
}  # fmt: skip

# Path in the module → Diffusers' name.
TO_DIFFUSERS: dict[str, list[tuple[str, str]]] = {
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
    "clip": [
        (r"(.+)\.(?:kernel|scale|embedding)", r"\1.weight"),
        (r"(.+)", r"\1"),
    ],
}

# Buffers that are not weights, and a projection that Stable Diffusion does not use.
IGNORED = {
    "text_encoder": r"(?:text_model\.)?embeddings\.position_ids|text_projection\.weight",
    "clip": r"(?:text|vision)_model\.embeddings\.position_ids",
}
# Part → its subdirectory, where that has not the name of the part.
SUBDIRECTORIES = {"clip": ""}
# The layers that inflation adds to a 2D UNet.
TEMPORAL = re.compile(r".+\.(?:attn_temp|norm_temp)\..+")


def translate(table: list[tuple[str, str]], name: str) -> str | None:
    """The name by the first row that matches all of it, None if there is none."""
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def from_torch(x: np.ndarray, path: str, dtype: Any) -> jax.Array | None:
    """A tensor in the module's layout and dtype, on the device; None if a value is not finite there.

    Numpy converts it: a jitted function would be compiled for each of the dozens of shapes. The axes are permuted by
    the transfer, because `device_put` reads a transposed view faster than numpy does. torch's kernels are
    (out, in[, height, width]), the module's ([height, width,] in, out).
    """
    with np.errstate(over="ignore"):  # the caller reports an overflow
        x = x.astype(np.float32) if x.dtype == np.float64 else x
        x = x.astype(dtype, copy=False)
    if not np.isfinite(x).all():
        return None
    if path.endswith(".kernel"):
        x = x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T
    return jax.device_put(x)


def to_torch(x: np.ndarray, path: str) -> np.ndarray:
    """The inverse of `from_torch` for the axes, as a view."""
    if not path.endswith(".kernel"):
        return x
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T


Module = TypeVar("Module", bound=nnx.Module)


class _ConstantRngs:
    """In place of `nnx.Rngs` where no random number is used, because tracing its counters takes seconds."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def abstract(build: Callable[..., Module], config: Any, dtype: Any) -> Module:
    """The module with shapes and dtypes in place of arrays."""
    return nnx.eval_shape(lambda: build(config, dtype=dtype, rngs=_ConstantRngs()))


def flat(state: nnx.State) -> dict[str, nnx.Variable]:
    """The variables by their path, with dots between its parts."""
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


@dataclass
class Components:
    """The networks of one pipeline directory, with their weights."""

    layout: Layout
    unet: UNet
    vae: VAE
    text_encoder: ClipText
    old_vae_names: bool  # the VAE's file has the deprecated attention names, which saving uses again
    fingerprint: str  # of all tensors that were read

    @classmethod
    def load(
        cls,
        layout: Layout,
        dtype,
        *,
        float32_filter: Callable[..., bool],
        seed: int = 0,
        variant: str | None = None,
        loras: Sequence[lora.Lora] = (),
    ) -> "Components":
        """Load all components in `dtype`, and the weights of the UNet that `float32_filter` selects in float32."""
        unet, vae = abstract(UNet, layout.unet, dtype), abstract(VAE, layout.vae, dtype)
        text_encoder = abstract(ClipText, layout.text_encoder, dtype)
        size = sum(x.size for x in jax.tree.leaves((unet, vae, text_encoder))) * jnp.dtype(dtype).itemsize
        if (capacity := memory.capacity()) is not None and size > capacity:
            raise OutOfMemoryError(
                f"the weights of {layout.file or layout.root} take {size / 2**30:.1f} GiB in {jnp.dtype(dtype)} and a "
                f"device has {capacity / 2**30:.1f}; use a smaller dtype, a smaller model or a machine with more memory"
            )

        def unet_dtype(path: str) -> Any:
            return jnp.float32 if float32_filter(path.split("."), None) else dtype

        shapes = {
            (part, name): shape
            for part, module in (("unet", unet), ("text_encoder", text_encoder))
            for name, shape in torch_shapes(module, part).items()
        }
        source = Source(layout, variant, lora.match(loras, shapes, layout.unet))
        digests = fill(unet, source, "unet", unet_dtype, seed)
        vae_digests = fill(vae, source, "vae", lambda path: dtype)
        digests |= vae_digests | fill(text_encoder, source, "text_encoder", lambda path: dtype)
        old_vae_names = any(name.endswith(".proj_attn.weight") for name in vae_digests)
        lines = "".join(f"{name} {digests[name]} " for name in sorted(digests))
        fingerprint = hashlib.blake2b(lines.encode(), digest_size=16).hexdigest()
        return cls(layout, unet, vae, text_encoder, old_vae_names, fingerprint)


def torch_shapes(module: nnx.Module, part: str) -> dict[str, tuple[int, ...]]:
    """Diffusers' names of the kernels that a 2D pipeline has → their shapes in torch."""
    shapes = {path: variable.shape for path, variable in flat(nnx.state(module)).items() if path.endswith(".kernel")}
    shapes = {path: to_torch(np.broadcast_to(0.0, shape), path).shape for path, shape in shapes.items()}
    return {diffusers_name(part, path): s for path, s in shapes.items() if not TEMPORAL.fullmatch(path)}


def diffusers_name(part: str, path: str) -> str:
    name = translate(TO_DIFFUSERS[part], path)
    assert name is not None, f"TO_DIFFUSERS has no row for {part} {path}"
    return name


class Files(NamedTuple):
    """A directory with weights that is not a pipeline."""

    root: Path
    file: None = None


@dataclass(frozen=True)
class Source:
    """Where the tensors of a pipeline are: in a directory or a single file, with LoRA updates for some of them."""

    layout: Layout | Files
    variant: str | None = None
    updates: Mapping[tuple[str, str], Sequence[lora.Update]] = field(default_factory=dict)

    def tensors(self, part: str, names: Sequence[str]) -> Iterator[Tensor]:
        if self.layout.file is None:
            return iter_tensors(self.place(part), self.variant)
        return single_file.iter_component(self.layout, part, names)

    def problem(self, part: str, problems: Mapping[str, list[str]]) -> WeightsError:
        listed = "; ".join(f"{len(names)} {kind}: {join_names(names)}" for kind, names in problems.items() if names)
        if self.layout.file is None:
            return WeightsError(
                f"{self.place(part)}: the tensors do not match config.json: {listed}. Weights and config must be from "
                "the same model: download the component again."
            )
        return WeightsError(
            f"{self.layout.file}: the tensors do not match the {single_file.PARTS[part]} of the config: {listed}. "
            "Download the file again, or give the config of this model (config: model.config)."
        )

    def place(self, part: str) -> Path:
        return self.layout.file or self.layout.root / SUBDIRECTORIES.get(part, part)

    def names(self, part: str, paths: Sequence[str]) -> list[str]:
        """The names in the file of the tensors that it lacks."""
        names = [diffusers_name(part, path) for path in paths]
        return names if self.layout.file is None else single_file.names_in_file(self.layout, part, names)


def fill(
    module: nnx.Module, source: Source, part: str, dtype_of: Callable[[str], Any], seed: int = 0
) -> dict[str, str]:
    """Load the tensors of a component into an abstract module, and initialize the temporal layers of a 2D UNet.

    Returns the digest of each tensor by its name in the file.
    """
    state = nnx.state(module)
    variables = flat(state)
    names = {path: diffusers_name(part, path) for path in variables}
    unexpected, wrong_shape, wrong_dtype, found = [], [], [], {}
    for tensor in source.tensors(part, list(names.values())):
        if part in IGNORED and re.fullmatch(IGNORED[part], tensor.name):
            continue
        path, name = translate(FROM_DIFFUSERS[part], tensor.name), tensor.origin or tensor.name
        if path not in variables or path in found:
            unexpected.append(name)
            continue
        found[path] = tensor
        if tensor.shape != (expected := to_torch(np.broadcast_to(0.0, variables[path].shape), path).shape):
            wrong_shape.append(f"{name} is {list(tensor.shape)}, expected {list(expected)}")
        elif tensor.dtype not in FLOAT_DTYPES:
            wrong_dtype.append(f"{name} is {tensor.dtype}, expected {' or '.join(FLOAT_DTYPES)}")
    missing = [path for path in variables if path not in found]
    if part == "unet" and not any(TEMPORAL.fullmatch(path) for path in found):  # a 2D UNet
        missing = [path for path in missing if not TEMPORAL.fullmatch(path)]
    problems = {
        "missing": source.names(part, missing),
        "unexpected": unexpected,
        "of a wrong shape": wrong_shape,
        "of a wrong dtype": wrong_dtype,
    }
    if any(problems.values()):
        raise source.problem(part, problems)

    digests = {}
    for path, tensor in found.items():
        dtype, raw = dtype_of(path), np.ascontiguousarray(tensor.read())
        digest = hashlib.blake2b(raw.view(np.uint8).data, digest_size=16)
        if updates := source.updates.get((part, names[path])):
            raw = lora.merge(raw, updates, digest)
        digests[tensor.name] = digest.hexdigest()
        # Waiting for each tensor bounds memory: the transfer is asynchronous, and the raw arrays would accumulate.
        array = jax.block_until_ready(from_torch(raw.reshape(tensor.shape), path, dtype))
        if array is None:
            raise WeightsError(
                f"{source.place(part)}: {tensor.origin or tensor.name} has values that are NaN, infinite or too large "
                f"for {jnp.dtype(dtype)}; download the component again, or use dtype float32."
            )
        variables[path].set_value(array)
    new = {path: variable for path, variable in variables.items() if path not in found}
    for path, value in init_temporal({path: variable.shape for path, variable in new.items()}, seed).items():
        new[path].set_value(jax.device_put(value.astype(dtype_of(path))))
    nnx.update(module, state)
    return digests


def init_temporal(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Initial values of temporal layers: uniform within ±1/√fan_in for queries, keys and values, zero for the output.

    The inflated UNet then equals the 2D UNet on each frame. The official code initializes the output's bias at random.
    """
    values = {path: np.full(shape, path.endswith("norm_temp.scale"), np.float32) for path, shape in shapes.items()}
    projections = {path: s for path, s in shapes.items() if re.fullmatch(r".+\.attn_temp\.to_[qkv]\.kernel", path)}
    if projections:
        hashes = np.array([zlib.crc32(path.encode()) for path in projections], np.uint32)
        arrays = _uniform(np.uint32(seed), hashes, tuple(projections.values()))
        values |= zip(projections, map(np.asarray, arrays), strict=True)
    return values


@functools.partial(jax.jit, static_argnames=("shapes",))
def _uniform(seed: Any, hashes: Any, shapes: tuple[tuple[int, ...], ...]) -> list[jax.Array]:
    """An array for each shape, uniform within ±1/√fan_in, in one program. Hashes are folded into the key."""
    key, arrays = jax.random.key(seed), {}
    for shape in sorted(set(shapes)):  # one operation for the arrays of a shape: it compiles in less time
        rows, limit = np.flatnonzero([other == shape for other in shapes]), shape[0] ** -0.5
        keys = jax.vmap(lambda data: jax.random.fold_in(key, data))(hashes[rows])
        uniform = functools.partial(jax.random.uniform, shape=shape, minval=-limit, maxval=limit)
        arrays |= zip(rows.tolist(), jax.vmap(uniform)(keys), strict=True)
    return [arrays[row] for row in range(len(shapes))]


def torch_tensors(module: nnx.Module, part: str, *, old_vae_names: bool = False) -> dict[str, np.ndarray]:
    """All weights of a module under Diffusers' names, with torch's order of axes."""
    tensors = {}
    for path, leaf in flat(nnx.state(module)).items():
        name = diffusers_name(part, path)
        for new, old in OLD_VAE_NAMES.items() if part == "vae" and old_vae_names else ():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        tensors[name] = np.ascontiguousarray(to_torch(np.asarray(leaf.get_value()), path))
    return tensors

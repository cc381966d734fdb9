"""The tensors of one pipeline component or one file, one at a time, from any of the file formats in use.

Formats: safetensors, sharded safetensors with an index, their `.fp16.` variants, and files of `torch.save` (`.bin`,
`.ckpt`) through torch's `weights_only` loader, which executes no code. The header of a file is validated before any of
its tensors is read.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from tav_jax.errors import InputError, MissingError, WeightsError, install_command, join_names, short_repr

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
MAX_HEADER = MAX_INDEX = 10 << 20  # bytes; at most 0.1 MB in Stable Diffusion, and safetensors accepts 100 MB
MAX_DIMENSIONS, MAX_ELEMENTS = 8, 2**48
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")  # allowed for weights
MAX_MAPPED = 128 << 20  # bytes that are read from a torch file before it is mapped anew
# The checkpoints of Stable Diffusion 1.4 contain the name of this class. It is not imported.
CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class Tensor(NamedTuple):
    """A named tensor that is read on request."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # in the notation of safetensors
    read: Callable[[], np.ndarray]
    origin: str = ""  # its name in the file, if `name` is another


def iter_tensors(directory: Path, variant: str | None = None) -> Iterator[Tensor]:
    """All tensors of a component. Without a `variant`, full precision is preferred to `.fp16.`, and safetensors to
    `.bin`."""
    for suffix, reader in ((".safetensors", _iter_safetensors), (".bin", _iter_torch)):
        for middle in (f".{variant}",) if variant else ("", ".fp16"):
            for stem in STEMS:
                single = directory / f"{stem}{middle}{suffix}"
                # Both spellings are in use: Diffusers puts the variant last, other tools put it after the stem.
                indices = (f"{stem}{suffix}.index{middle}.json", f"{stem}{middle}{suffix}.index.json")
                index = next((directory / name for name in indices if (directory / name).is_file()), None)
                if single.is_file():
                    return reader([single])
                if index is not None:
                    return reader(_shards(index))
    if variant:
        raise MissingError(f"{directory} contains no weights of the variant {variant!r}; use another, or no variant")
    stem = STEMS[directory.name not in ("unet", "vae")]
    raise MissingError(
        f"{directory} contains no weights: expected {stem}.safetensors, its sharded or .fp16 form, or a .bin file. "
        "Download the component again."
    )


def parse_json(text: bytes) -> Any:
    """Parse untrusted JSON. Every defect raises a ValueError, including deep nesting and duplicate names."""

    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            ((duplicate, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"duplicate name {short_repr(duplicate)}")
        return table

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=reject_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def load_json(path: Path, max_bytes: int) -> Any:
    with path.open("rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise ValueError(f"it is larger than {max_bytes >> 20} MiB")
    return parse_json(text)


def _shards(index: Path) -> list[Path]:
    """The files named in an index. They must be in its directory, but may be symbolic links, as in the hub's cache."""
    try:
        files = list(load_json(index, MAX_INDEX)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise WeightsError(f"{index} is not an index of weight files ({_reason(error)}); download it again.") from error
    if not files:
        raise WeightsError(f"{index} names no file; download it again.")
    for n in files:
        if not isinstance(n, str) or Path(n).name != n or n in ("", "..") or len(n) > 255 or "\0" in n:
            problem = f"names {short_repr(n)}, which is not a file beside it"
            raise WeightsError(f"{index} {problem}; download the component again.")
    shards = [index.parent / name for name in sorted(set(files))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise MissingError(f"{index.parent} lacks {join_names(missing)}, named by {index.name}; download them.")
    return shards


def _reason(error: Exception) -> str:
    """The message of another library's error, on one line and shortened."""
    return join_names([str(error).removeprefix("Error while deserializing header: ") or type(error).__name__])


def unreadable(file: Path) -> InputError:
    return InputError(f"{file} is not readable; change its permissions")


def _iter_safetensors(files: list[Path]) -> Iterator[Tensor]:
    for file in files:
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if length > MAX_HEADER:
                    raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER}")
                with safe_open(file, framework="np") as handle:
                    slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
                    tensors = [(name, tuple(x.get_shape()), x.get_dtype()) for name, x in slices.items()]
                _check_header(parse_json(stream.read(length)))
        except PermissionError as error:
            raise unreadable(file) from error
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"{file} is truncated or not a valid safetensors file ({_reason(error)}); download it again."
            ) from error
        for name, shape, dtype in tensors:
            yield Tensor(name, shape, dtype, partial(_read_safetensor, file, name))


def _read_safetensor(file: Path, name: str) -> np.ndarray:
    # The file is opened for each tensor: a memory mapping that stays open keeps every page that was read resident,
    # which would double the peak while a large model loads.
    try:
        with safe_open(file, framework="np") as handle:
            return handle.get_tensor(name)
    except PermissionError as error:
        raise unreadable(file) from error
    except (SafetensorError, OSError, ValueError) as error:  # for example, the file was replaced
        raise WeightsError(f"{file} could not be read ({_reason(error)}); download it again.") from error


def _check_header(header: dict[str, Any]) -> None:
    """Refuse what safetensors reads but other readers may not read alike: lists as entries, objects as dtypes, and
    shapes that no array can have. Unknown fields of an entry are ignored, as in every reader."""
    header.pop("__metadata__", None)
    for name, entry in header.items():
        fields = set(entry) if isinstance(entry, dict) else set()
        if not fields >= {"dtype", "shape", "data_offsets"} or not isinstance(entry["dtype"], str):
            raise ValueError(f"expected an object with dtype, shape and data_offsets for tensor {short_repr(name)}")
        if (dimensions := len(entry["shape"])) > MAX_DIMENSIONS:
            raise ValueError(f"{dimensions} dimensions, more than {MAX_DIMENSIONS}, for tensor {short_repr(name)}")
        if math.prod(size or 1 for size in entry["shape"]) > MAX_ELEMENTS:  # also of an array without elements
            raise ValueError(f"the shape {entry['shape']} is too large for tensor {short_repr(name)}")


def iter_file(file: Path) -> Iterator[Tensor]:
    """All tensors of one file. Its first bytes decide the format: `.ckpt` files may be safetensors."""
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
    except PermissionError as error:
        raise unreadable(file) from error
    is_safetensors = head[8:] == b"{"
    if not is_safetensors and head.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive or a bare pickle
        if file.suffix == ".safetensors":
            raise WeightsError(
                f"{file} is named .safetensors and is a file of torch.save, which was not read. Download the "
                "safetensors file, or rename it to .ckpt."
            )
        return _iter_torch([file])
    if file.suffix != ".safetensors" and not is_safetensors:
        raise WeightsError(
            f"{file} is neither a safetensors file nor one of torch.save (it begins with {head[:8]!r}); download it "
            "again."
        )
    return _iter_safetensors([file])


def metadata(file: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file that `iter_file` has read; of another file, none."""
    try:
        with safe_open(file, framework="np") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _iter_torch(files: list[Path]) -> Iterator[Tensor]:
    for file in files:
        weights = _TorchFile(file)
        for name, (shape, dtype) in weights.entries.items():
            yield Tensor(name, shape, dtype, partial(weights.read, name))


class _TorchFile:
    """A file of `torch.save`. It is mapped into memory, so that only the tensors that are read take memory."""

    def __init__(self, file: Path):
        try:
            import torch  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MissingError(
                f"{file} is a torch file and torch is not installed. Use the safetensors files of the same model, or "
                f"`{install_command('torch')}`."
            ) from error
        dtypes = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
        self.file, self.torch = file, torch
        self.table, self.bytes_read = self._load(), 0
        self.entries = {n: (tuple(x.shape), dtypes.get(x.dtype, str(x.dtype))) for n, x in self.table.items()}

    def _load(self) -> dict[str, Any]:
        torch = self.torch
        options = {"map_location": "cpu", "weights_only": True}
        try:
            with torch.serialization.safe_globals([(object, CALLBACK)]), self.file.open("rb") as stream:
                # Only archives can be mapped; files of torch before 1.6 are none.
                weights = torch.load(self.file, mmap=stream.read(2) == b"PK", **options)
        except PermissionError as error:
            raise unreadable(self.file) from error
        except Exception as error:  # an unpickling, zip or end-of-file error
            raise WeightsError(
                f"{self.file} is damaged, or a pickle of other objects than tensors; it was not executed. Use the "
                "safetensors files of the same model."
            ) from error
        if isinstance(weights, dict) and "string_to_param" in weights:
            raise WeightsError(f"{self.file} is a textual inversion embedding, which is not supported; give a model.")
        if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):  # of PyTorch Lightning
            weights = weights["state_dict"]
        if not isinstance(weights, dict) or not all(isinstance(k, str) and self._dense(v) for k, v in weights.items()):
            raise WeightsError(
                f"{self.file} is not a table of named tensors; use the safetensors files of the same model."
            )
        return weights

    def _dense(self, value: Any) -> bool:
        torch = self.torch
        return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"

    def read(self, name: str) -> np.ndarray:
        if self.bytes_read > MAX_MAPPED:  # a mapping keeps every page that was read resident
            self.table, self.bytes_read = self._load(), 0
        value = self.table[name].detach()
        self.bytes_read += value.nbytes
        if value.dtype == self.torch.bfloat16:  # which torch does not convert
            return value.contiguous().view(self.torch.uint16).numpy().view(ml_dtypes.bfloat16).copy()
        return value.numpy().copy()

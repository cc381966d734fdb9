"""The tensors of one component's folder, one at a time, whatever files they lie in.

Safetensors, sharded safetensors with an index, `.fp16.` variants, and `.bin` through torch's `weights_only` loader. A
pickle is never executed. What a file says of itself is checked before any of it is believed: the shapes, types and
places of all tensors are known, and known to fit the file, before the first is read.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tav_jax.errors import MissingError, WeightsError, join_names, short_repr

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
HEADER = 10 << 20  # bytes; Stable Diffusion's largest header has 0.1 MB
INDEX = 10 << 20  # likewise
BITS = {  # of the types that a safetensors header may name
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **{"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4},
}
FLOATS = ("F64", "F32", "F16", "BF16")  # of which weights may be


class Tensor(NamedTuple):
    """A named tensor that is read only when asked for."""

    name: str
    shape: tuple[int, ...]
    kind: str  # as safetensors calls its type; one of FLOATS can be a weight
    read: Callable[[], np.ndarray]


def tensors_in(folder: Path) -> Iterator[Tensor]:
    """All tensors of a component. Full precision is preferred to `.fp16.`, safetensors to `.bin`."""
    for suffix, reader in ((".safetensors", _safetensors), (".bin", _bin)):
        for variant in ("", ".fp16"):
            for stem in STEMS:
                whole = folder / f"{stem}{variant}{suffix}"
                # Both spellings are in use: Diffusers puts the variant last, other tools put it after the stem.
                indices = (f"{stem}{suffix}.index{variant}.json", f"{stem}{variant}{suffix}.index.json")
                index = next((folder / name for name in indices if (folder / name).is_file()), None)
                if whole.is_file():
                    return reader([whole])
                if index is not None:
                    return reader(_shards(index))
    raise MissingError(
        f"{folder} holds no weights: expected {STEMS[folder.name == 'text_encoder']}.safetensors, its sharded or .fp16 "
        "form, or a .bin file. Download the component again."
    )


def parse(text: bytes) -> Any:
    """Foreign JSON; whatever is wrong with it is a ValueError, deep nesting and names that are given twice included."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen = set()
            again = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"{short_repr(again)} is given twice")
        return found

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=table)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _shards(index: Path) -> list[Path]:
    try:
        with index.open("rb") as file:
            text = file.read(INDEX + 1)
        if len(text) > INDEX:
            raise ValueError(f"it has more than {INDEX >> 20} MiB")
        table = parse(text)["weight_map"]
        names = sorted({name for name in table.values() if isinstance(name, str)})
        if bad := [name for name in table.values() if not isinstance(name, str)]:
            raise ValueError(f"{short_repr(bad[0])} is no file's name")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise WeightsError(f"{index} is not an index of weight files ({_told(error)}); download it again.") from error
    if not names:
        raise WeightsError(f"{index} names no file; download it again.")
    # Only what lies beside the index is read. A link there is the user's own, as in the hub's cache.
    if outside := [n for n in names if Path(n).name != n or n in ("", ".", "..") or len(n) > 255 or "\0" in n]:
        raise WeightsError(
            f"{index} names {short_repr(outside[0])}, which is not a file beside it; download the component again."
        )
    if absent := [n for n in names if not (index.parent / n).is_file()]:
        raise MissingError(f"{index.parent} lacks {join_names(absent)}, named by {index.name}; download them.")
    return [index.parent / n for n in names]


def _told(error: Exception) -> str:
    return short_repr(str(error) or type(error).__name__)[1:-1]


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (type, shape) of every tensor; a ValueError says where the header contradicts itself or the file.

    The tensors lie one after another behind the header and fill the file to its end.
    """
    whole = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise ValueError(f"it has {whole} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > HEADER:
            raise ValueError(f"its header claims {length} bytes, more than {HEADER}")
        if 8 + length > whole:
            raise ValueError(f"its header claims {length} bytes and the file has {whole}")
        table = parse(stream.read(length))
    if not isinstance(table, dict):
        raise ValueError(f"its header is a {type(table).__name__}")
    table.pop("__metadata__", None)
    found, places = {}, []
    for name, entry in table.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{short_repr(name)} has not just a dtype, a shape and data_offsets")
        kind, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(kind, str) or kind not in BITS:
            raise ValueError(f"{short_repr(name)} is of the unknown type {short_repr(kind)}")
        if not _counts(shape) or len(shape) > 8:
            raise ValueError(f"{short_repr(name)} has the shape {short_repr(shape)}")
        if not _counts(place) or len(place) != 2:
            raise ValueError(f"{short_repr(name)} lies at {short_repr(place)}")
        if 8 * (place[1] - place[0]) != math.prod(shape) * BITS[kind]:
            raise ValueError(
                f"{short_repr(name)} is {kind} {short_repr(shape)} in {short_repr(place[1] - place[0])} bytes"
            )
        found[name] = kind, tuple(shape)
        places.append((place[0], place[1], name))
    end = 0
    for first, last, name in sorted(places):
        if first != end:
            raise ValueError(f"{short_repr(name)} begins at {short_repr(first)} where {short_repr(end)} was due")
        end = last
    if 8 + length + end != whole:
        raise ValueError(f"its tensors end at {short_repr(8 + length + end)} and the file at {whole}")
    return found


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _safetensors(files: list[Path]) -> Iterator[Tensor]:
    from safetensors import SafetensorError, safe_open

    def reader(file: Path, name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            # Opened anew for every tensor: a mapping that stays open keeps every page that was ever read in memory,
            # which would double the peak while a large model loads.
            try:
                with safe_open(file, framework="np") as handle:
                    return handle.get_tensor(name)
            except (SafetensorError, OSError) as error:  # the file is another one by now
                raise WeightsError(f"{file} could not be read ({_told(error)}); download it again.") from error

        return read

    for file in files:
        try:
            tensors = _header(file)
            with safe_open(file, framework="np") as handle:
                if set(handle.keys()) != set(tensors):
                    raise ValueError("its names are read in two ways")
        except (SafetensorError, OSError, ValueError) as error:
            raise WeightsError(
                f"{file} is truncated or not a safetensors file ({_told(error)}); download it again."
            ) from error
        for name, (kind, shape) in tensors.items():
            yield Tensor(name, shape, kind, reader(file, name))


def _bin(files: list[Path]) -> Iterator[Tensor]:
    try:
        import torch
    except ImportError as error:
        raise MissingError(
            f"{files[0]} is a torch file and torch is not installed. Use the safetensors files of the same model, or "
            "`pip install 'tav_jax[torch]'`."
        ) from error

    def as_numpy(value) -> np.ndarray:
        if value.dtype == torch.bfloat16:
            import ml_dtypes

            return value.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()

    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

    for file in files:
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # an unpickling, zip or end-of-file error: each means that the file is not plain weights
            raise WeightsError(
                f"{file} is damaged, or a pickle with more in it than plain weights; it was not executed. Use the "
                "safetensors files of the same model."
            ) from error
        if not isinstance(weights, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) and v.layout == torch.strided and v.device.type == "cpu"
            for k, v in weights.items()
        ):
            raise WeightsError(f"{file} is not a table of named tensors; use the safetensors files of the same model.")
        for name, value in weights.items():
            kind = kinds.get(value.dtype, str(value.dtype))
            yield Tensor(name, tuple(value.shape), kind, lambda value=value: as_numpy(value.detach()))

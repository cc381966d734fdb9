"""The tensors of one component's folder, one at a time, whatever files they lie in.

Safetensors, sharded safetensors with an index, `.fp16.` variants, and `.bin` through torch's `weights_only` loader. A
pickle is never executed.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tav_jax.errors import MissingError, WeightsError

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")


class Tensor(NamedTuple):
    """A named tensor that is read only when asked for."""

    name: str
    shape: tuple[int, ...]
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


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not an index of weight files; download it again.") from error
    if outside := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
        raise WeightsError(
            f"{index} names {outside[0]!r}, which is not a file beside it; download the component again."
        )
    if absent := [n for n in names if not (index.parent / n).is_file()]:
        raise MissingError(f"{index.parent} lacks {', '.join(absent)}, named by {index.name}; download them.")
    return [index.parent / n for n in names]


def _safetensors(files: list[Path]) -> Iterator[Tensor]:
    from safetensors import SafetensorError, safe_open

    def reader(file: Path, name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            # Opened anew for every tensor: a mapping that stays open keeps every page that was ever read in memory,
            # which would double the peak while a large model loads.
            with safe_open(file, framework="np") as handle:
                return handle.get_tensor(name)

        return read

    for file in files:
        try:
            with safe_open(file, framework="np") as handle:
                shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file} is truncated or not a safetensors file ({error}); download it again."
            ) from error
        for name, shape in shapes.items():
            yield Tensor(name, shape, reader(file, name))


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

            return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return value.numpy()

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
        if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
            raise WeightsError(f"{file} is not a table of named tensors; use the safetensors files of the same model.")
        for name, value in weights.items():
            yield Tensor(name, tuple(value.shape), lambda value=value: as_numpy(value))

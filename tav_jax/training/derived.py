"""Files of a run that can be made again: logs and caches. A damaged one never ends a run."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy

from tav_jax.errors import InputError
from tav_jax.io import paths
from tav_jax.training.run_directory import RunDirectory

MAX_HEADER = 4096  # bytes of a cached array's file other than its values


def read_object(directory: RunDirectory, name: str, log: Callable[[str], None]) -> dict[str, Any]:
    """A JSON object; empty if there is none. A file that is something else is set aside."""
    try:
        value = json.loads(directory.read(name) or "{}")
        if isinstance(value, dict):
            return value
        problem = f"is a JSON {type(value).__name__}, not an object"
    except InputError as error:
        problem = _problem(error, directory, name)
    except (ValueError, RecursionError):
        problem = "is not readable JSON"
    log(directory.set_aside(name, problem))
    return {}


def read_steps(directory: RunDirectory, name: str, last: int, log: Callable[[str], None]) -> list[str]:
    """The lines of a JSON-lines log up to the step `last`. A kill leaves an incomplete last line, which is dropped. A
    file with other damage is set aside, and the intact lines are returned."""
    try:
        lines = (directory.read(name) or "").split("\n")
    except InputError as error:
        log(directory.set_aside(name, _problem(error, directory, name)))
        return []
    steps = [step_of_line(line) for line in lines]
    if damaged := [number for number, step in enumerate(steps[:-1], 1) if step == float("inf")]:
        log(directory.set_aside(name, f"is damaged in line {damaged[0]}"))
    return [line for line, step in zip(lines, steps, strict=True) if step <= last]


def step_of_line(line: str) -> float:
    """Infinity for an incomplete or damaged line."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")


def _problem(error: InputError, directory: RunDirectory, name: str) -> str:
    return str(error).partition(";")[0].removeprefix(f"{directory / name} ")


def write_array(directory: RunDirectory, name: str, array: np.ndarray) -> None:
    digest = np.frombuffer(_digest(array), np.uint8)
    with directory.writing(name) as scratch:
        safetensors.numpy.save_file({"array": np.ascontiguousarray(array), "digest": digest}, scratch)


def read_array(directory: RunDirectory, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray | None:
    """A cached array; None if there is none, or if the file is damaged or has another shape or dtype."""
    try:
        data = paths.read_file(directory / name, int(np.prod(shape)) * np.dtype(dtype).itemsize + MAX_HEADER)
        tensors = safetensors.numpy.load(data) if data is not None else {}
    except (InputError, ValueError, safetensors.SafetensorError):
        return None
    array, digest = tensors.get("array"), tensors.get("digest")
    if array is None or digest is None or array.shape != shape or array.dtype != dtype:
        return None
    return array if digest.tobytes() == _digest(array) else None


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).digest()

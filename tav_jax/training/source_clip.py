"""The identity of a run's clip: another file with the same name is refused, a moved file is accepted.

Each checkpoint records the clip that it was trained on. Clips are equal if their decoded frames are, or their files:
another version of the decoder may round differently.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tav_jax.errors import InputError
from tav_jax.io.single_file import is_single_file
from tav_jax.io.video import Clip

BLOCK = 1 << 22  # bytes


def absolute(path: str) -> str:
    """A local path that is valid in every working directory. URLs and the empty path are returned unchanged."""
    return path if not path or "://" in path else os.path.abspath(os.path.expanduser(path))


def absolute_model(model: Any) -> dict[str, Any]:
    """The files of the section `model` as absolute paths. Directories and hub ids in `path` are kept as they are."""
    path = absolute(model.path) if is_single_file(model.path) else model.path
    config = absolute(model.config) if os.path.isdir(os.path.expanduser(model.config)) else model.config
    return {"path": path, "config": config, "lora": tuple(absolute(item) for item in model.lora)}


def frames_digest(clip: Clip) -> str:
    return hashlib.blake2b(clip.frames.tobytes(), digest_size=16).hexdigest()


def describe(clip: Clip, path: str) -> dict[str, Any]:
    """The record of a clip. `file` is None for a clip in a bucket."""
    return {"path": path, "size": list(clip.frames.shape[:3]), "frames": frames_digest(clip), "file": _file(path)}


def check(recorded: Mapping[str, Any] | None, clip: Clip, path: str, fix: str) -> str | None:
    """Refuse a clip that is not the recorded one. Returns a note if the same file is decoded to other frames. Runs of
    early versions have no record."""
    if not recorded or frames_digest(clip) == recorded["frames"]:
        return None
    found = describe(clip, path)
    if found["file"] and found["file"] == recorded["file"]:
        return f"{path} is decoded to other frames here than when the run began, by other versions or another machine."
    raise InputError(
        f"{path} ({_text(found)}) is not the clip that this run was tuned on, {recorded['path']} ({_text(recorded)}); "
        f"{fix}"
    )


def _text(record: Mapping[str, Any]) -> str:
    frames, height, width = record["size"]
    size = f", {record['file']['bytes']} bytes" if record["file"] else ""
    return f"{frames} frames of {height}×{width} with digest {record['frames'][:12]}{size}"


def _file(path: str) -> dict[str, Any] | None:
    """The size and digest of a file, or of all files in a directory of images."""
    if "://" in path:
        return None
    files = sorted(file for file in Path(path).iterdir() if file.is_file()) if os.path.isdir(path) else [Path(path)]
    digest, size = hashlib.blake2b(digest_size=16), 0
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
                size += len(block)
    return {"bytes": size, "digest": digest.hexdigest()}

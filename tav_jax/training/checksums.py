"""Checksums of a checkpoint's files, written just before Orbax gives the checkpoint its final name.

Orbax gives a checkpoint its name only when it is complete. But not every flipped bit is detected when Orbax reads a
file, and after a power failure a directory can exist without its contents. So checkpoints are verified before use.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from tav_jax.errors import WeightsError

FILE = "checksums.json"
METADATA = "_CHECKPOINT_METADATA"  # written by Orbax, which adds the time of the commit after the checksums
EXCLUDED = (FILE, "commit_success.txt")  # written after the checksums
BLOCK = 1 << 22  # bytes


class Examination(NamedTuple):
    newest: int | None  # the step of the newest intact checkpoint
    damaged: list[tuple[int, str]]  # the steps of newer checkpoints, and the reasons


def write(checkpoint: Any) -> None:
    """Write the checksums of a finished checkpoint."""
    text = json.dumps({name: _hash(file) for name, file in _files(checkpoint)}, indent=1) + "\n"
    (checkpoint / FILE).write_text(text)
    if "://" not in str(checkpoint):
        with (checkpoint / FILE).open("rb") as written:
            os.fsync(written.fileno())


def damage(checkpoint: Any) -> str | None:
    """The reason why a checkpoint is damaged; None if it is intact."""
    try:
        expected = dict(json.loads((checkpoint / FILE).read_text()).items())
    except FileNotFoundError:
        return f"{FILE} is missing"
    except (OSError, ValueError, AttributeError):
        return f"{FILE} cannot be read"
    files = dict(_files(checkpoint))
    for name, value in expected.items():
        if name not in files:
            return f"{name} is missing"
        try:
            if _hash(files[name]) != value:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def examine(directory: Any) -> Examination:
    """Find the newest intact checkpoint. If there is none, use the newest without checksums, which early versions did
    not write. Damage to that one is found only when Orbax reads it."""
    damaged: list[tuple[int, str]] = []
    names = [x.name for x in directory.iterdir() if x.is_dir()] if directory.exists() else []
    steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)  # unfinished ones have longer names
    for step in steps:
        if (reason := damage(directory / str(step))) is None:
            return Examination(step, damaged)
        damaged.append((step, reason))
    for i, step in enumerate(steps):
        if not (directory / str(step) / FILE).exists():
            return Examination(step, damaged[:i])
    if damaged:
        reasons = "; ".join(f"step {step}, {reason}" for step, reason in damaged)
        raise WeightsError(
            f"every checkpoint in {directory} is damaged: {reasons}. Nothing was changed. Restore one from a copy, or "
            "start again in another --workdir."
        )
    return Examination(None, [])


def rename_damaged(directory: Any, step: int) -> str:
    """Rename a damaged checkpoint, so that its step can be saved again. Returns the new name."""
    names = (f"{step}.damaged{'' if n == 1 else f'-{n}'}" for n in range(1, 10_000))
    name = next(name for name in names if not (directory / name).exists())
    (directory / str(step)).rename(directory / name)
    return name


def _files(directory: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in sorted(directory.iterdir(), key=lambda x: x.name):
        if item.is_dir():
            yield from _files(item, f"{prefix}{item.name}/")
        elif item.name not in EXCLUDED:
            yield prefix + item.name, item


def _hash(file: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if file.name == METADATA:
        try:
            metadata = json.loads(file.read_text())
            digest.update(json.dumps({**metadata, "commit_timestamp_nsecs": None}, sort_keys=True).encode())
        except (ValueError, TypeError):
            digest.update(b"damaged")  # equal to no other checksum
        return digest.hexdigest()
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()

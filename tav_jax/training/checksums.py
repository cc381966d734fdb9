"""Checksums of a checkpoint's files, written just before Orbax gives the checkpoint its final name.

Orbax gives a checkpoint its name only when it is complete. But not every flipped bit is detected when Orbax reads a
file, and after a power failure a directory can exist without its contents. So checkpoints are verified before use.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from tav_jax.errors import InputError, WeightsError
from tav_jax.io import paths

FILE = "checksums.json"
METADATA = "_CHECKPOINT_METADATA"  # written by Orbax, which adds the time of the commit after the checksums
STEP_FILE = "metadata/metadata"  # JSON with the step
EXCLUDED = (FILE, "commit_success.txt")  # written after the checksums
STEP = re.compile("0|[1-9][0-9]{0,17}")
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
        if (text := paths.read_text(checkpoint / FILE)) is None:
            return f"{FILE} is missing"
        expected, files = dict(json.loads(text).items()), dict(_files(checkpoint))
    except (InputError, OSError, ValueError, AttributeError, RecursionError):
        return f"{FILE} cannot be read"
    for name in (*expected, STEP_FILE):
        if name not in files:
            return f"{name} is missing"
    for name, file in files.items():
        try:
            if name not in expected:
                if not file.name.startswith("."):  # of the file system or a file manager
                    return f"{name} is not in {FILE}"
            elif _hash(file) != expected[name]:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read ({paths.reason(error)})"
    step = json.loads(paths.read_text(files[STEP_FILE]) or "{}").get("step")
    return None if str(step) == checkpoint.name else f"it is the checkpoint of step {step}"


def examine(directory: Any) -> Examination:
    """Find the newest intact checkpoint. If there is none, use the newest without checksums, which early versions did
    not write. Damage to that one is found only when Orbax reads it.

    While `tav train` runs, it removes checkpoints that are being read here. So damage counts only if there are the same
    checkpoints afterwards.
    """
    listed = steps(directory)
    while True:
        newest, damaged = None, []
        for step in listed:
            if (reason := damage(directory / str(step))) is None:
                newest = step
                break
            damaged.append((step, reason))
        before, listed = listed, steps(directory) if damaged else listed
        if listed == before:
            break
    if newest is not None:
        return Examination(newest, damaged)
    for i, step in enumerate(listed):
        if not (directory / str(step) / FILE).exists():
            return Examination(step, damaged[:i])
    if damaged:
        reasons = "; ".join(f"step {step}, {reason}" for step, reason in damaged)
        raise WeightsError(
            f"every checkpoint in {directory} is damaged: {reasons}. Nothing was changed. Restore one from a copy, or "
            "start again in another --workdir."
        )
    return Examination(None, [])


def steps(directory: Any) -> list[int]:
    """The steps of the finished checkpoints, newest first."""
    try:
        exists = directory.exists() or ("://" not in str(directory) and os.path.islink(directory))
        names = [x.name for x in directory.iterdir() if x.is_dir()] if exists else []
    except OSError as error:
        raise WeightsError(
            f"{directory} cannot be read ({paths.reason(error)}); restore it from a copy, or use another --workdir"
        ) from error
    # Names of unfinished and of damaged checkpoints are longer.
    return sorted((int(name) for name in names if STEP.fullmatch(name)), reverse=True)


def rename_damaged(directory: Any, step: int) -> str:
    """Rename a damaged checkpoint, so that its step can be saved again. Returns the new name."""
    names = (f"{step}.damaged{'' if n == 1 else f'-{n}'}" for n in range(1, 10_000))
    name = next(name for name in names if not (directory / name).exists())
    (directory / str(step)).rename(directory / name)
    return name


def _files(directory: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in sorted(directory.iterdir(), key=lambda x: x.name):
        if "://" not in str(item) and os.path.islink(item) and item.is_dir():
            raise OSError(errno.ELOOP, "a directory that is a link", str(item))  # perhaps to a parent
        if item.is_dir():
            yield from _files(item, f"{prefix}{item.name}/")
        elif item.name not in EXCLUDED:
            yield prefix + item.name, item


def _hash(file: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if file.name == METADATA:
        try:
            metadata = json.loads(paths.read_text(file) or "")
            digest.update(json.dumps({**metadata, "commit_timestamp_nsecs": None}, sort_keys=True).encode())
        except (ValueError, TypeError, RecursionError):
            digest.update(b"damaged")  # equal to no other checksum
        return digest.hexdigest()
    with file.open("rb") if "://" in str(file) else paths.open_file(file) as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()

"""A checkpoint's seal: a list of its files with a hash of each, written just before it gets its final name.

Orbax names a checkpoint only when it is complete, but neither it nor the formats below it notice every flipped bit, and
a machine that loses power may keep a name and lose what it stands for. Checked before Orbax opens anything.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from tav_jax.errors import WeightsError

NAME = "seal.json"
ABOUT = "_CHECKPOINT_METADATA"  # Orbax's; the time of the commit comes into it last
LATER = (NAME, f".{NAME}", "commit_success.txt")  # written after the hashes were taken
AT_ONCE = 1 << 22  # bytes


class Damage(NamedTuple):
    step: int
    why: str


class Found(NamedTuple):
    """What lies in a folder of checkpoints."""

    newest: int | None  # that can be gone on from
    damaged: list[Damage]  # the ones after it


def put(checkpoint: Any) -> None:
    """Seal a finished checkpoint."""
    text = json.dumps({name: _hash(file) for name, file in _files(checkpoint)}, indent=1) + "\n"
    scratch = checkpoint / f".{NAME}"
    if "://" in str(checkpoint):  # a bucket's files are whole or not there
        (checkpoint / NAME).write_text(text)
        return
    with open(scratch, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, checkpoint / NAME)


def flaw(checkpoint: Any) -> str | None:
    """What is wrong with it, in a few words."""
    try:
        sealed = json.loads((checkpoint / NAME).read_text())
        wanted = {str(name): str(value) for name, value in sealed.items()}
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError, AttributeError):
        return f"{NAME} cannot be read"
    there = dict(_files(checkpoint))
    for name, value in wanted.items():
        if name not in there:
            return f"{name} is missing"
        try:
            if _hash(there[name]) != value:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def examine(directory: Any) -> Found:
    """The newest checkpoint that is whole. Where no seal holds, the newest that never had one: reading it will tell."""
    damaged: list[Damage] = []
    steps = _steps(directory)
    for step in steps:
        if (why := flaw(directory / str(step))) is None:
            return Found(step, damaged)
        damaged.append(Damage(step, why))
    for i, step in enumerate(steps):
        if not (directory / str(step) / NAME).exists():
            return Found(step, damaged[:i])
    if damaged:
        raise WeightsError(
            f"every checkpoint in {directory} is damaged: "
            + "; ".join(f"step {step}, {why}" for step, why in damaged)
            + ". Nothing was changed. Bring one back from a copy, or start again in another --workdir."
        )
    return Found(None, [])


def set_aside(directory: Any, step: int) -> str:
    """Out of the way, under another name, so that this step can be written again."""
    names = (f"{step}.damaged{'' if n == 1 else f'-{n}'}" for n in range(1, 10_000))
    name = next(name for name in names if not (directory / name).exists())
    (directory / str(step)).rename(directory / name)
    return name


def _steps(directory: Any) -> list[int]:
    """Newest first; those still being written have longer names."""
    if not directory.exists():
        return []
    return sorted((int(x.name) for x in directory.iterdir() if x.name.isdecimal() and x.is_dir()), reverse=True)


def _files(folder: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in sorted(folder.iterdir(), key=lambda x: x.name):
        if item.is_dir():
            yield from _files(item, f"{prefix}{item.name}/")
        elif item.name not in LATER:
            yield prefix + item.name, item


def _hash(file: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if file.name == ABOUT:
        try:
            told = json.loads(file.read_text())
            digest.update(json.dumps({**told, "commit_timestamp_nsecs": None}, sort_keys=True).encode())
        except (ValueError, TypeError):
            digest.update(b"damaged")
        return digest.hexdigest()
    with file.open("rb") as stream:
        while block := stream.read(AT_ONCE):
            digest.update(block)
    return digest.hexdigest()

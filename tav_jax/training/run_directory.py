"""A run's folder, on this machine or in a bucket.

A bucket cannot append, rename or lock. So files are always made whole on this machine, and `publish` puts them in
place: by a rename here, by one upload there.

    config.json  metrics.jsonl  checkpoints/  previews/  inversions/  edits/
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tav_jax.distributed import processes
from tav_jax.errors import InputError, MissingError
from tav_jax.training import lock

HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
SCRATCH = re.compile(r"\.+([0-9a-f]{8})-(\d+)\..+")  # a second dot in front: what a clip writes on its way there
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}  # by Windows
DIGEST = re.compile(r"-[0-9a-f]{8}([0-9a-f]{32})?$")
LONG_AGO = 24 * 3600  # seconds: no file takes longer to be made


def bucket(path: str) -> Any:
    from etils import epath

    return epath.Path(path)


class RunDirectory:
    def __init__(self, path: str | Path):
        self.remote = "://" in str(path)
        self.path: Any = bucket(str(path)) if self.remote else Path(path).expanduser().absolute()
        # Where files are made. On this machine it is the folder itself, so that a rename is all that publishing takes.
        self.local = Path(tempfile.mkdtemp(prefix="tav_jax_run_")) if self.remote else self.path

    def __str__(self) -> str:
        return str(self.path)

    def check_writable(self) -> "RunDirectory":
        """Checked before anything long; nothing is made yet."""
        if self.remote:
            return self
        there = next(place for place in (self.path, *self.path.parents) if place.exists())
        if not there.is_dir():
            raise InputError(f"{there} is a file; give a folder")
        if not os.access(there, os.W_OK):
            raise InputError(f"{there} may not be written; give another folder or change its permissions")
        return self

    def check_shared(self) -> "RunDirectory":
        """Do all processes see what the first one writes here? Tried out, but for a bucket: all see the same."""
        if not processes.is_multiprocess() or self.remote:
            return self

        there = next(place for place in (self.path, *self.path.parents) if place.exists())

        def mark() -> str:
            try:
                handle, name = tempfile.mkstemp(prefix=".tav_jax_", dir=there)
            except OSError:
                return ""  # what may not be written can still be read
            os.close(handle)
            return Path(name).name

        name = processes.run_on_primary("looking for the folder", mark)
        try:
            for _ in range(25):  # a network disk may take seconds to show it
                if (there / name).exists():
                    break
                time.sleep(0.2)
            seen = processes.gather("looking for the folder", (there / name).exists())
        finally:
            if processes.is_primary() and name:
                (there / name).unlink(missing_ok=True)
        if blind := [str(number) for number, sees in enumerate(seen) if not sees]:
            raise InputError(
                f"process {', '.join(blind)} does not see the {self} of process 0; give a folder that all of them "
                "share, such as one in a bucket (gs://…)"
            )
        return self

    def create(self) -> "RunDirectory":
        if processes.is_primary():
            self.path.mkdir(parents=True, exist_ok=True)
        processes.barrier("writing the folder")
        return self

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Held while a run writes here, by the process that does. Buckets cannot lock; see `lock`."""
        locked = not self.remote and processes.is_primary()
        return lock.only_one(self.path) if locked else contextlib.nullcontext()

    def remove_scratch(self) -> None:
        """Remove the scratch files of processes that are no more. Another machine's processes cannot be seen, so theirs
        go when they are old; those of a `tav edit` that is at work stay."""
        if self.remote or not processes.is_primary():
            return
        for place, folders, files in os.walk(self.path):
            if Path(place) == self.path and "checkpoints" in folders:
                folders.remove("checkpoints")  # Orbax sees to its own
            for name in files:
                if (made_by := SCRATCH.fullmatch(name)) and _is_left_over(Path(place, name), *made_by.groups()):
                    Path(place, name).unlink(missing_ok=True)

    def check_has_run(self) -> "RunDirectory":
        if not self.has_run:
            raise MissingError(f"{self} holds no run (no config.json); give the --workdir of a `tav train`")
        return self

    @property
    def has_run(self) -> bool:
        return processes.run_on_primary("looking for a run", (self.path / "config.json").exists)

    def __truediv__(self, name: str) -> Any:
        return self.path / name

    def read(self, name: str) -> str | None:
        file = self.path / name
        return file.read_text() if file.exists() else None

    def write(self, name: str, text: str) -> None:
        """A small file, whole or not at all; of several processes the first one writes it."""
        if not processes.is_primary():
            return
        with self.writing(name) as scratch:
            scratch.write_text(text)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A place to make a file at, which is then published as `name`; whatever goes wrong, no half of it stays."""
        scratch = None
        try:
            scratch = self.scratch(name)
            yield scratch
            self.publish(scratch, name)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            mend = "make room there" if full else "give a folder that may be written"
            raise InputError(
                f"{self.path / name} could not be written ({(error.strerror or str(error)).lower()}); {mend} and run "
                "the same command again"
            ) from error
        finally:
            if scratch:
                scratch.unlink(missing_ok=True)

    def scratch(self, name: str) -> Path:
        """Where a file that will be published as `name` is made: a hidden one beside it."""
        final = self.local / name
        final.parent.mkdir(parents=True, exist_ok=True)
        return final.with_name(f".{HOST}-{os.getpid()}.{final.name}")

    def publish(self, file: Path, name: str) -> None:
        if not self.remote:
            with open(file, "rb") as made:
                os.fsync(made.fileno())  # a name must not outlive its contents when the power fails
            os.replace(file, self.path / name)  # scratch has made the folder
            return
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
        file.unlink()

    def publish_directory(self, name: str) -> None:
        """A folder that a library fills by itself."""
        if self.remote:
            for file in (self.local / name).rglob("*"):
                if file.is_file():
                    target = self.path / str(file.relative_to(self.local))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())

    def fetch(self, name: str) -> Path | None:
        """A file of the run as one on this machine."""
        source = self.path / name
        if not source.exists():
            return None
        if not self.remote:
            return source
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        return target

    def close(self) -> None:
        if self.remote:
            shutil.rmtree(self.local, ignore_errors=True)


def _is_left_over(file: Path, host: str, pid: str) -> bool:
    if host != HOST:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - file.stat().st_mtime > LONG_AGO
        return False
    if int(pid) == os.getpid():  # a container gives every process the same number
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def file_names(texts: Sequence[str], *, longest: int = 60) -> list[str]:
    """A safe file name for each prompt, without a suffix; no two alike, and the same ones every time.

    Letters and digits stay, everything else becomes one dash. Where that loses something which tells prompts apart, or
    might be taken for a name of another kind, a short digest of the whole text follows.
    """
    plain = [_plain(text) for text in texts]
    alike, same = Counter(plain), Counter(texts)
    names = []
    for text, name in zip(texts, plain, strict=True):
        if not name or len(name) > longest or alike[name] > same[text] or name in RESERVED or DIGEST.search(name):
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
            # Eight digits tell a person's prompts apart; for two that were made to share them, there are more.
            name = f"{name[:longest].rstrip('-') or 'prompt'}-{digest[:8]}"
            name += digest[8:40] if name in names and text != texts[names.index(name)] else ""
        names.append(name)
    return names


def _plain(text: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")

"""The directory of a run, on this machine or in a bucket.

Buckets do not support appending, renaming and locks. So every file is first written completely on this machine, as a
scratch file, and then published: by a rename in a local directory, by an upload to a bucket.

    config.json  environment.json  metrics.jsonl  checkpoints/  previews/  inversions/  edits/
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import tempfile
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tav_jax import config as configs
from tav_jax.distributed import processes
from tav_jax.errors import InputError, short_repr

HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
SCRATCH = re.compile(r"\.+([0-9a-f]{8})-(\d+)\..+")  # two dots: `Clip.save` has a scratch file of its own
MAX_AGE = 24 * 3600  # seconds; the age at which scratch files of other machines are removed
LOCK, LOCK_HOLDER = ".lock", ".lock.json"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # the file system has no locks
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}  # by Windows
DIGEST = re.compile(r"-[0-9a-f]{8}([0-9a-f]{32})?$")


def bucket(path: str) -> Any:
    from etils import epath

    return epath.Path(path)


class RunDirectory:
    def __init__(self, path: str | Path):
        self.remote = "://" in str(path)
        self.path: Any = bucket(str(path)) if self.remote else Path(path).expanduser().absolute()
        # Where scratch files are written. On one file system with `path`, so that a file can be published by a rename.
        self.local = Path(tempfile.mkdtemp(prefix="tav_jax_run_")) if self.remote else self.path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Any:
        return self.path / name

    def check_writable(self) -> None:
        """Refuse a local path that is not a directory or not writable. Creates nothing."""
        if self.remote:
            return
        existing = self._existing()
        if not existing.is_dir():
            raise InputError(f"{existing} is a file; give a directory")
        if not os.access(existing, os.W_OK):
            raise InputError(f"{existing} is not writable; give another directory or change its permissions")

    def check_shared(self) -> None:
        """Refuse a local directory that is not the same in all processes. Process 0 creates a marker file there."""
        if not processes.is_multiprocess() or self.remote:
            return
        existing = self._existing()

        def create_marker() -> str:
            with contextlib.suppress(OSError):  # not writable, but perhaps readable
                handle, name = tempfile.mkstemp(prefix=".tav_jax_", dir=existing)
                os.close(handle)
                return Path(name).name
            return ""

        name = processes.run_on_primary("checking the directory", create_marker)
        try:
            deadline = time.monotonic() + 5  # seconds; a network file system may be slow to show it
            while not (existing / name).exists() and time.monotonic() < deadline:
                time.sleep(0.2)
            visible = processes.gather("checking the directory", (existing / name).exists())
        finally:
            if processes.is_primary() and name:
                (existing / name).unlink(missing_ok=True)
        if missing := [str(index) for index, is_visible in enumerate(visible) if not is_visible]:
            raise InputError(
                f"process {', '.join(missing)} does not see the {self} of process 0; give a directory that all "
                "processes share, such as one in a bucket (gs://…)"
            )

    def _existing(self) -> Path:
        return next(path for path in (self.path, *self.path.parents) if path.exists())

    @property
    def has_run(self) -> bool:
        return processes.run_on_primary("looking for a run", (self.path / "config.json").exists)

    def create(self) -> None:
        if processes.is_primary():
            self.path.mkdir(parents=True, exist_ok=True)
        processes.gather("creating the directory", None)  # wait for process 0

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock a local directory, in process 0 only. The lock of a killed process is released.

        A directory that was created for the lock is removed again if it stays empty. Two runs in one bucket, or on a
        file system without locks, are not detected.
        """
        if self.remote or not processes.is_primary():
            yield
            return
        created = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(self.path / LOCK), self.path / LOCK_HOLDER
        try:
            self._acquire(lock)
            if lock.is_locked:
                with contextlib.suppress(OSError):
                    holder.unlink(missing_ok=True)  # left by a process that was killed
                    since = time.strftime("%Y-%m-%d %H:%M:%S")
                    with holder.open("x") as file:  # mode "x" does not follow links
                        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since}, file)
            yield
        finally:
            if lock.is_locked:
                for file in (holder, self.path / LOCK):  # before the release, when another process may create them
                    with contextlib.suppress(OSError):
                        file.unlink(missing_ok=True)
                lock.release()
            for path in created:
                with contextlib.suppress(OSError):  # not empty: there is a run now
                    path.rmdir()

    def _acquire(self, lock: FileLock) -> None:
        file = self.path / LOCK
        if file.is_symlink():
            raise InputError(f"{file} is a symbolic link; remove it, or give another --workdir")
        try:
            lock.acquire(timeout=0.1)
        except Timeout:
            try:
                holder = json.loads((self.path / LOCK_HOLDER).read_text())
                name = "process {pid} on {host} since {since}".format(**holder)
            except (OSError, ValueError, KeyError, TypeError):  # it has not been written yet
                name = "another process"
            raise InputError(f"{self} is in use by {name}; wait for it or stop it, or give another --workdir") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise InputError(f"{file} cannot be locked ({_reason(error)}); give another --workdir") from error

    def read(self, name: str) -> str | None:
        file = self.path / name
        return file.read_text() if file.exists() else None

    def write(self, name: str, text: str) -> None:
        """Write a small file atomically, in process 0 only."""
        if processes.is_primary():
            with self.writing(name) as scratch:
                scratch.write_text(text)

    def read_config(self) -> Any:
        return configs.from_json(self.read("config.json") or "")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A scratch file that is published as `name` at the end, or removed after an error."""
        scratch = None
        try:
            scratch = self.scratch(name)
            yield scratch
            if self.remote:
                self._upload(scratch, name)
            else:
                with open(scratch, "rb") as written:
                    os.fsync(written.fileno())  # otherwise the file may be empty after a power failure
                os.replace(scratch, self.path / name)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            fix = "free some space there" if full else "give a directory that is writable"
            raise InputError(
                f"{self.path / name} could not be written ({_reason(error)}); {fix} and run the same command again"
            ) from error
        finally:
            if scratch:
                scratch.unlink(missing_ok=True)

    def scratch(self, name: str) -> Path:
        """The path of a scratch file for `name`: a hidden file beside it, with the host and process in its name."""
        final = self.local / name
        final.parent.mkdir(parents=True, exist_ok=True)
        return final.with_name(f".{HOST}-{os.getpid()}.{final.name}")

    def publish_directory(self, name: str) -> None:
        """Publish a directory that another library has written to `local`."""
        if self.remote:
            for file in (self.local / name).rglob("*"):
                if file.is_file():
                    self._upload(file, str(file.relative_to(self.local)))

    def _upload(self, file: Path, name: str) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())

    def fetch(self, name: str) -> Path:
        """The path of a file on this machine. Downloads it from a bucket."""
        target = self.local / name
        if self.remote:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((self.path / name).read_bytes())
        return target

    def remove_scratch(self) -> None:
        """Remove the scratch files of processes that have ended. Those of other machines, whose processes are unknown,
        are removed when they are older than `MAX_AGE`."""
        if self.remote or not processes.is_primary():
            return
        for directory, subdirectories, files in os.walk(self.path):
            if Path(directory) == self.path and "checkpoints" in subdirectories:
                subdirectories.remove("checkpoints")  # Orbax removes its own
            for name in files:
                if (match := SCRATCH.fullmatch(name)) and _is_abandoned(Path(directory, name), *match.groups()):
                    Path(directory, name).unlink(missing_ok=True)


def _is_abandoned(file: Path, host: str, pid: str) -> bool:
    with contextlib.suppress(FileNotFoundError, PermissionError):
        if host != HOST:
            return time.time() - file.stat().st_mtime > MAX_AGE
        if int(pid) == os.getpid():  # an earlier process had the same number, as is common in containers
            return True
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
    return False


def _reason(error: OSError) -> str:
    return (error.strerror or short_repr(str(error))).lower()


def file_names(texts: Sequence[str], *, longest: int = 60) -> list[str]:
    """A safe file name, without suffix, for each prompt. Different prompts have different names.

    Characters other than letters and digits are replaced by dashes. If the name would be empty, too long, reserved or
    that of another prompt, a digest of the prompt is appended.
    """
    ascii_texts = [unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode() for text in texts]
    slugs = [re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") for text in ascii_texts]
    slug_counts, text_counts = Counter(slugs), Counter(texts)
    names = []
    for text, name in zip(texts, slugs, strict=True):
        shared = slug_counts[name] > text_counts[text]
        if not name or len(name) > longest or shared or name in RESERVED or DIGEST.search(name):
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
            name = f"{name[:longest].rstrip('-') or 'prompt'}-{digest[:8]}"
            # Texts can be constructed to share eight digits of the digest; those get more digits.
            name += digest[8:40] if name in names and text != texts[names.index(name)] else ""
        names.append(name)
    return names

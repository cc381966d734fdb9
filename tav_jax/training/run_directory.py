"""The directory of a run, on this machine or in a bucket.

Buckets do not support appending, renaming and locks. So every file is first written completely on this machine, in a
scratch directory, and then published: by a rename in a local directory, by an upload to a bucket.

A run can be read from a directory of another user. Links in it are not followed by anything that writes.

    config.json  environment.json  metrics.jsonl  checkpoints/  previews/  inversions/  edits/
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import socket
import tempfile
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tav_jax import config as configs
from tav_jax.distributed import processes
from tav_jax.errors import InputError
from tav_jax.io import paths
from tav_jax.io.paths import bucket

LOCK, LOCK_HOLDER = ".lock", ".lock.json"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # the file system has no locks
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}  # by Windows
DIGEST = re.compile(r"-[0-9a-f]{8}([0-9a-f]{32})?$")


class RunDirectory:
    def __init__(self, path: str | Path):
        self.remote = "://" in str(path)
        self.path: Any = bucket(str(path)) if self.remote else paths.local_path(path)
        # Where files are written first. On one file system with `path`, so that a file can be published by a rename.
        self.local = paths.temporary_directory() if self.remote else self.path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Any:
        return self.path / name

    def check_writable(self) -> None:
        """Refuse a local path that is not a directory or not writable. Leaves nothing there."""
        if not self.remote:
            paths.check_writable(self.path)

    def check_shared(self) -> None:
        """Refuse a local directory that is not the same in all processes. Process 0 creates a marker file there."""
        if not processes.is_multiprocess() or self.remote:
            return
        existing = paths.nearest_existing(self.path)

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

    @property
    def has_run(self) -> bool:
        return processes.run_on_primary("looking for a run", (self.path / "config.json").exists)

    def create(self) -> None:
        if processes.is_primary():
            with paths.reporting(self):
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
        existing = paths.nearest_existing(self.path)
        created = [path for path in (self.path, *self.path.parents) if path.is_relative_to(existing)][:-1]
        with paths.reporting(self):
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
        if file.is_symlink() or (file.exists() and not file.is_file()):
            kind = "symbolic link" if file.is_symlink() else "directory or a pipe"
            raise InputError(f"{file} is a {kind}; remove it, or give another --workdir")
        try:
            with contextlib.suppress(OSError):
                _remove_lock_of_another_user(file)
            lock.acquire(timeout=0.1)
        except Timeout:
            raise InputError(
                f"{self} is in use by {self._holder()}; wait for it or stop it, or give another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                fix = "remove it, or give another --workdir"
                raise InputError(f"{file} cannot be locked ({paths.reason(error)}); {fix}") from error

    def _holder(self) -> str:
        try:
            return "process {pid} on {host} since {since}".format(**json.loads(self.read(LOCK_HOLDER) or ""))
        except (ValueError, KeyError, TypeError, RecursionError):  # it has not been written yet
            return "another process"

    def read(self, name: str) -> str | None:
        """The text of a file, None if it does not exist."""
        return paths.read_text(self.path / name)

    def write(self, name: str, text: str) -> None:
        """Write a small file atomically, in process 0 only."""
        if processes.is_primary():
            with self.writing(name) as scratch:
                scratch.write_text(text, "utf-8")

    def read_config(self) -> Any:
        return configs.from_json(self.read("config.json") or "")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """The path of a file to write. It is published as `name` at the end, or removed after an error."""
        final = self.local / name
        with paths.reporting(self.path / name):
            self.make_directory(str(Path(name).parent))
            paths.remove_abandoned(final.parent)
            with paths.scratch_directory(final.parent) as directory:
                scratch = directory / final.name
                yield scratch
                if self.remote:
                    self._upload(scratch, name)
                else:
                    with open(scratch, "rb") as written:
                        os.fsync(written.fileno())  # otherwise the file may be empty after a power failure
                    os.replace(scratch, final)

    def make_directory(self, name: str) -> Path:
        """Create a subdirectory on this machine, unless there is one. Refuses a link to a place outside of the run,
        where files of other programs could be overwritten."""
        directory = self.local / name
        directory.mkdir(parents=True, exist_ok=True)
        if not directory.resolve().is_relative_to(self.local.resolve()):
            raise InputError(f"{directory} is a link out of {self}; replace it by a directory, or link all of {self}")
        return directory

    def set_aside(self, name: str, problem: str) -> str:
        """Rename a file that cannot be used, so that a new one can be written. Returns a sentence about it."""
        kept = f"{name}.damaged-{secrets.token_hex(4)}"
        with paths.reporting(self.path / name):
            if self.remote:
                (self.path / kept).write_bytes((self.path / name).read_bytes())
            else:
                (self.path / name).rename(self.path / kept)
        return f"{self.path / name} {problem}; it is kept as {kept}, and a new one is begun."

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
        """Remove what killed processes have left in a local directory."""
        if self.remote or not processes.is_primary():
            return
        for directory, subdirectories, _ in os.walk(self.path):
            if Path(directory) == self.path and "checkpoints" in subdirectories:
                subdirectories.remove("checkpoints")  # Orbax removes its own
            paths.remove_abandoned(Path(directory))


def _remove_lock_of_another_user(file: Path) -> None:
    """Remove a lock file that cannot be opened for writing, if no process holds it."""
    if not file.exists() or os.access(file, os.W_OK):
        return
    import fcntl  # such files exist on POSIX only

    with paths.open_file(file) as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.unlink()


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

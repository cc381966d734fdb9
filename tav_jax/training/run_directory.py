"""The directory of a run, on this machine or in a bucket.

A bucket has no append, no rename and no locks. So every file is first completed on this machine, and `publish` puts it
in place: with a rename in a local directory, with one upload in a bucket.

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

from tav_jax.distributed import processes
from tav_jax.errors import InputError, MissingError, short_repr

HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
SCRATCH = re.compile(r"\.+([0-9a-f]{8})-(\d+)\..+")  # a second dot: the scratch file of `Clip.save` for a scratch file
MAX_AGE = 24 * 3600  # seconds; a scratch file of another machine that is older is left over
LOCK, LOCK_HOLDER = ".lock", ".lock.json"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # of file systems without locks
RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}  # by Windows
DIGEST = re.compile(r"-[0-9a-f]{8}([0-9a-f]{32})?$")


def bucket(path: str) -> Any:
    from etils import epath

    return epath.Path(path)


class RunDirectory:
    def __init__(self, path: str | Path):
        self.remote = "://" in str(path)
        self.path: Any = bucket(str(path)) if self.remote else Path(path).expanduser().absolute()
        # Where files are completed: for a local run the directory itself, so that publishing is one rename.
        self.local = Path(tempfile.mkdtemp(prefix="tav_jax_run_")) if self.remote else self.path

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Any:
        return self.path / name

    # ------------------------------------------------------------------------------------------- checks

    def check_writable(self) -> "RunDirectory":
        """Refuse a path that cannot be a directory of ours. Creates nothing."""
        if self.remote:
            return self
        existing = self._existing()
        if not existing.is_dir():
            raise InputError(f"{existing} is a file; give a directory")
        if not os.access(existing, os.W_OK):
            raise InputError(f"{existing} is not writable; give another directory or change its permissions")
        return self

    def check_shared(self) -> "RunDirectory":
        """Refuse a local directory that not all processes see, with a file that the first process writes there."""
        if not processes.is_multiprocess() or self.remote:
            return self
        existing = self._existing()

        def create_mark() -> str:
            try:
                handle, name = tempfile.mkstemp(prefix=".tav_jax_", dir=existing)
            except OSError:
                return ""  # a directory that is not writable can still be read
            os.close(handle)
            return Path(name).name

        name = processes.run_on_primary("checking the directory", create_mark)
        try:
            for _ in range(25):  # a network file system may take seconds to show it
                if (existing / name).exists():
                    break
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
        return self

    def _existing(self) -> Path:
        return next(path for path in (self.path, *self.path.parents) if path.exists())

    def check_has_run(self) -> "RunDirectory":
        if not self.has_run:
            raise MissingError(f"{self} holds no run (no config.json); give the --workdir of a `tav train`")
        return self

    @property
    def has_run(self) -> bool:
        return processes.run_on_primary("looking for a run", (self.path / "config.json").exists)

    def create(self) -> "RunDirectory":
        if processes.is_primary():
            self.path.mkdir(parents=True, exist_ok=True)
        processes.gather("creating the directory", None)  # wait for process 0
        return self

    # ------------------------------------------------------------------------------------------- one run at a time

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Exclusive use of the directory, for the process that writes. A killed process loses it.

        A directory that was created for the lock is removed again if it stays empty. Two runs in one bucket are not
        noticed, and neither are two on a file system without locks.
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
                    holder.unlink(missing_ok=True)  # of a process that was killed
                    with holder.open("x") as file:  # "x" does not follow links
                        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}, file)
            yield
        finally:
            if lock.is_locked:
                for file in (holder, self.path / LOCK):  # before the release: afterwards they may be those of others
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

    # ------------------------------------------------------------------------------------------- files

    def read(self, name: str) -> str | None:
        file = self.path / name
        return file.read_text() if file.exists() else None

    def write(self, name: str, text: str) -> None:
        """Write a small file atomically, from the first process."""
        if not processes.is_primary():
            return
        with self.writing(name) as scratch:
            scratch.write_text(text)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A scratch file that is published as `name` at the end, or removed after an error."""
        scratch = None
        try:
            scratch = self.scratch(name)
            yield scratch
            self.publish(scratch, name)
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
        """The path of a scratch file for `name`: a hidden file beside it, whose name tells its process."""
        final = self.local / name
        final.parent.mkdir(parents=True, exist_ok=True)
        return final.with_name(f".{HOST}-{os.getpid()}.{final.name}")

    def publish(self, file: Path, name: str) -> None:
        if self.remote:
            self._upload(file, name)
            file.unlink()
            return
        with open(file, "rb") as written:
            os.fsync(written.fileno())  # otherwise a power failure can keep the name and lose the contents
        os.replace(file, self.path / name)  # in the directory that `scratch` has created

    def publish_directory(self, name: str) -> None:
        """Publish a directory that a library has written under `local`."""
        if self.remote:
            for file in (self.local / name).rglob("*"):
                if file.is_file():
                    self._upload(file, str(file.relative_to(self.local)))

    def _upload(self, file: Path, name: str) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())

    def fetch(self, name: str) -> Path | None:
        """The path of a file of the run on this machine, downloaded if need be; None if there is no such file."""
        source = self.path / name
        if not source.exists():
            return None
        if not self.remote:
            return source
        target = self.local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        return target

    def remove_scratch(self) -> None:
        """Remove the scratch files of processes that have ended. Whether a process of another machine has ended is not
        known; its files are removed when they are older than `MAX_AGE`."""
        if self.remote or not processes.is_primary():
            return
        for directory, subdirectories, files in os.walk(self.path):
            if Path(directory) == self.path and "checkpoints" in subdirectories:
                subdirectories.remove("checkpoints")  # Orbax removes its own
            for name in files:
                if (match := SCRATCH.fullmatch(name)) and _is_left_over(Path(directory, name), *match.groups()):
                    Path(directory, name).unlink(missing_ok=True)


def _is_left_over(file: Path, host: str, pid: str) -> bool:
    if host != HOST:
        with contextlib.suppress(FileNotFoundError):
            return time.time() - file.stat().st_mtime > MAX_AGE
        return False
    if int(pid) == os.getpid():  # of an earlier process: in a container all have the same number
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _reason(error: OSError) -> str:
    return (error.strerror or short_repr(str(error))).lower()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def file_names(texts: Sequence[str], *, longest: int = 60) -> list[str]:
    """A safe file name, without suffix, for each prompt. Different prompts have different names, equal in every run.

    Letters and digits stay; everything else becomes a dash. A digest of the text follows where names would be equal,
    too long or reserved.
    """
    plain = [_plain(text) for text in texts]
    alike, same = Counter(plain), Counter(texts)
    names = []
    for text, name in zip(texts, plain, strict=True):
        if not name or len(name) > longest or alike[name] > same[text] or name in RESERVED or DIGEST.search(name):
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
            name = f"{name[:longest].rstrip('-') or 'prompt'}-{digest[:8]}"
            # Texts can be constructed to share eight digits of the digest; those get more digits.
            name += digest[8:40] if name in names and text != texts[names.index(name)] else ""
        names.append(name)
    return names


def _plain(text: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")

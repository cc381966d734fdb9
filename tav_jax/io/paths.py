"""Files on this machine: paths that can be used, reads that cannot block, and scratch directories.

A directory may contain files of other users. So only regular files are read, up to a size, and every file is written in
a scratch directory of a random name and then renamed, which replaces a link instead of following it.
"""

import atexit
import contextlib
import errno
import importlib.util
import os
import shutil
import ssl
import stat
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from tav_jax.errors import InputError, MissingError, short_repr

SCRATCH = ".tav_jax-"  # the prefix of scratch directories
LOCK = ".lock"  # held by the process that uses a scratch directory
MAX_AGE = 24 * 3600  # seconds; the age at which scratch directories are removed where there are no locks
MAX_SMALL_FILE = 1 << 28  # bytes; configs and logs
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def reason(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or short_repr(str(error))).lower()


def local_path(path: str | Path) -> Path:
    """The absolute path of a file or directory, which need not exist. Refuses a path that cannot be used."""
    shown = str(path) if str(path).isprintable() and len(str(path)) <= 300 else short_repr(str(path))
    if not str(path) or "\0" in str(path):
        raise InputError(f"the path {shown!r} is empty or contains a NUL character; give the path of a directory")
    try:
        absolute = Path(path).expanduser().absolute()
    except RuntimeError as error:
        raise InputError(f"{shown} names the home directory of an unknown user; give the path in full") from error
    except OSError as error:
        raise InputError(f"{shown} is relative to a directory that no longer exists; give the path in full") from error
    try:
        os.stat(absolute)
    except (FileNotFoundError, NotADirectoryError) as error:
        if absolute.is_symlink():
            raise InputError(f"{shown} is a link to a path that does not exist; remove it") from error
    except OSError as error:  # a link loop, a name that is too long, a directory without permission
        raise InputError(f"{shown} cannot be used ({reason(error)}); give another path") from error
    return absolute


# Scheme → the packages of which one is needed, and the server that must be reachable.
BUCKETS = {"gs": (("gcsfs", "tensorflow"), "storage.googleapis.com"), "s3": (("s3fs",), ""), "az": (("adlfs",), "")}
EMULATOR = "STORAGE_EMULATOR_HOST"  # environment variable of Google's client: another server


def check_bucket(url: str) -> None:
    """Refuse a bucket path that cannot be accessed. The clients would try for most of a minute."""
    scheme = url.partition("://")[0]
    if scheme not in BUCKETS:
        names = " or ".join(f"{name}://" for name in BUCKETS)
        raise InputError(f"{short_repr(url)} is not a path; give a directory of this machine, or a bucket ({names}…)")
    packages, server = BUCKETS[scheme]
    if not any(map(importlib.util.find_spec, packages)):
        raise MissingError(f"{url} cannot be read without {packages[0]}; `pip install {packages[0]}`")
    if not server or os.environ.get(EMULATOR):
        return
    try:
        urllib.request.urlopen(f"https://{server}", timeout=10).close()  # through a proxy, if one is configured
    except urllib.error.HTTPError:  # it answers
        pass
    except OSError as error:
        cause = getattr(error, "reason", error)
        if isinstance(cause, ssl.SSLError):  # it answers; the client has certificates of its own
            return
        fix = "check the network, or give a directory of this machine"
        raise MissingError(f"{url} cannot be reached: no connection to {server} ({reason(cause)}); {fix}") from error


def bucket(url: str) -> Any:
    from etils import epath

    check_bucket(url)
    return epath.Path(url)


def nearest_existing(path: Path) -> Path:
    """The path itself or the nearest of its parents that can be seen."""
    return next(x for x in (path, *path.parents) if os.path.exists(x))


def check_writable(directory: Path) -> None:
    """Refuse a path that is not a directory or in which no file can be created."""
    existing = nearest_existing(directory)
    if not existing.is_dir():
        raise InputError(f"{existing} is a file; give a directory")
    try:
        os.rmdir(tempfile.mkdtemp(prefix=SCRATCH, dir=existing))
    except OSError as error:
        fix = "give another directory or change its permissions"
        raise InputError(f"{existing} is not writable ({reason(error)}); {fix}") from error


def check_readable(*directories: Path) -> None:
    """Refuse directories whose files cannot be read."""
    for directory in directories:
        if directory.is_dir() and not os.access(directory, os.R_OK | os.X_OK):
            raise InputError(f"{directory} is not readable; change its permissions or give another directory")


@contextlib.contextmanager
def reporting(file: Any) -> Iterator[None]:
    """Turn an error while `file` is written into one sentence."""
    try:
        yield
    except OSError as error:
        fix = "free some space there" if error.errno in FULL else "give a directory that is writable"
        raise InputError(f"{file} could not be written ({reason(error)}); {fix} and run the same command again") from (
            error
        )


def open_file(file: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading. Opening a pipe would wait for its writer."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(file))
    return open(descriptor, "rb")


def read_file(file: Any, limit: int | None = None) -> bytes | None:
    """The contents of a file on this machine or in a bucket; None if it does not exist. Raises `InputError` if it is
    not a regular file of at most `limit` bytes."""
    limit = MAX_SMALL_FILE if limit is None else limit
    try:
        if "://" in str(file):
            return file.read_bytes() if file.exists() else None
        with open_file(file) as stream:
            data = stream.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({reason(error)}); remove it or restore it from a copy") from error
    if len(data) > limit:
        raise InputError(f"{file} has more than {limit >> 20} MiB; remove it or restore it from a copy")
    return data


def read_text(file: Any) -> str | None:
    data = read_file(file)
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not a UTF-8 text; remove it or restore it from a copy") from error


# --------------------------------------------------------------------------------------------- scratch directories


@contextlib.contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """A new hidden directory in `parent`, for files that are then renamed into place. It is removed at the end; a
    process that is killed leaves it for `remove_abandoned`."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=parent))
        lock = FileLock(path / LOCK)
        with contextlib.suppress(OSError, NotImplementedError):  # no locks there: the age decides
            lock.acquire(timeout=0)
        if not lock.is_locked or (path / LOCK).exists():  # otherwise another process has just removed it
            break
        lock.release()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        lock.release()


def remove_abandoned(parent: Path) -> None:
    """Remove scratch directories whose processes have ended: their locks are free. Process ids mean nothing in a
    directory that several machines or containers share."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for path in [Path(x) for x in entries if x.name.startswith(SCRATCH) and x.is_dir(follow_symlinks=False)]:
            with contextlib.suppress(OSError):
                _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    lock = FileLock(path / LOCK)
    if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
        return
    try:
        if (path / LOCK).exists():  # otherwise its process may not have locked it yet
            lock.acquire(timeout=0)
    except Timeout:
        return
    except (OSError, NotImplementedError):  # no locks there
        pass
    if lock.is_locked or time.time() - path.stat().st_mtime > MAX_AGE:
        shutil.rmtree(path, ignore_errors=True)
    lock.release()


def temporary_directory() -> Path:
    """A scratch directory in the system's temporary directory, which is removed when the process ends."""
    parent, stack = Path(tempfile.gettempdir()), contextlib.ExitStack()
    remove_abandoned(parent)
    atexit.register(stack.close)
    return stack.enter_context(scratch_directory(parent))

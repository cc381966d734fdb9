"""One run at a time in one folder.

The lock is the operating system's, on a hidden file, so it ends with the process that holds it, however that ends. A
bucket has no such locks: there, two runs on one folder are not noticed.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from tav_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the folder, or says who does. A folder that was made for it goes again if nothing comes into it."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = _taken(folder)
    try:
        yield
    finally:
        if handle is not None:
            (folder / NAME).unlink(missing_ok=True)
            os.close(handle)
        for place in made:
            with contextlib.suppress(OSError):  # not empty: there is a run now
                place.rmdir()


def _taken(folder: Path) -> int | None:
    if fcntl is None:
        return None
    file = folder / NAME
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            told = os.read(handle, 1000).decode(errors="replace")
            os.close(handle)
            raise InputError(_refusal(folder, told)) from None
        except OSError:  # a file system without locks
            os.close(handle)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), file.stat()):
                break
        os.close(handle)  # its holder was just leaving, and took the name along
    about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(about).encode())
    return handle


def _refusal(folder: Path, told: str) -> str:
    try:
        by = "process {pid} on {host} since {since}".format(**json.loads(told))
    except (ValueError, KeyError, TypeError):  # it has not written its name yet
        by = "another process"
    return f"{folder} is in use by {by}. Wait for it or stop it, or give another --workdir."

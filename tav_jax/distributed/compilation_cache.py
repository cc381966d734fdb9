"""JAX's persistent compilation cache, in the user's cache directory."""

import contextlib
import functools
import hashlib
import os
import platform
import stat
import sys
import tempfile
from pathlib import Path

import jax


def cache_directory() -> Path | None:
    """The user's cache directory for this package, or one in the temporary directory if that is not writable. None if
    others can write to either: they could place compiled programs there, which would be run."""
    name = f"tav_jax-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    places = [Path(tempfile.gettempdir()) / name]
    with contextlib.suppress(RuntimeError):  # there is no home directory
        places.insert(0, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tav_jax")
    problems = []
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(place, os.W_OK):
                problems.append(f"{place} is not writable")
            elif problem := _problem(place.stat()):
                problems.append(f"{place} {problem}")
            else:
                return place
        except OSError as error:
            problems.append(f"{place} cannot be created ({error.strerror})")
    _warn_once(f"nothing is cached, and programs are compiled at each start: {'; '.join(problems)}")
    return None


def _problem(status: os.stat_result) -> str | None:
    """Why the contents of a directory cannot be trusted, as `ssh` checks it for keys."""
    if hasattr(os, "getuid") and status.st_uid != os.getuid():
        return f"belongs to another user ({status.st_uid}); remove it, or set XDG_CACHE_HOME"
    if os.name == "posix" and status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "can be written by other users; `chmod go-w` it if its contents are yours"
    return None


@functools.cache
def _warn_once(message: str) -> None:
    print(f"tav: {message}", file=sys.stderr)


def compiled_directory() -> Path | None:
    """The cache's directory for this kind of processor: programs for CPUs use the instruction set of the machine that
    compiled them, and machines with different processors may share a home directory."""
    if (directory := cache_directory()) is None:
        return None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        processor = platform.processor()
    digest = hashlib.sha256(processor.encode()).hexdigest()[:8]
    return directory / "compiled" / f"{platform.machine()}-{digest}"


def enable() -> None:
    """Turn the cache on, unless JAX already has a cache directory or none can be trusted."""
    configured = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if configured is None and (directory := compiled_directory()) is not None:
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

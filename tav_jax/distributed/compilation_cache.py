"""Compiled programs, kept on disk: what was compiled once starts at once the next time."""

import hashlib
import os
import platform
import tempfile
from pathlib import Path

import jax


def base() -> Path:
    """In the user's cache folder or, where there is none to write to, in the temporary one."""
    try:
        wanted = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tav_jax"
        wanted.mkdir(parents=True, exist_ok=True)
        if not os.access(wanted, os.W_OK):
            raise PermissionError
        return wanted
    except (OSError, RuntimeError):  # no home folder, or one that may not be written
        return Path(tempfile.gettempdir()) / f"tav_jax-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def folder() -> Path:
    """Programs for a CPU use all that this CPU can do, and a home folder may be shared by unlike machines: each kind of
    processor has a folder of its own."""
    return base() / "compiled" / _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        told = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def enable() -> None:
    """Keep compiled programs from now on. JAX's own settings, where they are given, stand."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

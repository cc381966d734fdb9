"""JAX's persistent compilation cache, in the user's cache directory."""

import hashlib
import os
import platform
import tempfile
from pathlib import Path

import jax


def cache_directory() -> Path:
    """The user's cache directory for this package, or one in the temporary directory if that is not writable."""
    try:
        wanted = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tav_jax"
        wanted.mkdir(parents=True, exist_ok=True)
        if not os.access(wanted, os.W_OK):
            raise PermissionError
        return wanted
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return Path(tempfile.gettempdir()) / f"tav_jax-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def compiled_directory() -> Path:
    """The cache's directory for this kind of processor: programs for CPUs use the instruction set of the machine that
    compiled them, and machines with different processors may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        processor = platform.processor()
    digest = hashlib.sha256(processor.encode()).hexdigest()[:8]
    return cache_directory() / "compiled" / f"{platform.machine()}-{digest}"


def enable() -> None:
    """Turn the cache on, unless JAX already has a cache directory."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(compiled_directory()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

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
    except (OSError, RuntimeError):  # no home directory, or one that is not writable
        return Path(tempfile.gettempdir()) / f"tav_jax-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


def compiled_directory() -> Path:
    """One directory for each kind of processor: CPU programs use the instruction set of the machine that compiled them,
    and a home directory may be shared by different machines."""
    return cache_directory() / "compiled" / _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        description = "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        description = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(description.encode()).hexdigest()[:8]}"


def enable() -> None:
    """Turn the cache on. JAX's own settings take precedence."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(compiled_directory()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

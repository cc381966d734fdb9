"""What else than its config determines the result of a run: versions, devices, flags, and the git commit."""

import glob
import importlib.util
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tav_jax.distributed import processes

PACKAGES = ("tav_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy", "av")
NOT_INSTALLED = "not installed"  # also tav_jax itself, where a checkout is on sys.path
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_", "NVIDIA_TF32_OVERRIDE", "CUDA_VISIBLE_DEVICES")


def describe() -> dict[str, Any]:
    """The contents of a run's `environment.json`."""
    import jax

    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "host": socket.gethostname(),
        "packages": versions(),
        "commit": commit(),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": processes.process_count(),
        "flags": flags(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "directory": os.getcwd(),
        "command": sys.argv,
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    installed = {name: list(metadata.distributions(name=name)) for name in packages}
    return {name: found[0].version if found else NOT_INSTALLED for name, found in installed.items()}


def flags() -> dict[str, str]:
    """Environment variables that change the results of a program or the devices that it uses."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(FLAGS)}


def has_tpu() -> bool:
    """Whether this machine has the device file of a TPU."""
    return any((*glob.glob("/dev/accel*"), *glob.glob("/dev/vfio/[0-9]*")))


def skip_absent_tpu() -> None:
    """Keep JAX from looking for a TPU on a machine that has none: where libtpu is installed, JAX starts it in every
    process, which takes time and prints errors. Call it before JAX is imported."""
    plugins = importlib.util.find_spec("jax_plugins") or metadata.entry_points(group="jax_plugins")  # GPUs and others
    if importlib.util.find_spec("libtpu") and not plugins and not has_tpu():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def commit(checkout: Path = Path(__file__).parents[2]) -> str | None:
    """The git commit of the checkout that contains this package, with "+ changes" if it has uncommitted changes. None
    outside of a checkout."""
    if not (checkout / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" + changes" if changed else "")
    except (OSError, subprocess.SubprocessError):  # git is not installed, or refuses another user's checkout
        return None

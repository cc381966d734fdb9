"""`tav plan`: compile the programs of a run with the TPU compiler, without a TPU, and report what they need.

`libtpu`, the compiler, is the same on a TPU machine, so a real run needs the memory that it reports.
"""

import importlib.util
import os
import shlex
import sys
from importlib import metadata
from pathlib import Path

from tav_jax.errors import MissingError

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Without these, libtpu queries the cloud's metadata server for the machine type, and warns if there is no server.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


def pinned_compiler() -> str:
    """The requirement of the libtpu that `jax[tpu]` installs with this version of JAX: that of a run on a TPU."""
    requirements = metadata.requires("jax") or []
    return next((r.partition(";")[0].strip() for r in requirements if r.startswith("libtpu")), "libtpu")


def is_pinned_compiler(version: str) -> bool:
    """Whether this version of libtpu is the one that `jax[tpu]` installs."""
    pinned = pinned_compiler().partition("==")[2]
    return version == pinned or (pinned.endswith(".*") and version.startswith(pinned[:-1]))


def compiler_directory() -> Path:
    """Where libtpu is installed if it is not in the environment itself, where JAX would start it in every process."""
    return Path(os.environ.get("TAV_TPU_COMPILER") or Path(sys.prefix, "tpu-compiler"))


def install_command() -> str:
    return f"pip install --upgrade --target={shlex.quote(str(compiler_directory()))} '{pinned_compiler()}'"


def prepare_environment() -> None:
    """Make libtpu importable and set the environment variables that JAX and libtpu need here. Call it before JAX is
    imported."""
    directory = compiler_directory()
    if (directory / "libtpu").is_dir() and str(directory) not in sys.path:
        sys.path.append(str(directory))
        importlib.invalidate_caches()
    if importlib.util.find_spec("libtpu") is None:
        fix = f"run `{install_command()}`"
        raise MissingError(f"`tav plan` needs the TPU compiler, and libtpu is not installed; {fix}")
    os.environ.update(ENVIRONMENT)

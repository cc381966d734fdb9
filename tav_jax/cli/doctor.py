"""`tav doctor`: what this machine has, what is missing, and the command that fixes it."""

import argparse
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from typing import NamedTuple

from tav_jax.errors import install_command
from tav_jax.training import environment


class Finding(NamedTuple):
    ok: bool
    text: str
    fix: str = ""  # the command that fixes it


REQUIRED = (
    *(name for name in environment.PACKAGES if name != "tav_jax"),
    *("safetensors", "imageio", "ml_collections", "filelock"),
)
# package → (what it is used for, the extra that installs it; "": the package by its name)
OPTIONAL = {
    "torch": ("for .bin weights", "torch"),
    "tensorboardX": ("for TensorBoard logs", "tensorboard"),
    "wandb": ("for Weights & Biases logs", "wandb"),
    "gcsfs": ("for gs:// paths", ""),
}


def examine() -> Iterator[Finding]:
    yield Finding(True, f"Python {platform.python_version()} on {platform.platform()}")
    if commit := environment.commit():
        yield Finding(True, f"tav_jax from the git commit {commit}")
    for name, version in environment.versions(REQUIRED).items():
        missing = version == environment.NOT_INSTALLED
        yield Finding(not missing, f"{name} {version}", f"pip install {name}" * missing)
    for name, version in environment.versions(tuple(OPTIONAL)).items():
        use, extra = OPTIONAL[name]
        missing = version == environment.NOT_INSTALLED
        command = install_command(extra) if extra else f"pip install {name}"
        yield Finding(True, f"{name} {version} (optional, {use})", command * missing)
    yield from _devices()
    if importlib.util.find_spec("libtpu") and not environment.has_tpu():
        yield Finding(True, "libtpu is used by `tav plan` only, because this machine has no TPU")
    for name, value in environment.flags().items():
        yield Finding(True, f"{name} is set: {value}")
    yield _video_encoders()
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES"):
        yield Finding(True, "HF_HUB_OFFLINE is set: only hub models that are downloaded already can be used")


def _devices() -> Iterator[Finding]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # ImportError, RuntimeError and others
        yield Finding(False, f"JAX cannot be used ({str(error).splitlines()[0]})", "unset JAX_PLATFORMS")
        return
    kinds = {d.device_kind for d in devices}
    stats = devices[0].memory_stats() or {}
    size = f", {stats['bytes_limit'] / 1e9:.0f} GB each" if "bytes_limit" in stats else ""
    yield Finding(True, f"{len(devices)} × {', '.join(sorted(kinds))} ({jax.default_backend()}{size})")
    from tav_jax import kernels  # imports JAX

    yield Finding(True, f"spatial attention: the {kernels.choose_kernel('auto', jax.default_backend())} kernel")
    if jax.default_backend() == "cpu":
        if shutil.which("nvidia-smi"):
            yield Finding(False, "this machine has an NVIDIA GPU that JAX does not find", install_command("cuda"))
        elif environment.has_tpu():
            yield Finding(False, "this machine has a TPU that JAX does not find", install_command("tpu"))
        else:
            yield Finding(True, "no accelerator: small models run well, Stable Diffusion very slowly")


def _video_encoders() -> Finding:
    try:
        import av
    except ImportError as error:
        return Finding(False, f"PyAV does not load ({error})", "pip install --force-reinstall av")
    if missing := [codec for codec in ("libx264", "aac") if codec not in av.codecs_available]:
        return Finding(False, f"PyAV was built without {', '.join(missing)}", "pip install --force-reinstall av")
    return Finding(True, "video: H.264 and AAC can be written")


def run(_: argparse.Namespace) -> int:
    """Print all findings. The exit status is 0 if everything that is required is there."""
    problems = 0
    for finding in examine():
        print(f"{'ok ' if finding.ok else 'BAD'}  {finding.text}")
        if finding.fix:
            print(f"       → {finding.fix}")
        problems += not finding.ok
    print(f"{problems} to fix, see above." if problems else "Everything that is required is installed.")
    return 1 if problems else 0

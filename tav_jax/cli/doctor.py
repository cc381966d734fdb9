"""`tav doctor`: what this machine has, what is missing, and the command that mends it."""

import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

from tav_jax.training import environment


class Finding(NamedTuple):
    good: bool
    what: str
    mend: str = ""


NEEDED = (
    *(name for name in environment.PACKAGES if name != "tav_jax"),  # what a run writes down
    *("safetensors", "imageio", "ml_collections"),
)
# package → what it is for, the extra that brings it
OPTIONAL = {
    "torch": ("reads .bin weights", "torch"),
    "tensorboardX": ("TensorBoard logs", "tensorboard"),
    "wandb": ("Weights & Biases logs", "wandb"),
    "gcsfs": ("gs:// paths", "tpu"),
}


def examine() -> Iterator[Finding]:
    yield Finding(True, f"Python {platform.python_version()} on {platform.platform()}")
    if commit := environment.commit():
        yield Finding(True, f"tav_jax from the git commit {commit}")
    for name in NEEDED:
        yield _package(name)
    for name, (use, extra) in OPTIONAL.items():
        there = importlib.util.find_spec(name) is not None
        if there:
            yield Finding(True, f"{name} {metadata.version(name)} ({use})")
        else:
            yield Finding(True, f"{name} is not installed: optional, {use}", f"pip install 'tav_jax[{extra}]'")
    yield from _devices()
    for name, value in environment.flags().items():
        yield Finding(True, f"{name} is set: {value}")
    yield _encoder()
    yield from _model()


def _package(name: str) -> Finding:
    try:
        return Finding(True, f"{name} {metadata.version(name)}")
    except metadata.PackageNotFoundError:
        return Finding(False, f"{name} is not installed", f"pip install {name}")


def _devices() -> Iterator[Finding]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # a backend that fails to start says so in many ways
        yield Finding(False, f"JAX finds no device ({str(error).splitlines()[0]})", "unset JAX_PLATFORMS")
        return
    kinds = {d.device_kind for d in devices}
    stats = devices[0].memory_stats() or {}
    size = f", {stats['bytes_limit'] / 1e9:.0f} GB each" if "bytes_limit" in stats else ""
    yield Finding(True, f"{len(devices)} × {', '.join(sorted(kinds))} ({jax.default_backend()}{size})")
    from tav_jax import kernels  # needs JAX to be there

    yield Finding(True, f"spatial attention: the {kernels.choose_kernel('auto', jax.default_backend())} kernel")
    if jax.default_backend() == "cpu":
        if shutil.which("nvidia-smi"):
            yield Finding(False, "there is an NVIDIA GPU, and JAX does not see it", "pip install 'tav_jax[cuda]'")
        elif os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0"):
            yield Finding(False, "there is a TPU, and JAX does not see it", "pip install 'tav_jax[tpu]'")
        else:
            yield Finding(True, "no accelerator: small models run well, Stable Diffusion very slowly")


def _encoder() -> Finding:
    try:
        import av
    except ImportError as error:
        return Finding(False, f"PyAV does not load ({error})", "pip install --force-reinstall av")
    if lacking := [codec for codec in ("libx264", "aac") if codec not in av.codecs_available]:
        return Finding(False, f"PyAV was built without {', '.join(lacking)}", "pip install --force-reinstall av")
    return Finding(True, "video: H.264 and AAC can be written")


def _model() -> Iterator[Finding]:
    hub = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES")
    if hub:
        yield Finding(True, "HF_HUB_OFFLINE is set: hub ids are found only if they were downloaded before")


def report() -> int:
    """Print everything; the exit status is 0 when nothing that is needed is missing."""
    bad = 0
    for finding in examine():
        print(f"{'ok ' if finding.good else 'BAD'}  {finding.what}")
        if finding.mend:
            print(f"       → {finding.mend}")
        bad += not finding.good
    print("Everything that is needed is here." if not bad else f"{bad} to mend, see above.")
    return 1 if bad else 0

"""Install what tests compare with: CPU torch, diffusers and PEFT, and beside them the TPU's compiler.

On Linux a plain `torch` is the CUDA build with gigabytes of companions, so pip is asked first which build it would
take. Where it is not a CPU build, nothing is installed: the tests that need it skip and say so, and the stored numbers
still run.

The compiler (libtpu) goes into the folder where `tav plan` finds it: JAX would start it in every process that can
import it, and find no TPU.
"""

import json
import platform
import subprocess
import sys

TORCH, DIFFUSERS, PEFT = "torch==2.13.0", "diffusers>=0.40,<0.50", "peft>=0.19,<0.30"
LIBTPU, FOLDER = "libtpu>=0.0.40,<0.1", "tpu-compiler"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def offered_build() -> str | None:
    """The version of torch that pip would install, without installing it."""
    command = [*PIP, "install", "--quiet", "--dry-run", "--no-deps", "--only-binary=:all:", "--report=-", TORCH]
    asked = subprocess.run(command, capture_output=True, text=True)
    if asked.returncode:
        return None
    found = json.loads(asked.stdout)["install"]
    return found[0]["metadata"]["version"] if found else "installed"


def main() -> None:
    install_torch()
    install_libtpu()


def install_libtpu() -> None:
    """Its wheels are for Linux on x86 only; there, a failure is told by the tests that skip."""
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        target = ["--no-deps", "--upgrade", "--target", f"{sys.prefix}/{FOLDER}"]
        if subprocess.run([*PIP, "install", "--quiet", *target, LIBTPU], check=False).returncode:
            print("The TPU's compiler could not be installed: the tests that compile for a TPU will skip.")


def install_torch() -> None:
    build = offered_build()
    if build is None or (platform.system() == "Linux" and "+cpu" not in build and build != "installed"):
        print(
            f"No CPU build of {TORCH} for Python {platform.python_version()} here: the tests against torch will skip."
        )
        return
    subprocess.run([*PIP, "install", "--quiet", TORCH, DIFFUSERS, PEFT], check=True)


if __name__ == "__main__":
    main()

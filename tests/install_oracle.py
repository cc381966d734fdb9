"""Install CPU torch and diffusers, the oracle of many tests, where a CPU build of torch is to be had.

On Linux a plain `torch` is the CUDA build with gigabytes of companions, so pip is asked first which build it would
take. Where it is not a CPU build, nothing is installed: the tests that need it skip and say so, and the stored numbers
still run.
"""

import json
import platform
import subprocess
import sys

TORCH, DIFFUSERS = "torch==2.13.0", "diffusers>=0.40,<0.50"
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
    build = offered_build()
    if build is None or (platform.system() == "Linux" and "+cpu" not in build and build != "installed"):
        print(
            f"No CPU build of {TORCH} for Python {platform.python_version()} here: the tests against torch will skip."
        )
        return
    subprocess.run([*PIP, "install", "--quiet", TORCH, DIFFUSERS], check=True)


if __name__ == "__main__":
    main()

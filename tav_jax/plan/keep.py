"""Reports, kept on disk under all that they depend on: a full-size program takes many minutes to compile."""

import dataclasses
import hashlib
import json
import os
import tempfile
from importlib import metadata
from pathlib import Path

import jax

from tav_jax.plan.job import Job, as_json
from tav_jax.plan.measure import Report

PACKAGE = Path(__file__).parent.parent
# What makes the programs, and what reads the compiler's answers.
SOURCES = ("models", "kernels", "diffusion", "plan", "programs.py", "sharding.py", "training.py", "weights.py")
VERSIONS = ("jax", "jaxlib", "libtpu", "flax", "optax")


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def optimization() -> str:
    """How hard the compiler tries, as JAX_OPTIMIZATION_LEVEL asks for; empty where nothing is asked for."""
    level = str(jax.config.jax_optimization_level)  # pyright: ignore[reportAttributeAccessIssue]
    return "" if level == "UNKNOWN" else level


def key(job: Job, name: str) -> str:
    depends = hashlib.sha256(f"{name}\n{as_json(job)}\n".encode())
    depends.update(f"{optimization()}\n".encode())
    for package in VERSIONS:
        depends.update(f"{package} {version(package)}\n".encode())
    for source in SOURCES:
        path = PACKAGE / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            depends.update(str(file.relative_to(PACKAGE)).encode() + file.read_bytes())
    return depends.hexdigest()[:24]


def load(folder: Path, job: Job, name: str) -> Report | None:
    file = folder / f"{key(job, name)}.json"
    try:
        told = json.loads(file.read_text())["report"]
        return Report(**{f.name: told[f.name] for f in dataclasses.fields(Report)})
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged: compiled again
        return None


def save(folder: Path, job: Job, report: Report) -> None:
    """Whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"job": json.loads(as_json(job)), "report": report.told()}
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        json.dump(about, file, indent=1)
    os.replace(file.name, folder / f"{key(job, report.name)}.json")

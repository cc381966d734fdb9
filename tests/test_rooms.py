"""The arrows between the rooms go one way: a model never knows of files, a config or the command line."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tav_jax"

# room → the rooms and the heavy libraries that it may import
ALLOWED = {
    "errors": set(),
    "kernels": {"jax", "sharding"},
    "sharding": {"jax"},
    "line": {"errors"},
    "processes": {"jax", "line", "errors", "__version__"},
    "models": {"jax", "flax", "kernels", "sharding"},
    "diffusion": {"jax", "errors"},
    "sources": {"av", "PIL", "errors"},
    "video": {"av", "etils", "imageio", "PIL", "sources", "errors"},
    "prompts": {"transformers", "errors"},
    "layout": {"etils", "huggingface_hub", "models", "tensors", "errors"},
    "tensors": {"safetensors", "torch", "ml_dtypes", "errors"},
    "weights": {"jax", "flax", "safetensors", "memory", "models", "layout", "tensors", "errors"},
    "training": {"jax", "flax", "optax", "models", "diffusion", "sharding", "errors"},
    "programs": {"jax", "models", "diffusion", "sharding"},
    "given": {"jax", "video", "errors"},
    "pipeline": {
        *("given", "jax", "flax", "errors", "video", "models", "diffusion", "sharding", "training"),
        *("finite", "kernels", "layout", "memory", "weights", "processes", "prompts", "programs", "progress", "run"),
    },
    "progress": {"processes", "tqdm"},
    "config": {"ml_collections", "errors"},
    "lock": {"errors"},
    "stopping": set(),
    "seals": {"errors"},
    "finite": {"jax", "errors"},
    "environment": {"jax", "processes"},
    "workdir": {"processes", "etils", "errors", "lock"},
    "memory": {"jax", "kernels", "models", "errors"},
    "metrics": {"processes", "tensorboardX", "wandb", "workdir", "errors"},
    "checkpoint": {"processes", "jax", "flax", "orbax", "seals", "training", "weights", "errors"},
    "run": {
        *("jax", "flax", "errors", "config", "memory", "metrics", "prompts", "training", "checkpoint", "pipeline"),
        *("processes", "progress", "sharding", "stopping", "video", "workdir", "environment", "finite"),
    },
    "edit": {
        *("jax", "PIL", "errors", "memory", "processes", "prompts", "pipeline", "progress", "run", "video", "workdir"),
    },
    "doctor": {"jax", "av", "environment", "kernels"},
    "cache": {"jax"},
    "sprites": {
        *("jax", "PIL", "Clip", "Edit", "InputError", "TavError", "TuneAVideo"),  # the public interface
        *("cache", "edit", "pipeline", "progress", "prompts", "training", "workdir"),
        *("flax", "optax", "safetensors", "diffusion", "models", "weights"),  # pretraining
    },
    "plan": {
        *("jax", "flax", "errors", "cache", "kernels", "layout", "models", "diffusion", "programs", "sharding"),
        *("training", "weights"),
    },
    "cli": {
        *("absl", "ml_collections", "errors", "__version__"),
        *("cache", "config", "doctor", "edit", "jax", "plan", "processes", "run", "sprites", "stopping", "weights"),
    },
    "__main__": {"cli"},
    "__init__": {"errors", "pipeline", "prompts", "video"},
}
REPLICATED = {*sys.stdlib_module_names, "numpy", "jaxtyping"}


def rooms() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in PACKAGE.rglob("*.py"):
        found.setdefault(file.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(file)
    return found


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "tav_jax" else set()
            names |= full or {node.module}
    return {name.split(".")[1] if name.startswith("tav_jax.") else name.split(".")[0] for name in names}


def test_every_room_is_in_the_plan():
    assert set(rooms()) == set(ALLOWED)


@pytest.mark.parametrize("room", list(ALLOWED))
def test_a_room_imports_only_what_it_may(room):
    for file in rooms()[room]:
        extra = imported(file) - ALLOWED[room] - REPLICATED - {room}
        assert not extra, f"{file.relative_to(PACKAGE)} imports {sorted(extra)}"


def test_models_diffusion_and_training_need_no_video_config_or_tokenizer():
    code = """
import sys
for name in ("av", "imageio", "ml_collections", "transformers", "huggingface_hub", "torch", "orbax", "safetensors"):
    sys.modules[name] = None  # importing it now fails
import tav_jax.models, tav_jax.diffusion, tav_jax.training.train_step
"""
    subprocess.run([sys.executable, "-c", code], check=True)

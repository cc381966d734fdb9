"""The structure of the package: layers, no import cycles, module sizes, what the core can be imported without."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "tav_jax"

# From low to high. A module imports from its own layer and lower ones only; the longest matching prefix counts.
LAYERS = [
    ["errors", "config"],
    ["distributed.sharding", "distributed.compilation_cache", "distributed.processes", "kernels"],
    ["models"],
    ["diffusion"],
    ["distributed.memory", "training.train_step", "io"],
    ["training"],
    ["pipeline"],
    ["training.loop", "plan", "evaluation"],
    ["demo"],
    ["web"],
    ["cli", "__main__", "__init__"],
]
MAX_LINES = 400
MAX_TOP_LEVEL = 15  # entries of the package, without __init__ and __main__


def modules() -> dict[str, Path]:
    """Dotted name without the package → file. An `__init__` that imports nothing is left out."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        if file.name == "__init__.py" and "import" not in file.read_text():
            continue
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])] = file
    return found


def imported_modules(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports anywhere, but for `if TYPE_CHECKING:`."""
    found = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    names = {name.removeprefix("tav_jax.") for name in found if name and name.startswith("tav_jax.")}
    return {name for name in names if name in known}


def layer(module: str) -> int:
    """The layer with the longest prefix of the module's name."""
    matches = [
        (len(prefix), number)
        for number, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if module == prefix or module.startswith(f"{prefix}.")
    ]
    assert matches, f"{module} belongs to no layer"
    return max(matches)[1]


def test_imports_go_to_the_same_or_a_lower_layer():
    known = modules()
    wrong = [
        f"{module} imports {target}"
        for module, file in known.items()
        for target in imported_modules(file, known)
        if layer(target) > layer(module)
    ]
    assert not wrong


def test_there_are_no_import_cycles():
    known = modules()
    graph = {module: imported_modules(file, known) - {module} for module, file in known.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_sizes():
    top = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if not path.name.startswith("__")}
    assert len(top) <= MAX_TOP_LEVEL, sorted(top)
    for module, file in modules().items():
        lines = len(file.read_text().splitlines())
        assert lines <= MAX_LINES, f"{module} has {lines} lines"


def test_the_core_needs_no_video_config_or_tokenizer_library():
    code = """
import sys
for name in ("av", "imageio", "ml_collections", "transformers", "huggingface_hub", "torch", "orbax", "safetensors"):
    sys.modules[name] = None  # importing it now fails
import tav_jax.models, tav_jax.diffusion.programs, tav_jax.diffusion.samplers, tav_jax.training.train_step
"""
    subprocess.run([sys.executable, "-c", code], check=True)

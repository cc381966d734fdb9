"""The commands in README.md, launch/README.md and the configs, run as they are printed.

The commands are read from the documents, so that a documented command that does not work fails here. They run in order
in one directory with the real programs. Three things are replaced: the model hub by a local server with a tiny model,
the clips by generated ones, and sizes and steps by options that are appended to a command.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hub_server import MODEL_ID, RENAMED, SETTINGS, Hub

from tav_jax import Clip
from tav_jax.cli import main
from tav_jax.cli.settings import read_config
from tests.conftest import REFERENCE, with_libtpu

ROOT = Path(__file__).parent.parent
README, LAUNCH_README = (ROOT / "README.md").read_text(), (ROOT / "launch/README.md").read_text()
MODEL = REFERENCE / "sd1" / "model"
BIN = Path(sys.executable).parent

# Appended to a documented `tav` command, so that it runs on a tiny model in seconds.
TINY = {
    "model.dtype": "float32",
    "clip.frames": 3,
    "clip.height": 32,
    "clip.width": 32,
    "train.steps": 2,
    "train.preview_every": 0,
    "edit.steps": 2,
    "edit.inversion_steps": 2,
}
TINY_OPTIONS = [f"--config.{name}={value}" for name, value in TINY.items()]


def shell_commands(document: str) -> list[list[str]]:
    """The words of every command in the shell blocks of a Markdown document, in order."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def inline_commands(document: str) -> list[list[str]]:
    """The words of every `tav …` that is quoted in the text."""
    quoted = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", document, flags=re.MULTILINE | re.DOTALL))
    return [shlex.split(code) for code in quoted if re.match(r"tav [a-z]", code)]


COMMANDS = shell_commands(README)


def commands_of(program: str, *arguments: str) -> list[list[str]]:
    return [words for words in COMMANDS if words[: 1 + len(arguments)] == [program, *arguments]]


# --------------------------------------------------------------------------------------------- the hub and the commands


NEEDED = {str(path.relative_to(MODEL)): path for path in MODEL.rglob("*") if path.is_file()}
# What repositories of Stable Diffusion hold besides: other formats, half-precision copies, the safety checker.
DECOYS = (
    "README.md",
    "sd-v1-4.ckpt",
    "sd-v1-4.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "vae/diffusion_pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.fp16.safetensors",
    "safety_checker/model.safetensors",
    "safety_checker/pytorch_model.bin",
)
SMALL_DECOYS = {"safety_checker/config.json", "feature_extractor/preprocessor_config.json"}  # a few hundred bytes


@pytest.fixture(scope="module")
def hub():
    files = {name: path.read_bytes() for name, path in NEEDED.items()}
    files |= dict.fromkeys(DECOYS, b"not to be downloaded") | dict.fromkeys(SMALL_DECOYS, b"{}")
    hub = Hub(files)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    """Runs a command in a directory that has the documented files."""
    place = tmp_path_factory.mktemp("documented")
    (place / "configs").symlink_to(ROOT / "configs")
    (place / "data").mkdir()
    frames = np.full((80, 40, 40, 3), 70, np.uint8)
    for i, frame in enumerate(frames):
        frame[10:26, i % 20 : 20 + i % 20] = (40, 200, 90)
    for name in ("man-skiing.mp4", "data/man-skiing.mp4", "data/car-turn.mp4"):
        Clip(frames, 15.0).save(place / name)
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = str(ROOT)
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(place / "hub"), "NO_PROXY": "127.0.0.1"}
    environment |= SETTINGS

    def run(*words: str) -> subprocess.CompletedProcess:
        words = [sys.executable, "-m", "tav_jax", *words[1:]] if words[0] == "tav" else [BIN / words[0], *words[1:]]
        return subprocess.run(words, env=environment, cwd=place, capture_output=True, text=True, timeout=1200)

    run.place = place
    return run


@pytest.fixture(scope="module")
def downloaded(run, hub) -> list[Path]:
    """The directories that the documented `hf download` commands write."""
    directories = []
    for words in commands_of("hf", "download"):
        hub.fetched.clear()
        done = run(*words)
        assert done.returncode == 0, done.stderr
        directories.append(run.place / words[words.index("--local-dir") + 1])
    assert directories
    return directories


# ------------------------------------------------------------------------------------------------------------ the tests


def test_every_documented_command_is_of_a_kind_that_is_tested_here():
    kinds = {"make", "pip", "hf", "tav"}
    assert {words[0] for words in COMMANDS} == kinds
    tested = {"doctor", "train", "edit", "score", "export", "plan", "demo"}
    assert {words[1] for words in commands_of("tav")} == tested | {"web"}  # whose server test_web.py starts
    assert {words[0].split("/")[0] for words in shell_commands(LAUNCH_README)} == {"gcloud", "launch"}


def test_hf_download_fetches_the_needed_files_and_no_others(downloaded, hub):
    for directory in downloaded:
        files = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
        arrived = {name for name in files if not name.startswith(".cache/")}
        assert arrived - SMALL_DECOYS == set(NEEDED)
        assert {name: (directory / name).read_bytes() for name in NEEDED} == {n: hub.files[n] for n in NEEDED}
    assert set(hub.fetched) - SMALL_DECOYS == set(NEEDED)


LOAD = "import sys; from tav_jax import TuneAVideo; print(TuneAVideo.from_pretrained(sys.argv[1], dtype='float32'))"


@pytest.mark.slow
def test_the_downloaded_directory_loads(downloaded, run):
    for directory in downloaded:
        done = run("python", "-c", LOAD, str(directory))
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_hub_id_loads_and_fetches_the_same_files(hub, run):
    hub.fetched.clear()
    done = run("python", "-c", LOAD, MODEL_ID)
    assert done.returncode == 0, done.stderr
    assert set(hub.fetched) - SMALL_DECOYS == set(NEEDED)


OPEN = """
import json, sys
from tav_jax.errors import TavError
from tav_jax.io.diffusers_layout import Layout

def message(name):
    try:
        return f"loaded {Layout.open(name).unet.block_out_channels}"
    except TavError as error:
        return str(error)
print(json.dumps({name: message(name) for name in sys.argv[1:]}))
"""


@pytest.mark.slow
def test_repositories_that_cannot_be_downloaded_differ_in_their_errors(hub, run):
    unknown = "is neither a directory nor a repository on the hub (HTTP status 401 of HUB); check the spelling"
    log_in = ", or run `hf auth login` if it is private"
    expected = {
        "CompVis/stable-difusion-v1-4": f"{unknown}, did you mean 'CompVis/stable-diffusion-v1-4'{log_in}",
        "unknown/model": unknown + log_in,
        "gated/model": "is gated (HTTP status 403 of HUB); accept its terms at HUB/gated/model, and run `hf",
        "disabled/model": "was disabled by the hub (HTTP status 403 of HUB); use another model",
        "down/model": "could not be downloaded, because the hub is not available (HTTP status 503 of HUB); try",
        "runwayml/stable-diffusion-v1-5": "is no longer on the hub (HTTP status 401); use its mirror 'stable-",
        "bad name/x": "is neither a directory nor a valid hub id. Give a directory",
        RENAMED: "loaded (16, 32, 32)",
    }
    done = run("python", "-c", OPEN, *expected)
    assert done.returncode == 0, done.stderr
    for name, message in json.loads(done.stdout).items():
        assert message.removeprefix(f"{name!r} ").startswith(expected[name].replace("HUB", hub.endpoint)), message


def test_an_unknown_hub_id_is_refused_in_one_sentence(run):
    settings = {"model.path": "unknown/model", "clip.path": "man-skiing.mp4", "clip.prompt": "a man is skiing"}
    done = run("tav", "train", "--workdir=refused", *TINY_OPTIONS, *(f"--config.{k}={v}" for k, v in settings.items()))
    assert done.returncode == 2
    assert "'unknown/model' is neither a directory nor a repository on the hub" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.fixture(scope="module")
def trained(downloaded, run) -> list[str]:
    """The documented `tav train`, `edit`, `score` and `export` commands, after they have run in order."""
    commands = [words for words in commands_of("tav") if words[1] in ("train", "edit", "score", "export")]
    for words in commands:
        done = run(*words, *(TINY_OPTIONS if words[1] == "train" else ()))
        assert done.returncode == 0, (words, done.stderr)
    return [words[1] for words in commands]


@pytest.mark.slow
def test_train_edit_and_export_run_in_the_documented_order(trained, run):
    assert trained == ["train", "edit", "score", "export"]
    assert len(list((run.place / "runs/ski/edits").glob("*.mp4"))) == 3  # two prompts, and one video of both
    assert '<td data-label="flicker">' in (run.place / "runs/ski/edits/index.html").read_text("utf-8")
    assert (run.place / "ski/unet/diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.slow
def test_the_python_of_the_readme_runs(trained, run):
    [code] = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for documented, tiny in {"frames=24, size=(512, 512)": "frames=3, size=(32, 32)", "steps=500": "steps=2"}.items():
        assert documented in code
        code = code.replace(documented, tiny)
    done = run("python", "-c", code)
    assert done.returncode == 0, done.stderr
    assert (run.place / "spider-man.mp4").is_file()
    assert (run.place / "tuned/model_index.json").is_file()


@pytest.mark.slow
@with_libtpu
def test_plan_runs(downloaded, run):
    for words in commands_of("tav", "plan"):
        done = run(*words, "--config.model.path=sd14", *TINY_OPTIONS, "--cache=plans")
        assert done.returncode == 0, done.stderr
        assert "fits" in done.stdout


def test_doctor_runs(run):
    done = run("tav", "doctor")
    assert done.returncode in (0, 1), done.stderr  # 1 where a package or a device is missing
    assert "Python" in done.stdout


def test_demo_options_exist():
    for words in commands_of("tav", "demo"):
        main.parser().parse_args(words[1:])


def test_pip_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra for document in (README, LAUNCH_README) for extra in re.findall(r"'(?:\.|tav_jax)\[(\w+)\]'", document)
    }
    assert {"cuda", "tpu"} <= named <= set(extras)
    for words in commands_of("pip"):
        assert words[1] == "install"
        assert all(re.fullmatch(r"\.(\[\w+\])?|libtpu|--target=\S+/tpu-compiler", word) for word in words[2:])


def test_make_targets_exist():
    for words in commands_of("make"):
        done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def subcommand_options() -> dict[str, set[str]]:
    [subcommands] = [a for a in main.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return {name: set(parser._option_string_actions) for name, parser in subcommands.choices.items()}


def test_options_quoted_in_the_text_exist():
    known = subcommand_options()
    quoted = inline_commands(README) + inline_commands(LAUNCH_README)
    assert quoted
    for _, command, *words in quoted:
        options = [word.split("=")[0] for word in words if word.startswith("--")]
        assert {name for name in options if not name.startswith("--config")} <= known[command]
        read_config([word for word in words if word.startswith("--config.")])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_the_launch_line_of_a_config_is_a_valid_command(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    docstring = path.read_text().split('"""')[1].replace("\\\n", " ")
    [line] = [line for line in docstring.splitlines() if line.strip().startswith("tav train")]
    words = shlex.split(line)
    assert f"--config={path.stem}" in words
    arguments, settings = main.parser().parse_known_args(words[1:])
    config = read_config(settings)
    assert arguments.workdir
    assert config.clip.path
    assert config.clip.prompt
    for heading in ("Cost:", "Result:"):
        assert heading in docstring


def test_launch_commands_print_their_plan():
    commands = shell_commands(LAUNCH_README)
    for script, *words in (words for words in commands if words[0].startswith("launch/")):
        done = subprocess.run([ROOT / script, "--dry-run", *words], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert done.stdout
        if "--" in words:
            arguments, settings = main.parser().parse_known_args(words[words.index("--") + 1 :])
            assert arguments.workdir.startswith("gs://")
            read_config(settings)


def reliability_commands() -> list[list[str]]:
    """The words of the commands in the tables of docs/RELIABILITY.md; `…` repeats the file of the row above."""
    commands, file = [], ""
    for code in re.findall(r"\| `([^`]+)`[^|`]*\|$", (ROOT / "docs/RELIABILITY.md").read_text(), re.MULTILINE):
        words = shlex.split(code.replace("…", f"pytest {file}"))
        if words[0] == "pytest":
            file = words[1]
        commands.append(words)
    return commands


def test_the_commands_of_the_reliability_tables_select_tests_and_scripts():
    commands = reliability_commands()
    assert len(commands) == 24
    files = {word for words in commands for word in words if re.fullmatch(r"tests/test_\w+\.py", word)}
    collected = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files]
    done = subprocess.run(collected, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    for words in commands:
        if words[0] == "pytest" and "-k" in words:
            for term in words[words.index("-k") + 1].split(" or "):
                assert [test for test in tests if test.split("::")[0] in words and term in test.split("::")[1]], words
        elif words[0] == "python":
            source = (ROOT / words[1]).read_text()
            assert all(f'"{word.split("=")[0]}"' in source for word in words[2:] if word.startswith("--")), words


def test_every_row_of_where_to_find_things_is_right():
    """Paths exist, at most three hops from the root, and have the names."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("### Where to find things")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 11
    for _, path, names in rows:
        [file] = re.findall(r"`([^`]+)`", path)
        assert file.count("/") <= 2
        text = "".join((ROOT / name).read_text() for name in (file, *re.findall(r"`(tav_jax/[^`]+)`", names)))
        for name in re.findall(r"`([\w.]+)`", names):
            assert name.split(".")[-1] in text, (file, name)

"""Paths, links, pipes and permissions that a run may meet: used, or refused with one sentence, without waiting.

`/proc`, `mkfifo` and user ids exist on Linux only.
"""

import contextlib
import errno
import io
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
from pathlib import Path

import absl.logging
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refusal, train, trained
from flax import nnx
from safetensors.numpy import load_file, save_file

from tav_jax import TuneAVideo
from tav_jax.cli.main import main
from tav_jax.cli.settings import silence_background_tracebacks
from tav_jax.distributed import compilation_cache
from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.io import paths
from tav_jax.io.weights import torch_tensors
from tav_jax.training import checkpoint as checkpoint_module
from tav_jax.training import checksums, derived, metrics
from tav_jax.training.checkpoint import Checkpoints
from tav_jax.training.run import Run
from tav_jax.training.run_directory import LOCK, RunDirectory
from tav_jax.training.train_step import TrainState

ODD_NAME = os.fsdecode(b"50% off [1] a\\b *?#'\" $HOME: \xff\n") + "x" * 200


def open_run(path) -> None:
    RunDirectory(path).check_writable()


# ------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "is empty or contains a NUL"),
        ("a\0b", "is empty or contains a NUL"),
        ("~nosuchuser/run", "names the home directory of an unknown user"),
        ("x" * 256, "cannot be used (file name too long)"),
        ("/proc/run", "is not writable ("),
        ("loop/run", "cannot be used (too many levels of symbolic links)"),
        ("nowhere", "is a link to a path that does not exist"),
        ("file", "is a file; give a directory"),
        ("file/run", "is a file; give a directory"),
        ("pipe", "is a file; give a directory"),
        ("foo://bucket/run", "is not a path; give a directory of this machine, or a bucket (gs://"),
    ],
)
def test_path_that_cannot_be_used_is_refused(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("nowhere").symlink_to("missing")
    Path("file").write_text("")
    os.mkfifo("pipe")
    before = sorted(os.listdir())
    assert message in refusal(InputError, open_run, path)
    assert sorted(os.listdir()) == before


def test_relative_path_in_a_directory_that_was_removed(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    assert "a directory that no longer exists" in refusal(InputError, open_run, "run")
    open_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)


def test_bucket_that_cannot_be_reached_is_refused_at_once(monkeypatch):
    monkeypatch.delenv(paths.EMULATOR, raising=False)
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    assert "cannot be read without gcsfs; `pip install" in refusal(MissingError, open_run, "gs://bucket/run")
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: name)

    def fails(error):
        def urlopen(url, timeout):
            raise error

        monkeypatch.setattr(paths.urllib.request, "urlopen", urlopen)

    fails(urllib.error.URLError(socket.gaierror(-3, "Temporary failure in name resolution")))
    message = refusal(MissingError, open_run, "gs://bucket/run")
    assert "gs://bucket/run cannot be reached: no connection to storage.googleapis.com (temporary failure" in message
    for answer in (urllib.error.HTTPError("", 400, "Bad Request", {}, None), urllib.error.URLError(ssl.SSLError())):
        fails(answer)
        paths.check_bucket("gs://bucket/run")


@pytest.mark.parametrize("kind", ["directory", "pipe", "loop", "latin-1", "large", "device"])
def test_file_that_cannot_be_read_is_refused_without_waiting(tmp_path, monkeypatch, kind):
    file = tmp_path / "config.json"
    monkeypatch.setattr(paths, "MAX_SMALL_FILE", 10)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind in ("directory", "loop", "device"):
        file.mkdir() if kind == "directory" else file.symlink_to(file if kind == "loop" else "/dev/zero")
    else:
        file.write_bytes(b"\xff" if kind == "latin-1" else b"x" * 11)
    began = time.monotonic()
    assert "remove it or restore it from a copy" in refusal(InputError, RunDirectory(tmp_path).read, "config.json")
    assert time.monotonic() - began < 5


def test_links_are_replaced_and_never_followed(tmp_path, settings):
    """A run directory of somebody else must not make `tav` overwrite files outside of it."""
    precious, directory = tmp_path / "precious", RunDirectory(tmp_path / "run")
    precious.mkdir()
    (precious / "red.mp4").write_text("precious")
    directory.create()
    for name in ("config.json", "metrics.jsonl"):
        (directory / name).symlink_to(precious / "red.mp4")
    (directory / "edits").symlink_to(precious)
    directory.write("config.json", "{}")
    metrics.Metrics(directory, 0).close()
    (directory / "checkpoints").symlink_to(precious)
    run = Run(directory, settings())
    run.is_training = True
    assert "checkpoints is a link out of " in refusal(InputError, lambda: run.checkpoints)
    message = refusal(InputError, directory.write, "edits/red.mp4", "new")
    assert "edits is a link out of " in message
    assert (precious / "red.mp4").read_text() == "precious"
    assert not (directory / "config.json").is_symlink()
    assert [x.name for x in precious.iterdir()] == ["red.mp4"]


# ------------------------------------------------------------------------------------------------- derived files

DEEP = "[" * 100_000
DAMAGED_LOGS = {
    "bytes": b"\xff\xfe",
    "nested": DEEP.encode(),
    "list": b"[1]",
    "huge number": b'{"step": 1' + b"0" * 400 + b'}\n{"step": 1, "loss": 2}\n',
    "many digits": b'{"step": 1' + b"0" * 5000 + b"}\n",
}


@pytest.mark.parametrize("damage", [*DAMAGED_LOGS, "directory", "pipe", "loop"])
@pytest.mark.parametrize("name", ["environment.json", "metrics.jsonl"])
def test_damaged_log_is_set_aside(tmp_path, damage, name, capsys):
    file, directory, messages = tmp_path / name, RunDirectory(tmp_path), []
    if damage in DAMAGED_LOGS:
        file.write_bytes(DAMAGED_LOGS[damage] + b"\n" * (name == "metrics.jsonl"))
    else:
        {"directory": os.mkdir, "pipe": os.mkfifo, "loop": lambda path: os.symlink(path, path)}[damage](file)
    if name == "environment.json":
        found = derived.read_object(directory, name, messages.append)
        if damage == "huge number":
            messages.append("is not readable JSON; it is kept as")  # two objects; checked by the next line
        assert found == {}
    else:
        found = derived.read_steps(directory, name, 5, messages.append)
        assert found == (['{"step": 1, "loss": 2}'] if damage == "huge number" else [])
    assert "; it is kept as " in messages[0]
    assert messages[0].isprintable()
    assert [x.name.startswith(f"{name}.damaged-") for x in tmp_path.iterdir()] == [True]


def test_incomplete_last_line_of_the_metrics_is_dropped(tmp_path):
    lines = ['{"step": 1}', '{"step": 2}', '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"st')
    read = derived.read_steps(RunDirectory(tmp_path), "metrics.jsonl", 2, pytest.fail)
    assert read == lines[:2]


def test_failing_disk_under_the_metrics_is_one_sentence(tmp_path, monkeypatch):
    log = metrics.Metrics(RunDirectory(tmp_path), 0)

    def broken(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(metrics.os, "fsync", broken)
    assert "metrics.jsonl could not be written (input/output error)" in refusal(InputError, log.publish)
    assert "input/output error" in refusal(InputError, log.close)
    assert log.file.closed


NOISE = np.random.default_rng(0).normal(size=(1, 3, 8, 8, 4)).astype(np.float32)


def damaged_arrays(file: Path):
    """Each way in which a cached array may be damaged."""
    data = file.read_bytes()
    yield "half", data[: len(data) // 2]
    yield "empty", b""
    for bit in (64, len(data) * 4, len(data) * 8 - 1):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield "flipped", bytes(flipped)
    header = json.dumps({"array": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    yield "4 TiB", len(header).to_bytes(8, "little") + header
    yield "large header", (1 << 60).to_bytes(8, "little")
    for changes in ({"array": NOISE[:, :1]}, {"array": NOISE.astype(np.float16)}, {"array": NOISE + 1}):
        save_file({**load_file(file), **changes}, file)
        yield "changed", file.read_bytes()


def test_damaged_cached_array_is_ignored(tmp_path):
    directory, file = RunDirectory(tmp_path), tmp_path / "inversions/a.safetensors"
    derived.write_array(directory, "inversions/a.safetensors", NOISE)

    def read():
        return derived.read_array(directory, "inversions/a.safetensors", NOISE.shape, NOISE.dtype)

    assert np.array_equal(read(), NOISE)
    for name, data in list(damaged_arrays(file)):
        file.write_bytes(data)
        assert read() is None, name
    file.unlink()
    assert read() is None
    os.mkfifo(file)
    assert read() is None
    derived.write_array(directory, "inversions/a.safetensors", NOISE)  # replaces the pipe
    assert np.array_equal(read(), NOISE)


# ------------------------------------------------------------------------------------------------- checkpoints


def checkpoint(directory: Path, step: int = 4) -> Path:
    """A directory with the files of a checkpoint that `checksums` reads."""
    (directory / str(step) / "metadata").mkdir(parents=True)
    (directory / str(step) / "metadata/metadata").write_text(json.dumps({"step": step}))
    (directory / str(step) / "array").write_bytes(bytes(100))
    checksums.write(directory / str(step))
    return directory / str(step)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda x: (x / checksums.FILE).write_text("{}"), "array is not in checksums.json"),
        (lambda x: (x / checksums.FILE).write_text(DEEP), "checksums.json cannot be read"),
        (lambda x: (x / checksums.FILE).write_bytes(b"\xff"), "checksums.json cannot be read"),
        (lambda x: (x / checksums.FILE).unlink() or os.mkfifo(x / checksums.FILE), "checksums.json cannot be read"),
        (lambda x: (x / checksums.FILE).unlink() or (x / checksums.FILE).mkdir(), "checksums.json cannot be read"),
        (lambda x: (x / "array").unlink() or os.mkfifo(x / "array"), "array cannot be read (not a regular file)"),
        (lambda x: (x / "cycle").symlink_to(x), "checksums.json cannot be read"),
        (lambda x: (x / "more").write_text(""), "more is not in checksums.json"),
    ],
)
def test_damaged_checkpoint_is_found_without_waiting(tmp_path, damage, reason):
    one = checkpoint(tmp_path)
    (one / ".DS_Store").write_text("of a file manager")
    assert checksums.damage(one) is None
    damage(one)
    assert checksums.damage(one) == reason


def test_checkpoint_with_the_name_of_another_step_is_damaged(tmp_path):
    checkpoint(tmp_path).rename(tmp_path / "6")
    checkpoint(tmp_path)
    found = checksums.examine(tmp_path)
    assert found == checksums.Examination(4, [(6, "it is the checkpoint of step 4")])


@pytest.mark.parametrize("name", ["٣", "007", "9" * 30, "9" * 5000, "-1", "6.damaged"])
def test_other_names_are_no_checkpoints(tmp_path, name):
    checkpoint(tmp_path)
    if len(name) < 256:
        (tmp_path / name).mkdir()
    assert checksums.examine(tmp_path) == checksums.Examination(4, [])


@pytest.mark.parametrize("kind", ["file", "pipe", "loop"])
def test_something_else_in_place_of_the_checkpoints(tmp_path, kind):
    place = tmp_path / "checkpoints"
    {"file": Path.touch, "pipe": os.mkfifo, "loop": lambda path: path.symlink_to(path)}[kind](place)
    assert "checkpoints cannot be read (" in refusal(WeightsError, checksums.examine, place)


# ------------------------------------------------------------------------------------------------- the cache


def test_cache_that_others_can_write_is_not_used(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    compilation_cache._warn_once.cache_clear()
    ours = compilation_cache.cache_directory()
    assert ours == tmp_path / "tav_jax"
    assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    ours.chmod(0o775)
    fallback = compilation_cache.cache_directory()
    assert fallback is not None
    assert fallback.parent == tmp_path / "temporary"
    fallback.chmod(0o757)
    assert compilation_cache.compiled_directory() is None
    assert compilation_cache.cache_directory() is None
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"tav: nothing is cached, and programs are compiled at each start: {ours} can be written by" in error
    ours.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    assert compilation_cache.cache_directory() is None or os.stat(fallback).st_uid == 4321
    assert "belongs to another user" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- another user

AS_NOBODY = """
import os, sys, tempfile
from tav_jax.errors import TavError
from tav_jax.io.diffusers_layout import Layout
from tav_jax.training.run_directory import RunDirectory

def use(path):
    if path.endswith("model"):
        return Layout.open(path)
    directory = RunDirectory(path)
    directory.check_writable()
    with directory.lock():
        directory.write("a.json", "{}")

with tempfile.TemporaryDirectory() as first:
    use(first)  # imports all modules, which `nobody` may not be able to read
os.setgroups([]), os.setgid(65534), os.setuid(65534)
for path in sys.argv[1:]:
    try:
        use(path)
        print("ok")
    except TavError as error:
        print(error)
"""


@pytest.mark.slow
def test_directories_of_another_user(start_python, tmp_path_factory):
    """In a process without privileges: root may read and write everything."""
    if os.getuid():
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as base:
        for name in ("", "private/run", "readonly", "shared", "locked", "model", "part-of-a-model/unet"):
            Path(base, name).mkdir(parents=True, exist_ok=True)
        for name in ("shared", "locked"):
            Path(base, name, LOCK).touch()  # left by a process of root that was killed
        Path(base, "locked", LOCK).chmod(0o600)
        modes = {"": 0o755, "private": 0o700, "shared": 0o777, "locked": 0o777, "model": 0, "part-of-a-model/unet": 0}
        for name, mode in modes.items():
            Path(base, name).chmod(mode)
        names = ("private/run", "private/run/new", "readonly/run", "readonly", "shared", "locked")
        names = (*names, "model", "part-of-a-model")
        child = start_python(AS_NOBODY, *(f"{base}/{name}" for name in names))
        output, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    private, below_private, below_readonly, readonly, shared, locked, model, part = output.splitlines()
    assert "private/run cannot be used (permission denied)" in private
    assert "private/run/new cannot be used (permission denied)" in below_private
    assert "readonly is not writable (permission denied)" in below_readonly
    assert "readonly is not writable (permission denied)" in readonly
    assert shared == "ok"
    assert ".lock cannot be locked (permission denied); remove it" in locked
    assert "model is not readable; change its permissions" in model
    assert "unet is not readable; change its permissions" in part


# ------------------------------------------------------------------------------------------------- the terminal


def tav(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tav_jax", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, **options)


@pytest.mark.slow
def test_output_that_cannot_be_written():
    """`tav doctor` prints characters that are not ASCII."""
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = tav("doctor", stdout=subprocess.PIPE, env=ascii_only)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2)
    with open("/dev/full", "w") as full:
        lost = tav("doctor", stdout=full)
    assert lost.stderr.endswith("tav: standard output could not be written (no space left on device)\n")
    assert lost.returncode == (done.returncode or 1)
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as nobody:
        unread = tav("doctor", stdout=nobody)
    assert (unread.returncode, unread.stderr) == (done.returncode, done.stderr)


def test_warnings_of_libraries_are_printed_and_background_tracebacks_are_not():
    handler = absl.logging.get_absl_handler()
    before = list(handler.filters), absl.logging.get_verbosity(), logging.getLogger("asyncio").level, sys.unraisablehook
    try:
        silence_background_tracebacks()
        assert absl.logging.get_verbosity() == absl.logging.WARNING
        error = (ValueError, ValueError("in a thread"), None)
        records = [logging.LogRecord("absl", level, "", 1, "text", None, None) for level in (30, 40)]
        records.append(logging.LogRecord("absl", 30, "", 1, "text", None, error))
        assert [bool(handler.filter(record)) for record in records] == [True, False, False]
    finally:
        handler.filters = before[0]
        absl.logging.set_verbosity(before[1])
        logging.getLogger("asyncio").setLevel(before[2])
        sys.unraisablehook = before[3]


STREAMS = r"""
import os, sys
from tav_jax.cli import terminal
terminal.protect_streams()
print("5 × 5 \udcff", flush=True)
print("5 × 5 \udcff", file=sys.stderr)
print(os.open(sys.argv[1], os.O_RDONLY) > 2, file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize("close", ["", ">&-", "2>&-", "<&-", "<&- >&- 2>&-", "| head -c1", "> /dev/full"])
def test_streams_accept_any_character_and_may_be_closed(tmp_path, close):
    code, log = tmp_path / "streams.py", tmp_path / "log"
    code.write_text(f"{STREAMS}open({str(log)!r}, 'w').write('end')\n")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = f"{sys.executable} {code} {code} {close}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0
    assert log.read_text() == "end"
    if "2>&-" not in close:
        assert done.stderr == "5 \\xd7 5 \\udcff\nTrue\n"
    if not close:
        assert done.stdout == "5 \\xd7 5 \\udcff\n"


EXPORT = """
import signal, sys, time
from pathlib import Path
from tav_jax.cli import main, terminal
from tav_jax.io import paths

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits that it is ignored

def export(arguments):
    with paths.scratch_directory(Path(sys.argv[1])) as scratch:
        (scratch / "model").write_text("half")
        print("writing", flush=True)
        time.sleep(60)

sys.modules["tav_jax.cli.export"] = type(sys)("export")
sys.modules["tav_jax.cli.export"].run = export
sys.argv[0] = "tav"
sys.exit(main.main(["export", "--workdir=x", "--out=y"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "left"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, 1)])
def test_stopped_export_leaves_no_scratch_files(start_python, tmp_path, number, left):
    child = start_python(EXPORT, tmp_path)
    assert child.stdout.readline() == "writing\n"
    child.send_signal(number)
    _, error = child.communicate(timeout=60)
    assert len(os.listdir(tmp_path)) == left
    if not left:
        assert (child.returncode, error) == (128 + number, "tav: stopped\n")
    paths.remove_abandoned(tmp_path)  # as the next export does
    assert not os.listdir(tmp_path)


# ------------------------------------------------------------------------------------------------- names of a run


@pytest.mark.slow
def test_odd_names_through_train_continue_edit_and_export(settings, square_clip, tmp_path):
    """Orbax expands patterns in its own paths, and TensorStore takes backslashes for slashes and needs UTF-8."""
    place = tmp_path / ODD_NAME
    place.mkdir()
    run, exported = place / "run", place / "x".ljust(255, "x")
    clip = tmp_path / "50% off [1] a\\b *?#'\" $HOME.mp4"
    shutil.copyfile(square_clip, clip)
    changes = {"clip__path": str(clip), "train__keep_newest": 1}
    train(run, settings(train__steps=1, **changes))
    assert "Continuing at step 1 of 2" in train(run, settings(train__steps=2, **changes))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert main(["edit", f"--workdir={run}", "--prompt=red [1] *", f"--out={place / 'edits'}"]) == 0
        assert main(["export", f"--workdir={run}", f"--out={exported}"]) == 0
    assert f"Wrote {place / 'edits'}" in output.getvalue()
    assert "red-1.mp4" in os.listdir(place / "edits")
    weights = torch_tensors(TuneAVideo.from_pretrained(exported, dtype="float32").components.unet, "unet")
    assert all(np.array_equal(value, weights[name]) for name, value in trained(run).items())
    assert sorted(os.listdir(tmp_path)) == sorted([ODD_NAME, clip.name])  # nothing was written to `a/b` or to a sibling
    assert not [name for name in os.listdir(place) if name.startswith(".")]
    assert [x for x in os.listdir(run / "checkpoints") if x.isdecimal()] == ["2"]


@pytest.mark.slow
def test_checkpoint_that_cannot_be_read_back_is_not_sealed(tmp_path, monkeypatch):
    """Orbax writes it without an error, and reports only a warning."""
    state = TrainState.create(nnx.State({"a": nnx.Param(jnp.zeros((2, 3)))}))
    monkeypatch.setattr(checkpoint_module, "_plain_path", lambda directory: directory)
    for name, message in (("ski[1]", "could not be written to"), ("other", "differ when they are read back")):
        if name == "other":
            monkeypatch.setattr(checkpoint_module, "_describe", lambda arrays: object())
        checkpoints = Checkpoints(tmp_path / name)

        def save(checkpoints=checkpoints):
            checkpoints.save(1, state, {})
            checkpoints.wait()

        assert message in refusal(InputError, save)
        assert checksums.examine(tmp_path / name) == checksums.Examination(None, [])

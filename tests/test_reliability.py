"""Kills, signals, damaged checkpoints, two runs in one directory, values that are not finite, reproducibility.

The expected result is always that of a run that was not interrupted.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, contents, logged, same_run, train, trained
from safetensors.numpy import load_file, save_file

from tav_jax import TuneAVideo
from tav_jax import config as configs
from tav_jax.cli.settings import read_config
from tav_jax.errors import InputError, NotFiniteError, StoppedError, WeightsError
from tav_jax.io import paths
from tav_jax.training import checkpoint, checksums, environment, loop, nonfinite, run_directory, train_step, trainer
from tav_jax.training.preemption import Stop
from tav_jax.training.run import Run
from tav_jax.training.run_directory import LOCK, RunDirectory

pytestmark = pytest.mark.slow  # most of these tests compile a UNet or start processes

MODEL = REFERENCE / "sd1/model"


# ------------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
def test_two_kills_lose_nothing(tmp_path):
    """The short form of `python benchmarks/kill.py`."""
    spec = importlib.util.spec_from_file_location("kill", Path(__file__).parent.parent / "benchmarks/kill.py")
    assert spec
    assert spec.loader
    kill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kill)
    assert kill.run_benchmark(2, 3, tmp_path, {**os.environ, "JAX_PLATFORMS": "cpu"}, print) == []


WRITER = """
import sys, time
from tav_jax.training.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).writing("edits/red.mp4") as scratch:
    scratch.write_text("half"); print(scratch, flush=True); time.sleep(600)
"""


def test_scratch_directories_of_dead_processes_are_removed(start_python, tmp_path):
    """A lock decides, not a process id: a writer in another container is alive although its number is unknown here."""
    (tmp_path / "previews").mkdir()
    writer = start_python(WRITER, tmp_path)
    scratch = Path(writer.stdout.readline().strip())
    unknown = tmp_path / "previews" / f"{paths.SCRATCH}just-created"  # not locked yet
    foreign = tmp_path / f"{paths.SCRATCH}file"
    unknown.mkdir()
    foreign.write_text("not a directory")
    (tmp_path / f"{paths.SCRATCH}link").symlink_to(tmp_path / "previews")
    directory = RunDirectory(tmp_path)
    directory.remove_scratch()
    assert scratch.read_text() == "half"
    assert unknown.exists()
    writer.kill()
    writer.wait()
    os.utime(unknown, (1, 1))
    directory.remove_scratch()
    assert not scratch.parent.exists()
    assert not unknown.exists()
    assert foreign.exists()
    assert (tmp_path / "previews").exists()


def test_writing_removes_what_a_killed_writer_left_in_the_same_directory(start_python, tmp_path):
    """Such as `--out` of `tav edit`, which is not a run's directory."""
    writer = start_python(WRITER, tmp_path)
    scratch = Path(writer.stdout.readline().strip())
    writer.kill()
    writer.wait()
    assert scratch.exists()
    RunDirectory(tmp_path / "edits").write("a.json", "{}")
    assert [x.name for x in (tmp_path / "edits").iterdir()] == ["a.json"]


@pytest.mark.slow
def test_old_checkpoint_is_renamed_before_its_files_are_deleted(settings, tmp_path, monkeypatch):
    """Otherwise a kill during the deletion would leave half of it under its final name."""
    directory, deleted = tmp_path / "checkpoints", []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **options: deleted.append(sorted(path.glob("*"))))
    train(tmp_path, settings(train__keep_newest=1))
    assert [x.name for x in directory.iterdir() if x.name.isdecimal()] == ["6"]
    assert {x.name for x in (directory / checkpoint.REMOVED).iterdir()} == {"2", "4"}  # what a kill now would leave
    monkeypatch.undo()
    assert any(deleted)
    train(tmp_path, settings(train__keep_newest=1, train__steps=7))
    assert not (directory / checkpoint.REMOVED).exists()


@pytest.mark.slow
def test_previews_lost_in_a_kill_are_written_when_the_run_continues(settings, tmp_path, monkeypatch):
    config, real = settings(train__steps=4, train__preview_every=2), loop.publish_video
    for step in (2, 4):  # in the middle, and after the last checkpoint

        def killed(directory, video, name, prefix=f"previews/step_{step:06d}"):
            if name.startswith(prefix):
                raise KeyboardInterrupt
            real(directory, video, name)

        monkeypatch.setattr(loop, "publish_video", killed)
        run = Run.start_or_continue(str(tmp_path / "run"), config)
        with pytest.raises(KeyboardInterrupt):
            loop.train(run)
        run.checkpoints.wait()
        assert run.checkpoints.newest == step
        assert not (tmp_path / f"run/previews/step_{step:06d}").exists()
    monkeypatch.undo()
    train(tmp_path / "run", config)
    files = [f"run/previews/step_{step:06d}/blue-square.mp4" for step in (2, 4)]
    assert all((tmp_path / file).exists() for file in files)
    assert "is finished" in train(tmp_path / "run", config)
    assert [step for step, _ in logged(tmp_path / "run")] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------- signals

LISTENER = """
import sys, time
from hashlib import pbkdf2_hmac
from pathlib import Path
from tav_jax.training.preemption import Stop

phase, file = sys.argv[1], Path(sys.argv[2])

def save():
    if phase == "slow save":
        print("saving"); time.sleep(60)
    file.write_text("saved")
    return "at step 3 of 6"

with Stop() as stop:
    if phase != "loading":
        stop.steps_begin()
    if phase in ("preview", "slow save"):
        with stop.saving_with(save):
            print("ready"); pbkdf2_hmac("sha256", b"", b"", 10**9)  # one long instruction, like a compilation
    print("ready")
    while not stop.requested or phase == "loading":
        time.sleep(0.01)
    print("requested")
    time.sleep(1)
"""


@pytest.mark.parametrize(
    ("phase", "signals", "status", "message"),
    [
        ("loading", (signal.SIGTERM,), 75, "stopped before the first step, as requested"),
        ("loading", (signal.SIGINT,), 75, "the same command continues"),
        ("preview", (signal.SIGTERM,), 75, "stopped at step 3 of 6, as requested"),
        ("steps", (signal.SIGTERM, signal.SIGTERM), 0, ""),  # a cloud machine may repeat it
        ("steps", (signal.SIGTERM, signal.SIGINT), 130, "stopped at once"),
        ("slow save", (signal.SIGINT, signal.SIGINT), 130, "stopped at once"),
    ],
)
def test_signals_in_every_phase(start_python, tmp_path, phase, signals, status, message):
    child = start_python(LISTENER, phase, tmp_path / "file")
    assert child.stdout
    for number in signals:
        assert child.stdout.readline().strip() in ("ready", "requested", "saving")
        child.send_signal(number)
    _, error = child.communicate(timeout=60)
    assert child.returncode == status, error
    assert message in error
    assert error.count("\n") == bool(message)
    assert (tmp_path / "file").exists() == (phase == "preview")


class StopAt(Stop):
    """Requested after a number of steps."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def steps_begin(self):
        super().steps_begin()
        self.left -= 1
        self.requested = self.left <= 0


@pytest.mark.slow
def test_stopped_run_saves_its_last_step_and_continues_bit_for_bit(finished_run, settings, tmp_path):
    with pytest.raises(StoppedError, match="stopped at step 4 of 6, as requested; nothing is lost") as info:
        train(tmp_path / "run", settings(train__checkpoint_every=0), StopAt(3))
    assert info.value.exit_code == 75
    assert Run.open(tmp_path / "run").checkpoints.newest == 4  # the fourth step was running when it was requested
    assert [step for step, _ in logged(tmp_path / "run")] == [1, 2, 3, 4]
    assert "Continuing at step 4 of 6" in train(tmp_path / "run", settings(train__checkpoint_every=0))
    assert same_run(finished_run, tmp_path / "run")


@pytest.mark.slow
def test_sigterm_ends_tav_train_with_75_and_a_checkpoint(start_python, finished_run, settings, tmp_path):
    config, directory = tmp_path / "config.json", tmp_path / "run"
    config.write_text(configs.to_json(settings(train__steps=100_000, train__checkpoint_every=0)))
    code = "from tav_jax.cli.main import entry; entry()"
    child = start_python(code, "train", f"--config={config}", f"--workdir={directory}")
    metrics = directory / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate(timeout=600)
    assert child.returncode == 75, error
    assert error.count("\n") == 1
    newest = Run.open(directory).checkpoints.newest
    assert f"stopped at step {newest} of 100000, as requested" in error
    steps = [step for step, _ in logged(directory)]
    assert steps == list(range(1, len(steps) + 1))
    assert newest == len(steps)
    assert logged(directory)[:6] == logged(finished_run)[: len(steps)]


# ------------------------------------------------------------------------------------------------- damaged checkpoints


def largest(directory: Path) -> Path:
    return max((x for x in directory.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)


def flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def empty_directory(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


DAMAGES = {
    "a truncated file": lambda directory: os.truncate(largest(directory), largest(directory).stat().st_size // 2),
    "an empty file": lambda directory: os.truncate(largest(directory), 0),
    "a flipped bit": lambda directory: flip_bit(largest(directory)),
    "a missing file": lambda directory: largest(directory).unlink(),
    "a missing item": lambda directory: shutil.rmtree(directory / "train_state"),
    "no checksums": lambda directory: (directory / checksums.FILE).unlink(),
    "damaged checksums": lambda directory: os.truncate(directory / checksums.FILE, 10),
    "an empty directory, left by a crash": empty_directory,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_detected_and_the_previous_one_is_used(run_copy, damage):
    assert checksums.examine(run_copy / "checkpoints") == checksums.Examination(6, [])
    DAMAGES[damage](run_copy / "checkpoints/6")
    before = contents(run_copy)
    found = checksums.examine(run_copy / "checkpoints")
    assert (found.newest, [step for step, _ in found.damaged]) == (4, [6])
    assert contents(run_copy) == before  # examining changes nothing


def test_change_of_any_file_of_a_checkpoint_is_detected(finished_run, tmp_path):
    original = finished_run / "checkpoints/6"
    files = [x for x in original.rglob("*") if x.is_file() and x.name not in checksums.EXCLUDED]
    assert len(files) > 5
    for i, file in enumerate(files):
        copy = Path(shutil.copytree(original, tmp_path / str(i) / "6"))
        assert checksums.damage(copy) is None
        changed = copy / file.relative_to(original)
        if changed.stat().st_size:
            flip_bit(changed)
            assert "does not match its checksum" in (checksums.damage(copy) or ""), file
        changed.unlink()
        assert "is missing" in (checksums.damage(copy) or ""), file


def test_training_continues_from_the_previous_checkpoint_and_renames_the_damaged_one(run_copy, finished_run, settings):
    flip_bit(largest(run_copy / "checkpoints/6"))
    damaged = contents(run_copy / "checkpoints/6")
    output = train(run_copy, settings())
    [message] = [line for line in output.splitlines() if "damaged" in line]
    assert message.startswith("The checkpoint of step 6 is damaged (")
    assert message.endswith("it is kept as 6.damaged. Step 4 is used.")
    assert "Continuing at step 4 of 6" in output
    assert same_run(finished_run, run_copy)  # step 6 was saved again
    assert contents(run_copy / "checkpoints/6.damaged") == damaged
    flip_bit(largest(run_copy / "checkpoints/6"))
    assert "kept as 6.damaged-2" in train(run_copy, settings())


def test_restoring_uses_the_previous_checkpoint_and_renames_nothing(run_copy, capsys):
    flip_bit(largest(run_copy / "checkpoints/6"))
    before = contents(run_copy)
    step_4 = trained(run_copy, 4)
    capsys.readouterr()
    newest = trained(run_copy)
    assert "The checkpoint of step 6 is damaged" in capsys.readouterr().out
    assert all(np.array_equal(step_4[name], newest[name]) for name in step_4)
    with pytest.raises(WeightsError, match="step 6 is damaged"):
        TuneAVideo.restore(run_copy, step=6)
    assert contents(run_copy) == before


def test_nothing_is_changed_if_every_checkpoint_is_damaged(run_copy, settings):
    for step in (4, 6):
        flip_bit(largest(run_copy / f"checkpoints/{step}"))
    before = contents(run_copy)
    with pytest.raises(WeightsError, match=r"every checkpoint .* damaged: step 6, .*; step 4, .*Nothing was changed"):
        train(run_copy, settings())
    with pytest.raises(WeightsError, match=r"every checkpoint in .* is damaged"):
        TuneAVideo.restore(run_copy)
    assert contents(run_copy) == before


def test_checkpoints_without_checksums_are_read(run_copy, finished_run):
    for step in (4, 6):
        (run_copy / f"checkpoints/{step}" / checksums.FILE).unlink()
    assert same_run(finished_run, run_copy)
    largest(run_copy / "checkpoints/6").unlink()
    with pytest.raises(WeightsError, match="checkpoints/6 cannot be read"):
        TuneAVideo.restore(run_copy)


# ------------------------------------------------------------------------------------------------- lock

HOLDER = """
import sys, time
from tav_jax.training.run_directory import RunDirectory
with RunDirectory(sys.argv[1]).lock():
    print("locked"); time.sleep(600)
"""


def test_second_run_in_a_directory_is_refused_until_the_first_is_killed(start_python, run_copy, settings):
    holder = start_python(HOLDER, run_copy)
    assert holder.stdout
    holder.stdout.readline()
    before = contents(run_copy)
    for _ in range(2):  # a refused run must not damage what the holder has written
        with pytest.raises(InputError, match=rf"is in use by process {holder.pid} on {os.uname().nodename} since 20"):
            train(run_copy, settings(train__steps=7))
    assert contents(run_copy) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (run_copy / LOCK).exists()
    assert "is finished" in train(run_copy, settings())
    assert not [x for x in run_copy.iterdir() if x.name.startswith(".")]


def test_directory_created_for_the_lock_is_removed_if_it_stays_empty(tmp_path):
    with RunDirectory(tmp_path / "a/b/c").lock():
        assert (tmp_path / "a/b/c" / LOCK).exists()
        with (
            pytest.raises(InputError, match=rf"is in use by process {os.getpid()} on "),
            RunDirectory(tmp_path / "a/b/c").lock(),
        ):
            pass
        assert (tmp_path / "a/b/c" / LOCK).exists()
    assert not (tmp_path / "a").exists()


def test_lock_follows_no_links(tmp_path):
    """A link in a shared directory must not make the run write to the file that it points to."""
    target, directory = tmp_path / "target", tmp_path / "run"
    target.write_text("precious")
    directory.mkdir()
    (directory / LOCK).symlink_to(target)
    with pytest.raises(InputError, match=r"\.lock is a symbolic link; remove it"), RunDirectory(directory).lock():
        pass
    (directory / LOCK).unlink()
    (directory / run_directory.LOCK_HOLDER).symlink_to(target)
    with RunDirectory(directory).lock():
        assert json.loads((directory / run_directory.LOCK_HOLDER).read_text())["pid"] == os.getpid()
    assert target.read_text() == "precious"
    assert not list(directory.iterdir())


@pytest.mark.parametrize(("number", "refused"), [(*run_directory.NO_LOCKS[1:2], False), (13, True)])
def test_file_system_without_locks_does_not_fail_the_run(tmp_path, monkeypatch, number, refused):
    def acquire(self, *args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    if refused:
        with pytest.raises(InputError, match=r"\.lock cannot be locked \(permission denied\)"):
            RunDirectory(tmp_path).lock().__enter__()
    else:
        with RunDirectory(tmp_path).lock():
            pass
        assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- values not finite


def model_with_nan(directory: Path, file: str, tensor: str) -> str:
    """A copy of the tiny pipeline with one NaN."""
    shutil.copytree(MODEL, directory)
    tensors = load_file(directory / file)
    tensors[tensor] = tensors[tensor].copy()
    tensors[tensor].flat[0] = np.nan
    save_file(tensors, directory / file)
    return str(directory)


@pytest.mark.parametrize(
    ("step", "values", "message"),
    [
        (7, {"loss": np.nan, "grad_norm": 1.0}, "loss is nan at step 7; no checkpoint contains it. Use a lower"),
        (7, {"loss": 1.0, "grad_norm": np.inf}, r"grad_norm is inf at step 7; .* model\.dtype=float32 in another"),
        (1, {"loss": np.inf, "grad_norm": 1.0}, r"loss is inf at step 1; .* Use a lower train\.learning_rate"),
    ],
)
def test_metrics_that_are_not_finite_are_refused(step, values, message):
    with pytest.raises(NotFiniteError, match=message):
        nonfinite.check_metrics(step, values)
    nonfinite.check_metrics(step, {"loss": 1.0, "grad_norm": 0.0})


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("loss", "loss is nan at step 4; "),
        ("state", "the weights or the optimizer state are not finite after step 4; "),
    ],
)
def test_values_that_are_not_finite_are_not_saved(settings, tmp_path, monkeypatch, what, message):
    """At step 4, after which a checkpoint is due."""
    real = trainer.Trainer.step_fn

    def faulty(self, state, step):
        state, metrics = real(self, state, step)
        if step + 1 == 4 and what == "loss":
            metrics = train_step.StepMetrics(jnp.float32(jnp.nan), metrics.grad_norm)
        if step + 1 == 4 and what == "state":
            adam = state.opt_state[0]
            mu = jax.tree.map(lambda x: x.at[...].set(jnp.inf), adam.mu)
            state = train_step.TrainState(state.params, (adam._replace(mu=mu), *state.opt_state[1:]))
        return state, metrics

    monkeypatch.setattr(trainer.Trainer, "step_fn", faulty)
    with pytest.raises(NotFiniteError, match=message):
        train(tmp_path / "run", settings())
    monkeypatch.undo()
    assert Run.open(tmp_path / "run").checkpoints.newest == 2
    assert nonfinite.all_finite(TuneAVideo.restore(tmp_path / "run").components.unet)
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize(("part", "tensor"), [("vae", "quant_conv.bias"), ("unet", "conv_in.bias")])
def test_damaged_model_is_refused_before_anything_is_written(settings, tmp_path, part, tensor):
    model = model_with_nan(tmp_path / "model", f"{part}/diffusion_pytorch_model.safetensors", tensor)
    with pytest.raises(
        WeightsError, match=tensor.replace(".", r"\.") + " has values that are NaN, infinite or too large"
    ):
        train(tmp_path / "run", settings(model__path=model))
    assert not (tmp_path / "run").exists()


def test_latents_that_are_not_finite_give_no_video(sd1):
    start = np.array(sd1.latents)
    start.flat[5] = np.nan
    with pytest.raises(NotFiniteError, match="the inversion gave values that are not finite"):
        sd1.tav.invert(start, steps=2)
    with pytest.raises(NotFiniteError, match="sampling gave values that are not finite"):
        sd1.tav.sample("red", latents=start, steps=2)


def test_clipped_video_gives_a_warning(sd1):
    grey = np.full((2, 8, 8, 3), 100, np.uint8)
    assert nonfinite.clipped_share(grey) == 0
    clipped = np.where(np.arange(8)[None, :, None, None] < 4, 0, 255).astype(np.uint8).repeat(3, -1)
    assert nonfinite.clipped_share(clipped) == 1
    message = "100% of the pixel values sampled for 'red' are 0 or 255"
    with pytest.warns(nonfinite.ClippedVideoWarning, match=message):
        nonfinite.warn_if_clipped(clipped, "red")
    bias = sd1.tav.components.vae.decoder.conv_out.bias
    before = bias[...]
    bias[...] = before + 1e3  # every decoded value is far above 1
    try:
        with pytest.warns(nonfinite.ClippedVideoWarning):
            sd1.tav.sample("red", latents=sd1.latents, steps=2, guidance=1.0)
    finally:
        bias[...] = before


@pytest.mark.slow
def test_debug_nans_names_the_operation(settings, tmp_path, monkeypatch):
    from tav_jax.models import UNet

    real = UNet.__call__

    def log_of_negative(self, *args, **options):
        return jnp.log(real(self, *args, **options) * 0 - 1)

    monkeypatch.setattr(UNet, "__call__", log_of_negative)
    train_step.tune_step.clear_cache()
    try:
        with jax.debug_nans(True), pytest.raises(NotFiniteError, match=r"step 1: .*nan.*log"):
            train(tmp_path / "run", settings())
    finally:
        train_step.tune_step.clear_cache()


# ------------------------------------------------------------------------------------------------- reproducibility

TUNE_AND_EDIT = """
import hashlib, sys
import numpy as np
from tav_jax import TuneAVideo
tav = TuneAVideo.from_pretrained(sys.argv[1], dtype="float32", seed=4)
frames = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), np.uint8)
tuned = tav.tune(frames, "a man is skiing", steps=3, learning_rate=1e-3, seed=5)
noise = tav.invert(frames, steps=3)
edit = tav.sample("spider man", latents=noise, steps=3)
free = tav.sample("spider man", seed=7, frames=3, size=(32, 32), steps=3)
for x in (tuned.losses, noise, edit.latents, edit.frames, free.latents):
    print(hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_give_the_same_bits(start_python):
    outputs = []
    for _ in range(2):
        child = start_python(TUNE_AND_EDIT, MODEL)
        output, error = child.communicate(timeout=600)
        assert child.returncode == 0, error
        outputs.append(output.split())
    assert len(set(outputs[0])) == 5
    assert outputs[0] == outputs[1]


@pytest.mark.slow
def test_run_is_repeated_from_its_config_json(finished_run, tmp_path):
    command = ["train", f"--config={finished_run / 'config.json'}", f"--workdir={tmp_path / 'again'}"]
    done = subprocess.run([sys.executable, "-m", "tav_jax", *command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert same_run(finished_run, tmp_path / "again")
    assert (finished_run / "config.json").read_text() == (tmp_path / "again/config.json").read_text()


def test_config_json_is_a_config(finished_run, tmp_path):
    config = f"--config={finished_run / 'config.json'}"
    changed = read_config([config, "--config.train.steps=9", "--config.edit.prompts=a dog"])
    assert (changed.train.steps, changed.edit.prompts, changed.train.learning_rate) == (9, ("a dog",), 1e-3)
    (tmp_path / "bad.json").write_text('{"train": {"stepz": 3}}')
    with pytest.raises(InputError, match=r"train\.stepz is not a setting"):
        read_config([f"--config={tmp_path / 'bad.json'}"])
    (tmp_path / "bad.json").write_text('{"train": ')
    with pytest.raises(InputError, match="is not readable JSON"):
        read_config([f"--config={tmp_path / 'bad.json'}"])


def test_environment_json_keeps_all_sessions(run_copy, settings, monkeypatch):
    first = json.loads((run_copy / "environment.json").read_text())
    assert first["packages"]["jax"] == jax.__version__
    assert first["devices"] == [device.device_kind for device in jax.devices()]
    assert first["base"] == TuneAVideo.restore(run_copy).components.fingerprint
    assert first["earlier"] == []
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    train(run_copy, settings(train__steps=7))
    second = json.loads((run_copy / "environment.json").read_text())
    assert second["flags"]["NVIDIA_TF32_OVERRIDE"] == "0"
    assert (second["began_at"], second["earlier"][0]) == (6, {k: v for k, v in first.items() if k != "earlier"})


def test_commit_of_a_checkout_and_whether_files_have_changed(tmp_path):
    def git(*arguments):
        command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    repository = Path(environment.__file__).parents[2]
    assert (environment.commit() is not None) == (repository / ".git").exists()
    assert environment.commit(tmp_path) is None
    (tmp_path / "a").write_text("1")
    git("init", "-q")
    git("add", "a")
    git("commit", "-qm", "a")
    head = git("rev-parse", "HEAD").strip()
    assert environment.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert environment.commit(tmp_path) == f"{head} + changes"

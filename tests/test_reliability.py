"""Nothing is lost: kills, polite ends, damaged files, two runs in a folder, numbers that run away, the same bits again.

What a run must give is always what the same run gave when it was left alone.
"""

import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE
from safetensors.numpy import load_file, save_file

from tav_jax import Clip, TuneAVideo
from tav_jax import config as configs
from tav_jax.errors import InputError, NotFiniteError, StoppedError, WeightsError
from tav_jax.io import weights
from tav_jax.training import checkpoint, checksums, environment, lock, loop, nonfinite, train_step
from tav_jax.training.preemption import Stop
from tav_jax.training.run import Run
from tav_jax.training.run_directory import HOST, RunDirectory

MODEL = REFERENCE / "sd1/model"


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    frames = np.full((4, 32, 32, 3), 60, np.uint8)
    for i, frame in enumerate(frames):
        frame[8:20, 3 + 4 * i : 15 + 4 * i] = (220, 40, 40)
    return Clip(frames, 10.0).save(tmp_path_factory.mktemp("clip") / "square.mp4")


@pytest.fixture(scope="module")
def settings(clip_file):
    """A small run of six steps, but for the changes."""

    def make(**changes):
        c = configs.get_config()
        c.model.update(path=str(MODEL), dtype="float32")
        c.clip.update(path=str(clip_file), prompt="red square is moving", frames=3, height=32, width=32)
        c.train.update(steps=6, learning_rate=1e-3, checkpoint_every=2, preview_every=0)
        c.edit.update(steps=2, inversion_steps=2, guidance=3.0, prompts=("blue square",))
        c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
        return c

    return make


def train(folder, config, stop=None) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        Run.start_or_continue(str(folder), config).train(stop)
    return said.getvalue()


def trained(folder) -> dict[str, np.ndarray]:
    return weights.torch_tensors(TuneAVideo.restore(folder).components.unet, "unet")


def metrics(folder) -> list[tuple[int, float]]:
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in read]


def same(one, two) -> bool:
    a, b = trained(one), trained(two)
    return metrics(one) == metrics(two) and all(np.array_equal(a[name], b[name]) for name in a)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings):
    """The folder of a run that was left alone. Tests that change it make a copy."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, settings())
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def process():
    """Starts Python processes; none outlives its test."""
    started = []

    def start(code: str, *arguments) -> subprocess.Popen:
        command = [sys.executable, "-u", "-c", code, *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.communicate()


# ----------------------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
def test_two_kills_lose_nothing(tmp_path):
    """The short form of `python benchmarks/kill.py`."""
    spec = importlib.util.spec_from_file_location("kill", Path(__file__).parent.parent / "benchmarks/kill.py")
    assert spec
    assert spec.loader
    kill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kill)
    assert kill.harness(2, 3, tmp_path, {**os.environ, "JAX_PLATFORMS": "cpu"}, print) == []


def test_scratch_files_of_dead_processes_go_and_those_of_the_living_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder, alive = RunDirectory(tmp_path), os.getppid()
    ours = [folder.scratch("config.json"), tmp_path / "previews" / f"..{HOST}-{os.getpid()}.a.12345678.mp4"]
    left = [tmp_path / f".{HOST}-{dead.pid}.config.json", tmp_path / "edits" / f".{HOST}-{dead.pid}.red.mp4"]
    stay = [tmp_path / f".{HOST}-{alive}.red.mp4", tmp_path / ".0badcafe-1.red.mp4", tmp_path / "edits/red.mp4"]
    old = tmp_path / ".0badcafe-2.red.mp4"  # of another machine, from long ago
    for file in (*ours, *left, *stay, old):
        file.parent.mkdir(exist_ok=True)
        file.write_text("x")
    os.utime(old, (1, 1))
    folder.remove_scratch()
    assert {x for x in tmp_path.rglob("*") if x.is_file()} == set(stay)


def test_an_old_checkpoint_loses_its_name_before_its_first_file(settings, tmp_path, monkeypatch):
    """A kill while one is removed left half of it under its final name, for good."""
    folder, taken = tmp_path / "checkpoints", []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **options: taken.append(sorted(path.glob("*"))))
    train(tmp_path, settings(train__keep_newest=1))
    assert [x.name for x in folder.iterdir() if x.name.isdecimal()] == ["6"]
    assert {x.name for x in (folder / checkpoint.BIN).iterdir()} == {"2", "4"}  # what a kill at this moment leaves
    monkeypatch.undo()
    assert any(taken)
    train(tmp_path, settings(train__keep_newest=1, train__steps=7))
    assert not (folder / checkpoint.BIN).exists()


def test_a_clips_own_scratch_file_is_known_by_its_name(tmp_path, monkeypatch):
    """An encoder that is killed leaves what it wrote; the next start must know whose it was."""
    folder, seen = RunDirectory(tmp_path), []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(Path(a).name), real(a, b)))
    video = Clip(np.zeros((2, 32, 32, 3), np.uint8), 5.0)
    loop.publish_video(folder, video, f"previews/step_000001/{'long-name-' * 6}.mp4")
    seen = [name for name in seen if name.startswith(".")]
    assert len(seen) == 2  # the clip's own, and ours
    for name in seen:
        (tmp_path / name).write_text("x")
    folder.remove_scratch()
    assert sorted(x.suffix for x in tmp_path.rglob("*") if x.is_file()) == [".mp4"]


def test_previews_that_a_kill_took_are_made_when_the_run_goes_on(settings, tmp_path, monkeypatch):
    config, real = settings(train__steps=4, train__preview_every=2), loop.publish_video
    for step in (2, 4):  # in the middle, and at the end, where the run could be taken for finished

        def killed(workdir, video, name, at=f"step_{step:06d}"):
            if at in name:
                raise KeyboardInterrupt
            real(workdir, video, name)

        monkeypatch.setattr(loop, "publish_video", killed)
        job = Run.start_or_continue(str(tmp_path / "run"), config)
        with pytest.raises(KeyboardInterrupt):
            job.train()
        job.checkpoints.wait()
        assert job.checkpoints.newest == step
        assert not (tmp_path / f"run/previews/step_{step:06d}").exists()
    monkeypatch.undo()
    train(tmp_path / "run", config)
    files = [f"run/previews/step_{step:06d}/blue-square.mp4" for step in (2, 4)]
    assert all((tmp_path / file).exists() for file in files)
    assert "is finished" in train(tmp_path / "run", config)
    assert [step for step, _ in metrics(tmp_path / "run")] == [1, 2, 3, 4]


# ----------------------------------------------------------------------------------------------------- polite ends

LISTENER = """
import sys, time
from hashlib import pbkdf2_hmac
from pathlib import Path
from tav_jax.training.preemption import Stop

what, file = sys.argv[1], Path(sys.argv[2])

def keep():
    if what == "slow":
        print("keeping"); time.sleep(60)
    file.write_text("kept")
    return "at step 3 of 6"

with Stop() as stop:
    if what != "loading":
        stop.steps_begin()
    if what in ("preview", "slow"):
        with stop.meanwhile(keep):
            print("ready"); pbkdf2_hmac("sha256", b"", b"", 10**9)  # one long instruction, as a compilation is
    print("ready")
    while not stop.asked or what == "loading":
        time.sleep(0.01)
    print("asked")
    time.sleep(1)
"""


@pytest.mark.parametrize(
    ("what", "signals", "status", "said"),
    [
        ("loading", (signal.SIGTERM,), 75, "stopped before the first step, as asked"),
        ("loading", (signal.SIGINT,), 75, "the same command continues"),
        ("preview", (signal.SIGTERM,), 75, "stopped at step 3 of 6, as asked"),
        ("steps", (signal.SIGTERM, signal.SIGTERM), 0, ""),  # said twice by a machine that is taken away
        ("steps", (signal.SIGTERM, signal.SIGINT), 130, "stopped at once"),
        ("slow", (signal.SIGINT, signal.SIGINT), 130, "stopped at once"),
    ],
)
def test_a_stop_is_heard_whatever_is_going_on(process, tmp_path, what, signals, status, said):
    child = process(LISTENER, what, tmp_path / "file")
    assert child.stdout
    for number in signals:
        assert child.stdout.readline().strip() in ("ready", "asked", "keeping")
        child.send_signal(number)
    _, error = child.communicate(timeout=60)
    assert child.returncode == status, error
    assert said in error
    assert error.count("\n") == bool(said)
    assert (tmp_path / "file").exists() == (what == "preview")


class StopAt(Stop):
    """Asked for after so many steps."""

    def __init__(self, step: int):
        super().__init__()
        self.left = step

    def steps_begin(self):
        super().steps_begin()
        self.left -= 1
        self.asked = self.left <= 0


def test_a_stopped_run_keeps_its_last_step_and_goes_on_bit_for_bit(whole, settings, tmp_path):
    with pytest.raises(StoppedError, match="stopped at step 4 of 6, as asked; nothing is lost") as told:
        train(tmp_path / "run", settings(train__checkpoint_every=0), StopAt(3))
    assert told.value.exit_code == 75
    assert Run.open(tmp_path / "run").checkpoints.newest == 4  # asked for after the third, the fourth was under way
    assert [step for step, _ in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert "Continuing at step 4 of 6" in train(tmp_path / "run", settings(train__checkpoint_every=0))
    assert same(whole, tmp_path / "run")


def test_sigterm_ends_tav_train_with_75_and_a_checkpoint(process, whole, settings, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(configs.to_json(settings(train__steps=100_000, train__checkpoint_every=0)))
    line = (
        "from tav_jax.cli.main import entry; entry()",
        "train",
        f"--config={config}",
        f"--workdir={tmp_path / 'run'}",
    )
    child = process(*line)
    while not (tmp_path / "run/metrics.jsonl").exists() or len(metrics_so_far(tmp_path / "run")) < 3:
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate(timeout=600)
    assert child.returncode == 75, error
    assert error.count("\n") == 1
    newest = Run.open(tmp_path / "run").checkpoints.newest
    assert f"stopped at step {newest} of 100000, as asked" in error
    steps = [step for step, _ in metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))
    assert newest == len(steps)
    assert metrics(tmp_path / "run")[:6] == metrics(whole)[: len(steps)][:6]


def metrics_so_far(folder) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


# ---------------------------------------------------------------------------------------------------------- damage


def largest(checkpoint: Path) -> Path:
    return max((x for x in checkpoint.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)


def flip(file: Path, at: int | None = None) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    file.write_bytes(data)


def crash(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


DAMAGES = {
    "truncated": lambda checkpoint: os.truncate(largest(checkpoint), largest(checkpoint).stat().st_size // 2),
    "empty": lambda checkpoint: os.truncate(largest(checkpoint), 0),
    "a flipped bit": lambda checkpoint: flip(largest(checkpoint)),
    "a missing file": lambda checkpoint: largest(checkpoint).unlink(),
    "a missing part": lambda checkpoint: shutil.rmtree(checkpoint / "learner"),
    "no seal": lambda checkpoint: (checkpoint / checksums.NAME).unlink(),
    "a damaged seal": lambda checkpoint: os.truncate(checkpoint / checksums.NAME, 10),
    "left by a crash": crash,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_found_out_and_the_one_before_is_used(copy, damage):
    assert checksums.examine(copy / "checkpoints") == checksums.Found(6, [])
    DAMAGES[damage](copy / "checkpoints/6")
    before = contents(copy)
    found = checksums.examine(copy / "checkpoints")
    assert (found.newest, [d.step for d in found.damaged]) == (4, [6])
    assert contents(copy) == before  # looking changes nothing


def test_no_file_of_a_checkpoint_can_change_unseen(whole, tmp_path):
    files = [x for x in (whole / "checkpoints/6").rglob("*") if x.is_file() and x.name not in checksums.LATER]
    assert len(files) > 5
    for i, file in enumerate(files):
        checkpoint = Path(shutil.copytree(whole / "checkpoints/6", tmp_path / str(i)))
        assert checksums.flaw(checkpoint) is None
        damaged = checkpoint / file.relative_to(whole / "checkpoints/6")
        if damaged.stat().st_size:
            flip(damaged)
            assert "is not what was written" in (checksums.flaw(checkpoint) or ""), file
        damaged.unlink()
        assert "is missing" in (checksums.flaw(checkpoint) or ""), file


def test_a_run_goes_on_from_the_one_before_and_keeps_the_damaged_one(copy, whole, settings):
    flip(largest(copy / "checkpoints/6"))
    damaged = contents(copy / "checkpoints/6")
    said = train(copy, settings())
    [line] = [line for line in said.splitlines() if "damaged" in line]
    assert line.startswith("The checkpoint of step 6 is damaged (")
    assert line.endswith("it is kept as 6.damaged. Step 4 is used.")
    assert "Continuing at step 4 of 6" in said
    assert same(whole, copy)  # that step was written again
    assert contents(copy / "checkpoints/6.damaged") == damaged
    flip(largest(copy / "checkpoints/6"))
    assert "kept as 6.damaged-2" in train(copy, settings())


def test_edits_use_the_one_before_and_move_nothing(copy, capsys):
    flip(largest(copy / "checkpoints/6"))
    before = contents(copy)
    four = weights.torch_tensors(Run.open(copy).restore(4).components.unet, "unet")
    newest = trained(copy)
    assert "The checkpoint of step 6 is damaged" in capsys.readouterr().out
    assert all(np.array_equal(four[name], newest[name]) for name in four)
    with pytest.raises(WeightsError, match="step 6 is damaged"):
        Run.open(copy).restore(6)
    assert contents(copy) == before


def test_where_all_are_damaged_nothing_is_touched(copy, settings):
    for step in (4, 6):
        flip(largest(copy / f"checkpoints/{step}"))
    before = contents(copy)
    with pytest.raises(WeightsError, match=r"every checkpoint .* damaged: step 6, .*; step 4, .*Nothing was changed"):
        train(copy, settings())
    with pytest.raises(WeightsError, match=r"every checkpoint in .* is damaged"):
        Run.open(copy).restore()
    assert contents(copy) == before


def test_checkpoints_without_seals_are_read_and_a_damaged_one_is_told(copy, whole, settings):
    for step in (4, 6):
        (copy / f"checkpoints/{step}" / checksums.NAME).unlink()
    assert same(whole, copy)
    largest(copy / "checkpoints/6").unlink()
    with pytest.raises(WeightsError, match="checkpoints/6 cannot be read"):
        Run.open(copy).restore()


# ------------------------------------------------------------------------------------------------------------ lock

HOLDER = """
import sys, time
from pathlib import Path
from tav_jax.training.lock import only_one
with only_one(Path(sys.argv[1])):
    print("held"); time.sleep(600)
"""


def test_a_second_run_in_one_folder_says_who_is_there_and_a_killed_one_does_not_block(process, copy, settings):
    holder = process(HOLDER, copy)
    assert holder.stdout
    holder.stdout.readline()
    before = contents(copy)
    with pytest.raises(InputError, match=rf"is in use by process {holder.pid} on {os.uname().nodename} since 20"):
        train(copy, settings(train__steps=7))
    assert contents(copy) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (copy / lock.NAME).exists()
    assert "is finished" in train(copy, settings())
    assert not (copy / lock.NAME).exists()


def test_the_lock_leaves_no_folder_where_nothing_began(tmp_path):
    with lock.only_one(tmp_path / "a/b/c"):
        assert (tmp_path / "a/b/c" / lock.NAME).exists()
    assert not (tmp_path / "a").exists()


# --------------------------------------------------------------------------------------------------------- numbers


def spoiled_model(place: Path, file: str, tensor: str) -> str:
    """The tiny pipeline with one NaN in it."""
    shutil.copytree(MODEL, place)
    tensors = load_file(place / file)
    tensors[tensor] = tensors[tensor].copy()
    tensors[tensor].flat[0] = np.nan
    save_file(tensors, place / file)
    return str(place)


UNET = ("unet/diffusion_pytorch_model.safetensors", "conv_in.bias")


@pytest.mark.parametrize(
    ("step", "values", "dtype", "rate", "said"),
    [
        (7, {"loss": np.nan, "grad_norm": 1.0}, "bfloat16", 1e-2, r"loss of step 7 is nan: the learning rate of 0\.01"),
        (7, {"loss": 1.0, "grad_norm": np.inf}, "float16", 1e-2, r"gradient's norm of step 7 is inf: float16 ends at"),
        (1, {"loss": np.inf, "grad_norm": 1.0}, "float32", 1e-2, "the base model's UNet is likely to be damaged"),
        (9, {"loss": np.nan, "grad_norm": 1.0}, "float32", 3e-5, r"a lower train\.learning_rate or model\.dtype"),
    ],
)
def test_the_likely_cause_is_said(step, values, dtype, rate, said):
    with pytest.raises(NotFiniteError, match=said):
        nonfinite.check_metrics(step, values, dtype=dtype, learning_rate=rate)
    nonfinite.check_metrics(step, {"loss": 1.0, "grad_norm": 0.0}, dtype=dtype, learning_rate=rate)


@pytest.mark.parametrize("what", ["report", "learner"])
def test_what_is_not_finite_reaches_no_checkpoint(settings, tmp_path, monkeypatch, what):
    """Step 4 goes wrong, which has a checkpoint of its own."""
    real = TuneAVideo.tuning

    def tuning(self, *args, **options):
        learner, advance = real(self, *args, **options)

        def spoiled(learner, step):
            learner, report = advance(learner, step)
            if step + 1 == 4 and what == "report":
                report = train_step.StepMetrics(jnp.float32(jnp.nan), report.grad_norm)
            if step + 1 == 4 and what == "learner":
                adam = learner.opt_state[0]
                mu = jax.tree.map(lambda x: x.at[...].set(jnp.inf), adam.mu)
                learner = train_step.TrainState(learner.params, (adam._replace(mu=mu), *learner.opt_state[1:]))
            return learner, report

        return learner, spoiled

    monkeypatch.setattr(TuneAVideo, "tuning", tuning)
    said = "the loss of step 4 is nan" if what == "report" else "what was learned by step 4 is not finite"
    with pytest.raises(NotFiniteError, match=said):
        train(tmp_path / "run", settings())
    monkeypatch.undo()
    found = Run.open(tmp_path / "run")
    assert found.checkpoints.newest == 2
    assert nonfinite.all_finite(found.restore().components.unet)
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_every_report_is_read_before_a_step_is_kept():
    seen = []
    steps = train_step.run_steps(
        lambda learner, step: (learner, train_step.StepMetrics(jnp.float32(step), jnp.float32(0))),
        train_step.TrainState(train_step.nnx.State({}), ()),
        0,
        9,
        settle=lambda done: done == 5,
    )
    for progress in steps:
        seen += [number for number, _ in progress.reports]
        assert progress.settled == (progress.done in (5, 9))
        if progress.settled:
            assert seen == list(range(1, progress.done + 1))


def test_a_damaged_vae_or_unet_is_told_before_anything_is_kept(settings, tmp_path):
    vae = ("vae/diffusion_pytorch_model.safetensors", "quant_conv.bias")
    config = settings(model__path=spoiled_model(tmp_path / "vae", *vae))
    with pytest.raises(WeightsError, match=r"quant_conv\.bias holds values that are no numbers"):
        train(tmp_path / "one", config)
    assert not (tmp_path / "one").exists()
    config = settings(model__path=spoiled_model(tmp_path / "unet", *UNET))
    with pytest.raises(WeightsError, match=r"conv_in\.bias holds values that are no numbers"):
        train(tmp_path / "two", config)
    assert not list((tmp_path / "two").rglob("seal.json"))


def test_latents_that_are_not_finite_give_no_picture(sd1):
    start = np.asarray(sd1.latents)
    bad = start.copy()
    bad.flat[5] = np.nan
    with pytest.raises(NotFiniteError, match="the inversion gave latents that are not finite"):
        sd1.tav.invert(bad, steps=2)
    with pytest.raises(NotFiniteError, match="sampling gave latents that are not finite"):
        sd1.tav.sample("red", latents=bad, steps=2)


def test_black_and_burnt_pictures_are_told(sd1):
    grey = np.full((2, 8, 8, 3), 100, np.uint8)
    assert nonfinite.clipped_share(grey) == 0
    burnt = np.where(np.arange(8)[None, :, None, None] < 4, 0, 255).astype(np.uint8).repeat(3, -1)
    assert nonfinite.clipped_share(burnt) == 1
    with pytest.warns(
        nonfinite.ClippedVideoWarning, match="100% of what was sampled for 'red' is quite black or quite white"
    ):
        nonfinite.warn_if_clipped(burnt, "red")
    last = sd1.tav.components.vae.decoder.conv_out.bias
    before = last[...]
    last[...] = before + 1e3  # all that is decoded is far beyond white
    try:
        with pytest.warns(nonfinite.ClippedVideoWarning):
            sd1.tav.sample("red", latents=sd1.latents, steps=2, guidance=1.0)
    finally:
        last[...] = before


def test_debug_nans_names_the_operation(settings, tmp_path, monkeypatch):
    from tav_jax.models import UNet

    real = UNet.__call__

    def log_of_less_than_nothing(self, *args, **options):
        return jnp.log(real(self, *args, **options) * 0 - 1)

    monkeypatch.setattr(UNet, "__call__", log_of_less_than_nothing)
    train_step.tune_step.clear_cache()
    try:
        with jax.debug_nans(True), pytest.raises(NotFiniteError, match=r"step 1: .*nan.*log"):
            train(tmp_path / "run", settings())
    finally:
        train_step.tune_step.clear_cache()


# --------------------------------------------------------------------------------------------------- the same again

ONCE = """
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


def test_two_processes_give_the_same_bits(process):
    told = []
    for _ in range(2):
        child = process(ONCE, MODEL)
        out, error = child.communicate(timeout=600)
        assert child.returncode == 0, error
        told.append(out.split())
    assert len(set(told[0])) == 5
    assert told[0] == told[1]


def test_a_run_is_made_again_from_its_folder(whole, tmp_path):
    from tav_jax.cli import settings as settings_module

    line = ["train", f"--config={whole / 'config.json'}", f"--workdir={tmp_path / 'again'}"]
    done = subprocess.run([sys.executable, "-m", "tav_jax", *line], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert same(whole, tmp_path / "again")
    assert (whole / "config.json").read_text() == (tmp_path / "again/config.json").read_text()
    changed = settings_module.read_config([line[1], "--config.train.steps=9", "--config.edit.prompts=a dog"])
    assert (changed.train.steps, changed.edit.prompts, changed.train.learning_rate) == (9, ("a dog",), 1e-3)
    (tmp_path / "bad.json").write_text('{"train": {"stepz": 3}}')
    with pytest.raises(InputError, match=r"train\.stepz is not a setting"):
        settings_module.read_config([f"--config={tmp_path / 'bad.json'}"])
    (tmp_path / "bad.json").write_text('{"train": ')
    with pytest.raises(InputError, match="is no readable JSON"):
        settings_module.read_config([f"--config={tmp_path / 'bad.json'}"])


def test_a_run_writes_down_what_it_was_made_with(copy, settings, monkeypatch):
    first = json.loads((copy / "environment.json").read_text())
    assert first["packages"]["jax"] == jax.__version__
    assert first["devices"] == [device.device_kind for device in jax.devices()]
    assert first["base"] == TuneAVideo.restore(copy).components.fingerprint
    assert first["earlier"] == []
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=nowhere")
    train(copy, settings(train__steps=7))
    second = json.loads((copy / "environment.json").read_text())
    assert second["flags"]["XLA_FLAGS"] == "--xla_dump_to=nowhere"
    assert (second["began_at"], second["earlier"][0]) == (6, {k: v for k, v in first.items() if k != "earlier"})


def test_the_commit_of_a_checkout_and_whether_it_was_changed(tmp_path):
    def git(*words):
        who = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    assert environment.commit(tmp_path) is None
    (tmp_path / "a").write_text("1")
    git("init", "-q")
    git("add", "a")
    git("commit", "-qm", "a")
    head = git("rev-parse", "HEAD").strip()
    assert environment.commit(tmp_path) == head
    (tmp_path / "a").write_text("2")
    assert environment.commit(tmp_path) == f"{head} + changes"

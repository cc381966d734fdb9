"""A training run and its folder: it continues bit for bit, refuses what would make it another run, loses nothing."""

import contextlib
import io
import json
import shutil

import jax
import numpy as np
import pytest
from conftest import REFERENCE
from safetensors.numpy import load_file, save_file

from tav_jax import Clip, TuneAVideo
from tav_jax import config as configs
from tav_jax.cli import edit
from tav_jax.diffusion import programs
from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.io import weights
from tav_jax.training import checkpoint, loop, metrics, run_directory
from tav_jax.training.run import Run
from tav_jax.training.run_directory import RunDirectory


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("clip") / "square.mp4"
    frames = np.full((6, 32, 40, 3), 60, np.uint8)
    for i, frame in enumerate(frames):
        frame[8:20, 3 + 4 * i : 15 + 4 * i] = (220, 40, 40)
    Clip(frames, 10.0).save(file)
    return file


@pytest.fixture(scope="module")
def settings(clip_file):
    """A small run of six steps, but for the changes."""

    def make(**changes):
        c = configs.get_config()
        c.model.update(path=str(REFERENCE / "sd1/model"), dtype="float32")
        c.clip.update(path=str(clip_file), prompt="red square is moving", frames=3, height=32, width=32)
        c.train.update(steps=6, learning_rate=1e-3, checkpoint_every=2, preview_every=0)
        c.edit.update(steps=2, inversion_steps=2, guidance=3.0, prompts=("blue square",))
        c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
        return c

    return make


def trained(folder) -> dict[str, np.ndarray]:
    return weights.torch_tensors(TuneAVideo.restore(folder).components.unet, "unet")


def steps_logged(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(folder, config) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        Run.start_or_continue(str(folder), config).train()
    return said.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings):
    """The folder of an uninterrupted run. Tests that change it make a copy."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    said = train(folder, settings())
    assert "Tuning for 6 steps: 0.03 M of 0.39 M parameters, 3 frames of 32×32, float32" in said
    assert str(folder) in said
    return folder


def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(whole, settings, tmp_path):
    train(tmp_path / "run", settings(train__steps=3))
    (tmp_path / "run/metrics.jsonl").open("a").write('{"step": 4, "loss": 9}\n{"step": 5, "lo')  # left by a kill
    said = train(tmp_path / "run", settings())
    assert "Continuing at step 3 of 6" in said
    one, two = trained(whole), trained(tmp_path / "run")
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert steps_logged(whole) == steps_logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    losses = [[json.loads(x)["loss"] for x in (w / "metrics.jsonl").open()] for w in (whole, tmp_path / "run")]
    assert losses[0] == losses[1]
    assert np.isfinite(losses).all()


def test_a_run_learns_and_keeps_only_what_it_learned(whole, sd1):
    before = load_file(sd1.model / "unet/diffusion_pytorch_model.safetensors")
    after = trained(whole)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == set(load_file(sd1.root / "trained_params.safetensors"))
    kept = sorted(int(folder.name) for folder in (whole / "checkpoints").iterdir())
    assert kept == [4, 6]  # the newest two
    assert not (whole / "checkpoints/2").exists()


def test_the_notebooks_tune_is_the_same_run(whole, settings):
    c = settings()
    tav = TuneAVideo.from_pretrained(c.model.path, dtype="float32", seed=c.seed)
    result = tav.tune(loop.load_clip(c), c.clip.prompt, steps=6, learning_rate=1e-3, seed=c.seed)
    assert result.losses.shape == result.grad_norms.shape == (6,)
    logged = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").open()]
    np.testing.assert_allclose(result.losses, logged, rtol=1e-6)
    ours, theirs = weights.torch_tensors(tav.components.unet, "unet"), trained(whole)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_run_says_so_and_more_steps_go_on(whole, settings, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    assert "is finished: 6 steps of 6" in train(tmp_path / "run", settings())
    assert "Continuing at step 6 of 7" in train(tmp_path / "run", settings(train__steps=7))
    assert steps_logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6, 7]


def test_another_config_is_refused_with_the_difference(whole, settings):
    with pytest.raises(InputError, match=r"train\.learning_rate was 0\.001 and is 0\.002"):
        Run.start_or_continue(str(whole), settings(train__learning_rate=2e-3))


def test_changed_base_weights_are_refused(whole, settings, sd1, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.copytree(sd1.model, tmp_path / "model")
    for file in (tmp_path / "run/config.json",):
        file.write_text(file.read_text().replace(str(sd1.model), str(tmp_path / "model")))
    TuneAVideo.restore(tmp_path / "run")
    file = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"][0] += 1e-3
    save_file(tensors, file)
    with pytest.raises(WeightsError, match="have changed since this run began"):
        TuneAVideo.restore(tmp_path / "run")
    with pytest.raises(WeightsError, match="have changed since this run began"):
        train(tmp_path / "run", settings(model__path=str(tmp_path / "model"), train__steps=7))


def test_nothing_is_written_where_a_run_cannot_begin(settings, tmp_path):
    with pytest.raises(InputError, match=r"clip\.path is empty"):
        train(tmp_path / "run", settings(clip__path=""))
    with pytest.raises(MissingError, match=r"github\.com/showlab/Tune-A-Video"):
        train(tmp_path / "run", settings(clip__path="data/man-skiing.mp4"))
    with pytest.raises(InputError, match="has 6 frames"):
        train(tmp_path / "run", settings(clip__frames=60))
    with pytest.raises(MissingError, match=r"pip install 'tav_jax\[wandb\]'"):
        train(tmp_path / "run", settings(log__wandb="mine"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file; give a folder"):
        train(tmp_path / "file", settings())
    with pytest.raises(MissingError, match="holds no run"):
        Run.open(tmp_path / "run")


def test_previews_are_files_and_pictures_in_the_log(settings, tmp_path):
    prompts = ("blue square", "a / b 🎿")
    config = settings(train__steps=2, train__preview_every=2, edit__prompts=prompts, log__tensorboard=True)
    train(tmp_path / "run", config)
    found = sorted(str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run/previews").rglob("*.*"))
    assert found == ["previews/step_000002/a-b.mp4", "previews/step_000002/blue-square.mp4"]
    events = b"".join(file.read_bytes() for file in (tmp_path / "run/tensorboard").iterdir())
    for tag in (b"preview/blue-square", b"preview/a-b", b"train/loss"):
        assert tag in events
    # A preview changes nothing of the run.
    train(tmp_path / "quiet", settings(train__steps=2))
    one, two = trained(tmp_path / "run"), trained(tmp_path / "quiet")
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_profile_can_be_asked_for(settings, tmp_path):
    train(tmp_path / "run", settings(train__steps=3, log__profile_step=1, log__profile_steps=1))
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(whole, settings, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    with pytest.raises(InputError, match=r"step 8 could not be written .*no space left.*earlier ones are whole"):
        train(tmp_path / "run", settings(train__steps=9))
    monkeypatch.undo()
    assert Run.open(tmp_path / "run").checkpoints.newest == 6
    one, two = trained(whole), trained(tmp_path / "run")
    assert all(np.array_equal(one[name], two[name]) for name in one)


# --------------------------------------------------------------------------------------------------------- editing


def test_edits_share_one_inversion_and_one_program(whole, settings, tmp_path, capsys, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    job = Run.open(tmp_path / "run")
    monkeypatch.setattr(edit.memory, "available", lambda: 1)  # no room for more than one prompt at a time
    programs.denoise_loop.clear_cache()
    paths = edit.edit(job, ["blue square", "red circle", "blue square"])
    assert programs.denoise_loop._cache_size() == 2  # the inversion and the sampler
    assert [path.rsplit("/", 1)[1] for path in paths] == [
        "blue-square.mp4",
        "red-circle.mp4",
        "side-by-side-blue-square-red-circle-blue-square.mp4",
    ]
    assert "Inverted the clip in 2 steps" in capsys.readouterr().out
    edit.edit(job, ["green"])
    assert "Reusing the inversion" in capsys.readouterr().out
    assert programs.denoise_loop._cache_size() == 2
    with pytest.raises(InputError, match=r"blue-square\.mp4 exists already; add --force"):
        edit.edit(job, ["blue square"])
    edit.edit(job, ["blue square"], force=True)

    job.config.edit.inversion_steps = 3
    edit.edit(job, ["other"])
    assert "Inverted the clip in 3 steps" in capsys.readouterr().out


def test_batches_give_what_single_prompts_give(whole, monkeypatch):
    job = Run.open(whole)
    tav, e = job.restore(), job.config.edit
    start, texts = tav.noise(0, 3, (32, 32)), ["red", "blue", "red square"]
    monkeypatch.setattr(edit.memory, "available", lambda: None)
    together = edit.sample_in_batches(tav, texts, start, e)
    monkeypatch.setattr(edit.memory, "prompt_batch_size", lambda wanted, each: 2)  # the second batch is filled up
    in_twos = edit.sample_in_batches(tav, texts, start, e)
    assert [x.prompt for x in together] == [x.prompt for x in in_twos] == texts
    for a, b in zip(together, in_twos, strict=True):
        assert np.abs(a.frames.astype(int) - b.frames.astype(int)).max() <= 1


def test_the_configs_strength_is_the_edits(whole):
    job = Run.open(whole)
    tav, e = job.restore(), job.config.edit
    noise = tav.noise(0, 3, (32, 32))
    e.strength = 0.5
    [made] = edit.sample_in_batches(tav, ["red"], noise, e)
    wanted = tav.sample("red", latents=noise, steps=e.steps, guidance=e.guidance, strength=0.5)
    assert np.array_equal(made.frames, wanted.frames)
    assert not np.array_equal(
        made.latents, tav.sample("red", latents=noise, steps=e.steps, guidance=e.guidance).latents
    )
    with pytest.raises(InputError, match="--no-inversion leaves no clip to keep; add --strength=1"):
        edit.edit(job, ["red"], inversion=False)


def test_noise_starts_and_other_folders(whole, tmp_path):
    paths = edit.edit(Run.open(whole), ["red"], out=str(tmp_path / "out"), inversion=False, seeds=(1, 2), suffix=".gif")
    assert sorted(path.rsplit("/", 1)[1] for path in paths) == [
        "red-seed1.gif",
        "red-seed2.gif",
        "side-by-side-red.gif",
    ]
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file; give a folder"):
        edit.edit(Run.open(whole), ["red"], out=str(tmp_path / "file"))
    with pytest.raises(InputError, match="there is no prompt"):
        edit.edit(Run.open(whole), [])


def test_side_by_side_shows_the_source_and_every_edit_in_step():
    frames = np.arange(3 * 16 * 24 * 3, dtype=np.uint8).reshape(3, 16, 24, 3)
    source = Clip(frames, 5.0)
    edits = [edit.Edit(frames=255 - frames, fps=5.0, prompt="word " * 500, latents=jax.numpy.zeros((1, 3, 2, 2, 4)))]
    both = edit.side_by_side(source, edits, "")
    assert both.frames.shape[0] == 3
    assert both.frames.shape[2] == 2 * 24 + edit.GAP
    assert both.frames.shape[1] < 16 + 100  # a long prompt is cut after a few lines
    np.testing.assert_array_equal(both.frames[:, -16:, :24], frames)
    np.testing.assert_array_equal(both.frames[:, -16:, -24:], 255 - frames)
    assert (both.frames[0, :-16] < 128).any()  # there are words


# ------------------------------------------------------------------------------------------------- a bucket's rules


class Bucket:
    """A store with a bucket's rules: whole objects only, no append, no rename, no folders of their own."""

    objects: dict[str, bytes]

    def __init__(self, path: str):
        self.name = str(path).rstrip("/")

    def __truediv__(self, part):
        return Bucket(f"{self.name}/{part}")

    def __str__(self):
        return self.name

    @property
    def parent(self):
        return Bucket(self.name.rsplit("/", 1)[0])

    def exists(self):
        return self.name in self.objects

    def mkdir(self, **_):
        pass

    def read_bytes(self):
        return self.objects[self.name]

    def read_text(self):
        return self.read_bytes().decode()

    def write_bytes(self, data: bytes):
        self.objects[self.name] = bytes(data)


def test_a_run_in_a_bucket(settings, tmp_path, monkeypatch, capsys):
    from etils import epath

    Bucket.objects = {}
    # Orbax has buckets of its own; here it gets a folder, with the path class that it imported.
    folder = epath.Path(tmp_path / "checkpoints")
    monkeypatch.setattr(loop, "Checkpoints", lambda _, **options: checkpoint.Checkpoints(folder, **options))
    monkeypatch.setattr(run_directory, "bucket", Bucket)
    place = "gs://bucket/run"
    config = settings(train__steps=4, train__preview_every=4, log__tensorboard=True)
    Run.start_or_continue(place, settings(train__steps=2)).train()
    Run.start_or_continue(place, config).train()
    lines = Bucket(f"{place}/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    names = {name.removeprefix(place + "/") for name in Bucket.objects}
    assert {"config.json", "environment.json", "metrics.jsonl", "previews/step_000004/blue-square.mp4"} <= names
    assert any(name.startswith("tensorboard/") for name in names)
    job = Run.open(place)
    edit.edit(job, ["red"])
    edit.edit(job, ["blue"])
    assert "Reusing the inversion in gs://bucket/run/inversions/" in capsys.readouterr().out
    assert Bucket(f"{place}/edits/red.mp4").read_bytes()[4:8] == b"ftyp"
    assert not any("/." in name for name in Bucket.objects)  # no scratch file was ever put there


def test_the_loop_reads_reports_late_and_loses_none():
    from flax.nnx import State

    from tav_jax.training.train_step import Report, TrainState, loop

    order = []

    def advance(learner, step):
        order.append(f"start {step}")
        return learner, Report(jax.numpy.float32(step), jax.numpy.float32(0))

    learner = TrainState(State({}), ())

    seen = []
    for progress in loop(advance, learner, 2, 9, lag=3):
        seen += [(number, float(report.loss)) for number, report in progress.reports]
        if progress.done < 9:
            assert len(seen) == max(0, progress.done - 2 - 3)
    assert seen == [(step + 1, float(step)) for step in range(2, 9)]


def test_files_are_whole_or_not_there(tmp_path):
    folder = RunDirectory(tmp_path)
    folder.write("a/b.json", "one")
    with pytest.raises(UnicodeEncodeError):
        folder.write("a/b.json", "\ud800")
    assert (tmp_path / "a/b.json").read_text() == "one"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b.json"]
    assert metrics._step('{"step": 3') == float("inf")

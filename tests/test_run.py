"""Training runs: continuing bit for bit, refusing changed settings, edits and previews, a run in a bucket."""

import io
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import logged, same_run, train, trained
from flax.nnx import State
from safetensors.numpy import load_file, save_file

from tav_jax import Clip, TuneAVideo, load_video
from tav_jax.cli import edit, main
from tav_jax.diffusion import programs
from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.evaluation.index import update_index
from tav_jax.evaluation.page import Entry
from tav_jax.evaluation.scores import score
from tav_jax.io import side_by_side, video, weights
from tav_jax.training import checkpoint, checksums, derived, editing, run_directory
from tav_jax.training import run as run_module
from tav_jax.training.run import Run
from tav_jax.training.run_directory import RunDirectory
from tav_jax.training.train_step import StepMetrics, TrainState, run_steps

pytestmark = pytest.mark.slow  # most of these tests compile a UNet or start processes


def steps_logged(directory) -> list[int]:
    return [step for step, _ in logged(directory)]


# ------------------------------------------------------------------------------------------------- training


def test_continued_run_equals_uninterrupted_run_bit_for_bit(finished_run, settings, tmp_path):
    train(tmp_path / "run", settings(train__steps=3))
    (tmp_path / "run/metrics.jsonl").open("a").write('{"step": 4, "loss": 9}\n{"step": 5, "lo')  # as left by a kill
    assert "Continuing at step 3 of 6" in train(tmp_path / "run", settings())
    assert same_run(finished_run, tmp_path / "run")
    assert steps_logged(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    assert np.isfinite([loss for _, loss in logged(finished_run)]).all()


def test_only_trainable_weights_change_and_only_the_newest_checkpoints_stay(finished_run, sd1):
    before = load_file(sd1.model / "unet/diffusion_pytorch_model.safetensors")
    after = trained(finished_run)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == set(load_file(sd1.root / "trained_params.safetensors"))
    assert sorted(int(x.name) for x in (finished_run / "checkpoints").iterdir()) == [4, 6]  # the newest two


def test_tune_in_python_equals_the_run(finished_run, settings):
    c = settings()
    run = Run.open(finished_run)
    tav = TuneAVideo.from_pretrained(c.model.path, dtype="float32", seed=c.seed)
    result = tav.tune(run.load_clip(), c.clip.prompt, steps=6, learning_rate=1e-3, seed=c.seed)
    assert result.losses.shape == result.grad_norms.shape == (6,)
    np.testing.assert_allclose(result.losses, [loss for _, loss in logged(finished_run)], rtol=1e-6)
    ours, theirs = weights.torch_tensors(tav.components.unet, "unet"), trained(finished_run)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_finished_run_is_reported_and_more_steps_continue_it(run_copy, settings):
    assert "is finished: 6 steps of 6" in train(run_copy, settings())
    assert "Continuing at step 6 of 7" in train(run_copy, settings(train__steps=7))
    assert steps_logged(run_copy) == [1, 2, 3, 4, 5, 6, 7]


def test_changed_settings_are_refused(finished_run, settings):
    with pytest.raises(InputError, match=r"train\.learning_rate was 0\.001 and is 0\.002"):
        Run.start_or_continue(str(finished_run), settings(train__learning_rate=2e-3))


def test_changed_base_weights_are_refused(run_copy, settings, sd1, tmp_path):
    shutil.copytree(sd1.model, tmp_path / "model")
    config = run_copy / "config.json"
    config.write_text(config.read_text().replace(str(sd1.model), str(tmp_path / "model")))
    TuneAVideo.restore(run_copy)
    file = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.bias"][0] += 1e-3
    save_file(tensors, file)
    with pytest.raises(WeightsError, match="have changed since this run began"):
        TuneAVideo.restore(run_copy)
    with pytest.raises(WeightsError, match="have changed since this run began"):
        train(run_copy, settings(model__path=str(tmp_path / "model"), train__steps=7))


def test_refused_run_writes_nothing(settings, tmp_path):
    with pytest.raises(InputError, match=r"clip\.path is empty"):
        train(tmp_path / "run", settings(clip__path=""))
    with pytest.raises(MissingError, match=r"github\.com/showlab/Tune-A-Video"):
        train(tmp_path / "run", settings(clip__path="data/man-skiing.mp4"))
    with pytest.raises(InputError, match="has 6 frames"):
        train(tmp_path / "run", settings(clip__frames=60))
    with pytest.raises(MissingError, match=r"pip install '.*\[wandb\]'`, or leave log\.wandb"):
        train(tmp_path / "run", settings(log__wandb="project"))
    with pytest.raises(InputError, match=r"edit\.steps is 3 and edit\.inversion_steps is 2; sample with at most 2"):
        train(tmp_path / "run", settings(edit__steps=3, train__preview_every=2))
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file; give a directory"):
        train(tmp_path / "file", settings())
    with pytest.raises(MissingError, match="holds no run"):
        Run.open(tmp_path / "run")


@pytest.mark.slow
def test_previews_are_written_and_logged_and_do_not_change_the_run(settings, tmp_path):
    prompts = ("blue square", "a / b 🎿")
    changes = {"edit__steps": 1, "edit__prompts": prompts, "log__tensorboard": True}  # fewer steps than the inversion
    train(tmp_path / "run", settings(train__steps=2, train__preview_every=2, **changes))
    files = sorted(str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run/previews").rglob("*.*"))
    assert files == ["previews/step_000002/a-b.mp4", "previews/step_000002/blue-square.mp4"]
    events = b"".join(file.read_bytes() for file in (tmp_path / "run/tensorboard").iterdir())
    for tag in (b"preview/blue-square", b"preview/a-b", b"train/loss"):
        assert tag in events
    train(tmp_path / "no-previews", settings(train__steps=2))
    assert same_run(tmp_path / "run", tmp_path / "no-previews")


def test_profile_is_written(settings, tmp_path):
    train(tmp_path / "run", settings(train__steps=3, log__profile_step=1, log__profile_steps=1))
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


def test_failed_checkpoint_leaves_the_previous_one(finished_run, run_copy, settings, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", full)
    with pytest.raises(InputError, match=r"step 8 could not be written .*no space left.*earlier ones are intact"):
        train(run_copy, settings(train__steps=9))
    monkeypatch.undo()
    assert Run.open(run_copy).checkpoints.newest == 6
    one, two = trained(finished_run), trained(run_copy)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_run_steps_fetches_metrics_late_but_before_a_save():
    """`lag` steps late, and all of them at the last step and where `fetch_all` is true."""
    progress_of = {}

    def step_fn(state, step):
        return state, StepMetrics(jnp.float32(step), jnp.float32(0))

    fetched = []
    for progress in run_steps(step_fn, TrainState(State({}), ()), 2, 9, lag=3, fetch_all=lambda done: done == 7):
        fetched += [(number, float(values.loss)) for number, values in progress.metrics]
        progress_of[progress.done] = progress
        assert progress.complete == (progress.done in (7, 9))
        late = 0 if progress.complete else min(3, progress.done - 2) if progress.done < 7 else progress.done - 7
        assert len(fetched) == progress.done - 2 - late
    assert sorted(progress_of) == list(range(3, 10))
    assert fetched == [(step + 1, float(step)) for step in range(2, 9)]


# ------------------------------------------------------------------------------------------------- editing


@pytest.mark.slow
def test_edits_share_one_inversion_and_one_program(run_copy, capsys, monkeypatch):
    run = Run.open(run_copy)
    monkeypatch.setattr(edit.memory, "available", lambda: 1)  # memory for one prompt at a time
    programs.denoise_loop.clear_cache()
    paths = edit.edit(run, ["blue square", "red circle", "blue square"])
    assert programs.denoise_loop._cache_size() == 2  # inversion and sampling
    assert [path.rsplit("/", 1)[1] for path in paths] == [
        "blue-square.mp4",
        "red-circle.mp4",
        "side-by-side-blue-square-red-circle-blue-square.mp4",
        "index.html",
    ]
    assert "Inverted the clip in 2 steps" in capsys.readouterr().out
    edit.edit(run, ["green"])
    assert "Reusing the inversion" in capsys.readouterr().out
    assert programs.denoise_loop._cache_size() == 2
    with pytest.raises(InputError, match=r"blue-square\.mp4 exists already; add --force"):
        edit.edit(run, ["blue square"])
    edit.edit(run, ["blue square"], force=True)

    run.config.edit.inversion_steps = 3
    edit.edit(run, ["other"])
    assert "Inverted the clip in 3 steps" in capsys.readouterr().out


def frames_of(run, prompt, step=None) -> np.ndarray:
    return video.load_video(edit.edit(run, [prompt], step=step)[0]).frames


@pytest.mark.slow
def test_edit_of_an_earlier_checkpoint_equals_the_edit_of_a_run_stopped_there(run_copy, settings, tmp_path, capsys):
    train(tmp_path / "stopped", settings(train__steps=4))
    expected, run = frames_of(Run.open(tmp_path / "stopped"), "blue square"), Run.open(run_copy)
    newest = frames_of(run, "blue square")
    shutil.rmtree(run_copy / "edits")
    capsys.readouterr()
    earlier = frames_of(run, "blue square", step=4)
    assert "Inverted the clip" in capsys.readouterr().out  # the inversion of another checkpoint is another one
    assert np.array_equal(earlier, expected)
    assert not np.array_equal(earlier, newest)
    with pytest.raises(MissingError, match=r"^\S+/checkpoints has no checkpoint of step 5; it has 4, 6$"):
        edit.edit(run, ["red"], step=5)


@pytest.mark.slow
def test_sampling_with_fewer_steps_than_the_inversion_uses_a_subset_of_its_timesteps(run_copy, monkeypatch):
    run, inverted = Run.open(run_copy), []
    real = editing.invert_cached
    monkeypatch.setattr(editing, "invert_cached", lambda *args: inverted.append(real(*args)) or inverted[-1])
    run.config.edit.update(inversion_steps=4, steps=3)
    frames = frames_of(run, "blue square")
    tav = TuneAVideo.restore(run_copy)
    expected = tav.sample("blue square", latents=inverted[0], steps=3, inversion_steps=4, guidance=3.0, fps=10.0)
    expected.save(run_copy / "expected.mp4")
    assert np.array_equal(frames, video.load_video(run_copy / "expected.mp4").frames)
    other = tav.sample("blue square", latents=inverted[0], steps=3, guidance=3.0)
    assert not np.array_equal(expected.frames, other.frames)
    run.config.edit.steps = 5
    with pytest.raises(InputError, match=r"edit\.steps is 5 and edit\.inversion_steps is 4; sample with at most 4"):
        edit.edit(run, ["red"])
    edit.edit(run, ["red"], inversion=False)  # there is no inversion to be compatible with


@pytest.mark.slow
def test_batches_equal_single_prompts(finished_run, monkeypatch):
    run = Run.open(finished_run)
    tav, prompts = TuneAVideo.restore(finished_run), ["red", "blue", "red square"]
    options = editing.sampling_options(run.config, tav.noise(0, 3, (32, 32)))
    monkeypatch.setattr(edit.memory, "available", lambda: None)
    one_batch = edit.sample_in_batches(tav, prompts, options)
    monkeypatch.setattr(edit.memory, "prompt_batch_size", lambda wanted, each: 2)  # the second batch is padded
    two_batches = edit.sample_in_batches(tav, prompts, options)
    assert [x.prompt for x in one_batch] == [x.prompt for x in two_batches] == prompts
    for a, b in zip(one_batch, two_batches, strict=True):
        assert np.abs(a.frames.astype(int) - b.frames.astype(int)).max() <= 1


@pytest.mark.slow
def test_strength_of_the_config_is_used(finished_run):
    run = Run.open(finished_run)
    tav, e = TuneAVideo.restore(finished_run), run.config.edit
    noise = tav.noise(0, 3, (32, 32))
    e.strength = 0.5
    [ours] = edit.sample_in_batches(tav, ["red"], editing.sampling_options(run.config, noise))
    options = {"latents": noise, "steps": e.steps, "guidance": e.guidance}
    assert np.array_equal(ours.frames, tav.sample("red", strength=0.5, **options).frames)
    assert not np.array_equal(ours.latents, tav.sample("red", **options).latents)
    with pytest.raises(InputError, match="--no-inversion leaves no clip to keep; add --strength=1"):
        edit.edit(run, ["red"], inversion=False)


def test_edits_from_noise_and_in_another_directory(finished_run, tmp_path):
    run = Run.open(finished_run)
    paths = edit.edit(run, ["red"], out=str(tmp_path / "out"), inversion=False, seeds=(1, 2), suffix=".gif")
    names = sorted(path.rsplit("/", 1)[1] for path in paths)
    assert names == ["index.html", "red-seed1.gif", "red-seed2.gif", "side-by-side-red-seed1-2.gif"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="file is a file; give a directory"):
        edit.edit(run, ["red"], out=str(tmp_path / "file"))
    with pytest.raises(InputError, match="there is no prompt"):
        edit.edit(run, [])


def test_scores_of_a_run_are_written_and_shown(run_copy, capsys, tmp_path, square_clip):
    """Here those without weights. The mask is the one that the edit recorded, at the size of latents."""
    clip = load_video(square_clip, frames=3, size=(32, 32))
    edited = 255 - clip.frames
    edited[:, :, :16] = clip.frames[:, :, :16]
    mask = np.zeros((3, 8, 8), np.float32)
    mask[:, :, 4:] = 1
    options = ["score", f"--workdir={run_copy}"]
    assert main.main(options) == 2
    assert "run/edits holds no edits of this version; make some with `tav edit" in capsys.readouterr().err
    entries = {}
    for name, shown in (("a.mp4", mask), ("b.gif", None)):
        video = Clip(edited, clip.fps).save(run_copy / "edits" / name)
        entries[name] = Entry("blue square", video, scores={"clip_text": 31.0}, mask=shown)
    update_index(RunDirectory(run_copy), "edits/", clip, "red square is moving", entries)
    (run_copy / "edits/b.gif").rename(tmp_path / "b.gif")  # leaves the page

    moved = square_clip.rename(tmp_path / "moved.mp4")
    try:
        assert main.main(options) == 2
        assert "does not exist; put it back, or give its new path with --source=…" in capsys.readouterr().err
        assert main.main([*options, f"--source={moved}"]) == 0
    finally:
        moved.rename(square_clip)
    decoded = load_video(run_copy / "edits/a.mp4").frames
    wide = mask.repeat(4, 1).repeat(4, 2)
    expected = score(decoded, None, source=clip, mask=wide)
    assert expected.background_psnr > 25  # the edit is compressed
    assert score(decoded, None, source=clip, mask=1 - wide).background_psnr < 15
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["flicker", "background_psnr"]
    assert table[1][0] == "a.mp4"
    written = json.loads((run_copy / "edits/scores.json").read_text())
    assert written["edits"] == [{"video": "a.mp4", "prompt": "blue square", **expected.to_dict()}]
    page = (run_copy / "edits/index.html").read_text("utf-8")
    shown = dict(re.findall(r'<td data-label="(.*?)">(.*?)</td>', page))
    assert shown == {"clip_text": "31", "flicker": f"{expected.flicker:.4g}"} | {
        "background_psnr": f"{expected.background_psnr:.4g}"
    }


def test_side_by_side_shows_source_and_edits():
    frames = np.arange(3 * 16 * 24 * 3, dtype=np.uint8).reshape(3, 16, 24, 3)
    edits = [video.Edit(frames=255 - frames, fps=5.0, prompt="word " * 500, latents=jnp.zeros((1, 3, 2, 2, 4)))]
    combined = side_by_side.side_by_side(Clip(frames, 5.0), edits, "")
    assert combined.frames.shape[0] == 3
    assert combined.frames.shape[2] == 2 * 24 + side_by_side.GAP
    assert combined.frames.shape[1] < 16 + 100  # a long prompt is cut after a few lines
    np.testing.assert_array_equal(combined.frames[:, -16:, :24], frames)
    np.testing.assert_array_equal(combined.frames[:, -16:, -24:], 255 - frames)
    assert (combined.frames[0, :-16] < 128).any()  # the prompt is drawn


# ------------------------------------------------------------------------------------------------- while training runs


def test_checkpoint_that_is_removed_while_it_is_verified_is_not_damaged(run_copy, tmp_path, monkeypatch):
    directory, real = run_copy / "checkpoints", checksums._hash
    (directory / "6").rename(tmp_path / "6")

    def hash_after_removal(file):
        if (directory / "4").exists():  # training saves step 6 and removes step 4
            (tmp_path / "6").rename(directory / "6")
            (directory / "4").rename(tmp_path / "4")
        return real(file)

    monkeypatch.setattr(checksums, "_hash", hash_after_removal)
    assert checksums.examine(directory) == checksums.Examination(6, [])


def test_checkpoint_that_is_removed_before_it_is_read_is_replaced_by_the_next_one(
    run_copy, tmp_path, monkeypatch, capsys
):
    expected, real = trained(run_copy, 4), TuneAVideo.from_config

    def remove_and_load(config):
        (run_copy / "checkpoints/6").rename(tmp_path / "6")
        return real(config)

    monkeypatch.setattr(TuneAVideo, "from_config", remove_and_load)
    run = Run.open(run_copy)
    tav = TuneAVideo.restore(run_copy, run=run)
    found = weights.torch_tensors(tav.components.unet, "unet")
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert run.checkpoints.newest == 4
    assert "damaged" not in capsys.readouterr().out
    (tmp_path / "6").rename(run_copy / "checkpoints/6")
    with pytest.raises(MissingError, match="has no checkpoint of step 6; it has 4"):
        TuneAVideo.restore(run_copy, step=6)


# ------------------------------------------------------------------------------------------------- storage


class Bucket:
    """A store with the rules of a bucket: whole objects only, no append, no rename, no directories."""

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

    def open(self, mode: str = "rb"):
        assert mode == "rb"
        if not self.exists():
            raise FileNotFoundError(self.name)
        return io.BytesIO(self.read_bytes())

    def is_file(self):
        return self.exists()

    def write_bytes(self, data: bytes):
        self.objects[self.name] = bytes(data)


@pytest.mark.slow
def test_run_in_a_bucket(settings, tmp_path, monkeypatch, capsys):
    from etils import epath

    Bucket.objects = {}
    # Orbax accesses buckets by itself; here it writes to a local directory, through the path class that it uses.
    checkpoints = epath.Path(tmp_path / "checkpoints")
    monkeypatch.setattr(run_module, "Checkpoints", lambda _, **options: checkpoint.Checkpoints(checkpoints, **options))
    monkeypatch.setattr(run_directory, "bucket", Bucket)
    workdir = "gs://bucket/run"
    train(workdir, settings(train__steps=2))
    train(workdir, settings(train__steps=4, train__preview_every=4, log__tensorboard=True))
    lines = Bucket(f"{workdir}/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    names = {name.removeprefix(workdir + "/") for name in Bucket.objects}
    assert {"config.json", "environment.json", "metrics.jsonl", "previews/step_000004/blue-square.mp4"} <= names
    assert any(name.startswith("tensorboard/") for name in names)
    run = Run.open(workdir)
    edit.edit(run, ["red"])
    edit.edit(run, ["blue"])
    assert "Reusing the inversion in gs://bucket/run/inversions/" in capsys.readouterr().out
    assert Bucket(f"{workdir}/edits/red.mp4").read_bytes()[4:8] == b"ftyp"
    hidden = [name for name in Bucket.objects if "/." in name]
    assert hidden == [f"{workdir}/edits/.tav-edits.json"]  # the record of the page; no scratch file was uploaded


def test_files_are_written_atomically(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write("a/b.json", "one")
    with pytest.raises(UnicodeEncodeError):
        directory.write("a/b.json", "\ud800")
    assert (tmp_path / "a/b.json").read_text() == "one"
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["b.json"]
    assert derived.step_of_line('{"step": 3') == float("inf")

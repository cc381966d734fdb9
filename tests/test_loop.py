"""What a run prints and writes, without a network: coverage of the clip, mean loss, times, previews, file names."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refusal
from flax.nnx import State

from tav_jax import Clip, TuneAVideo
from tav_jax.cli import edit, main
from tav_jax.distributed import processes
from tav_jax.errors import InputError, NotFiniteError
from tav_jax.io import progress, side_by_side, video
from tav_jax.io.caption import caption_height
from tav_jax.training import loop, metrics
from tav_jax.training.run import Run
from tav_jax.training.run_directory import RunDirectory
from tav_jax.training.train_step import StepMetrics, TrainState
from tav_jax.training.trainer import Trainer


@pytest.mark.parametrize(
    ("frames", "fps", "start", "stride", "source", "expected"),
    [
        (
            24,
            30.0,
            0,
            1,
            186,
            "24 frames at stride 1: 0.8 s of the clip's 6.2 s; --config.clip.stride=8 covers all of it",
        ),
        (24, 3.75, 0, 8, 186, "24 frames at stride 8: 6.4 s of the clip's 6.2 s"),
        (
            5,
            9.0,
            50,
            1,
            90,
            "5 frames at stride 1: 0.6 s of the clip's 10.0 s; --config.clip.stride=9 covers all after 50",
        ),
        (1, 10.0, 0, 1, 100, "1 frame at stride 1: 0.1 s of the clip's 10.0 s"),
        (3, 10.0, 0, 1, None, "3 frames at stride 1: 0.3 s"),
    ],
)
def test_coverage_of_the_clip(frames, fps, start, stride, source, expected):
    clip = Clip(np.zeros((frames, 8, 8, 3), np.uint8), fps, source_frames=source)
    assert loop.coverage(clip, start, stride) == expected.replace("all after 50", "all of it after frame 50") + "."


def test_stride_that_covers_all_of_a_clip_can_be_loaded(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (31, 16, 16, 3), np.uint8)
    for name in ("a.mp4", "a.gif"):
        path = Clip(frames, 10.0).save(tmp_path / name)
        text = loop.coverage(video.load_video(path, frames=4), 0, 1)
        assert text == "4 frames at stride 1: 0.4 s of the clip's 3.1 s; --config.clip.stride=10 covers all of it."
        assert len(video.load_video(path, frames=4, stride=10).frames) == 4


def test_mean_loss_is_shown():
    bar = progress.progress_bar(1000, "tuning", True)
    bar.fp = io.StringIO()
    loss = progress.MeanLoss(bar)
    for value in [9.0] * 10 + [1.0, 3.0] * (progress.MEAN_OF // 2):
        loss.step(value)
    assert (bar.n, bar.postfix) == (10 + progress.MEAN_OF, "mean loss=2.0000")


def test_seconds_of_steps_leave_out_checkpoints_and_previews(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    log = metrics.Metrics(RunDirectory(tmp_path), 0)
    # Steps of one second: the first three are fetched together, then a preview takes 50 seconds.
    for passed, fetched, between in ((3, (1, 2, 3), 50), (0, (), 0), (1, (4,), 0), (1, (5,), 7), (2, (6, 7), 0)):
        clock[0] += passed
        seconds = log.seconds_per_step(len(fetched))
        for step in fetched:
            log.write(step, {"loss": 0.5, "seconds": seconds})
        with log.untimed():
            clock[0] += between
    log.close()
    lines = [json.loads(line) for line in (tmp_path / metrics.FILE).read_text().splitlines()]
    assert lines == [{"step": step, "loss": 0.5, "seconds": 1.0} for step in range(1, 8)]


def test_profiler_records_exactly_the_steps_of_the_config(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(loop.jax.profiler, "start_trace", lambda path: calls.append("start"))
    monkeypatch.setattr(loop.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    for first, count, expected in (
        (1, 2, ["start", 1, 2, "stop", 3, 4]),
        (3, 1, [1, 2, "start", 3, "stop", 4]),
        (4, 9, [1, 2, 3, "start", 4, "stop"]),
        (0, 3, [1, 2, 3, 4]),
    ):
        calls.clear()
        profiler = loop.Profiler(RunDirectory(tmp_path), first, count)
        profiler.after(0, jnp.zeros(1))
        for step in range(1, 5):
            calls.append(step)
            profiler.after(step, jnp.zeros(1))
        profiler.close()
        assert calls == expected


def test_previews_are_announced_and_their_paths_are_printed(tmp_path, capsys, monkeypatch, settings):
    config = settings(edit__prompts=("blue square", "a dog"))
    run = Run(RunDirectory(tmp_path), config)
    bars, sampled = [], Clip(np.zeros((1, 8, 8, 3), np.uint8), 8.0)

    def steps(count):
        def call(*args, progress, **options):
            progress(count)
            return sampled

        return call

    def shown_bar(*args, **options):
        bars.append(progress.progress_bar(*args, **options, show=True))
        return bars[-1]

    monkeypatch.setattr(loop, "progress_bar", shown_bar)
    monkeypatch.setattr(loop, "publish_video", lambda *_: None)
    tav, log = TuneAVideo.__new__(TuneAVideo), metrics.Metrics.__new__(metrics.Metrics)
    monkeypatch.setattr(tav, "invert", steps(2))
    monkeypatch.setattr(tav, "sample", steps(2))
    monkeypatch.setattr(log, "log_preview", lambda *_: None)
    loop.write_previews(run, tav, jnp.zeros(1), None, 100, log)
    output = capsys.readouterr().out.splitlines()
    assert output == [
        "Sampling 2 previews at step 100.",
        f"Wrote {tmp_path}/previews/step_000100/blue-square.mp4.",
        f"Wrote {tmp_path}/previews/step_000100/a-dog.mp4.",
    ]
    assert (bars[0].n, bars[0].total, bars[0].desc) == (6, 6, "previews of step 100")


def test_command_for_an_edit_can_be_pasted():
    for path, quoted in (("/runs/ski", "/runs/ski"), ("/my run", "'/my run'")):
        assert loop.edit_command(Run(RunDirectory(path), None)) == f"`tav edit --workdir={quoted} --prompt=…`"
    assert [loop.plural(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_tuning_in_python_refuses_values_that_are_not_finite(what):
    trainer: Trainer = Trainer.__new__(Trainer)
    trainer.state = TrainState(State({}), ())
    bad = TrainState(State({}), (jnp.array([jnp.nan]),)) if what == "weights" else trainer.state
    loss = jnp.float32(jnp.nan if what == "loss" else 0.5)
    trainer.step_fn = lambda state, step: (bad, StepMetrics(loss if step == 1 else jnp.float32(0.5), jnp.float32(1)))
    trainer.load_into_unet = lambda: pytest.fail("the weights are not finite")
    message = refusal(NotFiniteError, trainer.run, 3)
    expected = "loss is nan at step 2" if what == "loss" else "not finite after step 3"
    assert expected in message
    assert "the pipeline keeps its weights" in message


# ------------------------------------------------------------------------------------------------- file names of edits


def test_file_names_tell_what_differs_from_the_config(settings):
    config = settings().edit.to_dict()
    names = set()
    for changes, step, expected in (
        ({}, None, ""),
        ({"strength": 0.6}, None, "-strength0.6"),
        ({"guidance": 7.0, "inversion_steps": 25}, None, "-guidance7-inversion-steps25"),
        ({"guidance": 7.0000001}, None, "-guidance7.0000001"),
        ({"sampler": "dpm++2m"}, 400, "-sampler-dpm++2m-step400"),
        ({"negative_prompt": "very ugly"}, None, "-negative-prompt-very-ugly"),
        ({"negative_prompt": "very-ugly"}, None, "-negative-prompt-very-ugly-5fb16457"),
        ({"negative_prompt": "Ugly, 🎿"}, None, "-negative-prompt-ugly-87704c51"),
        ({"mask": "/a/b/My mask.png"}, None, "-mask-my-mask.png-ae9f3d6c"),
        ({"prompts": ("red",)}, None, ""),
    ):
        suffix = edit.settings_suffix(config, {**config, **changes}, step)
        assert suffix == expected
        names.add(suffix)
    many = {"guidance": 7.0, "negative_prompt": "x" * 500, "strength": 0.6}
    for changes in (many, many | {"strength": 0.7}):
        suffix = edit.settings_suffix(config, {**config, **changes})
        assert suffix.startswith("-settings-")
        assert len(suffix) == 18
        names.add(suffix)
    assert len(names) == 11


def test_file_names_of_several_seeds(settings):
    assert [name for *_, name in edit._outputs(["red", "red"], (1, 2))] == ["red-seed1", "red-seed2"]
    assert edit._seeds_suffix((None,)) == ""
    assert edit._seeds_suffix((1, 2, 1)) == "-seed1-2"
    long = edit._seeds_suffix(range(100))
    assert len(long) == 15
    assert long != edit._seeds_suffix(range(101))


def test_seed_that_would_have_no_effect_is_refused(settings):
    message = refusal(InputError, edit.edit, Run(RunDirectory("run"), settings()), ["red"], seeds=(5,))
    assert message.startswith("--seed=5 has no effect on edits that start from the inverted clip; add --no-inversion")


# ------------------------------------------------------------------------------------------------- side by side


def test_many_clips_are_put_into_a_grid(settings):
    assert side_by_side.grid_shape(2, 512, 512) == (2, 1)
    assert side_by_side.grid_shape(7, 512, 512) == (7, 1)
    assert side_by_side.grid_shape(8, 512, 512) == (4, 2)
    assert side_by_side.grid_shape(32, 512, 512) == (7, 5)
    assert side_by_side.grid_shape(2, 4096, 4096) == (1, 2)
    message = refusal(InputError, side_by_side.grid_shape, 301, 512, 512)
    assert message.startswith("300 edits of 512×512 pixels do not fit beside the clip into one video; sample at most ")
    most = int(message.split("at most ")[1].split()[0])
    side_by_side.grid_shape(most + 1, 512, 512)
    run = Run(RunDirectory("run"), settings(clip__height=512, clip__width=512))  # refused before anything is loaded
    assert refusal(InputError, edit.edit, run, [str(n) for n in range(300)]) == message


def test_cells_of_the_grid(monkeypatch):
    monkeypatch.setattr(side_by_side, "MAX_WIDTH", 100)
    frames = np.arange(2 * 16 * 40 * 3, dtype=np.uint8).reshape(2, 16, 40, 3)
    edits = [video.Edit(frames=frames ^ np.uint8(n), fps=5.0, prompt="word " * n) for n in (1, 2, 30)]
    combined = side_by_side.side_by_side(Clip(frames, 5.0), edits, "").frames
    top = caption_height(40, 1)
    assert combined.shape[2] == 2 * 40 + side_by_side.GAP
    np.testing.assert_array_equal(combined[:, top : top + 16, :40], frames)
    np.testing.assert_array_equal(combined[:, top : top + 16, -40:], edits[0].frames)
    np.testing.assert_array_equal(combined[:, -16:, :40], edits[1].frames)
    np.testing.assert_array_equal(combined[:, -16:, -40:], edits[2].frames)
    tall = caption_height(40)
    assert combined.shape[1] == top + 16 + side_by_side.GAP + tall + 16


# ------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--prompt=a", "cat"], "'cat' is not …; a text with spaces needs quotes: --prompt='a cat'"),
        (
            ["--prompt", "a", "red", "cat", "--gif"],
            "'red' is not …; a text with spaces needs quotes: --prompt='a red cat'",
        ),
        (["--verbose"], "'--verbose' is not …; `tav edit --help` lists its options"),
    ],
)
def test_text_without_quotes_is_refused_with_the_quoted_text(words, expected, capsys):
    assert main.main(["edit", "--workdir=x", *words]) == 2
    assert capsys.readouterr().err == f"tav: {expected.replace('…', 'an option of `tav edit`')}\n"


def test_error_in_process_0_keeps_its_traceback(monkeypatch):
    def fail():
        raise InputError("it does not work")

    monkeypatch.setattr(processes, "_group", processes.Group("localhost:1", 2, 0))
    monkeypatch.setattr(processes, "gather", lambda name, value: [value, None])
    with pytest.raises(InputError, match="it does not work") as caught:
        processes.run_on_primary("failing", fail)
    assert caught.traceback[-1].name == "fail"

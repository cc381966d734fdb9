"""The clip of a run: found from every directory, recognized by its content, refused if it is another one."""

import json
import shutil

import numpy as np
import pytest
from conftest import refusal, train

from tav_jax import Clip
from tav_jax.cli import edit
from tav_jax.errors import InputError, MissingError
from tav_jax.training import source_clip
from tav_jax.training.run import Run

pytestmark = pytest.mark.slow  # the run that these tests share compiles a UNet

FRAMES = np.arange(3 * 16 * 16 * 3, dtype=np.uint8).reshape(3, 16, 16, 3)


def test_moved_clip_is_accepted_and_another_one_is_refused(run_copy, square_clip, settings, tmp_path):
    (run_copy / "environment.json").unlink()  # a derived file, which may be lost
    moved = shutil.copy(square_clip, tmp_path / "square.mp4")
    config = settings(clip__path=str(moved))
    assert "is finished" in train(run_copy, config)
    assert json.loads((run_copy / "config.json").read_text())["clip"]["path"] == str(moved)

    Clip(np.full((6, 32, 40, 3), 9, np.uint8), 10.0).save(moved)
    config.train.steps = 7
    message = refusal(InputError, train, run_copy, config)
    was = f"{square_clip} (3 frames of 32×32 with digest "
    assert message.startswith(f"{moved} (3 frames of 32×32 with digest ")
    assert f"is not the clip that this run was tuned on, {was}" in message
    assert "give that clip with --config.clip.path=…, or use another --workdir" in message
    message = refusal(InputError, edit.edit, Run.open(run_copy), ["red"])
    assert message.endswith("give that clip with --clip=…")
    assert not (run_copy / "edits").exists()

    moved.unlink()
    expected = f"{moved}, the clip that this run was tuned on, does not exist; put it back, or give its new path with "
    assert refusal(MissingError, edit.edit, Run.open(run_copy), ["red"]) == expected + "--clip=…"
    assert refusal(MissingError, train, run_copy, config) == expected + "--config.clip.path=…"

    config.clip.path = str(square_clip)
    config.train.steps = 4
    assert "is finished: 6 steps, more than train.steps=4." in train(run_copy, config)
    run = Run.open(run_copy)
    assert run.config.clip.path == str(square_clip)
    run.load_clip(run.checkpoints.read_metadata()["clip"])


def test_relative_path_is_stored_as_an_absolute_one(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = settings(clip__path="a/../man.mp4")
    assert Run.start_or_continue("run", config).config.clip.path == str(tmp_path / "man.mp4")
    assert source_clip.absolute("gs://bucket/man.mp4") == "gs://bucket/man.mp4"


def test_run_without_a_record_of_its_clip_continues_with_the_same_path_only(run_copy, settings, tmp_path):
    """As written by early versions. The path may be relative there."""
    run = Run.start_or_continue(str(run_copy), settings())
    assert not run.clip_moved(None)
    run.config.clip.path = str(tmp_path / "other.mp4")
    assert "clip.path was '" in refusal(InputError, run.clip_moved, None)
    assert run.clip_moved({"frames": "0"})


def test_same_file_that_is_decoded_differently_is_accepted_with_a_note(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(name.encode())
    for path in (tmp_path / "a/1.png", tmp_path / "a"):
        recorded = source_clip.describe(Clip(FRAMES, 8.0), str(path))
        assert recorded["file"]["bytes"] == 1
        assert source_clip.check(recorded, Clip(FRAMES, 8.0), "elsewhere", "") is None
        rounded = Clip(FRAMES ^ 1, 8.0)
        assert "is decoded to other frames here" in (source_clip.check(recorded, rounded, str(path), "") or "")
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        refusal(InputError, source_clip.check, recorded, rounded, str(other), "use the old one")
    assert source_clip.check(None, Clip(FRAMES, 8.0), "elsewhere", "") is None


def test_forgotten_prompt_is_refused_and_an_empty_one_is_accepted(settings, tmp_path):
    message = refusal(InputError, Run.start_or_continue, str(tmp_path / "run"), settings(clip__prompt=None))
    assert message.startswith(
        "clip.prompt is not set; describe the clip in one sentence, such as --config.clip.prompt="
    )
    assert f"`tav caption {settings().clip.path}` suggests a sentence" in message
    assert Run.start_or_continue(str(tmp_path / "run"), settings(clip__prompt="")).config.clip.prompt == ""

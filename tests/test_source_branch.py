"""`tav edit` with two-branch editing: the settings, the cached trajectory, masks from files, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from tav_jax import Clip, InputError, TuneAVideo, load_video
from tav_jax.cli import edit, main
from tav_jax.config import equalizer_factors, get_config
from tav_jax.diffusion import programs
from tav_jax.io.masks import load_mask
from tav_jax.training import editing
from tav_jax.training.run import Run


@pytest.fixture
def mask_file(tmp_path):
    """White in the right half of the 32×40 clip of the tests."""
    mask = np.zeros((32, 40), np.uint8)
    mask[:, 20:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.mark.slow
def test_an_edit_keeps_the_source_outside_its_mask(run_copy, mask_file, capsys, square_clip, monkeypatch):
    """The files, their names, the cached trajectory, and an edit that may change nothing. (The tests' autoencoder has
    random weights: a change of latents on one side changes all pixels.)"""
    edits, sample = [], edit.sample_in_batches
    monkeypatch.setattr(edit, "sample_in_batches", lambda *args: edits.extend(sample(*args)) or edits[-1:])
    options = ["edit", f"--workdir={run_copy}", "--prompt=blue square", "--mask", str(mask_file), "--blend-start=0"]
    shares = ["--self-attention-steps=0.5", "--feature-steps=0.8", "--cross-attention-steps=0.8"]
    assert (
        main.main([*options, *shares, "--equalizer=blue=2", "--blend-word=square", "--out", str(run_copy / "a")]) == 0
    )
    assert "Inverted the clip in 2 steps" in capsys.readouterr().out
    compiled = programs.denoise_loop._cache_size()
    Image.new("L", (40, 32)).save(mask_file)  # black: nothing may change
    assert main.main([*options, "--out", str(run_copy / "b")]) == 0  # with other controls
    assert "Reusing the inversion" in capsys.readouterr().out
    assert programs.denoise_loop._cache_size() == compiled
    tav = TuneAVideo.restore(run_copy)
    source = load_video(square_clip, frames=3, size=(32, 32))
    kept = np.asarray(tav.decode_video(tav.encode_video(source)))[0] * 255
    assert np.abs(edits[1].frames - kept).max() < 1.5  # the trajectory is cached in float16
    assert np.abs(edits[0].frames - kept).max() > 10
    page = (run_copy / "b" / "index.html").read_text()
    assert "--mask=" in page


@pytest.mark.slow
def test_the_options_are_those_of_sample(run_copy, mask_file):
    run = Run.open(run_copy)
    run.config.edit.update(
        self_attention_steps=0.5, blend_words=("square",), mask=str(mask_file), inversion_iterations=2
    )
    run.config.edit.update(inversion_prompt="red square is moving", cross_attention_steps=0.5, equalizer=("blue=2",))
    tav, clip = TuneAVideo.restore(run_copy), run.load_clip()
    trajectory = editing.invert_cached(run, tav, clip, 6)
    again = tav.invert(clip, steps=2, prompt="red square is moving", iterations=2, return_trajectory=True)
    np.testing.assert_allclose(trajectory, again, rtol=2**-11, atol=1e-6)  # cached in float16
    mask = editing.mask(run.config, 3)
    edited = tav.sample("blue square", **editing.sampling_options(run.config, trajectory, mask))
    direct = tav.sample(
        "blue square",
        source=trajectory,
        source_prompt="red square is moving",
        steps=2,
        guidance=3.0,
        self_attention_steps=0.5,
        feature_steps=0.0,
        cross_attention_steps=0.5,
        equalizer={"blue": 2.0},
        blend_words=["square"],
        mask=mask,
    )
    assert np.array_equal(edited.latents, direct.latents)


REFUSED = {
    "--blend-word=dog": "blend_words has 'dog', which is not in 'red square is moving', 'blue square'",
    "--equalizer=red": "edit.equalizer has 'red'; it must be a word and a factor from 0 to 1000, such as 'red=2.0'",
    "--equalizer=blue=2": "equalizer has no effect with cross_attention_steps 0; set it, 0.8 is usual",
    "--equalizer=blue=-1": "edit.equalizer has 'blue=-1'; it must be a word and a factor from 0 to 1000",
    "--self-attention-steps=1.5": "edit.self_attention_steps is 1.5; it must be 0.0 to 1.0",
    "--inversion-iterations=0": "edit.inversion_iterations is 0; it must be 1 to 100",
    "--mask=missing.png": "missing.png does not exist",
    "--no-inversion --feature-steps=0.5": "--no-inversion leaves no source to take attention, features or a background",
    "--feature-steps=0.5 --steps=3": "edit.steps is 3 and edit.inversion_steps is 2; sample with at most 2",
}


@pytest.mark.slow
@pytest.mark.parametrize("options", REFUSED)
def test_settings_that_are_refused(finished_run, capsys, options):
    arguments = ["edit", f"--workdir={finished_run}", "--prompt=blue square", f"--out={finished_run}-out"]
    assert main.main([*arguments, *options.split()]) == 2
    assert REFUSED[options] in capsys.readouterr().err
    assert not (finished_run.parent / f"{finished_run.name}-out").exists()


def test_equalizer_factors():
    assert equalizer_factors(["red=2", "spider man = 0.5"]) == {"red": 2.0, "spider man": 0.5}


def test_masks_have_the_frames_of_the_clip(square_clip, tmp_path):
    config = get_config().clip
    config.update(path=str(square_clip), frames=2, height=32, width=32, start=1, stride=2)
    frames = np.zeros((6, 32, 40, 3), np.uint8)
    frames[3, :, :16] = 255  # frame 1 of the clip
    Clip(frames, 10.0).save(tmp_path / "all.mp4")
    mask = load_mask(str(tmp_path / "all.mp4"), config, 2)
    assert mask.shape == (2, 32, 32)
    assert mask[0].max() < 0.1
    assert mask[1, :, :10].min() > 0.9 > 0.1 > mask[1, :, 14:].max()
    Clip(frames[[1, 3]], 10.0).save(tmp_path / "clip.mp4")
    np.testing.assert_allclose(load_mask(str(tmp_path / "clip.mp4"), config, 2), mask, atol=0.1)
    Image.fromarray(frames[3]).save(tmp_path / "still.png")
    np.testing.assert_allclose(load_mask(str(tmp_path / "still.png"), config, 2)[0], mask[1], atol=0.1)


def test_masks_that_are_refused(square_clip, tmp_path):
    config = get_config().clip
    config.update(path=str(square_clip), frames=3, height=32, width=32, start=0, stride=2)
    Clip(np.zeros((4, 32, 40, 3), np.uint8), 10.0).save(tmp_path / "short.mp4")
    with pytest.raises(InputError, match=r"short\.mp4 has 4 frames; it must be an image, or have 3 frames as the clip"):
        load_mask(str(tmp_path / "short.mp4"), config, 3)
    Image.fromarray(np.zeros((32, 80), np.uint8)).save(tmp_path / "wide.png")
    with pytest.raises(InputError, match=r"wide\.png is 80×32; draw it at the size of the clip, 40×32 or 32×32"):
        load_mask(str(tmp_path / "wide.png"), config, 3)

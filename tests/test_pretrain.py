"""The recipe of the embedded model: it can be stopped anywhere, and what it writes is a Stable Diffusion."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tav_jax import TuneAVideo
from tools import pretrain_demo_model as pretrain
from tools.pretrain_demo_model import Recipe


def lesson(workdir, steps, upto=None):
    """A toy: a vector learns the mean of random rows."""

    def loss(params, key, row):
        return jnp.mean((params["w"] - row) ** 2)

    def batch(step):
        if step == upto:
            raise KeyboardInterrupt
        return (np.random.default_rng(step).normal(size=3).astype(np.float32),)

    tx = pretrain.optimizer(0.1, steps)
    return pretrain.fit("toy", loss, {"w": jnp.zeros(3)}, tx, steps, batch, workdir, decay=0.9, every=5)


def test_a_stopped_lesson_goes_on_to_the_same_bits(tmp_path):
    whole = lesson(tmp_path / "whole", 20) if (tmp_path / "whole").mkdir() is None else None
    (tmp_path / "parts").mkdir()
    with pytest.raises(KeyboardInterrupt):
        lesson(tmp_path / "parts", 20, upto=13)
    assert np.array_equal(lesson(tmp_path / "parts", 20)["w"], whole["w"])
    lines = [json.loads(line)["step"] for line in (tmp_path / "parts" / "toy.jsonl").read_text().splitlines()]
    assert lines == [5, 10, 15, 20]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_finished_lesson_is_not_begun_again(tmp_path):
    first = lesson(tmp_path, 10)
    assert np.array_equal(lesson(tmp_path, 10, upto=0)["w"], first["w"])


@pytest.mark.slow
def test_the_whole_recipe_in_small_makes_a_model_that_opens(tmp_path):
    steps = {"vae_steps": 2, "polish_steps": 2, "pictures": 128, "unet_steps": 2, "unet_batch": 4}
    widths = {"vae_widths": (8, 8, 16), "unet_widths": (16, 32, 32), "unet_heads": (1, 2, 2), "text_width": 32}
    recipe = Recipe(**steps, **widths)
    pretrain.make(recipe, tmp_path / "work", tmp_path / "model")
    tav = TuneAVideo.from_pretrained(tmp_path / "model", dtype="float32")
    assert tav.encode_text("a red star on snow").shape == (1, 77, recipe.text_width)
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    latents = tav.encode_video(frames)
    assert latents.shape == (1, 2, 16, 16, 4)
    assert tav.decode_video(latents).shape == (1, 2, 64, 64, 3)
    assert tav.unet(latents, np.array([5]), tav.encode_text("")).shape == latents.shape

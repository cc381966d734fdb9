"""Pretraining of the demo model: it continues after an interruption, and writes a Stable Diffusion pipeline."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tav_jax import TuneAVideo
from tools import pretrain_demo_model
from tools.pretrain_demo_model import Recipe


def fit_mean(workdir, steps, interrupt_at=None):
    """A vector is fitted to the mean of random rows."""

    def loss(params, key, row):
        return jnp.mean((params["w"] - row) ** 2)

    def batch(step):
        if step == interrupt_at:
            raise KeyboardInterrupt
        return (np.random.default_rng(step).normal(size=3).astype(np.float32),)

    tx = pretrain_demo_model.optimizer(0.1, steps)
    params = {"w": jnp.zeros(3)}
    return pretrain_demo_model.fit("toy", loss, params, tx, steps, batch, workdir, decay=0.9, save_every=5)


def test_an_interrupted_run_continues_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = fit_mean(whole, 20)
    with pytest.raises(KeyboardInterrupt):
        fit_mean(parts, 20, interrupt_at=13)
    assert np.array_equal(fit_mean(parts, 20)["w"], expected["w"])
    assert [json.loads(line)["step"] for line in (parts / "toy.jsonl").read_text().splitlines()] == [5, 10, 15, 20]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_finished_run_is_not_repeated(tmp_path):
    first = fit_mean(tmp_path, 10)
    assert np.array_equal(fit_mean(tmp_path, 10, interrupt_at=0)["w"], first["w"])


@pytest.mark.slow
def test_a_small_recipe_writes_a_model_that_loads(tmp_path):
    steps = {"vae_steps": 2, "vae_object_steps": 2, "images": 128, "unet_steps": 2, "unet_batch": 4}
    widths = {"vae_widths": (8, 8, 16), "unet_widths": (16, 32, 32), "unet_heads": (1, 2, 2), "text_width": 32}
    recipe = Recipe(**steps, **widths)
    pretrain_demo_model.pretrain(recipe, tmp_path / "work", tmp_path / "model")
    tav = TuneAVideo.from_pretrained(tmp_path / "model", dtype="float32")
    assert tav.encode_text("a red star on snow").shape == (1, 77, recipe.text_width)
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    latents = tav.encode_video(frames)
    assert latents.shape == (1, 2, 16, 16, 4)
    assert tav.decode_video(latents).shape == (1, 2, 64, 64, 3)
    assert tav.unet(latents, np.array([5]), tav.encode_text("")).shape == latents.shape

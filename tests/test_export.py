"""Exported pipeline directories: their README, tokenizer, file modes and 2D part; links in a model directory."""

import json
import os
import shutil
import stat

import numpy as np
import pytest
from conftest import refusal
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tav_jax import TuneAVideo
from tav_jax.errors import InputError, WeightsError
from tav_jax.io import export
from tav_jax.io.diffusers_layout import Layout
from tav_jax.io.tokenizer import load_tokenizer, tokenize
from tav_jax.io.weights import TEMPORAL

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Both kinds of exports of the first case, under a umask that lets the group read."""
    from conftest import _cases

    root, before = tmp_path_factory.mktemp("exports"), os.umask(0o027)
    try:
        for name, two_d in (("video", False), ("images", True)):
            export.save(_cases["sd1"].tav.components, root / name, prompt='a "red" | square', two_d=two_d)
    finally:
        os.umask(before)
    return root


def test_modes_follow_the_umask(exported):
    assert {stat.S_IMODE(path.stat().st_mode) for path in exported.rglob("*") if path.is_file()} == {0o640}
    assert {stat.S_IMODE(path.stat().st_mode) for path in exported.rglob("*") if path.is_dir()} == {0o750}


@pytest.mark.parametrize("case_name", ["sd1", "sd2"])
def test_the_tokenizer_is_written_from_what_was_loaded(case_name, request, tmp_path):
    case, texts = request.getfixturevalue(case_name), ["Red square, moving!", "", "naïve 日本 🙂"]
    components = case.tav.components
    export.save(components, tmp_path / "out")
    ours, theirs = tmp_path / "out/tokenizer", case.model / "tokenizer"
    assert json.loads((ours / "vocab.json").read_text()) == json.loads((theirs / "vocab.json").read_text())
    merges = [[line for line in (d / "merges.txt").read_text().splitlines() if line[0] != "#"] for d in (ours, theirs)]
    assert merges[0] == merges[1]
    expected = tokenize(load_tokenizer(theirs), texts, 77)
    assert np.array_equal(tokenize(load_tokenizer(ours), texts, 77), expected)
    for unused in ("tokenizer.json", "vocab.json"):  # either format alone is enough
        shutil.copytree(ours, tmp_path / unused)
        (tmp_path / unused / unused).unlink()
        assert np.array_equal(tokenize(load_tokenizer(tmp_path / unused), texts, 77), expected)


def test_the_readme_says_how_to_load_it(exported):
    video, images = ((exported / name / "README.md").read_text() for name in ("video", "images"))
    for text in (video, images):
        assert "| base model | model |" in text
        assert '| prompt of the tuning | "a \\"red\\" \\| square" |' in text
        assert "base_model:" not in text  # it is the name of a directory, which the hub would refuse
    assert 'TuneAVideo.from_pretrained("video")' in video
    assert 'UNet3DConditionModel.from_pretrained("video", subfolder="unet")' in video
    assert 'save_pretrained("video-2d", two_d=True)' in video
    assert 'StableDiffusionPipeline.from_pretrained("images")' in images
    assert "The temporal layers are dropped" in images


def test_the_2d_export_has_no_temporal_layers(exported):
    video, images = (load_file(exported / name / UNET) for name in ("video", "images"))
    assert {name for name in video if not TEMPORAL.fullmatch(name)} == set(images) < set(video)
    assert all(np.array_equal(images[name], video[name]) for name in images)
    assert "3D" not in (exported / "images/unet/config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("sd1", "float32"), ("sd2", "bfloat16")])
def test_diffusers_opens_the_2d_export(request, tmp_path, name, dtype):
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers on CPU torch, is not installed")
    torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    case = request.getfixturevalue(name)
    export.save(case.load(dtype).components, tmp_path / "out", two_d=True)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", torch_dtype=torch.float32)
    image = pipeline("red square", num_inference_steps=2, height=32, width=32, output_type="np").images[0]
    assert image.shape == (32, 32, 3)
    x, text = case.latents[:, :1], case.numbers["emb_prompt"]
    with torch.no_grad():
        theirs = pipeline.unet(torch.tensor(x[:, 0]).permute(0, 3, 1, 2), 321, torch.tensor(text)).sample
    without = TuneAVideo.from_pretrained(tmp_path / "out", dtype="float32", temporal_attention=False)
    ours = without.unet(x, np.array([321]), text)[:, 0]
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=2e-5)


# -------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", ["tokenizer/vocab.json", "tokenizer", "unet/config.json", "vae/notes.txt"])
def test_a_link_out_of_the_model_is_neither_read_nor_exported(model, name):
    secret = model.parent / "secret"
    if name == "tokenizer":
        shutil.move(model / name, secret)
    else:
        secret.write_text('{"password": "mine"}')
        (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    message = refusal(WeightsError, Layout.open, model)
    assert f"{name} is a link to {secret}, outside of the pipeline's directory; replace it with a copy" in message


def test_links_within_the_model_and_in_the_cache_of_the_hub_are_followed(model, tmp_path):
    cache = tmp_path / "models--owner--name"
    (cache / "blobs").mkdir(parents=True)
    shutil.move(model, cache / "snapshots/1234")
    for i, file in enumerate(sorted(path for path in (cache / "snapshots/1234").rglob("*") if path.is_file())):
        shutil.move(file, cache / f"blobs/{i}")
        file.symlink_to(os.path.relpath(cache / f"blobs/{i}", file.parent))
    assert Layout.open(cache / "snapshots/1234").configs
    (tmp_path / "link").symlink_to(cache / "snapshots/1234")  # to the directory itself
    assert Layout.open(tmp_path / "link").configs
    other = cache / "snapshots/1234/vae"
    (other / "same.json").symlink_to("config.json")
    assert Layout.open(cache / "snapshots/1234").configs
    (other / "loop").symlink_to("loop")
    assert "vae/loop" in refusal(WeightsError, Layout.open, cache / "snapshots/1234")


# ------------------------------------------------------------------------------------------------------------ failures


def test_saving_never_overwrites_and_leaves_no_incomplete_directory(sd1, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not an empty directory"):
        sd1.tav.save_pretrained(tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["notes.txt"]

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "torch_tensors", full_disk)
    with pytest.raises((OSError, InputError)):
        sd1.tav.save_pretrained(tmp_path / "new")
    assert os.listdir(tmp_path) == ["full"]


def test_a_failed_write_of_tensors_is_one_sentence_and_leaves_nothing(sd1, tmp_path, monkeypatch):
    """safetensors has an error class of its own, also for a full disk."""

    def fail(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", fail)
    with pytest.raises(InputError, match=r"out could not be written \(Error while serializing.*free some space"):
        sd1.tav.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

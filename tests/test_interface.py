"""What `TuneAVideo` accepts: names and values as in Diffusers, dtypes, seeds, paths; what it and its edits show."""

import base64
import inspect
import io
import re
from importlib import resources
from types import SimpleNamespace

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refusal

from tav_jax import Clip, Edit, InputError, TuneAVideo, load_video
from tav_jax.errors import ArgumentNameError, MissingError
from tav_jax.io import validation, video
from tav_jax.io.diffusers_layout import Layout
from tav_jax.io.diffusers_names import INSTEAD, OTHER_NAMES, accept_other_names
from tav_jax.io.progress import reporter
from tav_jax.io.tensor_files import iter_tensors
from tav_jax.training.train_step import check_trainable

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 32, 40, 3), np.uint8)


# -------------------------------------------------------------------------------------------------------------- names


def received(method: str, *arguments, **options) -> dict:
    """The options that a method of `TuneAVideo` receives after the translation of names."""

    def record(*_, **options):
        return options

    record.__name__, record.__signature__ = method, inspect.signature(getattr(TuneAVideo, method))
    return accept_other_names(record)(*arguments, **options)


def test_names_of_diffusers_are_accepted():
    given = {
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "generator": 3,
        "num_frames": 8,
        "height": 64,
        "width": 32,
    }
    expected = {"steps": 20, "guidance": 7.5, "seed": 3, "frames": 8, "size": (64, 32)}
    assert received("sample", "red", **given) == expected
    assert received("invert", "a.mp4", num_inference_steps=20) == {"steps": 20}
    assert received("tune", "a.mp4", "red", max_train_steps=5, adam_weight_decay=0.1) == {
        "steps": 5,
        "weight_decay": 0.1,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"scheduler": "DDIMScheduler"},
            "sample() has no argument 'scheduler'; sample has sampler='ddim'",
        ),
        ({"num_inference_step": 5}, "'num_inference_step'; did you mean num_inference_steps?"),
        ({"gidance": 5}, "'gidance'; did you mean guidance?"),
        ({"xyzzy": 5}, "sample() has no argument 'xyzzy'; it has "),
        ({"num_inference_steps": 5, "steps": 5}, "sample() got steps twice"),
        ({"height": 64}, "sample() got height; give size=(height, width) only"),
        ({"height": 64, "width": 64, "size": (64, 64)}, "sample() got height and size and width; give size"),
        ({"output_type": "np"}, "the result has .frames (uint8) and .latents"),
    ],
)
def test_other_names_are_refused_with_ours(options, message):
    assert message in refusal(ArgumentNameError, received, "sample", "red", **options)
    with pytest.raises(TypeError):  # as Python's own error for an unknown argument is
        received("sample", "red", **options)


def test_the_tables_name_existing_parameters():
    for method, others in OTHER_NAMES.items():
        parameters = inspect.signature(getattr(TuneAVideo, method)).parameters
        assert set(others.values()) <= set(parameters)
        assert not set(others) & set(parameters)
        assert not set(INSTEAD) & set(others)


def test_options_of_the_hub_are_passed_on(model, monkeypatch):
    calls = []

    def download(name, **options):
        calls.append(options)
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub = {"revision": "main", "cache_dir": "/x", "local_files_only": True}
    tav = TuneAVideo.from_pretrained("owner/name", torch_dtype=jnp.float32, **hub)
    assert {name: calls[-1][name] for name in hub} == hub
    assert tav.components.layout.source == "owner/name"
    for file in model.glob("*/*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    Layout.open("owner/name", variant="fp16")
    assert "*/*.fp16*.safetensors" in calls[-1]["allow_patterns"]
    assert len(calls) == 2
    with pytest.raises(ArgumentNameError, match="'revison'; did you mean revision"):
        TuneAVideo.from_pretrained("owner/name", revison="main")


def test_a_variant_selects_the_weight_files(model):
    file = model / "vae/diffusion_pytorch_model.safetensors"
    (model / "vae/diffusion_pytorch_model.ema.safetensors").write_bytes(file.read_bytes())
    file.write_bytes(b"")
    assert len(list(iter_tensors(model / "vae", "ema"))) > 0
    assert "no weights of the variant 'fp16'" in refusal(MissingError, iter_tensors, model / "vae", "fp16")


# ------------------------------------------------------------------------------------------------------------- values


def torch_dtype(name):
    return type("dtype", (), {"__module__": "torch", "__str__": lambda self: f"torch.{name}"})()


@pytest.mark.parametrize(
    "value",
    ["bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16), torch_dtype("bfloat16"), jnp.ones(1, jnp.bfloat16).dtype],
)
def test_dtypes_are_names_or_dtypes(value):
    assert validation.dtype(value) == "bfloat16"
    assert validation.dtype(np.float32) == "float32"


@pytest.mark.parametrize("value", [None, "half", np.float64, int, 3, [], torch_dtype("int8")])
def test_other_dtypes_are_refused(value):
    assert "it must be one of bfloat16, float16, float32" in refusal(InputError, validation.dtype, value)


def test_float16_needs_a_gpu(model, monkeypatch):
    monkeypatch.setattr(Layout, "open", None)  # it is refused before anything is read
    message = refusal(InputError, TuneAVideo.from_pretrained, model, dtype=np.float16)
    assert message == "dtype is float16, which needs a GPU, and the platform is cpu; use bfloat16 or float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert validation.dtype("float16") == "float16"


@pytest.mark.parametrize("value", [0, 33, 2**31, 2**32 - 1, np.int64(7), np.uint32(7)])
def test_seeds(sd1, value):
    expected = jax.random.normal(jax.random.key(int(value)), (1, 2, 8, 8, 4))
    for given in (value, jax.random.key(int(value)), jax.random.PRNGKey(int(value))):
        assert np.array_equal(sd1.tav.noise(given, 2, (32, 32)), expected)


@pytest.mark.parametrize("value", [-1, 2**32, 2**64, 10**30, 1.0, True, "3", None, [1]])
def test_seeds_that_would_wrap_or_overflow_are_refused(sd1, value):
    message = "it must be a whole number from 0 to 4294967295"
    assert message in refusal(InputError, sd1.tav.noise, value, 2, (32, 32))
    assert message in refusal(InputError, sd1.tav.tune, FRAMES, "red", seed=value)
    assert message in refusal(InputError, TuneAVideo.from_pretrained, sd1.model, seed=value)


def test_generators_of_other_libraries_are_refused(sd1):
    options = {"generator": np.random.default_rng(0), "num_frames": 1, "size": (32, 32)}
    assert "seed is a numpy.random" in refusal(InputError, sd1.tav.sample, "red", **options)


def test_a_shape_that_differs_from_the_latents_is_refused(sd1):
    options = {"latents": np.zeros((1, 3, 8, 8, 4), np.float32), "steps": 1}
    message = "size is (64, 64) and the latents are of size (32, 32); leave size out"
    assert message in refusal(InputError, sd1.tav.sample, "red", height=64, width=64, **options)
    assert "frames is 4 and the latents are of frames 3" in refusal(
        InputError, sd1.tav.sample, "red", frames=4, **options
    )


def test_a_path_is_accepted_where_a_clip_is(square_clip):
    assert np.array_equal(validation.frames(str(square_clip), 4), load_video(square_clip).frames)
    assert validation.opened(square_clip).fps == 10
    assert "does not exist" in refusal(MissingError, validation.frames, "none.mp4", 4)


def test_weights_that_were_rounded_when_loaded_are_not_trained(sd1):
    unet = sd1.load("bfloat16").components.unet
    check_trainable(unet, ("attn1.to_q", "attn_temp"))
    message = refusal(InputError, check_trainable, unet, ("attn1.to_k",))
    assert "selects weights that were loaded in bfloat16; give the same trainable to from_pretrained" in message


# ------------------------------------------------------------------------------------------------------------- source


def test_edits_get_the_fps_of_the_clip_that_was_inverted_last(sd1):
    tav, clip = TuneAVideo(sd1.tav.components, "float32"), Clip(FRAMES, 12.5)
    assert tav._source_of(FRAMES) is None
    assert tav._source_of(clip) is clip
    tav.source = clip
    assert tav._source_of(FRAMES.copy()) is clip
    assert tav._source_of(np.zeros((1, 5, 8, 10, 4))) is clip  # its latents
    assert tav._source_of(255 - FRAMES) is None
    assert tav._source_of(np.zeros((1, 4, 8, 10, 4))) is None


# ----------------------------------------------------------------------------------------------------- what is shown


def test_repr_of_a_pipeline_and_of_an_edit(sd1):
    tav = TuneAVideo(sd1.tav.components, "float32")
    text = repr(tav)
    assert text.startswith("TuneAVideo('model', dtype=float32)\n  parameters: unet 0.39 M, vae 0.06 M")
    tav.source, tav.tuned_prompt = Clip(FRAMES, 12.5), "red"
    assert repr(tav).endswith("source clip: Clip(5 frames of 32×40, 12.5 fps), 'red'")
    assert repr(Edit(FRAMES[:1], 8.0, prompt="it's")) == 'Edit(1 frame of 32×40, 8 fps, prompt="it\'s")'


def test_an_edit_shows_itself_in_a_notebook(tmp_path):
    page = Edit(FRAMES, 8.0, prompt="a <red> square")._repr_html_()
    assert "a &lt;red&gt; square" in page
    (data,) = re.findall(r'<video src="data:video/mp4;base64,([^"]+)"', page)
    (tmp_path / "edit.mp4").write_bytes(base64.b64decode(data))
    assert load_video(tmp_path / "edit.mp4").frames.shape == FRAMES.shape


@pytest.mark.parametrize(("interactive", "progress", "shown"), [
    (True, None, True), (False, None, False), (True, False, False), (False, True, True),
])  # fmt: skip
def test_a_bar_is_shown_when_interactive(monkeypatch, interactive, progress, shown):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: interactive, raising=False)
    monkeypatch.setattr("sys.stderr", stream)
    with reporter(progress, 4, "sampling") as report:
        assert (report is not None) == shown
        if report:
            report(4)
    assert ("sampling" in stream.getvalue()) == shown


# --------------------------------------------------------------------------------------------------------- file types


def test_png_files_are_the_frames(tmp_path):
    clip = Clip(FRAMES, 8.0)
    path = clip.save(f"{tmp_path}/frames/")
    assert [file.name for file in sorted(path.iterdir())][:2] == ["00000.png", "00001.png"]
    assert np.array_equal(load_video(path).frames, FRAMES)
    assert "exists and is not an empty directory" in refusal(InputError, clip.save, f"{tmp_path}/frames/")
    assert len(list(tmp_path.iterdir())) == 1


def test_webm(tmp_path, monkeypatch):
    clip = Clip(np.repeat(FRAMES[:, ::8, ::8], 8, 1).repeat(8, 2), 12.5)
    again = load_video(clip.save(tmp_path / "a.webm"))
    assert again.fps == 12.5
    assert np.abs(again.frames.astype(int) - clip.frames).mean() < 12
    monkeypatch.setattr(video, "av", SimpleNamespace(codecs_available=set()))
    assert "has no encoder libopus for .webm; use .mp4 or .gif" in refusal(InputError, clip.save, tmp_path / "b.webm")


def test_the_package_is_typed():
    assert resources.files("tav_jax").joinpath("py.typed").is_file()

"""Properties that hold for every prompt, every selection of frames and every config, tested with random values."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from tav_jax import config
from tav_jax.cli import edit
from tav_jax.errors import InputError, TavError, join_names, short_repr
from tav_jax.io.caption import caption
from tav_jax.io.diffusers_layout import text_config, unet_config, vae_config
from tav_jax.io.video import load_video
from tav_jax.training import run_directory
from tav_jax.training.run_directory import RunDirectory, file_names

deterministic = settings(
    derandomize=True, database=None, deadline=None, max_examples=120, suppress_health_check=list(HealthCheck)
)
PROMPTS = st.one_of(
    st.text(st.characters(), max_size=200),  # surrogates and control characters included
    st.text(".-_ /\\", max_size=80),
    st.sampled_from(
        ["a b", "A, b!", "a  b", "con", "NUL", "com1", "../../x", "..", "\0", "🎿", "滑雪", "é", "x" * 9999]
    ),
    st.lists(st.sampled_from(["..", "/", "\\", "C:", "~", "%2e", "\u202e", "a", "con"]), max_size=9).map("".join),
)


def outcome(call, *args, **options):
    """(result, None) of a call, or (None, message) if it raises a TavError."""
    try:
        return call(*args, **options), None
    except TavError as error:
        return None, str(error)


# --------------------------------------------------------------------------------------------------------- prompts


@deterministic
@given(st.lists(PROMPTS, min_size=1, max_size=8))
def test_file_names_are_safe_and_unique(tmp_path_factory, texts):
    names = file_names(texts)
    root = tmp_path_factory.getbasetemp()
    for name in names:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        assert len(name) <= 101
        assert name.split("-")[0] == name or name not in ("con", "nul")
        assert not re.fullmatch(r"con|prn|aux|nul|com\d|lpt\d", name)  # devices on Windows, with any suffix
        assert (root / f"{name}.mp4").resolve().parent == root.resolve()
    assert len(set(names)) == len(set(texts))
    assert file_names(texts) == names


def test_a_prompt_equal_to_another_file_name_gets_its_own():
    texts = ["a b", "a, b"]
    for _ in range(3):
        names = file_names(texts)
        assert len(set(names)) == len(texts)
        texts.append(names[-1])  # the file name of another prompt


def test_prompts_with_equal_short_digests_have_different_names(monkeypatch):
    class EqualDigest:
        def __init__(self, data):
            self.data = data

        def hexdigest(self):
            return "0" * 8 + self.data.hex().ljust(56, "f")

    monkeypatch.setattr(run_directory.hashlib, "sha256", EqualDigest)
    assert len(set(file_names(["🎿", "⛷", "..."]))) == 3


@deterministic
@given(st.lists(PROMPTS, min_size=1, max_size=4, unique=True), st.lists(st.integers(0, 99), min_size=1, max_size=3))
def test_all_videos_of_an_edit_have_different_names(texts, seeds):
    names = [name for _, _, name in edit._outputs(texts, seeds)]
    names += [file_names(["side by side " + ", ".join(texts)])[0]]
    assert len(set(names)) == len(names)


@deterministic
@given(st.text(st.characters(), max_size=300))
@example("x" * 10_000)
@example("\ud800\0\u202e")
def test_every_prompt_can_be_drawn_as_a_caption(text):
    assert caption(text, 64).shape[1:] == (64, 3)


@deterministic
@given(st.recursive(st.none() | st.text(st.characters()) | st.integers() | st.floats(), st.lists, max_leaves=200))
def test_any_value_is_one_short_line_in_an_error_message(value):
    for text in (short_repr(value), join_names([str(value)] * 30)):
        assert text.isprintable() or not str(value).isprintable()
        assert "\n" not in text
        assert len(text) < 2000


# ----------------------------------------------------------------------------------------------------------- frames


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A directory of thirty images; the grey value of each is 8 times its number."""
    directory = tmp_path_factory.mktemp("images")
    for i in range(30):
        Image.fromarray(np.full((8, 8, 3), 8 * i, np.uint8)).save(directory / f"{i}.png")
    return directory


@deterministic
@given(start=st.integers(0, 35), stride=st.integers(1, 40), frames=st.none() | st.integers(1, 35))
def test_start_stride_and_frames_select_as_a_slice(images, start, stride, frames):
    expected = list(range(start, 30, stride))[:frames]
    if not expected or (frames is not None and len(expected) < frames):
        with pytest.raises(InputError):
            load_video(images, start=start, stride=stride, frames=frames)
    else:
        clip = load_video(images, start=start, stride=stride, frames=frames)
        assert (clip.frames[:, 0, 0, 0] // 8).tolist() == expected
        assert clip.fps == pytest.approx(8 / stride)


@deterministic
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "frames": st.none() | st.integers(),
            "start": st.integers(),
            "stride": st.integers(),
            "size": st.none() | st.tuples(st.integers(), st.integers()) | st.just((8, 16)),
            "fps": st.none() | st.floats(),
        },
    )
)
def test_any_arguments_give_a_clip_or_an_error_message(images, options):
    clip, message = outcome(load_video, images, **options)
    assert message.isprintable() if clip is None else 0 < len(clip.frames) <= 30


# ---------------------------------------------------------------------------------------------------------- configs

NAMES = sorted(dict(config.leaves(config.get_config())))
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 2**63, 8, 16, 512]),
    st.floats(),
    st.text(st.characters(), max_size=20),
    st.sampled_from(["bfloat16", "float32", "crop", "stretch", "sparse-causal", "first-frame", "per-frame"]),
    st.lists(st.text(st.characters(), max_size=5) | st.integers(), max_size=3),
    st.lists(st.text(max_size=5), max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=2),
    st.binary(max_size=5),
)


@settings(deterministic, max_examples=300)
@given(st.dictionaries(st.sampled_from([*NAMES, "train", "train.stepz", "x", ""]), VALUES, max_size=4))
def test_any_config_is_valid_or_refused_in_one_line(changes):
    table = config.get_config().to_dict()
    for name, value in changes.items():
        *groups, last = name.split(".")
        inner = table.setdefault(groups[0], {}) if groups else table
        (inner if isinstance(inner, dict) else table)[last] = value
    valid, message = outcome(config.validate, table)
    if valid is None:
        assert message.isprintable()
        assert len(message) < 5000
        return
    defaults = dict(config.leaves(config.get_config()))
    assert {name: type(value) for name, value in config.leaves(valid)} == {
        name: type(value) for name, value in defaults.items()
    }
    assert config.from_json(config.to_json(valid)) == valid
    assert config.validate(valid) == valid


# Accepted types: that of the default, an int for a float, a whole float for an int, and a list for a tuple.
@deterministic
@given(st.sampled_from(NAMES), st.one_of(st.integers(-5, 2000), st.floats(-2, 2), st.booleans(), st.text(max_size=3)))
def test_a_value_of_another_type_is_refused(name, value):
    default = dict(config.leaves(config.get_config()))[name]
    default = "" if default is None else default  # clip.prompt, which must be set
    if type(value) is type(default) or (type(default) is float and type(value) is int):
        return
    if type(default) is int and type(value) is float and value.is_integer():  # such as 1e3
        return
    if name == "train.remat" and type(value) is bool:  # the older spelling of `block` and `none`
        return
    *groups, last = name.split(".")
    with pytest.raises(InputError, match=re.escape(f"{name} is {short_repr(value)}") + "(, expected|; it must be)"):
        config.validate({groups[0]: {last: value}} if groups else {last: value})


@deterministic
@given(
    st.text(max_size=60) | st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=9).map(json.dumps)
)
@example("[" * 100_000)
@example('{"train": {"steps": ' + "9" * 5000 + "}}")
def test_any_text_is_a_valid_config_file_or_refused_in_one_line(text):
    valid, message = outcome(config.from_json, text)
    assert message.isprintable() if valid is None else valid == config.get_config()


@pytest.mark.parametrize("value", [None, 3, "x", [], ConfigDict({"train": 1})])
def test_values_that_are_not_configs_are_refused(value):
    with pytest.raises(InputError):
        config.validate(value)


# --------------------------------------------------------------------------------------------- configs of components

SETTINGS = (
    *("block_out_channels", "layers_per_block", "attention_head_dim", "num_attention_heads", "cross_attention_dim"),
    *("norm_num_groups", "norm_eps", "use_linear_projection", "flip_sin_to_cos", "freq_shift", "down_block_types"),
    *("up_block_types", "in_channels", "out_channels", "latent_channels", "scaling_factor", "hidden_size"),
    *("intermediate_size", "num_hidden_layers", "max_position_embeddings", "hidden_act", "layer_norm_eps", "act_fn"),
    "vocab_size",
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from([10**9, -1, 0, 8]),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=20,
)


@settings(deterministic, max_examples=250)
@given(st.dictionaries(st.sampled_from(SETTINGS), JSON, max_size=4))
def test_any_component_config_is_bounded_or_refused_in_one_line(changes):
    for read in (unet_config, vae_config, text_config):
        parsed, message = outcome(read, changes, Path("model/config.json"))
        if parsed is None:
            assert message.isprintable()
            assert len(message) < 1500
            continue
        for value in vars(parsed).values():
            for number in value if isinstance(value, tuple) else (value,):
                assert isinstance(number, str) or (0 <= number <= 1_000_000)


# ------------------------------------------------------------------------------------------------------------ files


@deterministic
@given(st.lists(PROMPTS, min_size=1, max_size=3))
def test_every_prompt_can_be_written(tmp_path_factory, texts):
    root = tmp_path_factory.getbasetemp() / "run"
    for name in file_names(texts):
        RunDirectory(root).write(f"edits/{name}.mp4", name)
        assert (root / f"edits/{name}.mp4").read_text() == name

"""Prompts: token ids from the CLIP tokenizer, and file names."""

import contextlib
import json
import re

import pytest
from conftest import refusal

from tav_jax import PromptCut
from tav_jax.errors import InputError, WeightsError
from tav_jax.io.tokenizer import load_tokenizer, tokenize
from tav_jax.training.run_directory import file_names

VOCABULARY = 530  # of the reference cases


@pytest.fixture
def tokenizer(sd1):
    return load_tokenizer(sd1.model / "tokenizer")


def test_ids_are_padded_to_the_length_and_below_the_vocabulary_size(tokenizer):
    ids = tokenize(tokenizer, ["red square", ""], 77, VOCABULARY)
    assert ids.shape == (2, 77)
    assert ids.max() < VOCABULARY


def test_a_long_prompt_is_truncated_with_a_warning(tokenizer):
    with pytest.warns(PromptCut, match=r"tokens and the text encoder reads 77; '.*never read' is ignored"):
        ids = tokenize(tokenizer, ["red square " * 60 + "never read"], 77, VOCABULARY)
    assert ids.shape == (1, 77)


def test_a_tokenizer_from_another_pipeline_is_refused(tokenizer):
    message = refusal(WeightsError, tokenize, tokenizer, ["red square"], 77, 300)
    assert "the text encoder's vocab_size is 300" in message


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("\ud800", "is not valid Unicode"),
        ("x" * 200_000, "200000 characters, more than 100000"),
    ],
)
def test_an_invalid_prompt_is_refused(tokenizer, prompt, message):
    assert message in refusal(InputError, tokenize, tokenizer, [prompt], 77, VOCABULARY)


@pytest.mark.parametrize("value", [[[]], "long", None, {"a": 1}])
def test_an_invalid_model_max_length_is_read_or_refused(model, value):
    file = model / "tokenizer/tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": value}))
    with contextlib.suppress(WeightsError):  # None is valid
        tokenize(load_tokenizer(model / "tokenizer"), ["red"], 77, VOCABULARY)


def test_a_damaged_vocabulary_is_refused(model):
    (model / "tokenizer/vocab.json").write_text("[" * 100_000)
    assert "not a readable CLIP tokenizer" in refusal(WeightsError, load_tokenizer, model / "tokenizer")


# -------------------------------------------------------------------------------------------------------- file names


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a man is skiing", "a-man-is-skiing"),
        ("Spider-Man, on the beach!", "spider-man-on-the-beach"),
        ("../../etc/passwd", "etc-passwd"),
        ("été à la plage", "ete-a-la-plage"),
        ("a / b \\ c : d", "a-b-c-d"),
    ],
)
def test_a_simple_prompt_has_a_readable_file_name(prompt, name):
    assert file_names([prompt]) == [name]


@pytest.mark.parametrize("prompt", ["", "🎿🎿", "...", "滑雪", "x" * 5000, "con\x00\n\ttrol", "\ud800", " "])
def test_every_prompt_has_a_safe_file_name(prompt):
    (name,) = file_names([prompt])
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,80}[a-z0-9])?", name)
    assert file_names([prompt]) == [name]


def test_different_prompts_have_different_file_names():
    texts = ["a b", "a, b", "A B", "🎿", "⛷", "", "x" * 100, "x" * 101]
    assert len(set(file_names(texts))) == len(texts)

"""File names from prompts: safe, short, never two alike."""

import re

import pytest

from tav_jax.training.run_directory import file_names


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
def test_plain_prompts_are_readable(prompt, name):
    assert file_names([prompt]) == [name]


@pytest.mark.parametrize("prompt", ["", "🎿🎿", "...", "滑雪", "x" * 5000, "con\x00\n\ttrol", "\ud800", " "])
def test_every_prompt_has_a_safe_name(prompt):
    (name,) = file_names([prompt])
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,80}[a-z0-9])?", name)
    assert file_names([prompt]) == [name]


def test_prompts_that_differ_have_names_that_differ():
    texts = ["a b", "a, b", "A B", "🎿", "⛷", "", "x" * 100, "x" * 101]
    assert len(set(file_names(texts))) == len(texts)

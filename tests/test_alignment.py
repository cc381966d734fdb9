"""Alignment of prompts, cross-attention control and masks from words, against prompt-to-prompt's own code.

`reference/prompt_to_prompt.npz` has the numbers of google/prompt-to-prompt (commit 9c472e4: `seq_aligner.py`,
`ptp_utils.py`, and the controllers and `LocalBlend` of its notebooks), with the tokenizer of the reference case `sd1`,
truncating at 77 tokens as the text encoder does. Attention probabilities are those of random q and k of one layer, 6
queries, 2 heads; the maps of `LocalBlend` are of random attention in 5 layers of 16×16 and 3 steps.
"""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, refusal

from tav_jax.diffusion.alignment import TokenizedPrompt, align, equalizers, refinement, replacement, word_tokens
from tav_jax.diffusion.editing import Editing, edit_mask, make_editing
from tav_jax.errors import InputError
from tav_jax.io.tokenizer import load_tokenizer, tokenize_words
from tav_jax.models.controls import AttentionControls, controlled_cross_attention


@pytest.fixture(scope="module")
def theirs() -> dict:
    with np.load(REFERENCE / "prompt_to_prompt.npz") as file:
        return {name: json.loads(str(x)) if x.dtype.kind == "U" else x for name, x in file.items()}


@pytest.fixture(scope="module")
def words():
    tokenizer = load_tokenizer(REFERENCE / "sd1/model/tokenizer")
    return lambda text, length=77: tokenize_words(tokenizer, length, text)


# ------------------------------------------------------------------------------------------- alignment


def test_replacement_equals_prompt_to_prompt(theirs, words):
    for (source, edit), expected in zip(theirs["pairs"]["replace"], theirs["replace_mapping"], strict=True):
        ours = align(words(source), words(edit))
        np.testing.assert_allclose(ours.mapping, expected, rtol=1e-6, err_msg=f"{source!r} to {edit!r}")
        assert ours.shared.all()


def test_refinement_equals_prompt_to_prompt(theirs, words):
    cases = zip(theirs["pairs"]["refine"], theirs["refine_source"], theirs["refine_shared"], strict=True)
    for (source, edit), position, shared in cases:
        ours = refinement(words(source), words(edit))
        assert np.array_equal(ours.shared, shared), (source, edit)
        # Their mapper is an index; where a token is not shared it is −1, and its value is multiplied by 0.
        assert np.array_equal(ours.mapping, np.eye(77, dtype=np.float32)[:, position] * shared), (source, edit)
        if len(source.split()) != len(edit.split()):
            assert np.array_equal(ours.mapping, align(words(source), words(edit)).mapping)


@pytest.mark.parametrize("prompt", ["", "a red square is moving", "red " * 100])
def test_a_prompt_is_aligned_with_itself_by_the_identity(words, prompt):
    for kind in (replacement, refinement):
        ours = kind(words(prompt), words(prompt))
        assert np.array_equal(ours.mapping, np.eye(77))
        assert ours.shared.all()


@pytest.mark.parametrize("length", [3, 5, 8, 77])
def test_words_that_were_truncated_are_left_out(words, length):
    """Every token of an edit has the attention of at most one word, whose weights add up to at most 1."""
    long, short = "a crimson square is moving over sand", "a red square is moving over tyrannosaurus"
    for source, edit in ((long, short), (short, long), (long, "sand"), ("a", short)):
        ours = align(words(source, length), words(edit, length))
        assert ours.mapping.shape == (length, length)
        assert ours.mapping.min() >= 0
        assert set(np.unique(ours.shared)) <= {0, 1}
        assert ours.mapping[0, 0] == 1  # the start token


def test_spaces_and_accents_do_not_shift_tokens(words):
    plain, spaced = words("a cat sits"), words("  a \t cat\n sits ")
    assert np.array_equal(plain.ids, spaced.ids)
    assert [tokens for _, tokens in plain.words()] == [tokens for _, tokens in spaced.words()]
    accented = words("un café, 日本 cat")
    assert [tokens[0] for _, tokens in accented.words()] == sorted(tokens[0] for _, tokens in accented.words())
    found = accented.find("CAFÉ")
    assert len(found) == 5  # c, a, f and two bytes
    assert "".join("un café, 日本 cat"[slice(*accented.offsets[i])] for i in found[:3]) == "caf"


# --------------------------------------------------------------------------------------------- words


def test_equalizers_equal_prompt_to_prompt(theirs, words):
    for (text, factors), expected in zip(theirs["equalizer_cases"], theirs["equalizers"], strict=True):
        assert np.array_equal(equalizers([words(text)], factors)[0], expected)


def test_words_are_found_whole_in_any_case_and_beside_punctuation(words):
    prompt = words("A cat, a CAT and a caterpillar: the cat's")
    at = dict(prompt.words())
    assert len(prompt.find("cat")) == 3 * 3  # three tokens each
    assert not set(prompt.find("cat")) & set(at["caterpillar:"])
    assert prompt.find("a CAT and") == at["CAT"][:0] + prompt.find("a cat and")
    assert prompt.find("") == prompt.find(" ") == prompt.find("dog") == prompt.find("(") == []


def test_words_that_no_prompt_has_are_refused(words):
    prompts = [words("a red square"), words("a blue square")]
    assert equalizers(prompts, {"blue": 2})[:, prompts[1].find("blue")].tolist() == [[1], [2]]
    message = refusal(InputError, equalizers, prompts, {"green": 2.0})
    assert message.startswith("equalizer has 'green', which is not in ")
    assert "'a red square', 'a blue square'" in message
    assert "blend_words has 'squ'" in refusal(InputError, word_tokens, "blend_words", prompts, ["squ"])
    for bad in ("2", -0.1, 1001, float("nan"), True, None):
        assert "it must be a number from 0 to 1000" in refusal(InputError, equalizers, prompts, {"red": bad})


def test_a_word_behind_the_last_token_is_refused_by_cause(words):
    message = refusal(InputError, equalizers, [words("red " * 100 + "cat")], {"cat": 2.0})
    assert "first 77 tokens" in message


# --------------------------------------------------------------------------------- cross-attention control


def controls(source: TokenizedPrompt, prompts: list[TokenizedPrompt], on: bool, factors=None) -> AttentionControls:
    mask = jnp.ones((1, 1, 8, 8, 1))
    editing = make_editing(source, prompts, mask, equalizer=factors or {}, blend_words=["cat", "run"])
    rows = jnp.concatenate([editing.words[:1], 0 * editing.words[1:], editing.words[1:]])
    switches = (jnp.asarray(False), jnp.asarray(False), jnp.asarray(on))
    return AttentionControls(*switches, editing.mapping, editing.shared, editing.equalizer, rows)


@pytest.mark.parametrize("factors", [None, {"cat": 3.0, "run": 0.5}])
@pytest.mark.parametrize("kind", ["replace", "refine"])
def test_controlled_attention_equals_prompt_to_prompt(theirs, words, kind, factors):
    """Their rows are unconditional and conditional, each with one for the source; ours [source; unconditional;
    conditional]."""
    ours = [3, 1, 2, 4, 5]
    q, k, v = (jnp.asarray(theirs[name][ours]) for name in "qkv")
    source, *prompts = map(words, theirs["prompts"][kind])
    q = jnp.stack([q, q[:, ::-1]], axis=1)  # two frames
    out, maps = controlled_cross_attention(q, k, v, controls(source, prompts, True, factors))
    name = kind + ("_reweight" if factors else "")
    np.testing.assert_allclose(out[:, 0], theirs[f"{name}_out"][ours], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(maps[:, 0], theirs[f"{name}_maps"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out[:, 1], out[:, 0, ::-1], rtol=1e-6, atol=1e-6)
    off, _ = controlled_cross_attention(q, k, v, controls(source, prompts, False, factors))
    np.testing.assert_allclose(off[:, 0], theirs["no_control_out"][ours], rtol=1e-5, atol=1e-6)


def test_several_clips_of_a_batch_are_controlled_alike(theirs, words):
    """A batch of windows: all source rows first, then all rows of each kind."""
    source, *prompts = map(words, theirs["prompts"]["refine"])
    given = controls(source, prompts, True, {"cat": 2.0})
    rng = np.random.default_rng(1)
    q = rng.normal(size=(2, 5, 3, 6, 2, 4)).astype(np.float32)  # [clips, R, F, T, N, D]
    k, v = rng.normal(size=(2, 2, 5, 77, 2, 4)).astype(np.float32)
    together, maps = controlled_cross_attention(
        *(jnp.asarray(np.concatenate(np.swapaxes(x, 0, 1))) for x in (q, k, v)), given
    )
    for clip in range(2):
        alone, its_maps = controlled_cross_attention(*(jnp.asarray(x[clip]) for x in (q, k, v)), given)
        np.testing.assert_allclose(together[clip::2], alone, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(maps[clip::2], its_maps, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------ masks from words


def test_masks_from_words_equal_prompt_to_prompt(theirs, words):
    """3×3 maximum, nearest resize, more than 0.3 of the maximum, union with the source's; maps are sums over steps."""
    prompts, named = theirs["blend_words"]
    tokens = np.stack([word_tokens("blend_words", [words(p)], w)[0] for p, w in zip(prompts, named, strict=True)])
    assert np.array_equal(tokens, theirs["blend_words_tokens"])
    for maps, expected in zip(theirs["blend_maps"], theirs["blend_masks"], strict=True):
        # The same maps in frame 1, scaled: each frame is compared with its own maximum.
        both = jnp.asarray(np.stack([maps, 0.1 * maps], axis=1))  # [1 + P, F, T]
        nothing: dict = dict.fromkeys(("mapping", "shared", "equalizer"), jnp.zeros((2, 77)))
        nothing["mapping"] = jnp.zeros((2, 77, 77))
        editing = Editing(
            **nothing, words=jnp.asarray(tokens), word_mask=jnp.asarray(True), mask=jnp.ones((1, 2, 64, 64, 1))
        )
        ours = np.asarray(edit_mask(both, editing))[..., 0]
        for frame in range(2):
            assert np.array_equal(ours[:, frame], expected[1:])
        # A given mask restricts it further; without words it is the mask.
        half = jnp.ones((1, 2, 64, 64, 1)).at[:, :, :32].set(0.25)
        assert np.array_equal(edit_mask(both, editing._replace(mask=half))[..., 0], ours * half[..., 0])
        plain = edit_mask(both, editing._replace(mask=half, word_mask=jnp.asarray(False)))
        assert np.array_equal(plain, jnp.broadcast_to(half, plain.shape))


def test_words_without_attention_allow_nothing(words):
    """As 0/0 > 0.3 in prompt-to-prompt: a word that only the edit has is not found in the source."""
    editing = make_editing(
        words("a dog"), [words("a cat")], jnp.ones((1, 1, 8, 8, 1)), equalizer={}, blend_words=["cat"]
    )
    maps = jnp.zeros((2, 1, 64)).at[1, 0, 9].set(1.0)
    mask = np.asarray(edit_mask(maps, editing))[0, 0, :, :, 0]
    expected = np.zeros((8, 8))
    expected[:3, :3] = 1
    assert np.array_equal(mask, expected)
    assert not np.asarray(edit_mask(0 * maps, editing)).any()


def test_a_prompt_without_any_of_the_words_is_refused(words):
    """Its edit would be the source, whatever it says."""
    source, prompts = words("a square"), [words("a cat"), words("a dog")]
    options = {"mask": jnp.ones((1, 1, 8, 8, 1)), "equalizer": {}}
    message = refusal(InputError, make_editing, source, prompts, blend_words=["cat"], **options)
    assert message.startswith("blend_words has no word of the prompt 'a dog' or of the source prompt 'a square'")
    make_editing(source, prompts, blend_words=["cat", "dog"], **options)
    make_editing(source, prompts, blend_words=["cat", "square"], **options)

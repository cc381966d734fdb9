"""Alignment of two prompts, token by token, for cross-attention control (prompt-to-prompt, arXiv 2208.01626)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from tav_jax.errors import InputError, join_names, short_repr


class TokenizedPrompt(NamedTuple):
    text: str
    ids: Int[np.ndarray, "n"]  # with start and end tokens, without padding
    offsets: list[tuple[int, int]]  # of each token, the characters that it covers; (0, 0) for start and end
    length: int  # with padding

    def tokens(self, begin: int, end: int) -> list[int]:
        """The tokens that cover these characters."""
        return [i for i, (first, last) in enumerate(self.offsets) if first < last and first < end and last > begin]

    def words(self) -> list[tuple[str, list[int]]]:
        """The words between spaces, and the tokens of each."""
        return [(match[0], self.tokens(*match.span())) for match in re.finditer(r"\S+", self.text)]

    def find(self, word: str) -> list[int]:
        """The tokens of all occurrences of a word or phrase."""
        return sorted({token for span in occurrences(word, self.text) for token in self.tokens(*span)})


def occurrences(word: str, text: str) -> list[tuple[int, int]]:
    """Where a word or phrase is in a text, without regard to case."""
    pattern = rf"(?<!\w){re.escape(word.strip())}(?!\w)"
    return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)] if word.strip() else []


def check_words(name: str, words: Iterable[str], texts: Sequence[str]) -> None:
    """Refuse a word that is in none of the texts."""
    for word in words:
        if not any(occurrences(word, text) for text in texts):
            found = join_names([repr(text) for text in texts])
            raise InputError(f"{name} has {short_repr(word)}, which is not in {found}; use words of the prompts")


class Alignment(NamedTuple):
    """From the tokens of a source prompt to those of an edit."""

    mapping: Float[np.ndarray, "L L"]
    shared: Float[np.ndarray, "L"]  # 1 for tokens of the edit whose attention is the source's


def align(source: TokenizedPrompt, edit: TokenizedPrompt) -> Alignment:
    """Replacement if the prompts have the same number of words, else refinement."""
    same = len(source.words()) == len(edit.words())
    return replacement(source, edit) if same else refinement(source, edit)


def replacement(source: TokenizedPrompt, edit: TokenizedPrompt) -> Alignment:
    """Word i of the edit has the attention of word i of the source, also where they differ.

    The tokens of a word share the attention of the other word's tokens: token for token if there are equally many, else
    each token of the edit has their sum, divided by the number of tokens of the edit.
    """
    mapping = np.zeros((source.length, edit.length), np.float32)
    changed = [
        (old, new)
        for (old_word, old), (new_word, new) in zip(source.words(), edit.words(), strict=True)
        if old_word != new_word and old and new
    ]
    i = j = 0
    while i < source.length and j < edit.length:
        if changed and changed[0][0][0] == i:
            old, new = changed.pop(0)
            if len(old) == len(new):
                mapping[old, new] = 1
            else:
                mapping[np.ix_(old, new)] = 1 / len(new)
            i, j = i + len(old), j + len(new)
        else:
            # After the last changed word, position j has the attention of position j (of padding, mostly).
            mapping[i if changed else j, j] = 1
            i, j = i + 1, j + 1
    return Alignment(mapping, np.ones(edit.length, np.float32))


def refinement(source: TokenizedPrompt, edit: TokenizedPrompt) -> Alignment:
    """Tokens that both prompts share have the source's attention, added tokens their own.

    Shared tokens are those of a Needleman–Wunsch alignment of the token ids: gap 0, match 1, mismatch −1.
    """
    x, y = source.ids, edit.ids
    score = np.zeros((len(x) + 1, len(y) + 1), np.int32)
    for i in range(1, len(x) + 1):
        for j in range(1, len(y) + 1):
            diagonal = score[i - 1, j - 1] + (1 if x[i - 1] == y[j - 1] else -1)
            score[i, j] = max(score[i, j - 1], score[i - 1, j], diagonal)
    aligned = np.full(len(y), -1)
    i, j = len(x), len(y)
    while j > 0:  # of equally good alignments, the one that skips a token of the edit first, then one of the source
        if i == 0 or score[i, j] == score[i, j - 1]:
            j -= 1
        elif score[i, j] == score[i - 1, j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            aligned[j] = i
    positions = np.concatenate([aligned, np.arange(len(y), edit.length)])
    mapping, shared = np.zeros((source.length, edit.length), np.float32), (positions >= 0).astype(np.float32)
    mapping[positions, np.arange(edit.length)] = shared
    return Alignment(mapping, shared)


def equalizers(prompts: Sequence[TokenizedPrompt], factors: Mapping[str, Any]) -> Float[np.ndarray, "P L"]:
    """For each prompt, the factor on the attention to each of its tokens."""
    table = np.ones((len(prompts), prompts[0].length), np.float32)
    for word, factor in factors.items():
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor <= 1000:
            raise InputError(f"equalizer has {short_repr(factor)} for {word!r}; it must be a number from 0 to 1000")
        _check_found("equalizer", word, prompts)
        for row, prompt in zip(table, prompts, strict=True):
            row[prompt.find(word)] = factor
    return table


def word_tokens(name: str, prompts: Sequence[TokenizedPrompt], words: Sequence[str]) -> Float[np.ndarray, "P L"]:
    """For each prompt, 1 for the tokens of these words."""
    table = np.zeros((len(prompts), prompts[0].length), np.float32)
    for word in words:
        _check_found(name, word, prompts)
        for row, prompt in zip(table, prompts, strict=True):
            row[prompt.find(word)] = 1
    return table


def blend_tokens(
    source: TokenizedPrompt, prompts: Sequence[TokenizedPrompt], words: Sequence[str]
) -> Float[np.ndarray, "M L"]:
    """`word_tokens` of the source and the prompts. Each prompt needs a word, of its own or of the source:
    otherwise its edit could change nothing."""
    table = word_tokens("blend_words", [source, *prompts], words)
    for prompt, row in zip(prompts, table[1:], strict=True):
        if words and not (row.any() or table[0].any()):
            texts = f"the prompt {short_repr(prompt.text)} or of the source prompt {short_repr(source.text)}"
            raise InputError(f"blend_words has no word of {texts}, so that nothing may change; add one")
    return table


def _check_found(name: str, word: str, prompts: Sequence[TokenizedPrompt]) -> None:
    check_words(name, [word], [prompt.text for prompt in prompts])
    if not any(prompt.find(word) for prompt in prompts):
        where = f"no prompt has in its first {prompts[0].length} tokens"
        raise InputError(f"{name} has {short_repr(word)}, which {where}; shorten the prompt")

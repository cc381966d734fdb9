"""CLIP's tokenizer: prompts to token ids."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from tav_jax.config import MAX_TEXT
from tav_jax.diffusion.alignment import TokenizedPrompt
from tav_jax.errors import InputError, WeightsError, is_utf8, short_repr


class PromptCut(UserWarning):
    """A prompt has more tokens than the text encoder reads and was truncated."""


def load_tokenizer(directory: Path) -> Any:
    """The CLIP tokenizer of a pipeline, with its vocabulary and padding token (Stable Diffusion 2 pads with "!")."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is not needed here
    from transformers import CLIPTokenizer  # imports in about a second

    try:
        tokenizer = CLIPTokenizer.from_pretrained(directory)
        tokenizer("a word", verbose=False)  # some defects appear only in use
        tokenizer(["a word"], padding="max_length", max_length=9, truncation=True)
    except Exception as error:  # the library raises many types for a damaged vocabulary
        cause = short_repr(str(error))
        raise WeightsError(f"{directory} is not a readable CLIP tokenizer ({cause}); download it again.") from error
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write the vocabulary of a loaded tokenizer, in the files of this and of earlier versions of transformers."""
    # The library's own writer needs a path in UTF-8.
    text = tokenizer.backend_tokenizer.to_str(pretty=True)
    model = json.loads(text)["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    (directory / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def tokenize(tokenizer: Any, texts: Sequence[str], length: int, vocab_size: int = 2**31) -> Int[np.ndarray, "n L"]:
    """Token ids below `vocab_size`, padded to `length`. Longer texts are truncated, with a warning."""
    for text in texts:
        _check_text(text, length)
        ids = tokenizer(text, verbose=False).input_ids
        if len(ids) > length:
            rest = tokenizer.decode(ids[length - 1 : -1])
            ignored = f"the prompt has {len(ids)} tokens and the text encoder reads {length}; {rest!r} is ignored"
            warnings.warn(PromptCut(f"{ignored}. Shorten the prompt to use all of it."), stacklevel=4)
    encoded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    ids = encoded.input_ids.astype(np.int32)
    # JAX clamps an index that is out of range without an error.
    if not 0 <= ids.min(initial=0) <= ids.max(initial=0) < vocab_size:
        raise WeightsError(
            f"the tokenizer produces the token id {ids.max()} and the text encoder's vocab_size is {vocab_size}; they "
            "are from different pipelines. Use both from the same one."
        )
    return ids


def _check_text(text: Any, length: int) -> None:
    if not isinstance(text, str):
        raise InputError(f"a prompt must be a string, not {short_repr(text)}")
    if len(text) > MAX_TEXT:
        encoder = f"the text encoder reads {length} tokens"
        raise InputError(f"a prompt has {len(text)} characters, more than {MAX_TEXT}; {encoder}")
    if not is_utf8(text):
        raise InputError(f"the prompt {short_repr(text)} is not valid Unicode; write it in UTF-8")


def tokenize_words(tokenizer: Any, length: int, text: str) -> TokenizedPrompt:
    """The tokens of a prompt, at most `length`, with the characters that each one covers."""
    _check_text(text, length)
    encoded = tokenizer(text, truncation=True, max_length=length, return_offsets_mapping=True, verbose=False)
    ids, offsets = np.asarray(encoded.input_ids, np.int32), [tuple(span) for span in encoded.offset_mapping]
    return TokenizedPrompt(text, ids, offsets, length)

"""Prompts: words to token ids, and to file names."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from tav_jax.errors import InputError, WeightsError, is_utf8, short_repr

LONGEST = 100_000  # characters of a prompt, of which some hundred are read


class PromptCut(UserWarning):
    """A prompt was longer than the text encoder can read."""


def load_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer, with this pipeline's vocabulary and padding (Stable Diffusion 2 pads with "!")."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing: nothing here needs it
    from transformers import CLIPTokenizer  # takes a second to import

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        tokenizer("a word", verbose=False)  # some damage shows only in use
        tokenizer(["a word"], padding="max_length", max_length=9, truncation=True)
    except Exception as error:  # whatever the library makes of a damaged vocabulary
        raise WeightsError(
            f"{folder} is not a readable CLIP tokenizer ({short_repr(str(error))}); download it again."
        ) from error
    return tokenizer


def tokenize(tokenizer: Any, texts: Sequence[str], length: int, words: int = 2**31) -> Int[np.ndarray, "n L"]:
    """Token ids below `words`, padded to `length`; what does not fit is cut, with a warning that says what."""
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"a prompt is a text, not {short_repr(text)}")
        if len(text) > LONGEST:
            raise InputError(f"a prompt has {len(text)} characters, more than {LONGEST}; {length} words are read of it")
        if not is_utf8(text):
            raise InputError(f"the prompt {short_repr(text)} holds bytes that are no text; write it in UTF-8")
    for text in texts:
        ids = tokenizer(text, verbose=False).input_ids
        if len(ids) > length:
            lost = tokenizer.decode(ids[length - 1 : -1])
            warnings.warn(
                PromptCut(
                    f"the prompt has {len(ids)} tokens and the text encoder reads {length}: cut off was {lost!r}. "
                    "Shorten the prompt to keep it all."
                ),
                stacklevel=4,
            )
    encoded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    ids = encoded.input_ids.astype(np.int32)
    if not 0 <= ids.min(initial=0) <= ids.max(initial=0) < words:  # JAX would take another word's place in silence
        raise WeightsError(
            f"the tokenizer gives the number {ids.max()} and the text encoder has {words} words; the two are not from "
            "one pipeline. Take both from the same one."
        )
    return ids

"""Prompts: words to token ids, and to file names."""

import hashlib
import re
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from tav_jax.errors import InputError, WeightsError


class PromptCut(UserWarning):
    """A prompt was longer than the text encoder can read."""


def load_tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer, with this pipeline's vocabulary and padding (Stable Diffusion 2 pads with "!")."""
    from transformers import CLIPTokenizer  # takes a second to import

    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever the library makes of a damaged vocabulary
        raise WeightsError(f"{folder} is not a readable CLIP tokenizer ({error}); download it again.") from error


def tokenize(tokenizer: Any, texts: Sequence[str], length: int) -> Int[np.ndarray, "n L"]:
    """Token ids, padded to `length`; what does not fit is cut, with a warning that says what."""
    if bad := [text for text in texts if not isinstance(text, str)]:
        raise InputError(f"a prompt is a text, not {bad[0]!r}")
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
    return encoded.input_ids.astype(np.int32)


def file_names(texts: Sequence[str], *, longest: int = 60) -> list[str]:
    """A safe file name for each prompt, without a suffix; no two alike, and the same ones every time.

    Letters and digits stay, everything else becomes one dash. Where that loses something which tells prompts apart, a
    short digest of the whole text follows.
    """
    plain = [_plain(text) for text in texts]
    names = []
    for text, name in zip(texts, plain, strict=True):
        if not name or len(name) > longest or plain.count(name) > texts.count(text):
            digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
            name = f"{name[:longest].rstrip('-') or 'prompt'}-{digest}"
        names.append(name)
    return names


def _plain(text: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only).strip("-")

"""The world's words, and a CLIP tokenizer that knows each of them as one token. Other words fall into pieces."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tav_jax.demo.world import COLOURS, PLACES, SHAPES, STYLES

LENGTH = 77  # tokens that the text encoder reads
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ("a", "an", "on", *COLOURS, *SHAPES, *PLACES, *re.findall("[a-z]+", " ".join(STYLES.values())))


def unknown_words(text: str) -> list[str]:
    """The words of a prompt that no picture of the world was captioned with."""
    return [word for word in dict.fromkeys(re.findall(r"[^\s,.;:!?]+", text.lower())) if word not in WORDS]


def _letters() -> list[str]:
    """The printable stand-ins that byte-level BPE uses for the 256 bytes, in their usual order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + i) for i in range(len(others))]


def merges() -> list[tuple[str, str]]:
    """Byte-pair encoding learned from the list of words: the commonest pair first, until each word is one token."""
    splits = [[*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(WORDS)]
    learned = []
    while any(len(split) > 1 for split in splits):
        counts = Counter(pair for split in splits for pair in pairwise(split))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        learned.append(best)
        for split in splits:
            i = 0
            while i < len(split) - 1:
                if (split[i], split[i + 1]) == best:
                    split[i : i + 2] = ["".join(best)]
                i += 1
    return learned


def vocabulary() -> list[str]:
    letters = _letters()
    return [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges()), START, END]


def write_tokenizer(folder: Path) -> None:
    """The files that transformers' CLIPTokenizer reads."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = {token: number for number, token in enumerate(vocabulary())}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges()))
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = {**special, "model_max_length": LENGTH, "errors": "replace", "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

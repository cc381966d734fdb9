"""Writes the demo model as a Stable Diffusion pipeline in the Diffusers layout, with a CLIP tokenizer for its captions.

Every word of the demo world's captions is one token. Other words are split into smaller tokens.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tav_jax.demo.edits import WORDS
from tav_jax.io.weights import TEMPORAL, torch_tensors
from tav_jax.models import VAE, ClipText, UNet

LENGTH = 77  # tokens in a prompt of the text encoder
START, END = "<|startoftext|>", "<|endoftext|>"

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    # With Stable Diffusion's 0.012, latents of 16 × 16 still show the image at the last timestep, and an edit of
    # inverted latents keeps the colours of the source whatever the prompt is.
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


# ---------------------------------------------------------------------------------------------------- tokenizer


def _byte_characters() -> list[str]:
    """The printable characters that stand for the 256 bytes in byte-level BPE, in the order of CLIP's vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def merges() -> list[tuple[str, str]]:
    """The merges of byte-pair encoding: the most frequent pair, repeatedly, until each word is one token."""
    splits = [[*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(WORDS)]
    pairs = []
    while any(len(split) > 1 for split in splits):
        counts = Counter(pair for split in splits for pair in pairwise(split))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        pairs.append(best)
        for split in splits:
            i = 0
            while i < len(split) - 1:
                if (split[i], split[i + 1]) == best:
                    split[i : i + 2] = ["".join(best)]
                i += 1
    return pairs


def vocabulary() -> list[str]:
    """All tokens, in the order of their ids."""
    characters = _byte_characters()
    return [*characters, *(c + "</w>" for c in characters), *("".join(pair) for pair in merges()), START, END]


def _write_json(file: Path, content: Any, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, **options) + "\n")


def write_tokenizer(directory: Path) -> None:
    """Write the files that transformers' CLIPTokenizer reads."""
    ids = {token: number for number, token in enumerate(vocabulary())}
    _write_json(directory / "vocab.json", ids, ensure_ascii=False)
    (directory / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges()))
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write_json(directory / "special_tokens_map.json", special, indent=2)
    config = {**special, "model_max_length": LENGTH, "errors": "replace", "tokenizer_class": "CLIPTokenizer"}
    _write_json(directory / "tokenizer_config.json", config, indent=2)


# ----------------------------------------------------------------------------------------------------- pipeline


def write_pipeline(
    directory: Path, unet: UNet, vae: VAE, text_encoder: ClipText, scaling_factor: float, recipe: dict[str, Any]
) -> None:
    """Replace the contents of `directory` by the pipeline, in half precision, and its training recipe."""
    u, v, t = unet.config, vae.config, text_encoder.config

    def block_types(direction: str, attention: Sequence[bool]) -> list[str]:
        return [f"{'CrossAttn' * has_attention}{direction}Block2D" for has_attention in attention]

    configs: dict[str, dict[str, Any]] = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.40.0",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": SCHEDULER,
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": list(u.heads),  # the number of heads, as in Stable Diffusion's configs
            "block_out_channels": list(u.block_out_channels),
            "cross_attention_dim": u.cross_attention_dim,
            "down_block_types": block_types("Down", u.down_attention),
            "in_channels": u.in_channels,
            "layers_per_block": u.layers_per_block,
            "norm_num_groups": u.norm_num_groups,
            "out_channels": u.out_channels,
            "sample_size": 16,
            "up_block_types": block_types("Up", u.up_attention),
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": list(v.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(v.block_out_channels),
            "latent_channels": v.latent_channels,
            "layers_per_block": v.layers_per_block,
            "norm_num_groups": v.norm_num_groups,
            "sample_size": 64,
            "scaling_factor": round(scaling_factor, 6),
            "up_block_types": ["UpDecoderBlock2D"] * len(v.block_out_channels),
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "bos_token_id": vocabulary().index(START),
            "eos_token_id": vocabulary().index(END),
            "hidden_act": t.hidden_act,
            "hidden_size": t.hidden_size,
            "intermediate_size": t.intermediate_size,
            "max_position_embeddings": t.max_position_embeddings,
            "model_type": "clip_text_model",
            "num_attention_heads": t.num_attention_heads,
            "num_hidden_layers": t.num_hidden_layers,
            "pad_token_id": vocabulary().index(END),
            "projection_dim": t.hidden_size,
            "vocab_size": t.vocab_size,
        },
        "recipe.json": recipe,
    }
    shutil.rmtree(directory, ignore_errors=True)
    for name, config in configs.items():
        _write_json(directory / name, config, indent=2)
    write_tokenizer(directory / "tokenizer")
    for part, module in (("unet", unet), ("vae", vae), ("text_encoder", text_encoder)):
        tensors = torch_tensors(module, part)
        half = {name: x.astype(np.float16) for name, x in tensors.items() if not TEMPORAL.fullmatch(name)}
        file = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
        save_file(half, directory / part / file, metadata={"format": "pt"})

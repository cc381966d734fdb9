"""Pipeline directories as single files in the original layout of Stable Diffusion, for tests.

The tables are those of Diffusers' script `convert_diffusers_to_original_stable_diffusion.py`, for any number of levels.
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def unet_prefixes(levels: int, layers: int) -> dict[str, str]:
    """Prefix of Diffusers' names → original prefix."""
    pairs = {"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2."}
    pairs |= {f"time_embedding.linear_{i}.": f"time_embed.{2 * i - 2}." for i in (1, 2)}
    number = 1
    for i in range(levels):
        for j in range(layers):
            pairs[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{number}.0."
            pairs[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{number}.1."
            number += 1
        pairs[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{number}.0.op."
        number += 1
    pairs |= {f"mid_block.resnets.{j}.": f"middle_block.{2 * j}." for j in (0, 1)}
    pairs["mid_block.attentions.0."] = "middle_block.1."
    number = 0
    for i in range(levels):
        for j in range(layers + 1):
            pairs[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{number}.0."
            pairs[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{number}.1."
            number += 1
        # The first level has no attention.
        pairs[f"up_blocks.{i}.upsamplers.0."] = f"output_blocks.{number - 1}.{1 if i == 0 else 2}."
    return pairs


def unet_original(name: str, prefixes: dict[str, str]) -> str:
    ((new, old),) = [(new, old) for new, old in prefixes.items() if name.startswith(new)]
    rest = name.removeprefix(new)
    if ".resnets." in new:
        inner, parameter = rest.rsplit(".", 1)
        rest = f"{RESNET[inner]}.{parameter}"
    return old + rest


def vae_original(name: str, levels: int) -> str:
    pairs = {"conv_shortcut": "nin_shortcut", "conv_norm_out": "norm_out", "mid_block.attentions.0.": "mid.attn_1."}
    for i in range(levels):
        for j in range(9):
            pairs[f"encoder.down_blocks.{i}.resnets.{j}."] = f"encoder.down.{i}.block.{j}."
            pairs[f"decoder.up_blocks.{i}.resnets.{j}."] = f"decoder.up.{levels - 1 - i}.block.{j}."
        pairs[f"down_blocks.{i}.downsamplers.0."] = f"down.{i}.downsample."
        pairs[f"up_blocks.{i}.upsamplers.0."] = f"up.{levels - 1 - i}.upsample."
    pairs |= {f"mid_block.resnets.{i}.": f"mid.block_{i + 1}." for i in (0, 1)}
    for new, old in pairs.items():
        name = name.replace(new, old)
    if ".attn_1." in name:  # both generations of Diffusers' names
        for new, old in (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
            name = name.replace(f".{new}.", f".{old}.")
        for new, old in (("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out")):
            name = name.replace(f".{new}.", f".{old}.")
    return name


def open_clip(tensors: dict[str, np.ndarray], layers: int) -> dict[str, np.ndarray]:
    """A text encoder with the names of OpenCLIP, and with its last layer, which Stable Diffusion 2 does not use."""
    out, fused = {}, {}
    for name, x in tensors.items():
        name = name.removeprefix("text_model.")
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            fused.setdefault(f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}", {})[match[2]] = x
            continue
        for new, old in (
            ("encoder.layers.", "transformer.resblocks."),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("fc1", "c_fc"),
            ("fc2", "c_proj"),
            ("self_attn", "attn"),
            ("final_ln", "ln_final"),
            ("final_layer_norm", "ln_final"),
            ("embeddings.token_embedding", "token_embedding"),
            ("embeddings.position_embedding.weight", "positional_embedding"),
        ):
            name = name.replace(new, old)
        out[name] = x
    out |= {name: np.concatenate([parts[part] for part in "qkv"]) for name, parts in fused.items()}
    last = {name: x for name, x in out.items() if f"resblocks.{layers - 1}." in name}
    out |= {name.replace(f".{layers - 1}.", f".{layers}."): x + 1 for name, x in last.items()}
    width = out["ln_final.bias"].shape[0]
    return {**out, "text_projection": np.ones((width, width), np.float32), "logit_scale": np.ones((), np.float32)}


def read_component(root: Path, part: str) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors that a 2D pipeline has, and the config."""
    (file,) = (root / part).glob("*.safetensors")
    tensors = {
        name: x for name, x in load_file(file).items() if not re.search("attn_temp|norm_temp|position_ids", name)
    }
    return tensors, json.loads((root / part / "config.json").read_text())


def original_tensors(root: Path, *, convolutions: bool = True) -> dict[str, np.ndarray]:
    """The tensors of a single file with the weights of a directory."""
    parts = {part: read_component(root, part) for part in ("unet", "vae", "text_encoder")}
    tensors, configs = ({part: pair[i] for part, pair in parts.items()} for i in (0, 1))
    return in_original_layout(tensors, configs, convolutions=convolutions)


def in_original_layout(components: dict, configs: dict, *, convolutions: bool = True) -> dict[str, np.ndarray]:
    """The tensors of a single file: with OpenCLIP if the text encoder uses GELU. The attention of the VAE has 1×1
    convolutions, as in the files of Stable Diffusion 1.x and 2.x."""
    config, text_config, text = configs["unet"], configs["text_encoder"], components["text_encoder"]
    prefixes = unet_prefixes(len(config["block_out_channels"]), config["layers_per_block"])
    tensors = {f"model.diffusion_model.{unet_original(name, prefixes)}": x for name, x in components["unet"].items()}
    for name, x in components["vae"].items():
        name = vae_original(name, len(configs["vae"]["block_out_channels"]))
        is_linear = ".attn_1." in name and name.endswith("weight") and ".norm." not in name
        tensors[f"first_stage_model.{name}"] = x[:, :, None, None] if is_linear and convolutions else x
    if text_config["hidden_act"] == "gelu":
        text = open_clip(text, text_config["num_hidden_layers"])
        return tensors | {f"cond_stage_model.model.{name}": x for name, x in text.items()}
    tensors |= {f"cond_stage_model.transformer.{name}": x for name, x in text.items()}
    positions = np.arange(text_config["max_position_embeddings"])[None]
    return {**tensors, "cond_stage_model.transformer.text_model.embeddings.position_ids": positions}

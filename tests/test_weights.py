"""Loading and saving weights: the tables of names, every file layout in use, and tensors that do not match."""

import json
import os
import re
import zlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import refusal
from safetensors.numpy import load_file, save_file

from tav_jax import TuneAVideo
from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.io import weights
from tav_jax.io.diffusers_layout import CONFIGS, Layout
from tav_jax.models import VAE, Conditioning
from tav_jax.training.train_step import trainable_filter

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
BIAS = "encoder.conv_in.bias"
TEMPORAL = re.compile(r"attn_temp|norm_temp")


def load(path, dtype="float32", **options) -> TuneAVideo:
    return TuneAVideo.from_pretrained(path, dtype=dtype, **options)


def state(tav: TuneAVideo) -> dict[str, np.ndarray]:
    """All weights of a pipeline under Diffusers' names."""
    parts = {"unet": tav.components.unet, "vae": tav.components.vae, "text_encoder": tav.components.text_encoder}
    return {f"{name} {key}": x for name, part in parts.items() for key, x in weights.torch_tensors(part, name).items()}


def same(ours: dict, theirs: dict) -> bool:
    return set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def edit_config(model, part: str, **changes) -> None:
    file = model / part / CONFIGS[part]
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(config))


def edit_tensors(model, part: str, change) -> None:
    file = model / part / FILES[part]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


# ------------------------------------------------------------------------------------------------------------ tables


def test_each_name_matches_one_row_and_converts_back_to_itself(case):
    for part, file in FILES.items():
        for name in load_file(case.model / part / file):
            if name.endswith("position_ids"):
                continue
            rows = [pattern for pattern, _ in weights.FROM_DIFFUSERS[part] if re.fullmatch(pattern, name)]
            assert len(rows) == 1 or (rows and name.endswith(".bias")), name  # the last row matches any bias
            path = weights.translate(weights.FROM_DIFFUSERS[part], name)
            assert path is not None, name
            back = weights.translate(weights.TO_DIFFUSERS[part], path)
            assert back is not None, path
            for new, old in weights.OLD_VAE_NAMES.items():
                back = back.replace(f"attentions.0.{new}.", f"attentions.0.{old}.") if part == "vae" else back
            assert back == name


def test_saving_a_loaded_pipeline_gives_the_same_files(case, tmp_path):
    case.tav.save_pretrained(tmp_path / "again")
    for part, file in FILES.items():
        theirs = {k: v for k, v in load_file(case.model / part / file).items() if not k.endswith("position_ids")}
        assert same(load_file(tmp_path / "again" / part / file), theirs)
    for part, file in CONFIGS.items():
        again, before = (json.loads((root / part / file).read_text()) for root in (tmp_path / "again", case.model))
        assert again == before
    assert same(state(load(tmp_path / "again")), state(case.tav))
    index = json.loads((tmp_path / "again/model_index.json").read_text())
    assert index["_class_name"] == "TuneAVideoPipeline"
    assert os.listdir(tmp_path) == ["again"]


# ------------------------------------------------------------------------------------------------------ file layouts


def test_sharded_files_are_read(model, sd1):
    directory = model / "unet"
    tensors = load_file(directory / FILES["unet"])
    names = sorted(tensors)
    (directory / FILES["unet"]).unlink()
    shards = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[::2]}
    shards["diffusion_pytorch_model-00002-of-00002.safetensors"] = names[1::2]
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    table = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    index = directory / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(table))
    assert same(state(load(model)), state(sd1.tav))

    (directory / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingError, match="lacks diffusion_pytorch_model-00002-of-00002"):
        load(model)


def test_the_fp16_variant_is_read_only_if_there_is_no_other(model, sd1):
    half = load_file(model / "vae" / FILES["vae"])
    half = {name: x.astype(np.float16) for name, x in half.items()}
    save_file(half, model / "vae/diffusion_pytorch_model.fp16.safetensors")
    assert same(state(load(model)), state(sd1.tav))
    (model / "vae" / FILES["vae"]).unlink()
    kernel = "decoder.conv_in.weight"
    assert np.array_equal(state(load(model))[f"vae {kernel}"], half[kernel].astype(np.float32))


def test_bin_files_are_read_without_executing_pickles(model, sd1, tmp_path):
    torch = pytest.importorskip("torch", reason="reading .bin needs CPU torch, which is not installed")
    tensors = {name: torch.tensor(x) for name, x in load_file(model / "text_encoder" / FILES["text_encoder"]).items()}
    (model / "text_encoder" / FILES["text_encoder"]).unlink()
    file = model / "text_encoder/pytorch_model.bin"
    torch.save(tensors, file)
    assert same(state(load(model)), state(sd1.tav))

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({**tensors, "payload": Evil()}, file)
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin .*not executed"):
        load(model)
    assert not (tmp_path / "executed").exists()
    torch.save([1, 2, 3], file)
    with pytest.raises(WeightsError, match="not a table of named tensors"):
        load(model)


def test_new_vae_names_and_a_text_encoder_without_prefix(model, sd1, tmp_path):
    new = {old: new for new, old in weights.OLD_VAE_NAMES.items()}

    def modern(tensors):
        for name in [n for n in tensors if ".attentions.0." in n and "group_norm" not in n]:
            kind = name.split(".attentions.0.")[1].rsplit(".", 1)[0]
            tensors[name.replace(f".{kind}.", f".{new[kind]}.")] = tensors.pop(name)

    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("text_model.")] = tensors.pop(name)

    edit_tensors(model, "vae", modern)
    edit_tensors(model, "text_encoder", bare)
    tav = load(model)
    assert same(state(tav), state(sd1.tav))
    tav.save_pretrained(tmp_path / "again")  # under the names that were read
    assert set(load_file(tmp_path / "again/vae" / FILES["vae"])) == set(load_file(model / "vae" / FILES["vae"]))


def make_2d(model) -> None:
    def strip(tensors):
        for name in [n for n in tensors if TEMPORAL.search(n)]:
            del tensors[name]

    edit_tensors(model, "unet", strip)
    edit_config(
        model,
        "unet",
        _class_name="UNet2DConditionModel",
        mid_block_type="UNetMidBlock2DCrossAttn",
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    )


@pytest.mark.parametrize("inflate", [False, True])
def test_loading_compiles_nothing_but_the_temporal_initialization(model, caplog, inflate):
    """Each program that loading compiles delays every start: most are too small for the persistent cache."""
    if inflate:
        make_2d(model)
        jax.clear_caches()
    with jax.log_compiles():
        load(model, "bfloat16")
    compiled = re.findall(r"Finished XLA compilation of (\S+)", caplog.text)
    assert compiled == ["jit(_uniform)"] * inflate


def test_the_temporal_initialization_of_a_seed():
    """The values of a layer depend on its name and the seed only, not on the other layers."""
    path, shape = "mid_block.attentions.0.transformer_blocks.0.attn_temp.to_q.kernel", (16, 16)
    key = jax.random.fold_in(jax.random.key(5), zlib.crc32(path.encode()))
    expected = jax.random.uniform(key, shape, minval=-0.25, maxval=0.25)
    assert np.array_equal(weights.init_temporal({path: shape}, 5)[path], expected)
    others = {path.replace("mid_block", name): shape for name in ("a", "z")}
    assert np.array_equal(weights.init_temporal({path: shape, **others}, 5)[path], expected)


@pytest.mark.parametrize("stored", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_conversion_on_the_host_gives_the_values_of_xla(stored):
    x = np.random.default_rng(0).normal(size=(24, 8, 3, 3)).astype(stored)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        ours = weights.from_torch(x, "conv_in.kernel", dtype)
        theirs = jax.jit(lambda x, dtype=dtype: x.transpose(2, 3, 1, 0).astype(dtype))(x)
        assert ours is not None
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


@pytest.mark.slow
def test_an_inflated_2d_unet_gives_the_same_output(model, sd1):
    make_2d(model)
    tav = load(model)
    fresh = {name: x for name, x in state(tav).items() if TEMPORAL.search(name)}
    assert len(fresh) == 7 * 7
    for name, x in fresh.items():
        if re.search(r"to_out|norm_temp\.bias", name):
            assert not x.any(), name
        elif "norm_temp" in name:
            assert (x == 1).all()
        else:  # torch's default for a linear layer: uniform within ±1/√fan_in
            limit = x.shape[1] ** -0.5
            assert 0.9 * limit < np.abs(x).max() <= limit, name
    assert same(state(load(model)), state(tav))
    assert not same(state(load(model, seed=1)), state(tav))
    without = load(model, temporal_attention=False)
    x, t, text = jnp.asarray(sd1.latents), jnp.array([321]), Conditioning(jnp.asarray(sd1.numbers["emb_prompt"]))
    np.testing.assert_allclose(tav.components.unet(x, t, text), without.components.unet(x, t, text), atol=1e-6)
    assert json.loads((model / "unet/config.json").read_text())["_class_name"] == "UNet2DConditionModel"


@pytest.mark.slow
def test_diffusers_opens_a_saved_pipeline(model, sd1, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers on CPU torch, is not installed")
    torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    transformers = pytest.importorskip("transformers")
    make_2d(model)
    load(model).save_pretrained(tmp_path / "out")
    out = tmp_path / "out"
    config = json.loads((out / "unet/config.json").read_text())
    assert config["down_block_types"][0] == "CrossAttnDownBlock3D"
    assert config["mid_block_type"] == "UNetMidBlock3DCrossAttn"
    flat = json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}).replace("3D", "2D"))
    unet = diffusers.UNet2DConditionModel.from_config(flat)
    tensors = {k: torch.tensor(v) for k, v in load_file(out / "unet" / FILES["unet"]).items()}
    result = unet.load_state_dict({k: v for k, v in tensors.items() if not TEMPORAL.search(k)}, strict=True)
    assert not result.missing_keys
    diffusers.AutoencoderKL.from_pretrained(out / "vae")
    diffusers.DDIMScheduler.from_pretrained(out / "scheduler")
    transformers.CLIPTextModel.from_pretrained(out / "text_encoder")
    assert transformers.CLIPTokenizer.from_pretrained(out / "tokenizer")("red").input_ids
    # On one frame, the inflated UNet is the 2D UNet.
    x, text = sd1.latents[:, :1], sd1.numbers["emb_prompt"]
    with torch.no_grad():
        theirs = unet(torch.tensor(x[:, 0]).permute(0, 3, 1, 2), 321, torch.tensor(text)).sample
    ours = load(out).components.unet(jnp.asarray(x), jnp.array([321]), Conditioning(jnp.asarray(text)))[:, 0]
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=2e-5)


def test_trained_weights_are_float32_and_frozen_ones_bfloat16(case):
    tav = case.load("bfloat16")
    trainable = trainable_filter()
    for path, leaf in weights.flat(weights.nnx.state(tav.components.unet)).items():
        assert leaf.get_value().dtype == (jnp.float32 if trainable(path.split("."), None) else jnp.bfloat16), path
    exact = state(case.tav)
    for name, x in state(tav).items():
        assert np.array_equal(x.astype(np.float32), exact[name].astype(x.dtype).astype(np.float32)), name
        assert x.dtype in (np.float32, ml_dtypes.bfloat16)


# ---------------------------------------------------------------------------------------------------- refused inputs


@pytest.mark.parametrize("part", list(FILES))
def test_a_component_without_weights(model, part):
    (model / part / FILES[part]).unlink()
    with pytest.raises(MissingError, match=f"{part} contains no weights: expected {FILES[part]}"):
        load(model)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "header"])
def test_a_damaged_file(model, damage):
    file = model / "unet" / FILES["unet"]
    whole = file.read_bytes()
    contents = {
        "truncated": whole[: len(whole) // 2],
        "text": b"<html>404</html>" * 100,
        "empty": b"",
        "header": b"\xff" * 8 + whole[8:],
    }
    file.write_bytes(contents[damage])
    with pytest.raises(WeightsError, match=r"unet/diffusion_pytorch_model\.safetensors is truncated or not a valid"):
        load(model)


def test_all_tensors_that_do_not_match_are_listed(model):
    def change(tensors):
        del tensors["conv_in.bias"], tensors["mid_block.resnets.0.norm1.weight"]
        tensors["conv_out.weight"] = tensors["conv_out.weight"][:, :3].copy()
        tensors["surprise.weight"] = np.zeros(3, np.float32)

    edit_tensors(model, "unet", change)
    with pytest.raises(WeightsError) as caught:
        load(model)
    message = str(caught.value)
    assert "2 missing: conv_in.bias, mid_block.resnets.0.norm1.weight" in message
    assert "1 unexpected: surprise.weight" in message
    assert "1 of a wrong shape: conv_out.weight is [4, 3, 3, 3], expected [4, 16, 3, 3]" in message


def autoencoder(model) -> VAE:
    """The smallest network of a pipeline, with its weights."""
    layout = Layout.open(model)
    vae = weights.abstract(VAE, layout.vae, jnp.float32)
    weights.fill(vae, weights.Source(layout), "vae", lambda path: jnp.float32)
    return vae


def test_thousands_of_unexpected_names_give_a_short_message(model):
    def change(tensors):
        tensors |= {f"no\nsuch{i}": np.zeros(1, np.float32) for i in range(5000)}

    edit_tensors(model, "vae", change)
    message = refusal(WeightsError, autoencoder, model)
    assert "5000 unexpected: 'no\\nsuch0'" in message
    assert "and 4988 more" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.astype(np.int64), "1 of a wrong dtype: encoder.conv_in.bias is I64, expected F64 or F32"),
        (lambda x: np.where(np.arange(len(x)) == 1, np.nan, x), "encoder.conv_in.bias has values that are NaN"),
        (lambda x: x.astype(np.float64) + 1e300, "infinite or too large for float32"),
    ],
)
def test_values_that_cannot_be_weights(model, change, message):
    edit_tensors(model, "vae", lambda tensors: tensors.update({BIAS: change(tensors[BIAS])}))
    assert message in refusal(WeightsError, autoencoder, model)


def test_an_inflated_unet_without_some_temporal_tensors_is_refused(model):
    name = "mid_block.attentions.0.transformer_blocks.0.attn_temp.to_q.weight"
    edit_tensors(model, "unet", lambda tensors: tensors.pop(name))
    with pytest.raises(WeightsError, match=f"1 missing: {name}"):
        load(model)


def test_options_are_checked(sd1):
    with pytest.raises(InputError, match="dtype is 'int8'; it must be one of bfloat16, float16, float32"):
        sd1.load("int8")
    with pytest.raises(InputError, match="spatial_attention is 'full'"):
        sd1.load(spatial_attention="full")


def test_one_value_of_a_kernel_is_at_its_transposed_index(sd1):
    theirs = load_file(sd1.model / "unet" / FILES["unet"])["conv_in.weight"]  # [out, in, height, width]
    ours = sd1.tav.components.unet.conv_in.kernel.get_value()  # [height, width, in, out]
    assert ours[2, 0, 3, 5] == theirs[5, 3, 2, 0]
    assert isinstance(ours, jax.Array)

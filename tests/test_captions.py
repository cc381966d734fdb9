"""`tav caption`, with a tiny BLIP of random weights."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE, refusal

from tav_jax import Clip
from tav_jax.cli import main
from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.evaluation import captions
from tav_jax.evaluation.captions import caption

WORDS = ["a", "man", "is", "skiing", "on", "the", "snow", "red", "blue", "square", "circle", "moves"]
FRAMES = np.random.default_rng(0).integers(0, 256, (6, 41, 50, 3), np.uint8)


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    module = pytest.importorskip("transformers.models.blip.image_processing_pil_blip")
    directory = tmp_path_factory.mktemp("blip")
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *WORDS]
    special = {"pad_token_id": 0, "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3}
    text = {"vocab_size": len(tokens), "hidden_size": 16, "encoder_hidden_size": 24, **shared, **special}
    vision = {"hidden_size": 24, "image_size": 32, "patch_size": 8, **shared}
    torch.manual_seed(1)
    network = transformers.BlipForConditionalGeneration(
        transformers.BlipConfig(text_config=text, vision_config=vision, projection_dim=8)
    )
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.3 * torch.randn(value.shape))
    network.save_pretrained(directory)
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n")
    tokenizer = transformers.BertTokenizer(str(directory / "vocab.txt"))
    images = module.BlipImageProcessorPil(size={"height": 32, "width": 32})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(directory)
    return directory


def test_caption_is_that_of_the_model_for_the_middle_frame(blip, tmp_path, capsys):
    import torch
    import transformers

    Clip(FRAMES, 8.0).save(f"{tmp_path}/clip/")
    network = transformers.BlipForConditionalGeneration.from_pretrained(blip).eval()
    processor = transformers.AutoProcessor.from_pretrained(blip)

    def describe(frame) -> str:
        with torch.inference_mode():
            inputs = processor(images=frame, return_tensors="pt")
            ids = network.generate(**inputs, max_new_tokens=captions.MAX_TOKENS)
        return processor.decode(ids[0], skip_special_tokens=True).strip()

    assert np.array_equal(captions.middle_frame(tmp_path / "clip"), FRAMES[3])
    expected = describe(FRAMES[3])
    assert len(expected.split()) > 1
    assert caption(Clip(FRAMES, 8.0), blip) == expected
    assert main.main(["caption", f"{tmp_path}/clip", f"--model={blip}"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_middle_frame_of_a_video(tmp_path):
    frames = np.stack([np.full((32, 32, 3), 40 * i, np.uint8) for i in range(5)])
    video = Clip(frames, 8.0).save(tmp_path / "clip.mp4")
    assert abs(np.asarray(captions.middle_frame(video), float) - 80).max() < 4


def test_what_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    clip = Clip(FRAMES, 8.0)
    message = refusal(WeightsError, caption, clip, REFERENCE / "sd1/model/text_encoder")
    assert "is a model of type 'clip_text_model'. Use a BLIP or BLIP-2 model in the layout of transformers" in message
    assert "neither a directory nor a hub id. Use a BLIP" in refusal(MissingError, caption, clip, "no-such-model")
    (tmp_path / "config.json").write_text("{")
    assert "is not a readable model" in refusal(WeightsError, caption, clip, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    assert "is not a readable model" in refusal(WeightsError, caption, clip, tmp_path)
    refusal(MissingError, caption, tmp_path / "no.mp4", tmp_path)
    (tmp_path / "text.mp4").write_text("this is not a video")
    assert "text.mp4" in refusal(InputError, caption, tmp_path / "text.mp4", tmp_path)

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    assert "cannot be reached (ConnectionError); check the network" in refusal(MissingError, caption, clip, "a/b")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    message = refusal(MissingError, caption, clip, "a/b")
    assert message.startswith("captions need torch, which is not installed; `pip install '")
    assert message.endswith("[caption]'`")

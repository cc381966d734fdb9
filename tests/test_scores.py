"""Scores: against transformers' CLIPModel in torch, a plain implementation of LOVEU's script, and formulas."""

import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REFERENCE, refusal
from PIL import Image

import tav_jax
from tav_jax import Clip, PromptCut
from tav_jax.cli import main
from tav_jax.errors import InputError, MissingError, WeightsError
from tav_jax.evaluation import loveu, scores
from tav_jax.evaluation.scores import Scores, score
from tav_jax.io import clip as clips
from tav_jax.io.video import load_video

TOKENIZER = REFERENCE / "sd1/model/tokenizer"
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 37, 50, 3), np.uint8)
PROMPT, SOURCE_PROMPT = "blue square", "red square is moving"
# The two families: OpenAI's models, and OpenCLIP's, which use the exact GELU. 529 is the end token of the tokenizer,
# and 2 is what older configs say. Positions, heads and widths differ; an image side need not be a multiple of a patch.
FAMILIES = {
    "openai": {"act": "quick_gelu", "patch": 6, "image": 20, "heads": 2, "end": 2},
    "openclip": {"act": "gelu", "patch": 5, "image": 30, "heads": 4, "end": 529},
}


def make_clip(directory: Path, *, act: str, patch: int, image: int, heads: int, end: int):
    """Write a tiny CLIP of random weights in the layout of transformers, and return it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shared = {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": heads, "hidden_act": act}
    text = {"vocab_size": 530, "hidden_size": 24, "eos_token_id": end, "bos_token_id": 528, **shared}
    vision = {"hidden_size": 32, "image_size": image, "patch_size": patch, **shared}
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in theirs.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
        theirs.logit_scale.fill_(np.log(100))  # that of all published models
    theirs.save_pretrained(directory)
    processor(image).save_pretrained(directory)
    shutil.copytree(TOKENIZER, directory, dirs_exist_ok=True)
    return theirs


def processor(image: int, **options):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    return module.CLIPImageProcessorPil(**{"size": {"shortest_edge": image}, "crop_size": image} | options)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(directory, transformers' model, our loaded model)"""
    directory = tmp_path_factory.mktemp("clip") / request.param
    theirs = make_clip(directory, **FAMILIES[request.param])
    return directory, theirs, clips.load_clip(directory)


@pytest.fixture
def clip_directory(tmp_path) -> Path:
    make_clip(tmp_path / "clip", **FAMILIES["openai"])
    return tmp_path / "clip"


def loveu_script(theirs, directory: Path, frames: np.ndarray, prompt: str) -> dict[str, Any]:
    """What the challenge's script computes, with Pillow, transformers and numpy."""
    import torch
    import transformers

    images = [Image.fromarray(frame).resize((480, 480)) for frame in frames]
    pixels = processor(theirs.config.vision_config.image_size)(images, return_tensors="pt").pixel_values
    ids = transformers.CLIPTokenizer.from_pretrained(directory)([prompt], return_tensors="pt").input_ids
    with torch.no_grad():
        out = theirs(input_ids=ids, pixel_values=pixels)
    features = out.image_embeds.double().numpy()  # of length one
    cosines = features @ features.T
    np.fill_diagonal(cosines, 0)
    scale = theirs.logit_scale.exp().item()
    return {
        "clip_text": out.logits_per_image.mean().item(),
        "of_frames": out.logits_per_image[:, 0].numpy(),
        "clip_frame": cosines.sum() / (len(frames) * (len(frames) - 1)),
        "pick": scale * (features @ out.text_embeds[0].double().numpy()).mean(),
        "temporal_consistency": np.mean([a @ b for a, b in pairwise(features)]),
    }


@pytest.mark.parametrize("prompt", [PROMPT, "", "a blue square is moving on snow, cartoon style"])
def test_scores_equal_transformers_and_the_script_of_loveu(family, prompt):
    directory, theirs, ours = family
    expected = loveu_script(theirs, directory, FRAMES, prompt)
    source = loveu_script(theirs, directory, FRAMES, SOURCE_PROMPT)
    nearer = expected.pop("of_frames") > source["of_frames"]
    ours_scores = score(FRAMES, prompt, ours, pick=ours, source_prompt=SOURCE_PROMPT)
    for name, value in expected.items():
        assert abs(getattr(ours_scores, name) - value) <= 1e-4, name
    assert abs(expected["clip_text"] - source["clip_text"]) > 1e-2  # the text matters
    assert ours_scores.frame_accuracy == np.mean(nearer)
    assert ours_scores.background_psnr is None


def test_pick_uses_the_scale_of_its_model(family):
    _, _, ours = family
    images, text = np.eye(3, 4, dtype=np.float32), np.full(4, 0.5, np.float32)
    assert scores.pick_score(images, text, np.log(50)) == pytest.approx(25)
    assert scores.clip_text(images, text) == pytest.approx(50)
    assert ours.logit_scale == pytest.approx(np.log(100), abs=1e-6)


def test_long_prompts_are_cut_with_a_warning(family):
    ours = family[2]
    with pytest.warns(PromptCut, match="tokens and the text encoder reads 77"):
        embedding = ours.embed_text("a blue square " * 40)
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(37, 50), (51, 33), (480, 480), (20, 21), (9, 300)])
@pytest.mark.parametrize(
    "options",
    [{}, {"crop_size": {"height": 20, "width": 20}, "size": {"height": 23, "width": 31}}, {"resample": 2}],
)
def test_preprocessing_equals_that_of_transformers_exactly(tmp_path, shape, options):
    frame = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    theirs = processor(20, **options)
    theirs.save_pretrained(tmp_path)
    ours = clips._preprocessing(tmp_path, clips.ClipVisionConfig(image_size=20))(frame)
    expected = theirs([frame], return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    assert ours.dtype == expected.dtype == np.float32
    assert np.array_equal(ours, expected)


def test_preprocessing_of_other_configs(tmp_path):
    """The forms of older and newer versions, and none."""
    vision = clips.ClipVisionConfig(image_size=224)
    published = {"crop_size": 224, "size": 224, "resample": 3, "image_mean": clips.MEAN, "image_std": clips.STD}
    usual = clips._preprocessing(tmp_path, vision)
    assert usual == clips.Preprocessing(224, (224, 224), 3, 1 / 255, clips.MEAN, clips.STD)
    for name, config in (
        ("preprocessor_config.json", published),
        ("processor_config.json", {"image_processor": {**published, "size": {"shortest_edge": 224}}}),
    ):
        (tmp_path / name).write_text(json.dumps(config))
        assert clips._preprocessing(tmp_path, vision) == usual
        (tmp_path / name).unlink()
    for name, value, message in (
        ("crop_size", 336, "crop_size is (336, 336), expected images of 224 pixels on a side"),
        ("size", {"longest_edge": 224}, "size is {'longest_edge': 224}, expected a number, shortest_edge, or height"),
        ("image_std", [0, 1, 1], "image_std is [0, 1, 1], expected three numbers"),
        ("do_resize", "yes", "do_resize is 'yes', expected true or false"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(published | {name: value}))
        assert message in refusal(WeightsError, clips._preprocessing, tmp_path, vision)


@pytest.mark.parametrize("form", ["sharded", "bin", "half", "config_dict"])
def test_other_forms_of_the_weights(family, tmp_path, form):
    import torch

    directory, theirs, ours = family
    copy = Path(shutil.copytree(directory, tmp_path / "clip"))
    (copy / "model.safetensors").unlink()
    if form == "bin":
        torch.save(theirs.state_dict(), copy / "pytorch_model.bin")
    elif form == "half":
        torch.save({name: x.half() for name, x in theirs.state_dict().items()}, copy / "pytorch_model.bin")
    else:
        theirs.save_pretrained(copy, max_shard_size="20KB" if form == "sharded" else "1GB")
    if form == "config_dict":  # of older versions, where only it is right
        config = json.loads((copy / "config.json").read_text())
        config |= {"text_config_dict": config["text_config"], "text_config": {"hidden_size": 99}}
        (copy / "config.json").write_text(json.dumps(config))
    same = clips.load_clip(copy)
    for one, other in zip(weights_of(same), weights_of(ours), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3 if form == "half" else 0)


def weights_of(encoder) -> list[np.ndarray]:
    import jax

    return [np.asarray(x) for x in jax.tree.leaves(encoder.model)]


# ------------------------------------------------------------------------------------------------------ without weights


def test_flicker_is_the_formula():
    changes = [abs(int(b) - int(a)) for a, b in zip(FRAMES[:-1].ravel(), FRAMES[1:].ravel(), strict=True)]
    assert scores.flicker(FRAMES) == pytest.approx((255 - np.mean(changes)) / 255, abs=1e-12)
    assert scores.flicker(np.stack([FRAMES[0]] * 3)) == 1.0


def test_background_psnr_is_the_formula():
    rng = np.random.default_rng(2)
    source = rng.integers(0, 256, FRAMES.shape, np.uint8)
    mask = rng.integers(0, 2, FRAMES.shape[:3]).astype(bool)
    outside = (FRAMES.astype(float) - source)[~mask]
    expected = 10 * np.log10(255**2 / np.mean(outside**2))
    assert score(FRAMES, None, source=source, mask=mask).background_psnr == pytest.approx(expected, abs=1e-9)
    one = score(FRAMES, None, source=source, mask=mask[0]).background_psnr
    assert one == score(FRAMES, None, source=source, mask=np.stack([mask[0]] * 5)).background_psnr
    edited = np.where(mask[..., None], source, FRAMES)
    same = score(edited, "", source=Clip(FRAMES, 8.0), mask=mask)
    assert same.background_psnr == np.inf
    assert same.to_dict() == {"flicker": same.flicker, "background_psnr": "Infinity"}
    assert score(FRAMES, "", source=source, mask=np.ones(FRAMES.shape[:3])).background_psnr is None


def test_scores_that_cannot_be_computed_are_absent(family):
    assert score(FRAMES, PROMPT) == Scores(flicker=scores.flicker(FRAMES))
    one = score(FRAMES[:1], PROMPT, family[2])
    assert (one.clip_frame, one.temporal_consistency, one.flicker, one.pick) == (None,) * 4
    assert one.to_dict().keys() == {"clip_text"}
    no_prompt = score(FRAMES, None, family[2], pick=family[2], source_prompt=SOURCE_PROMPT)
    assert no_prompt.to_dict().keys() == {"clip_frame", "temporal_consistency", "flicker"}


def test_scores_of_a_file_are_those_of_all_its_pixels(tmp_path):
    Clip(FRAMES, 8.0).save(f"{tmp_path}/frames/")
    assert score(tmp_path / "frames", None) == score(FRAMES, None) == score(Clip(FRAMES, 8.0), None)
    assert load_video(tmp_path / "frames", multiple=1).frames.shape == FRAMES.shape
    assert load_video(tmp_path / "frames").frames.shape == (5, 32, 48, 3)
    assert tav_jax.evaluation.score is score


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": FRAMES[0]}, "frames are uint8 [37, 50, 3]; give uint8 [F, H, W, 3], a Clip, or the path"),
        ({"frames": FRAMES / 255}, "frames are float64 [5, 37, 50, 3]; give uint8"),
        ({"frames": FRAMES[:0]}, "frames are uint8 [0, 37, 50, 3]; give uint8"),
        ({"frames": None}, "frames are None; give uint8"),
        ({"source": FRAMES}, "background_psnr needs both source and mask; give both or neither"),
        ({"mask": FRAMES[..., 0] > 9}, "background_psnr needs both source and mask; give both or neither"),
        ({"source": FRAMES[1:], "mask": FRAMES[..., 0] > 9}, "source has the shape [4, 37, 50, 3] and frames [5, 37,"),
        ({"source": FRAMES, "mask": np.ones((5, 37, 51))}, "mask has the shape [5, 37, 51]; it must be [5, 37, 50] or"),
        ({"source": FRAMES, "mask": FRAMES[..., 0]}, "its values must be from 0 to 1"),
    ],
)
def test_refused_arguments(arguments, message):
    assert message in refusal(
        InputError, lambda: score(**{"frames": FRAMES, "prompt": "a", "clip": "no/dir", **arguments})
    )


# ------------------------------------------------------------------------------------------------------ refused models


def change_config(**changes):
    def change(directory: Path):
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def only_text_encoder(directory: Path):
    shutil.rmtree(directory)
    shutil.copytree(REFERENCE / "sd1/model/text_encoder", directory)


def pipeline(directory: Path):
    shutil.rmtree(directory)
    shutil.copytree(REFERENCE / "sd1/model", directory)


def truncate(directory: Path):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def text_weights_only(directory: Path):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    save_file({n: x for n, x in tensors.items() if "vis" not in n}, directory / "model.safetensors")


DAMAGE = [
    (only_text_encoder, WeightsError, "is a CLIP text encoder without a vision tower. Use a CLIP model in the layout"),
    (pipeline, MissingError, "has no config.json (it is a pipeline of Diffusers). Use a CLIP model"),
    (change_config(model_type="siglip"), WeightsError, "is a model of type 'siglip', not 'clip'. Use a CLIP model"),
    (change_config(vision_config=[1]), WeightsError, "vision_config is not an object"),
    (change_config(projection_dim="12"), WeightsError, "projection_dim is '12', expected a whole number"),
    (
        change_config(projection_dim=13),
        WeightsError,
        "2 of a wrong shape: text_projection.weight is [12, 24], expected",
    ),
    (text_weights_only, WeightsError, "missing: vision_model.embeddings.class_embedding, "),
    (truncate, WeightsError, "model.safetensors is truncated or not a valid safetensors file"),
    (lambda d: (d / "config.json").write_text("{"), WeightsError, "config.json is not a readable JSON file"),
    (lambda d: (d / "model.safetensors").unlink(), MissingError, "contains no weights: expected model.safetensors"),
    (lambda d: (d / "vocab.json").unlink(), MissingError, "has no tokenizer (tokenizer.json, or vocab.json and merges"),
    (lambda d: (d / "vocab.json").write_text("{"), WeightsError, "is not a readable CLIP tokenizer"),
    (shutil.rmtree, MissingError, "is neither a directory nor a hub id. Use a CLIP model"),
]


@pytest.mark.parametrize(("damage", "kind", "message"), DAMAGE)
def test_refused_clip_directories(clip_directory, damage, kind, message):
    damage(clip_directory)
    assert message in refusal(kind, score, FRAMES, PROMPT, clip_directory)


def test_pickscore_takes_its_processor_from_another_repository(clip_directory, tmp_path, monkeypatch):
    """PickScore's repository has no tokenizer."""
    expected = score(FRAMES, PROMPT, pick=clip_directory)
    other = tmp_path / "processor"
    other.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "preprocessor_config.json"):
        (clip_directory / name).rename(other / name)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, "model*.safetensors*" in allow_patterns))
        return str(other)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert score(FRAMES, PROMPT, pick=clip_directory) == expected
    assert asked == [("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", False)]

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    message = refusal(MissingError, score, FRAMES, PROMPT, pick=clip_directory)
    assert "cannot be reached (ConnectionError)" in message
    assert "clip has no tokenizer; copy that of laion/CLIP-ViT-H-14-laion2B-s32B-b79K into it" in message


# ------------------------------------------------------------------------------------------------------- command line


def tav(capsys, *words) -> tuple[int, str, str]:
    code = main.main(list(map(str, words)))
    return code, *capsys.readouterr()


def test_score_of_a_video(family, tmp_path, capsys):
    directory, _, ours = family
    video = Clip(FRAMES[:, :32, :48], 8.0).save(tmp_path / "out.mp4")
    Clip(FRAMES[::-1, :32, :48], 8.0).save(f"{tmp_path}/source/")
    mask = np.zeros((32, 48, 3), np.uint8)
    mask[:, 24:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    frames = load_video(video).frames

    code, out, _ = tav(capsys, "score", "--video", video, "--prompt=a")
    assert code == 0
    assert out.splitlines()[0].split() == ["flicker"]
    assert "Add --clip for scores with CLIP (openai/clip-vit-large-patch14, 1.7 GB) and --pick for PickScore" in out

    options = [f"--source={tmp_path}/source", f"--mask={tmp_path}/mask.png", f"--source-prompt={SOURCE_PROMPT}"]
    code, out, _ = tav(
        capsys,
        "score",
        f"--video={video}",
        "--prompt=",
        f"--clip={directory}",
        f"--pick={directory}",
        *options,
        "--json",
    )
    source = FRAMES[::-1, :32, :48]
    expected = score(frames, "", ours, pick=ours, source_prompt=SOURCE_PROMPT, source=source, mask=mask[..., 0] / 255)
    assert code == 0
    assert out.count("\n") == 1
    assert json.loads(out) == pytest.approx(expected.to_dict(), abs=1e-5)
    assert len(expected.to_dict()) == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--video={no.mp4}"], "no.mp4 does not exist; use a video file or a directory of images"),
        (["--video={text.mp4}"], "text.mp4"),
        (["--video={frames}", "--csv=a.csv"], "--csv has no effect with --video; leave it out"),
        (["--workdir={frames}", "--prompt=a"], "--prompt has no effect with --workdir; leave it out"),
        (["--workdir={frames}"], "frames holds no run (no config.json); give the --workdir of a `tav train`"),
        (["--video={frames}", "--mask={frames}"], "needs both --source and --mask; give both or neither"),
        (["--video={frames}", "--source={less}", "--mask={frames}"], "--source has 4 frames of 37×50 and --video 5"),
        (["--video={frames}", "--source={frames}", "--mask={long}"], "--mask has 5 frames of 20×90; give an image"),
        (["--video={frames}", "--clip=no-such-directory"], "no-such-directory is neither a directory nor a hub id"),
    ],
)  # fmt: skip
def test_refused_command_lines(tmp_path, capsys, words, message):
    Clip(FRAMES, 8.0).save(f"{tmp_path}/frames/")
    Clip(FRAMES[1:], 8.0).save(f"{tmp_path}/less/")
    Clip(np.zeros((5, 20, 90, 3), np.uint8), 8.0).save(f"{tmp_path}/long/")
    (tmp_path / "text.mp4").write_text("this is not a video")
    code, out, error = tav(capsys, "score", *(w.replace("{", f"{tmp_path}/").replace("}", "") for w in words))
    assert (code, out) == (2, "")
    assert error.count("\n") == 1
    assert message in error


# ---------------------------------------------------------------------------------------------------------- LOVEU-TGVE

COLUMNS = [loveu.VIDEO, loveu.CAPTION, *loveu.TYPES.values()]
# As in the challenge's file: a row begins each dataset, rows without a name end it.
ROWS = [
    ["DAVIS Videos:"],
    ["stunt", "red square", *(f"{kind} square " for kind in loveu.TYPES)],
    [],
    ["", "", "", "", "", ""],
    ["Youtube Videos:", "", "", "", "", ""],
    ["a-car, old", 'a "car"', "red car", "a bus", "a car at sea", ""],
]


def submission(directory: Path, rows=ROWS, columns=COLUMNS) -> Path:
    """A submission in the challenge's layout, and the CSV."""
    rng = np.random.default_rng(3)
    for video in ("DAVIS_480p/stunt", "youtube_480p/a-car, old"):
        for kind in loveu.TYPES:
            (directory / video / kind).mkdir(parents=True)
            for i in range(3):
                image = Image.fromarray(rng.integers(0, 256, (30, 44, 3), np.uint8))
                image.save(directory / video / kind / f"{i:05d}.jpg")
    with (directory / loveu.CSV).open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([columns, *rows])
    return directory


def test_the_table_of_the_challenge(family, tmp_path, capsys):
    directory, theirs, _ = family
    root = submission(tmp_path)
    expected: dict[str, list] = {kind: [] for kind in loveu.TYPES}
    for video, row in (("DAVIS_480p/stunt", ROWS[1]), ("youtube_480p/a-car, old", ROWS[5])):
        for kind, prompt in zip(loveu.TYPES, row[2:], strict=True):
            images = [Image.open(file) for file in sorted((root / video / kind).glob("*.jpg"))]
            frames = np.stack([np.asarray(image) for image in images])
            expected[kind].append(loveu_script(theirs, directory, frames, prompt.strip()))
    code, out, _ = tav(capsys, "score", f"--loveu={root}", f"--clip={directory}", f"--pick={directory}", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["missing"] == []
    assert len(result["clips"]) == 8
    everything = [values for group in expected.values() for values in group]
    for kind, group in {**expected, "all": everything}.items():
        assert result[kind]["clips"] == len(group)
        for name in ("clip_text", "clip_frame", "pick"):
            assert abs(result[kind][name] - np.mean([values[name] for values in group])) <= 1e-4

    for file in (root / "youtube_480p/a-car, old/style").iterdir():
        file.unlink()
    code, _, error = tav(capsys, "score", f"--loveu={root}")
    assert code == 2
    assert "lacks 1 of 8 clips: youtube_480p/a-car, old/style; add --partial to score the others" in error
    code, out, error = tav(capsys, "score", f"--loveu={root}", "--partial", f"--csv={root / loveu.CSV}")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["clips", "flicker"]
    assert [line[0] for line in lines[1:6]] == [*loveu.TYPES, "all"]
    assert [line[1] for line in lines[1:6]] == ["1", "2", "2", "2", "7"]
    assert "Not scored, because they are missing: youtube_480p/a-car, old/style" in out


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        (COLUMNS[:-1], ROWS, "has no column Multiple Changes Caption; use the challenge's LOVEU-TGVE-2023_Dataset.csv"),
        (COLUMNS, [], "has no column Video name, "),
        (COLUMNS, ROWS[:1], "names no video"),
        (COLUMNS, ROWS[1:], "has the video 'stunt', which is not a name below one of the rows 'DAVIS Videos:'"),
        (COLUMNS, [ROWS[0], ["../secret"]], "has the video '../secret', which is not a name below"),
        (COLUMNS, [["TikTok Videos:"], ROWS[1]], "has the video 'stunt', which is not a name below"),
    ],
)
def test_refused_csv(tmp_path, capsys, columns, rows, message):
    root = submission(tmp_path, rows, columns)
    code, out, error = tav(capsys, "score", f"--loveu={root}")
    assert (code, out) == (2, "")
    assert message in error
    (root / loveu.CSV).unlink()
    assert "does not exist; give the challenge's" in tav(capsys, "score", f"--loveu={root}")[2]
    (root / loveu.CSV).write_bytes(b"\xff\xfe\0")
    assert "is not a UTF-8 text" in tav(capsys, "score", f"--loveu={root}")[2]

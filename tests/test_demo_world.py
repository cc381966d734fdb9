"""The demo world, its evaluation (compared with ground truth), its edits and its tokenizer."""

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from tav_jax.demo import world
from tav_jax.demo.edits import EDIT_KINDS, MODEL, example_edits, parse_scene, source_clip, unknown_words
from tav_jax.demo.evaluation import FIELDS, analyze_frame, evaluate
from tav_jax.demo.world import COLOURS, MOTIONS, PLACES, SHAPES, STYLES, DemoClip, Pose, Scene, all_scenes, render
from tav_jax.io.tokenizer import load_tokenizer, tokenize
from tools.demo_model_files import vocabulary, write_tokenizer
from tools.pretrain_demo_model import training_image

# ---------------------------------------------------------------------------------------------------- the world


def test_number_of_scenes_and_captions():
    assert len(COLOURS) >= 8
    assert len(SHAPES) >= 6
    assert len(PLACES) >= 8
    assert len(STYLES) >= 3
    every = list(all_scenes())
    assert len(every) == len({scene.caption for scene in every}) == 8 * 6 * 8 * 3
    assert Scene("orange", "ring", "sand").caption == "an orange ring on sand"
    assert Scene("red", "star", "snow", "night").caption == "a red star on snow, at night"


def test_training_images_depend_on_the_seed_only():
    for seed in (0, 5):
        scene, pose, image = training_image(seed)
        again = training_image(seed)
        assert (scene, pose) == again[:2]
        assert np.array_equal(image, again[2])
        assert np.array_equal(image, render(scene, pose))
    assert not np.array_equal(training_image(0)[2], training_image(1)[2])


def test_training_images_exclude_held_out_combinations():
    held = {(s.colour, s.shape, s.place) for s in all_scenes() if s.held_out}
    assert len(held) == 8 * 6 * 8 // 8
    for names, position in ((COLOURS, 0), (SHAPES, 1), (PLACES, 2)):  # every word is still trained
        share = Counter(combination[position] for combination in held)
        assert max(share.values()) / (8 * 6 * 8 / len(names)) < 0.3
    assert not any(training_image(seed)[0].held_out for seed in range(500))


@pytest.mark.parametrize("shape", SHAPES)
def test_shape_has_the_centre_and_size_of_its_pose(shape):
    rows, columns = np.mgrid[:64, :64] + 0.5
    areas = []
    for pose in (Pose(20.3, 31.7, 10.0, 0.4), Pose(40.0, 25.5, 14.0, 2.0)):
        mask = world.coverage(world.signed_distance(shape, pose))
        areas.append(mask.sum())
        assert np.average(columns, weights=mask) == pytest.approx(pose.x, abs=0.05)
        assert np.average(rows, weights=mask) == pytest.approx(pose.y, abs=0.05)
        assert np.hypot(columns - pose.x, rows - pose.y)[mask > 0.5].max() < pose.radius + 0.5
    assert areas[1] / areas[0] == pytest.approx(1.4**2, rel=0.03)


def test_shape_areas():
    r = 14.0
    expected = {
        "circle": np.pi * (0.88 * r) ** 2,
        "square": (2 * 0.71 * r) ** 2,
        "triangle": 3 * np.sqrt(3) / 4 * r**2,
        "star": 5 * 0.45 * r**2 * np.sin(np.pi / 5),
        "cross": 2 * (1.9 * 0.6) * r**2 - (0.6 * r) ** 2,
        "ring": np.pi * ((0.96 * r) ** 2 - (0.42 * r) ** 2),
    }
    for shape, area in expected.items():
        measured = world.coverage(world.signed_distance(shape, Pose(32.0, 32.0, r, 0.3))).sum()
        assert measured == pytest.approx(area, rel=0.02), shape


@pytest.mark.parametrize("motion", MOTIONS)
def test_ground_truth_of_a_clip(motion):
    clip = DemoClip.sample(11, 8, motion=motion)
    assert clip.frames.shape == (8, 64, 64, 3)
    assert clip.scene.style == "plain"
    rows, columns = np.mgrid[:64, :64] + 0.5
    for centre, mask in zip(clip.centres, clip.masks, strict=True):
        assert np.average(columns, weights=mask) == pytest.approx(centre[0], abs=0.1)
        assert np.average(rows, weights=mask) == pytest.approx(centre[1], abs=0.1)
        assert mask[0].max() == mask[-1].max() == mask[:, 0].max() == mask[:, -1].max() == 0  # never at the edge
    moved = np.abs(np.diff(clip.centres, axis=0)).sum()
    assert moved > 20
    radii, angles = ([getattr(pose, name) for pose in clip.poses] for name in ("radius", "angle"))
    assert (max(radii) > 1.2 * min(radii)) == (motion == "growth")
    assert (np.ptp(angles) > 0.7) == (motion == "rotation")
    # The background is static.
    for i, j in pairwise(range(8)):
        away = (clip.masks[i] == 0) & (clip.masks[j] == 0)
        assert np.array_equal(clip.frames[i][away], clip.frames[j][away])


# ---------------------------------------------------------------------------------------------------- evaluation


def test_frame_analysis_of_every_scene():
    rng = np.random.default_rng(99)
    correct, distances = [], []
    for scene in all_scenes():
        pose = Pose.sample(rng)
        found = analyze_frame(render(scene, pose))
        correct.append(found.scene == scene)
        distances.append(np.hypot(found.centre[0] - pose.x, found.centre[1] - pose.y))
    assert np.mean(correct) >= 0.99
    assert np.max(distances) < 0.5


@pytest.mark.parametrize("seed", range(6))
def test_evaluation_of_a_perfect_edit_and_of_no_edit(seed):
    source = DemoClip.sample(seed)
    for kind, expected in example_edits(source, seed).items():
        perfect = evaluate(expected.frames, expected)
        assert perfect.edit_accuracy == 1, kind
        assert perfect.trajectory_error_px < 0.3
        assert perfect.frame_consistency > 0.999
        unedited = evaluate(source.frames, expected)
        assert unedited.edit_accuracy == 0, kind
        assert unedited.trajectory_error_px < 0.3


def test_evaluation_detects_each_kind_of_error():
    expected = DemoClip.sample(3, motion="arc", scene=Scene("green", "star", "wood"))
    for field, wrong in (("colour", "blue"), ("shape", "circle"), ("place", "sand"), ("style", "night")):
        evaluation = evaluate(expected.edit(**{field: wrong}).frames, expected)
        assert evaluation.edit_accuracy == 0
        for other in FIELDS:
            assert getattr(evaluation, other) == (other != field), (field, other)
    backwards = evaluate(expected.frames[::-1], expected)
    assert backwards.edit_accuracy == 1
    assert backwards.trajectory_error_px > 5
    one_bad = expected.frames.copy()
    one_bad[3] = expected.edit(colour="red").frames[3]
    assert evaluate(one_bad, expected).edit_accuracy == pytest.approx(7 / 8)
    restless = DemoClip(
        expected.scene, "arc", tuple(replace(p, texture_offset=(9 * i, 5 * i)) for i, p in enumerate(expected.poses))
    )
    assert evaluate(restless.frames, expected).frame_consistency < 0.97


def test_evaluation_without_an_object():
    expected = DemoClip.sample(3)
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    for frames in (np.zeros((8, 64, 64, 3), np.uint8), np.full((8, 64, 64, 3), 255, np.uint8), noise):
        evaluation = evaluate(frames, expected)
        assert evaluation.edit_accuracy == 0
        assert evaluation.shape == 0
    empty = np.stack([(world.texture("grass")[:64, :64] * 255).astype(np.uint8)] * 8)
    assert evaluate(empty, expected).trajectory_error_px == 64


# ------------------------------------------------------------------------------------------- edits and tokenizer


def test_tokenizer_round_trip(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for scene in all_scenes():
        words = re.findall(r"[a-z]+|,", scene.caption)
        assert len(tokenizer(scene.caption).input_ids) == len(words) + 2
    ids = tokenize(tokenizer, ["a golden dragon", ""], 77)
    assert ids.shape == (2, 77)
    assert ids.max() < len(vocabulary())
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == "a golden dragon"
    assert len(json.loads((tmp_path / "vocab.json").read_text())) == len(vocabulary())
    for file in tmp_path.iterdir():  # the vocabulary has not changed since the demo model was trained
        assert file.read_bytes() == (MODEL / "tokenizer" / file.name).read_bytes()


def test_unknown_words():
    assert unknown_words("a Golden dragon on snow, at night; a dragon!") == ["golden", "dragon"]
    assert not any(unknown_words(scene.caption) for scene in all_scenes())


def test_example_edits_change_the_fields_of_their_kind():
    source = DemoClip.sample(5)
    edits = example_edits(source, 5)
    assert tuple(edits) == EDIT_KINDS
    changed = [{f for f in FIELDS if getattr(edit.scene, f) != getattr(source.scene, f)} for edit in edits.values()]
    assert changed == [{"style"}, {"colour", "shape"}, {"place"}, set(FIELDS)]
    assert all(edit.poses == source.poses for edit in edits.values())


def test_parse_scene():
    source = source_clip(None, 8).scene
    assert parse_scene("a blue star on snow, at night", source) == Scene("blue", "star", "snow", "night")
    assert parse_scene("something on sand", source) == replace(source, place="sand")
    assert parse_scene("", source) == source
    for scene in all_scenes():
        assert parse_scene(scene.caption, Scene("red", "ring", "wood")) == scene

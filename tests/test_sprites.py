"""The drawn world, its judge, its words: the judge is held against drawn truth before it may judge anything."""

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from tav_jax.demo import vocabulary as words
from tav_jax.demo import world
from tav_jax.demo.edits import KINDS, edits_of, scene_of, source_clip
from tav_jax.demo.judge import judge, look
from tav_jax.demo.world import (
    COLOURS,
    MOTIONS,
    PLACES,
    SHAPES,
    STYLES,
    Pose,
    Scene,
    SpriteClip,
    render,
    scenes,
    still,
)
from tav_jax.io.tokenizer import load_tokenizer, tokenize

# ---------------------------------------------------------------------------------------------------- the world


def test_the_world_is_as_rich_as_it_says():
    assert len(COLOURS) >= 8
    assert len(SHAPES) >= 6
    assert len(PLACES) >= 8
    assert len(STYLES) >= 3
    every = list(scenes())
    assert len(every) == len({scene.caption for scene in every}) == 8 * 6 * 8 * 3
    assert Scene("orange", "ring", "sand").caption == "an orange ring on sand"
    assert Scene("red", "star", "snow", "night").caption == "a red star on snow, at night"


def test_a_picture_is_the_same_for_the_same_seed_and_another_for_another():
    for seed in (0, 5):
        scene, pose, picture = still(seed)
        again = still(seed)
        assert (scene, pose) == again[:2]
        assert np.array_equal(picture, again[2])
        assert np.array_equal(picture, render(scene, pose))
    assert not np.array_equal(still(0)[2], still(1)[2])


def test_pretraining_never_sees_what_is_held_out():
    held = {(s.colour, s.shape, s.place) for s in scenes() if s.held_out}
    assert len(held) == 8 * 6 * 8 // 8
    for names, position in ((COLOURS, 0), (SHAPES, 1), (PLACES, 2)):  # each word is seen all the same
        share = Counter(combination[position] for combination in held)
        assert max(share.values()) / (8 * 6 * 8 / len(names)) < 0.3
    assert not any(still(seed)[0].held_out for seed in range(500))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_turns_grows_and_moves_as_its_pose_says(shape):
    rows, columns = np.mgrid[:64, :64] + 0.5
    areas = []
    for pose in (Pose(20.3, 31.7, 10.0, 0.4), Pose(40.0, 25.5, 14.0, 2.0)):
        mask = world.coverage(world.distance(shape, pose))
        areas.append(mask.sum())
        assert np.average(columns, weights=mask) == pytest.approx(pose.x, abs=0.05)
        assert np.average(rows, weights=mask) == pytest.approx(pose.y, abs=0.05)
        assert np.hypot(columns - pose.x, rows - pose.y)[mask > 0.5].max() < pose.radius + 0.5
    assert areas[1] / areas[0] == pytest.approx(1.4**2, rel=0.03)


def test_shapes_have_the_areas_of_geometry():
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
        drawn = world.coverage(world.distance(shape, Pose(32.0, 32.0, r, 0.3))).sum()
        assert drawn == pytest.approx(area, rel=0.02), shape


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_clip_knows_its_truth(motion):
    clip = SpriteClip.draw(11, 8, motion=motion)
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
    # What does not move stays: outside of the object two neighbouring frames are alike.
    for i, j in pairwise(range(8)):
        away = (clip.masks[i] == 0) & (clip.masks[j] == 0)
        assert np.array_equal(clip.frames[i][away], clip.frames[j][away])


# ---------------------------------------------------------------------------------------------------- the judge


def test_the_judge_is_right_about_drawn_truth():
    rng = np.random.default_rng(99)
    right, apart = [], []
    for scene in scenes():
        pose = Pose.draw(rng)
        seen = look(render(scene, pose))
        right.append(seen.scene == scene)
        apart.append(np.hypot(seen.centre[0] - pose.x, seen.centre[1] - pose.y))
    assert np.mean(right) >= 0.99
    assert np.max(apart) < 0.5


@pytest.mark.parametrize("seed", range(6))
def test_the_judge_finds_a_perfect_edit_perfect_and_the_unedited_clip_wrong(seed):
    source = SpriteClip.draw(seed)
    for kind, wanted in edits_of(source, seed).items():
        perfect = judge(wanted.frames, wanted)
        assert perfect.edit_accuracy == 1, kind
        assert perfect.trajectory_error_px < 0.3
        assert perfect.frame_consistency > 0.999
        unedited = judge(source.frames, wanted)
        assert unedited.edit_accuracy == 0, kind
        assert unedited.trajectory_error_px < 0.3


def test_the_judge_sees_each_kind_of_fault():
    wanted = SpriteClip.draw(3, motion="arc", scene=Scene("green", "star", "wood"))
    for field, wrong in (("colour", "blue"), ("shape", "circle"), ("place", "sand"), ("style", "night")):
        verdict = judge(wanted.edited(**{field: wrong}).frames, wanted)
        assert verdict.edit_accuracy == 0
        for other in ("colour", "shape", "place", "style"):
            assert getattr(verdict, other) == (other != field), (field, other)
    backwards = judge(wanted.frames[::-1], wanted)
    assert backwards.edit_accuracy == 1
    assert backwards.trajectory_error_px > 5
    one_bad = wanted.frames.copy()
    one_bad[3] = wanted.edited(colour="red").frames[3]
    assert judge(one_bad, wanted).edit_accuracy == pytest.approx(7 / 8)
    restless = SpriteClip(
        wanted.scene, "arc", tuple(replace(p, ground=(9 * i, 5 * i)) for i, p in enumerate(wanted.poses))
    )
    assert judge(restless.frames, wanted).frame_consistency < 0.97


def test_nothing_noise_and_an_empty_place_are_not_an_object_on_the_path():
    wanted = SpriteClip.draw(3)
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    for frames in (np.zeros((8, 64, 64, 3), np.uint8), np.full((8, 64, 64, 3), 255, np.uint8), noise):
        verdict = judge(frames, wanted)
        assert verdict.edit_accuracy == 0
        assert verdict.shape == 0
    empty = np.stack([(world.ground("grass")[:64, :64] * 255).astype(np.uint8)] * 8)
    assert judge(empty, wanted).trajectory_error_px == 64


# ---------------------------------------------------------------------------------------------------- the words


def test_each_word_of_the_world_is_one_token_and_others_survive(tmp_path):
    words.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for scene in scenes():
        said = re.findall(r"[a-z]+|,", scene.caption)
        assert len(tokenizer(scene.caption).input_ids) == len(said) + 2
    ids = tokenize(tokenizer, ["a golden dragon", ""], 77)
    assert ids.shape == (2, 77)
    assert ids.max() < len(words.vocabulary())
    assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == "a golden dragon"
    # The same merges whatever the order in which a set is gone through.
    assert words.merges() == words.merges()
    assert len(json.loads((tmp_path / "vocab.json").read_text())) == len(words.vocabulary())


def test_unknown_words_are_named_once():
    assert words.unknown_words("a Golden dragon on snow, at night; a dragon!") == ["golden", "dragon"]
    assert not any(words.unknown_words(scene.caption) for scene in scenes())


def test_edits_change_what_their_kind_says():
    source = SpriteClip.draw(5)
    edits = edits_of(source, 5)
    assert tuple(edits) == KINDS
    fields = ("colour", "shape", "place", "style")
    changed = [{f for f in fields if getattr(edit.scene, f) != getattr(source.scene, f)} for edit in edits.values()]
    assert changed == [{"style"}, {"colour", "shape"}, {"place"}, set(fields)]
    assert all(edit.poses == source.poses for edit in edits.values())


def test_what_a_prompt_asks_for_is_read_from_its_words():
    source = source_clip(None, 8).scene
    assert scene_of("a blue star on snow, at night", source) == Scene("blue", "star", "snow", "night")
    assert scene_of("something on sand", source) == replace(source, place="sand")
    assert scene_of("", source) == source
    for scene in scenes():
        assert scene_of(scene.caption, Scene("red", "ring", "wood")) == scene

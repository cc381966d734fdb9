"""What a picture of the world shows, found by looking at its pixels. Nothing here is learned.

The object is what is bright: every place is dim. From there follow its centre, its colour, its shape (by laying all
shapes over it, in all sizes and turns), and from the rest the place and the style.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from tav_jax.demo.world import (
    COLOURS,
    PLACES,
    SHAPES,
    SIDE,
    STYLES,
    Scene,
    SpriteClip,
    coverage,
    distance_at,
    ground,
    style_ground,
    style_object,
)

STANDS_OUT = 0.25  # by how much an object is at least brighter than the place it is in
OUTLINED = 0.25  # a pixel beside the object that is darker than this is part of an outline, but at night
RIM = 8  # pixels around an object that an outline with its pointed corners, or a blurred edge, may reach
ALIKE = 0.60  # how much of the best-fitting shape and the object must overlap for it to be that shape


class Seen(NamedTuple):
    """One picture, judged. `centre` is (x, y), not a number where there is no object; `scene` names what is nearest."""

    scene: Scene
    centre: Float[np.ndarray, "2"]
    overlap: float  # of the object with the shape it is taken for
    mask: Float[np.ndarray, "64 64"]


def look(picture: UInt8[np.ndarray, "64 64 3"]) -> Seen:
    colours = picture.astype(np.float64) / 255
    mask = mask_of(colours)
    centre = centre_of(mask)
    shape, overlap = shape_of(mask, centre)
    place, style = ground_of(colours, mask)
    return Seen(Scene(colour_of(colours, mask, style), shape, place, style), centre, overlap, mask)


def mask_of(colours: Float[np.ndarray, "64 64 3"]) -> Float[np.ndarray, "64 64"]:
    """How much of each pixel is the object's. An outline belongs to neither the object nor the place."""
    brightness = colours.max(axis=-1)
    place, brightest = np.median(brightness), np.percentile(brightness, 99)  # the place is most of a picture
    inside = brightness > (place + brightest) / 2
    if brightest - place < STANDS_OUT or np.count_nonzero(inside) < 12:
        return np.zeros((SIDE, SIDE))
    full, floor = np.percentile(brightness[inside], 60), np.median(brightness[~inside])
    return np.clip((brightness - floor) / (full - floor) * 1.6 - 0.6 * 0.5, 0, 1) * _near(inside, 1)


def _near(inside: Bool[np.ndarray, "64 64"], pixels: int) -> Bool[np.ndarray, "64 64"]:
    """The pixels that are inside, or so few pixels from one that is."""
    for _ in range(pixels):
        padded = np.pad(inside, 1)
        inside = np.any([padded[dy : dy + SIDE, dx : dx + SIDE] for dy in range(3) for dx in range(3)], axis=0)
    return inside


def centre_of(mask: Float[np.ndarray, "64 64"]) -> Float[np.ndarray, "2"]:
    """The mean of the mask's pixels; those far from the bulk are left out the second time."""
    if not mask.any():
        return np.full(2, np.nan)
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    centre = np.array([np.average(columns, weights=mask), np.average(rows, weights=mask)])
    close = mask * (np.hypot(columns - centre[0], rows - centre[1]) < 20)
    if not close.any():
        return centre
    return np.array([np.average(columns, weights=close), np.average(rows, weights=close)])


def colour_of(colours: Float[np.ndarray, "64 64 3"], mask: Float[np.ndarray, "64 64"], style: str) -> str:
    core = mask > 0.85
    if not core.any():
        return "none"
    seen = np.median(colours[core], axis=0)
    return min(COLOURS, key=lambda name: float(np.sum((style_object(style, COLOURS[name]) - seen) ** 2)))


# -------------------------------------------------------------------------------------------------------- shapes

REACH = 18  # pixels around the centre that a shape is compared on
TURNS = 18
LENGTHS = tuple(np.arange(6.0, 18.1, 0.75))


@functools.cache
def _shapes() -> tuple[tuple[str, ...], Float[np.ndarray, "n"], Float[np.ndarray, "n pixels"]]:
    """Every shape in every size and turn, around the middle: names, areas, pixels."""
    rows, columns = np.mgrid[-REACH:REACH, -REACH:REACH] + 0.5
    turn = {"circle": np.inf, "ring": np.inf, "square": 4, "cross": 4, "triangle": 3, "star": 5}
    names, drawn = [], []
    for shape in SHAPES:
        for length in LENGTHS:
            for i in range(TURNS if np.isfinite(turn[shape]) else 1):
                names.append(shape)
                angle = 2 * np.pi / turn[shape] * i / TURNS
                drawn.append(coverage(distance_at(shape, columns, rows, length, angle)).ravel())
    bank = np.stack(drawn)
    return tuple(names), bank.sum(axis=1), bank


def shape_of(mask: Float[np.ndarray, "64 64"], centre: Float[np.ndarray, "2"]) -> tuple[str, float]:
    """The shape that fits best, and the overlap: intersection over union."""
    if not mask.any():
        return "none", 0.0
    around = _window(mask, centre)
    area, lost = around.sum(), mask.sum() - around.sum()
    names, areas, bank = _shapes()
    close = np.flatnonzero((areas > 0.7 * area) & (areas < 1.4 * area))
    if not len(close):
        return "none", 0.0
    common = np.minimum(bank[close], around.ravel()).sum(axis=1)
    overlap = common / (areas[close] + area + lost - common)
    best = int(np.argmax(overlap))
    return names[close[best]], float(overlap[best])


def _window(mask: Float[np.ndarray, "64 64"], centre: Float[np.ndarray, "2"]) -> Float[np.ndarray, "36 36"]:
    """The mask around a centre, moved by parts of a pixel so that the centre is the middle."""
    padded = np.pad(mask, REACH + 2)
    whole = np.floor(centre).astype(int)
    fx, fy = centre - whole
    y, x = whole[1] + 2, whole[0] + 2
    a, b, c, d = (padded[y + i : y + i + 2 * REACH, x + j : x + j + 2 * REACH] for i in (0, 1) for j in (0, 1))
    return (1 - fy) * ((1 - fx) * a + fx * b) + fy * ((1 - fx) * c + fx * d)


# ---------------------------------------------------------------------------------------------- places and styles


@functools.cache
def _grounds() -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Mean and spread of the colours of each place in each style."""
    drawn = {(p, s): np.clip(style_ground(s, ground(p)), 0, 1).reshape(-1, 3) for p in PLACES for s in STYLES}
    return {what: (pixels.mean(axis=0), pixels.std(axis=0)) for what, pixels in drawn.items()}


def ground_of(colours: Float[np.ndarray, "64 64 3"], mask: Float[np.ndarray, "64 64"]) -> tuple[str, str]:
    """The place and the style whose colours have the nearest mean and spread, looking at pixels away from the object.

    The style that draws an outline is not it where the object has none.
    """
    near = _near(mask > 0, RIM)
    if near.all():
        return "none", "none"
    pixels = colours[~near]
    mean, spread = pixels.mean(axis=0), pixels.std(axis=0)

    def apart(what: tuple[str, str]) -> float:
        its_mean, its_spread = _grounds()[what]
        return float(np.sum((its_mean - mean) ** 2) + np.sum((its_spread - spread) ** 2))

    place, style = min(_grounds(), key=apart)
    if style == "outline" and mask.any() and outlined(colours, mask) < 0.5:
        style = "none"
    return place, style


def outlined(colours: Float[np.ndarray, "64 64 3"], mask: Float[np.ndarray, "64 64"]) -> float:
    """How much of the object's edge has a dark pixel within reach."""
    edge = _near(mask > 0.5, 1) & (mask <= 0.5)
    return float(np.mean(_near(colours.max(axis=-1) < OUTLINED, 2)[edge]))


# -------------------------------------------------------------------------------------------------------- clips


class Verdict(NamedTuple):
    """Shares of frames that are right, and the clip's two other measures."""

    colour: float
    shape: float
    place: float
    style: float
    edit_accuracy: float  # all four at once
    trajectory_error_px: float
    frame_consistency: float
    centres: Float[np.ndarray, "F 2"]


def judge(frames: UInt8[np.ndarray, "F 64 64 3"], wanted: SpriteClip) -> Verdict:
    """Compare a clip with what it should show: the scene frame by frame, and the object's path."""
    seen = [look(frame) for frame in frames]
    right = np.array(
        [
            (
                s.scene.colour == wanted.scene.colour,
                s.scene.shape == wanted.scene.shape and s.overlap > ALIKE,
                s.scene.place == wanted.scene.place,
                s.scene.style == wanted.scene.style,
            )
            for s in seen
        ]
    )
    centres = np.stack([s.centre for s in seen])
    apart = np.hypot(*(centres - wanted.centres).T)
    # No object at all is as far off as a picture is wide.
    apart = np.where(np.isfinite(apart), apart, SIDE)
    shares = right.mean(axis=0)
    return Verdict(
        *(float(share) for share in shares),
        edit_accuracy=float(right.all(axis=1).mean()),
        trajectory_error_px=float(apart.mean()),
        frame_consistency=consistency(frames, [s.mask for s in seen]),
        centres=centres,
    )


def consistency(frames: UInt8[np.ndarray, "F 64 64 3"], masks: list[np.ndarray]) -> float:
    """1 − the root mean square change, from each frame to the next, of the pixels that the object covers in neither."""
    changes = []
    for i in range(len(frames) - 1):
        near = _near((masks[i] > 0) | (masks[i + 1] > 0), RIM)
        change = (frames[i + 1].astype(float) - frames[i])[~near] / 255
        changes.append(np.mean(change**2) if change.size else 1.0)
    return 1.0 - float(np.sqrt(np.mean(changes))) if changes else 1.0

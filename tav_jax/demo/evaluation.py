"""Measures what an image of the demo world shows from its pixels, without a learned model.

Objects are bright and places are dim, so brightness gives the mask of the object. The mask gives its centre, its
colour and, by comparison with every shape in all sizes and rotations, its shape. The other pixels give place and style.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from tav_jax.demo.world import (
    COLOURS,
    IMAGE_SIZE,
    PLACES,
    SHAPES,
    STYLES,
    DemoClip,
    Scene,
    coverage,
    signed_distance_at,
    style_background,
    style_object,
    texture,
)

MIN_CONTRAST = 0.25  # between the brightness of an object and of its place
MAX_OUTLINE = 0.25  # the largest brightness of a pixel of an outline
RIM = 8  # pixels around an object's mask that may show its outline, corners or blurred edge
MIN_OVERLAP = 0.60  # intersection over union of the object and the best matching shape
FIELDS = ("colour", "shape", "place", "style")


class FrameAnalysis(NamedTuple):
    """What one image shows."""

    scene: Scene  # the nearest match of each field; "none" if there is none
    centre: Float[np.ndarray, "2"]  # (x, y); NaN without an object
    overlap: float  # intersection over union of the object and the nearest shape
    mask: Float[np.ndarray, "64 64"]


def analyze_frame(image: UInt8[np.ndarray, "64 64 3"]) -> FrameAnalysis:
    pixels = image.astype(np.float64) / 255
    mask = object_mask(pixels)
    centre = mask_centre(mask)
    shape, overlap = match_shape(mask, centre)
    place, style = match_background(pixels, mask)
    return FrameAnalysis(Scene(match_colour(pixels, mask, style), shape, place, style), centre, overlap, mask)


def object_mask(pixels: Float[np.ndarray, "64 64 3"]) -> Float[np.ndarray, "64 64"]:
    """The fraction of each pixel that the object covers, without its outline; zeros without an object."""
    brightness = pixels.max(axis=-1)
    background, brightest = np.median(brightness), np.percentile(brightness, 99)  # most pixels are background
    inside = brightness > (background + brightest) / 2
    if brightest - background < MIN_CONTRAST or np.count_nonzero(inside) < 12:
        return np.zeros((IMAGE_SIZE, IMAGE_SIZE))
    high, low = np.percentile(brightness[inside], 60), np.median(brightness[~inside])
    return np.clip((brightness - low) / (high - low) * 1.6 - 0.6 * 0.5, 0, 1) * _dilate(inside, 1)


def _dilate(mask: Bool[np.ndarray, "64 64"], pixels: int) -> Bool[np.ndarray, "64 64"]:
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        shifts = [padded[dy : dy + IMAGE_SIZE, dx : dx + IMAGE_SIZE] for dy in range(3) for dx in range(3)]
        mask = np.any(shifts, axis=0)
    return mask


def mask_centre(mask: Float[np.ndarray, "64 64"]) -> Float[np.ndarray, "2"]:
    """The centroid (x, y) of the mask within 20 pixels of its centroid, which excludes stray pixels far away."""
    if not mask.any():
        return np.full(2, np.nan)
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5
    centre = np.array([np.average(columns, weights=mask), np.average(rows, weights=mask)])
    close = mask * (np.hypot(columns - centre[0], rows - centre[1]) < 20)
    if not close.any():
        return centre
    return np.array([np.average(columns, weights=close), np.average(rows, weights=close)])


def match_colour(pixels: Float[np.ndarray, "64 64 3"], mask: Float[np.ndarray, "64 64"], style: str) -> str:
    core = mask > 0.85
    if not core.any():
        return "none"
    median = np.median(pixels[core], axis=0)
    return min(COLOURS, key=lambda name: float(np.sum((style_object(style, COLOURS[name]) - median) ** 2)))


# ------------------------------------------------------------------------------------------------------- shapes

REACH = 18  # shapes are compared in a square of 2 · REACH pixels around the centre
ROTATIONS = 18
TEMPLATE_RADII = tuple(np.arange(6.0, 18.1, 0.75))


@functools.cache
def _shape_templates() -> tuple[tuple[str, ...], Float[np.ndarray, "n"], Float[np.ndarray, "n pixels"]]:
    """The names, areas and masks of every shape in every size and rotation."""
    rows, columns = np.mgrid[-REACH:REACH, -REACH:REACH] + 0.5
    symmetry = {"circle": np.inf, "ring": np.inf, "square": 4, "cross": 4, "triangle": 3, "star": 5}
    names, masks = [], []
    for shape in SHAPES:
        for radius in TEMPLATE_RADII:
            for i in range(ROTATIONS if np.isfinite(symmetry[shape]) else 1):
                names.append(shape)
                angle = 2 * np.pi / symmetry[shape] * i / ROTATIONS
                masks.append(coverage(signed_distance_at(shape, columns, rows, float(radius), angle)).ravel())
    templates = np.stack(masks)
    return tuple(names), templates.sum(axis=1), templates


def match_shape(mask: Float[np.ndarray, "64 64"], centre: Float[np.ndarray, "2"]) -> tuple[str, float]:
    """The best matching shape and its overlap with the mask: intersection over union."""
    if not mask.any():
        return "none", 0.0
    window = _window(mask, centre)
    area, outside = window.sum(), mask.sum() - window.sum()
    names, areas, templates = _shape_templates()
    close = np.flatnonzero((areas > 0.7 * area) & (areas < 1.4 * area))
    if not len(close):
        return "none", 0.0
    intersection = np.minimum(templates[close], window.ravel()).sum(axis=1)
    overlap = intersection / (areas[close] + area + outside - intersection)
    best = int(np.argmax(overlap))
    return names[close[best]], float(overlap[best])


def _window(mask: Float[np.ndarray, "64 64"], centre: Float[np.ndarray, "2"]) -> Float[np.ndarray, "36 36"]:
    """The mask in the square around a centre, interpolated between pixels."""
    padded = np.pad(mask, REACH + 2)
    corner = np.floor(centre).astype(int)
    fx, fy = centre - corner
    y, x = corner[1] + 2, corner[0] + 2
    a, b, c, d = (padded[y + i : y + i + 2 * REACH, x + j : x + j + 2 * REACH] for i in (0, 1) for j in (0, 1))
    return (1 - fy) * ((1 - fx) * a + fx * b) + fy * ((1 - fx) * c + fx * d)


# ---------------------------------------------------------------------------------------------- places and styles


@functools.cache
def _background_statistics() -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation of the colours of each (place, style)."""
    pixels = {(p, s): np.clip(style_background(s, texture(p)), 0, 1).reshape(-1, 3) for p in PLACES for s in STYLES}
    return {key: (colours.mean(axis=0), colours.std(axis=0)) for key, colours in pixels.items()}


def match_background(pixels: Float[np.ndarray, "64 64 3"], mask: Float[np.ndarray, "64 64"]) -> tuple[str, str]:
    """The (place, style) whose mean and standard deviation of colours are nearest to those of the background.

    The style is "none" if the nearest style is "outline" and the object has no outline.
    """
    near = _dilate(mask > 0, RIM)
    if near.all():
        return "none", "none"
    background = pixels[~near]
    mean, std = background.mean(axis=0), background.std(axis=0)
    statistics = _background_statistics()

    def error(key: tuple[str, str]) -> float:
        expected_mean, expected_std = statistics[key]
        return float(np.sum((expected_mean - mean) ** 2) + np.sum((expected_std - std) ** 2))

    place, style = min(statistics, key=error)
    if style == "outline" and mask.any() and outlined_fraction(pixels, mask) < 0.5:
        style = "none"
    return place, style


def outlined_fraction(pixels: Float[np.ndarray, "64 64 3"], mask: Float[np.ndarray, "64 64"]) -> float:
    """The fraction of the object's edge pixels that have a dark pixel within 2 pixels."""
    edge = _dilate(mask > 0.5, 1) & (mask <= 0.5)
    return float(np.mean(_dilate(pixels.max(axis=-1) < MAX_OUTLINE, 2)[edge]))


# -------------------------------------------------------------------------------------------------------- clips


class Evaluation(NamedTuple):
    """How well a clip matches the expected scene and motion."""

    colour: float  # the fraction of frames with the expected colour; likewise shape, place and style
    shape: float
    place: float
    style: float
    edit_accuracy: float  # the fraction of frames in which all four are as expected
    trajectory_error_px: float  # mean distance of the object's centre from the expected one
    frame_consistency: float
    centres: Float[np.ndarray, "F 2"]


MEASURES = ("edit_accuracy", "trajectory_error_px", "frame_consistency")


def evaluate(frames: UInt8[np.ndarray, "F 64 64 3"], expected: DemoClip) -> Evaluation:
    """Compare the scene and the object's path with the ground truth, frame by frame.

    A frame without an object counts as a trajectory error of the width of the image.
    """
    found = [analyze_frame(frame) for frame in frames]
    correct = np.array([[getattr(f.scene, name) == getattr(expected.scene, name) for name in FIELDS] for f in found])
    correct[:, FIELDS.index("shape")] &= [f.overlap > MIN_OVERLAP for f in found]
    centres = np.stack([f.centre for f in found])
    distances = np.hypot(*(centres - expected.centres).T)
    distances = np.where(np.isfinite(distances), distances, IMAGE_SIZE)
    return Evaluation(
        *(float(fraction) for fraction in correct.mean(axis=0)),
        edit_accuracy=float(correct.all(axis=1).mean()),
        trajectory_error_px=float(distances.mean()),
        frame_consistency=background_consistency(frames, [f.mask for f in found]),
        centres=centres,
    )


def near_object(frames: UInt8[np.ndarray, "F 64 64 3"]) -> Bool[np.ndarray, "F 64 64"]:
    """Pixels of the object and around it."""
    return np.stack([_dilate(analyze_frame(frame).mask > 0, RIM) for frame in frames])


def background_consistency(frames: UInt8[np.ndarray, "F 64 64 3"], masks: list[np.ndarray]) -> float:
    """1 − the root mean square difference of consecutive frames, over pixels away from the object in both frames."""
    changes = []
    for i in range(len(frames) - 1):
        near = _dilate((masks[i] > 0) | (masks[i + 1] > 0), RIM)
        change = (frames[i + 1].astype(float) - frames[i])[~near] / 255
        changes.append(np.mean(change**2) if change.size else 1.0)
    return 1.0 - float(np.sqrt(np.mean(changes))) if changes else 1.0

"""A drawn world whose truth is known: still pictures with captions, and clips of motions that no caption names.

A scene is one object of one colour in one place, drawn in one style, on 64 × 64 anti-aliased pixels. Positions are
(x, y) in pixels from the upper left corner, angles are in radians, a size is the radius of the circle around an object.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, UInt8

SIDE = 64
MARGIN = 3.0  # pixels that stay free between an object and the picture's edge
RADII = (11.0, 16.0)
TILT = 0.4  # radians that an object may lean to either side

# Objects are bright and places are dim, whatever their colours: a denoiser finds an object in the noise by its contrast
# to the place, so an object that changes its colour or its place is found where it was.
COLOURS = {
    "red": (1.00, 0.60, 0.57),
    "orange": (1.00, 0.78, 0.50),
    "yellow": (1.00, 0.97, 0.60),
    "green": (0.62, 0.97, 0.62),
    "cyan": (0.58, 0.98, 0.98),
    "blue": (0.62, 0.73, 1.00),
    "purple": (0.84, 0.65, 1.00),
    "pink": (1.00, 0.74, 0.90),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLACES = ("grass", "sand", "snow", "water", "bricks", "wood", "stones", "clouds")
# How a style's name is said in a caption; "plain" is not said.
STYLES = {"plain": "", "outline": ", outlined", "night": ", at night"}


@dataclass(frozen=True)
class Scene:
    """What a caption names."""

    colour: str
    shape: str
    place: str
    style: str = "plain"

    @property
    def caption(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} on {self.place}{STYLES[self.style]}"

    @property
    def held_out(self) -> bool:
        """One in eight of the combinations of colour, shape and place, never shown in pretraining."""
        numbers = list(COLOURS).index(self.colour), SHAPES.index(self.shape), PLACES.index(self.place)
        return (3 * numbers[0] + 5 * numbers[1] + numbers[2]) % 8 == 0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Scene":
        choices = list(COLOURS), SHAPES, PLACES, list(STYLES)
        return cls(*(str(rng.choice(names)) for names in choices))


def scenes() -> Iterator[Scene]:
    """All there are."""
    for colour in COLOURS:
        for shape in SHAPES:
            for place in PLACES:
                for style in STYLES:
                    yield Scene(colour, shape, place, style)


@dataclass(frozen=True)
class Pose:
    """Where the object is, how large, how turned; and which part of the place's endless texture is seen."""

    x: float
    y: float
    radius: float
    angle: float = 0.0
    ground: tuple[int, int] = (0, 0)

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Pose":
        radius = rng.uniform(*RADII)
        x, y = rng.uniform(radius + MARGIN, SIDE - radius - MARGIN, 2)
        dx, dy = rng.integers(0, TILE, 2)
        return cls(float(x), float(y), float(radius), float(rng.uniform(-TILT, TILT)), (int(dx), int(dy)))


# ------------------------------------------------------------------------------------------------------- shapes


def distance(shape: str, pose: Pose) -> Float[np.ndarray, "64 64"]:
    """Distance of each pixel's centre to the object's edge, negative inside."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    return distance_at(shape, columns - pose.x, rows - pose.y, pose.radius, pose.angle)


def distance_at(shape: str, x, y, radius: float, angle: float):
    """As `distance`, for points given relative to the object's centre."""
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = x * cos + y * sin, y * cos - x * sin
    if shape == "circle":
        return np.hypot(u, v) - 0.88 * radius
    if shape == "ring":
        return np.abs(np.hypot(u, v) - 0.69 * radius) - 0.27 * radius
    if shape == "square":
        return _box(u, v, 0.71 * radius, 0.71 * radius)
    if shape == "cross":
        return np.minimum(_box(u, v, 0.95 * radius, 0.3 * radius), _box(u, v, 0.3 * radius, 0.95 * radius))
    if shape == "triangle":
        turns = np.pi / 2 + 2 * np.pi / 3 * np.arange(3)
        return np.max([u * math.cos(t) + v * math.sin(t) for t in turns], axis=0) - radius / 2
    if shape == "star":
        return _star(u, v, radius)
    raise ValueError(f"there is no shape {shape!r}")


def _box(u, v, half_width: float, half_height: float):
    a, b = np.abs(u) - half_width, np.abs(v) - half_height
    return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0)


def _star(u, v, radius: float, points: int = 5, inner: float = 0.45):
    """By symmetry only half of one point is looked at: the edge from its tip to the notch beside it."""
    sector = np.pi / points
    angle = np.arctan2(u, -v)  # 0 is up
    folded = np.abs((angle + sector) % (2 * sector) - sector)
    r = np.hypot(u, v)
    px, py = r * np.sin(folded), r * np.cos(folded)
    notch_x, notch_y = inner * radius * math.sin(sector), inner * radius * math.cos(sector)
    edge_x, edge_y = notch_x, notch_y - radius
    length = math.hypot(edge_x, edge_y)
    return (-edge_y * px + edge_x * (py - radius)) / length


def coverage(signed_distance: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """How much of a pixel lies inside: the anti-aliasing."""
    return np.clip(0.5 - signed_distance, 0, 1)


# ------------------------------------------------------------------------------------------------------- places

TILE = 128  # textures repeat after so many pixels


def _ripple(x, y, *waves: tuple[int, int, float]):
    """A sum of sines that repeats with the tile; each wave is (turns along x, turns along y, phase)."""
    return sum(np.sin(2 * np.pi * (a * x + b * y) / TILE + phase) for a, b, phase in waves) / len(waves)


def _spots(rng: np.random.Generator, count: int, radius: tuple[float, float]):
    """Soft round spots at random places, wrapping around: how much of each pixel they cover."""
    rows, columns = np.mgrid[:TILE, :TILE] + 0.5
    cover = np.zeros((TILE, TILE))
    for x, y, r in zip(*rng.uniform(0, TILE, (2, count)), rng.uniform(*radius, count), strict=True):
        dx = (columns - x + TILE / 2) % TILE - TILE / 2
        dy = (rows - y + TILE / 2) % TILE - TILE / 2
        cover = np.maximum(cover, np.clip((r - np.hypot(dx, dy)) / 2.5 + 0.5, 0, 1))
    return cover


def _seams(rng: np.random.Generator, count: int, width: float):
    """The lines between the cells around random points."""
    rows, columns = np.mgrid[:TILE, :TILE] + 0.5
    across = TILE / math.sqrt(count)
    grid = np.stack(np.meshgrid(*[np.arange(across / 2, TILE, across)] * 2), -1).reshape(-1, 2)
    points = grid + rng.uniform(-0.3, 0.3, grid.shape) * across
    dx = (columns[..., None] - points[:, 0] + TILE / 2) % TILE - TILE / 2
    dy = (rows[..., None] - points[:, 1] + TILE / 2) % TILE - TILE / 2
    nearest = np.sort(np.hypot(dx, dy), axis=-1)
    return np.clip(width / 2 - (nearest[..., 1] - nearest[..., 0]) / 2 + 0.5, 0, 1)


def _mix(a, b, share):
    return np.asarray(a) + (np.asarray(b) - np.asarray(a)) * np.asarray(share)[..., None]


@functools.cache
def ground(place: str) -> Float[np.ndarray, "128 128 3"]:
    """A place's texture, in dim colours, so that every object is brighter than it."""
    rng = np.random.default_rng(PLACES.index(place))
    y, x = np.mgrid[:TILE, :TILE] + 0.5
    if place == "grass":
        blades = _ripple(x, y, (16, 3, 0.0), (13, -4, 1.0), (5, 9, 2.0))
        return _mix((0.10, 0.24, 0.07), (0.20, 0.37, 0.14), np.clip(0.5 + blades, 0, 1))
    if place == "sand":
        dunes = np.sin(2 * np.pi * 8 * y / TILE + 1.6 * np.sin(2 * np.pi * 2 * x / TILE))
        return _mix((0.25, 0.21, 0.12), (0.34, 0.29, 0.19), 0.5 + 0.5 * dunes)
    if place == "snow":
        return _mix((0.27, 0.29, 0.33), (0.19, 0.23, 0.30), _spots(rng, 60, (2.5, 4.0)))
    if place == "water":
        waves = np.sin(2 * np.pi * 10 * y / TILE + 2.0 * np.sin(2 * np.pi * 4 * x / TILE))
        return _mix((0.03, 0.22, 0.25), (0.10, 0.38, 0.40), np.clip(0.5 + 0.8 * waves, 0, 1))
    if place == "bricks":
        row = np.floor(y / 16)
        along = (x + 16 * (row % 2)) % 32
        joint = np.minimum(np.minimum(along, 32 - along), np.minimum(y % 16, 16 - y % 16))
        return _mix((0.34, 0.11, 0.08), (0.44, 0.33, 0.28), np.clip(2.0 - joint, 0, 1))
    if place == "wood":
        plank = np.minimum(x % 16, 16 - x % 16)
        grain = 0.35 + 0.35 * np.sin(2 * np.pi * 3 * y / TILE + 2.2 * np.floor(x / 16))
        return _mix(_mix((0.22, 0.13, 0.05), (0.32, 0.21, 0.11), grain), (0.13, 0.08, 0.04), np.clip(1.6 - plank, 0, 1))
    if place == "stones":
        return _mix((0.24, 0.24, 0.25), (0.10, 0.10, 0.11), _seams(rng, 81, 2.5))
    if place == "clouds":
        return _mix((0.12, 0.17, 0.38), (0.26, 0.29, 0.44), _spots(rng, 34, (6.0, 10.0)))
    raise ValueError(f"there is no place {place!r}")


# ------------------------------------------------------------------------------------------------------- styles

OUTLINE = 2.6  # pixels


def style_ground(style: str, colour):
    """A place's colour as a style shows it."""
    if style == "outline":
        return _mix(colour, (0.62, 0.52, 0.36), np.float64(0.5))
    if style == "night":
        return _mix(colour, (0.0, 0.0, 0.20), np.float64(0.5))
    return np.asarray(colour)


def style_object(style: str, colour):
    """An object's colour as a style shows it."""
    if style == "outline":
        return _mix(colour, (1.0, 1.0, 1.0), np.float64(0.15))
    if style == "night":
        return np.asarray(colour) * (0.72, 0.74, 0.84)
    return np.asarray(colour)


def render(scene: Scene, pose: Pose) -> UInt8[np.ndarray, "64 64 3"]:
    """The picture."""
    rows, columns = (np.arange(SIDE) + start for start in (pose.ground[1], pose.ground[0]))
    seen = ground(scene.place)[rows[:, None] % TILE, columns[None] % TILE]
    picture = style_ground(scene.style, seen)
    edge = distance(scene.shape, pose)
    if scene.style == "outline":
        picture = _mix(picture, (0.04, 0.04, 0.06), coverage(edge - OUTLINE))
    picture = _mix(picture, style_object(scene.style, COLOURS[scene.colour]), coverage(edge))
    return np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def still(seed: int) -> tuple[Scene, Pose, UInt8[np.ndarray, "64 64 3"]]:
    """One training picture; the same for the same seed."""
    rng = np.random.default_rng((seed, 1))
    while (scene := Scene.draw(rng)).held_out:
        pass
    pose = Pose.draw(rng)
    return scene, pose, render(scene, pose)


# -------------------------------------------------------------------------------------------------------- clips

MOTIONS = ("arc", "bounce", "spiral", "wave", "growth", "rotation")


def _path(motion: str, rng: np.random.Generator, frames: int):
    """x and y in 0..1, the size's factor and the turn, for each frame."""
    t = np.linspace(0, 1, frames)
    one, flat = np.ones(frames), np.zeros(frames)
    if motion == "arc":
        return t, 1 - np.sin(np.pi * t), one, flat
    if motion == "bounce":
        return t, 1 - np.abs(np.sin(2 * np.pi * t)), one, flat
    if motion == "spiral":
        turn, reach = 2 * np.pi * t + rng.uniform(0, 2 * np.pi), 0.5 - 0.3 * t
        return 0.5 + reach * np.cos(turn), 0.5 + reach * np.sin(turn), one, flat
    if motion == "wave":
        return t, 0.5 + 0.4 * np.sin(2 * np.pi * t + rng.uniform(0, 2 * np.pi)), one, flat
    if motion == "growth":
        return 0.2 + 0.6 * t, 0.75 - 0.5 * t, 0.93 + 0.25 * t, flat
    if motion == "rotation":
        return 0.15 + 0.7 * t, 0.5 + 0.25 * np.sin(np.pi * t), one, TILT * (2 * t - 1)
    raise ValueError(f"there is no motion {motion!r}")


@dataclass(frozen=True)
class SpriteClip:
    """A clip and the truth about it."""

    scene: Scene
    motion: str
    poses: tuple[Pose, ...]

    @classmethod
    def draw(cls, seed: int, frames: int = 8, *, motion: str | None = None, scene: Scene | None = None) -> "SpriteClip":
        """The same for the same seed. Plain in style, so that an edit has a style to change."""
        rng = np.random.default_rng((seed, 2))
        motion = motion or MOTIONS[seed % len(MOTIONS)]
        scene = scene or replace(Scene.draw(rng), style="plain")
        radius = rng.uniform(12, 13.5)
        u, v, factor, turn = _path(motion, rng, frames)
        u = 1 - u if rng.random() < 0.5 else u
        v = 1 - v if rng.random() < 0.5 and motion not in ("arc", "bounce") else v  # things fall downwards
        size = radius * factor
        low, high = size.max() + MARGIN, SIDE - size.max() - MARGIN
        start = 0.0 if motion == "rotation" else rng.uniform(-TILT, TILT)
        dx, dy = (int(n) for n in rng.integers(0, TILE, 2))
        x, y = low + (high - low) * u, low + (high - low) * v
        poses = tuple(
            Pose(float(x[i]), float(y[i]), float(size[i]), float(start + turn[i]), (dx, dy)) for i in range(frames)
        )
        return cls(scene, motion, poses)

    @property
    def frames(self) -> UInt8[np.ndarray, "F 64 64 3"]:
        return np.stack([render(self.scene, pose) for pose in self.poses])

    @property
    def centres(self) -> Float[np.ndarray, "F 2"]:
        return np.array([(pose.x, pose.y) for pose in self.poses])

    @property
    def masks(self) -> Float[np.ndarray, "F 64 64"]:
        """How much of each pixel is the object's."""
        return np.stack([coverage(distance(self.scene.shape, pose)) for pose in self.poses])

    def edited(self, **changes: str) -> "SpriteClip":
        """The same motion in another scene: what a perfect edit would show."""
        return replace(self, scene=replace(self.scene, **changes))

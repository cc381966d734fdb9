"""The demo world: rendered images and clips whose content is known exactly.

A scene is one object of one colour in one place, rendered in one style, in an anti-aliased image of 64 × 64 pixels.
Captions name the scene but not the motion. Positions are (x, y) in pixels from the upper left corner, angles are in
radians, and the size of an object is the radius of its circumscribed circle.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, UInt8

IMAGE_SIZE = 64
MARGIN = 3.0  # pixels between an object and the edge of the image
RADII = (11.0, 16.0)
TILT = 0.4  # the largest rotation of an object to either side, in radians

# Objects are bright and places are dim. A denoiser locates an object in noise by its contrast with the background, so
# that an edit of colour or place keeps the object's position only if the contrast does not change sign.
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
# What each style adds to a caption.
STYLES = {"plain": "", "outline": ", outlined", "night": ", at night"}


@dataclass(frozen=True)
class Scene:
    """What a caption describes."""

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
        """Whether pretraining excludes this combination of colour, shape and place (one in eight)."""
        numbers = list(COLOURS).index(self.colour), SHAPES.index(self.shape), PLACES.index(self.place)
        return (3 * numbers[0] + 5 * numbers[1] + numbers[2]) % 8 == 0

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Scene":
        choices = list(COLOURS), SHAPES, PLACES, list(STYLES)
        return cls(*(str(rng.choice(names)) for names in choices))


def all_scenes() -> Iterator[Scene]:
    for colour in COLOURS:
        for shape in SHAPES:
            for place in PLACES:
                for style in STYLES:
                    yield Scene(colour, shape, place, style)


@dataclass(frozen=True)
class Pose:
    """Position, size and rotation of the object, and the offset of the visible part of the background texture."""

    x: float
    y: float
    radius: float
    angle: float = 0.0
    texture_offset: tuple[int, int] = (0, 0)

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Pose":
        radius = rng.uniform(*RADII)
        x, y = rng.uniform(radius + MARGIN, IMAGE_SIZE - radius - MARGIN, 2)
        dx, dy = rng.integers(0, TEXTURE_SIZE, 2)
        return cls(float(x), float(y), float(radius), float(rng.uniform(-TILT, TILT)), (int(dx), int(dy)))


# ------------------------------------------------------------------------------------------------------- shapes


def signed_distance(shape: str, pose: Pose) -> Float[np.ndarray, "64 64"]:
    """Distance in pixels from each pixel's centre to the edge of the object, negative inside."""
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE] + 0.5
    return signed_distance_at(shape, columns - pose.x, rows - pose.y, pose.radius, pose.angle)


def signed_distance_at(
    shape: str, x: Float[np.ndarray, "*S"], y: Float[np.ndarray, "*S"], radius: float, angle: float
) -> Float[np.ndarray, "*S"]:
    """As `signed_distance`, at points (x, y) relative to the object's centre."""
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
    raise ValueError(f"unknown shape {shape!r}; known shapes are {SHAPES}")


def _box(u, v, half_width: float, half_height: float):
    a, b = np.abs(u) - half_width, np.abs(v) - half_height
    return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0)


def _star(u, v, radius: float, points: int = 5, inner: float = 0.45):
    """The distance to one edge, which runs from a tip to the adjacent inner corner; the others follow by symmetry."""
    sector = np.pi / points
    angle = np.arctan2(u, -v)  # 0 is up
    folded = np.abs((angle + sector) % (2 * sector) - sector)
    r = np.hypot(u, v)
    px, py = r * np.sin(folded), r * np.cos(folded)
    inner_x, inner_y = inner * radius * math.sin(sector), inner * radius * math.cos(sector)
    edge_x, edge_y = inner_x, inner_y - radius
    length = math.hypot(edge_x, edge_y)
    return (-edge_y * px + edge_x * (py - radius)) / length


def coverage(distance: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """The fraction of a pixel that an object at this signed distance covers, for anti-aliasing."""
    return np.clip(0.5 - distance, 0, 1)


# ------------------------------------------------------------------------------------------------------- places

TEXTURE_SIZE = 128  # the period of a texture in both directions, in pixels


def _waves(x, y, *waves: tuple[int, int, float]):
    """The mean of sine waves that are periodic in the texture, each (cycles along x, cycles along y, phase)."""
    return sum(np.sin(2 * np.pi * (a * x + b * y) / TEXTURE_SIZE + phase) for a, b, phase in waves) / len(waves)


def _spots(rng: np.random.Generator, count: int, radius: tuple[float, float]):
    """The coverage of each pixel by soft round spots at random positions, periodic in both directions."""
    rows, columns = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE] + 0.5
    cover = np.zeros((TEXTURE_SIZE, TEXTURE_SIZE))
    for x, y, r in zip(*rng.uniform(0, TEXTURE_SIZE, (2, count)), rng.uniform(*radius, count), strict=True):
        dx = (columns - x + TEXTURE_SIZE / 2) % TEXTURE_SIZE - TEXTURE_SIZE / 2
        dy = (rows - y + TEXTURE_SIZE / 2) % TEXTURE_SIZE - TEXTURE_SIZE / 2
        cover = np.maximum(cover, np.clip((r - np.hypot(dx, dy)) / 2.5 + 0.5, 0, 1))
    return cover


def _cell_borders(rng: np.random.Generator, count: int, width: float):
    """The coverage of each pixel by the borders of the Voronoi cells of jittered grid points."""
    rows, columns = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE] + 0.5
    spacing = TEXTURE_SIZE / math.sqrt(count)
    grid = np.stack(np.meshgrid(*[np.arange(spacing / 2, TEXTURE_SIZE, spacing)] * 2), -1).reshape(-1, 2)
    points = grid + rng.uniform(-0.3, 0.3, grid.shape) * spacing
    dx = (columns[..., None] - points[:, 0] + TEXTURE_SIZE / 2) % TEXTURE_SIZE - TEXTURE_SIZE / 2
    dy = (rows[..., None] - points[:, 1] + TEXTURE_SIZE / 2) % TEXTURE_SIZE - TEXTURE_SIZE / 2
    nearest = np.sort(np.hypot(dx, dy), axis=-1)
    return np.clip(width / 2 - (nearest[..., 1] - nearest[..., 0]) / 2 + 0.5, 0, 1)


def _blend(a, b, share):
    return np.asarray(a) + (np.asarray(b) - np.asarray(a)) * np.asarray(share)[..., None]


@functools.cache
def texture(place: str) -> Float[np.ndarray, "128 128 3"]:
    """The background texture of a place, in dim colours: every object is brighter."""
    rng = np.random.default_rng(PLACES.index(place))
    y, x = np.mgrid[:TEXTURE_SIZE, :TEXTURE_SIZE] + 0.5
    if place == "grass":
        blades = _waves(x, y, (16, 3, 0.0), (13, -4, 1.0), (5, 9, 2.0))
        return _blend((0.10, 0.24, 0.07), (0.20, 0.37, 0.14), np.clip(0.5 + blades, 0, 1))
    if place == "sand":
        dunes = np.sin(2 * np.pi * 8 * y / TEXTURE_SIZE + 1.6 * np.sin(2 * np.pi * 2 * x / TEXTURE_SIZE))
        return _blend((0.25, 0.21, 0.12), (0.34, 0.29, 0.19), 0.5 + 0.5 * dunes)
    if place == "snow":
        return _blend((0.27, 0.29, 0.33), (0.19, 0.23, 0.30), _spots(rng, 60, (2.5, 4.0)))
    if place == "water":
        waves = np.sin(2 * np.pi * 10 * y / TEXTURE_SIZE + 2.0 * np.sin(2 * np.pi * 4 * x / TEXTURE_SIZE))
        return _blend((0.03, 0.22, 0.25), (0.10, 0.38, 0.40), np.clip(0.5 + 0.8 * waves, 0, 1))
    if place == "bricks":
        row = np.floor(y / 16)
        along = (x + 16 * (row % 2)) % 32
        joint = np.minimum(np.minimum(along, 32 - along), np.minimum(y % 16, 16 - y % 16))
        return _blend((0.34, 0.11, 0.08), (0.44, 0.33, 0.28), np.clip(2.0 - joint, 0, 1))
    if place == "wood":
        plank = np.minimum(x % 16, 16 - x % 16)
        grain = 0.35 + 0.35 * np.sin(2 * np.pi * 3 * y / TEXTURE_SIZE + 2.2 * np.floor(x / 16))
        return _blend(
            _blend((0.22, 0.13, 0.05), (0.32, 0.21, 0.11), grain), (0.13, 0.08, 0.04), np.clip(1.6 - plank, 0, 1)
        )
    if place == "stones":
        return _blend((0.24, 0.24, 0.25), (0.10, 0.10, 0.11), _cell_borders(rng, 81, 2.5))
    if place == "clouds":
        return _blend((0.12, 0.17, 0.38), (0.26, 0.29, 0.44), _spots(rng, 34, (6.0, 10.0)))
    raise ValueError(f"unknown place {place!r}; known places are {PLACES}")


# ------------------------------------------------------------------------------------------------------- styles

OUTLINE = 2.6  # width in pixels


def style_background(style: str, colour: Float[np.ndarray, "*S 3"]) -> Float[np.ndarray, "*S 3"]:
    """A background colour in a given style."""
    if style == "outline":
        return _blend(colour, (0.62, 0.52, 0.36), np.float64(0.5))
    if style == "night":
        return _blend(colour, (0.0, 0.0, 0.20), np.float64(0.5))
    return np.asarray(colour)


def style_object(style: str, colour: tuple[float, float, float]) -> Float[np.ndarray, "3"]:
    """An object's colour in a given style."""
    if style == "outline":
        return _blend(colour, (1.0, 1.0, 1.0), np.float64(0.15))
    if style == "night":
        return np.asarray(colour) * (0.72, 0.74, 0.84)
    return np.asarray(colour)


def render(scene: Scene, pose: Pose) -> UInt8[np.ndarray, "64 64 3"]:
    rows, columns = (np.arange(IMAGE_SIZE) + start for start in (pose.texture_offset[1], pose.texture_offset[0]))
    background = texture(scene.place)[rows[:, None] % TEXTURE_SIZE, columns[None] % TEXTURE_SIZE]
    image = style_background(scene.style, background)
    distance = signed_distance(scene.shape, pose)
    if scene.style == "outline":
        image = _blend(image, (0.04, 0.04, 0.06), coverage(distance - OUTLINE))
    image = _blend(image, style_object(scene.style, COLOURS[scene.colour]), coverage(distance))
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


# -------------------------------------------------------------------------------------------------------- clips

MOTIONS = ("arc", "bounce", "spiral", "wave", "growth", "rotation")


def _motion_path(motion: str, rng: np.random.Generator, frames: int):
    """x and y from 0 to 1, the relative size and the rotation of the object in each frame."""
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
    raise ValueError(f"unknown motion {motion!r}; known motions are {MOTIONS}")


@dataclass(frozen=True)
class DemoClip:
    """A rendered clip with its ground truth."""

    scene: Scene
    motion: str
    poses: tuple[Pose, ...]

    @classmethod
    def sample(cls, seed: int, frames: int = 8, *, motion: str | None = None, scene: Scene | None = None) -> "DemoClip":
        """A clip determined by the arguments. A sampled scene is plain, so that an edit can change its style."""
        rng = np.random.default_rng((seed, 2))
        motion = motion or MOTIONS[seed % len(MOTIONS)]
        scene = scene or replace(Scene.sample(rng), style="plain")
        radius = rng.uniform(12, 13.5)
        u, v, factor, turn = _motion_path(motion, rng, frames)
        u = 1 - u if rng.random() < 0.5 else u
        v = 1 - v if rng.random() < 0.5 and motion not in ("arc", "bounce") else v  # these two fall downwards
        size = radius * factor
        low, high = size.max() + MARGIN, IMAGE_SIZE - size.max() - MARGIN
        start = 0.0 if motion == "rotation" else rng.uniform(-TILT, TILT)
        dx, dy = (int(n) for n in rng.integers(0, TEXTURE_SIZE, 2))
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
        """The fraction of each pixel that the object covers."""
        return np.stack([coverage(signed_distance(self.scene.shape, pose)) for pose in self.poses])

    def edit(self, **changes: str) -> "DemoClip":
        """The same motion with parts of the scene replaced: the ground truth of an edit."""
        return replace(self, scene=replace(self.scene, **changes))

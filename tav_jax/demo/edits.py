"""What is asked of a clip of the drawn world: four kinds of edits, and the settings that they are made with."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tav_jax.demo.world import COLOURS, PLACES, SHAPES, STYLES, Scene, SpriteClip

MODEL = Path(__file__).parent / "model"
FPS = 8.0
SOURCE = Scene("red", "circle", "grass")
MOTION = "bounce"
KINDS = ("style", "object", "place", "several at once")
KEEPING, REPLACING = ("style", "place"), ("object", "several at once")  # the source's object, or by another one


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on, beside the clip and the prompts."""

    frames: int = 8
    steps: int = 400
    learning_rate: float = 3e-4
    inversion_steps: int = 50
    sampling_steps: int = 50
    guidance: float = 12.5
    strength: float = 0.6
    seed: int = 0


def source_clip(number: int | None, frames: int) -> SpriteClip:
    """The demo's clip or, with a number, any other."""
    if number is None:
        return SpriteClip.draw(0, frames, motion=MOTION, scene=SOURCE)
    return SpriteClip.draw(number, frames)


def edits_of(clip: SpriteClip, seed: int) -> dict[str, SpriteClip]:
    """One edit of each kind: what a perfect one would show. The same for the same seed."""
    rng, scene = np.random.default_rng((seed, 3)), clip.scene

    def other(names, now: str) -> str:
        return str(rng.choice([name for name in names if name != now]))

    def styled() -> str:
        return other(STYLES, "plain")

    def coloured() -> str:
        return other(COLOURS, scene.colour)

    def shaped() -> str:
        return other(SHAPES, scene.shape)

    def placed() -> str:
        return other(PLACES, scene.place)

    changes = (
        {"style": styled()},
        {"colour": coloured(), "shape": shaped()},
        {"place": placed()},
        {"colour": coloured(), "shape": shaped(), "place": placed(), "style": styled()},
    )
    return {kind: clip.edited(**change) for kind, change in zip(KINDS, changes, strict=True)}


def scene_of(text: str, source: Scene) -> Scene:
    """What a prompt asks for: the world's words of each kind, where it has them, and else what the source shows."""
    words = re.findall("[a-z]+", text.lower())
    for kind, names in (("colour", COLOURS), ("shape", SHAPES), ("place", PLACES)):
        for word in words:
            if word in names:
                source = replace(source, **{kind: word})
    for style, said in STYLES.items():
        if said and said.split()[-1] in words:
            source = replace(source, style=style)
    return source

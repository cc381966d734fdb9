"""The source clip, the example edits and the settings of `tav demo`, and the parsing of its prompts."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tav_jax.demo.world import COLOURS, PLACES, SHAPES, STYLES, DemoClip, Scene

MODEL = Path(__file__).parent / "model"
FPS = 8.0
EDIT_KINDS = ("style", "object", "place", "several at once")
WORDS = ("a", "an", "on", *COLOURS, *SHAPES, *PLACES, *re.findall("[a-z]+", " ".join(STYLES.values())))


@dataclass(frozen=True)
class Settings:
    """Everything but the clip and the prompts that a result depends on."""

    frames: int = 8
    steps: int = 400
    learning_rate: float = 3e-4
    inversion_steps: int = 50
    sampling_steps: int = 50
    guidance: float = 12.5
    strength: float = 0.6
    seed: int = 0


def source_clip(seed: int | None, frames: int) -> DemoClip:
    """The clip of this seed, or by default a red circle that bounces over grass."""
    if seed is None:
        return DemoClip.sample(0, frames, motion="bounce", scene=Scene("red", "circle", "grass"))
    return DemoClip.sample(seed, frames)


def example_edits(clip: DemoClip, seed: int) -> dict[str, DemoClip]:
    """The ground truth of one edit of each kind, sampled with the seed."""
    rng, scene = np.random.default_rng((seed, 3)), clip.scene

    def change(*fields: str) -> DemoClip:
        choices = {"colour": COLOURS, "shape": SHAPES, "place": PLACES, "style": STYLES}
        others = {field: [name for name in choices[field] if name != getattr(scene, field)] for field in fields}
        return clip.edit(**{field: str(rng.choice(names)) for field, names in others.items()})

    changes = (("style",), ("colour", "shape"), ("place",), ("colour", "shape", "place", "style"))
    return {kind: change(*fields) for kind, fields in zip(EDIT_KINDS, changes, strict=True)}


def parse_scene(prompt: str, source: Scene) -> Scene:
    """The scene that a prompt describes. What the prompt does not mention is taken from `source`."""
    words = re.findall("[a-z]+", prompt.lower())
    for field, names in (("colour", COLOURS), ("shape", SHAPES), ("place", PLACES)):
        for word in words:
            if word in names:
                source = replace(source, **{field: word})
    for style, suffix in STYLES.items():
        if suffix and suffix.split()[-1] in words:
            source = replace(source, style=style)
    return source


def unknown_words(prompt: str) -> list[str]:
    """The words of a prompt that occur in no caption of the demo world."""
    return [word for word in dict.fromkeys(re.findall(r"[^\s,.;:!?]+", prompt.lower())) if word not in WORDS]

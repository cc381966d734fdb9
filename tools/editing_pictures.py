"""The pictures of docs/EDITING.md, on the demo model: `python tools/editing_pictures.py`

Each picture has one row of frames for the source, one for the plain edit and one with the options of a wish.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tav_jax import Clip, TuneAVideo
from tav_jax.demo.edits import FPS, MODEL, Settings
from tav_jax.demo.evaluation import near_object
from tav_jax.demo.world import DemoClip, Scene
from tav_jax.distributed import compilation_cache
from tav_jax.io.caption import caption

OUT = Path(__file__).parent.parent / "docs" / "images"
SIDE, GAP, LABEL = 96, 4, 176  # pixels
SOURCE = Scene("red", "circle", "grass")
LAYOUT = {"feature_steps": 0.5, "self_attention_steps": 0.5, "cross_attention_steps": 0.2, "guidance": 7.5}
SUBJECT, SNOW = {"colour": "blue", "shape": "square"}, {"place": "snow"}
OFF = {"self_attention_steps": 0.0, "feature_steps": 0.0, "cross_attention_steps": 0.0}


@dataclass(frozen=True)
class Wish:
    name: str
    edit: Mapping[str, str]  # fields of the scene that change
    option: str  # as shown
    sample: Mapping[str, Any] = field(default_factory=dict)
    two_branches: bool = True
    mask: bool = False  # around the object of the source and of the edit


WISHES = (
    Wish("background", SUBJECT, "+ a mask around both objects", LAYOUT, mask=True),
    Wish("subject", SUBJECT, "two branches (0.5, 0.5, 0.2), guidance 7.5", LAYOUT),
    Wish("style", {"style": "night"}, "guidance 7.5", {"guidance": 7.5}, two_branches=False),
    Wish("layout", SNOW, "feature steps 0.5, guidance 7.5", {**OFF, "feature_steps": 0.5, "guidance": 7.5}),
    Wish("freely", SUBJECT, "no inversion", {"latents": None}, two_branches=False),
    Wish("faster", SNOW, "dpm++2m, 20 steps", {"sampler": "dpm++2m", "steps": 20}, two_branches=False),
)


def main() -> None:
    compilation_cache.enable()
    settings = Settings()
    source = DemoClip.sample(0, settings.frames, motion="bounce", scene=SOURCE)
    clip, prompt = Clip(source.frames, FPS), SOURCE.caption
    tav = TuneAVideo.from_pretrained(MODEL, dtype="float32", seed=settings.seed)
    tav.tune(clip, prompt, steps=settings.steps, learning_rate=settings.learning_rate, seed=settings.seed)
    noise = tav.invert(clip, steps=settings.inversion_steps)
    trajectory = tav.invert(clip, steps=settings.inversion_steps, prompt=prompt, return_trajectory=True)
    OUT.mkdir(exist_ok=True)
    for wish in WISHES:
        expected = source.edit(**wish.edit)
        text = expected.scene.caption
        options = {"inversion_steps": settings.inversion_steps, "frames": settings.frames, **wish.sample}
        if wish.two_branches:
            options |= {"source": trajectory, "source_prompt": prompt}
        elif "latents" not in options:
            options["latents"] = noise
        if wish.mask:
            options["mask"] = near_object(source.frames) | near_object(expected.frames)
        plain, edit = tav.sample(text, latents=noise), tav.sample(text, **options)
        rows = [(prompt, source.frames), (f"{text}: plain", plain.frames), (f"{text}: {wish.option}", edit.frames)]
        picture(rows).save(OUT / f"{wish.name}.webp", quality=80, method=6)


def picture(rows: list[tuple[str, np.ndarray]]) -> Image.Image:
    """One row of frames for each clip, with its text at the left."""
    width = LABEL + len(rows[0][1]) * (SIDE + GAP)
    image = Image.new("RGB", (width, len(rows) * (SIDE + GAP) - GAP), "white")
    for i, (text, frames) in enumerate(rows):
        image.paste(Image.fromarray(caption(text, LABEL - GAP)), (0, i * (SIDE + GAP)))
        for j, frame in enumerate(frames):
            one = Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            image.paste(one, (LABEL + j * (SIDE + GAP), i * (SIDE + GAP)))
    return image


if __name__ == "__main__":
    main()

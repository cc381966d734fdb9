"""The whole job on a tiny model, without downloads: `make demo`.

A clip is drawn, learned, inverted and edited through the same command that a Stable Diffusion run takes. The model is
the tests' tiny pipeline with random weights, so the edits are patterns and no pictures: what you see is the machinery.
"""

import shutil
from pathlib import Path

import numpy as np

from tav_jax import Clip, cli

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "demo"
MODEL = ROOT / "tests" / "reference" / "sd1" / "model"


def draw(frames: int = 8, size: int = 64) -> Clip:
    """A red square that crosses a striped ground on an arc."""
    clip = np.empty((frames, size, size, 3), np.uint8)
    for i, picture in enumerate(clip):
        picture[:] = np.where(np.arange(size)[None, :, None] // 8 % 2, (90, 140, 90), (70, 120, 80))
        x, y = 4 + 42 * i // (frames - 1), 34 - round(26 * np.sin(np.pi * i / (frames - 1)))
        picture[y : y + 16, x : x + 16] = (220, 50, 40)
    return Clip(clip, 8.0)


def main() -> int:
    shutil.rmtree(OUT, ignore_errors=True)
    clip = draw().save(OUT / "clip.mp4")
    settings = {
        "model.path": MODEL,
        "model.dtype": "float32",
        "clip.path": clip,
        "clip.prompt": "red square is moving",
        "clip.frames": 8,
        "clip.height": 64,
        "clip.width": 64,
        "train.steps": 60,
        "train.learning_rate": 1e-3,
        "train.preview_every": 0,
        "edit.steps": 20,
        "edit.inversion_steps": 20,
    }
    train = ["train", f"--workdir={OUT / 'run'}", *(f"--config.{name}={value}" for name, value in settings.items())]
    edit = ["edit", f"--workdir={OUT / 'run'}", f"--out={OUT}", "--prompt=blue square is moving", "--prompt=red circle"]
    for arguments in (train, edit):
        if status := cli.main(arguments):
            return status
    print(f"\nThe source and its edits, side by side, are in {OUT}. The weights are random: this shows the machinery.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

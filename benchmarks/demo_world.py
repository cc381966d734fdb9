"""What each part of the method buys, measured against known truth: `python -m benchmarks.demo_world`

Held-out clips of the drawn world, four edits each, judged by their pixels. Each cell (row, clip, seed) is a file of its
own, so that the table can be computed in pieces and in any order: the same line goes on where it was stopped.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tav_jax import Clip, TuneAVideo
from tav_jax.demo.demo import reconstruction
from tav_jax.demo.edits import FPS, KEEPING, KINDS, MODEL, REPLACING, Settings, edits_of
from tav_jax.demo.judge import judge, look
from tav_jax.demo.world import SIDE, Scene, SpriteClip, scenes
from tav_jax.distributed import compilation_cache
from tav_jax.io.progress import progress_bar

FIRST_CLIP = 1000  # the clips that nothing was tried out on begin here
CLIPS, FEW, SEEDS = 16, 4, 3
TOGETHER = 32  # stills that are sampled as one batch
STILLS_GUIDANCE = 3.0


@dataclass(frozen=True)
class Row:
    """One way to do it: the full method, or the method without one of its parts."""

    name: str
    told: str
    clips: int = FEW
    tuning: bool = True
    inversion: bool = True
    spatial_attention: str = "sparse-causal"
    temporal_attention: bool = True
    places: tuple[str, ...] = ()
    strength: float | None = None  # None: the settings'


ROWS = (
    Row("full", "the full method", clips=CLIPS),
    Row("led-throughout", "led by the prompt throughout: strength 1", strength=1.0),
    Row("no-tuning", "no tuning", tuning=False),
    Row("no-inversion", "no inversion: from noise, strength 1", inversion=False, strength=1.0),
    Row("first-frame", "attention to the first frame only", spatial_attention="first-frame"),
    Row("per-frame", "attention within each frame only", spatial_attention="per-frame"),
    Row("no-temporal", "no temporal attention", temporal_attention=False),
    Row("mid-and-up", "official subset: mid and up blocks only", places=("mid", "up")),
)
MEASURES = ("edit_accuracy", "trajectory_error_px", "frame_consistency")


class Cell(NamedTuple):
    row: Row
    clip: int
    seed: int

    @property
    def file(self) -> str:
        return f"{self.row.name}/clip{self.clip:02d}-seed{self.seed}.json"


def cells(rows: tuple[Row, ...] = ROWS, clips: int = CLIPS, seeds: int = SEEDS) -> Iterator[Cell]:
    """In the order that soonest gives a table: all rows on a few clips with one seed first."""
    grid = [Cell(row, clip, seed) for seed in range(seeds) for clip in range(clips) for row in rows if clip < row.clips]
    return iter(sorted(grid, key=lambda cell: (cell.clip >= FEW, cell.seed, cell.clip)))


def compute(cell: Cell, settings: Settings) -> dict[str, Any]:
    """One clip tuned, inverted, edited four times and judged."""
    from tav_jax.training.train_step import TRAINABLE

    row, s, started = cell.row, settings, time.perf_counter()
    source = SpriteClip.draw(FIRST_CLIP + cell.clip, s.frames)
    clip = Clip(source.frames, FPS)
    sentence = source.scene.caption
    words = (*TRAINABLE, *row.places)
    tav = TuneAVideo.from_pretrained(
        MODEL,
        dtype="float32",
        seed=cell.seed,
        spatial_attention=row.spatial_attention,
        temporal_attention=row.temporal_attention,
        trainable=words,
    )
    if row.tuning:
        tav.tune(clip, sentence, steps=s.steps, learning_rate=s.learning_rate, seed=cell.seed, trainable=words)
    if row.inversion:
        start = tav.invert(clip, steps=s.inversion_steps)
    else:
        start = tav.noise(cell.seed, s.frames, source.frames.shape[1:3])
    wanted = edits_of(source, FIRST_CLIP + cell.clip)
    texts = [edit.scene.caption for edit in wanted.values()]
    strength = s.strength if row.strength is None else row.strength
    edits = tav.sample(texts, latents=start, steps=s.sampling_steps, guidance=s.guidance, strength=strength)
    verdicts = {kind: judge(edit.frames, wanted[kind]) for kind, edit in zip(wanted, edits, strict=True)}
    told = {
        "row": row.name,
        "clip": cell.clip,
        "seed": cell.seed,
        "motion": source.motion,
        "sentence": sentence,
        "edits": {
            kind: {"prompt": text} | {name: value for name, value in verdict._asdict().items() if name != "centres"}
            for (kind, verdict), text in zip(verdicts.items(), texts, strict=True)
        },
        **{name: float(np.mean([getattr(v, name) for v in verdicts.values()])) for name in MEASURES},
        "settings": asdict(settings),
    }
    if row.name == "full":
        told["reconstruction_psnr_db"] = reconstruction(tav, clip, sentence, s)
    return told | {"seconds": time.perf_counter() - started}


def made(file: Path, settings: Settings) -> bool:
    """Is the cell there, and made with these settings?"""
    return file.exists() and json.loads(file.read_text())["settings"] == asdict(settings)


def write(file: Path, told: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".partial")
    scratch.write_text(json.dumps(told, indent=1) + "\n")
    os.replace(scratch, file)


# -------------------------------------------------------------------------------------------- the model by itself


def stills(tav: TuneAVideo, chosen: Sequence[Scene], settings: Settings) -> dict[str, float]:
    """Still pictures of scenes, drawn from noise by the pretrained model: the shares that are right."""
    right = []
    for first in range(0, len(chosen), TOGETHER):
        batch = chosen[first : first + TOGETHER]
        texts = [scene.caption for scene in batch]
        size = {"frames": 1, "size": (SIDE, SIDE)}
        # A start of its own for each prompt: sampled in one batch, they would all begin with the same noise.
        starts = np.concatenate([tav.noise(first + i, **size) for i in range(len(batch))])
        drawn = tav.sample(texts, latents=starts, steps=settings.sampling_steps, guidance=STILLS_GUIDANCE)
        for edit, scene in zip(drawn, batch, strict=True):
            seen = look(edit.frames[0])
            fields = ("colour", "shape", "place", "style")
            right.append([getattr(seen.scene, field) == getattr(scene, field) for field in fields])
    shares = np.mean(right, axis=0)
    return dict(zip(("colour", "shape", "place", "style"), map(float, shares), strict=True)) | {
        "all": float(np.mean(np.all(right, axis=1))),
        "pictures": len(right),
    }


def composition(settings: Settings, pictures: int = 128) -> dict[str, Any]:
    """As many pictures of combinations that pretraining has shown, and of combinations that it has not."""
    tav, rng = TuneAVideo.from_pretrained(MODEL, dtype="float32"), np.random.default_rng(4)
    told = {}
    for name, held_out in (("shown", False), ("held_out", True)):
        candidates = [scene for scene in scenes() if scene.held_out == held_out]
        chosen = [candidates[i] for i in rng.choice(len(candidates), pictures, replace=False)]
        told[name] = stills(tav, chosen, settings)
    return told


# --------------------------------------------------------------------------------------------------- the table


class Figure(NamedTuple):
    mean: float
    spread: float  # standard deviation between the seeds' means; not a number where there is one seed only
    cells: int

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}}" + (f" ± {self.spread:{spec}}" if np.isfinite(self.spread) else "")


def figure(told: list[dict[str, Any]], measure: str, kinds: Sequence[str] = KINDS) -> Figure:
    """Over the edits of these kinds of all cells; the spread is that of the clips that every seed has."""
    by_seed: dict[int, dict[int, float]] = defaultdict(dict)
    for cell in told:
        by_seed[cell["seed"]][cell["clip"]] = float(np.mean([cell["edits"][kind][measure] for kind in kinds]))
    shared = set.intersection(*(set(clips) for clips in by_seed.values()))
    means = [np.mean([clips[clip] for clip in shared]) for clips in by_seed.values() if shared]
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")
    return Figure(float(np.mean([x for clips in by_seed.values() for x in clips.values()])), spread, len(told))


def gathered(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What there is, by row."""
    told = [json.loads(file.read_text()) for file in sorted(folder.glob("*/*.json"))]
    return {row.name: [cell for cell in told if cell["row"] == row.name] for row in ROWS}


def table(folder: Path) -> str:
    """A table in Markdown: every row on all of its clips, and on the clips that all rows share."""
    lines = [
        "| | edit accuracy | path error, px | where the object stays | where it is replaced | steadiness | cells |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        told = gathered(folder)[row.name]
        versions = [(row.told, told)]
        if row.clips > FEW:
            versions.append((f"{row.told}, the {FEW} clips of the rows below", [c for c in told if c["clip"] < FEW]))
        for name, some in versions:
            if some:
                a, t, f = (figure(some, measure) for measure in MEASURES)
                parts = [
                    f"{figure(some, MEASURES[0], kinds):.2f}, {figure(some, MEASURES[1], kinds):.2f} px"
                    for kinds in (KEEPING, REPLACING)
                ]
                lines.append(f"| {name} | {a:.2f} | {t:.2f} | {' | '.join(parts)} | {f:.3f} | {a.cells} |")
    return "\n".join(lines) + "\n"


def picture(folder: Path) -> str:
    """Accuracy against path error (its axis is logarithmic), a dot a cell and a large one a row, as an SVG."""
    wide, high, left, right, top, bottom = 860, 420, 60, 290, 24, 46
    colours = ("#d1495b", "#7d8590", "#2e86ab", "#e09f3e", "#6a994e", "#8e6bbf", "#b5838d", "#3d405b")
    told = gathered(folder)
    every = [cell for cells in told.values() for cell in cells]
    lowest = min((int(4 * cell["edit_accuracy"]) / 4 for cell in every), default=0.0)
    nearest, furthest = 0.5, 1.2 * max([1.0, *(cell["trajectory_error_px"] for cell in every)])

    def at(error: float, accuracy: float) -> tuple[float, float]:
        across = np.log(max(error, nearest) / nearest) / np.log(furthest / nearest)
        up = (accuracy - lowest) / max(1 - lowest, 0.25)
        return left + (wide - left - right) * float(across), high - bottom - (high - top - bottom) * up

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
    ]
    for share in np.arange(lowest, 1.001, 0.125 if lowest >= 0.5 else 0.25):
        _, y = at(nearest, share)
        parts.append(f'<line x1="{left}" x2="{wide - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#555">{share:.0%}</text>')
    for pixels in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0):
        x, y = at(pixels, lowest)
        if pixels <= furthest:
            parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle" fill="#555">{pixels:g}</text>')
    parts.append(f'<text x="{left}" y="{high - 8}" fill="#555">distance from the source\'s path, pixels</text>')
    parts.append(f'<text x="{left}" y="13" fill="#555">frames that show what the prompt says</text>')
    dots, means = [], []
    for i, (row, colour) in enumerate(zip(ROWS, colours, strict=True)):
        if not told[row.name]:
            continue
        for cell in told[row.name]:
            x, y = at(cell["trajectory_error_px"], cell["edit_accuracy"])
            dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" opacity="0.35"/>')
        x, y = at(figure(told[row.name], "trajectory_error_px").mean, figure(told[row.name], "edit_accuracy").mean)
        means.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{colour}" stroke="white" stroke-width="1.5"/>')
        parts.append(f'<circle cx="{wide - right + 20}" cy="{40 + 22 * i}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{wide - right + 31}" y="{44 + 22 * i}" fill="#222">{row.told}</text>')
    # The full method's dot lies on top.
    return "\n".join([*parts, *dots, *reversed(means), "</svg>"]) + "\n"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_world", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/sprites"), help="the cells' folder (%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="only these rows")
    parser.add_argument("--clips", type=int, default=CLIPS, help="only the first clips (%(default)s)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="only the first seeds (%(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    a, started = arguments(given), time.time()
    compilation_cache.enable()
    rows = tuple(row for row in ROWS if not a.rows or row.name in a.rows)
    missing = [cell for cell in cells(rows, a.clips, a.seeds) if not made(a.out / cell.file, Settings())]
    if not (a.out / "stills.json").exists():
        write(a.out / "stills.json", composition(Settings()))
    with progress_bar(len(missing), "cells") as bar:
        for cell in missing:
            if time.time() - started > 60 * a.minutes:
                break
            told = compute(cell, Settings())
            write(a.out / cell.file, told)
            short = ", ".join(f"{name} {told[name]:.3f}" for name in MEASURES)
            print(f"{cell.file}: {short}, {told['seconds']:.0f} s", file=sys.stderr, flush=True)
            bar.update()
    (a.out / "table.md").write_text(table(a.out))
    (a.out / "picture.svg").write_text(picture(a.out))
    print(table(a.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

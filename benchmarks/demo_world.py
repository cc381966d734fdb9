"""Ablations of the method on the demo world, whose ground truth is known: `python -m benchmarks.demo_world`

Four edits of each of several held-out clips are evaluated from their pixels. The result of each cell (row, clip, seed)
is a file of its own. The same command continues an interrupted run.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tav_jax import Clip, TuneAVideo
from tav_jax.config import TRAINABLE
from tav_jax.demo.edits import EDIT_KINDS, FPS, MODEL, Settings, example_edits
from tav_jax.demo.evaluation import FIELDS, MEASURES, analyze_frame, evaluate
from tav_jax.demo.report import plot
from tav_jax.demo.run import reconstruction_psnr
from tav_jax.demo.world import IMAGE_SIZE, DemoClip, Scene, all_scenes
from tav_jax.distributed import compilation_cache
from tav_jax.io.progress import progress_bar

FIRST_CLIP = 1000  # seed of the first clip; the settings were chosen on clips with lower seeds
CLIPS, FEW, SEEDS = 16, 4, 3
SAME_OBJECT, NEW_OBJECT = ("style", "place"), ("object", "several at once")  # kinds of edits
BATCH = 32  # images that are sampled together
IMAGE_GUIDANCE = 3.0


@dataclass(frozen=True)
class Row:
    """The full method, or the method without one of its parts."""

    name: str
    label: str
    clips: int = FEW
    tuning: bool = True
    inversion: bool = True
    spatial_attention: str = "sparse-causal"
    temporal_attention: bool = True
    parts: tuple[str, ...] = ()  # of the UNet, to which training is restricted; (): all
    strength: float | None = None  # None: the strength of the settings


ROWS = (
    Row("full", "full method", clips=CLIPS),
    Row("strength-1", "prompt in all steps (strength 1)", strength=1.0),
    Row("no-tuning", "no tuning", tuning=False),
    Row("no-inversion", "no inversion: random noise, strength 1", inversion=False, strength=1.0),
    Row("first-frame", "attention to the first frame only", spatial_attention="first-frame"),
    Row("per-frame", "attention within each frame only", spatial_attention="per-frame"),
    Row("no-temporal", "no temporal attention", temporal_attention=False),
    Row("mid-and-up", "official subset: mid and up blocks only", parts=("mid", "up")),
)


class Cell(NamedTuple):
    row: Row
    clip: int
    seed: int

    @property
    def file(self) -> str:
        return f"{self.row.name}/clip{self.clip:02d}-seed{self.seed}.json"


def all_cells(rows: Sequence[Row] = ROWS, clips: int = CLIPS, seeds: int = SEEDS) -> list[Cell]:
    """All cells, in an order in which every row has results early: few clips with the first seed come first."""
    cells = [
        Cell(row, clip, seed) for seed in range(seeds) for clip in range(clips) for row in rows if clip < row.clips
    ]
    return sorted(cells, key=lambda cell: (cell.clip >= FEW, cell.seed, cell.clip))


def run_cell(cell: Cell, settings: Settings) -> dict[str, Any]:
    """Tune, invert, sample four edits and evaluate them."""
    row, s, started = cell.row, settings, time.perf_counter()
    source = DemoClip.sample(FIRST_CLIP + cell.clip, s.frames)
    clip = Clip(source.frames, FPS)
    caption = source.scene.caption
    trainable = (*TRAINABLE, *row.parts)
    tav = TuneAVideo.from_pretrained(
        MODEL,
        dtype="float32",
        seed=cell.seed,
        spatial_attention=row.spatial_attention,
        temporal_attention=row.temporal_attention,
        trainable=trainable,
    )
    if row.tuning:
        tav.tune(clip, caption, steps=s.steps, learning_rate=s.learning_rate, seed=cell.seed, trainable=trainable)
    if row.inversion:
        noise = tav.invert(clip, steps=s.inversion_steps)
    else:
        noise = tav.noise(cell.seed, s.frames, source.frames.shape[1:3])
    expected = example_edits(source, FIRST_CLIP + cell.clip)
    prompts = [edit.scene.caption for edit in expected.values()]
    strength = s.strength if row.strength is None else row.strength
    edits = tav.sample(prompts, latents=noise, steps=s.sampling_steps, guidance=s.guidance, strength=strength)
    evaluations = [evaluate(edit.frames, clip) for edit, clip in zip(edits, expected.values(), strict=True)]
    result = {
        "row": row.name,
        "clip": cell.clip,
        "seed": cell.seed,
        "motion": source.motion,
        "caption": caption,
        "edits": {
            kind: {"prompt": prompt} | {name: x for name, x in evaluation._asdict().items() if name != "centres"}
            for kind, prompt, evaluation in zip(expected, prompts, evaluations, strict=True)
        },
        **{name: float(np.mean([getattr(e, name) for e in evaluations])) for name in MEASURES},
        "settings": asdict(settings),
    }
    if row.name == "full":
        result["reconstruction_psnr_db"] = reconstruction_psnr(tav, clip, caption, s)
    return result | {"seconds": time.perf_counter() - started}


def has_result(file: Path, settings: Settings) -> bool:
    """Whether the file has a result with these settings."""
    return file.exists() and json.loads(file.read_text())["settings"] == asdict(settings)


def write_result(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial, file)


# --------------------------------------------------------------------------------------- images of the pretrained model


def image_accuracy(tav: TuneAVideo, scenes: Sequence[Scene], settings: Settings) -> dict[str, float]:
    """The fractions of sampled images that match their captions."""
    correct = []
    for first in range(0, len(scenes), BATCH):
        batch = scenes[first : first + BATCH]
        # One prompt per noise: a batch of prompts otherwise shares its initial noise.
        noise = np.concatenate(
            [tav.noise(first + i, frames=1, size=(IMAGE_SIZE, IMAGE_SIZE)) for i in range(len(batch))]
        )
        prompts = [scene.caption for scene in batch]
        images = tav.sample(prompts, latents=noise, steps=settings.sampling_steps, guidance=IMAGE_GUIDANCE)
        found = [analyze_frame(image.frames[0]).scene for image in images]
        correct += [[getattr(f, x) == getattr(s, x) for x in FIELDS] for f, s in zip(found, batch, strict=True)]
    fractions = dict(zip(FIELDS, map(float, np.mean(correct, axis=0)), strict=True))
    return fractions | {"all": float(np.mean(np.all(correct, axis=1))), "images": len(correct)}


def composition(settings: Settings, images: int = 128) -> dict[str, Any]:
    """Image accuracy on combinations of colour, shape and place of the training set, and on held-out ones."""
    tav, rng = TuneAVideo.from_pretrained(MODEL, dtype="float32"), np.random.default_rng(4)
    result = {}
    for name, held_out in (("trained", False), ("held_out", True)):
        candidates = [scene for scene in all_scenes() if scene.held_out == held_out]
        chosen = [candidates[i] for i in rng.choice(len(candidates), images, replace=False)]
        result[name] = image_accuracy(tav, chosen, settings)
    return result


# ------------------------------------------------------------------------------------------------ table and figure


class Statistic(NamedTuple):
    mean: float
    std: float  # between the means of the seeds; NaN for one seed
    cells: int

    def __format__(self, spec: str) -> str:
        return f"{self.mean:{spec}}" + (f" ± {self.std:{spec}}" if np.isfinite(self.std) else "")


def statistic(results: list[dict[str, Any]], measure: str, kinds: Sequence[str] = EDIT_KINDS) -> Statistic:
    """The mean over all cells and these kinds of edits. `std` is computed over the clips that every seed has."""
    by_seed: dict[int, dict[int, float]] = defaultdict(dict)
    for result in results:
        by_seed[result["seed"]][result["clip"]] = float(np.mean([result["edits"][kind][measure] for kind in kinds]))
    shared = set.intersection(*(set(clips) for clips in by_seed.values()))
    means = [np.mean([clips[clip] for clip in shared]) for clips in by_seed.values() if shared]
    std = float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")
    return Statistic(float(np.mean([x for clips in by_seed.values() for x in clips.values()])), std, len(results))


def read_results(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """The results of each row."""
    results = [json.loads(file.read_text()) for file in sorted(directory.glob("*/*.json"))]
    return {row.name: [result for result in results if result["row"] == row.name] for row in ROWS}


def make_table(directory: Path) -> str:
    """A Markdown table: every row on all of its clips, and on the clips that all rows share."""
    lines = [
        "| | edit accuracy | path error, px | object kept | object replaced | consistency | cells |",
        "|---|---|---|---|---|---|---|",
    ]
    results = read_results(directory)
    for row in ROWS:
        versions = [(row.label, results[row.name])]
        if row.clips > FEW:
            few = [result for result in results[row.name] if result["clip"] < FEW]
            versions.append((f"{row.label}, the {FEW} clips of the rows below", few))
        for label, cells in versions:
            if cells:
                accuracy, error, consistency = (statistic(cells, measure) for measure in MEASURES)
                by_kind = [
                    f"{statistic(cells, MEASURES[0], kinds):.2f}, {statistic(cells, MEASURES[1], kinds):.2f} px"
                    for kinds in (SAME_OBJECT, NEW_OBJECT)
                ]
                columns = [label, f"{accuracy:.2f}", f"{error:.2f}", *by_kind, f"{consistency:.3f}", accuracy.cells]
                lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines) + "\n"


def make_figure(directory: Path) -> str:
    """An SVG of edit accuracy against path error: a small dot for each cell, a large one for the mean of each row."""
    colours = ("#d1495b", "#7d8590", "#2e86ab", "#e09f3e", "#6a994e", "#8e6bbf", "#b5838d", "#3fa7a0")
    results = read_results(directory)

    def draw(axes: Any) -> None:
        from matplotlib.ticker import PercentFormatter

        for i, (row, colour) in enumerate(zip(ROWS, colours, strict=True)):
            if cells := results[row.name]:
                x, y = ([cell[measure] for cell in cells] for measure in ("trajectory_error_px", "edit_accuracy"))
                axes.scatter(x, y, s=20, color=colour, alpha=0.5, linewidth=0, gid=f"cells-{row.name}")
                mean = [statistic(cells, measure).mean for measure in ("trajectory_error_px", "edit_accuracy")]
                # The full method is drawn last, on top.
                axes.scatter(*mean, s=110, color=colour, edgecolor="white", label=row.label, zorder=3 + len(ROWS) - i)
        axes.set(xlabel="path error, pixels", ylabel="edit accuracy", xscale="log")
        ticks = (0.5, 1, 2, 4, 8, 16, 32)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y")
        if any(results.values()):
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)

    return plot(draw, (11.0, 5.0))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_world", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/demo_world"), help="results (%(default)s)")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], help="only these rows")
    parser.add_argument("--clips", type=int, default=CLIPS, help="only the first clips (%(default)s)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="only the first seeds (%(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after this time")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, settings, started = parse_args(argv), Settings(), time.time()
    compilation_cache.enable()
    rows = [row for row in ROWS if not args.rows or row.name in args.rows]
    cells = all_cells(rows, args.clips, args.seeds)
    missing = [cell for cell in cells if not has_result(args.out / cell.file, settings)]
    if not (args.out / "composition.json").exists():
        write_result(args.out / "composition.json", composition(settings))
    with progress_bar(len(missing), "cells") as bar:
        for cell in missing:
            if time.time() - started > 60 * args.minutes:
                break
            result = run_cell(cell, settings)
            write_result(args.out / cell.file, result)
            numbers = ", ".join(f"{name} {result[name]:.3f}" for name in MEASURES)
            print(f"{cell.file}: {numbers}, {result['seconds']:.0f} s", file=sys.stderr, flush=True)
            bar.update()
    (args.out / "table.md").write_text(make_table(args.out))
    (args.out / "figure.svg").write_text(make_figure(args.out))
    print(make_table(args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Editing methods on the demo world, at strength 1: `python -m benchmarks.editing`

Every recipe edits the same tuned models of held-out clips, and is evaluated from pixels. The result of each cell
(recipe, clip, seed) is a file of its own, and tuned weights are cached: the same command continues an interrupted run.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.demo_world import CLIPS, FEW, FIRST_CLIP, SEEDS, statistic, write_result
from tav_jax import Clip, TuneAVideo
from tav_jax.demo.edits import FPS, MODEL, Settings, example_edits
from tav_jax.demo.evaluation import MEASURES, evaluate, near_object
from tav_jax.demo.world import DemoClip
from tav_jax.distributed import compilation_cache
from tav_jax.training.train_step import trainable_filter

PLACE_KEPT = "object"  # the kind of edit that changes the object only


@dataclass(frozen=True)
class Recipe:
    name: str
    label: str
    sample: Mapping[str, Any] = field(default_factory=dict)  # arguments of `TuneAVideo.sample`
    source: bool = True  # two-branch editing
    invert_with_prompt: bool = False
    iterations: int = 1
    shapes: bool = False  # blend_words: the words for the object's shape
    true_mask: bool = False  # mask: where the source or the edit has its object
    clips: int = FEW


OFF = {"self_attention_steps": 0.0, "feature_steps": 0.0, "cross_attention_steps": 0.0}
BEST = {"guidance": 4.0, "self_attention_steps": 0.5, "feature_steps": 0.35, "cross_attention_steps": 0.2}
GUIDANCE_6 = {**BEST, "guidance": 6.0, "feature_steps": 0.45}
STRONG = {**BEST, "guidance": 7.5, "feature_steps": 0.4}
DPM20 = {"sampler": "dpm++2m", "steps": 20}
DPM20_LABEL = "the same, 20 steps of dpm++2m"
RECIPES = (
    Recipe("plain", "plain Tune-A-Video, guidance 12.5", source=False, clips=CLIPS),
    Recipe("plain-dpm20", "plain, 20 steps of dpm++2m", DPM20, source=False, clips=CLIPS),
    Recipe("plain-7.5", "plain, guidance 7.5", {"guidance": 7.5}, source=False, clips=CLIPS),
    Recipe("inversion-prompt", "plain, inversion with the prompt", source=False, invert_with_prompt=True),
    Recipe("fixed-point", "plain, 5 fixed-point iterations", source=False, iterations=5),
    Recipe("self-attention", "self-attention of the source, 0.5", {**OFF, "self_attention_steps": 0.5}),
    Recipe("features", "features of the source, 0.5", {**OFF, "feature_steps": 0.5}),
    Recipe("cross-attention", "attention to shared words, 0.8", {**OFF, "cross_attention_steps": 0.8}),
    Recipe("words", "blend by words", OFF, shapes=True),
    Recipe("mask", "blend by the true mask", OFF, true_mask=True),
    Recipe("best", "best recipe", BEST, invert_with_prompt=True, clips=CLIPS),
    Recipe("best-dpm20", "best recipe, 20 steps of dpm++2m", {**BEST, **DPM20}, invert_with_prompt=True, clips=CLIPS),
    Recipe("guidance-6", "feature steps 0.45, guidance 6", GUIDANCE_6, invert_with_prompt=True, clips=CLIPS),
    Recipe("guidance-6-dpm20", DPM20_LABEL, {**GUIDANCE_6, **DPM20}, invert_with_prompt=True, clips=CLIPS),
    Recipe("guidance-6-mask", "the same and the true mask", GUIDANCE_6, invert_with_prompt=True, true_mask=True),
    Recipe("strong", "feature steps 0.4, guidance 7.5", STRONG, invert_with_prompt=True),
    Recipe("strong-dpm20", DPM20_LABEL, {**STRONG, **DPM20}, invert_with_prompt=True),
)


def tuned(clip: int, seed: int, settings: Settings, cache: Path) -> tuple[TuneAVideo, DemoClip]:
    """The pipeline tuned on a clip, and the clip."""
    source = DemoClip.sample(FIRST_CLIP + clip, settings.frames)
    tav = TuneAVideo.from_pretrained(MODEL, dtype="float32", seed=seed)
    file, weights = cache / f"{clip}-{seed}.npz", dict(nnx.to_flat_state(trainable_state(tav)))
    if file.exists():
        with np.load(file) as table:
            loaded = [(path, x.replace(jnp.asarray(table["/".join(map(str, path))]))) for path, x in weights.items()]
        nnx.update(tav.components.unet, nnx.from_flat_state(loaded))
        tav.source, tav.tuned_prompt = Clip(source.frames, FPS), source.scene.caption
        return tav, source
    options = {"steps": settings.steps, "learning_rate": settings.learning_rate, "seed": seed}
    tav.tune(Clip(source.frames, FPS), source.scene.caption, **options)
    cache.mkdir(parents=True, exist_ok=True)
    arrays = {"/".join(map(str, path)): np.asarray(x) for path, x in nnx.to_flat_state(trainable_state(tav))}
    partial = file.with_name(f"{file.stem}.partial.npz")
    np.savez(partial, **arrays)
    os.replace(partial, file)
    return tav, source


def trainable_state(tav: TuneAVideo) -> Any:
    return nnx.state(tav.components.unet, trainable_filter())


def run_cells(clip: int, seed: int, recipes: list[Recipe], settings: Settings, out: Path, cache: Path) -> None:
    tav, source = tuned(clip, seed, settings, cache)
    caption, frames = source.scene.caption, Clip(source.frames, FPS)
    expected = example_edits(source, FIRST_CLIP + clip)
    trajectories: dict[Any, Any] = {}
    for recipe in recipes:
        key = (recipe.invert_with_prompt, recipe.iterations)
        started = time.perf_counter()
        if key not in trajectories:
            prompt, options = caption if key[0] else "", {"iterations": key[1], "return_trajectory": True}
            trajectories[key] = tav.invert(frames, steps=settings.inversion_steps, prompt=prompt, **options)
        inverted = time.perf_counter()
        edits = sample(tav, source, expected, recipe, trajectories[key], settings)
        seconds = {"inverting": inverted - started, "sampling": time.perf_counter() - inverted}
        result = evaluate_edits(source, expected, edits)
        result |= {"recipe": recipe.name, "clip": clip, "seed": seed, "sample": dict(recipe.sample), "seconds": seconds}
        write_result(out / recipe.name / f"clip{clip:02d}-seed{seed}.json", result)
        numbers = ", ".join(f"{name} {result[name]:.3f}" for name in MEASURES)
        line = f"{recipe.name} clip {clip} seed {seed}: {numbers}, {seconds['sampling']:.0f} s"
        print(line, file=sys.stderr, flush=True)


def sample(tav: Any, source: DemoClip, expected: Mapping[str, DemoClip], recipe: Recipe, trajectory: Any, s: Settings):
    """The edits of a clip: in one batch or, if each has a mask of its own, one by one."""
    prompts = [clip.scene.caption for clip in expected.values()]
    options: dict[str, Any] = {"steps": s.sampling_steps, "guidance": s.guidance, "inversion_steps": s.inversion_steps}
    options |= {"latents": trajectory[-1], **recipe.sample}
    if recipe.source:
        options |= {"source": trajectory, "source_prompt": source.scene.caption}
    if recipe.shapes:
        options["blend_words"] = sorted({clip.scene.shape for clip in (source, *expected.values())})
    if not recipe.true_mask:
        return tav.sample(prompts, **options)
    masks = [near_object(source.frames) | near_object(clip.frames) for clip in expected.values()]
    # Where place or style change, everything may change.
    masks = [mask if kind == PLACE_KEPT else np.ones_like(mask) for kind, mask in zip(expected, masks, strict=True)]
    return [tav.sample(prompt, mask=mask, **options) for prompt, mask in zip(prompts, masks, strict=True)]


def evaluate_edits(source: DemoClip, expected: Mapping[str, DemoClip], edits: list[Any]) -> dict[str, Any]:
    evaluations = {
        kind: evaluate(edit.frames, clip) for (kind, clip), edit in zip(expected.items(), edits, strict=True)
    }
    kept = edits[list(expected).index(PLACE_KEPT)].frames
    result = {
        kind: {name: x for name, x in evaluation._asdict().items() if name != "centres"}
        for kind, evaluation in evaluations.items()
    }
    result[PLACE_KEPT]["background_psnr_db"] = background_psnr(kept, source.frames)
    means = {name: float(np.mean([getattr(e, name) for e in evaluations.values()])) for name in MEASURES}
    return {"edits": result, **means}


def background_psnr(frames: np.ndarray, source: np.ndarray) -> float:
    """PSNR in dB of the pixels that are away from the object in both clips."""
    away = ~(near_object(frames) | near_object(source))
    error = np.mean((frames[away].astype(float) - source[away]) ** 2) / 255**2
    return float(-10 * np.log10(max(error, 1e-12)))


def make_table(out: Path) -> str:
    lines = [
        "| | edit accuracy | path error, px | background PSNR, dB | consistency | sampling, s | cells |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        results = [json.loads(file.read_text()) for file in sorted((out / recipe.name).glob("*.json"))]
        groups = [(recipe.label, results)]
        if recipe.clips > FEW:
            groups.append((f"{recipe.label}, the first {FEW} clips", [r for r in results if r["clip"] < FEW]))
        for label, cells in groups:
            if cells:
                accuracy, error, consistency = (statistic(cells, measure) for measure in MEASURES)
                psnr = statistic(cells, "background_psnr_db", (PLACE_KEPT,))
                seconds = np.median([cell["seconds"]["sampling"] for cell in cells])
                columns = [label, f"{accuracy:.3f}", f"{error:.2f}", f"{psnr:.1f}", f"{consistency:.3f}"]
                lines.append(f"| {' | '.join(map(str, [*columns, f'{seconds:.0f}', len(cells)]))} |")
    return "\n".join(lines) + "\n"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.editing", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/editing"), help="results (%(default)s)")
    parser.add_argument("--cache", type=Path, default=Path("out/editing"), help="tuned weights (%(default)s)")
    parser.add_argument("--recipes", nargs="+", choices=[recipe.name for recipe in RECIPES], help="only these")
    parser.add_argument("--clips", type=int, default=CLIPS, help="only the first clips (%(default)s)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="only the first seeds (%(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no clip after this time")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args, settings, started = parse_args(argv), Settings(), time.time()
    compilation_cache.enable()
    cells = [(clip, seed) for seed in range(args.seeds) for clip in range(args.clips) if seed == 0 or clip < FEW]
    for clip, seed in sorted(cells, key=lambda cell: (cell[0] >= FEW, cell[1], cell[0])):
        missing = [
            recipe
            for recipe in RECIPES
            if clip < recipe.clips
            and (not args.recipes or recipe.name in args.recipes)
            and not (args.out / recipe.name / f"clip{clip:02d}-seed{seed}.json").exists()
        ]
        if missing and time.time() - started < 60 * args.minutes:
            run_cells(clip, seed, missing, settings, args.out, args.cache)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "table.md").write_text(make_table(args.out))
    print(make_table(args.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

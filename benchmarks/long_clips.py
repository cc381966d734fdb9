"""Long clips in windows, and the reuse of deep features, on the demo world: `python -m benchmarks.long_clips`

The model is tuned on each clip. A clip of 64 frames is edited in windows and as a whole; one of 8 frames with and
without reuse of features. Each cell (clip, variant) is a file; the same command continues an interrupted run.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.demo_world import FIRST_CLIP, write_result
from tav_jax import Clip, TuneAVideo
from tav_jax.demo.edits import FPS, MODEL, example_edits
from tav_jax.demo.evaluation import MEASURES, analyze_frame, background_consistency, evaluate
from tav_jax.demo.world import DemoClip
from tav_jax.diffusion.windows import Window
from tav_jax.distributed import compilation_cache

LONG, SHORT = 64, 8
LONG_STEPS, SHORT_STEPS = 15, 50  # of inversion and of sampling
SAMPLING = {"guidance": 12.5, "strength": 0.6}
WINDOWS = {"whole": (), "windows 16, 4": (16, 4), "windows 16, 16": (16, 16)}
REUSE = (1, 2, 3, 5)
REPEATS = 4  # timings of each interval, taken in turn


def borders(window: Window, frames: int) -> np.ndarray:
    """For each pair of consecutive frames, whether a window begins or ends between them."""
    starts = window.starts(frames)
    edges = {*starts, *(starts + window.frames)} - {0, frames}
    return np.array([i + 1 in edges for i in range(frames - 1)])


def steadiness(frames: np.ndarray, window: Window) -> dict[str, float]:
    """The background's consistency from frame to frame, across borders of windows and inside."""
    masks = [analyze_frame(frame).mask for frame in frames]
    pairs = np.array([1 - background_consistency(frames[i : i + 2], masks[i : i + 2]) for i in range(len(frames) - 1)])
    crossing = borders(window, len(frames))
    return {
        "across": 1 - float(np.sqrt(np.mean(pairs[crossing] ** 2))),
        "inside": 1 - float(np.sqrt(np.mean(pairs[~crossing] ** 2))),
    }


def tuned(source: DemoClip, steps: int, window: int) -> TuneAVideo:
    tav = TuneAVideo.from_pretrained(MODEL, dtype="float32")
    clip = Clip(source.frames, FPS)
    tav.tune(clip, source.scene.caption, steps=steps, learning_rate=3e-4, seed=0, window=window)
    return tav


def scores(edits: Any, expected: dict[str, DemoClip]) -> dict[str, float]:
    found = [evaluate(edit.frames, clip) for edit, clip in zip(edits, expected.values(), strict=True)]
    return {name: float(np.mean([getattr(one, name) for one in found])) for name in MEASURES}


def sample(tav: TuneAVideo, source: DemoClip, seed: int, **options: Any) -> tuple[Any, dict[str, DemoClip]]:
    """Two edits, one that keeps the object and one that replaces everything."""
    expected = {
        kind: clip for kind, clip in example_edits(source, seed).items() if kind in ("place", "several at once")
    }
    return tav.sample([clip.scene.caption for clip in expected.values()], **SAMPLING, **options), expected


def long_clip(number: int, directory: Path, steps: int) -> None:
    seed, tav = FIRST_CLIP + number, None
    source = DemoClip.sample(seed, LONG)
    for name, window in WINDOWS.items():
        file = directory / f"long-clip{number:02d}-{name.replace(', ', '-').replace(' ', '-')}.json"
        if file.exists():
            continue
        tav = tav or tuned(source, steps, window=16)
        began = time.perf_counter()
        noise = tav.invert(Clip(source.frames, FPS), steps=LONG_STEPS, window=window)
        edits, expected = sample(tav, source, seed, latents=noise, steps=LONG_STEPS, window=window)
        steady = {
            str(stride): [steadiness(edit.frames, Window(16, stride)) for edit in edits]
            for stride in ((window[1],) if window else (4, 16))
        }
        result = {"clip": number, "variant": name, **scores(edits, expected), "steadiness": steady}
        write_result(file, result | {"seconds": time.perf_counter() - began})
        print(file.name, {k: round(result[k], 3) for k in MEASURES}, steady, file=sys.stderr, flush=True)


def short_clip(number: int, directory: Path, steps: int) -> None:
    """Reuse of features at several intervals. Sampling is timed, without decoding."""
    file = directory / f"short-clip{number:02d}.json"
    if file.exists():
        return
    seed = FIRST_CLIP + number
    source = DemoClip.sample(seed, SHORT)
    tav = tuned(source, steps, window=0)
    noise = tav.invert(Clip(source.frames, FPS), steps=SHORT_STEPS)
    variants: dict[str, Any] = {}
    reference: Any = None
    for interval in REUSE:
        edits, expected = sample(tav, source, seed, latents=noise, steps=SHORT_STEPS, feature_reuse=interval)
        pixels = np.stack([edit.frames for edit in edits]).astype(float)
        reference = pixels if interval == 1 else reference
        error = float(np.mean((pixels - reference) ** 2))
        psnr = 10 * np.log10(255**2 / error) if error else None
        variants[str(interval)] = {**scores(edits, expected), "psnr_db": psnr, "seconds": []}
    for turn in range(REPEATS + 1):  # the first turn compiles
        for interval in REUSE:
            began = time.perf_counter()
            tav.sample(source.scene.caption, latents=noise, steps=SHORT_STEPS, feature_reuse=interval, **SAMPLING)
            if turn:
                variants[str(interval)]["seconds"].append(time.perf_counter() - began)
    write_result(file, {"clip": number, "variants": variants})
    print(file.name, json.dumps(variants), file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_clips", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/long_clips"), help="results (%(default)s)")
    parser.add_argument("--clips", type=int, nargs="+", default=[1, 0], help="numbers of the clips (%(default)s)")
    parser.add_argument("--steps", type=int, default=120, help="tuning steps (%(default)s)")
    args = parser.parse_args()
    compilation_cache.enable()
    for number in args.clips:
        short_clip(number, args.out, args.steps)
        long_clip(number, args.out, args.steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

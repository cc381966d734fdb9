"""`tav demo`: tune, invert and edit a rendered clip with the demo model, and evaluate the edits."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tav_jax import Clip, InputError, TuneAVideo
from tav_jax.demo.edits import FPS, MODEL, Settings, example_edits, parse_scene, source_clip, unknown_words
from tav_jax.demo.evaluation import evaluate
from tav_jax.demo.report import CUSTOM, DemoResult, write_results
from tav_jax.demo.world import DemoClip
from tav_jax.io.progress import progress_bar
from tav_jax.training.run_directory import RunDirectory


def make_settings(**overrides: int | None) -> Settings:
    """The default settings with every override that is not None."""
    chosen = {name: value for name, value in overrides.items() if value is not None}
    if chosen.get("steps", 1) < 1:
        raise InputError(f"--steps is {chosen['steps']}; give 1 or more")
    if not 0 <= chosen.get("seed", 0) < 2**31:
        raise InputError(f"--seed is {chosen['seed']}; give a whole number from 0 to {2**31 - 1}")
    return Settings(**chosen)


def prepare_directory(out: str | Path) -> Path:
    """Create the output directory, which must be new or empty, and check that it is writable."""
    directory = Path(out).expanduser()
    RunDirectory(directory).check_writable()
    if directory.exists() and any(directory.iterdir()):
        raise InputError(f"{directory} is not empty; give another directory with --out=…, or remove this one first")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").touch()
        (directory / ".writable").unlink()
    except OSError as error:
        raise InputError(f"{directory} cannot be written ({error.strerror}); give another with --out=…") from error
    return directory


def run_demo(
    out: str | Path, prompts: Sequence[str] = (), settings: Settings | None = None, *, clip_seed: int | None = None
) -> Path:
    """Tune, invert, edit and evaluate; write the results to `out` and return the path of the report."""
    if clip_seed is not None and clip_seed < 0:
        raise InputError(f"--clip is {clip_seed}; give 0 or more")
    directory = prepare_directory(out)
    settings = settings or Settings()
    for prompt in prompts:
        if unknown := unknown_words(prompt):
            words = ", ".join(repr(word) for word in unknown)
            print(f"The demo model was not trained on {words}; only the other words can have effect.", file=sys.stderr)
    source = source_clip(clip_seed, settings.frames)
    if prompts:
        kinds = [CUSTOM] * len(prompts)
        expected = [replace(source, scene=parse_scene(prompt, source.scene)) for prompt in prompts]
    else:
        examples = example_edits(source, clip_seed or 0)
        kinds, expected = list(examples), list(examples.values())
        prompts = [clip.scene.caption for clip in expected]
    result = edit_clip(DemoResult(settings, clip_seed, source, kinds), prompts, expected)
    report = write_results(result, directory)
    metrics = result.metrics
    print(
        f"{metrics['edit_accuracy']:.0%} of the edited frames match their prompt; the object is "
        f"{metrics['trajectory_error_px']:.1f} pixels from the source's path on average.\nReport: {report}",
        file=sys.stderr,
    )
    return report


def edit_clip(result: DemoResult, prompts: Sequence[str], expected: Sequence[DemoClip]) -> DemoResult:
    """Tune, invert and sample with the public API, and complete the result."""
    settings, caption = result.settings, result.source.scene.caption

    @contextlib.contextmanager
    def timed(stage: str, total: int | None = None) -> Iterator[None]:
        started = time.perf_counter()
        with progress_bar(total or 1, stage, None if total else False) as bar:
            yield
            bar.update(total or 1)
        result.seconds[stage] = time.perf_counter() - started

    with timed("rendering", settings.frames):
        clip = Clip(result.source.frames, FPS)
    with timed("loading", 1):
        tav = TuneAVideo.from_pretrained(MODEL, dtype="float32", seed=settings.seed)
    with timed("tuning"):
        tuned = tav.tune(clip, caption, steps=settings.steps, learning_rate=settings.learning_rate, seed=settings.seed)
    with timed("inverting"):
        noise = tav.invert(clip, steps=settings.inversion_steps)
    with timed("sampling"):
        options = {"steps": settings.sampling_steps, "guidance": settings.guidance, "strength": settings.strength}
        result.edits = tav.sample(prompts, latents=noise, **options)
    with timed("evaluating", len(prompts)):
        result.evaluations = [evaluate(e.frames, clip) for e, clip in zip(result.edits, expected, strict=True)]
    with timed("reconstructing"):
        result.reconstruction_psnr_db = reconstruction_psnr(tav, clip, caption, settings)
    result.losses = [float(loss) for loss in tuned.losses]
    return result


def reconstruction_psnr(tav: TuneAVideo, clip: Clip, caption: str, settings: Settings) -> float:
    """PSNR in dB of a clip that is inverted and sampled with its own caption, against the clip encoded and decoded."""
    latents = tav.encode_video(clip)
    noise = tav.invert(latents, steps=settings.inversion_steps, prompt=caption, progress=False)
    sampled = tav.sample(caption, latents=noise, steps=settings.sampling_steps, guidance=1.0, progress=False)
    reference, reconstruction = (np.asarray(tav.decode_video(x), np.float64) for x in (latents, sampled.latents))
    return float(-10 * np.log10(max(np.mean((reference - reconstruction) ** 2), 1e-12)))

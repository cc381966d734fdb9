"""`tav edit`: one restore, one inversion, one compilation, any number of prompts."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tav_jax import memory, processes, prompts
from tav_jax.errors import InputError
from tav_jax.pipeline import Edit, TuneAVideo
from tav_jax.progress import counter, progress_bar
from tav_jax.run import Run, digest, load_clip, publish_video, sampling, say
from tav_jax.video import Clip
from tav_jax.workdir import Workdir

GAP = 8  # white pixels between the columns of a side-by-side video


def edit(
    run: Run,
    texts: Sequence[str],
    *,
    out: str | None = None,
    inversion: bool = True,
    seeds: Sequence[int] = (0,),
    suffix: str = ".mp4",
    force: bool = False,
) -> list[str]:
    """Sample the prompts as the run's config says; write a video of each, and one of all side by side. Gives paths."""
    e = run.config.edit
    if not texts:
        raise InputError("there is no prompt to edit with; give --prompt=… or set edit.prompts in the config")
    asked = {"prompts": list(texts), "out": out, "inversion": inversion, "seeds": list(seeds), "suffix": suffix}
    if not inversion and e.strength < 1:
        raise InputError(f"strength is {e.strength:g}, but --no-inversion leaves no clip to keep; add --strength=1")
    processes.same({**asked, "force": force, **{f"edit.{name}": value for name, value in e.items()}})
    targets = _targets(texts, seeds if not inversion else (None,), suffix)
    folder = Workdir(out) if out else run.workdir
    place = "" if out else "edits/"
    together = place + prompts.file_names(["side by side " + ", ".join(texts)])[0] + suffix
    names = (*(place + target for _, _, target in targets), together)
    processes.from_first("looking for edits", lambda: check_free(folder, () if force else names))

    run.workdir.sweep()
    clip = load_clip(run.config)
    tav = run.restore()
    tav.source = clip
    noise = inverted(run, tav, clip) if inversion else None
    edits: list[Edit] = []
    for seed in dict.fromkeys(seed for _, seed, _ in targets):
        start = tav.noise(seed or 0, len(clip.frames), clip.frames.shape[1:3]) if noise is None else noise
        chosen = [text for text, at, _ in targets if at == seed]
        edits += sample_in_batches(tav, chosen, start, e)

    written = []  # where process 0 writes
    for made, (_, _, target) in zip(edits, targets, strict=True):
        publish_video(folder, Clip(made.frames, made.fps, made.audio), place + target)
        written.append(str(folder / (place + target)))
    publish_video(folder, side_by_side(clip, edits, run.config.clip.prompt), together)
    return [*written, str(folder / together)]


def check_free(folder: Workdir, names: Sequence[str]) -> None:
    folder.usable()
    if taken := [name for name in names if (folder / name).exists()]:
        raise InputError(f"{folder / taken[0]} exists already; add --force to overwrite, or give another --out")


def _targets(texts: Sequence[str], seeds: Sequence[int | None], suffix: str) -> list[tuple[str, int | None, str]]:
    """(prompt, seed, file name) of every video to make; a prompt given twice is made once."""
    texts = list(dict.fromkeys(texts))
    return [
        (text, seed, name + (f"-seed{seed}" if seed is not None else "") + suffix)
        for seed in dict.fromkeys(seeds)
        for text, name in zip(texts, prompts.file_names(texts), strict=True)
    ]


def sample_in_batches(tav: TuneAVideo, texts: Sequence[str], start: Any, e: Any) -> list[Edit]:
    """All prompts, as many at once as memory allows; the last batch is filled up, so that one program does for all."""
    fitting = memory.prompts_at_once(len(texts), tav.prompt_bytes(start))
    size = min(processes.everyones("sharing out the prompts", fitting))
    edits: list[Edit] = []
    with progress_bar(-(-len(texts) // size) * e.steps, "sampling") as bar:
        for begin in range(0, len(texts), size):
            batch = list(texts[begin : begin + size])
            filled = batch + batch[:1] * (size - len(batch))
            edits += tav.sample(filled, latents=start, progress=counter(bar), **sampling(e))[: len(batch)]
    return edits


# ------------------------------------------------------------------------------------------------------- inversion


def inverted(run: Run, tav: TuneAVideo, clip: Clip) -> Any:
    """The clip's noise, kept in the run's folder and used again while nothing that it depends on changes."""
    steps, step = run.config.edit.inversion_steps, run.checkpoints.newest
    depends = {
        "frames": digest(clip),
        "shape": clip.frames.shape,
        "base": tav.parts.fingerprint,
        "checkpoint": step,
        "model": run.config.model.to_dict(),
        "steps": steps,
    }
    key = hashlib.blake2b(json.dumps(depends, sort_keys=True, default=list).encode(), digest_size=8).hexdigest()
    name = f"inversions/{key}.npz"
    kept = _read_noise(run.workdir, name)
    if not processes.agree(kept is None):
        say(f"Reusing the inversion in {run.workdir / name}.")
        return kept
    with progress_bar(steps, "inverting") as bar:
        noise = tav.invert(clip, steps=steps, progress=counter(bar))
    if processes.is_first():
        with run.workdir.making(name) as scratch:
            np.savez(scratch, noise=np.asarray(noise))
    say(f"Inverted the clip in {steps} steps; kept in {run.workdir / name}.")
    return noise


def _read_noise(workdir: Workdir, name: str) -> Any:
    file = workdir.fetch(name)
    if file is None:
        return None
    try:
        with np.load(file) as table:
            return jnp.asarray(table["noise"])
    except (OSError, ValueError, KeyError, EOFError):  # damaged: made again
        return None


# ---------------------------------------------------------------------------------------------------- side by side


def side_by_side(source: Clip, edits: Sequence[Edit], prompt: str) -> Clip:
    """The source and the edits in one picture, in step, each under its words."""
    columns = [(prompt or "source", source.frames), *((e.prompt or "(empty prompt)", e.frames) for e in edits)]
    height, width = source.frames.shape[1:3]
    captions = [caption(text, width) for text, _ in columns]
    tallest = max(c.shape[0] for c in captions)
    step = width + GAP
    canvas = np.full((len(source.frames), tallest + height, step * len(columns) - GAP, 3), 255, np.uint8)
    for i, (words, (_, video)) in enumerate(zip(captions, columns, strict=True)):
        across = slice(i * step, i * step + width)
        canvas[:, : words.shape[0], across] = words
        canvas[:, tallest:, across] = video
    return Clip(canvas, source.fps, source.audio)


def caption(text: str, width: int, lines: int = 4) -> np.ndarray:
    """Words on white, broken to the width and cut after a few lines."""
    font = ImageFont.load_default(max(9, width // 20))
    words, rows = " ".join(text.split()).split(" "), [""]
    for word in words:
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width - 8 or not rows[-1]:
            rows[-1] = longer
        else:
            rows.append(word)
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1] + " …"]
    line = font.size + 4  # pyright: ignore[reportAttributeAccessIssue]
    picture = Image.new("RGB", (width, int(line * len(rows)) + 8), "white")
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        draw.text((4, 4 + i * line), row, fill="black", font=font)
    return np.asarray(picture)

"""The page that `tav demo` writes: one file, nothing fetched from anywhere."""

import base64
import html
import io
import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from tav_jax.demo.edits import FPS, Settings
from tav_jax.demo.world import SIDE

if TYPE_CHECKING:
    from tav_jax.demo.demo import Story

MARKS = ("#d1495b", "#2e86ab", "#e09f3e", "#6a994e", "#8e6bbf", "#b5838d")
SOURCE_MARK = "#7d8590"
WINDOW = 25  # steps that the smooth loss curve is a mean of


def page(story: "Story") -> str:
    s = story.settings
    prompts = [edit.prompt for edit in story.edits]
    marks = [MARKS[i % len(MARKS)] for i in range(len(prompts))]
    fields = {
        "title": html.escape(f"“{story.source.scene.caption}”, and what became of it"),
        "lead": (
            f"A very small Stable Diffusion, which had only ever seen still pictures, learned this one clip of "
            f"{s.frames} frames in {s.steps} steps. The clip was then turned back into noise, and drawn again from "
            f"that noise, with other words for the last {s.strength:.0%} of the way. What moves, moves as it did: no "
            "caption ever named the motion."
        ),
        "cards": _cards(story, prompts, marks),
        "last_frame": s.frames - 1,
        "pause": round(1000 / FPS),
        "paths": _paths(story, marks),
        "legend": "".join(
            f'<li><i style="background:{mark}"></i>{html.escape(text)}</li>'
            for mark, text in zip([SOURCE_MARK, *marks], ["source", *prompts], strict=True)
        ),
        "losses": _losses(np.asarray(story.losses)),
        "steps": s.steps,
        "window": WINDOW,
        "rows": _rows(story, prompts),
        "psnr": f"{story.reconstruction_psnr_db:.1f}",
        "stages": _stages(story.seconds),
        "command": html.escape(_command(story, prompts)),
        "python": html.escape(_python(story, prompts)),
        "settings": html.escape(json.dumps(asdict(s), indent=2)),
    }
    template = Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
    return template.substitute(fields)


def _strip(frames: UInt8[np.ndarray, "F h w 3"]) -> str:
    """All frames in one row, as a picture inside the page."""
    out = io.BytesIO()
    Image.fromarray(np.concatenate(list(frames), axis=1)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _card(frames, kind: str, prompt: str, figures: str, mark: str) -> str:
    return (
        f'<article class="card" style="--mark:{mark}"><canvas class="clip" width="{SIDE}" height="{SIDE}" '
        f'data-strip="{_strip(frames)}" role="img" aria-label="{html.escape(re.sub("<[^>]+>", "", prompt))}"></canvas>'
        f'<p class="kind">{html.escape(kind)}</p><p class="prompt">{prompt}</p>'
        f'<p class="figures">{figures}</p></article>'
    )


def _cards(story: "Story", prompts: list[str], marks: list[str]) -> str:
    said = story.source.scene.caption
    cards = [_card(story.source.frames, "the clip", html.escape(said), f"{story.source.motion}, drawn", SOURCE_MARK)]
    for edit, verdict, kind, mark in zip(story.edits, story.verdicts, story.kinds, marks, strict=True):
        figures = f"{verdict.edit_accuracy:.0%} right, {verdict.trajectory_error_px:.1f} px off the path"
        cards.append(_card(edit.frames, kind, _changed(edit.prompt, said), figures, mark))
    return "\n".join(cards)


def _changed(prompt: str, said: str) -> str:
    """The prompt, with the words that the source's sentence does not have marked."""
    before = set(re.findall(r"\w+", said))
    return "".join(
        f"<ins>{html.escape(part)}</ins>" if re.fullmatch(r"\w+", part) and part not in before else html.escape(part)
        for part in re.split(r"(\w+)", prompt)
    )


def _points(path: Float[np.ndarray, "F 2"]) -> str:
    return " ".join(f"{x:.2f},{y:.2f}" for x, y in path)


def _paths(story: "Story", marks: list[str]) -> str:
    lines = []
    everyone = [(story.source.centres, SOURCE_MARK)]
    everyone += [(verdict.centres, mark) for verdict, mark in zip(story.verdicts, marks, strict=True)]
    for i, (path, mark) in enumerate(everyone):
        seen = path[np.isfinite(path).all(axis=1)]  # the line passes over frames without an object
        path = np.where(np.isfinite(path), path, -9.0)  # and the dot waits outside of the picture
        wide = 2.6 if i == 0 else 0.7
        lines.append(
            f'<polyline points="{_points(seen)}" fill="none" stroke="{mark}" stroke-width="{wide}" '
            f'stroke-linejoin="round" stroke-linecap="round" opacity="{0.35 if i == 0 else 0.9}"/>'
        )
        lines.append(
            f'<circle r="{2.4 if i == 0 else 1.1}" fill="{mark}" opacity="{0.6 if i == 0 else 1}" '
            f'data-path="{_points(path)}" cx="{path[0, 0]:.2f}" cy="{path[0, 1]:.2f}"/>'
        )
    frame = f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="var(--line)" stroke-width=".5"/>'
    return f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="Paths">{frame}{"".join(lines)}</svg>'


def _losses(losses: Float[np.ndarray, "N"]) -> str:
    wide, high, left, top, bottom = 420, 400, 40, 10, 26
    window = min(WINDOW, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    roof = max(float(losses.max()), 1e-6)

    def line(values, first: int) -> str:
        x = left + (wide - left - 8) * (np.arange(len(values)) + first) / max(1, len(losses) - 1)
        y = high - bottom - (high - top - bottom) * values / roof
        return _points(np.stack([x, y], axis=1))

    marks = "".join(
        f'<line x1="{left}" x2="{wide - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{roof * share:.2f}</text>'
        for share in (0, 0.5, 1)
        for y in [high - bottom - (high - top - bottom) * share]
    )
    return (
        f'<svg viewBox="0 0 {wide} {high}" role="img" aria-label="Loss over steps">{marks}'
        f'<text x="{left}" y="{high - 8}">1</text>'
        f'<text x="{wide - 8}" y="{high - 8}" text-anchor="end">step {len(losses)}</text>'
        f'<polyline points="{line(losses, 0)}" fill="none" stroke="var(--accent)" opacity=".3"/>'
        f'<polyline points="{line(smooth, window // 2)}" fill="none" stroke="var(--accent)" stroke-width="2.5"/></svg>'
    )


def _rows(story: "Story", prompts: list[str]) -> str:
    rows = []
    for text, v in zip(prompts, story.verdicts, strict=True):
        shares = "".join(f"<td>{share:.0%}</td>" for share in (v.colour, v.shape, v.place, v.style, v.edit_accuracy))
        rows.append(
            f"<tr><td>{html.escape(text)}</td>{shares}<td>{v.trajectory_error_px:.2f} px</td>"
            f"<td>{v.frame_consistency:.3f}</td></tr>"
        )
    return "\n".join(rows)


def _stages(seconds: dict[str, float]) -> str:
    longest = max(seconds.values(), default=1.0)
    return "".join(
        f'<tr><td>{name}</td><td>{value:.1f} s</td><td style="width:55%"><div class="bar" '
        f'style="width:{100 * value / longest:.1f}%"></div></td></tr>'
        for name, value in seconds.items()
    )


def _command(story: "Story", prompts: list[str]) -> str:
    usual, words = Settings(), ["tav demo --out=DIR"]
    if story.number is not None:
        words.append(f"--clip={story.number}")
    words += [f"--{name}={getattr(story.settings, name)}" for name in ("steps", "seed")
              if getattr(story.settings, name) != getattr(usual, name)]  # fmt: skip
    if story.kinds == ["your prompt"] * len(prompts):
        words += [f"--prompt={shlex.quote(text)}" for text in prompts]
    return " ".join(words)


def _python(story: "Story", prompts: list[str]) -> str:
    s = story.settings
    join_names = "".join(f"    {text!r},\n" for text in prompts)
    return f"""\
from tav_jax import Clip, TuneAVideo
from tav_jax.demo.edits import MODEL, source_clip

source = source_clip({story.number!r}, frames={s.frames})
clip = Clip(source.frames, {FPS})
tav = TuneAVideo.from_pretrained(MODEL, dtype="float32", seed={s.seed})
tav.tune(clip, {story.source.scene.caption!r}, steps={s.steps}, learning_rate={s.learning_rate}, seed={s.seed})
noise = tav.invert(clip, steps={s.inversion_steps})
prompts = [
{join_names}]
edits = tav.sample(
    prompts, latents=noise, steps={s.sampling_steps}, guidance={s.guidance}, strength={s.strength}
)
"""

"""A page that shows a source clip and its edits, playing in step: one self-contained HTML file."""

import base64
import difflib
import html
import io
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Num, UInt8
from PIL import Image

from tav_jax.errors import InputError
from tav_jax.io.video import Clip, load_video

MAX_EMBEDDED = 18_000_000  # bytes of all videos in a page; the others are linked. Base64 makes them a third larger
GREY = "#808080"  # of the source, and of text and axes of plots; legible on light and dark backgrounds
GENERATOR = '<meta name="generator" content="tav_jax">'  # in the first lines of a page
MASK_COLOUR = (224, 33, 138, 140)  # RGBA where a mask is 1
MASK_SIDE = 64  # pixels; larger masks are reduced


@dataclass(frozen=True)
class Entry:
    """An edit on the page."""

    prompt: str
    video: Clip | Path  # if it is a file, and too large to be embedded, the page links to it
    settings: Mapping[str, Any] = field(default_factory=dict)  # those that differ from the run's
    command: str = ""  # makes the edit again
    scores: Mapping[str, Any] = field(default_factory=dict)
    mask: Num[np.ndarray, "F h w"] | None = None  # 1 where the clip may change; one frame holds for all
    kind: str = ""
    note: str = ""
    colour: str = GREY


def render_page(
    source: Clip,
    source_prompt: str,
    entries: Sequence[Entry],
    *,
    title: str = "",
    lead: str = "",
    sections: str = "",
    source_video: Path | None = None,
    source_note: str = "",
    directory: Path = Path(),
    card_width: int = 260,
) -> str:
    """The page as HTML.

    Args:
        source: the clip. All edits have its number of frames and its frame rate.
        lead, sections: HTML below the title and at the end.
        source_video: a file with the source clip, for which the rules of `Entry.video` hold.
        directory: where the page will be, for relative links.
        card_width: the smallest width of a video, in pixels.
    """
    cards, budget = [], MAX_EMBEDDED
    for entry in (Entry(source_prompt, source_video or source, kind="source", note=source_note), *entries):
        uri = _relative(entry.video, directory)
        if isinstance(entry.video, Clip) or entry.video.stat().st_size <= budget:
            with suppress(InputError):  # a damaged GIF, which does not become an MP4
                data = mp4(entry.video)
                uri, budget = "data:video/mp4;base64," + base64.b64encode(data).decode(), budget - len(data)
        cards.append(_card(entry, uri, source_prompt, source.frames.shape[1:3], directory))
    switches = _switch("sound", "Sound") if source.audio else ""
    switches += _switch("masks", "Masks") if any(entry.mask is not None for entry in entries) else ""
    fields = {
        "generator": GENERATOR,
        "title": html.escape(title or f"Edits of “{source_prompt}”"),
        "lead": lead,
        "cards": "\n".join(cards),
        "last_frame": len(source.frames) - 1,
        "fps": f"{source.fps:.9g}",
        "switches": switches,
        "sections": _comparison(entries) + sections,
        "card_width": card_width,
    }
    return Template((Path(__file__).parent / "page.html").read_text(encoding="utf-8")).substitute(fields)


def _relative(video: Clip | Path, directory: Path) -> str:
    """The URL of a file, relative to the page; "" for a clip."""
    return "" if isinstance(video, Clip) else quote(os.path.relpath(video, directory).replace(os.sep, "/"))


def mp4(video: Clip | Path) -> bytes:
    """The bytes of an MP4. Other files, such as GIFs, are converted."""
    if isinstance(video, Path) and video.suffix == ".mp4":
        return video.read_bytes()
    clip = video if isinstance(video, Clip) else load_video(video)
    with tempfile.TemporaryDirectory(prefix="tav_jax_page_") as scratch:
        return Clip(clip.frames, clip.fps, clip.audio).save(Path(scratch) / "video.mp4").read_bytes()


def _card(entry: Entry, uri: str, source_prompt: str, size: tuple[int, int], directory: Path) -> str:
    height, width = size
    parts = [
        f'<article class="card" style="--colour:{entry.colour}"><div class="clip">',
        f'<video src="{html.escape(uri)}" width="{width}" height="{height}" muted playsinline preload="auto" ',
        f'aria-label="{html.escape(entry.prompt)}"></video>{_mask(entry.mask)}</div>',
        f'<p class="kind">{html.escape(entry.kind)}</p>' if entry.kind else "",
        f'<p class="prompt">{mark_changes(entry.prompt, source_prompt) or "(empty prompt)"}</p>',
        f'<p class="figures">{html.escape(entry.note)}</p>' if entry.note else "",
    ]
    if link := _relative(entry.video, directory):
        parts.append(f'<p class="figures"><a href="{html.escape(link)}">{html.escape(Path(link).name)}</a></p>')
    if entry.command:
        parts.append(f"<details><summary>Make it again</summary>{code(entry.command)}</details>")
    return "".join(parts) + "</article>"


def mark_changes(prompt: str, source_prompt: str) -> str:
    """The prompt as HTML. The words that a word-by-word comparison with the source's prompt finds new are in <ins>."""
    old, new = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (source_prompt, prompt))
    matcher = difflib.SequenceMatcher(None, [x.lower() for x in old], [x.lower() for x in new], autojunk=False)
    parts = []
    for kind, _, _, begin, end in matcher.get_opcodes():
        for i in range(begin, end):
            text = html.escape(new[i])
            parts.append(f"<ins>{text}</ins>" if kind != "equal" and new[i].strip() else text)
    return re.sub(r"</ins>(\s*)<ins>", r"\1", "".join(parts))


def _mask(mask: Num[np.ndarray, "F h w"] | None) -> str:
    """The frames of a mask below each other, as a background of which the page's script shows one frame."""
    if mask is None:
        return ""
    strip = mask_strip(mask)
    image = np.empty((*strip.shape, 4), np.uint8)
    image[...] = MASK_COLOUR
    image[..., 3] = np.rint(strip * (MASK_COLOUR[3] / 255))
    uri = f"data:image/png;base64,{png(image)}"
    style = f"background-image:url({uri});background-size:100% {100 * len(mask)}%"
    return f'<div class="mask" data-frames="{len(mask)}" style="{style}"></div>'


def mask_strip(mask: Num[np.ndarray, "F h w"]) -> UInt8[np.ndarray, "rows width"]:
    """A mask from 0 to 255, reduced to about the size of latents, with its frames below each other."""
    step = -(-max(mask.shape[1:]) // MASK_SIDE)
    small = np.rint(255 * np.clip(mask[:, ::step, ::step].astype(np.float32), 0, 1)).astype(np.uint8)
    return small.reshape(-1, small.shape[2])


def png(image: UInt8[np.ndarray, "*s"]) -> str:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def _switch(name: str, label: str) -> str:
    return f'<label><input type="checkbox" id="{name}"> {label}</label>'


def code(text: str) -> str:
    """Text to copy, with a button that copies it."""
    return f'<pre tabindex="0">{html.escape(text)}</pre><button class="copy" type="button">Copy</button>'


def table(rows: Sequence[tuple[str, Mapping[str, Any]]], heading: str = "Prompt") -> str:
    """A table with a row for each (name, values); on phones, a list."""
    columns = list(dict.fromkeys(name for _, values in rows for name in values))
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in (heading, *columns))
    body = []
    for name, values in rows:
        cells = (f'<td data-label="{html.escape(c)}">{html.escape(_shown(values.get(c)))}</td>' for c in columns)
        body.append(f'<tr><th scope="row">{html.escape(name)}</th>{"".join(cells)}</tr>')
    content = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="stack">{content}</table></div>'


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _comparison(entries: Sequence[Entry]) -> str:
    """The section with the settings and the scores of the edits; "" if there are none."""
    names = dict.fromkeys([*(n for entry in entries for n in entry.settings), *(n for e in entries for n in e.scores)])
    if not names:
        return ""
    rows = [(entry.prompt, {n: {**entry.scores, **entry.settings}.get(n) for n in names}) for entry in entries]
    return f'<section class="card"><h2>Settings and scores</h2>{table(rows)}</section>'

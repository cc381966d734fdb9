"""Captions of videos: text as an image, in fonts of this machine that have its characters."""

import bisect
import functools
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from tav_jax.errors import short_repr

MARGIN, LEADING = 4, 4  # pixels
MAX_LINES = 4
ATTACHED = ("Mn", "Me", "Mc", "Cf")  # drawn with the character before: combining marks, joiners of emoji, …
BITMAP_SIZES = (109, 136, 160, 128, 96, 64)  # of fonts with colored bitmaps, which are scaled; the first is Noto's
PLACEHOLDERS = ("lastresort", "blank")  # fonts that have a box, or nothing, for every character


def caption_prompts(prompts: Sequence[str], width: int) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The captions of the source and the edits. A prompt with characters that no font has is replaced by its number,
    with a warning that names the prompt."""
    images = []
    for number, prompt in enumerate(prompts):
        name = f"prompt {number}" if number else "source"
        if absent := missing_characters(prompt):
            warnings.warn(
                f"{short_repr(prompt)} has the caption {name!r} in the video, because no font on this machine has "
                f"{short_repr(absent)}; install one that does, such as Noto Sans CJK or Noto Emoji",
                stacklevel=3,
            )
        images.append(caption(name if absent else prompt, width))
    return images


def caption(text: str, width: int, lines: int = MAX_LINES) -> UInt8[np.ndarray, "h w 3"]:
    """An image of black text on white, wrapped to the width and truncated after some lines."""
    size, ascii_only, rows = _font_size(width), text.isascii(), [""]

    def fits(row: str) -> bool:
        runs = _runs(row, ascii_only)
        return sum(font.getlength(run) * scale for font, scale, run in _load_all(runs, size)) <= width - 2 * MARGIN

    for word in " ".join(text.split()).split(" "):
        longer = f"{rows[-1]} {word}".strip()
        if fits(longer) or not rows[-1]:
            rows[-1] = longer
        else:
            rows.append(word)
        while len(rows) <= lines and not fits(rows[-1]) and len(rows[-1]) > 1:  # a script without spaces
            end = bisect.bisect(range(1, len(rows[-1])), False, key=lambda n: not fits(rows[-1][:n])) or 1
            rows[-1:] = [rows[-1][:end], rows[-1][end:]]
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1] + " …"]
    line_height, ascent = size + LEADING, _load("", size)[0].getmetrics()[0]
    image = Image.new("RGB", (width, caption_height(width, len(rows))), "white")
    for i, row in enumerate(rows):
        x = float(MARGIN)
        for font, scale, run in _load_all(_runs(row, ascii_only), size):
            _draw(image, (x, MARGIN + i * line_height + ascent), run, font, scale)
            x += font.getlength(run) * scale
    return np.asarray(image)


def caption_height(width: int, lines: int = MAX_LINES) -> int:
    """The height of a caption of some lines, by default of as many as are shown."""
    return (_font_size(width) + LEADING) * lines + 2 * MARGIN


def _font_size(width: int) -> int:
    return max(9, width // 20)


def missing_characters(text: str) -> str:
    """The characters of a text that no font has."""
    visible = (char for char in text if not char.isspace() and unicodedata.category(char) not in ATTACHED)
    return "" if text.isascii() else "".join(char for char in dict.fromkeys(visible) if not _font_path(char))


def _runs(text: str, ascii_only: bool) -> list[tuple[str, str]]:
    """The text in parts, each with the path of its font. ASCII text is drawn in Pillow's own font, whose path is ""."""
    runs: list[tuple[str, str]] = []
    for char in text:
        attached = runs and unicodedata.category(char) in ATTACHED
        path = "" if ascii_only else runs[-1][0] if attached else _font_path(char)
        if runs and runs[-1][0] == path:
            runs[-1] = path, runs[-1][1] + char
        else:
            runs.append((path, char))
    return runs


def _load_all(runs: list[tuple[str, str]], size: int) -> list[tuple[ImageFont.FreeTypeFont, float, str]]:
    return [(*_load(path, size), run) for path, run in runs]


def _draw(image: Image.Image, baseline: tuple[float, int], text: str, font: Any, scale: float) -> None:
    if scale == 1:
        ImageDraw.Draw(image).text(baseline, text, fill="black", font=font, anchor="ls", embedded_color=True)
        return
    left, top, right, bottom = font.getbbox(text, anchor="ls")
    bitmap = Image.new("RGBA", (max(1, round(right - left)), max(1, round(bottom - top))))
    ImageDraw.Draw(bitmap).text((-left, -top), text, font=font, anchor="ls", embedded_color=True)
    bitmap = bitmap.resize((max(1, round(bitmap.width * scale)), max(1, round(bitmap.height * scale))))
    image.paste(bitmap, (round(baseline[0] + left * scale), round(baseline[1] + top * scale)), bitmap)


@functools.cache
def _load(path: str, size: int) -> tuple[ImageFont.FreeTypeFont, float]:
    """A font, and the factor by which it is to be scaled."""
    if not path:
        return ImageFont.load_default(size), 1.0  # pyright: ignore[reportReturnType]
    for font_size in (size, *BITMAP_SIZES):
        try:
            return ImageFont.truetype(path, font_size), size / font_size
        except OSError:  # a font of bitmaps has a few sizes only
            continue
    raise AssertionError(f"{path} has no size that is known")  # `_characters` has checked it


@functools.cache
def _font_path(char: str) -> str:
    """The first font that has the character, or ""."""
    return next((path for path in _font_files() if ord(char) in _characters(path)), "")


@functools.cache
def _characters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        _load(path, 12)
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, AssertionError):  # a damaged font, or one of an unknown type
        return frozenset()


@functools.cache
def _font_files() -> list[str]:
    """DejaVu Sans, which Matplotlib contains, then the fonts of this machine, upright ones of normal weight first."""
    import matplotlib
    from matplotlib import font_manager  # imports slowly

    names = {path: Path(path).name.lower() for path in font_manager.findSystemFonts()}
    usable = [path for path, name in names.items() if not any(word in name for word in PLACEHOLDERS)]
    ordered = sorted(usable, key=lambda path: ("regular" not in names[path], names[path]))
    return [f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", *ordered]

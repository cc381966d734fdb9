"""One video with a clip and its edits."""

from collections.abc import Sequence

import numpy as np

from tav_jax.errors import InputError
from tav_jax.io.caption import caption_height, caption_prompts
from tav_jax.io.decoding import MAX_FRAME_SIDE, MAX_PIXELS
from tav_jax.io.video import Clip, Edit

GAP = 8  # white pixels between clips
MAX_WIDTH = 4096  # pixels, beyond which there is another row; a limit of many players


def side_by_side(source: Clip, edits: Sequence[Edit], prompt: str) -> Clip:
    """One clip with the source and the edits, each below its prompt: in one row or, if that is too wide, in a grid."""
    cells = [(prompt or "source", source.frames), *((e.prompt or "(empty prompt)", e.frames) for e in edits)]
    height, width = source.frames.shape[1:3]
    columns, rows = grid_shape(len(cells), height, width)
    captions = caption_prompts([text for text, _ in cells], width)
    tops = [max(len(image) for image in captions[row * columns :][:columns]) for row in range(rows)]
    bottoms = [sum(tops[: row + 1]) + row * GAP + (row + 1) * height for row in range(rows)]
    canvas = np.full((len(source.frames), bottoms[-1], (width + GAP) * columns - GAP, 3), 255, np.uint8)
    for i, (text, (_, frames)) in enumerate(zip(captions, cells, strict=True)):
        row, column = divmod(i, columns)
        top, left = bottoms[row] - height, column * (width + GAP)
        canvas[:, top - tops[row] :][:, : len(text), left : left + width] = text
        canvas[:, top : top + height, left : left + width] = frames
    return Clip(canvas, source.fps, source.audio)


def grid_shape(count: int, height: int, width: int) -> tuple[int, int]:
    """Columns and rows of a grid of clips. Refuses clips that do not fit into one video, whatever their captions."""

    def shape(count: int) -> tuple[int, int]:
        rows = -(-count // max(1, (MAX_WIDTH + GAP) // (width + GAP)))
        return -(-count // rows), rows

    def fits(count: int) -> bool:
        columns, rows = shape(count)
        h, w = rows * (height + caption_height(width) + GAP), columns * (width + GAP)
        return max(h, w) <= MAX_FRAME_SIDE and h * w <= MAX_PIXELS

    if not fits(count):
        most = max((n for n in range(2, count) if fits(n)), default=1)
        raise InputError(
            f"{count - 1} edits of {height}×{width} pixels do not fit beside the clip into one video; "
            + (f"sample at most {most - 1} of them with one command" if most > 1 else "use a smaller size")
        )
    return shape(count)

"""`index.html` beside the videos of `tav edit`: a page with all edits in the directory.

A hidden file records the edits, so that a later `tav edit` adds to the page. Both files are derived: a damaged record
is begun anew, and edits whose video was removed leave the page.
"""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from tav_jax.evaluation.page import GENERATOR, MAX_EMBEDDED, Entry, mask_strip, mp4, png, render_page
from tav_jax.io.video import Clip
from tav_jax.training.run_directory import RunDirectory

PAGE, RECORD = "index.html", ".tav-edits.json"
SOURCE = "_source.mp4"  # written if the source is large; the names of edits do not begin with "_"
MAX_SOURCE = MAX_EMBEDDED // 3  # bytes
VALUES = (str, int, float, bool, type(None))  # types of settings and scores in the record


def update_index(
    directory: RunDirectory, prefix: str, source: Clip, source_prompt: str, edits: Mapping[str, Entry]
) -> str:
    """Add edits to the record, write the page, and return its path. To be called in one process.

    Args:
        directory: that of the run, or of the edits.
        prefix: of the names in the directory, "edits/" or "".
        edits: the new ones by the names of their videos, which have been written. They are first on the page.
    """
    entries = {**edits, **read_record(directory, prefix + RECORD), **edits}
    entries = {name: entry for name, entry in entries.items() if (directory / (prefix + name)).is_file()}
    record = {"edits": {name: _to_json(entry) for name, entry in entries.items()}}
    _write(directory, prefix + RECORD, json.dumps(record, indent=1) + "\n")
    source_video = None
    if len(mp4(source)) > MAX_SOURCE:
        from tav_jax.training.run import publish_video  # imports JAX, which a reader of the record does not need

        publish_video(directory, source, prefix + SOURCE)
        source_video = directory.fetch(prefix + SOURCE)
    shown = [replace(entry, video=directory.fetch(prefix + name)) for name, entry in entries.items()]
    place = directory.fetch(prefix + RECORD).parent
    page = render_page(source, source_prompt, shown, source_video=source_video, directory=place)
    _write(directory, prefix + PAGE, page)
    return str(directory / (prefix + PAGE))


def is_foreign(directory: RunDirectory, name: str) -> bool:
    """Whether the file exists and is not a page of edits."""
    try:
        with (directory / name).open("rb") as file:
            return GENERATOR.encode() not in file.read(1000)
    except OSError:
        return False


def _write(directory: RunDirectory, name: str, text: str) -> None:
    with directory.writing(name) as scratch:
        scratch.write_bytes(text.encode("utf-8", "replace"))


def read_record(directory: RunDirectory, name: str) -> dict[str, Entry]:
    """The edits of a record by their file names; none if the record is missing or damaged."""
    try:
        record = json.loads(directory.read(name) or '{"edits": {}}')
        return {file: _from_json(file, edit) for file, edit in record["edits"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _to_json(entry: Entry) -> dict[str, Any]:
    values = {"prompt": entry.prompt, "command": entry.command}
    values |= {"settings": dict(entry.settings), "scores": dict(entry.scores)}
    mask = None if entry.mask is None else {"frames": len(entry.mask), "png": png(mask_strip(entry.mask))}
    return {**values, "mask": mask}


def _from_json(file: str, edit: dict[str, Any]) -> Entry:
    if PurePath(file).name != file or not file.endswith((".mp4", ".gif")):
        raise ValueError(f"{file!r} is not the name of a video beside the page")
    settings, scores, mask = edit["settings"], edit["scores"], edit["mask"]
    if not all(isinstance(value, VALUES) for value in (*settings.values(), *scores.values())):
        raise ValueError("a setting or a score is not a text or a number")
    if mask is not None:
        with Image.open(io.BytesIO(base64.b64decode(mask["png"])), formats=("PNG",)) as image:
            mask = (np.asarray(image.convert("L")) / np.float32(255)).reshape(mask["frames"], -1, image.width)
    return Entry(str(edit["prompt"]), Path(file), settings, str(edit["command"]), scores, mask)

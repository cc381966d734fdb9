"""The clips of the LOVEU-TGVE 2023 challenge: its CSV, the layout of a submission, and its table of scores.

A submission has the frames of each edit in `DAVIS_480p/stunt/style/00000.jpg`, …: dataset, video, and type of edit.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tav_jax.errors import InputError, MissingError, join_names, short_repr
from tav_jax.evaluation.scores import Scores, score
from tav_jax.io import paths
from tav_jax.io.images import is_image
from tav_jax.io.progress import progress_bar

CSV = "LOVEU-TGVE-2023_Dataset.csv"
VIDEO, CAPTION = "Video name", "Our GT caption"
TYPES = {
    "style": "Style Change Caption",
    "object": "Object Change Caption",
    "background": "Background Change Caption",
    "multiple": "Multiple Changes Caption",
}
DATASETS = {"davis": "DAVIS_480p", "youtube": "youtube_480p", "videvo": "videvo_480p"}


@dataclass(frozen=True)
class LoveuEdit:
    name: str  # "DAVIS_480p/stunt/style", the directory of its frames in a submission
    prompt: str
    source_prompt: str

    @property
    def type(self) -> str:
        return self.name.rpartition("/")[2]


def read_csv(file: Path) -> list[LoveuEdit]:
    """All edits of the challenge's CSV. A row such as "DAVIS Videos:" begins a dataset."""
    text = paths.read_text(file)
    if text is None:
        raise MissingError(f"{file} does not exist; give the challenge's {CSV} with --csv=FILE")
    try:
        rows = list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True))
    except csv.Error as error:
        raise InputError(f"{file} is not a CSV ({error}); download the challenge's {CSV} again") from error
    columns = list(rows[0]) if rows else []
    if missing := [name for name in (VIDEO, CAPTION, *TYPES.values()) if name not in columns]:
        raise InputError(f"{file} has no column {join_names(missing)}; use the challenge's {CSV}")
    edits, dataset = [], None
    for row in rows:
        name = (row[VIDEO] or "").strip()
        if name.endswith(":"):
            dataset = DATASETS.get(name.split()[0].lower())
        elif name:
            if dataset is None or Path(name).name != name:
                raise InputError(
                    f"{file} has the video {short_repr(name)}, which is not a name below one of the rows "
                    f"'DAVIS Videos:', 'Youtube Videos:' and 'Videvo Videos:'; use the challenge's {CSV}"
                )
            prompts = {kind: (row[column] or "").strip() for kind, column in TYPES.items()}
            source_prompt = (row[CAPTION] or "").strip()
            edits += [LoveuEdit(f"{dataset}/{name}/{kind}", prompts[kind], source_prompt) for kind in TYPES]
    if not edits:
        raise InputError(f"{file} names no video; use the challenge's {CSV}")
    return edits


def find_clips(root: Path, edits: Sequence[LoveuEdit], *, partial: bool) -> tuple[list[LoveuEdit], list[str]]:
    """The edits that have images, and the names of the others, which are an error unless `partial`."""
    there = [edit for edit in edits if any(map(is_image, (root / edit.name).glob("*")))]
    missing = sorted({edit.name for edit in edits} - {edit.name for edit in there})
    if missing and not (partial and there):
        fix = "add --partial to score the others" if there else "give the directory that contains DAVIS_480p"
        raise MissingError(f"{root} lacks {len(missing)} of {len(edits)} clips: {join_names(missing)}; {fix}")
    return there, missing


def score_clips(root: Path, edits: Sequence[LoveuEdit], **models: Any) -> dict[str, Scores]:
    """The scores of each edit by its name."""
    results = {}
    with progress_bar(len(edits), "scoring") as bar:
        for edit in edits:
            results[edit.name] = score(root / edit.name, edit.prompt, source_prompt=edit.source_prompt, **models)
            bar.update()
    return results


def mean_scores(results: Mapping[str, Scores]) -> dict[str, dict[str, Any]]:
    """The table of the challenge: mean scores for each type of edit, and of all edits."""
    types = {kind: [scores for name, scores in results.items() if name.endswith(f"/{kind}")] for kind in TYPES}
    table = {}
    for kind, group in {**types, "all": list(results.values())}.items():
        values = [scores.to_dict() for scores in group]
        names = dict.fromkeys(name for row in values for name in row)
        means = {name: float(np.mean([row[name] for row in values if name in row])) for name in names}
        if group:
            table[kind] = {"clips": len(group), **means}
    return table

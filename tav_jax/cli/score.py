"""`tav score`: scores of the edits of a run, of one video, or of a submission to the LOVEU-TGVE challenge."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tav_jax.cli.settings import silence_background_tracebacks
from tav_jax.distributed import compilation_cache
from tav_jax.errors import InputError, MissingError, join_names
from tav_jax.evaluation import CLIP_MODEL, PICK_MODEL, loveu
from tav_jax.evaluation.index import PAGE, RECORD, is_foreign, read_record, update_index
from tav_jax.evaluation.scores import load_pick, score
from tav_jax.io.clip import load_clip
from tav_jax.io.video import load_video
from tav_jax.training import source_clip
from tav_jax.training.run import Run
from tav_jax.training.run_directory import RunDirectory

SCORES = "scores.json"
# Options that belong to one of --workdir, --video and --loveu
OPTIONS = {
    "workdir": ("source", "edits"),
    "video": ("prompt", "source_prompt", "source", "mask"),
    "loveu": ("csv", "partial"),
}


def run(arguments: argparse.Namespace) -> int:
    silence_background_tracebacks()
    compilation_cache.enable()
    mode = next(name for name in OPTIONS if getattr(arguments, name) is not None)
    for name in dict.fromkeys(name for names in OPTIONS.values() for name in names):
        if name not in OPTIONS[mode] and getattr(arguments, name) not in (None, False):
            raise InputError(f"--{name.replace('_', '-')} has no effect with --{mode}; leave it out")
    result, table = {"workdir": _run, "video": _video, "loveu": _loveu}[mode](arguments)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(format_table(table))
        if missing := result.get("missing"):
            print(f"Not scored, because they are missing: {join_names(missing)}.")
        if note := _missing_models(arguments):
            print(note)
    return 0


def _missing_models(arguments: argparse.Namespace) -> str:
    options = {
        "--clip": (arguments.clip, f"for scores with CLIP ({CLIP_MODEL}, 1.7 GB)"),
        "--pick": (arguments.pick, f"for PickScore ({PICK_MODEL}, 4 GB)"),
    }
    missing = [f"{option} {use}" for option, (value, use) in options.items() if value is None]
    return f"Add {' and '.join(missing)}, or give the directory of such a model." if missing else ""


def _models(arguments: argparse.Namespace) -> dict[str, Any]:
    clip = load_clip(arguments.clip) if arguments.clip else None
    return {"clip": clip, "pick": load_pick(arguments.pick) if arguments.pick else None}


def format_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A table with a row for each name, and a column for each value."""
    columns = list(dict.fromkeys(name for values in rows.values() for name in values))
    lines = [["", *columns]]
    for name, values in rows.items():
        cells = (values.get(column, "–") for column in columns)
        lines.append([name, *(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        f"{first:{widths[0]}}  " + "  ".join(f"{x:>{n}}" for x, n in zip(rest, widths[1:], strict=True))
        for first, *rest in lines
    ).rstrip()


# ------------------------------------------------------------------------------------------------------------ one video


def _video(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    clip = load_video(arguments.video, multiple=1)
    if (arguments.source is None) != (arguments.mask is None):
        raise InputError("the PSNR of the background needs both --source and --mask; give both or neither")
    options: dict[str, Any] = {"source_prompt": arguments.source_prompt}
    if arguments.source is not None:
        source, mask = (load_video(path, multiple=1).frames for path in (arguments.source, arguments.mask))
        wanted = _describe(clip.frames)
        if source.shape != clip.frames.shape:
            raise InputError(f"--source has {_describe(source)} and --video {wanted}; give the frames that were edited")
        if mask.shape[1:] != clip.frames.shape[1:] or len(mask) not in (1, len(clip.frames)):
            raise InputError(f"--mask has {_describe(mask)}; give an image or a video of the size of --video, {wanted}")
        mask = mask.mean(axis=-1, dtype=np.float32) / 255
        options |= {"source": source, "mask": mask[0] if len(mask) == 1 else mask}
    scores = score(clip, arguments.prompt, **_models(arguments), **options).to_dict()
    return scores, {Path(arguments.video).name: scores}


def _describe(frames: np.ndarray) -> str:
    return "{} frames of {}×{}".format(*frames.shape[:3])


# --------------------------------------------------------------------------------------------------- the edits of a run


def _run(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    run = Run.open(arguments.workdir)
    run.clip_option = "--source"
    if arguments.source is not None:
        run.config.clip.path = source_clip.absolute(arguments.source)
    directory, prefix = (RunDirectory(arguments.edits), "") if arguments.edits else (run.directory, "edits/")
    entries = read_record(directory, prefix + RECORD)
    entries = {name: entry for name, entry in entries.items() if (directory / (prefix + name)).is_file()}
    if not entries:
        raise MissingError(
            f"{directory / prefix} holds no edits of this version; make some with "
            f"`tav edit --workdir={arguments.workdir} --prompt=…`, or score a file with --video"
        )
    directory.check_writable()
    if is_foreign(directory, prefix + PAGE):
        raise InputError(f"{directory / (prefix + PAGE)} is not a page of `tav edit`; rename it")
    source = run.load_clip(run.checkpoints.read_metadata().get("clip"))
    models, source_prompt = _models(arguments), run.config.clip.prompt
    results = {}
    for name, entry in entries.items():
        edit = load_video(directory.fetch(prefix + name), multiple=1)
        options: dict[str, Any] = {"source_prompt": source_prompt, **models}
        if entry.mask is not None and edit.frames.shape == source.frames.shape:  # a GIF may have fewer frames
            options |= {"source": source, "mask": _enlarge(entry.mask, edit.frames.shape[:3])}
        results[name] = score(edit, entry.prompt, **options).to_dict()
    scored = {name: replace(entry, scores={**entry.scores, **results[name]}) for name, entry in entries.items()}
    rows = [{"video": name, "prompt": entries[name].prompt, **scores} for name, scores in results.items()]
    result = {"clip": arguments.clip, "pick": arguments.pick, "edits": rows}
    directory.write(prefix + SCORES, json.dumps(result, indent=1) + "\n")
    update_index(directory, prefix, source, source_prompt, scored)
    return result, results


def _enlarge(mask: Float[np.ndarray, "f h w"], shape: tuple[int, ...]) -> Float[np.ndarray, "F H W"]:
    """The mask at the size of the frames, by the nearest neighbor. A mask of one frame holds for all."""
    frames, rows, columns = (np.arange(n) * old // n for n, old in zip(shape, mask.shape, strict=True))
    return np.asarray(mask, np.float32)[frames][:, rows][:, :, columns]


# ------------------------------------------------------------------------------------------------- the LOVEU-TGVE table


def _loveu(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    root = Path(arguments.loveu).expanduser()
    edits = loveu.read_csv(Path(arguments.csv).expanduser() if arguments.csv else root / loveu.CSV)
    there, missing = loveu.find_clips(root, edits, partial=arguments.partial)
    results = loveu.score_clips(root, there, **_models(arguments))
    table: dict[str, Any] = loveu.mean_scores(results)
    clips = {name: scores.to_dict() for name, scores in results.items()}
    return {**table, "clips": clips, "missing": missing}, table

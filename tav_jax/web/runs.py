"""What `tav web` reads and writes in its directory of runs, and the commands that it queues.

    RUN/ …  .tav-web/clips/  .tav-web/masks/  .tav-web/jobs/  .tav-web/cache/

Names of files that are uploaded are not used. The page gets videos from `cache/` only.
"""

import functools
import hashlib
import html
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from tav_jax import config as configs
from tav_jax.demo.edits import FPS, source_clip
from tav_jax.demo.edits import Settings as DemoSettings
from tav_jax.errors import InputError, MissingError, TavError
from tav_jax.evaluation.index import RECORD, read_record
from tav_jax.evaluation.page import MAX_EMBEDDED, Entry, render_page
from tav_jax.io import paths
from tav_jax.io.video import Clip, load_video
from tav_jax.training.run_directory import RunDirectory, file_names

STATE = ".tav-web"
MAX_SECONDS = 600  # of an uploaded clip
MAX_POINTS = 400  # of the plot
MEAN_OF = 50  # steps
PAINT_SIDE = 512  # pixels; smaller frames are enlarged to be painted on
# Links to the videos would lead out of the frame; the frame tells the page its height.
IN_FRAME = """<style>main { padding: 4px } h1, .lead { display: none } section { margin-top: 12px }
.figures a { pointer-events: none; color: inherit; text-decoration: none }</style>
<script>new ResizeObserver(() => parent.postMessage(document.querySelector("main").offsetHeight + 8, "*"))
.observe(document.querySelector("main"));</script>"""


class Workspace:
    """A directory of runs, or a single run, on this machine."""

    def __init__(self, workdir: str | Path):
        if "://" in str(workdir):
            raise InputError(f"{workdir} is in a bucket; give `tav web` a directory of this machine")
        self.root = paths.local_path(workdir)
        paths.check_writable(self.root)
        self.is_run = (self.root / "config.json").is_file()
        self.state, self.cache = self.root / STATE, self.root / STATE / "cache"
        for name in ("clips", "masks", "jobs", "cache"):
            self.directory(name)

    def directory(self, name: str) -> Path:
        with paths.reporting(self.state):
            (self.state / name).mkdir(parents=True, exist_ok=True)
        return self.state / name

    def runs(self) -> dict[str, Path]:
        """The runs by their names, the newest first."""
        found = [self.root] if self.is_run else [x for x in self.root.iterdir() if not x.name.startswith(".")]
        begun = {run: (run / "config.json").stat().st_mtime for run in found if (run / "config.json").is_file()}
        return {run.name: run for run in sorted(begun, key=lambda run: -begun[run])}

    def run(self, name: str | None) -> Path:
        """The directory of a run that exists."""
        if run := self.runs().get(name or ""):
            return run
        raise MissingError(f"there is no run {name!r} yet; choose one, or tune on a clip" if name else "choose a run")

    def new_run(self, name: str, taken: Collection[str]) -> Path:
        """A directory for a new run, named after this text. `taken` are the directories of runs that are queued."""
        if self.is_run:
            raise InputError(f"{self.root} is a run itself; start `tav web` in a directory of runs to tune on a clip")
        slug = file_names([name])[0]
        names = (slug if i == 1 else f"{slug}-{i}" for i in range(1, 10_000))
        return next(run for run in map(self.root.joinpath, names) if not run.exists() and str(run) not in taken)

    def add_clip(self, file: Path, max_bytes: int) -> tuple[Path, Clip, str]:
        """Copy an uploaded clip. Returns its path, its first frames and a sentence about it."""
        size = file.stat().st_size
        if size > max_bytes:
            raise InputError(f"the clip has {size / 1e6:.0f} MB, more than {max_bytes / 1e6:.0f}; shorten it")
        try:
            clip = load_video(file, frames=2)
        except TavError as error:
            raise InputError(str(error).replace(str(file), "the file")) from error
        count, (height, width) = clip.source_frames, clip.frames.shape[1:3]
        if count and count / clip.fps > MAX_SECONDS:
            raise InputError(f"the clip has {count / clip.fps:.0f} s, more than {MAX_SECONDS}; cut it")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "blake2b").hexdigest()[:16]
        suffix = file.suffix.lower() if file.suffix[1:].isalnum() and len(file.suffix) < 6 else ".video"
        path = self.directory("clips") / f"{digest}{suffix}"
        if not path.exists():
            with paths.reporting(path), paths.scratch_directory(path.parent) as scratch:
                shutil.copyfile(file, scratch / "clip")
                os.replace(scratch / "clip", path)
        frames = f"{count} frames, {count / clip.fps:.1f} s, " if count else ""
        return path, clip, f"{frames}{width}×{height} at {clip.fps:.4g} frames per second"

    def demo_clip(self) -> tuple[Path, str]:
        """The clip of `tav demo`, and its prompt."""
        clip = source_clip(None, DemoSettings().frames)
        return Clip(clip.frames, FPS).save(self.directory("clips") / "demo.mp4"), clip.scene.caption

    def save_mask(self, layers: Sequence[Shaped[np.ndarray, "h w 4"]], size: tuple[int, int]) -> Path:
        """White where something is painted, in the size of the clip."""
        painted = [layer[..., 3] > 0 for layer in layers if layer is not None]
        if not painted or not np.any(painted):
            raise InputError("the mask is empty; paint where the edit may change the clip, or switch the mask off")
        mask = Image.fromarray(255 * np.any(painted, axis=0).astype(np.uint8))
        mask = mask.resize((size[1], size[0]), Image.Resampling.BOX).point([0] * 128 + [255] * 128)
        path = self.directory("masks") / f"{hashlib.blake2b(mask.tobytes(), digest_size=6).hexdigest()}.png"
        with paths.reporting(path):
            mask.save(path)
        return path

    def download(self, video: Path) -> list[str]:
        """Copies of an edit for the page: the MP4 and a GIF."""
        stat = video.stat()
        digest = hashlib.blake2b(repr((str(video), stat.st_mtime_ns)).encode(), digest_size=8).hexdigest()
        copies = [self.directory("cache") / digest / f"{video.stem}{suffix}" for suffix in (".mp4", ".gif")]
        for copy in copies:
            if not copy.exists() and (video.suffix == copy.suffix or copy.suffix == ".gif"):
                with paths.reporting(copy):
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(video, copy) if video.suffix == copy.suffix else load_video(video).save(copy)
        return [str(copy) for copy in copies if copy.exists()]


# ------------------------------------------------------------------------------------------------------------ commands


def train_words(run: Path, settings: Mapping[str, Any]) -> list[str]:
    """The arguments of `tav` that start a run. Settings that have their default are left out."""
    known = dict(configs.leaves(configs.get_config()))
    config: Any = configs.get_config()
    config.update_from_flattened_dict(dict(settings))
    config = configs.validate(config)
    if not settings.get("clip.path"):
        raise InputError("there is no clip yet; upload one, or take the demo's")
    if not settings.get("clip.prompt"):
        raise InputError("there is no prompt yet; describe the clip in one sentence, such as: a man is skiing")
    if config.edit.prompts:
        configs.check_edit_steps(config.edit)
    values = {name: value for name, value in configs.leaves(config) if name in settings and value != known[name]}
    # JSON quotes texts with double quotes, which need no further quoting by the shell.
    texts = {k: f"({', '.join(map(json.dumps, v))},)" if isinstance(v, tuple) else v for k, v in values.items()}
    return ["train", f"--workdir={run}", *(f"--config.{name}={text}" for name, text in texts.items())]


def continue_words(run: Path, steps: int | None = None) -> list[str]:
    """The arguments of `tav` that continue a run, with another number of steps if one is given."""
    config = read_config(run)
    more = [f"--config.train.steps={steps}"] if steps and steps != config.train.steps else []
    return ["train", f"--workdir={run}", f"--config={run / 'config.json'}", *more]


def edit_words(run: Path, prompts: Sequence[str], settings: Mapping[str, Any], *, force: bool = False) -> list[str]:
    """The arguments of `tav` that edit. Settings that are those of the run are left out."""
    config = read_config(run)
    if not prompts:
        raise InputError("there is no prompt yet; write one on each line, such as: spider man is skiing")
    before: dict[str, Any] = config.edit.to_dict()
    config.edit.update({name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
    after: Any = configs.validate(config).edit
    configs.check_edit_steps(after)
    words = ["edit", f"--workdir={run}", *(f"--prompt={prompt}" for prompt in prompts)]
    for name, value in after.items():
        if name in settings and value != before[name]:
            option = "--blend-word" if name == "blend_words" else f"--{name.replace('_', '-')}"
            if value == ():
                raise InputError(f"edit.{name} of this run is {before[name]}; it cannot be emptied by an option")
            words += [f"{option}={one}" for one in (value if isinstance(value, tuple) else (value,))]
    return [*words, *(["--force"] if force else [])]


# ---------------------------------------------------------------------------------------------------- what a run shows


def read_config(run: Path) -> Any:
    return RunDirectory(run).read_config()


def losses(run: Path) -> list[tuple[int, float, float]]:
    """(step, loss, mean of the last steps), at most MAX_POINTS of them."""
    values = []
    for line in (paths.read_text(run / "metrics.jsonl") or "").splitlines():
        try:
            record = json.loads(line)
            values.append((int(record["step"]), float(record["loss"])))
        except (ValueError, KeyError, TypeError, RecursionError):  # the last line may be incomplete
            continue
    sums = np.cumsum([0.0, *(loss for _, loss in values)])
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(0, ends - MEAN_OF)
    means = (sums[ends] - sums[begins]) / (ends - begins) if values else []
    chosen = np.unique(np.linspace(0, len(values) - 1, min(len(values), MAX_POINTS)).astype(int)) if values else []
    return [(*values[i], float(means[i])) for i in chosen]


def preview_files(run: Path) -> list[Path]:
    """The newest previews."""
    steps = sorted((run / "previews").glob("step_*"))
    return sorted(file for file in steps[-1].glob("*.mp4") if not file.is_symlink()) if steps else []


def edits(run: Path) -> dict[str, Entry]:
    """The edits of a run by the names of their files, the newest first."""
    record = read_record(RunDirectory(run), f"edits/{RECORD}")
    files = {name: run / "edits" / name for name in record}
    return {n: record[n] for n, file in files.items() if file.is_file() and not file.is_symlink()}


def source(run: Path) -> Clip:
    """The clip of a run as its edits are: selected frames, resized."""
    c = read_config(run).clip
    try:
        changed = os.stat(c.path).st_mtime_ns
    except OSError:
        changed = 0
    return _load(c.path, changed, c.frames or None, (c.height, c.width), c.start, c.stride, c.fit)


@functools.lru_cache(maxsize=4)
def _load(path: str, changed: int, frames: int | None, size: tuple[int, int], start: int, stride: int, fit: Any):
    return load_video(path, frames=frames, size=size, start=start, stride=stride, fit=fit)


def enlarge(frame: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "height width 3"]:
    """The frame, enlarged by a whole number if it is small."""
    factor = max(1, PAINT_SIDE // max(frame.shape[:2]))
    return frame.repeat(factor, 0).repeat(factor, 1)


def preview_players(run: Path) -> str:
    prompts = read_config(run).edit.prompts
    by_name = dict(zip(file_names(prompts), prompts, strict=True)) if prompts else {}
    files = preview_files(run)
    step = f"step {int(files[0].parent.name.removeprefix('step_'))}" if files else ""
    return players(run, [Entry(by_name.get(file.stem, file.stem), file, kind=step) for file in files])


def edit_players(run: Path, names: Sequence[str]) -> str:
    """The named edits, as many as a page can embed."""
    entries, budget = [], MAX_EMBEDDED // 2
    for name, entry in edits(run).items():
        file = run / "edits" / name
        if name in names and (budget := budget - file.stat().st_size) > 0:
            entries.append(Entry(**{**vars(entry), "video": file}))
    return players(run, entries)


def players(run: Path, entries: Sequence[Entry]) -> str:
    """Source and entries, playing in step, in a frame that has no access to the page."""
    if not entries:
        return ""
    try:
        page = render_page(source(run), read_config(run).clip.prompt, entries, directory=run, sections=IN_FRAME)
    except TavError as error:
        return f"<p>{html.escape(str(error))}</p>"
    return f'<iframe class="players" sandbox="allow-scripts" title="Players" srcdoc="{html.escape(page)}"></iframe>'

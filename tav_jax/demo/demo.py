"""`tav demo`: a clip is drawn, learned, inverted and edited with the embedded model, and judged by its known truth."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8

from tav_jax import Clip, InputError, TuneAVideo
from tav_jax.io.video import side_by_side
from tav_jax.demo import report
from tav_jax.demo.edits import FPS, MODEL, Settings, edits_of, scene_of, source_clip
from tav_jax.demo.judge import Verdict, judge
from tav_jax.demo.world import SpriteClip
from tav_jax.io.progress import progress_bar
from tav_jax.training.run_directory import file_names
from tav_jax.io.video import Edit
from tav_jax.training.run_directory import RunDirectory
from tav_jax.demo.vocabulary import unknown_words

ENLARGED = 4  # a picture of 64 pixels is a stamp on today's screens


@dataclass
class Story:
    """All that the page tells."""

    settings: Settings
    number: int | None  # of the clip; None is the demo's own
    source: SpriteClip
    wanted: list[SpriteClip]
    kinds: list[str]
    edits: list[Edit] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    reconstruction_psnr_db: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> dict:
        """`metrics.json`."""
        means = np.mean([[getattr(v, name) for name in MEASURES] for v in self.verdicts], axis=0)
        return {
            **dict(zip(MEASURES, map(float, means), strict=True)),
            "reconstruction_psnr_db": self.reconstruction_psnr_db,
            "edits": [
                {"prompt": e.prompt, **{name: value for name, value in v._asdict().items() if name != "centres"}}
                for e, v in zip(self.edits, self.verdicts, strict=True)
            ],
            "seconds": self.seconds,
            "settings": asdict(self.settings),
        }


MEASURES = ("edit_accuracy", "trajectory_error_px", "frame_consistency")


def settings_with(**given: int | None) -> Settings:
    """The usual ones, but for what is given."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if chosen.get("steps", 1) < 1:
        raise InputError(f"--steps is {chosen['steps']}; give 1 or more")
    if not 0 <= chosen.get("seed", 0) < 2**31:
        raise InputError(f"--seed is {chosen['seed']}; give a whole number from 0 to {2**31 - 1}")
    return Settings(**chosen)


def checked_folder(out: str | Path) -> Path:
    """New or empty, and writable: said before anything starts."""
    folder = Path(out).expanduser()
    RunDirectory(folder).check_writable()
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; give --out=… another name, or remove it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}); give another --out=…") from error
    return folder


def demo(
    out: str | Path, prompts: Sequence[str] = (), settings: Settings | None = None, *, number: int | None = None
) -> Path:
    """Runs the whole job; gives the page."""
    if number is not None and number < 0:
        raise InputError(f"--clip is {number}; give 0 or more")
    folder = checked_folder(out)
    settings = settings or Settings()
    for text in prompts:
        if unknown := unknown_words(text):
            told = ", ".join(repr(word) for word in unknown)
            say(f"The embedded model has never seen a picture of {told}; it goes by the words it knows.")
    source = source_clip(number, settings.frames)
    if prompts:
        kinds = ["your prompt"] * len(prompts)
        wanted = [replace(source, scene=scene_of(text, source.scene)) for text in prompts]
    else:
        asked = edits_of(source, number or 0)
        kinds, wanted = list(asked), list(asked.values())
    story = Story(settings, number, source, wanted, kinds)
    make(story, list(prompts) or [edit.scene.caption for edit in wanted])
    page = write(story, folder)
    told = story.metrics
    say(
        f"Right in {told['edit_accuracy']:.0%} of the frames; {told['trajectory_error_px']:.1f} pixels from the "
        f"source's path on average.\nThe page to look at: {page}"
    )
    return page


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def stage(story: Story, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    story.seconds[name] = time.perf_counter() - started


def make(story: Story, texts: Sequence[str]) -> None:
    """The method, as anybody would call it."""
    s = story.settings
    with stage(story, "drawing"), progress_bar(s.frames, "drawing") as bar:
        clip = Clip(story.source.frames, FPS)
        bar.update(s.frames)
    with stage(story, "loading"), progress_bar(1, "loading") as bar:
        tav = TuneAVideo.from_pretrained(MODEL, dtype="float32", seed=s.seed)
        bar.update()
    with stage(story, "tuning"):
        tuned = tav.tune(clip, story.source.scene.caption, steps=s.steps, learning_rate=s.learning_rate, seed=s.seed)
        story.losses = [float(loss) for loss in tuned.losses]
    look = sys.stderr.isatty() or None  # a bar, where somebody looks
    with stage(story, "inverting"):
        noise = tav.invert(clip, steps=s.inversion_steps, progress=look)
    with stage(story, "sampling"):
        options = {"steps": s.sampling_steps, "guidance": s.guidance, "strength": s.strength}
        story.edits = tav.sample(texts, latents=noise, progress=look, **options)
    with stage(story, "judging"), progress_bar(len(texts), "judging") as bar:
        for edit, wanted in zip(story.edits, story.wanted, strict=True):
            story.verdicts.append(judge(edit.frames, wanted))
            bar.update()
    with stage(story, "reconstructing"):
        story.reconstruction_psnr_db = reconstruction(tav, clip, story.source.scene.caption, s)


def reconstruction(tav: TuneAVideo, clip: Clip, sentence: str, s: Settings) -> float:
    """The clip inverted and sampled with its own sentence, against what the autoencoder alone makes of it: PSNR, dB."""
    latents = tav.encode_video(clip)
    noise = tav.invert(latents, steps=s.inversion_steps, prompt=sentence)
    again = tav.sample(sentence, latents=noise, steps=s.sampling_steps, guidance=1.0)
    best, ours = (np.asarray(tav.decode_video(x), np.float64) for x in (latents, again.latents))
    return float(-10 * np.log10(max(np.mean((best - ours) ** 2), 1e-12)))


def enlarged(frames: UInt8[np.ndarray, "F h w 3"]) -> UInt8[np.ndarray, "F H W 3"]:
    return frames.repeat(ENLARGED, axis=1).repeat(ENLARGED, axis=2)


def write(story: Story, folder: Path) -> Path:
    source = Clip(enlarged(story.source.frames), FPS)
    large = [Edit(enlarged(e.frames), e.fps, prompt=e.prompt) for e in story.edits]
    videos = {"source": source, **dict(zip(file_names([e.prompt for e in large]), large, strict=True))}
    videos["side-by-side"] = side_by_side(source, large, story.source.scene.caption)
    with progress_bar(2 * len(videos), "writing") as bar:
        for name, video in videos.items():
            for suffix in (".mp4", ".gif"):
                video.save(folder / (name + suffix))
                bar.update()
    (folder / "metrics.json").write_text(json.dumps(story.metrics, indent=2) + "\n")
    page = folder / "report.html"
    page.write_text(report.page(story), encoding="utf-8")
    return page

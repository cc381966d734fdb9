"""The results of `tav demo`: videos, metrics and a report, which is the page of edits with more sections."""

import html
import io
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from tav_jax import Clip, Edit
from tav_jax.demo.edits import FPS, Settings
from tav_jax.demo.evaluation import FIELDS, MEASURES, Evaluation
from tav_jax.demo.world import IMAGE_SIZE, DemoClip
from tav_jax.evaluation.page import GREY, Entry, code, render_page, table
from tav_jax.io.progress import progress_bar
from tav_jax.io.side_by_side import side_by_side
from tav_jax.training.run_directory import file_names

COLOURS = ("#d1495b", "#2e86ab", "#e09f3e", "#6a994e", "#8e6bbf", "#b5838d")  # of the edits
SMOOTHING = 25  # steps over which the smooth loss curve is averaged
SCALE = 4  # the videos are enlarged to 256 pixels
LEAD = """\
A small Stable Diffusion model, pretrained on still images only, was tuned on this clip of $frames frames for $steps
steps. The clip was then inverted to noise, and each edit was sampled from that noise. The edit prompt is used in the
last $strength of the sampling steps; the steps before follow the inversion. No prompt describes the motion: the edits
take it from the clip."""
CUSTOM = "your prompt"  # the kind of edit that is shown for a user's prompt


@dataclass
class DemoResult:
    settings: Settings
    clip_seed: int | None
    source: DemoClip
    kinds: list[str]  # of the edits, such as "style"
    edits: list[Edit] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    reconstruction_psnr_db: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # by stage

    @property
    def metrics(self) -> dict[str, Any]:
        """The content of `metrics.json`."""
        return {
            **{name: float(np.mean([getattr(e, name) for e in self.evaluations])) for name in MEASURES},
            "reconstruction_psnr_db": self.reconstruction_psnr_db,
            "edits": [
                {"prompt": edit.prompt, **{name: x for name, x in evaluation._asdict().items() if name != "centres"}}
                for edit, evaluation in zip(self.edits, self.evaluations, strict=True)
            ],
            "seconds": self.seconds,
            "settings": asdict(self.settings),
        }


def write_results(result: DemoResult, directory: Path) -> Path:
    """Write the videos, `metrics.json` and `report.html`; return the path of the report."""
    source = Clip(_enlarge(result.source.frames), FPS)
    edits = [Edit(_enlarge(edit.frames), edit.fps, prompt=edit.prompt) for edit in result.edits]
    videos = {"source": source, **dict(zip(file_names([edit.prompt for edit in edits]), edits, strict=True))}
    videos["side-by-side"] = side_by_side(source, edits, result.source.scene.caption)
    with progress_bar(2 * len(videos), "writing") as bar:
        for name, video in videos.items():
            for suffix in (".mp4", ".gif"):
                video.save(directory / (name + suffix))
                bar.update()
    (directory / "metrics.json").write_text(json.dumps(result.metrics, indent=2) + "\n")
    report = directory / "report.html"
    report.write_text(render_report(result), encoding="utf-8")
    return report


def _enlarge(frames: UInt8[np.ndarray, "F h w 3"]) -> UInt8[np.ndarray, "F H W 3"]:
    return frames.repeat(SCALE, axis=1).repeat(SCALE, axis=2)


def render_report(result: DemoResult) -> str:
    prompts = [edit.prompt for edit in result.edits]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(prompts))]
    entries = [
        Entry(
            edit.prompt,
            Clip(_enlarge(edit.frames), edit.fps),
            kind=kind,
            note=f"{e.edit_accuracy:.0%} of frames correct, path error {e.trajectory_error_px:.1f} px",
            colour=colour,
        )
        for edit, e, kind, colour in zip(result.edits, result.evaluations, result.kinds, colours, strict=True)
    ]
    source = Clip(_enlarge(result.source.frames), FPS)
    settings = {**asdict(result.settings), "strength": f"{result.settings.strength:.0%}"}
    return render_page(
        source,
        result.source.scene.caption,
        entries,
        source_note=f"motion: {result.source.motion}",
        lead=Template(LEAD).substitute(settings),
        sections=Template((Path(__file__).parent / "sections.html").read_text(encoding="utf-8")).substitute(
            settings,
            paths=_plot_in_page(lambda axes: _draw_paths(axes, result, colours)),
            legend="".join(
                f'<li><i style="background:{colour}"></i>{html.escape(text)}</li>'
                for colour, text in zip([GREY, *colours], ["source", *prompts], strict=True)
            ),
            losses=_plot_in_page(lambda axes: _draw_losses(axes, np.asarray(result.losses))),
            smoothing=min(SMOOTHING, result.settings.steps),
            scores=table([(prompt, _scores(e)) for prompt, e in zip(prompts, result.evaluations, strict=True)]),
            psnr=f"{result.reconstruction_psnr_db:.1f}",
            stages=_stages(result.seconds),
            command=code(_command(result, prompts)),
            python=code(_python(result, prompts)),
            all_settings=html.escape(json.dumps(asdict(result.settings), indent=2)),
        ),
        card_width=150,
    )


def _plot_in_page(draw: Callable[[Any], None]) -> str:
    return plot(draw, (4.4, 4.4)).replace(GREY, "currentColor")


def plot(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """An SVG with a transparent background, in which `draw` has drawn on Matplotlib axes. `size` is in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    grey = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    style: Any = {
        **dict.fromkeys(grey, GREY),
        "svg.fonttype": "none",
        "svg.hashsalt": "tav_jax",
        "font.size": 11,
        "grid.alpha": 0.3,
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(size, layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    # Matplotlib numbers its groups from 1 in every figure. Without these ids, one page can contain several figures.
    return re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])


def _draw_paths(axes: Any, result: DemoResult, colours: list[str]) -> None:
    """The paths as lines, and a group `dots-<frame>` for each frame. The page's script shows one group at a time."""
    centres = np.stack([result.source.centres, *(e.centres for e in result.evaluations)])  # [clips, F, 2]
    widths = [8, *(2 for _ in colours)]
    for path, colour, width in zip(centres, [GREY, *colours], widths, strict=True):
        found = path[np.isfinite(path).all(axis=1)]
        axes.plot(*found.T, color=colour, linewidth=width, alpha=0.35 if colour == GREY else 0.9)
    for frame, points in enumerate(centres.swapaxes(0, 1)):
        axes.scatter(*points.T, c=[GREY, *colours], s=[100, *(30 for _ in colours)], zorder=3, gid=f"dots-{frame}")
    axes.set(xlim=(0, IMAGE_SIZE), ylim=(IMAGE_SIZE, 0), aspect="equal", xlabel="x, pixels", ylabel="y, pixels")
    axes.set(xticks=range(0, IMAGE_SIZE + 1, 16), yticks=range(0, IMAGE_SIZE + 1, 16))


def _draw_losses(axes: Any, losses: Float[np.ndarray, "N"]) -> None:
    window = min(SMOOTHING, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    axes.plot(np.arange(len(losses)) + 1, losses, color=COLOURS[1], alpha=0.35, linewidth=1)
    axes.plot(np.arange(len(smooth)) + 1 + window // 2, smooth, color=COLOURS[1], linewidth=2.5)
    axes.set(xlabel="tuning step", ylabel="loss", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params(axis="x", integer=True)
    axes.grid(axis="y")


def _scores(evaluation: Evaluation) -> dict[str, str]:
    names = ("Colour", "Shape", "Place", "Style", "All four")
    fractions = [f"{getattr(evaluation, name):.0%}" for name in (*FIELDS, "edit_accuracy")]
    others = {
        "Path error": f"{evaluation.trajectory_error_px:.2f} px",
        "Consistency": f"{evaluation.frame_consistency:.3f}",
    }
    return dict(zip(names, fractions, strict=True)) | others


def _stages(seconds: dict[str, float]) -> str:
    longest = max(seconds.values(), default=1.0)
    return "".join(
        f'<tr><th scope="row">{stage}</th><td>{value:.1f} s</td><td style="width:55%"><div class="bar" '
        f'style="width:{100 * value / longest:.1f}%"></div></td></tr>'
        for stage, value in seconds.items()
    )


def _command(result: DemoResult, prompts: list[str]) -> str:
    words, defaults = ["tav demo --out=DIR"], Settings()
    if result.clip_seed is not None:
        words.append(f"--clip={result.clip_seed}")
    for name in ("steps", "seed"):
        if (value := getattr(result.settings, name)) != getattr(defaults, name):
            words.append(f"--{name}={value}")
    if CUSTOM in result.kinds:
        words += [f"--prompt={shlex.quote(prompt)}" for prompt in prompts]
    return " ".join(words)


def _python(result: DemoResult, prompts: list[str]) -> str:
    s = result.settings
    lines = "".join(f"    {prompt!r},\n" for prompt in prompts)
    return f"""\
from tav_jax import Clip, TuneAVideo
from tav_jax.demo.edits import MODEL, source_clip

source = source_clip({result.clip_seed!r}, frames={s.frames})
clip = Clip(source.frames, {FPS})
tav = TuneAVideo.from_pretrained(MODEL, dtype="float32", seed={s.seed})
tav.tune(clip, {result.source.scene.caption!r}, steps={s.steps}, learning_rate={s.learning_rate}, seed={s.seed})
noise = tav.invert(clip, steps={s.inversion_steps})
prompts = [
{lines}]
edits = tav.sample(
    prompts, latents=noise, steps={s.sampling_steps}, guidance={s.guidance}, strength={s.strength}
)
for i, edit in enumerate(edits):
    edit.save(f"edit-{{i}}.mp4")
"""

"""The forms of the page of `tav web`, and its jobs and losses as HTML and tables."""

import html
import shlex
import time
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import pandas as pd  # pyright: ignore[reportMissingImports]

from tav_jax import config as configs
from tav_jax.demo.edits import MODEL
from tav_jax.web import runs
from tav_jax.web.jobs import Job, JobQueue

SHOWN_JOBS = 20


def tune_form(defaults: Any) -> dict[str, Any]:
    """Fields for a new run, by the names of the settings."""
    fields: dict[str, Any] = {}
    info = "One sentence that names the subject, what it does and the scene"
    fields["clip.prompt"] = gr.Textbox(label="Prompt of the clip", info=info, placeholder="a man is skiing")
    info = "One on each line; sampled and shown while it tunes"
    placeholder = "spider man is skiing\na man is skiing, watercolor"
    fields["edit.prompts"] = gr.Textbox(label="Preview prompts", info=info, lines=2, placeholder=placeholder)
    hub = defaults.model.path
    choices = [(f"{hub} (from the hub)", hub), ("Demo model, 64×64, no downloads", str(MODEL))]
    info = "Choose, or enter a directory or a hub id"
    fields["model.path"] = gr.Dropdown(choices, value=hub, label="Model", info=info, allow_custom_value=True)
    with gr.Row():
        fields["clip.frames"] = number("Frames", defaults.clip.frames, "0: all")
        fields["clip.stride"] = number("Stride", defaults.clip.stride, "1: every frame")
        fields["clip.start"] = number("Start", defaults.clip.start, "first frame")
    with gr.Row():
        fields["clip.width"] = number("Width", defaults.clip.width)
        fields["clip.height"] = number("Height", defaults.clip.height)
    with gr.Row():
        fields["train.steps"] = number("Steps", defaults.train.steps)
        fields["train.learning_rate"] = gr.Number(
            label="Learning rate", value=defaults.train.learning_rate, min_width=100
        )
    with gr.Accordion("More settings", open=False):
        choices = list(configs.CHOICES["model.dtype"])
        fields["model.dtype"] = gr.Dropdown(choices, value=defaults.model.dtype, label="Type of the weights")
        with gr.Row():
            fields["train.checkpoint_every"] = number("Checkpoint every", defaults.train.checkpoint_every, "steps")
            fields["train.preview_every"] = number("Preview every", defaults.train.preview_every, "steps; 0: none")
        with gr.Row():
            fields["edit.steps"] = number("Sampling steps", defaults.edit.steps)
            fields["edit.inversion_steps"] = number("Inversion steps", defaults.edit.inversion_steps)
        fields["edit.strength"] = share("Strength of edits", defaults.edit.strength, 0.01)
        fields["seed"] = number("Seed", defaults.seed)
    return fields


def edit_form(defaults: Any) -> dict[str, Any]:
    """Fields for edits, by the names of the settings in section `edit`."""
    fields: dict[str, Any] = {}
    with gr.Row():
        fields["strength"] = share("Strength", defaults.strength, 0.01, "Lower: closer to the clip")
        fields["guidance"] = gr.Number(label="Guidance", value=defaults.guidance, info="Of the prompt", min_width=100)
    with gr.Row():
        fields["steps"] = number("Steps", defaults.steps)
        fields["inversion_steps"] = number("Inversion steps", defaults.inversion_steps)
        choices = list(configs.CHOICES["edit.sampler"])
        fields["sampler"] = gr.Dropdown(choices, value=defaults.sampler, label="Sampler", min_width=120)
    fields["negative_prompt"] = gr.Textbox(label="Negative prompt", placeholder="what to avoid")
    info = "The clip's prompt keeps more of the clip"
    fields["inversion_prompt"] = gr.Textbox(label="Prompt of the inversion", info=info)
    with gr.Accordion("Keep more of the clip", open=False):
        gr.Markdown("Shares of the steps, the first ones, that use what the network computes for the clip. 0: off.")
        fields["self_attention_steps"] = share("Spatial attention", 0, 0, "Layout and motion; 0.5 is usual")
        fields["feature_steps"] = share("Features", 0, 0, "Shapes too; 0.5 to 0.8")
        info = "Changes only what other words say; 0.2 to 0.8"
        fields["cross_attention_steps"] = share("Attention to shared words", 0, 0, info)
        info = "With the attention to shared words: factors, separated by commas"
        fields["equalizer"] = gr.Textbox(label="Show more of words", info=info, placeholder="snow=2")
        info = "Change only where these words are shown, separated by commas"
        fields["blend_words"] = gr.Textbox(label="Blend words", info=info, placeholder="man")
        info = "Share of the steps after which blend words and the mask begin to act"
        fields["blend_start"] = share("Start of blending", defaults.blend_start, 0, info)
    return fields


def mask_editor() -> gr.ImageEditor:
    brush = gr.Brush(colors=["rgb(224, 33, 138)"], color_mode="fixed", default_size=40)
    options: dict[str, Any] = {"sources": (), "transforms": (), "layers": False, "brush": brush, "format": "png"}
    return gr.ImageEditor(label="Mask: paint where the edit may change the clip", visible=False, **options)


def number(label: str, value: int | None, info: str | None = None) -> gr.Number:
    return gr.Number(label=label, value=value, info=info, precision=0, min_width=100)


def share(label: str, value: float, minimum: float, info: str | None = None) -> gr.Slider:
    return gr.Slider(minimum, 1, value=value, step=0.01, label=label, info=info)


def command_box() -> gr.Textbox:
    options: dict[str, Any] = {"lines": 2, "max_lines": 12, "interactive": False, "elem_classes": "command"}
    return gr.Textbox(label="The same on the command line", buttons=["copy"], **options)


def items(text: str | None, separator: str = "\n") -> list[str]:
    return [item.strip() for item in (text or "").split(separator) if item.strip()]


def loss_table(run: Path | None) -> pd.DataFrame:
    points = runs.losses(run) if run else []
    rows = [(step, loss, "each step") for step, loss, _ in points]
    rows += [(step, mean, f"mean of {runs.MEAN_OF}") for step, _, mean in points]
    return pd.DataFrame(rows, columns=["step", "loss", "line"])


def job_status(queue: JobQueue) -> str:
    """What runs or has run last, with its progress."""
    job, waiting = queue.current, sum(job.state == "queued" for job in queue.jobs())
    problem = f"<p>{html.escape(queue.problem)}</p>" if queue.problem else ""
    if job is None:
        return f"{problem}<p>No job yet. Tune on a clip to begin.</p>"
    seconds = max(0, round((job.ended or time.time()) - job.begun))
    name = html.escape(Path(job.run).name)
    text = f"<b>{_state(job)}</b>: {job.words[0]} {name}, {seconds // 60}:{seconds % 60:02} min"
    text += f", {waiting} waiting" if waiting else ""
    if job.state != "running":
        return f"{problem}<p>{text}{_outcome(job)}</p>"
    what, done, total = queue.progress(job) or ("starting", 0, 0)
    count = f" {done} of {total}" if total else ""
    bar = f'<div class="bar"><div style="width: {100 * done / max(total, 1):.1f}%"></div></div>'
    return f"{problem}<p>{text}; {html.escape(what)}{count}</p>{bar}"


def job_table(queue: JobQueue) -> str:
    rows = (
        f"<tr><td>{job.id}</td><td>{_state(job)}</td>"
        f"<td><code>{html.escape(shlex.join(job.command))}</code>{_outcome(job)}</td></tr>"
        for job in queue.jobs()[:SHOWN_JOBS]
    )
    return f"<table>{''.join(rows)}</table>"


def _state(job: Job) -> str:
    return "stopping" if job.state == "running" and job.cancelled else job.state


def _outcome(job: Job) -> str:
    if job.state == "stopped" and job.words[0] == "train":
        return "; saved, “Continue tuning” goes on from there"
    return f": {html.escape(job.message)}" if job.message else ""

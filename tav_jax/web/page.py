"""The page of `tav web`: tune on a clip, watch the run, edit, compare, download.

Everything that takes time is a `tav` command in the queue. The page reads what the commands write, so it shows the same
after a reload, in another browser, or from another server.
"""

import functools
import html
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]

from tav_jax import config as configs
from tav_jax.demo.edits import MODEL
from tav_jax.demo.edits import Settings as DemoSettings
from tav_jax.errors import InputError, TavError
from tav_jax.web import forms, runs
from tav_jax.web.jobs import Job, JobQueue
from tav_jax.web.runs import Workspace

REFRESH = 1.5  # seconds
COMPARED = 3  # edits that are shown at first
# What the model determines, and the fields that are set when it is chosen.
OF_MODEL = ("clip.frames", "clip.width", "clip.height", "train.steps", "train.learning_rate", "model.dtype")
OF_MODEL += ("edit.strength",)
# A frame of players is as high as its contents, and at most most of the window.
HEAD = """<script>addEventListener("message", event => {
  for (const frame of document.querySelectorAll("iframe.players"))
    if (frame.contentWindow === event.source && event.data > 0)
      frame.style.height = Math.min(event.data, Math.max(400, innerHeight * 0.85)) + "px";
});</script>"""
CSS = """
iframe.players { width: 100%; height: 400px; border: 0; border-radius: 8px; }
.job { padding: 8px 0; overflow-wrap: anywhere; } .job p { margin: 0; }
.job .bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
.job .bar div { height: 100%; background: var(--color-accent); }
.job b { display: inline-block; } .job b::first-letter { text-transform: uppercase; }
.jobs table { border: 0; } .jobs td { vertical-align: top; padding: 6px 12px 6px 0; border: 0; }
.jobs tr { border-bottom: 1px solid var(--border-color-primary); }
.command textarea { font-family: ui-monospace, monospace; font-size: .85em; }
.jobs code { overflow-wrap: anywhere; white-space: pre-wrap; font-size: .85em; }
"""


def sentence(method: Callable[..., Any]) -> Callable[..., Any]:
    """Show an error that the user can fix as one sentence."""

    @functools.wraps(method)
    def wrapped(*args: Any) -> Any:
        try:
            return method(*args)
        except (TavError, OSError) as error:
            raise gr.Error(html.escape(str(error)), duration=None, print_exception=False) from error

    return wrapped


class Actions:
    """What happens when something is chosen or clicked. The names are those of the fields, in the forms' order."""

    def __init__(self, workspace: Workspace, queue: JobQueue, max_bytes: int):
        self.workspace, self.queue, self.max_bytes = workspace, queue, max_bytes
        self.tune_names: list[str] = []
        self.edit_names: list[str] = []

    @sentence
    def upload(self, file: str | None) -> tuple[Any, ...]:
        if not file:
            return "", None, ""
        path, clip, text = self.workspace.add_clip(Path(file), self.max_bytes)
        return str(path), runs.enlarge(clip.frames[0]), text

    @sentence
    def take_demo(self) -> tuple[Any, ...]:
        path, caption = self.workspace.demo_clip()
        return *self.upload(str(path)), caption, str(MODEL)

    def choose_model(self, model: str) -> list[Any]:
        """The fields of OF_MODEL: what the demo model was made for, or the defaults."""
        defaults, demo = dict(configs.leaves(configs.get_config())), DemoSettings()
        if model == str(MODEL):
            return [demo.frames, 64, 64, demo.steps, demo.learning_rate, "float32", demo.strength]
        return [defaults[name] for name in OF_MODEL]

    def words_to_tune(self, clip: str, name: str, *values: Any) -> tuple[Path, list[str]]:
        settings = dict(zip(self.tune_names, values, strict=True)) | {"clip.path": clip}
        settings["edit.prompts"] = forms.items(settings["edit.prompts"])
        taken = {job.run for job in self.queue.jobs() if job.state in ("queued", "running")}
        run = self.workspace.new_run(name or settings["clip.prompt"] or "", taken)
        return run, runs.train_words(run, _filled(settings))

    def words_to_edit(self, name: str, prompts: str, masked: bool, mask: Any, force: bool, *values: Any):
        settings = dict(zip(self.edit_names, values, strict=True))
        settings |= {field: forms.items(settings[field], ",") for field in ("equalizer", "blend_words")}
        run = self.workspace.run(name)
        if masked:
            clip, layers = runs.read_config(run).clip, (mask or {}).get("layers") or []
            settings["mask"] = str(self.workspace.save_mask(layers, (clip.height, clip.width)))
        return run, runs.edit_words(run, forms.items(prompts), _filled(settings), force=force)

    def tune_command(self, *values: Any) -> str:
        return _command(self.words_to_tune, values)

    def edit_command(self, *values: Any) -> str:
        return _command(self.words_to_edit, values)

    @sentence
    def tune(self, *values: Any) -> tuple[Any, ...]:
        run, words = self.words_to_tune(*values)
        self.queue.add(run, words)
        return gr.Dropdown(value=run.name), gr.Tabs(selected="watch"), shlex.join(["tav", *words])

    @sentence
    def go_on(self, name: str, steps: int | None) -> str:
        words = runs.continue_words(run := self.workspace.run(name), steps)
        self.queue.add(run, words)
        return shlex.join(["tav", *words])

    @sentence
    def edit(self, *values: Any) -> tuple[Any, ...]:
        run, words = self.words_to_edit(*values)
        self.queue.add(run, words)
        return gr.Tabs(selected="compare"), shlex.join(["tav", *words])

    @sentence
    def cancel(self) -> str:
        """Cancel the job that runs."""
        if (job := self.queue.current) and job.state == "running":
            self.queue.cancel(job.id)
        return forms.job_status(self.queue)

    def form(self, run: Path | None) -> list[Any]:
        """The run's settings for the form of edits, and the first frame of its clip to paint on."""
        if run is None:
            return [gr.skip()] * (len(self.edit_names) + 1)
        values = runs.read_config(run).edit
        texts = {field: ", ".join(values[field]) for field in ("equalizer", "blend_words")}
        try:
            frame = runs.enlarge(runs.source(run).frames[0])
        except TavError:  # the clip has moved; the players and `tav edit` say so
            frame = None
        return [*(texts.get(field, values[field]) for field in self.edit_names), frame]

    @sentence
    def compare(self, name: str, edits: Sequence[str] | None) -> str:
        return runs.edit_players(self.workspace.run(name), edits) if edits else ""

    @sentence
    def download(self, name: str, edit: str | None) -> list[str] | None:
        if not edit:
            return None
        if edit not in runs.edits(run := self.workspace.run(name)):
            raise InputError(f"{edit} is not an edit of {name}; choose one of the list")
        return self.workspace.download(run / "edits" / edit)

    @sentence
    def refresh(self, name: str | None, before: dict[str, Any]) -> list[Any]:
        """Everything that changes by itself. Only what has changed since `before` is sent."""
        found, job = self.workspace.runs(), self.queue.current
        begins = [Path(job.run).name] if job and job.state == "running" else []
        names = [*(begun for begun in begins if begun not in found), *found]
        name = name if name in names else next(iter(names), None)
        run = found.get(name or "")
        previews = runs.preview_files(run) if run else []
        edits = {edit: _modified(run / "edits" / edit) for edit in runs.edits(run)} if run else {}
        now = {
            "status": forms.job_status(self.queue),
            "jobs": forms.job_table(self.queue),
            "log": self.queue.log(job) if job else "",
            "runs": [name, names],
            "losses": [name, _modified(run / "metrics.jsonl") if run else 0],
            "previews": [name, [[str(file), _modified(file)] for file in previews]],
            "edits": [name, edits],
            "form": [name, run is not None],
        }
        values: dict[str, Callable[[], list[Any]]] = {
            "status": lambda: [now["status"], _cancel_button(job)],
            "jobs": lambda: [now["jobs"]],
            "log": lambda: [now["log"]],
            "runs": lambda: [gr.Dropdown(choices=names, value=name)],
            "losses": lambda: [forms.loss_table(run)],
            "previews": lambda: [runs.preview_players(run) if run else ""],
            "edits": lambda: [
                gr.Dropdown(choices=list(edits), value=list(edits)[:COMPARED]),
                gr.Dropdown(choices=list(edits), value=None),
                runs.edit_players(run, list(edits)[:COMPARED]) if run else "",
            ],
            "form": lambda: self.form(run),
        }
        outputs: list[Any] = [now]
        for part, count in zip(values, (2, 1, 1, 1, 1, 1, 3, len(self.edit_names) + 1), strict=True):
            outputs += values[part]() if now[part] != before.get(part) else [gr.skip()] * count
        return outputs


def build(workspace: Workspace, queue: JobQueue, max_bytes: int) -> gr.Blocks:
    """The page. `max_bytes` is the size of the largest clip that is accepted."""
    defaults, actions = configs.get_config(), Actions(workspace, queue, max_bytes)
    with gr.Blocks(title="tav_jax", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown(f"# Tune-A-Video\nRuns in `{workspace.root}`")
        with gr.Row():
            with gr.Column(scale=4, min_width=200):
                status = gr.HTML(elem_classes="job")
            cancel = gr.Button("Cancel", variant="stop", interactive=False, scale=0, min_width=90, size="md")
        run = gr.Dropdown(label="Run", choices=[], allow_custom_value=True)
        clip, seen = gr.State(""), gr.State({})
        with gr.Tabs() as tabs:
            with gr.Tab("Tune", id="tune", visible=not workspace.is_run), gr.Row():
                with gr.Column():
                    limits = f"at most {max_bytes / 1e6:.0f} MB and {runs.MAX_SECONDS // 60} minutes"
                    upload = gr.File(label=f"Clip: a video of {limits}", height=165)
                    use_demo = gr.Button("Try it without downloads: the clip and the model of the demo", size="sm")
                    first = gr.Image(label="First frame", interactive=False, height=260, buttons=[])
                    about = gr.Markdown()
                    name = gr.Textbox(label="Name of the run", placeholder="the prompt")
                with gr.Column():
                    tune_fields = forms.tune_form(defaults)
                    tune_command = forms.command_box()
                    tune = gr.Button("Tune", variant="primary")
            with gr.Tab("Watch", id="watch"):
                plot = gr.LinePlot(x="step", y="loss", color="line", color_title=" ", title="Loss", height=260)
                previews = gr.HTML()
                with gr.Row():
                    in_all = forms.number("Steps in all", 0, "0: as many as before")
                    with gr.Column(scale=3, min_width=200):
                        go_on = gr.Button("Continue tuning")
                        go_on_command = forms.command_box()
            with gr.Tab("Edit", id="edit"), gr.Row():
                with gr.Column():
                    info = "One on each line, each gives a video"
                    prompts = gr.Textbox(label="Prompts", info=info, lines=3, placeholder="spider man is skiing")
                    edit_fields = forms.edit_form(defaults.edit)
                with gr.Column():
                    use_mask = gr.Checkbox(label="Change only what I paint on the first frame")
                    mask = forms.mask_editor()
                    force = gr.Checkbox(label="Overwrite an edit with the same name")
                    edit_command = forms.command_box()
                    edit = gr.Button("Edit", variant="primary")
            with gr.Tab("Compare", id="compare"):
                compared = gr.Dropdown(label="Edits", multiselect=True, choices=[], allow_custom_value=True)
                players = gr.HTML()
                with gr.Row():
                    chosen = gr.Dropdown(label="Download", choices=[], value=None, allow_custom_value=True)
                    files = gr.File(label="MP4 and GIF", interactive=False, height=120)
            with gr.Tab("Jobs", id="jobs"):
                jobs = gr.HTML(elem_classes="jobs")
                with gr.Accordion("Output of this job, or of the last one", open=False):
                    log = gr.Textbox(show_label=False, lines=12, max_lines=12, interactive=False)

        actions.tune_names, actions.edit_names = list(tune_fields), list(edit_fields)
        to_tune = [clip, name, *tune_fields.values()]
        to_edit = [run, prompts, use_mask, mask, force, *edit_fields.values()]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        upload.change(actions.upload, upload, [clip, first, about], api_name="upload")
        demo_outputs = [clip, first, about, tune_fields["clip.prompt"], tune_fields["model.path"]]
        use_demo.click(actions.take_demo, None, demo_outputs, api_name="demo")
        of_model = [tune_fields[field] for field in OF_MODEL]
        tune_fields["model.path"].change(actions.choose_model, tune_fields["model.path"], of_model, **quiet)
        tune.click(actions.tune, to_tune, [run, tabs, tune_command], api_name="tune")
        go_on.click(actions.go_on, [run, in_all], go_on_command, api_name="continue")
        edit.click(actions.edit, to_edit, [tabs, edit_command], api_name="edit")
        cancel.click(actions.cancel, None, status, api_name="cancel")
        use_mask.change(lambda on: gr.ImageEditor(visible=on), use_mask, mask, **quiet)
        commands = ((to_tune, actions.tune_command, tune_command), (to_edit, actions.edit_command, edit_command))
        for fields, command, box in commands:
            events = [*(field.change for field in fields), *([mask.input] if mask in fields else [])]
            gr.on(events, command, fields, box, trigger_mode="always_last", **quiet)
        compared.input(actions.compare, [run, compared], players, **quiet)
        chosen.input(actions.download, [run, chosen], files, api_name="download")
        outputs = [seen, status, cancel, jobs, log, run, plot, previews, compared, chosen, players]
        outputs += [*edit_fields.values(), mask]
        run.input(actions.refresh, [run, seen], outputs, **quiet)
        page.load(actions.refresh, [run, seen], outputs, api_name="show", show_progress="hidden")
        gr.Timer(REFRESH).tick(actions.refresh, [run, seen], outputs, **quiet)
    return page.queue(default_concurrency_limit=4)


def launch(page: gr.Blocks, **options: Any) -> tuple[Any, str, str | None]:
    """Start the server. The page loads nothing from other servers."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    off: dict[str, Any] = dict.fromkeys(("run_history", "ssr_mode", "pwa", "mcp_server", "enable_monitoring"), False)
    off |= {"allowed_paths": [], "footer_links": []}
    look = {"theme": theme, "css": CSS, "head": HEAD}
    return page.launch(prevent_thread_lock=True, quiet=True, **off, **look, **options)


def _filled(settings: dict[str, Any]) -> dict[str, Any]:
    """Without fields that were emptied."""
    return {name: value for name, value in settings.items() if value is not None}


def _command(words: Callable[..., tuple[Path, list[str]]], values: Sequence[Any]) -> str:
    try:
        return shlex.join(["tav", *words(*values)[1]])
    except TavError as error:
        return f"# {error}"


def _cancel_button(job: Job | None) -> gr.Button:
    running = job if job and job.state == "running" else None
    return gr.Button("Kill" if running and running.cancelled else "Cancel", interactive=running is not None)


def _modified(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0

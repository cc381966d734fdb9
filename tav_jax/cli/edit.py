"""`tav edit`: sample edited clips. All prompts share one inversion and one compilation."""

import argparse
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from tav_jax import config as configs
from tav_jax.cli.settings import silence_background_tracebacks
from tav_jax.diffusion.windows import check_length
from tav_jax.distributed import compilation_cache, memory, processes
from tav_jax.errors import InputError
from tav_jax.evaluation.index import PAGE, is_foreign, update_index
from tav_jax.evaluation.page import Entry
from tav_jax.io.progress import counter, progress_bar
from tav_jax.io.side_by_side import grid_shape, side_by_side
from tav_jax.io.video import Clip, Edit
from tav_jax.pipeline import TuneAVideo
from tav_jax.training import editing, source_clip
from tav_jax.training.run import Run, publish_video
from tav_jax.training.run_directory import RunDirectory, file_names

MAX_SUFFIX = 60  # characters of a file name for settings


def run(arguments: argparse.Namespace) -> int:
    silence_background_tracebacks()
    compilation_cache.enable()
    processes.initialize()
    training_run = Run.open(arguments.workdir)
    for name in training_run.config.edit:
        if (value := getattr(arguments, name, None)) is not None:
            training_run.config.edit[name] = tuple(value) if isinstance(value, list) else value
    training_run.config = configs.validate(training_run.config)
    if arguments.mask:
        training_run.config.edit.mask = source_clip.absolute(arguments.mask)
    if arguments.clip is not None:
        training_run.config.clip.path = source_clip.absolute(arguments.clip)
    prompts = arguments.prompt or training_run.config.edit.prompts
    options = {"inversion": not arguments.no_inversion, "seeds": arguments.seed, "force": arguments.force}
    options["command"] = command_words(arguments)
    suffix = ".gif" if arguments.gif else ".mp4"
    paths = edit(training_run, prompts, step=arguments.step, out=arguments.out, suffix=suffix, **options)
    if processes.is_primary():
        print("\n".join(f"Wrote {path}" for path in paths))
    return 0


def command_words(arguments: argparse.Namespace) -> list[str]:
    """The command line, without its prompts and seeds, and without --force."""
    words = ["tav", "edit"]
    for name, value in vars(arguments).items():
        given = value is not None and value is not False and value != []
        if given and name not in ("command", "settings", "prompt", "seed", "force"):
            option = f"--{name.replace('_', '-')}"
            values = value if isinstance(value, list) else [value]
            repeated = [option if value is True else f"{option}={one}" for one in values]
            words += [option, *map(str, values)] if name == "window" else repeated  # that is one option with two values
    return words


def edit(
    run: Run,
    prompts: Sequence[str],
    *,
    step: int | None = None,
    out: str | None = None,
    inversion: bool = True,
    seeds: Sequence[int] = (),
    suffix: str = ".mp4",
    force: bool = False,
    command: Sequence[str] = (),
) -> list[str]:
    """Sample the prompts with the run's settings. Writes a video for each prompt, one with all of them side by side and
    a page; returns their paths. `step` is the step of the checkpoint, by default the newest. `seeds` are those of
    the noise without `inversion`, by default 0. The page shows `command` with the prompt and the seed of each edit."""
    settings = run.config.edit
    if not prompts:
        raise InputError("there is no prompt to edit with; give --prompt=… or set edit.prompts in the config")
    editing.check(run.config, prompts, inversion=inversion)
    if inversion:
        if seeds:
            raise InputError(
                f"--seed={seeds[0]} has no effect on edits that start from the inverted clip; add --no-inversion to "
                "start from random noise, or leave --seed out"
            )
    elif settings.strength < 1:
        raise InputError(
            f"strength is {settings.strength:g}, but --no-inversion leaves no clip to keep; add --strength=1"
        )
    options = {"step": step, "out": out, "inversion": inversion, "seeds": list(seeds), "suffix": suffix, "force": force}
    options |= {f"edit.{name}": value for name, value in settings.items()}
    processes.check_same({"prompts": list(prompts), **options})
    c = run.config.clip
    outputs = _outputs(prompts, (None,) if inversion else seeds or (0,))
    grid_shape(len(outputs) + 1, c.height, c.width)  # refuses more edits than fit into the video of all
    compared = (run.directory.read_config().edit.to_dict(), settings.to_dict(), step)
    changed, ending = changed_settings(*compared), settings_suffix(*compared) + suffix
    directory = RunDirectory(out) if out else run.directory
    prefix = "" if out else "edits/"
    combined = file_names(["side by side " + ", ".join(prompts)])[0] + _seeds_suffix([] if inversion else seeds or (0,))
    names = [f"{prefix}{name}{ending}" for name in (*(name for _, _, name in outputs), combined)]
    processes.run_on_primary("checking the outputs", lambda: _check_outputs(directory, prefix, () if force else names))

    run.directory.remove_scratch()
    clip = run.load_clip(run.checkpoints.read_metadata(step).get("clip"))
    check_length(settings.window, len(clip.frames))
    mask = editing.mask(run.config, len(clip.frames))
    tav = TuneAVideo.restore(run.directory, step=step, run=run)
    step = run.checkpoints.newest if step is None else step  # after restoring, in case training has removed it before
    tav.source = clip
    inverted = editing.invert_cached(run, tav, clip, step) if inversion else None
    sampling = editing.sampling_options(run.config, inverted, mask)
    edits: list[Edit] = []
    for seed in dict.fromkeys(seed for _, seed, _ in outputs):
        if inverted is None:
            sampling["latents"] = tav.noise(seed or 0, len(clip.frames), clip.frames.shape[1:3])
        selected = [prompt for prompt, its_seed, _ in outputs if its_seed == seed]
        edits += sample_in_batches(tav, selected, sampling)

    videos = [Clip(sampled.frames, sampled.fps, sampled.audio) for sampled in edits]
    for video, name in zip([*videos, side_by_side(clip, edits, c.prompt)], names, strict=True):
        publish_video(directory, video, name)
    entries, restricted = {}, bool(settings.blend_words or settings.mask)
    for video, sampled, (prompt, seed, _), name in zip(videos, edits, outputs, names, strict=False):
        again = shlex.join([*command, f"--prompt={prompt}", *([] if seed is None else [f"--seed={seed}"])])
        shown = {
            key: ", ".join(map(str, value)) if isinstance(value, tuple) else value for key, value in changed.items()
        }
        shown |= {} if seed is None else {"seed": seed}
        entry = Entry(prompt, video, shown, again if command else "", mask=sampled.mask if restricted else None)
        entries[name.removeprefix(prefix)] = entry
    page = processes.run_on_primary(
        "writing the page", lambda: update_index(directory, prefix, clip, c.prompt, entries)
    )
    return [*(str(directory / name) for name in names), page]


def _check_outputs(directory: RunDirectory, prefix: str, names: Sequence[str]) -> None:
    directory.check_writable()
    if names and is_foreign(directory, prefix + PAGE):
        page = directory / (prefix + PAGE)
        raise InputError(f"{page} is not a page of `tav edit`; add --force to overwrite it, or give another --out")
    if existing := [name for name in names if (directory / name).exists()]:
        raise InputError(f"{directory / existing[0]} exists already; add --force to overwrite, or give another --out")


def _outputs(prompts: Sequence[str], seeds: Sequence[int | None]) -> list[tuple[str, int | None, str]]:
    """(prompt, seed, name) of each video. Repeated prompts are dropped."""
    prompts = list(dict.fromkeys(prompts))
    return [
        (prompt, seed, name + _seeds_suffix([seed]))
        for seed in dict.fromkeys(seeds)
        for prompt, name in zip(prompts, file_names(prompts), strict=True)
    ]


def changed_settings(config: Mapping[str, Any], used: Mapping[str, Any], step: int | None = None) -> dict[str, Any]:
    """What differs from the run's `edit` settings, and the step of a checkpoint that was chosen."""
    changed = {name: value for name, value in used.items() if value != config[name] and name != "prompts"}
    return changed | ({} if step is None else {"step": step})


def settings_suffix(config: Mapping[str, Any], used: Mapping[str, Any], step: int | None = None) -> str:
    """The part of a file name that tells what differs, such as `-strength0.6`. Different settings have different
    suffixes."""
    changed = changed_settings(config, used, step)
    text = "".join(f"-{name.replace('_', '-')}{_value_text(value)}" for name, value in changed.items())
    return text if len(text) <= MAX_SUFFIX else f"-settings-{_digest(changed)}"


def _value_text(value: Any) -> str:
    """A number as it is; the letters and digits of a text, with a digest if they do not determine it."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value).removesuffix(".0")
    text = value if isinstance(value, str) else json.dumps(value, default=list)
    slug = re.sub(r"[^a-z0-9.+]+", "-", text.rsplit("/", 1)[-1].lower()).strip("-")  # of a path, the file's name
    exact = re.fullmatch(r"[a-z0-9.+]+( [a-z0-9.+]+)*", text)
    return f"-{slug}" if exact else f"-{slug[:24]}-{_digest(text)}"


def _seeds_suffix(seeds: Sequence[int | None]) -> str:
    text = "".join(f"-{seed}" for seed in dict.fromkeys(seeds) if seed is not None)
    return "" if not text else f"-seed{text[1:]}" if len(text) <= MAX_SUFFIX else f"-seeds-{_digest(seeds)}"


def _digest(value: Any, size: int = 4) -> str:
    text = json.dumps(value, sort_keys=True, default=list)
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def sample_in_batches(tav: TuneAVideo, prompts: Sequence[str], options: dict[str, Any]) -> list[Edit]:
    """Sample as many prompts at a time as fit in memory. The last batch is padded, to be compiled only once."""
    fitting = memory.prompt_batch_size(
        len(prompts), tav.memory_estimator.prompt_bytes(options["latents"], options["window"])
    )
    size = min(processes.gather("the batch size", fitting))
    edits: list[Edit] = []
    with progress_bar(-(-len(prompts) // size) * options["steps"], "sampling") as bar:
        for begin in range(0, len(prompts), size):
            batch = list(prompts[begin : begin + size])
            padded = batch + batch[:1] * (size - len(batch))
            edits += tav.sample(padded, progress=counter(bar), **options)[: len(batch)]
    return edits

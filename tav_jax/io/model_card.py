"""The README.md of an exported pipeline: a model card of the Hugging Face hub."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tav_jax.errors import short_repr
from tav_jax.io.diffusers_layout import MAX_CONFIG

# Licences of the base models on the hub, by the names that the hub has for them.
LICENSES = {
    r"(CompVis|runwayml|stable-diffusion-v1-5)/stable-diffusion-v1-\d": "creativeml-openrail-m",
    r"(stabilityai|sd2-community)/stable-diffusion-2(-1)?(-base)?": "openrail++",
}
UNKNOWN_LICENSE = "other"

CARD = """\
---
{metadata}---

# {title}

{summary}

| | |
|---|---|
{table}
{scores}
{usage}"""
VIDEO_USAGE = """\
## Load it

With tav_jax:

```python
from tav_jax import TuneAVideo

tav = TuneAVideo.from_pretrained("{name}")
tav.sample({prompt!r}, frames={frames}, size={size}).save("sample.mp4")
```

With the [official code](https://github.com/showlab/Tune-A-Video), whose names the UNet's tensors have:

```python
from tuneavideo.models.unet import UNet3DConditionModel
from tuneavideo.pipelines.pipeline_tuneavideo import TuneAVideoPipeline

unet = UNet3DConditionModel.from_pretrained("{name}", subfolder="unet")
pipeline = TuneAVideoPipeline.from_pretrained({base!r}, unet=unet)
```

With Diffusers, which has no 3D UNet of this kind, load the 2D part (no temporal layers; it generates images):

```python
TuneAVideo.from_pretrained("{name}").save_pretrained("{local}-2d", two_d=True)  # or: tav export --two-d

from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained("{local}-2d")
```
"""
TWO_D_USAGE = """\
## Load it

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{name}")
pipeline({prompt!r}).images[0].save("sample.png")
```

`TuneAVideo.from_pretrained("{name}")` of tav_jax adds new temporal layers to it, which can be tuned on another clip.
"""
SUMMARY = {
    False: "A Stable Diffusion pipeline whose UNet is inflated to video, with temporal layers, and tuned on one clip.",
    True: "The 2D part of a Stable Diffusion pipeline that was tuned on one clip. The temporal layers are dropped: it "
    "generates images, not videos.",
}


@dataclass(frozen=True)
class Origin:
    """Where the weights of a pipeline come from."""

    settings: Mapping[str, str] = field(default_factory=dict)  # rows of the table
    scores: Sequence[Mapping[str, Any]] = ()  # of edits; a row has the edit's prompt, and numbers by their names
    frames: int = 24
    size: tuple[int, int] = (512, 512)

    @classmethod
    def of_run(cls, config: Any, step: int, scores: str | None) -> "Origin":
        """From the config of a run, the step of the checkpoint, and the file with the scores of its edits."""
        c, t, e = config.clip, config.train, config.edit
        every = f", every {c.stride} frames" if c.stride > 1 else ""
        settings = {
            "clip": f"{Path(c.path).name}: {c.frames or 'all'} frames of {c.height} × {c.width} from {c.start}{every}",
            "tuning": f"{step} steps, learning rate {t.learning_rate:g}, weight decay {t.weight_decay:g}, seed "
            f"{config.seed}" + (f", windows of {t.window} frames" if t.window else ""),
            "trained modules": ", ".join(t.trainable),
            "LoRA": ", ".join(Path(file).name for file in config.model.lora),
            "edits": f"{e.steps} steps of {e.sampler}, {e.inversion_steps} of inversion, guidance {e.guidance:g}, "
            f"strength {e.strength:g}",
        }
        settings = {name: value for name, value in settings.items() if value}
        return cls(settings, _read_scores(scores), c.frames or 24, (c.height, c.width))


def _read_scores(text: str | None) -> list[dict[str, Any]]:
    """The rows of a run's scores; none if the file is not one of `tav score`."""
    try:
        rows = json.loads(text or "")["edits"]
        return [{str(name): value for name, value in row.items()} for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def model_card(source: str, root: Path, name: str, prompt: str, *, two_d: bool, origin: Origin) -> str:
    """The card of the pipeline `name`, a directory or a repository, of the base model `source` in directory `root`."""
    from huggingface_hub import ModelCardData  # slow to import

    from tav_jax import __version__

    task = "text-to-image" if two_d else "text-to-video"
    metadata = ModelCardData(
        base_model=source if source.count("/") == 1 and "://" not in source else None,
        library_name="diffusers",
        license=base_license(source, root),
        pipeline_tag=task,
        tags=[task, "tune-a-video"],
    )
    rows = {
        "base model": source or "unknown",
        "prompt of the tuning": json.dumps(prompt, ensure_ascii=False) if prompt else "unknown",
        **origin.settings,
    }
    version = f"[tav_jax](https://arxiv.org/abs/2212.11565) {__version__}, an implementation of Tune-A-Video"
    table = [f"| {row} | {_cell(value)} |" for row, value in rows.items()] + [f"| written by | {version} |"]
    values = {
        "name": name,
        "local": name.rpartition("/")[2],
        "base": source or "the base model",
        "prompt": prompt or "a prompt",
        "frames": origin.frames,
        "size": origin.size,
    }
    return CARD.format(
        metadata=metadata.to_yaml() + "\n",
        title=name.rpartition("/")[2],
        summary=SUMMARY[two_d],
        table="\n".join(table),
        scores=_score_table(origin.scores),
        usage=(TWO_D_USAGE if two_d else VIDEO_USAGE).format(**values),
    )


def _score_table(rows: Sequence[Mapping[str, Any]]) -> str:
    numbers = [{n: x for n, x in row.items() if type(x) in (int, float)} for row in rows]
    names = list(dict.fromkeys(name for row in numbers for name in row))
    if not names:
        return ""
    lines = [["prompt", *names], ["---"] * (1 + len(names))]
    for row, values in zip(rows, numbers, strict=True):
        lines.append([_cell(row.get("prompt", "")), *(f"{values[n]:.4g}" if n in values else "–" for n in names)])
    return "\n## Scores of edits\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    """A value in a Markdown table. Prompts and names of files may have any characters."""
    text = str(value) if str(value).isprintable() else short_repr(str(value))
    return text.replace("|", "\\|").replace("<", "&lt;")


def base_license(source: str, root: Path) -> str:
    """The licence of the base model: from its own model card, else by its hub id."""
    from huggingface_hub.repocard import metadata_load

    card = root / "README.md"
    try:
        found = metadata_load(card) if card.is_file() and card.stat().st_size <= MAX_CONFIG else None
    except Exception:  # not YAML, not text, or not readable: it is not needed
        found = None
    license_name = (found or {}).get("license")
    if isinstance(license_name, str) and re.fullmatch(r"[a-z0-9.+-]{1,60}", license_name):
        return license_name
    return next((x for ids, x in LICENSES.items() if re.fullmatch(ids, source, re.I)), UNKNOWN_LICENSE)

"""What a run says while it goes: `metrics.jsonl` always, TensorBoard and Weights & Biases where asked for."""

import importlib.util
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tav_jax.distributed import processes
from tav_jax.errors import MissingError
from tav_jax.training.run_directory import RunDirectory

FILE = "metrics.jsonl"
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_installed(*, tensorboard: bool, wandb: str) -> None:
    """Before anything is loaded: are the asked-for loggers there?"""
    for name, wanted in (("tensorboard", tensorboard), ("wandb", bool(wandb))):
        if wanted and importlib.util.find_spec(_PACKAGES[name]) is None:
            raise MissingError(
                f"log.{name} is asked for and {_PACKAGES[name]} is not installed; `pip install 'tav_jax[{name}]'`, or "
                f"leave log.{name} at its default"
            )


class Metrics:
    """One line a step, each step once: lines past `step`, left by a run that was stopped, are dropped. Of several
    processes the first one writes."""

    def __init__(self, workdir: RunDirectory, step: int, *, tensorboard: bool = False, wandb: str = "", config: Any = None):
        self.workdir = workdir
        kept = [line for line in (workdir.read(FILE) or "").splitlines() if _step(line) <= step]
        workdir.write(FILE, "".join(line + "\n" for line in kept))
        self.local = workdir.local / FILE
        if workdir.remote:
            self.local.write_text("".join(line + "\n" for line in kept))
        self.writes = processes.is_primary()
        self.file = (self.local if self.writes else Path(os.devnull)).open("a", buffering=1)
        self.before = time.perf_counter()
        self.board = self.wandb = None
        if not self.writes:
            return
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.board = SummaryWriter(str(workdir.local / "tensorboard"), purge_step=step + 1)
        if wandb:
            import wandb as client  # pyright: ignore[reportMissingImports]

            name = str(workdir).rstrip("/").rsplit("/", 1)[-1]
            self.wandb = client.init(project=wandb, name=name, config=config, resume="allow", dir=str(workdir.local))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = time.perf_counter()
        values = {**values, "seconds": round(now - self.before, 4)}
        self.before = now
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(f"train/{name}", value, step)
        if self.wandb:
            self.wandb.log(dict(values), step=step)

    def preview(self, step: int, name: str, frames: np.ndarray) -> None:
        """A preview as a strip of at most eight frames."""
        chosen = frames[np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)]
        strip = np.concatenate(list(chosen), axis=1)  # [H, n·W, 3]
        if self.board:
            self.board.add_image(f"preview/{name}", strip, step, dataformats="HWC")
        if self.wandb:
            import wandb as client  # pyright: ignore[reportMissingImports]

            self.wandb.log({f"preview/{name}": client.Image(strip)}, step=step)

    def publish(self) -> None:
        """The lines so far, for good: a checkpoint must not outlive the lines of its steps. A bucket cannot append, so
        there they are put in place as a whole."""
        if not self.writes:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.workdir.remote:
            (self.workdir / FILE).write_bytes(self.local.read_bytes())
            if self.board:
                self.board.flush()
                self.workdir.publish_directory("tensorboard")

    def close(self) -> None:
        self.file.flush()
        self.publish()
        self.file.close()
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


def _step(line: str) -> float:
    """The line's step; a line that was cut off by a kill belongs to none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

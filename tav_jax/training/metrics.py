"""Metrics of a run: always `metrics.jsonl`, and TensorBoard and Weights & Biases if the config asks for them."""

import importlib.util
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tav_jax.distributed import processes
from tav_jax.errors import MissingError
from tav_jax.training.run_directory import RunDirectory

FILE = "metrics.jsonl"
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_installed(*, tensorboard: bool, wandb: str) -> None:
    """Refuse a config that asks for a logger whose package is not installed."""
    for name, wanted in (("tensorboard", tensorboard), ("wandb", bool(wandb))):
        if wanted and importlib.util.find_spec(_PACKAGES[name]) is None:
            raise MissingError(
                f"log.{name} is set and {_PACKAGES[name]} is not installed; `pip install 'tav_jax[{name}]'`, or leave "
                f"log.{name} at its default"
            )


class Metrics:
    """One line for each step. Lines after `step`, left by a run that was killed, are dropped. Of several processes the
    first one writes."""

    def __init__(
        self, directory: RunDirectory, step: int, *, tensorboard: bool = False, wandb: str = "", config: Any = None
    ):
        self.directory = directory
        text = "".join(line + "\n" for line in (directory.read(FILE) or "").splitlines() if _step_of_line(line) <= step)
        directory.write(FILE, text)
        self.local = directory.local / FILE
        if directory.remote:
            self.local.write_text(text)
        self.writes = processes.is_primary()
        self.file = (self.local if self.writes else Path(os.devnull)).open("a", buffering=1)
        self.last_time = time.perf_counter()
        self.tensorboard = self.wandb = None
        if not self.writes:
            return
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.tensorboard = SummaryWriter(str(directory.local / "tensorboard"), purge_step=step + 1)
        if wandb:
            import wandb as client  # pyright: ignore[reportMissingImports]

            name = str(directory).rstrip("/").rsplit("/", 1)[-1]
            self.wandb = client.init(project=wandb, name=name, config=config, resume="allow", dir=str(directory.local))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = time.perf_counter()
        values = {**values, "seconds": round(now - self.last_time, 4)}
        self.last_time = now
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(f"train/{name}", value, step)
        if self.wandb:
            self.wandb.log(dict(values), step=step)

    def preview(self, step: int, name: str, frames: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Log at most eight frames side by side as one image."""
        chosen = frames[np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)]
        image = np.concatenate(list(chosen), axis=1)  # [H, n·W, 3]
        if self.tensorboard:
            self.tensorboard.add_image(f"preview/{name}", image, step, dataformats="HWC")
        if self.wandb:
            import wandb as client  # pyright: ignore[reportMissingImports]

            self.wandb.log({f"preview/{name}": client.Image(image)}, step=step)

    def publish(self) -> None:
        """Sync the lines to disk, or upload the file to the bucket. Called before a checkpoint is saved: a checkpoint
        whose steps have no lines would leave a gap."""
        if not self.writes:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        if self.directory.remote:
            (self.directory / FILE).write_bytes(self.local.read_bytes())
            if self.tensorboard:
                self.tensorboard.flush()
                self.directory.publish_directory("tensorboard")

    def close(self) -> None:
        self.file.flush()
        self.publish()
        self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def _step_of_line(line: str) -> float:
    """Infinity for a line that a kill has cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")

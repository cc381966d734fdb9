"""Metrics of a run, in `metrics.jsonl` and, if the config says so, in TensorBoard and Weights & Biases."""

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from tav_jax.distributed import processes
from tav_jax.errors import MissingError, install_command
from tav_jax.io import paths
from tav_jax.training.derived import read_steps
from tav_jax.training.run_directory import RunDirectory

FILE = "metrics.jsonl"


def check_installed(*, tensorboard: bool, wandb: str) -> None:
    """Refuse a logger whose package is not installed."""
    for name, package, wanted in (("tensorboard", "tensorboardX", tensorboard), ("wandb", "wandb", wandb)):
        if wanted and importlib.util.find_spec(package) is None:
            fix = f"`{install_command(name)}`, or leave log.{name} at its default"
            raise MissingError(f"log.{name} is set and {package} is not installed; {fix}")


class Metrics:
    """Writes one line for each step, in process 0 only. When a run continues at `step`, the lines of later steps, from
    before it was killed, are removed."""

    def __init__(
        self, directory: RunDirectory, step: int, *, tensorboard: bool = False, wandb: str = "", config: Any = None
    ):
        self.directory = directory
        lines = processes.run_on_primary("reading the metrics", lambda: read_steps(directory, FILE, step, print))
        text = "".join(f"{line}\n" for line in lines)
        directory.write(FILE, text)
        self.local = directory.local / FILE
        if directory.remote:
            self.local.write_text(text)
        self.primary = processes.is_primary()
        self.file = (self.local if self.primary else Path(os.devnull)).open("a", buffering=1)
        self.last_time = time.perf_counter()
        self.tensorboard = self.wandb = None
        if tensorboard and self.primary:
            from tensorboardX import SummaryWriter

            self.tensorboard = SummaryWriter(str(directory.make_directory("tensorboard")), purge_step=step + 1)
        if wandb and self.primary:
            import wandb as client  # pyright: ignore[reportMissingImports]

            name = str(directory).rstrip("/").rsplit("/", 1)[-1]
            self.wandb = client.init(project=wandb, name=name, config=config, resume="allow", dir=str(directory.local))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with paths.reporting(self.local):
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        if self.tensorboard:
            for name, value in values.items():
                self.tensorboard.add_scalar(f"train/{name}", value, step)
        if self.wandb:
            self.wandb.log(dict(values), step=step)

    def seconds_per_step(self, count: int) -> float:
        """The time since the previous steps were fetched, for each of the `count` steps that were fetched now."""
        if not count:
            return 0.0
        begin, self.last_time = self.last_time, time.perf_counter()
        return round((self.last_time - begin) / count, 4)

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """For work between two steps: its time is not part of a step."""
        began = time.perf_counter()
        yield
        self.last_time += time.perf_counter() - began

    def log_preview(self, step: int, name: str, frames: UInt8[np.ndarray, "F H W 3"]) -> None:
        """Log at most eight frames side by side as one image."""
        chosen = frames[np.linspace(0, len(frames) - 1, min(8, len(frames))).round().astype(int)]
        image = np.concatenate(list(chosen), axis=1)  # [H, n·W, 3]
        if self.tensorboard:
            self.tensorboard.add_image(f"preview/{name}", image, step, dataformats="HWC")
        if self.wandb:
            import wandb as client  # pyright: ignore[reportMissingImports]

            self.wandb.log({f"preview/{name}": client.Image(image)}, step=step)

    def publish(self) -> None:
        """Sync the file to disk or upload it to the bucket. Must precede saving a checkpoint, because a run that
        continues there does not write the earlier lines again."""
        if not self.primary:
            return
        with paths.reporting(self.directory / FILE):
            self.file.flush()
            os.fsync(self.file.fileno())
            if self.directory.remote:
                (self.directory / FILE).write_bytes(self.local.read_bytes())
                if self.tensorboard:
                    self.tensorboard.flush()
                    self.directory.publish_directory("tensorboard")

    def close(self) -> None:
        try:
            self.publish()
        finally:
            with contextlib.suppress(OSError):  # reported by `publish`
                self.file.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()

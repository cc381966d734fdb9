"""Progress bars."""

import builtins
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tav_jax.distributed import processes

Progress = Callable[[int], None] | bool | None  # called with the number of steps done; True for a bar
MEAN_OF = 50  # steps
SHOW = "TAV_PROGRESS"  # environment variable with which bars are shown in any output, for a program that reads it


def progress_bar(total: int, description: str, show: bool | None = None, *, leave: bool = True) -> Any:
    """A tqdm bar, by default shown in a terminal or a notebook, and by the first process only. With `leave=False` it is
    cleared at the end."""
    from tqdm.auto import tqdm

    if show is None:
        interactive = hasattr(builtins, "__IPYTHON__") or sys.stderr.isatty() or bool(os.environ.get(SHOW))
        show = processes.is_primary() and interactive
    return tqdm(total=total, desc=description, disable=not show, leave=leave)


@contextmanager
def reporter(progress: Progress, steps: int, description: str) -> Iterator[Callable[[int], None] | None]:
    """The function to call with the number of steps done, or None. If `progress` is True, or None in a terminal or a
    notebook, it updates a new bar."""
    if progress is None or progress is True:
        with progress_bar(steps, description, progress) as bar:
            yield counter(bar)
    else:
        yield progress or None


def counter(bar: Any) -> Callable[[int], None] | None:
    """A function that sets a bar to its present count plus the number of steps done; None for a hidden bar."""
    start = bar.n
    return None if bar.disable else lambda done: bar.update(start + done - bar.n)


class MeanLoss:
    """Shows the mean loss of the last steps beside a bar. That of one step depends mostly on its random timestep."""

    def __init__(self, bar: Any):
        self.bar, self.losses = bar, deque(maxlen=MEAN_OF)

    def step(self, loss: float) -> None:
        self.losses.append(loss)
        self.bar.set_postfix({"mean loss": f"{sum(self.losses) / len(self.losses):.4f}"}, refresh=False)
        self.bar.update()

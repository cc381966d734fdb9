"""Bars, for whoever looks."""

import builtins
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tav_jax import processes

Progress = Callable[[int], None] | bool | None


def progress_bar(total: int, what: str, show: bool | None = None):
    """Shown where somebody looks: at a terminal or in a notebook, and by the first process only."""
    from tqdm.auto import tqdm

    if show is None:
        show = processes.is_first() and (hasattr(builtins, "__IPYTHON__") or sys.stderr.isatty())
    return tqdm(total=total, desc=what, disable=not show)


@contextlib.contextmanager
def shown(progress: Progress, steps: int, what: str) -> Iterator[Callable[[int], None] | None]:
    """A walk's `progress` as its caller gave it: a function, True for a bar, or nothing."""
    if progress is True:
        with progress_bar(steps, what, True) as bar:
            yield counter(bar)
    else:
        yield progress or None


def counter(bar: Any) -> Callable[[int], None] | None:
    """A walk's `progress` that moves the bar on; none for a bar that nobody sees."""

    before = bar.n

    def count(done: int) -> None:
        bar.update(before + done - bar.n)

    return None if bar.disable else count

"""Progress bars."""

import builtins
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from tav_jax.distributed import processes

Progress = Callable[[int], None] | bool | None


def progress_bar(total: int, description: str, show: bool | None = None) -> Any:
    """A tqdm bar, by default shown in a terminal or a notebook, and by the first process only."""
    from tqdm.auto import tqdm

    if show is None:
        show = processes.is_primary() and (hasattr(builtins, "__IPYTHON__") or sys.stderr.isatty())
    return tqdm(total=total, desc=description, disable=not show)


@contextlib.contextmanager
def reporter(progress: Progress, steps: int, description: str) -> Iterator[Callable[[int], None] | None]:
    """A function of the number of steps done: the given one, one that moves a bar if `progress` is True, or None."""
    if progress is True:
        with progress_bar(steps, description, True) as bar:
            yield counter(bar)
    else:
        yield progress or None


def counter(bar: Any) -> Callable[[int], None] | None:
    """Moves a bar on by the number of steps done; None for a hidden bar."""
    before = bar.n

    def count(done: int) -> None:
        bar.update(before + done - bar.n)

    return None if bar.disable else count

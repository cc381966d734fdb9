"""What `tav plan` does with its options."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tav_jax.distributed import compilation_cache
from tav_jax.errors import InputError
from tav_jax.plan import chips, page, sweep
from tav_jax.plan.advice import advise
from tav_jax.plan.functions import NAMES
from tav_jax.plan.job import read
from tav_jax.plan.planner import Planner


def plan(
    config: Any,
    topology: str,
    *,
    names: Sequence[str] = (),
    as_json: bool = False,
    search: bool = True,
    folder: str | None = None,
) -> None:
    """Print what each function of a run needs on that topology."""
    job = read(config, chips.read(topology))
    planner = _planner(folder)
    reports = planner.reports(job, _known(names))
    advice = {r.name: list(advise(planner, job, r)) for r in reports if search and not r.fits and not r.error}
    print(page.one_line(job, reports, advice) if as_json else page.text(job, reports, advice))


def sweep_to(
    config: Any,
    topologies: Sequence[str],
    frames: Sequence[int],
    out: str,
    *,
    names: Sequence[str] = (),
    every: bool = False,
    folder: str | None = None,
) -> list[Path]:
    """Write a table and a picture of each function into a folder."""
    if not frames or min(frames) < 1:
        raise InputError(f"--frames is {','.join(map(str, frames)) or 'empty'}; give whole numbers such as 8,16,24,32")
    known = [chips.read(name) for name in topologies]
    job, planner, written = read(config, known[0]), _planner(folder), []
    target = Path(out)
    target.mkdir(parents=True, exist_ok=True)
    for name in _known(names or ("tune",)):
        points = sweep.sweep(planner, job, name, known, frames, every=every)
        for suffix, made in ((".md", sweep.table(name, points)), (".svg", sweep.picture(name, points))):
            path = target / f"{name}{suffix}"
            path.write_text(made)
            written.append(path)
        print(sweep.table(name, points))
    return written


def _known(names: Sequence[str]) -> tuple[str, ...]:
    if unknown := [name for name in names if name not in NAMES]:
        raise InputError(f"--function is {unknown[0]!r}; it must be one of {', '.join(NAMES)}")
    return tuple(names) or NAMES


def _planner(folder: str | None) -> Planner:
    return Planner(
        Path(folder) if folder else compilation_cache.base() / "plans", lambda said: print(said, file=sys.stderr)
    )

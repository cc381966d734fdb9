"""Memory and time over frames and topologies, by the TPU compiler: a table and a plot for each program.

    pip install --target="$VIRTUAL_ENV/tpu-compiler" libtpu
    python benchmarks/plan_sweep.py --topology=v5e-4 --topology=v5e-8 --frames=8,16,24,32 --config.model.path=sd1

Of each topology the fewest and the most frames are compiled, and the points between are interpolated: a program's
memory is linear in the frames of a chip. With --every, all points are compiled.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tav_jax.cli.settings import read_config
from tav_jax.errors import InputError, TavError
from tav_jax.plan import prepare_environment
from tav_jax.plan.chips import GIB, Topology, parse_topology

if TYPE_CHECKING:
    from tav_jax.plan.compile import ReportCache
    from tav_jax.plan.programs import Job


class Point(NamedTuple):
    topology: Topology
    frames: int
    peak: float  # bytes per chip
    seconds: float  # the least time of a step; 0 where it cannot be interpolated
    compiled: bool

    @property
    def fits(self) -> bool:
        return self.peak <= self.topology.chip.hbm


def sweep(
    cache: "ReportCache",
    job: "Job",
    name: str,
    topologies: Sequence[Topology],
    frames: Sequence[int],
    *,
    every: bool = False,
) -> list[Point]:
    """The program `name` of a job for each topology and number of frames."""
    points = []
    for topology in topologies:
        jobs = {n: job.replace(topology=topology, frames=n, mesh=(0, 0)) for n in sorted(set(frames))}
        first, last = min(jobs), max(jobs)
        reports = {n: cache.get(jobs[n], name) for n in jobs if every or n in (first, last)}
        if failed := [report for report in reports.values() if not report.peak_bytes]:
            raise TavError(f"{name} could not be compiled for {topology.name}: {failed[0].error}")
        low, high = reports[first], reports[last]
        span = jobs[last].frames_per_chip - jobs[first].frames_per_chip
        timed = low.seconds and high.seconds
        for n in jobs:
            if n in reports:
                points.append(Point(topology, n, reports[n].peak_bytes, reports[n].step_seconds, True))
                continue
            share = (jobs[n].frames_per_chip - jobs[first].frames_per_chip) / span if span else 0.0
            peak = low.peak_bytes + share * (high.peak_bytes - low.peak_bytes)
            seconds = low.step_seconds + share * (high.step_seconds - low.step_seconds) if timed else 0.0
            points.append(Point(topology, n, peak, seconds, False))
    return points


def format_table(name: str, points: Sequence[Point]) -> str:
    """Markdown."""
    frames = sorted({p.frames for p in points})
    topologies = list(dict.fromkeys(p.topology for p in points))
    by_key = {(p.topology, p.frames): p for p in points}

    def cell(p: Point) -> str:
        peak = f"**{p.peak / GIB:.1f}**" if p.compiled else f"{p.peak / GIB:.1f}"
        return f"{peak} GiB, {p.seconds:.2f} s" if p.fits else f"{peak} GiB, too much"

    rows = [
        [f"{name}, frames", *(f"{t.name} ({t.chip.hbm / GIB:.2f} GiB)" for t in topologies)],
        ["---:", *("---" for _ in topologies)],
        *([str(n), *(cell(by_key[t, n]) for t in topologies)] for n in frames),
    ]
    note = "Per chip. Bold: compiled; the rest is interpolated. The seconds are the least time of a step."
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", note]) + "\n"


def plot(name: str, points: Sequence[Point]) -> Any:
    """A matplotlib figure: peak memory over frames, a line for each topology, and a dashed line at each chip's HBM."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot(title=f"{name}: peak memory per chip", xlabel="frames", ylabel="GiB")
    colours = {}
    for topology in dict.fromkeys(p.topology for p in points):
        line = sorted((p.frames, p.peak / GIB) for p in points if p.topology == topology)
        (drawn,) = axes.plot(*zip(*line, strict=True), label=topology.name)
        colours[topology] = drawn.get_color()
    for compiled, label in ((True, "compiled"), (False, "interpolated")):
        some = [p for p in points if p.compiled == compiled]
        edges = [colours[p.topology] for p in some]
        faces = edges if compiled else "white"
        places = [p.frames for p in some], [p.peak / GIB for p in some]
        axes.scatter(*places, facecolors=faces, edgecolors=edges, zorder=3, label=label)
    for chip in dict.fromkeys(p.topology.chip for p in points):
        limit = chip.hbm / GIB
        axes.axhline(limit, color="#b00020", linestyle="--")
        right = max(p.frames for p in points)
        axes.text(right, limit, f"{chip.name}: {limit:.2f} GiB", color="#b00020", ha="right", va="bottom")
    axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({p.frames for p in points}))
    axes.grid(axis="y", color="#e4e4e4")
    axes.legend(fontsize="small")
    return figure


def save_svg(figure: Any, path: Path) -> None:
    """The same figure gives the same file."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "tav_jax", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", action="append", required=True, help="such as v5e-8; may be repeated")
    parser.add_argument("--frames", default="8,16,24,32", help="numbers of frames (default: %(default)s)")
    parser.add_argument("--function", action="append", default=[], help="as for `tav plan` (default: tune)")
    parser.add_argument("--every", action="store_true", help="compile every point")
    parser.add_argument("--out", default="plan", help="directory for NAME.md and NAME.svg (default: %(default)s)")
    parser.add_argument("--cache", help="directory of the report cache (default: that of `tav plan`)")
    arguments, rest = parser.parse_known_args(argv)
    frames = arguments.frames.split(",")
    if not all(n.isdecimal() and int(n) for n in frames):
        raise InputError(f"--frames is {arguments.frames!r}; it must be whole numbers from 1, such as 8,16,24,32")
    config = read_config(rest)
    topologies = [parse_topology(name) for name in arguments.topology]

    prepare_environment()  # before anything imports JAX
    from tav_jax.distributed import compilation_cache
    from tav_jax.plan.compile import ReportCache
    from tav_jax.plan.programs import NAMES, read_job

    names = arguments.function or ["tune"]
    if unknown := [name for name in names if name not in NAMES]:
        raise InputError(f"--function is {unknown[0]!r}; it must be one of {', '.join(NAMES)}")
    config.clip.frames = int(frames[0])  # each job of the sweep has its own
    if config.train.remat == "auto":
        config.train.remat = "block"  # the points of a line have one policy
    job = read_job(config, topologies[0])
    directory = Path(arguments.cache) if arguments.cache else compilation_cache.cache_directory() / "plans"
    cache = ReportCache(directory, log=lambda line: print(line, file=sys.stderr))
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        points = sweep(cache, job, name, topologies, [int(n) for n in frames], every=arguments.every)
        table = format_table(name, points)
        (out / f"{name}.md").write_text(table)
        save_svg(plot(name, points), out / f"{name}.svg")
        print(table)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TavError as error:
        sys.exit(f"plan_sweep: {error}")

"""Frames against chips: what fits where, as a table and a picture. Some points are compiled, the rest lie on the line
between them: a program's memory is linear in the frames that a chip has."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from tav_jax.errors import TavError
from tav_jax.plan.advice import per_chip
from tav_jax.plan.chips import GIB, Topology
from tav_jax.plan.job import Job
from tav_jax.plan.planner import Planner, describe


class Point(NamedTuple):
    topology: Topology
    frames: int
    peak: float  # bytes
    seconds: float  # a step's least; 0 where nothing that fits is near
    compiled: bool

    @property
    def fits(self) -> bool:
        return self.peak <= self.topology.chip.hbm


def sweep(
    planner: Planner, job: Job, name: str, topologies: Sequence[Topology], frames: Sequence[int], *, every: bool
) -> list[Point]:
    """Of each topology the fewest and the most frames are compiled, or `every` point."""
    points = []
    for topology in topologies:
        jobs = {n: job.with_(topology=topology, frames=n, mesh=(0, 0)) for n in sorted(set(frames))}
        ends = (min(jobs), max(jobs))
        reports = {n: planner.report(jobs[n], name) for n in jobs if every or n in ends}
        if broken := [report for report in reports.values() if not report.peak_bytes]:
            raise TavError(f"{describe(jobs[max(jobs)], name)} could not be compiled: {broken[0].error}")
        low, high = (reports[n] for n in ends)
        for n, at in jobs.items():
            if (report := reports.get(n)) is not None:
                points.append(Point(topology, n, report.peak_bytes, report.step_seconds, True))
                continue
            span = per_chip(jobs[ends[1]]) - per_chip(jobs[ends[0]])
            share = (per_chip(at) - per_chip(jobs[ends[0]])) / span if span else 0.0

            timed = bool(low.seconds and high.seconds)
            points.append(
                Point(
                    topology,
                    n,
                    low.peak_bytes + share * (high.peak_bytes - low.peak_bytes),
                    low.step_seconds + share * (high.step_seconds - low.step_seconds) if timed else 0.0,
                    False,
                )
            )
    return points


def table(name: str, points: Sequence[Point]) -> str:
    """Markdown."""
    frames = sorted({p.frames for p in points})
    names = list(dict.fromkeys(p.topology.name for p in points))
    at = {(p.topology.name, p.frames): p for p in points}

    def cell(p: Point) -> str:
        peak = f"{p.peak / GIB:.1f}"
        peak = f"**{peak}**" if p.compiled else peak
        return f"{peak} GiB, {p.seconds:.2f} s" * p.fits + f"{peak} GiB, too much" * (not p.fits)

    rows = [
        f"| {name}, frames | "
        + " | ".join(f"{n} ({at[n, frames[0]].topology.chip.hbm / GIB:.2f} GiB)" for n in names)
        + " |",
        "|---:|" + "---|" * len(names),
        *(f"| {n} | " + " | ".join(cell(at[topology, n]) for topology in names) + " |" for n in frames),
        "",
        "Per chip. Bold: compiled; the rest lies on the line between. The seconds are the least that a step can take.",
    ]
    return "\n".join(rows) + "\n"


Number = int | float
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 60, 130, 40, 50
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#444444")


def picture(name: str, points: Sequence[Point]) -> str:
    """SVG: a line for each topology, full dots where it was compiled, dashes for the memory there is."""
    frames = [p.frames for p in points]
    names = list(dict.fromkeys(p.topology.name for p in points))
    limits = {p.topology.chip.name: p.topology.chip.hbm for p in points}
    most = 1.08 * max(*(p.peak for p in points), *limits.values())
    first, last = min(frames), max(frames)

    def x(n: Number) -> Number:
        return LEFT + (n - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT)

    def y(size: Number) -> Number:
        return HEIGHT - BOTTOM - size / most * (HEIGHT - TOP - BOTTOM)

    def words(px: Number, py: Number, said: str, anchor: str = "middle", colour: str = "#222") -> str:
        return f'<text x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(said)}</text>'

    def line(x1: Number, y1: Number, x2: Number, y2: Number, style: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        words(
            LEFT, TOP - 16, f"{name}: peak memory per chip, GiB (full dots: compiled; hollow: interpolated)", "start"
        ),
        line(LEFT, y(0), WIDTH - RIGHT, y(0), 'stroke="#222"'),
        line(LEFT, y(0), LEFT, TOP, 'stroke="#222"'),
        words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "frames"),
        *(words(x(n), y(0) + 18, str(n)) for n in sorted(set(frames))),
    ]
    step = 2 ** max(0, round(most / GIB / 8).bit_length() - 1)
    for size in range(0, int(most / GIB) + 1, step):
        parts += [
            line(LEFT, y(size * GIB), WIDTH - RIGHT, y(size * GIB), 'stroke="#e4e4e4"'),
            words(LEFT - 8, y(size * GIB) + 4, str(size), "end"),
        ]
    for chip, limit in limits.items():
        parts += [
            line(LEFT, y(limit), WIDTH - RIGHT, y(limit), 'stroke="#b00020" stroke-dasharray="6 4"'),
            words(WIDTH - RIGHT + 8, y(limit) + 4, f"{chip} has {limit / GIB:.2f}", "start", "#b00020"),
        ]
    for i, topology in enumerate(names):
        colour = COLOURS[i % len(COLOURS)]
        here = sorted((p for p in points if p.topology.name == topology), key=lambda p: p.frames)
        path = " ".join(f"{x(p.frames):.1f},{y(p.peak):.1f}" for p in here)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for p in here:
            fill = colour if p.compiled else "white"
            parts.append(f'<circle cx="{x(p.frames):.1f}" cy="{y(p.peak):.1f}" r="4" fill="{fill}" stroke="{colour}"/>')
        parts.append(words(WIDTH - RIGHT + 8, y(here[-1].peak) + 4, topology, "start", colour))
    return "\n".join([*parts, "</svg>"]) + "\n"

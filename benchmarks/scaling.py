"""Scaling on paper: one step of tuning Stable Diffusion 1.4 at 512², 8 to 256 frames on 1 to 256 v5e chips.

    python benchmarks/scaling.py > benchmarks/scaling.md      # and benchmarks/scaling.svg

From the programs that were compiled (benchmarks/plans, see tpu_plan.py). What a chip computes and holds is a constant
and a part for each of its frames; the line through the compiled points gives both. HBM sees less than in proportion of
few frames, since VMEM has room for them: a power of the frames, and never less than the arguments. Between the chips:
the exchange before and after temporal attention goes with a chip's frames, what the neighbour and frame 0 send and the
statistics of group norms do not; and each of these messages takes a microsecond a hop, along both axes of the torus.

A step takes at least its longest part, if the others hide behind it, and at most their sum. A mesh stops paying where
it has a chip for each frame, or where twice the chips make the sum less than a quarter shorter.
"""

import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tav_jax.plan import chips

HERE = Path(__file__).parent
FRAMES, CHIPS = (8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16, 32, 64, 128, 256)
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#444444")
PAYS, HOP = 0.75, 1e-6


class Line(NamedTuple):
    constant: float
    each: float  # for a frame of the chip's

    def __call__(self, frames: float) -> float:
        return self.constant + self.each * frames


class Power(NamedTuple):
    """Grows as a power of a chip's frames, and in proportion after the most that were compiled."""

    one: float  # of a single frame
    exponent: float
    least: float
    most: float  # frames

    def __call__(self, frames: float) -> float:
        beyond = max(frames / self.most, 1.0)
        return max(self.one * min(frames, self.most) ** self.exponent * beyond, self.least)


class Step(NamedTuple):
    peak: float
    flops: float
    moved: float
    sent: float  # bytes
    compute: float
    memory: float
    wire: float
    hops: float  # seconds

    @property
    def least(self) -> float:
        return max(self.compute, self.memory, self.wire + self.hops)

    @property
    def most(self) -> float:
        return self.compute + self.memory + self.wire + self.hops


def compiled() -> list[dict]:
    told = [json.loads(file.read_text()) for file in sorted((HERE / "plans").glob("sd1-v5e-*x512-tune.json"))]
    return [{**one, **one["functions"]["tune"]} for one in told]


def at(points: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """The compiled programs' values by the number of a chip's frames."""
    frames = [math.ceil(p["frames"] / p["chips"]) for p in points]
    return np.array(frames, float), np.array([p[name] for p in points], float)


def line(points: list[dict], name: str) -> Line:
    """By least squares."""
    each, constant = np.polyfit(*at(points, name), 1)
    return Line(float(constant), float(each))


def power(points: list[dict], name: str, least: float) -> Power:
    frames, values = at(points, name)
    exponent, one = np.polyfit(np.log(frames), np.log(values), 1)
    return Power(math.exp(one), float(exponent), least, max(frames))


class Model:
    def __init__(self, points: list[dict]):
        self.chip = chips.CHIPS["v5e"]
        self.peak, self.flops = line(points, "peak_bytes"), line(points, "flops")
        self.moved = power(points, "moved_bytes", points[0]["argument_bytes"])
        one = next(p for p in points if p["chips"] == 8)
        told, mine = one["collectives"], math.ceil(one["frames"] / one["chips"])
        self.exchanged = told["all-to-all"]["bytes"] / mine
        self.neighbour = told["collective-permute"]["bytes"]
        self.summed = told["all-reduce"]["bytes"]
        self.messages = sum(kind["times"] for kind in told.values())

    def step(self, frames: int, count: int) -> Step:
        mine = math.ceil(frames / min(count, frames))
        others = (min(count, frames) - 1) / min(count, frames)
        sent = others * (self.exchanged * mine + 2 * self.summed) + (self.neighbour if count > 1 else 0)
        flops, moved = self.flops(mine), self.moved(mine)
        chip = self.chip
        seconds = (flops / chip.flops, moved / chip.bandwidth, sent / chip.wire)
        across = 2 ** math.ceil(math.log2(count) / 2)  # the torus, as square as it can be
        hops = self.messages * HOP * (across + count // across) if count > 1 else 0.0
        return Step(self.peak(mine), flops, moved, sent, *seconds, hops)

    def stops(self, frames: int) -> int:
        """The last number of chips that still pays."""
        pays = 1
        for count in CHIPS[1:]:
            if count > frames or self.step(frames, count).most > PAYS * self.step(frames, count // 2).most:
                break
            pays = count
        return pays


def table(model: Model) -> str:
    lines = [
        "| frames | chips | GB a chip | TFLOP a chip | GB over HBM | MB sent | a step, least–most | pays |",
        "|" + "---:|" * 7 + "---|",
    ]
    for frames in FRAMES:
        for count in (c for c in CHIPS if c <= frames):
            s = model.step(frames, count)
            fits = "" if s.peak <= model.chip.hbm else " (too much)"
            pays = "yes" if count <= model.stops(frames) else "no"
            lines.append(
                f"| {frames} | {count} | {s.peak / 1e9:.1f}{fits} | {s.flops / 1e12:.1f} | {s.moved / 1e9:.1f} | "
                f"{s.sent / 1e6:.0f} | {s.least * 1e3:.0f}–{s.most * 1e3:.0f} ms | {pays} |"
            )
    return "\n".join(lines) + "\n"


def picture(model: Model) -> str:
    """Two panels over chips: the time of a step, and the memory of a chip."""
    wide, high, top, bottom, side, gap = 980, 420, 40, 50, 60, 90
    panel = (wide - 2 * side - gap - 60) / 2

    def x(left: float, count: int) -> float:
        return left + panel * math.log2(count) / 8

    def y(value: float, low: float, upper: float) -> float:
        share = (math.log2(value) - math.log2(low)) / (math.log2(upper) - math.log2(low))
        return high - bottom - (high - top - bottom) * min(max(share, 0), 1)

    def words(px: float, py: float, said: str, anchor: str = "middle", colour: str = "#222") -> str:
        return f'<text x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}" fill="{colour}">{said}</text>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
    ]
    limit = model.chip.hbm / 1e9
    panels = (
        (side, "a step at most, ms (full dot: where the mesh stops paying)", 16, 8192, (16, 64, 256, 1024, 4096)),
        (side + panel + gap, f"GB a chip (dashed: a v5e has {limit:.1f})", 2, 128, (2, 4, 8, 16, 32, 64, 128)),
    )
    for number, (left, title, low, upper, ticks) in enumerate(panels):
        parts.append(words(left, 20, title, "start"))
        for tick in ticks:
            level = y(tick, low, upper)
            parts.append(
                f'<line x1="{left}" x2="{left + panel:.1f}" y1="{level:.1f}" y2="{level:.1f}" stroke="#e4e4e4"/>'
            )
            parts.append(words(left - 8, level + 4, str(tick), "end", "#555"))
        for count in CHIPS:
            parts.append(words(x(left, count), high - bottom + 18, str(count), colour="#555"))
        parts.append(words(left + panel / 2, high - 10, "chips", colour="#555"))
        if number:
            level = y(limit, low, upper)
            parts.append(
                f'<line x1="{left}" x2="{left + panel:.1f}" y1="{level:.1f}" y2="{level:.1f}" stroke="#b00020" '
                'stroke-dasharray="6 4"/>'
            )
        for frames, colour in zip(FRAMES, COLOURS, strict=True):
            counts = [count for count in CHIPS if count <= frames]
            values = [model.step(frames, count) for count in counts]
            heights = [y(v.peak / 1e9 if number else v.most * 1e3, low, upper) for v in values]
            path = " ".join(f"{x(left, c):.1f},{h:.1f}" for c, h in zip(counts, heights, strict=True))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            for count, level in zip(counts, heights, strict=True):
                full = colour if number or count == model.stops(frames) else "white"
                size = 3 if number else 4.5 if count == model.stops(frames) else 3
                parts.append(
                    f'<circle cx="{x(left, count):.1f}" cy="{level:.1f}" r="{size}" fill="{full}" stroke="{colour}"/>'
                )
            if number:
                parts.append(
                    words(wide - side + 4, top + 20 + 20 * FRAMES.index(frames), f"{frames} frames", "end", colour)
                )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> int:
    points = compiled()
    if len({math.ceil(p["frames"] / p["chips"]) for p in points}) < 2:
        raise SystemExit(
            "benchmarks/plans needs tuning on v5e with two different numbers of frames a chip; tpu_plan.py"
        )
    model = Model(points)
    (HERE / "scaling.svg").write_text(picture(model))
    print(table(model))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Scaling by estimate: one training step of Stable Diffusion 1.4 at 512², 8 to 256 frames on 1 to 256 v5e chips.

    python benchmarks/scaling.py > benchmarks/scaling.md      # also writes benchmarks/scaling.svg

The estimate interpolates the compiled programs (benchmarks/plans, see tpu_plan.py). Memory and FLOPs of a chip are
linear in its frames, fitted by least squares. HBM traffic is a power of the frames, because VMEM holds more of a
smaller clip, and is at least the size of the arguments. Of the communication, the exchange before and after temporal
attention is proportional to a chip's frames; the keys and values of the previous frame and of frame 0 and the
statistics of group norms are constant. Each of these messages takes a microsecond per hop, along both axes of the
torus.

A step takes at least the time of its longest part, if the others overlap with it, and at most the sum of all parts. The
last column says whether the number of chips is efficient: there is at least one frame per chip, and each doubling of
the chips reduces the sum by at least a quarter.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tav_jax.plan import chips

HERE = Path(__file__).parent
FRAMES, CHIPS = (8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_TIME_RATIO = 0.75  # twice the chips are efficient if a step takes at most this fraction of the time
HOP_SECONDS = 1e-6


class Line(NamedTuple):
    """Linear in the frames of a chip."""

    constant: float
    per_frame: float

    def __call__(self, frames: float) -> float:
        return self.constant + self.per_frame * frames


class Power(NamedTuple):
    """A power of the frames of a chip; beyond the most that were compiled, proportional to them."""

    one_frame: float
    exponent: float
    least: float
    most_frames: float

    def __call__(self, frames: float) -> float:
        beyond = max(frames / self.most_frames, 1.0)
        return max(self.one_frame * min(frames, self.most_frames) ** self.exponent * beyond, self.least)


class Step(NamedTuple):
    """One training step on one chip: bytes, FLOPs, and the seconds of each part."""

    peak: float
    flops: float
    moved: float
    sent: float
    compute: float
    memory: float
    transfer: float
    latency: float

    @property
    def least(self) -> float:
        return max(self.compute, self.memory, self.transfer + self.latency)

    @property
    def most(self) -> float:
        return self.compute + self.memory + self.transfer + self.latency


def read_plans() -> list[dict]:
    plans = [json.loads(file.read_text()) for file in sorted((HERE / "plans").glob("sd1-v5e-*x512-tune.json"))]
    return [{**plan, **plan["functions"]["tune"]} for plan in plans]


def values_by_frames(points: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Frames per chip, and a value of the compiled program."""
    frames = [math.ceil(p["frames"] / p["chips"]) for p in points]
    return np.array(frames, float), np.array([p[name] for p in points], float)


def fit_line(points: list[dict], name: str) -> Line:
    per_frame, constant = np.polyfit(*values_by_frames(points, name), 1)
    return Line(float(constant), float(per_frame))


def fit_power(points: list[dict], name: str, least: float) -> Power:
    frames, values = values_by_frames(points, name)
    exponent, log_one = np.polyfit(np.log(frames), np.log(values), 1)
    return Power(math.exp(log_one), float(exponent), least, max(frames))


class Model:
    def __init__(self, points: list[dict]):
        self.chip = chips.CHIPS["v5e"]
        self.peak, self.flops = fit_line(points, "peak_bytes"), fit_line(points, "flops")
        self.moved = fit_power(points, "moved_bytes", points[0]["argument_bytes"])
        plan = next(p for p in points if p["chips"] == 8)
        totals = plan["collectives"]
        self.exchanged_per_frame = totals["all-to-all"]["bytes"] / math.ceil(plan["frames"] / plan["chips"])
        self.permuted = totals["collective-permute"]["bytes"]
        self.reduced = totals["all-reduce"]["bytes"]
        self.messages = sum(total["times"] for total in totals.values())

    def step(self, frames: int, count: int) -> Step:
        per_chip = math.ceil(frames / min(count, frames))
        others = (min(count, frames) - 1) / min(count, frames)
        sent = others * (self.exchanged_per_frame * per_chip + 2 * self.reduced) + (self.permuted if count > 1 else 0)
        flops, moved = self.flops(per_chip), self.moved(per_chip)
        chip = self.chip
        seconds = (flops / chip.flops, moved / chip.bandwidth, sent / chip.ring_bandwidth)
        side = 2 ** math.ceil(math.log2(count) / 2)  # of the most square torus
        latency = self.messages * HOP_SECONDS * (side + count // side) if count > 1 else 0.0
        return Step(self.peak(per_chip), flops, moved, sent, *seconds, latency)

    def max_efficient(self, frames: int) -> int:
        """The largest efficient number of chips."""
        efficient = 1
        for count in CHIPS[1:]:
            if count > frames or self.step(frames, count).most > MAX_TIME_RATIO * self.step(frames, count // 2).most:
                break
            efficient = count
        return efficient


def table(model: Model) -> str:
    lines = [
        "# Estimated scaling on v5e chips",
        "",
        "One training step of Stable Diffusion 1.4 at 512², interpolated from compiled programs.",
        "`benchmarks/scaling.py` writes this table and describes the method;",
        "[`TPU_PLAN.md`](TPU_PLAN.md) interprets it.",
        "",
        "| frames | chips | GB per chip | TFLOP per chip | HBM traffic, GB | sent, MB | time per step | efficient |",
        "|" + "---:|" * 7 + "---|",
    ]
    for frames in FRAMES:
        for count in (c for c in CHIPS if c <= frames):
            s = model.step(frames, count)
            fits = "" if s.peak <= model.chip.hbm else " (too much)"
            efficient = "yes" if count <= model.max_efficient(frames) else "no"
            lines.append(
                f"| {frames} | {count} | {s.peak / 1e9:.1f}{fits} | {s.flops / 1e12:.1f} | {s.moved / 1e9:.1f} | "
                f"{s.sent / 1e6:.0f} | {s.least * 1e3:.0f}–{s.most * 1e3:.0f} ms | {efficient} |"
            )
    return "\n".join(lines) + "\n"


def plot(model: Model) -> Any:
    """Two panels over chips: the time of a step, and the memory of a chip."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.8, 4.2), layout="constrained")
    limit = model.chip.hbm / 1e9
    time, memory = figure.subplots(1, 2)
    time.set(title="upper bound of the time per step, ms (filled: largest efficient number)", ylim=(16, 8192))
    memory.set(title=f"GB per chip (dashed: a v5e has {limit:.1f})", ylim=(2, 128))
    memory.axhline(limit, color="#b00020", linestyle="--")
    for frames in FRAMES:
        counts = [count for count in CHIPS if count <= frames]
        steps = [model.step(frames, count) for count in counts]
        (line,) = time.plot(counts, [step.most * 1e3 for step in steps], "o-", markersize=4, markerfacecolor="white")
        color, last = line.get_color(), counts.index(model.max_efficient(frames))
        time.plot(counts[last], steps[last].most * 1e3, "o", color=color, markersize=7)
        memory.plot(
            counts, [step.peak / 1e9 for step in steps], "o-", markersize=4, color=color, label=f"{frames} frames"
        )
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.set_xlabel("chips")
        axes.set_xticks(CHIPS)
        axes.grid(axis="y", color="#e4e4e4")
        axes.title.set_fontsize(10)
    memory.legend(fontsize="small")
    return figure


def save_svg(figure: Any, path: Path) -> None:
    """The same figure gives the same file."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "tav_jax", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> int:
    points = read_plans()
    if len({math.ceil(p["frames"] / p["chips"]) for p in points}) < 2:
        raise SystemExit("benchmarks/plans needs tuning on v5e with two numbers of frames per chip; run tpu_plan.py")
    model = Model(points)
    save_svg(plot(model), HERE / "scaling.svg")
    print(table(model), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

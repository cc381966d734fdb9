"""Reports as text for a person, and as one line of JSON for a program."""

import json
from collections.abc import Sequence

from tav_jax.plan import keep
from tav_jax.plan.advice import Advice, per_chip
from tav_jax.plan.chips import GIB
from tav_jax.plan.job import Job
from tav_jax.plan.measure import Report

COLUMNS = (
    *("", "fits", "peak", "arguments", "temporary", "code", "beside"),
    *("TFLOP", "moved", "a step", "limit", "expected", "all"),
)
LEGEND = """\
GiB per chip, of {hbm:.2f}; beside: what the run keeps meanwhile. TFLOP, and GB moved over HBM: per chip and step.
A step takes at least so long, by its limit; expected: what the compiler reckons with, where it says so.
All: at least so long for all steps of an inversion or of a sample, and one step of tuning."""


def text(job: Job, reports: Sequence[Report], advice: dict[str, list[Advice]]) -> str:
    topology = job.topology
    lines = [
        f"{topology.name}: {topology.chips} × {topology.chip.name} ({topology.layout}), {job.frames} frames of "
        f"{job.height}×{job.width}, {per_chip(job)} a chip, {job.dtype}, remat {job.remat}",
        "",
        *_table([COLUMNS, *(_row(report) for report in reports)]),
        "",
        LEGEND.format(hbm=topology.chip.hbm / GIB),
    ]
    for report in reports:
        if told := ", ".join(
            f"{kind} {c['times'] / report.steps:.0f} ({c['bytes'] / report.steps / 1e6:.1f} MB)"
            for kind, c in report.collectives.items()
        ):
            lines.append(f"{report.name}, between the chips, per step: {told}")
    level = keep.optimization() and f", with JAX_OPTIMIZATION_LEVEL={keep.optimization()}"
    lines.append("Compiled in " + ", ".join(f"{r.name} {r.compile_seconds:.0f} s" for r in reports) + f"{level}.")
    for report in reports:
        if not report.fits:
            lines += ["", *_refusal(report, advice.get(report.name, []))]
    return "\n".join(lines)


def _row(r: Report) -> tuple[str, ...]:
    def gib(n: int | float) -> str:
        return f"{n / GIB:.2f}"

    if not r.seconds:
        return r.name, "no", gib(r.peak_bytes) if r.peak_bytes else "?", gib(r.argument_bytes), *("",) * 9
    return (
        r.name,
        "yes" if r.fits else "no",
        *(gib(n) for n in (r.peak_bytes, r.argument_bytes, r.temporary_bytes, r.code_bytes, r.beside_bytes)),
        f"{r.flops / r.steps / 1e12:.2f}",
        f"{r.moved_bytes / r.steps / 1e9:.1f}",
        seconds(r.step_seconds),
        r.limit,
        seconds(r.expected_seconds) if r.expected_seconds else "",
        seconds(r.step_seconds * r.job_steps),
    )


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _refusal(report: Report, advice: Sequence[Advice]) -> list[str]:
    if report.error:
        return [f"{report.name} could not be compiled: {report.error}"]
    said = f"{report.name} needs {report.peak_bytes / GIB:.2f} GiB of {report.hbm_bytes / GIB:.2f} and does not fit."
    if not advice:
        return [said]
    return [f"{said} These would (compiled):"] + [
        f"  {a.change}  ({a.report.peak_bytes / GIB:.2f} GiB, at least {seconds(a.report.step_seconds)} a step)"
        for a in advice
    ]


def one_line(job: Job, reports: Sequence[Report], advice: dict[str, list[Advice]]) -> str:
    return json.dumps(
        {
            "topology": job.topology.name,
            "chips": job.topology.chips,
            "frames": job.frames,
            "height": job.height,
            "width": job.width,
            "remat": job.remat,
            "optimization": keep.optimization(),
            "fits": all(report.fits for report in reports),
            "functions": {report.name: report.told() for report in reports},
            "would_fit": {name: [[a.change, a.report.peak_bytes] for a in some] for name, some in advice.items()},
        }
    )

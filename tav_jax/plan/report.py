"""Reports as a table or as JSON, and the changes with which a program that does not fit would fit."""

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

from tav_jax.config import Remat
from tav_jax.plan import install_command, is_pinned_compiler, pinned_compiler
from tav_jax.plan.chips import GIB, topologies_of
from tav_jax.plan.compile import Report, ReportCache, optimization_level, package_version
from tav_jax.plan.programs import Job

# ------------------------------------------------------------------------------------------------------------ changes

REMAT = get_args(Remat)  # from most memory to least
MAX_COMPILATIONS = 3  # for each kind of change


class Change(NamedTuple):
    """A change of the command line with which a program fits, and its report."""

    option: str
    report: Report


def find_changes(cache: ReportCache, job: Job, report: Report) -> Iterator[Change]:
    """For a program that does not fit, the smallest change of each kind (remat policy, more chips, fewer frames)
    with which it was compiled and fits. What to compile is selected by an estimate, for which arguments have a constant
    size and temporaries are proportional to the frames on a chip."""
    searches = (_more_chips, _fewer_frames)
    for search in (_next_remat, *searches) if report.name == "tune" else searches:
        current, known = job, report
        for _ in range(MAX_COMPILATIONS):
            if (candidate := search(current, known)) is None:
                break
            option, current = candidate
            known = cache.get(current, report.name)
            if known.fits:
                yield Change(option, known)
                break


Candidate = tuple[str, Job] | None


def _next_remat(job: Job, known: Report) -> Candidate:
    """The policy that stores the next smaller set of intermediates."""
    rest = REMAT[REMAT.index(job.remat) + 1 :]
    return (f"--config.train.remat={rest[0]}", job.replace(remat=rest[0])) if rest else None


def _more_chips(job: Job, known: Report) -> Candidate:
    """The smallest topology of the same chip with which the program should fit."""
    for topology in topologies_of(job.topology.chip):
        other = job.replace(topology=topology, mesh=(0, 0))
        if topology.chips > job.topology.chips and _should_fit(job, known, other):
            return f"--topology={topology.name}", other
    return None


def _fewer_frames(job: Job, known: Report) -> Candidate:
    """The largest number of frames that should fit. The estimate improves with each report."""
    for other in (job.replace(frames=frames) for frames in range(job.frames - 1, 0, -1)):
        if _should_fit(job, known, other):
            return f"--config.clip.frames={other.frames}", other
    return None


def _should_fit(job: Job, known: Report, other: Job) -> bool:
    """Whether another job should fit because it has fewer frames on a chip, estimated from the report of this one."""
    ratio = other.frames_per_chip / job.frames_per_chip
    return ratio < 1 and not known.error and known.peak_bytes + known.temporary_bytes * (ratio - 1) <= known.hbm_bytes


# --------------------------------------------------------------------------------------------------------- formatting

COLUMNS = ("", "fits", "peak", "arguments", "temporary", "code", "other")
COLUMNS += ("TFLOP", "HBM GB", "step", "limit", "estimate", "all steps")
LEGEND = """\
Memory is in GiB per chip, of {hbm:.2f}. other: arrays that are not the program's and that the run keeps on the chip.
TFLOP and HBM GB (bytes moved to and from HBM) are per chip and step.
step: the least time of a step, set by its limit. estimate: the compiler's own estimate of that time, if it has one.
all steps: the least time of all steps of an inversion or of sampling, and of one step of tuning."""


def format_table(job: Job, reports: Sequence[Report], changes: dict[str, list[Change]]) -> str:
    """Text for a terminal. `changes`: the results of `find_changes` by program."""
    topology, level = job.topology, optimization_level()
    lines = [
        f"{topology.name}: {topology.chips} × {topology.chip.name} ({topology.layout}), {job.frames} frames of "
        f"{job.height}×{job.width}, {job.frames_per_chip} per chip, {job.dtype}, remat {job.remat}",
        "",
        *_align([COLUMNS, *(_row(report) for report in reports)]),
        "",
        LEGEND.format(hbm=topology.chip.hbm / GIB),
    ]
    for report in reports:
        if kinds := ", ".join(
            f"{kind} {total['times'] / report.steps:.0f} ({total['bytes'] / report.steps / 1e6:.1f} MB)"
            for kind, total in report.collectives.items()
        ):
            lines.append(f"{report.name}, collectives per step: {kinds}")
    times = ", ".join(f"{report.name} {report.compile_seconds:.0f} s" for report in reports)
    version = package_version("libtpu")
    lines.append(f"Compiled with libtpu {version} in {times}{level and f', with JAX_OPTIMIZATION_LEVEL={level}'}.")
    if not is_pinned_compiler(version):
        lines.append(f"On a TPU, this JAX uses {pinned_compiler()}: `{install_command()}`.")
    for report in reports:
        if not report.fits:
            lines += ["", *_why_not(report, changes.get(report.name, []))]
    return "\n".join(lines)


def _row(r: Report) -> tuple[str, ...]:
    sizes = (r.peak_bytes, r.argument_bytes, r.temporary_bytes, r.code_bytes, r.beside_bytes)
    peak, arguments, *others = (f"{n / GIB:.2f}" for n in sizes)
    if not r.seconds:  # not compiled
        return r.name, "no", peak if r.peak_bytes else "?", arguments, *("",) * 9
    return (
        *(r.name, "yes" if r.fits else "no", peak, arguments, *others),
        f"{r.flops / r.steps / 1e12:.2f}",
        f"{r.moved_bytes / r.steps / 1e9:.1f}",
        format_seconds(r.step_seconds),
        r.limit,
        format_seconds(r.expected_seconds) if r.expected_seconds else "",
        format_seconds(r.step_seconds * r.job_steps),
    )


def format_seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as lines, with the first column aligned to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]).rstrip()
        for first, *rest in rows
    ]


def _why_not(report: Report, changes: Sequence[Change]) -> list[str]:
    if report.error:
        return [f"{report.name} could not be compiled: {report.error}"]
    peak, hbm = report.peak_bytes / GIB, report.hbm_bytes / GIB
    sentence = f"{report.name} does not fit: it needs {peak:.2f} GiB per chip, and a chip has {hbm:.2f} GiB."
    lines = [sentence + " With each of these changes it fits (compiled):" * bool(changes)]
    for option, r in changes:
        lines.append(f"  {option}  ({r.peak_bytes / GIB:.2f} GiB, at least {format_seconds(r.step_seconds)} per step)")
    return lines


def format_json(job: Job, reports: Sequence[Report], changes: dict[str, list[Change]]) -> str:
    """One line."""
    content = {"topology": job.topology.name, "chips": job.topology.chips}
    content |= {name: getattr(job, name) for name in ("frames", "height", "width", "remat")}
    content |= {"libtpu": package_version("libtpu"), "pinned": pinned_compiler()}
    content |= {"optimization": optimization_level(), "fits": all(report.fits for report in reports)}
    content["functions"] = {report.name: report.to_dict() for report in reports}
    content["would_fit"] = {name: [[c.option, c.report.peak_bytes] for c in found] for name, found in changes.items()}
    return json.dumps(content)

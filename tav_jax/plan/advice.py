"""Where a program does not fit: what would. Every answer was compiled; what to compile is guessed from what is known.

A program's arguments stay as they are, and its temporaries grow with the frames that a chip has.
"""

from collections.abc import Iterator
from typing import NamedTuple

from tav_jax.distributed.sharding import default_mesh_shape
from tav_jax.config import CHOICES
from tav_jax.plan.chips import all_of
from tav_jax.plan.job import Job
from tav_jax.plan.measure import Report
from tav_jax.plan.planner import Planner

REMAT = CHOICES["train.remat"]
TRIES = 3  # compilations for each kind of advice


class Advice(NamedTuple):
    change: str
    report: Report


def advise(planner: Planner, job: Job, report: Report) -> Iterator[Advice]:
    """A leaner remat policy, more chips, fewer frames: of each kind the mildest that was found to fit."""
    for next_candidate in (
        (_leaner_remat, _more_chips, _fewer_frames)
        if report.name == "tune"
        else (
            _more_chips,
            _fewer_frames,
        )
    ):
        at, known = job, report
        for _ in range(TRIES):
            candidate = next_candidate(at, known)
            if candidate is None:
                break
            change, at = candidate
            known = planner.report(at, report.name)
            if known.fits:
                yield Advice(change, known)
                break


Candidate = tuple[str, Job] | None


def _leaner_remat(at: Job, known: Report) -> Candidate:
    leaner = REMAT[REMAT.index(at.remat) + 1 :]
    return (f"--config.train.remat={leaner[0]}", at.with_(remat=leaner[0])) if leaner else None


def _more_chips(at: Job, known: Report) -> Candidate:
    """The next larger slice of the same chip that is large enough by the estimate."""
    for topology in all_of(at.topology.chip):
        other = at.with_(topology=topology, mesh=(0, 0))
        if topology.chips > at.topology.chips and _would_fit(at, known, other):
            return f"--topology={topology.name}", other
    return None


def _fewer_frames(at: Job, known: Report) -> Candidate:
    """As many as fit by the estimate, which each attempt makes better."""
    for frames in range(at.frames - 1, 0, -1):
        other = at.with_(frames=frames)
        if _would_fit(at, known, other):
            return f"--config.clip.frames={frames}", other
    return None


def _would_fit(at: Job, known: Report, other: Job) -> bool:
    fewer = per_chip(other) < per_chip(at)
    return fewer and not known.error and expected(known, per_chip(other) / per_chip(at)) <= known.hbm_bytes


def per_chip(job: Job) -> int:
    """Frames on the chip that has most of them."""
    data, over_frames = job.mesh
    if not over_frames:
        over_frames = job.topology.chips // data if data else default_mesh_shape(job.topology.chips, job.frames)[1]
    return -(-job.frames // over_frames)


def expected(report: Report, ratio: float) -> float:
    """Bytes with so many times the frames on a chip."""
    return report.peak_bytes + report.temporary_bytes * (ratio - 1)

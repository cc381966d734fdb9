"""From a job to its reports, each compiled once for good."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tav_jax.plan import keep
from tav_jax.plan.functions import functions
from tav_jax.plan.job import Job
from tav_jax.plan.measure import Report, measure

Say = Callable[[str], None]


@dataclass(frozen=True)
class Planner:
    folder: Path  # where reports are kept
    say: Say = lambda _: None  # what is going on, for whoever waits

    def report(self, job: Job, name: str) -> Report:
        if (kept := keep.load(self.folder, job, name)) is not None:
            return kept
        (function,) = functions(job, (name,))
        self.say(f"compiling {describe(job, name)} …")
        report = measure(function, job.topology)
        if not report.error:  # a broken kernel or compiler may be mended by the next version, or by luck
            keep.save(self.folder, job, report)
        return report

    def reports(self, job: Job, names: tuple[str, ...]) -> list[Report]:
        return [self.report(job, name) for name in names]


def describe(job: Job, name: str) -> str:
    remat = f", remat {job.remat}" if name == "tune" else ""
    return f"{name} for {job.topology.name}: {job.frames} frames of {job.height}×{job.width}{remat}"

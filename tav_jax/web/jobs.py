"""The queue of `tav web`: `tav` commands in processes of their own, one at a time.

A job is a few files, so that the queue survives the server: `N.json` describes it, `N.log` has its output, `N.status`
its exit status, and its processes hold a lock on `N.lock` as long as they live. A job goes on when the server ends; the
next server finds it by its lock, which, unlike a process id, cannot belong to another process.
"""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tav_jax.errors import InputError, StoppedError
from tav_jax.io import paths
from tav_jax.io.progress import SHOW

MAX_QUEUED, MAX_KEPT = 20, 100  # jobs that wait; jobs that have ended and are kept
POLL = 0.2  # seconds
MAX_TAIL = 20_000  # bytes of a log that are read
# The shell outlives the command to record its exit status, also if both receive SIGTERM. $0 is the file.
RECORD_STATUS = 'trap : TERM INT HUP; "$@"; echo $? >"$0.part" && mv "$0.part" "$0"'
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # moves of the cursor and colours
BAR = re.compile(r"([^:|\r\n]+):\s+\d+%\|[^|]*\|\s*(\d+)/(\d+)")  # of tqdm
ENDED = ("finished", "stopped", "failed", "cancelled")


@dataclass
class Job:
    id: int
    run: str  # the run's directory
    words: list[str]  # the arguments of `tav`
    state: str = "queued"  # then running, then one of ENDED
    pid: int = 0  # of the process group
    begun: float = 0.0
    ended: float = 0.0
    cancelled: bool = False
    message: str = ""  # why it has failed

    @property
    def command(self) -> list[str]:
        return ["tav", *self.words]


class JobQueue:
    """Runs the jobs of a directory, in the order in which they were added, in a thread."""

    def __init__(self, directory: Path, program: Sequence[str] = (sys.executable, "-m", "tav_jax")):
        self.directory, self.program, self.problem = directory, list(program), ""
        self._environment = {**os.environ, SHOW: "1", "TQDM_MININTERVAL": "1", "PYTHONUNBUFFERED": "1"}
        with paths.reporting(directory):
            directory.mkdir(parents=True, exist_ok=True)
        self._server = FileLock(directory / "server.lock")
        try:
            self._server.acquire(timeout=0.1)
        except Timeout:
            raise InputError(f"another `tav web` serves {directory}; stop it, or give another --workdir") from None
        self._lock, self._closing = threading.RLock(), threading.Event()
        self._children: dict[int, subprocess.Popen] = {}
        self._jobs = {job.id: job for file in directory.glob("*.json") if (job := _read(file))}
        for old in sorted(id for id, job in self._jobs.items() if job.state in ENDED)[:-MAX_KEPT]:
            del self._jobs[old]
            for file in directory.glob(f"{old}.*"):
                file.unlink(missing_ok=True)
        self._advance()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="jobs")
        self._thread.start()

    def add(self, run: str | Path, words: Sequence[str]) -> Job:
        """Queue `tav` with these arguments."""
        with self._lock:
            if sum(job.state == "queued" for job in self._jobs.values()) >= MAX_QUEUED:
                raise InputError(f"{MAX_QUEUED} jobs are waiting already; cancel one, or wait until one has finished")
            job = Job(max(self._jobs, default=0) + 1, str(run), list(words))
            self._save(job)
            self._jobs[job.id] = job
            self._advance()
            return job

    def cancel(self, id: int) -> None:
        """Drop a job that waits, or stop one that runs: a training run saves a checkpoint. The second call kills it."""
        with self._lock:
            job = self._jobs.get(id)
            if job is None or job.state in ENDED:
                return
            if job.state == "queued":
                job.state, job.ended = "cancelled", time.time()
            elif job.pid and self._is_alive(job):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(job.pid, signal.SIGKILL if job.cancelled else signal.SIGTERM)
            job.cancelled = True
            self._save(job)

    def jobs(self) -> list[Job]:
        """All jobs, the newest first."""
        with self._lock:
            return [self._jobs[id] for id in sorted(self._jobs, reverse=True)]

    @property
    def current(self) -> Job | None:
        """The job that runs, or else the newest one that has begun."""
        begun = [job for job in self.jobs() if job.state not in ("queued", "cancelled")]
        return next((job for job in begun if job.state == "running"), begun[0] if begun else None)

    def log(self, job: Job) -> str:
        """The end of the output, with each progress bar as it is now."""
        with contextlib.suppress(OSError), self._file(job, "log").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MAX_TAIL))
            text = ANSI.sub("", file.read().decode("utf-8", "replace"))
            lines = text.replace("\r\n", "\n").split("\n")
            return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines).strip()
        return ""

    def progress(self, job: Job) -> tuple[str, int, int] | None:
        """(what, done, total) of the newest progress bar."""
        bars = BAR.findall(self.log(job))
        return (bars[-1][0].strip(), int(bars[-1][1]), int(bars[-1][2])) if bars else None

    def close(self) -> None:
        """Stop serving the queue. The job that runs goes on."""
        self._closing.set()
        self._thread.join()
        self._server.release()

    def _loop(self) -> None:
        while not self._closing.wait(POLL):
            try:
                self._advance()
                self.problem = ""
            except (OSError, InputError) as error:  # such as a full disk, which may have space again later
                self.problem = str(error)

    def _advance(self) -> None:
        """End the job whose processes have ended, and start the next one."""
        with self._lock:
            for job in self._jobs.values():
                if job.state == "running" and not self._is_alive(job):
                    self._end(job)
            waiting = [job for _, job in sorted(self._jobs.items()) if job.state == "queued"]
            if waiting and not any(job.state == "running" for job in self._jobs.values()):
                self._start(waiting[0])

    def _start(self, job: Job) -> None:
        job.state, job.begun = "running", time.time()
        self._save(job)
        command = ["/bin/sh", "-c", RECORD_STATUS, str(self._file(job, "status")), *self.program, *job.words]
        with self._file(job, "lock").open("w") as lock, self._file(job, "log").open("wb") as log:
            fcntl.flock(lock, fcntl.LOCK_EX)
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            child = subprocess.Popen(command, env=self._environment, pass_fds=(lock.fileno(),), **options)
        self._children[job.id], job.pid = child, child.pid
        self._save(job)

    def _end(self, job: Job) -> None:
        if child := self._children.pop(job.id, None):
            child.wait()
        job.ended, lines = time.time(), self.log(job).splitlines()
        try:
            status = int(self._file(job, "status").read_text())
        except (OSError, ValueError):
            status = None
        if status == 0:
            job.state = "finished"
        elif job.cancelled or status == StoppedError.exit_code:
            job.state = "stopped"
        else:
            job.state = "failed"
            killed = "it was killed, by the system or by a restart; what it has saved is intact, so run it again"
            said = [line.removeprefix("tav: ") for line in lines if line.startswith("tav: ")] or lines
            job.message = killed if status is None or status > 128 else said[-1] if said else f"exit status {status}"
        self._save(job)

    def _is_alive(self, job: Job) -> bool:
        try:
            with self._file(job, "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # it was never started
            return False
        return False

    def _file(self, job: Job, suffix: str) -> Path:
        return self.directory / f"{job.id}.{suffix}"

    def _save(self, job: Job) -> None:
        scratch = self._file(job, "part")
        with paths.reporting(self.directory):
            scratch.write_text(json.dumps(asdict(job), indent=1))
            os.replace(scratch, self._file(job, "json"))


def _read(file: Path) -> Job | None:
    """The job of a file; None if the file is damaged."""
    try:
        job = Job(**json.loads(paths.read_text(file) or ""))
        valid = file.stem == str(job.id) and all(isinstance(word, str) for word in job.words)
        return job if valid and job.state in ("queued", "running", *ENDED) else None
    except (InputError, ValueError, TypeError, RecursionError):
        return None

"""A polite end: after SIGTERM or Ctrl-C the step under way is finished and kept, and the same command continues.

Python runs a signal's handler between two of its own instructions, and a compilation is one instruction that can take
minutes. So a thread reads the signals from a pipe as they arrive. What it may do by itself depends on what is going on:
before the first step it ends the process; between steps it leaves the end to the loop; during a preview it keeps what
has been learned, and then ends the process.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

CONTINUE = 75  # sysexits' EX_TEMPFAIL: not finished, run the same command again
AT_ONCE = 130  # as a shell says of a process that Ctrl-C ended
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Whether somebody has asked for the end. Listens inside `with`, in the main thread; elsewhere nobody ever asks."""

    def __init__(self) -> None:
        self.requested = False
        self._turn = threading.Lock()  # held by whoever decides what comes next: the loop or the end
        self._instead: Callable[[], str] | None = lambda: "before the first step"
        self._before: list[Any] = []

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = [signal.signal(number, lambda *_: None) for number in SIGNALS]
        threading.Thread(target=self._listen, args=(self._read,), daemon=True, name="stopping").start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)  # ends the thread

    def steps_begin(self) -> None:
        """From here on the loop looks at `requested` after each step."""
        with self._turn:
            self._instead = None

    @contextlib.contextmanager
    def during(self, keep: Callable[[], str]) -> Iterator[None]:
        """Long work between two steps. Asked for now, the end does not wait for it: `keep` keeps what there is, says
        where it stopped, and the process ends."""
        with self._turn:
            before, self._instead = self._instead, keep
        try:
            if self.requested:  # just before: nobody else will see to it
                self._end(keep)
            yield
        finally:
            with self._turn:  # waits for ever where the end has begun
                self._instead = before

    def _listen(self, pipe: int) -> None:
        while number := os.read(pipe, 1):
            if number[0] in SIGNALS:
                self._hear(signal.Signals(number[0]))
        os.close(pipe)

    def _hear(self, number: signal.Signals) -> None:
        if self.requested:
            # Machines that are taken away may say so twice; a person who asks again means it.
            if number == signal.SIGINT:
                leave(
                    "stopped at once; what is in finished checkpoints is kept, and the same command continues", AT_ONCE
                )
            return
        self.requested = True
        # A second Ctrl-C must be heard while `keep` writes.
        threading.Thread(target=self._end, daemon=True, name="ending").start()

    def _end(self, keep: Callable[[], str] | None = None) -> None:
        with self._turn:
            keep = keep or self._instead
            if keep is None:
                return
            try:
                leave(stop_message(keep()), CONTINUE)
            except Exception as error:
                leave(str(error), getattr(error, "exit_code", 1))


def stop_message(where: str) -> str:
    return f"stopped {where}, as asked; nothing is lost, and the same command continues"


def leave(sentence: str, status: int) -> None:
    """Now, whatever other threads and libraries are doing."""
    with contextlib.suppress(OSError, ValueError):
        print(f"\ntav: {sentence}" if sys.stderr.isatty() else f"tav: {sentence}", file=sys.stderr, flush=True)
    os._exit(status)

"""Stopping after SIGTERM or Ctrl-C: the current step is finished and saved, and the same command continues.

Python runs signal handlers only between two bytecode instructions, and a compilation is a single one that can take
minutes. Therefore a thread reads the signals from a pipe as they arrive. Before the first step it ends the process;
between steps the training loop does; during a preview the thread saves the state and ends the process.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tav_jax.errors import StoppedError

STOPPED_AT_ONCE = 130  # the exit status that shells report for Ctrl-C
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """A request to stop. As a context manager it handles signals; outside of the main thread it cannot, and `requested`
    stays False."""

    def __init__(self) -> None:
        self.requested = False
        self._lock = threading.Lock()  # of `_save`; `_exit` holds it until the process ends
        # Saves the state and returns where the run stopped. None: the training loop does this.
        self._save: Callable[[], str] | None = lambda: "before the first step"
        self._old_handlers: list[Any] = []

    def __enter__(self) -> "Stop":
        if threading.current_thread() is not threading.main_thread():
            return self
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._old_handlers = [signal.signal(number, lambda *_: None) for number in SIGNALS]
        threading.Thread(target=self._listen, args=(read_end,), daemon=True, name="signals").start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._old_handlers:
            return
        for number, handler in zip(SIGNALS, self._old_handlers, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write_end)  # ends the thread

    def steps_begin(self) -> None:
        """From now on the training loop checks `requested` after each step."""
        with self._lock:
            self._save = None

    @contextlib.contextmanager
    def saving_with(self, save: Callable[[], str]) -> Iterator[None]:
        """For long work between two steps: a request to stop interrupts it, calls `save` and ends the process. `save`
        returns where the run stopped, such as "at step 3 of 6"."""
        with self._lock:
            previous, self._save = self._save, save
        try:
            if self.requested:  # since the training loop has checked it
                self._exit(save)
            yield
        finally:
            with self._lock:  # blocks while the process ends
                self._save = previous

    def _listen(self, pipe: int) -> None:
        while received := os.read(pipe, 1):
            if received[0] in SIGNALS:
                self._handle(signal.Signals(received[0]))
        os.close(pipe)

    def _handle(self, number: signal.Signals) -> None:
        if self.requested:
            if number == signal.SIGINT:  # a repeated SIGTERM is ignored: cloud machines may send it twice
                message = "stopped at once; finished checkpoints are kept, and the same command continues"
                exit_now(message, STOPPED_AT_ONCE)
            return
        self.requested = True
        # In another thread, so that this one can receive a second Ctrl-C while `save` writes.
        threading.Thread(target=self._exit, daemon=True, name="stopping").start()

    def _exit(self, save: Callable[[], str] | None = None) -> None:
        with self._lock:
            if (save := save or self._save) is None:
                return
            try:
                exit_now(stop_message(save()), StoppedError.exit_code)
            except Exception as error:
                exit_now(str(error), getattr(error, "exit_code", 1))


def stop_message(where: str) -> str:
    return f"stopped {where}, as requested; nothing is lost, and the same command continues"


def exit_now(message: str, status: int) -> None:
    """End the process without waiting for its other threads."""
    with contextlib.suppress(OSError, ValueError):
        print(f"\ntav: {message}" if sys.stderr.isatty() else f"tav: {message}", file=sys.stderr, flush=True)
    os._exit(status)

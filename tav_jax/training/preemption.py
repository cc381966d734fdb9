"""Stopping after SIGTERM or Ctrl-C: the current step is finished and saved, and the same command continues.

Python runs signal handlers only between its own instructions, and a compilation is one instruction that can take
minutes. A thread therefore reads the signals from a pipe as they arrive. What it does depends on what is running:
before the first step it exits; during steps it leaves that to the training loop; during a preview it saves the state
and exits.
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
    """A request to stop. As a context manager it listens for signals. That takes the main thread; in another one
    `requested` stays False."""

    def __init__(self) -> None:
        self.requested = False
        self._deciding = threading.Lock()  # held while the next action is chosen: the training loop's or the exit
        # Called to save, before the process exits; returns where it stopped. None: the training loop handles the stop.
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
        with self._deciding:
            self._save = None

    @contextlib.contextmanager
    def during(self, save: Callable[[], str]) -> Iterator[None]:
        """Long work between two steps, which a stop does not wait for: then `save` saves the state and returns where it
        stopped, and the process exits."""
        with self._deciding:
            before, self._save = self._save, save
        try:
            if self.requested:  # after the last check of the training loop
                self._exit(save)
            yield
        finally:
            with self._deciding:  # blocks if the process is about to exit
                self._save = before

    def _listen(self, pipe: int) -> None:
        while received := os.read(pipe, 1):
            if received[0] in SIGNALS:
                self._handle(signal.Signals(received[0]))
        os.close(pipe)

    def _handle(self, number: signal.Signals) -> None:
        if self.requested:
            # A cloud machine may repeat SIGTERM; a second Ctrl-C is meant to stop at once.
            if number == signal.SIGINT:
                exit_now(
                    "stopped at once; finished checkpoints are kept, and the same command continues", STOPPED_AT_ONCE
                )
            return
        self.requested = True
        # In another thread, because a second Ctrl-C must be received while `save` writes.
        threading.Thread(target=self._exit, daemon=True, name="stopping").start()

    def _exit(self, save: Callable[[], str] | None = None) -> None:
        with self._deciding:
            save = save or self._save
            if save is None:
                return
            try:
                exit_now(stop_message(save()), StoppedError.exit_code)
            except Exception as error:
                exit_now(str(error), getattr(error, "exit_code", 1))


def stop_message(where: str) -> str:
    return f"stopped {where}, as requested; nothing is lost, and the same command continues"


def exit_now(message: str, status: int) -> None:
    """End the process at once, whatever its other threads are doing."""
    with contextlib.suppress(OSError, ValueError):
        print(f"\ntav: {message}" if sys.stderr.isatty() else f"tav: {message}", file=sys.stderr, flush=True)
    os._exit(status)

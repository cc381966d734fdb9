"""Standard output and signals of the command `tav`."""

import errno
import io
import os
import signal
import sys
import threading
import warnings
from typing import Any


class _Descriptor(io.FileIO):
    """A file descriptor whose errors are recorded, not raised: a run continues when its output is not read."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            return memoryview(data).nbytes


def protect_streams() -> None:
    """Let `sys.stdout` and `sys.stderr` accept any character, and survive a closed pipe, terminal or full disk."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed. A file that is opened later would get its number, and then what is printed
            os.open(os.devnull, os.O_RDWR)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        encoding = getattr(old, "encoding", None) or "utf-8"
        buffer: Any = io.BufferedWriter(_Descriptor(number, "w", closefd=False))
        line_buffering = number == 2 or os.isatty(number)
        new = io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=line_buffering)
        setattr(sys, name, new)


def lost_output() -> str | None:
    """Why standard output could not be written, unless its reader has closed it, as `head` does."""
    sys.stdout.flush()
    error = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "error", None)
    return error.strerror.lower() if error and error.errno != errno.EPIPE else None


def shorten_warnings() -> None:
    """Print the warnings of this package as one line, such as that of an HDR clip, and others as Python does."""
    package, default = os.path.dirname(os.path.dirname(__file__)), warnings.formatwarning

    def short(message: Any, category: type[Warning], filename: str, *args: Any, **options: Any) -> str:
        ours = issubclass(category, UserWarning) and filename.startswith(package)
        return f"tav: {message}\n" if ours else default(message, category, filename, *args, **options)

    warnings.formatwarning = short


def interrupt_on_signals() -> None:
    """Let SIGTERM and SIGHUP end the process like Ctrl-C, so that scratch files are removed."""

    if threading.current_thread() is not threading.main_thread():  # signals are received there
        return

    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:  # `nohup` ignores SIGHUP
            signal.signal(number, interrupt)

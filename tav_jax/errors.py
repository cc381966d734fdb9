"""Errors that a user can fix. Each is one sentence with the value, the limit and the fix.

The command line prints the sentence and exits with `exit_code`; in Python they are typed exceptions.
"""

import reprlib
from collections.abc import Sequence
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxtuple, _REPR.maxlist, _REPR.maxdict = 3, 8, 8, 8
_REPR.maxstring = _REPR.maxother = 120


def short_repr(value: Any) -> str:
    """The repr of an untrusted value, on one line and cut to a length that fits a sentence."""
    return _REPR.repr(value)[:240]


def join_names(names: Sequence[str], most: int = 12) -> str:
    """Names separated by commas, on one line: the first dozen, and how many more there are."""
    shown = [name[:120] if name[:120].isprintable() else short_repr(name) for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def is_utf8(text: str) -> bool:
    """Whether the text can be encoded: arguments and file names may hold surrogates for other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class TavError(Exception):
    """Base class of all errors that a user can fix."""

    exit_code = 2


class InputError(TavError, ValueError):
    """A value that cannot be used: a size, a prompt, a number, a file of the wrong kind."""


class MissingError(TavError, FileNotFoundError):
    """A file, a directory or a package that does not exist."""

    def __str__(self) -> str:  # OSError has a format of its own
        return str(self.args[0]) if self.args else ""


class NotFiniteError(TavError, ArithmeticError):
    """A loss, gradient, latents or weights that are NaN or infinite."""


class StoppedError(TavError):
    """A run that was asked to stop and has saved its state; the same command continues it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class WeightsError(TavError, ValueError):
    """Weights that cannot be used: a damaged file, another model family, missing tensors or wrong shapes."""


class ProcessLostError(TavError, RuntimeError):
    """Another process of a multi-process run has failed or does not answer."""

    exit_code = 1


class OutOfMemoryError(TavError, MemoryError):
    """A computation that is too large for the device or the machine."""

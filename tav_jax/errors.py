"""What goes wrong on the user's side, said in one sentence: the value, the limit and the mend.

The command line prints the sentence and exits with `exit_code`; a notebook sees a typed exception.
"""

import reprlib
from collections.abc import Sequence
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxtuple, _REPR.maxlist, _REPR.maxdict = 3, 8, 8, 8
_REPR.maxstring = _REPR.maxother = 120


def brief(value: Any) -> str:
    """A foreign value as a sentence can hold it: on one line, and short whatever it is."""
    return _REPR.repr(value)[:240]


def listed(words: Sequence[str], most: int = 12) -> str:
    """Several of a kind, the first dozen by name: a file made to annoy may have a million. Each stays on one line."""
    names = [word[:120] if word[:120].isprintable() else brief(word) for word in words[:most]]
    return ", ".join(names) + (f" and {len(words) - most} more" if len(words) > most else "")


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: what a terminal or a file hands over may hold other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class TavError(Exception):
    """Any error that a person can mend by changing what they gave us."""

    exit_code = 2


class InputError(TavError, ValueError):
    """A value that cannot be used: a size, a prompt, a count, a file that is not what it should be."""


class MissingError(TavError, FileNotFoundError):
    """A file, a folder or a package that is not there."""

    def __str__(self) -> str:  # OSError would print its own form
        return str(self.args[0]) if self.args else ""


class NotFiniteError(TavError, ArithmeticError):
    """A loss, a gradient, latents or weights that are NaN or infinite."""


class StoppedError(TavError):
    """Asked to stop, and stopped in good order: the same command continues."""

    exit_code = 75  # sysexits' EX_TEMPFAIL


class WeightsError(TavError, ValueError):
    """Weights that do not fit: a damaged file, another family, missing or misshapen tensors."""


class LostError(TavError, RuntimeError):
    """Another process of the same run has stopped, or is not where the others are."""

    exit_code = 1


class ShortOfMemoryError(TavError, MemoryError):
    """Work that is too large for the device, or for the machine."""

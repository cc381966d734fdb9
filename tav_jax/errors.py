"""What goes wrong on the user's side, said in one sentence: the value, the limit and the mend.

The command line prints the sentence and exits with `exit_code`; a notebook sees a typed exception.
"""


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

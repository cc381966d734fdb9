"""Errors that a user can fix. Each message is one sentence with the value, the limit and the fix.

The command line prints the message and exits with `exit_code`.
"""

import json
import re
import reprlib
import shlex
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxtuple, _REPR.maxlist, _REPR.maxdict = 3, 8, 8, 8
_REPR.maxstring = _REPR.maxother = 120


def short_repr(value: Any) -> str:
    """The repr of an untrusted value, on one line and truncated to fit into a message."""
    return _REPR.repr(value)[:240]


def join_names(names: Sequence[str]) -> str:
    """The first twelve names on one line, separated by commas, and how many more there are."""
    shown = [name[:120] if name[:120].isprintable() else short_repr(name) for name in names[:12]]
    return ", ".join(shown) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded as UTF-8. Arguments and file names may contain surrogates, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def install_command(extra: str) -> str:
    """The command that installs an extra of this package, from where the package itself comes: it is not on PyPI."""
    root = Path(__file__).parents[1]
    if (root / "pyproject.toml").is_file():  # a checkout
        where = "." if root == Path.cwd() else root
        return f"pip install '{where}[{extra}]'"
    try:
        package = metadata.distribution("tav_jax")
    except metadata.PackageNotFoundError:
        return f"pip install '.[{extra}]' in a clone of the repository"
    origin = json.loads(package.read_text("direct_url.json") or "{}")
    if (url := origin.get("url")) and (not url.startswith("file:") or Path(url2pathname(urlsplit(url).path)).exists()):
        prefix = f"{origin['vcs_info']['vcs']}+" if "vcs_info" in origin else ""
        return f"pip install 'tav_jax[{extra}] @ {prefix}{url}'"
    wanted = (r.split(";")[0] for r in package.requires or () if re.search(rf"extra == ['\"]{extra}['\"]", r))
    return f"pip install {' '.join(shlex.quote(requirement.strip()) for requirement in wanted)}"


class TavError(Exception):
    """Base class of all errors that a user can fix."""

    exit_code = 2


class InputError(TavError, ValueError):
    """A value that cannot be used: a size, a prompt, a number, a file of the wrong kind."""


class ArgumentNameError(InputError, TypeError):
    """An argument that a method does not have."""


class MissingError(TavError, FileNotFoundError):
    """A file, a directory or a package that does not exist."""

    def __str__(self) -> str:  # OSError has a format of its own
        return str(self.args[0]) if self.args else ""


class NotFiniteError(TavError, ArithmeticError):
    """A loss, gradient, latents or weights that are NaN or infinite."""


class StoppedError(TavError):
    """A run that was interrupted and has saved its state; the same command continues it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class WeightsError(TavError, ValueError):
    """Weights that cannot be used: a damaged file, another model family, missing tensors or wrong shapes."""


class HubError(TavError, RuntimeError):
    """A repository on the hub that cannot be written."""

    exit_code = 1


class ProcessLostError(TavError, RuntimeError):
    """Another process of a multi-process run has failed or does not respond."""

    exit_code = 1


class OutOfMemoryError(TavError, MemoryError):
    """A computation that is too large for the device or the machine."""

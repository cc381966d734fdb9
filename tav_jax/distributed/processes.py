"""Several processes that work as one, such as those of a TPU slice's hosts: how they find each other and agree.

All of them run the same programs on one mesh; process 0 alone writes. `join` finds out whether there are others:

    TAV_COORDINATOR=host:port  TAV_PROCESSES=2  TAV_PROCESS=0    on each, with a number of its own
    srun, mpirun, Cloud TPU slices, GKE                          by themselves, as `jax.distributed` knows them

JAX takes the coordinator's port, `line.py` the one above it. With a single process nothing here does anything.
"""

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from tav_jax import errors
from tav_jax.distributed.line import Line, differences
from tav_jax.distributed.line import join as join_line
from tav_jax.errors import InputError, ProcessLostError, TavError

Value = TypeVar("Value")

NAMES = ("TAV_COORDINATOR", "TAV_PROCESSES", "TAV_PROCESS")
WAIT = 300.0  # seconds for all to come, unless TAV_WAIT says otherwise
LONGEST = 3600.0  # seconds that one may be behind the others: it may still be compiling
GRACE = 5.0  # seconds to come to an end by oneself after another has gone
AT_THE_END = "the end"


@dataclass(frozen=True)
class _Place:
    """Where this process is among the others."""

    coordinator: str
    count: int
    index: int
    devices: Any = None  # the local devices that it shall use; None: all


_line: Line | None = None
_looked = False
_leaving = False


# ------------------------------------------------------------------------------------------------------- beginning


def initialize() -> None:
    """Find the other processes, if there are any. To be called before JAX is used; again does nothing."""
    global _line, _looked
    if _looked:
        return
    seconds = _seconds()
    place = _given() or _detected(seconds)
    if place is None or place.count == 1:
        _looked = True
        return

    import jax

    from tav_jax import __version__

    if jax.distributed.is_initialized():
        raise InputError(
            "jax.distributed.initialize() was called before; leave it to tav_jax.distributed.processes.initialize(), which knows who is "
            "missing"
        )
    host, _, port = place.coordinator.rpartition(":")
    host = host.strip("[]")
    about = {"tav_jax": __version__, "jax": jax.__version__}
    _line = join_line(host, int(port) + 1, place.count, place.index, about, seconds, _on_loss)
    before = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(seconds) + 1,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"process {place.index} could not join the others at {place.coordinator} ({str(error).splitlines()[0]}); "
            "call tav_jax.distributed.processes.initialize() before anything that uses JAX"
        ) from error
    with contextlib.suppress(ValueError):  # JAX keeps SIGTERM to itself; in a thread it cannot be given back
        signal.signal(signal.SIGTERM, before)
    _looked = True
    atexit.register(_at_exit)  # runs before JAX's own, which would wait for the others without a word


def require_single_process(what: str) -> None:
    """For what makes no sense on several."""
    place = _given() or _detected(_seconds())
    if place is not None and place.count > 1:
        raise InputError(
            f"{what} is for one process; on one machine of several: TAV_PROCESSES=1 JAX_PLATFORMS=cpu {what}"
        )


def _seconds() -> float:
    given = os.environ.get("TAV_WAIT", "").strip()
    try:
        seconds = float(given or WAIT)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise InputError(f"TAV_WAIT is {given!r}; give the seconds to wait for other processes, above 0 to 86400")
    return seconds


def _given() -> _Place | None:
    """As the environment says in our own words. TAV_PROCESSES=1 alone means: whatever else is there, only this one."""
    given = {name: os.environ.get(name, "").strip() for name in NAMES}
    if not any(given.values()):
        return None
    numbers = {}
    for name in NAMES[1:]:
        if given[name] and not given[name].isdecimal():
            raise InputError(f"{name} is {given[name]!r}; it must be a whole number")
        numbers[name] = int(given[name] or -1)
    count, index = numbers.values()
    if count == 1:
        return _Place("", 1, 0)
    if missing := [name for name in NAMES if not given[name]]:
        raise InputError(f"{', '.join(missing)} must be set, too: {', '.join(NAMES)} belong together")
    if not 0 <= index < count:
        raise InputError(f"TAV_PROCESS is {index}; with TAV_PROCESSES={count} it must be 0 to {count - 1}")
    host, _, port = given["TAV_COORDINATOR"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise InputError(
            f"TAV_COORDINATOR is {given['TAV_COORDINATOR']!r}; it must be host:port of process 0, the port below 65535"
        )
    return _Place(given["TAV_COORDINATOR"], count, index)


def _detected(seconds: float) -> _Place | None:
    """As `jax.distributed.initialize()` would find out by itself: it would not say who is missing, but abort."""
    from jax._src.clusters import ClusterEnv

    tpu = "tpu" in os.environ.get("JAX_PLATFORMS", "tpu")
    usual = ("slurm", "ompi", *("gcetpu", "gketpu") * tpu)
    try:
        kinds = [kind for kind in ClusterEnv._cluster_types if kind.name in usual]
        found = next((kind.name for kind in kinds if kind.is_env_present()), None)
        if found is None:
            return None
        find = ClusterEnv.auto_detect_unset_distributed_params
        coordinator, count, index, devices = find(None, None, None, None, found, int(seconds) + 1)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"this machine is one of several, and the others cannot be found ({error}); name them with "
            f"{', '.join(NAMES)}, or set TAV_PROCESSES=1 to work alone"
        ) from error
    if coordinator is None or count is None or index is None:
        return None
    return _Place(coordinator, count, index, devices)


# --------------------------------------------------------------------------------------------------------- agreeing


def process_count() -> int:
    return 1 if _line is None else _line.count


def is_multiprocess() -> bool:
    return _line is not None


def is_primary() -> bool:
    """Is this the one that writes?"""
    return _line is None or _line.index == 0


def gather(what: str, value: Value) -> list[Value]:
    """Each process's value (of what JSON knows), in their order; `what` is said of one that does not come."""
    return [value] if _line is None else _line.exchange(what, value, LONGEST)


def barrier(what: str) -> None:
    """Go on when all are here."""
    gather(what, None)


def any_process(flag: bool) -> bool:
    """Any process's True is everyone's True. It takes one round trip of a few bytes: cheap enough for every step."""
    return any(gather("agreeing", bool(flag)))


def run_on_primary(what: str, make: Callable[[], Value]) -> Value:
    """What `make` gives on process 0, to all; a sentence that it raises there is raised by all."""
    if _line is None:
        return make()
    told: dict[str, Any] = {}
    failure = None
    if is_primary():
        try:
            told["value"] = make()
        except TavError as error:
            failure = error
            told.update(error=str(error), kind=type(error).__name__)
    told = gather(what, told)[0]
    if failure is not None:
        raise failure
    if "error" in told:
        raise getattr(errors, told["kind"], TavError)(told["error"])
    return told["value"]


def check_same(values: Mapping[str, Any]) -> None:
    """Refuse to go on where the processes were given different things."""
    if _line is None:
        return
    tables = gather("comparing what was given", dict(values))
    if different := differences(tables, range(len(tables))):
        raise InputError(f"the processes were started differently: {different}; start the same on all of them")


# ----------------------------------------------------------------------------------------------------------- ending


def lost_process(seconds: float = 0.0) -> str | None:
    """Why the others stopped, if they did; a program that breaks may know of it a little before the line does."""
    if _line is None:
        return None
    _line.lost.wait(seconds)
    return _line.loss and _advised(_line.loss)


def _advised(sentence: str) -> str:
    return f"{sentence}, so all stopped; what was finished is whole. Run the same command again on all processes."


def _on_loss(sentence: str) -> None:
    """A device that waits for one that has gone waits for ever, and nothing in Python can wake it."""
    if "process 0 has died" not in sentence:  # with it goes JAX's own service, and JAX aborts at once
        time.sleep(GRACE)
    if _leaving:
        return
    print(f"tav: {_advised(sentence)}", file=sys.stderr, flush=True)
    _end_now(ProcessLostError.exit_code)


def exit_all(sentence: str, code: int) -> None:
    """This process stops with this sentence: tell the others, and end. Alone it does nothing."""
    global _leaving
    if _line is None:
        return
    _leaving = True
    if not _line.lost.is_set():
        _line.stop(f"process {_line.index} stopped: {sentence}")
    _line.close(2 * GRACE)
    _end_now(code)


def _end_now(code: int) -> NoReturn:
    """JAX's way out would wait for the others for minutes, and abort."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _at_exit() -> None:
    """All end together: one that still writes is waited for. One that ends by an exception says so."""
    assert _line is not None
    if (error := getattr(sys, "last_value", None)) is not None:  # Python has printed it
        exit_all(f"{type(error).__name__}: {error}", 1)
    try:
        barrier(AT_THE_END)
    except TavError as error:
        print(f"tav: {error}", file=sys.stderr)
        exit_all(str(error), error.exit_code)
    _line.say_goodbye()

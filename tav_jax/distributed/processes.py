"""Runs of several processes, such as one on each host of a TPU slice, on JAX's coordination service.

All processes run the same program on one mesh; only process 0 writes. `initialize` finds the other processes:

    TAV_COORDINATOR=host:port  TAV_PROCESSES=2  TAV_PROCESS=0    in each process, with its own number
    srun, mpirun, Cloud TPU slices, GKE                          without settings, as `jax.distributed` detects them

With a single process nothing here has an effect.
"""

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from tav_jax import errors
from tav_jax.errors import InputError, ProcessLostError, StoppedError, TavError

Value = TypeVar("Value")

VARIABLES = ("TAV_COORDINATOR", "TAV_PROCESSES", "TAV_PROCESS")
WAIT = 300.0  # seconds for all processes to connect; TAV_WAIT overrides it
HEARTBEAT = 30  # seconds without a heartbeat after which JAX ends the other processes
LONGEST = 3600  # seconds that a process may be behind the others: it may still be compiling
GRACE = 3.0  # seconds that a process has to end with its own message after another one has failed


@dataclass(frozen=True)
class Group:
    coordinator: str
    count: int
    index: int
    local_devices: Any = None  # numbers of the devices that this process uses; None: all


_group: Group | None = None  # None: a single process
_initialized = False
_exchanges = 0  # calls of `gather`
_last_step = 0  # the argument of the last call of `stop_at_this_step`
_watcher: threading.Thread | None = None
_ending = threading.Event()  # this process ends with its own message
_finished = threading.Event()  # this process has finished


def initialize(*, preemption: bool = False) -> None:
    """Connect to the other processes, if there are any. Call it before JAX is used; further calls do nothing.

    With `preemption`, SIGTERM only notifies `stop_at_this_step`; otherwise it keeps the effect that it had.
    """
    global _group, _initialized, _watcher
    if _initialized:
        return
    seconds = _wait_seconds()
    group = _from_environment() or _detect(seconds)
    if group is None or group.count == 1:
        _initialized = True
        return
    import jax

    from tav_jax import __version__

    if jax.distributed.is_initialized():
        raise InputError("jax.distributed.initialize() was called before; leave it to processes.initialize()")
    others = [index for index in range(group.count) if index != group.index]
    missing = (
        f"{'at least one of ' * (len(others) > 1)}{_names(others)} did not connect to {group.coordinator} within "
        f"{seconds:g} seconds; start the same command in all {group.count} processes, or set TAV_WAIT to more seconds"
    )
    timer = threading.Timer(seconds, _end, (InputError.exit_code, missing))  # JAX would abort, and name no process
    timer.start()
    try:
        jax.distributed.initialize(
            group.coordinator,
            group.count,
            group.index,
            group.local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(seconds) + 60,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=LONGEST,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"process {group.index} cannot use {group.coordinator} ({str(error).splitlines()[0]}); give a free port of "
            "process 0, and call processes.initialize() before JAX is used"
        ) from error
    finally:
        timer.cancel()
    if not preemption:
        with contextlib.suppress(ValueError):  # outside of the main thread JAX's handler stays
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    _group, _initialized = group, True
    _watcher = threading.Thread(target=_watch, args=(_client(),), daemon=True)
    _watcher.start()
    atexit.register(_at_exit)  # runs before JAX's exit function, which waits for the other processes
    check_same({"the number of processes": group.count, "tav_jax": __version__, "jax": jax.__version__})
    jax.devices()  # all processes must start the backend together, not one of them while another waits in `gather`


def require_single_process(command: str) -> None:
    """Refuse a command that supports one process only."""
    group = _from_environment() or _detect(_wait_seconds())
    if group is not None and group.count > 1:
        alone = f"TAV_PROCESSES=1 JAX_PLATFORMS=cpu {command}"
        raise InputError(f"{command} supports a single process; on one machine of several, run {alone}")


def _names(indices: list[int]) -> str:
    return f"process{'es' * (len(indices) > 1)} {', '.join(map(str, indices))}"


def _wait_seconds() -> float:
    value = os.environ.get("TAV_WAIT", "").strip()
    try:
        seconds = float(value or WAIT)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise InputError(f"TAV_WAIT is {value!r}; it must be the seconds to wait for other processes, above 0 to 86400")
    return seconds


def _from_environment() -> Group | None:
    """The group that the TAV_ variables describe. TAV_PROCESSES=1 alone turns off the detection of other processes."""
    values = [os.environ.get(name, "").strip() for name in VARIABLES]
    if not any(values):
        return None
    for name, value in zip(VARIABLES[1:], values[1:], strict=True):
        if value and not value.isdecimal():
            raise InputError(f"{name} is {value!r}; it must be a whole number")
    address, count, index = values[0], *(int(value or -1) for value in values[1:])
    if count == 1:
        return Group("", 1, 0)
    if missing := [name for name, value in zip(VARIABLES, values, strict=True) if not value]:
        raise InputError(f"{', '.join(missing)} must be set, too: {', '.join(VARIABLES)} belong together")
    if not 0 <= index < count:
        raise InputError(f"TAV_PROCESS is {index}; with TAV_PROCESSES={count} it must be 0 to {count - 1}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise InputError(f"TAV_COORDINATOR is {address!r}; it must be host:port of process 0, the port below 65535")
    return Group(address, count, index)


# The two private parts of JAX that are used: its detection of the group, which is public only as a part of connecting,
# and the key-value store of its coordination service, which Orbax uses in the same way.


def _detect(seconds: float) -> Group | None:
    from jax._src.clusters import ClusterEnv

    methods = ["slurm", "ompi"] + ["gcetpu", "gketpu"] * ("tpu" in os.environ.get("JAX_PLATFORMS", "tpu"))
    try:
        clusters = [cluster for cluster in ClusterEnv._cluster_types if cluster.name in methods]
        method = next((cluster.name for cluster in clusters if cluster.is_env_present()), None)
        if method is None:
            return None
        detect = ClusterEnv.auto_detect_unset_distributed_params
        coordinator, count, index, devices = detect(None, None, None, None, method, int(seconds) + 1)
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"this machine is one of several, and the others cannot be found ({error}); set {', '.join(VARIABLES)}, "
            "or TAV_PROCESSES=1 for a single process"
        ) from error
    if coordinator is None or count is None or index is None:
        return None
    return Group(coordinator, count, index, devices)


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


def process_count() -> int:
    return 1 if _group is None else _group.count


def is_multiprocess() -> bool:
    return _group is not None


def is_primary() -> bool:
    """Whether this is the process that writes."""
    return _group is None or _group.index == 0


def gather(what: str, value: Value) -> list[Value]:
    """The value (of JSON types) of each process, in their order. `what` names the exchange in error messages."""
    global _exchanges
    if _group is None:
        return [value]
    _exchanges += 1
    client, key, failure = _client(), f"tav/{_exchanges}/", None
    client.key_value_set(f"{key}{_group.index}", json.dumps([what, value]))
    try:
        client.wait_at_barrier(key, LONGEST * 1000)
    except RuntimeError as error:
        failure = error
    entries = {int(name.rpartition("/")[2]): json.loads(text) for name, text in client.key_value_dir_get(key)}
    if failure is not None:
        if not (late := [index for index in range(_group.count) if index not in entries]):
            raise failure
        raise ProcessLostError(f"{_names(late)} did not reach “{what}” within {LONGEST} seconds") from failure
    for index, (other, _) in entries.items():
        if other != entries[0][0]:
            raise ProcessLostError(f"process {index} is at “{other}” while process 0 is at “{entries[0][0]}”")
    return [entries[index][1] for index in sorted(entries)]


def barrier(what: str) -> None:
    gather(what, None)


def any_process(flag: bool) -> bool:
    """Whether the flag is true in any process."""
    return any(gather("any_process", bool(flag)))


def run_on_primary(what: str, function: Callable[[], Value]) -> Value:
    """Run the function in process 0 and return its value in all; a `TavError` that it raises is raised in all."""
    if _group is None:
        return function()
    result: dict[str, Any] = {}
    if is_primary():
        try:
            result["value"] = function()
        except TavError as error:
            result.update(error=str(error), kind=type(error).__name__)
    result = gather(what, result)[0]
    if "error" in result:
        raise getattr(errors, result["kind"], TavError)(result["error"])
    return result["value"]


def check_same(values: Mapping[str, Any]) -> None:
    """Refuse values that differ between the processes."""
    if _group is None:
        return
    first, *others = gather("comparing the settings", dict(values))
    if differences := [
        f"{name} is {first.get(name)!r} on process 0 and {other.get(name)!r} on process {index}"
        for index, other in enumerate(others, 1)
        for name in {**first, **other}
        if first.get(name) != other.get(name)
    ]:
        raise InputError(f"the processes differ: {'; '.join(differences)}; start the same command in all of them")


def stop_at_this_step(step: int, requested: bool) -> bool:
    """Whether to stop after this step, the same in all processes: after SIGTERM or a request in any of them.

    Steps count from 1, in a single training run per process. JAX notifies the processes in the background.
    """
    global _last_step
    if _group is None:
        return requested
    from jax.experimental import multihost_utils

    if requested:  # by Ctrl-C
        signal.raise_signal(signal.SIGTERM)  # JAX's handler
    # JAX chooses the step after the last one that any process has asked for: step 1 where SIGTERM arrives before a run
    # continues. So no step may be left out.
    steps, _last_step = range(_last_step + 1, step + 1), step
    return any(map(multihost_utils.reached_preemption_sync_point, steps))


def _watch(client: Any) -> None:
    """End this process when another one fails, even while the main thread waits for a device."""
    with contextlib.suppress(RuntimeError):  # JAX has disconnected
        while not (messages := client.key_value_dir_get("tav/stopped/")):
            if _finished.wait(0.5):
                return
        if not _ending.wait(GRACE):
            _end(ProcessLostError.exit_code, f"{messages[0][1]}; run the same command again in all processes")


def wait_for_abort(error: Exception) -> None:
    """After an error: if another process may have died, wait until JAX notices it, names it and aborts this one."""
    if _group is not None and ("Gloo" in str(error) or type(error).__name__ == "JaxRuntimeError"):
        print(
            f"tav: a computation of all processes failed ({str(error).splitlines()[0]}); if one of them has died, JAX "
            f"names it within {HEARTBEAT + 15} seconds",
            file=sys.stderr,
        )
        time.sleep(HEARTBEAT + 15)


def exit_all(message: str, code: int) -> None:
    """End this process with the status, and the others with the message. Alone, or after a common stop: do nothing."""
    if _group is None or code == StoppedError.exit_code:
        return
    _ending.set()
    with contextlib.suppress(RuntimeError):
        _client().key_value_set(f"tav/stopped/{_group.index}", f"process {_group.index} stopped: {message}")
    try:
        if is_primary():  # without the coordination service JAX aborts the others, before they print the message
            time.sleep(2 * GRACE)
    finally:  # also after Ctrl-C
        _end(code)


def _end(code: int, message: str = "") -> NoReturn:
    """End this process without JAX's exit function, which waits for the others."""
    with contextlib.suppress(OSError, ValueError):
        if message:
            print(f"tav: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@atexit.register  # if JAX is imported later than this module, its exit function has already waited for the others
def _finish() -> None:
    """Stop the watcher: Python must not end while a thread is in JAX's code."""
    _finished.set()
    if _watcher is not None:
        _watcher.join(GRACE)


def _at_exit() -> None:
    if (error := getattr(sys, "last_value", None)) is not None:  # Python has printed it
        exit_all(f"{type(error).__name__}: {error}", 1)

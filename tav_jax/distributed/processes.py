"""Runs of several processes, such as one on each host of a TPU slice, on JAX's coordination service.

All processes run the same program on one mesh; only process 0 writes. `initialize` finds the other processes:

    TAV_COORDINATOR=host:port  TAV_PROCESSES=2  TAV_PROCESS=0    in each process, with its own number
    srun, mpirun, Cloud TPU slices, GKE                          detected by `jax.distributed`, without these variables

In a single process, these functions do not communicate.
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
from typing import Any, NamedTuple, NoReturn, TypeVar

import tav_jax
from tav_jax import errors
from tav_jax.errors import InputError, ProcessLostError, StoppedError, TavError

Value = TypeVar("Value")

VARIABLES = ("TAV_COORDINATOR", "TAV_PROCESSES", "TAV_PROCESS")
# Seconds
CONNECT_TIMEOUT = 300.0  # for all processes to connect; TAV_WAIT overrides it
HEARTBEAT_TIMEOUT = 30  # without a heartbeat, until JAX aborts the other processes
GATHER_TIMEOUT = 3600  # for the last process to reach `gather`: it may still be compiling
EXIT_TIMEOUT = 3.0  # for a process to exit with its own message after another one has failed


class Group(NamedTuple):
    """The first arguments of `jax.distributed.initialize`."""

    coordinator_address: str
    num_processes: int
    process_id: int
    local_device_ids: Any = None  # of the devices that this process uses; None: all


SINGLE = Group("", 1, 0)

_group = SINGLE
_initialized = False
_client: Any = None  # of JAX's coordination service
_gather_count = 0  # calls of `gather`
_last_step = 0  # the argument of the last call of `stop_at_this_step`
_watcher: threading.Thread | None = None
_exiting = threading.Event()  # this process has finished or prints a message of its own


def initialize(*, preemption: bool = False) -> None:
    """Connect to the other processes, if there are any. Call it before JAX is used; further calls do nothing.

    With `preemption`, SIGTERM only notifies `stop_at_this_step`; otherwise its handler is left as it was.
    """
    global _group, _initialized, _client, _watcher
    if _initialized:
        return
    seconds = _connect_timeout()
    group = _from_environment() or _detect(seconds) or SINGLE
    if group.num_processes == 1:
        _initialized = True
        return
    import jax
    from jax._src import distributed  # private: the key-value store of the coordination service, as in Orbax

    address, count, index, _ = group
    others = [other for other in range(count) if other != index]
    message = (
        f"{'at least one of ' * (len(others) > 1)}{_join(others)} did not connect to {address} within {seconds:g} "
        f"seconds; start the same command in all {count} processes, or set TAV_WAIT to more seconds"
    )
    timer = threading.Timer(seconds, _exit_now, (InputError.exit_code, message))  # JAX would abort, naming no process
    timer.start()
    try:
        jax.distributed.initialize(
            *group,
            cluster_detection_method="deactivate",
            initialization_timeout=int(seconds) + 60,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=GATHER_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"process {index} cannot use {address} ({str(error).splitlines()[0]}); give a free port of process 0, and "
            "call processes.initialize() before JAX is used and in place of jax.distributed.initialize()"
        ) from error
    finally:
        timer.cancel()
    if not preemption:
        with contextlib.suppress(ValueError):  # outside of the main thread JAX's handler stays
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    _group, _initialized, _client = group, True, distributed.global_state.client
    _watcher = threading.Thread(target=_watch, daemon=True)
    _watcher.start()
    atexit.register(_exit_all_after_exception)  # runs before JAX's exit function, which waits for the other processes
    check_same({"the number of processes": count, "tav_jax": tav_jax.__version__, "jax": jax.__version__})
    # Initializing the backend is collective: done later by one process, it would block while another is in `gather`.
    jax.devices()


def require_single_process(command: str) -> None:
    """Refuse a command that supports one process only."""
    if (_from_environment() or _detect(_connect_timeout()) or SINGLE).num_processes > 1:
        alone = f"TAV_PROCESSES=1 JAX_PLATFORMS=cpu {command}"
        raise InputError(f"{command} supports a single process; to run it on one of several machines, use {alone}")


def _join(indices: list[int]) -> str:
    return f"process{'es' * (len(indices) > 1)} {', '.join(map(str, indices))}"


def _connect_timeout() -> float:
    value = os.environ.get("TAV_WAIT", "").strip()
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(value or CONNECT_TIMEOUT)) <= 86400:
            return seconds
    raise InputError(f"TAV_WAIT is {value!r}; it must be the seconds to wait for other processes, above 0 to 86400")


def _from_environment() -> Group | None:
    """The group that the TAV_ variables describe. TAV_PROCESSES=1 alone turns off the detection of other processes."""
    values = {name: value for name in VARIABLES if (value := os.environ.get(name, "").strip())}
    if not values:
        return None
    for name in VARIABLES[1:]:
        if not values.get(name, "0").isdecimal():
            raise InputError(f"{name} is {values[name]!r}; it must be a whole number")
    if int(values.get("TAV_PROCESSES", 0)) == 1:
        return SINGLE
    if missing := [name for name in VARIABLES if name not in values]:
        raise InputError(f"{', '.join(missing)} must be set, too; with several processes, each needs all three")
    address, count, index = values["TAV_COORDINATOR"], int(values["TAV_PROCESSES"]), int(values["TAV_PROCESS"])
    if not count:
        raise InputError("TAV_PROCESSES is 0; it must be the number of processes, 1 or more")
    if index >= count:
        raise InputError(f"TAV_PROCESS is {index}; with TAV_PROCESSES={count} it must be 0 to {count - 1}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise InputError(f"TAV_COORDINATOR is {address!r}; it must be host:port of process 0, the port below 65535")
    return Group(address, count, index)


def _detect(seconds: float) -> Group | None:
    from jax._src.clusters import ClusterEnv  # private: the public function also connects

    names = ["slurm", "ompi"] + ["gcetpu", "gketpu"] * ("tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu"))
    detect: Any = ClusterEnv.auto_detect_unset_distributed_params
    try:
        for cluster in ClusterEnv._cluster_types:
            if cluster.name in names and cluster.is_env_present():
                return Group(*detect(None, None, None, None, cluster.name, int(seconds) + 1))
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"this machine is one of several, and the others cannot be found ({error}); set {', '.join(VARIABLES)}, "
            "or TAV_PROCESSES=1 for a single process"
        ) from error
    return None


def process_count() -> int:
    return _group.num_processes


def is_multiprocess() -> bool:
    return _group.num_processes > 1


def is_primary() -> bool:
    """Whether this is process 0, which writes."""
    return _group.process_id == 0


def gather(name: str, value: Value) -> list[Value]:
    """The value (of JSON types) of each process, in their order. Error messages contain the name."""
    global _gather_count
    if not is_multiprocess():
        return [value]
    _gather_count += 1
    prefix, failure = f"tav/{_gather_count}/", None
    _client.key_value_set(f"{prefix}{_group.process_id}", json.dumps([name, value]))
    try:
        _client.wait_at_barrier(prefix, GATHER_TIMEOUT * 1000)
    except RuntimeError as error:
        failure = error
    entries = {int(key.rpartition("/")[2]): json.loads(text) for key, text in _client.key_value_dir_get(prefix)}
    if failure is not None:
        if not (late := [index for index in range(_group.num_processes) if index not in entries]):
            raise failure
        raise ProcessLostError(f"{_join(late)} did not reach “{name}” within {GATHER_TIMEOUT} seconds") from failure
    for index, (other, _) in entries.items():
        if other != entries[0][0]:
            raise ProcessLostError(
                f"process {index} is at “{other}” while process 0 is at “{entries[0][0]}”; all must make the same calls"
            )
    return [entries[index][1] for index in sorted(entries)]


def any_process(flag: bool) -> bool:
    """Whether the flag is true in any process."""
    return any(gather("the comparison of a flag", bool(flag)))


def run_on_primary(name: str, function: Callable[[], Value]) -> Value:
    """Run the function in process 0 and return its value in all; a `TavError` that it raises is raised in all."""
    if not is_multiprocess():
        return function()
    result: Any = None
    caught: TavError | None = None
    if is_primary():
        try:
            result = function(), None, ""
        except TavError as error:
            caught, result = error, (None, type(error).__name__, str(error))
    value, error_type, message = gather(name, result)[0]
    if caught:
        raise caught  # with its traceback
    if error_type:
        raise getattr(errors, error_type, TavError)(message)
    return value


def check_same(values: Mapping[str, Any]) -> None:
    """Refuse values that differ between the processes."""
    if not is_multiprocess():
        return
    first, *others = gather("the comparison of settings", dict(values))
    if differences := [
        f"{name} is {first.get(name)!r} on process 0 and {other.get(name)!r} on process {index}"
        for index, other in enumerate(others, 1)
        for name in {**first, **other}
        if first.get(name) != other.get(name)
    ]:
        raise InputError(
            f"the processes differ: {'; '.join(differences)}; all need the same command, versions and files"
        )


def stop_at_this_step(step: int, requested: bool) -> bool:
    """Whether to stop after this step, the same in all processes: after SIGTERM or a request in any of them.

    Steps count from 1, in a single training run per process. JAX notifies the processes in the background.
    """
    global _last_step
    if not is_multiprocess():
        return requested
    from jax.experimental import multihost_utils

    if requested:  # by Ctrl-C
        signal.raise_signal(signal.SIGTERM)  # JAX's handler
    # JAX chooses the step after the last one that any process has asked for. That is step 1 if SIGTERM arrives before
    # the first step of a continued run, so no step may be left out.
    steps, _last_step = range(_last_step + 1, step + 1), step
    return any(map(multihost_utils.reached_preemption_sync_point, steps))


def _watch() -> None:
    """Exit when another process fails, even while the main thread waits for a device."""
    with contextlib.suppress(RuntimeError):  # JAX has disconnected
        while not (messages := _client.key_value_dir_get("tav/stopped/")):
            if _exiting.wait(0.5):
                return
        if not _exiting.wait(EXIT_TIMEOUT):
            _exit_now(ProcessLostError.exit_code, f"{messages[0][1]}; run the same command again in all processes")


def wait_for_abort(error: Exception) -> None:
    """If the error may mean that another process has died: wait until JAX notices, names it and aborts this process."""
    if is_multiprocess() and ("Gloo" in str(error) or type(error).__name__ == "JaxRuntimeError"):
        reason, seconds = str(error).splitlines()[0], HEARTBEAT_TIMEOUT + 15
        message = f"a computation of all processes failed ({reason}); if one of them has died, JAX names it within"
        print(f"tav: {message} {seconds} seconds", file=sys.stderr)
        time.sleep(seconds)


def exit_all(message: str, code: int) -> None:
    """Exit with `code`, and make the other processes exit with `message`. Does nothing in a single process, or if
    `code` is that of `StoppedError`, after which every process exits by itself."""
    if not is_multiprocess() or code == StoppedError.exit_code:
        return
    _exiting.set()
    with contextlib.suppress(RuntimeError):
        _client.key_value_set(f"tav/stopped/{_group.process_id}", f"process {_group.process_id} stopped: {message}")
    try:
        if is_primary():  # without the coordination service JAX aborts the others, before they print the message
            time.sleep(2 * EXIT_TIMEOUT)
    finally:  # also after Ctrl-C
        _exit_now(code)


def _exit_now(code: int, message: str = "") -> NoReturn:
    """Exit without JAX's exit function, which waits for the other processes."""
    with contextlib.suppress(OSError, ValueError):
        if message:
            print(f"tav: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@atexit.register  # exit functions run in reverse order: that of JAX, if imported later, runs before this one
def _join_watcher() -> None:
    """Python must not end while a thread is in JAX's code."""
    _exiting.set()
    if _watcher is not None:
        _watcher.join(EXIT_TIMEOUT)


def _exit_all_after_exception() -> None:
    if (error := getattr(sys, "last_value", None)) is not None:  # Python has printed it
        exit_all(f"{type(error).__name__}: {error}", 1)

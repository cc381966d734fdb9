"""Two real processes over loopback: the same numbers as one, one writer, and a clear message for each failure."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE, difference
from safetensors.numpy import load_file

from tav_jax import Clip, InputError, TuneAVideo
from tav_jax.distributed import processes
from tav_jax.io import weights

pytestmark = pytest.mark.slow  # most of these tests compile a UNet or start processes

WORKER = str(Path(__file__).parent / "processes_worker.py")


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


class Processes:
    """A command in several processes of this machine."""

    def __init__(self, count: int = 2, **environment: str):
        self.count, self.port = count, free_port()
        plain = {k: v for k, v in os.environ.items() if not k.startswith("TAV_")}
        self.environment = {**plain, "JAX_PLATFORMS": "cpu", **environment}
        if count > 1:
            self.environment |= {"TAV_COORDINATOR": f"localhost:{self.port}", "TAV_PROCESSES": str(count)}
        self.running: dict[int, subprocess.Popen] = {}

    def start(self, index: int, *arguments: str, cwd: Path | None = None, **environment: str) -> None:
        number = {"TAV_PROCESS": str(index)} if self.count > 1 else {}
        pipe = subprocess.PIPE
        self.running[index] = subprocess.Popen(
            [sys.executable, *arguments],
            env={**self.environment, **number, **environment},
            cwd=cwd,
            stdout=pipe,
            stderr=pipe,
            text=True,
        )

    def start_all(self, *arguments: str) -> "Processes":
        for index in range(self.count):
            self.start(index, *arguments)
        return self

    def results(self, seconds: float = 900) -> list[tuple[int, str, str]]:
        """Exit status, output and errors of each, in order."""
        try:
            return [(p.wait(seconds), *p.communicate(timeout=seconds)) for _, p in sorted(self.running.items())]
        finally:
            for process in self.running.values():
                process.kill()


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("clip") / "square.mp4"
    frames = np.full((4, 32, 40, 3), 60, np.uint8)
    for i, frame in enumerate(frames):
        frame[8:20, 3 + 4 * i : 15 + 4 * i] = (220, 40, 40)
    Clip(frames, 10.0).save(file)
    return file


# ------------------------------------------------------------------------------------------------ two processes and one


@pytest.fixture(scope="module")
def job(clip_file, tmp_path_factory) -> tuple[Path, list[dict]]:
    """The directory in which one process and then two have worked, and the result of each of the two."""
    root = tmp_path_factory.mktemp("runs")
    for count in (1, 2):
        results = Processes(count).start_all(WORKER, "job", str(root), str(clip_file)).results()
        for status, _, errors in results:
            assert status == 0, errors[-3000:]
    return root, [json.loads(output.splitlines()[-1]) for _, output, _ in results]


def losses(directory: Path) -> list[float]:
    rows = [json.loads(row) for row in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    return [row["loss"] for row in rows]


@pytest.mark.slow
def test_training_losses_of_two_processes_equal_those_of_one(job):
    root, _ = job
    np.testing.assert_allclose(losses(root / "two"), losses(root / "one"), rtol=1e-4)


@pytest.mark.slow
def test_inversion_and_sampling_of_two_processes_equal_those_of_one(job):
    root, _ = job
    with np.load(root / "1.npz") as one, np.load(root / "2.npz") as two:
        for name in ("noise", "latents"):
            assert difference(two[name], one[name]) <= 1e-4, name
        assert np.abs(two["frames"].astype(int) - one["frames"]).max() <= 1


@pytest.mark.slow
def test_two_processes_continue_the_run_of_one(job):
    root, _ = job
    np.testing.assert_allclose(losses(root / "continued"), losses(root / "one"), rtol=1e-4)


@pytest.mark.slow
def test_one_process_restores_the_run_of_two(job):
    root, _ = job
    restored = weights.torch_tensors(TuneAVideo.restore(root / "two").components.unet, "unet")
    exported = load_file(root / "exported/unet/diffusion_pytorch_model.safetensors")  # by the two processes
    assert set(restored) == set(exported)
    assert all(np.array_equal(restored[name], exported[name]) for name in restored)
    base = load_file(REFERENCE / "sd1/model/unet/diffusion_pytorch_model.safetensors")
    assert any(not np.array_equal(restored[name], base[name]) for name in base)


@pytest.mark.slow
def test_only_process_0_writes(job):
    root, (first, second) = job
    assert second["written"] == []
    names = ("two/metrics.jsonl", "two/edits", ".tav_jax-")  # the last one: the export, before it is renamed
    assert all(any(path.startswith(name) for path in first["written"]) for name in names), first["written"]
    assert first["paths"] == second["paths"]
    assert all(Path(path).stat().st_size for path in first["paths"])
    assert (root / "edit.gif").exists()


@pytest.mark.slow
def test_a_mesh_without_devices_of_one_process_is_refused_in_all(job):
    for result in job[1]:
        assert "uses 1 of 2 devices, and none of process 1" in result["refused"]


@pytest.mark.slow
def test_any_process_is_true_in_all_processes(job):
    assert [result["agreed"] for result in job[1]] == [[True, False]] * 2


# ------------------------------------------------------------------------------------------------------------ exchanges


def test_values_are_exchanged_in_order_whatever_else_connects_to_the_port():
    """Garbage and silent connections, before and after the processes have connected, do not end the run."""
    both = Processes(2)
    both.start(0, WORKER, "agree")
    strangers = []

    def send_garbage() -> None:
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"[" * 100_000, os.urandom(100_000), b""):
            stranger = socket.create_connection(("localhost", both.port))
            stranger.sendall(data)
            strangers.append(stranger)  # left open

    while True:
        try:
            send_garbage()
            break
        except ConnectionRefusedError:
            assert both.running[0].poll() is None
            time.sleep(0.1)
    both.start(1, WORKER, "agree")
    while both.running[1].poll() is None:
        with contextlib.suppress(OSError):
            send_garbage()
        time.sleep(0.5)
    for status, output, errors in both.results(120):
        assert status == 0, errors
        assert json.loads(output.splitlines()[-1])["gathered"] == [[[n, i] for i in range(2)] for n in range(20)]


@pytest.mark.slow
def test_processes_at_different_exchanges_are_named():
    for status, _, errors in Processes(2).start_all(WORKER, "diverge").results(120):
        assert status == 1
        message = "process 1 is at “inverting” while process 0 is at “sampling”; all must make the same calls"
        assert errors == f"tav: {message}\n"


@pytest.mark.slow
def test_a_process_that_is_late_at_an_exchange_is_named():
    (first, _, errors0), (second, _, errors1) = Processes(2).start_all(WORKER, "late").results(120)
    assert (first, second) == (1, 1)
    assert errors0 == "tav: process 1 did not reach “writing” within 2 seconds\n"
    assert "tav: process 0 stopped: process 1 did not reach “writing” within 2 seconds; run the same" in errors1


@pytest.mark.slow
def test_different_versions_are_refused_with_the_difference():
    both = Processes(2)
    for index in range(2):
        both.start(index, WORKER, "agree", TEST_VERSION=f"0.{index}")
    for status, _, errors in both.results(120):
        assert status == 2
        assert "tav: the processes differ: tav_jax is '0.0' on process 0 and '0.1' on process 1" in errors


def test_different_numbers_of_processes_are_refused():
    both = Processes(2)
    both.start(0, WORKER, "agree")
    both.start(1, WORKER, "agree", TAV_PROCESSES="3")
    for status, _, errors in both.results(120):
        assert status == 2
        assert "the number of processes is 2 on process 0 and 3 on process 1" in errors


# ------------------------------------------------------------------------------------------------------------- failures


def train(*arguments: str) -> list[str]:
    model = f"--config.model.path={REFERENCE / 'sd1/model'}"
    size = [f"--config.clip.{name}={value}" for name, value in (("height", 32), ("width", 32), ("frames", 2))]
    return ["-m", "tav_jax", "train", model, "--config.clip.prompt=a square", *size, *arguments]


@pytest.mark.parametrize(("started", "missing"), [(0, "process 1"), (1, "process 0")])
def test_a_missing_process_is_named(started, missing, clip_file, tmp_path):
    group = Processes(2, TAV_WAIT="1.5")
    group.start(started, *train(f"--workdir={tmp_path / 'run'}", f"--config.clip.path={clip_file}"))
    [(status, _, errors)] = group.results(120)
    assert status == 2
    assert f"tav: {missing} did not connect to localhost:{group.port} within 1.5 seconds" in errors
    assert errors.count("\n") == 1, errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_missing_processes_of_four_are_narrowed_down():
    """JAX's coordination service does not report which processes have connected before all have."""
    group = Processes(4, TAV_WAIT="4")
    for index in (0, 2):
        group.start(index, WORKER, "agree")
    for (status, _, errors), others in zip(group.results(120), ("1, 2, 3", "0, 1, 3"), strict=True):
        assert status == 2
        assert f"tav: at least one of processes {others} did not connect to " in errors


def test_a_port_in_use_is_refused(clip_file, tmp_path):
    group = Processes(2)
    with socket.create_server(("", group.port)):
        group.start(0, *train(f"--workdir={tmp_path / 'run'}", f"--config.clip.path={clip_file}"))
        [(status, _, errors)] = group.results(120)
    # JAX raises, which is one sentence and status 2, or its server crashes (jax 0.10.2); it names the port in any case.
    assert status != 0
    assert f":{group.port}" in errors
    assert status != 2 or f"tav: process 0 cannot use localhost:{group.port} (" in errors
    assert not (tmp_path / "run").exists()


def test_different_configs_are_refused_with_the_difference(clip_file, tmp_path):
    both = Processes(2)
    for index in range(2):
        steps = f"--config.train.steps={index + 3}"
        both.start(index, *train(f"--workdir={tmp_path / 'run'}", f"--config.clip.path={clip_file}", steps))
    for status, _, errors in both.results(120):
        assert status == 2
        assert "train.steps is 3 on process 0 and 4 on process 1" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(clip_file, tmp_path):
    both = Processes(2)
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        both.start(index, *train("--workdir=run", f"--config.clip.path={clip_file}"), cwd=tmp_path / str(index))
    for status, _, errors in both.results(120):
        assert status == 2
        assert "process 1 does not see the " in errors
    assert [list((tmp_path / str(index)).iterdir()) for index in range(2)] == [[], []]


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_with_its_message(clip_file, tmp_path):
    both = Processes(2)
    (tmp_path / "square.mp4").write_bytes(clip_file.read_bytes())
    (tmp_path / "elsewhere").mkdir()
    for index, cwd in enumerate((tmp_path, tmp_path / "elsewhere")):
        both.start(index, *train(f"--workdir={tmp_path / 'run'}", "--config.clip.path=square.mp4"), cwd=cwd)
    (first, _, errors0), (second, _, errors1) = both.results(120)
    assert (first, second) == (1, 2)
    missing = f"{tmp_path / 'elsewhere/square.mp4'} does not exist"
    assert f"tav: {missing}" in errors1
    assert f"tav: process 1 stopped: {missing}" in errors0


@pytest.mark.slow
def test_an_exception_in_one_process_ends_all_with_its_message():
    (first, _, errors0), (second, _, errors1) = Processes(2).start_all(WORKER, "crash").results(120)
    assert (first, second) == (1, 1)
    assert "tav: process 1 stopped: KeyError: 'no such key'" in errors0
    assert "Traceback" in errors1


# JAX numbers the tasks of its coordination service as we number the processes, and calls task 0 the leader.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "message"),
    [
        (1, "The following tasks are unhealthy (stopped sending heartbeats):\n1\nThe tasks have crashed."),
        (0, "Either the leader task was preempted/died/restarted unexpectedly"),
    ],
)
def test_a_killed_process_ends_the_other_within_a_minute(victim, message):
    both = Processes(2).start_all(WORKER, "die", str(victim))
    assert both.running[victim].wait(120) == -signal.SIGKILL
    killed = time.monotonic()
    status = both.running[1 - victim].wait(120)
    seconds = time.monotonic() - killed
    errors = both.results()[1 - victim][2]
    print(f"process {1 - victim} ended {seconds:.1f} seconds after process {victim} with status {status}:\n{errors}")
    assert status != 0
    assert seconds < 60
    assert message in errors


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step_and_the_same_command_continues(clip_file, tmp_path):
    run = tmp_path / "run"
    options = ("--config.train.steps=400", "--config.train.checkpoint_every=0", "--config.train.preview_every=0")
    command = train(f"--workdir={run}", f"--config.clip.path={clip_file}", *options)

    def rows() -> list[dict]:
        lines = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
        return [json.loads(line) for line in lines.splitlines(keepends=True) if line.endswith("\n")]

    stopped = 0
    for receiver, number in ((1, signal.SIGTERM), (0, signal.SIGINT)):
        both = Processes(2).start_all(*command)
        while len(rows()) <= stopped:
            assert both.running[0].poll() is None, both.results()
            time.sleep(0.2)
        both.running[receiver].send_signal(number)
        results = both.results(300)
        assert [status for status, _, _ in results] == [75, 75], results
        steps = [re.findall(r"tav: stopped at step (\d+) of 400", errors) for _, _, errors in results]
        assert steps[0] == steps[1]
        assert f"Continuing at step {stopped} of 400" in results[0][1] or not stopped
        stopped = int(steps[0][0])
        assert (run / "checkpoints" / str(stopped)).is_dir()
        assert [row["step"] for row in rows()] == list(range(1, stopped + 1))


def test_a_signal_before_the_first_step_of_a_continued_run_is_not_lost():
    for status, output, errors in Processes(2).start_all(WORKER, "preempt", "100").results(120):
        assert status == 0, errors
        assert json.loads(output.splitlines()[-1])["stopped"] == 101


@pytest.mark.slow
def test_sigterm_ends_a_process_that_does_not_train():
    both = Processes(2).start_all(WORKER, "idle")
    for process in both.running.values():
        assert process.stdout.readline() == "ready\n"
    for process in both.running.values():
        process.send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in both.running.values()] == [-signal.SIGTERM] * 2


# --------------------------------------------------------------------------------------------------------- environment


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"TAV_PROCESSES": "2"}, "TAV_COORDINATOR, TAV_PROCESS must be set, too"),
        ({"TAV_PROCESS": "one"}, "TAV_PROCESS is 'one'; it must be a whole number"),
        ({"TAV_COORDINATOR": "h:1", "TAV_PROCESSES": "2", "TAV_PROCESS": "2"}, "it must be 0 to 1"),
        ({"TAV_COORDINATOR": "h", "TAV_PROCESSES": "2", "TAV_PROCESS": "1"}, "TAV_COORDINATOR is 'h'; it must be host"),
        ({"TAV_COORDINATOR": "h:65535", "TAV_PROCESSES": "2", "TAV_PROCESS": "1"}, "the port below 65535"),
        ({"TAV_WAIT": "long"}, "TAV_WAIT is 'long'; it must be the seconds"),
        ({"TAV_WAIT": "-1"}, "TAV_WAIT is '-1'; it must be the seconds"),
    ],
)
def test_a_wrong_environment_is_refused(environment, message, monkeypatch):
    monkeypatch.setattr(processes, "_initialized", False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        processes.initialize()


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[003-004]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


def test_slurm_is_detected_unless_the_environment_says_otherwise(monkeypatch):
    assert processes._from_environment() is None
    assert processes._detect(1.0) is None
    for name, value in {**SLURM, "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    group = processes._detect(1.0)
    assert group.coordinator_address.split(":")[0] == "node003"
    assert group[1:] == (2, 1, [0])
    monkeypatch.setenv("TAV_PROCESSES", "1")  # no detection
    assert processes._from_environment().num_processes == 1


def test_a_single_process_starts_and_exchanges_nothing(monkeypatch):
    import jax

    monkeypatch.setattr(processes, "_initialized", False)
    threads = threading.active_count()
    processes.initialize()
    assert not jax.distributed.is_initialized()
    assert threading.active_count() == threads
    assert processes.process_count() == 1
    assert processes.is_primary()
    assert not processes.is_multiprocess()
    assert processes.gather("x", {"a": (1,)}) == [{"a": (1,)}]
    assert processes.run_on_primary("x", lambda: 3) == 3
    assert (processes.any_process(True), processes.any_process(False)) == (True, False)
    assert (processes.stop_at_this_step(1, True), processes.stop_at_this_step(1, False)) == (True, False)
    processes.check_same({"anything": object()})
    processes.wait_for_abort(ValueError("Gloo"))
    processes.exit_all("nothing happens", 1)

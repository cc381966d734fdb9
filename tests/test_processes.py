"""Two real processes against one: the same numbers, one that writes, and a sentence for whatever goes wrong."""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE, difference
from safetensors.numpy import load_file

from tav_jax import Clip, InputError, TuneAVideo
from tav_jax.distributed import line, processes
from tav_jax.errors import ProcessLostError
from tav_jax.io import weights

WORKER = str(Path(__file__).parent / "processes_worker.py")
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # to compile, not to run


def free_port() -> int:
    """A port that is free, as is the one above it."""
    while True:
        with socket.create_server(("", 0)) as one:
            port = one.getsockname()[1]
            try:
                socket.create_server(("", port + 1)).close()
            except (OSError, OverflowError):
                continue
            return port


class Several:
    """The same command in several processes of one machine, each with a folder and words of its own if need be."""

    def __init__(self, count: int = 2, **environment: str):
        self.count, self.port = count, free_port()
        plain = {k: v for k, v in os.environ.items() if not k.startswith("TAV_")}
        self.environment = {**plain, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, **environment}
        if count > 1:
            self.environment |= {"TAV_COORDINATOR": f"localhost:{self.port}", "TAV_PROCESSES": str(count)}
        self.running: dict[int, subprocess.Popen] = {}

    def start(self, index: int, *words: str, cwd: Path | None = None) -> None:
        number = {"TAV_PROCESS": str(index)} if self.count > 1 else {}
        line = [sys.executable, *words]
        pipe = subprocess.PIPE
        environment = {**self.environment, **number}
        self.running[index] = subprocess.Popen(line, env=environment, cwd=cwd, stdout=pipe, stderr=pipe, text=True)

    def ends(self, seconds: float = 900) -> list[tuple[int, str, str]]:
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


# ---------------------------------------------------------------------------------------------------- two against one


@pytest.fixture(scope="module")
def told(clip_file, tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder that one process and then two have worked in, and what each of the two said."""
    root = tmp_path_factory.mktemp("runs")
    alone, both = Several(1), Several(2)
    alone.start(0, WORKER, "job", str(root), str(clip_file))
    [(status, _, errors)] = alone.ends()
    assert status == 0, errors[-3000:]
    for index in range(2):
        both.start(index, WORKER, "job", str(root), str(clip_file))
    ends = both.ends()
    for status, _, errors in ends:
        assert status == 0, errors[-3000:]
    return root, [json.loads(said.splitlines()[-1]) for _, said, _ in ends]


def losses(folder: Path) -> list[float]:
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    return [row["loss"] for row in rows]


def test_two_learn_what_one_learns(told):
    root, _ = told
    np.testing.assert_allclose(losses(root / "two"), losses(root / "one"), rtol=1e-4)


def test_two_invert_and_sample_what_one_does(told):
    root, _ = told
    with np.load(root / "1.npz") as one, np.load(root / "2.npz") as two:
        for name in ("noise", "latents"):
            assert difference(two[name], one[name]) <= 1e-4, name
        assert np.abs(two["frames"].astype(int) - one["frames"]).max() <= 1


def test_a_run_of_one_is_continued_by_two(told):
    root, _ = told
    np.testing.assert_allclose(losses(root / "continued"), losses(root / "one"), rtol=1e-4)


def test_a_run_of_two_is_restored_by_one(told):
    root, _ = told
    restored = weights.torch_tensors(TuneAVideo.restore(root / "two").components.unet, "unet")
    exported = load_file(root / "exported/unet/diffusion_pytorch_model.safetensors")  # of what the two restored
    assert set(restored) == set(exported)
    assert all(np.array_equal(restored[name], exported[name]) for name in restored)
    base = load_file(REFERENCE / "sd1/model/unet/diffusion_pytorch_model.safetensors")
    assert any(not np.array_equal(restored[name], base[name]) for name in base)


def test_the_first_one_writes(told):
    root, (first, second) = told
    assert second["written"] == []
    names = ("two/metrics.jsonl", "two/edits", ".exported")
    assert all(any(path.startswith(name) for path in first["written"]) for name in names), first["written"]
    assert first["paths"] == second["paths"]
    assert all(Path(path).stat().st_size for path in first["paths"])
    assert (root / "edit.gif").exists()


def test_a_mesh_that_leaves_one_idle_is_refused_by_all(told):
    for said in told[1]:
        assert "has 1 of 2 devices, and process 1 has none of them" in said["refused"]


def test_what_one_says_holds_for_all(told):
    assert [said["agreed"] for said in told[1]] == [[True, False]] * 2


# ---------------------------------------------------------------------------------------------------- what goes wrong


def train(*words: str) -> list[str]:
    model = f"--config.model.path={REFERENCE / 'sd1/model'}"
    return [
        "-m",
        "tav_jax",
        "train",
        model,
        "--config.clip.height=32",
        "--config.clip.width=32",
        "--config.clip.frames=2",
        *words,
    ]


@pytest.mark.parametrize(("comes", "missing"), [(0, 1), (1, 0)])
def test_one_that_never_comes_is_named(comes, missing, clip_file, tmp_path):
    few = Several(2, TAV_WAIT="1.5")
    few.start(comes, *train(f"--workdir={tmp_path / 'run'}", f"--config.clip.path={clip_file}"))
    [(status, _, errors)] = few.ends(120)
    assert status == 2
    assert f"tav: process {missing} " in errors
    assert "did not come" in errors
    assert "within 1.5 seconds" in errors
    assert errors.count("\n") == 1, errors
    assert not (tmp_path / "run").exists()


def test_different_configs_are_refused_with_the_difference(clip_file, tmp_path):
    both = Several(2)
    for index in range(2):
        words = (
            f"--workdir={tmp_path / 'run'}",
            f"--config.clip.path={clip_file}",
            f"--config.train.steps={index + 3}",
        )
        both.start(index, *train(*words))
    for status, _, errors in both.ends(120):
        assert status == 2
        assert "train.steps is 3 on process 0 and 4 on process 1" in errors
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_is_not_shared_is_refused(clip_file, tmp_path):
    both = Several(2)
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        both.start(index, *train("--workdir=run", f"--config.clip.path={clip_file}"), cwd=tmp_path / str(index))
    for status, _, errors in both.ends(120):
        assert status == 2
        assert "process 1 does not see the " in errors
    assert [list((tmp_path / str(index)).iterdir()) for index in range(2)] == [[], []]


def test_one_that_stops_with_a_sentence_stops_all_with_it(clip_file, tmp_path):
    both = Several(2)
    (tmp_path / "square.mp4").write_bytes(clip_file.read_bytes())
    (tmp_path / "elsewhere").mkdir()
    for index, cwd in enumerate((tmp_path, tmp_path / "elsewhere")):
        both.start(index, *train(f"--workdir={tmp_path / 'run'}", "--config.clip.path=square.mp4"), cwd=cwd)
    (first, _, of_first), (second, _, of_second) = both.ends(120)
    assert (first, second) == (1, 2)
    assert "tav: square.mp4 does not exist" in of_second
    assert "tav: process 1 stopped: square.mp4 does not exist" in of_first


def test_one_that_is_killed_stops_all():
    both = Several(2)
    for index in range(2):
        both.start(index, WORKER, "die")
    (first, _, of_first), (second, _, of_second) = both.ends(120)
    assert (first, second) == (1, -9), of_first + of_second
    assert of_first.count("tav:") == 1, of_first
    assert "tav: process 1 has died or cannot be reached, so all stopped" in of_first


# ----------------------------------------------------------------------------------------- what the environment says


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"TAV_PROCESSES": "2"}, "TAV_COORDINATOR, TAV_PROCESS must be set, too"),
        ({"TAV_PROCESS": "one"}, "TAV_PROCESS is 'one'; it must be a whole number"),
        ({"TAV_COORDINATOR": "h:1", "TAV_PROCESSES": "2", "TAV_PROCESS": "2"}, "it must be 0 to 1"),
        ({"TAV_COORDINATOR": "h", "TAV_PROCESSES": "2", "TAV_PROCESS": "1"}, "TAV_COORDINATOR is 'h'; it must be host"),
        ({"TAV_COORDINATOR": "h:65535", "TAV_PROCESSES": "2", "TAV_PROCESS": "1"}, "the port below 65535"),
        ({"TAV_WAIT": "long"}, "TAV_WAIT is 'long'; give the seconds"),
        ({"TAV_WAIT": "-1"}, "TAV_WAIT is '-1'; give the seconds"),
    ],
)
def test_a_wrong_environment_is_refused(given, sentence, monkeypatch):
    monkeypatch.setattr(processes, "_looked", False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=sentence):
        processes.initialize()


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[003-004]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


def test_slurm_and_our_own_words_say_where_a_process_is(monkeypatch):
    assert processes._given() is None
    assert processes._detected(1.0) is None
    for name, value in {**SLURM, "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    place = processes._detected(1.0)
    assert (place.coordinator.split(":")[0], place.count, place.index, place.devices) == ("node003", 2, 1, [0])
    monkeypatch.setenv("TAV_PROCESSES", "1")  # alone, whatever else is there
    assert processes._given().count == 1


def test_a_single_process_leaves_no_trace(monkeypatch):
    import jax

    monkeypatch.setattr(processes, "_looked", False)
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
    processes.check_same({"anything": object()})
    processes.exit_all("nothing happens", 1)


# ---------------------------------------------------------------------------------------------------------- the line


def call(count: int, *about: dict, numbers: tuple[int, ...] = (), seconds: float = 20.0) -> list:
    """`line.join` in threads: a line or the error of each."""
    port, made = free_port(), {}

    def one(place: int, index: int) -> None:
        try:
            mine = line.join("127.0.0.1", port, count, index, about[place], seconds, lambda sentence: None)
        except InputError as error:
            mine = error
        made[place] = mine

    everyone = numbers or tuple(range(len(about)))
    threads = [threading.Thread(target=one, args=item) for item in enumerate(everyone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [made[place] for place in range(len(about))]


def together(lines: list, *words: tuple[str, object]) -> list:
    made = {}

    def one(index: int) -> None:
        try:
            made[index] = lines[index].exchange(*words[index], 5.0)
        except ProcessLostError as error:
            made[index] = str(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(len(lines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [made[index] for index in range(len(lines))]


def test_all_hear_all_in_order():
    lines = call(4, *[{}] * 4)
    for n in range(50):
        assert together(lines, *(("saying", [n, index]) for index in range(4))) == [[[n, i] for i in range(4)]] * 4


def test_missing_ones_are_named_to_those_that_came():
    errors = [str(error) for error in call(4, {}, {}, numbers=(0, 2), seconds=1.0)]
    assert errors[0] == errors[1]
    assert "processes 1, 3 of 4 did not come within 1 seconds" in errors[0]


def test_numbers_given_twice_and_unlike_versions_are_refused():
    assert "two processes are numbered 1 of 3" in str(call(3, {}, {}, {}, numbers=(0, 1, 1))[0])
    for error in call(2, {"jax": "0.10"}, {"jax": "0.12"}):
        assert "jax is '0.10' on process 0 and '0.12' on process 1" in str(error)


def test_a_stranger_at_the_door_is_sent_away():
    port = free_port()
    lines = {}

    def one(index: int) -> None:
        lines[index] = line.join("127.0.0.1", port, 2, index, {}, 20.0, lambda sentence: None)

    first = threading.Thread(target=one, args=(0,))
    first.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": "x"}\n', b""):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(words)
                break
            except ConnectionRefusedError:
                pass
    one(1)
    first.join(20)
    assert together([lines[0], lines[1]], ("x", 1), ("x", 2)) == [[1, 2]] * 2


def test_processes_that_do_different_things_are_told_so():
    answers = together(call(2, {}, {}), ("sampling", 1), ("inverting", 1))
    assert "process 1 is at “inverting (exchange 1)” where process 0 is at “sampling (exchange 1)”" in answers[0]
    assert answers[1] == answers[0]


def test_a_broken_line_is_heard_by_all():
    lines = call(3, {}, {}, {})
    lines[1].ends[0].close()
    for one in (lines[0], lines[2]):
        assert one.lost.wait(20)
        assert one.loss == "process 1 has died or cannot be reached"
    assert together([lines[0], lines[2]], ("x", 1), ("x", 1)) == ["process 1 has died or cannot be reached"] * 2


def test_one_that_is_late_is_named():
    lines = call(3, {}, {}, {})
    answers = {}

    def one(index: int) -> None:
        with pytest.raises(ProcessLostError) as error:
            lines[index].exchange("writing", None, 1.0)
        answers[index] = str(error.value)

    threads = [threading.Thread(target=one, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers[0] == answers[1] == "process 2 did not come to “writing” within 1 seconds"

"""`tav web`: the queue with fake commands, the commands of the page, and the server with the demo model."""

import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from conftest import REFERENCE, refusal
from PIL import Image

from tav_jax import Clip
from tav_jax import config as configs
from tav_jax.cli import main, web
from tav_jax.cli.settings import read_config
from tav_jax.errors import InputError, MissingError, TavError
from tav_jax.io import masks
from tav_jax.io.video import load_video
from tav_jax.web import runs
from tav_jax.web.jobs import ENDED, MAX_QUEUED, Job, JobQueue
from tav_jax.web.runs import Workspace

SHELL = ("/bin/sh", "-c")  # as the program: the argument of a job is a script
STOPPABLE = "trap 'echo tav: stopped; exit 75' TERM; echo begun; while :; do sleep 0.1; done"
HOSTILE = "it's \"quoted\" $(touch x) `touch y`; ('a', 1) --config.seed=3 \\ é"


def until(condition, seconds: float = 20):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)
    return value


@pytest.fixture
def queue(tmp_path):
    queue = JobQueue(tmp_path / "jobs", SHELL)
    yield queue
    for job in queue.jobs():
        for _ in range(2):  # the second call kills it
            queue.cancel(job.id)
    queue.close()


def ended(queue: JobQueue, job: Job) -> Job:
    return until(lambda: job.state in ENDED and job)


def test_jobs_run_one_at_a_time_in_order(queue, tmp_path):
    script = f"echo $0 begins >>{tmp_path}/order; sleep 0.1; echo $0 ends >>{tmp_path}/order"
    jobs = [queue.add(tmp_path, [script, name]) for name in "abc"]
    assert [job.state for job in jobs] == ["running", "queued", "queued"]
    ended(queue, jobs[2])
    lines = [f"{name} {what}" for name in "abc" for what in ("begins", "ends")]
    assert (tmp_path / "order").read_text().splitlines() == lines
    assert [job.state for job in jobs] == ["finished"] * 3
    assert [job.id for job in queue.jobs()] == [3, 2, 1]
    assert queue.current is jobs[2]


@pytest.mark.parametrize(
    ("script", "state", "message"),
    [
        ("exit 0", "finished", ""),
        ("echo 'tav: stopped' >&2; exit 75", "stopped", ""),
        ("echo 'tav: no clip; give one' >&2; echo more; exit 2", "failed", "no clip; give one"),
        ("echo Traceback; echo 'ValueError: x'; exit 1", "failed", "ValueError: x"),
        ("exit 3", "failed", "exit status 3"),
        ("kill -9 $$", "failed", "it was killed, by the system"),
        ("kill -9 0", "failed", "it was killed, by the system"),  # with the shell that records the status
    ],
)
def test_how_a_job_ends(queue, tmp_path, script, state, message):
    job = ended(queue, queue.add(tmp_path, [script]))
    assert (job.state, job.message[: len(message)]) == (state, message)
    assert not message or job.message


def test_cancelled_job_saves_and_the_next_one_begins(queue, tmp_path):
    running, waiting, last = (queue.add(tmp_path, [script]) for script in (STOPPABLE, "exit 0", "exit 0"))
    queue.cancel(waiting.id)
    assert waiting.state == "cancelled"
    until(lambda: "begun" in queue.log(running))
    queue.cancel(running.id)
    assert ended(queue, last).state == "finished"
    assert (running.state, running.cancelled) == ("stopped", True)
    assert queue.log(running).endswith("tav: stopped")
    assert not waiting.begun
    queue.cancel(running.id)  # has ended: no effect
    queue.cancel(17)


def test_second_cancel_kills_a_job_that_does_not_stop(queue, tmp_path):
    job = queue.add(tmp_path, ["trap '' TERM; echo begun; while :; do sleep 0.1; done"])
    until(lambda: "begun" in queue.log(job))
    queue.cancel(job.id)
    time.sleep(0.3)
    assert job.state == "running"
    queue.cancel(job.id)
    assert ended(queue, job).state == "stopped"


def test_progress_and_log_are_read_from_the_output(queue, tmp_path):
    bar = (
        r"\rtuning:   0%%|    | 0/60 [00:00<?]\rtuning:  33%%|### | 20/60 [00:10<00:20, 2.9s/it, mean loss=0.04]\033[A"
    )
    job = ended(queue, queue.add(tmp_path, [f"printf 'Tuning for 60 steps: 1 of 2\\n{bar}'"]))
    assert queue.progress(job) == ("tuning", 20, 60)
    assert queue.log(job).splitlines()[0] == "Tuning for 60 steps: 1 of 2"
    assert queue.log(job).splitlines()[1] == "tuning:  33%|### | 20/60 [00:10<00:20, 2.9s/it, mean loss=0.04]"
    job = ended(queue, queue.add(tmp_path, ["head -c 1000000 /dev/zero | tr '\\0' x"]))
    assert len(queue.log(job)) <= 20_000
    assert queue.progress(job) is None


def test_job_survives_a_killed_server(tmp_path, start_python):
    """The next server finds the job that goes on, learns its exit status, and runs the job that waits."""
    code = """
import sys, time
from pathlib import Path
from tav_jax.web.jobs import JobQueue
queue = JobQueue(Path(sys.argv[1]), ("/bin/sh", "-c"))
queue.add("run", ["while [ ! -e go ]; do sleep 0.05; done; echo tav: no clip; exit 2".replace("go", sys.argv[2])])
queue.add("run", ["exit 0"])
print("ready", flush=True)
time.sleep(60)
"""
    server = start_python(code, tmp_path / "jobs", tmp_path / "go")
    assert server.stdout.readline() == "ready\n"
    message = refusal(InputError, JobQueue, tmp_path / "jobs")
    assert "another `tav web` serves" in message
    server.kill()
    server.wait()
    queue = JobQueue(tmp_path / "jobs", SHELL)
    try:
        waiting, running = queue.jobs()
        assert (running.state, waiting.state) == ("running", "queued")
        (tmp_path / "go").touch()
        assert ended(queue, waiting).state == "finished"
        assert (running.state, running.message) == ("failed", "no clip")
    finally:
        queue.close()
    again = JobQueue(tmp_path / "jobs", SHELL)
    assert [job.state for job in again.jobs()] == ["finished", "failed"]
    again.close()


def test_job_whose_processes_are_gone_is_reported(tmp_path):
    """After a restart of the machine; the process id may belong to another process now."""
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    (tmp_path / "jobs").mkdir()
    job = Job(1, "run", ["train"], "running", pid=other.pid, begun=1.0)
    (tmp_path / "jobs/1.json").write_text(json.dumps(vars(job)))
    for number, text in enumerate(("", "{", "[]", '{"id": 7}', json.dumps({**vars(job), "words": [1]})), 2):
        (tmp_path / f"jobs/{number}.json").write_text(text)
    queue = JobQueue(tmp_path / "jobs", SHELL)
    (job,) = queue.jobs()
    assert (job.state, job.message[:13]) == ("failed", "it was killed")
    queue.cancel(1)
    queue.close()
    assert other.poll() is None
    other.kill()
    other.wait()


def test_queue_is_bounded(queue, tmp_path):
    for _ in range(MAX_QUEUED + 1):
        queue.add(tmp_path, [STOPPABLE])
    assert "20 jobs are waiting already; cancel one" in refusal(InputError, queue.add, tmp_path, ["exit 0"])


# ------------------------------------------------------------------------------------------------ directories and clips


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path / "runs")


def test_names_of_runs_and_clips_are_our_own(workspace, square_clip, tmp_path):
    for name in ("../../x", "/etc/passwd", "~root", "..", "", "a\0b", "CON"):
        assert workspace.new_run(name, ()).parent == workspace.root
    (workspace.root / "x").mkdir()
    assert workspace.new_run("X!", [str(workspace.root / "x-2")]).name == "x-3"
    uploaded = tmp_path / "..mp4.$(x) \n.mp4"
    uploaded.write_bytes(square_clip.read_bytes())
    path, clip, text = workspace.add_clip(uploaded, 10**6)
    assert path.parent == workspace.state / "clips"
    assert path.stem.isalnum()
    assert path.read_bytes() == square_clip.read_bytes()
    assert text == "6 frames, 0.6 s, 40×32 at 10 frames per second"
    assert clip.frames.shape[1:] == (32, 40, 3)
    for name in ("../runs", "/etc", None, ""):
        refusal(MissingError, workspace.run, name)


@pytest.mark.parametrize(
    ("content", "limit", "message"),
    [
        (b"not a video" * 100, 10**6, "the file"),
        (b"", 10**6, "the file"),
        (b"x" * 2_000_001, 2_000_000, "the clip has 2 MB, more than 2; shorten it"),
    ],
)
def test_uploads_that_are_refused(workspace, tmp_path, content, limit, message):
    (tmp_path / "secret-name.mp4").write_bytes(content)
    text = refusal(TavError, workspace.add_clip, tmp_path / "secret-name.mp4", limit)
    assert message in text
    assert "secret-name" not in text
    assert not list((workspace.state / "clips").iterdir())


def test_long_upload_is_refused(workspace, tmp_path):
    file = Clip(np.zeros((7, 16, 16, 3), np.uint8), 0.01).save(tmp_path / "long.mp4")
    assert "the clip has 700 s, more than 600; cut it" in refusal(InputError, workspace.add_clip, file, 10**6)


def test_workspace_of_one_run(tmp_path, workspace):
    assert "is in a bucket; give `tav web` a directory" in refusal(InputError, Workspace, "gs://bucket/runs")
    (tmp_path / "file").touch()
    assert "is a file; give a directory" in refusal(InputError, Workspace, tmp_path / "file")
    write_config(run := tmp_path / "one")
    one = Workspace(run)
    assert one.run("one") == run
    assert "is a run itself" in refusal(InputError, one.new_run, "a", ())


def write_config(run: Path, **changes) -> Path:
    config = configs.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(configs.to_json(config))
    return run


def test_mask_is_accepted_by_tav_edit(workspace, square_clip):
    config = configs.get_config()
    config.clip.update(path=str(square_clip), height=32, width=48)
    layer = np.zeros((8 * 32, 8 * 48, 4), np.uint8)
    layer[:128, 192:] = (224, 33, 138, 255)
    path = workspace.save_mask([layer], (32, 48))
    expected = np.zeros((2, 32, 48))
    expected[:, :16, 24:] = 1
    np.testing.assert_array_equal(masks.load_mask(str(path), config.clip, 2), expected)
    assert workspace.save_mask([layer], (32, 48)) == path
    for empty in ([], [np.zeros_like(layer)]):
        assert "the mask is empty; paint where" in refusal(InputError, workspace.save_mask, empty, (32, 48))


# ------------------------------------------------------------------------------------------------------------- commands


def test_train_command_gives_the_settings_of_the_form(workspace):
    settings = {"clip.path": "/a b/clip.mp4", "clip.prompt": HOSTILE, "edit.prompts": [HOSTILE, "a"], "train.steps": 7}
    settings |= {"train.learning_rate": 1, "edit.strength": 0.6, "clip.frames": 24, "model.path": "/m o'd"}
    words = runs.train_words(workspace.root / "run", settings)
    assert not any(word.startswith("--config.clip.frames") for word in words)  # the default
    arguments, rest = main.parser().parse_known_args(shlex.split(shlex.join(words)))
    assert (arguments.command, arguments.workdir) == ("train", str(workspace.root / "run"))
    config = read_config(rest)
    expected = configs.get_config()
    expected.update_from_flattened_dict({**settings, "edit.prompts": tuple(settings["edit.prompts"])})
    assert dict(configs.leaves(config)) == dict(configs.leaves(configs.validate(expected)))


def test_edit_command_gives_the_settings_of_the_form(tmp_path):
    run = write_config(tmp_path / "run", edit__guidance=7.5)
    settings = {"guidance": 7.5, "strength": 0.5, "steps": 10, "negative_prompt": HOSTILE, "blend_words": ["a", "b c"]}
    settings |= {"equalizer": ["red=2.0"], "cross_attention_steps": 0.4, "mask": "/m.png", "sampler": "dpm++2m"}
    words = runs.edit_words(run, [HOSTILE, "--b"], settings, force=True)
    arguments = main.parser().parse_args(shlex.split(shlex.join(words)))
    assert (arguments.command, arguments.workdir, arguments.force) == ("edit", str(run), True)
    assert arguments.prompt == [HOSTILE, "--b"]
    assert arguments.guidance is None  # the run's
    given = {name: getattr(arguments, name) for name in settings if name != "guidance"}
    assert given == {name: value for name, value in settings.items() if name != "guidance"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip.path": ""}, "there is no clip yet; upload one"),
        ({"clip.prompt": ""}, "there is no prompt yet; describe the clip"),
        ({"clip.height": 30}, "clip.height 30 is not a multiple of 8"),
        ({"train.steps": 0}, "train.steps is 0; it must be 1 to"),
        ({"edit.prompts": ["a"], "edit.steps": 60}, "edit.steps is 60 and edit.inversion_steps is 50"),
    ],
)
def test_bad_fields_of_the_tune_form(tmp_path, settings, message):
    good = {"clip.path": "a.mp4", "clip.prompt": "a man"}
    assert message in refusal(InputError, runs.train_words, tmp_path, good | settings)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "there is no prompt yet; write one on each line"),
        (["a"], {"strength": 0}, "edit.strength is 0.0; it must be 0.01 to 1"),
        (["a"], {"steps": 60}, "edit.steps is 60 and edit.inversion_steps is 50"),
        (["a"], {"equalizer": ["red"]}, "equalizer has 'red'; it must be a word and a factor"),
    ],
)
def test_bad_fields_of_the_edit_form(tmp_path, prompts, settings, message):
    run = write_config(tmp_path / "run")
    assert message in refusal(InputError, runs.edit_words, run, prompts, settings)


def test_continue_command(tmp_path):
    run = write_config(tmp_path / "run", clip__prompt="a", train__steps=5)
    for steps, expected in ((0, 5), (5, 5), (9, 9)):
        _, rest = main.parser().parse_known_args(runs.continue_words(run, steps))
        config = read_config(rest)
        assert config.train.steps == expected
        assert not configs.differences(runs.read_config(run), config)


def test_losses(tmp_path):
    assert runs.losses(tmp_path) == []
    lines = [json.dumps({"step": i, "loss": float(i)}) for i in range(1, 1001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 1001, "lo']))
    points = runs.losses(tmp_path)
    assert len(points) == runs.MAX_POINTS
    assert points[0] == (1, 1.0, 1.0)
    assert points[-1] == (1000, 1000.0, np.mean(np.arange(951, 1001)))


# ---------------------------------------------------------------------------------------------------------- the command


def test_busy_port_and_other_addresses():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        message = refusal(InputError, web.check_port, "127.0.0.1", port)
        assert f"port {port} of 127.0.0.1 is in use; add --port=" in message
        web.check_port("127.0.0.1", int(message.partition("--port=")[2].partition(",")[0]))
    assert "--port is 70000; it must be 1 to 65535" in refusal(InputError, web.check_port, "127.0.0.1", 70000)
    assert "cannot be used" in refusal(InputError, web.check_port, "192.0.2.1", port)
    assert "is not an address of this machine" in refusal(InputError, web.check_port, "no such host", port)


def test_password_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(web.PASSWORD, raising=False)
    assert web.read_password(None) == ""
    monkeypatch.setenv(web.PASSWORD, "from the environment")
    assert web.read_password(None) == "from the environment"
    (tmp_path / "password").write_text("from a file\n")
    assert web.read_password(str(tmp_path / "password")) == "from a file"
    (tmp_path / "empty").touch()
    for name in ("empty", "missing"):
        assert "does not exist or is empty" in refusal(InputError, web.read_password, str(tmp_path / name))


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main.main(["web"]) == 2
    assert "tav: `tav web` needs Gradio, which is not installed; `pip install" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the server

with_gradio = pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="needs the extra `web`")
PASSWORD = "a password"


class Server:
    """`tav web` in a process, and the client of Gradio with the fields of the forms in order."""

    def __init__(self, root: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "tav_jax", "web", f"--workdir={root}", f"--port={self.port}", "--max-upload=1"]
        environment = {**os.environ, web.PASSWORD: PASSWORD, "HTTP_PROXY": "http://192.0.2.1:1"}
        output = root.parent / "output.txt"
        with output.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
        until(lambda: f"Tune and edit in {root} at {self.url} " in output.read_text(), 180)
        from gradio_client import Client

        self.client = Client(self.url, auth=(web.USER, PASSWORD), verbose=False, analytics_enabled=False)
        self.opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        form = urllib.parse.urlencode({"username": web.USER, "password": PASSWORD}).encode()
        self.opener.open(f"{self.url}login", form).close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def call(self, name: str, *values):
        return self.client.predict(*values, api_name=f"/{name}")

    def refuses(self, message: str, name: str, *values) -> None:
        with pytest.raises(Exception, match=message):  # its type depends on whether the upload or the page refuses
            self.call(name, *values)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def state(root: Path) -> list[tuple[str, str]]:
    """(command, state) of all jobs."""
    files = sorted((root / ".tav-web/jobs").glob("*.json"), key=lambda file: int(file.stem))
    return [(job["words"][0], job["state"]) for job in (json.loads(file.read_text()) for file in files)]


@with_gradio
@pytest.mark.slow
def test_upload_tune_edit_cancel_and_restart(tmp_path, square_clip):
    """The page over its API, with a server that is killed while it tunes."""
    from gradio_client import handle_file

    root = tmp_path / "runs"
    server = Server(root)
    try:
        (tmp_path / "no video.mp4").write_text("text" * 100)
        server.refuses("the file", "upload", handle_file(str(tmp_path / "no video.mp4")))
        (tmp_path / "large.mp4").write_bytes(bytes(1_500_000))
        server.refuses("413|size|large", "upload", handle_file(str(tmp_path / "large.mp4")))
        for path in ("/etc/passwd", root / "red/config.json", root / ".tav-web/jobs/1.json", "../../etc/passwd"):
            for opener in (server.opener, urllib.request.build_opener()):  # logged in, and not
                with pytest.raises(urllib.error.HTTPError, match=r"40[134]"):
                    opener.open(f"{server.url}gradio_api/file={path}")
        server.opener.open(f"{server.url}config").close()

        assert "red circle on grass" in str(server.call("demo"))
        assert server.call("upload", handle_file(str(square_clip)))[-1].startswith("6 frames, 0.6 s, 40×32")
        fields = ["red square", "blue square", str(REFERENCE / "sd1/model"), 3, 1, 0, 32, 32, 4000, 1e-3, "float32"]
        fields += [2, 2, 2, 2, 1.0, 33]
        server.refuses("clip.height 30 is not a multiple of 8", "tune", "x", *fields[:7], 30, *fields[8:])
        command = server.call("tune", "../../red", *fields)[-1]
        assert command.startswith(f"tav train --workdir={root}/red ")
        metrics = root / "red/metrics.jsonl"
        until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 4, 300)
        server.kill()
        lines = len(metrics.read_text().splitlines())
        until(lambda: len(metrics.read_text().splitlines()) > lines, 60)

        server = Server(root)
        shown = str(server.call("show", None))
        assert "train red, " in shown  # the page after a reload in mid-run
        assert "tuning" in shown
        assert "red square" in shown  # the previews beside the clip
        server.call("cancel")
        until(lambda: state(root) == [("train", "stopped")], 60)
        steps = max(
            int(directory.name) for directory in (root / "red/checkpoints").iterdir() if directory.name.isdigit()
        )
        server.call("continue", "red", steps + 1)
        until(lambda: state(root)[-1] == ("train", "finished"), 120)
        assert json.loads(metrics.read_text().splitlines()[-1])["step"] == steps + 1

        layer = np.zeros((32, 32, 4), np.uint8)
        layer[:16] = 255
        Image.fromarray(layer).save(tmp_path / "layer.png")
        painted = {"background": None, "layers": [handle_file(str(tmp_path / "layer.png"))], "composite": None}
        fields = [0.5, 3.0, 2, 2, "ddim", "", "", 0, 0, 0, "", "", 0.0]
        server.refuses("there is no run", "edit", "../red", "a", False, None, False, *fields)
        command = server.call("edit", "red", "blue square\ngreen square", True, painted, False, *fields)
        until(lambda: state(root)[-1] == ("edit", "finished"), 300)
        words = shlex.split(command)
        assert words[:3] == ["tav", "edit", f"--workdir={root}/red"]
        (mask,) = (word.removeprefix("--mask=") for word in words if word.startswith("--mask="))
        assert load_video(mask).frames[0, :, :, 0].tolist() == [[255] * 32] * 16 + [[0] * 32] * 16
        names = [file.name for file in (root / "red/edits").glob("blue-square*.mp4")]
        mp4, gif = server.call("download", "red", names[0])
        assert load_video(mp4).frames.shape == load_video(gif).frames.shape == (3, 32, 32, 3)
        server.refuses("is not an edit of red", "download", "red", "../../config.json")
        # The command that the page shows makes the same edit again.
        videos = {file.name: file.read_bytes() for file in (root / "red/edits").glob("*square*.mp4")}
        again = subprocess.run([sys.executable, "-m", "tav_jax", *words[1:], "--force"], capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert {file.name: file.read_bytes() for file in (root / "red/edits").glob("*square*.mp4")} == videos
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
    finally:
        server.kill()
        for file in (root / ".tav-web/jobs").glob("*.json"):
            if (job := json.loads(file.read_text()))["state"] == "running":
                os.killpg(job["pid"], signal.SIGKILL)

"""The launch scripts, run for real against stand-ins for Google's tools that write down what they were asked."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = ("create.sh", "run.sh", "delete.sh", "queued.sh", "gke.sh")
PLACE = ("--zone=us-west4-a", "--name=ski")

STAND_IN = """#!/usr/bin/env bash
# Writes its words down; $ANSWERS/<verb> is a script that answers.
printf '%s\\0' "$(basename "$0")" "$@" >> "$ANSWERS/asked"
printf '\\n' >> "$ANSWERS/asked"
for word in "$@"; do
  if [ -f "$ANSWERS/$word" ]; then . "$ANSWERS/$word"; fi
done
exit 0
"""


class Machine:
    """A person's machine with stand-ins on its PATH."""

    def __init__(self, root: Path):
        self.root, self.bin = root, root / "bin"
        self.bin.mkdir()
        for tool in ("gcloud", "xpk", "docker", "uv", "tav"):
            (self.bin / tool).write_text(STAND_IN)
            (self.bin / tool).chmod(0o755)

    def answer(self, verb: str, script: str) -> None:
        (self.root / verb).write_text(script)

    def __call__(self, script: str | Path, *words: str, **more: str) -> subprocess.CompletedProcess:
        env = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(self.root), "ANSWERS": str(self.root), **more}
        return subprocess.run(
            ["bash", str(LAUNCH / script), *words], env=env, cwd=self.root, capture_output=True, text=True, timeout=60
        )

    @property
    def asked(self) -> list[list[str]]:
        file = self.root / "asked"
        if not file.exists():
            return []
        return [line.rstrip("\0").split("\0") for line in file.read_text().split("\0\n") if line]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize(
    ("kind", "accelerator", "runtime"),
    [
        ("v4-8", "v4-8", "tpu-ubuntu2204-base"),
        ("v5e-8", "v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5litepod-16", "v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v5p-8", "v2-alpha-tpuv5"),
        ("v6e-4", "v6e-4", "v2-alpha-tpuv6e"),
    ],
)
def test_create_asks_for_the_type_and_installs_on_all_workers(machine, kind, accelerator, runtime):
    done = machine("create.sh", f"--type={kind}", *PLACE, "--spot", "--project=mine")
    assert done.returncode == 0, done.stderr
    create, copy, install = machine.asked
    tail = ["--zone=us-west4-a", "--project=mine"]
    begin = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert create == [
        *begin, "create", "ski", f"--accelerator-type={accelerator}", f"--version={runtime}", "--spot", *tail
    ]  # fmt: skip
    assert copy[:5] == [*begin, "scp"]
    assert [Path(word).name for word in copy[5:7]] == ["tav_jax.tar.gz", "on_vm.sh"]
    assert copy[7:] == ["ski:", "--worker=all", *tail]
    assert install == [*begin, "ssh", "ski", "--worker=all", "--command=bash on_vm.sh", *tail]


def test_what_is_packed_is_a_whole_checkout(machine):
    machine.answer("scp", 'cp "$5" "$ANSWERS/packed.tar.gz"')
    assert machine("create.sh", "--type=v5e-8", *PLACE).returncode == 0
    with tarfile.open(machine.root / "packed.tar.gz") as packed:
        names = packed.getnames()
    assert {"tav_jax/pyproject.toml", "tav_jax/tav_jax/__init__.py", "tav_jax/configs/default.py"} <= set(names)


def test_run_gives_every_worker_the_same_words_whatever_is_in_them(machine):
    words = ["train", "--workdir=gs://b/run", '--config.clip.prompt=it\'s "a man"; $HOME `x` is skiing, 100%', "--é=ü"]
    done = machine("run.sh", *PLACE, "--", *words)
    assert done.returncode == 0, done.stderr
    [ssh] = machine.asked
    assert ssh[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "ski", "--worker=all"]
    command = ssh[7].removeprefix("--command=")
    assert "nohup" in command  # it outlives the connection
    # What the worker's shell makes of the line:
    env = {"PATH": f"{machine.bin}:{os.environ['PATH']}", "HOME": str(machine.root), "ANSWERS": str(machine.root)}
    subprocess.run(["bash", "-c", command + " wait"], env=env, cwd=machine.root, check=True, timeout=30)
    assert machine.asked[-1] == ["tav", *words]


def test_run_shows_logs(machine):
    for log, worker in (("follow", "0"), ("all", "all")):
        assert machine("run.sh", *PLACE, f"--log={log}").returncode == 0
        assert f"--worker={worker}" in machine.asked[-1]
        assert "tav.log" in machine.asked[-1][7]


def test_delete_takes_the_machine_or_the_request(machine):
    assert machine("delete.sh", *PLACE).returncode == machine("delete.sh", *PLACE, "--queued=yes").returncode == 0
    vm, request = machine.asked
    assert vm[3:7] == ["tpu-vm", "delete", "ski", "--quiet"]
    assert request[3:8] == ["queued-resources", "delete", "ski", "--force", "--quiet"]


QUEUED = ("--type=v5e-8", *PLACE, "--bucket=gs://b/place/")


def test_a_slice_that_is_taken_away_is_asked_for_again_until_the_run_has_finished(machine):
    # Looked at four times: running, taken away, running, finished.
    looks = '$(cat "$ANSWERS"/look* 2>/dev/null | wc -l)'
    machine.answer("describe", f'echo x >> "$ANSWERS/looks"; [ {looks} = 2 ] && echo SUSPENDED || echo ACTIVE')
    machine.answer("ls", f"[ {looks} -ge 3 ] || exit 1")
    machine.answer(
        "create",
        'for w in "$@"; do case $w in --metadata-from-file=*) cp "${w#*script=}" "$ANSWERS/startup";; esac; done',
    )
    words = ["train", "--config.clip.prompt=a man is skiing", "--workdir=gs://b/run"]
    done = machine("queued.sh", *QUEUED, "--spot", "--watch=1", "--", *words)
    assert done.returncode == 0, done.stderr
    assert "asking again" in done.stderr
    assert "has finished" in done.stderr
    verbs = [asked[4] for asked in machine.asked if asked[3] == "queued-resources"]
    assert verbs == ["create", "describe", "describe", "delete", "create", "describe", "delete"]
    create = next(asked for asked in machine.asked if "create" in asked)
    assert create[5:10] == [
        "ski", "--node-id=ski", "--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"
    ]  # fmt: skip
    copies = [asked for asked in machine.asked if asked[:3] == ["gcloud", "storage", "cp"]]
    assert [copy[-1] for copy in copies] == ["gs://b/place/ski.tar.gz"]

    # The startup script is one that a worker can run: it fetches, installs, runs those very words, and leaves the mark.
    (machine.root / "asked").unlink()
    machine.answer("cp", ': > "$HOME/tav_jax.tar.gz"')
    machine.answer("venv", 'mkdir -p "${@: -1}/bin"; ln -sf "$(command -v tav)" "${@: -1}/bin/python"')
    (machine.bin / "date").write_text("#!/bin/sh\nsleep 0.3; echo now\n")  # slower than a gcloud that reads nothing
    (machine.bin / "date").chmod(0o755)
    done = machine(machine.root / "startup")
    assert done.returncode == 0, done.stderr
    told = machine.asked
    assert told[0] == ["gcloud", "storage", "cp", "gs://b/place/ski.tar.gz", f"{machine.root}/tav_jax.tar.gz"]
    assert told[1][:4] == ["uv", "venv", "--python", "3.12"]
    assert told[2][:3] == ["uv", "pip", "install"]
    assert told[2][-1] == f"tav_jax[tpu] @ file://{machine.root}/tav_jax.tar.gz"
    assert told[3] == ["tav", *words]
    assert told[4] == ["gcloud", "storage", "cp", "-", "gs://b/place/ski.finished"]


def test_a_run_that_fails_leaves_no_mark(machine):
    machine.answer("venv", 'mkdir -p "${@: -1}/bin"; ln -sf "$(command -v tav)" "${@: -1}/bin/python"')
    machine.answer("train", "exit 3")
    done = machine("on_vm.sh", TAV_SOURCE="tav_jax[tpu]", TAV_COMMAND="train", TAV_FINISHED="gs://b/mark")
    assert done.returncode == 3
    assert machine.asked[-1] == ["tav", "train"]
    assert machine.asked[1][-1] == "tav_jax[tpu]"


def test_gke_builds_pushes_and_hands_the_job_to_xpk(machine):
    words = ["train", "--config.clip.prompt=a man is skiing", "--workdir=gs://b/run"]
    done = machine("gke.sh", "--type=v6e-8", *PLACE, "--cluster=c", "--image=i/t", "--build=yes", "--", *words)
    assert done.returncode == 0, done.stderr
    build, push, job = machine.asked
    assert build[:5] == ["docker", "build", "--tag", "i/t", "--file"]
    assert push == ["docker", "push", "i/t"]
    assert job[:3] == ["xpk", "workload", "create"]
    told = dict(word.removeprefix("--").split("=", 1) for word in job[3:])
    assert told.pop("command").strip() == r"tav train --config.clip.prompt=a\ man\ is\ skiing --workdir=gs://b/run"
    assert told == {
        "cluster": "c", "workload": "ski", "tpu-type": "v6e-8", "num-slices": "1", "docker-image": "i/t",
        "max-restarts": "100", "zone": "us-west4-a",
    }  # fmt: skip


COMMANDS = {
    "create.sh": ["--type=v5e-8", *PLACE],
    "run.sh": [*PLACE, "--", "train", "--workdir=gs://b/r"],
    "delete.sh": [*PLACE],
    "queued.sh": [*QUEUED, "--", "train", "--workdir=gs://b/r"],
    "gke.sh": ["--type=v5e-8", *PLACE, "--cluster=c", "--image=i", "--build=yes", "--", "train", "--workdir=gs://b/r"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_what_a_run_would_do_and_does_nothing(machine, script):
    first, *rest = COMMANDS[script]
    dry = machine(script, "--dry-run", first, *rest)
    assert dry.returncode == 0, dry.stderr
    assert not machine.asked
    printed = dry.stdout.splitlines()
    assert printed
    assert all(line.split()[0] in ("gcloud", "git", "docker", "xpk") for line in printed)
    assert machine(script, "--help").stdout.startswith(f"launch/{script} ")


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("create.sh", ["--type=v9-8", *PLACE], "--type is 'v9-8'; one of v4-N, v5e-N, v5p-N, v6e-N"),
        ("create.sh", ["--type=v5e-many", *PLACE], "ends in a number"),
        ("create.sh", [*PLACE], "--type is missing"),
        ("create.sh", ["--type=v5e-8"], "--zone is missing"),
        ("create.sh", ["--type=v5e-8", "--zone=z", "--name=My TPU"], "--name is 'My TPU'"),
        ("create.sh", ["--typ=v5e-8"], "--typ is not an option"),
        ("create.sh", ["v5e-8"], "v5e-8 is not an option"),
        ("create.sh", ["--type"], "--type needs a value"),
        ("run.sh", [*PLACE], "there is no command"),
        ("run.sh", [*PLACE, "--", "train", "--workdir=runs/ski"], "needs a bucket"),
        ("run.sh", [*PLACE, "--log=some"], "--log is 'some'"),
        ("queued.sh", ["--type=v5e-8", *PLACE, "--bucket=here", "--", "train"], "--bucket is 'here'"),
        ("queued.sh", [*QUEUED, "--watch=often", "--", "train"], "--watch is 'often'"),
        ("queued.sh", [*QUEUED], "there is no command"),
        ("gke.sh", ["--type=v5e-8", *PLACE, "--image=i", "--", "train"], "--cluster is missing"),
        ("gke.sh", ["--type=v5e-8", *PLACE, "--cluster=c", "--", "train"], "--image is missing"),
    ],
)
def test_a_wrong_line_is_told_in_one_sentence_before_anything_is_asked(machine, script, words, told):
    done = machine(script, *words)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not machine.asked


def test_a_machine_without_gcloud_is_told_where_to_get_it(machine):
    (machine.bin / "gcloud").unlink()
    for tool in ("bash", "basename", "dirname"):
        (machine.bin / tool).symlink_to(shutil.which(tool))
    done = machine("create.sh", "--type=v5e-8", *PLACE, PATH=str(machine.bin))
    assert done.returncode == 2
    assert "gcloud is not installed" in done.stderr


def test_shellcheck_has_nothing_to_say():
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = [str(file) for file in LAUNCH.glob("*.sh")]
    found = subprocess.run([shellcheck, "-x", *scripts], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout

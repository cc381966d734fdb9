"""The launch scripts, executed with stand-ins for gcloud, xpk, docker and uv that record their arguments."""

import argparse
import os
import shlex
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
# Records its arguments, and runs the script $ANSWERS/<word> for each of them that has one.
printf '%s\\0' "$(basename "$0")" "$@" >> "$ANSWERS/calls"
printf '\\n' >> "$ANSWERS/calls"
for word in "$@"; do
  if [ -f "$ANSWERS/$word" ]; then . "$ANSWERS/$word"; fi
done
exit 0
"""


class Machine:
    """Runs launch scripts with the stand-ins on the PATH."""

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
    def calls(self) -> list[list[str]]:
        file = self.root / "calls"
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
def test_create_requests_the_type_and_installs_on_all_workers(machine, kind, accelerator, runtime):
    done = machine("create.sh", f"--type={kind}", *PLACE, "--spot", "--project=mine")
    assert done.returncode == 0, done.stderr
    create, copy, install = machine.calls
    tail = ["--zone=us-west4-a", "--project=mine"]
    begin = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert create == [
        *begin, "create", "ski", f"--accelerator-type={accelerator}", f"--version={runtime}", "--spot", *tail
    ]  # fmt: skip
    assert copy[:5] == [*begin, "scp"]
    assert [Path(word).name for word in copy[5:7]] == ["tav_jax.tar.gz", "on_vm.sh"]
    assert copy[7:] == ["ski:", "--worker=all", *tail]
    assert install == [*begin, "ssh", "ski", "--worker=all", "--command=bash on_vm.sh", *tail]


def test_the_archive_contains_the_checkout(machine):
    machine.answer("scp", 'cp "$5" "$ANSWERS/packed.tar.gz"')
    assert machine("create.sh", "--type=v5e-8", *PLACE).returncode == 0
    with tarfile.open(machine.root / "packed.tar.gz") as packed:
        names = packed.getnames()
    assert {"tav_jax/pyproject.toml", "tav_jax/tav_jax/__init__.py", "tav_jax/configs/default.py"} <= set(names)


def test_run_passes_arguments_with_special_characters_unchanged_to_every_worker(machine):
    words = ["train", "--workdir=gs://b/run", '--config.clip.prompt=it\'s "a man"; $HOME `x` is skiing, 100%', "--é=ü"]
    done = machine("run.sh", *PLACE, "--", *words)
    assert done.returncode == 0, done.stderr
    [ssh] = machine.calls
    assert ssh[:7] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "ski", "--worker=all"]
    command = ssh[7].removeprefix("--command=")
    assert "nohup" in command  # continues when the connection breaks
    # The worker's shell parses the line back to the same arguments.
    env = {"PATH": f"{machine.bin}:{os.environ['PATH']}", "HOME": str(machine.root), "ANSWERS": str(machine.root)}
    subprocess.run(["bash", "-c", command + " wait"], env=env, cwd=machine.root, check=True, timeout=30)
    assert machine.calls[-1] == ["tav", *words]


def test_run_shows_logs(machine):
    for log, worker in (("follow", "0"), ("all", "all")):
        assert machine("run.sh", *PLACE, f"--log={log}").returncode == 0
        assert f"--worker={worker}" in machine.calls[-1]
        assert "tav.log" in machine.calls[-1][7]


def test_delete_removes_the_vm_or_the_queued_request(machine):
    assert machine("delete.sh", *PLACE).returncode == machine("delete.sh", *PLACE, "--queued=yes").returncode == 0
    vm, request = machine.calls
    assert vm[3:7] == ["tpu-vm", "delete", "ski", "--quiet"]
    assert request[3:8] == ["queued-resources", "delete", "ski", "--force", "--quiet"]


QUEUED = ("--type=v5e-8", *PLACE, "--bucket=gs://b/place/")


def test_queued_requests_a_preempted_slice_again_until_the_run_has_finished(machine):
    # The state is checked four times: running, preempted, running, finished.
    checks = '$(cat "$ANSWERS"/check* 2>/dev/null | wc -l)'
    machine.answer("describe", f'echo x >> "$ANSWERS/checks"; [ {checks} = 2 ] && echo SUSPENDED || echo ACTIVE')
    machine.answer("ls", f"[ {checks} -ge 3 ] || exit 1")
    machine.answer(
        "create",
        'for w in "$@"; do case $w in --metadata-from-file=*) cp "${w#*script=}" "$ANSWERS/startup";; esac; done',
    )
    words = ["train", "--config.clip.prompt=a man is skiing", "--workdir=gs://b/run"]
    done = machine("queued.sh", *QUEUED, "--spot", "--watch=1", "--", *words)
    assert done.returncode == 0, done.stderr
    assert "requesting it again" in done.stderr
    assert "has finished" in done.stderr
    verbs = [call[4] for call in machine.calls if call[3] == "queued-resources"]
    assert verbs == ["create", "describe", "describe", "delete", "create", "describe", "delete"]
    create = next(call for call in machine.calls if "create" in call)
    assert create[5:10] == [
        "ski", "--node-id=ski", "--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"
    ]  # fmt: skip
    copies = [call for call in machine.calls if call[:3] == ["gcloud", "storage", "cp"]]
    assert [copy[-1] for copy in copies] == ["gs://b/place/ski.tar.gz"]

    # A worker can run the startup script: it fetches, installs, runs the command, and writes the finished mark.
    (machine.root / "calls").unlink()
    machine.answer("cp", 'case "$4" in *.gz) : > "$HOME/tav_jax.tar.gz";; esac')
    machine.answer("venv", 'mkdir -p "${@: -1}/bin"; ln -sf "$(command -v tav)" "${@: -1}/bin/python"')
    done = machine(machine.root / "startup")
    assert done.returncode == 0, done.stderr
    calls = machine.calls
    assert calls[0] == ["gcloud", "storage", "cp", "gs://b/place/ski.tar.gz", f"{machine.root}/tav_jax.tar.gz"]
    assert calls[1][:4] == ["uv", "venv", "--python", "3.12"]
    assert calls[2][:3] == ["uv", "pip", "install"]
    assert calls[2][-1] == f"tav_jax[tpu] @ file://{machine.root}/tav_jax.tar.gz"
    assert calls[3] == ["tav", *words]
    assert calls[4] == ["gcloud", "storage", "cp", f"{machine.root}/tav.log", "gs://b/place/ski.finished"]


@pytest.mark.parametrize(("status", "attempts", "mark"), [(3, 3, True), (2, 1, True), (75, 1, False)])
def test_a_failed_run_is_repeated_and_then_leaves_its_log_as_a_mark(machine, status, attempts, mark):
    machine.answer("venv", 'mkdir -p "${@: -1}/bin"; ln -sf "$(command -v tav)" "${@: -1}/bin/python"')
    machine.answer("train", f"echo 'what went wrong'; exit {status}")
    marks = {"TAV_FINISHED": "gs://b/finished", "TAV_FAILED": "gs://b/failed"}
    done = machine("on_vm.sh", TAV_SOURCE="tav_jax[tpu]", TAV_COMMAND="train", **marks)
    assert done.returncode == status
    assert machine.calls[1][-1] == "tav_jax[tpu]"
    copy = ["gcloud", "storage", "cp", f"{machine.root}/tav.log", "gs://b/failed"]
    assert machine.calls[2:] == [["tav", "train"]] * attempts + [copy] * mark
    assert (machine.root / "tav.log").read_text() == "what went wrong\n"


def test_under_systemd_the_command_is_a_unit_that_gets_sigterm(machine):
    machine.answer("venv", 'mkdir -p "${@: -1}/bin"; ln -sf "$(command -v tav)" "${@: -1}/bin/python"')
    for tool, script in (("ps", "echo systemd"), ("id", "echo 0"), ("systemd-run", '"${@: -3}"')):
        (machine.bin / tool).write_text(STAND_IN.replace("exit 0", script))
        (machine.bin / tool).chmod(0o755)
    words = ["train", "--config.clip.prompt=a 'man' is $HOME"]
    line = " ".join(map(shlex.quote, words))
    assert machine("on_vm.sh", TAV_SOURCE="tav_jax[tpu]", TAV_COMMAND=line).returncode == 0
    unit = next(call for call in machine.calls if call[0] == "systemd-run")
    assert {"--wait", "--pipe", "--property=After=network-online.target", f"--setenv=HOME={machine.root}"} <= set(unit)
    assert machine.calls[-1] == ["tav", *words]


def test_queued_stops_after_a_failed_run_and_after_its_time(machine):
    machine.answer("describe", "echo ACTIVE")
    machine.answer("ls", 'case "$3" in *.failed) [ -f "$ANSWERS/has_failed" ] || exit 1;; *) exit 1;; esac')
    machine.answer("cat", "echo the last line of the log")
    (machine.root / "has_failed").touch()
    words = ("--watch=1", "--network=n", "--service-account=a@b", "--reserved", "--", "train", "--workdir=gs://b/run")
    done = machine("queued.sh", *QUEUED, *words)
    assert done.returncode == 1
    assert "The run has failed. Its log is gs://b/place/ski.failed" in done.stderr
    assert "the last line of the log" in done.stderr
    verbs = [call[4] for call in machine.calls if call[3] == "queued-resources"]
    assert verbs == ["create", "delete"]
    create = next(call for call in machine.calls if "create" in call)
    assert {"--network=n", "--service-account=a@b", "--reserved"} <= set(create)

    (machine.root / "has_failed").unlink()
    (machine.bin / "sleep").write_text("#!/bin/sh\n")
    (machine.bin / "sleep").chmod(0o755)
    done = machine("queued.sh", *QUEUED, "--hours=1", "--watch=1200", "--", "train", "--workdir=gs://b/run")
    assert done.returncode == 1
    assert "allocated for 1 h" in done.stderr
    verbs = [call[4] for call in machine.calls if call[3] == "queued-resources"]
    assert verbs[2:] == ["create", "describe", "describe", "describe", "delete"]


def test_gke_builds_and_pushes_the_image_and_creates_an_xpk_workload(machine):
    words = ["train", "--config.clip.prompt=a man is skiing", "--workdir=gs://b/run"]
    done = machine("gke.sh", "--type=v6e-8", *PLACE, "--cluster=c", "--image=i/t", "--build=yes", "--", *words)
    assert done.returncode == 0, done.stderr
    build, push, job = machine.calls
    assert build[:5] == ["docker", "build", "--tag", "i/t", "--file"]
    assert push == ["docker", "push", "i/t"]
    assert job[:3] == ["xpk", "workload", "create"]
    options = dict(word.removeprefix("--").split("=", 1) for word in job[3:])
    assert (
        options.pop("command").strip() == r"exec tav train --config.clip.prompt=a\ man\ is\ skiing --workdir=gs://b/run"
    )
    assert options == {
        "cluster": "c", "workload": "ski", "tpu-type": "v6e-8", "num-slices": "1", "docker-image": "i/t",
        "max-restarts": "100", "restart-on-exit-codes": "75,1", "zone": "us-west4-a",
    }  # fmt: skip


def test_xpk_accepts_the_line_and_restarts_on_these_codes(machine):
    """With xpk's own parser: without the option it restarts on 42 and 127 to 255."""
    core = pytest.importorskip("xpk.parser.core", reason="xpk is not installed", exc_type=ImportError)
    from xpk.commands.workload import get_restart_exit_codes

    parser = argparse.ArgumentParser()
    core.set_parser(parser)
    machine("gke.sh", "--type=v6e-8", *PLACE, "--cluster=c", "--image=i", "--", "train", "--workdir=gs://b/run")
    given = parser.parse_args(machine.calls[-1][1:])
    assert {1, 75, 134} <= set(get_restart_exit_codes(given))
    assert not {0, 2} & set(get_restart_exit_codes(given))
    assert given.command.strip() == "exec tav train --workdir=gs://b/run"


COMMANDS = {
    "create.sh": ["--type=v5e-8", *PLACE],
    "run.sh": [*PLACE, "--", "train", "--workdir=gs://b/r"],
    "delete.sh": [*PLACE],
    "queued.sh": [*QUEUED, "--", "train", "--workdir=gs://b/r"],
    "gke.sh": ["--type=v5e-8", *PLACE, "--cluster=c", "--image=i", "--build=yes", "--", "train", "--workdir=gs://b/r"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_dry_run_prints_the_commands_and_runs_none(machine, script):
    first, *rest = COMMANDS[script]
    dry = machine(script, "--dry-run", first, *rest)
    assert dry.returncode == 0, dry.stderr
    assert not machine.calls
    printed = dry.stdout.splitlines()
    assert printed
    assert all(line.split()[0] in ("gcloud", "git", "docker", "xpk") for line in printed)
    assert machine(script, "--help").stdout.startswith(f"launch/{script} ")


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("create.sh", ["--type=v9-8", *PLACE], "--type is 'v9-8'; one of v4-N, v5e-N, v5p-N, v6e-N"),
        ("create.sh", ["--type=v5e-many", *PLACE], "must end in a number of chips"),
        ("create.sh", [*PLACE], "--type is missing"),
        ("create.sh", ["--type=v5e-8"], "--zone is missing"),
        ("create.sh", ["--type=v5e-8", "--zone=z", "--name=My TPU"], "--name is 'My TPU'"),
        ("create.sh", ["--typ=v5e-8"], "--typ is not an option"),
        ("create.sh", ["v5e-8"], "v5e-8 is not an option"),
        ("create.sh", ["--type"], "--type needs a value"),
        ("run.sh", [*PLACE], "there is no command"),
        ("run.sh", [*PLACE, "--", "train", "--workdir=runs/ski"], "needs a bucket"),
        ("run.sh", [*PLACE, "--log=some"], "--log is 'some'; it must be follow or all"),
        ("queued.sh", ["--type=v5e-8", *PLACE, "--bucket=here", "--", "train"], "--bucket is 'here'"),
        ("queued.sh", [*QUEUED, "--watch=often", "--", "train"], "--watch is 'often'"),
        ("queued.sh", [*QUEUED, "--hours=0", "--", "train"], "--hours is '0'"),
        ("queued.sh", [*QUEUED], "there is no command"),
        ("gke.sh", ["--type=v5e-8", *PLACE, "--image=i", "--", "train"], "--cluster is missing"),
        ("gke.sh", ["--type=v5e-8", *PLACE, "--cluster=c", "--", "train"], "--image is missing"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence_before_any_call(machine, script, words, message):
    done = machine(script, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not machine.calls


def test_a_missing_gcloud_is_reported_with_its_address(machine):
    (machine.bin / "gcloud").unlink()
    for tool in ("bash", "basename", "dirname"):
        (machine.bin / tool).symlink_to(shutil.which(tool))
    done = machine("create.sh", "--type=v5e-8", *PLACE, PATH=str(machine.bin))
    assert done.returncode == 2
    assert "gcloud is not installed" in done.stderr


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    scripts = [str(file) for file in LAUNCH.glob("*.sh")]
    found = subprocess.run([shellcheck, "-x", *scripts], cwd=LAUNCH.parent, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout

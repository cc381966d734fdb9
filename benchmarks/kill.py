"""Kill `tav train` again and again, at random moments, and check that nothing is lost.

python benchmarks/kill.py --kills=30 --seed=0

The run is a short one on the embedded model, with a checkpoint every second step and previews every third. It is killed
with SIGKILL at a random time, or just after something has started that must not be left half done: an unfinished
checkpoint, its checksums, the removal of an old checkpoint, a scratch file, a video being encoded, a line of metrics.
Then the same command runs again. A run that has finished is compared with a run that was not interrupted, and the next
one starts in a new directory, until there were enough kills. Compared are:

  the trained weights and Adam's state, bit for bit; the loss of every step, one line for each step
  the pixels of every preview; every JSON file can be parsed; the checksums of every checkpoint match
  no scratch file, no unfinished checkpoint and no lock is left

The last line is a summary in JSON; the exit status is 0 if nothing was lost.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

STEPS, CHECKPOINT_EVERY, PREVIEW_EVERY = 12, 2, 3
PROMPTS = ("a blue circle on grass", "a red circle on grass, at night")
TIMEOUT = 600  # seconds for one process


def write_clip(file: Path) -> Path:
    """The demo's clip, as a video file."""
    from tav_jax import Clip
    from tav_jax.demo.edits import FPS, source_clip

    return Clip(source_clip(None, 4).frames, FPS).save(file)


def train_command(clip: Path, workdir: Path) -> list[str]:
    from tav_jax.demo.edits import MODEL

    settings = {
        "model.path": MODEL,
        "model.dtype": "float32",
        "clip.path": clip,
        "clip.prompt": "a red circle on grass",
        "clip.frames": 4,
        "clip.height": 64,
        "clip.width": 64,
        "train.steps": STEPS,
        "train.learning_rate": 3e-4,
        "train.checkpoint_every": CHECKPOINT_EVERY,
        "train.preview_every": PREVIEW_EVERY,
        "edit.prompts": PROMPTS,
        "edit.steps": 2,
        "edit.inversion_steps": 2,
    }
    options = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "tav_jax", "train", f"--workdir={workdir}", *options]


# ------------------------------------------------------------------------------------------------- killing


def paths(directory: Path) -> set[str]:
    """All files and directories below a directory, and the size of the metrics. Files may vanish during the listing."""
    found, waiting = set(), [str(directory)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    found.add(entry.path)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.name == "metrics.jsonl":
                        found.add(f"{entry.path} {entry.stat().st_size}")
        except FileNotFoundError:
            pass
    return found


def is_hidden(path: str) -> bool:
    return Path(path).name.startswith(".")


# The moment of a kill: when such a path appears or, after a minus sign, disappears.
EVENTS: dict[str, Callable[[str], bool]] = {
    "checkpoint": lambda path: path.endswith(".orbax-checkpoint-tmp"),
    "inside a checkpoint": lambda path: ".orbax-checkpoint-tmp/" in path,
    "checksums": lambda path: path.endswith("checksums.json"),
    "-old checkpoint": lambda path: "/checkpoints/" in path and "orbax-checkpoint-tmp" not in path,
    "scratch file": lambda path: is_hidden(path) and path.endswith(".json"),
    "video": lambda path: is_hidden(path) and path.endswith(".mp4"),
    "metrics": lambda path: "metrics.jsonl " in path,
}


def wait_for_event(process: subprocess.Popen, workdir: Path, event: str, delay: float) -> bool:
    """Wait for an event and the delay. Returns whether the process is still running then."""
    before, matches = paths(workdir), EVENTS[event]
    while process.poll() is None:
        now = paths(workdir)
        changed = before - now if event.startswith("-") else now - before
        if any(map(matches, changed)):
            time.sleep(delay)
            return process.poll() is None
        before = now
        time.sleep(0.001)
    return False


def run_and_kill(command: list[str], workdir: Path, rng: random.Random, environment: dict[str, str]) -> str | None:
    """Run one process. Returns the event after which it was killed, or None if it finished first."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        event = rng.choice(["any time", *EVENTS])
        if event == "any time":
            try:
                process.wait(rng.uniform(0.0, 25.0))
                running = False
            except subprocess.TimeoutExpired:
                running = True
        else:
            running = wait_for_event(process, workdir, event, rng.choice((0.0, rng.uniform(0.0, 0.03))))
        if running:
            process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    if process.returncode == -signal.SIGKILL:
        return event
    if process.returncode:
        raise AssertionError(f"the command that continues failed with status {process.returncode}: {output}")
    return None


# ------------------------------------------------------------------------------------------------- checking


def train_state(workdir: Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint, read with Orbax alone."""
    import jax
    import orbax.checkpoint as ocp

    newest = max(int(x.name) for x in (workdir / "checkpoints").iterdir() if x.name.isdecimal())
    tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(newest) / "train_state")
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def metrics(workdir: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def differences(expected: Path, killed: Path) -> list[str]:
    """What was lost or damaged in a finished run, compared with an uninterrupted one."""
    from tav_jax import load_video
    from tav_jax.training import checksums

    lost = []
    one, two = train_state(expected), train_state(killed)
    if one.keys() != two.keys():
        lost.append("the checkpoints hold different arrays")
    lost += [f"{name} differs" for name in one if name in two and not np.array_equal(one[name], two[name])]
    if metrics(expected) != metrics(killed):
        lost.append(f"metrics.jsonl differs: {metrics(killed)}")
    previews = {str(x.relative_to(expected)) for x in (expected / "previews").rglob("*.mp4")}
    found = {str(x.relative_to(killed)) for x in killed.rglob("*.mp4")}
    if previews != found:
        lost.append(f"videos that are not in both: {sorted(previews ^ found)}")
    for name in previews & found:
        if not np.array_equal(load_video(expected / name).frames, load_video(killed / name).frames):
            lost.append(f"{name} has other pixels")
    for file in killed.rglob("*.json"):
        try:
            json.loads(file.read_text())
        except ValueError as error:
            lost.append(f"{file} cannot be parsed: {error}")
    steps = {x.name for x in (killed / "checkpoints").iterdir() if x.name.isdecimal()}
    lost += [f"checkpoint {s}: {damage}" for s in steps if (damage := checksums.damage(killed / "checkpoints" / s))]
    lost += [
        f"{x} was left over" for x in killed.rglob("*") if is_hidden(str(x)) or "tmp" in x.name or "damaged" in x.name
    ]
    return lost


def incomplete_files(workdir: Path) -> list[str]:
    """Files under a final name that a kill has left incomplete."""
    from tav_jax import TavError, load_video
    from tav_jax.training import checksums

    incomplete = []
    for file in workdir.rglob("*"):
        # Unfinished checkpoints have another name, and the next process rewrites the lock.
        if any(part.startswith(".") or "orbax-checkpoint-tmp" in part for part in file.relative_to(workdir).parts):
            continue
        try:
            if file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".mp4":
                load_video(file)
        except (ValueError, TavError) as error:
            incomplete.append(f"{file}: {error}")
    found = checksums.examine(workdir / "checkpoints")
    return incomplete + [f"checkpoint {step} is damaged: {reason}" for step, reason in found.damaged]


def run_benchmark(
    kills: int, seed: int, directory: Path, environment: dict[str, str], log: Callable[[str], None]
) -> list[str]:
    """Kill that many times. Returns everything that was lost."""
    rng, done = random.Random(seed), Counter()
    clip, expected = write_clip(directory / "clip.mp4"), directory / "uninterrupted"

    def run_to_end(workdir: Path) -> None:
        command = train_command(clip, workdir)
        subprocess.run(command, check=True, env=environment, timeout=TIMEOUT, stdout=subprocess.DEVNULL)

    run_to_end(expected)  # also fills the compilation cache
    log(f"uninterrupted: {len(metrics(expected))} steps")
    lost, runs = [], 0
    while done.total() < kills:
        runs += 1
        workdir = directory / f"run{runs}"
        while done.total() < kills:
            event = run_and_kill(train_command(clip, workdir), workdir, rng, environment)
            if event is None:
                break
            done[event] += 1
            checkpoints = sorted(x.name for x in (workdir / "checkpoints").glob("*"))
            log(f"kill {done.total()} of run {runs}, {event}: {checkpoints}")
            lost += incomplete_files(workdir)
        else:
            run_to_end(workdir)
        lost += differences(expected, workdir)
        log(f"run {runs} has finished: {lost or 'nothing lost'}")
    log(json.dumps({"kills": done.total(), "runs": runs, "events": dict(done), "lost": lost}))
    return lost


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory in which the runs are kept (default: a temporary one)")
    arguments = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        directory = (arguments.out or Path(temporary)).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        lost = run_benchmark(
            arguments.kills, arguments.seed, directory, dict(os.environ), lambda text: print(text, flush=True)
        )
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

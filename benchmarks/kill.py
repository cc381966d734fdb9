"""Kill `tav train` again and again, at any moment, and look whether anything was lost.

python benchmarks/kill.py --kills=30 --seed=0

The run is a short one on the embedded model, with a checkpoint every second step and previews every third. It is
killed (SIGKILL, which no process can see coming) at a random instant, or just after something that is dangerous to
interrupt has begun: a checkpoint's unfinished folder, its seal, an old one's removal, a scratch file, a video that is
being encoded, a line of metrics. Then the same command runs again. A run that reached its end is examined, and the next
begins in a new folder, until there were enough kills. Examined is, against a run that was left alone:

  the trained weights and Adam's moments, bit for bit; the loss of every step, each step once
  every preview, its pixels equal; every JSON file parses; every checkpoint's seal holds
  no scratch file, no unfinished checkpoint, no lock is left

The last line is a summary in JSON; the exit status is 0 when nothing was lost.
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

STEPS, EVERY, PREVIEWS = 12, 2, 3
PROMPTS = ("a blue circle on grass", "a red circle on grass, at night")
COMMAND = (sys.executable, "-m", "tav_jax")
PATIENCE = 600  # seconds for one process


def write_clip(file: Path) -> Path:
    """The demo's clip, as a video file."""
    from tav_jax import Clip
    from tav_jax.demo.edits import FPS, source_clip

    return Clip(source_clip(None, 4).frames, FPS).save(file)


def command(clip: Path, workdir: Path, *, steps: int = STEPS) -> list[str]:
    from tav_jax.demo.edits import MODEL

    settings = {
        "model.path": MODEL,
        "model.dtype": "float32",
        "clip.path": clip,
        "clip.prompt": "a red circle on grass",
        "clip.frames": 4,
        "clip.height": 64,
        "clip.width": 64,
        "train.steps": steps,
        "train.learning_rate": 3e-4,
        "train.checkpoint_every": EVERY,
        "train.preview_every": PREVIEWS,
        "edit.prompts": PROMPTS,
        "edit.steps": 2,
        "edit.inversion_steps": 2,
    }
    return [
        *COMMAND,
        "train",
        f"--workdir={workdir}",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def names(folder: Path) -> set[str]:
    """Every file and folder below, and how long the metrics are; what vanishes while looking is not there."""
    found, waiting = set(), [str(folder)]
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


def _hidden(path: str) -> bool:
    return Path(path).name.startswith(".")


# What to wait for: a path that appears, or with a minus sign one that goes.
AIMS: dict[str, Callable[[str], bool]] = {
    "checkpoint": lambda path: path.endswith(".orbax-checkpoint-tmp"),
    "inside a checkpoint": lambda path: ".orbax-checkpoint-tmp/" in path,
    "seal": lambda path: path.endswith("seal.json"),
    "-old checkpoint": lambda path: "/checkpoints/" in path and "orbax-checkpoint-tmp" not in path,
    "scratch file": lambda path: _hidden(path) and path.endswith(".json"),
    "video": lambda path: _hidden(path) and path.endswith(".mp4"),
    "metrics": lambda path: "metrics.jsonl " in path,
}


def aimed(process: subprocess.Popen, workdir: Path, aim: str, after: float) -> bool:
    """Wait for what is aimed at, and a little more; whether it came before the process ended."""
    before, wanted = names(workdir), AIMS[aim]
    while process.poll() is None:
        now = names(workdir)
        changed = before - now if aim.startswith("-") else now - before
        if any(map(wanted, changed)):
            time.sleep(after)
            return process.poll() is None
        before = now
        time.sleep(0.001)
    return False


def run_and_kill(line: list[str], workdir: Path, rng: random.Random, environment: dict[str, str]) -> str | None:
    """One process; what it was killed at, or None where it came to its end first."""
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        aim = rng.choice(["any time", *AIMS])
        if aim == "any time":
            try:
                process.wait(rng.uniform(0.0, 25.0))
                alive = False
            except subprocess.TimeoutExpired:
                alive = True
        else:
            alive = aimed(process, workdir, aim, rng.choice((0.0, rng.uniform(0.0, 0.03))))
        if alive:
            process.send_signal(signal.SIGKILL)
        said, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    if process.returncode == -signal.SIGKILL:
        return aim
    if process.returncode:
        raise AssertionError(f"the command that continues failed with status {process.returncode}: {said}")
    return None


# -------------------------------------------------------------------------------------------------------- examining


def learned(workdir: Path) -> dict[str, np.ndarray]:
    """What the newest checkpoint keeps, moments included, by Orbax alone."""
    import jax
    import orbax.checkpoint as ocp

    newest = max(int(x.name) for x in (workdir / "checkpoints").iterdir() if x.name.isdecimal())
    tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(newest) / "learner")
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def lines(workdir: Path) -> list[tuple[int, float, float]]:
    read = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read]


def losses_of(whole: Path, killed: Path) -> list[str]:
    """What was lost or spoiled in `killed`, in words; nothing is the hope."""
    from tav_jax import load_video
    from tav_jax.training import checksums

    lost = []
    one, two = learned(whole), learned(killed)
    if one.keys() != two.keys():
        lost.append("other tensors were learned")
    lost += [f"{name} differs" for name in one if name in two and not np.array_equal(one[name], two[name])]
    if lines(whole) != lines(killed):
        lost.append(f"metrics.jsonl differs: {lines(killed)}")
    previews = {str(x.relative_to(whole)) for x in (whole / "previews").rglob("*.mp4")}
    found = {str(x.relative_to(killed)) for x in killed.rglob("*.mp4")}
    if previews != found:
        lost.append(f"videos: {sorted(previews ^ found)} are not in both")
    for name in previews & found:
        if not np.array_equal(load_video(whole / name).frames, load_video(killed / name).frames):
            lost.append(f"{name} shows something else")
    for file in killed.rglob("*.json"):
        try:
            json.loads(file.read_text())
        except ValueError as error:
            lost.append(f"{file} does not parse: {error}")
    steps = {x.name for x in (killed / "checkpoints").iterdir() if x.name.isdecimal()}
    lost += [f"checkpoint {s}: {why}" for s in steps if (why := checksums.flaw(killed / "checkpoints" / s))]
    lost += [
        f"{x} was left behind" for x in killed.rglob("*") if _hidden(str(x)) or "tmp" in x.name or "damaged" in x.name
    ]
    return lost


def half_written(workdir: Path) -> list[str]:
    """What stands under a final name and is not whole, at the moment of a kill."""
    from tav_jax import TavError, load_video
    from tav_jax.training import checksums

    bad = []
    for file in workdir.rglob("*"):
        # Unfinished checkpoints bear another name, and the lock is rewritten by whoever takes it.
        if any(part.startswith(".") or "orbax-checkpoint-tmp" in part for part in file.relative_to(workdir).parts):
            continue
        try:
            if file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".mp4":
                load_video(file)
        except (ValueError, TavError) as error:
            bad.append(f"{file}: {error}")
    found = checksums.examine(workdir / "checkpoints")
    bad += [f"checkpoint {step} is damaged: {why}" for step, why in found.damaged]
    return bad


def harness(kills: int, seed: int, place: Path, environment: dict[str, str], say: Callable[[str], None]) -> list[str]:
    """Kill so many times; everything that was lost."""
    rng, done = random.Random(seed), Counter()
    clip = write_clip(place / "clip.mp4")
    whole = place / "whole"
    subprocess.run(
        command(clip, whole), check=True, env=environment, timeout=PATIENCE, stdout=subprocess.DEVNULL
    )  # and its programs are compiled now
    say(f"left alone: {len(lines(whole))} steps")
    lost, runs = [], 0
    while done.total() < kills:
        runs += 1
        workdir = place / f"run{runs}"
        while True:
            if done.total() < kills:
                aim = run_and_kill(command(clip, workdir), workdir, rng, environment)
            else:
                subprocess.run(command(clip, workdir), check=True, env=environment, stdout=subprocess.DEVNULL)
                aim = None
            if aim is None:
                break
            done[aim] += 1
            kept = sorted(x.name for x in (workdir / "checkpoints").glob("*"))
            say(f"kill {done.total()}, run {runs}, aimed at {aim}: {kept}")
            lost += half_written(workdir)
        lost += losses_of(whole, workdir)
        say(f"run {runs} came to its end: {lost or 'nothing lost'}")
    say(json.dumps({"kills": done.total(), "runs": runs, "aims": dict(done), "lost": lost}))
    return lost


def main() -> int:
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--kills", type=int, default=30)
    read.add_argument("--seed", type=int, default=0)
    read.add_argument("--out", type=Path, help="a folder to keep the runs in (default: a temporary one)")
    given = read.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        place = (given.out or Path(scratch)).absolute()
        place.mkdir(parents=True, exist_ok=True)
        lost = harness(given.kills, given.seed, place, dict(os.environ), lambda text: print(text, flush=True))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())

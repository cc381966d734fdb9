"""Started by `test_processes.py`: a single process or one of several, depending on the environment.

The first argument names the task. Each process prints its result as a line of JSON.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

import tav_jax
from tav_jax import InputError, TuneAVideo
from tav_jax import config as configs
from tav_jax.cli import edit
from tav_jax.distributed import processes
from tav_jax.errors import TavError
from tav_jax.training.loop import train
from tav_jax.training.run import Run

REFERENCE = Path(__file__).parent / "reference"


def settings(clip: str, steps: int, **changes):
    c = configs.get_config()
    c.model.update(path=str(REFERENCE / "sd1/model"), dtype="float32")
    c.clip.update(path=clip, prompt="red square is moving", frames=2, height=32, width=32)
    c.train.update(steps=steps, learning_rate=1e-3, checkpoint_every=2, preview_every=0, remat="none")
    c.edit.update(steps=2, inversion_steps=2, guidance=3.0)
    c.update_from_flattened_dict(changes)
    return c


def job(directory: str, clip: str) -> dict:
    """A single process: a run of two steps, then one more. Several: the last step of that run, a new run, and edits."""
    root = Path(directory)
    alone = not processes.is_multiprocess()
    written = watch_writing(root)
    if alone:
        train(Run.start_or_continue(str(root / "one"), settings(clip, 2)))
        shutil.copytree(root / "one", root / "continued")
        train(Run.start_or_continue(str(root / "one"), settings(clip, 3)))
    else:
        try:
            TuneAVideo.from_pretrained(REFERENCE / "sd1/model", mesh=(1, 1))
        except InputError as error:
            refused = str(error)
        for name in ("continued", "two"):  # sharded, so that neither process holds the whole state
            train(Run.start_or_continue(str(root / name), settings(clip, 3, **{"mesh.fsdp": True})))
    run = Run.open(root / ("one" if alone else "two"))
    tav = TuneAVideo.restore(run.directory, run=run)
    noise = tav.invert(run.load_clip(), steps=2, return_trajectory=True)
    prompts = ("blue", "a green square")
    edits = [tav.sample(text, latents=noise[-1], steps=2, guidance=3.0) for text in prompts]
    numbers = {"noise": noise, "latents": np.concatenate([e.latents for e in edits]), "frames": edits[0].frames}
    if processes.is_primary():
        np.savez(root / f"{processes.process_count()}.npz", **numbers)
    if alone:
        return {}
    # Progress reports and the available memory may differ between the processes.
    noise = tav.invert(run.load_clip(), steps=2, progress=(lambda done: None) if processes.is_primary() else None)
    edit.memory.available = lambda: None if processes.is_primary() else 1
    paths = edit.edit(run, prompts)
    edits[0].save(root / "edit.gif")
    tav.save_pretrained(root / "exported")
    return {
        "refused": refused,
        "paths": paths,
        "written": sorted(set(written)),
        "agreed": [processes.any_process(processes.is_primary()), processes.any_process(False)],
    }


def watch_writing(root: Path) -> list[str]:
    """The files below the directory that this process writes from now on, except Orbax's."""
    written: list[str] = []

    def record(event: str, arguments: tuple) -> None:
        path = arguments[0] if arguments else None
        writes = event in ("os.rename", "os.mkdir", "os.remove") or (event == "open" and arguments[2] & os.O_ACCMODE)
        if writes and isinstance(path, str | os.PathLike) and str(root) in (name := os.fspath(path)):
            relative = os.path.relpath(name, root)
            if "checkpoints" not in Path(relative).parts:
                written.append(relative)

    sys.addaudithook(record)
    return written


def agree() -> dict:
    """Twenty exchanges of values, in two seconds."""
    index = int(os.environ["TAV_PROCESS"])
    gathered = []
    for number in range(20):
        gathered.append(processes.gather("counting", [number, index]))
        time.sleep(0.1)
    return {"gathered": gathered}


def diverge() -> dict:
    """Exchanges of different names."""
    return {"gathered": processes.gather("sampling" if processes.is_primary() else "inverting", 1)}


def late() -> dict:
    """Process 1 comes too late to an exchange."""
    processes.GATHER_TIMEOUT = 2
    time.sleep(0 if processes.is_primary() else 30)
    return {"gathered": processes.gather("writing", 1)}


def crash() -> dict:
    """An error that is not a `TavError`, in process 1, while process 0 waits for an exchange."""
    if not processes.is_primary():
        raise KeyError("no such key")
    return {"gathered": processes.gather("writing", 1)}


def preempt(first: str) -> dict:
    """SIGTERM in process 1 before the first step of a run that continues at step `first`."""
    if not processes.is_primary():
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)  # JAX looks for the signal once a second
    step = int(first) + 1
    while not processes.stop_at_this_step(step, False):
        step += 1
        time.sleep(0.05)
    return {"stopped": step}


def idle() -> dict:
    print("ready", flush=True)
    time.sleep(60)
    return {}


def die(victim: str) -> dict:
    """Steps that both processes compute together, until one of them is killed."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
    total = jax.jit(lambda x: x.sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    for step in range(100_000):
        x = jax.make_array_from_callback((jax.device_count(),), rows, lambda _: np.ones(1))
        assert total(x) == jax.device_count()
        if step == 20 and jax.process_index() == int(victim):
            os.kill(os.getpid(), signal.SIGKILL)
    return {}


if __name__ == "__main__":
    from tav_jax.cli.main import fail

    tav_jax.__version__ = os.environ.get("TEST_VERSION", tav_jax.__version__)
    task, *arguments = sys.argv[1:]
    try:
        processes.initialize(preemption=task == "preempt")
        print(json.dumps(globals()[task](*arguments)))
    except TavError as error:
        sys.exit(fail(str(error), error.exit_code))
    except Exception as error:
        processes.wait_for_abort(error)
        raise

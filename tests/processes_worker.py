"""Run by `test_processes.py`: one of several processes, or the only one, as the environment says.

What is asked for is the first word; each process prints a line of JSON at its end.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from tav_jax import InputError, TuneAVideo
from tav_jax import config as configs
from tav_jax.cli import edit
from tav_jax.distributed import processes
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


def job(folder: str, clip: str) -> dict:
    """Alone: a run of two steps, and of one more. Several: that run's last step, a run of their own, and edits."""
    root = Path(folder)
    alone = not processes.is_multiprocess()
    written = watch_writing(root)
    if alone:
        Run.start_or_continue(str(root / "one"), settings(clip, 2)).train()
        shutil.copytree(root / "one", root / "continued")
        Run.start_or_continue(str(root / "one"), settings(clip, 3)).train()
    else:
        try:
            TuneAVideo.from_pretrained(REFERENCE / "sd1/model", mesh=(1, 1))
        except InputError as error:
            refused = str(error)
        for name in ("continued", "two"):  # what is learned lies in parts, so that neither holds all of it
            Run.start_or_continue(str(root / name), settings(clip, 3, **{"mesh.fsdp": True})).train()
    run = Run.open(root / ("one" if alone else "two"))
    tav = run.restore()
    noise = tav.invert(load_clip(run.config), steps=2, return_trajectory=True)
    words = ("blue", "a green square")
    edits = [tav.sample(text, latents=noise[-1], steps=2, guidance=3.0) for text in words]
    numbers = {"noise": noise, "latents": np.concatenate([e.latents for e in edits]), "frames": edits[0].frames}
    if processes.is_primary():
        np.savez(root / f"{processes.process_count()}.npz", **numbers)
    if alone:
        return {}
    # One look for each process: whether a bar is watched, and how much memory there is, differs between them.
    noise = tav.invert(load_clip(run.config), steps=2, progress=(lambda done: None) if processes.is_primary() else None)
    edit.memory.available = lambda: None if processes.is_primary() else 1
    paths = edit.edit(run, words)
    edits[0].save(root / "edit.gif")
    tav.save_pretrained(root / "exported")
    return {
        "refused": refused,
        "paths": paths,
        "written": sorted(set(written)),
        "agreed": [processes.any_process(processes.is_primary()), processes.any_process(False)],
    }


def watch_writing(root: Path) -> list[str]:
    """Everything that this process opens to write below the folder from now on, but for what Orbax keeps."""
    seen: list[str] = []

    def look(event: str, words: tuple) -> None:
        path = words[0] if words else None
        writes = event in ("os.rename", "os.mkdir", "os.remove") or (event == "open" and words[2] & os.O_ACCMODE)
        if writes and isinstance(path, str | os.PathLike) and str(root) in (name := os.fspath(path)):
            relative = os.path.relpath(name, root)
            if "checkpoints" not in Path(relative).parts:
                seen.append(relative)

    sys.addaudithook(look)
    return seen


def die() -> dict:
    """Steps that all take together; process 1 is killed in the middle."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
    total = jax.jit(lambda x: x.sum(), out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    for step in range(100_000):
        x = jax.make_array_from_callback((jax.device_count(),), rows, lambda _: np.ones(1))
        assert total(x) == jax.device_count()
        if step == 20 and not processes.is_primary():
            os.kill(os.getpid(), signal.SIGKILL)
    return {}


if __name__ == "__main__":
    from tav_jax.cli.main import end

    processes.initialize()
    try:
        print(json.dumps({"job": job, "die": die}[sys.argv[1]](*sys.argv[2:])))
    except Exception:
        if lost := processes.lost_process(5.0):
            sys.exit(end(lost, 1))
        raise

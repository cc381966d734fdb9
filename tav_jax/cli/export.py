"""`tav export`: a tuned run as a directory in the Diffusers layout, and as a repository of the hub."""

import argparse
from pathlib import Path

from tav_jax.cli.settings import silence_background_tracebacks
from tav_jax.distributed import compilation_cache, processes
from tav_jax.errors import InputError


def run(arguments: argparse.Namespace) -> int:
    silence_background_tracebacks()
    if arguments.private and not arguments.push:
        raise InputError("--private has no effect without --push=user/name; add it, or leave --private out")
    compilation_cache.enable()
    processes.initialize()
    from tav_jax.io import export, hub
    from tav_jax.io.model_card import Origin
    from tav_jax.pipeline import TuneAVideo
    from tav_jax.training.run import Run

    options = ("out", "step", "two_d", "push", "private")
    processes.check_same({f"--{name.replace('_', '-')}": getattr(arguments, name) for name in options})
    target = Path(processes.run_on_primary("checking --out", lambda: str(export.check_target(arguments.out))))
    repository, private = arguments.push or "", arguments.private
    if repository:
        processes.run_on_primary("checking --push", lambda: hub.check_push(repository, private=private))
    opened = Run.open(arguments.workdir)
    tav = TuneAVideo.restore(arguments.workdir, step=arguments.step, run=opened)
    step = opened.checkpoints.read_metadata(arguments.step)["step"]

    def write() -> str:
        origin = Origin.of_run(opened.config, step, opened.directory.read("edits/scores.json"))
        options = {"tokenizer": tav.tokenizer, "prompt": tav.tuned_prompt, "two_d": arguments.two_d}
        export.save(tav.components, target, repository=repository, origin=origin, **options)
        print(f"Wrote {arguments.out}" + (", without the temporal layers." if arguments.two_d else "."), flush=True)
        return hub.push(target, repository, private=private) if repository else ""

    url = processes.run_on_primary(f"writing {arguments.out}", write)
    if url and processes.is_primary():
        print(f"Pushed to {url}")
    return 0

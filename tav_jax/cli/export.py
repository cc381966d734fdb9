"""`tav export`: a tuned run as a directory in the Diffusers layout."""

import argparse

from tav_jax.cli.settings import silence_background_tracebacks
from tav_jax.distributed import compilation_cache, processes


def run(arguments: argparse.Namespace) -> int:
    silence_background_tracebacks()
    compilation_cache.enable()
    processes.initialize()
    from tav_jax.io.export import check_target
    from tav_jax.pipeline import TuneAVideo

    processes.check_same({"--out": arguments.out, "--step": arguments.step})
    processes.run_on_primary("checking --out", lambda: str(check_target(arguments.out)))
    TuneAVideo.restore(arguments.workdir, step=arguments.step).save_pretrained(arguments.out, two_d=arguments.two_d)
    if processes.is_primary():
        print(f"Wrote {arguments.out}" + (", without the temporal layers." if arguments.two_d else "."))
    return 0

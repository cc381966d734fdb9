"""`tav demo`: the whole method on the embedded model."""

import argparse

from tav_jax.cli.settings import silence_background_tracebacks
from tav_jax.distributed import compilation_cache, processes


def run(arguments: argparse.Namespace) -> int:
    silence_background_tracebacks()
    compilation_cache.enable()
    processes.require_single_process("tav demo")
    from tav_jax.demo.run import make_settings, run_demo

    settings = make_settings(steps=arguments.steps, seed=arguments.seed)
    run_demo(arguments.out, arguments.prompt, settings, clip_seed=arguments.clip)
    return 0

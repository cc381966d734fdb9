"""`tav demo`"""

import argparse

from tav_jax.cli.settings import silence_background_tracebacks
from tav_jax.distributed import compilation_cache, processes


def run(arguments: argparse.Namespace) -> int:
    silence_background_tracebacks()
    compilation_cache.enable()
    processes.require_single_process("tav demo")
    from tav_jax.demo.demo import demo, settings_with

    settings = settings_with(steps=arguments.steps, seed=arguments.seed)
    demo(arguments.out, arguments.prompt, settings, number=arguments.clip)
    return 0

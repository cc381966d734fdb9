"""`tav train`: start or continue a run."""

import argparse

from tav_jax.cli.settings import read_config, silence_background_tracebacks
from tav_jax.distributed import processes
from tav_jax.training.preemption import Stop


def run(arguments: argparse.Namespace) -> int:
    silence_background_tracebacks()
    with Stop() as stop:  # before anything slow is imported
        processes.initialize(preemption=True)
        config = read_config(arguments.settings)
        from tav_jax.distributed import compilation_cache
        from tav_jax.training.loop import train
        from tav_jax.training.run import Run

        compilation_cache.enable()
        if arguments.debug_nans:
            import jax

            jax.config.update("jax_debug_nans", True)
        train(Run.start_or_continue(arguments.workdir, config), stop)
    return 0

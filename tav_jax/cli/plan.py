"""`tav plan`"""

import argparse
from collections.abc import Sequence

from tav_jax.cli.settings import read_config


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    config = read_config(rest)
    from tav_jax import plan

    plan.prepare()  # before anything imports JAX
    from tav_jax.plan import command

    command.plan(
        config,
        arguments.topology,
        names=arguments.function,
        as_json=arguments.json,
        search=not arguments.no_search,
        folder=arguments.cache,
    )
    return 0

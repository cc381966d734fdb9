"""`tav plan`: memory and time of a run on a TPU, from compilation alone."""

import argparse
import sys
from pathlib import Path

from tav_jax.cli.settings import read_config
from tav_jax.errors import InputError, short_repr


def run(arguments: argparse.Namespace) -> int:
    config = read_config(arguments.settings)
    from tav_jax import plan

    plan.prepare_environment()  # before anything imports JAX
    from tav_jax.distributed import compilation_cache
    from tav_jax.io import paths
    from tav_jax.plan.chips import parse_topology
    from tav_jax.plan.compile import ReportCache
    from tav_jax.plan.programs import NAMES, read_job
    from tav_jax.plan.report import find_changes, format_json, format_table

    if unknown := [name for name in arguments.function if name not in NAMES]:
        raise InputError(f"--function is {short_repr(unknown[0])}; it must be one of {', '.join(NAMES)}")
    job = read_job(config, parse_topology(arguments.topology))
    place = compilation_cache.cache_directory() or paths.temporary_directory()
    directory = Path(arguments.cache) if arguments.cache else place / "plans"
    cache = ReportCache(directory, log=lambda line: print(line, file=sys.stderr))
    reports = [cache.get(job, name) for name in NAMES if name in (arguments.function or NAMES)]
    changes = {}
    if not arguments.no_search:
        changes = {r.name: list(find_changes(cache, job, r)) for r in reports if not r.fits and not r.error}
    print((format_json if arguments.json else format_table)(job, reports, changes))
    return 0

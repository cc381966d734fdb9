"""`tav caption`: one sentence that describes a clip."""

import argparse

from tav_jax.evaluation.captions import caption


def run(arguments: argparse.Namespace) -> int:
    print(caption(arguments.path, arguments.model))
    return 0

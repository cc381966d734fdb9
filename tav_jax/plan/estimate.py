"""A program's time as the compiler itself expects it.

Without a chip this comes closest to a measurement: for each instruction it has made, the TPU's compiler writes down how
many cycles it reckons with, and chooses between programs by these numbers. Fetching ahead and what crosses between
chips have none, nor have kernels of our own.
"""

import re

from tav_jax.plan.text import computations

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


def cycles(text: str, loop: int = 1) -> int:
    """`loop` is the count of a loop that does not tell its own."""
    return sum(
        one.times * sum(int(n) for line in one.lines for n in _CYCLES.findall(line))
        for one in computations(text, loop).values()
        if not one.fused
    )

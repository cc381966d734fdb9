"""TPU chips, with their memory and peak rates, and topologies by name."""

import math
import re
from typing import Any, NamedTuple

from tav_jax.errors import InputError, short_repr

GIB = 2**30


class Chip(NamedTuple):
    """Rates are per chip and second, from Google Cloud's documentation and, for links, "How to Scale Your Model"."""

    name: str
    hbm: int  # bytes that the compiler (libtpu) makes available to a program
    flops: float  # of bfloat16 products
    bandwidth: float  # bytes to and from HBM
    link: float  # bytes over one link in one direction
    compiler_name: str
    cores: int  # per chip; the number in a name such as v4-8 counts cores
    layouts: tuple[str, ...]
    clock: float | None = None  # cycles per second, if published
    # FLOP/s of a kernel's inner loop in the compiler's schedule, relative to `flops`: benchmarks/kernels.py --schedule
    kernels: tuple[tuple[str, float], ...] = ()

    @property
    def ring_bandwidth(self) -> float:
        """Bytes per second that a chip sends around a ring: one axis of the torus, both directions."""
        return 2 * self.link


V5E_KERNELS = (("sparse_causal_forward", 0.309), ("sparse_causal_backward", 0.525))
LAYOUTS_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
LAYOUTS_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * GIB), 275e12, 1.2e12, 45e9, "v4", 2, LAYOUTS_3D, 1.05e9),
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 45e9, "v5e", 1, LAYOUTS_2D, 1.5e9, V5E_KERNELS),
        Chip("v5p", int(95.73 * GIB), 459e12, 2.765e12, 90e9, "v5", 2, LAYOUTS_3D, 1.75e9),
        Chip("v6e", int(31.24 * GIB), 918e12, 1.64e12, 90e9, "v6e", 1, LAYOUTS_2D),
    )
}
ALIASES = {"v5": "v5p", "v5litepod": "v5e", "v5lite": "v5e"}


class Topology(NamedTuple):
    chip: Chip
    layout: str

    @property
    def chips(self) -> int:
        return math.prod(int(n) for n in self.layout.split("x"))

    @property
    def name(self) -> str:
        """Google Cloud's name, whose number counts cores: v5e-8 has 8 chips; v5p-8 has 4, with two cores each."""
        return f"{self.chip.name}-{self.chips * self.chip.cores}"

    def devices(self) -> list[Any]:
        """JAX device descriptions to compile for."""
        from jax.experimental import topologies  # loads libtpu

        options: dict[str, Any] = {"topology_name": f"{self.chip.compiler_name}:{self.layout}"}
        if self.chips == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # one JAX device per chip, as on a real v4
        return list(topologies.get_topology_desc(platform="tpu", **options).devices)


def topologies_of(chip: Chip) -> list[Topology]:
    """All topologies of a chip, by increasing size."""
    return [Topology(chip, layout) for layout in chip.layouts]


def parse_topology(name: str) -> Topology:
    """The topology of a name such as `v5e-8` or `v5e:2x4`."""
    text = name.strip().lower()
    family = re.split("[-:]", text, maxsplit=1)[0]
    chip = ALIASES.get(family, family)
    canonical = text.replace(family, chip, 1)
    known = [t for c in CHIPS.values() if c.name == chip or chip not in CHIPS for t in topologies_of(c)]
    for topology in known:
        if canonical in (topology.name, f"{chip}:{topology.layout}"):
            return topology
    names = ", ".join(f"{topology.name} ({topology.layout})" for topology in known)
    raise InputError(f"there is no topology {short_repr(name)}; there are {names}")

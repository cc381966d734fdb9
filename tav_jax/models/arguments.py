"""Modules and their weights as arguments of jitted functions that are called many times.

A jitted function flattens its arguments and hashes their structure at every call: for Stable Diffusion's UNet several
milliseconds in Python, in which a device may be idle. A `FlatTree` is flattened once, and its structure is hashed once.
"""

from typing import Any

import jax
from flax import nnx


class Static:
    """A value that is hashed once. Equal values are equal."""

    def __init__(self, value: Any):
        self.value, self.hash = value, hash(value)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: Any) -> bool:
        return self is other or (isinstance(other, Static) and self.hash == other.hash and self.value == other.value)


@jax.tree_util.register_pytree_node_class
class FlatTree:
    """A pytree as the list of its leaves and its structure."""

    def __init__(self, tree: Any):
        self.leaves, structure = jax.tree.flatten(tree)
        self.structure = Static(structure)

    def tree_flatten(self) -> tuple[Any, Static]:
        return (self.leaves,), self.structure

    @classmethod
    def tree_unflatten(cls, structure: Static, children: Any) -> "FlatTree":
        flat = object.__new__(cls)
        flat.structure, (flat.leaves,) = structure, children
        return flat


def unwrap(x: Any) -> Any:
    """The value of a `Static`, the pytree of a `FlatTree`, or anything else as it is."""
    if isinstance(x, FlatTree):
        return jax.tree.unflatten(x.structure.value, x.leaves)
    return x.value if isinstance(x, Static) else x


def merge(graph: Any, *states: Any) -> Any:
    """`nnx.merge` of arguments that may be `Static` and `FlatTree`."""
    return nnx.merge(unwrap(graph), *map(unwrap, states))

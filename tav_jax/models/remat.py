"""What the UNet keeps from its forward pass for the backward pass, by name; the rest is computed again.

| name        | kept                                                                | computed again           |
|-------------|---------------------------------------------------------------------|--------------------------|
| `none`      | everything                                                          | nothing                  |
| `products`  | each block's input, results of convolutions and products of weights | norms, attention's scores|
| `attention` | each block's input and the results of its attentions                | the rest of each block   |
| `block`     | each block's input (a block is one resnet or one transformer)       | each block, once         |
| `level`     | the inputs of each level, and what skips over to the way up         | each block, twice        |

The arithmetic is the same with each of them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

NAMES = ("none", "products", "attention", "block", "level")
# What attention calls its results. A kernel with a gradient of its own gives the same name to what that gradient needs.
ATTENTION = "attention"

Run = Callable[..., Any]  # run(block, *arrays, **fixed) → block(*arrays, **fixed)


class Remat(NamedTuple):
    """How one block, and how a whole level of blocks, is run."""

    block: Run
    level: Run


def called(remat: str | bool) -> str:
    """The policy's name; True and False are `block` and `none`. ValueError for a name that there is not."""
    name = {True: "block", False: "none"}.get(remat, remat) if isinstance(remat, bool) else remat
    if name not in NAMES:
        raise ValueError(f"remat is {remat!r}; it must be one of {', '.join(NAMES)}")
    return name


def policy(remat: str | bool) -> Remat:
    name = called(remat)
    if name == "none":
        return Remat(_call, _call)
    if name == "level":
        return Remat(_again(None), _again(None))
    kept = {
        "products": _is_product,
        "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION),
        "block": None,
    }[name]
    return Remat(_again(kept), _call)


def name_attention(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, ATTENTION)


def _call(block: Callable[..., Any], *args: Any, **fixed: Any) -> Any:
    return block(*args, **fixed)


def _again(kept: Callable[..., bool] | None) -> Run:
    def run(block, *args, **fixed):
        # The block is an argument and no part of the function: what a function closes over would be kept as well.
        return jax.checkpoint(lambda block, *args: block(*args, **fixed), policy=kept)(block, *args)

    return run


def _is_product(primitive, *args, **parameters) -> bool:
    """Weights times activations. Attention's scores and sums, products over a batch of heads, are not."""
    return primitive.name == "conv_general_dilated" or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *args, **parameters
    )

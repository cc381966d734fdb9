"""Rematerialization policies of the UNet: what the forward pass keeps for the backward pass, by name.

| name        | kept                                                          | recomputed                 |
|-------------|---------------------------------------------------------------|----------------------------|
| `none`      | everything                                                    | nothing                    |
| `products`  | block inputs, results of convolutions, linear layers, kernels | norms, attention scores    |
| `attention` | block inputs and attention outputs                            | the rest of each block     |
| `block`     | block inputs (a block is one resnet or one transformer)       | each block, once           |
| `level`     | inputs of each level, and the skip connections                | each block, twice          |

The arithmetic is the same with every policy. `train.remat=auto` chooses one by the memory of the device, see
`choose_remat` in `distributed/memory.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from tav_jax.config import remat_name
from tav_jax.kernels import OUTPUT, RESIDUALS

Run = Callable[..., Any]  # run(block, *arrays, **static) computes block(*arrays, **static)


class Remat(NamedTuple):
    """How to call a block, and how to call a level of blocks."""

    block: Run
    level: Run


def policy(remat: str | bool) -> Remat:
    name = remat_name(remat)
    if name == "none":
        return Remat(_call, _call)
    if name == "level":
        return Remat(_remat(None), _remat(None))
    attention = jax.checkpoint_policies.save_only_these_names(OUTPUT, RESIDUALS)
    return Remat(_remat({"products": _is_linear, "attention": attention, "block": None}[name]), _call)


def _call(block: Callable[..., Any], *args: Any, **static: Any) -> Any:
    return block(*args, **static)


def _remat(saveable: Callable[..., bool] | None) -> Run:
    def run(block, *args, **static):
        # The block is an argument, because `jax.checkpoint` also keeps arrays that its function closes over.
        return jax.checkpoint(lambda block, *args: block(*args, **static), policy=saveable)(block, *args)

    return run


def _is_linear(primitive, *args, **parameters) -> bool:
    """Products of weights and activations, but not those of attention, which have batch dimensions (the heads); and
    what a kernel's backward pass needs, so that its forward pass runs once."""
    policies = jax.checkpoint_policies
    of_kernel = policies.save_only_these_names(RESIDUALS)(primitive, *args, **parameters)
    is_dot = policies.dots_with_no_batch_dims_saveable(primitive, *args, **parameters)
    return primitive.name == "conv_general_dilated" or is_dot or of_kernel

"""Floating-point operations of a traced program: two for each multiplication of a product or a convolution.

Counted from the program itself, so that what is computed again for the backward pass and what a kernel does are in
it; XLA's own count leaves out kernels and takes a loop's body once. Sums, norms and other element-wise work, a few
per cent, are left out.
"""

import math
from collections.abc import Set
from typing import Any

import numpy as np

KERNELS = frozenset({"pallas_call"})
ALL = KERNELS | {"dot_general", "conv_general_dilated"}


def count(jaxpr: Any, kinds: Set[str] = ALL) -> float:
    """Of the whole program, on all devices together; of some kinds of operations, or of all."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # closed or open
    return float(sum(_of(equation, kinds) for equation in jaxpr.eqns))


def _of(equation: Any, kinds: Set[str]) -> float:
    name, parameters = equation.primitive.name, equation.params
    if name in ALL and name not in kinds:
        return 0.0
    if name == "dot_general":
        return _product(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "scan":
        return parameters["length"] * count(parameters["jaxpr"], kinds)
    if name == "while":
        return count(parameters["body_jaxpr"], kinds)  # how often is not known
    if name == "cond":
        return _branch(parameters, kinds)
    if name == "shard_map":  # what each device does; where an axis of the mesh shares nothing out, all do the same
        sharing = {axis for spec in parameters["out_specs"] for part in spec for axis in _names(part)}
        return math.prod(parameters["mesh"].shape[axis] for axis in sharing) * count(parameters["jaxpr"], kinds)
    if name == "pallas_call":
        if parameters["cost_estimate"] is not None:
            return float(parameters["cost_estimate"].flops)
        return math.prod(parameters["grid_mapping"].grid) * count(parameters["jaxpr"])
    if name == "custom_vjp_call" or name == "custom_jvp_call":
        return count(parameters.get("call_jaxpr", parameters.get("fun_jaxpr")), kinds)
    for inner in ("jaxpr", "call_jaxpr"):  # jit, checkpoint and the like
        if inner in parameters:
            return count(parameters[inner], kinds)
    return 0.0


def _names(part: Any) -> tuple[str, ...]:
    return () if part is None else part if isinstance(part, tuple) else (part,)


def _branch(parameters: Any, kinds: Set[str]) -> float:
    """Where the platform decides, the TPU's branch; else the longest."""
    branches = parameters["branches"]
    for index, platforms in enumerate(parameters.get("branches_platforms") or ()):
        if platforms is None or "tpu" in platforms:
            return count(branches[index], kinds)
    return max(count(branch, kinds) for branch in branches)


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    """Only what meets the picture: neither padding nor the holes of a dilation are multiplied with."""
    p = equation.params
    numbers = p["dimension_numbers"]
    picture, kernel = (x.aval.shape for x in equation.invars)
    out = equation.outvars[0].aval.shape
    pairs = 1.0
    for i, axes in enumerate(zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)):
        source, taps, places = (shape[axis] for shape, axis in zip((picture, kernel, out), axes, strict=True))
        at = (
            np.arange(places)[:, None] * p["window_strides"][i]
            + np.arange(taps)[None] * p["rhs_dilation"][i]
            - p["padding"][i][0]
        )
        hole = p["lhs_dilation"][i]
        pairs *= np.count_nonzero((at >= 0) & (at < (source - 1) * hole + 1) & (at % hole == 0))
    into = kernel[numbers.rhs_spec[1]]  # per group already
    batch, features = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return 2.0 * batch * features * into * pairs

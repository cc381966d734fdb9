"""Sparse-causal attention as one TPU kernel: each frame looks at frame 0 and at the frame before.

Written plainly, keys and values of both frames are laid side by side, `[B, F, 2T, N, D]`, and stored. This kernel reads
them where they are: which frame a block comes from is in its index map. Frame 0's keys stay on the chip while all
frames go by, so that every key and value is read about once. Frames 0 and 1 look at frame 0 only: there both halves
would be frame 0, and a softmax over everything twice is the softmax over everything once.

In here arrays are `[B, F, N, D, T]`. With T last a head of 40 numbers takes the place of 48, where `[…, T, D]` would
take that of 128 (a TPU stores the last axis in pieces of 128); and the softmax's statistics are rows.

Scores are in float32 and to base 2, the exponential that the hardware has.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES = 128
QUERIES, KEYS = 512, 512  # at once: a tile of scores is 1 MiB
VMEM = 96 * 2**20  # of the 128 MiB of v5e and v6e

Heads = Float[Array, "B F N D T"]
Frame = Float[Array, "B 1 N D T"]


class Sizes(NamedTuple):
    """What a program is compiled for."""

    tokens: int  # the real ones; the arrays are filled up to whole blocks
    queries: int  # in a block
    keys: int  # in a tile
    halo: bool  # whether the frame before the first one may be on another device
    interpret: bool

    def grid(self, q: jax.Array) -> tuple[int, int, int, int]:
        b, f, n, _, t = q.shape
        return b, n, f, t // self.queries


def _fill(tokens: int) -> tuple[int, int]:
    """The length that so many tokens are filled up to, and how many of them go at once."""
    filled = -(-tokens // LANES) * LANES
    block = max(n for n in range(LANES, min(QUERIES, filled) + 1, LANES) if filled % n == 0)
    if block < min(QUERIES, filled) // 2:  # no good divisor: rather fill up to whole blocks
        block = min(QUERIES, filled)
        filled = -(-filled // block) * block
    return filled, block


# ------------------------------------------------------------------------------------------------------- in tiles


def _dot(a, b, contract: tuple[int, int]):
    """A matrix product over one axis of each, summed in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _over_keys(size: Sizes, filled: int, visit) -> None:
    """Call `visit(where, start)` for each tile of keys."""

    def step(j, _):
        start = pl.multiple_of(j * size.keys, size.keys)
        visit(pl.ds(start, size.keys), start)

    jax.lax.fori_loop(0, filled // size.keys, step, None)


def _scores(size: Sizes, k, q, start):
    """[keys, queries] to base 2; no key that only fills up is seen."""
    s = _dot(k, q, (0, 0)) * (math.log2(math.e) / math.sqrt(q.shape[0]))
    if size.tokens % size.keys == 0:
        return s
    rows = start + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    return jnp.where(rows < size.tokens, s, -jnp.inf)


def _two_halves(size: Sizes, offset, look, first, before, halo) -> None:
    """`look` at frame 0 and, from the clip's frame 2 on, at the frame before."""
    f = pl.program_id(2)
    look("first", *first)
    later = offset[0] + f > 1
    pl.when(later & (f > 0) if size.halo else later)(lambda: look("before", *before))
    if size.halo:
        pl.when(later & (f == 0))(lambda: look("halo", *halo))


def _forward_kernel(size: Sizes, offset, q, k0, v0, kp, vp, *rest):
    halo, rest = (rest[:2], rest[2:]) if size.halo else ((), rest)
    out, lse, top, total, acc = rest
    top[...] = jnp.full_like(top, -jnp.inf)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

    def look(_, k, v):
        def visit(where, start):
            s = _scores(size, k[:, where], q[...], start)
            highest = jnp.maximum(top[...], s.max(axis=0, keepdims=True))  # [1, queries]
            p = jnp.exp2(s - highest)
            shrink = jnp.exp2(top[...] - highest)
            total[...] = shrink * total[...] + p.sum(axis=0, keepdims=True)
            acc[...] = shrink * acc[...] + _dot(v[:, where], p.astype(v.dtype), (1, 0))  # [D, queries]
            top[...] = highest

        _over_keys(size, k.shape[1], visit)

    _two_halves(size, offset, look, (k0, v0), (kp, vp), halo)
    out[...] = (acc[...] / total[...]).astype(out.dtype)
    lse[...] = top[...] + jnp.log2(total[...])


def _backward_kernel(size: Sizes, offset, q, out, g, lse, k0, v0, kp, vp, *rest):
    """All gradients from one pass over the scores.

    What frame 0's keys get is summed up on the chip over all frames; what the keys of the frame before get, over this
    frame's queries. Keys of the last frame get nothing here, since no frame of this device comes after it.
    """
    halo, rest = (rest[:2], rest[2:]) if size.halo else ((), rest)
    dq, dk0, dv0, dk, dv, *rest = rest
    dhalo, rest = (rest[:2], rest[2:]) if size.halo else ((), rest)
    dq_sum, dk_sum, dv_sum = rest
    f, i = pl.program_id(2), pl.program_id(3)

    @pl.when((f == 0) & (i == 0))
    def _():
        for x in (dk0, dv0, *dhalo):
            x[...] = jnp.zeros_like(x)

    @pl.when(i == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    dq_sum[...] = jnp.zeros_like(dq_sum)
    scale = 1 / math.sqrt(q.shape[0])
    delta = jnp.sum(g[...].astype(jnp.float32) * out[...].astype(jnp.float32), axis=0, keepdims=True)  # [1, queries]
    sums = {"first": (dk0, dv0), "before": (dk_sum, dv_sum), "halo": dhalo}

    def look(half, k, v):
        to_k, to_v = sums[half]

        def visit(where, start):
            p = jnp.exp2(_scores(size, k[:, where], q[...], start) - lse[...])  # [keys, queries]
            to_v[:, where] += _dot(g[...], p.astype(g.dtype), (1, 1))  # [D, keys]
            ds = (p * (_dot(v[:, where], g[...], (0, 0)) - delta) * scale).astype(q.dtype)
            to_k[:, where] += _dot(q[...], ds, (1, 1))
            dq_sum[...] += _dot(k[:, where], ds, (1, 0))  # [D, queries]

        _over_keys(size, k.shape[1], visit)

    _two_halves(size, offset, look, (k0, v0), (kp, vp), halo)
    dq[...] = dq_sum[...].astype(dq.dtype)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


# ---------------------------------------------------------------------------------------------------- in programs


def _cost(size: Sizes, q, products: int, arrays) -> pl.CostEstimate:
    """For the compiler's schedule and for `tav plan`, neither of which looks into a kernel."""
    b, frames, heads, dim, tokens = q.shape
    seen = 2 * frames - (0 if size.halo else min(frames, 2))  # in frames: 0 and 1 look at one only
    scores = b * heads * seen * tokens**2
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    return pl.CostEstimate(flops=2 * products * scores * dim, bytes_accessed=moved, transcendentals=scores)


def _call(kernel, size: Sizes, q, *, inputs, outputs, scratch, products: int, name: str):
    """`inputs` and `outputs` pair what goes in, or the shape of what comes out, with the block of it that is seen."""
    return pl.pallas_call(
        functools.partial(kernel, size),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=size.grid(q),
            in_specs=[block for _, block in inputs],
            out_specs=[block for _, block in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[shape for shape, _ in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=_cost(size, q, products, [x for x, _ in (*inputs, *outputs)]),
        interpret=size.interpret,
        name=name,
    )


class _Blocks(NamedTuple):
    """Which part of an array a step of the grid (batch, head, frame, block of queries) sees."""

    queries: pl.BlockSpec
    rows: pl.BlockSpec  # one number for each query
    frame: pl.BlockSpec  # the only frame there is
    before: pl.BlockSpec
    behind: pl.BlockSpec  # where the gradient of the frame before goes; in frame 0's turn the last one's, nothing

    @classmethod
    def of(cls, size: Sizes, q: jax.Array) -> "_Blocks":
        frames, dim, tokens = q.shape[1], q.shape[3], q.shape[4]
        one, whole = (None, None, None, dim, size.queries), (None, None, None, dim, tokens)
        return cls(
            pl.BlockSpec(one, lambda b, n, f, i, _: (b, f, n, 0, i)),
            pl.BlockSpec((None, None, None, 1, size.queries), lambda b, n, f, i, _: (b, f, n, 0, i)),
            pl.BlockSpec(whole, lambda b, n, f, i, _: (b, 0, n, 0, 0)),
            pl.BlockSpec(whole, lambda b, n, f, i, _: (b, jnp.maximum(f - 1, 0), n, 0, 0)),
            pl.BlockSpec(whole, lambda b, n, f, i, _: (b, jnp.where(f == 0, frames - 1, f - 1), n, 0, 0)),
        )


def _run_forward(size: Sizes, offset, q, k, v, first, halo):
    at, dim = _Blocks.of(size, q), q.shape[3]
    inputs = [(q, at.queries), *((x, at.frame) for x in first), (k, at.before), (v, at.before)]
    inputs += [(x, at.frame) for x in halo]
    sums = jax.ShapeDtypeStruct((*q.shape[:3], 1, q.shape[4]), jnp.float32)
    outputs = [(jax.ShapeDtypeStruct(q.shape, q.dtype), at.queries), (sums, at.rows)]
    scratch = [(1, size.queries), (1, size.queries), (dim, size.queries)]
    blocks = {"inputs": inputs, "outputs": outputs, "scratch": scratch}
    call = _call(_forward_kernel, size, q, **blocks, products=2, name="sparse_causal_forward")
    return call(offset, *(x for x, _ in inputs))


def _run_backward(size: Sizes, offset, q, k, v, first, halo, out, lse, g):
    at, (dim, tokens) = _Blocks.of(size, q), q.shape[3:]
    inputs = [(q, at.queries), (out, at.queries), (g, at.queries), (lse, at.rows), *((x, at.frame) for x in first)]
    inputs += [(k, at.before), (v, at.before), *((x, at.frame) for x in halo)]
    like = jax.ShapeDtypeStruct
    whole = [(like(x.shape, jnp.float32), at.frame) for x in (*first, *halo)]
    outputs = [(like(q.shape, q.dtype), at.queries), *whole[:2]]
    outputs += [(like(x.shape, x.dtype), at.behind) for x in (k, v)] + whole[2:]
    scratch = [(dim, size.queries), (dim, tokens), (dim, tokens)]
    blocks = {"inputs": inputs, "outputs": outputs, "scratch": scratch}
    call = _call(_backward_kernel, size, q, **blocks, products=5, name="sparse_causal_backward")
    dq, dk0, dv0, dk, dv, *dhalo = call(offset, *(x for x, _ in inputs))
    dfirst = tuple(x.astype(k.dtype) for x in (dk0, dv0))
    return dq, dk, dv, dfirst, tuple(x.astype(k.dtype) for x in dhalo)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(size: Sizes, offset, q, k, v, first, halo):
    """For one device's frames: `first` and `halo` are keys and values of the clip's frame 0 and of the frame before."""
    return _run_forward(size, offset, q, k, v, first, halo)[0]


def _attention_fwd(size: Sizes, offset, q, k, v, first, halo):
    out, lse = _run_forward(size, offset, q, k, v, first, halo)
    return out, (offset, q, k, v, first, halo, out, lse)


def _attention_bwd(size: Sizes, kept, g):
    offset, q, k, v, first, halo, out, lse = kept
    nothing = np.zeros(offset.shape, jax.dtypes.float0)  # the offset is a whole number
    return nothing, *_run_backward(size, offset, q, k, v, first, halo, out, lse, g)


_attention.defvjp(_attention_fwd, _attention_bwd)


# --------------------------------------------------------------------------------------------------------- to call


def sparse_causal(
    q: Float[Array, "B F T N D"],
    k: Float[Array, "B F T N D"],
    v: Float[Array, "B F T N D"],
    *,
    axis: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B F T N D"]:
    """`softmax(q [k₀ kᵢ₋₁]ᵀ / √d) [v₀ vᵢ₋₁]`. Inside a `shard_map` that spreads the frames over `axis`, keys and
    values of one frame come from the device before and those of frame 0 from the first."""
    tokens = q.shape[2]
    filled, block = _fill(tokens)
    size = Sizes(tokens, block, block, axis is not None, interpret)

    def inwards(x):
        x = jnp.transpose(x, (0, 1, 3, 4, 2))  # [B, F, N, D, T]
        return jnp.pad(x, ((0, 0),) * 4 + ((0, filled - tokens),))

    q, k, v = (inwards(x) for x in (q, k, v))
    first, halo, offset = (k[:, :1], v[:, :1]), (), jnp.zeros(1, jnp.int32)
    if axis is not None:
        first, halo, offset = _neighbours(k, v, axis)
    out: Any = _attention(size, offset, q, k, v, first, halo)
    return jnp.transpose(out[..., :tokens], (0, 1, 4, 2, 3))  # [B, F, T, N, D]


def _neighbours(k: Heads, v: Heads, axis: str) -> tuple[tuple[Frame, Frame], tuple[Frame, Frame], Int[Array, "1"]]:
    """The clip's frame 0, the frame before this device's first, and that first one's number in the clip."""
    me, devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    both = jnp.stack([k, v])  # so that each collective is one
    first = jax.lax.psum(jnp.where(me == 0, both[:, :, :1], 0), axis)
    halo = jax.lax.ppermute(both[:, :, -1:], axis, [(i, i + 1) for i in range(devices - 1)])
    offset = jnp.reshape(me * k.shape[1], (1,)).astype(jnp.int32)
    return (first[0], first[1]), (halo[0], halo[1]), offset


def fits(tokens: int, dim: int, itemsize: int, *, backward: bool = True) -> bool:
    """Whether a frame's keys and values, and their gradients, fit on the chip."""
    filled, block = _fill(tokens)
    frame: Any = math.ceil(dim / 16) * 16 * filled
    held = 2 * 6 * frame * itemsize + backward * (2 * 2 * frame * itemsize + (2 * 4 + 2) * frame * 4)
    return held + 6 * 4 * block * block <= VMEM

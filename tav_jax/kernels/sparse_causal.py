"""Sparse-causal attention as a Pallas kernel for TPUs: each frame attends to frame 0 and to the previous frame.

XLA's version stores the concatenated keys and values of both frames, `[B, F, 2T, N, D]`. This kernel reads them in
place: its index maps choose the frame. Keys and values of frame 0 stay in VMEM while the grid iterates over frames, so
that each is read about once. Frames 0 and 1 attend to frame 0 only once: the softmax over duplicated keys is the same.

Arrays in this module are `[B, F, N, D, T]`. A TPU tiles the last axis by 128: with T last, a head of size 40 is padded
to 48; as `[…, T, D]` it would be padded to 128.

Scores are float32, and exponentials have base 2, for which the hardware has an instruction.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES = 128
RESIDUALS = "kernel"  # the `checkpoint_name` of what a kernel's backward pass needs of its forward pass
BLOCK = 512  # queries and keys at a time, at most: a tile of scores is 1 MiB
VMEM = 96 * 2**20  # limit, of 128 MiB on v5e and v6e

Heads = Float[Array, "B F N D T"]
Frame = Float[Array, "B 1 N D T"]


class Options(NamedTuple):
    """Static parameters of the kernel."""

    tokens: int  # without padding
    block: int  # queries per block, and keys per tile
    halo: bool  # whether the first frame's previous frame may be on another device
    interpret: bool


def _padding(tokens: int) -> tuple[int, int]:
    """The padded number of tokens, and the block size that divides it."""
    padded = -(-tokens // LANES) * LANES
    largest = min(BLOCK, padded)
    block = max(n for n in range(LANES, largest + 1, LANES) if padded % n == 0)
    if block < largest // 2:  # no large divisor: pad to a multiple of the largest block
        block, padded = largest, -(-padded // largest) * largest
    return padded, block


# --------------------------------------------------------------------------------------------------- kernel bodies


def _dot(a, b, contract: tuple[int, int]):
    """A matrix product over one axis of each operand, accumulated in float32."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _over_keys(options: Options, padded: int, visit) -> None:
    """Call `visit(slice, start)` for every tile of keys."""

    def step(j, _):
        start = pl.multiple_of(j * options.block, options.block)
        visit(pl.ds(start, options.block), start)

    jax.lax.fori_loop(0, padded // options.block, step, None)


def _scores(options: Options, k, q, start):
    """Scores `[keys, queries]` for exponentials with base 2. Padded keys are masked."""
    s = _dot(k, q, (0, 0)) * (math.log2(math.e) / math.sqrt(q.shape[0]))
    if options.tokens % options.block == 0:
        return s
    rows = start + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    return jnp.where(rows < options.tokens, s, -jnp.inf)


def _for_key_frames(options: Options, offset, attend, first, previous, halo) -> None:
    """Call `attend(source, keys, values)` for frame 0 and, from frame 2 of the clip on, for the previous frame."""
    f = pl.program_id(2)
    attend("first", *first)
    later = offset[0] + f > 1
    pl.when(later & (f > 0) if options.halo else later)(lambda: attend("previous", *previous))
    if options.halo:
        pl.when(later & (f == 0))(lambda: attend("halo", *halo))


def _forward_kernel(options: Options, offset, q, k0, v0, kp, vp, *rest):
    halo, rest = (rest[:2], rest[2:]) if options.halo else ((), rest)
    out, lse, row_max, total, acc = rest
    row_max[...] = jnp.full_like(row_max, -jnp.inf)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

    def attend(_, k, v):
        def visit(where, start):
            s = _scores(options, k[:, where], q[...], start)
            new_max = jnp.maximum(row_max[...], s.max(axis=0, keepdims=True))  # [1, queries]
            p = jnp.exp2(s - new_max)
            rescale = jnp.exp2(row_max[...] - new_max)
            total[...] = rescale * total[...] + p.sum(axis=0, keepdims=True)
            acc[...] = rescale * acc[...] + _dot(v[:, where], p.astype(v.dtype), (1, 0))  # [D, queries]
            row_max[...] = new_max

        _over_keys(options, k.shape[1], visit)

    _for_key_frames(options, offset, attend, (k0, v0), (kp, vp), halo)
    out[...] = (acc[...] / total[...]).astype(out.dtype)
    lse[...] = row_max[...] + jnp.log2(total[...])


def _backward_kernel(options: Options, offset, q, out, g, lse, k0, v0, kp, vp, *rest):
    """All gradients in one pass over the scores.

    Gradients of frame 0's keys and values are summed in VMEM over all frames, those of the previous frame over the
    queries of this frame. The last frame's are zero here: no later frame on this device attends to it.
    """
    halo, rest = (rest[:2], rest[2:]) if options.halo else ((), rest)
    dq, dk0, dv0, dk, dv, *rest = rest
    dhalo, rest = (rest[:2], rest[2:]) if options.halo else ((), rest)
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
    sums = {"first": (dk0, dv0), "previous": (dk_sum, dv_sum), "halo": dhalo}

    def attend(source, k, v):
        to_k, to_v = sums[source]

        def visit(where, start):
            p = jnp.exp2(_scores(options, k[:, where], q[...], start) - lse[...])  # [keys, queries]
            to_v[:, where] += _dot(g[...], p.astype(g.dtype), (1, 1))  # [D, keys]
            ds = (p * (_dot(v[:, where], g[...], (0, 0)) - delta) * scale).astype(q.dtype)
            to_k[:, where] += _dot(q[...], ds, (1, 1))
            dq_sum[...] += _dot(k[:, where], ds, (1, 0))  # [D, queries]

        _over_keys(options, k.shape[1], visit)

    _for_key_frames(options, offset, attend, (k0, v0), (kp, vp), halo)
    dq[...] = dq_sum[...].astype(dq.dtype)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        dk[...] = dk_sum[...].astype(dk.dtype)
        dv[...] = dv_sum[...].astype(dv.dtype)


# ----------------------------------------------------------------------------------------------------- kernel calls


def _cost(options: Options, q, products: int, arrays) -> pl.CostEstimate:
    """Used by the compiler for scheduling, and by `tav plan`, which cannot analyze a kernel."""
    b, frames, heads, dim, tokens = q.shape
    key_frames = 2 * frames - (0 if options.halo else min(frames, 2))  # frames 0 and 1 have one each
    scores = b * heads * key_frames * tokens**2
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    return pl.CostEstimate(flops=2 * products * scores * dim, bytes_accessed=moved, transcendentals=scores)


def _call(kernel, options: Options, offset, inputs, outputs, scratch, *, products: int, name: str):
    """`inputs` and `outputs` are pairs of an array, or of its shape and dtype, and a block spec."""
    arrays = [x for x, _ in inputs]
    batch, frames, heads, _, tokens = arrays[0].shape  # of the queries
    call = pl.pallas_call(
        functools.partial(kernel, options),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, frames, tokens // options.block),
            in_specs=[block for _, block in inputs],
            out_specs=[block for _, block in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[shape for shape, _ in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=_cost(options, arrays[0], products, [*arrays, *(shape for shape, _ in outputs)]),
        interpret=options.interpret,
        name=name,
    )
    return call(offset, *arrays)


class _Blocks(NamedTuple):
    """Block specs for the grid (batch, head, frame, block of queries)."""

    queries: pl.BlockSpec
    rows: pl.BlockSpec  # one value for each query
    frame: pl.BlockSpec  # of an array with one frame
    previous: pl.BlockSpec
    gradient: pl.BlockSpec  # of the previous frame; at frame 0 the last frame's, which is zero

    @classmethod
    def of(cls, options: Options, q: jax.Array) -> "_Blocks":
        frames, dim, tokens = q.shape[1], q.shape[3], q.shape[4]
        one, whole = (None, None, None, dim, options.block), (None, None, None, dim, tokens)
        return cls(
            pl.BlockSpec(one, lambda b, n, f, i, _: (b, f, n, 0, i)),
            pl.BlockSpec((None, None, None, 1, options.block), lambda b, n, f, i, _: (b, f, n, 0, i)),
            pl.BlockSpec(whole, lambda b, n, f, i, _: (b, 0, n, 0, 0)),
            pl.BlockSpec(whole, lambda b, n, f, i, _: (b, jnp.maximum(f - 1, 0), n, 0, 0)),
            pl.BlockSpec(whole, lambda b, n, f, i, _: (b, jnp.where(f == 0, frames - 1, f - 1), n, 0, 0)),
        )


def _run_forward(options: Options, offset, q, k, v, first, halo):
    at, dim = _Blocks.of(options, q), q.shape[3]
    inputs = [(q, at.queries), *((x, at.frame) for x in first), (k, at.previous), (v, at.previous)]
    inputs += [(x, at.frame) for x in halo]
    sums = jax.ShapeDtypeStruct((*q.shape[:3], 1, q.shape[4]), jnp.float32)
    outputs = [(jax.ShapeDtypeStruct(q.shape, q.dtype), at.queries), (sums, at.rows)]
    scratch = [(1, options.block), (1, options.block), (dim, options.block)]
    return _call(_forward_kernel, options, offset, inputs, outputs, scratch, products=2, name="sparse_causal_forward")


def _run_backward(options: Options, offset, q, k, v, first, halo, out, lse, g):
    at, (dim, tokens) = _Blocks.of(options, q), q.shape[3:]
    inputs = [(q, at.queries), (out, at.queries), (g, at.queries), (lse, at.rows), *((x, at.frame) for x in first)]
    inputs += [(k, at.previous), (v, at.previous), *((x, at.frame) for x in halo)]
    like = jax.ShapeDtypeStruct
    whole = [(like(x.shape, jnp.float32), at.frame) for x in (*first, *halo)]
    outputs = [(like(q.shape, q.dtype), at.queries), *whole[:2]]
    outputs += [(like(x.shape, x.dtype), at.gradient) for x in (k, v)] + whole[2:]
    scratch = [(dim, options.block), (dim, tokens), (dim, tokens)]
    call = functools.partial(_call, products=5, name="sparse_causal_backward")
    dq, dk0, dv0, dk, dv, *dhalo = call(_backward_kernel, options, offset, inputs, outputs, scratch)
    return dq, dk, dv, *(tuple(x.astype(k.dtype) for x in frame) for frame in ((dk0, dv0), dhalo))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, offset, q, k, v, first, halo):
    """Attention for the frames on one device. `first`: keys and values of the clip's frame 0; `halo`: those of the last
    frame on the previous device; `offset`: the clip's index of the first frame here."""
    return _run_forward(options, offset, q, k, v, first, halo)[0]


def _attention_fwd(options: Options, offset, q, k, v, first, halo):
    # Named here, because a policy that keeps only the result would run the kernel again for `lse`.
    out, lse = (checkpoint_name(x, RESIDUALS) for x in _run_forward(options, offset, q, k, v, first, halo))
    return out, (offset, q, k, v, first, halo, out, lse)


def _attention_bwd(options: Options, residuals, g):
    offset, q, k, v, first, halo, out, lse = residuals
    no_gradient = np.zeros(offset.shape, jax.dtypes.float0)  # the offset is an integer
    return no_gradient, *_run_backward(options, offset, q, k, v, first, halo, out, lse, g)


_attention.defvjp(_attention_fwd, _attention_bwd)


# ------------------------------------------------------------------------------------------------ public functions


def sparse_causal(
    q: Float[Array, "B F T N D"],
    k: Float[Array, "B F T N D"],
    v: Float[Array, "B F T N D"],
    *,
    axis: str | None = None,
    interpret: bool = False,
) -> Float[Array, "B F T N D"]:
    """`softmax(q [k₀ kᵢ₋₁]ᵀ / √d) [v₀ vᵢ₋₁]`. Inside a `shard_map` with the frames sharded over the mesh axis `axis`,
    frame 0 and the last frame of the previous device are transferred."""
    tokens = q.shape[2]
    padded, block = _padding(tokens)
    options = Options(tokens, block, axis is not None, interpret)

    def to_kernel_layout(x):
        x = jnp.transpose(x, (0, 1, 3, 4, 2))  # [B, F, N, D, T]
        return jnp.pad(x, ((0, 0),) * 4 + ((0, padded - tokens),))

    q, k, v = (to_kernel_layout(x) for x in (q, k, v))
    first, halo, offset = (k[:, :1], v[:, :1]), (), jnp.zeros(1, jnp.int32)
    if axis is not None:
        first, halo, offset = _exchange_frames(k, v, axis)
    out: Any = _attention(options, offset, q, k, v, first, halo)
    return jnp.transpose(out[..., :tokens], (0, 1, 4, 2, 3))  # [B, F, T, N, D]


def _exchange_frames(k: Heads, v: Heads, axis: str) -> tuple[tuple[Frame, Frame], tuple[Frame, Frame], Int[Array, "1"]]:
    """`first`, `halo` and `offset` of `_attention`."""
    index, devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    kv = jnp.stack([k, v])  # one collective instead of two
    first = jax.lax.psum(jnp.where(index == 0, kv[:, :, :1], 0), axis)
    halo = jax.lax.ppermute(kv[:, :, -1:], axis, [(i, i + 1) for i in range(devices - 1)])
    offset = jnp.reshape(index * k.shape[1], (1,)).astype(jnp.int32)
    return (first[0], first[1]), (halo[0], halo[1]), offset


def fits(tokens: int, dim: int, itemsize: int) -> bool:
    """Whether the keys and values of the frames, and their gradients, fit into VMEM."""
    padded, block = _padding(tokens)
    frame: Any = math.ceil(dim / 16) * 16 * padded
    # Double-buffered keys, values (6) and their gradients (2); float32 gradients: 4 double-buffered and 2 sums; tiles.
    return 2 * (6 + 2) * frame * itemsize + (2 * 4 + 2) * frame * 4 + 6 * 4 * block * block <= VMEM

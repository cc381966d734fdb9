"""The attention kernels against the plain formula, on the CPU in interpret mode, and through the real TPU compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import LOOKING_THERE, difference, with_libtpu

from tav_jax import InputError, TuneAVideo, kernels
from tav_jax.kernels import frame_attention
from tav_jax.kernels.attention import splash
from tav_jax.kernels.sparse_causal import fits, sparse_causal

WORKER = Path(__file__).parent / "kernel_worker.py"


def arrays(*shape, dtype=jnp.float32, count=3):
    keys = jax.random.split(jax.random.key(0), count)
    return tuple(jax.random.normal(key, shape).astype(dtype) for key in keys)


def by_hand(q, k, v):
    """Frame by frame, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for i in range(q.shape[1]):
        seen = [0] if i <= 1 else [0, i - 1]
        keys, values = (np.concatenate([x[:, j] for j in seen], axis=1) for x in (k, v))  # [B, S, N, D]
        scores = np.einsum("btnd,bsnd->bnts", q[:, i], keys) / np.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, i] = np.einsum("bnts,bsnd->btnd", scores / scores.sum(axis=-1, keepdims=True), values)
    return out


# Head sizes of Stable Diffusion 1 and 2, odd numbers of frames, lengths that fill no block, and one that fills many.
SHAPES = [
    (1, 3, 64, 2, 40),
    (2, 2, 130, 1, 64),
    (1, 5, 96, 1, 80),
    (1, 1, 77, 2, 160),
    (1, 4, 1100, 1, 8),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_fused_kernel_is_the_formula(shape):
    q, k, v = arrays(*shape)
    ours = jax.jit(lambda q, k, v: sparse_causal(q, k, v, interpret=True))(q, k, v)
    assert difference(ours, by_hand(q, k, v)) <= 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_the_fused_kernels_gradients_are_the_formulas(shape):
    q, k, v, g = arrays(*shape, count=4)

    def pulled(kernel):
        return jax.jit(lambda q, k, v: jax.vjp(lambda *x: frame_attention(*x, "sparse-causal", kernel), q, k, v)[1](g))

    for ours, plain in zip(pulled("interpret")(q, k, v), pulled("plain")(q, k, v), strict=True):
        assert np.abs(ours - plain).max() <= 3e-6 * max(1.0, float(np.abs(plain).max()))


def test_what_no_frame_looks_at_gets_no_gradient():
    q, k, v, g = arrays(1, 4, 32, 1, 8, count=4)
    _, dk, dv = jax.vjp(lambda *x: sparse_causal(*x, interpret=True), q, k, v)[1](g)
    assert not np.asarray(dk)[:, -1].any()
    assert not np.asarray(dv)[:, -1].any()
    assert np.asarray(dk)[:, 1].any()


def test_half_precision_is_as_near_as_its_digits():
    q, k, v = arrays(1, 3, 160, 2, 40, dtype=jnp.bfloat16)
    ours = sparse_causal(q, k, v, interpret=True)
    assert ours.dtype == jnp.bfloat16
    assert difference(ours.astype(jnp.float32), by_hand(q, k, v)) <= 2e-2


@pytest.mark.parametrize("sees", ["sparse-causal", "first-frame", "per-frame"])
def test_splash_is_the_formula_also_where_a_length_fills_no_block(sees):
    q, k, v = arrays(1, 3, 150, 2, 40)
    ours = splash(q, kernels.key_frames(k, sees), kernels.key_frames(v, sees), interpret=True)
    assert difference(ours, frame_attention(q, k, v, sees)) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(("data", "frames", "batch"), [(1, 4, 1), (2, 2, 2), (2, 2, 1)])
def test_over_a_mesh_the_kernel_gets_its_neighbours_frame(data, frames, batch):
    flags = f"--xla_force_host_platform_device_count={data * frames}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    line = [sys.executable, str(WORKER), str(data), str(frames), str(batch)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert max(told["errors"]) <= 3e-6
    # One frame from the device before, frame 0 from the first, and their gradients back: nothing is gathered.
    assert set(told["collectives"]) <= {"collective-permute", "all-reduce"}


def test_a_frame_too_large_for_the_chip_is_not_given_to_the_kernel():
    assert fits(4096, 40, 2)
    assert fits(9216, 64, 2)  # Stable Diffusion 2.1 at 768²
    assert not fits(128 * 128, 160, 4)


# ------------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "fused"), ("gpu", "cudnn"), ("cpu", "plain")])
def test_each_platform_has_its_best_kernel(platform, kernel):
    assert kernels.choose_kernel("auto", platform) == kernel
    assert kernels.choose_kernel("plain", platform) == "plain"


def test_a_kernel_is_refused_where_it_cannot_run(sd1):
    with pytest.raises(InputError, match=r"kernel 'fused' runs on tpu only, and this is cpu; use auto or plain"):
        TuneAVideo.from_pretrained(sd1.model, kernel="fused")
    with pytest.raises(InputError, match=r"'flash' is not one of auto, plain"):
        TuneAVideo.from_pretrained(sd1.model, kernel="flash")


@pytest.mark.slow
def test_the_whole_network_gives_the_same_with_the_kernel(sd1):
    """The kernel in its place: one pipeline with it and one without."""
    latents = np.random.default_rng(0).normal(size=(1, 3, 8, 8, 4)).astype(np.float32)
    plain, ours = (TuneAVideo.from_pretrained(sd1.model, dtype="float32", kernel=k) for k in ("plain", "interpret"))
    text = plain.encode_text("a red square")
    t = np.array([500])
    assert difference(ours.unet(latents, t, text), plain.unet(latents, t, text)) <= 1e-5


# ----------------------------------------------------------------------------------------------- the TPU compiler


@pytest.mark.slow
@with_libtpu
def test_the_tpu_compiler_takes_the_kernel_and_it_needs_less_memory_than_splash():
    """At the largest level. (Of fewer tokens the compiler may keep all that splash has beside it on the chip.)"""
    script = Path(__file__).parent.parent / "benchmarks/kernels.py"
    line = [sys.executable, str(script), "--topologies=v5e:1x1", "--shapes=4096x8x40", "--frames=4", "--json"]
    there = {**os.environ, **LOOKING_THERE}
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, env=there)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {(row["kernel"], row["way"]): row for row in map(json.loads, done.stdout.splitlines())}
    for way in ("forward", "gradient"):
        assert (
            rows["fused", way]["temporaries"] < rows["splash", way]["temporaries"] < rows["plain", way]["temporaries"]
        )

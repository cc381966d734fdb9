"""The attention kernels against the formula, on the CPU in interpret mode, and through the TPU compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import difference, with_libtpu

from tav_jax import InputError, TuneAVideo, kernels
from tav_jax.kernels import frame_attention
from tav_jax.kernels.attention import key_frames, splash
from tav_jax.kernels.sparse_causal import fits, sparse_causal

WORKER = Path(__file__).parent / "kernel_worker.py"


def arrays(*shape, dtype=jnp.float32, count=3):
    keys = jax.random.split(jax.random.key(0), count)
    return tuple(jax.random.normal(key, shape).astype(dtype) for key in keys)


def reference(q, k, v):
    """Sparse-causal attention frame by frame, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for i in range(q.shape[1]):
        frames = [0] if i <= 1 else [0, i - 1]
        keys, values = (np.concatenate([x[:, j] for j in frames], axis=1) for x in (k, v))  # [B, S, N, D]
        scores = np.einsum("btnd,bsnd->bnts", q[:, i], keys) / np.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, i] = np.einsum("bnts,bsnd->btnd", scores / scores.sum(axis=-1, keepdims=True), values)
    return out


# Head sizes of Stable Diffusion 1 and 2, odd numbers of frames, lengths below, at and above the block size.
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
    assert difference(ours, reference(q, k, v)) <= 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradients_of_the_fused_kernel_are_the_formula(shape):
    q, k, v, g = arrays(*shape, count=4)

    def gradients(kernel):
        return jax.jit(lambda q, k, v: jax.vjp(lambda *x: frame_attention(*x, "sparse-causal", kernel), q, k, v)[1](g))

    for ours, plain in zip(gradients("interpret")(q, k, v), gradients("plain")(q, k, v), strict=True):
        assert np.abs(ours - plain).max() <= 3e-6 * max(1.0, float(np.abs(plain).max()))


def test_keys_that_no_frame_attends_to_have_no_gradient():
    q, k, v, g = arrays(1, 4, 32, 1, 8, count=4)
    _, dk, dv = jax.vjp(lambda *x: sparse_causal(*x, interpret=True), q, k, v)[1](g)
    assert not np.asarray(dk)[:, -1].any()
    assert not np.asarray(dv)[:, -1].any()
    assert np.asarray(dk)[:, 1].any()


def test_bfloat16_is_within_its_precision():
    q, k, v = arrays(1, 3, 160, 2, 40, dtype=jnp.bfloat16)
    ours = sparse_causal(q, k, v, interpret=True)
    assert ours.dtype == jnp.bfloat16
    assert difference(ours.astype(jnp.float32), reference(q, k, v)) <= 2e-2


@pytest.mark.parametrize("attention", ["sparse-causal", "first-frame", "per-frame"])
def test_splash_is_the_formula_for_lengths_that_are_padded(attention):
    q, k, v = arrays(1, 3, 150, 2, 40)
    ours = splash(q, key_frames(k, attention), key_frames(v, attention), interpret=True)
    assert difference(ours, frame_attention(q, k, v, attention)) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize(("data", "frames", "batch"), [(1, 4, 1), (2, 2, 2), (2, 2, 1)])
def test_the_kernel_on_a_mesh(data, frames, batch):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={data * frames}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    line = [sys.executable, str(WORKER), str(data), str(frames), str(batch)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert max(result["errors"]) <= 3e-6
    # The previous frame, frame 0, and their gradients are exchanged; nothing is gathered.
    assert set(result["collectives"]) <= {"collective-permute", "all-reduce"}


def test_shapes_that_fit_the_kernel():
    assert fits(4096, 40, 2)
    assert fits(9216, 64, 2)  # Stable Diffusion 2.1 at 768²
    assert not fits(128 * 128, 160, 4)


# -------------------------------------------------------------------------------------------- choosing a kernel


@pytest.mark.parametrize(
    ("platform", "capability", "kernel"),
    [
        *(("tpu", "", "fused"), ("cpu", "", "plain")),
        *(("gpu", "9.0", "cudnn"), ("gpu", "8.0", "cudnn"), ("gpu", "10.3", "cudnn")),
        *(("gpu", "7.5", "plain"), ("gpu", "gfx90a", "plain")),
    ],
)
def test_the_default_kernel_of_each_platform(platform, capability, kernel):
    device = SimpleNamespace(compute_capability=capability)
    assert kernels.choose_kernel("auto", platform, device) == kernel
    assert kernels.choose_kernel("plain", platform, device) == "plain"


def test_cudnn_attention_is_refused_on_gpus_that_do_not_have_it():
    with pytest.raises(InputError, match=r"compute capability 8\.0 or higher, such as an A100, and this one has 7\.5"):
        kernels.choose_kernel("cudnn", "gpu", SimpleNamespace(compute_capability="7.5"))


def test_a_kernel_of_another_platform_is_refused(sd1):
    with pytest.raises(InputError, match=r"kernel 'fused' runs on tpu only, and this is cpu; use auto or plain"):
        TuneAVideo.from_pretrained(sd1.model, kernel="fused")
    with pytest.raises(InputError, match=r"kernel is 'flash'; it must be one of auto, plain"):
        TuneAVideo.from_pretrained(sd1.model, kernel="flash")


@pytest.mark.slow
def test_the_network_with_the_fused_kernel(sd1):
    """A pipeline with the kernel equals one without."""
    latents = np.random.default_rng(0).normal(size=(1, 3, 8, 8, 4)).astype(np.float32)
    plain, ours = (TuneAVideo.from_pretrained(sd1.model, dtype="float32", kernel=k) for k in ("plain", "interpret"))
    text = plain.encode_text("a red square")
    t = np.array([500])
    assert difference(ours.unet(latents, t, text), plain.unet(latents, t, text)) <= 1e-5


# ----------------------------------------------------------------------------------------------- the TPU compiler


@pytest.mark.slow
@with_libtpu
def test_the_tpu_compiler_needs_less_memory_for_the_kernel_than_for_splash():
    """At the largest level. At fewer tokens the compiler may keep all of splash's temporaries in VMEM."""
    script = Path(__file__).parent.parent / "benchmarks/kernels.py"
    line = [sys.executable, str(script), "--topologies=v5e:1x1", "--shapes=4096x8x40", "--frames=4", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {(row["kernel"], row["way"]): row for row in map(json.loads, done.stdout.splitlines())}
    for way in ("forward", "gradient"):
        assert (
            rows["fused", way]["temporaries"] < rows["splash", way]["temporaries"] < rows["plain", way]["temporaries"]
        )

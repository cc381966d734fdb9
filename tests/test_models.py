"""The networks, layer by layer and whole, with random weights: against torch, Diffusers, transformers and loops."""

import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import difference
from flax import nnx
from jax.extend.core import jaxprs_in_params

from tav_jax.config import TRAINABLE
from tav_jax.io import diffusers_layout, weights
from tav_jax.kernels import full_attention
from tav_jax.kernels.attention import key_frames
from tav_jax.models import VAE, ClipText, ClipTextConfig, Conditioning, UNet, UNetConfig, VAEConfig
from tav_jax.models.arguments import FlatTree, Static, unwrap
from tav_jax.models.attention import Attention, FeedForward, TransformerBlock, gelu
from tav_jax.models.norms import group_norm, layer_norm
from tav_jax.models.remat import policy
from tav_jax.models.resnet import resize_nearest
from tav_jax.models.unet import timestep_embedding
from tav_jax.training.train_step import trainable_filter

torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# -------------------------------------------------------------------------------------------------------- layers


def plain_attention(q, k, v):
    scores = np.einsum("tnd,snd->nts", q.astype(np.float64), k) / np.sqrt(q.shape[-1])
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nts,snd->tnd", scores / scores.sum(-1, keepdims=True), v)


def test_full_attention_is_the_formula():
    q, k, v = normal(2, 3, 5, 2, 8), normal(2, 3, 7, 2, 8, seed=1), normal(2, 3, 7, 2, 8, seed=2)
    ours = full_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))
    for b in range(2):
        for f in range(3):
            np.testing.assert_allclose(ours[b, f], plain_attention(q[b, f], k[b, f], v[b, f]), atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_attention_in_batches_has_the_same_values_and_gradients(monkeypatch, batch_size):
    q, k, v = (jnp.asarray(normal(2, 4, size, 2, 8, seed=size)) for size in (5, 7, 7))

    def value_and_gradients(q, k, v):
        return jax.value_and_grad(lambda *qkv: (full_attention(*qkv) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)

    whole = value_and_gradients(q, k, v)
    module = importlib.import_module("tav_jax.kernels.attention")
    monkeypatch.setattr(module, "MAX_SCORE_BYTES", batch_size * 4 * 5 * 7 * 2)
    assert module.attention_batch_size(5, 7, 2) == batch_size
    in_batches = value_and_gradients(q, k, v)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(in_batches), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_sparse_causal_attention_uses_the_first_and_the_previous_frame(frames):
    layer = Attention(16, 16, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.asarray(normal(2, frames, 6, 16))
    q, k, v = (np.asarray(y) for y in layer.project(x, x))
    ours = layer.spatial(x, "sparse-causal")
    for b in range(2):
        for i in range(frames):
            previous = max(i - 1, 0)
            keys = np.concatenate([k[b, 0], k[b, previous]])
            values = np.concatenate([v[b, 0], v[b, previous]])
            expected = layer.output(jnp.asarray(plain_attention(q[b, i], keys, values), jnp.float32))
            np.testing.assert_allclose(ours[b, i], expected, atol=1e-5)


def test_key_frames_of_the_ablations():
    x = jnp.asarray(normal(1, 4, 3, 2, 8))
    assert np.array_equal(key_frames(x, "per-frame"), x)
    assert np.array_equal(key_frames(x, "first-frame"), np.repeat(x[:, :1], 4, axis=1))


def test_temporal_attention_is_over_all_frames_at_each_position():
    layer = Attention(16, 16, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jnp.asarray(normal(2, 5, 3, 16))
    q, k, v = (np.asarray(y) for y in layer.project(x, x))
    ours = layer.temporal(x, Conditioning(x[:, 0]))
    for b in range(2):
        for position in range(3):
            at = (b, slice(None), position)
            expected = layer.output(jnp.asarray(plain_attention(q[at], k[at], v[at]), jnp.float32))
            np.testing.assert_allclose(ours[at], expected, atol=1e-5)


def test_feed_forward_uses_the_exact_gelu():
    layer = FeedForward(8, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = normal(3, 8)
    value, gate = torch.tensor(np.asarray(layer.proj_in(jnp.asarray(x)))).chunk(2, dim=-1)
    expected = layer.proj_out(jnp.asarray((value * torch.nn.functional.gelu(gate)).numpy()))
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 8e-3)])
def test_the_gelu_and_its_derivative_equal_the_formula(dtype, bound):
    """Relative to max(1, |x|), against float64; for bfloat16 the bound is its precision."""
    x = jnp.linspace(-9, 9, 20_001).astype(dtype)
    exact = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    expected = torch.nn.functional.gelu(exact)
    expected.sum().backward()
    ours, derivative = jax.jvp(gelu, (x,), (jnp.ones_like(x),))
    scale = np.maximum(1, np.abs(np.asarray(x, np.float64)))
    for one, other in ((ours, expected.detach()), (derivative, exact.grad)):
        assert one.dtype == x.dtype
        assert np.max(np.abs(np.asarray(one, np.float64) - other.numpy()) / scale) <= bound


def test_the_gelu_is_not_computed_by_erfc():
    """Which is several times as expensive on a TPU."""
    x = jnp.zeros(8, jnp.bfloat16)
    assert "erfc" not in str(jax.make_jaxpr(lambda x: jax.jvp(gelu, (x,), (x,)))(x))


@pytest.mark.parametrize(("remat", "calls"), [("none", 1), ("products", 1), ("attention", 1), ("block", 2)])
def test_only_block_remat_runs_the_forward_kernel_twice(remat, calls):
    kinds = {"spatial_attention": "sparse-causal", "temporal_attention": True, "kernel": "interpret"}
    layer = TransformerBlock(8, 12, 2, **kinds, controlled=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(layer)

    def loss(weights, x):
        return policy(remat).block(nnx.merge(graph, weights), x, Conditioning(jnp.ones((1, 7, 12)))).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(weights, jnp.ones((1, 3, 4, 8)))
    assert list(used_kernels(jaxpr.jaxpr)).count("sparse_causal_forward") == calls


def test_a_flat_module_is_hashed_once_and_compiled_once():
    class Options:
        hashed = 0

        def __hash__(self) -> int:
            Options.hashed += 1
            return 1

        def __eq__(self, other) -> bool:
            return isinstance(other, Options)

    def layer(seed: int) -> FeedForward:
        return FeedForward(8, dtype=jnp.float32, rngs=nnx.Rngs(seed))

    call = jax.jit(lambda options, module, x: unwrap(module)(x), static_argnums=0)
    x, options, module = jnp.ones((2, 8)), Static(Options()), FlatTree(layer(0))
    for _ in range(3):
        assert np.array_equal(call(options, module, x), jax.jit(layer(0))(x))
    assert Options.hashed == 1
    assert np.array_equal(call(Static(Options()), FlatTree(layer(1)), x), jax.jit(layer(1))(x))
    assert call._cache_size() == 1


def used_kernels(jaxpr):
    """The names of the kernels whose results are used: XLA removes the others."""
    used = {id(x) for eqn in jaxpr.eqns for x in eqn.invars} | {id(x) for x in jaxpr.outvars}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield from [eqn.params["name"]] * any(id(x) in used for x in eqn.outvars)
        else:
            for inner in jaxprs_in_params(eqn.params):
                yield from used_kernels(inner)


@pytest.mark.parametrize(("size", "out"), [((4, 4), (8, 8)), ((4, 3), (7, 5)), ((5, 9), (9, 17)), ((2, 2), (3, 4))])
def test_nearest_equals_torch(size, out):
    x = normal(2, *size, 3)
    theirs = torch.nn.functional.interpolate(torch.tensor(x).permute(0, 3, 1, 2), size=out, mode="nearest")
    assert np.array_equal(resize_nearest(jnp.asarray(x), out), theirs.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(("flip", "shift", "dim"), [(True, 0, 320), (False, 1, 32), (True, 0, 17)])
def test_timestep_embedding_equals_diffusers(flip, shift, dim):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    t = np.array([0, 1, 321, 999])
    theirs = embeddings.get_timestep_embedding(torch.tensor(t), dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    np.testing.assert_allclose(timestep_embedding(jnp.asarray(t), dim, flip, shift), theirs, atol=1e-4)


# ---------------------------------------------------------------------------- epsilons, sizes, trainable subset


def modules(model: nnx.Module):
    return [(".".join(map(str, path)), module) for path, module in nnx.iter_modules(model)]


def test_every_norm_has_its_epsilon():
    counted = 0
    for path, module in modules(weights.abstract(UNet, UNetConfig.sd1(), jnp.float32)):
        if isinstance(module, nnx.LayerNorm):
            assert module.epsilon == 1e-5, path
        elif isinstance(module, nnx.GroupNorm):
            assert module.epsilon == (1e-6 if path.endswith("norm") else 1e-5), path
        counted += isinstance(module, nnx.LayerNorm | nnx.GroupNorm)
    assert (
        counted == 16 * 5 + 22 * 2 + 1
    )  # 16 transformers with 4 layer norms and one group norm, 22 resnets, the output
    for path, module in modules(weights.abstract(VAE, VAEConfig(), jnp.float32)):
        if isinstance(module, nnx.GroupNorm):
            assert module.epsilon == 1e-6, path
            counted += 1
    for path, module in modules(weights.abstract(ClipText, ClipTextConfig.sd2(), jnp.float32)):
        if isinstance(module, nnx.LayerNorm):
            assert module.epsilon == 1e-5, path
            counted += 1
    assert counted == 125 + (10 + 14) * 2 + 2 + 2 + 23 * 2 + 1


@pytest.mark.parametrize(
    ("dtype", "mean", "bound"),
    [
        ("bfloat16", 0, 2**-8),
        ("bfloat16", 30, 2**-8),
        ("float16", 30, 2**-10),
        ("float32", 0, 1e-6),
        ("float32", 1000, 5e-4),
    ],
)
def test_norms_are_the_formula_with_a_large_mean(dtype, mean, bound):
    """In float32 the variance in one pass, E[x²] − E[x]², would be off by several per cent at 1000."""
    x = jnp.asarray(normal(2, 3, 4, 4, 64) + mean, dtype)
    rows = np.asarray(x, np.float64)
    groups = rows.reshape(2, 3, 4, 4, 8, 8)
    for norm, spread, over in (
        (group_norm(64, 8, 1e-5, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)), groups, (1, 2, 3, 5)),
        (layer_norm(64, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)), rows, (-1,)),
    ):
        centred = spread - spread.mean(over, keepdims=True)
        wanted = (centred / np.sqrt((centred**2).mean(over, keepdims=True) + 1e-5)).reshape(rows.shape)
        assert np.abs(np.asarray(norm(x), np.float64) - wanted).max() < bound * np.abs(wanted).max()


@pytest.mark.parametrize(("config", "total"), [(UNetConfig.sd1(), 909_120_004), (UNetConfig.sd2(), 915_509_764)])
def test_parameter_counts(config, total):
    state = nnx.state(weights.abstract(UNet, config, jnp.float32))
    trained, _ = nnx.split_state(state, trainable_filter(), ...)

    def size(s):
        return sum(leaf.size for leaf in jax.tree.leaves(s))

    assert size(state) == total
    assert (len(jax.tree.leaves(trained)), size(trained)) == (112, 74_354_880)
    names = weights.flat(trained)
    assert sum(".attn_temp." in name for name in names) == 16 * 5
    assert not any("norm_temp" in name for name in names)
    official, _ = nnx.split_state(state, trainable_filter((*TRAINABLE, "mid", "up")), ...)
    assert len(jax.tree.leaves(official)) == 70


def test_the_presets_are_the_published_configs():
    sd21 = {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": [5, 10, 20, 20],
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1024,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "use_linear_projection": True,
        "upcast_attention": True,
    }
    assert diffusers_layout.unet_config(sd21, Path("unet/config.json")) == UNetConfig.sd2()
    sd14 = {**sd21, "attention_head_dim": 8, "cross_attention_dim": 768, "use_linear_projection": False}
    assert diffusers_layout.unet_config(sd14, Path("unet/config.json")) == UNetConfig.sd1()


# ------------------------------------------------------------------------------------------- whole networks


def perturbed(model, seed: int = 0):
    """Random weights everywhere, norms included, so that no layer is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model.eval()


def loaded(model, part: str, tmp_path, build, read_config):
    model.save_pretrained(tmp_path / part)
    config = json.loads((tmp_path / part / "config.json").read_text())
    ours = weights.abstract(build, read_config(config, tmp_path / part / "config.json"), jnp.float32)
    weights.fill(ours, weights.Source(weights.Files(tmp_path)), part, lambda path: jnp.float32)
    return ours


@pytest.mark.parametrize("linear", [False, True])
def test_one_frame_equals_the_2d_unet(tmp_path, linear):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 24, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=20,
        attention_head_dim=(2, 3, 4),
        use_linear_projection=linear,
        sample_size=12,
    )
    ours = loaded(perturbed(theirs), "unet", tmp_path, UNet, diffusers_layout.unet_config)
    x, text = normal(2, 11, 7, 4), normal(2, 9, 20, seed=1)  # odd at every level
    with torch.no_grad():
        expected = theirs(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor([3, 700]), torch.tensor(text)).sample
    call = jax.jit(lambda m, *args: m(*args))
    alone = call(ours, jnp.asarray(x)[:, None], jnp.array([3, 700]), Conditioning(jnp.asarray(text)))
    assert difference(alone[:, 0], expected.permute(0, 2, 3, 1)) <= 1e-5


def test_the_vae_equals_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(8, 12, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
    )
    ours = loaded(perturbed(theirs), "vae", tmp_path, VAE, diffusers_layout.vae_config)
    pixels, latents = normal(2, 40, 24, 3), normal(2, 5, 3, 4)
    with torch.no_grad():
        posterior = theirs.encode(torch.tensor(pixels).permute(0, 3, 1, 2)).latent_dist
        decoded = theirs.decode(torch.tensor(latents).permute(0, 3, 1, 2)).sample
    mean, std = ours.encode(jnp.asarray(pixels))
    assert difference(mean, posterior.mean.permute(0, 2, 3, 1)) <= 1e-4
    assert difference(std, posterior.std.permute(0, 2, 3, 1)) <= 1e-4
    assert difference(ours.decode(jnp.asarray(latents)), decoded.permute(0, 2, 3, 1)) <= 1e-4


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_the_text_encoder_equals_transformers(tmp_path, act):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=24, intermediate_size=50, num_hidden_layers=3, num_attention_heads=3, hidden_act=act
    )
    theirs = perturbed(transformers.CLIPTextModel(config))
    ours = loaded(theirs, "text_encoder", tmp_path, ClipText, diffusers_layout.text_config)
    ids = np.random.default_rng(0).integers(0, 99, (2, 77))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).last_hidden_state
    assert difference(ours(jnp.asarray(ids)), expected) <= 1e-5

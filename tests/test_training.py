"""One training step: what learns, what stays, what is compiled."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from tav_jax import config
from tav_jax.config import CHOICES, remat_name
from tav_jax.errors import InputError
from tav_jax.io import weights
from tav_jax.models import UNet, UNetConfig

NAMES = CHOICES["train.remat"]
from tav_jax.training import train_step
from tav_jax.training.train_step import Hyperparameters, TrainState, trainable_filter

SMALL = UNetConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_attention=(True, True),
    up_attention=(True, True),
    heads=(2, 2),
    cross_attention_dim=12,
    norm_num_groups=4,
)
FRAMES, SIDE = 3, 6
HYPER = Hyperparameters(jnp.float32(1e-3), jnp.float32(1e-2), jnp.float32(1.0))


def network(dtype=jnp.float32, seed: int = 0, **changes) -> UNet:
    """Random, its temporal layers included: a zero output would hide the gradient of what comes before it."""
    unet = UNet(UNetConfig(**{**vars(SMALL), **changes}), dtype=dtype, rngs=nnx.Rngs(seed))
    for path, leaf in weights.flat(nnx.state(unet)).items():
        if "attn_temp.to_out" in path:
            leaf.set_value(0.2 * jax.random.normal(jax.random.key(1), leaf.shape))
    return unet


def example(seed: int = 0, t: int = 321) -> tuple[Example, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (1, FRAMES, SIDE, SIDE, 4)
    latents, noise = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape)
    return Example(latents, noise, jnp.int32(t)), jax.random.normal(keys[2], (1, 7, 12))


LEVELS = jnp.linspace(0.999, 0.005, 1000)


def step(
    unet: UNet,
    learner: TrainState | None = None,
    seed: int = 0,
    t: int = 321,
    hyper: Hyperparameters = HYPER,
    remat=True,
):
    graph, trained, frozen = nnx.split(unet, trainable_filter(), ...)
    one, text = example(seed, t)
    return train_step.replay_step(
        graph,
        learner or TrainState.create(trained),
        frozen,
        one,
        text,
        LEVELS,
        hyper,
        prediction="epsilon",
        remat=remat,
    )


def gradients(unet: UNet, remat: str | bool):
    graph, trained, frozen = nnx.split(unet, trainable_filter(), ...)
    one, text = example()

    @jax.jit
    def grad(trained):
        return jax.grad(
            lambda t: train_step.diffusion_loss(nnx.merge(graph, t, frozen), one, text, LEVELS, "epsilon", remat=remat)
        )(trained)

    return {path: np.asarray(leaf.get_value()) for path, leaf in weights.flat(grad(trained)).items()}


def test_every_trained_tensor_gets_a_gradient_everywhere_and_remat_changes_nothing():
    kept = gradients(network(), remat="none")
    places = {path.split(".")[0] for path in kept}
    assert places == {"down_blocks", "mid_block", "up_blocks"}
    for path, gradient in kept.items():
        assert np.abs(gradient).max() > 1e-8, f"{path} gets no gradient"
    for name in NAMES[1:]:
        again = gradients(network(), remat=name)
        for path, gradient in kept.items():  # but for float32's rounding
            assert np.abs(again[path] - gradient).max() <= 2e-5 * np.abs(gradient).max(), (name, path)


def kept_numbers(remat: str, capsys) -> int:
    """Of the forward pass, for the backward pass; weights and inputs, which are there anyway, left out."""
    unet = network()
    graph, trained, frozen = nnx.split(unet, trainable_filter(), ...)
    one, text = example()

    def loss(trained, frozen, one, text):
        return train_step.diffusion_loss(nnx.merge(graph, trained, frozen), one, text, LEVELS, "epsilon", remat=remat)

    print_saved_residuals(loss, trained, frozen, one, text)
    told = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    shapes = [re.match(r"\w+\[([\d,]*)\]", line) for line in told]
    return sum(math.prod(int(n) for n in shape[1].split(",") if n) for shape in shapes if shape)


def test_each_remat_policy_keeps_less_than_the_one_before(capsys):
    kept = [kept_numbers(name, capsys) for name in NAMES]
    assert kept[-1] > 0
    assert kept == sorted(kept, reverse=True), dict(zip(NAMES, kept, strict=True))
    assert len(set(kept)) == len(kept), dict(zip(NAMES, kept, strict=True))


def test_remat_may_be_said_as_it_was_at_first_and_a_wrong_name_is_refused():
    assert (remat_name(True), remat_name(False), remat_name("level")) == ("block", "none", "level")
    with pytest.raises(ValueError, match=r"remat is 'blocks'; it must be one of none, products, .*"):
        remat_name("blocks")
    assert config.REMAT == NAMES


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_frozen_bits_stay_and_trained_ones_move(dtype):
    unet = network(dtype)
    trainable = trainable_filter()
    for path, leaf in weights.flat(nnx.state(unet)).items():
        if not trainable(path.split("."), None):
            leaf.set_value(leaf.get_value().astype(dtype))
    before = {path: np.asarray(leaf.get_value()) for path, leaf in weights.flat(nnx.state(unet)).items()}
    learner, report = step(unet)
    nnx.update(unet, learner.params)
    moved = set()
    for path, leaf in weights.flat(nnx.state(unet)).items():
        after = np.asarray(leaf.get_value())
        if trainable(path.split("."), None):
            assert after.dtype == np.float32, f"{path} has no float32 master"
            assert (after != before[path]).any(), f"{path} did not move"
            moved.add(path)
        else:
            assert after.dtype == dtype
            assert np.array_equal(after, before[path]), f"{path} is frozen and has changed"
    assert len(moved) == 7 * (2 + 1 + 4)  # two down, one mid and four up transformers
    assert np.isfinite(report.loss)
    assert np.isfinite(report.grad_norm)


def test_other_values_compile_nothing():
    unet = network()
    learner, _ = step(unet)
    compiled = train_step.replay_step._cache_size()
    for seed, t, rate in ((1, 5, 1e-4), (2, 999, 3e-5)):
        learner, _ = step(
            unet, learner, seed, t, Hyperparameters(jnp.float32(rate), jnp.float32(0.1), jnp.float32(0.5))
        )
    assert train_step.replay_step._cache_size() == compiled


def test_the_optimizer_is_torchs_adamw_with_torchs_clipping():
    torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(4, 3)), rng.normal(size=(5, 4, 3))
    theirs = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    adam = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, eps=1e-8)
    ours = jnp.asarray(start, jnp.float32)
    optimizer = train_step.optimizer(Hyperparameters(1e-2, 0.1))
    moments = optimizer.init(ours)
    for gradient in grads:
        theirs.grad = torch.tensor(gradient, dtype=torch.float32)
        norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        adam.step()
        clipped, our_norm = train_step.clip_by_global_norm(jnp.asarray(gradient, jnp.float32), 1.0)
        np.testing.assert_allclose(our_norm, float(norm), rtol=1e-6)
        updates, moments = optimizer.update(clipped, moments, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-6)


def test_a_draw_depends_on_key_and_step_alone_and_has_the_right_spread():
    mean, std = jnp.full((1, 4, 16, 16, 4), 2.0), jnp.full((1, 4, 16, 16, 4), 0.5)
    key = jax.random.key(33)
    draws = [train_step.sample_example(jax.random.fold_in(key, step), mean, std, 1000) for step in range(200)]
    again = train_step.sample_example(jax.random.fold_in(key, 7), mean, std, 1000)
    assert all(np.array_equal(a, b) for a, b in zip(draws[7], again, strict=True))
    latents, noise = (np.stack([np.asarray(getattr(d, name)) for d in draws]) for name in ("latents", "noise"))
    assert abs(latents.mean() - 2) < 0.01
    assert abs(latents.std() - 0.5) < 0.01
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(np.corrcoef(latents.ravel(), noise.ravel())[0, 1]) < 0.01
    times = np.array([int(d.timestep) for d in draws])
    assert times.min() >= 0
    assert times.max() <= 999
    assert 400 < times.mean() < 600
    assert len(np.unique(times)) > 150


def test_the_subset_is_chosen_by_name_and_place():
    assert trainable_filter()(("down_blocks", 0, "attentions", 0, "attn1", "to_q", "kernel"), None)
    assert not trainable_filter()(("down_blocks", 0, "attentions", 0, "attn1", "to_k", "kernel"), None)
    assert not trainable_filter()(("up_blocks", 0, "norm_temp", "scale"), None)
    assert trainable_filter()(("mid_block", "attn_temp", "to_out", 0, "bias"), None)
    assert not trainable_filter(places=("mid", "up"))(("down_blocks", 0, "attn_temp", "to_q", "kernel"), None)
    assert trainable_filter(("attn1",))(("up_blocks", 0, "attn1", "to_v", "kernel"), None)
    with pytest.raises(InputError, match="'left' is not one of down, mid, up"):
        trainable_filter(places=("left",))

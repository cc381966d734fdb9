"""The training step: gradients, trainable and frozen weights, remat, optimizer, compilations."""

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
from tav_jax.models import Conditioning, UNet, UNetConfig
from tav_jax.training import train_step
from tav_jax.training.train_step import Hyperparameters, TrainExample, TrainState, check_trainable, trainable_filter

pytestmark = pytest.mark.slow  # most of these tests compile a UNet or start processes

NAMES = [name for name in CHOICES["train.remat"] if name != "auto"]
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
    """Random weights, also for the outputs of the temporal layers, whose zeros would hide the other gradients."""
    unet = UNet(UNetConfig(**{**vars(SMALL), **changes}), dtype=dtype, rngs=nnx.Rngs(seed))
    for path, leaf in weights.flat(nnx.state(unet)).items():
        if "attn_temp.to_out" in path:
            leaf.set_value(0.2 * jax.random.normal(jax.random.key(1), leaf.shape))
    return unet


def example(seed: int = 0, t: int = 321) -> tuple[TrainExample, Conditioning]:
    keys = jax.random.split(jax.random.key(seed), 3)
    shape = (1, FRAMES, SIDE, SIDE, 4)
    latents, noise = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape)
    return TrainExample(latents, noise, jnp.int32(t)), Conditioning(jax.random.normal(keys[2], (1, 7, 12)))


ALPHAS_CUMPROD = jnp.linspace(0.999, 0.005, 1000)


def step(
    unet: UNet,
    state: TrainState | None = None,
    seed: int = 0,
    t: int = 321,
    hyper: Hyperparameters = HYPER,
    remat=True,
):
    graph, trained, frozen = nnx.split(unet, trainable_filter(), ...)
    one, conditioning = example(seed, t)
    return train_step.replay_step(
        graph,
        state or TrainState.create(trained),
        frozen,
        one,
        conditioning,
        ALPHAS_CUMPROD,
        hyper,
        prediction="epsilon",
        remat=remat,
    )


def loss(unet: UNet, one: TrainExample, conditioning: Conditioning, remat: str | bool) -> jax.Array:
    return train_step.diffusion_loss(unet, one, conditioning, ALPHAS_CUMPROD, "epsilon", remat=remat)


def gradients(unet: UNet, remat: str | bool):
    graph, trained, frozen = nnx.split(unet, trainable_filter(), ...)
    one, conditioning = example()

    @jax.jit
    def grad(trained):
        return jax.grad(lambda t: loss(nnx.merge(graph, t, frozen), one, conditioning, remat))(trained)

    return {path: np.asarray(leaf.get_value()) for path, leaf in weights.flat(grad(trained)).items()}


def test_every_trained_tensor_has_a_gradient_and_remat_changes_nothing():
    expected = gradients(network(), remat="none")
    places = {path.split(".")[0] for path in expected}
    assert places == {"down_blocks", "mid_block", "up_blocks"}
    for path, gradient in expected.items():
        assert np.abs(gradient).max() > 1e-8, f"{path} has no gradient"
    for name in NAMES[1:]:
        ours = gradients(network(), remat=name)
        for path, gradient in expected.items():  # equal up to float32 rounding
            assert np.abs(ours[path] - gradient).max() <= 2e-5 * np.abs(gradient).max(), (name, path)


def saved_values(remat: str, capsys) -> int:
    """The number of values kept for the backward pass, without weights and inputs."""
    unet = network()
    graph, trained, frozen = nnx.split(unet, trainable_filter(), ...)
    one, conditioning = example()

    def of(trained, frozen, one, conditioning):
        return loss(nnx.merge(graph, trained, frozen), one, conditioning, remat)

    print_saved_residuals(of, trained, frozen, one, conditioning)
    lines = [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]
    shapes = [re.match(r"\w+\[([\d,]*)\]", line) for line in lines]
    return sum(math.prod(int(n) for n in shape[1].split(",") if n) for shape in shapes if shape)


def test_each_remat_policy_keeps_less_than_the_one_before(capsys):
    kept = [saved_values(name, capsys) for name in NAMES]
    assert kept[-1] > 0
    assert kept == sorted(kept, reverse=True), dict(zip(NAMES, kept, strict=True))
    assert len(set(kept)) == len(kept), dict(zip(NAMES, kept, strict=True))


def test_remat_names():
    assert (remat_name(True), remat_name(False), remat_name("level")) == ("block", "none", "level")
    with pytest.raises(InputError, match=r"remat is 'blocks'; it must be one of auto, none, products, .*"):
        remat_name("blocks")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_frozen_weights_stay_bit_for_bit_and_trained_ones_change(dtype):
    unet = network(dtype)
    trainable = trainable_filter()
    for path, leaf in weights.flat(nnx.state(unet)).items():
        if not trainable(path.split("."), None):
            leaf.set_value(leaf.get_value().astype(dtype))
    before = {path: np.asarray(leaf.get_value()) for path, leaf in weights.flat(nnx.state(unet)).items()}
    state, metrics = step(unet)
    nnx.update(unet, state.params)
    moved = set()
    for path, leaf in weights.flat(nnx.state(unet)).items():
        after = np.asarray(leaf.get_value())
        if trainable(path.split("."), None):
            assert after.dtype == np.float32, f"{path} has no float32 copy"
            assert (after != before[path]).any(), f"{path} did not move"
            moved.add(path)
        else:
            assert after.dtype == dtype
            assert np.array_equal(after, before[path]), f"{path} is frozen and has changed"
    assert len(moved) == 7 * (2 + 1 + 4)  # two down, one mid and four up transformers
    assert np.isfinite(metrics.loss)
    assert np.isfinite(metrics.grad_norm)


def test_other_values_compile_nothing():
    unet = network()
    state, _ = step(unet)
    compiled = train_step.replay_step._cache_size()
    for seed, t, rate in ((1, 5, 1e-4), (2, 999, 3e-5)):
        state, _ = step(unet, state, seed, t, Hyperparameters(jnp.float32(rate), jnp.float32(0.1), jnp.float32(0.5)))
    assert train_step.replay_step._cache_size() == compiled


def test_the_optimizer_equals_torchs_adamw_and_clipping():
    torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(4, 3)), rng.normal(size=(5, 4, 3))
    theirs = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    adam = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, eps=1e-8)
    ours = jnp.asarray(start, jnp.float32)
    optimizer = train_step.optimizer(Hyperparameters(1e-2, 0.1))
    opt_state = optimizer.init(ours)
    for gradient in grads:
        theirs.grad = torch.tensor(gradient, dtype=torch.float32)
        norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
        adam.step()
        clipped, our_norm = train_step.clip_by_global_norm(jnp.asarray(gradient, jnp.float32), 1.0)
        np.testing.assert_allclose(our_norm, float(norm), rtol=1e-6)
        updates, opt_state = optimizer.update(clipped, opt_state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=1e-6)


def test_an_example_depends_on_key_and_step_only_and_has_the_right_moments():
    mean, std = jnp.full((1, 4, 16, 16, 4), 2.0), jnp.full((1, 4, 16, 16, 4), 0.5)
    key = jax.random.key(33)
    examples = [train_step.sample_example(jax.random.fold_in(key, step), mean, std, 1000) for step in range(200)]
    again = train_step.sample_example(jax.random.fold_in(key, 7), mean, std, 1000)
    assert all(np.array_equal(a, b) for a, b in zip(examples[7], again, strict=True))
    latents, noise = (np.stack([np.asarray(getattr(d, name)) for d in examples]) for name in ("latents", "noise"))
    assert abs(latents.mean() - 2) < 0.01
    assert abs(latents.std() - 0.5) < 0.01
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(np.corrcoef(latents.ravel(), noise.ravel())[0, 1]) < 0.01
    times = np.array([int(d.timestep) for d in examples])
    assert times.min() >= 0
    assert times.max() <= 999
    assert 400 < times.mean() < 600
    assert len(np.unique(times)) > 150


def test_the_trainable_subset_is_chosen_by_suffix_and_part():
    def accepts(names, *path) -> bool:
        return trainable_filter(names)(path, None)

    default = config.TRAINABLE
    assert accepts(default, "down_blocks", 0, "attentions", 0, "attn1", "to_q", "kernel")
    assert not accepts(default, "down_blocks", 0, "attentions", 0, "attn1", "to_k", "kernel")
    assert not accepts(default, "up_blocks", 0, "norm_temp", "scale")
    assert accepts(default, "mid_block", "attn_temp", "to_out", 0, "bias")
    assert not accepts((*default, "mid", "up"), "down_blocks", 0, "attn_temp", "to_q", "kernel")
    assert accepts(("attn1",), "up_blocks", 0, "attn1", "to_v", "kernel")


def test_a_suffix_without_a_layer_is_refused():
    """It would train nothing for all steps."""
    unet = network()
    check_trainable(unet, config.TRAINABLE)
    check_trainable(unet, ("attn1", "mid"))
    with pytest.raises(InputError, match=r"trainable 'attn1\.toq' is not the end of any layer's name; .*attn1\.to_q"):
        check_trainable(unet, ("attn1.toq", "attn_temp"))
    with pytest.raises(InputError, match=r"trainable \('down',\) names no layer"):
        check_trainable(unet, ("down",))

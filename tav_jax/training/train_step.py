"""One-shot tuning: the trainable subset, the loss, the optimizer and the jitted training step.

Only trained weights have gradients, optimizer state and a float32 copy. Frozen weights are inputs of the step.
"""

import difflib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from tav_jax.config import TRAINABLE, UNET_PARTS
from tav_jax.diffusion.schedule import Prediction, add_noise, training_target
from tav_jax.diffusion.windows import input_frames, input_mask
from tav_jax.distributed.sharding import constrain_fsdp
from tav_jax.errors import InputError, join_names
from tav_jax.models import Conditioning, UNet
from tav_jax.models.arguments import FlatTree, Static, merge


def trainable_filter(names: Sequence[str] = TRAINABLE) -> Callable[..., bool]:
    """A filter for `nnx.split` that selects the weights of modules whose path ends in one of `names`. If down, mid or
    up are among the names, only weights in these parts of the UNet are selected.

    `attn_temp` is the whole layer with the bias of its output, but not `norm_temp`. By default the official code trains
    only mid and up, because with its gradient checkpointing the down blocks have no gradient.
    """
    suffixes = tuple(f".{name}" for name in names if name not in UNET_PARTS)
    parts = [name for name in names if name in UNET_PARTS] or UNET_PARTS
    roots = {"mid_block" if part == "mid" else f"{part}_blocks" for part in parts}

    def is_trainable(path, _value) -> bool:
        keys = [str(key) for key in path]
        modules = ["." + ".".join(keys[:end]) for end in range(1, len(keys))]
        return keys[0] in roots and any(module.endswith(suffixes) for module in modules)

    return is_trainable


def check_trainable(unet: UNet, names: Sequence[str]) -> None:
    """Refuse names that select no layer, which would train nothing, or weights that were rounded when loaded."""
    suffixes = [name for name in names if name not in UNET_PARTS]
    if not suffixes:
        raise InputError(f"trainable {tuple(names)!r} names no layer; give suffixes of names such as {TRAINABLE}")
    paths = [tuple(map(str, path)) for path, _ in nnx.iter_modules(unet)]
    ends = {".".join(path[start:]) for path in paths for start in range(len(path))}
    if unknown := [name for name in suffixes if name not in ends]:
        known = join_names(difflib.get_close_matches(unknown[0], sorted(ends), cutoff=0.5) or TRAINABLE)
        raise InputError(f"trainable {unknown[0]!r} is not the end of any layer's name; use one such as {known}")
    selected = [leaf.get_value().dtype for _, leaf in nnx.to_flat_state(nnx.state(unet, trainable_filter(names)))]
    if rounded := [str(dtype) for dtype in selected if dtype != jnp.float32]:
        raise InputError(
            f"trainable {tuple(names)!r} selects weights that were loaded in {rounded[0]}; give the same trainable to "
            "from_pretrained, which then loads them in float32"
        )


class Hyperparameters(NamedTuple):
    """Arguments of the jitted step, which other values do not recompile."""

    learning_rate: float | Float[Array, ""] = 3e-5
    weight_decay: float | Float[Array, ""] = 1e-2
    max_grad_norm: float | Float[Array, ""] = 1.0


def optimizer(hyper: Hyperparameters) -> optax.GradientTransformation:
    return optax.adamw(hyper.learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=hyper.weight_decay)


def clip_by_global_norm(grads: Any, limit: float | Float[Array, ""]) -> tuple[Any, Float[Array, ""]]:
    """torch's `clip_grad_norm_`, with its 1e-6. Also returns the norm before clipping."""
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale, grads), norm


class TrainState(NamedTuple):
    params: nnx.State  # the trained weights, float32
    opt_state: Any

    @classmethod
    def create(cls, params: nnx.State) -> "TrainState":
        # Copied even if the dtype is float32 already, because steps donate these buffers.
        params = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)
        return cls(params, optimizer(Hyperparameters()).init(params))


class TrainExample(NamedTuple):
    latents: Float[Array, "B F h w c"]
    noise: Float[Array, "B F h w c"]  # independent for each frame
    timestep: Int[Array, ""]  # one for the whole clip


def sample_example(
    key: Key[Array, ""], mean: Float[Array, "B F h w c"], std: Float[Array, "B F h w c"], train_timesteps: int
) -> TrainExample:
    """Sample the clip's scaled posterior, the noise and the timestep."""
    latents_key, noise_key, timestep_key = jax.random.split(key, 3)
    return TrainExample(
        mean + std * jax.random.normal(latents_key, mean.shape),
        jax.random.normal(noise_key, mean.shape),
        jax.random.randint(timestep_key, (), 0, train_timesteps),
    )


def sample_window(
    key: Key[Array, ""], example: TrainExample, conditioning: Conditioning, frames: int
) -> tuple[TrainExample, Conditioning]:
    """A random window of the clip, as the input that it is when it is sampled (`diffusion/windows.py`)."""
    clip_frames = example.latents.shape[1]
    if not 0 < frames < clip_frames:
        return example, conditioning
    start = jax.random.randint(key, (), 0, clip_frames - frames + 1)
    chosen = input_frames(start, frames)
    window = TrainExample(example.latents[:, chosen], example.noise[:, chosen], example.timestep)
    return window, conditioning._replace(frame_mask=input_mask(frames))


def diffusion_loss(
    unet: UNet,
    example: TrainExample,
    conditioning: Conditioning,
    alphas_cumprod: Float[Array, "train_timesteps"],
    prediction: Prediction,
    *,
    remat: str | bool,
) -> Float[Array, ""]:
    """Mean squared error of the predicted noise or velocity, in float32, over the frames of the frame mask."""
    alpha = alphas_cumprod[example.timestep]
    noisy = add_noise(example.latents, example.noise, alpha)
    timesteps = jnp.broadcast_to(example.timestep, noisy.shape[:1])
    predicted = unet(noisy, timesteps, conditioning, remat=remat).astype(jnp.float32)
    squared = (predicted - training_target(example.latents, example.noise, alpha, prediction)) ** 2
    mask = conditioning.frame_mask
    return jnp.mean(squared, where=None if mask is None else mask[:, None, None, None])


class StepMetrics(NamedTuple):
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]  # before clipping


def train_step(
    graph: nnx.GraphDef | Static,
    state: TrainState,
    frozen: nnx.State | FlatTree,
    example: TrainExample,
    conditioning: Conditioning,
    alphas_cumprod: Float[Array, "train_timesteps"],
    hyper: Hyperparameters,
    *,
    prediction: Prediction,
    remat: str | bool = "block",
    fsdp: bool = False,
) -> tuple[TrainState, StepMetrics]:
    """Gradient, clipping by the global norm, AdamW. `graph` and the options are static. With `fsdp` the new state is
    sharded over all devices, like the old one."""

    def loss(params):
        unet = merge(graph, params, frozen)
        return diffusion_loss(unet, example, conditioning, alphas_cumprod, prediction, remat=remat)

    value, grads = jax.value_and_grad(loss)(state.params)
    grads, norm = clip_by_global_norm(grads, hyper.max_grad_norm)
    updates, opt_state = optimizer(hyper).update(grads, state.opt_state, state.params)
    state = TrainState(jax.tree.map(jnp.add, state.params, updates), opt_state)
    return constrain_fsdp(state) if fsdp else state, StepMetrics(value, norm)


STATIC = ("graph", "prediction", "remat", "fsdp")
replay_step = jax.jit(train_step, static_argnames=STATIC, donate_argnames=("state",))


@jax.jit(static_argnames=(*STATIC, "window"), donate_argnames=("state",))
def tune_step(
    graph,
    state,
    frozen,
    key,
    step,
    mean,
    std,
    conditioning,
    alphas_cumprod,
    hyper,
    *,
    prediction,
    remat,
    fsdp,
    window=0,
) -> tuple[TrainState, StepMetrics]:
    """One training step. Its randomness is `fold_in(key, step)`, so that a run can continue at any step. `window`: the
    number of frames of a random window to train on; 0: the whole clip."""
    key = jax.random.fold_in(key, step)
    example = sample_example(key, mean, std, alphas_cumprod.shape[0])
    example, conditioning = sample_window(jax.random.split(key, 4)[3], example, conditioning, window)
    options = {"prediction": prediction, "remat": remat, "fsdp": fsdp}
    return train_step(graph, state, frozen, example, conditioning, alphas_cumprod, hyper, **options)


class Posterior(NamedTuple):
    """The scaled posterior of the clip's latents."""

    mean: Float[Array, "1 F h w c"]
    std: Float[Array, "1 F h w c"]


class Replay(NamedTuple):
    """Given examples in place of sampled ones: latents for all steps, a timestep and noise for each step."""

    latents: Float[Array, "1 F h w c"]
    timesteps: Int[Array, "N"]
    noise: Float[Array, "N F h w c"]


class Progress(NamedTuple):
    done: int  # the number of steps, counted from the beginning of the run
    state: TrainState
    metrics: list[tuple[int, StepMetrics]]  # of the steps, counted from 1, whose metrics have been fetched since
    complete: bool  # whether the metrics of all steps have been fetched


def run_steps(
    step_fn: Callable[[TrainState, int], tuple[TrainState, StepMetrics]],
    state: TrainState,
    first: int,
    last: int,
    *,
    lag: int = 2,
    fetch_all: Callable[[int], bool] = lambda done: False,
) -> Iterator[Progress]:
    """Run the steps `first` to `last` − 1.

    Metrics are fetched after `lag` more steps have been dispatched, so that logging does not stall the device. After
    the last step, and where `fetch_all(done)` is true, all of them are fetched, so that they can be checked before the
    state is saved. A yielded state is valid until the next step, which donates its buffers.
    """
    pending: deque[tuple[int, StepMetrics]] = deque()
    for done in range(first + 1, last + 1):
        state, metrics = step_fn(state, done - 1)
        pending.append((done, metrics))
        complete = done == last or fetch_all(done)
        fetched = [pending.popleft() for _ in range(len(pending) if complete else len(pending) - lag)]
        yield Progress(done, state, jax.device_get(fetched), complete)

"""One-shot tuning: which weights learn, the loss, the optimizer, one step, the loop.

Only the trained weights have gradients, Adam moments and a float32 copy. Frozen weights are plain inputs.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from tav_jax.diffusion.schedule import Prediction, add_noise, target
from tav_jax.errors import InputError
from tav_jax.models.unet import UNet
from tav_jax.sharding import pin_parts

TRAINABLE = ("attn1.to_q", "attn2.to_q", "attn_temp")
PLACES = ("down", "mid", "up")

Grads = TypeVar("Grads")


def subset(words: Sequence[str]) -> Callable[..., bool]:
    """The filter for a list of suffixes of names; with any of down, mid, up in it, only in these parts of the UNet."""
    names = tuple(word for word in words if word not in PLACES)
    return is_trainable(names, tuple(word for word in words if word in PLACES) or PLACES)


def is_trainable(names: tuple[str, ...] = TRAINABLE, places: tuple[str, ...] = PLACES):
    """A filter for `nnx.split`: weights of modules whose path ends in one of `names`, in these parts of the UNet.

    `attn_temp` is the whole layer, its output's bias included, but not `norm_temp`. The official code's default run
    trains `places=("mid", "up")` only: its gradient checkpointing cuts the down blocks off.
    """
    if unknown := [p for p in places if p not in PLACES]:
        raise InputError(f"trainable place {unknown[0]!r} is not one of {', '.join(PLACES)}")

    def accept(path, _value) -> bool:
        parts = [str(part) for part in path]
        modules = [".".join(parts[:end]) for end in range(1, len(parts))]
        return parts[0] in {f"{p}_blocks" if p != "mid" else "mid_block" for p in places} and any(
            ("." + module).endswith("." + name) for module in modules for name in names
        )

    return accept


class Hyper(NamedTuple):
    """What may change from step to step without a new compilation."""

    learning_rate: float | Float[Array, ""] = 3e-5
    weight_decay: float | Float[Array, ""] = 1e-2
    max_grad_norm: float | Float[Array, ""] = 1.0


def optimizer(hyper: Hyper) -> optax.GradientTransformation:
    return optax.adamw(hyper.learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=hyper.weight_decay)


def clip_by_norm(grads: Grads, limit: float | Float[Array, ""]) -> tuple[Grads, Float[Array, ""]]:
    """torch's clip_grad_norm_, its 1e-6 included. Gives the norm before clipping, too."""
    norm = optax.tree.norm(grads)
    shrink = jnp.minimum(1.0, limit / (norm + 1e-6))
    return jax.tree.map(lambda g: g * shrink, grads), norm


class Learner(NamedTuple):
    """What a step changes."""

    trained: nnx.State
    moments: Any  # optax's state

    @classmethod
    def create(cls, trained: nnx.State) -> "Learner":
        # A copy even where the type is float32 already: steps donate their buffers.
        masters = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trained)
        return cls(masters, optimizer(Hyper()).init(masters))


class Example(NamedTuple):
    """One training example: the clip's latents, the noise added to all of its frames, and how much of it."""

    latents: Float[Array, "B F h w c"]
    noise: Float[Array, "B F h w c"]
    timestep: Int[Array, ""]


def draw(
    key: Key[Array, ""], mean: Float[Array, "B F h w c"], std: Float[Array, "B F h w c"], train_steps: int
) -> Example:
    """A fresh sample of the clip's (scaled) posterior, noise, and one timestep for the whole clip."""
    for_latents, for_noise, for_time = jax.random.split(key, 3)
    return Example(
        mean + std * jax.random.normal(for_latents, mean.shape),
        jax.random.normal(for_noise, mean.shape),
        jax.random.randint(for_time, (), 0, train_steps),
    )


def loss_of(
    unet: UNet,
    example: Example,
    text: Float[Array, "B L e"],
    levels: Float[Array, "train_steps"],
    prediction: Prediction,
    *,
    remat: str | bool,
) -> Float[Array, ""]:
    """Mean squared error, in float32, of the predicted noise or velocity."""
    level = levels[example.timestep]
    noisy = add_noise(example.latents, example.noise, level)
    t = jnp.broadcast_to(example.timestep, noisy.shape[:1])
    predicted = unet(noisy, t, text, remat=remat).astype(jnp.float32)
    return jnp.mean((predicted - target(example.latents, example.noise, level, prediction)) ** 2)


class Report(NamedTuple):
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]  # before clipping


def train_step(
    graph: nnx.GraphDef,
    learner: Learner,
    frozen: nnx.State,
    example: Example,
    text: Float[Array, "B L e"],
    levels: Float[Array, "train_steps"],
    hyper: Hyper,
    *,
    prediction: Prediction,
    remat: str | bool = "block",
    fsdp: bool = False,
) -> tuple[Learner, Report]:
    """Gradient, clipping by the global norm, AdamW. Pure; jit it with `graph` and what follows `hyper` static.

    With `fsdp` the learner's arrays lie in parts over the mesh's devices, and stay so.
    """

    def loss(trained):
        unet = nnx.merge(graph, trained, frozen)
        return loss_of(unet, example, text, levels, prediction, remat=remat)

    value, grads = jax.value_and_grad(loss)(learner.trained)
    grads, norm = clip_by_norm(grads, hyper.max_grad_norm)
    updates, moments = optimizer(hyper).update(grads, learner.moments, learner.trained)
    after = Learner(jax.tree.map(jnp.add, learner.trained, updates), moments)
    return pin_parts(after) if fsdp else after, Report(value, norm)


STATIC = ("graph", "prediction", "remat", "fsdp")
replay_step = jax.jit(train_step, static_argnames=STATIC, donate_argnames=("learner",))


@jax.jit(static_argnames=STATIC, donate_argnames=("learner",))
def tune_step(
    graph, learner, frozen, key, step, mean, std, text, levels, hyper, *, prediction, remat="block", fsdp=False
) -> tuple[Learner, Report]:
    """Step number `step` of a run: its randomness depends on the key and the number alone, so a run can be resumed."""
    example = draw(jax.random.fold_in(key, step), mean, std, levels.shape[0])
    options = {"prediction": prediction, "remat": remat, "fsdp": fsdp}
    return train_step(graph, learner, frozen, example, text, levels, hyper, **options)


class Progress(NamedTuple):
    """After a step: what has been learned so far, and the reports that have come in since the last time."""

    done: int
    learner: Learner
    reports: list[tuple[int, Report]]
    settled: bool  # all reports up to this step have come in


def loop(
    advance: Callable[[Learner, int], tuple[Learner, Report]],
    learner: Learner,
    first: int,
    last: int,
    *,
    lag: int = 2,
    settle: Callable[[int], bool] = lambda done: False,
) -> Iterator[Progress]:
    """Steps `first` to `last` − 1. A step's report is read when `lag` more are under way, so that no log line stalls
    the device; with the last step, and with those that `settle` names, all that are left come: what is kept must have
    been looked at.

    A yielded learner is good until the next step is asked for, which takes its buffers.
    """
    waiting: deque[tuple[int, Report]] = deque()
    for step in range(first, last):
        learner, report = advance(learner, step)
        waiting.append((step + 1, report))
        ready, settled = [], step == last - 1 or settle(step + 1)
        while waiting and (settled or len(waiting) > lag):
            number, oldest = waiting.popleft()
            ready.append((number, jax.device_get(oldest)))
        yield Progress(step + 1, learner, ready, settled)

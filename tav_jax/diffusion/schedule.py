"""The noise schedule and one deterministic DDIM step, in either direction.

With ᾱ the cumulated product of 1 − β, a latent at level ᾱ is `x = √ᾱ·x0 + √(1−ᾱ)·ε`. A network predicts ε, or the
velocity `v = √ᾱ·ε − √(1−ᾱ)·x0`. One DDIM step reads x0 and ε off a prediction at one level and composes them again at
another; sampling goes up in ᾱ, inversion goes down, and both are the same function.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tav_jax.errors import InputError, WeightsError, brief

Prediction = Literal["epsilon", "v_prediction"]
Values = Array | np.ndarray
MOST_STEPS = 100_000  # of training; 1000 is usual
Level = Float[Values, ""] | np.floating | float


class Ladder(NamedTuple):
    """The steps of one walk. Row i: ask the network at `timesteps[i]`, go from level `start[i]` to level `end[i]`."""

    timesteps: Int[np.ndarray, "steps"]
    start: Float[np.ndarray, "steps"]
    end: Float[np.ndarray, "steps"]

    def part(self, first: int, last: int) -> "Ladder":
        """The rows from one to before another."""
        return Ladder(*(column[first:last] for column in self))


def _betas(schedule: str, first: float, last: float, count: int) -> np.ndarray:
    """float32, with torch's rounding: the tables are Diffusers' to the last bit."""
    if schedule == "linear":
        return _linspace(first, last, count)
    if schedule == "scaled_linear":
        return _linspace(math.sqrt(first), math.sqrt(last), count) ** 2
    if schedule == "squaredcos_cap_v2":

        def level(u):
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        return np.array([min(1 - level((i + 1) / count) / level(i / count), 0.999) for i in range(count)], np.float32)
    raise WeightsError(
        f"the scheduler's beta_schedule is {brief(schedule)}; known are 'scaled_linear' (Stable Diffusion's), 'linear' "
        "and 'squaredcos_cap_v2'. Mend scheduler/scheduler_config.json."
    )


def _linspace(first: float, last: float, count: int) -> np.ndarray:
    """torch.linspace in float32: counted from the nearer end, each value rounded once (a fused multiply-add)."""
    begin, end = np.float32(first), np.float32(last)
    step = np.float64((end - begin) / np.float32(max(count - 1, 1)))
    i = np.arange(count)
    up, down = np.float64(begin) + step * i, np.float64(end) - step * (count - 1 - i)
    return np.where(i < count // 2, up, down).astype(np.float32)


def _number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1


def _setting(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name, default)
    if isinstance(default, int):
        if type(value) is not int or not 2 <= value <= MOST_STEPS:
            raise _unusable(name, value, f"a whole number from 2 to {MOST_STEPS}")
    elif not _number(value):
        raise _unusable(name, value, "a number between 0 and 1")
    return value


def _unusable(name: str, value: Any, expected: str) -> WeightsError:
    return WeightsError(
        f"the scheduler's {name} is {brief(value)}, expected {expected}. Mend scheduler/scheduler_config.json."
    )


@dataclass(frozen=True, eq=False)
class Schedule:
    """A pipeline's noise schedule, read as DDIM: no clipping of x0, steps offset by one, η = 0."""

    levels: Float[np.ndarray, "train_steps"]  # ᾱ for each training timestep
    final: float  # ᾱ beyond the first timestep
    prediction: Prediction

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
        """From a Diffusers scheduler config of any class: only its noise and its prediction type are taken."""
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise WeightsError(
                f"the scheduler's prediction_type is {brief(prediction)}; only 'epsilon' and 'v_prediction' can be "
                "tuned and inverted. Mend scheduler/scheduler_config.json if the weights predict one of these."
            )
        if config.get("rescale_betas_zero_snr"):
            raise WeightsError(
                "the scheduler's rescale_betas_zero_snr is true: its last level holds no signal and cannot be "
                "inverted. Set it to false in scheduler_config.json, or use a pipeline with the usual schedule."
            )
        trained = config.get("trained_betas")
        if trained is not None:
            if not isinstance(trained, list) or not 2 <= len(trained) <= MOST_STEPS or not all(map(_number, trained)):
                raise _unusable("trained_betas", trained, f"a list of 2 to {MOST_STEPS} numbers between 0 and 1")
            betas = np.asarray(trained, np.float32)
        else:
            betas = _betas(
                str(config.get("beta_schedule", "linear")),
                _setting(config, "beta_start", 0.0001),
                _setting(config, "beta_end", 0.02),
                _setting(config, "num_train_timesteps", 1000),
            )
        # torch multiplies up in float64 and rounds each product once.
        levels = np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)
        if not 0 < levels.min() <= levels.max() < 1:
            raise WeightsError(
                "the scheduler's betas leave a level without any signal, or without any noise, which cannot be "
                "inverted. Mend scheduler/scheduler_config.json."
            )
        return cls(levels, 1.0 if config.get("set_alpha_to_one", True) else float(levels[0]), prediction)

    @property
    def train_steps(self) -> int:
        return len(self.levels)

    def _rungs(self, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Timesteps from 1 upwards, the level at each, and the level one step below it."""
        limit = self.train_steps - 1
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= limit:
            raise InputError(f"steps is {steps!r}; it must be a whole number from 1 to {limit}, 50 is usual")
        stride = self.train_steps // int(steps)
        t = stride * np.arange(steps) + 1
        # JAX would wrap a negative index silently; in numpy, here, the case is spelled out.
        below = np.where(t - stride < 0, np.float32(self.final), self.levels[np.maximum(t - stride, 0)])
        return t.astype(np.int32), self.levels[t], below.astype(np.float32)

    def sampling(self, steps: int) -> Ladder:
        """From noise to picture: for 50 steps the timesteps 981, 961, … 1."""
        t, level, below = self._rungs(steps)
        return Ladder(t[::-1].copy(), level[::-1].copy(), below[::-1].copy())

    def inversion(self, steps: int) -> Ladder:
        """From picture to noise: for 50 steps the timesteps 1, 21, … 981."""
        t, level, below = self._rungs(steps)
        return Ladder(t, below, level)


def add_noise(x0: Float[Values, "*s"], noise: Float[Values, "*s"], level: Level) -> Float[Array, "*s"]:
    return jnp.sqrt(level) * x0 + jnp.sqrt(1 - level) * noise


def velocity(x0: Float[Values, "*s"], noise: Float[Values, "*s"], level: Level) -> Float[Array, "*s"]:
    return jnp.sqrt(level) * noise - jnp.sqrt(1 - level) * x0


def move(
    x: Float[Values, "*s"],
    predicted: Float[Values, "*s"],
    start: Level,
    end: Level,
    prediction: Prediction,
) -> Float[Array, "*s"]:
    """One DDIM step: x at level `start` to level `end`, along the predicted noise or velocity."""
    signal, noise = jnp.sqrt(start), jnp.sqrt(1 - start)
    if prediction == "epsilon":
        eps = predicted
        x0 = (x - noise * eps) / signal
    else:
        x0 = signal * x - noise * predicted
        eps = signal * predicted + noise * x
    return jnp.sqrt(end) * x0 + jnp.sqrt(1 - end) * eps


def target(
    x0: Float[Values, "*s"], noise: Float[Values, "*s"], level: Level, prediction: Prediction
) -> Float[Values, "*s"]:
    """What the network should answer for `add_noise(x0, noise, level)`."""
    return noise if prediction == "epsilon" else velocity(x0, noise, level)

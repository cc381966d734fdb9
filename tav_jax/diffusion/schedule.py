"""The noise schedule, and one deterministic DDIM step in either direction.

With ᾱ = `alphas_cumprod`, the cumulative product of 1 − β, noisy latents are `x = √ᾱ·x0 + √(1−ᾱ)·ε`. A network predicts
ε, or the velocity `v = √ᾱ·ε − √(1−ᾱ)·x0`. A DDIM step computes x0 and ε from the prediction at one ᾱ and combines them
at another. Sampling goes to a larger ᾱ, inversion to a smaller one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tav_jax.errors import InputError, WeightsError, short_repr

Prediction = Literal["epsilon", "v_prediction"]
Values = Array | np.ndarray
Alpha = Float[Values, ""] | np.floating | float
MAX_TRAIN_TIMESTEPS = 100_000  # 1000 is usual


class Steps(NamedTuple):
    """The steps of a sampling or inversion loop, one array for each quantity; inside the loop, the values of one step.

    In step i the network is called at `timestep[i]`, and the latents go from `alpha[i]` to `next_alpha[i]`, both values
    of ᾱ. `step` and `remaining` count the steps before and after it, for samplers whose first or last step differs.
    `controls` is what else differs from step to step, a pytree of arrays of N values.
    """

    timestep: Int[Values, "*N"]
    alpha: Float[Values, "*N"]
    next_alpha: Float[Values, "*N"]
    step: Int[Values, "*N"]
    remaining: Int[Values, "*N"]
    controls: Any = None

    @classmethod
    def of(cls, timestep: Values, alpha: Values, next_alpha: Values, controls: Any = None) -> "Steps":
        step = np.arange(len(timestep), dtype=np.int32)
        return cls(timestep, alpha, next_alpha, step, step[::-1].copy(), controls)

    def slice(self, begin: int, end: int) -> "Steps":
        """A chunk of this loop, with its values of `step` and `remaining`."""
        return jax.tree.map(lambda values: values[begin:end], self)

    def restart(self, begin: int, end: int) -> "Steps":
        """A part of this loop as a loop of its own: `step` counts from 0."""
        part = self.slice(begin, end)
        return Steps.of(part.timestep, part.alpha, part.next_alpha, part.controls)


def _betas(schedule: str, first: float, last: float, count: int) -> np.ndarray:
    """β of every timestep, in float32 with torch's rounding, so that they equal Diffusers' bit for bit."""
    if schedule == "linear":
        return _linspace(first, last, count)
    if schedule == "scaled_linear":
        return _linspace(math.sqrt(first), math.sqrt(last), count) ** 2
    if schedule == "squaredcos_cap_v2":

        def alpha(u):
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        return np.array([min(1 - alpha((i + 1) / count) / alpha(i / count), 0.999) for i in range(count)], np.float32)
    names = "'scaled_linear' (Stable Diffusion's), 'linear' or 'squaredcos_cap_v2'"
    raise _bad_setting("beta_schedule", schedule, names)


def _linspace(first: float, last: float, count: int) -> np.ndarray:
    """torch.linspace in float32: computed from the nearer end, each value rounded once (a fused multiply-add)."""
    begin, end = np.float32(first), np.float32(last)
    step = np.float64((end - begin) / np.float32(max(count - 1, 1)))
    i = np.arange(count)
    up, down = np.float64(begin) + step * i, np.float64(end) - step * (count - 1 - i)
    return np.where(i < count // 2, up, down).astype(np.float32)


def _is_fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1


def _setting(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name, default)
    if isinstance(default, int):
        if type(value) is not int or not 2 <= value <= MAX_TRAIN_TIMESTEPS:
            raise _bad_setting(name, value, f"a whole number from 2 to {MAX_TRAIN_TIMESTEPS}")
    elif not _is_fraction(value):
        raise _bad_setting(name, value, "a number between 0 and 1")
    return value


def _bad_setting(name: str, value: Any, expected: str) -> WeightsError:
    problem = f"the scheduler's {name} is {short_repr(value)}, expected {expected}"
    return WeightsError(f"{problem}. Fix scheduler/scheduler_config.json.")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """A pipeline's noise schedule, used as DDIM's: x0 is not clipped, timesteps are offset by one, η = 0."""

    alphas_cumprod: Float[np.ndarray, "train_timesteps"]
    final_alpha_cumprod: float  # ᾱ after the last sampling step
    prediction: Prediction

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Use the betas and the prediction type of a Diffusers scheduler config of any class."""
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise WeightsError(
                f"the scheduler's prediction_type is {short_repr(prediction)}; only 'epsilon' and 'v_prediction' can "
                "be tuned and inverted. Fix scheduler/scheduler_config.json if the weights predict one of these."
            )
        if config.get("rescale_betas_zero_snr"):
            raise WeightsError(
                "the scheduler's rescale_betas_zero_snr is true: its last timestep has no signal and cannot be "
                "inverted. Set it to false in scheduler_config.json, or use a pipeline with the usual schedule."
            )
        trained = config.get("trained_betas")
        if trained is not None:
            valid = isinstance(trained, list) and 2 <= len(trained) <= MAX_TRAIN_TIMESTEPS
            if not valid or not all(map(_is_fraction, trained)):
                expected = f"a list of 2 to {MAX_TRAIN_TIMESTEPS} numbers between 0 and 1"
                raise _bad_setting("trained_betas", trained, expected)
            betas = np.asarray(trained, np.float32)
        else:
            betas = _betas(
                str(config.get("beta_schedule", "linear")),
                _setting(config, "beta_start", 0.0001),
                _setting(config, "beta_end", 0.02),
                _setting(config, "num_train_timesteps", 1000),
            )
        # torch accumulates in float64 and rounds each product once.
        alphas = np.cumprod(np.float32(1) - betas, dtype=np.float64).astype(np.float32)
        if not 0 < alphas.min() <= alphas.max() < 1:
            raise WeightsError(
                "the scheduler's betas have a timestep without any signal, or without any noise, which cannot be "
                "inverted. Fix scheduler/scheduler_config.json."
            )
        return cls(alphas, 1.0 if config.get("set_alpha_to_one", True) else float(alphas[0]), prediction)

    @property
    def train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def _ddim_timesteps(self, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ascending timesteps from 1, ᾱ at each of them, and ᾱ one step below."""
        limit = self.train_timesteps - 1
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= limit:
            raise InputError(f"steps is {steps!r}; it must be a whole number from 1 to {limit}, 50 is usual")
        stride = self.train_timesteps // int(steps)
        t = stride * np.arange(steps) + 1
        first, rest = np.float32(self.final_alpha_cumprod), self.alphas_cumprod[np.maximum(t - stride, 0)]
        return t.astype(np.int32), self.alphas_cumprod[t], np.where(t < stride, first, rest).astype(np.float32)

    def inversion_steps(self, steps: int) -> Steps:
        """From the clip to noise: for 50 steps the timesteps 1, 21, … 981."""
        t, alpha, below = self._ddim_timesteps(steps)
        return Steps.of(t, below, alpha)

    def sampling_steps(self, steps: int, inversion_steps: int | None = None) -> Steps:
        """From noise to the clip: for 50 steps the timesteps 981, 961, … 1.

        Latents that were inverted in more steps (`inversion_steps`) are at the last timestep of the inversion. Sampling
        then uses a subset of its timesteps, N of M: those with the indices `round(linspace(0, M, N + 1))[1:] − 1`.
        """
        if inversion_steps is None or inversion_steps == steps:
            t, alpha, below = self._ddim_timesteps(steps)
        else:
            t, alpha, _ = self._ddim_timesteps(inversion_steps)
            self._ddim_timesteps(steps)  # checks steps
            if steps > inversion_steps:
                raise InputError(
                    f"steps is {steps} and the latents were inverted in {inversion_steps} steps; sample with at most "
                    f"{inversion_steps}, or invert with {steps} (inversion_steps)"
                )
            chosen = np.round(np.linspace(0, inversion_steps, steps + 1)).astype(int)[1:] - 1
            t, alpha = t[chosen], alpha[chosen]
            below = np.concatenate([[np.float32(self.final_alpha_cumprod)], alpha[:-1]]).astype(np.float32)
        return Steps.of(t[::-1].copy(), alpha[::-1].copy(), below[::-1].copy())

    def trajectory_indices(self, steps: int, inversion_steps: int) -> Int[np.ndarray, "K"]:
        """Where, in a trajectory of the inversion, the latents before the first sampling step and after each step are.
        A trajectory has the clip's own latents first."""
        timesteps = self.sampling_steps(steps, inversion_steps).timestep[::-1]
        after = np.searchsorted(self._ddim_timesteps(inversion_steps)[0], timesteps) + 1
        return np.concatenate([[0], after])[::-1].copy()


def prompted_steps(steps: int, strength: float) -> int:
    """How many of the sampling steps, the last ones, use the prompt."""
    return max(1, round(strength * steps))


def add_noise(x0: Float[Values, "*s"], noise: Float[Values, "*s"], alpha: Alpha) -> Float[Array, "*s"]:
    """`√ᾱ·x0 + √(1−ᾱ)·ε`"""
    return jnp.sqrt(alpha) * x0 + jnp.sqrt(1 - alpha) * noise


def velocity(x0: Float[Values, "*s"], noise: Float[Values, "*s"], alpha: Alpha) -> Float[Array, "*s"]:
    """`√ᾱ·ε − √(1−ᾱ)·x0`"""
    return jnp.sqrt(alpha) * noise - jnp.sqrt(1 - alpha) * x0


def training_target(
    x0: Float[Values, "*s"], noise: Float[Values, "*s"], alpha: Alpha, prediction: Prediction
) -> Float[Values, "*s"]:
    """What the network should predict for `add_noise(x0, noise, alpha)`."""
    return noise if prediction == "epsilon" else velocity(x0, noise, alpha)


def predicted_x0_and_noise(
    x: Float[Values, "*s"], model_output: Float[Values, "*s"], alpha: Alpha, prediction: Prediction
) -> tuple[Float[Values, "*s"], Float[Values, "*s"]]:
    """x0 and ε of noisy latents x at ᾱ = alpha, from the network's prediction."""
    signal, noise = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
    if prediction == "epsilon":
        return (x - noise * model_output) / signal, model_output
    return signal * x - noise * model_output, signal * model_output + noise * x


def ddim_step(
    x: Float[Values, "*s"], model_output: Float[Values, "*s"], alpha: Alpha, next_alpha: Alpha, prediction: Prediction
) -> Float[Array, "*s"]:
    """`√ᾱ'·x0 + √(1−ᾱ')·ε`: from x at ᾱ = alpha to ᾱ' = next_alpha."""
    x0, eps = predicted_x0_and_noise(x, model_output, alpha, prediction)
    return jnp.sqrt(next_alpha) * x0 + jnp.sqrt(1 - next_alpha) * eps


def ddim_start(
    z: Float[Values, "*s"], model_output: Float[Values, "*s"], alpha: Alpha, next_alpha: Alpha, prediction: Prediction
) -> Float[Array, "*s"]:
    """The x for which `ddim_step(x, model_output, alpha, next_alpha)` is z; the step is linear in both arrays."""
    one, zero = jnp.float32(1), jnp.float32(0)
    from_x = ddim_step(one, zero, alpha, next_alpha, prediction)
    from_output = ddim_step(zero, one, alpha, next_alpha, prediction)
    return (jnp.asarray(z) - from_output * model_output) / from_x

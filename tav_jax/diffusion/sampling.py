"""The loop: one `lax.scan` over a ladder of DDIM steps, for sampling and inversion alike."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tav_jax.diffusion.schedule import Ladder, Prediction, move

Denoiser = Callable[[Float[Array, "B F h w c"], Int[Array, ""]], Float[Array, "B F h w c"]]


def guided(denoise: Denoiser, guidance: Float[Array, ""]) -> Denoiser:
    """Classifier-free guidance: `denoise` sees the latents twice, its text is [unconditional; conditional]."""

    def both(x, t):
        without, with_text = jnp.split(denoise(jnp.concatenate([x, x]), t), 2)
        return without + guidance * (with_text - without)

    return both


def walk(
    denoise: Denoiser,
    latents: Float[Array, "B F h w c"],
    ladder: Ladder,
    prediction: Prediction,
    *,
    trajectory: bool = False,
) -> tuple[Float[Array, "B F h w c"], Float[Array, "steps B F h w c"] | None]:
    """Take every step of the ladder. Returns the last latents and, if asked for, those after each step."""

    def step(x, row):
        t, start, end = row
        x = move(x, denoise(x, t), start, end, prediction)
        return x, x if trajectory else None

    rows = tuple(jnp.asarray(column) for column in ladder)
    return jax.lax.scan(step, latents.astype(jnp.float32), rows)

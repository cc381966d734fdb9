"""The compiled programs: one compilation for each shape, whatever the values.

Modules are pytrees, so a network goes in as an argument and its weights are never baked into a program. What changes
from call to call (text, guidance, tables, timesteps) is an array.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tav_jax import sharding
from tav_jax.diffusion import Ladder, guided, walk
from tav_jax.models import VAE, ClipText, UNet
from tav_jax.sharding import CLIP, EVERYWHERE, ROWS, pin

PIXELS_AT_ONCE = 4 * 512 * 512  # the VAE takes frames in groups of about this size, so that it is never the peak


@contextlib.contextmanager
def running(dtype: Any, mesh: Mesh | None) -> Iterator[None]:
    """What programs run under: the mesh, and full float32 products where float32 was asked for (accelerators take
    fewer bits unless told)."""
    exact = jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()
    with exact, sharding.on(mesh):
        yield


def group_of(frames: int, height: int, width: int, mesh: Mesh | None) -> int:
    """How many frames the VAE takes at once."""
    devices = mesh.size if mesh else 1
    each = min(-(-frames // devices), max(1, PIXELS_AT_ONCE // (height * width)))
    return each * devices


@jax.jit
def encode_text(text_encoder: ClipText, ids: Any) -> jax.Array:
    """[n, L] → [n, L, D]"""
    return pin(text_encoder(ids).astype(jnp.float32), EVERYWHERE)


@jax.jit(static_argnames=("group",))
def encode_frames(vae: VAE, frames: Any, *, group: int) -> tuple[jax.Array, jax.Array]:
    """uint8 [F, H, W, 3] → mean and standard deviation of the scaled latents [F, h, w, 4], `group` frames at a time."""

    def encode(some):
        return tuple(vae.encode(some.astype(jnp.float32) / 127.5 - 1))

    mean, std = _in_groups(encode, frames, group)
    return mean * vae.config.scaling_factor, std * vae.config.scaling_factor


@jax.jit(static_argnames=("group",))
def decode_frames(vae: VAE, latents: Any, *, group: int) -> jax.Array:
    """Scaled latents [n, F, h, w, 4] → pictures in [0, 1], [n, F, H, W, 3], `group` frames at a time."""

    def decode(some):
        return vae.decode(some / vae.config.scaling_factor).astype(jnp.float32)

    n, f, *_ = latents.shape
    pictures = _in_groups(decode, latents.reshape(n * f, *latents.shape[2:]), group)  # [n·F, H, W, 3]
    return jnp.clip(pictures / 2 + 0.5, 0, 1).reshape(n, f, *pictures.shape[1:])


def _in_groups(function: Callable[[jax.Array], Any], x: jax.Array, group: int) -> Any:
    """`function` of `group` rows at a time; over a mesh each group is shared out. The last one is filled up."""
    count = -(-len(x) // group)
    filled = jnp.pad(x, ((0, count * group - len(x)), *((0, 0),) * (x.ndim - 1)), mode="edge")
    groups = filled.reshape(count, group, *x.shape[1:])
    out = jax.lax.map(lambda some: function(pin(some, ROWS)), groups)
    return jax.tree.map(lambda y: pin(y.reshape(count * group, *y.shape[2:])[: len(x)], EVERYWHERE), out)


@jax.jit
def call_unet(unet: UNet, latents: Any, timesteps: Any, text: Any) -> jax.Array:
    return pin(unet(latents, timesteps, text).astype(jnp.float32), EVERYWHERE)


@jax.jit(static_argnames=("prediction", "use_guidance", "trajectory"))
def walk_latents(
    unet: UNet, latents, text, ladder, guidance, *, prediction, use_guidance: bool, trajectory: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Inversion or sampling. With guidance, `text` is [unconditional; conditional], twice the batch of the latents."""

    def denoise(x, t):
        return unet(pin(x, CLIP), jnp.broadcast_to(t, x.shape[:1]), text).astype(jnp.float32)

    denoiser = guided(denoise, guidance) if use_guidance else denoise
    last, path = walk(denoiser, latents, ladder, prediction, trajectory=trajectory)
    return pin(last, EVERYWHERE), None if path is None else pin(path, EVERYWHERE)


def led(steps: int, strength: float) -> int:
    """How many steps of a sampling the prompt leads."""
    return max(1, round(strength * steps))


def piece_of(steps: int, longest: int = 5) -> int:
    """How many steps of a walk make a piece: a divisor, so that one program walks them all."""
    return max(n for n in range(1, longest + 1) if steps % n == 0)


def in_pieces(ladder: Ladder, size: int) -> Iterator[Ladder]:
    """A ladder cut into parts of a few steps, with a look at the clock in between. A callback from inside the loop
    would do that too, but no program with one can be kept on disk. What is left over is walked step by step."""
    steps = len(ladder.timesteps)
    whole = steps - steps % size
    for first in range(0, whole, size):
        yield ladder.part(first, first + size)
    for first in range(whole, steps):
        yield ladder.part(first, first + 1)

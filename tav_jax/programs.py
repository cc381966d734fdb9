"""The compiled programs: one compilation for each shape, whatever the values.

Modules are pytrees, so a network goes in as an argument and its weights are never baked into a program. What changes
from call to call (text, guidance, tables, timesteps) is an array.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from tav_jax.diffusion import guided, walk
from tav_jax.models import VAE, ClipText, UNet


@jax.jit
def encode_text(text_encoder: ClipText, ids: Any) -> jax.Array:
    """[n, L] → [n, L, D]"""
    return text_encoder(ids).astype(jnp.float32)


@jax.jit(static_argnames=("group",))
def encode_frames(vae: VAE, frames: Any, *, group: int) -> tuple[jax.Array, jax.Array]:
    """uint8 [F, H, W, 3] → mean and standard deviation of the scaled latents [F, h, w, 4], `group` frames at a time."""

    def one(frame):
        posterior = vae.encode((frame.astype(jnp.float32) / 127.5 - 1)[None])
        return posterior.mean[0], posterior.std[0]

    mean, std = jax.lax.map(one, frames, batch_size=group)
    return mean * vae.config.scaling_factor, std * vae.config.scaling_factor


@jax.jit(static_argnames=("group",))
def decode_frames(vae: VAE, latents: Any, *, group: int) -> jax.Array:
    """Scaled latents [n, F, h, w, 4] → pictures in [0, 1], [n, F, H, W, 3], `group` frames at a time."""

    def one(frame):
        return vae.decode(frame[None] / vae.config.scaling_factor)[0].astype(jnp.float32)

    n, f, *_ = latents.shape
    pictures = jax.lax.map(one, latents.reshape(n * f, *latents.shape[2:]), batch_size=group)  # [n·F, H, W, 3]
    return jnp.clip(pictures / 2 + 0.5, 0, 1).reshape(n, f, *pictures.shape[1:])


@jax.jit
def call_unet(unet: UNet, latents: Any, timesteps: Any, text: Any) -> jax.Array:
    return unet(latents, timesteps, text).astype(jnp.float32)


@jax.jit(static_argnames=("prediction", "use_guidance", "trajectory", "report"))
def walk_latents(
    unet: UNet, latents, text, ladder, guidance, *, prediction, use_guidance: bool, trajectory: bool, report
) -> tuple[jax.Array, jax.Array | None]:
    """Inversion or sampling. With guidance, `text` is [unconditional; conditional], twice the batch of the latents."""

    def denoise(x, t):
        return unet(x, jnp.broadcast_to(t, x.shape[:1]), text).astype(jnp.float32)

    denoiser = guided(denoise, guidance) if use_guidance else denoise
    return walk(denoiser, latents, ladder, prediction, trajectory=trajectory, report=report)


class _Reporter:
    """One object for all callbacks, so that a program with progress is compiled once and not once a callback."""

    target: Callable[[int], None] | None = None

    def __call__(self, done: Any) -> None:
        if self.target is not None:
            self.target(int(done))


_reporter = _Reporter()


@contextlib.contextmanager
def reporting(progress: Callable[[int], None] | None) -> Iterator[_Reporter | None]:
    """While inside, walks given the yielded value call `progress` with the number of steps done. None costs nothing."""
    if progress is None:
        yield None
        return
    _reporter.target = progress
    try:
        yield _reporter
        jax.effects_barrier()  # the last reports are on their way when the call returns
    finally:
        _reporter.target = None

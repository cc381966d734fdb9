"""Long clips: overlapping windows of frames, denoised together (as in MultiDiffusion and AnimateDiff).

In each step the network is called on every window, and the predictions are averaged frame by frame. The weights fall
towards both ends of a window, `1, 2, … n/2, n/2, … 1`. Memory is that of one window, whatever the length of the clip.

The input of a window begins with frame 0 of the clip, to which sparse-causal attention attends in every frame. This
frame is masked: temporal attention has no keys of it, group norms leave it out of their statistics, and its prediction
is dropped. In the first window it is a copy, which changes nothing: a single window would give the result of the whole
clip. The first frame of another window attends to frame 0 in place of the frame before it, which is not in the input.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tav_jax.diffusion.network import Network
from tav_jax.distributed.sharding import REPLICATED, constrain, mesh_axes
from tav_jax.errors import InputError

CONTEXT = 1  # frames before those of a window


class Window(NamedTuple):
    """The frames of a window, and the distance between the first frames of neighboring windows."""

    frames: int
    stride: int

    def starts(self, clip_frames: int) -> Int[np.ndarray, "W"]:
        """The first frame of each window. The last window ends with the clip."""
        last = clip_frames - self.frames
        return np.append(np.arange(0, last, self.stride), last)

    def averaging(self, clip_frames: int) -> tuple[Int[np.ndarray, "F m"], Float[np.ndarray, "F m"]]:
        """For each frame of the clip: where it is among the frames of all windows, and the weights, which sum to 1. A
        frame in fewer than m windows has weights of 0."""
        first = self.starts(clip_frames)[None]  # [1, W]
        position = np.arange(clip_frames)[:, None] - first  # of each frame in each window, [F, W]
        covered = (position >= 0) & (position < self.frames)
        slot = np.cumsum(covered, axis=1) - 1
        frame, window = np.nonzero(covered)
        within = position[covered]
        index = np.zeros((clip_frames, slot.max() + 1), int)
        weights = np.zeros(index.shape)
        index[frame, slot[covered]] = window * self.frames + within
        weights[frame, slot[covered]] = np.minimum(within, self.frames - 1 - within) + 1
        return index, (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def check_length(window: int | Sequence[int], clip_frames: int, name: str = "window") -> None:
    """Refuse a window, (frames, stride) or only the frames, that is longer than the clip."""
    frames = window if isinstance(window, int) else max((0, *window[:1]))
    if frames > clip_frames:
        raise InputError(
            f"{name} is {frames} frames and the clip has {clip_frames}; use at most {clip_frames}, or leave {name} out"
        )


def input_frames(start: Int[Array, "*W"] | int, frames: int) -> Int[Array, "*W f"]:
    """The frames of the clip that are the input of a window: frame 0, and its own."""
    start = jnp.asarray(start)[..., None]
    return jnp.concatenate([jnp.zeros_like(start), start + jnp.arange(frames)], axis=-1)


def input_mask(frames: int) -> Bool[Array, "f"]:
    return jnp.arange(CONTEXT + frames) >= CONTEXT


def windows_at_a_time(rows: int, data: int) -> int:
    """How many windows are one batch, so that the `data` axis of the mesh divides its rows."""
    return data // math.gcd(rows, data)


def sliding_windows(network: Network, window: Window) -> Network:
    """A network for clips that are longer than a window; its carry has that of each batch of windows."""

    def windowed(latents: Float[Array, "R F h w c"], step, conditioning, carry):
        rows, clip_frames, *pixels = latents.shape
        if window.frames >= clip_frames:
            return network(latents, step, conditioning, carry)
        count = windows_at_a_time(rows, mesh_axes().get("data", 1))
        starts = window.starts(clip_frames)
        batches = np.pad(starts, (0, -len(starts) % count), mode="edge").reshape(-1, count)
        text = jnp.repeat(conditioning.text, count, axis=0)  # all windows of row 0 first
        repeated = conditioning._replace(text=text, frame_mask=input_mask(window.frames))
        latents = constrain(latents, REPLICATED)

        def batch(values):
            first, carry = values
            inputs = latents[:, input_frames(first, window.frames)]  # [R, W, f, h, w, c]
            output, carry = network(inputs.reshape(rows * count, -1, *pixels), step, repeated, carry)
            return jax.tree.map(own_frames, output), carry

        def own_frames(x: Float[Array, "RW f *s"]) -> Float[Array, "R Wn *s"]:
            x = constrain(x, REPLICATED)[:, CONTEXT:]
            return x.reshape(-1, count * window.frames, *x.shape[2:])

        def average(x: Float[Array, "G R Wn *s"]) -> Float[Array, "R F *s"]:
            x = jnp.swapaxes(x, 0, 1)
            x = x.reshape(x.shape[0], -1, *x.shape[3:])  # [R, G·W·n, ...]
            index, weights = window.averaging(clip_frames)
            weights = weights.reshape(*weights.shape, *(1,) * (x.ndim - 2))
            parts: list[Any] = [weights[:, i] * x[:, index[:, i]] for i in range(index.shape[1])]
            return functools.reduce(jnp.add, parts)

        outputs, carry = jax.lax.map(batch, (jnp.asarray(batches), carry))
        return jax.tree.map(average, outputs), carry

    return windowed

"""The jitted functions of inference: encoding, decoding and the denoising loop.

Each is compiled once per shape. Networks are arguments, so that their weights are not compiled in as constants, and
what changes from call to call (text embeddings, guidance scale, timesteps) is an array.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tav_jax.diffusion.editing import Editing, two_branch
from tav_jax.diffusion.feature_reuse import FeatureCache, reuse_features
from tav_jax.diffusion.guidance import classifier_free_guidance, without_guidance
from tav_jax.diffusion.inversion import FixedPointState, fixed_point_iteration
from tav_jax.diffusion.network import unet_network
from tav_jax.diffusion.samplers import AfterStep, Denoiser, LoopState, Sampler, run_sampler
from tav_jax.diffusion.schedule import Steps
from tav_jax.diffusion.windows import Window, sliding_windows
from tav_jax.distributed import sharding
from tav_jax.distributed.sharding import REPLICATED, ROWS, constrain
from tav_jax.models import VAE, ClipText, Conditioning, UNet
from tav_jax.models.arguments import FlatTree, unwrap

VAE_PIXELS = 4 * 512 * 512  # that the VAE processes at a time: few enough that the UNet determines the peak memory


@contextlib.contextmanager
def jit_context(dtype: Any, mesh: Mesh | None) -> Iterator[None]:
    """The context of every call: the mesh and, for float32 models, matrix products in full float32 (the default on
    accelerators is lower precision)."""
    exact = jax.default_matmul_precision("highest") if dtype == jnp.float32 else contextlib.nullcontext()
    with exact, sharding.use_mesh(mesh):
        yield


def vae_batch_size(frames: int, height: int, width: int, mesh: Mesh | None) -> int:
    """How many frames the VAE processes at a time, on all devices together."""
    devices = mesh.size if mesh else 1
    return devices * min(-(-frames // devices), max(1, VAE_PIXELS // (height * width)))


@jax.jit
def encode_text(text_encoder: ClipText, ids: Any) -> jax.Array:
    """Token ids [n, L] → text embeddings [n, L, D]."""
    return constrain(text_encoder(ids).astype(jnp.float32), REPLICATED)


@jax.jit(static_argnames=("batch_size",))
def encode_frames(vae: VAE, frames: Any, *, batch_size: int) -> tuple[jax.Array, jax.Array]:
    """uint8 [F, H, W, 3] → mean and standard deviation of the scaled latents [F, h, w, 4]."""

    def encode(batch):
        return tuple(vae.encode(batch.astype(jnp.float32) / 127.5 - 1))

    mean, std = _map_batches(encode, frames, batch_size)
    return mean * vae.config.scaling_factor, std * vae.config.scaling_factor


@jax.jit(static_argnames=("batch_size",))
def decode_frames(vae: VAE, latents: Any, *, batch_size: int) -> jax.Array:
    """Scaled latents [n, F, h, w, 4] → frames in [0, 1], [n, F, H, W, 3]."""

    def decode(batch):
        return vae.decode(batch / vae.config.scaling_factor).astype(jnp.float32)

    n, f, *_ = latents.shape
    frames = _map_batches(decode, latents.reshape(n * f, *latents.shape[2:]), batch_size)  # [n·F, H, W, 3]
    return jnp.clip(frames / 2 + 0.5, 0, 1).reshape(n, f, *frames.shape[1:])


def _map_batches(function: Callable[[jax.Array], Any], x: jax.Array, batch_size: int) -> Any:
    """Apply `function` to `batch_size` rows at a time, sharded over the mesh. The last batch is padded."""
    count = -(-len(x) // batch_size)
    padded = jnp.pad(x, ((0, count * batch_size - len(x)), *((0, 0),) * (x.ndim - 1)), mode="edge")
    batches = padded.reshape(count, batch_size, *x.shape[1:])
    out = jax.lax.map(lambda batch: function(constrain(batch, ROWS)), batches)
    return jax.tree.map(lambda y: constrain(y.reshape(count * batch_size, *y.shape[2:])[: len(x)], REPLICATED), out)


@jax.jit
def call_unet(unet: UNet, latents: Any, timesteps: Any, conditioning: Conditioning) -> jax.Array:
    return constrain(unet(latents, timesteps, conditioning).astype(jnp.float32), REPLICATED)


def _denoiser(
    unet: Any,
    conditioning: Conditioning,
    guidance: Any,
    editing: Editing | None,
    *,
    use_guidance: bool,
    window: Window | None,
    feature_reuse: int,
) -> tuple[Denoiser, AfterStep | None]:
    network = unet_network(unet, return_features=feature_reuse > 1)
    if feature_reuse > 1:
        network = reuse_features(network, feature_reuse)
    if window is not None:
        network = sliding_windows(network, window)
    if editing is not None:
        return two_branch(network, conditioning, editing, guidance if use_guidance else None)
    if use_guidance:
        return classifier_free_guidance(network, conditioning, guidance), None
    return without_guidance(network, conditioning), None


def _constrain_state(state: Any) -> Any:
    """Replicated, but for cached features."""

    def is_cache(x: Any) -> bool:
        return isinstance(x, FeatureCache)

    return jax.tree.map(lambda x: x.constrain() if is_cache(x) else constrain(x, REPLICATED), state, is_leaf=is_cache)


@jax.jit(static_argnames=("use_guidance", "window", "feature_reuse"))
def empty_cache(unet: Any, state: LoopState, conditioning, steps: Steps, guidance, editing, **options: Any) -> Any:
    """The denoiser's carry before the first step, with zeros for cached features; step 0 does not read them."""
    denoise, _ = _denoiser(unwrap(unet), conditioning, guidance, editing, **options)
    step = jax.tree.map(lambda values: values[0], steps)
    _, carry = jax.eval_shape(denoise, state.latents, step, state.denoiser)
    return _constrain_state(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), carry))


@jax.jit(
    static_argnames=(
        "sampler",
        "prediction",
        "use_guidance",
        "fixed_point",
        "trajectory",
        "window",
        "feature_reuse",
    )
)
def denoise_loop(
    unet: Any,
    state: LoopState,
    conditioning: Conditioning,
    steps: Steps,
    guidance: Any,
    editing: Editing | None = None,
    *,
    sampler: Sampler,
    prediction: Any,
    use_guidance: bool,
    fixed_point: bool = False,
    trajectory: bool,
    window: Window | None = None,
    feature_reuse: int = 1,
) -> tuple[LoopState, jax.Array | None]:
    """Sampling or inversion steps: the state of the loop and, with `trajectory`, the latents after each step.

    `unet` is a `UNet`, or a module that wraps one and has the same call; or a `FlatTree` of it. With guidance,
    `conditioning` has the rows [unconditional; conditional], twice as many as the latents; with `editing`, a row for
    the source before them. With `fixed_point`, each step is iterated, see `inversion.py`. `window` and `feature_reuse`:
    see `windows.py` and `feature_reuse.py`.
    """
    options: dict[str, Any] = {"use_guidance": use_guidance, "window": window, "feature_reuse": feature_reuse}
    unet = unwrap(unet)
    denoise, after_step = _denoiser(unet, conditioning, guidance, editing, **options)
    if fixed_point:
        denoise = fixed_point_iteration(denoise, prediction)
    result = run_sampler(sampler, denoise, state, steps, prediction, after_step=after_step, trajectory=trajectory)
    return _constrain_state(result)


def run_denoise_loop(
    unet: Any,
    latents: jax.Array,
    conditioning: Conditioning,
    steps: Steps,
    *,
    sampler: Sampler,
    prediction: Any,
    guidance: float | None = None,
    editing: Editing | None = None,
    iterations: int = 1,
    window: Window | None = None,
    feature_reuse: int = 1,
    trajectory: bool = False,
    chunk: int | None = None,
    report: Callable[[int], None] | None = None,
) -> tuple[LoopState, jax.Array | None]:
    """All steps in one call of the jitted loop or, with `chunk`, that many steps in each call. `report` is called with
    the number of steps done. Returns the state of the loop and, with `trajectory`, the latents after each step."""
    network: dict[str, Any] = {"use_guidance": guidance is not None, "window": window, "feature_reuse": feature_reuse}
    options: dict[str, Any] = {"sampler": sampler, "prediction": prediction, "trajectory": trajectory}
    options |= {"fixed_point": iterations > 1, **network}
    scale = jnp.float32(0.0 if guidance is None else guidance)
    carry: Any = None
    if editing is not None:
        carry = editing.initial_state(unet.config)
    elif iterations > 1:
        carry = FixedPointState.initial(iterations, len(steps.timestep))
    state, paths, done = LoopState(sampler.init(latents), carry), [], 0
    unet = FlatTree(unet)  # flattened and hashed once, not in every call
    if feature_reuse > 1:
        state = state._replace(denoiser=empty_cache(unet, state, conditioning, steps, scale, editing, **network))
    for part in in_chunks(steps, chunk or len(steps.timestep)):
        state, path = denoise_loop(unet, state, conditioning, part, scale, editing, **options)
        paths.append(path)
        done += len(part.timestep)
        if report is not None:
            jax.block_until_ready(state)
            report(done)
    return jax.block_until_ready((state, jnp.concatenate(paths) if trajectory else None))


def chunk_size(steps: int) -> int:
    """Steps per chunk: up to 5, and a divisor of their number, so that all chunks have one size and one compilation."""
    return max(n for n in range(1, 6) if steps % n == 0)


def in_chunks(steps: Steps, size: int) -> Iterator[Steps]:
    """The steps in chunks of `size`, and one by one where fewer are left.

    Progress is reported between chunks. A callback inside the loop could report it too, but a program with a callback
    cannot be stored in the persistent compilation cache.
    """
    count = len(steps.timestep)
    whole = count - count % size
    for begin in range(0, whole, size):
        yield steps.slice(begin, begin + size)
    for begin in range(whole, count):
        yield steps.slice(begin, begin + 1)

"""Pretrains the demo model: `python -m tools.pretrain_demo_model --workdir=out/pretrain`

Three stages: an autoencoder is trained on images of the demo world; many images are encoded once; a UNet is trained to
denoise them, together with its text encoder. Each stage saves its state in `workdir`, and the same command continues
an interrupted run. The result is a Stable Diffusion pipeline in the Diffusers layout, in half precision.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import UInt8

from tav_jax import TavError
from tav_jax.demo.edits import MODEL
from tav_jax.demo.world import OUTLINE, Pose, Scene, all_scenes, coverage, render, signed_distance
from tav_jax.diffusion.schedule import NoiseSchedule, add_noise
from tav_jax.io.progress import progress_bar
from tav_jax.io.tokenizer import load_tokenizer, tokenize
from tav_jax.models import VAE, ClipText, ClipTextConfig, Conditioning, UNet, UNetConfig, VAEConfig
from tav_jax.models.attention import TransformerBlock
from tools.demo_model_files import LENGTH, SCHEDULER, vocabulary, write_pipeline, write_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Every number that the weights depend on."""

    seed: int = 0
    vae_steps: int = 4000
    vae_batch: int = 8
    vae_learning_rate: float = 2e-3
    vae_kl: float = 1e-4  # weight of the mean KL divergence of a latent value
    vae_object_steps: int = 2000  # further steps with a higher weight on the object, for sharp edges
    vae_object_weight: float = 6.0
    images: int = 32768  # encoded images that the UNet is trained on
    unet_steps: int = 12000
    unet_batch: int = 16
    unet_learning_rate: float = 1e-3
    unet_object_weight: float = 4.0  # weight of the errors on the object, at low noise
    group_size: int = 4  # in every second batch, so many images of one caption form a clip; see `sample_batch`
    key_fraction: float = 0.25  # fraction of an image's positions that self-attention uses; see `SubsampledLinear`
    caption_dropout: float = 0.1  # for classifier-free guidance
    ema: float = 0.9995

    vae_widths: tuple[int, ...] = (16, 32, 64)
    unet_widths: tuple[int, ...] = (64, 96, 96)
    unet_heads: tuple[int, ...] = (2, 4, 4)
    text_width: int = 96

    def vae(self) -> VAEConfig:
        return VAEConfig(block_out_channels=self.vae_widths, layers_per_block=1, norm_num_groups=8)

    def unet(self) -> UNetConfig:
        """A 2D UNet: spatial attention within each frame, no temporal attention."""
        return UNetConfig(
            block_out_channels=self.unet_widths,
            layers_per_block=1,
            down_attention=(False, True, True),
            up_attention=(True, True, False),
            heads=self.unet_heads,
            cross_attention_dim=self.text_width,
            norm_num_groups=16,
            spatial_attention="per-frame",
            temporal_attention=False,
        )

    def text(self) -> ClipTextConfig:
        return ClipTextConfig(
            vocab_size=len(vocabulary()),
            hidden_size=self.text_width,
            intermediate_size=2 * self.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )


def training_image(seed: int) -> tuple[Scene, Pose, UInt8[np.ndarray, "64 64 3"]]:
    """A random scene that is not held out, and its image. Depends only on the seed."""
    rng = np.random.default_rng((seed, 1))
    while (scene := Scene.sample(rng)).held_out:
        pass
    pose = Pose.sample(rng)
    return scene, pose, render(scene, pose)


# ------------------------------------------------------------------------------------------------ training loop


class TrainState(NamedTuple):
    step: Any
    params: Any
    opt_state: Any
    average: Any  # exponential moving average of the parameters, used in the end


def optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(300, steps // 10), steps, learning_rate / 50)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-3))


def save(file: Path, tree: Any) -> None:
    """Write to a temporary file and rename it, so that the file is always complete."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("wb") as out:
        np.savez(out, *(np.asarray(leaf) for leaf in jax.tree.leaves(tree)))
    os.replace(partial, file)


def load(file: Path, like: Any) -> Any:
    with np.load(file) as arrays:
        leaves = [jnp.asarray(arrays[f"arr_{i}"]) for i in range(len(arrays.files))]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def initial_params(workdir: Path, name: str, params: Any) -> Any:
    """The parameters in `<name>-start.npz`, where a user has put such a file, or else `params`."""
    file = workdir / f"{name}-start.npz"
    return load(file, params) if file.exists() else params


def fit(
    name: str,
    loss: Callable[..., jax.Array],
    params: Any,
    tx: optax.GradientTransformation,
    steps: int,
    batch: Callable[[int], tuple],
    workdir: Path,
    *,
    decay: float,
    save_every: int = 500,
) -> Any:
    """Train up to `steps` from the newest state in `workdir`; return the averaged parameters."""

    @jax.jit(donate_argnums=0)
    def train_step(state: TrainState, *data):
        value, grads = jax.value_and_grad(loss)(state.params, jax.random.fold_in(key, state.step), *data)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        d = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda a, p: d * a + (1 - d) * p, state.average, params)
        return TrainState(state.step + 1, params, opt_state, average), value

    key = jax.random.key(1)
    state = TrainState(jnp.int32(0), params, tx.init(params), jax.tree.map(jnp.copy, params))
    file = workdir / f"{name}.npz"
    if file.exists():
        state = load(file, state)
    first, losses, started = int(state.step), [], time.time()
    with progress_bar(steps, name) as bar, (workdir / f"{name}.jsonl").open("a") as log:
        bar.update(first)
        for step in range(first, steps):
            state, value = train_step(state, *batch(step))
            losses.append(value)
            bar.update()
            if (step + 1) % save_every == 0 or step + 1 == steps:
                mean = float(np.mean(jax.device_get(losses)))
                bar.set_postfix(loss=f"{mean:.4f}")
                seconds = (time.time() - started) / len(losses)
                print(json.dumps({"step": step + 1, "loss": mean, "seconds_per_step": seconds}), file=log, flush=True)
                losses, started = [], time.time()
                save(file, state)
    return state.average


# -------------------------------------------------------------------------------------------------- autoencoder


def normalize(images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 images as the autoencoder's input, in [−1, 1]."""
    return np.stack(images).astype(np.float32) / 127.5 - 1


def train_vae(recipe: Recipe, workdir: Path) -> VAE:
    graph, params = nnx.split(VAE(recipe.vae(), rngs=nnx.Rngs(recipe.seed)))
    params = initial_params(workdir, "vae", params)

    def loss(params, key, images, weights):
        vae = nnx.merge(graph, params)
        mean, std = vae.encode(images)
        reconstruction = vae.decode(mean + std * jax.random.normal(key, mean.shape))
        divergence = 0.5 * (mean**2 + std**2 - 1) - jnp.log(std)
        return jnp.mean(weights * (reconstruction - images) ** 2) + recipe.vae_kl * jnp.mean(divergence)

    def batches(first: int, object_weight: float):
        """A function from the step to a batch of images and the weights of their pixels."""

        def batch(step):
            start = first + step * recipe.vae_batch
            scenes, poses, images = zip(*(training_image(start + i) for i in range(recipe.vae_batch)), strict=True)
            distances = np.stack(
                [signed_distance(scene.shape, pose) for scene, pose in zip(scenes, poses, strict=True)]
            )
            weights = 1 + (object_weight - 1) * coverage(distances - OUTLINE - 1)
            return normalize(images), weights[..., None].astype(np.float32)

        return batch

    for name, steps, learning_rate, first, weight in (
        ("vae", recipe.vae_steps, recipe.vae_learning_rate, 10_000_000, 1.0),
        ("vae-object", recipe.vae_object_steps, recipe.vae_learning_rate / 2, 20_000_000, recipe.vae_object_weight),
    ):
        tx = optimizer(learning_rate, steps)
        params = fit(name, loss, params, tx, steps, batches(first, weight), workdir, decay=0.998)
    return nnx.merge(graph, params)


class Latents(NamedTuple):
    """The posteriors of the encoded images, sorted by caption."""

    mean: Any
    std: Any
    caption: Any  # index of the caption
    object: Any  # the fraction of each position that the object and its outline cover


def encode_images(recipe: Recipe, vae: VAE, workdir: Path) -> tuple[Latents, float]:
    """The latents of all images, and the scaling factor that gives them unit variance."""
    file, batch_size = workdir / "latents.npz", 128
    caption_ids = {scene.caption: i for i, scene in enumerate(all_scenes())}
    encode = jax.jit(lambda vae, x: vae.encode(x))
    if not file.exists():
        parts = []
        with progress_bar(recipe.images, "encoding") as bar:
            for first in range(0, recipe.images, batch_size):
                batch = [training_image(first + i) for i in range(batch_size)]
                mean, std = encode(vae, normalize([image for *_, image in batch]))
                captions = np.array([caption_ids[scene.caption] for scene, *_ in batch], np.int32)
                covered = np.stack([coverage(signed_distance(s.shape, pose) - OUTLINE) for s, pose, _ in batch])
                h, w = mean.shape[1:3]
                covered = covered.reshape(batch_size, h, covered.shape[1] // h, w, -1).max(axis=(2, 4))
                half = [np.asarray(x, np.float16) for x in (mean, std, covered)]
                parts.append(Latents(half[0], half[1], captions, half[2]))
                bar.update(batch_size)
        latents = Latents(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        order = np.argsort(latents.caption, kind="stable")
        save(file, Latents(*(column[order] for column in latents)))
    latents = load(file, Latents(0, 0, 0, 0))
    return latents, 1 / float(np.std(np.asarray(latents.mean, np.float32)))


# --------------------------------------------------------------------------------------------------------- UNet


class Denoiser(nnx.Module):
    """UNet and text encoder, which are trained together."""

    def __init__(self, recipe: Recipe):
        rngs = nnx.Rngs(recipe.seed + 1)
        self.unet = UNet(recipe.unet(), rngs=rngs)
        self.text_encoder = ClipText(recipe.text(), rngs=rngs)
        # CLIP's initial embeddings are small. Flax's are fifty times as large as the updates of this training.
        for embed in (self.text_encoder.embeddings.token_embedding, self.text_encoder.embeddings.position_embedding):
            embed.embedding.set_value(0.1 * jax.random.normal(rngs.params(), embed.embedding.shape))

    def __call__(self, x: jax.Array, t: jax.Array, ids: jax.Array) -> jax.Array:
        return self.unet(x, t, Conditioning(self.text_encoder(ids)))


class SubsampledLinear(nnx.Module):
    """A projection of a random subset of the positions. Keys and values with the same `key` use the same subset.

    In an inflated UNet, a frame attends to other frames and not to itself. A UNet of this size that is pretrained with
    full self-attention learns that each position attends to itself, and fails when inflated. With random subsets it
    learns to use features of the whole image instead. Large networks learn this without subsets.
    """

    def __init__(self, linear: nnx.Linear, fraction: float, key: jax.Array):
        self.linear, self.fraction, self.key = linear, fraction, nnx.data(key)

    def __call__(self, x: jax.Array) -> jax.Array:
        positions = x.shape[-2]
        subset = jax.random.permutation(self.key, positions)[: max(1, round(self.fraction * positions))]
        return self.linear(x[..., subset, :])


def subsample_keys(unet: UNet, fraction: float, key: jax.Array) -> None:
    """Restrict every self-attention layer to a random fraction of the positions."""
    blocks = [module for _, module in nnx.iter_modules(unet) if isinstance(module, TransformerBlock)]
    for block, block_key in zip(blocks, jax.random.split(key, len(blocks)), strict=True):
        attention: Any = block.attn1
        attention.to_k, attention.to_v = (
            SubsampledLinear(x, fraction, block_key) for x in (attention.to_k, attention.to_v)
        )


def sample_batch(recipe: Recipe, captions: np.ndarray, step: int) -> np.ndarray:
    """Indices of a batch of latents, [groups, images].

    Batches of single images alternate with batches of groups of `group_size` images with the same caption. The images
    of a group share the statistics of the group norms, as the frames of a clip do. If trained on single images only, a
    network of this size learns that the statistics describe one object, and generates one object for a whole clip.
    """
    rng, images = np.random.default_rng((recipe.seed, step)), (1, recipe.group_size)[step % 2]
    caption = captions[rng.integers(0, len(captions), recipe.unet_batch // images)]
    low, high = (np.searchsorted(captions, caption, side) for side in ("left", "right"))
    return rng.integers(low[:, None], high[:, None], (len(caption), images))


def train_unet(recipe: Recipe, latents: Latents, scaling_factor: float, workdir: Path) -> Denoiser:
    graph, params = nnx.split(Denoiser(recipe))
    params = initial_params(workdir, "unet", params)
    write_tokenizer(workdir / "tokenizer")
    captions = [*(scene.caption for scene in all_scenes()), ""]
    ids = jnp.asarray(tokenize(load_tokenizer(workdir / "tokenizer"), captions, LENGTH))
    alphas_cumprod = jnp.asarray(NoiseSchedule.from_config(SCHEDULER).alphas_cumprod)

    def loss(params, key, latents, ids, indices):
        groups = len(indices)
        posterior_key, noise_key, time_key, dropout_key, subset_key = jax.random.split(key, 5)
        mean, std, covered = (x[indices].astype(jnp.float32) for x in (latents.mean, latents.std, latents.object))
        x0 = scaling_factor * (mean + std * jax.random.normal(posterior_key, mean.shape))
        noise = jax.random.normal(noise_key, mean.shape)
        # Stratified timesteps: each group samples from its own part of the schedule.
        uniform = jax.random.uniform(time_key, (groups,))
        t = jnp.int32((jnp.arange(groups) + uniform) / groups * len(alphas_cumprod))
        dropped = jax.random.bernoulli(dropout_key, recipe.caption_dropout, (groups,))
        text = ids[jnp.where(dropped, len(captions) - 1, latents.caption[indices[:, 0]])]
        denoiser = nnx.merge(graph, params)
        subsample_keys(denoiser.unet, recipe.key_fraction, subset_key)
        error = denoiser(jax.vmap(add_noise)(x0, noise, alphas_cumprod[t]), t, text) - noise
        # At low noise, a large error in ε is a small error in the image.
        alpha = alphas_cumprod[t].reshape(-1, 1, 1, 1, 1)
        weight = (1 + alpha / (1 - alpha) / 5) ** -0.5
        # The object is a small part of the image, so its errors get a higher weight, but not where noise hides its
        # position: the model would learn to generate objects everywhere.
        object_weight = 1 + (recipe.unet_object_weight - 1) * covered[..., None] * (alpha > 0.1)
        return jnp.mean(object_weight * weight * error**2)

    def batch(step: int):
        return latents, ids, sample_batch(recipe, image_captions, step)

    image_captions = np.asarray(latents.caption)
    tx = optimizer(recipe.unet_learning_rate, recipe.unet_steps)
    average = fit("unet", loss, params, tx, recipe.unet_steps, batch, workdir, decay=recipe.ema)
    return nnx.merge(graph, average)


def pretrain(recipe: Recipe, workdir: Path, out: Path) -> None:
    """Run all stages and write the pipeline to `out`."""
    workdir.mkdir(parents=True, exist_ok=True)
    vae = train_vae(recipe, workdir)
    latents, scaling_factor = encode_images(recipe, vae, workdir)
    denoiser = train_unet(recipe, latents, scaling_factor, workdir)
    write_pipeline(out, denoiser.unet, vae, denoiser.text_encoder, scaling_factor, asdict(recipe))


def parse_args(argv: list[str] | None = None) -> tuple[Recipe, Path, Path]:
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain_demo_model", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="where the state of each stage is saved")
    parser.add_argument("--out", type=Path, default=MODEL, help="where the pipeline is written (default: %(default)s)")
    for name, value in asdict(Recipe()).items():
        if not isinstance(value, tuple):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="(%(default)s)")
    options = vars(parser.parse_args(argv))
    workdir, out = options.pop("workdir"), options.pop("out")
    return Recipe(**options), workdir, out


def main(argv: list[str] | None = None) -> int:
    recipe, workdir, out = parse_args(argv)
    pretrain(recipe, workdir, out)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    print(f"The model is in {out}: {size / 1e6:.1f} MB of weights.")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except TavError as error:
        sys.exit(f"error: {error}")

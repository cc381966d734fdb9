"""How the embedded model was made: `python -m tools.pretrain_demo_model --workdir=out/pretrain`

Three stages, each kept on disk so that the same line goes on where it was stopped: an autoencoder is learned from
stills of the drawn world; many stills are encoded once; a UNet learns to denoise them, together with its text encoder.
What comes out is a Stable Diffusion in the Diffusers layout, in half precision.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.numpy import save_file

from tav_jax import TavError
from tav_jax.demo.vocabulary import END, LENGTH, START, vocabulary, write_tokenizer
from tav_jax.demo.world import OUTLINE, coverage, distance, scenes, still
from tav_jax.diffusion.schedule import NoiseSchedule, add_noise
from tav_jax.io.progress import progress_bar
from tav_jax.io.tokenizer import load_tokenizer, tokenize
from tav_jax.io.weights import TEMPORAL, torch_tensors
from tav_jax.models import VAE, ClipText, ClipTextConfig, UNet, UNetConfig, VAEConfig
from tav_jax.models.attention import TransformerBlock

HERE = Path(__file__).parent / "model"

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    # Stable Diffusion's 0.012 leaves a picture of 16 × 16 latents visible under the most noise: what was inverted would
    # keep its colours whatever the words say.
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class Recipe:
    """Every number that the weights depend on."""

    seed: int = 0
    vae_steps: int = 4000
    vae_batch: int = 8
    vae_learning_rate: float = 2e-3
    vae_kl: float = 1e-4  # weight of the posterior's divergence, a latent number
    polish_steps: int = 2000  # in which the object's pixels count more, for its edges
    polish_weight: float = 6.0
    pictures: int = 32768  # stills that the UNet learns from
    unet_steps: int = 12000
    unet_batch: int = 16
    unet_learning_rate: float = 1e-3
    object_weight: float = 4.0  # of the errors on the object, where there is little noise
    alike: int = 4  # stills of one caption that are denoised together, in every second batch; see `choose`
    glimpse: float = 0.25  # of its positions that a picture's self-attention may look at; see `Glimpse`
    caption_dropout: float = 0.1  # for guidance
    ema: float = 0.9995

    vae_widths: tuple[int, ...] = (16, 32, 64)
    unet_widths: tuple[int, ...] = (64, 96, 96)
    unet_heads: tuple[int, ...] = (2, 4, 4)
    text_width: int = 96

    def vae(self) -> VAEConfig:
        return VAEConfig(block_out_channels=self.vae_widths, layers_per_block=1, norm_num_groups=8)

    def unet(self) -> UNetConfig:
        """In its one-frame form: each picture sees itself, and time does not exist."""
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


# ---------------------------------------------------------------------------------------------------- the loop


class State(NamedTuple):
    step: Any
    params: Any
    moments: Any
    average: Any  # of the parameters, over the last few thousand steps: what is used in the end


def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(300, steps // 10), steps, rate / 50)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99, weight_decay=1e-3))


def save(file: Path, tree: Any) -> None:
    """All or nothing: the file is renamed into its place when it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".partial")
    with scratch.open("wb") as out:
        np.savez(out, *(np.asarray(leaf) for leaf in jax.tree.leaves(tree)))
    os.replace(scratch, file)


def load(file: Path, like: Any) -> Any:
    with np.load(file) as arrays:
        leaves = [jnp.asarray(arrays[f"arr_{i}"]) for i in range(len(arrays.files))]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def begin(workdir: Path, name: str, params: Any) -> Any:
    """Fresh parameters, or those that an earlier recipe has learned where somebody put them into the folder."""
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
    every: int = 500,
) -> Any:
    """Go on from the newest state in `workdir`, to the end; gives the averaged parameters."""

    @jax.jit(donate_argnums=0)
    def advance(state: State, *data):
        value, grads = jax.value_and_grad(loss)(state.params, jax.random.fold_in(key, state.step), *data)
        updates, moments = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        share = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
        average = jax.tree.map(lambda a, p: share * a + (1 - share) * p, state.average, params)
        return State(state.step + 1, params, moments, average), value

    key = jax.random.key(1)
    state = State(jnp.int32(0), params, tx.init(params), jax.tree.map(jnp.copy, params))
    file = workdir / f"{name}.npz"
    if file.exists():
        state = load(file, state)
    first, losses, started = int(state.step), [], time.time()
    with progress_bar(steps, name) as bar, (workdir / f"{name}.jsonl").open("a") as log:
        bar.update(first)
        for step in range(first, steps):
            state, value = advance(state, *batch(step))
            losses.append(value)
            bar.update()
            if (step + 1) % every == 0 or step + 1 == steps:
                mean = float(np.mean(jax.device_get(losses)))
                bar.set_postfix(loss=f"{mean:.4f}")
                rate = (time.time() - started) / len(losses)
                print(json.dumps({"step": step + 1, "loss": mean, "seconds_per_step": rate}), file=log, flush=True)
                losses, started = [], time.time()
                save(file, state)
    return state.average


# -------------------------------------------------------------------------------------------------- autoencoder


def scaled(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures as the autoencoder sees them, in [−1, 1]."""
    return np.stack(pictures).astype(np.float32) / 127.5 - 1


def train_vae(recipe: Recipe, workdir: Path) -> VAE:
    graph, params = nnx.split(VAE(recipe.vae(), rngs=nnx.Rngs(recipe.seed)))
    params = begin(workdir, "vae", params)

    def loss(params, key, pictures, weights):
        vae = nnx.merge(graph, params)
        mean, std = vae.encode(pictures)
        again = vae.decode(mean + std * jax.random.normal(key, mean.shape))
        divergence = 0.5 * (mean**2 + std**2 - 1) - jnp.log(std)
        return jnp.mean(weights * (again - pictures) ** 2) + recipe.vae_kl * jnp.mean(divergence)

    def drawn(first: int, object_weight: float):
        """The batches: pictures, and how much each of their pixels counts."""

        def batch(step):
            start = first + step * recipe.vae_batch
            scenes, poses, pictures = zip(*(still(start + i) for i in range(recipe.vae_batch)), strict=True)
            edges = np.stack([distance(scene.shape, pose) for scene, pose in zip(scenes, poses, strict=True)])
            weights = 1 + (object_weight - 1) * coverage(edges - OUTLINE - 1)
            return scaled(pictures), weights[..., None].astype(np.float32)

        return batch

    for name, steps, rate, first, weight in (
        ("vae", recipe.vae_steps, recipe.vae_learning_rate, 10_000_000, 1.0),
        ("polish", recipe.polish_steps, recipe.vae_learning_rate / 2, 20_000_000, recipe.polish_weight),
    ):
        tx = optimizer(rate, steps)
        params = fit(name, loss, params, tx, steps, drawn(first, weight), workdir, decay=0.998)
    return nnx.merge(graph, params)


class Pool(NamedTuple):
    """Encoded stills, ordered by caption: the posterior of each, and which caption it has."""

    mean: Any
    std: Any
    caption: Any
    object: Any  # how much of each latent number's place the object covers, and its rim


def encode_pool(recipe: Recipe, vae: VAE, workdir: Path) -> tuple[Pool, float]:
    """Also gives the scaling factor that makes the latents' variance 1."""
    file, group = workdir / "pool.npz", 128
    numbers = {scene.caption: i for i, scene in enumerate(scenes())}
    encode = jax.jit(lambda vae, x: vae.encode(x))
    if not file.exists():
        parts = []
        with progress_bar(recipe.pictures, "encoding") as bar:
            for first in range(0, recipe.pictures, group):
                drawn = [still(first + i) for i in range(group)]
                mean, std = encode(vae, scaled([picture for *_, picture in drawn]))
                captions = np.array([numbers[scene.caption] for scene, *_ in drawn], np.int32)
                covered = np.stack([coverage(distance(scene.shape, pose) - OUTLINE) for scene, pose, _ in drawn])
                h, w = mean.shape[1:3]
                covered = covered.reshape(group, h, covered.shape[1] // h, w, -1).max(axis=(2, 4))
                halves = [np.asarray(x, np.float16) for x in (mean, std, covered)]
                parts.append(Pool(halves[0], halves[1], captions, halves[2]))
                bar.update(group)
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        order = np.argsort(Pool(*columns).caption, kind="stable")
        save(file, Pool(*(column[order] for column in columns)))
    pool = load(file, Pool(0, 0, 0, 0))
    return pool, 1 / float(np.std(np.asarray(pool.mean, np.float32)))


# --------------------------------------------------------------------------------------------------------- UNet


class Denoiser(nnx.Module):
    """What is learned together."""

    def __init__(self, recipe: Recipe):
        rngs = nnx.Rngs(recipe.seed + 1)
        self.unet = UNet(recipe.unet(), rngs=rngs)
        self.text_encoder = ClipText(recipe.text(), rngs=rngs)
        # The token embeddings of CLIP are small; Flax would draw them fifty times as large as what is learned on top.
        for embed in (self.text_encoder.embeddings.token_embedding, self.text_encoder.embeddings.position_embedding):
            embed.embedding.set_value(0.1 * jax.random.normal(rngs.params(), embed.embedding.shape))

    def __call__(self, x: jax.Array, t: jax.Array, ids: jax.Array) -> jax.Array:
        return self.unet(x, t, self.text_encoder(ids))


class Glimpse(nnx.Module):
    """A projection of some positions only, drawn by `key`: keys and values that share it are of the same positions.

    In a clip, a frame's self-attention will look at other frames and not at itself. A network as small as this one
    would learn to find each position's own content there; one that never knows which positions it will be shown
    learns what is true of the whole picture. Large networks come by this through their data.
    """

    def __init__(self, linear: nnx.Linear, share: float, key: jax.Array):
        self.linear, self.share, self.key = linear, share, nnx.data(key)

    def __call__(self, x: jax.Array) -> jax.Array:
        positions = x.shape[-2]
        kept = jax.random.permutation(self.key, positions)[: max(1, round(self.share * positions))]
        return self.linear(x[..., kept, :])


def blindfold(unet: UNet, share: float, key: jax.Array) -> None:
    """Let each self-attention look at so large a share of the positions."""
    blocks = [module for _, module in nnx.iter_modules(unet) if isinstance(module, TransformerBlock)]
    for block, own in zip(blocks, jax.random.split(key, len(blocks)), strict=True):
        seeing: Any = block.attn1
        seeing.to_k, seeing.to_v = (Glimpse(x, share, own) for x in (seeing.to_k, seeing.to_v))


def choose(recipe: Recipe, captions: np.ndarray, step: int) -> np.ndarray:
    """The pictures of a batch, as [pictures of a clip's kind, frames].

    Every second batch is made of single pictures. In the others a few with the same caption are denoised together and
    share the statistics of their group norms, as the frames of a clip do. Without that, a network that normalises over
    so few numbers learns that a picture holds one object, and draws one object in the whole clip.
    """
    rng, frames = np.random.default_rng((recipe.seed, step)), (1, recipe.alike)[step % 2]
    first = captions[rng.integers(0, len(captions), recipe.unet_batch // frames)]
    low, high = (np.searchsorted(captions, first, side) for side in ("left", "right"))
    return rng.integers(low[:, None], high[:, None], (len(first), frames))


def train_unet(recipe: Recipe, pool: Pool, scale: float, workdir: Path) -> Denoiser:
    graph, params = nnx.split(Denoiser(recipe))
    params = begin(workdir, "unet", params)
    write_tokenizer(workdir / "tokenizer")
    captions = [*(scene.caption for scene in scenes()), ""]
    ids = jnp.asarray(tokenize(load_tokenizer(workdir / "tokenizer"), captions, LENGTH))
    levels = jnp.asarray(NoiseSchedule.from_config(SCHEDULER).levels)

    def loss(params, key, pool, ids, chosen):
        clips = len(chosen)
        for_latents, for_noise, for_time, for_captions, for_glimpses = jax.random.split(key, 5)
        mean, std, covered = (x[chosen].astype(jnp.float32) for x in (pool.mean, pool.std, pool.object))
        latents = scale * (mean + std * jax.random.normal(for_latents, mean.shape))
        noise = jax.random.normal(for_noise, mean.shape)
        # One timestep from each of equal parts: the batch always sees all amounts of noise.
        t = jnp.int32((jnp.arange(clips) + jax.random.uniform(for_time, (clips,))) / clips * len(levels))
        dropped = jax.random.bernoulli(for_captions, recipe.caption_dropout, (clips,))
        text = ids[jnp.where(dropped, len(captions) - 1, pool.caption[chosen[:, 0]])]
        denoiser = nnx.merge(graph, params)
        blindfold(denoiser.unet, recipe.glimpse, for_glimpses)
        error = denoiser(jax.vmap(add_noise)(latents, noise, levels[t]), t, text) - noise
        # Errors at little noise are large in ε and small in the picture: weigh them less, but not away.
        level = levels[t].reshape(-1, 1, 1, 1, 1)
        weight = (1 + level / (1 - level) / 5) ** -0.5
        # The ground's texture is most of a picture and the object's shape is what is looked at. Where the noise hides
        # where the object is, no pixel may count more: it would teach to see objects everywhere.
        object_weight = 1 + (recipe.object_weight - 1) * covered[..., None] * (level > 0.1)
        return jnp.mean(object_weight * weight * error**2)

    def batch(step: int):
        return pool, ids, choose(recipe, known, step)

    known = np.asarray(pool.caption)
    tx = optimizer(recipe.unet_learning_rate, recipe.unet_steps)
    average = fit("unet", loss, params, tx, recipe.unet_steps, batch, workdir, decay=recipe.ema)
    return nnx.merge(graph, average)


# ------------------------------------------------------------------------------------------------------- export


def export(recipe: Recipe, vae: VAE, scale: float, denoiser: Denoiser, target: Path) -> None:
    """Write the pipeline directory, in half precision, as Stable Diffusion's are."""
    u, v, t = recipe.unet(), recipe.vae(), recipe.text()

    def kinds(way: str, attention: tuple[bool, ...]) -> list[str]:
        return [f"{'CrossAttn' * has}{way}Block2D" for has in attention]

    configs: dict[str, dict[str, Any]] = {
        "model_index.json": {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.40.0",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "scheduler/scheduler_config.json": SCHEDULER,
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": list(u.heads),  # the number of heads, as in Stable Diffusion's own configs
            "block_out_channels": list(u.block_out_channels),
            "cross_attention_dim": u.cross_attention_dim,
            "down_block_types": kinds("Down", u.down_attention),
            "in_channels": u.in_channels,
            "layers_per_block": u.layers_per_block,
            "norm_num_groups": u.norm_num_groups,
            "out_channels": u.out_channels,
            "sample_size": 16,
            "up_block_types": kinds("Up", u.up_attention),
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": list(v.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * len(v.block_out_channels),
            "latent_channels": v.latent_channels,
            "layers_per_block": v.layers_per_block,
            "norm_num_groups": v.norm_num_groups,
            "sample_size": 64,
            "scaling_factor": round(scale, 6),
            "up_block_types": ["UpDecoderBlock2D"] * len(v.block_out_channels),
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"],
            "bos_token_id": vocabulary().index(START),
            "eos_token_id": vocabulary().index(END),
            "hidden_act": t.hidden_act,
            "hidden_size": t.hidden_size,
            "intermediate_size": t.intermediate_size,
            "max_position_embeddings": t.max_position_embeddings,
            "model_type": "clip_text_model",
            "num_attention_heads": t.num_attention_heads,
            "num_hidden_layers": t.num_hidden_layers,
            "pad_token_id": vocabulary().index(END),
            "projection_dim": t.hidden_size,
            "vocab_size": t.vocab_size,
        },
        "recipe.json": asdict(recipe),
    }
    shutil.rmtree(target, ignore_errors=True)
    write_tokenizer(target / "tokenizer")
    for name, config in configs.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(json.dumps(config, indent=2) + "\n")
    for part, module in (("unet", denoiser.unet), ("vae", vae), ("text_encoder", denoiser.text_encoder)):
        tensors = torch_tensors(module, part)
        halves = {n: x.astype(np.float16) for n, x in tensors.items() if not TEMPORAL.fullmatch(n)}
        file = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
        save_file(halves, target / part / file, metadata={"format": "pt"})


def arguments(given: list[str] | None = None) -> tuple[Recipe, Path, Path]:
    parser = argparse.ArgumentParser(prog="python -m tools.pretrain_demo_model", description=__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="where the state is kept between starts")
    parser.add_argument("--out", type=Path, default=HERE, help="where the finished model goes (default: %(default)s)")
    for name, value in asdict(Recipe()).items():
        if not isinstance(value, tuple):
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="(%(default)s)")
    chosen = vars(parser.parse_args(given))
    workdir, out = chosen.pop("workdir"), chosen.pop("out")
    return Recipe(**chosen), workdir, out


def stages(recipe: Recipe, workdir: Path) -> Iterator[tuple[str, Any]]:
    vae = train_vae(recipe, workdir)
    yield "vae", vae
    pool, scale = encode_pool(recipe, vae, workdir)
    yield "pool", (pool, scale)
    yield "unet", train_unet(recipe, pool, scale, workdir)


def make(recipe: Recipe, workdir: Path, out: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    made = dict(stages(recipe, workdir))
    export(recipe, made["vae"], made["pool"][1], made["unet"], out)


def main(given: list[str] | None = None) -> int:
    recipe, workdir, out = arguments(given)
    make(recipe, workdir, out)
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    print(f"The model is in {out}: {size / 1e6:.1f} MB of weights.")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except TavError as error:
        sys.exit(f"error: {error}")

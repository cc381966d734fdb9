"""Run by `test_mesh.py` in a process of its own, which has as many virtual devices as it asks for.

Tunes, inverts and samples a reference case on one mesh, and stores the numbers.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from tav_jax import TuneAVideo
from tav_jax.diffusion import programs
from tav_jax.models import Conditioning
from tav_jax.plan import hlo
from tav_jax.training.train_step import Hyperparameters, Replay
from tav_jax.training.trainer import Trainer

REFERENCE = Path(__file__).parent / "reference"


def main(case: str, mesh: list[int], frames: int, out: str, fsdp: bool = False, methods: bool = False) -> None:
    root = REFERENCE / case
    with np.load(root / "reference.npz") as file:
        latents = np.moveaxis(file["latents_scaled_bcfhw"], -4, -1)  # [1, F, h, w, 4]
    rng = np.random.default_rng(0)
    shape = (1, frames, *latents.shape[2:])
    latents = (np.resize(latents, shape) + 0.1 * rng.normal(size=shape)).astype(np.float32)
    tav = TuneAVideo.from_pretrained(root / "model", dtype="float32", mesh=tuple(mesh))
    assert (tav.mesh.size if tav.mesh else 1) == mesh[0] * mesh[1]
    noise = rng.normal(size=(3, *latents.shape[1:])).astype(np.float32)
    data, text = Replay(latents, np.array([40, 500, 900]), noise), tav.encode_text("a red square is moving")
    trainer = Trainer(tav, data, text, hyper=Hyperparameters(learning_rate=1e-3), fsdp=fsdp)
    result = trainer.run(3, show_bar=False)
    inverted = tav.invert(latents, steps=4)
    edit, other = tav.sample(["blue", "a green square"], latents=inverted, steps=4, guidance=7.5)
    report = {"largest_shard": largest_shard(trainer)}
    extra = long_clip(tav, inverted) | edited(tav, latents) if methods else {}
    if not fsdp:
        kept = tav.sample(["blue", "red"], latents=inverted, steps=4, guidance=7.5, strength=0.5)
        extra["kept"] = np.concatenate([one.latents for one in kept])
        report |= {"gathered": most_gathered(tav, latents), "latents": latents.nbytes}
    np.savez(
        out,
        **extra,
        losses=result.losses,
        norms=result.grad_norms,
        inverted=inverted,
        edit=edit.latents,
        other=other.latents,
        frames=edit.frames,
        encoded=tav.encode_video(edit.frames),
    )
    # A replicated array is bit-equal on all devices.
    for x in (inverted, tav.components.unet.conv_in.kernel.get_value()):
        shards = [np.asarray(shard.data) for shard in x.addressable_shards]
        assert all(np.array_equal(shards[0], shard) for shard in shards)
    print(json.dumps(report))


def long_clip(tav: TuneAVideo, latents: jax.Array) -> dict[str, np.ndarray]:
    """Samples in windows and with reuse of features, alone and together."""
    options = {"latents": latents, "guidance": 7.5, "window": (3, 1), "feature_reuse": 2}
    long = tav.sample(["blue", "red"], steps=2, **options)
    options = {"steps": 6, "feature_reuse": 2, "progress": lambda done: None}  # in chunks of 3
    reused = tav.sample("blue", latents=latents, guidance=7.5, **options)
    compiled = programs.denoise_loop._cache_size(), programs.empty_cache._cache_size()
    tav.sample("red", latents=latents, guidance=5.0, **options)
    assert (programs.denoise_loop._cache_size(), programs.empty_cache._cache_size()) == compiled
    return {"long": np.concatenate([one.latents for one in long]), "reused": np.asarray(reused.latents)}


def edited(tav: TuneAVideo, latents: np.ndarray) -> dict[str, np.ndarray]:
    """Fixed-point inversion, and two-branch editing of two prompts with all controls."""
    path = tav.invert(latents, steps=4, iterations=3, return_trajectory=True)
    options = {"source": path, "source_prompt": "a red square", "inversion_steps": 4, "steps": 3, "guidance": 7.5}
    options |= {"equalizer": {"blue": 3.0}, "blend_words": ("square",), "mask": np.linspace(np.zeros(16), 1, 16)}
    # Cross-attention is controlled in two steps, self-attention and features in one; all are blended.
    shares = {"self_attention_steps": 0.3, "feature_steps": 0.3, "cross_attention_steps": 0.6, "blend_start": 0.0}
    edits = tav.sample(["a blue square", "a big green square"], **options, **shares)
    clips = {name: np.concatenate([getattr(one, name) for one in edits]) for name in ("latents", "mask")}
    return {"path": path, "residuals": tav.inversion_residuals, "controlled": clips["latents"], "masks": clips["mask"]}


def most_gathered(tav: TuneAVideo, latents: np.ndarray) -> int:
    """Bytes of the largest all-gather result in one step of guided sampling with two prompts."""
    rows, text = np.concatenate([latents] * 4), np.asarray(tav.encode_text(["", "", "blue", "red"]))
    with tav.jit_context():
        arguments = (tav.components.unet, rows, np.full(4, 500, np.int32), Conditioning(text))
        compiled = programs.call_unet.lower(*arguments).compile()
    found = hlo.collectives(compiled.as_text(), jax.device_count())
    return max((one.bytes for one in found if one.kind == "all-gather"), default=0)


def largest_shard(trainer: Trainer) -> float:
    """The largest share that one device holds of a trained array that its mesh divides."""
    devices = trainer.tav.mesh.size if trainer.tav.mesh else 1
    arrays = [x for x in jax.tree.leaves(trainer.state) if any(n % devices == 0 for n in x.shape)]
    return max(x.addressable_shards[0].data.size / x.size for x in arrays)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4], **json.loads(sys.argv[5]))

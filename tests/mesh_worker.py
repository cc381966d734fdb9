"""Run by `test_mesh.py` in a process of its own, which has as many virtual devices as it asks for.

Tunes, inverts and samples a reference case on one mesh, and writes the numbers down.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from tav_jax import TuneAVideo
from tav_jax.diffusion import programs
from tav_jax.plan import collectives

REFERENCE = Path(__file__).parent / "reference"


def main(case: str, mesh: list[int], frames: int, out: str, fsdp: bool = False) -> None:
    root = REFERENCE / case
    with np.load(root / "reference.npz") as file:
        latents = np.moveaxis(file["latents_scaled_bcfhw"], -4, -1)  # [1, F, h, w, 4]
    rng = np.random.default_rng(0)
    shape = (1, frames, *latents.shape[2:])
    latents = (np.resize(latents, shape) + 0.1 * rng.normal(size=shape)).astype(np.float32)
    tav = TuneAVideo.from_pretrained(root / "model", dtype="float32", mesh=tuple(mesh))
    assert (tav.mesh.size if tav.mesh else 1) == mesh[0] * mesh[1]
    noise = rng.normal(size=(3, *latents.shape[1:])).astype(np.float32)
    largest = largest_part(tav) if fsdp else 1.0
    told = tav.replay(latents, "a red square is moving", timesteps=[40, 500, 900], noise=noise, learning_rate=1e-3)
    inverted = tav.invert(latents, steps=4)
    edit, other = tav.sample(["blue", "a green square"], latents=inverted, steps=4, guidance=7.5)
    kept = tav.sample(["blue", "red"], latents=inverted, steps=4, guidance=7.5, strength=0.5)
    np.savez(
        out,
        kept=np.concatenate([one.latents for one in kept]),
        losses=told.losses,
        norms=told.grad_norms,
        inverted=inverted,
        edit=edit.latents,
        other=other.latents,
        frames=edit.frames,
        encoded=tav.encode_video(edit.frames),
    )
    # A replicated array is the same on all devices, to the bit.
    for x in (inverted, tav.components.unet.conv_in.kernel.get_value()):
        shards = [np.asarray(shard.data) for shard in x.addressable_shards]
        assert all(np.array_equal(shards[0], shard) for shard in shards)
    told = {"devices": jax.device_count(), "largest_part": largest}
    print(json.dumps(told | {"gathered": most_gathered(tav, latents), "latents": latents.nbytes}))


def most_gathered(tav: TuneAVideo, latents: np.ndarray) -> int:
    """Bytes of the largest array that one step of guided sampling, two prompts at once, gathers on a device."""
    halves, text = np.concatenate([latents] * 4), np.asarray(tav.encode_text(["", "", "blue", "red"]))
    with programs.running(np.float32, tav.mesh):
        compiled = programs.call_unet.lower(tav.components.unet, halves, np.full(4, 500, np.int32), text).compile()
    found = collectives.read(compiled.as_text(), jax.device_count())
    return max((one.bytes for one in found if one.kind == "all-gather"), default=0)


def largest_part(tav: TuneAVideo) -> float:
    """Two steps with `fsdp`: of the trained arrays that can be cut, the largest share that one device holds after."""
    posterior = tav.posterior(np.zeros((tav.mesh.size, 32, 32, 3), np.uint8))
    learner, advance = tav.tuning(posterior, tav.encode_text("red"), fsdp=True)
    for step in range(2):
        learner, report = advance(learner, step)
    assert np.isfinite(report.loss)
    arrays = [x for x in jax.tree.leaves(learner) if any(n % tav.mesh.size == 0 for n in x.shape)]
    return max(x.addressable_shards[0].data.size / x.size for x in arrays)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4], **json.loads(sys.argv[5]))

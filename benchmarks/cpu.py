"""Seconds and peak memory on a CPU, in float32: ours, and the official PyTorch code beside it.

python benchmarks/cpu.py --size=small --rounds=5
python benchmarks/cpu.py --size=sd14 --rounds=1 --official=Tune-A-Video --official-python=old/bin/python

`small` is the tiny pipeline of the tests, 8 frames of 64×64; `sd14` is Stable Diffusion 1.4 at its full size with random
weights, written once into --cache (4.1 GiB), 2 frames of 128×128. `--official` is a checkout of the official code,
`--official-python` an interpreter that can run it (diffusers 0.11, accelerate, einops, imageio; torchvision is not needed).

Every measurement is a fresh process, so that its peak memory is its own; the two sides take turns, round by round. Each
process prints one line of JSON to the standard error's log; the table goes to the standard output. Both sides say what
they computed (how many parameters, how many trained tensors, the spread of the last latents), and must agree on it.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SMALL = Path(__file__).parent.parent / "tests" / "reference" / "sd1" / "model"
PROMPT, GUIDANCE = "a man is skiing", 7.5
TRAINABLE = ("attn1.to_q", "attn2.to_q", "attn_temp")


class Size(NamedTuple):
    frames: int
    pixels: int  # a frame's side
    walk: int  # DDIM steps in one inversion or sampling
    repeat: int  # calls after the first one; their median is the steady time
    jobs: tuple[str, ...]


SIZES = {
    "small": Size(8, 64, walk=10, repeat=5, jobs=("import", "load", "tune", "invert", "sample")),
    "sd14": Size(2, 128, walk=2, repeat=2, jobs=("import", "load", "tune", "tune-remat", "invert", "sample")),
}
NAMES = {
    "import": "import",
    "load": "load",
    "tune": "tune",
    "tune-remat": "tune, our remat on",
    "invert": "inversion",
    "sample": "guided sampling",
}
INSTEAD = {"tune-remat": "tune"}  # what of the official side a job is compared with that only we have

Job = Callable[[], Any]  # one call of what is measured; gives the number on which both sides must agree


# ------------------------------------------------------------------------------------------- in a measured process


def ours(job: str, model: Path, size: Size) -> Job:
    if job == "import":
        return lambda: __import__("transformers").CLIPTokenizer and __import__("tav_jax").TuneAVideo and 0
    import jax
    import jax.numpy as jnp
    from transformers import CLIPTokenizer  # noqa: F401  ours imports it late; here it is no part of loading

    from tav_jax import TuneAVideo, programs

    if job == "load":

        def load() -> int:
            tav = TuneAVideo.from_pretrained(model, dtype="float32")
            networks = (tav.parts.unet, tav.parts.vae, tav.parts.text_encoder)
            assert tav.tokenizer
            return sum(x.size for x in jax.tree.leaves(networks))

        return load

    tav = TuneAVideo.from_pretrained(model, dtype="float32")
    latents = jnp.asarray(start(size, tav.parts.vae.config.downsampling))
    if job.startswith("tune"):
        posterior = latents, jnp.zeros_like(latents)
        learner, advance = tav.tuning(posterior, tav.encode_text(PROMPT), remat=job == "tune-remat")
        count = itertools.count()

        def step() -> int:
            nonlocal learner
            learner, _ = jax.block_until_ready(advance(learner, next(count)))
            return len(jax.tree.leaves(learner.trained))

        return step

    sampling = job == "sample"
    text = tav.encode_text(["", PROMPT] if sampling else "")
    ladder = tav.schedule.sampling(size.walk) if sampling else tav.schedule.inversion(size.walk)

    def walk() -> float:
        last, _ = programs.walk_latents(
            tav.parts.unet,
            latents,
            text,
            ladder,
            jnp.float32(GUIDANCE),
            prediction=tav.schedule.prediction,
            use_guidance=sampling,
            trajectory=False,
            report=None,
        )
        return float(last.std())

    return walk


def official(job: str, model: Path, size: Size, checkout: Path) -> Job:
    """The official training script's own lines, and its own inversion and pipeline."""
    sys.path.insert(0, str(checkout))
    if job == "import":
        return lambda: load_official() and 0
    api = load_official()
    if job == "load":
        return lambda: sum(p.numel() for part in parts_of(api, model) for p in part.parameters())

    import torch

    text_encoder, vae, unet = parts_of(api, model)
    pipe = api.TuneAVideoPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=api.CLIPTokenizer.from_pretrained(model, subfolder="tokenizer"),
        unet=unet,
        scheduler=api.DDIMScheduler.from_pretrained(model, subfolder="scheduler"),
    )
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(start(size, pipe.vae_scale_factor)).permute(0, 4, 1, 2, 3).contiguous()
    with torch.no_grad():
        unconditional, conditional = (pipe._encode_prompt(text, "cpu", 1, False, None) for text in ("", PROMPT))

    if job == "tune":
        return official_step(api, model, unet, latents, conditional)

    # Text and pictures are no part of a step: both sides have encoded the one before, and leave the other out.
    api.util.init_prompt = lambda prompt, pipeline: torch.cat([unconditional, unconditional])
    pipe._encode_prompt = lambda *args: torch.cat([unconditional, conditional])
    pipe.decode_latents = lambda latents: latents.numpy()
    pipe.scheduler.set_timesteps(size.walk)

    def invert() -> float:
        return float(api.util.ddim_inversion(pipe, pipe.scheduler, latents, size.walk)[-1].std(correction=0))

    def sample() -> float:
        shape = {"video_length": size.frames, "height": size.pixels, "width": size.pixels}
        last = pipe(PROMPT, latents=latents, num_inference_steps=size.walk, guidance_scale=GUIDANCE, **shape).videos
        return float(last.std(correction=0))

    return {"invert": invert, "sample": sample}[job]


def load_official() -> types.SimpleNamespace:
    """What the official code is made of."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer
    from tuneavideo.models.unet import UNet3DConditionModel
    from tuneavideo.pipelines.pipeline_tuneavideo import TuneAVideoPipeline

    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))  # imported for GIF grids, which none makes
    from tuneavideo import util

    util.tqdm = iter  # no progress bar
    return types.SimpleNamespace(**locals())


def parts_of(api: types.SimpleNamespace, model: Path) -> tuple[Any, Any, Any]:
    """Text encoder, VAE and UNet, as the training script loads and freezes them; an inflated UNet is read as it is."""
    api.CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    text_encoder = api.CLIPTextModel.from_pretrained(model, subfolder="text_encoder")
    vae = api.AutoencoderKL.from_pretrained(model, subfolder="vae")
    unet = api.UNet3DConditionModel.from_pretrained(model, subfolder="unet")
    for part in (text_encoder, vae, unet):
        part.requires_grad_(False)
    return text_encoder, vae, unet


def official_step(api: types.SimpleNamespace, model: Path, unet: Any, latents: Any, text: Any) -> Job:
    import torch
    import torch.nn.functional as F

    schedule = api.DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    for name, module in unet.named_modules():
        if name.endswith(TRAINABLE):
            module.requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-5, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    unet.train()

    def step() -> int:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.num_train_timesteps, (1,)).long()
        noisy = schedule.add_noise(latents, noise, timesteps)
        loss = F.mse_loss(unet(noisy, timesteps, text).sample.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return sum(p.requires_grad for p in unet.parameters())

    return step


def start(size: Size, factor: int) -> Any:
    """The same latents for everybody, [1, F, h, w, 4]."""
    import numpy as np

    side = size.pixels // factor
    return np.random.default_rng(0).normal(size=(1, size.frames, side, side, 4)).astype(np.float32)


def measure(side: str, job: str, model: Path, size: Size, checkout: Path | None) -> dict[str, Any]:
    """Run one job here. The first call apart, for it compiles or warms up; a walk's times are per step."""
    call = ours(job, model, size) if side == "ours" else official(job, model, size, checkout)
    steps = size.walk if job in ("invert", "sample") else 1
    first, computed = clock(call)
    later = [clock(call)[0] / steps for _ in range(0 if job in ("import", "load") else size.repeat)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    steady = statistics.median(later) if later else None
    return {"side": side, "job": job, "first": first, "steady": steady, "peak": peak, "computed": computed}


def clock(call: Job) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def write_sd14(model: Path) -> None:
    """Stable Diffusion 1.4 in shape: fresh weights, the tiny model's vocabulary, an inflated UNet that both sides read."""
    from flax import nnx

    from tav_jax import layout, models, weights

    unet, vae, text = models.UNetConfig.sd1(), models.VAEConfig(), models.ClipTextConfig.sd1()
    configs = dict(layout.Layout.open(SMALL).configs)
    configs["unet"] = {"cross_attention_dim": 768, "attention_head_dim": 8}
    configs["vae"] |= {"block_out_channels": vae.block_out_channels, "layers_per_block": 2, "norm_num_groups": 32}
    configs["vae"] |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    configs["text_encoder"] |= vars(text)
    networks = (models.UNet(unet, rngs=nnx.Rngs(0)), models.VAE(vae, rngs=nnx.Rngs(1)))
    networks += (models.ClipText(text, rngs=nnx.Rngs(2)),)
    shape = layout.Layout(SMALL, {}, configs, unet, vae, text)
    weights.save(weights.Pipeline(shape, *networks, old_vae_names=True, fingerprint=""), model)


# ------------------------------------------------------------------------------------------------- in the parent


def rounds(arguments: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """All measurements, the sides in turn, and in the other order every second round."""
    sides = {"ours": sys.executable} | ({"official": arguments.official_python} if arguments.official else {})
    jobs = [job for job in SIZES[arguments.size].jobs if not arguments.jobs or job in arguments.jobs.split(",")]
    results = []
    for number in range(arguments.rounds):
        for job in jobs:
            for side in list(sides)[:: -1 if number % 2 else 1]:
                if side == "ours" or job not in INSTEAD:
                    results.append(child(sides[side], f"{side}:{job}", arguments, model))
                    print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    for job in jobs:
        agree(job, [result["computed"] for result in results if result["job"] == job])
    return results


def child(python: str, what: str, arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    # This parent imports nothing large: a process starts with its parent's peak for its own.
    command = [python, __file__, f"--measure={what}", f"--size={arguments.size}", f"--model={model}"]
    command += [f"--{name}={value}" for name in ("official", "cores") if (value := getattr(arguments, name))]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def agree(job: str, values: list[float]) -> None:
    if max(values) - min(values) > 1e-3 * abs(max(values)):
        sys.exit(f"{job}: the sides did not compute the same: {sorted(set(values))}")


def table(results: list[dict[str, Any]], size: Size) -> str:
    """Markdown: median (smallest–largest), and the official side's median over ours."""
    lines = ["| | ours | official | official ÷ ours |", "|---|---|---|---|"]
    first = {"invert": f"first {size.walk} steps, s", "sample": f"first {size.walk} steps, s"}
    for job in dict.fromkeys(result["job"] for result in results):
        for key, what in (
            ("first", first.get(job, "first step, s" if "tune" in job else "s")),
            ("steady", "a step, s"),
            ("peak", "peak, GiB"),
        ):
            ours_, theirs = (
                [r[key] for r in results if r["side"] == side and r["job"] == job_]
                for side, job_ in (("ours", job), ("official", INSTEAD.get(job, job)))
            )
            if ours_[0] is not None:
                ratio = f"{statistics.median(theirs) / statistics.median(ours_):.2f}" if theirs else "–"
                lines.append(f"| {NAMES[job]}: {what} | {spread(ours_)} | {spread(theirs)} | {ratio} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    median, low, high = (f"{x:#.3g}" for x in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low}–{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, help="use this many, by default all")
    parser.add_argument("--jobs", help="only these, with commas between them")
    parser.add_argument("--official", type=Path, help="checkout of the official code; without it only ours is measured")
    parser.add_argument("--official-python", default=sys.executable, help="interpreter that can run it")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "tav_jax_benchmark")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a child is asked to do: side:job, or write
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure == "write":
        return write_sd14(arguments.model)
    if arguments.measure:
        side, job = arguments.measure.split(":")
        # Both sides take as many threads as they may run on; on a busy machine torch's wait for each other, ours do not.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
        result = measure(side, job, arguments.model, SIZES[arguments.size], arguments.official)
        return print(json.dumps(result))
    model = SMALL
    if arguments.size == "sd14" and not (model := arguments.cache / "sd14").is_dir():
        subprocess.run([sys.executable, __file__, "--measure=write", f"--model={model}"], check=True)
    print(table(rounds(arguments, model), SIZES[arguments.size]))


if __name__ == "__main__":
    main()

"""Seconds and peak memory on a CPU, in float32, of this package and of the official PyTorch code.

python benchmarks/cpu.py --size=small --rounds=5
python benchmarks/cpu.py --size=sd14 --rounds=1 --official=Tune-A-Video --official-python=old/bin/python

`small` is the tiny pipeline of the tests, 8 frames of 64×64; `sd14` is Stable Diffusion 1.4 at its full size with
random weights, written once into --cache (4.5 GB), 2 frames of 128×128. `--official` is a checkout of the official
code, `--official-python` an interpreter that can run it (diffusers 0.11, accelerate, einops, imageio).

Every measurement is a separate process, so that its peak memory is its own. The two sides alternate, round by round.
Each measurement prints one line of JSON to standard error; the tables go to standard output. Both sides also report a
number that they computed (parameters, trained tensors, standard deviation of the last latents), and these must agree.

On a busy machine use `--cores=1` and the table of CPU seconds, which count only while the process runs.
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
    steps: int  # DDIM steps in one inversion or sampling
    repeat: int  # calls after the first one; their median is the steady time
    jobs: tuple[str, ...]


SIZES = {
    "small": Size(8, 64, steps=10, repeat=5, jobs=("load", "tune", "invert", "sample")),
    "sd14": Size(2, 128, steps=1, repeat=2, jobs=("load", "tune", "tune-remat", "invert", "sample")),
}
NAMES = {"tune-remat": "tune (ours with remat)", "invert": "inversion", "sample": "guided sampling"}
COMPARED = {"tune-remat": "tune"}  # the official job to compare with, where it has none of that name

Job = Callable[[], Any]  # the measured call; returns the number on which both sides must agree


# --------------------------------------------------------------------------------------------- the measured process


def ours(job: str, model: Path, size: Size) -> Job:
    import jax
    import jax.numpy as jnp
    from transformers import CLIPTokenizer  # noqa: F401  imported here so that loading does not include the import

    from tav_jax import TuneAVideo
    from tav_jax.diffusion import programs
    from tav_jax.diffusion.samplers import DDIM, LoopState
    from tav_jax.models import Conditioning
    from tav_jax.training.train_step import Hyperparameters, Posterior
    from tav_jax.training.trainer import Trainer

    def load() -> int:
        tav = TuneAVideo.from_pretrained(model, dtype="float32")
        assert tav.tokenizer
        return sum(
            x.size for x in jax.tree.leaves((tav.components.unet, tav.components.vae, tav.components.text_encoder))
        )

    if job == "load":
        return load
    tav = TuneAVideo.from_pretrained(model, dtype="float32")
    latents = jnp.asarray(start(size, tav.components.vae.config.downsampling))

    if job.startswith("tune"):
        posterior, remat = Posterior(latents, jnp.zeros_like(latents)), job == "tune-remat"
        trainer = Trainer(tav, posterior, tav.encode_text(PROMPT), hyper=Hyperparameters(), remat=remat)
        count = itertools.count()

        def step() -> int:
            trainer.state, _ = jax.block_until_ready(trainer.step_fn(trainer.state, next(count)))
            return len(jax.tree.leaves(trainer.state.params))

        return step

    guided = job == "sample"
    conditioning = Conditioning(tav.encode_text(["", PROMPT] if guided else ""))
    steps = tav.schedule.sampling_steps(size.steps) if guided else tav.schedule.inversion_steps(size.steps)
    options = {"prediction": tav.schedule.prediction, "use_guidance": guided, "trajectory": False}
    scale, sampler = jnp.float32(GUIDANCE), DDIM()

    def denoise() -> float:
        start = LoopState(sampler.init(latents))
        state, _ = programs.denoise_loop(
            tav.components.unet,
            start,
            conditioning,
            steps,
            scale,
            sampler=sampler,
            **options,
        )
        return float(state.latents.std())

    return denoise


def official(job: str, model: Path, size: Size, checkout: Path) -> Job:
    """The official training step, inversion and pipeline."""
    sys.path.insert(0, str(checkout))
    import torch
    from diffusers import DDIMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401  as above
    from tuneavideo.pipelines.pipeline_tuneavideo import TuneAVideoPipeline

    sys.modules.setdefault(
        "torchvision", types.ModuleType("torchvision")
    )  # imported for GIF grids, which are not used here
    from tuneavideo import util

    def load() -> int:
        parts = load_official(model)
        weights = [p for name in ("unet", "vae", "text_encoder") for p in parts[name].parameters()]
        for weight in weights:
            weight.sum()  # the file is memory-mapped, so weights are read when they are first used
        return sum(weight.numel() for weight in weights)

    if job == "load":
        return load
    pipe = TuneAVideoPipeline(
        **load_official(model), scheduler=DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    )
    latents = torch.from_numpy(start(size, pipe.vae_scale_factor)).permute(0, 4, 1, 2, 3).contiguous()
    with torch.no_grad():
        unconditional, conditional = (pipe._encode_prompt(text, "cpu", 1, False, None) for text in ("", PROMPT))
    if job == "tune":
        return official_step(model, pipe.unet, latents, conditional)

    # A step includes neither text encoding nor the VAE: text is encoded before, and latents are not decoded.
    util.tqdm = iter
    util.init_prompt = lambda prompt, pipeline: torch.cat([unconditional, unconditional])
    pipe._encode_prompt = lambda *_: torch.cat([unconditional, conditional])
    pipe.decode_latents = lambda latents: latents.numpy()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(size.steps)
    shape = {"video_length": size.frames, "height": size.pixels, "width": size.pixels}

    def invert() -> float:
        return float(util.ddim_inversion(pipe, pipe.scheduler, latents, size.steps)[-1].std(correction=0))

    def sample() -> float:
        last = pipe(PROMPT, latents=latents, num_inference_steps=size.steps, guidance_scale=GUIDANCE, **shape).videos
        return float(last.std(correction=0))

    return {"invert": invert, "sample": sample}[job]


def load_official(model: Path) -> dict[str, Any]:
    """Loaded and frozen as in the training script; the UNet on disk is already inflated."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer
    from tuneavideo.models.unet import UNet3DConditionModel

    parts = {
        "text_encoder": CLIPTextModel.from_pretrained(model, subfolder="text_encoder"),
        "vae": AutoencoderKL.from_pretrained(model, subfolder="vae"),
        "unet": UNet3DConditionModel.from_pretrained(model, subfolder="unet"),
    }
    for part in parts.values():
        part.requires_grad_(False)
    return parts | {"tokenizer": CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")}


def official_step(model: Path, unet: Any, latents: Any, text: Any) -> Job:
    import torch
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    for name, module in unet.named_modules():
        if name.endswith(TRAINABLE):
            module.requires_grad_(True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-5, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    unet.train()

    def step() -> int:
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, schedule.num_train_timesteps, (1,)).long()
        predicted = unet(schedule.add_noise(latents, noise, timesteps), timesteps, text).sample
        loss = torch.nn.functional.mse_loss(predicted.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return sum(p.requires_grad for p in unet.parameters())

    return step


def start(size: Size, factor: int) -> Any:
    """The same latents for both sides, [1, F, h, w, 4]."""
    import numpy as np

    side = size.pixels // factor
    return np.random.default_rng(0).normal(size=(1, size.frames, side, side, 4)).astype(np.float32)


def measure(side: str, job: str, model: Path, size: Size, checkout: Path) -> dict[str, Any]:
    """Run one job in this process. The first call, which compiles or warms up, is timed separately; the later times are
    for one step."""
    call = ours(job, model, size) if side == "ours" else official(job, model, size, checkout)
    steps = size.steps if job in ("invert", "sample") else 1
    first, computed = clock(call)
    later = [clock(call)[0] for _ in range(0 if job == "load" else size.repeat)]
    steady = {name: statistics.median(took[name] for took in later) / steps for name in first} if later else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    return {"side": side, "job": job, "first": first, "steady": steady, "peak": peak, "computed": computed}


def clock(call: Job) -> tuple[dict[str, float], Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return {"wall": time.perf_counter() - wall, "CPU": time.process_time() - cpu}, result


def write_sd14(model: Path) -> None:
    """A pipeline of Stable Diffusion 1.4's shapes: random weights, the tiny model's tokenizer, an inflated UNet."""
    from flax import nnx

    from tav_jax import models
    from tav_jax.io import diffusers_layout, export, weights

    unet, vae, text = models.UNetConfig.sd1(), models.VAEConfig(), models.ClipTextConfig.sd1()
    configs = dict(diffusers_layout.Layout.open(SMALL).configs)
    configs["unet"] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    configs["vae"] |= {"block_out_channels": vae.block_out_channels, "layers_per_block": 2, "norm_num_groups": 32}
    configs["vae"] |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    configs["text_encoder"] |= vars(text)
    kinds = ((models.UNet, unet), (models.VAE, vae), (models.ClipText, text))
    networks = [build(config, rngs=nnx.Rngs(seed)) for seed, (build, config) in enumerate(kinds)]
    shape = diffusers_layout.Layout(SMALL, configs, unet, vae, text)
    export.save(weights.Components(shape, *networks, old_vae_names=True, fingerprint=""), model)


# ------------------------------------------------------------------------------------------------ the parent process


def measure_all(arguments: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """All rounds. The sides alternate; every second round is in reverse order."""
    sides = {"ours": sys.executable} | ({"official": arguments.official_python} if arguments.official else {})
    results = []
    for number, job in itertools.product(range(arguments.rounds), SIZES[arguments.size].jobs):
        for side in list(sides)[:: -1 if number % 2 else 1]:
            if side == "ours" or job not in COMPARED:
                results.append(child(sides[side], f"{side}:{job}", arguments, model))
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
        computed = [result["computed"] for result in results if result["job"] == job]
        if max(computed) - min(computed) > 1e-3 * abs(max(computed)):
            sys.exit(f"{job}: the two sides computed different numbers: {sorted(set(computed))}")
    return results


def child(python: str, what: str, arguments: argparse.Namespace, model: Path) -> dict[str, Any]:
    # The parent imports nothing large, because a child process starts with its parent's peak memory.
    command = [python, __file__, f"--measure={what}", f"--size={arguments.size}", f"--model={model}"]
    command += [f"--{name}={value}" for name in ("official", "cores") if (value := getattr(arguments, name))]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(results: list[dict[str, Any]], size: Size, clock: str) -> str:
    """Markdown: median (smallest–largest) of the rounds, and the official side's median divided by ours."""
    lines = [f"| {clock} seconds | ours | official | official ÷ ours |", "|---|---|---|---|"]
    for job in dict.fromkeys(result["job"] for result in results):
        steps = 1 if "tune" in job else size.steps
        first = "" if job == "load" else f", first {steps} steps" if steps > 1 else ", first step"
        for key, what in (("first", f"{first}, s"), ("steady", ", a step, s"), ("peak", ", peak, GiB")):
            mine, theirs = (
                [r[key] if key == "peak" else r[key][clock] for r in results if (r["side"], r["job"]) == row and r[key]]
                for row in (("ours", job), ("official", COMPARED.get(job, job)))
            )
            if mine and (key != "peak" or clock == "wall"):
                ratio = f"{statistics.median(theirs) / statistics.median(mine):.2f}" if theirs else "–"
                lines.append(f"| {NAMES.get(job, job)}{what} | {spread(mine)} | {spread(theirs)} | {ratio} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):#.3g} ({min(values):#.3g}–{max(values):#.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, help="number of CPU cores for both sides (default: all)")
    parser.add_argument(
        "--official", type=Path, help="checkout of the official code; without it only this package is measured"
    )
    parser.add_argument("--official-python", default=sys.executable, help="interpreter that can run it")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "tav_jax_benchmark")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the job of a child process: side:job, or write
    parser.add_argument("--model", type=Path, default=SMALL, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.measure == "write":
        write_sd14(a.model)
    elif a.measure:
        os.sched_setaffinity(
            0, sorted(os.sched_getaffinity(0))[: a.cores]
        )  # before any import that reads the number of cores
        print(json.dumps(measure(*a.measure.split(":"), a.model, SIZES[a.size], a.official)))
    else:
        model = a.model if a.size == "small" else a.cache / a.size
        if not model.is_dir():
            subprocess.run([sys.executable, __file__, "--measure=write", f"--model={model}"], check=True)
        results = measure_all(a, model)
        print(table(results, SIZES[a.size], "wall"), table(results, SIZES[a.size], "CPU"), sep="\n\n")


if __name__ == "__main__":
    main()

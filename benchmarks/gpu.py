"""Stable Diffusion 1.4 at its full size on one GPU, in bfloat16: a step of tuning, of inversion, of guided sampling.

python benchmarks/gpu.py --rounds=3 --official=Tune-A-Video
python benchmarks/gpu.py --small --rounds=1                   (a small network, on whatever is here: does it run?)

The UNet's weights are random and made on the device; nothing is downloaded. Ours is measured with the plain attention
and with cuDNN's; `--official` is a checkout of the official PyTorch code, measured as it is and with PyTorch's fused
attention in place of its own. It needs diffusers 0.11 and einops beside torch (`--official-path` is a folder of them);
the parts of diffusers that it does not use are kept from being imported, so that other versions of transformers and
huggingface_hub do not matter.

Every measurement is a process of its own, and the ways take turns. The table has the median and the range of the
rounds, the share of the chip's peak that the counted operations make, the memory, and at the end what 500 steps of
tuning, and an edit (50 steps of inversion, 50 of guided sampling), come to; the paper says 10 minutes and 1 minute on
an A100. The text encoder and the autoencoder, a few seconds of either, are not part of it.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Dense bfloat16, operations a second, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "L4": 121e12, "4090": 165e12}
JOBS = {"tune": 1, "invert": 1, "sample": 2}  # and how many rows go through the network
WAYS = ("ours plain", "ours cudnn", "official", "official fused")
TRAINABLE = ("attn1.to_q", "attn2.to_q", "attn_temp")
REPEAT = 8  # steps after the first two

Step = Callable[[], Any]


# ---------------------------------------------------------------------------------------------------------- ours


def ours(kernel: str, job: str, a: argparse.Namespace) -> tuple[Step, float, Callable[[], float]]:
    """A step that waits for its end, how many operations it takes, and a look at the peak of memory."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from tav_jax.diffusion.samplers import guided
    from tav_jax.models import UNet, UNetConfig
    from tav_jax.plan import hlo
    from tav_jax.training import train_step

    config = UNetConfig.sd1()
    if a.small:
        config = UNetConfig(**SMALL, cross_attention_dim=64)
    config = type(config)(**{**vars(config), "kernel": kernel})
    wide = jnp.bfloat16
    graph, trained, frozen = nnx.split(
        nnx.eval_shape(lambda: UNet(config, dtype=wide, rngs=nnx.Rngs(0))), train_step.trainable_filter(), ...
    )
    keys = map(jax.random.key, itertools.count())

    def filled(tree: Any, dtype: Any) -> Any:
        def draw(x):
            return (jax.random.normal(next(keys), x.shape) / max(x.size // x.shape[-1], 1) ** 0.5).astype(dtype)

        return jax.tree.map(draw, tree)

    trained, frozen = filled(trained, jnp.float32), filled(frozen, wide)
    side = a.pixels // 8
    latents = jax.random.normal(next(keys), (1, a.frames, side, side, 4))
    text = jax.random.normal(next(keys), (JOBS[job], 77, config.cross_attention_dim))

    if job == "tune":
        learner = train_step.TrainState.create(trained)
        hyper = train_step.Hyperparameters(*(jnp.float32(x) for x in (3e-5, 1e-2, 1.0)))
        rest = (latents, jnp.ones_like(latents), text, jnp.linspace(0.999, 0.005, 1000), hyper)
        options = {"prediction": "epsilon", "remat": a.remat}
        arguments = (graph, learner, frozen, jax.random.key(0), jnp.int32(0), *rest)
        count = hlo.count_flops(train_step.tune_step.trace(*arguments, **options).jaxpr)

        def step() -> None:
            nonlocal learner
            learner, _ = jax.block_until_ready(
                train_step.tune_step(graph, learner, frozen, jax.random.key(0), jnp.int32(0), *rest, **options)
            )
    else:
        unet = nnx.merge(graph, trained, frozen)

        def network(unet, x, text):
            def denoise(x, t):
                return unet(x, jnp.full(x.shape[:1], t), text).astype(jnp.float32)

            level = jnp.float32(12.5)
            return (guided(denoise, level) if job == "sample" else denoise)(x, jnp.int32(500))

        run = jax.jit(network)
        count = hlo.count_flops(run.trace(unet, latents, text).jaxpr)

        def step() -> None:
            jax.block_until_ready(run(unet, latents, text))

    def peak() -> float:
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30

    return step, count, peak


SMALL = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_attention": (True, False),
    "up_attention": (False, True),
    "heads": (2, 4),
}


# ------------------------------------------------------------------------------------------------------ official


def official(kind: str, job: str, a: argparse.Namespace) -> tuple[Step, float, Callable[[], float]]:
    """The official network, in the official script's precision: mixed for tuning, half for the rest."""
    import torch

    hide_what_is_not_used(a)
    from tuneavideo.models.unet import UNet3DConditionModel

    if kind == "official fused":
        fuse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    if a.small:
        shape = {"sample_size": 8, "cross_attention_dim": 64, "block_out_channels": (32, 64), "layers_per_block": 1}
        shape |= {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "attention_head_dim": 2}
        shape |= {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}
    torch.manual_seed(0)
    unet = UNet3DConditionModel(**shape).to(device)
    side = a.pixels // 8
    latents = torch.randn(JOBS[job], 4, a.frames, side, side, device=device)
    text = torch.randn(JOBS[job], 77, shape["cross_attention_dim"], device=device)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    if job == "tune":
        unet.enable_gradient_checkpointing()
        unet.requires_grad_(False)
        for name, module in unet.named_modules():
            if name.endswith(TRAINABLE):
                module.requires_grad_(True)
        learned = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=3e-5, weight_decay=1e-2)
        unet.train()

        def step() -> None:
            with torch.autocast(device, torch.bfloat16):
                predicted = unet(latents, torch.tensor([500], device=device), text).sample
                loss = torch.nn.functional.mse_loss(predicted.float(), latents)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            wait()
    else:
        unet = unet.to(torch.bfloat16).eval()
        latents, text = latents.to(torch.bfloat16), text.to(torch.bfloat16)

        @torch.no_grad()
        def step() -> None:
            unet(latents, 500, text)
            wait()

    def peak() -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0

    return step, 0.0, peak


def hide_what_is_not_used(a: argparse.Namespace) -> None:
    """Diffusers 0.11 imports its pipelines when it finds transformers, and names that the hub's library has lost."""
    sys.path[:0] = [str(a.official), *([str(a.official_path)] if a.official_path else [])]
    import huggingface_hub

    for name in ("HfFolder", "Repository", "cached_download", "model_info", "whoami"):
        if not hasattr(huggingface_hub, name):
            setattr(huggingface_hub, name, types.SimpleNamespace())
    for name in ("transformers", "xformers", "flax", "jax", "accelerate", "onnxruntime"):
        sys.modules[name] = None  # type: ignore[assignment]


def fuse() -> None:
    """PyTorch's own fused attention where the official code multiplies, softens and multiplies."""
    import torch
    from diffusers.models.attention import CrossAttention

    def attention(self, query, key, value, attention_mask=None):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=self.scale)
        return self.reshape_batch_dim_to_heads(out)

    CrossAttention._attention = attention


# ---------------------------------------------------------------------------------------------------- measuring


def measure(way: str, job: str, a: argparse.Namespace) -> dict[str, Any]:
    side, _, kernel = way.partition(" ")
    step, count, peak = ours(kernel, job, a) if side == "ours" else official(way, job, a)
    begin = time.perf_counter()
    step()
    first = time.perf_counter() - begin
    step()
    times = []
    for _ in range(REPEAT):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    told = {"way": way, "job": job, "first": first, "seconds": statistics.median(times), "flops": count}
    return told | {"peak": peak(), "device": device_name()}


def device_name() -> str:
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "CPU"


def table(results: list[dict[str, Any]]) -> str:
    device = results[0]["device"]
    top = next((value for name, value in PEAKS.items() if name in device), None)
    lines = [
        f"{device}",
        "",
        "| | a step, ms | share of the peak | memory, GiB | first step, s |",
        "|---|---|---|---|---|",
    ]
    per: dict[tuple[str, str], float] = {}
    for job, way in itertools.product(JOBS, WAYS):
        of = [r for r in results if (r["job"], r["way"]) == (job, way)]
        if not of:
            continue
        if failed := [r["error"] for r in of if "error" in r]:
            lines.append(f"| {job}, {way} | {failed[0]} | | | |")
            continue
        times = [1000 * r["seconds"] for r in of]
        per[job, way] = statistics.median(times) / 1000
        count = max(r["flops"] for r in results if r["job"] == job and "flops" in r)
        share = f"{count / per[job, way] / top:.0%}" if top and count else "–"
        middle = f"{statistics.median(times):.1f} ({min(times):.1f}–{max(times):.1f})"
        memory, first = (statistics.median(r[name] for r in of) for name in ("peak", "first"))
        lines.append(f"| {job}, {way} | {middle} | {share} | {memory:.1f} | {first:.1f} |")
    lines += ["", "| | 500 steps of tuning, min | an edit, 50 + 50 steps, s |", "|---|---|---|"]
    for way in WAYS:
        if all((job, way) in per for job in JOBS):
            edit = 50 * (per["invert", way] + per["sample", way])
            lines.append(f"| {way} | {500 * per['tune', way] / 60:.1f} | {edit:.1f} |")
    return "\n".join(lines)


def child(way: str, job: str, given: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    line = [sys.executable, __file__, f"--measure={way}:{job}", *given]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
        said = (errors or ["no word of why"])[-1][:160]
        return {"way": way, "job": job, "error": said, "device": device_name()}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--remat", default="block")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="only these")
    parser.add_argument("--official", type=Path, help="a checkout of the official code")
    parser.add_argument("--official-path", type=Path, help="a folder with diffusers 0.11 and einops")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a child is asked for, way:job
    a = parser.parse_args()
    if a.small:
        a.frames, a.pixels = 4, 64
    if a.measure:
        print(json.dumps(measure(*a.measure.split(":"), a)))
        return
    ways = [w for w in a.ways or WAYS if a.official or not w.startswith("official")]
    results = []
    for number, job in itertools.product(range(a.rounds), JOBS):
        for way in ways[:: -1 if number % 2 else 1]:
            results.append(child(way, job, sys.argv[1:]))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()

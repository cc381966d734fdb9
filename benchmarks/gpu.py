"""Time and memory of Stable Diffusion 1.4 on one GPU in bfloat16: a step of tuning, of inversion, of guided sampling.

python benchmarks/gpu.py --rounds=3 --official=Tune-A-Video
python benchmarks/gpu.py --small --rounds=1                   (a small network on any device, to test the script)

The UNet's weights are random and generated on the device; nothing is downloaded. This package is measured with the
`plain` and the `cudnn` attention kernel. `--official` is a checkout of the official PyTorch code, which is measured
unchanged and with PyTorch's fused attention in place of its own. It needs diffusers 0.11 and einops beside torch
(`--official-path` is a directory with both). Parts of diffusers that it does not use are not imported, so that any
version of transformers and huggingface_hub can be installed.

Every measurement is a separate process, and the variants alternate. The table has the median and the range of the
rounds, the share of the peak FLOP/s, the memory, and the time of 500 steps of tuning and of an edit (50 steps of
inversion, 50 of guided sampling); the paper reports 10 minutes and 1 minute on an A100. The text encoder and the VAE,
a few seconds each, are not included.
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

# Peak dense bfloat16 FLOP/s, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "L4": 121e12, "4090": 165e12}
JOBS = {"tune": 1, "invert": 1, "sample": 2}  # with the batch size of the network
VARIANTS = ("ours plain", "ours cudnn", "official", "official fused")
TRAINABLE = ("attn1.to_q", "attn2.to_q", "attn_temp")
REPEAT = 8  # steps after the first two

Step = Callable[[], Any]


# ---------------------------------------------------------------------------------------------------------- ours


def ours(kernel: str, job: str, a: argparse.Namespace) -> tuple[Step, float, Callable[[], float]]:
    """A blocking step, its floating-point operations, and a function that reads the peak memory."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from tav_jax.diffusion.guidance import classifier_free_guidance, without_guidance
    from tav_jax.diffusion.network import unet_network
    from tav_jax.diffusion.schedule import Steps
    from tav_jax.models import Conditioning, UNet, UNetConfig
    from tav_jax.plan import hlo
    from tav_jax.training import train_step

    config = UNetConfig.sd1()
    if a.small:
        config = UNetConfig(**SMALL, cross_attention_dim=64)
    config = type(config)(**{**vars(config), "kernel": kernel})
    graph, trained, frozen = nnx.split(
        nnx.eval_shape(lambda: UNet(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))), train_step.trainable_filter(), ...
    )
    keys = map(jax.random.key, itertools.count())

    def random_weights(tree: Any, dtype: Any) -> Any:
        def sample(x):
            return (jax.random.normal(next(keys), x.shape) / max(x.size // x.shape[-1], 1) ** 0.5).astype(dtype)

        return jax.tree.map(sample, tree)

    trained, frozen = random_weights(trained, jnp.float32), random_weights(frozen, jnp.bfloat16)
    side = a.pixels // 8
    latents = jax.random.normal(next(keys), (1, a.frames, side, side, 4))
    text = jax.random.normal(next(keys), (JOBS[job], 77, config.cross_attention_dim))
    conditioning = Conditioning(text)

    if job == "tune":
        state = train_step.TrainState.create(trained)
        hyper = train_step.Hyperparameters(*(jnp.float32(x) for x in (3e-5, 1e-2, 1.0)))
        key, number, std = jax.random.key(0), jnp.int32(0), jnp.ones_like(latents)
        rest = (frozen, key, number, latents, std, conditioning, jnp.linspace(0.999, 0.005, 1000), hyper)
        options = {"prediction": "epsilon", "remat": a.remat, "fsdp": False}
        count = hlo.count_flops(train_step.tune_step.trace(graph, state, *rest, **options).jaxpr)

        def step() -> None:
            nonlocal state
            state, _ = jax.block_until_ready(train_step.tune_step(graph, state, *rest, **options))
    else:
        unet = nnx.merge(graph, trained, frozen)

        step_500 = Steps(*(jnp.float32(x) for x in (500, 0.3, 0.31, 25, 24)))

        def denoise(unet, x, conditioning):
            network = unet_network(unet)
            if job == "sample":
                denoiser = classifier_free_guidance(network, conditioning, jnp.float32(12.5))
            else:
                denoiser = without_guidance(network, conditioning)
            return denoiser(x, step_500, None)[0]

        run = jax.jit(denoise)
        count = hlo.count_flops(run.trace(unet, latents, conditioning).jaxpr)

        def step() -> None:
            jax.block_until_ready(run(unet, latents, conditioning))

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
    """The official network in the precision of the official script: mixed for tuning, half otherwise."""
    import torch

    hide_unused_imports(a)
    from tuneavideo.models.unet import UNet3DConditionModel

    if kind == "official fused":
        use_fused_attention()
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
        trained = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-5, weight_decay=1e-2)
        unet.train()

        def step() -> None:
            with torch.autocast(device, torch.bfloat16):
                predicted = unet(latents, torch.tensor([500], device=device), text).sample
                loss = torch.nn.functional.mse_loss(predicted.float(), latents)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
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


def hide_unused_imports(a: argparse.Namespace) -> None:
    """Diffusers 0.11 imports its pipelines if transformers is installed, and names that huggingface_hub has removed."""
    sys.path[:0] = [str(a.official), *([str(a.official_path)] if a.official_path else [])]
    import huggingface_hub

    for name in ("HfFolder", "Repository", "cached_download", "model_info", "whoami"):
        if not hasattr(huggingface_hub, name):
            setattr(huggingface_hub, name, types.SimpleNamespace())
    for name in ("transformers", "xformers", "flax", "jax", "accelerate", "onnxruntime"):
        sys.modules[name] = None  # type: ignore[assignment]


def use_fused_attention() -> None:
    """Replace the official attention (matmul, softmax, matmul) by PyTorch's fused attention."""
    import torch
    from diffusers.models.attention import CrossAttention

    def attention(self, query, key, value, attention_mask=None):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=self.scale)
        return self.reshape_batch_dim_to_heads(out)

    CrossAttention._attention = attention


# ---------------------------------------------------------------------------------------------------- measuring


def measure(variant: str, job: str, a: argparse.Namespace) -> dict[str, Any]:
    side, _, kernel = variant.partition(" ")
    step, count, peak = ours(kernel, job, a) if side == "ours" else official(variant, job, a)
    begin = time.perf_counter()
    step()
    first = time.perf_counter() - begin
    step()
    times = []
    for _ in range(REPEAT):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    result = {"variant": variant, "job": job, "first": first, "seconds": statistics.median(times), "flops": count}
    return result | {"peak": peak(), "device": device_name()}


def device_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "CPU"


def table(results: list[dict[str, Any]]) -> str:
    device = results[0]["device"]
    peak = next((value for name, value in PEAKS.items() if name in device), None)
    lines = [
        f"{device}",
        "",
        "| | a step, ms | share of the peak | memory, GiB | first step, s |",
        "|---|---|---|---|---|",
    ]
    seconds: dict[tuple[str, str], float] = {}
    for job, variant in itertools.product(JOBS, VARIANTS):
        rounds = [r for r in results if (r["job"], r["variant"]) == (job, variant)]
        if not rounds:
            continue
        if failed := [r["error"] for r in rounds if "error" in r]:
            lines.append(f"| {job}, {variant} | {failed[0]} | | | |")
            continue
        times = [1000 * r["seconds"] for r in rounds]
        seconds[job, variant] = statistics.median(times) / 1000
        count = max(r["flops"] for r in results if r["job"] == job and "flops" in r)
        share = f"{count / seconds[job, variant] / peak:.0%}" if peak and count else "–"
        middle = f"{statistics.median(times):.1f} ({min(times):.1f}–{max(times):.1f})"
        memory, first = (statistics.median(r[name] for r in rounds) for name in ("peak", "first"))
        lines.append(f"| {job}, {variant} | {middle} | {share} | {memory:.1f} | {first:.1f} |")
    lines += ["", "| | 500 steps of tuning, min | an edit, 50 + 50 steps, s |", "|---|---|---|"]
    for variant in VARIANTS:
        if all((job, variant) in seconds for job in JOBS):
            edit = 50 * (seconds["invert", variant] + seconds["sample", variant])
            lines.append(f"| {variant} | {500 * seconds['tune', variant] / 60:.1f} | {edit:.1f} |")
    return "\n".join(lines)


def child(variant: str, job: str, arguments: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    line = [sys.executable, __file__, f"--measure={variant}:{job}", *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
        message = (errors or ["no error message"])[-1][:160]
        return {"variant": variant, "job": job, "error": message, "device": device_name()}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--remat", default="block")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="only these variants")
    parser.add_argument("--official", type=Path, help="a checkout of the official code")
    parser.add_argument("--official-path", type=Path, help="a directory with diffusers 0.11 and einops")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the job of a child process, variant:job
    a = parser.parse_args()
    if a.small:
        a.frames, a.pixels = 4, 64
    if a.measure:
        print(json.dumps(measure(*a.measure.split(":"), a)))
        return
    variants = [w for w in a.variants or VARIANTS if a.official or not w.startswith("official")]
    results = []
    for number, job in itertools.product(range(a.rounds), JOBS):
        for variant in variants[:: -1 if number % 2 else 1]:
            results.append(child(variant, job, sys.argv[1:]))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()

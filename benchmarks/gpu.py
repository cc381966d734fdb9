"""Time and memory of Stable Diffusion 1.4 on one GPU in bfloat16: a step of tuning, of inversion, of guided sampling.

    pip install --target=official --no-deps diffusers==0.11.1 einops requests pillow importlib_metadata filelock regex
    python benchmarks/gpu.py --official=Tune-A-Video --official-path=official --out=gpu --budget=840
    python benchmarks/gpu.py --dry-run                            (a small network on the CPU, to test the script)

The UNet's weights are random; nothing is downloaded. `--official` is a checkout of the
official PyTorch code. It needs diffusers 0.11 and what that imports beside torch (`--official-path` is a directory with
them); on a machine without a network connection, carry both directories. Parts of diffusers that it does not use are
not imported, so that any version of transformers and huggingface_hub can be installed.

Variants:

- ours: with an attention kernel and a rematerialization policy; the default of a GPU is `cudnn`.
- official: unchanged, that is with plain attention.
- official efficient: with PyTorch's memory-efficient attention where the official configs have that of xformers: in
  spatial and cross-attention.
- official fused: with the fastest fused attention that PyTorch has for each shape, in all layers. An error if a shape
  would fall back to plain attention.

Jobs: `tune` trains all 112 tensors; `tune-up` only those of the middle and up blocks. The official script trains these,
because its re-entrant checkpointing gives the down blocks no gradient; in `tune`, its checkpointing is not re-entrant.

Every measurement is a separate process: the first two steps, then three times ten steps, dispatched one after the other
as a training loop does, of which the table has the median. The rows are measured in the order of ROWS, all of them once
before the second round; each is written to DIR/rows.jsonl and DIR/table.md as soon as it exists (`--out=DIR`). After
`--budget` seconds no other row is started. A row that runs out of memory is a result, too.

The share of the peak FLOP/s counts the work that a job needs: matrix products and convolutions of the forward and the
backward pass, no recomputation, the same for all variants. The table also has the time of 500 steps of tuning and of an
edit (50 steps of inversion, 50 of guided sampling); the paper reports 10 minutes and 1 minute on an A100. The text
encoder and the VAE, a few seconds each, are not included.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Peak dense bfloat16 FLOP/s, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "L4": 121e12, "4090": 165e12}
JOBS = {"tune": 1, "tune-up": 1, "invert": 1, "sample": 2}  # with the batch size of the network
ROWS = (
    ("ours cudnn none", "sample"),
    ("ours cudnn none", "tune"),
    ("official fused", "sample"),
    ("official fused", "tune-up"),
    ("ours cudnn none", "tune-up"),
    ("official efficient", "sample"),
    ("official efficient", "tune-up"),
    ("official", "sample"),
    ("official", "tune-up"),
    ("official fused", "tune"),
    ("ours cudnn block", "tune"),
    ("ours cudnn none", "invert"),
    ("official fused", "invert"),
    ("ours plain none", "sample"),
    ("ours plain none", "tune"),
    ("ours plain block", "tune"),
)
TRAINABLE = ("attn1.to_q", "attn2.to_q", "attn_temp")
REPEAT = 3  # timed runs
MAX_SECONDS = 300  # of a row, on a GPU

Steps = Callable[[int], Any]  # runs so many steps and waits for the last one


# ---------------------------------------------------------------------------------------------------------- ours


def our_network(job: str, kernel: str, small: bool) -> tuple[Any, ...]:
    """The config, and graph, trained and frozen weights as shapes."""
    import jax.numpy as jnp
    from flax import nnx

    from tav_jax.io import weights
    from tav_jax.models import UNet, UNetConfig
    from tav_jax.training.train_step import trainable_filter

    config = UNetConfig(**SMALL, cross_attention_dim=64) if small else UNetConfig.sd1()
    config = type(config)(**{**vars(config), "kernel": kernel})
    parts = ("mid", "up") if job == "tune-up" else ()
    unet = weights.abstract(UNet, config, jnp.bfloat16)
    return config, *nnx.split(unet, trainable_filter((*TRAINABLE, *parts)), ...)


def program(job: str, config: Any, graph: Any, trained: Any, frozen: Any, a: argparse.Namespace, remat: str) -> Any:
    """A jitted function of a carry and the other arguments, both as shapes, that returns the next carry first."""
    import jax
    import jax.numpy as jnp

    from tav_jax.diffusion.guidance import classifier_free_guidance, without_guidance
    from tav_jax.diffusion.network import unet_network
    from tav_jax.diffusion.schedule import Steps as Row
    from tav_jax.models import Conditioning
    from tav_jax.models.arguments import merge
    from tav_jax.training import train_step

    side = a.pixels // 8
    latents = jax.ShapeDtypeStruct((1, a.frames, side, side, 4), jnp.float32)
    conditioning = Conditioning(jax.ShapeDtypeStruct((JOBS[job], 77, config.cross_attention_dim), jnp.float32))
    if job.startswith("tune"):
        master = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), trained)
        state = jax.eval_shape(train_step.TrainState.create, master)

        def tune(state, frozen, latents, conditioning):
            hyper = train_step.Hyperparameters(*(jnp.float32(x) for x in (3e-5, 1e-2, 1.0)))
            rest = (jax.random.key(0), jnp.int32(0), latents, jnp.ones_like(latents), conditioning)
            rest = (*rest, jnp.linspace(0.999, 0.005, 1000), hyper)
            options = {"prediction": "epsilon", "remat": remat, "fsdp": False}
            return train_step.tune_step(graph, state, frozen, *rest, **options)

        return jax.jit(tune, donate_argnums=0), state, (frozen, latents, conditioning)

    def denoise(latents, trained, frozen, conditioning):
        network = unet_network(merge(graph, trained, frozen))
        row = Row(*(jnp.float32(x) for x in (500, 0.3, 0.31, 25, 24)))
        if job == "sample":
            denoiser = classifier_free_guidance(network, conditioning, jnp.float32(12.5))
        else:
            denoiser = without_guidance(network, conditioning)
        return denoiser(latents, row, None)

    return jax.jit(denoise), latents, (trained, frozen, conditioning)


def needed_flops(job: str, a: argparse.Namespace) -> float:
    """Of one step, without recomputation."""
    from tav_jax.kernels import attention
    from tav_jax.plan import hlo

    attention.MAX_SCORE_BYTES = 2**60  # else the scores are computed in parts, and again in the backward pass
    function, carry, rest = program(job, *our_network(job, "plain", a.small), a, "none")
    return hlo.count_flops(function.trace(carry, *rest).jaxpr)


def ours(variant: str, job: str, a: argparse.Namespace) -> tuple[Steps, Callable[[], float], int]:
    """The steps, a function that reads the peak memory in GiB, and the number of trained tensors."""
    import jax
    import numpy as np

    from tav_jax.models.arguments import FlatTree, unwrap
    from tav_jax.training import train_step

    _, kernel, remat = variant.split()
    network = our_network(job, "plain" if a.dry_run else kernel, a.small)
    function, carry, rest = program(job, *network, a, remat)
    values = np.random.default_rng(0).standard_normal(2**20, np.float32)  # repeated: one program for each shape is slow

    def sample(x: Any) -> Any:
        return jax.device_put((np.resize(values, x.shape) / max(x.size // x.shape[-1], 1) ** 0.5).astype(x.dtype))

    rest = jax.tree.map(sample, rest)
    if job.startswith("tune"):
        carry = train_step.TrainState.create(jax.tree.map(sample, carry.params))
    else:
        carry = sample(carry)
    flat = FlatTree(rest)  # as in the package, flattened once
    call = jax.jit(lambda carry, flat: function(carry, *unwrap(flat))[0], donate_argnums=0)

    def run(count: int) -> None:
        nonlocal carry
        for _ in range(count):
            carry = call(carry, flat)
        jax.block_until_ready(carry)

    def peak() -> float:
        return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30

    return run, peak, len(jax.tree.leaves(network[2])) if job.startswith("tune") else 0


SMALL = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_attention": (True, False),
    "up_attention": (False, True),
    "heads": (2, 4),
}


# ------------------------------------------------------------------------------------------------------ official


def official(variant: str, job: str, a: argparse.Namespace) -> tuple[Steps, Callable[[], float], int]:
    """The official network in the precision of the official script: mixed for tuning, half otherwise."""
    import torch

    hide_unused_imports(a)
    from tuneavideo.models.unet import UNet3DConditionModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    if a.small:
        shape = {"sample_size": 8, "cross_attention_dim": 64, "block_out_channels": (32, 64), "layers_per_block": 1}
        shape |= {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "attention_head_dim": 2}
        shape |= {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}
    torch.manual_seed(0)
    unet = UNet3DConditionModel(**shape).to(device)
    if variant != "official":
        use_fused_attention(unet, variant.split()[1], device)
    side = a.pixels // 8
    latents = torch.randn(JOBS[job], 4, a.frames, side, side, device=device)
    text = torch.randn(JOBS[job], 77, shape["cross_attention_dim"], device=device)
    trained: list[Any] = []

    if job.startswith("tune"):
        if job == "tune":
            checkpoint = torch.utils.checkpoint.checkpoint
            torch.utils.checkpoint.checkpoint = lambda *x, **kw: checkpoint(*x, **{**kw, "use_reentrant": False})
        unet.enable_gradient_checkpointing()
        unet.requires_grad_(False)
        for name, module in unet.named_modules():
            if name.endswith(TRAINABLE):
                module.requires_grad_(True)
        trained = [p for p in unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-5, weight_decay=1e-2)
        unet.train()
        with_gradient: set[int] = set()

        def step() -> None:
            with torch.autocast(device, torch.bfloat16):
                predicted = unet(latents, torch.tensor([500], device=device), text).sample
                loss = torch.nn.functional.mse_loss(predicted.float(), latents)
            loss.backward()
            if not with_gradient:
                with_gradient.update(i for i, p in enumerate(trained) if p.grad is not None)
                trained[:] = [trained[i] for i in sorted(with_gradient)]
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        step()
    else:
        unet = unet.to(torch.bfloat16).eval()
        latents, text = latents.to(torch.bfloat16), text.to(torch.bfloat16)

        @torch.no_grad()
        def step() -> None:
            unet(latents, 500, text)

    def run(count: int) -> None:
        for _ in range(count):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    def peak() -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0

    return run, peak, len(trained)


def hide_unused_imports(a: argparse.Namespace) -> None:
    """Diffusers 0.11 imports its pipelines if transformers is installed, and names that huggingface_hub has removed."""
    sys.path[:0] = [str(a.official), *([str(a.official_path)] if a.official_path else [])]
    import huggingface_hub

    for name in ("HfFolder", "Repository", "cached_download", "model_info", "whoami"):
        if not hasattr(huggingface_hub, name):
            setattr(huggingface_hub, name, types.SimpleNamespace())
    for name in ("transformers", "xformers", "flax", "jax", "accelerate", "onnxruntime"):
        sys.modules[name] = None  # type: ignore[assignment]


def use_fused_attention(unet: Any, kind: str, device: str) -> None:
    """Replace the official attention (matmul, softmax, matmul) by a kernel of PyTorch. Queries, keys and values have
    four dimensions: with three, PyTorch has no fused kernel."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backends = [SDPBackend.FLASH_ATTENTION]  # the only one on a CPU
    if device == "cuda":
        efficient = SDPBackend.EFFICIENT_ATTENTION
        backends = [efficient] if kind == "efficient" else [SDPBackend.CUDNN_ATTENTION, *backends, efficient]

    def attention(self, query, key, value, attention_mask=None):
        q, k, v = (x.unflatten(0, (-1, self.heads)) for x in (query, key, value))  # [B, heads, T, D]
        with sdpa_kernel(backends, set_priority=True):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attention_mask, scale=self.scale)
        return self.reshape_batch_dim_to_heads(out.flatten(0, 1))

    for name, module in unet.named_modules():
        if hasattr(module, "_attention") and not (kind == "efficient" and name.endswith("attn_temp")):
            module._attention = types.MethodType(attention, module)


# ---------------------------------------------------------------------------------------------------- measuring


def measure(variant: str, job: str, a: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    run, peak, tensors = (ours if variant.startswith("ours") else official)(variant, job, a)
    run(1)
    first = time.perf_counter() - begin
    run(1)
    times = []
    for _ in range(REPEAT):
        begin = time.perf_counter()
        run(a.steps)
        times.append((time.perf_counter() - begin) / a.steps)
    return {"seconds": statistics.median(times), "first": first, "peak": peak(), "tensors": tensors}


def device_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "CPU"


def table(results: list[dict[str, Any]], needed: dict[str, float], device: str) -> str:
    peak = next((value for name, value in PEAKS.items() if name in device), None)
    work = ", ".join(f"{job} {needed[job] / 1e12:.3g}" for job in needed)
    lines = [
        f"{device}; TFLOP that a step needs: {work}",
        "",
        "| | a step, ms | share of the peak | memory, GiB | trained tensors | first step, s |",
        "|---|---|---|---|---|---|",
    ]
    seconds: dict[tuple[str, str], float] = {}
    rows = sorted({(r["job"], r["variant"]) for r in results}, key=lambda row: (list(JOBS).index(row[0]), row[1]))
    for job, variant in rows:
        rounds = [r for r in results if (r["job"], r["variant"]) == (job, variant)]
        if not (done := [r for r in rounds if "error" not in r]):
            lines.append(f"| {job}, {variant} | {rounds[-1]['error']} | | | | |")
            continue
        times = [1000 * r["seconds"] for r in done]
        seconds[job, variant] = statistics.median(times) / 1000
        share = f"{needed[job] / seconds[job, variant] / peak:.0%}" if peak else "–"
        middle = f"{statistics.median(times):.1f} ({min(times):.1f}–{max(times):.1f})"
        memory, first = (statistics.median(r[name] for r in done) for name in ("peak", "first"))
        tensors = done[0]["tensors"] or ""
        lines.append(f"| {job}, {variant} | {middle} | {share} | {memory:.1f} | {tensors} | {first:.1f} |")
    lines += ["", "| | 500 steps of tuning, min | an edit, 50 + 50 steps, s |", "|---|---|---|"]
    for variant in dict.fromkeys(variant for _, variant in rows):
        if all((job, variant) in seconds for job in ("tune", "invert", "sample")):
            edit = 50 * (seconds["invert", variant] + seconds["sample", variant])
            lines.append(f"| {variant} | {500 * seconds['tune', variant] / 60:.1f} | {edit:.1f} |")
    return "\n".join(lines)


def child(*options: str, **environment: str) -> dict[str, Any]:
    """The JSON that a child process with these options prints last, or its error."""
    line = [sys.executable, __file__, *sys.argv[1:], *options]
    try:
        done = subprocess.run(
            line,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=None if "--dry-run" in line else MAX_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {MAX_SECONDS} s"}
    if not done.returncode:
        return json.loads(done.stdout.splitlines()[-1])
    if re.search("RESOURCE_EXHAUSTED|OutOfMemoryError|out of memory", done.stderr):
        return {"error": "out of memory"}
    errors = [line for line in done.stderr.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return {"error": (errors or [f"status {done.returncode}"])[-1][:160]}


def results(rows: list[tuple[str, str]], a: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All rows once, then all rows again. One that has failed is not repeated."""
    begin, failed = time.monotonic(), set()
    environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment["JAX_COMPILATION_CACHE_DIR"] = f"{tempfile.gettempdir()}/gpu-benchmark-{os.getuid()}"
    for number, (variant, job) in itertools.product(range(a.rounds), rows):
        if (variant, job) in failed:
            continue
        if time.monotonic() - begin > a.budget:
            return
        row = {"variant": variant, "job": job, "round": number} | child(f"--measure={variant}:{job}", **environment)
        failed |= {(variant, job)} if "error" in row else set()
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps of a timed run")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--out", type=Path, help="directory for rows.jsonl and table.md")
    parser.add_argument("--variants", nargs="+", choices=sorted({v for v, _ in ROWS}), help="only these variants")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, help="only these jobs")
    parser.add_argument("--official", type=Path, help="a checkout of the official code")
    parser.add_argument("--official-path", type=Path, help="a directory with diffusers 0.11 and what it imports")
    parser.add_argument("--small", action="store_true", help="a small network")
    parser.add_argument("--dry-run", action="store_true", help="a small network on the CPU, without kernels, one round")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a child process does: variant:job
    parser.add_argument("--count", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.dry_run:
        a.small, a.rounds, a.steps, os.environ["JAX_PLATFORMS"] = True, 1, 1, "cpu"
    if a.small:
        a.frames, a.pixels = 4, 64
    if a.count:
        print(json.dumps({job: needed_flops(job, a) for job in JOBS}))
        return
    if a.measure:
        print(json.dumps(measure(*a.measure.split(":"), a)))
        return
    rows = [
        (variant, job)
        for variant, job in ROWS
        if (a.official or variant.startswith("ours"))
        and variant in (a.variants or [variant])
        and job in (a.jobs or JOBS)
    ]
    needed, device, found = child("--count", JAX_PLATFORMS="cpu"), device_name(), []
    for row in results(rows, a):
        found.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        if a.out:
            a.out.mkdir(parents=True, exist_ok=True)
            with (a.out / "rows.jsonl").open("a") as file:
                file.write(json.dumps(row | {"device": device}) + "\n")
            (a.out / "table.md").write_text(table(found, needed, device) + "\n")
    print(table(found, needed, device))


if __name__ == "__main__":
    main()

"""Stable Diffusion 1.4 and 2.1 at full size with random weights, compared with Diffusers and transformers."""

import gc
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, difference

from tav_jax.io import diffusers_layout, weights
from tav_jax.io.diffusers_layout import Layout
from tav_jax.models import VAE, ClipText, Conditioning, UNet

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="the oracle, CPU torch, is not installed")
diffusers = pytest.importorskip("diffusers", reason="the oracle, diffusers, is not installed")
transformers = pytest.importorskip("transformers")

FAMILIES = {
    "sd14": {
        "unet": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "act": "quick_gelu",
        "parameters": 909_120_004,
    },
    "sd21": {
        "unet": {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "text": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
        "act": "gelu",
        "parameters": 915_509_764,
    },
}


def normal(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """A pipeline directory in half precision, and the torch modules that it was saved from."""
    settings = FAMILIES[request.param]
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(block_out_channels=(320, 640, 1280, 1280), **settings["unet"])
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=49408, hidden_act=settings["act"], **settings["text"])
    )
    theirs = {"unet": unet, "vae": vae, "text_encoder": text}
    for part, module in theirs.items():
        module.half().save_pretrained(root / part)
        module.float().eval()
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(REFERENCE / "sd1" / "model" / part, root / part)
    yield root, theirs, settings
    del unet, vae, text, theirs
    gc.collect()


def load(root, part, build, read_config):
    """A component in float32."""
    path = root / part / "config.json"
    module = weights.abstract(build, read_config(json.loads(path.read_text()), path), jnp.float32)
    weights.fill(module, weights.Source(Layout.open(root)), part, lambda path: jnp.float32)
    return module


def test_the_inflated_unet_on_one_frame_is_the_2d_unet(family):
    root, theirs, settings = family
    unet = load(root, "unet", UNet, diffusers_layout.unet_config)
    assert sum(leaf.size for leaf in jax.tree.leaves(unet)) == settings["parameters"]
    x, text = normal(1, 16, 24, 4), normal(1, 77, unet.config.cross_attention_dim, seed=1)
    with torch.no_grad():
        expected = theirs["unet"](torch.tensor(x).permute(0, 3, 1, 2), 321, torch.tensor(text)).sample
    conditioning = Conditioning(jnp.asarray(text))
    ours = jax.jit(lambda m, *args: m(*args))(unet, jnp.asarray(x)[:, None], jnp.array([321]), conditioning)
    assert difference(ours[:, 0], expected.permute(0, 2, 3, 1)) <= 1e-5


def test_the_vae(family):
    root, theirs, _ = family
    vae = load(root, "vae", VAE, diffusers_layout.vae_config)
    pixels, latents = normal(1, 64, 96, 3), normal(1, 8, 12, 4)
    with torch.no_grad():
        mean = theirs["vae"].encode(torch.tensor(pixels).permute(0, 3, 1, 2)).latent_dist.mean
        decoded = theirs["vae"].decode(torch.tensor(latents).permute(0, 3, 1, 2)).sample
    assert difference(jax.jit(lambda m, x: m.encode(x).mean)(vae, pixels), mean.permute(0, 2, 3, 1)) <= 1e-4
    assert difference(jax.jit(lambda m, x: m.decode(x))(vae, latents), decoded.permute(0, 2, 3, 1)) <= 1e-4


def test_the_text_encoder(family):
    root, theirs, _ = family
    text = load(root, "text_encoder", ClipText, diffusers_layout.text_config)
    ids = np.random.default_rng(0).integers(0, 49408, (2, 77))
    with torch.no_grad():
        expected = theirs["text_encoder"](torch.tensor(ids)).last_hidden_state
    assert difference(jax.jit(lambda m, x: m(x))(text, ids), expected) <= 1e-5


def test_peak_memory_of_loading_is_at_most_1_3_times_the_weights(family):
    """The peak resident size of a separate process that loads in bfloat16."""
    code = f"""
import json, re, jax
from tav_jax import TuneAVideo
def peak():  # `ru_maxrss` would be at least that of the process that started this one
    return int(re.search("VmHWM:(.+)kB", open("/proc/self/status").read())[1]) * 1024
import tav_jax.pipeline, transformers
jax.numpy.ones(3).block_until_ready()
before = peak()
tav = TuneAVideo.from_pretrained({str(family[0])!r}, dtype="bfloat16")
parts = tav.components
size = sum(x.nbytes for part in (parts.unet, parts.vae, parts.text_encoder) for x in jax.tree.leaves(part))
print(json.dumps([peak() - before, size]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rise, size = json.loads(done.stdout.splitlines()[-1])
    assert size > 2e9
    assert rise <= 1.3 * size, f"loading took {rise / 1e9:.2f} GB for {size / 1e9:.2f} GB of weights"

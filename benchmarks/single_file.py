"""Loading single files of Stable Diffusion's full size: equality with Diffusers' converters, and the peak of memory.

python benchmarks/single_file.py sd1 /tmp/files
python benchmarks/single_file.py sd2 /tmp/files --suffix=.ckpt

Writes a file of random half-precision weights in the original layout into the directory, unless it is there, converts
it with Diffusers, loads it in bfloat16 in another process, and compares all tensors. docs/WEIGHTS.md has the figures.
"""

import argparse
import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

LOAD = """
import json, re, sys, time
import jax, torch, transformers
import tav_jax.pipeline
from tav_jax.io import weights
from tav_jax import TuneAVideo
def peak():  # `ru_maxrss` would be at least that of the process that started this one
    return int(re.search("VmHWM:(.+)kB", open("/proc/self/status").read())[1]) * 1024
jax.numpy.ones(3).block_until_ready()
before, start = peak(), time.perf_counter()
tav = TuneAVideo.from_pretrained(sys.argv[1], dtype="bfloat16", config=sys.argv[2])
used, seconds = peak() - before, time.perf_counter() - start
parts, digests = {part: getattr(tav.components, part) for part in ("unet", "vae", "text_encoder")}, {}
size = sum(x.nbytes for part in parts.values() for x in jax.tree.leaves(part))
import numpy as np, zlib
for part, module in parts.items():
    for name, x in weights.torch_tensors(module, part).items():
        digests[f"{part} {name}"] = zlib.crc32(np.ascontiguousarray(x.astype(np.float32)))
print(json.dumps([used, size, seconds, digests]))
"""


def configs(family: str, directory: Path) -> Path:
    """A directory with the configs of Stable Diffusion and the tokenizer of the tests."""
    import shutil

    from conftest import REFERENCE

    from tav_jax.io.single_file import STABLE_DIFFUSION

    root = directory / f"{family}-configs"
    shutil.copytree(REFERENCE / "sd1/model/tokenizer", root / "tokenizer", dirs_exist_ok=True)
    for part, config in STABLE_DIFFUSION[family].items():
        (root / part).mkdir(exist_ok=True)
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        (root / part / name).write_text(json.dumps(config))
    return root


def random_tensors(root: Path) -> dict[str, dict[str, np.ndarray]]:
    """Half-precision tensors of the pipeline under Diffusers' names."""
    import jax.numpy as jnp

    from tav_jax.io import weights
    from tav_jax.io.diffusers_layout import Layout
    from tav_jax.models import VAE, ClipText, UNet

    layout, tables = Layout.open(root), {}
    for part, build in (("unet", UNet), ("vae", VAE), ("text_encoder", ClipText)):
        variables = weights.flat(weights.nnx.state(weights.abstract(build, getattr(layout, part), jnp.float32)))
        tables[part] = {}
        for path, variable in variables.items():
            if not weights.TEMPORAL.fullmatch(path):
                shape = weights.to_torch(np.broadcast_to(0.0, variable.shape), path).shape
                name = weights.diffusers_name(part, path)
                values = np.random.default_rng(zlib.crc32(name.encode())).random(shape, np.float32)
                tables[part][name] = values.astype(np.float16)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=["sd1", "sd2"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--suffix", choices=[".safetensors", ".ckpt"], default=".safetensors")
    options = parser.parse_args()
    import original_layout
    import torch
    from diffusers.loaders import single_file_utils as utils
    from safetensors.numpy import save_file
    from safetensors.torch import load_file

    root = configs(options.family, options.directory)
    file = options.directory / f"{options.family}{options.suffix}"
    config = {part: json.loads((root / part / "config.json").read_text()) for part in ("unet", "vae", "text_encoder")}
    if not file.exists():
        tensors = original_layout.in_original_layout(random_tensors(root), config)
        tensors = {name: x.astype(np.float16) if x.dtype == np.float32 else x for name, x in tensors.items()}
        if options.suffix == ".ckpt":
            torch.save({"state_dict": {name: torch.tensor(x) for name, x in tensors.items()}}, file)
        else:
            save_file(tensors, file)
        del tensors

    command = [sys.executable, "-c", LOAD, str(file), str(root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    used, size, seconds, ours = json.loads(done.stdout.splitlines()[-1])
    print(f"{file.name}: peak {used / 2**30:.2f} GiB, weights {size / 2**30:.2f} GiB, factor {used / size:.2f}")
    print(f"{seconds:.0f} s for {file.stat().st_size / 2**30:.2f} GiB")

    table = load_file(file) if options.suffix == ".safetensors" else torch.load(file, mmap=True)["state_dict"]
    theirs = {"unet": utils.convert_ldm_unet_checkpoint(dict(table), config["unet"])}
    theirs["vae"] = utils.convert_ldm_vae_checkpoint(dict(table), config["vae"])
    if options.family == "sd1":
        theirs["text_encoder"] = utils.convert_ldm_clip_checkpoint(table)
    else:
        from types import SimpleNamespace

        model = SimpleNamespace(config=SimpleNamespace(hidden_size=config["text_encoder"]["hidden_size"]))
        theirs["text_encoder"] = utils.convert_open_clip_checkpoint(model, table)
    unused = ("text_encoder text_model.embeddings.position_ids", "text_encoder text_projection.weight")
    digests = {
        f"{part} {name}": zlib.crc32(np.ascontiguousarray(x.to(torch.bfloat16).float().numpy()))
        for part, tensors in theirs.items()
        for name, x in tensors.items()
        if f"{part} {name}" not in unused
    }
    trained = ("attn1.to_q.weight", "attn2.to_q.weight")  # these are loaded in float32
    digests |= {
        f"unet {name}": zlib.crc32(np.ascontiguousarray(x.float().numpy()))
        for name, x in theirs["unet"].items()
        if name.endswith(trained)
    }
    ours = {name: digest for name, digest in ours.items() if "_temp." not in name}
    different = [name for name in ours | digests if ours.get(name) != digests.get(name)]
    print(f"{len(digests)} tensors of Diffusers, {len(ours)} of ours, {len(different)} differ: {different[:5]}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()

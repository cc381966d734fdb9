"""`tav plan` with the TPU's own compiler, for a TPU that is not there: memory, and what the chips tell each other."""

import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from conftest import LOOKING_THERE, REFERENCE, with_libtpu
from flax import nnx

from tav_jax.io import diffusers_layout
from tav_jax.models import UNet
from tav_jax.training import train_step

GIB = 2**30
MODEL = REFERENCE / "sd1/model"


def tav_plan(model, folder, *arguments) -> SimpleNamespace:
    """In a process of its own, which has no say in the environment."""
    line = [sys.executable, "-m", "tav_jax", "plan", f"--config.model.path={model}", f"--cache={folder}"]
    sizes = [f"--config.clip.{name}={value}" for name, value in (("frames", 8), ("height", 32), ("width", 32))]
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    env = kept | LOOKING_THERE
    done = subprocess.run([*line, *sizes, *arguments], capture_output=True, text=True, env=env, timeout=900)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A pipeline's configs, and nothing else: two levels, four transformers."""
    root = tmp_path_factory.mktemp("small")
    shutil.copytree(MODEL, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    path = root / "unet/config.json"
    unet = json.loads(path.read_text()) | {
        "block_out_channels": [64, 64],
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
        "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
    }
    path.write_text(json.dumps(unet))
    return root


@with_libtpu
def test_tuning_compiles_for_one_chip_and_one_line_tells(small, tmp_path):
    options = ("--topology=v5e-1", "--json", "--function=tune")
    done = tav_plan(small, tmp_path, *options)
    assert done.code == 0, done.err
    (line,) = done.out.splitlines()
    told = json.loads(line)
    assert told["fits"] is True
    assert set(told["functions"]) == {"tune"}
    tune = told["functions"]["tune"]
    assert tune["hbm_bytes"] == int(15.75 * GIB)
    assert tune["collectives"] == {}
    parts = ("argument", "temporary", "output", "code", "beside")
    assert sum(tune[f"{name}_bytes"] for name in parts) == tune["peak_bytes"] < GIB
    # Frozen weights in bfloat16, trained ones and their two moments in float32. A chip keeps an array in tiles of
    # 8 × 128 values, which this model's narrow ones do not fill; the compiler may lay them out better than by rows.
    trained, frozen = weights_of(small)
    exact, tiled = (
        sum(12 * values(x) for x in trained) + sum(2 * values(x) for x in frozen) for values in (math.prod, in_tiles)
    )
    assert exact <= tune["argument_bytes"] <= tiled
    assert tune["beside_bytes"] == 0
    # Each argument is read at least once, and what VMEM keeps goes by no HBM.
    assert exact <= tune["moved_bytes"] <= tune["touched_bytes"]
    again = tav_plan(small, tmp_path, *options)
    assert (again.out, "compiling" in done.err, "compiling" in again.err) == (done.out, True, False)


def in_tiles(shape) -> int:
    *rest, rows, columns = (1, 1, *shape)
    return math.prod(rest) * -(-rows // 8) * 8 * -(-columns // 128) * 128


def weights_of(root) -> tuple[list, list]:
    """The shapes of the trained ones and of the frozen ones."""
    path = root / "unet/config.json"
    unet = nnx.eval_shape(
        lambda: UNet(diffusers_layout.unet_config(json.loads(path.read_text()), path), rngs=nnx.Rngs(0))
    )
    _, trained, frozen = nnx.split(unet, train_step.trainable_filter(), ...)
    return [x.shape for x in jax.tree.leaves(trained)], [x.shape for x in jax.tree.leaves(frozen)]


@with_libtpu
@pytest.mark.parametrize("name", ["invert", "sample"])
def test_over_eight_chips_each_attention_tells_its_neighbours_and_no_clip_is_gathered(small, tmp_path, name):
    done = tav_plan(small, tmp_path, "--topology=v5e:2x4", "--json", f"--function={name}")
    assert done.code == 0, done.err
    walk = json.loads(done.out)["functions"][name]
    told = {kind: one["times"] for kind, one in walk["collectives"].items()}
    transformers, steps = 4, walk["steps"]
    assert steps == 5
    # Frames are exchanged for positions before temporal attention, and back after it.
    assert told.pop("all-to-all") == 2 * transformers * steps
    # Keys and values of the frame before come from the neighbour.
    assert told.pop("collective-permute") <= 2 * transformers * steps
    # The result, once, after the last step: a tiny part of what one block's keys would be.
    assert told.pop("all-gather", 1) == 1
    assert walk["collectives"].get("all-gather", {"bytes": 0})["bytes"] <= 8 * 8 * 8 * 4 * 4
    # Frame 0 for all, and the statistics of group norms: two each for every resnet's two norms and the last.
    assert set(told) == {"all-reduce"}


@with_libtpu
def test_more_than_a_chip_has_is_told_in_bytes(small, tmp_path):
    sizes = ("--config.clip.frames=8000", "--config.clip.height=512", "--config.clip.width=512")
    done = tav_plan(small, tmp_path, "--topology=v5e-1", "--json", "--no-search", "--function=decode", *sizes)
    told = json.loads(done.out)
    decode = told["functions"]["decode"]
    assert (done.code, told["fits"], decode["fits"], decode["error"]) == (0, False, False, "")
    assert decode["peak_bytes"] >= 8000 * 512 * 512 * 3 * 4  # the pictures alone

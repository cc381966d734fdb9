"""`tav plan` with the real TPU compiler, without a TPU: memory and collectives of the compiled programs."""

import json
import math
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from conftest import REFERENCE, with_libtpu
from flax import nnx

from tav_jax.io import diffusers_layout
from tav_jax.models import UNet
from tav_jax.plan.chips import GIB
from tav_jax.training import train_step

MODEL = REFERENCE / "sd1/model"


def tav_plan(model, user_cache, *arguments) -> SimpleNamespace:
    """In its own process, without the environment variables that the tests set for JAX."""
    command = [sys.executable, "-m", "tav_jax", "plan", f"--config.model.path={model}"]
    sizes = [f"--config.clip.{name}={value}" for name, value in (("frames", 8), ("height", 32), ("width", 32))]
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    env |= {"XDG_CACHE_HOME": str(user_cache)}
    done = subprocess.run([*command, *sizes, *arguments], capture_output=True, text=True, env=env, timeout=900)
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A pipeline directory with the configs only: two levels, four transformers."""
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
@pytest.mark.slow
def test_memory_of_tuning_on_one_chip(small, tmp_path):
    options = ("--topology=v5e-1", "--json", "--function=tune", f"--cache={tmp_path}/reports")
    done = tav_plan(small, tmp_path, *options)
    assert done.code == 0, done.err
    (line,) = done.out.splitlines()
    content = json.loads(line)
    assert content["fits"] is True
    assert set(content["functions"]) == {"tune"}
    tune = content["functions"]["tune"]
    assert tune["hbm_bytes"] == int(15.75 * GIB)
    assert tune["collectives"] == {}
    parts = ("argument", "temporary", "output", "code", "beside")
    assert sum(tune[f"{name}_bytes"] for name in parts) == tune["peak_bytes"] < GIB
    # Frozen weights in bfloat16, trained weights and two moments in float32. A TPU pads arrays to tiles of 8 × 128, but
    # the compiler may choose a layout with less padding than the row-major one.
    trained, frozen = weight_shapes(small)
    exact, tiled = (
        sum(12 * values(x) for x in trained) + sum(2 * values(x) for x in frozen) for values in (math.prod, tiled_size)
    )
    assert exact <= tune["argument_bytes"] <= tiled
    assert tune["beside_bytes"] == 0
    # Every argument is read at least once; accesses to VMEM are not HBM traffic.
    assert exact <= tune["moved_bytes"] <= tune["touched_bytes"]
    again = tav_plan(small, tmp_path, *options)
    assert (again.out, "compiling" in done.err, "compiling" in again.err) == (done.out, True, False)
    assert len(list(tmp_path.glob("reports/*.json"))) == 1


def tiled_size(shape) -> int:
    *rest, rows, columns = (1, 1, *shape)
    return math.prod(rest) * -(-rows // 8) * 8 * -(-columns // 128) * 128


def weight_shapes(root) -> tuple[list, list]:
    """Of the trained and of the frozen weights."""
    path = root / "unet/config.json"
    unet_config = diffusers_layout.unet_config(json.loads(path.read_text()), path)
    unet = nnx.eval_shape(lambda: UNet(unet_config, rngs=nnx.Rngs(0)))
    _, trained, frozen = nnx.split(unet, train_step.trainable_filter(), ...)
    return [x.shape for x in jax.tree.leaves(trained)], [x.shape for x in jax.tree.leaves(frozen)]


@with_libtpu
@pytest.mark.parametrize("name", ["invert", "sample"])
def test_collectives_on_eight_chips(small, tmp_path, name):
    """Attention exchanges frames with other chips, and no clip is gathered."""
    done = tav_plan(small, tmp_path, "--topology=v5e:2x4", "--json", f"--function={name}")
    assert done.code == 0, done.err
    report = json.loads(done.out)["functions"][name]
    times = {kind: total["times"] for kind, total in report["collectives"].items()}
    transformers, steps = 4, report["steps"]
    assert steps == 5
    # Temporal attention: from sharded frames to sharded positions, and back.
    assert times.pop("all-to-all") == 2 * transformers * steps
    # Sparse-causal attention: keys and values of the previous frame.
    assert times.pop("collective-permute") <= 2 * transformers * steps
    # Only the result, after the last step: much smaller than the keys of one block.
    assert times.pop("all-gather", 1) == 1
    assert report["collectives"].get("all-gather", {"bytes": 0})["bytes"] <= 8 * 8 * 8 * 4 * 4
    # Keys and values of frame 0, and the statistics of group norms.
    assert set(times) == {"all-reduce"}


@with_libtpu
@pytest.mark.slow
def test_windows_on_eight_chips_need_the_memory_of_one_window(small, tmp_path):
    """Windows are sharded over the batch axis: chips exchange nothing within a window."""
    options = ("--topology=v5e:2x4", "--json", "--function=sample", "--config.mesh.data=8")
    reports = [
        json.loads(tav_plan(small, tmp_path, *options, *more).out)["functions"]["sample"]
        for more in (
            ("--config.edit.window=(4,2)", "--config.clip.frames=12"),
            ("--config.edit.window=(4,2)", "--config.clip.frames=48"),
            ("--config.clip.frames=48",),
        )
    ]
    short, long, whole = (report["temporary_bytes"] for report in reports)
    assert long <= short  # four times the frames
    assert long < whole
    assert not {"all-to-all", "collective-permute"} & set(reports[1]["collectives"])
    assert reports[1]["flops"] < reports[2]["flops"]


@with_libtpu
def test_a_program_that_does_not_fit_reports_how_much_it_needs(small, tmp_path):
    sizes = ("--config.clip.frames=8000", "--config.clip.height=512", "--config.clip.width=512")
    done = tav_plan(small, tmp_path, "--topology=v5e-1", "--json", "--no-search", "--function=decode", *sizes)
    content = json.loads(done.out)
    decode = content["functions"]["decode"]
    assert (done.code, content["fits"], decode["fits"], decode["error"]) == (0, False, False, "")
    assert decode["peak_bytes"] >= 8000 * 512 * 512 * 3 * 4  # the frames alone
    assert len(list(tmp_path.glob("tav_jax/plans/*.json"))) == 1

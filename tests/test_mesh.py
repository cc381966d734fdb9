"""Tuning, inversion and sampling on meshes of virtual devices equal one device."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tav_jax import InputError, TuneAVideo, config
from tav_jax.distributed import sharding
from tav_jax.distributed.sharding import default_mesh_shape

WORKER = Path(__file__).parent / "mesh_worker.py"


def numbers(folder: Path, case: str, mesh: tuple[int, int], frames: int, devices: int, **options) -> dict:
    out = folder / f"{case}-{mesh}-{frames}.npz"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    line = [sys.executable, str(WORKER), case, json.dumps(mesh), str(frames), str(out), json.dumps(options)]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as file:
        return dict(file) | json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One device's numbers, computed once for each number of frames."""
    folder, known = tmp_path_factory.mktemp("alone"), {}

    def of(frames: int) -> dict:
        if frames not in known:
            known[frames] = numbers(folder, "sd1", (1, 1), frames, 1, methods=frames == 6, fsdp=frames != 6)
        return known[frames]

    return of


def assert_same(ours: dict, theirs: dict, names: tuple[str, ...] = ()) -> None:
    for name in ("losses", "norms", "inverted", "edit", "other", *names):
        error = np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()
        assert error <= 1e-4, (name, error)
    assert np.abs(ours["frames"].astype(int) - theirs["frames"]).max() <= 1


def test_neighbours_on_the_mesh_are_neighbours_on_the_network_of_a_tpu():
    places = [(x, y, 0) for y in (0, 1) for x in (0, 1)]  # the order in which JAX lists a v5e-4, which is no ring
    chip = {"platform": "tpu", "device_kind": "TPU v5 lite", "core_on_chip": 0, "process_index": 0}
    devices = [SimpleNamespace(id=i, coords=place, **chip) for i, place in enumerate(places)]
    [row] = sharding._device_grid((1, 4), devices)
    steps = [sum(abs(a - b) for a, b in zip(x.coords, y.coords, strict=True)) for x, y in itertools.pairwise(row)]
    assert steps == [1, 1, 1]
    part = sharding._device_grid((1, 3), devices[:3])  # not a whole slice
    assert part.tolist() == [devices[:3]]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 8), (2, 4), (8, 1)])
def test_a_mesh_equals_one_device_with_frames_that_do_not_divide(mesh, alone, tmp_path):
    ours = numbers(tmp_path, "sd1", mesh, 6, 8, methods=mesh[1] > 1)
    methods = ("long", "reused", "path", "residuals", "controlled", "masks") if mesh[1] > 1 else ()
    assert_same(ours, alone(6), ("kept", *methods))
    # Only the result is gathered: four clips of latents with padded frames.
    assert ours["gathered"] <= 4 * ours["latents"] * 8 / 6


@pytest.mark.slow
def test_24_frames_on_16_devices_with_fsdp(alone, tmp_path):
    ours = numbers(tmp_path, "sd1", (1, 16), 24, 16, fsdp=True)
    assert_same(ours, alone(24))
    assert ours["largest_shard"] == 1 / 16


# ------------------------------------------------------------------------------------------- mesh shapes


@pytest.mark.parametrize(
    ("devices", "frames", "shape"),
    [
        (1, 24, (1, 1)),
        (8, 24, (1, 8)),
        (8, 8, (1, 8)),
        (8, 6, (2, 4)),
        (16, 24, (1, 16)),
        (32, 24, (2, 16)),
        (256, 24, (16, 16)),
        (6, 4, (2, 3)),
        (8, 1, (8, 1)),
    ],
)
def test_the_default_mesh_shards_frames_first(devices, frames, shape):
    assert default_mesh_shape(devices, frames) == shape


def test_a_mesh_larger_than_the_machine_is_refused(sd1):
    with pytest.raises(InputError, match=r"mesh of 4 × 2 .* needs 8 devices and there is 1"):
        TuneAVideo.from_pretrained(sd1.model, mesh=(4, 2))


def test_one_device_has_no_mesh():
    assert sharding.make_mesh((1, 1)) is None
    assert sharding.make_mesh((0, 0)) is None
    assert sharding.make_mesh() is None


@pytest.mark.parametrize("value", [-1, 65537])
def test_mesh_settings_out_of_range_are_refused(value):
    given = config.get_config()
    given.mesh.frames = value
    with pytest.raises(InputError, match=f"mesh.frames is {value}"):
        config.validate(given)

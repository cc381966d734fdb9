"""`tav plan` without the TPU compiler: topologies, jobs, FLOP counts, HLO analysis, errors, changes that would fit, the
report cache and the sweep. `test_plan_compiled.py` compiles with it."""

import dataclasses
import importlib.util
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REFERENCE, refusal
from flax import nnx
from jax.experimental import pallas as pl

from benchmarks import plan_sweep
from tav_jax import config, plan
from tav_jax.diffusion import programs
from tav_jax.errors import InputError, MissingError
from tav_jax.models import Conditioning, UNet, UNetConfig
from tav_jax.plan import compile, hlo, prepare_environment
from tav_jax.plan import programs as plan_programs
from tav_jax.plan.chips import GIB, Topology, parse_topology
from tav_jax.plan.compile import Report, ReportCache, needed_bytes, package_version
from tav_jax.plan.programs import Job, read_job
from tav_jax.plan.report import find_changes, format_json, format_table
from tav_jax.training import train_step

MODEL = REFERENCE / "sd2/model"

# ------------------------------------------------------------------------------------------------- topologies and jobs


@pytest.mark.parametrize(
    ("name", "chip", "layout", "count"),
    [
        ("v5e-8", "v5e", "2x4", 8),
        ("v5e:2x4", "v5e", "2x4", 8),
        ("V5E-1", "v5e", "1x1", 1),
        ("v5litepod-16", "v5e", "4x4", 16),
        ("v5p-8", "v5p", "2x2x1", 4),
        ("v5:2x2x1", "v5p", "2x2x1", 4),
        ("v4-16", "v4", "2x2x2", 8),
        ("v6e-256", "v6e", "16x16", 256),
    ],
)
def test_topology_names(name, chip, layout, count):
    topology = parse_topology(name)
    assert (topology.chip.name, topology.layout, topology.chips) == (chip, layout, count)
    assert parse_topology(topology.name) == topology


@pytest.mark.parametrize("name", ["v5e-3", "v5e:3x3", "v5e:4x2", "v5p-4", "v5e"])
def test_an_unknown_topology_is_refused_with_the_known_ones(name):
    with pytest.raises(InputError, match=f"there is no topology '{name}'.*{name[:3]}-8") as caught:
        parse_topology(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "somebody/flux"}, "model.path is 'somebody/flux', .* use --config.model.path=sd1"),
        ({"frames": 0}, "clip.frames is 0, .* give their number"),
        ({"height": 500}, "clip.height 500 is not a multiple of 8; use 496"),
    ],
)
def test_a_config_that_cannot_be_planned_is_refused(changes, message):
    settings = config.get_config()
    settings.model.path = changes.pop("path", "sd1")
    settings.clip.update(changes)
    with pytest.raises(InputError, match=message):
        read_job(settings, parse_topology("v5e-8"))


@pytest.mark.parametrize(
    ("topology", "frames", "window", "chosen"),
    [("v5e-8", 32, 0, "none"), ("v5e-8", 128, 0, "block"), ("v5e-1", 16, 0, "block"), ("v5e-1", 16, 4, "none")],
)
def test_remat_is_chosen_for_the_memory_of_a_chip(topology, frames, window, chosen):
    settings = config.get_config()
    settings.model.path, settings.clip.frames, settings.train.window = "sd1", frames, window
    assert read_job(settings, parse_topology(topology)).remat == chosen


def test_model_shapes_come_from_a_preset_or_a_directory():
    settings, topology = config.get_config(), parse_topology("v5e-8")
    assert read_job(settings, topology).model.unet == dataclasses.replace(UNetConfig.sd1(), kernel="fused")
    settings.model.path = "stabilityai/stable-diffusion-2-1"
    model = read_job(settings, topology).model
    assert model.unet == dataclasses.replace(UNetConfig.sd2(), kernel="fused")
    assert model.prediction == "v_prediction"
    settings.model.path = str(MODEL)
    model = read_job(settings, topology).model
    assert (model.unet.block_out_channels, model.prediction) == ((16, 32, 32), "v_prediction")


@pytest.fixture
def without_libtpu(monkeypatch, tmp_path) -> Path:
    """The directory in which `tav plan` looks for libtpu, which is nowhere else."""
    path = [entry for entry in sys.path if not (Path(entry) / "libtpu").is_dir()]
    for name, value in {"path": path, "modules": {k: v for k, v in sys.modules.items() if k != "libtpu"}}.items():
        monkeypatch.setattr(sys, name, value)
    monkeypatch.setattr(os, "environ", {**os.environ, "TAV_TPU_COMPILER": str(tmp_path / "tpu compiler")})
    return tmp_path / "tpu compiler"


def test_the_error_without_libtpu_names_the_command_that_installs_it(without_libtpu):
    message = refusal(MissingError, prepare_environment)
    pinned = next(r.split(";")[0].strip() for r in metadata.requires("jax") or () if r.startswith("libtpu"))
    assert pinned.startswith("libtpu==")
    command = f"pip install --upgrade --target='{without_libtpu}' '{pinned}'"
    assert message.endswith(f"libtpu is not installed; run `{command}`")
    version = pinned.removeprefix("libtpu==").replace("*", "1")
    assert plan.is_pinned_compiler(version)
    assert not plan.is_pinned_compiler("9" + version)


def test_libtpu_is_found_in_its_own_directory(without_libtpu):
    (without_libtpu / "libtpu").mkdir(parents=True)
    (without_libtpu / "libtpu/__init__.py").touch()
    (without_libtpu / "libtpu-7.dist-info").mkdir()
    (without_libtpu / "libtpu-7.dist-info/METADATA").write_text("Name: libtpu\nVersion: 7\n")
    assert importlib.util.find_spec("libtpu") is None
    prepare_environment()
    assert package_version("libtpu") == "7"
    assert importlib.util.find_spec("libtpu").origin == str(without_libtpu / "libtpu/__init__.py")
    assert os.environ["JAX_PLATFORMS"] == "cpu"


# -------------------------------------------------------------------------------------------------------------- FLOPs


def flops(function, *shapes) -> float:
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return hlo.count_flops(jax.jit(function).trace(*arguments).jaxpr)


def test_flops_of_products_convolutions_loops_and_recomputation():
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7

    def conv(x, k, padding="VALID"):
        return jax.lax.conv_general_dilated(x, k, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops(conv, (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * 2 * 6 * 6 * 9 * 3 * 5
    # With "SAME" padding, 3·8 − 2 pairs of a position and a tap along each side are inside of the image.
    assert flops(lambda x, k: conv(x, k, padding="SAME"), (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * 2 * 22 * 22 * 3 * 5

    def loop(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, None, length=6)[0]

    assert flops(loop, (3, 5), (5, 5)) == 6 * 2 * 3 * 5 * 5

    def gradient(x, w):
        return jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x).sum())(x)

    # Two products forward, two recomputed, two backward.
    assert flops(gradient, (3, 5), (5, 5)) == 6 * 2 * 3 * 5 * 5


def test_flops_of_a_strided_convolutions_gradient_leave_out_the_zeros_of_dilation():
    def down(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def gradient(g, k):
        return jax.linear_transpose(lambda x: down(x, k), jnp.zeros((1, 8, 8, 3)))(g)[0]

    assert flops(gradient, (1, 4, 4, 5), (3, 3, 3, 5)) == flops(down, (1, 8, 8, 3), (3, 3, 3, 5))


def test_flops_of_a_kernel_come_from_its_cost_estimate_or_its_grid():
    def kernel(x, y):
        y[...] = x[...] @ x[...]

    def call(x, **options):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32), grid=(3,), **options)(x)

    assert flops(call, (8, 8)) == 3 * 2 * 8**3
    estimate = pl.CostEstimate(flops=77, bytes_accessed=0, transcendentals=0)
    assert flops(lambda x: call(x, cost_estimate=estimate), (8, 8)) == 77

    # Of one kernel by its name, and with a schedule that is a quarter as fast as the chip's peak
    named = jax.jit(lambda x: call(call(x, name="ours"), name="other")).trace(jnp.zeros((8, 8))).jaxpr
    assert hlo.count_flops(named, {"ours"}) == hlo.count_flops(named) / 2 == 3 * 2 * 8**3
    chip = parse_topology("v5e-1").chip._replace(flops=3 * 2 * 8**3, kernels=(("ours", 0.25),))
    assert compile._kernel_seconds(named, chip) == 4 + 1

    def mixed(x):
        return jax.lax.scan(lambda x, _: (call(x) @ x, None), x, length=2)[0]

    traced = jax.jit(mixed).trace(jnp.zeros((8, 8)))
    assert hlo.count_flops(traced.jaxpr) == 2 * (3 + 1) * 2 * 8**3
    assert hlo.count_flops(traced.jaxpr, hlo.KERNELS) == 2 * 3 * 2 * 8**3


def test_flops_of_a_platform_dependent_branch_are_the_tpus():
    def either(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x, default=lambda x: x @ x @ x)

    assert flops(either, (8, 8)) == 2 * 8**3


WIDE = UNetConfig(
    block_out_channels=(128, 256),
    layers_per_block=1,
    down_attention=(True, False),
    up_attention=(False, True),
    heads=(2, 4),
    cross_attention_dim=64,
)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_flops_of_a_training_step_are_at_most_5_percent_below_xlas(remat):
    """XLA also counts element-wise operations."""
    unet = nnx.eval_shape(lambda: UNet(WIDE, rngs=nnx.Rngs(0)))
    graph, trained, frozen = nnx.split(unet, train_step.trainable_filter(), ...)
    shape = jax.ShapeDtypeStruct
    latents, text, alphas_cumprod = (shape(s, jnp.float32) for s in ((1, 4, 8, 8, 4), (1, 77, 64), (1000,)))
    traced = train_step.tune_step.trace(
        graph,
        jax.eval_shape(train_step.TrainState.create, trained),
        frozen,
        jax.eval_shape(lambda: jax.random.key(0)),
        shape((), jnp.int32),
        latents,
        latents,
        Conditioning(text),
        alphas_cumprod,
        train_step.Hyperparameters(*(jnp.float32(0) for _ in range(3))),
        prediction="epsilon",
        remat=remat,
        fsdp=False,
    )
    xla = traced.lower().cost_analysis()["flops"]
    assert 0.95 * xla <= hlo.count_flops(traced.jaxpr) <= xla


# ---------------------------------------------------------------------------------------------------------------- HLO

COLLECTIVES = """\
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%fused.1 (p: bf16[1,4,8]) -> (bf16[1,4,8], bf16[8,4,8]) {
  %all-gather.7 = bf16[8,4,8]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=13, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}
}

%fused.2 (p: bf16[1,4,8]) -> bf16[8,4,8] {
  %all-gather.9 = bf16[8,4,8]{2,1,0} all-gather(%p), channel_id=13, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}
}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-to-all.1 = f32[2,8]{1,0} all-to-all(%x), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
}

%condition (s: (s32[], f32[8])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%never (p: f32[8]) -> f32[8] {
  %all-reduce.99 = f32[1000000]{0} all-reduce(%p), channel_id=99, replica_groups={{0,1}}, to_apply=%sum
}

ENTRY %main.0 (x: f32[8]) -> f32[8] {
  %all-reduce.1 = (f32[32,4]{1,0:T(8,128)}, f32[16]{0}) all-reduce(%x, %y), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%sum
  %collective-permute-start = (bf16[1,2,64]{2,1,0}, bf16[1,2,64]{2,1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=2, source_target_pairs={{0,1},{1,2}}
  %collective-permute-done = bf16[1,2,64]{2,1,0} collective-permute-done(%collective-permute-start)
  %f1 = (bf16[1,4,8], bf16[8,4,8]) fusion(%x), kind=kCustom, calls=%fused.1
  %f2 = bf16[8,4,8] fusion(%f1), kind=kCustom, calls=%fused.2
  ROOT %while.1 = (s32[], f32[8]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""  # noqa: E501


def test_collectives_are_read_from_hlo():
    found = {c.kind: c for c in hlo.collectives(COLLECTIVES, 8)}
    assert set(found) == {"all-gather", "all-reduce", "all-to-all", "collective-permute"}
    assert found["all-gather"] == ("all-gather", 8 * 4 * 8 * 2, 8, 1)  # start and end are one collective
    assert found["all-reduce"] == ("all-reduce", (32 * 4 + 16) * 4, 4, 1)
    assert found["all-to-all"] == ("all-to-all", 2 * 8 * 4, 4, 6)  # in a loop of six steps
    assert found["collective-permute"] == ("collective-permute", 2 * 64 * 2, 8, 1)
    assert found["all-reduce"].sent_bytes == 2 * 3 / 4 * 576
    assert found["all-to-all"].sent_bytes == 6 * 3 / 4 * 64
    no_trip_count = COLLECTIVES.replace('"known_trip_count":{"n":"6"}', "")
    assert hlo.total_by_kind(hlo.collectives(no_trip_count, 8, trip_count=5))["all-to-all"] == {
        "times": 5,
        "bytes": 5 * 64,
    }


TRAFFIC = """\
HloModule jit_step, is_scheduled=true

%piece (p.0: f32[100,64], p.1: s32[]) -> f32[1,64] {
  %p.0 = f32[100,64]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %taken = f32[1,64]{1,0} dynamic-slice(%p.0, %p.1, %p.1), dynamic_slice_sizes={1,64}
}

%put (q.0: f32[100,64], q.1: f32[1,64]) -> f32[100,64] {
  %q.1 = f32[1,64]{1,0} parameter(1)
  %q.0 = f32[100,64]{1,0} parameter(0)
  ROOT %there = f32[100,64]{1,0} dynamic-update-slice(%q.0, %q.1, %zero, %zero)
}

%body (s: (s32[], f32[100,64])) -> (s32[], f32[100,64]) {
  %s = (s32[], f32[100,64]) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%s), index=0
  %all = f32[100,64]{1,0} get-tuple-element(%s), index=1
  %row = f32[1,64]{1,0:T(1,128)S(1)} fusion(%all, %i), kind=kLoop, calls=%piece
  %back = f32[100,64]{1,0} fusion(%all, %row), kind=kLoop, calls=%put
  ROOT %t = (s32[], f32[100,64]) tuple(%i, %back)
}

%condition (s.1: (s32[], f32[100,64])) -> pred[] {
  ROOT %less = pred[]{:S(6)} constant(false)
}

ENTRY %main (x: bf16[16,128], w: bf16[128,128]) -> bf16[16,128] {
  %x = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[128,128]{1,0:T(8,128)(2,1)} parameter(1)
  %ahead = (bf16[128,128]{1,0:S(1)}, bf16[128,128]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %here = bf16[128,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%ahead)
  %half = ((bf16[16,128]{1,0}), bf16[8,128]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:8], [0:128]}
  %dot = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %here), kind=kOutput, calls=%inner
  %loop = (s32[], f32[100,64]) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = bf16[16,128]{1,0:T(8,128)(2,1)} add(%dot, %dot)
}
"""  # noqa: E501


def test_hbm_traffic_is_read_from_hlo():
    weights, rows, row = 128 * 128 * 2, 16 * 128 * 2, 64 * 4
    prefetched = weights + rows // 2  # copied to VMEM, and not read again from HBM
    looped = 3 * (row + row)  # one row is read and one is written; the other rows are not touched
    assert hlo.hbm_bytes(TRAFFIC) == prefetched + rows + looped + rows
    assert hlo.hbm_bytes(TRAFFIC.replace("S(1)", "")) > 2 * (prefetched + rows + looped + rows)
    narrow = TRAFFIC.replace("%x = bf16[16,128]", "%x = bf16[9,77]")  # as many tiles as 16 × 128
    assert hlo.hbm_bytes(narrow) == hlo.hbm_bytes(TRAFFIC)
    no_trip_count = TRAFFIC.replace('"known_trip_count":{"n":"3"}', "")
    assert hlo.hbm_bytes(no_trip_count, trip_count=7) == prefetched + rows + looped // 3 * 7 + rows


def test_estimated_cycles_are_read_from_hlo():
    def with_estimate(instruction, n):
        return f'{instruction}, backend_config={{"estimated_cycles":"{n}","iteration_bounds":["1"]}}'

    text = TRAFFIC
    for instruction, n in (("kind=kOutput, calls=%inner", 1000), ("calls=%piece", 20)):
        text = text.replace(instruction, with_estimate(instruction, n))
    in_fusion = "dynamic_slice_sizes={1,64}"
    text = text.replace(in_fusion, with_estimate(in_fusion, 7))  # part of the fusion's own estimate
    assert hlo.estimated_cycles(text) == 1000 + 3 * 20
    assert hlo.estimated_cycles(TRAFFIC) == hlo.estimated_cycles("") == 0


def test_a_program_whose_hlo_cannot_be_printed_is_reported_without_it(capsys):
    def as_text():
        raise RuntimeError("INTERNAL: RET_CHECK failure")

    assert compile.hlo_text(SimpleNamespace(as_text=as_text)) == ""
    assert "cannot print this program's HLO: INTERNAL: RET_CHECK" in capsys.readouterr().err
    assert hlo.collectives("", 8) == []


def test_needed_bytes_are_read_from_the_compilers_error():
    late = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.26G of "
        "15.75G hbm. Exceeded hbm capacity by 2.51G.\n\nTotal hbm usage >= 18.51G:\n    reserved        258.00M"
    )
    assert needed_bytes(late, 5) == int(18.26 * GIB)
    early = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (298.12G) exceeds available HBM (15.75G). HLO module: jit_f."
    )
    assert needed_bytes(early, 2 * GIB) == int(298.12 * GIB) + 2 * GIB
    assert needed_bytes("Ran out of memory in memory space vmem while allocating on stack for kernel", 0) is None


# ---------------------------------------------------------------------------------------- changes, report cache, sweep


def make_job(topology: str = "v5e-8", **changes) -> Job:
    settings = config.get_config()
    settings.model.path, settings.train.remat = "sd1", "block"
    return read_job(settings, parse_topology(topology)).replace(**changes)


class FakeCache(ReportCache):
    """In place of the compiler: 3 GiB, and for each frame on a chip an amount that depends on the remat policy."""

    def __init__(self):
        super().__init__(Path("nowhere"))
        object.__setattr__(self, "compiled", [])

    def get(self, job: Job, name: str) -> Report:
        self.compiled.append(job)
        per_frame = {"none": 5, "products": 4, "attention": 3.5, "block": 3, "level": 1}[job.remat] * GIB
        temporaries = int(per_frame * job.frames_per_chip)
        peak, hbm = 3 * GIB + temporaries, job.topology.chip.hbm
        collectives = {"all-to-all": {"times": 4, "bytes": 6_000_000}}
        seconds = {"compute": float(job.frames)}
        return Report(name, peak <= hbm, peak, hbm, 3 * GIB, temporaries, seconds=seconds, collectives=collectives)


def test_the_smallest_change_of_each_kind_that_fits_is_found():
    cache = FakeCache()
    job = make_job("v5e-4", frames=24)  # 6 frames per chip: 21 GiB of 15.75
    report = cache.get(job, "tune")
    assert not report.fits
    options = [change.option for change in find_changes(cache, job, report)]
    assert options == ["--config.train.remat=level", "--topology=v5e-8", "--config.clip.frames=16"]
    assert len(cache.compiled) == 4  # no compilation without a result


def test_windows_of_a_job():
    settings = config.get_config()
    settings.model.path = "sd1"
    settings.clip.frames, settings.edit.window, settings.train.window = 200, (16, 4), 16
    settings.mesh.data = 8
    job = read_job(settings, parse_topology("v5e-8"))
    assert (job.window, job.train_window, job.frames_per_chip) == ((16, 4), 16, 16)
    settings.clip.frames = 12
    with pytest.raises(InputError, match=r"edit.window is 16 frames and the clip has 12; use at most 12"):
        read_job(settings, parse_topology("v5e-8"))


@pytest.mark.parametrize(("source", "reuse"), [(False, 1), (True, 2)])
def test_planned_sampling_has_the_arguments_of_the_real_call(sd1, source, reuse, monkeypatch):
    settings = config.get_config()
    settings.model.path, settings.model.dtype = str(sd1.model), "float32"
    settings.clip.update({"frames": 3, "height": 32, "width": 32})
    settings.edit.update({"steps": 4, "inversion_steps": 4, "feature_reuse": reuse, "feature_steps": 0.5 * source})
    monkeypatch.setattr(Topology, "devices", lambda _: jax.devices()[:1])
    planned = plan_programs.build_program(read_job(settings, parse_topology("v5e-1")), "sample")

    class CallError(Exception):
        pass

    def called(*arguments, **options):
        raise CallError(arguments, options)

    monkeypatch.setattr(programs, "denoise_loop", called)
    trajectory = np.zeros((5, 1, 3, 8, 8, 4), np.float32)
    branch = {"source": trajectory, "source_prompt": "red"} if source else {}
    with pytest.raises(CallError) as caught:
        sd1.tav.sample("blue", latents=trajectory[-1], steps=4, feature_reuse=reuse, progress=print, **branch)
    arguments, options = caught.value.args
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), args[1:]) for args in (planned.arguments, arguments)]
    assert kinds[0] == kinds[1]
    assert {**options, "fixed_point": False} == {**planned.options, "fixed_point": False}


def test_table_and_json():
    job = make_job("v5e-4", frames=24)
    report = FakeCache().get(job, "tune")
    changes = {"tune": list(find_changes(FakeCache(), job, report))}
    text = format_table(job, [report], changes)
    assert (
        "tune does not fit: it needs 21.00 GiB per chip, and a chip has 15.75 GiB. With each of these changes it fits "
        "(compiled):"
    ) in text
    assert "--config.clip.frames=16  (15.00 GiB, at least 16.0 s per step)" in text
    assert "tune, collectives per step: all-to-all 4 (6.0 MB)" in text
    assert "62.5 ms" not in text  # the compiler gave no estimate
    estimated = dataclasses.replace(report, expected_seconds=0.0625)
    assert "62.5 ms" in format_table(job, [estimated], {})
    line = format_json(job, [report], changes)
    assert "\n" not in line
    content = json.loads(line)
    tune = content["functions"]["tune"]
    assert (content["fits"], tune["fits"], tune["peak_bytes"], tune["hbm_bytes"]) == (
        False,
        False,
        21 * GIB,
        63 * GIB // 4,
    )


def test_cached_reports_depend_on_job_program_versions_and_options(tmp_path, monkeypatch):
    cache, job = ReportCache(tmp_path), make_job()
    report = FakeCache().get(job, "tune")
    assert cache.load(job, "tune") is None
    cache.save(job, report)
    assert cache.load(job, "tune") == report == cache.get(job, "tune")
    assert cache.load(job, "sample") is None
    for change in ({"frames": 23}, {"remat": "level"}, {"fsdp": True}, {"topology": parse_topology("v6e-8")}):
        assert cache.load(job.replace(**change), "tune") is None
    with monkeypatch.context() as patch:
        patch.setattr(compile, "package_version", lambda package: "7.0" if package == "libtpu" else "1.0")
        assert cache.load(job, "tune") is None
    with monkeypatch.context() as patch:
        patch.setattr(compile, "optimization_level", lambda: "O1")
        assert cache.load(job, "tune") is None
    next(tmp_path.glob("*.json")).write_text('{"report": ')
    assert cache.load(job, "tune") is None  # damaged: compiled again


def test_a_sweep_compiles_the_ends_and_interpolates_between(tmp_path):
    cache, topologies = FakeCache(), [parse_topology("v5e-4"), parse_topology("v5e-8")]
    points = plan_sweep.sweep(cache, make_job(), "tune", topologies, [8, 16, 24, 32])
    assert len(cache.compiled) == 4
    ends = [("v5e-4", 8), ("v5e-4", 32), ("v5e-8", 8), ("v5e-8", 32)]
    assert [(p.topology.name, p.frames) for p in points if p.compiled] == ends
    exact = plan_sweep.sweep(cache, make_job(), "tune", topologies, [8, 16, 24, 32], every=True)
    assert [p.peak for p in points] == [p.peak for p in exact]  # the fake memory is linear in the frames per chip
    assert [p.fits for p in points] == [True, True, False, False, True, True, True, True]
    table = plan_sweep.format_table("tune", points)
    assert "| 16 | 15.0 GiB, 16.00 s | 9.0 GiB, 16.00 s |" in table
    assert "| 32 | **27.0** GiB, too much | **15.0** GiB, 32.00 s |" in table
    figure = plan_sweep.plot("tune", points)
    compiled, interpolated = figure.axes[0].collections
    assert (len(compiled.get_offsets()), len(interpolated.get_offsets())) == (4, 4)
    assert figure.axes[0].get_ylim()[1] > 27  # every point is visible
    plan_sweep.save_svg(figure, tmp_path / "tune.svg")
    assert "v5e: 15.75 GiB" in (tmp_path / "tune.svg").read_text()

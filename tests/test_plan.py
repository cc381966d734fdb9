"""`tav plan`: names of topologies, operations counted, collectives and traffic read, refusals understood, advice. Real
compilations are in `test_plan_compiled.py`."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from conftest import REFERENCE
from flax import nnx
from jax.experimental import pallas as pl

from tav_jax import config
from tav_jax.errors import InputError, MissingError
from tav_jax.models import UNet, UNetConfig
from tav_jax.plan import advice, chips, collectives, estimate, flops, job, keep, measure, page, prepare, sweep, traffic
from tav_jax.plan.measure import Report, needed_bytes
from tav_jax.plan.planner import Planner
from tav_jax.training import train_step

GIB = 2**30
MODEL = REFERENCE / "sd2/model"

# ------------------------------------------------------------------------------------------------------- topologies


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
def test_a_topology_by_either_of_its_names(name, chip, layout, count):
    topology = chips.read(name)
    assert (topology.chip.name, topology.layout, topology.chips) == (chip, layout, count)
    assert chips.read(topology.name) == topology


@pytest.mark.parametrize("name", ["v5e-3", "v5e:3x3", "v5e:4x2", "v5p-4", "v5e"])
def test_a_topology_that_there_is_not_is_refused_with_those_that_there_are(name):
    family = name[:3]
    with pytest.raises(InputError, match=f"there is no topology '{name}'.*{family}-8") as caught:
        chips.read(name)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- operations


def counted(function, *shapes) -> float:
    return flops.count(jax.jit(function).trace(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).jaxpr)


def test_products_convolutions_loops_and_recomputation_are_counted():
    assert counted(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7

    def conv(x, k, stride=1, padding="VALID"):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, k, (stride, stride), padding, dimension_numbers=numbers)

    assert counted(conv, (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * 2 * 6 * 6 * 9 * 3 * 5
    # At the rim of "SAME" a 3×3 kernel meets the picture with 3·8 − 2 of its places along each side.
    assert counted(lambda x, k: conv(x, k, padding="SAME"), (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * 2 * 22 * 22 * 3 * 5

    def loop(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, None, length=6)[0]

    assert counted(loop, (3, 5), (5, 5)) == 6 * 2 * 3 * 5 * 5

    def gradient(x, w):
        return jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(jnp.sin(x @ w) @ w))(x).sum())(x)

    # Two products forward, both again, and two backward; the first again's second gives nothing that is used but cos.
    assert counted(gradient, (3, 5), (5, 5)) == 6 * 2 * 3 * 5 * 5


def test_a_gradient_of_a_strided_convolution_multiplies_with_no_hole():
    def down(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    forward = counted(down, (1, 8, 8, 3), (3, 3, 3, 5))

    def back(g, k):
        return jax.linear_transpose(lambda x: down(x, k), jnp.zeros((1, 8, 8, 3)))(g)[0]

    assert counted(back, (1, 4, 4, 5), (3, 3, 3, 5)) == forward


def test_a_kernel_is_counted_by_what_it_says_of_itself_or_by_its_grid():
    def kernel(x, y):
        y[...] = x[...] @ x[...]

    def call(x, **options):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32), grid=(3,), **options)(x)

    assert counted(call, (8, 8)) == 3 * 2 * 8**3
    told = pl.CostEstimate(flops=77, bytes_accessed=0, transcendentals=0)
    assert counted(lambda x: call(x, cost_estimate=told), (8, 8)) == 77

    def mixed(x):
        return jax.lax.scan(lambda x, _: (call(x) @ x, None), x, length=2)[0]

    traced = jax.jit(mixed).trace(jnp.zeros((8, 8)))
    assert flops.count(traced.jaxpr) == 2 * (3 + 1) * 2 * 8**3
    assert flops.count(traced.jaxpr, flops.KERNELS) == 2 * 3 * 2 * 8**3


def test_where_the_platform_decides_the_tpus_way_is_counted():
    def either(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x, default=lambda x: x @ x @ x)

    assert counted(either, (8, 8)) == 2 * 8**3


WIDE = UNetConfig(
    block_out_channels=(128, 256),
    layers_per_block=1,
    down_attention=(True, False),
    up_attention=(False, True),
    heads=(2, 4),
    cross_attention_dim=64,
)


@pytest.mark.parametrize("remat", ["none", "block"])
def test_the_count_is_xlas_within_a_few_percent(remat):
    """XLA's has the element-wise work as well, so it is a little more."""
    unet = nnx.eval_shape(lambda: UNet(WIDE, rngs=nnx.Rngs(0)))
    graph, trained, frozen = nnx.split(unet, train_step.trainable_filter(), ...)
    shape = jax.ShapeDtypeStruct
    key = jax.eval_shape(lambda: jax.random.key(0))
    latents, text, levels = (shape(s, jnp.float32) for s in ((1, 4, 8, 8, 4), (1, 77, 64), (1000,)))
    traced = train_step.tune_step.trace(
        graph,
        jax.eval_shape(train_step.TrainState.create, trained),
        frozen,
        key,
        shape((), jnp.int32),
        latents,
        latents,
        text,
        levels,
        train_step.Hyperparameters(*(jnp.float32(0) for _ in range(3))),
        prediction="epsilon",
        remat=remat,
    )
    xlas = traced.lower().cost_analysis()["flops"]
    assert 0.95 * xlas <= flops.count(traced.jaxpr) <= xlas


# ------------------------------------------------------------------------------------------------------ collectives

HLO = """\
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


def test_collectives_are_read_from_a_programs_text():
    told = {c.kind: c for c in collectives.read(HLO, 8)}
    assert set(told) == {"all-gather", "all-reduce", "all-to-all", "collective-permute"}
    assert told["all-gather"] == ("all-gather", 8 * 4 * 8 * 2, 8, 1)  # its two halves are one
    assert told["all-reduce"] == ("all-reduce", (32 * 4 + 16) * 4, 4, 1)
    assert told["all-to-all"] == ("all-to-all", 2 * 8 * 4, 4, 6)  # in a loop of six
    assert told["collective-permute"] == ("collective-permute", 2 * 64 * 2, 8, 1)
    assert told["all-reduce"].sent == 2 * 3 / 4 * 576
    assert told["all-to-all"].sent == 6 * 3 / 4 * 64
    unsaid = HLO.replace('"known_trip_count":{"n":"6"}', "")
    assert collectives.by_kind(collectives.read(unsaid, 8, loop=5))["all-to-all"] == (5, 5 * 64)


# ---------------------------------------------------------------------------------------------------------- traffic

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


def test_what_goes_to_and_from_hbm_is_read_from_a_programs_text():
    weights, rows, row = 128 * 128 * 2, 16 * 128 * 2, 64 * 4
    ahead = weights + rows // 2  # what is fetched into VMEM, and not read again from HBM
    looped = 3 * (row + row)  # a row is read, and one is written; the other rows stay where they are
    assert traffic.hbm_bytes(TRAFFIC) == ahead + rows + looped + rows
    assert traffic.hbm_bytes(TRAFFIC.replace("S(1)", "")) > 2 * (ahead + rows + looped + rows)
    narrow = TRAFFIC.replace("%x = bf16[16,128]", "%x = bf16[9,77]")  # fills as many tiles as 16 × 128
    assert traffic.hbm_bytes(narrow) == traffic.hbm_bytes(TRAFFIC)
    unsaid = TRAFFIC.replace('"known_trip_count":{"n":"3"}', "")
    assert traffic.hbm_bytes(unsaid, loop=7) == ahead + rows + looped // 3 * 7 + rows


def test_the_compilers_own_reckoning_is_read_from_a_programs_text():
    def reckoned(kind, n):
        return f'{kind}, backend_config={{"estimated_cycles":"{n}","iteration_bounds":["1"]}}'

    text = TRAFFIC.replace("kind=kOutput, calls=%inner", reckoned("kind=kOutput, calls=%inner", 1000))
    text = text.replace("calls=%piece", reckoned("calls=%piece", 20))  # in the loop of three
    inside = "dynamic_slice_sizes={1,64}"
    text = text.replace(inside, reckoned(inside, 7))  # a part of what is counted already
    assert estimate.cycles(text) == 1000 + 3 * 20
    assert estimate.cycles(TRAFFIC) == estimate.cycles("") == 0


def test_a_program_that_the_compiler_cannot_show_is_told_by_what_else_is_known(capsys):
    def as_text():
        raise RuntimeError("INTERNAL: RET_CHECK failure")

    assert measure._text(SimpleNamespace(as_text=as_text)) == ""
    assert "cannot show this program: INTERNAL: RET_CHECK" in capsys.readouterr().err
    assert collectives.read("", 8) == []


# --------------------------------------------------------------------------------------------------------- refusals


def test_the_compilers_refusals_are_understood():
    classic = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 18.26G of "
        "15.75G hbm. Exceeded hbm capacity by 2.51G.\n\nTotal hbm usage >= 18.51G:\n    reserved        258.00M"
    )
    assert needed_bytes(classic, 5) == int(18.26 * GIB)
    early = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (298.12G) exceeds available HBM (15.75G). HLO module: jit_f."
    )
    assert needed_bytes(early, 2 * GIB) == int(298.12 * GIB) + 2 * GIB
    assert needed_bytes("Ran out of memory in memory space vmem while allocating on stack for kernel", 0) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"path": "somebody/flux"}, "model.path is 'somebody/flux', .* give --config.model.path=sd1"),
        ({"frames": 0}, "clip.frames is 0, .* give their number"),
        ({"height": 500}, "clip.height 500 is not a multiple of 8; use 496"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(changes, said):
    given = config.get_config()
    given.model.path = changes.pop("path", "sd1")
    given.clip.update(changes)
    with pytest.raises(InputError, match=said):
        job.read(given, chips.read("v5e-8"))


def test_shapes_come_from_a_preset_or_from_a_directorys_configs():
    given = config.get_config()
    assert job.read(given, chips.read("v5e-8")).shapes.unet == dataclasses.replace(UNetConfig.sd1(), kernel="fused")
    given.model.path = "stabilityai/stable-diffusion-2-1"
    shapes = job.read(given, chips.read("v5e-8")).shapes
    on_tpu = dataclasses.replace(UNetConfig.sd2(), kernel="fused")
    assert (shapes.unet, shapes.prediction) == (on_tpu, "v_prediction")
    given.model.path = str(MODEL)
    shapes = job.read(given, chips.read("v5e-8")).shapes
    assert (shapes.unet.block_out_channels, shapes.prediction) == ((16, 32, 32), "v_prediction")


def test_without_the_compiler_one_line_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name))
    with pytest.raises(MissingError, match="pip install libtpu") as caught:
        prepare()
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- advice and sweep


def a_job(topology: str = "v5e-8", **changes) -> job.Job:
    given = config.get_config()
    given.model.path = "sd1"
    return job.read(given, chips.read(topology)).with_(**changes)


class Imagined(Planner):
    """A compiler of one formula: 3 GiB, and for each frame on a chip as many as the policy says."""

    def __init__(self):
        super().__init__(Path("nowhere"))
        object.__setattr__(self, "asked", [])

    def report(self, one: job.Job, name: str) -> Report:
        self.asked.append(one)
        each = {"none": 5, "products": 4, "attention": 3.5, "block": 3, "level": 1}[one.remat] * GIB
        temporaries = int(each * advice.per_chip(one))
        peak, hbm = 3 * GIB + temporaries, one.topology.chip.hbm
        told = {"all-to-all": {"times": 4, "bytes": 6_000_000}}
        seconds = {"compute": float(one.frames)}
        return Report(name, peak <= hbm, peak, hbm, 3 * GIB, temporaries, seconds=seconds, collectives=told)


def test_advice_is_the_mildest_of_each_kind_that_was_compiled_and_fits():
    planner = Imagined()
    at = a_job("v5e-4", frames=24)  # 6 frames a chip: 21 GiB of 15.75
    report = planner.report(at, "tune")
    assert not report.fits
    told = [one.change for one in advice.advise(planner, at, report)]
    assert told == ["--config.train.remat=level", "--topology=v5e-8", "--config.clip.frames=16"]
    assert len(planner.asked) == 4  # and nothing was compiled in vain


def test_a_sweep_compiles_the_ends_and_draws_the_line_between():
    planner = Imagined()
    known = [chips.read("v5e-4"), chips.read("v5e-8")]
    points = sweep.sweep(planner, a_job(), "tune", known, [8, 16, 24, 32], every=False)
    assert len(planner.asked) == 4
    assert [(p.topology.name, p.frames) for p in points if p.compiled] == [
        ("v5e-4", 8),
        ("v5e-4", 32),
        ("v5e-8", 8),
        ("v5e-8", 32),
    ]
    exact = sweep.sweep(planner, a_job(), "tune", known, [8, 16, 24, 32], every=True)
    assert [p.peak for p in points] == [p.peak for p in exact]  # the imagined memory is linear
    assert [p.fits for p in points] == [True, True, False, False, True, True, True, True]
    text, drawn = sweep.table("tune", points), sweep.picture("tune", points)
    assert "| 16 | 15.0 GiB, 16.00 s | 9.0 GiB, 16.00 s |" in text
    assert "| 32 | **27.0** GiB, too much | **15.0** GiB, 32.00 s |" in text
    assert drawn.count("<circle") == 8
    assert drawn.count('fill="white" stroke') == 4


def test_reports_are_kept_under_all_that_they_depend_on(tmp_path, monkeypatch):
    at, report = a_job(), Imagined().report(a_job(), "tune")
    assert keep.load(tmp_path, at, "tune") is None
    keep.save(tmp_path, at, report)
    assert keep.load(tmp_path, at, "tune") == report
    assert keep.load(tmp_path, at, "sample") is None
    for change in ({"frames": 23}, {"remat": "level"}, {"fsdp": True}, {"topology": chips.read("v6e-8")}):
        assert keep.load(tmp_path, at.with_(**change), "tune") is None
    with monkeypatch.context() as other:
        other.setattr(keep, "version", lambda package: "7.0" if package == "libtpu" else "1.0")
        assert keep.load(tmp_path, at, "tune") is None
    with monkeypatch.context() as other:
        other.setattr(keep, "optimization", lambda: "O1")
        assert keep.load(tmp_path, at, "tune") is None
    next(tmp_path.glob("*.json")).write_text('{"report": ')
    assert keep.load(tmp_path, at, "tune") is None  # damaged: compiled again


def test_a_page_and_a_line_say_what_fits_and_what_would():
    at = a_job("v5e-4", frames=24)
    report = Imagined().report(at, "tune")
    told = {"tune": list(advice.advise(Imagined(), at, report))}
    said = page.text(at, [report], told)
    assert "tune needs 21.00 GiB of 15.75 and does not fit. These would (compiled):" in said
    assert "--config.clip.frames=16  (15.00 GiB, at least 16.0 s a step)" in said
    assert "tune, between the chips, per step: all-to-all 4 (6.0 MB)" in said
    assert "62.5 ms" not in said  # the compiler did not say
    known = dataclasses.replace(report, expected_seconds=0.0625)
    assert "62.5 ms" in page.text(at, [known], {})
    line = page.one_line(at, [report], told)
    assert "\n" not in line
    read = json.loads(line)
    tune = read["functions"]["tune"]
    assert (read["fits"], tune["fits"], tune["peak_bytes"], tune["hbm_bytes"]) == (
        False,
        False,
        21 * GIB,
        63 * GIB // 4,
    )

"""Two-branch editing: closed forms, reimplementations on attention maps, compilations, and input that is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import difference, refusal
from flax import nnx
from test_diffusion import schedule

from tav_jax import InputError
from tav_jax.diffusion import programs
from tav_jax.diffusion.editing import Editing, EditingState, step_controls, two_branch
from tav_jax.diffusion.network import NetworkOutput
from tav_jax.diffusion.samplers import LoopState, get_sampler, run_sampler
from tav_jax.io import validation
from tav_jax.models import AttentionControls, Conditioning, UNet, UNetConfig
from tav_jax.models.attention import Attention

OFF = {"self_attention_steps": 0.0, "feature_steps": 0.0, "cross_attention_steps": 0.0}
SOURCE, EDIT, OTHER = "a red square is moving", "a blue square is moving", "a big red circle is moving"


def normal(*shape: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# -------------------------------------------------------------------------------------- steps and shares


@pytest.mark.parametrize(("steps", "inversion_steps"), [(6, 6), (3, 6), (4, 10), (1, 50), (13, 50)])
def test_trajectory_indices(steps, inversion_steps):
    """The source's latents are read at the noise levels of the sampling steps."""
    s = schedule()
    table, inversion = s.sampling_steps(steps, inversion_steps), s.inversion_steps(inversion_steps)
    levels = np.concatenate([[inversion.alpha[0]], inversion.next_alpha])  # ᾱ of each entry of the trajectory
    indices = s.trajectory_indices(steps, inversion_steps)
    assert len(indices) == steps + 1
    assert (indices[0], indices[-1]) == (inversion_steps, 0)
    assert np.array_equal(levels[indices[:-1]], table.alpha)
    assert np.array_equal(levels[indices[1:]], table.next_alpha)


def shares(steps: int, **given: float):
    defaults = dict.fromkeys(("self_attention_steps", "feature_steps", "cross_attention_steps", "blend_start"), 0.0)
    return step_controls(normal(steps + 1, 1, 1, 2, 2, 4), **(defaults | given))


@pytest.mark.parametrize(
    ("share", "steps", "count"),
    [
        (0.0, 10, 0),
        (1.0, 10, 10),
        (0.5, 10, 5),
        (0.8, 50, 40),
        (0.25, 10, 3),
        (0.55, 20, 11),
        (0.07, 100, 7),
        (0.57, 100, 57),
    ],
)
def test_a_share_of_the_steps(share, steps, count):
    """Products such as 0.55 · 20 = 11.000000000000002 are not one step more. A step that is partly in the share is
    controlled and blended, so that a mask of zeros keeps the source in a single step too."""
    before = count - (share * steps < count - 0.1)
    controls = shares(steps, self_attention_steps=share, cross_attention_steps=share, blend_start=share)
    assert (
        controls.self_attention.tolist()
        == controls.cross_attention.tolist()
        == [True] * count + [False] * (steps - count)
    )
    assert controls.blend.tolist() == [False] * before + [True] * (steps - before)
    assert not controls.features.any()


# ------------------------------------------------------------------------------- the denoiser, with any network


def editing_arrays(prompts: int, mask, words: bool = False) -> Editing:
    identity = jnp.broadcast_to(jnp.eye(5), (prompts, 5, 5))
    tokens = jnp.ones((1 + prompts, 5))
    return Editing(identity, jnp.ones((prompts, 5)), 2 * jnp.ones((prompts, 5)), tokens, jnp.asarray(words), mask)


@pytest.mark.parametrize("guided", [True, False])
def test_rows_guidance_and_word_maps(guided):
    """The source row always has the latents of the inversion, the others those of the edits."""
    path, x, prompts = normal(5, 1, 2, 8, 8, 4), normal(2, 2, 8, 8, 4, seed=1), 2
    editing = editing_arrays(prompts, jnp.ones((1, 2, 8, 8, 1)))
    scale = jnp.float32(7.5) if guided else None
    text = normal(1 + prompts * (1 + guided), 5, 6, seed=2)
    seen = []

    def network(rows, step, conditioning, carry):
        seen.append((rows, conditioning.controls))
        maps = jnp.ones((3, 2, 64))
        return NetworkOutput(rows * conditioning.text[:, :1, :1, None, None], maps), carry

    denoise, _ = two_branch(network, Conditioning(text), editing, scale)
    table = (
        schedule()
        .sampling_steps(4)
        ._replace(
            controls=step_controls(
                path, self_attention_steps=0.5, feature_steps=0.25, cross_attention_steps=1.0, blend_start=0.0
            )
        )
    )
    step = jax.tree.map(lambda values: values[1], table)
    output, carry = denoise(x, step, EditingState(jnp.ones((3, 2, 64))))
    ((rows, controls),) = seen
    assert np.array_equal(rows, np.concatenate([path[1], *[x] * (1 + guided)]))
    assert (controls.self_attention, controls.features, controls.cross_attention) == (True, False, True)
    assert controls.rows == len(rows)
    assert controls.words.sum(axis=1).tolist() == ([5, 0, 0, 5, 5] if guided else [5, 5, 5])
    assert (carry.word_maps == 2).all()
    factors = text[:, 0, 0].reshape(-1, 1, 1, 1, 1)
    expected = x * factors[-2:]
    if guided:
        expected = x * (factors[1:3] + 7.5 * (factors[3:] - factors[1:3]))
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "dpm++2m"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_masks_in_closed_form(name, steps):
    """With a mask of zeros the result is the source bit for bit; of ones, that without blending; in between, both."""
    s, sampler = schedule(), get_sampler(name)
    path = normal(11, 1, 2, 8, 8, 4)[s.trajectory_indices(steps, 10)]
    table = s.sampling_steps(steps, 10)

    def network(rows, step, conditioning, carry):
        return NetworkOutput(jnp.sin(rows), jnp.ones((2, 2, 64))), carry

    def run(mask, blend_start):
        editing = editing_arrays(1, mask)
        options = OFF | {"blend_start": blend_start}
        denoise, blend = two_branch(network, Conditioning(normal(3, 5, 6)), editing, jnp.float32(3))
        state = LoopState(sampler.init(path[0] + 0.1), EditingState(jnp.zeros((2, 2, 64))))
        given = table._replace(controls=step_controls(path, **options))
        state, _ = run_sampler(sampler, denoise, state, given, "epsilon", after_step=blend)
        return np.asarray(state.latents)

    ones = jnp.ones((1, 2, 8, 8, 1))
    half = ones.at[:, :, :4].set(0)
    free = run(ones, 1.0)  # no step is blended
    assert np.array_equal(run(0 * ones, 0.2), path[-1])
    assert np.array_equal(run(ones, 0.0), free)
    assert np.array_equal(run(half, 0.2)[:, :, :4], path[-1][:, :, :4])
    assert np.array_equal(run(half, 0.0)[:, :, 4:], free[:, :, 4:])  # this network has no neighborhood


# ------------------------------------------------------------- against attention maps that are materialized


class MapsOfTheSource(nnx.Module):
    """In place of `attn1`: the softmax of the first row, computed frame by frame, applied to the values of all rows."""

    def __init__(self, layer: Attention):
        self.layer = layer

    def spatial(self, x, attention, kernel, controls=None):
        assert attention == "sparse-causal"
        q, k, v = self.layer.project(x, x)  # [B, F, T, N, D]
        frames = []
        for i in range(x.shape[1]):
            previous = max(i - 1, 0)
            keys = jnp.concatenate([k[0, 0], k[0, previous]])
            maps = jax.nn.softmax(jnp.einsum("tnd,snd->nts", q[0, i], keys) / q.shape[-1] ** 0.5, axis=-1)
            values = jnp.concatenate([v[:, 0], v[:, previous]], axis=1)
            frames.append(jnp.einsum("nts,bsnd->btnd", maps, values))
        return self.layer.output(jnp.stack(frames, axis=1))


class FirstRow(nnx.Module):
    """In place of a convolution: its output for the first row, in every row."""

    def __init__(self, layer: nnx.Module):
        self.layer = layer

    def __call__(self, x):
        out = self.layer(x)
        return jnp.broadcast_to(out[:1], out.shape)


SMALL = {"cross_attention_dim": 8, "norm_num_groups": 4}
LIKE_SD = UNetConfig(block_out_channels=(8, 8, 16, 16), heads=(2, 2, 2, 2), **SMALL)
THREE_LEVELS = UNetConfig(
    block_out_channels=(8, 8, 16),
    layers_per_block=1,
    heads=(2, 2, 2),
    down_attention=(True, True, False),
    up_attention=(False, True, True),
    **SMALL,
)
# Plug-and-Play's layers: of block 1 those from index 1 on, and all of the later blocks.
INJECTED = {
    LIKE_SD: [(1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1), (3, 2)],
    THREE_LEVELS: [(1, 1), (2, 0), (2, 1)],
}


@pytest.mark.slow
@pytest.mark.parametrize("config", [LIKE_SD, THREE_LEVELS], ids=["four levels", "three levels"])
def test_injection_equals_the_maps_and_features_of_the_source(config):
    unet = UNet(config, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(unet)
    # The last layers of a new temporal attention are zero: all weights are drawn, so that every layer matters.
    weights = jax.tree.map(lambda x: x + 0.1 * normal(*x.shape, seed=x.size), weights)
    rows, prompts = 5, 2
    latents, times = normal(rows, 3, 8, 8, 4, seed=1), jnp.full(rows, 301)
    text, on = normal(rows, 7, 8, seed=2), jnp.asarray(True)
    identity = jnp.broadcast_to(jnp.eye(7), (prompts, 7, 7))
    ones = jnp.ones((prompts, 7))
    controls = AttentionControls(on, on, ~on, identity, ones, ones, jnp.ones((rows, 7)))

    @jax.jit
    def controlled(weights, controls):
        return nnx.merge(graph, weights)(latents, times, Conditioning(text, controls=controls))

    @jax.jit
    def injected(weights):
        unet = nnx.merge(graph, weights)
        for block, i in INJECTED[config]:
            layer = unet.up_blocks[block].attentions[i].transformer_blocks[0]
            layer.attn1 = MapsOfTheSource(layer.attn1)
        resnet = unet.up_blocks[1].resnets[1]
        resnet.conv2 = FirstRow(resnet.conv2)
        return unet(latents, times, Conditioning(text))

    with jax.default_matmul_precision("highest"):
        theirs, ours = injected(weights), controlled(weights, controls)
        without = controlled(weights, controls._replace(self_attention=~on, features=~on))
        only_features = controlled(weights, controls._replace(self_attention=~on))
        # The prompts' words in the places of the source's, all of them its own: the same as replacing the text.
        all_cross = controls._replace(self_attention=~on, features=~on, cross_attention=on)
        crossed = controlled(weights, all_cross)
    assert difference(ours, theirs) <= 1e-5
    assert difference(ours[0], without[0]) <= 1e-5  # the source is not changed
    assert difference(crossed[:3], without[:3]) <= 1e-5  # neither are the unconditional rows by the words
    for other in (without, only_features, crossed):
        assert min(difference(ours[i], other[i]) for i in (1, 2, 3, 4)) > 1e-3
    assert difference(crossed[3:], without[3:]) > 1e-3


def test_fused_kernels_take_the_queries_and_keys_of_the_source():
    layer = Attention(16, 16, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x, on, nothing = normal(3, 2, 512, 16), jnp.asarray(True), jnp.zeros((1, 4))
    controls = AttentionControls(on, on, on, jnp.zeros((1, 4, 4)), nothing, nothing, jnp.zeros((3, 4)))
    ours = {kernel: layer.spatial(x, "sparse-causal", kernel, controls) for kernel in ("plain", "interpret")}
    assert difference(ours["interpret"], ours["plain"]) <= 1e-5
    assert difference(MapsOfTheSource(layer).spatial(x, "sparse-causal", "plain"), ours["plain"]) <= 1e-5
    assert difference(layer.spatial(x, "sparse-causal", "plain"), ours["plain"]) > 1e-2


# --------------------------------------------------------------------------------------------- the pipeline


def inverted(case, steps: int):
    return case.tav.invert(case.latents[:, :2], steps=steps, prompt=SOURCE, return_trajectory=True)


@pytest.fixture(scope="module")
def trajectories():
    """Of each case, computed once. All tests run loops of three steps, so that they share few programs."""
    known = {}

    def of(case):
        return known[case.root] if case.root in known else known.setdefault(case.root, inverted(case, 6))

    return of


def options(path, **changes):
    return {"source": path, "source_prompt": SOURCE, "steps": 3, "inversion_steps": 6, "guidance": 4.0} | changes


@pytest.mark.slow
def test_other_controls_compile_nothing_and_change_the_edit(sd1, trajectories):
    path, tav = trajectories(sd1), sd1.tav
    first = tav.sample(EDIT, **options(path)).latents
    compiled = programs.denoise_loop._cache_size()
    left = np.zeros((16, 16))
    left[:, :8] = 1
    changes: list[dict] = [
        {"self_attention_steps": 0.0},
        {"feature_steps": 0.3},
        {"cross_attention_steps": 0.0},
        {"equalizer": {"blue": 5.0}},
        {"equalizer": {"square": 0.0, "blue": 2.0}},
        {"mask": left},
        {"mask": left, "blend_start": 0.7},
        {"source_prompt": "a red circle"},
        {"guidance": 2.0},
    ]
    found = [first, tav.sample(OTHER, **options(path)).latents]
    found += [tav.sample(EDIT, **options(path, **change)).latents for change in changes]
    # The attention of this network is flat, so that its maps of the word allow changes everywhere.
    tav.sample(EDIT, **options(path, blend_words=("square",)))
    assert programs.denoise_loop._cache_size() == compiled
    for i, one in enumerate(found):
        assert all(not np.array_equal(one, other) for other in found[:i]), i
    # Progress and a longer loop run it in chunks of three steps, the same program.
    done = []
    tav.sample(EDIT, **options(path, steps=6, progress=done.append))
    assert done == [3, 6]
    assert programs.denoise_loop._cache_size() == compiled


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "dpm++2m"])
def test_a_mask_of_zeros_is_the_source_and_of_ones_no_mask(sd1, trajectories, sampler):
    path, tav = trajectories(sd1), sd1.tav
    zeros, pixels = np.zeros((16, 16)), np.zeros((2, 64, 64), np.uint8)
    for mask, steps in ((zeros, 3), (pixels, 3), (zeros, 6)):  # 6: in two chunks
        edit = tav.sample(EDIT, **options(path, mask=mask, sampler=sampler, steps=steps, progress=lambda _: None))
        assert np.array_equal(edit.latents, path[0])
        assert not edit.mask.any()
    if sampler == "ddim":  # half way, the first three steps use the empty prompt
        edit = tav.sample(EDIT, **options(path, mask=zeros, steps=6, strength=0.5))
        assert np.array_equal(edit.latents, path[0])
    free = tav.sample(EDIT, **options(path, sampler=sampler))
    for mask in (zeros + 1, pixels + 255, zeros == 0):
        assert np.array_equal(tav.sample(EDIT, **options(path, mask=mask, sampler=sampler)).latents, free.latents)
    assert free.mask.shape == (2, 16, 16)
    assert free.mask.all()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"guidance": 1.0}, {"steps": 6, "strength": 0.5}], ids=str)
def test_everything_off_equals_sampling_without_a_source(sd1, trajectories, changes):
    """Up to rounding: cross-attention sums in another order, and the batch has a row more."""
    path, tav = trajectories(sd1), sd1.tav
    given = {
        "latents": path[-1],
        "steps": 3,
        "inversion_steps": 6,
        "guidance": 4.0,
        "progress": lambda _: None,
    } | changes
    plain = tav.sample(EDIT, **given)
    del given["latents"]
    ours = tav.sample(EDIT, **options(path, **OFF, **given))
    assert difference(ours.latents, plain.latents) <= 1e-5
    assert plain.mask is None


@pytest.mark.slow
def test_several_prompts_share_one_source(sd1, trajectories):
    path, tav = trajectories(sd1), sd1.tav
    given = options(path, equalizer={"blue": 3.0}, blend_words=("square", "circle"), cross_attention_steps=0.7)
    together = tav.sample([EDIT, OTHER], **given)
    for edit in together:
        words = {word: factor for word, factor in given["equalizer"].items() if word in edit.prompt}
        blend = [word for word in given["blend_words"] if word in edit.prompt + SOURCE]
        alone = tav.sample(edit.prompt, **(given | {"equalizer": words, "blend_words": blend}))
        assert difference(edit.latents, alone.latents) <= 1e-4
        assert np.array_equal(edit.mask, alone.mask)
    assert not np.array_equal(together[0].latents, together[1].latents)


@pytest.mark.slow
def test_velocity(sd2):
    path, tav = inverted(sd2, 3), sd2.tav
    given = {"steps": 3, "inversion_steps": 3}
    assert np.array_equal(tav.sample(EDIT, **options(path, mask=np.zeros(path.shape[3:5]), **given)).latents, path[0])
    plain = tav.sample(EDIT, latents=path[-1], guidance=4.0, **given)
    off = tav.sample(EDIT, **options(path, **OFF, **given))
    assert difference(off.latents, plain.latents) <= 1e-5


# ------------------------------------------------------------------------------------------- input that is refused


@pytest.mark.parametrize("name", ["self_attention_steps", "feature_steps", "cross_attention_steps", "blend_start"])
@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan")])
def test_a_share_out_of_range_is_refused(sd1, name, value):
    message = refusal(InputError, sd1.tav.sample, EDIT, latents=sd1.latents, **{name: value})
    assert message == f"{name} is {value!r}; it must be from 0 (no step) to 1 (all steps)"


PATH = np.zeros((7, 1, 2, 16, 16, 4), np.float32)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"mask": np.ones((12, 16))},
            "the mask is [12, 16]; for this clip it must be [2, 64, 64] (pixels) or [2, 16, 16]",
        ),
        ({"mask": np.ones((3, 16, 16))}, "the mask is [3, 16, 16]"),
        ({"mask": np.ones((2, 64, 64, 3))}, "the mask is [2, 64, 64, 3]"),
        ({"mask": np.full((16, 16), 1.5)}, "the mask has values outside 0 to 1"),
        ({"mask": np.full((16, 16), np.nan)}, "the mask has values outside 0 to 1"),
        ({"equalizer": {"green": 2.0}}, "equalizer has 'green', which is not in"),
        ({"equalizer": {"blue": -1.0}}, "equalizer has -1.0 for 'blue'; it must be a number from 0 to 1000"),
        ({"equalizer": {"blue": float("inf")}}, "equalizer has inf for 'blue'"),
        ({"blend_words": ("dog",)}, "blend_words has 'dog', which is not in"),
        ({"blend_words": ("",)}, "blend_words has '', which is not in"),
        ({"blend_words": "red"}, "blend_words is 'red'; it must be a list of words, ('red',)"),
        ({"inversion_steps": 5}, "source is the trajectory of an inversion in 6 steps and inversion_steps is 5"),
        ({"inversion_steps": None}, "source is the trajectory of an inversion in 6 steps and inversion_steps is 3"),
        ({"steps": 7}, "steps is 7 and the latents were inverted in 6 steps"),
        ({"latents": np.repeat(PATH[-1], 2, axis=0)}, "the latents are [2, 2, 16, 16, 4]; expected [1, frames"),
        ({"frames": 3}, "frames is 3 and the latents are of frames 2; leave frames out"),
        ({"source_prompt": "\ud800"}, "the prompt '\\ud800' is not valid Unicode"),
    ],
)
def test_bad_input_is_refused(sd1, changes, expected):
    message = refusal(InputError, sd1.tav.sample, EDIT, **options(jnp.asarray(PATH), **changes))
    assert message.startswith(expected), message


def test_a_trajectory_of_another_clip_is_refused():
    for latents in (PATH[-1, :, :, :8], PATH[-1, :, :1]):
        message = refusal(InputError, validation.trajectory_of, PATH, jnp.asarray(latents), 6)
        assert (
            f"source is of latents [2, 16, 16, 4] and the latents are {list(latents.shape[1:])}; give both" in message
        )


def test_latents_in_place_of_a_trajectory_are_refused():
    for values in (PATH[-1], PATH[:, 0], np.repeat(PATH, 2, axis=1), PATH[:0], np.zeros(())):
        message = refusal(InputError, validation.trajectory, values)
        assert (
            "expected [steps + 1, 1, frames, height, width, channels], as invert(..., return_trajectory=True)"
            in message
        )


@pytest.mark.parametrize(
    "changes", [{"equalizer": {"blue": 2.0}}, {"blend_words": ("blue",)}, {"mask": np.ones((16, 16))}]
)
def test_controls_without_a_source_are_refused(sd1, changes):
    message = refusal(InputError, sd1.tav.sample, EDIT, latents=sd1.latents, **changes)
    assert message.startswith("equalizer, blend_words and mask need source=")


def test_masks_of_pixels_are_averaged():
    latents, mask = normal(1, 2, 3, 4, 4), np.zeros((12, 16), bool)
    mask[:6, :4] = True
    ours = np.asarray(validation.mask(mask, latents, 4))
    assert ours.shape == (1, 2, 3, 4, 1)
    assert ours[0, :, :, 0, 0].tolist() == [[1, 0.5, 0]] * 2
    assert not ours[..., 1:, :].any()
    assert np.array_equal(validation.mask(mask.astype(np.uint8) * 255, latents, 4), ours)
    assert np.array_equal(validation.mask(mask.astype(np.uint8), latents, 4), ours)


# --------------------------------------------------------------------------------------------------- memory


def test_memory_counts_the_row_of_the_source(sd1):
    estimator, latents = sd1.tav.memory_estimator, jnp.zeros((1, 24, 16, 16, 4))
    rows = {n: estimator.denoising("sampling", latents, rows=n) for n in (2, 3, 5, 9)}
    needed = {n: one.bytes_needed(one.shape, one.devices) - estimator.weights for n, one in rows.items()}
    assert [round(needed[n] / needed[2], 2) for n in (3, 5, 9)] == [1.5, 2.5, 4.5]
    given = options(jnp.zeros((4, 1, 24, 16, 16, 4)), inversion_steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAV_MEMORY_GIB", str((estimator.weights + 2.4 * needed[2]) / 2**30))
        with pytest.raises(MemoryError, match="sampling 24 frames of 64×64"):
            sd1.tav.sample([EDIT, OTHER], **given)

"""Windows over long clips: weights, context, and equality with the whole clip where it is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import refusal, same_run, train

from tav_jax import InputError, config
from tav_jax.cli.main import main
from tav_jax.diffusion import programs
from tav_jax.diffusion.network import NetworkOutput, unet_network
from tav_jax.diffusion.schedule import NoiseSchedule
from tav_jax.diffusion.windows import CONTEXT, Window, input_frames, input_mask, sliding_windows, windows_at_a_time
from tav_jax.distributed import memory
from tav_jax.io import validation
from tav_jax.models import Conditioning
from tav_jax.training.train_step import TrainExample, sample_window

STEP = NoiseSchedule.from_config({}).sampling_steps(5).slice(0, 1)
STEP = jax.tree.map(lambda values: values[0], STEP)


def random(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# --------------------------------------------------------------------------------------------- the windows of a clip


@pytest.mark.parametrize(
    ("frames", "window"), [(64, (16, 4)), (200, (16, 4)), (17, (16, 16)), (7, (3, 2)), (5, (4, 1))]
)
def test_windows_cover_the_clip_and_the_weights_are_a_pyramid(frames, window):
    w = Window(*window)
    starts = w.starts(frames)
    assert starts[0] == 0
    assert starts[-1] + w.frames == frames
    assert 1 <= np.diff(starts).min() <= np.diff(starts).max() <= w.stride
    half = -(-w.frames // 2)
    pyramid = [*range(1, half + 1), *range(w.frames - half, 0, -1)]
    total = np.zeros(frames)
    for start in starts:
        total[start : start + w.frames] += pyramid
    index, weights = w.averaging(frames)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    for frame, (places, values) in enumerate(zip(index, weights, strict=True)):
        for place, value in zip(places[values > 0], values[values > 0], strict=True):
            window_number, position = divmod(int(place), w.frames)
            assert starts[window_number] + position == frame
            assert value == np.float32(pyramid[position] / total[frame])
        assert (values > 0).sum() == ((starts <= frame) & (frame < starts + w.frames)).sum()


def test_a_pyramid_of_16_frames_in_closed_form():
    index, weights = Window(16, 16).averaging(24)  # windows 0 to 15 and 8 to 23
    assert index[10].tolist() == [10, 16 + 2]
    np.testing.assert_allclose(weights[10], [6 / 9, 3 / 9], rtol=1e-6)
    assert weights[0].tolist() == [1, 0]


def test_a_window_begins_with_frame_0():
    assert input_frames(5, 3).tolist() == [0, 5, 6, 7]
    assert input_frames(0, 3).tolist() == [0, 0, 1, 2]
    assert input_frames(jnp.array([0, 2]), 2).tolist() == [[0, 0, 1], [0, 2, 3]]
    assert input_mask(2).tolist() == [False, True, True]


@pytest.mark.parametrize(("rows", "data", "windows"), [(2, 1, 1), (2, 8, 4), (3, 8, 8), (2, 2, 1), (8, 8, 1)])
def test_the_mesh_divides_the_rows_of_a_batch_of_windows(rows, data, windows):
    assert windows_at_a_time(rows, data) == windows


# --------------------------------------------------------------------------------------------------- the network


def per_frame(latents, step, conditioning, carry):
    """A network that treats every frame alone: windows must change nothing."""
    text = conditioning.text.mean(axis=(1, 2))[:, None, None, None, None]
    return NetworkOutput(jnp.sin(latents) * text, latents.mean(axis=-1).reshape(*latents.shape[:2], -1)), carry


def test_a_network_without_attention_between_frames_is_unchanged():
    latents, conditioning = random(3, 11, 4, 4, 2), Conditioning(random(3, 5, 6, seed=1))
    whole, _ = per_frame(latents, STEP, conditioning, None)
    output, carry = sliding_windows(per_frame, Window(4, 3))(latents, STEP, conditioning, None)
    assert carry is None
    np.testing.assert_allclose(output.prediction, whole.prediction, atol=1e-6)
    np.testing.assert_allclose(output.word_maps, whole.word_maps, atol=1e-6)


def test_frame_0_is_that_of_the_whole_clip_in_every_window():
    def network(latents, step, conditioning, carry):
        assert conditioning.frame_mask is not None or latents.shape[1] == 9
        return NetworkOutput(latents + 3 * latents[:, :1]), carry

    latents, conditioning = random(1, 9, 2, 2, 1), Conditioning(random(1, 5, 6))
    whole, _ = network(latents, STEP, conditioning, None)
    output, _ = sliding_windows(network, Window(4, 2))(latents, STEP, conditioning, None)
    np.testing.assert_allclose(output.prediction, whole.prediction, atol=1e-5)


@pytest.fixture(scope="module")
def temporal(request):
    """The UNet of a reference case with random weights in place of the zeros of its temporal layers."""
    from conftest import _cases

    tav = _cases["sd1"].load()
    randomize_temporal_layers(tav)
    return tav


def randomize_temporal_layers(tav) -> None:
    from flax import nnx

    for path, value in nnx.to_flat_state(nnx.state(tav.components.unet)):
        if "attn_temp" in path and "to_out" in path:
            value.set_value(0.1 * random(*value.get_value().shape))


@pytest.mark.slow
def test_the_context_of_the_first_window_changes_nothing(temporal):
    """A copy of frame 0 that is masked, before the whole clip as its only window."""
    latents, conditioning = random(1, 4, 8, 8, 4), Conditioning(temporal.encode_text("red"))

    @jax.jit
    def both(unet):
        network = unet_network(unet)
        whole, _ = network(latents, STEP, conditioning, None)
        masked = conditioning._replace(frame_mask=input_mask(4))
        window, _ = network(latents[:, input_frames(0, 4)], STEP, masked, None)
        return whole.prediction, window.prediction[:, CONTEXT:]

    with temporal.jit_context():
        whole, window = both(temporal.components.unet)
    np.testing.assert_allclose(window, whole, atol=2e-5 * float(jnp.abs(whole).max()))


# ----------------------------------------------------------------------------------------------- the Python interface


@pytest.mark.slow
def test_windows_in_the_interface(sd1, temporal):
    """A window of the whole clip is today's sample; another clip, prompt or scale compiles nothing."""
    tav, latents = temporal, random(1, 6, 8, 8, 4)
    plain = tav.sample("red", latents=latents, steps=2, guidance=3.0).latents
    assert np.array_equal(tav.sample("red", latents=latents, steps=2, guidance=3.0, window=(6, 2)).latents, plain)
    windowed = tav.sample("red", latents=latents, steps=2, guidance=3.0, window=(4, 2)).latents
    assert 1e-4 < np.abs(windowed - plain).max() < 0.3 * np.abs(plain).max()
    tav.invert(latents, steps=2, window=(4, 2))
    compiled = programs.denoise_loop._cache_size()
    tav.sample("blue", latents=2 * latents, steps=2, guidance=7.5, negative_prompt="red", window=(4, 2))
    noise = tav.invert(2 * latents, steps=2, window=(4, 2), prompt="a square")
    assert noise.shape == latents.shape
    assert programs.denoise_loop._cache_size() == compiled


@pytest.mark.slow
def test_two_branch_editing_in_windows(temporal):
    """With a mask of zeros the source is returned exactly; word maps are those of the whole clip."""
    source = random(3, 1, 6, 8, 8, 4)
    options = {"source": source, "source_prompt": "a red square", "steps": 2, "guidance": 3.0, "window": (4, 2)}
    edit = temporal.sample("a blue square", mask=np.zeros((8, 8)), blend_start=0.0, **options)
    np.testing.assert_allclose(edit.latents, source[0], atol=1e-6)
    assert edit.mask.shape == (6, 8, 8)


@pytest.mark.parametrize(
    ("window", "said"),
    [
        (16, r"window is 16; it must be \(frames, stride\) with a stride from 1 to frames, such as \(16, 4\), or"),
        ((4, 2.5), r"window is \(4, 2.5\); it must be"),
        ((4,), r"window is \(4,\); it must be"),
        ((4, 5), r"window is \(4, 5\); it must be"),
        ((4, 0), r"window is \(4, 0\); it must be"),
        ((0, 0), r"window is \(0, 0\); it must be"),
        ((8, 2), r"window is 8 frames and the clip has 6; use at most 6, or leave window out"),
    ],
)
def test_a_window_that_cannot_be_used_is_refused(window, said):
    with pytest.raises(InputError, match=said):
        validation.window(window, 6)


def test_windows_that_are_not_needed_are_not_used():
    assert validation.window((), 6) is None
    assert validation.window((6, 2), 6) is None
    assert validation.window([5, 2], 6) == Window(5, 2)
    assert validation.training_window(6, 6) == 0


@pytest.mark.parametrize(("frames", "said"), [(7, "use at most 6"), (-1, "from 0 to"), (True, "whole number")])
def test_a_training_window_that_cannot_be_used_is_refused(frames, said):
    assert said in refusal(InputError, validation.training_window, frames, 6)


def test_windows_in_the_config():
    c = config.get_config()
    c.edit.window = (16, 4)
    c.train.window = 16
    checked = config.validate(c)
    assert (checked.edit.window, checked.train.window) == ((16, 4), 16)
    assert config.from_json(config.to_json(checked)).edit.window == (16, 4)
    c.edit.window = (16, 40)
    assert "window is (16, 40); it must be" in refusal(InputError, config.validate, c)


# ------------------------------------------------------------------------------------------------------------ memory


def test_the_estimate_is_that_of_one_window(sd1):
    estimator = sd1.tav.memory_estimator

    def needed(frames: int, window: Window | None) -> int:
        workload = estimator.denoising("sampling", jnp.zeros((1, frames, 16, 16, 4)), 2, window)
        return workload.bytes_needed(workload.shape, workload.devices)

    window = Window(16, 4)
    assert needed(200, window) == needed(64, window) == needed(16 + CONTEXT, None) < needed(64, None)
    latents = jnp.zeros((1, 200, 16, 16, 4))
    tuned = [
        estimator.tuning(latents, 10, remat="block", fsdp=False, window=n).bytes_needed(memory.Shape(n, 64, 64), 1)
        for n in (16, 8)
    ]
    assert tuned[0] > tuned[1]
    workload = estimator.denoising("sampling", latents, 2, window)
    assert str(workload) == "sampling windows of 16 frames of 64×64"
    assert estimator.prompt_bytes(latents, (16, 4)) == estimator.prompt_bytes(latents[:, :17])


# ------------------------------------------------------------------------------------------------------------ tuning


def test_a_training_example_is_a_random_window_with_its_context():
    example = TrainExample(random(1, 9, 2, 2, 1), random(1, 9, 2, 2, 1, seed=1), jnp.int32(3))
    conditioning = Conditioning(random(1, 5, 6))
    assert sample_window(jax.random.key(0), example, conditioning, 9) == (example, conditioning)
    assert sample_window(jax.random.key(0), example, conditioning, 0) == (example, conditioning)
    starts = set()
    for seed in range(40):
        window, masked = sample_window(jax.random.key(seed), example, conditioning, 3)
        assert masked.frame_mask.tolist() == [False, True, True, True]
        start = int(jnp.argmax(jnp.all(example.latents[0] == window.latents[0, CONTEXT], axis=(1, 2, 3))))
        starts.add(start)
        frames = input_frames(start, 3)
        assert np.array_equal(window.latents, example.latents[:, frames])
        assert np.array_equal(window.noise, example.noise[:, frames])
    assert starts == set(range(7))


@pytest.mark.slow
def test_tuning_with_a_window_is_resumed_bit_for_bit(settings, tmp_path):
    changes = {"clip__frames": 5, "train__window": 3}
    train(tmp_path / "whole", settings(train__steps=4, **changes))
    train(tmp_path / "parts", settings(train__steps=2, **changes))
    train(tmp_path / "parts", settings(train__steps=4, **changes))
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    said = refusal(InputError, train, tmp_path / "long", settings(clip__frames=5, train__window=6))
    assert "train.window is 6 frames and the clip has 5; use at most 5" in said
    assert not (tmp_path / "long").exists()


@pytest.mark.slow
def test_windows_on_the_command_line(run_copy, capsys):
    line = ["edit", f"--workdir={run_copy}", "--prompt=a blue square"]
    assert main([*line, "--window", "5", "2"]) == 2
    assert "window is 5 frames and the clip has 3; use at most 3, or leave window out" in capsys.readouterr().err
    assert main([*line, "--window", "2", "3"]) == 2
    assert "window is (2, 3); it must be (frames, stride) with a stride from 1 to frames" in capsys.readouterr().err
    assert not list(run_copy.glob("edits/*"))
    assert main([*line, "--window", "2", "1", "--feature-reuse=2"]) == 0
    assert [*run_copy.glob("edits/a-blue-square-*window-2-1*.mp4")]
    assert "--window 2 1" in (run_copy / "edits/index.html").read_text()
    inversions = set(run_copy.glob("inversions/*"))
    assert main([*line, "--force"]) == 0
    assert set(run_copy.glob("inversions/*")) > inversions  # another one, of the whole clip

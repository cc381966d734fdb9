"""Loading and saving clips. The tests write their own videos with PyAV and read saved clips back with PyAV.

A numbered frame shows its number as eight black or white blocks, so that a test can tell which frames were loaded.
"""

import itertools
import os
import re
import resource
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tav_jax.cli import terminal
from tav_jax.errors import InputError, MissingError, TavError
from tav_jax.io import caption, decoding, paths, tone_mapping, video
from tav_jax.io.side_by_side import side_by_side
from tav_jax.io.video import Audio, Clip, Edit, load_video

RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 170, 60), (30, 40, 210), (128, 128, 128)
# With two B-frames, two of three frames are stored out of display order.
H264 = {"x264-params": "bframes=2:b-adapt=0:b-pyramid=none:scenecut=0:keyint=12"}


# -------------------------------------------------------------------------------------------- writing and reading files


def numbered(number: int, height: int = 32, width: int = 64) -> np.ndarray:
    bits = np.array([255 * (number >> bit & 1) for bit in range(8)], np.uint8)
    return np.broadcast_to(np.repeat(bits, width // 8)[None, :, None], (height, width, 3)).copy()


def numbered_frames(count: int) -> np.ndarray:
    return np.stack([numbered(i % 256) for i in range(count)])


def numbers(frames) -> list[int]:
    """The numbers that the frames show."""
    found = []
    for frame in frames:
        blocks = frame.astype(float).mean((0, 2)).reshape(8, -1).mean(1)
        assert ((blocks < 60) | (blocks > 195)).all(), f"not a numbered frame: {blocks}"
        found.append(sum(1 << bit for bit in range(8) if blocks[bit] > 128))
    return found


def write(
    path: Path,
    frames,
    *,
    rate=10,
    codec="libx264",
    pix_fmt="yuv420p",
    options=None,
    movflags="",
    times=None,
    audio=None,
    audio_codec="aac",
    audio_start=0.0,
    pixel_aspect=None,
    metadata=None,
) -> Path:
    """`times` are those of the frames in ms; `audio` is (samples [channels, n], rate, layout)."""
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=rate, options=options or (H264 if codec == "libx264" else {}))
        stream.codec_context.thread_count = 2  # by default one per CPU, and the slices of a frame depend on it
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if audio is not None:
            samples, audio_rate, layout = audio
            audio_stream = container.add_stream(audio_codec, rate=audio_rate, layout=layout)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
            if audio is not None:  # interleaved with the frames
                low, high = (min(samples.shape[1], round(i * audio_rate / rate)) for i in (index, index + 1))
                if low == high:
                    continue
                format = "fltp" if audio_codec == "aac" else "flt"
                chunk = samples[:, low:high] if format == "fltp" else samples[:, low:high].T.reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(chunk), format=format, layout=layout)
                frame.sample_rate, frame.time_base = audio_rate, Fraction(1, audio_rate)
                frame.pts = low + round(audio_start * audio_rate)
                container.mux(audio_stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            container.mux(audio_stream.encode())
    return path


def tone(seconds: float, begin: float, end: float, rate: int = 48000, channels: int = 1):
    """A tone of 1 kHz between `begin` and `end`, and silence around it."""
    t = np.arange(round(seconds * rate)) / rate
    wave = np.where((t >= begin) & (t < end), 0.5 * np.sin(2 * np.pi * 1000 * t), 0).astype(np.float32)
    return np.repeat(wave[None], channels, 0), rate, {1: "mono", 2: "stereo", 6: "5.1"}[channels]


def tone_interval(samples: np.ndarray, rate: int) -> tuple[float, float]:
    """When the tone begins and ends, in seconds."""
    step = rate // 500
    wave = samples[0][: len(samples[0]) // step * step].reshape(-1, step)
    loud = np.flatnonzero(np.abs(wave).max(1) > 0.2)
    assert len(loud), "silent"
    return loud[0] * step / rate, (loud[-1] + 1) * step / rate


class Decoded:
    """A video file as PyAV reads it."""

    def __init__(self, path: Path):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            self.seconds = Fraction(container.duration, av.time_base)
            self.rate, self.codec, self.pix_fmt = stream.average_rate, stream.codec_context.name, stream.pix_fmt
            context = stream.codec_context
            self.tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
            self.video_seconds = stream.duration * stream.time_base
            self.raw = list(container.decode(stream))
            self.frames = [frame.to_ndarray(format="rgb24") for frame in self.raw]
            self.times = [frame.pts * stream.time_base for frame in self.raw]
            self.audio_codec = container.streams.audio[0].codec_context.name if container.streams.audio else None
        self.samples = None
        if self.audio_codec:
            with av.open(str(path)) as container:
                stream = container.streams.audio[0]
                self.audio_rate, self.audio_seconds = stream.rate, stream.duration * stream.time_base
                chunks = list(container.decode(stream))
                assert chunks[0].pts == 0
                self.samples = np.concatenate([chunk.to_ndarray() for chunk in chunks], 1)


def image_directory(path: Path, images: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    for name, image in images.items():
        Image.fromarray(image).save(path / name)
    return path


def error_message(error, *args, **options) -> str:
    """The error message of `load_video`, which must be one sentence."""
    with pytest.raises(error) as caught:
        load_video(*args, **options)
    assert isinstance(caught.value, TavError)
    message = str(caught.value)
    assert not re.search(r"\n|\. |\.$", message), f"not one sentence: {message}"
    return message


@pytest.fixture(scope="module")
def clip20(tmp_path_factory) -> Path:
    """Twenty numbered frames at 10 fps, in H.264 with B-frames."""
    return write(tmp_path_factory.mktemp("clip") / "clip20.mp4", numbered_frames(20))


# -------------------------------------------------------------------------------------------------------------- loading

VP8 = {"codec": "libvpx", "options": {"deadline": "realtime"}}
MJPEG = {"codec": "mjpeg", "pix_fmt": "yuvj420p"}
CONTAINERS = {
    "a.mp4": {},
    "faststart.mp4": {"movflags": "faststart"},
    "fragments.mp4": {"movflags": "frag_keyframe+empty_moov"},
    "a.mov": {"codec": "mpeg4"},
    "a.mkv": {"codec": "ffv1"},
    "a.webm": VP8,
    "a.avi": MJPEG,
    "a.ts": {},
    "ten-bits.mp4": {"pix_fmt": "yuv420p10le"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "a.asf": {"codec": "mpeg4"},
    "a.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "name: 100%d of it?.mp4": {},  # FFmpeg would read a protocol and a pattern in this name
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_loads_all_frames_in_order(tmp_path, name):
    clip = load_video(write(tmp_path / name, numbered_frames(15), **CONTAINERS[name]))
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape == (15, 32, 64, 3)
    assert numbers(clip.frames) == list(range(15))
    assert clip.fps == 10.0
    assert clip.audio is None


def test_stream_without_timestamps_loads_all_frames_in_order(tmp_path):
    path = write(tmp_path / "a.h264", numbered_frames(15))
    assert numbers(load_video(path).frames) == list(range(15))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"frames": 4}, [0, 1, 2, 3]),
        ({"frames": 4, "start": 3}, [3, 4, 5, 6]),
        ({"frames": 4, "stride": 6}, [0, 6, 12, 18]),
        ({"frames": 3, "start": 5, "stride": 7}, [5, 12, 19]),
        ({"start": 17}, [17, 18, 19]),
        ({"stride": 8}, [0, 8, 16]),
        ({"start": 19}, [19]),
    ],
)
def test_start_stride_and_frames_select_the_frames(clip20, options, expected):
    clip = load_video(clip20, **options)
    assert numbers(clip.frames) == expected
    assert clip.fps == 10 / options.get("stride", 1)


def test_fractional_frame_rate(tmp_path):
    path = write(tmp_path / "ntsc.mp4", numbered_frames(7), rate=Fraction(30000, 1001))
    assert load_video(path).fps == pytest.approx(30000 / 1001, rel=1e-12)
    assert load_video(path, stride=2).fps == pytest.approx(15000 / 1001, rel=1e-12)


def test_fps_replaces_the_rate_of_the_file(tmp_path):
    path = write(tmp_path / "a.mp4", numbered_frames(6), audio=tone(0.6, 0, 0.6))
    clip = load_video(path, fps=25.0, stride=2)
    assert clip.fps == 12.5
    assert numbers(clip.frames) == [0, 2, 4]
    assert clip.audio is None  # it would not stay in sync with the frames


def assert_timing(clip: Clip, times: list[int]) -> None:
    """Each frame of the clip is one that the file shows within half a slot of that moment."""

    def shown_at(moment: float) -> int:
        return max(i for i, time in enumerate(times) if time <= moment)

    for slot, shown in enumerate(numbers(clip.frames)):
        moment, slack = 1000 * slot / clip.fps, 500 / clip.fps + 1
        assert shown_at(max(0, moment - slack)) <= shown <= shown_at(moment + slack)


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.webm"])
def test_variable_frame_rate_keeps_its_timing(tmp_path, name):
    times = [0, 100, 200, 300, 400, 500, 700, 800, 900, 1200, 1300, 1400, 1500, 1600, 1700, 1800, 1900, 2000]
    path = write(tmp_path / name, numbered_frames(len(times)), times=times, **(VP8 if name == "v.webm" else {}))
    clip = load_video(path)
    assert len(clip.frames) / clip.fps == pytest.approx(2.1, abs=0.1)
    assert_timing(clip, times)
    assert set(numbers(clip.frames)) == set(range(len(times)))  # all are at multiples of 0.1 s, so none is dropped


def test_irregular_timestamps_keep_their_timing(tmp_path):
    times = [0, 33, 71, 90, 140, 390, 400, 655, 700, 741, 803, 990]
    clip = load_video(write(tmp_path / "v.mp4", numbered_frames(len(times)), times=times))
    assert clip.fps < 20  # the average is about 12; the clock of the file ticks 1000 times per second
    assert_timing(clip, times)


@pytest.mark.parametrize(
    ("steps", "fps"),
    [
        ([34, 33, 35, 31, 33, 34] * 10, 30),  # a phone's jitter: one slot per frame
        ([40, 40, 60] * 8, 22),  # a grid of 50 fps would repeat most frames
    ],
)
def test_grid_is_about_as_fine_as_the_frames(tmp_path, steps, fps):
    times = [0, *np.cumsum(steps).tolist()]
    clip = load_video(write(tmp_path / "v.mp4", numbered_frames(len(times)), times=times, rate=30))
    assert clip.fps == pytest.approx(fps, rel=0.02)
    assert len(clip.frames) == pytest.approx(len(times), abs=1)
    if fps == 30:
        assert numbers(clip.frames) == list(range(61))


@pytest.mark.parametrize(
    ("durations", "expected"),
    [
        ([100] * 6, [0, 1, 2, 3, 4, 5]),
        ([100, 100, 300, 100, 100, 100], [0, 1, 2, 2, 2, 3, 4, 5]),
        ([100, 100, 100, 100, 100, 2000], [0, 1, 2, 3, 4] + [5] * 20),
    ],
)
def test_gif_with_pauses(tmp_path, durations, expected):
    images = [Image.fromarray(frame) for frame in numbered_frames(6)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=durations)
    clip = load_video(tmp_path / "a.gif")
    assert clip.fps == 10.0
    assert numbers(clip.frames) == expected


# ------------------------------------------------------------------------------------------- rotation, size and colors


def quarters(height: int, width: int) -> np.ndarray:
    """Red and green above, blue and grey below."""
    top, bottom = (np.repeat(np.array([pair], np.uint8), width // 2, 1) for pair in ((RED, GREEN), (BLUE, GREY)))
    return np.repeat(np.concatenate([top, bottom]), height // 2, 0)


def corners(frame: np.ndarray) -> list[tuple]:
    """The color nearest to the one at the center of each quarter: top left, top right, bottom left, bottom right."""
    h, w = frame.shape[0] // 4, frame.shape[1] // 4
    pixels = [frame[y, x].astype(int) for y in (h, 3 * h) for x in (w, 3 * w)]
    return [min((RED, GREEN, BLUE, GREY), key=lambda color: abs(pixel - color).sum()) for pixel in pixels]


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Write (a, b, c, d) into the track header of an MP4: the point (x, y), y down, is shown at (ax + cy, bx + dy)."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd")
    assert data[header + 4] == 0  # version 0, with times of 32 bits
    offset = header + 4 + 40
    assert data[offset : offset + 4] == (1 << 16).to_bytes(4, "big")  # the identity matrix begins with 1.0
    a, b, c, d = (value << 16 for value in matrix)
    cells = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    data[offset : offset + 36] = b"".join(cell.to_bytes(4, "big", signed=True) for cell in cells)
    path.write_bytes(data)
    return path


ROTATIONS = {  # clockwise, in degrees: display matrix and the colors of the corners
    0: ((1, 0, 0, 1), [RED, GREEN, BLUE, GREY]),
    90: ((0, 1, -1, 0), [BLUE, RED, GREY, GREEN]),
    180: ((-1, 0, 0, -1), [GREY, BLUE, GREEN, RED]),
    270: ((0, -1, 1, 0), [GREEN, GREY, RED, BLUE]),
}


SIGNS = list(itertools.product((-1, 1), repeat=2))


@pytest.mark.parametrize("matrix", [(x, 0, 0, y) for x, y in SIGNS] + [(0, x, y, 0) for x, y in SIGNS])
def test_every_display_matrix(tmp_path, matrix):
    """All rotations and reflections: each color is where the matrix shows it."""
    path = set_display_matrix(write(tmp_path / "a.mp4", [quarters(64, 96)] * 2), matrix)
    a, b, c, d = matrix
    shown = {}
    for x, y, color in ((-1, -1, RED), (1, -1, GREEN), (-1, 1, BLUE), (1, 1, GREY)):
        shown[b * x + d * y, a * x + c * y] = color  # keys in the order of `corners`
    frames = load_video(path).frames
    assert frames.shape == (2, *((64, 96) if a else (96, 64)), 3)
    assert corners(frames[0]) == [shown[key] for key in sorted(shown)]


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotated_video_is_loaded_upright(tmp_path, rotation):
    matrix, expected = ROTATIONS[rotation]
    path = set_display_matrix(write(tmp_path / "phone.mp4", [quarters(64, 96)] * 2), matrix)
    frames = load_video(path).frames
    assert frames.shape == (2, *((96, 64) if rotation % 180 else (64, 96)), 3)
    assert corners(frames[0]) == expected


PAL_WIDE = Fraction(64, 45)  # 720×576 pixels shown as 16:9


def square(height: int = 576, width: int = 720) -> np.ndarray:
    """`quarters` with a white square of 200×200 pixels at the center."""
    frame = quarters(height, width)
    frame[height // 2 - 100 : height // 2 + 100, width // 2 - 100 : width // 2 + 100] = 255
    return frame


def square_size(frame: np.ndarray) -> tuple[int, int]:
    """(height, width) of the white square. Every other color has a component below 200."""
    white = frame.min(-1) > 190
    return int(white.any(1).sum()), int(white.any(0).sum())


def ffmpeg_display_frame(path: Path) -> np.ndarray:
    """The first frame as FFmpeg's own filter scales it to square pixels, before any rotation."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        source = {
            "video_size": f"{stream.width}x{stream.height}",
            "pix_fmt": stream.pix_fmt,
            "time_base": str(stream.time_base),
            "pixel_aspect": str(stream.sample_aspect_ratio),
        }
        nodes = [
            graph.add("buffer", ":".join(f"{name}={value}" for name, value in source.items())),
            graph.add("scale", "iw*sar:ih:flags=bicubic"),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        ]
        for left, right in itertools.pairwise(nodes):
            left.link_to(right)
        graph.configure()
        graph.push(next(container.decode(stream)))
        return graph.pull().to_ndarray(format="rgb24")


@pytest.mark.parametrize(
    ("name", "codec", "aspect"),
    [
        ("a.mp4", "libx264", PAL_WIDE),
        ("a.mkv", "libx264", PAL_WIDE),
        ("a.mov", "mpeg4", PAL_WIDE),
        ("a.ts", "mpeg2video", PAL_WIDE),
        ("a.mp4", "libx264", Fraction(8, 9)),  # NTSC 4:3, narrower than stored
        ("a.mkv", "libx264", Fraction(8, 9)),
    ],
)
def test_anamorphic_video_gets_square_pixels(tmp_path, name, codec, aspect):
    path = write(tmp_path / name, [square()] * 3, codec=codec, pixel_aspect=aspect)
    frame = load_video(path, frames=1).frames[0]
    assert frame.shape == (576, 720 * aspect, 3)
    assert square_size(frame) == (200, pytest.approx(200 * aspect, abs=1))
    drawn = np.asarray(Image.fromarray(square()).resize((int(720 * aspect), 576), Image.Resampling.BICUBIC))
    for expected in (drawn, ffmpeg_display_frame(path)):  # FFmpeg also scales the chroma, at half the resolution
        assert abs(frame.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rotated_anamorphic_video_gets_square_pixels(tmp_path, rotation, container):
    matrix, expected = ROTATIONS[rotation]
    path = set_display_matrix(write(tmp_path / "a.mp4", [square()] * 3, pixel_aspect=PAL_WIDE), matrix)
    if container == "mkv":  # copied, not encoded again, so that the rotation is written to the new file
        with av.open(str(path)) as source, av.open(str(tmp_path / "a.mkv"), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    target.mux(packet)
        path = tmp_path / "a.mkv"
    frame = load_video(path, frames=1).frames[0]
    quarter_turn = rotation % 180 != 0
    assert frame.shape == ((1024, 576, 3) if quarter_turn else (576, 1024, 3))
    assert square_size(frame) == ((284, 200) if quarter_turn else (200, 284))
    assert corners(frame) == expected


def test_crop_keeps_the_display_aspect_and_stretch_fills_the_size(tmp_path):
    path = write(tmp_path / "a.mp4", [square()], pixel_aspect=PAL_WIDE)

    def loaded(*size: int, fit: str) -> tuple[int, int]:
        frames = load_video(path, size=size, fit=fit).frames
        assert frames.shape == (1, *size, 3)
        return square_size(frames[0])

    height, width = loaded(288, 288, fit="crop")
    assert height == pytest.approx(100, abs=1)
    assert width == pytest.approx(100 * PAL_WIDE, abs=1)
    assert loaded(576, 1024, fit="crop") == loaded(576, 1024, fit="stretch") == (200, 284)
    assert loaded(576, 720, fit="stretch") == pytest.approx((200, 200), abs=1)  # the stored pixels again
    assert loaded(288, 720, fit="stretch") == pytest.approx((100, 200), abs=1)


@pytest.mark.parametrize("aspect", [Fraction(0), Fraction(1), Fraction(17), Fraction(1, 17), Fraction(1000)])
def test_missing_or_invalid_pixel_aspect_means_square_pixels(tmp_path, aspect):
    path = write(tmp_path / "a.mp4", numbered_frames(3), pixel_aspect=aspect)
    plain = write(tmp_path / "plain.mp4", numbered_frames(3))
    np.testing.assert_array_equal(load_video(path).frames, load_video(plain).frames)


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(16), 1024), (Fraction(12, 11), 64), (Fraction(1, 4), 16)])
def test_display_width_is_cropped_to_multiples_of_8(tmp_path, aspect, width):
    path = write(tmp_path / "a.mp4", numbered_frames(3), pixel_aspect=aspect)
    assert load_video(path).frames.shape == (3, 32, width, 3)


def test_display_size_above_the_limit(tmp_path):
    path = write(tmp_path / "a.mp4", [np.zeros((32, 2048, 3), np.uint8)], pixel_aspect=Fraction(16))
    message = error_message(InputError, path, size=(8, 8))
    assert "a.mp4 is 32×32768 pixels, more than 16384 on a side; use a smaller one" in message


@pytest.mark.parametrize(
    ("height", "width", "fit"),
    [
        (32, 32, "crop"),
        (32, 96, "crop"),
        (48, 16, "crop"),
        (96, 128, "crop"),
        (32, 32, "stretch"),
        (64, 16, "stretch"),
    ],
)
@pytest.mark.parametrize("shape", [(64, 160), (160, 64), (120, 120)])
def test_crop_uses_the_center_and_stretch_the_whole_frame(tmp_path, shape, height, width, fit):
    """Red rises to the right and green downwards, so that each pixel shows its position in the source."""
    h, w = shape
    x, y = np.meshgrid(np.arange(w), np.arange(h))
    ramp = np.stack([x, y, 0 * y], -1).astype(np.uint8)
    frame = load_video(image_directory(tmp_path / "f", {"1.png": ramp}), size=(height, width), fit=fit).frames[0]
    assert frame.shape == (height, width, 3)
    scale = (h / height, w / width) if fit == "stretch" else [min(h / height, w / width)] * 2
    for axis, length, side, color in ((0, h, height, 1), (1, w, width, 0)):
        expected = length / 2 - 0.5 + (np.arange(side) - side / 2 + 0.5) * scale[axis]
        found = frame[..., color].mean(1 - axis)
        # Colors are whole numbers, and at the edges the filter reaches beyond the frame.
        assert abs(found - expected)[2:-2].max() <= 0.6


def test_without_a_size_frames_are_cropped_to_multiples_of_8(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8)
    frames = load_video(image_directory(tmp_path / "f", {"1.png": image})).frames
    np.testing.assert_array_equal(frames[0], image[2:42, 3:67])


def test_multiples_of_4_are_allowed(clip20):
    assert load_video(clip20, frames=1, size=(20, 12)).frames.shape == (1, 20, 12, 3)


LUMA = {1: (0.2126, 0.0722), 6: (0.299, 0.114)}  # colorspace tag (BT.709, BT.601): weights of red and blue


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("tag", LUMA)
@pytest.mark.parametrize("aspect", [Fraction(1), PAL_WIDE])
def test_colors_follow_the_tags_of_the_file(tmp_path, aspect, tag, full):
    for color in (RED, GREEN, BLUE, GREY):
        red, green, blue = np.array(color) / 255
        kr, kb = LUMA[tag]
        y = kr * red + (1 - kr - kb) * green + kb * blue
        cb, cr = (blue - y) / (2 - 2 * kb), (red - y) / (2 - 2 * kr)
        planes = (255 * y, 255 * cb + 128, 255 * cr + 128) if full else (219 * y + 16, 224 * cb + 128, 224 * cr + 128)
        image = np.concatenate(
            [np.full((rows, 64), round(value), np.uint8) for rows, value in zip((64, 16, 16), planes, strict=True)]
        )
        with av.open(str(tmp_path / "a.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10, options={"crf": "0"})
            stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
            context = stream.codec_context
            context.colorspace, context.color_range, context.sample_aspect_ratio = tag, 2 if full else 1, aspect
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="yuv420p")))
            container.mux(stream.encode())
        frames = load_video(tmp_path / "a.mp4").frames
        assert frames.shape[2] == round(64 * aspect) // 8 * 8
        assert abs(frames.astype(int) - color).max() <= 3


BT2020 = np.array([[0.627404, 0.329283, 0.043313], [0.069097, 0.919541, 0.011362], [0.016391, 0.088013, 0.895595]])


def pq(light) -> np.ndarray:
    """The PQ signal of light in cd/m² (BT.2100, table 4)."""
    y = (np.asarray(light, float) / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg(light) -> np.ndarray:
    """The HLG signal with which a display with a peak of 1000 cd/m² shows this RGB (BT.2100, table 5)."""
    light = np.asarray(light, float) / 1000
    luminance = light @ [0.2627, 0.6780, 0.0593]
    scene = light / luminance ** (1 - 1 / 1.2) if luminance else light
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def write_hdr(path: Path, signals, transfer: int, colorspace: int = 9) -> Path:
    """10 bits, BT.2020 non-constant luminance, one frame of one color for each R'G'B' signal."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace, context.color_range = transfer, 9, colorspace, 1
        for red, green, blue in signals:
            y = 0.2627 * red + 0.6780 * green + 0.0593 * blue
            planes = (876 * y + 64, 896 * (blue - y) / 1.8814 + 512, 896 * (red - y) / 1.4746 + 512)
            frame = av.VideoFrame(64, 64, "yuv420p10le")
            for plane, value in zip(frame.planes, planes, strict=True):
                plane.update(np.full(plane.buffer_size // 2, round(value), np.uint16).tobytes())
            frame.color_trc, frame.color_primaries, frame.colorspace, frame.color_range = transfer, 9, colorspace, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# Linear BT.709 in units of reference white (203 cd/m²) and the 8-bit signal after tone mapping.
HDR_COLORS = [
    ((0.0, 0.0, 0.0), (0, 0, 0)),
    ((0.18, 0.18, 0.18), (125, 125, 125)),  # 255 · 0.18^(1/2.4)
    ((0.5, 0.5, 0.5), (191, 191, 191)),  # the knee: 255 · 0.5^(1/2.4)
    ((1.0, 1.0, 1.0), (227, 227, 227)),  # 0.5 + 0.5 · 1 · (1 + 1/8.852²)/2 = 0.753
    ((2.0, 2.0, 2.0), (243, 243, 243)),  # 0.5 + 0.5 · 3 · (1 + 3/8.852²)/4 = 0.889
    ((1000 / 203,) * 3, (255, 255, 255)),
    ((0.4, 0.0, 0.0), (174, 0, 0)),  # the primaries of BT.709
    ((0.0, 0.4, 0.0), (0, 174, 0)),
    ((0.0, 0.0, 0.4), (0, 0, 174)),
    ((2.0, 0.5, 0.125), (243, 136, 77)),  # all three are multiplied by 0.889/2
]


@pytest.mark.parametrize(("transfer", "name", "signal"), [(16, "PQ", pq), (18, "HLG", hlg)])
@pytest.mark.parametrize("colorspace", [9, 2])
def test_hdr_is_tone_mapped(tmp_path, transfer, name, signal, colorspace):
    signals = [signal(203 * BT2020 @ color) for color, _ in HDR_COLORS]
    path = write_hdr(tmp_path / "phone.mp4", signals, transfer, colorspace)
    with pytest.warns(UserWarning, match=rf"phone.mp4 is an HDR video \({name}\); its colors were tone mapped to SDR"):
        frames = load_video(path).frames
    for frame, (color, expected) in zip(frames, HDR_COLORS, strict=True):
        # A step of 10 bits of a bright primary is 0.1 % of the light of the others: 255 · 0.001^(1/2.4) = 14.
        tolerance = [3 if value else 14 for value in expected]
        assert (abs(frame.astype(int) - expected).max((0, 1)) <= tolerance).all(), (color, frame[0, 0], expected)


def test_warnings_of_commands_are_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    terminal.shorten_warnings()
    warning = UserWarning("phone.mp4 is an HDR video (PQ)")
    assert warnings.formatwarning(warning, UserWarning, video.__file__, 3) == "tav: phone.mp4 is an HDR video (PQ)\n"
    assert "test_video.py:3: UserWarning: phone.mp4" in warnings.formatwarning(warning, UserWarning, __file__, 3)


def test_tone_curve():
    light = np.linspace(0, tone_mapping.PEAK / tone_mapping.REFERENCE_WHITE, 1000)
    curve = tone_mapping.tone_curve(light)
    slope = np.diff(curve) / np.diff(light)
    assert curve[-1] == pytest.approx(1)
    assert (slope > 0).all()
    assert (np.diff(slope) <= 1e-6).all()  # no jump of the slope, at the knee or elsewhere
    assert abs(np.diff(slope)).max() < 0.02


# ------------------------------------------------------------------------------------------------ directories of images


def test_images_are_ordered_by_the_numbers_in_their_names(tmp_path):
    names = ["frame2.png", "frame10.png", "frame1.png", "frame03.PNG", "frame1b.bmp"]
    path = image_directory(tmp_path / "f", {name: numbered(i) for i, name in enumerate(names)})
    (path / "notes.txt").write_text("not an image")
    (path / "._frame0.png").write_bytes(b"metadata that macOS writes")
    clip = load_video(path)
    expected = ["frame1.png", "frame1b.bmp", "frame2.png", "frame03.PNG", "frame10.png"]
    assert [names[i] for i in numbers(clip.frames)] == expected
    assert clip.fps == 8.0
    assert clip.audio is None
    assert load_video(path, fps=12.0, stride=2).fps == 6.0


def test_images_of_several_kinds(tmp_path):
    image = quarters(64, 96)
    path = image_directory(tmp_path / "f", {"1.png": image})
    plain = Image.fromarray(image)
    plain.convert("RGBA").save(path / "2.png")
    plain.convert("P", palette=Image.Palette.ADAPTIVE).save(path / "3.png")
    plain.save(path / "4.webp", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated clockwise by 90°
    plain.transpose(Image.Transpose.ROTATE_90).save(path / "5.jpg", quality=95, subsampling=0, exif=exif)
    frames = load_video(path).frames
    assert frames.shape == (5, 64, 96, 3)
    for frame in frames:
        assert abs(frame.astype(int) - image).mean() < 2


def test_image_types_keep_their_brightness(tmp_path):
    """Each image is a ramp from black to white in another type; transparent parts are white."""
    ramp = np.tile(np.arange(0, 256, 4, np.uint8), (8, 1))  # [8, 64]
    grey = Image.fromarray(ramp)
    rgb = Image.merge("RGB", [grey] * 3)
    half = Image.fromarray(np.repeat(np.repeat([[0, 255]], 8, 0), 32, 1).astype(np.uint8))  # opacity
    images = {
        "8.png": grey,
        "16.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "16.tif": Image.fromarray(ramp.astype(np.uint16) * 257),
        "float.tif": Image.fromarray(ramp.astype(np.float32) / 255),
        "cmyk.jpg": rgb.convert("CMYK"),
        "cmyk.tif": rgb.convert("CMYK"),
        "palette.png": grey.convert("P"),
        "alpha.png": Image.merge("LA", [grey, half]),
        "alpha.webp": Image.merge("RGBA", [grey, grey, grey, half]),
    }
    for name, image in images.items():
        image.save(tmp_path / name, **({"lossless": True} if "webp" in name else {"quality": 100}))
        expected = np.repeat(ramp[..., None], 3, -1).astype(int)
        if "alpha" in name:
            expected[:, :32] = 255
        frame = load_video(tmp_path / name).frames[0]
        assert abs(frame - expected).max() <= (3 if name == "cmyk.jpg" else 0), name


def test_images_that_are_neither_8_nor_16_bits(tmp_path):
    ramp = np.tile(np.arange(64), (8, 1))
    cases = {"float.tif": ramp.astype(np.float32), "nan.tif": np.full((8, 8), np.nan, np.float32)}
    for name, image in cases.items():
        Image.fromarray(image).save(tmp_path / name)
        message = error_message(InputError, tmp_path / name)
        assert re.search(r"has floating-point values, from \S+ to \S+, and images of this type must be", message)
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "32.tif")
    message = error_message(InputError, tmp_path / "32.tif")
    assert "32.tif has integers of 32 bits, from 0 to 63, and at most 16 are supported; convert it to 8 bits" in message


def test_percent_sign_in_the_name_of_an_image(tmp_path):
    for name, number in (("s%03d.png", 3), ("s001.png", 1), ("s002.png", 2)):
        Image.fromarray(numbered(number)).save(tmp_path / name)
    (tmp_path / "s%03d.mp4").write_bytes((tmp_path / "s%03d.png").read_bytes())
    assert numbers(load_video(tmp_path / "s%03d.png").frames) == [3]
    assert numbers(load_video(tmp_path / "s%03d.mp4").frames) == [3]  # read by FFmpeg


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
@pytest.mark.parametrize(
    ("durations", "expected", "fps"),
    [
        ([100] * 6, [0, 1, 2, 3, 4, 5], 10),
        ([100, 100, 300, 100, 100, 100], [0, 1, 2, 2, 2, 3, 4, 5], 10),
        ([33, 33, 34, 33, 33, 34], [0, 1, 2, 3, 4, 5], 30),
        ([0] * 6, [0, 1, 2, 3, 4, 5], 10),  # as browsers show it
    ],
)
def test_animated_images(tmp_path, name, durations, expected, fps):
    images = [Image.fromarray(frame) for frame in numbered_frames(6)]
    options = {"lossless": True} if name == "a.webp" else {}
    images[0].save(tmp_path / name, save_all=True, append_images=images[1:], duration=durations, **options)
    clip = load_video(tmp_path / name)
    assert clip.fps == pytest.approx(fps, rel=1e-3)
    assert numbers(clip.frames) == expected
    assert numbers(load_video(tmp_path / name, frames=2, start=1, stride=2, fps=4.0).frames) == expected[1:4:2]


def test_png_whose_first_image_is_not_part_of_its_animation(tmp_path):
    images = [Image.fromarray(frame) for frame in numbered_frames(4)]
    images[0].save(tmp_path / "a.png", save_all=True, append_images=images[1:], duration=100, default_image=True)
    assert numbers(load_video(tmp_path / "a.png").frames) == [1, 2, 3]


def test_truncated_animation(tmp_path):
    images = [Image.fromarray(frame) for frame in NOISE.frames]
    images[0].save(tmp_path / "a.webp", save_all=True, append_images=images[1:], duration=100)
    truncate(tmp_path / "a.webp", 0.5)
    assert "a.webp is not a readable image" in error_message(InputError, tmp_path / "a.webp")


def test_images_of_different_sizes_need_a_size(tmp_path):
    path = image_directory(tmp_path / "f", {"1.png": numbered(1, 32, 64), "2.png": numbered(2, 33, 64)})
    message = error_message(InputError, path)
    assert "differ in size (32×64 and 33×64); set size=(height, width)" in message
    assert numbers(load_video(path, size=(32, 64)).frames) == [1, 2]
    assert numbers(load_video(path, frames=1, start=1).frames) == [2]  # the other image is not selected


# --------------------------------------------------------------------------------------------------------------- audio


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_audio_covers_exactly_the_selected_frames(tmp_path, name):
    audio_codec = "aac" if name == "a.mp4" else "pcm_f32le"
    path = write(tmp_path / name, numbered_frames(30), audio=tone(3, 1.2, 1.7), audio_codec=audio_codec)
    for start, stride, count in ((0, 1, 30), (5, 1, 15), (5, 2, 10), (14, 3, 2), (16, 1, 9)):
        audio = load_video(path, frames=count, start=start, stride=stride).audio
        begin, end = start / 10, (start + count * stride) / 10
        assert audio.samples.shape == (1, round((end - begin) * 48000))
        assert audio.rate == 48000
        low, high = tone_interval(audio.samples, audio.rate)
        assert low == pytest.approx(max(1.2, begin) - begin, abs=0.005)
        assert high == pytest.approx(min(1.7, end) - begin, abs=0.005)


def test_silence_before_and_after_the_tone(tmp_path):
    path = write(tmp_path / "a.mkv", numbered_frames(30), audio=tone(3, 1, 2), audio_codec="pcm_f32le")
    assert not load_video(path, frames=10).audio.samples.any()
    assert not load_video(path, start=20).audio.samples.any()


def test_audio_and_frames_share_the_clock(tmp_path):
    """Frames begin at 1 s, audio at 1.5 s: a tone at 2.5 s is heard 1.5 s after the first frame."""
    times = [1000 + 100 * i for i in range(30)]
    options = {"audio": tone(2, 1, 1.2), "audio_codec": "pcm_f32le", "audio_start": 1.5}
    path = write(tmp_path / "a.mkv", numbered_frames(30), times=times, **options)
    audio = load_video(path).audio
    assert audio.samples.shape == (1, 3 * 48000)
    assert tone_interval(audio.samples, 48000) == pytest.approx((1.5, 1.7), abs=0.003)
    assert not audio.samples[:, :24000].any()
    audio = load_video(path, frames=10, start=10).audio
    assert tone_interval(audio.samples, 48000) == pytest.approx((0.5, 0.7), abs=0.003)


def test_six_channels_are_mixed_to_stereo(tmp_path):
    path = write(tmp_path / "a.mkv", [numbered(0)] * 10, audio=tone(1, 0.5, 0.8, channels=6), audio_codec="pcm_f32le")
    audio = load_video(path).audio
    assert audio.samples.shape == (2, 48000)
    assert audio.layout == "stereo"
    assert tone_interval(audio.samples, 48000) == pytest.approx((0.5, 0.8), abs=0.003)


def test_audio_is_saved(tmp_path):
    """A tone from 1.2 to 1.7 s; the saved clip begins at 0.5 s and has every second frame, at the source's speed."""
    source = write(tmp_path / "a.mp4", numbered_frames(30), audio=tone(3, 1.2, 1.7, 44100, 2))
    clip = load_video(source, frames=11, start=5, stride=2)
    saved = Decoded(clip.save(tmp_path / "out.mp4"))
    assert numbers(saved.frames) == list(range(5, 27, 2))
    assert saved.rate == 5
    assert saved.seconds == saved.video_seconds == Fraction(11, 5)
    assert saved.audio_codec == "aac"
    assert saved.audio_rate == 44100
    assert saved.samples.shape[0] == 2
    assert saved.audio_seconds == pytest.approx(2.2, abs=2 / 44100)
    assert tone_interval(saved.samples, 44100) == pytest.approx((0.7, 1.2), abs=0.01)


@pytest.mark.parametrize("rate", [8000, 37800, 192000])
def test_audio_of_any_sample_rate_is_saved(tmp_path, rate):
    clip = Clip(numbered_frames(16), 8.0, Audio(*tone(2, 0.5, 1, rate)))
    saved = Decoded(clip.save(tmp_path / "out.mp4"))
    assert tone_interval(saved.samples, saved.audio_rate) == pytest.approx((0.5, 1), abs=0.01)
    assert saved.seconds == 2


@pytest.mark.parametrize("seconds", [0.3, 0.5, 4])
def test_audio_ends_with_the_frames(tmp_path, seconds):
    clip = Clip(numbered_frames(16), 8.0, Audio(*tone(seconds, 0, seconds)))
    saved = Decoded(clip.save(tmp_path / "out.mp4"))
    assert saved.seconds == 2
    assert saved.audio_seconds == pytest.approx(min(seconds, 2), abs=1e-3)


def test_damaged_audio_is_loaded_up_to_the_damage(tmp_path):
    path = write(tmp_path / "a.mp4", numbered_frames(30), audio=tone(3, 0.5, 2.5))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(audio=0):
            if packet.size and packet.pts * packet.time_base > 1.5:
                data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    clip = load_video(path)
    assert numbers(clip.frames) == list(range(30))
    assert clip.audio.samples.shape == (1, 3 * 48000)
    assert tone_interval(clip.audio.samples, 48000) == pytest.approx((0.5, 1.5), abs=0.05)


def test_audio_with_an_unknown_codec_is_dropped(tmp_path):
    path = write(tmp_path / "a.mov", numbered_frames(10), audio=tone(1, 0, 1), audio_codec="pcm_f32le")
    path.write_bytes(path.read_bytes().replace(b"fl32", b"xxxx").replace(b"lpcm", b"xxxx"))
    clip = load_video(path)
    assert numbers(clip.frames) == list(range(10))
    assert clip.audio is None


# --------------------------------------------------------------------------------------------------------------- saving


def boxes(path: Path) -> list[str]:
    """The names of the top-level boxes of an MP4."""
    data, offset, found = path.read_bytes(), 0, []
    while offset < len(data):
        found.append(data[offset + 4 : offset + 8].decode())
        offset += int.from_bytes(data[offset : offset + 4], "big")
    return found


def header_seconds(path: Path) -> Fraction:
    """The duration in the header of an MP4."""
    data = path.read_bytes()
    offset = data.index(b"mvhd") + 4
    assert data[offset] == 0  # version 0, with times of 32 bits
    timescale, duration = (int.from_bytes(data[offset + at : offset + at + 4], "big") for at in (12, 16))
    return Fraction(duration, timescale)


@pytest.mark.parametrize("count", [1, 2, 24])
@pytest.mark.parametrize("fps", [8.0, 12.5, 30000 / 1001, 30000 / 1001 / 7, 1.0])
def test_saved_mp4(tmp_path, count, fps):
    path = Clip(numbered_frames(count), fps).save(tmp_path / "new" / "out.MP4")
    assert path == tmp_path / "new" / "out.MP4"
    saved = Decoded(path)
    exact = Fraction(fps).limit_denominator(10_000)
    assert numbers(saved.frames) == list(range(count))
    assert (saved.codec, saved.pix_fmt, saved.audio_codec) == ("h264", "yuv420p", None)
    assert saved.rate == exact
    assert saved.video_seconds == header_seconds(path) == count / exact
    assert saved.seconds == pytest.approx(float(count / exact), abs=1e-6)
    assert saved.times == [index / exact for index in range(count)]
    found = boxes(path)
    assert found.index("moov") < found.index("mdat")  # can be played while it is downloaded
    assert load_video(path).fps == pytest.approx(fps, rel=1e-9)


@pytest.mark.parametrize("color", [RED, GREEN, BLUE, GREY, (250, 250, 250), (4, 4, 4), (240, 200, 20)])
def test_saved_colors(tmp_path, color):
    path = Clip(np.full((3, 48, 64, 3), color, np.uint8), 8.0).save(tmp_path / "out.mp4")
    saved = Decoded(path)
    assert saved.tags == (1, 1, 1, 1)  # BT.709 for all three, limited range
    # Convert from Y'CbCr by the formula of BT.709, independently of any library.
    raw = saved.raw[1].to_ndarray()
    planes = [plane.mean() for plane in (raw[:48], *raw[48:].reshape(2, -1))]
    y, cb, cr = (planes[0] - 16) / 219, (planes[1] - 128) / 224, (planes[2] - 128) / 224
    rgb = 255 * np.array([y + 1.5748 * cr, y - 0.1873 * cb - 0.4681 * cr, y + 1.8556 * cb])
    assert abs(rgb - color).max() <= 3
    assert abs(saved.frames[1].astype(int) - color).max() <= 3
    assert abs(load_video(path).frames.astype(int) - color).max() <= 3


def test_odd_sides_are_padded(tmp_path):
    image = np.full((33, 47, 3), GREY, np.uint8)
    image[:, -1], image[-1] = RED, GREEN
    saved = Decoded(Clip(image[None], 8.0).save(tmp_path / "out.mp4"))
    assert saved.frames[0].shape == (34, 48, 3)
    assert abs(saved.frames[0][:31, :45].astype(int) - GREY).mean() < 3
    assert abs(saved.frames[0][33, 4:40].astype(int) - GREEN).mean() < 12  # the edge is repeated: black would bleed


def gif_frames(path: Path) -> tuple[list[int], list[int]]:
    """The numbers and the durations (ms) of the frames, as Pillow reads them."""
    with Image.open(path) as image:
        shown, durations = [], []
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            shown += numbers([np.asarray(image.convert("RGB"))])
            durations.append(image.info["duration"])
        assert len(shown) == 1 or image.info["loop"] == 0
    return shown, durations


@pytest.mark.parametrize(
    ("count", "fps"), [(1, 8.0), (5, 8.0), (24, 30000 / 1001), (10, 3.0), (30, 60.0), (31, 75.0), (5, 100.0)]
)
def test_saved_gif_has_the_duration_of_the_clip(tmp_path, count, fps):
    shown, durations = gif_frames(Clip(numbered_frames(count), fps).save(tmp_path / "out.gif"))
    assert sum(durations) == pytest.approx(1000 * count / fps, abs=5)
    assert min(durations) >= 20  # players slow down shorter ones
    begins = np.cumsum([0, *durations[:-1]])
    for begin, index in zip(begins, shown, strict=True):
        assert begin == pytest.approx(1000 * index / fps, abs=5)
    if fps < 50:
        assert shown == list(range(count))


@pytest.mark.parametrize("fps", [3.0, 7.5, 8.0, 30000 / 1001 / 2, 12.0, 15.0, 24.0, 30000 / 1001])
@pytest.mark.parametrize("count", [24, 60])
def test_saved_gif_loads_as_the_same_clip(tmp_path, fps, count):
    clip = load_video(Clip(numbered_frames(count), fps).save(tmp_path / "out.gif"))
    assert numbers(clip.frames) == list(range(count))
    assert clip.fps == pytest.approx(fps, rel=0.01)


def test_gif_of_equal_frames_has_the_full_duration(tmp_path):
    path = Clip(np.full((10, 16, 16, 3), 255, np.uint8), 8.0).save(tmp_path / "out.gif")
    assert sum(gif_frames(path)[1]) == pytest.approx(1250, abs=5)


@pytest.fixture
def limit_file_size():
    """A function that limits the size of files to a number of bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


NOISE = Clip(np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8), 8.0)
both_formats = pytest.mark.parametrize("name", ["out.mp4", "out.gif"])


@pytest.fixture
def earlier(tmp_path, name) -> Path:
    """A file at the place where the clip is to be saved."""
    (tmp_path / name).write_bytes(b"earlier content")
    return tmp_path / name


@both_formats
def test_full_disk_leaves_the_earlier_file(tmp_path, limit_file_size, earlier, name):
    full = NOISE.save(tmp_path / f"whole{earlier.suffix}").stat().st_size
    os.unlink(tmp_path / f"whole{earlier.suffix}")
    for most in (0, 100, full // 2, full - 1):
        limit_file_size(most)
        with pytest.raises(InputError, match=rf"{name} could not be written \(.*\); free some space"):
            NOISE.save(earlier)
        assert list(tmp_path.iterdir()) == [earlier]
        assert earlier.read_bytes() == b"earlier content"
    limit_file_size(full)
    assert NOISE.save(earlier).stat().st_size == full


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@both_formats
def test_no_space_left(tmp_path, monkeypatch, name):
    class FixedUuid:
        hex = "0123456789abcdef"

    monkeypatch.setattr(video.uuid, "uuid4", FixedUuid)
    (tmp_path / f".out.01234567{Path(name).suffix}").symlink_to("/dev/full")
    with pytest.raises(InputError, match=rf"{name} could not be written \(no space left on device\); free some space"):
        NOISE.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@both_formats
def test_interrupted_save_leaves_the_earlier_file(tmp_path, monkeypatch, earlier, name):
    def interrupted(path, clip):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "_write_gif" if name.endswith(".gif") else "_write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        NOISE.save(earlier)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"earlier content"]


@both_formats
def test_directory_without_write_permission(tmp_path, name):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(InputError, match=rf"file/{name} could not be written \(.*\); choose a directory"):
        NOISE.save(tmp_path / "file" / name)
    if os.geteuid() == 0:
        return  # root may write anywhere
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(InputError, match=rf"{name} could not be written \(permission denied\); choose a directory"):
        NOISE.save(tmp_path / "locked" / name)


def test_invalid_clips_and_names_are_not_saved(tmp_path):
    with pytest.raises(InputError, match=r"'out.avi' has the suffix '.avi'; use .mp4, .webm or .gif, or a name"):
        NOISE.save(tmp_path / "out.avi")
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(InputError, match=r"dir.mp4 is a directory; use the name of a file, or end it"):
        NOISE.save(tmp_path / "dir.mp4")
    with pytest.raises(InputError, match=r"out.mp4 is 8×16392 pixels, more than 16384 on a side"):
        Clip(np.zeros((1, 8, 16392, 3), np.uint8), 8.0).save(tmp_path / "out.mp4")
    with pytest.raises(InputError, match=r"0 frames"):
        Clip(NOISE.frames[:0], 8.0).save(tmp_path / "out.mp4")


def test_name_with_a_meaning_for_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(Decoded(NOISE.save("http:out%03d.mp4").absolute()).frames) == 6
    assert len(load_video("http:out%03d.mp4").frames) == 6


@both_formats
def test_saved_file_replaces_the_earlier_one_atomically(earlier, name):
    with open(earlier, "rb") as reader:
        NOISE.save(earlier)
        assert reader.read() == b"earlier content"
    assert len(load_video(earlier).frames) == 6


def test_saved_file_has_the_default_permissions(tmp_path):
    (tmp_path / "plain").touch()
    for name in ("out.mp4", "out.gif"):
        assert NOISE.save(tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


# ------------------------------------------------------------------------------------------------------------- captions


@pytest.fixture
def fonts(monkeypatch):
    """A function that replaces the fonts of this machine. Matplotlib's DejaVu Sans is always there."""
    from matplotlib import font_manager

    def replace(*paths: Path) -> None:
        for cached in (caption._font_files, caption._font_path, caption._load):
            cached.cache_clear()
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(path) for path in paths])

    yield replace
    monkeypatch.undo()
    replace()
    caption._font_files.cache_clear()


def make_font(path: Path, characters: str) -> Path:
    """A font in which each of the characters is a black square as high as the line."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for point in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(point)
    pen.closePath()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(char): "square" for char in characters})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupPost()
    builder.save(path)
    return path


def test_captions_use_a_font_that_has_their_characters(tmp_path, fonts):
    fonts()
    drawn = [caption.caption(text, 256) for text in ("ж", "ф", "é", "ש", "中", "国", "🐼")]
    same = [np.array_equal(a, b) for a, b in itertools.combinations(drawn, 2)]
    assert same.count(True) == 3  # of the last three, which are boxes
    assert [caption.missing_characters(text) for text in ("é ж שלום\u200d ☀\ufe0f", "中国\u3000中", "a 🐼")] == [
        "",
        "中国",
        "🐼",
    ]
    fonts(make_font(tmp_path / "LastResort.ttf", "中国"), make_font(tmp_path / "cjk.ttf", "中国"))
    assert not caption.missing_characters("中国")
    square = caption.caption("中", 256)
    size = 256 // 20
    assert (square == 0).sum() == pytest.approx(3 * size**2, rel=0.15)
    long = caption.caption("中" * 30, 256)  # wrapped between any two characters
    assert (long == 0).sum() == pytest.approx(30 * 3 * size**2, rel=0.15)
    assert (tmp_path / "broken.ttf").write_bytes(b"no font")
    fonts(tmp_path / "broken.ttf", tmp_path / "missing.ttf")
    assert caption.missing_characters("中国") == "中国"


def test_prompt_that_no_font_can_show_is_numbered(fonts):
    fonts()
    source = Clip(NOISE.frames[:2], 8.0)
    edits = [Edit(source.frames, 8.0, prompt=prompt) for prompt in ("a cat", "一只猫")]
    message = (
        "'一只猫' has the caption 'prompt 2' in the video, because no font on this machine has '一只猫'; install one"
    )
    with pytest.warns(UserWarning, match=message):
        video = side_by_side(source, edits, "a dog")
    edits[1] = Edit(source.frames, 8.0, prompt="prompt 2")
    np.testing.assert_array_equal(video.frames, side_by_side(source, edits, "a dog").frames)


# -------------------------------------------------------------------------------------------------------- invalid input

MULTIPLE = "is not a multiple of 8 (of 4 for a VAE with fewer levels than Stable Diffusion's); use"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames is 0; it must be a whole number, 1 or more"),
        ({"start": -1}, "start is -1; it must be a whole number, 0 or more"),
        ({"stride": 0}, "stride is 0; it must be a whole number, 1 or more"),
        ({"size": (30, 64)}, f"height 30 {MULTIPLE} 24 or 32"),
        ({"size": (64, 6)}, f"width 6 {MULTIPLE} 8"),
        ({"size": (0, 64)}, f"height 0 {MULTIPLE} 8"),
        ({"size": (-8, 64)}, f"height -8 {MULTIPLE} 8"),
        ({"size": (8, 16392)}, "width is 16392; it must be a multiple of 8, at most 16384"),
        ({"fps": 0.0}, "fps is 0.0; it must be above 0 and below 1000"),
        ({"fps": float("nan")}, "fps is nan; it must be above 0 and below 1000"),
    ],
)
def test_invalid_arguments(options, message):
    # The arguments are checked before the file is opened.
    assert error_message(InputError, "missing.mp4", **options) == message


def test_missing_file(tmp_path):
    assert "missing.mp4 does not exist; use a video file" in error_message(MissingError, tmp_path / "missing.mp4")


def test_empty_file(tmp_path):
    (tmp_path / "a.mp4").touch()
    assert "a.mp4 is empty" in error_message(InputError, tmp_path / "a.mp4")


def test_unknown_codec(tmp_path):
    path = write(tmp_path / "a.mp4", numbered_frames(3))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"xxxx"))
    assert "a.mp4 is not a video that FFmpeg decodes" in error_message(InputError, path)


@pytest.mark.parametrize("name", ["a.mp4", "a.txt", "a.gif", "a.m3u8"])
@pytest.mark.parametrize("content", ["noise", "text", "playlist", "list"])
def test_file_that_is_not_a_video(tmp_path, clip20, name, content):
    (tmp_path / "other.mp4").write_bytes(clip20.read_bytes())
    data = {
        "noise": np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes(),
        "text": b"Dear diary, today I made a film.\n" * 40,
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nother.mp4\n#EXT-X-ENDLIST\n",
        "list": b"ffconcat version 1.0\nfile other.mp4\n",  # FFmpeg would play the other file
    }[content]
    (tmp_path / name).write_bytes(data)
    assert re.search(rf"{name} is not a video.*; use ", error_message(InputError, tmp_path / name))


def test_file_with_audio_only(tmp_path):
    samples, rate, layout = tone(1, 0, 1)
    for name, codec, cover in (("a.m4a", "aac", False), ("a.mp4", "aac", False), ("cover.mp3", "libmp3lame", True)):
        with av.open(str(tmp_path / name), "w", options={"id3v2_version": "3"} if cover else {}) as container:
            stream = container.add_stream(codec, rate=rate, layout=layout)
            if cover:  # a cover image is stored as a video stream
                art = container.add_stream("png", rate=1)
                art.height, art.width, art.pix_fmt = 32, 64, "rgb24"
                art.disposition = av.stream.Disposition.attached_pic.value
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate = rate
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
            if cover:
                container.mux(art.encode(av.VideoFrame.from_ndarray(numbered(0), format="rgb24")))
                container.mux(art.encode())
        message = error_message(InputError, tmp_path / name)
        assert f"{name} has no video stream, only audio; use a video" in message


@pytest.fixture(scope="module")
def rich() -> np.ndarray:
    """Forty numbered frames above noise, so that each takes many bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 64, 3), np.uint8)
    return np.concatenate([numbered_frames(40), noise], 1)


def rich_numbers(frames: np.ndarray) -> list[int]:
    return numbers(frames[:, :32])


def truncate(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def test_truncated_file_with_the_index_at_the_end(tmp_path, rich):
    path = write(tmp_path / "a.mp4", rich)
    assert "moov" in boxes(path)[-2:]
    truncate(path, 0.6)
    assert "a.mp4 is not a video, or is truncated" in error_message(InputError, path)


ORDERED = {"bf": "0", "g": "12"}
TRUNCATED = {  # how many intact frames may be lost: Matroska does not store decoding times
    "faststart.mp4": (0, {"movflags": "faststart"}),
    "ordered.mp4": (0, {"movflags": "faststart", "options": ORDERED}),
    "fragments.mp4": (0, {"movflags": "frag_keyframe+empty_moov"}),
    "motion.mov": (0, {**MJPEG, "movflags": "faststart"}),
    "a.avi": (0, MJPEG),
    "a.mkv": (2, {}),
    "a.webm": (0, VP8),
}


@pytest.mark.parametrize("share", [0.4, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("name", TRUNCATED)
def test_truncated_file(tmp_path, rich, name, share):
    lost, options = TRUNCATED[name]
    path = write(tmp_path / name, rich, **options)
    whole = load_video(path).frames
    assert rich_numbers(whole) == list(range(40))
    size = int(path.stat().st_size * share)
    with av.open(str(path)) as container:
        stored = {packet.pts: packet.pos + packet.size <= size for packet in container.demux(video=0) if packet.size}
    intact = len(list(itertools.takewhile(stored.get, sorted(stored))))  # in display order
    truncate(path, share)
    message = error_message(InputError, path)
    found = re.search(r"damaged after frame (\d+) \(.+\); use a complete file, or frames=(\d+) ", message)
    loadable = int(found[2])
    assert int(found[1]) == loadable - 1
    assert intact - lost <= loadable <= intact
    # The suggested number of frames loads and is exact; one more does not load.
    np.testing.assert_array_equal(load_video(path, frames=loadable).frames, whole[:loadable])
    assert rich_numbers(load_video(path, frames=3, start=2, stride=3).frames) == [2, 5, 8]
    message = error_message(InputError, path, frames=loadable + 1)
    assert f"has {loadable} frames before it is damaged" in message
    assert f"use frames={loadable}" in message


@pytest.mark.parametrize(("kept", "fill"), [(0.25, 0), (0.25, 255), (0, 255)])
def test_damaged_frame(tmp_path, rich, kept, fill):
    """Frame 17 is overwritten, or all of it but its head, which the decoder accepts."""
    path = write(tmp_path / "a.mp4", rich, options=ORDERED)
    whole = load_video(path).frames
    with av.open(str(path)) as container:
        packet = next(itertools.islice(container.demux(video=0), 17, None))
        begin, end = packet.pos + int(kept * packet.size), packet.pos + packet.size
    data = bytearray(path.read_bytes())
    data[begin:end] = bytes([fill]) * (end - begin)
    path.write_bytes(data)
    assert re.search(r"a.mp4 is damaged after frame 16 .*, or frames=17 ", error_message(InputError, path))
    np.testing.assert_array_equal(load_video(path, frames=17).frames, whole[:17])


def suggestions(message: str) -> list[dict[str, int]]:
    """The changes that an error message suggests, each as options."""
    alternatives = message.split(": use ")[1].split(" or ")
    return [{name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", text)} for text in alternatives]


@pytest.mark.parametrize("available", [1, 5])
def test_too_few_frames_suggests_what_works(tmp_path, available):
    path = image_directory(tmp_path / "f", {f"{i}.png": numbered(i, 8, 64) for i in range(available)})
    refused = 0
    for frames, start, stride in itertools.product((1, 2, 3, 5, 9), (0, 1, 4, 5, 7), (1, 2, 4)):
        options = {"frames": frames, "start": start, "stride": stride}
        if start + (frames - 1) * stride < available:
            expected = list(range(available))[start::stride][:frames]
            assert numbers(load_video(path, **options).frames) == expected
            continue
        refused += 1
        message = error_message(InputError, path, **options)
        assert f"has {available} frame{'s' if available > 1 else ''};" in message
        assert f"need {start + (frames - 1) * stride + 1}:" in message
        for change in suggestions(message):
            assert any(options[name] != value for name, value in change.items()), message
            changed = options | change
            assert len(load_video(path, **changed).frames) == changed["frames"]
    assert refused > 20


def test_too_few_frames_in_a_video(clip20):
    message = error_message(InputError, clip20, frames=8, start=2, stride=4)
    expected = "clip20.mp4 has 20 frames; frames=8, start=2 and stride=4 need 31: use stride=2 or frames=5"
    assert message.endswith(expected)
    assert "use start=19" in error_message(InputError, clip20, start=20)


def test_directory_without_images(tmp_path):
    (tmp_path / "a.txt").write_text("none")
    assert "has no images; expected files such as 0001.png" in error_message(InputError, tmp_path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_damaged_image(tmp_path, suffix, share):
    path = image_directory(tmp_path / "f", {f"{i}.{suffix}": NOISE.frames[0] for i in range(3)})
    truncate(path / f"2.{suffix}", share)
    assert f"2.{suffix} is not a readable image" in error_message(InputError, path)
    assert load_video(path, frames=2).frames.shape == (2, 64, 64, 3)


def test_images_smaller_than_8_pixels(tmp_path):
    path = image_directory(tmp_path / "f", {"1.png": numbered(1, 5, 64)})
    assert "5×64 pixels, less than 8 on a side; set size=" in error_message(InputError, path)
    assert load_video(path, size=(8, 64)).frames.shape == (1, 8, 64, 3)


def test_metadata_that_is_not_utf8_is_ignored(tmp_path):
    path = write(tmp_path / "a.mp4", numbered_frames(3), metadata={"title": "QQQQQQQQ"})
    path.write_bytes(path.read_bytes().replace(b"QQQQQQQQ", b"\xff\xfe\xe9\xc3\x28\xf1\xf2\xf3"))
    assert numbers(load_video(path).frames) == [0, 1, 2]


# ----------------------------------------------------------------------------------------------------- memory limits


def test_frames_above_the_size_limit(tmp_path):
    (tmp_path / "f").mkdir()
    Image.new("1", (16392, 8)).save(tmp_path / "f" / "1.png")
    assert "1.png is 8×16392 pixels, more than 16384 on a side" in error_message(
        InputError, tmp_path / "f", size=(8, 8)
    )
    path = write(tmp_path / "a.avi", [np.zeros((16, 16400, 3), np.uint8)], **MJPEG)
    assert "a.avi is 16×16400 pixels, more than 16384 on a side" in error_message(InputError, path, size=(8, 8))


def test_image_that_decompresses_to_too_much(tmp_path):
    Image.new("1", (16000, 16000)).save(tmp_path / "1.png")  # 5 kB that decode to 730 MB
    assert "1.png is not a readable image" in error_message(InputError, tmp_path, size=(8, 8))


def test_frames_above_the_memory_limit(clip20, monkeypatch):
    monkeypatch.setattr(video, "MAX_BYTES", 10 * 32 * 64 * 3)
    assert len(load_video(clip20, frames=10).frames) == 10
    assert "the selected frames of" in error_message(InputError, clip20)
    resized, resize = [], video._resize
    monkeypatch.setattr(video, "_resize", lambda *args: resized.append(args) or resize(*args))
    assert "clip20.mp4 take 0.0 GiB, more than 0.0; use fewer frames" in error_message(InputError, clip20, frames=11)
    assert len(resized) == 1  # refused at the first frame
    assert len(load_video(clip20, size=(16, 64)).frames) == 20


def test_pause_of_days_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_BYTES", 1000 * 32 * 64 * 3)
    times = [*range(0, 5000, 10), 300_000_000]
    path = write(tmp_path / "a.mkv", numbered_frames(len(times)), codec="ffv1", rate=100, times=times)
    assert "the selected frames of" in error_message(InputError, path)
    assert numbers(load_video(path, frames=3, start=10).frames) == [10, 11, 12]


def test_only_selected_frames_are_converted(clip20, monkeypatch):
    converted, to_rgb = [], decoding._to_rgb
    monkeypatch.setattr(decoding, "_to_rgb", lambda *args: converted.append(args) or to_rgb(*args))
    load_video(clip20, frames=3, start=2, stride=5)
    assert len(converted) == 3


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs the kernel's count of bytes read")
@pytest.mark.parametrize("seconds", [90, 0.3])
def test_only_the_selected_part_is_read(tmp_path, seconds):
    """Also where the audio is much shorter than the video: the rest of the file is not searched for it."""

    def bytes_read() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    noise = np.random.default_rng(0).integers(0, 256, (10, 128, 128, 3), np.uint8)
    audio = tone(seconds, 0, seconds)
    path = write(tmp_path / "long.mkv", np.tile(noise, (90, 1, 1, 1)), audio=audio, audio_codec="pcm_f32le", **MJPEG)
    before = bytes_read()
    clip = load_video(path, frames=5)
    assert path.stat().st_size > 3_000_000
    assert bytes_read() - before < path.stat().st_size / (20 if seconds == 90 else 4)
    assert clip.frames.shape == (5, 128, 128, 3)
    assert clip.audio.samples.shape == (1, 24000)


# -------------------------------------------------------------------------------------------------------------- buckets


def test_video_or_image_directory_in_a_bucket(tmp_path, monkeypatch):
    from etils import epath

    frames = numbered_frames(4)
    Clip(frames, 8.0).save(tmp_path / "clip.mp4")
    image_directory(tmp_path / "images", {f"{i}.png": frame for i, frame in enumerate(frames)})
    local = epath.Path(tmp_path)
    monkeypatch.setattr(paths, "check_bucket", lambda url: None)
    monkeypatch.setattr(epath, "Path", lambda url: local / str(url).removeprefix("gs://bucket/"))
    assert numbers(load_video("gs://bucket/clip.mp4", stride=2).frames) == [0, 2]
    assert numbers(load_video("gs://bucket/images").frames) == [0, 1, 2, 3]
    with pytest.raises(MissingError, match=r"gs://bucket/other.mp4 does not exist"):
        load_video("gs://bucket/other.mp4")


def test_unreachable_bucket(monkeypatch):
    from etils import epath

    def unreachable(url):
        raise PermissionError("403 no")

    monkeypatch.setattr(paths, "check_bucket", lambda url: None)
    monkeypatch.setattr(epath, "Path", unreachable)
    with pytest.raises(MissingError, match=r"gs://bucket/clip.mp4 cannot be read \(403 no\)"):
        load_video("gs://bucket/clip.mp4")

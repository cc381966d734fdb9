"""Clips in and out. Every clip is made here, so that its truth is known; what is written is read back by PyAV alone.

A drawn frame carries its own number as eight blocks, black or white, so that any choice of frames can be read back.
"""

import itertools
import os
import re
import resource
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import tav_jax.io.video
from tav_jax.errors import InputError, MissingError, TavError
from tav_jax.io.video import Audio, Clip, load_video

RED, GREEN, BLUE, GREY = (200, 30, 30), (30, 170, 60), (30, 40, 210), (128, 128, 128)
# Two frames of three are stored out of order.
H264 = {"x264-params": "bframes=2:b-adapt=0:b-pyramid=none:scenecut=0:keyint=12"}


# ------------------------------------------------------------------------------------------------- drawing and reading


def numbered(number: int, height: int = 32, width: int = 64) -> np.ndarray:
    bits = np.array([255 * (number >> bit & 1) for bit in range(8)], np.uint8)
    return np.broadcast_to(np.repeat(bits, width // 8)[None, :, None], (height, width, 3)).copy()


def number(frame: np.ndarray) -> int:
    blocks = frame.astype(float).mean((0, 2)).reshape(8, -1).mean(1)
    assert ((blocks < 60) | (blocks > 195)).all(), f"not a numbered frame: {blocks}"
    return sum(1 << bit for bit in range(8) if blocks[bit] > 128)


def numbers(frames) -> list[int]:
    return [number(frame) for frame in frames]


def write(
    path: Path,
    pictures,
    *,
    rate=10,
    codec="libx264",
    pixels="yuv420p",
    options=None,
    movflags="",
    times=None,
    sound=None,
    sound_codec="aac",
    sound_at=0.0,
    metadata=None,
) -> Path:
    """`times` are the frames' in ms; `sound` is (samples [channels, n], rate, layout), heard from `sound_at` on."""
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=rate, options=options or (H264 if codec == "libx264" else {}))
        stream.codec_context.thread_count = 2  # FFmpeg takes one a processor, and cuts the file otherwise by them
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sound is not None:
            samples, sound_rate, layout = sound
            track = container.add_stream(sound_codec, rate=sound_rate, layout=layout)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
            if sound is not None:  # in pieces, so that it lies beside the pictures
                low, high = (min(samples.shape[1], round((index + more) * sound_rate / rate)) for more in (0, 1))
                if low == high:
                    continue
                kind = "fltp" if sound_codec == "aac" else "flt"
                piece = samples[:, low:high] if kind == "fltp" else samples[:, low:high].T.reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(piece), format=kind, layout=layout)
                frame.sample_rate, frame.time_base = sound_rate, Fraction(1, sound_rate)
                frame.pts = low + round(sound_at * sound_rate)
                container.mux(track.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            container.mux(track.encode())
    return path


def tone(seconds: float, begin: float, end: float, rate: int = 48000, channels: int = 1):
    """Silence, but for 1 kHz between `begin` and `end`."""
    t = np.arange(round(seconds * rate)) / rate
    wave = np.where((t >= begin) & (t < end), 0.5 * np.sin(2 * np.pi * 1000 * t), 0).astype(np.float32)
    return np.repeat(wave[None], channels, 0), rate, {1: "mono", 2: "stereo", 6: "5.1"}[channels]


def loud(samples: np.ndarray, rate: int) -> tuple[float, float]:
    """From when to when it is loud, in seconds."""
    step = rate // 500
    wave = samples[0][: len(samples[0]) // step * step].reshape(-1, step)
    heard = np.flatnonzero(np.abs(wave).max(1) > 0.2)
    assert len(heard), "silent"
    return heard[0] * step / rate, (heard[-1] + 1) * step / rate


class Decoded:
    """A file as PyAV reads it."""

    def __init__(self, path: Path):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            self.seconds = Fraction(container.duration, av.time_base)
            self.rate, self.codec, self.pixels = stream.average_rate, stream.codec_context.name, stream.pix_fmt
            context = stream.codec_context
            self.tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
            self.picture_seconds = stream.duration * stream.time_base
            self.raw = list(container.decode(stream))
            self.frames = [frame.to_ndarray(format="rgb24") for frame in self.raw]
            self.times = [frame.pts * stream.time_base for frame in self.raw]
            self.sound_codec = container.streams.audio[0].codec_context.name if container.streams.audio else None
        self.samples = None
        if self.sound_codec:
            with av.open(str(path)) as container:
                stream = container.streams.audio[0]
                self.sound_rate, self.sound_seconds = stream.rate, stream.duration * stream.time_base
                heard = list(container.decode(stream))
                assert heard[0].pts == 0
                self.samples = np.concatenate([frame.to_ndarray() for frame in heard], 1)


def folder(path: Path, pictures: dict[str, np.ndarray]) -> Path:
    path.mkdir()
    for name, picture in pictures.items():
        Image.fromarray(picture).save(path / name)
    return path


def refusal(error, *args, **options) -> str:
    """The sentence with which `load_video` refuses."""
    with pytest.raises(error) as caught:
        load_video(*args, **options)
    assert isinstance(caught.value, TavError)
    said = str(caught.value)
    assert not re.search(r"\n|\. |\.$", said), f"one sentence, please: {said}"
    return said


@pytest.fixture(scope="module")
def clip20(tmp_path_factory) -> Path:
    """Twenty numbered frames at 10 per second, in H.264 with frames out of order."""
    return write(tmp_path_factory.mktemp("clip") / "clip20.mp4", [numbered(i) for i in range(20)])


# -------------------------------------------------------------------------------------------------------------- reading

CONTAINERS = {
    "a.mp4": {"codec": "libx264"},
    "faststart.mp4": {"codec": "libx264", "movflags": "faststart"},
    "fragments.mp4": {"codec": "libx264", "movflags": "frag_keyframe+empty_moov"},
    "a.mov": {"codec": "mpeg4"},
    "a.mkv": {"codec": "ffv1"},
    "a.webm": {"codec": "libvpx", "options": {"deadline": "realtime"}},
    "a.avi": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "a.ts": {"codec": "libx264"},
    "ten-bits.mp4": {"codec": "libx264", "pixels": "yuv420p10le"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "a.asf": {"codec": "mpeg4"},
    "a.gif": {"codec": "gif", "pixels": "rgb8"},
    "name: 100%d of it?.mp4": {"codec": "libx264"},  # means a protocol and a pattern to FFmpeg
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_every_frame_in_order(tmp_path, name):
    path = write(tmp_path / name, [numbered(i) for i in range(15)], **CONTAINERS[name])
    clip = load_video(path)
    assert clip.frames.dtype == np.uint8
    assert clip.frames.shape == (15, 32, 64, 3)
    assert numbers(clip.frames) == list(range(15))
    assert clip.fps == 10.0
    assert clip.audio is None


def test_a_stream_without_times_gives_every_frame_in_order(tmp_path):
    path = write(tmp_path / "a.h264", [numbered(i) for i in range(15)])
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
def test_start_stride_and_count_choose_the_frames(clip20, options, expected):
    clip = load_video(clip20, **options)
    assert numbers(clip.frames) == expected
    assert clip.fps == 10 / options.get("stride", 1)


def test_a_fractional_rate_is_kept(tmp_path):
    path = write(tmp_path / "ntsc.mp4", [numbered(i) for i in range(7)], rate=Fraction(30000, 1001))
    assert load_video(path).fps == pytest.approx(30000 / 1001, rel=1e-12)
    assert load_video(path, stride=2).fps == pytest.approx(15000 / 1001, rel=1e-12)


def test_another_speed_can_be_given(tmp_path):
    path = write(tmp_path / "a.mp4", [numbered(i) for i in range(6)], sound=tone(0.6, 0, 0.6))
    clip = load_video(path, fps=25.0, stride=2)
    assert clip.fps == 12.5
    assert numbers(clip.frames) == [0, 2, 4]
    assert clip.audio is None  # it would drift away from the pictures


def shown_at(times: list[int], moment: float) -> int:
    return max(i for i, time in enumerate(times) if time <= moment)


VARIABLE = [0, 100, 200, 300, 400, 500, 700, 800, 900, 1200, 1300, 1400, 1500, 1600, 1700, 1800, 1900, 2000]


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.webm"])
def test_variable_rate_keeps_its_timing(tmp_path, name):
    codec = {"codec": "libvpx", "options": {"deadline": "realtime"}} if name == "v.webm" else {}
    path = write(tmp_path / name, [numbered(i) for i in range(len(VARIABLE))], times=VARIABLE, **codec)
    clip = load_video(path)
    assert len(clip.frames) / clip.fps == pytest.approx(2.1, abs=0.1)
    for slot, shown in enumerate(numbers(clip.frames)):
        moment = 1000 * slot / clip.fps
        # Whatever the grid, what is shown at a moment was on the screen within half a slot of it.
        slack = 500 / clip.fps + 1
        assert shown_at(VARIABLE, moment - min(slack, moment)) <= shown <= shown_at(VARIABLE, moment + slack)
    assert set(numbers(clip.frames)) == set(range(len(VARIABLE)))  # all lie on tenths of a second: none is lost


def test_irregular_times_still_last_as_long(tmp_path):
    times = [0, 33, 71, 90, 140, 390, 400, 655, 700, 741, 803, 990]
    path = write(tmp_path / "v.mp4", [numbered(i) for i in range(len(times))], times=times)
    clip = load_video(path)
    assert clip.fps < 20  # the average is 12 or so: no grid of milliseconds
    for slot, shown in enumerate(numbers(clip.frames)):
        moment, slack = 1000 * slot / clip.fps, 500 / clip.fps + 1
        assert shown_at(times, max(0, moment - slack)) <= shown <= shown_at(times, moment + slack)


@pytest.mark.parametrize(
    ("steps", "fps"),
    [
        ([34, 33, 35, 31, 33, 34] * 10, 30),  # a phone's: each frame has its slot
        ([40, 40, 60] * 8, 22),  # on a clock of 50, which would show most frames twice
    ],
)
def test_the_grid_is_about_as_fine_as_the_frames(tmp_path, steps, fps):
    times = [0, *np.cumsum(steps).tolist()]
    clip = load_video(write(tmp_path / "v.mp4", [numbered(i) for i in range(len(times))], times=times, rate=30))
    assert clip.fps == pytest.approx(fps, rel=0.02)
    assert len(clip.frames) == pytest.approx(len(times), abs=1)
    if fps == 30:
        assert numbers(clip.frames) == list(range(61))


@pytest.mark.parametrize(
    ("lasting", "expected"),
    [
        ([100] * 6, [0, 1, 2, 3, 4, 5]),
        ([100, 100, 300, 100, 100, 100], [0, 1, 2, 2, 2, 3, 4, 5]),
        ([100, 100, 100, 100, 100, 2000], [0, 1, 2, 3, 4] + [5] * 20),
    ],
)
def test_a_gif_with_pauses(tmp_path, lasting, expected):
    pictures = [Image.fromarray(numbered(i)) for i in range(6)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=lasting)
    clip = load_video(tmp_path / "a.gif")
    assert clip.fps == 10.0
    assert numbers(clip.frames) == expected


QUARTERS = np.zeros((64, 96, 3), np.uint8)  # red and green above, blue and grey below
QUARTERS[:32, :48], QUARTERS[:32, 48:], QUARTERS[32:, :48], QUARTERS[32:, 48:] = RED, GREEN, BLUE, GREY


def corners(frame: np.ndarray) -> list[tuple]:
    """Top left, top right, bottom left, bottom right, each by name of its nearest colour."""
    h, w = frame.shape[0] // 4, frame.shape[1] // 4
    middles = [frame[y, x].astype(int) for y in (h, 3 * h) for x in (w, 3 * w)]
    return [min((RED, GREEN, BLUE, GREY), key=lambda colour: abs(middle - colour).sum()) for middle in middles]


def turn_display(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Puts (a, b, c, d) into the track header: a point (x, y), y downwards, is shown at (ax + cy, bx + dy)."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd")
    assert data[header + 4] == 0  # the version whose times have 32 bits
    place = header + 4 + 40
    assert data[place : place + 4] == (1 << 16).to_bytes(4, "big")  # the identity begins with 1.0
    a, b, c, d = (value << 16 for value in matrix)
    cells = (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    data[place : place + 36] = b"".join(cell.to_bytes(4, "big", signed=True) for cell in cells)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("matrix", "shape", "expected"),
    [
        ((1, 0, 0, 1), (64, 96), [RED, GREEN, BLUE, GREY]),
        ((0, 1, -1, 0), (96, 64), [BLUE, RED, GREY, GREEN]),  # clockwise: what was on the left comes to the top
        ((-1, 0, 0, -1), (64, 96), [GREY, BLUE, GREEN, RED]),
        ((0, -1, 1, 0), (96, 64), [GREEN, GREY, RED, BLUE]),
    ],
)
def test_a_phone_held_upright(tmp_path, matrix, shape, expected):
    path = write(tmp_path / "phone.mp4", [QUARTERS] * 2)
    turn_display(path, matrix)
    frames = load_video(path).frames
    assert frames.shape == (2, *shape, 3)
    assert corners(frames[0]) == expected


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
def test_crop_takes_the_middle_and_stretch_takes_all(tmp_path, shape, height, width, fit):
    """On a ramp, red across and green down, each pixel tells where in the source it was taken."""
    h, w = shape
    across, down = np.meshgrid(np.arange(w), np.arange(h))
    picture = np.stack([across, down, 0 * down], -1).astype(np.uint8)
    frame = load_video(folder(tmp_path / "f", {"1.png": picture}), size=(height, width), fit=fit).frames[0]
    assert frame.shape == (height, width, 3)
    scale = (h / height, w / width) if fit == "stretch" else [min(h / height, w / width)] * 2
    for axis, length, side, colour in ((0, h, height, 1), (1, w, width, 0)):
        expected = length / 2 - 0.5 + (np.arange(side) - side / 2 + 0.5) * scale[axis]
        found = frame[..., colour].mean(1 - axis)
        assert (
            abs(found - expected)[2:-2].max() <= 0.6
        )  # whole numbers; the filter looks beyond the picture at its edges


def test_without_a_size_the_middle_is_cut_to_multiples_of_8(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8)
    frames = load_video(folder(tmp_path / "f", {"1.png": picture})).frames
    np.testing.assert_array_equal(frames[0], picture[2:42, 3:67])


def test_sides_of_multiples_of_4_do(clip20):
    assert load_video(clip20, frames=1, size=(20, 12)).frames.shape == (1, 20, 12, 3)


LUMA = {1: (0.2126, 0.0722), 6: (0.299, 0.114)}  # weights of red and blue in BT.709 and BT.601, by their tags in a file


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("tag", LUMA)
def test_colours_are_read_as_the_file_says(tmp_path, tag, full):
    for colour in (RED, GREEN, BLUE, GREY):
        red, green, blue = np.array(colour) / 255
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
            stream.codec_context.colorspace, stream.codec_context.color_range = tag, 2 if full else 1
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="yuv420p")))
            container.mux(stream.encode())
        assert abs(load_video(tmp_path / "a.mp4").frames.astype(int) - colour).max() <= 3


# ------------------------------------------------------------------------------------------------------------ pictures


def test_pictures_come_in_the_order_of_their_numbers(tmp_path):
    names = ["frame2.png", "frame10.png", "frame1.png", "frame03.PNG", "frame1b.bmp"]
    path = folder(tmp_path / "f", {name: numbered(i) for i, name in enumerate(names)})
    (path / "notes.txt").write_text("not a picture")
    (path / "._frame0.png").write_bytes(b"what a Mac leaves behind")
    clip = load_video(path)
    assert [names[i] for i in numbers(clip.frames)] == [
        "frame1.png",
        "frame1b.bmp",
        "frame2.png",
        "frame03.PNG",
        "frame10.png",
    ]
    assert clip.fps == 8.0
    assert clip.audio is None
    assert load_video(path, fps=12.0, stride=2).fps == 6.0


def test_pictures_of_every_kind(tmp_path):
    path = tmp_path / "f"
    path.mkdir()
    plain = Image.fromarray(QUARTERS)
    plain.save(path / "1.png")
    plain.convert("RGBA").save(path / "2.png")
    plain.convert("P", palette=Image.Palette.ADAPTIVE).save(path / "3.png")
    plain.save(path / "4.webp", lossless=True)
    sideways = plain.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    sideways.save(path / "5.jpg", quality=95, subsampling=0, exif=exif)
    frames = load_video(path).frames
    assert frames.shape == (5, 64, 96, 3)
    for frame in frames:
        assert abs(frame.astype(int) - QUARTERS).mean() < 2


def test_pictures_of_differing_size(tmp_path):
    path = folder(tmp_path / "f", {"1.png": numbered(1, 32, 64), "2.png": numbered(2, 33, 64)})
    said = refusal(InputError, path)
    assert "32×64" in said
    assert "33×64" in said
    assert "size=(height, width)" in said
    assert numbers(load_video(path, size=(32, 64)).frames) == [1, 2]
    assert numbers(load_video(path, frames=1, start=1).frames) == [2]  # the odd one out is not asked for


# --------------------------------------------------------------------------------------------------------------- sound


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov"])
def test_sound_covers_just_the_chosen_frames(tmp_path, name):
    sound_codec = "aac" if name == "a.mp4" else "pcm_f32le"
    pictures = [numbered(i) for i in range(30)]
    path = write(tmp_path / name, pictures, sound=tone(3, 1.2, 1.7), sound_codec=sound_codec)
    for start, stride, count in ((0, 1, 30), (5, 1, 15), (5, 2, 10), (14, 3, 2), (16, 1, 9)):
        audio = load_video(path, frames=count, start=start, stride=stride).audio
        begin, end = start / 10, (start + count * stride) / 10
        assert audio.samples.shape == (1, round((end - begin) * 48000))
        assert audio.rate == 48000
        low, high = loud(audio.samples, audio.rate)
        assert low == pytest.approx(max(1.2, begin) - begin, abs=0.005)
        assert high == pytest.approx(min(1.7, end) - begin, abs=0.005)


def test_sound_before_and_after_the_tone_is_silent(tmp_path):
    path = write(tmp_path / "a.mkv", [numbered(i) for i in range(30)], sound=tone(3, 1, 2), sound_codec="pcm_f32le")
    assert not load_video(path, frames=10).audio.samples.any()
    assert not load_video(path, start=20).audio.samples.any()


def test_sound_and_pictures_share_the_clock(tmp_path):
    """Pictures from second 1 on, sound from second 1.5 on: a tone at 2.5 is heard 1.5 s after the first picture."""
    times = [1000 + 100 * i for i in range(30)]
    sound = tone(2, 1, 1.2)
    pictures = [numbered(i) for i in range(30)]
    path = write(tmp_path / "a.mkv", pictures, times=times, sound=sound, sound_codec="pcm_f32le", sound_at=1.5)
    audio = load_video(path).audio
    assert audio.samples.shape == (1, 3 * 48000)
    assert loud(audio.samples, 48000) == pytest.approx((1.5, 1.7), abs=0.003)
    assert not audio.samples[:, :24000].any()
    audio = load_video(path, frames=10, start=10).audio
    assert loud(audio.samples, 48000) == pytest.approx((0.5, 0.7), abs=0.003)


def test_six_channels_become_two(tmp_path):
    path = write(tmp_path / "a.mkv", [numbered(0)] * 10, sound=tone(1, 0.5, 0.8, channels=6), sound_codec="pcm_f32le")
    audio = load_video(path).audio
    assert audio.samples.shape == (2, 48000)
    assert audio.layout == "stereo"
    assert loud(audio.samples, 48000) == pytest.approx((0.5, 0.8), abs=0.003)


def test_sound_reaches_the_saved_file(tmp_path):
    """A tone from 1.2 to 1.7 s; the saved clip begins at 0.5 s and takes every second frame, at the source's speed."""
    source = write(tmp_path / "a.mp4", [numbered(i) for i in range(30)], sound=tone(3, 1.2, 1.7, 44100, 2))
    clip = load_video(source, frames=11, start=5, stride=2)
    saved = Decoded(clip.save(tmp_path / "out.mp4"))
    assert numbers(saved.frames) == list(range(5, 27, 2))
    assert saved.rate == 5
    assert saved.seconds == saved.picture_seconds == Fraction(11, 5)
    assert saved.sound_codec == "aac"
    assert saved.sound_rate == 44100
    assert saved.samples.shape[0] == 2
    assert saved.sound_seconds == pytest.approx(2.2, abs=2 / 44100)
    assert loud(saved.samples, 44100) == pytest.approx((0.7, 1.2), abs=0.01)


@pytest.mark.parametrize("rate", [8000, 37800, 192000])
def test_sound_of_any_rate_can_be_saved(tmp_path, rate):
    samples, _, layout = tone(2, 0.5, 1, rate)
    clip = Clip(np.stack([numbered(i) for i in range(16)]), 8.0, Audio(samples, rate, layout))
    saved = Decoded(clip.save(tmp_path / "out.mp4"))
    assert loud(saved.samples, saved.sound_rate) == pytest.approx((0.5, 1), abs=0.01)
    assert saved.seconds == 2


@pytest.mark.parametrize("seconds", [0.3, 0.5, 4])
def test_sound_ends_with_the_pictures(tmp_path, seconds):
    clip = Clip(np.stack([numbered(i) for i in range(16)]), 8.0, Audio(*tone(seconds, 0, seconds)))
    saved = Decoded(clip.save(tmp_path / "out.mp4"))
    assert saved.seconds == 2
    assert saved.sound_seconds == pytest.approx(min(seconds, 2), abs=1e-3)


def test_sound_that_breaks_off_is_carried_as_far_as_it_goes(tmp_path):
    path = write(tmp_path / "a.mp4", [numbered(i) for i in range(30)], sound=tone(3, 0.5, 2.5))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(audio=0):
            if packet.size and packet.pts * packet.time_base > 1.5:
                data[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    path.write_bytes(data)
    clip = load_video(path)
    assert numbers(clip.frames) == list(range(30))
    assert clip.audio.samples.shape == (1, 3 * 48000)
    assert loud(clip.audio.samples, 48000) == pytest.approx((0.5, 1.5), abs=0.05)


def test_sound_that_cannot_be_decoded_is_left_out(tmp_path):
    path = write(tmp_path / "a.mov", [numbered(i) for i in range(10)], sound=tone(1, 0, 1), sound_codec="pcm_f32le")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"fl32", b"xxxx").replace(b"lpcm", b"xxxx"))
    clip = load_video(path)
    assert numbers(clip.frames) == list(range(10))
    assert clip.audio is None


# ------------------------------------------------------------------------------------------------------------- writing


def boxes(path: Path) -> list[str]:
    """The top-level boxes of an MP4."""
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):
        found.append(data[place + 4 : place + 8].decode())
        place += int.from_bytes(data[place : place + 4], "big")
    return found


def stated_seconds(path: Path) -> Fraction:
    """How long an MP4's header says that it lasts, on the header's own clock."""
    data = path.read_bytes()
    place = data.index(b"mvhd") + 4
    assert data[place] == 0  # the version with 32 bits
    clock, lasting = (int.from_bytes(data[place + at : place + at + 4], "big") for at in (12, 16))
    return Fraction(lasting, clock)


@pytest.mark.parametrize("count", [1, 2, 24])
@pytest.mark.parametrize("fps", [8.0, 12.5, 30000 / 1001, 30000 / 1001 / 7, 1.0])
def test_a_saved_mp4(tmp_path, count, fps):
    path = Clip(np.stack([numbered(i) for i in range(count)]), fps).save(tmp_path / "new" / "out.MP4")
    assert path == tmp_path / "new" / "out.MP4"
    saved = Decoded(path)
    exact = Fraction(fps).limit_denominator(10_000)
    assert numbers(saved.frames) == list(range(count))
    assert (saved.codec, saved.pixels, saved.sound_codec) == ("h264", "yuv420p", None)
    assert saved.rate == exact
    assert saved.picture_seconds == stated_seconds(path) == count / exact
    assert saved.seconds == pytest.approx(float(count / exact), abs=1e-6)
    assert saved.times == [index / exact for index in range(count)]
    found = boxes(path)
    assert found.index("moov") < found.index("mdat")  # plays before it has come whole
    assert load_video(path).fps == pytest.approx(fps, rel=1e-9)


@pytest.mark.parametrize("colour", [RED, GREEN, BLUE, GREY, (250, 250, 250), (4, 4, 4), (240, 200, 20)])
def test_colours_come_back(tmp_path, colour):
    path = Clip(np.full((3, 48, 64, 3), colour, np.uint8), 8.0).save(tmp_path / "out.mp4")
    saved = Decoded(path)
    assert saved.tags == (1, 1, 1, 1)  # BT.709 thrice, limited range
    # The formula of BT.709, apart from any library: Y'CbCr in 8 bits, then back.
    planes = [
        plane.mean() for plane in (saved.raw[1].to_ndarray()[:48], *saved.raw[1].to_ndarray()[48:].reshape(2, -1))
    ]
    y, cb, cr = (planes[0] - 16) / 219, (planes[1] - 128) / 224, (planes[2] - 128) / 224
    rgb = 255 * np.array([y + 1.5748 * cr, y - 0.1873 * cb - 0.4681 * cr, y + 1.8556 * cb])
    assert abs(rgb - colour).max() <= 3
    assert abs(saved.frames[1].astype(int) - colour).max() <= 3
    assert abs(load_video(path).frames.astype(int) - colour).max() <= 3


def test_odd_sides_are_padded(tmp_path):
    picture = np.full((33, 47, 3), GREY, np.uint8)
    picture[:, -1], picture[-1] = RED, GREEN
    saved = Decoded(Clip(picture[None], 8.0).save(tmp_path / "out.mp4"))
    assert saved.frames[0].shape == (34, 48, 3)
    assert abs(saved.frames[0][:31, :45].astype(int) - GREY).mean() < 3
    assert abs(saved.frames[0][33, 4:40].astype(int) - GREEN).mean() < 12  # its edge goes on, where black would bleed


@pytest.mark.parametrize(
    ("count", "fps"), [(1, 8.0), (5, 8.0), (24, 30000 / 1001), (10, 3.0), (30, 60.0), (31, 75.0), (5, 100.0)]
)
def test_a_saved_gif_lasts_as_long(tmp_path, count, fps):
    path = Clip(np.stack([numbered(i) for i in range(count)]), fps).save(tmp_path / "out.gif")
    with Image.open(path) as picture:
        shown, lasting = [], []
        for index in range(getattr(picture, "n_frames", 1)):
            picture.seek(index)
            shown.append(number(np.asarray(picture.convert("RGB"))))
            lasting.append(picture.info["duration"])
        assert count == 1 or picture.info["loop"] == 0
    assert sum(lasting) == pytest.approx(1000 * count / fps, abs=5)
    assert min(lasting) >= 20  # players slow down what is shorter
    begins = np.cumsum([0, *lasting[:-1]])
    for begin, index in zip(begins, shown, strict=True):
        assert begin == pytest.approx(1000 * index / fps, abs=5)
    if fps < 50:
        assert shown == list(range(count))


@pytest.mark.parametrize("fps", [3.0, 7.5, 8.0, 30000 / 1001 / 2, 12.0, 15.0, 24.0, 30000 / 1001])
@pytest.mark.parametrize("count", [24, 60])
def test_a_saved_gif_is_read_as_it_was(tmp_path, fps, count):
    clip = load_video(Clip(np.stack([numbered(i) for i in range(count)]), fps).save(tmp_path / "out.gif"))
    assert numbers(clip.frames) == list(range(count))
    assert clip.fps == pytest.approx(fps, rel=0.01)


def test_frames_that_are_all_alike_make_a_gif_of_full_length(tmp_path):
    path = Clip(np.full((10, 16, 16, 3), 90, np.uint8), 8.0).save(tmp_path / "out.gif")
    with Image.open(path) as picture:
        lasting = 0
        for index in range(getattr(picture, "n_frames", 1)):
            picture.seek(index)
            lasting += picture.info["duration"]
    assert lasting == pytest.approx(1250, abs=5)


@pytest.fixture
def small_disk():
    """Called with a number of bytes, lets no file grow beyond it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


NOISE = Clip(np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8), 8.0)


@pytest.mark.parametrize("name", ["out.mp4", "out.gif"])
def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path, small_disk, name):
    full = NOISE.save(tmp_path / name).stat().st_size
    (tmp_path / name).write_bytes(b"what was there")
    for most in (0, 100, full // 2, full - 1):
        small_disk(most)
        with pytest.raises(InputError, match=rf"{name} could not be written \(.*\); free some space"):
            NOISE.save(tmp_path / name)
        assert [file.name for file in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_bytes() == b"what was there"
    small_disk(full)
    NOISE.save(tmp_path / name)
    assert (tmp_path / name).stat().st_size == full


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["out.mp4", "out.gif"])
def test_no_space_left(tmp_path, monkeypatch, name):
    class Known:
        hex = "0123456789abcdef"

    monkeypatch.setattr(tav_jax.io.video.uuid, "uuid4", Known)
    (tmp_path / f".out.01234567{Path(name).suffix}").symlink_to("/dev/full")
    with pytest.raises(InputError, match=rf"{name} could not be written \(no space left on device\); free some space"):
        NOISE.save(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.mp4", "out.gif"])
def test_a_failure_of_any_kind_leaves_what_was_there(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"what was there")

    def interrupted(path, clip):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(tav_jax.io.video, f"_write_{name[-3:]}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        NOISE.save(tmp_path / name)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"what was there"]


@pytest.mark.parametrize("name", ["out.mp4", "out.gif"])
def test_a_folder_that_may_not_be_written(tmp_path, name):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=rf"file/{name} could not be written \(.*\); choose a folder"):
        NOISE.save(tmp_path / "file" / name)
    if os.geteuid() == 0:
        return  # root may write anywhere
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(InputError, match=rf"{name} could not be written \(permission denied\); choose a folder"):
        NOISE.save(tmp_path / "locked" / name)


def test_what_cannot_be_a_clips_name(tmp_path):
    with pytest.raises(InputError, match=r"'out.avi' has the suffix '.avi'; clips are written as .mp4 or .gif"):
        NOISE.save(tmp_path / "out.avi")
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(InputError, match=r"dir.mp4 is a folder"):
        NOISE.save(tmp_path / "dir.mp4")
    with pytest.raises(InputError, match=r"out.mp4 is 8×16392 pixels, more than 16384 on a side"):
        Clip(np.zeros((1, 8, 16392, 3), np.uint8), 8.0).save(tmp_path / "out.mp4")
    with pytest.raises(InputError, match=r"0 frames"):
        Clip(NOISE.frames[:0], 8.0).save(tmp_path / "out.mp4")


def test_a_name_that_means_something_to_ffmpeg(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(Decoded(NOISE.save("http:out%03d.mp4").absolute()).frames) == 6
    assert len(load_video("http:out%03d.mp4").frames) == 6


@pytest.mark.parametrize("name", ["out.mp4", "out.gif"])
def test_a_saved_file_takes_the_place_of_another_at_once(tmp_path, name):
    (tmp_path / name).write_bytes(b"what was there")
    with open(tmp_path / name, "rb") as reader:
        NOISE.save(tmp_path / name)
        assert reader.read() == b"what was there"  # never half of each
    assert len(load_video(tmp_path / name).frames) == 6


def test_a_saved_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").touch()
    for name in ("out.mp4", "out.gif"):
        assert NOISE.save(tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"frames": 0}, "frames is 0; it must be a whole number, 1 or more"),
        ({"start": -1}, "start is -1; it must be a whole number, 0 or more"),
        ({"stride": 0}, "stride is 0; it must be a whole number, 1 or more"),
        ({"size": (30, 64)}, "height 30 is not a multiple of 8; use 24 or 32"),
        ({"size": (64, 6)}, "width 6 is not a multiple of 8; use 8"),
        ({"size": (0, 64)}, "height 0 is not a multiple of 8; use 8"),
        ({"size": (-8, 64)}, "height -8 is not a multiple of 8; use 8"),
        ({"size": (8, 16392)}, "width is 16392; it must be a multiple of 8, at most 16384"),
        ({"fps": 0.0}, "fps is 0.0; it must be above 0 and below 1000"),
        ({"fps": float("nan")}, "fps is nan; it must be above 0 and below 1000"),
    ],
)
def test_requests_that_make_no_sense(options, said):
    # They are told before any file is looked for.
    assert refusal(InputError, "nowhere.mp4", **options) == said


def test_a_file_that_is_missing(tmp_path):
    assert "missing.mp4 does not exist" in refusal(MissingError, tmp_path / "missing.mp4")


def test_an_empty_file(tmp_path):
    (tmp_path / "a.mp4").touch()
    assert "a.mp4 is empty" in refusal(InputError, tmp_path / "a.mp4")


def test_a_codec_that_ffmpeg_does_not_know(tmp_path):
    path = write(tmp_path / "a.mp4", [numbered(i) for i in range(3)])
    path.write_bytes(path.read_bytes().replace(b"avc1", b"xxxx"))
    assert "a.mp4 is not a video that FFmpeg decodes" in refusal(InputError, path)


@pytest.mark.parametrize("name", ["a.mp4", "a.txt", "a.gif", "a.m3u8"])
@pytest.mark.parametrize("content", ["noise", "text", "playlist", "list"])
def test_a_file_that_is_no_video(tmp_path, clip20, name, content):
    (tmp_path / "other.mp4").write_bytes(clip20.read_bytes())
    data = {
        "noise": np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes(),
        "text": b"Dear diary, today I made a film.\n" * 40,
        "playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nother.mp4\n#EXT-X-ENDLIST\n",
        "list": b"ffconcat version 1.0\nfile other.mp4\n",  # would play another file than the one that was given
    }[content]
    (tmp_path / name).write_bytes(data)
    assert re.search(rf"{name} is not a video.*; give ", refusal(InputError, tmp_path / name))


def test_a_file_with_sound_alone(tmp_path):
    samples, rate, layout = tone(1, 0, 1)
    cover = numbered(0)
    for name, codec, picture in (("a.m4a", "aac", False), ("a.mp4", "aac", False), ("cover.mp3", "libmp3lame", True)):
        with av.open(str(tmp_path / name), "w", options={"id3v2_version": "3"} if picture else {}) as container:
            stream = container.add_stream(codec, rate=rate, layout=layout)
            if picture:  # an album's cover counts as a picture stream
                art = container.add_stream("png", rate=1)
                art.height, art.width, art.pix_fmt = 32, 64, "rgb24"
                art.disposition = av.stream.Disposition.attached_pic.value
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate = rate
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
            if picture:
                container.mux(art.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
                container.mux(art.encode())
        assert f"{name} has no picture in it, only audio; give a video" in refusal(InputError, tmp_path / name)


@pytest.fixture(scope="module")
def rich() -> list[np.ndarray]:
    """Forty numbered frames under noise, so that each has its weight in the file."""
    noise = np.random.default_rng(0)
    return [np.concatenate([numbered(i), noise.integers(0, 256, (32, 64, 3), np.uint8)]) for i in range(40)]


def upper(frames: np.ndarray) -> list[int]:
    return numbers(frames[:, :32])


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def test_cut_off_with_the_index_at_the_end(tmp_path, rich):
    path = write(tmp_path / "a.mp4", rich)
    assert "moov" in boxes(path)[-2:]
    cut(path, 0.6)
    assert "a.mp4 is not a video, or is cut off" in refusal(InputError, path)


ORDERED = {"bf": "0", "g": "12"}
CUT = {  # by how many frames the refusal may be too careful: Matroska does not say when a frame is to be decoded
    "faststart.mp4": (0, {"movflags": "faststart"}),
    "ordered.mp4": (0, {"movflags": "faststart", "options": ORDERED}),
    "fragments.mp4": (0, {"movflags": "frag_keyframe+empty_moov"}),
    "motion.mov": (0, {"codec": "mjpeg", "pixels": "yuvj420p", "movflags": "faststart"}),
    "a.avi": (0, {"codec": "mjpeg", "pixels": "yuvj420p"}),
    "a.mkv": (2, {}),
    "a.webm": (0, {"codec": "libvpx", "options": {"deadline": "realtime"}}),
}


@pytest.mark.parametrize("share", [0.4, 0.5, 0.6, 0.7])
@pytest.mark.parametrize("name", CUT)
def test_cut_off_in_the_middle(tmp_path, rich, name, share):
    careful, options = CUT[name]
    path = write(tmp_path / name, rich, **options)
    truth = load_video(path).frames
    assert upper(truth) == list(range(40))
    size = int(path.stat().st_size * share)
    with av.open(str(path)) as container:
        stored = {packet.pts: packet.pos + packet.size <= size for packet in container.demux(video=0) if packet.size}
    before = len(list(itertools.takewhile(stored.get, sorted(stored))))  # frames, as shown, of which all is in the file
    cut(path, share)
    said = refusal(InputError, path)
    found = re.search(r"damaged after frame (\d+) \(.+\); give a whole file, or frames=(\d+) ", said)
    whole = int(found[2])
    assert int(found[1]) == whole - 1
    assert before - careful <= whole <= before
    # What is offered works and is right to the last bit, one more does not.
    np.testing.assert_array_equal(load_video(path, frames=whole).frames, truth[:whole])
    assert upper(load_video(path, frames=3, start=2, stride=3).frames) == [2, 5, 8]
    said = refusal(InputError, path, frames=whole + 1)
    assert f"has {whole} frames before it is damaged" in said
    assert f"use frames={whole}" in said


@pytest.mark.parametrize(("kept", "fill"), [(0.25, 0), (0.25, 255), (0, 255)])
def test_damaged_in_the_middle(tmp_path, rich, kept, fill):
    """As by a download with holes: frame 17 is overwritten, or all but its head, so that the decoder goes on."""
    path = write(tmp_path / "a.mp4", rich, options=ORDERED)
    truth = load_video(path).frames
    with av.open(str(path)) as container:
        packet = next(itertools.islice(container.demux(video=0), 17, None))
        begin, end = packet.pos + int(kept * packet.size), packet.pos + packet.size
    data = bytearray(path.read_bytes())
    data[begin:end] = bytes([fill]) * (end - begin)
    path.write_bytes(data)
    assert re.search(r"a.mp4 is damaged after frame 16 .*, or frames=17 ", refusal(InputError, path))
    np.testing.assert_array_equal(load_video(path, frames=17).frames, truth[:17])


def mended(said: str) -> list[dict[str, int]]:
    """What a sentence offers: each alternative as options."""
    offers = said.split(": use ")[1].split(" or ")
    return [{name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", offer)} for offer in offers]


@pytest.mark.parametrize("have", [1, 5])
def test_too_short_offers_what_works(tmp_path, have):
    path = folder(tmp_path / "f", {f"{i}.png": numbered(i, 8, 64) for i in range(have)})
    refused = 0
    for frames, start, stride in itertools.product((1, 2, 3, 5, 9), (0, 1, 4, 5, 7), (1, 2, 4)):
        asked = {"frames": frames, "start": start, "stride": stride}
        if start + (frames - 1) * stride < have:
            assert numbers(load_video(path, **asked).frames) == list(range(have))[start::stride][:frames]
            continue
        refused += 1
        said = refusal(InputError, path, **asked)
        assert f"has {have} frame{'s' if have > 1 else ''};" in said
        assert f"need {start + (frames - 1) * stride + 1}:" in said
        for offer in mended(said):
            assert any(asked[name] != value for name, value in offer.items()), said
            count = (asked | offer)["frames"]
            assert len(load_video(path, **(asked | offer)).frames) == count
    assert refused > 20


def test_too_short_in_a_video(clip20):
    said = refusal(InputError, clip20, frames=8, start=2, stride=4)
    assert said.endswith("clip20.mp4 has 20 frames; frames=8, start=2 and stride=4 need 31: use stride=2 or frames=5")
    assert "use start=19" in refusal(InputError, clip20, start=20)


def test_a_folder_without_pictures(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.txt").write_text("none")
    assert "f has no pictures in it; expected files such as 0001.png" in refusal(InputError, tmp_path / "f")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_a_picture_that_is_damaged(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = folder(tmp_path / "f", {f"{i}.{suffix}": noise for i in range(3)})
    cut(path / f"2.{suffix}", share)
    assert f"2.{suffix} is not a readable picture" in refusal(InputError, path)
    assert load_video(path, frames=2).frames.shape == (2, 64, 64, 3)


def test_pictures_smaller_than_a_block(tmp_path):
    path = folder(tmp_path / "f", {"1.png": numbered(1, 5, 64)})
    assert "5×64 pixels, less than 8 on a side; give size=" in refusal(InputError, path)
    assert load_video(path, size=(8, 64)).frames.shape == (1, 8, 64, 3)


def test_text_in_another_alphabet_does_no_harm(tmp_path):
    path = write(tmp_path / "a.mp4", [numbered(i) for i in range(3)], metadata={"title": "QQQQQQQQ"})
    path.write_bytes(path.read_bytes().replace(b"QQQQQQQQ", b"\xff\xfe\xe9\xc3\x28\xf1\xf2\xf3"))
    assert numbers(load_video(path).frames) == [0, 1, 2]


# ----------------------------------------------------------------------------------------------------- keeping it small


def test_pictures_that_are_too_large(tmp_path):
    (tmp_path / "f").mkdir()
    Image.new("1", (16392, 8)).save(tmp_path / "f" / "1.png")
    assert "1.png is 8×16392 pixels, more than 16384 on a side" in refusal(InputError, tmp_path / "f", size=(8, 8))
    wide = np.zeros((16, 16400, 3), np.uint8)
    path = write(tmp_path / "a.avi", [wide], codec="mjpeg", pixels="yuvj420p")
    assert "a.avi is 16×16400 pixels, more than 16384 on a side" in refusal(InputError, path, size=(8, 8))


def test_a_picture_that_unpacks_to_too_much(tmp_path):
    (tmp_path / "f").mkdir()
    Image.new("1", (16000, 16000)).save(tmp_path / "f" / "1.png")  # 5 kB that would be 730 MB
    assert "1.png is not a readable picture" in refusal(InputError, tmp_path / "f", size=(8, 8))


def test_more_than_memory_holds(clip20, monkeypatch):
    monkeypatch.setattr(tav_jax.io.video, "MEMORY", 10 * 32 * 64 * 3)
    assert len(load_video(clip20, frames=10).frames) == 10
    assert "clip20.mp4 fills" in refusal(InputError, clip20)
    read = []
    fit = tav_jax.io.video._fit
    monkeypatch.setattr(tav_jax.io.video, "_fit", lambda *given: read.append(given) or fit(*given))
    assert "clip20.mp4 fills" in refusal(InputError, clip20, frames=11)
    assert len(read) == 1  # known at the first frame
    assert len(load_video(clip20, size=(16, 64)).frames) == 20


def test_a_pause_of_days_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tav_jax.io.video, "MEMORY", 1000 * 32 * 64 * 3)
    times = [*range(0, 5000, 10), 300_000_000]
    path = write(
        tmp_path / "a.mkv", [numbered(i % 256) for i in range(len(times))], codec="ffv1", rate=100, times=times
    )
    assert "a.mkv fills" in refusal(InputError, path)
    assert numbers(load_video(path, frames=3, start=10).frames) == [10, 11, 12]


def test_only_chosen_frames_become_pictures(clip20, monkeypatch):
    turned = []
    upright = tav_jax.io.decoding._upright
    monkeypatch.setattr(tav_jax.io.decoding, "_upright", lambda frame: turned.append(frame.pts) or upright(frame))
    load_video(clip20, frames=3, start=2, stride=5)
    assert len(turned) == 3


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="needs the kernel's count of bytes read")
@pytest.mark.parametrize("sound", ["whole", "early"])
def test_only_the_beginning_is_read(tmp_path, sound):
    """Even where the sound ends early, and would be looked for up to the end of the file."""

    def read() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    noise = np.random.default_rng(0).integers(0, 256, (10, 128, 128, 3), np.uint8)
    seconds = 90 if sound == "whole" else 0.3
    path = write(
        tmp_path / "long.mkv",
        [noise[i % 10] for i in range(900)],
        codec="mjpeg",
        pixels="yuvj420p",
        sound=tone(seconds, 0, seconds),
        sound_codec="pcm_f32le",
    )
    before = read()
    clip = load_video(path, frames=5)
    assert path.stat().st_size > 3_000_000
    assert read() - before < path.stat().st_size / (20 if sound == "whole" else 4)
    assert clip.frames.shape == (5, 128, 128, 3)
    assert clip.audio.samples.shape == (1, 24000)


# ------------------------------------------------------------------------------------------------------------ buckets


def test_a_clip_or_a_folder_of_pictures_may_lie_in_a_bucket(tmp_path, monkeypatch):
    from etils import epath

    frames = np.stack([numbered(i) for i in range(4)])
    Clip(frames, 8.0).save(tmp_path / "clip.mp4")
    (tmp_path / "pictures").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "pictures" / f"{i}.png")
    here = epath.Path(tmp_path)
    monkeypatch.setattr(epath, "Path", lambda url: here / str(url).removeprefix("gs://bucket/"))
    assert numbers(load_video("gs://bucket/clip.mp4", stride=2).frames) == [0, 2]
    assert numbers(load_video("gs://bucket/pictures").frames) == [0, 1, 2, 3]
    with pytest.raises(MissingError, match=r"gs://bucket/other.mp4 does not exist"):
        load_video("gs://bucket/other.mp4")


def test_a_bucket_that_cannot_be_reached_is_one_sentence(monkeypatch):
    from etils import epath

    def unreachable(url):
        raise PermissionError("403 no")

    monkeypatch.setattr(epath, "Path", unreachable)
    with pytest.raises(MissingError, match=r"gs://bucket/clip.mp4 cannot be read from here \(403 no\)"):
        load_video("gs://bucket/clip.mp4")

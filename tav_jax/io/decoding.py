"""Where clips come from: a folder of pictures or any file that FFmpeg decodes, as an even grid of slots.

A source gives its pictures in the order of showing, each with the slot at which the next one takes over, and its sound
on the same clock. What is damaged is said in `damage`, and never passed on as a picture.
"""

import math
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from jaxtyping import Float
from PIL import Image, ImageOps

from tav_jax.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
KINDS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # by content: Pillow reads more, and runs programs for some
# FFmpeg also draws text, plays devices and what it computes itself, and follows lists of other files. None of these is
# so much as opened.
NOT_VIDEO = {
    *("tty", "bin", "xbin", "adf", "idf", "lavfi", "alsa", "fbdev", "kmsgrab", "oss", "video4linux2,v4l2"),
    *("concat", "hls", "dash", "hds", "smoothstreaming", "webm_dash_manifest", "rtp", "rtsp", "sap", "sdp"),
}
FORMATS = ",".join(sorted(av.formats_available - NOT_VIDEO))
FOLDER_FPS = 8.0  # a folder of frames does not say how fast it plays
SLOWEST, FASTEST = Fraction(1, 100), 1000  # frames a second that a file may claim to have
LARGEST = 16384  # pixels on a side; H.264 goes no further
PIXELS = 1 << 26  # of a picture, twice as many as 8K video has
HERTZ = range(8000, 192_001)  # of sound; any other rate is changed
SOUND = 2 << 30  # bytes; 23 minutes at the highest rate
Shown = Generator[tuple[int, Callable[[], np.ndarray]], None, None]  # up to which slot, and how to read the picture


@dataclass(frozen=True)
class Audio:
    samples: Float[np.ndarray, "channels n"]  # from -1 to 1
    rate: int
    layout: str  # "mono" or "stereo"


def check_sides(path: Path, height: int, width: int) -> None:
    if max(height, width) > LARGEST:
        raise InputError(f"{path} is {height}×{width} pixels, more than {LARGEST} on a side; give a smaller one")
    if height * width > PIXELS:
        most = f"{PIXELS / 1e6:.0f} million"
        raise InputError(f"{path} is {height}×{width} pixels, more than {most} in all; give a smaller one")


class Folder:
    """Pictures, in the order of the numbers in their names."""

    damage = ""

    def __init__(self, path: Path, fps: float | None):
        self.fps = Fraction(fps or FOLDER_FPS).limit_denominator(100_000)
        files = (file for file in path.iterdir() if file.suffix.lower() in PICTURES and file.name[0] != ".")
        self.files = sorted((file for file in files if file.is_file()), key=_natural)
        if not self.files:
            raise InputError(f"{path} has no pictures in it; expected files such as 0001.png ({', '.join(PICTURES)})")

    def shown(self) -> Shown:
        for index, file in enumerate(self.files):
            yield index + 1, partial(_read_picture, file)

    def audio(self, begin: Fraction, end: Fraction) -> None:
        return None


def _natural(file: Path) -> tuple:
    """`2.png` before `10.png`: text and numbers alternate."""
    parts = re.split(r"(\d+)", file.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name


def _read_picture(file: Path) -> np.ndarray:
    try:
        with Image.open(file, formats=KINDS) as picture:
            check_sides(file, picture.height, picture.width)
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except InputError:
        raise
    except Exception as error:  # each of Pillow's readers has its own ways to fail on a damaged file
        raise InputError(f"{file} is not a readable picture ({reason(error)}); replace or remove it") from error


class File:
    """A video file. Its frames are put on an even grid, so that a variable rate keeps its timing."""

    def __init__(self, path: Path, fps: float | None):
        self.path, self.damage = path, ""
        self.begin = Fraction(0)  # when the first frame is shown, on the clock that the sound shares
        with _opened(path) as opened:
            self.native = _even_rate(*opened)
        self.fps = Fraction(fps).limit_denominator(100_000) if fps else self.native

    def shown(self) -> Shown:
        held, last = None, 0
        with _opened(self.path) as (container, stream):
            for count, frame in enumerate(self._decoded(container, stream)):
                time = count / self.native if frame.pts is None else frame.pts * stream.time_base
                if held is None:
                    self.begin = time
                else:
                    yield self._slot(time), partial(_upright, held)
                held, last = frame, self._slot(time)
            if held is not None:
                lasting = 0 if self.damage else stream.duration or 0
                end = ((stream.start_time or 0) + lasting) * stream.time_base
                yield max(last + 1, self._slot(end)), partial(_upright, held)

    def _slot(self, time: Fraction) -> int:
        return math.floor((time - self.begin) * self.native + Fraction(1, 2))

    def _decoded(self, container, stream) -> Iterator[av.VideoFrame]:
        """Frames in the order of showing, as far as nothing is damaged; then says in `damage` what is."""
        stream.thread_type = "NONE"  # threads decode further than asked, and report damage late or never
        due, reached = None, Fraction(0)  # what comes later in the file is not shown before `due`
        try:
            for packet in container.demux():
                if packet.pts is not None:
                    reached = max(reached, (packet.pts + (packet.duration or 0)) * packet.time_base)
                if packet.stream.index != stream.index:
                    continue
                due = due if packet.dts is None else packet.dts
                self.damage = _cut_short(container, packet, reached)
                if self.damage:
                    break
                for frame in packet.decode():
                    if frame.is_corrupt:
                        self.damage = "a frame cannot be decoded"
                        return
                    yield frame
        except FFmpegError as error:
            self.damage = reason(error)
        if self.damage and due is not None:
            with suppress(FFmpegError):  # whole frames that the decoder kept back, to put them into order
                for frame in stream.decode(None):
                    if frame.is_corrupt or frame.pts is None or frame.pts > due:
                        return
                    yield frame

    def audio(self, begin: Fraction, end: Fraction) -> Audio | None:
        """The sound from `begin` to `end`, in seconds after the first frame; silence where there is none."""
        if self.fps != self.native:
            return None
        begin, end = begin + self.begin, end + self.begin
        if 2 * 4 * HERTZ[-1] * (end - begin) > SOUND:
            raise InputError(
                f"the chosen frames of {self.path} last {float(end - begin) / 60:.0f} minutes, too long for their "
                "sound; ask for fewer frames or a smaller stride, or give fps to leave the sound out"
            )
        sound, rate = None, 0
        with suppress(FFmpegError, ValueError):  # sound that breaks off is carried as far as it goes
            for at, samples, rate in self._heard(end):
                if sound is None:
                    sound = np.zeros((len(samples), round((end - begin) * rate)), np.float32)
                place = round((at - begin) * rate)
                low, high = max(0, place), min(sound.shape[1], place + samples.shape[1])
                if low < high:
                    sound[:, low:high] = samples[:, low - place : high - place]
        return None if sound is None else Audio(sound, rate, "mono" if len(sound) == 1 else "stereo")

    def _heard(self, end: Fraction) -> Iterator[tuple[Fraction, np.ndarray, int]]:
        """(time, samples, rate) until `end`. More than two channels are mixed down: every player has two."""
        with _opened(self.path) as (container, picture):
            stream = container.streams.best("audio")
            if stream is None or stream.codec_context is None:
                return
            layout = "mono" if stream.codec_context.channels == 1 else "stereo"
            rate = stream.codec_context.sample_rate
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate if rate in HERTZ else 48000)
            at = Fraction(0)
            for packet in container.demux(stream, picture):
                # The pictures are walked along: a sound that has ended would be looked for in the whole file.
                if packet.dts is not None and packet.dts * packet.time_base > end + 10:
                    return
                for frame in packet.decode() if packet.stream.index == stream.index else ():
                    at = at if frame.pts is None else frame.pts * stream.time_base
                    if at >= end:
                        return
                    for piece in resampler.resample(frame):
                        yield at, piece.to_ndarray(), piece.sample_rate
                        at += Fraction(piece.samples, piece.sample_rate)


@contextmanager
def _opened(path: Path) -> Iterator[tuple]:
    """The container and the stream of its pictures."""
    try:
        # By protocol, so that a name with a colon or a % is a file's name; what it refers to elsewhere is not fetched.
        options = {"protocol_whitelist": "file", "format_whitelist": FORMATS, "max_pixels": str(PIXELS)}
        container = av.open(f"file:{path}", options=options, metadata_errors="replace")
    except (FFmpegError, OSError) as error:
        why = "is not a video, or is cut off" if path.stat().st_size else "is empty"
        raise InputError(f"{path} {why} ({reason(error)}); give a whole video file") from error
    with container:
        stream = container.streams.best("video")
        # An album's cover is no video.
        if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
            kinds = " and ".join(sorted({stream.type for stream in container.streams} - {"video"}))
            raise InputError(f"{path} has no picture in it, only {kinds or 'nothing'}; give a video")
        if stream.codec_context is None or not stream.time_base:
            raise InputError(f"{path} is not a video that FFmpeg decodes; give an MP4, MOV, WebM, MKV or GIF file")
        check_sides(path, stream.height, stream.width)
        # What the pictures themselves claim may differ from what the file says of them.
        stream.codec_context.options = {"max_pixels": str(PIXELS)}
        yield container, stream


def _even_rate(container, stream) -> Fraction:
    """The average, unless FFmpeg finds a somewhat higher even rate that most frames keep, as where there is a pause.

    What it finds is not the frames' own where it is about double the average or more: it counts fields, or clock ticks.
    Of a GIF, whose clock ticks 100 times a second, its average is that of the first frames, or of one long pause.
    """
    rates = stream.average_rate, stream.guessed_rate
    average, even = (rate if rate and SLOWEST <= rate <= FASTEST else None for rate in rates)
    if average and even:
        found = even <= 50 if container.format.name == "gif" else 1.02 < even / average < 1.9
        return Fraction(even if found else average)
    return Fraction(average or even or 25)


def _cut_short(container, packet, reached: Fraction) -> str:
    """Why the file has no more than this packet: Matroska and WebM end without an error."""
    lasting = Fraction(container.duration or 0, av.time_base)
    if packet.size == 0 and "matroska" in container.format.name and reached + 1 < lasting:
        return f"it ends at {float(reached):.1f} of {float(lasting):.1f} s"
    return "a frame is cut off" if packet.is_corrupt else ""


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB, turned as the file says that it should be shown."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip().lower()

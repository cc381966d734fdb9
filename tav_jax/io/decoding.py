"""Decode video files of any format that FFmpeg reads.

A file with a variable frame rate is resampled to a constant one, which keeps its timing. Frames are uint8 RGB
`[H, W, 3]` with square pixels, upright, in SDR. Decoding stops at the first damaged frame; `damage` is the cause.
"""

import math
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
from jaxtyping import Float, UInt8
from PIL import Image

from tav_jax.errors import InputError
from tav_jax.io import tone_mapping

# FFmpeg formats that render text, read devices, synthesize signals or refer to other files, which a pattern in the
# name does for image2.
EXCLUDED_FORMATS = {
    *("tty", "bin", "xbin", "adf", "idf", "lavfi", "alsa", "fbdev", "kmsgrab", "oss", "video4linux2,v4l2"),
    *(
        "image2",
        "alias_pix",
        "brender_pix",
        "concat",
        "hls",
        "dash",
        "hds",
        "smoothstreaming",
        "webm_dash_manifest",
        "rtp",
        "rtsp",
        "sap",
        "sdp",
    ),
}
ALLOWED_FORMATS = ",".join(sorted(av.formats_available - EXCLUDED_FORMATS))
MIN_FPS, MAX_FPS = Fraction(1, 100), 1000  # of a clip; rates outside of it in a file are ignored
MAX_FRAME_SIDE = 16384  # pixels, the limit of H.264
MAX_PIXELS = 1 << 26  # per frame, twice as many as in 8K video
MAX_PIXEL_ASPECT = 16  # a sample aspect ratio beyond 1:16 or 16:1 is ignored as an error in the file
UNSPECIFIED = 2  # of FFmpeg's color tags
SAMPLE_RATES = range(8000, 192_001)  # Hz; audio with any other rate is resampled to 48 kHz
MAX_AUDIO_BYTES = 2 << 30  # 23 minutes at the highest sample rate
# For each decoded frame in display order: the clip's first frame index after it, and a function that converts it to
# RGB. At a constant frame rate, a frame of long duration covers several indices, and a short one may cover none.
FrameIterator = Generator[tuple[int, Callable[[], np.ndarray]], None, None]


@dataclass(frozen=True)
class Audio:
    """Audio samples in [-1, 1] at `rate` Hz. `layout` is "mono" or "stereo"."""

    samples: Float[np.ndarray, "channels n"]
    rate: int
    layout: str


def check_frame_size(path: Path, height: int, width: int) -> None:
    if max(height, width) > MAX_FRAME_SIDE or height * width > MAX_PIXELS:
        side, total = f"{MAX_FRAME_SIDE} on a side", f"{MAX_PIXELS / 1e6:.0f} million in all"
        limit = side if max(height, width) > MAX_FRAME_SIDE else total
        raise InputError(f"{path} is {height}×{width} pixels, more than {limit}; use a smaller one")


class VideoFile:
    """A video file, resampled to `native_fps` and played at `fps`, which is the same unless the caller changes it."""

    def __init__(self, path: Path, fps: float | None):
        self.path, self.damage, self.note = path, "", ""
        self.begin = Fraction(0)  # timestamp of the first frame in seconds; audio timestamps use the same clock
        with _open(path) as (container, stream):
            self.native_fps = _constant_rate(container, stream)
            duration = Fraction(stream.duration or 0) * stream.time_base or Fraction(
                container.duration or 0, av.time_base
            )
        self.length = round(duration * self.native_fps) or None  # frames, as the file says; None: it does not
        self.fps = Fraction(fps).limit_denominator(100_000) if fps else self.native_fps

    def frames(self) -> FrameIterator:
        previous, last = None, 0
        with _open(self.path) as (container, stream):
            aspect = stream.sample_aspect_ratio or 1  # width ÷ height of a pixel
            pixel_aspect = Fraction(aspect if Fraction(1, MAX_PIXEL_ASPECT) <= aspect <= MAX_PIXEL_ASPECT else 1)
            for count, frame in enumerate(self._decode(container, stream)):
                if transfer := tone_mapping.TRANSFERS.get(frame.color_trc):
                    self.note = f"is an HDR video ({transfer}); its colors were tone mapped to SDR"
                time = count / self.native_fps if frame.pts is None else frame.pts * stream.time_base
                if previous is None:
                    self.begin = time
                else:
                    yield self._frame_index(time), partial(_to_rgb, self.path, previous, pixel_aspect)
                previous, last = frame, self._frame_index(time)
            if previous is not None:
                duration = 0 if self.damage else stream.duration or 0
                end = self._frame_index(((stream.start_time or 0) + duration) * stream.time_base)
                yield max(last + 1, end), partial(_to_rgb, self.path, previous, pixel_aspect)

    def _frame_index(self, time: Fraction) -> int:
        return math.floor((time - self.begin) * self.native_fps + Fraction(1, 2))

    def _decode(self, container, stream) -> Iterator[av.VideoFrame]:
        """The frames in display order, up to the first damaged one. Sets `damage` if there is one."""
        stream.thread_type = "NONE"  # threads decode further ahead than needed, and report damage late or not at all
        decode_time, end_time = None, Fraction(0)  # no later packet is displayed before `decode_time`
        try:
            for packet in container.demux():
                if packet.pts is not None:
                    end_time = max(end_time, (packet.pts + (packet.duration or 0)) * packet.time_base)
                if packet.stream.index != stream.index:
                    continue
                decode_time = decode_time if packet.dts is None else packet.dts
                self.damage = _truncation(container, packet, end_time)
                if self.damage:
                    break
                for frame in packet.decode():
                    if frame.is_corrupt:
                        self.damage = "a frame cannot be decoded"
                        return
                    yield frame
        except FFmpegError as error:
            self.damage = reason(error)
        if self.damage and decode_time is not None:
            with suppress(FFmpegError):  # intact frames that the decoder still holds for reordering
                for frame in stream.decode(None):
                    if frame.is_corrupt or frame.pts is None or frame.pts > decode_time:
                        return
                    yield frame

    def audio(self, begin: Fraction, end: Fraction) -> Audio | None:
        """The audio from `begin` to `end`, in seconds after the first frame. Gaps are filled with silence.

        None if the file has no audio that can be decoded, or if the clip is played at another rate than the file's.
        """
        if self.fps != self.native_fps:
            return None
        begin, end = begin + self.begin, end + self.begin
        if 2 * 4 * SAMPLE_RATES[-1] * (end - begin) > MAX_AUDIO_BYTES:
            raise InputError(
                f"the selected frames of {self.path} last {float(end - begin) / 60:.0f} minutes, too long for their "
                "audio; select fewer frames or a smaller stride, or set fps to leave the audio out"
            )
        audio, rate = None, 0
        with suppress(FFmpegError, ValueError):  # of damaged audio, the part before the damage is used
            for time, samples, rate in self._decode_audio(end):
                if audio is None:
                    audio = np.zeros((len(samples), round((end - begin) * rate)), np.float32)
                offset = round((time - begin) * rate)
                low, high = max(0, offset), min(audio.shape[1], offset + samples.shape[1])
                if low < high:
                    audio[:, low:high] = samples[:, low - offset : high - offset]
        return None if audio is None else Audio(audio, rate, "mono" if len(audio) == 1 else "stereo")

    def _decode_audio(self, end: Fraction) -> Iterator[tuple[Fraction, np.ndarray, int]]:
        """(time, samples, rate) up to `end`. More than two channels are mixed down to stereo."""
        with _open(self.path) as (container, video):
            stream = container.streams.best("audio")
            if stream is None or stream.codec_context is None:
                return
            layout = "mono" if stream.codec_context.channels == 1 else "stereo"
            rate = stream.codec_context.sample_rate
            resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate if rate in SAMPLE_RATES else 48000)
            time = Fraction(0)
            # Video packets are demuxed too, to stop at `end` where the audio track is shorter. Otherwise the whole
            # file would be read.
            for packet in container.demux(stream, video):
                if packet.dts is not None and packet.dts * packet.time_base > end + 10:
                    return
                for frame in packet.decode() if packet.stream.index == stream.index else ():
                    time = time if frame.pts is None else frame.pts * stream.time_base
                    if time >= end:
                        return
                    for resampled in resampler.resample(frame):
                        yield time, resampled.to_ndarray(), resampled.sample_rate
                        time += Fraction(resampled.samples, resampled.sample_rate)


@contextmanager
def _open(path: Path) -> Iterator[tuple]:
    """The container and its video stream."""
    try:
        # `file:` makes FFmpeg take a name with a colon or a % literally. The whitelists prevent the file from loading
        # anything else.
        options = {"protocol_whitelist": "file", "format_whitelist": ALLOWED_FORMATS, "max_pixels": str(MAX_PIXELS)}
        container = av.open(f"file:{path}", options=options, metadata_errors="replace")
    except (FFmpegError, OSError) as error:
        problem = "is not a video, or is truncated" if path.stat().st_size else "is empty"
        raise InputError(f"{path} {problem} ({reason(error)}); use a complete video file") from error
    with container:
        stream = container.streams.best("video")
        # The cover image of an audio file is stored as a video stream.
        if not isinstance(stream, av.VideoStream) or stream.disposition & Disposition.attached_pic:
            kinds = " and ".join(sorted({stream.type for stream in container.streams} - {"video"}))
            raise InputError(f"{path} has no video stream, only {kinds or 'nothing'}; use a video")
        if stream.codec_context is None or not stream.time_base:
            raise InputError(f"{path} is not a video that FFmpeg decodes; use an MP4, MOV, WebM, MKV or GIF file")
        check_frame_size(path, stream.height, stream.width)
        # The encoded frames may be larger than the container's header says.
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        yield container, stream


def _constant_rate(container, stream) -> Fraction:
    """The constant frame rate of a video: FFmpeg's average rate, or its guess of the rate of most frames.

    The guess is used if it is somewhat higher than the average, as in a clip with a pause. At double the average or
    more it is the rate of fields or of the container's clock. In a GIF, whose clock runs at 100 Hz, the average covers
    only the first frames or one long pause, so the guess is used up to 50.
    """

    def plausible(rate: Fraction | None) -> Fraction | None:
        return rate if rate and MIN_FPS <= rate <= MAX_FPS else None

    average, guess = plausible(stream.average_rate), plausible(stream.guessed_rate)
    if average and guess:
        use_guess = guess <= 50 if container.format.name == "gif" else 1.02 < guess / average < 1.9
        return Fraction(guess if use_guess else average)
    return Fraction(average or guess or 25)


def _truncation(container, packet, end_time: Fraction) -> str:
    """How the file is truncated at this packet, or "". For Matroska and WebM, FFmpeg does not report it as an error."""
    duration = Fraction(container.duration or 0, av.time_base)
    if packet.size == 0 and "matroska" in container.format.name and end_time + 1 < duration:
        return f"it ends at {float(end_time):.1f} of {float(duration):.1f} s"
    return "a frame is truncated" if packet.is_corrupt else ""


def _to_rgb(path: Path, frame: av.VideoFrame, pixel_aspect: Fraction) -> UInt8[np.ndarray, "H W 3"]:
    """RGB with square pixels, upright. The stored width is scaled by the pixel aspect, before the rotation."""
    width = max(1, round(frame.width * pixel_aspect))
    check_frame_size(path, frame.height, width)
    if transfer := tone_mapping.TRANSFERS.get(frame.color_trc):
        matrix = "BT2020" if frame.colorspace == UNSPECIFIED else None  # without a tag, FFmpeg assumes BT.601
        image = tone_mapping.to_sdr(frame.to_ndarray(format="rgb48le", src_colorspace=matrix), transfer)
    else:
        image = frame.to_ndarray(format="rgb24")
    if width != frame.width:
        image = np.asarray(Image.fromarray(image).resize((width, frame.height), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(_upright(image, frame))


def _upright(image: UInt8[np.ndarray, "h w 3"], frame: av.VideoFrame) -> UInt8[np.ndarray, "H W 3"]:
    """Apply the nearest of the eight rotations and reflections to the display matrix of the frame.

    The matrix shows the point (x, y), y down, at (a·x + c·y, b·x + d·y).
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")  # pyright: ignore[reportAttributeAccessIssue]
    if matrix is None:
        return image
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, np.int32)[:5])
    if abs(b) + abs(c) > abs(a) + abs(d):  # the axes are exchanged
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def reason(error: Exception) -> str:
    """The error's message without its number and file name, in lower case."""
    return (getattr(error, "strerror", None) or str(error)).strip().lower()

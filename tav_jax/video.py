"""Clips in and out: decode, choose frames, crop or stretch, carry the sound, write MP4 and GIF.

Frames are uint8 `[F, H, W, 3]`, upright, in the order in which they are shown.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import imageio.v3 as iio
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from tav_jax.errors import InputError, MissingError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
FOLDER_FPS = 8.0  # a folder of frames does not say how fast it plays
SIDE = 4  # no Stable Diffusion's VAE divides a side by less; the model checks its own factor
Fit = Literal["crop", "stretch"]


@dataclass(frozen=True)
class Audio:
    samples: Float[np.ndarray, "channels n"]
    rate: int
    layout: str  # "mono", "stereo", "5.1"


@dataclass(frozen=True)
class Clip:
    """Chosen frames. `fps` is the rate at which they play at the source's own speed; `audio` covers just their seconds."""

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: float
    audio: Audio | None = None

    def save(self, path: str | Path) -> Path:
        """Write an MP4 (H.264 and AAC, plays in a browser) or a GIF, by the name's suffix."""
        path = Path(path).expanduser()
        writers = {".mp4": _write_mp4, ".gif": _write_gif}
        if path.suffix.lower() not in writers:
            raise InputError(f"{path.name!r} has the suffix {path.suffix!r}; clips are written as .mp4 or .gif")
        if path.is_dir():
            raise InputError(f"{path} is a folder; give the name of a file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Written beside its final place, so that a full disk or a kill leaves no half file under that name.
        handle, scratch = tempfile.mkstemp(prefix=f".{path.stem[:50]}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        try:
            writers[path.suffix.lower()](Path(scratch), self)
            os.chmod(scratch, 0o644)
            os.replace(scratch, path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
        return path


def load_video(
    path: str | Path,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    start: int = 0,
    stride: int = 1,
    fit: Fit = "crop",
    fps: float | None = None,
) -> Clip:
    """Frames `start`, `start + stride`, … of a video or of a folder of pictures.

    `frames=None` takes all that fit. `size` is (height, width); by default the source's own, cropped to multiples of 8.
    `fit="crop"` keeps the proportions and cuts evenly from two sides; `"stretch"` distorts, as the official code does.
    `fps` overrides the source's rate, for a folder of pictures above all.
    """
    path = Path(path).expanduser()
    _check_request(frames, size, start, stride, fit, fps)
    if not path.exists():
        raise MissingError(f"{path} does not exist; give a video file or a folder of pictures")
    source = _Folder(path, fps) if path.is_dir() else _File(path, fps)
    chosen, seen = [], 0
    for index, read in source.frames():
        seen = index + 1
        if index >= start and (index - start) % stride == 0:
            chosen.append(_fit(read(), size, fit))
            if len(chosen) == frames:
                break
    if not chosen or (frames is not None and len(chosen) < frames):
        raise InputError(_too_short(path, seen, frames or 1, start, stride) + source.damage)
    if len(shapes := {frame.shape for frame in chosen}) > 1:
        sizes = " and ".join(f"{h}×{w}" for h, w, _ in sorted(shapes))
        raise InputError(f"the frames of {path} differ in size ({sizes}); give size=(height, width) to bring them to one")
    seconds = (start / source.fps, (start + len(chosen) * stride) / source.fps)
    return Clip(np.stack(chosen), float(source.fps / stride), source.audio(*map(float, seconds)))


def _check_request(frames, size, start, stride, fit, fps) -> None:
    for name, value, least in (("frames", frames, 1), ("start", start, 0), ("stride", stride, 1)):
        if name == "frames" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise InputError(f"{name} is {value!r}; it must be a whole number, {least} or more")
    if size is not None:
        if len(size) != 2:
            raise InputError(f"size is {size!r}; it must be (height, width)")
        for name, side in zip(("height", "width"), size, strict=True):
            if isinstance(side, bool) or not isinstance(side, int | np.integer) or side < SIDE or side % SIDE:
                below = int(side) // 8 * 8
                near = f"{below} or {below + 8}" if below > 0 else "8"
                raise InputError(f"{name} {side} is not a multiple of 8; use {near}")
    if fit not in ("crop", "stretch"):
        raise InputError(f"fit is {fit!r}; it must be 'crop' or 'stretch'")
    if fps is not None and not 0 < fps < 1000:
        raise InputError(f"fps is {fps!r}; it must be above 0 and below 1000")


def _too_short(path: Path, have: int, frames: int, start: int, stride: int) -> str:
    """How many frames there are, and what would do."""
    said = f"{path} has {have} frames; {frames} from frame {start} with a stride of {stride} need "
    said += f"{start + (frames - 1) * stride + 1}."
    mends = []
    if start < have:
        if frames > 1 and (fitting := (have - 1 - start) // (frames - 1)) >= 1:
            mends.append(f"a stride of {fitting}")
        mends.append(f"{-(-(have - start) // stride)} frames")
    if frames <= have and start > 0:
        mends.append(f"a start of {max(0, have - 1 - (frames - 1) * stride)}" if have > (frames - 1) * stride else "")
    mends = [m for m in mends if m]
    return said + (f" It would do with {' or '.join(mends)}." if mends else " Give a longer clip.")


def _fit(frame: np.ndarray, size: tuple[int, int] | None, fit: Fit) -> UInt8[np.ndarray, "H W 3"]:
    h, w, _ = frame.shape
    if size is None:
        size = (h // 8 * 8, w // 8 * 8)
        if 0 in size:
            raise InputError(f"the frames are {h}×{w} pixels, less than 8 on a side; give a larger clip")
        top, left = (h - size[0]) // 2, (w - size[1]) // 2
        return frame[top : top + size[0], left : left + size[1]]
    height, width = size
    if (h, w) == (height, width):
        return frame
    if fit == "stretch":
        box = (0, 0, w, h)
    else:  # the largest centred box of the wanted proportions
        across, down = min(w, h * width / height), min(h, w * height / width)
        box = ((w - across) / 2, (h - down) / 2, (w + across) / 2, (h + down) / 2)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=box))


# --------------------------------------------------------------------------------------------------------- sources


class _Folder:
    """Pictures, in the order of the numbers in their names."""

    damage = ""

    def __init__(self, path: Path, fps: float | None):
        self.fps = Fraction(fps or FOLDER_FPS).limit_denominator(100_000)
        self.files = sorted(
            (file for file in path.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith(".")),
            key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)],
        )
        if not self.files:
            raise InputError(f"{path} has no pictures in it; expected files such as 0001.png ({', '.join(PICTURES)})")

    def frames(self) -> Iterator:
        for index, file in enumerate(self.files):
            yield index, lambda file=file: self._read(file)

    def _read(self, file: Path) -> np.ndarray:
        try:
            return iio.imread(file, plugin="pillow", mode="RGB")
        except (OSError, ValueError) as error:
            raise InputError(f"{file} is not a readable picture ({error}); replace or remove it") from error

    def audio(self, begin: float, end: float) -> None:
        return None


class _File:
    """A video file. Its frames are put on an even grid of `fps`, so that a variable rate keeps its timing."""

    def __init__(self, path: Path, fps: float | None):
        self.path, self.damage = path, ""
        try:
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise InputError(f"{path} has no picture in it, only {_kinds(container)}; give a video")
                stream = container.streams.video[0]
                rate = stream.average_rate or stream.guessed_rate or stream.base_rate
                self.declared = stream.frames
                self.has_audio = bool(container.streams.audio)
        except (av.error.FFmpegError, OSError) as error:
            size = path.stat().st_size
            why = "is empty" if size == 0 else f"is not a video that FFmpeg reads, or is cut off ({_reason(error)})"
            raise InputError(f"{path} {why}; give a whole video file") from error
        self.native = Fraction(rate) if rate else Fraction(25)
        self.fps = Fraction(fps).limit_denominator(100_000) if fps else self.native
        self.begin = 0.0  # when the first frame is shown, on the clock that the sound shares

    def frames(self) -> Iterator:
        """(slot on the grid, a function that gives the picture). A frame fills every slot until the next one starts."""
        held, slot, decoded = None, 0, 0
        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                for frame in container.decode(stream):
                    time = frame.time if frame.time is not None else float(decoded / self.native)
                    if decoded == 0:
                        self.begin = time
                    first = round((time - self.begin) * self.native)
                    while held is not None and slot < first:
                        yield slot, lambda held=held: _upright(held)
                        slot += 1
                    held, decoded = frame, decoded + 1
                if held is not None:
                    yield slot, lambda held=held: _upright(held)
        except av.error.FFmpegError as error:
            self.damage = f" The file is damaged after frame {decoded} ({_reason(error)})."
            if held is not None:
                yield slot, lambda held=held: _upright(held)
        if not self.damage and decoded < self.declared:
            self.damage = f" The file announces {self.declared} frames and holds {decoded}: it was cut off."

    def audio(self, begin: float, end: float) -> Audio | None:
        """The sound from `begin` to `end`, in seconds after the first frame; silence where it starts later."""
        if not self.has_audio or self.fps != self.native:
            return None
        begin, end = begin + self.begin, end + self.begin
        pieces, rate = [], None
        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.audio[0]
                rate, layout = stream.rate, stream.layout
                resampler = av.AudioResampler(format="fltp", layout=layout, rate=rate)
                for frame in container.decode(stream):
                    at = frame.time or 0.0
                    if at >= end:
                        break
                    pieces += [(at, piece.to_ndarray()) for piece in resampler.resample(frame)]
        except av.error.FFmpegError:
            pass  # sound that breaks off is carried as far as it goes
        if not pieces:
            return None
        wanted = np.zeros((pieces[0][1].shape[0], round((end - begin) * rate)), np.float32)
        for at, samples in pieces:
            place = round((at - begin) * rate)
            low, high = max(0, place), min(wanted.shape[1], place + samples.shape[1])
            if low < high:
                wanted[:, low:high] = samples[:, low - place : high - place]
        return Audio(wanted, rate, layout.name)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """RGB, turned as the file says that it should be shown."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4))


def _kinds(container) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).strip().lower()


# --------------------------------------------------------------------------------------------------------- writing


def _write_mp4(path: Path, clip: Clip) -> None:
    count, h, w, _ = clip.frames.shape
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(clip.fps).limit_denominator(100_000))
        stream.width, stream.height = w + w % 2, h + h % 2  # H.264 with halved colours takes even sides only
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "16", "preset": "medium"}
        context = stream.codec_context
        # Said in the file, since players guess from the picture's size otherwise.
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        context.color_range = 1  # limited
        sound = container.add_stream("aac", rate=clip.audio.rate, layout=clip.audio.layout) if clip.audio else None
        for picture in clip.frames:
            padded = np.pad(picture, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _mux_audio(container, sound, clip.audio)


def _mux_audio(container, stream, audio: Audio) -> None:
    step = 1024
    for begin in range(0, audio.samples.shape[1], step):
        samples = np.ascontiguousarray(audio.samples[:, begin : begin + step], np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=audio.layout)
        frame.sample_rate, frame.pts, frame.time_base = audio.rate, begin, Fraction(1, audio.rate)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _write_gif(path: Path, clip: Clip) -> None:
    # GIF counts in hundredths of a second: spread the rounding, so that the whole clip lasts as long as it should.
    ends = [round(100 * (i + 1) / clip.fps) for i in range(len(clip.frames))]
    lasting = [10 * max(2, end - begin) for begin, end in zip([0, *ends], ends, strict=False)]
    iio.imwrite(path, clip.frames, plugin="pillow", duration=lasting, loop=0)

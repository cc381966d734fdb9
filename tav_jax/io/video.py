"""Clips: load frames and audio from a video, and save them as a video or as images.

Frames are uint8 RGB `[F, H, W, 3]`, upright, with square pixels, in display order. Read by
`decoding.py` and `images.py`.
"""

import base64
import errno
import html
import os
import shutil
import tempfile
import uuid
import warnings
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import av
import imageio.v3 as iio
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tav_jax.config import check_choice, check_size
from tav_jax.distributed import processes
from tav_jax.errors import InputError, MissingError, short_repr
from tav_jax.io import decoding, paths
from tav_jax.io.decoding import MAX_FPS, MAX_FRAME_SIDE, MIN_FPS, Audio, VideoFile
from tav_jax.io.images import ImageDirectory, ImageFile, is_image

MAX_BYTES = 4 << 30  # of all selected frames
MAX_FRAMES = 100_000
MAX_GIF_DELAY = 65_535  # hundredths of a second
# Suffix → encoders of video (with options) and audio. A codec's output depends on its number of threads, and so on the
# machine.
ENCODERS = {
    ".mp4": ("libx264", {"crf": "16", "preset": "medium", "x264-params": "threads=1"}, "aac"),
    ".webm": ("libvpx-vp9", {"crf": "18", "b": "0", "cpu-used": "4", "threads": "1"}, "libopus"),
}
Fit = Literal["crop", "stretch"]


@dataclass(frozen=True)
class Clip:
    """The frames of a clip. At `fps` they play at the source's speed. `audio` covers exactly their duration."""

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: float
    audio: Audio | None = None
    source_frames: int | None = None  # of the whole source, before frames were selected; None: unknown

    def save(self, path: str | Path) -> Path:
        """Write an MP4 (H.264 and AAC, which browsers play), a WebM (VP9 and Opus) or a GIF, by the suffix of the path,
        or a directory of PNG files if it ends with a slash."""
        is_directory = str(path).endswith(("/", os.sep))
        path = Path(path).expanduser()
        writers = dict.fromkeys(ENCODERS, _write_video) | {".gif": _write_gif}
        write = _write_images if is_directory else writers.get(path.suffix.lower())
        if write is None:
            use = "use .mp4, .webm or .gif, or a name that ends with a slash for a directory of PNG files"
            raise InputError(f"{path.name!r} has the suffix {path.suffix!r}; {use}")
        if is_directory and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"{path} exists and is not an empty directory; use another name")
        if not is_directory and os.path.isdir(path):
            raise InputError(f"{path} is a directory; use the name of a file, or end it with a slash for PNG files")
        if not len(self.frames):
            raise InputError(f"the clip for {path} has 0 frames; save 1 or more")
        decoding.check_frame_size(path, *self.frames.shape[1:3])
        if not MIN_FPS <= self.fps <= MAX_FPS:
            raise InputError(f"fps is {self.fps!r}; it must be between {float(MIN_FPS)} and {MAX_FPS} to save a clip")
        # Written to a temporary file first, so that an error never leaves an incomplete file at `path`.
        scratch = path.with_name(f".{path.stem[:50]}.{uuid.uuid4().hex[:8]}{path.suffix.lower()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(scratch, self)
            os.replace(scratch, path)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            fix = "free some space there" if full else "choose a directory with write permission"
            raise InputError(f"{path} could not be written ({decoding.reason(error)}); {fix}") from error
        finally:
            with suppress(OSError):
                shutil.rmtree(scratch, ignore_errors=True) if scratch.is_dir() else scratch.unlink(missing_ok=True)
        return path

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        name, sound = type(self).__name__, ", with sound" if self.audio else ""
        return f"{name}({count} frame{'s' * (count != 1)} of {height}×{width}, {self.fps:g} fps{sound})"


@dataclass(frozen=True, repr=False)
class Edit(Clip):
    """A sampled clip, with the fps and the audio of its source clip."""

    prompt: str = ""
    latents: Any = None  # [1, F, h, w, 4]
    trajectory: Any = None  # the latents after each step, [steps, 1, F, h, w, 4], if requested
    mask: Any = None  # [F, h, w], in two-branch editing: 1 where the edit may differ from the source

    def save(self, path: str | Path) -> Path:
        """As `Clip.save`. In a multi-process run only the primary process writes."""
        return super().save(path) if processes.is_primary() else Path(path)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, prompt={self.prompt!r})"

    def _repr_html_(self) -> str:
        """The clip as a video in a notebook."""
        with tempfile.TemporaryDirectory(prefix="tav_jax_") as scratch:
            data = base64.b64encode(Clip.save(self, Path(scratch) / "edit.mp4").read_bytes()).decode()
        video = (
            f'<video src="data:video/mp4;base64,{data}" autoplay loop muted controls style="min-width: 16em"></video>'
        )
        return f"<figure>{video}<figcaption>{html.escape(self.prompt)}</figcaption></figure>"


def load_video(
    path: str | Path,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    start: int = 0,
    stride: int = 1,
    fit: Fit = "crop",
    fps: float | None = None,
    multiple: int = 8,
) -> Clip:
    """Load frames `start`, `start + stride`, … of a video file or of a directory of images.

    Args:
        path: a local path or a bucket URL.
        frames: how many frames to load; by default all. A damaged file can be loaded up to the damage.
        size: (height, width) of the result; by default the display size of the source, cropped to multiples of
            `multiple`.
        start: index of the first frame.
        stride: distance between two frames. The clip's fps is the source's fps ÷ stride.
        fit: "crop" keeps the aspect ratio and crops the center; "stretch" changes it, as the official code does.
        fps: replaces the frame rate of the source, which for a directory of images is 8. The audio is dropped if it
            differs from the rate of the file.
    """
    _check_request(frames, size, start, stride, fit, fps)
    if "://" in str(path):
        paths.check_bucket(str(path))
        with paths.scratch_directory(Path(tempfile.gettempdir())) as scratch:
            local, options = _download(str(path), scratch), {"fit": fit, "fps": fps, "multiple": multiple}
            return load_video(local, frames=frames, size=size, start=start, stride=stride, **options)
    path = _check_path(path)
    kind = ImageDirectory if path.is_dir() else ImageFile if is_image(path) else VideoFile
    source = kind(path, fps)
    if source.fps / stride < MIN_FPS:
        raise InputError(
            f"{path} has {float(source.fps):.3g} frames per second, so stride={stride} gives less than one in "
            f"{1 / MIN_FPS} seconds; use stride={max(1, int(source.fps / MIN_FPS))} or less, or a higher fps"
        )
    selected, available, wanted, shape = [], 0, start, None
    with closing(source.frames()) as decoded:
        for end, read in decoded:
            available = max(available, end)
            if wanted >= end:
                continue
            frame = read()
            shape = shape or frame.shape
            if size is None and frame.shape != shape:
                sizes = f"{shape[0]}×{shape[1]} and {frame.shape[0]}×{frame.shape[1]}"
                raise InputError(f"the frames of {path} differ in size ({sizes}); set size=(height, width)")
            frame = _resize(frame, size, fit, multiple)
            while wanted < end and len(selected) != frames:
                selected.append(frame)
                wanted += stride
                if (needed := frame.nbytes * (frames or len(selected))) > MAX_BYTES:
                    memory = f"{needed / 2**30:.1f} GiB, more than {MAX_BYTES / 2**30:.1f}"
                    raise InputError(f"the selected frames of {path} take {memory}; use fewer frames or a smaller size")
                if len(selected) > MAX_FRAMES:
                    raise InputError(f"{path} has more than {MAX_FRAMES} frames to load; set frames to limit them")
            if len(selected) == frames:
                break
    if not selected or (frames is not None and len(selected) < frames):
        raise InputError(_too_short(path, available, source.damage, frames or 1, start, stride))
    if frames is None and source.damage:
        raise InputError(
            f"{path} is damaged after frame {available - 1} ({source.damage}); "
            f"use a complete file, or frames={len(selected)} to load the frames before the damage"
        )
    if source.note:
        warnings.warn(f"{path.name} {source.note}", stacklevel=2)
    audio = source.audio(start / source.fps, (start + len(selected) * stride) / source.fps)
    return Clip(np.stack(selected), float(source.fps / stride), audio, source.length)


def _check_request(frames, size, start, stride, fit, fps) -> None:
    counts = (("frames", 1 if frames is None else frames, 1), ("start", start, 0), ("stride", stride, 1))
    for name, value, minimum in counts:
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
            raise InputError(f"{name} is {short_repr(value)}; it must be a whole number, {minimum} or more")
    if size is not None:
        if not isinstance(size, tuple | list) or len(size) != 2:
            raise InputError(f"size is {short_repr(size)}; it must be (height, width)")
        check_size(*size, most=MAX_FRAME_SIDE)
    check_choice("clip.fit", fit)
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float | Fraction) or not 0 < fps < 1000):
        raise InputError(f"fps is {short_repr(fps)}; it must be above 0 and below 1000")


def _check_path(path: str | Path) -> Path:
    if "\0" in str(path):
        raise InputError(f"the path {short_repr(str(path))} contains a NUL character; use the name of a file")
    path = Path(path).expanduser()
    if not os.path.exists(path):
        raise MissingError(f"{path} does not exist; use a video file or a directory of images")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} is not readable; change its permissions or use another file")
    if not path.is_dir() and not path.is_file():
        raise InputError(f"{path} is a pipe or a device; use a video file or a directory of images")
    return path


def _download(url: str, directory: Path) -> Path:
    """Copy a video file, or a directory of images, from a bucket into a local directory."""
    from etils import epath  # imports slowly

    try:
        source = epath.Path(url)
        target = directory / source.name
        if source.is_dir():
            target.mkdir()
            for file in source.iterdir():
                if not file.is_dir():
                    file.copy(target / file.name)
            return target
        if source.exists():
            source.copy(target)
            return target
    except Exception as error:  # the exception depends on the bucket's client: import, permission or network errors
        raise MissingError(f"{url} cannot be read ({error}); run `tav doctor` to see what buckets need") from error
    raise MissingError(f"{url} does not exist; use a video file or a directory of images")


def _too_short(path: Path, available: int, damage: str, frames: int, start: int, stride: int) -> str:
    """The error message for too few frames, with each change of a single argument that would work."""
    until = f" before it is damaged ({damage})" if damage else ""
    if available == 0:
        return f"{path} has no frame that can be decoded{until}; use a complete video"
    reach = (frames - 1) * stride
    fixes = []
    if frames > 1 and (closer := (available - 1 - start) // (frames - 1)) >= 1:
        fixes.append(f"stride={closer}")
    if start > 0 and reach < available:
        fixes.append(f"start={available - 1 - reach}")
    if start < available:
        fixes.append(f"frames={-(-(available - start) // stride)}")
    return (
        f"{path} has {available} frame{'s' * (available > 1)}{until}; frames={frames}, start={start} and "
        f"stride={stride} need {start + reach + 1}: use "
        f"{' or '.join(fixes) or f'start=0, stride=1 and frames={min(frames, available)}'}"
    )


def _resize(
    frame: UInt8[np.ndarray, "h w 3"], size: tuple[int, int] | None, fit: Fit, multiple: int = 8
) -> UInt8[np.ndarray, "height width 3"]:
    """Crop to multiples (no size), crop the center and resize ("crop"), or resize only ("stretch")."""
    h, w, _ = frame.shape
    if size is None:
        if min(h, w) < multiple:
            raise InputError(f"the frames are {h}×{w} pixels, less than {multiple} on a side; set size=(height, width)")
        height, width = h // multiple * multiple, w // multiple * multiple
        top, left = (h - height) // 2, (w - width) // 2
        return frame[top : top + height, left : left + width]
    height, width = size
    if (h, w) == (height, width):
        return frame
    box = (0, 0, w, h)
    if fit == "crop":  # the largest centered box with the aspect ratio of `size`
        box_width, box_height = min(w, h * width / height), min(h, w * height / width)
        box = ((w - box_width) / 2, (h - box_height) / 2, (w + box_width) / 2, (h + box_height) / 2)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _write_images(path: Path, clip: Clip) -> None:
    path.mkdir()
    for index, frame in enumerate(clip.frames):
        Image.fromarray(frame).save(path / f"{index:05d}.png")


def _write_video(path: Path, clip: Clip) -> None:
    codec, codec_options, audio_codec = ENCODERS[path.suffix]
    if missing := {codec, audio_codec} - av.codecs_available:
        raise InputError(f"this build of PyAV has no encoder {min(missing)} for {path.suffix}; use .mp4 or .gif")
    h, w = clip.frames.shape[1:3]
    rate = Fraction(clip.fps).limit_denominator(100_000)
    # The time scale of the file is a multiple of the frame rate, so that the duration is exact, and fine enough for
    # the audio.
    timescale = rate.numerator * -(-100_000 // rate.numerator)
    options = {"movflags": "+faststart", "movie_timescale": str(timescale)} if path.suffix == ".mp4" else {}
    with av.open(f"file:{path}", "w", options=options) as container:
        video: Any = container.add_stream(codec, rate=rate, options=codec_options)
        video.width, video.height = w + w % 2, h + h % 2  # 4:2:0 chroma needs even sides
        video.pix_fmt = "yuv420p"
        # Players guess the color space from the frame size if the file does not specify it.
        context = video.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        audio: Any = None
        if clip.audio:
            supported = clip.audio.rate in (av.Codec(audio_codec, "w").audio_rates or ())
            audio = container.add_stream(
                audio_codec, rate=clip.audio.rate if supported else 48000, layout=clip.audio.layout
            )
        for index, image in enumerate(clip.frames):
            padded = np.pad(image, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(video.encode(frame))
            # Muxing the audio of each frame with it interleaves the two streams and ends both together.
            if audio and clip.audio and (samples := _audio_frame(clip.audio, index / rate, (index + 1) / rate)):
                container.mux(audio.encode(samples))
        container.mux(video.encode())
        if audio:
            container.mux(audio.encode())


def _audio_frame(audio: Audio, begin: Fraction, end: Fraction) -> av.AudioFrame | None:
    """The samples from `begin` to `end` in seconds; None if there are none."""
    low = round(begin * audio.rate)
    samples = np.ascontiguousarray(audio.samples[:, low : round(end * audio.rate)], np.float32)
    if not samples.size:
        return None
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=audio.layout)
    frame.sample_rate, frame.pts, frame.time_base = audio.rate, low, Fraction(1, audio.rate)
    return frame


def _write_gif(path: Path, clip: Clip) -> None:
    # GIF delays are hundredths of a second, and players slow down delays below two. Times are rounded, not delays, and
    # frames closer than that are dropped, so that the total duration is right.
    total = max(2, round(100 * len(clip.frames) / clip.fps))
    kept, begins = [0], [0]
    for index in range(1, len(clip.frames)):
        begin = round(100 * index / clip.fps)
        if begins[-1] + 2 <= begin <= total - 2:
            kept.append(index)
            begins.append(begin)
    delays = [end - begin for begin, end in pairwise([*begins, total])]
    shown = 0  # how long the same image is shown: Pillow merges equal consecutive frames and adds their delays
    for i, delay in enumerate(delays if total > MAX_GIF_DELAY else ()):
        same = i > 0 and np.array_equal(clip.frames[kept[i]], clip.frames[kept[i - 1]])
        shown = delay + (shown if same else 0)
        if shown > MAX_GIF_DELAY:
            limit = MAX_GIF_DELAY // 100
            raise InputError(f"a frame is shown for more than {limit} s, too long for a GIF; write .mp4 instead")
    duration = [10 * delay for delay in delays] if len(kept) > 1 else total * 10  # Pillow takes no list for one frame
    path.write_bytes(iio.imwrite("<bytes>", clip.frames[kept], extension=".gif", duration=duration, loop=0))

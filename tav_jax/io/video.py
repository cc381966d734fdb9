"""Clips in and out: choose frames, crop or stretch, carry the sound, write MP4 and GIF. `sources.py` decodes.

Frames are uint8 `[F, H, W, 3]`, upright, in the order in which they are shown. A source is an even grid of slots, one
picture each; `start` and `stride` count slots.
"""

import errno
import os
import tempfile
import uuid
from collections.abc import Sequence
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
from PIL import Image, ImageDraw, ImageFont

from tav_jax.distributed import processes
from tav_jax.errors import InputError, MissingError, short_repr
from tav_jax.io.decoding import FASTEST, LARGEST, SLOWEST, Audio, File, Folder, check_sides, reason

SIDE = 4  # no Stable Diffusion's VAE divides a side by less; the model checks its own factor
MEMORY = 4 << 30  # bytes of chosen frames
LONGEST = 100_000  # chosen frames, however small
GIF_STILL = 65_535  # hundredths of a second that a GIF can show a picture
Fit = Literal["crop", "stretch"]

__all__ = ["Audio", "Clip", "load_video"]


@dataclass(frozen=True)
class Clip:
    """Chosen frames. `fps` is how fast they play at the source's own speed; `audio` covers just their seconds."""

    frames: UInt8[np.ndarray, "F H W 3"]
    fps: float
    audio: Audio | None = None

    def save(self, path: str | Path) -> Path:
        """Write an MP4 (H.264 and AAC, plays in a browser) or a GIF, by the name's suffix."""
        path = Path(path).expanduser()
        write = {".mp4": _write_mp4, ".gif": _write_gif}.get(path.suffix.lower())
        if write is None:
            raise InputError(f"{path.name!r} has the suffix {path.suffix!r}; clips are written as .mp4 or .gif")
        if os.path.isdir(path):
            raise InputError(f"{path} is a folder; give the name of a file to write")
        if not len(self.frames):
            raise InputError(f"the clip for {path} has 0 frames; give it 1 or more")
        check_sides(path, *self.frames.shape[1:3])
        if not SLOWEST <= self.fps <= FASTEST:
            raise InputError(f"fps is {self.fps!r}; clips are written at {float(SLOWEST)} to {FASTEST} frames a second")
        # Written beside its final place, so that a full disk or a kill leaves no half file under that name.
        scratch = path.with_name(f".{path.stem[:50]}.{uuid.uuid4().hex[:8]}{path.suffix.lower()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(scratch, self)
            os.replace(scratch, path)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            mend = "free some space there" if full else "choose a folder that may be written"
            raise InputError(f"{path} could not be written ({reason(error)}); {mend}") from error
        finally:
            with suppress(OSError):
                scratch.unlink(missing_ok=True)
        return path


@dataclass(frozen=True)
class Edit(Clip):
    """A sampled clip, with the fps and the sound of its source."""

    prompt: str = ""
    latents: Any = None  # [1, F, h, w, 4]
    trajectory: Any = None  # the latents after each step, [steps, 1, F, h, w, 4], where they were asked for

    def save(self, path: str | Path) -> Path:
        """Write an MP4 or a GIF, by the suffix. Of several processes the first one writes."""
        return super().save(path) if processes.is_primary() else Path(path)


def _fetched(url: str, folder: Path) -> Path:
    """A clip in a bucket, or a folder of pictures there, as one on this machine."""
    from etils import epath  # heavy, and needed only here

    try:
        source = epath.Path(url)
        target = folder / source.name
        if source.is_dir():
            target.mkdir()
            for file in source.iterdir():
                if not file.is_dir():
                    file.copy(target / file.name)
            return target
        if source.exists():
            source.copy(target)
            return target
    except Exception as error:  # each kind of bucket fails in its own ways: no client, no permission, no network
        raise MissingError(f"{url} cannot be read from here ({error}); `tav doctor` says what buckets need") from error
    raise MissingError(f"{url} does not exist; give a video file or a folder of pictures")


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
    `fps` overrides the source's rate, for a folder of pictures above all; a video at another speed loses its sound.
    Of a damaged file, what lies before the damage can be had by its number of `frames`. The path may be in a bucket.
    """
    _check_request(frames, size, start, stride, fit, fps)
    if "://" in str(path):
        with tempfile.TemporaryDirectory(prefix="tav_jax_clip_") as scratch:
            local = _fetched(str(path), Path(scratch))
            return load_video(local, frames=frames, size=size, start=start, stride=stride, fit=fit, fps=fps)
    if "\0" in str(path):
        raise InputError(f"the path {short_repr(str(path))} has a NUL in it; give a file's name")
    path = Path(path).expanduser()
    if not os.path.exists(path):
        raise MissingError(f"{path} does not exist; give a video file or a folder of pictures")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} may not be read; change its permissions or give another one")
    if not path.is_dir() and not path.is_file():
        raise InputError(f"{path} is a pipe or a device; give a video file or a folder of pictures")
    source = Folder(path, fps) if path.is_dir() else File(path, fps)
    if source.fps / stride < SLOWEST:
        raise InputError(
            f"{path} has {float(source.fps):.3g} frames a second, so that stride={stride} plays less than one in "
            f"{1 / SLOWEST} seconds; use stride={max(1, int(source.fps / SLOWEST))} or less, or give a higher fps"
        )
    chosen, have, wanted, first = [], 0, start, None
    with closing(source.shown()) as shown:
        for end, read in shown:
            have = max(have, end)
            if wanted >= end:
                continue
            picture = read()
            first = first or picture.shape
            if size is None and picture.shape != first:
                sizes = f"{first[0]}×{first[1]} and {picture.shape[0]}×{picture.shape[1]}"
                raise InputError(f"the frames of {path} differ in size ({sizes}); give size=(height, width)")
            picture = _fit(picture, size, fit)
            while wanted < end and len(chosen) != frames:
                chosen.append(picture)
                wanted += stride
                _check_memory(path, picture.nbytes * (frames or len(chosen)))
                if len(chosen) > LONGEST:
                    raise InputError(f"{path} has more than {LONGEST} frames to choose; say how many with frames=")
            if len(chosen) == frames:
                break
    if not chosen or (frames is not None and len(chosen) < frames):
        raise InputError(_too_short(path, have, source.damage, frames or 1, start, stride))
    if frames is None and source.damage:
        raise InputError(
            f"{path} is damaged after frame {have - 1} ({source.damage}); "
            f"give a whole file, or frames={len(chosen)} to take what comes before"
        )
    sound = source.audio(start / source.fps, (start + len(chosen) * stride) / source.fps)
    return Clip(np.stack(chosen), float(source.fps / stride), sound)


def _check_request(frames, size, start, stride, fit, fps) -> None:
    counts = (("frames", 1 if frames is None else frames, 1), ("start", start, 0), ("stride", stride, 1))
    for name, value, least in counts:
        if not _whole(value) or value < least:
            raise InputError(f"{name} is {short_repr(value)}; it must be a whole number, {least} or more")
    if size is not None and (not isinstance(size, tuple | list) or len(size) != 2):
        raise InputError(f"size is {short_repr(size)}; it must be (height, width)")
    for name, side in zip(("height", "width"), size or (), strict=False):
        if not _whole(side) or side > LARGEST:
            raise InputError(f"{name} is {short_repr(side)}; it must be a multiple of 8, at most {LARGEST}")
        if side < SIDE or side % SIDE:
            below = max(side, 0) // 8 * 8
            raise InputError(f"{name} {side} is not a multiple of 8; use {f'{below} or ' if below else ''}{below + 8}")
    if fit not in ("crop", "stretch"):
        raise InputError(f"fit is {short_repr(fit)}; it must be 'crop' or 'stretch'")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float | Fraction) or not 0 < fps < 1000):
        raise InputError(f"fps is {short_repr(fps)}; it must be above 0 and below 1000")


def _whole(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_memory(path: Path, needed: int) -> None:
    if needed > MEMORY:
        raise InputError(
            f"what is asked of {path} fills {needed / 2**30:.1f} GiB, more than {MEMORY / 2**30:.1f}; "
            "ask for fewer frames or a smaller size"
        )


def _too_short(path: Path, have: int, damage: str, frames: int, start: int, stride: int) -> str:
    """How many frames there are, and each single change that would do."""
    until = f" before it is damaged ({damage})" if damage else ""
    if have == 0:
        return f"{path} has no frame that can be decoded{until}; give a whole video"
    reach = (frames - 1) * stride
    mends = []
    if frames > 1 and (closer := (have - 1 - start) // (frames - 1)) >= 1:
        mends.append(f"stride={closer}")
    if start > 0 and reach < have:
        mends.append(f"start={have - 1 - reach}")
    if start < have:
        mends.append(f"frames={-(-(have - start) // stride)}")
    return (
        f"{path} has {have} frame{'s' * (have > 1)}{until}; frames={frames}, start={start} and stride={stride} need "
        f"{start + reach + 1}: use {' or '.join(mends) or f'start=0, stride=1 and frames={min(frames, have)}'}"
    )


def _fit(frame: np.ndarray, size: tuple[int, int] | None, fit: Fit) -> UInt8[np.ndarray, "H W 3"]:
    h, w, _ = frame.shape
    if size is None:
        if min(h, w) < 8:
            raise InputError(f"the frames are {h}×{w} pixels, less than 8 on a side; give size=(height, width)")
        height, width = h // 8 * 8, w // 8 * 8
        top, left = (h - height) // 2, (w - width) // 2
        return frame[top : top + height, left : left + width]
    height, width = size
    if (h, w) == (height, width):
        return frame
    box = (0, 0, w, h)
    if fit == "crop":  # the largest centred box of the wanted proportions
        across, down = min(w, h * width / height), min(h, w * height / width)
        box = ((w - across) / 2, (h - down) / 2, (w + across) / 2, (h + down) / 2)
    return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC, box=box))


# --------------------------------------------------------------------------------------------------------- writing

# With several threads the encoder was seen to write the same pictures in two ways, in processes that had and had not
# compiled something before.
ONE_THREAD = {"x264-params": "threads=1"}


def _write_mp4(path: Path, clip: Clip) -> None:
    h, w = clip.frames.shape[1:3]
    rate = Fraction(clip.fps).limit_denominator(100_000)
    # The file's own clock: a multiple of the rate, so that the clip lasts exactly as long as it should, and fine enough
    # for sound.
    clock = rate.numerator * -(-100_000 // rate.numerator)
    options = {"movflags": "+faststart", "movie_timescale": str(clock)}
    with av.open(f"file:{path}", "w", options=options) as container:
        options = {"crf": "16", "preset": "medium", **ONE_THREAD}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height = w + w % 2, h + h % 2  # H.264 with halved colours takes even sides only
        stream.pix_fmt = "yuv420p"
        # Said in the file, since players guess from the picture's size otherwise.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1  # BT.709
        sound = None
        if clip.audio:
            known = clip.audio.rate in (av.Codec("aac", "w").audio_rates or ())
            sound = container.add_stream("aac", rate=clip.audio.rate if known else 48000, layout=clip.audio.layout)
        for index, picture in enumerate(clip.frames):
            padded = np.pad(picture, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
            if sound and clip.audio and (piece := _piece(clip.audio, index / rate, (index + 1) / rate)):
                container.mux(sound.encode(piece))
        container.mux(stream.encode())
        if sound:
            container.mux(sound.encode())


def _piece(audio: Audio, begin: Fraction, end: Fraction) -> av.AudioFrame | None:
    """One picture's sound: muxed with it, both lie side by side in the file and end together."""
    low = round(begin * audio.rate)
    samples = np.ascontiguousarray(audio.samples[:, low : round(end * audio.rate)], np.float32)
    if not samples.size:
        return None
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=audio.layout)
    frame.sample_rate, frame.pts, frame.time_base = audio.rate, low, Fraction(1, audio.rate)
    return frame


def _write_gif(path: Path, clip: Clip) -> None:
    # GIF counts in hundredths of a second, and players slow down a frame of less than two: spread the rounding, and
    # leave out frames that come too fast, so that the whole clip lasts as long as it should.
    total = max(2, round(100 * len(clip.frames) / clip.fps))
    kept, begins = [0], [0]
    for index in range(1, len(clip.frames)):
        begin = round(100 * index / clip.fps)
        if begins[-1] + 2 <= begin <= total - 2:
            kept.append(index)
            begins.append(begin)
    if total > GIF_STILL:  # like pictures in a row become one that is shown as long as all of them
        still = 0
        for index, (begin, end) in enumerate(pairwise([*begins, total])):
            same = index and np.array_equal(clip.frames[kept[index]], clip.frames[kept[index - 1]])
            still = end - begin + (still if same else 0)
            if still > GIF_STILL:
                raise InputError(
                    f"a picture stands still for over {GIF_STILL // 100} s, too long for a GIF; write .mp4"
                )
    lasting = [10 * (end - begin) for begin, end in pairwise([*begins, total])]
    duration = lasting if len(kept) > 1 else total * 10  # Pillow wants no list for a single picture
    path.write_bytes(iio.imwrite("<bytes>", clip.frames[kept], extension=".gif", duration=duration, loop=0))


# ------------------------------------------------------------------------------------------------------ side by side

GAP = 8  # white pixels between the columns


def side_by_side(source: Clip, edits: Sequence[Edit], prompt: str) -> Clip:
    """The source and the edits next to each other, each under its prompt."""
    columns = [(prompt or "source", source.frames), *((e.prompt or "(empty prompt)", e.frames) for e in edits)]
    height, width = source.frames.shape[1:3]
    captions = [caption(text, width) for text, _ in columns]
    tallest = max(c.shape[0] for c in captions)
    step = width + GAP
    canvas = np.full((len(source.frames), tallest + height, step * len(columns) - GAP, 3), 255, np.uint8)
    for i, (words, (_, video)) in enumerate(zip(captions, columns, strict=True)):
        across = slice(i * step, i * step + width)
        canvas[:, : words.shape[0], across] = words
        canvas[:, tallest:, across] = video
    return Clip(canvas, source.fps, source.audio)


def caption(text: str, width: int, lines: int = 4) -> np.ndarray:
    """Text on white, wrapped to the width and cut after a few lines."""
    font = ImageFont.load_default(max(9, width // 20))
    words, rows = " ".join(text.split()).split(" "), [""]
    for word in words:
        longer = f"{rows[-1]} {word}".strip()
        if font.getlength(longer) <= width - 8 or not rows[-1]:
            rows[-1] = longer
        else:
            rows.append(word)
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1] + " …"]
    line = font.size + 4  # pyright: ignore[reportAttributeAccessIssue]
    picture = Image.new("RGB", (width, int(line * len(rows)) + 8), "white")
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(rows):
        draw.text((4, 4 + i * line), row, fill="black", font=font)
    return np.asarray(picture)

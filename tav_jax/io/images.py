"""Read images as clips: a directory of images, or one image file, which may be animated.

Frames are uint8 RGB `[H, W, 3]`, turned upright by the EXIF orientation, on white where the image is transparent.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from statistics import fmean, median

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from tav_jax.errors import InputError
from tav_jax.io.decoding import MIN_FPS, FrameIterator, check_frame_size, reason

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
# Checked against the content. Pillow supports more formats, and runs external programs for some of them.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
DIRECTORY_FPS = 8.0  # default for images, which have no frame rate
MIN_DURATION, SHORT_DURATION = 11, 100  # ms; browsers show frames of an animation below the first for the second


class ImageDirectory:
    """A directory of images, one per frame, in the order of the numbers in their names."""

    damage = note = ""

    def __init__(self, path: Path, fps: float | None):
        self.fps = Fraction(fps or DIRECTORY_FPS).limit_denominator(100_000)
        files = (file for file in path.iterdir() if is_image(file) and file.name[0] != ".")
        self.files = sorted((file for file in files if file.is_file()), key=_natural_order)
        if not self.files:
            raise InputError(f"{path} has no images; expected files such as 0001.png ({', '.join(IMAGE_SUFFIXES)})")
        self.length = len(self.files)

    def frames(self) -> FrameIterator:
        for index, file in enumerate(self.files):
            yield index + 1, partial(_read_image, file)

    def audio(self, begin: Fraction, end: Fraction) -> None:
        return None


class ImageFile:
    """An image file: one frame, or an animated WebP or PNG, resampled to the rate of most of its frames."""

    damage = note = ""

    def __init__(self, path: Path, fps: float | None):
        self.path, durations = path, []
        with _readable(path), _open(path) as image:
            count = getattr(image, "n_frames", 1) if image.format in ("WEBP", "PNG") else 1
            # A PNG may begin with an image that is not part of its animation.
            self.indices = range(1 if count > 1 and image.info.get("default_image") else 0, count)
            for index in self.indices:
                image.seek(index)
                image.load()  # sets the duration
                duration = image.info.get("duration", 0)
                durations.append(duration if duration >= MIN_DURATION else SHORT_DURATION)
        usual = fmean(duration for duration in durations if duration <= 1.5 * median(durations))
        native_fps = DIRECTORY_FPS if count == 1 else 1000 / usual
        self.native_fps = max(MIN_FPS, Fraction(native_fps).limit_denominator(100_000))
        self.fps = Fraction(fps).limit_denominator(100_000) if fps else self.native_fps
        self.ends = [1] if count == 1 else np.rint(np.cumsum(durations) * float(self.native_fps / 1000)).astype(int)
        self.length = int(self.ends[-1])

    def frames(self) -> FrameIterator:
        with _readable(self.path), _open(self.path) as image:
            for index, end in zip(self.indices, self.ends, strict=True):
                yield int(end), partial(self._read, image, index)

    def _read(self, image: Image.Image, index: int) -> UInt8[np.ndarray, "H W 3"]:
        with _readable(self.path):
            image.seek(index)
            return _to_rgb(self.path, image)

    def audio(self, begin: Fraction, end: Fraction) -> None:
        return None


def is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES


def _natural_order(file: Path) -> tuple:
    """A sort key that puts `2.png` before `10.png`: the name split into alternating text and numbers."""
    parts = re.split(r"(\d+)", file.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise many exception types for damaged files
        raise InputError(f"{file} is not a readable image ({reason(error)}); replace or remove it") from error


def _open(file: Path) -> Image.Image:
    image = Image.open(file, formats=IMAGE_FORMATS)
    check_frame_size(file, image.height, image.width)
    return image


def _read_image(file: Path) -> UInt8[np.ndarray, "H W 3"]:
    with _readable(file), _open(file) as image:
        return _to_rgb(file, image)


def _to_rgb(file: Path, image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):  # `convert` would clip these values to 0 … 255
        values, most = np.asarray(image), 1 if image.mode == "F" else 65535
        if image.mode == "I" or not 0 <= values.min() <= values.max() <= most:
            kind = "floating-point values" if image.mode == "F" else "integers of 32 bits"
            limit = "images of this type must be from 0 to 1" if image.mode == "F" else "at most 16 are supported"
            raise InputError(
                f"{file} has {kind}, from {values.min():g} to {values.max():g}, and {limit}; convert it to 8 bits"
            )
        return np.repeat(np.rint(values * (255 / most)).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))

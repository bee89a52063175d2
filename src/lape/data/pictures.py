"""The one door through which pictures come in: what is opened, and how its values become colours."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageMode, UnidentifiedImageError

from lape.errors import RunError
from lape.files import reading

MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels
# Whatever else Pillow opens is no picture of a set: PostScript, for one, is a program, which it hands to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LARGEST = 89_478_485  # pixels, from which on Pillow warns; a model's copies of one take some 20 bytes for each
# What brings a picture upright that its camera held otherwise, by EXIF's number for that.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LYING = (5, 6, 7, 8)  # those that exchange width and height


def is_hidden(path: Path) -> bool:
    """Whether a file, named from the folder that a person gave, is one that programs keep beside a person's own."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


@contextmanager
def open_picture(path: Path) -> Generator[Image.Image, None, None]:
    """Open a picture; raises RunError as `open_image`, and for one whose values do not say which of them is white."""
    with open_image(path) as image:
        if np.dtype(ImageMode.getmode(image.mode).typestr).itemsize > 1:
            raise RunError(
                f"{path} has grey values of more than 8 bits (mode {image.mode}), and nothing says which of them is "
                "white. Save it with 8 bits, from 0 for black to 255 for white."
            )
        yield image


@contextmanager
def open_image(path: Path) -> Generator[Image.Image, None, None]:
    """Open an image file, whatever its values mean.

    Raises RunError naming one that cannot be read, whether at once or when its pixels are, and one of too many pixels.
    """
    try:
        with reading.opened(path) as file, Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > LARGEST:
                raise RunError(
                    f"{path} has {image.width}×{image.height} pixels, and {LARGEST:,} are the most that are read of a "
                    "picture. Make it smaller."
                )
            yield image
    except UnidentifiedImageError as error:
        raise RunError(
            f"{path} cannot be read as an image (it is none of {', '.join(FORMATS)}). Replace or remove it."
        ) from error
    except Image.DecompressionBombError as error:
        raise RunError(
            f"{path} has more than twice the {LARGEST:,} pixels that are read of a picture. Make it smaller."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path} cannot be read as an image ({reason}). Replace or remove it.") from error


def orientation(image: Image.Image) -> int:
    """Return EXIF's number of how a camera was held for an open picture; 1, upright, where nothing says so.

    Pillow turns a TIFF by itself, in every reader.
    """
    if image.format == "TIFF":
        return 1
    try:
        number = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever a broken block of EXIF makes Pillow stumble over; viewers show such a picture as it is
        return 1
    return number if number in TURNS else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an open picture as people see it; its pixels are not read."""
    width, height = image.size
    return (height, width) if orientation(image) in LYING else (width, height)


def read_picture(path: Path) -> Image.Image:
    """Return a picture in colour as people see it, RGB; raises as `open_picture` does.

    Whoever looks at pictures, in training, validation or prediction, looks at what this returns.
    """
    with open_picture(path) as image:
        return upright(image)


def upright(image: Image.Image) -> Image.Image:
    """Return an open picture in colour as people see it: turned as EXIF says."""
    turn = TURNS.get(orientation(image))
    picture = image.convert("RGB")
    return picture if turn is None else picture.transpose(turn)


def read_through(image: Image.Image) -> None:
    """Read all of the file of an open picture, and no more of its pixels than that takes."""
    image.draft(None, (1, 1))  # an eighth of a JPEG's side takes a fraction of the time
    image.load()

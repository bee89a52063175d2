"""The one door through which pictures come in: what is opened, and how its pixels become colours."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from lape import reading
from lape.errors import RunError

MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels
# Whatever else Pillow opens is no picture of a set: PostScript, for one, is a program, which it hands to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


@contextmanager
def open_picture(path: Path) -> Generator[Image.Image, None, None]:
    """Open an image file; raises RunError naming one that cannot be read, whether at once or when its pixels are."""
    try:
        with reading.opened(path) as file, Image.open(file, formats=FORMATS) as image:
            yield image
    except UnidentifiedImageError as error:
        raise RunError(
            f"{path} cannot be read as an image (it is none of {', '.join(FORMATS)}). Replace or remove it."
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RunError(f"{path} cannot be read as an image ({error}). Replace or remove it.") from error

"""Sizes of images as people type them: 224, or 28x56. Imports no torch: the command line reads them first."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from lape.errors import UsageError

_TYPED = re.compile(r"([1-9][0-9]{0,3})(?:x([1-9][0-9]{0,3}))?")


class Size(NamedTuple):
    """Height and width of an image, in pixels."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def sizes_of(typed: Sequence[str]) -> tuple[Size, ...]:
    """Read `--sizes`: 28 is a square, 28x56 is 28 high and 56 wide.

    Raises UsageError for what is no size, for a size that is listed twice, and for none at all.
    """
    sizes: list[Size] = []
    for word in typed:
        match = _TYPED.fullmatch(word)
        if match is None:
            raise UsageError(
                f"sizes lists sizes of images in pixels, each a side from 1 to 9999 or HEIGHTxWIDTH; {word!r} was "
                "received. Use for instance --sizes 28,42,28x56."
            )
        size = Size(int(match[1]), int(match[2] or match[1]))
        if size in sizes:
            raise UsageError(f"sizes lists each size once; {size} is there twice. Leave one out.")
        sizes.append(size)
    if not sizes:
        raise UsageError("sizes lists at least one size of images; nothing was received. Use for instance --sizes 28.")
    return tuple(sizes)

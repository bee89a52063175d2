"""Every file that is read is opened here: regular files alone, and of a text no more than a bound. Imports no torch.

A pipe would be waited for without end, and a device read without end; either may stand behind a link.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from lape.errors import RunError

# Bytes of the largest text of its kind.
SETTINGS = 1 << 20  # what a person writes: recipes, configurations, names of classes
RECORD = 1 << 26  # what the program writes: results, analyses, costs
ANNOTATIONS = 1 << 31  # COCO's own have half a gigabyte

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def opened(path: Path) -> BinaryIO:
    """Open a regular file for reading; raises RunError, naming it, for anything else, also behind a link.

    Raises OSError where there is none, or it may not be read.
    """

    def regular(name: str, flags: int) -> int:
        try:
            # A pipe that nobody writes to is opened at once so, and not waited for.
            descriptor = os.open(name, flags | getattr(os, "O_NONBLOCK", 0))
        except OSError:
            _refuse(path, os.stat(name).st_mode)  # a socket cannot be opened
            raise
        try:
            _refuse(path, os.fstat(descriptor).st_mode)  # of what was opened, whatever the path names by now
        except RunError:
            os.close(descriptor)
            raise
        return descriptor

    return open(path, "rb", opener=regular)


def _refuse(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise RunError(f"{path} is {kind}, and only regular files are read. Name a file, or put one in its place.")


def content(path: Path, most: int) -> bytes:
    """Return what a file holds; raises as `opened` does, and RunError, naming it, for more than `most` bytes."""
    with opened(path) as file:
        length = os.fstat(file.fileno()).st_size
        if length <= most:
            return file.read(length)
    size = f"{most >> 20} MB" if most < 1 << 30 else f"{most >> 30} GB"
    raise RunError(f"{path} is larger than {size}, more than a file of its kind has. Name another file.")


def text(path: Path, most: int) -> str:
    """Return a text in UTF-8 as `content` does; raises ValueError where it is none."""
    return content(path, most).decode("utf-8-sig")


def values(path: Path, most: int) -> Any:
    """Return the values of a JSON file as `content` does; raises ValueError where it is none, or too deep to read."""
    try:
        return json.loads(content(path, most))
    except RecursionError as error:
        raise ValueError("its parts lie too deep within each other") from error

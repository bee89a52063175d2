"""Every file that is written, removed or replaced is so here: whole or not there, through no link, over no one else's.

Imports no torch.
"""

import json
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import IO, Any

from lape.errors import RunError, UsageError
from lape.files import reading

# It stands in every file outside of a run's folder, and says that the file may be replaced.
MARK = "written-by-lape"
COMMENT = f"\n<!-- {MARK}; without this line the file is not replaced -->\n"  # the mark in Markdown

_PART = re.compile(r"\.lape-[0-9a-f]{8}-(.+)\.part", re.DOTALL)


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Replace `path` by what `fill` writes, at once: whoever reads sees the old file or the new, whole.

    A link of that name is replaced, and what it points to stays. Raises RunError where the disk refuses; the old file
    then stays.
    """
    part = _part_of(path)
    try:
        file = part.open("xb")  # it is made now, so it is no one else's, and no link
        try:
            with file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            with suppress(OSError):
                part.unlink()
    except (OSError, RuntimeError) as error:  # torch's writer turns an OSError into a RuntimeError or follows it
        cause = next((e for e in (error, error.__context__) if isinstance(e, OSError)), error)
        kept = "the one before it is whole" if path.exists() else "nothing was written"
        raise RunError(
            f"{path} could not be written ({getattr(cause, 'strerror', None) or cause}); {kept}. "
            "Make room or name another folder; a run goes on with --resume."
        ) from error


def _part_of(path: Path) -> Path:
    return path.with_name(f".lape-{token_hex(4)}-{path.name}.part")


def create(path: Path, content: bytes) -> bool:
    """Make a file that is not there yet, whole at once; returns whether this call made it.

    Of several that try, one succeeds, also on other machines that share the folder. Raises FileNotFoundError where
    there is no folder, RunError where the disk refuses.
    """
    part = _part_of(path)
    try:
        with part.open("xb") as file:
            file.write(content)
        try:
            os.link(part, path)
        except FileExistsError:
            return part.stat().st_nlink > 1  # a network that asked twice is told no, after a yes
        except OSError:  # a file system without links: then it is there for a moment before it is whole
            with path.open("xb") as file:
                file.write(content)
        return True
    except FileExistsError:
        return False
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(
            f"{path} could not be written ({error.strerror or error}). Make room or name another folder."
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once; of a name that is not UTF-8 the bytes are written out, as JSON writes them."""
    write(path, lambda file: file.write(_encoded(text)))


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file at once."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_marked(contents: Mapping[Path, str | bytes]) -> None:
    """Write files that bear the mark, and make their folders; raises as `refuse_others` does before any is written."""
    refuse_others(contents)
    for path, content in contents.items():
        data = _encoded(content) if isinstance(content, str) else content
        assert MARK.encode() in data, f"{path} would not be known again: it lacks {MARK}"
        make_folder(path.parent)
        write(path, lambda file, data=data: file.write(data))


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


def refuse_others(paths: Iterable[Path]) -> None:
    """Raise UsageError for a path where something is that does not bear the mark; an empty file may go."""
    for path in paths:
        if not _is_free(path):
            raise UsageError(
                f"{path} is there and was not written by lape, as far as it tells ({MARK} does not stand in it), so it "
                "is not replaced. Move it away, or name another place (--out)."
            )


def _is_free(path: Path) -> bool:
    try:
        there = path.lstat()
    except OSError:  # nothing is there, or writing will say why not
        return True
    if not stat.S_ISREG(there.st_mode):  # a link, a folder, a pipe
        return False
    if not there.st_size:  # nothing that could be lost, and nothing that could be mapped
        return True
    try:
        with reading.opened(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(MARK.encode()) >= 0
    except (OSError, RunError):
        return False


def make_folder(folder: Path, below: Path | None = None) -> None:
    """Make a folder, and those that it is in, where they are not there; raises as `refuse_links` does under `below`."""
    if below is not None:
        refuse_links(below, folder)
    folder.mkdir(parents=True, exist_ok=True)


def refuse_links(folder: Path, inner: Path) -> None:
    """Raise UsageError where a folder from `inner` up to `folder`, itself left out, is a link.

    Whoever names a folder may have made it a link; what is written below it stays below.
    """
    for path in (inner, *inner.parents):
        if path == folder:
            return
        if path.is_symlink():
            raise UsageError(
                f"{path} is a link, and what is written below {folder} stays there. Remove the link, or give another "
                "--out."
            )


def unfinished(folder: Path) -> dict[Path, str]:
    """Return what `write` has begun in a folder and not ended, by the names that the files were to have.

    Where nobody writes there now, they are of processes that were killed.
    """
    names = ((path, _PART.fullmatch(path.name)) for path in folder.iterdir())
    return {path: match[1] for path, match in names if match}


def remove(paths: Iterable[Path]) -> None:
    """Remove files; links and folders among them stay."""
    for path in paths:
        if stat.S_ISREG(path.lstat().st_mode):
            path.unlink()


def remove_empty(folder: Path) -> None:
    """Remove a folder in which nothing is; another one stays."""
    with suppress(OSError):
        folder.rmdir()

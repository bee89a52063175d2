"""What is in a set, so that a run which goes on, or stands beside another, can see that it is the same."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lape.files.characters import plural

PARTS = ("train", "validation")
PLACES = ("name", "folder", "root", "turned")  # fields of a split that say where it is, and how it is called and seen


def contents(source: Any) -> dict[str, Any]:
    """Say in plain values what is in a set: its classes, and of each part the number of pictures and a digest.

    The digest is of names and sizes of files, of annotations, and of whole pictures where they are held in memory; it
    stays the same where a set is moved. A file that is not there any more has no size.
    """
    parts = {part: getattr(source, part) for part in PARTS}
    counted = {part: {"pictures": len(split), "digest": _digest(split)} for part, split in parts.items()}
    return {"classes": list(source.classes), **counted}


def _digest(split: Any) -> str:
    digest = blake2b(digest_size=16)
    folder = getattr(split, "folder", None)
    for field in fields(split):
        if field.name not in PLACES:
            value = getattr(split, field.name) if field.compare else ()  # remarks may change where pictures do not
            _add(digest, field.name, value, folder)
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any, folder: Path | None) -> None:
    """Add one field of a split."""
    if isinstance(value, Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
    elif isinstance(value, Sequence) and value and isinstance(value[0], str | Path):
        paths = [os.path.join(folder, each) if folder else os.fspath(each) for each in value]  # there may be a million
        above = len(os.path.commonpath({os.path.dirname(path) for path in paths}))
        text = "".join(f"{name} {path[above:]} {_size(path)}\n" for path in paths)
        digest.update(text.encode(errors="surrogateescape"))
    else:
        parts = value if isinstance(value, list | tuple) else [value]
        digest.update(f"{name} {[getattr(part, 'size', part) for part in parts]}\n".encode())


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def differences(stored: Any, here: Mapping[str, Any]) -> list[str]:
    """Say in what a set is not what a file tells of one; nothing where the file tells of none."""
    if stored is None or stored == here:
        return []
    then = stored if isinstance(stored, Mapping) else {}
    if then.get("classes") != here["classes"]:
        return [f"its classes are {_named(here['classes'])} now, and were {_named(then.get('classes'))}"]
    changed = []
    for part in PARTS:
        before, now = then.get(part), here[part]
        if before == now:
            continue
        count = before.get("pictures") if isinstance(before, Mapping) else None
        kind = f"{'training' if part == 'train' else part} picture"
        if count != now["pictures"]:
            changed.append(f"it has {plural(now['pictures'], kind)} now, and had {count}")
        else:
            changed.append(f"its {kind}s have other names, sizes or labels")
    return changed or ["it is another one"]


def _named(classes: Any) -> str:
    names = list(map(str, classes)) if isinstance(classes, list | tuple) else ["unknown"]
    return ", ".join(names[:10]) + (" ..." if len(names) > 10 else "")

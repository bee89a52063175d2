"""What is known of the models of the paper and of their small relatives, without making them. Imports no torch.

The numbers are kept in catalogue.json, which `python docs/catalogue.py` writes and a test recounts.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lape.errors import UsageError
from lape.files import reading

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Entry:
    """One model as its authors made it."""

    name: str
    paper: str | None  # its name in the paper's tables
    parameters: int | None  # None where a package that it is made with is not installed
    flops: int | None  # of one image's forward, an addition and a multiplication counted as two; None in a detector
    size: tuple[int, int]
    joins: tuple[str, ...]  # that mean something with its own position embedding


def kept() -> list[Entry]:
    """Return what is kept of all models."""

    def of(size: list[int], joins: list[str], **facts: Any) -> Entry:
        return Entry(**facts, size=(size[0], size[1]), joins=tuple(joins))

    return [of(**entry) for entry in reading.values(FILE, reading.RECORD)]


def named(patterns: Sequence[str]) -> list[Entry]:
    """Return the models whose name fits one of the patterns, or all; UsageError where there is none."""
    entries = kept()
    chosen = [one for one in entries if not patterns or any(fnmatch(one.name, f"*{part}*") for part in patterns)]
    if not chosen:
        raise UsageError(f"No model's name has {' or '.join(patterns)} in it. `lape models` lists all {len(entries)}.")
    return chosen


def as_json(entries: Iterable[Entry]) -> str:
    """Return what is to be kept, a model a line."""
    return "[\n" + ",\n".join(json.dumps(dataclasses.asdict(entry)) for entry in entries) + "\n]\n"

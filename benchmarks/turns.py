"""How contenders take turns, and how what was measured is filed."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import track

from lape.training.provenance import provenance


def seconds(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Time every work in each of some rounds, after one that warms up."""

    def timed(work: Callable[[], object]) -> float:
        start = perf_counter()
        work()
        return perf_counter() - start

    return in_turns({name: lambda work=work: timed(work) for name, work in works.items()}, rounds)


def in_turns(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Ask every measure for a number in each of some rounds, after one that warms up."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    for turn in track(range(rounds + 1), "measuring", console=Console(stderr=True)):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]  # nobody is always after the same neighbour
            number = measures[name]()
            if turn:
                found[name].append(number)
    return found


def file(out: Path | None, rows: Sequence[Sequence[str]], said: str, words: int = 1, **content: Any) -> None:
    """Print a table, whose first row is its heading, and write it and what it was made from into a folder.

    The first columns, `words` of them, hold words, and the others numbers.
    """
    record = provenance()
    heading, *lines = [f"| {' | '.join(row)} |" for row in rows]
    rule = f"|{' --- |' * words}{' ---: |' * (len(rows[0]) - words)}"
    told = f"{said} `{record['command']}` at commit {record['commit']}, {record['machine']}"
    text = "\n".join([heading, rule, *lines, "", told.strip()]) + "\n"
    print(text, end="")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(text)
        (out / "table.json").write_text(json.dumps({"provenance": record, **content}, indent=1) + "\n")

"""The cost of joins as tables: for the terminal, as Markdown, and as JSON with every single time."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from lape import __version__, reading, writing
from lape.analysis.cost import Cost, ratio
from lape.characters import as_code, in_markdown
from lape.errors import RunError
from lape.report.words import as_markdown, duration
from lape.studies.paper import COSTS
from lape.training.provenance import provenance

if TYPE_CHECKING:
    from rich.console import Group

HEADINGS = ("", "parameters", "GFLOPs", "memory", "training", "beside", "inference", "beside")


def cells(costs: Sequence[Cost]) -> list[tuple[str, ...]]:
    """Return one line a contender; `beside` is the median of its ratios to the first one's times, round by round."""
    base = costs[0]
    return [
        (
            cost.name,
            f"{cost.parameters:,}",
            f"{cost.flops / 1e9:.3f}",
            f"{cost.training_bytes / 2**20:,.1f} MiB" if cost.training_bytes else "–",
            duration(median(cost.training)) if cost.training else "–",
            _beside(cost.training, base.training, cost is base),
            duration(median(cost.inference)),
            _beside(cost.inference, base.inference, cost is base),
        )
        for cost in costs
    ]


def _beside(times: Sequence[float], base: Sequence[float], itself: bool) -> str:
    if itself or not times:
        return "1" if times else "–"
    return str(ratio(times, base))


def explanation(model: str, batch_size: int, rounds: int, precision: str = "32-true", compile: bool = False) -> str:
    """Say what the numbers are, and how to read the noise."""
    how = f"{precision}, {'compiled' if compile else 'not compiled'}"
    return (
        f"{model}, {batch_size} images a step, {how}, {rounds} rounds in which all contenders take turns. GFLOPs: of "
        "one image, an addition and a multiplication counted as two. memory: at the peak of a training step, with "
        "AdamW. beside: the time over that of the untouched model in the same round, the median over rounds, ± half "
        "the width of their middle half; the second line is the same model timed again, so what differs there is noise."
    ) + _paper(model)


def _paper(model: str) -> str:
    """Say what the paper has of a model in Tables 5 and 6."""
    if model not in COSTS:
        return ""
    parameters, memory, seconds = COSTS[model]
    return (
        f" The paper, on V100: {parameters[0]} and {parameters[1]} million parameters (default and lape), "
        f"{memory[1] / memory[0]:.4f} of the memory, {seconds[1] / seconds[0]:.4f} of the time of an epoch."
    )


def terminal(costs: Sequence[Cost], said: str) -> "Group":
    """Return the table and its explanation for rich."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = [heading for heading in HEADINGS if heading != "GFLOPs"]  # 80 columns have no room for it
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for place, heading in enumerate(shown):
        table.add_column(heading, justify="right" if place else "left", vertical="bottom", no_wrap=not place)
    for line in cells(costs):
        table.add_row(*(Text(cell) for cell, heading in zip(line, HEADINGS, strict=True) if heading != "GFLOPs"))
    flops = ", ".join(f"{cost.flops / 1e9:.3f} ({cost.name})" for cost in costs)
    same = len({cost.flops for cost in costs}) == 1
    counted = f"GFLOPs: {costs[0].flops / 1e9:.3f} for each of them." if same else f"GFLOPs: {flops}."
    return Group(table, Text(), Text(f"{counted} {said}"))


def markdown(costs: Sequence[Cost], said: str) -> str:
    """Return table and explanation as Markdown."""
    found = provenance()
    table = as_markdown(HEADINGS, cells(costs))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    signed = f"{as_code(found['command'])} at commit {found['commit']}, {found['machine']}, {versions}"
    return f"{table}\n\n{in_markdown(said)}\n\n{signed}\n{writing.COMMENT}"


def as_json(costs: Sequence[Cost], said: str) -> str:
    """Return every time of every round, and what they were measured with."""
    content = {
        writing.MARK: __version__,
        "explanation": said,
        **provenance(),
        "costs": [asdict(cost) for cost in costs],
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Filed:
    """A cost that `lape cost --out` has filed."""

    path: Path
    explanation: str
    costs: Sequence[Cost]


def filed(path: Path) -> Filed:
    """Read what `as_json` wrote; raises RunError for a file that is something else."""
    try:
        content = reading.values(path, reading.RECORD)
        found = Filed(path, str(content["explanation"]), [Cost(**cost) for cost in content["costs"]])
        cells(found.costs)
    except (OSError, ValueError, KeyError, TypeError, IndexError, ArithmeticError) as error:
        raise RunError(
            f"{path} is no cost of lape cost's ({type(error).__name__}: {error}). Measure it again."
        ) from None
    return found

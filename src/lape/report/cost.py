"""The cost of joins as tables: for the terminal, as Markdown, and as JSON with every single time."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from lape import __version__
from lape.analysis.cost import Cost, ratio
from lape.errors import RunError
from lape.files import reading, writing
from lape.files.characters import as_code, in_markdown, plural
from lape.report.table import Table
from lape.report.words import duration
from lape.studies.paper import COSTS
from lape.training.provenance import provenance

if TYPE_CHECKING:
    from rich.console import Group

HEADINGS = ("", "parameters", "GFLOPs", "memory", "training", "beside", "inference", "beside")


def table(costs: Sequence[Cost]) -> Table:
    """Return one row for each model; `beside` is the median of its ratios to the first one's times, round by round."""
    base = costs[0]
    rows = [
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
    return Table(HEADINGS, rows)


def _beside(times: Sequence[float], base: Sequence[float], itself: bool) -> str:
    if itself or not times:
        return "1" if times else "–"
    return str(ratio(times, base))


def explanation(model: str, batch_size: int, rounds: int, precision: str = "32-true", compile: bool = False) -> str:
    """Say what the numbers are, and how to read the noise."""
    how = f"{precision}, {'compiled' if compile else 'not compiled'}"
    return (
        f"{model}, {plural(batch_size, 'image')} per step, {how}, {rounds} rounds in which all models take turns. "
        "GFLOPs: of one image, an addition and a multiplication counted as two. memory: at the peak of a training step "
        "with AdamW. beside: the time over that of the untouched model in the same round, the median over rounds, ± "
        "half the width of their middle half; the second line is the same model timed again, so what differs there is "
        "noise."
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


def terminal(costs: Sequence[Cost], legend: str) -> "Group":
    """Return the table and its explanation for rich."""
    from rich.console import Group
    from rich.text import Text

    flops = ", ".join(f"{cost.flops / 1e9:.3f} ({cost.name})" for cost in costs)
    same = len({cost.flops for cost in costs}) == 1
    counted = f"GFLOPs: {costs[0].flops / 1e9:.3f} for each of them." if same else f"GFLOPs: {flops}."
    # 80 columns have no room for them in the table.
    return Group(table(costs).without("GFLOPs").terminal(), Text(), Text(f"{counted} {legend}"))


def markdown(costs: Sequence[Cost], legend: str) -> str:
    """Return table and explanation as Markdown."""
    origin = provenance()
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    signature = f"{as_code(origin['command'])} at commit {origin['commit']}, {origin['machine']}, {versions}"
    return f"{table(costs).markdown()}\n\n{in_markdown(legend)}\n\n{signature}\n{writing.COMMENT}"


def as_json(costs: Sequence[Cost], legend: str) -> str:
    """Return every time of every round, and what they were measured with."""
    content = {
        writing.MARK: __version__,
        "explanation": legend,
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
        measured = Filed(path, str(content["explanation"]), [Cost(**cost) for cost in content["costs"]])
        table(measured.costs)
    except (OSError, ValueError, KeyError, TypeError, IndexError, ArithmeticError) as error:
        raise RunError(
            f"{path} is no cost of lape cost's ({type(error).__name__}: {error}). Measure it again."
        ) from None
    return measured

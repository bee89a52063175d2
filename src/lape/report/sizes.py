"""One checkpoint measured at several sizes of images: for the terminal, and with full precision as CSV and JSON."""

import json
import math
from typing import TYPE_CHECKING, Any

from lape import __version__
from lape.data.sources import SPLITS
from lape.files import writing
from lape.files.characters import plural
from lape.report.table import Table
from lape.tasks.measures import TITLES
from lape.training.evaluation import AtSize, SizesEvaluation
from lape.training.provenance import provenance

if TYPE_CHECKING:
    from rich.console import Group

NOT_TAKEN = "not taken"  # in the place of a measure


def table(evaluation: SizesEvaluation) -> Table:
    """Return one row for each size, in the order in which they were asked for."""
    titles = dict.fromkeys(name for one in evaluation.results for name in one.metrics if name in TITLES)
    headings = [f"{TITLES[name]}, %" for name in titles] or ["measure, %"]
    rows = [
        [f"{one.size}{' (trained)' if one.size == evaluation.trained else ''}", *_cells(one, list(titles))]
        for one in evaluation.results
    ]
    return Table(["size", *headings], rows)


def _cells(one: AtSize, names: list[str]) -> list[str]:
    if one.refusal is not None:
        return [NOT_TAKEN, *["–"] * (len(names) - 1)]
    return [f"{one.metrics[name]:.2f}" for name in names]


def terminal(evaluation: SizesEvaluation) -> "Group":
    """Return what was measured, the table, and why sizes are missing, for rich."""
    from rich.console import Group
    from rich.text import Text

    images = plural(evaluation.images, f"{SPLITS[evaluation.split]} image")
    about = f"{images} of {evaluation.data}, {evaluation.checkpoint}, trained at {evaluation.trained}"
    refusals = [f"{one.size} is not taken. {one.refusal}" for one in evaluation.results if one.refusal is not None]
    return Group(Text(about), Text(), table(evaluation).terminal(), *map(Text, ["", *refusals] if refusals else []))


def _record(one: AtSize, names: list[str]) -> dict[str, Any]:
    finite = {name: value for name, value in one.metrics.items() if math.isfinite(value)}
    numbers = {name: finite.get(name) for name in names}
    return {"size": str(one.size), **one.size._asdict(), **numbers, "refusal": one.refusal}


def _records(evaluation: SizesEvaluation) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for one in evaluation.results for name in one.metrics))
    return [_record(one, names) for one in evaluation.results]


def as_csv(evaluation: SizesEvaluation) -> str:
    """Return one line for each size, numbers unrounded, empty where there is none."""
    records = [record | {writing.MARK: __version__} for record in _records(evaluation)]
    return Table(list(records[0]), [list(record.values()) for record in records]).csv()


def as_json(evaluation: SizesEvaluation) -> str:
    """Return every measure at every size, with what they were measured on and with."""
    content = {
        writing.MARK: __version__,
        "checkpoint": str(evaluation.checkpoint),
        "data": evaluation.data,
        "split": evaluation.split,
        "images": evaluation.images,
        "trained": str(evaluation.trained),
        "sizes": _records(evaluation),
        **provenance(),
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

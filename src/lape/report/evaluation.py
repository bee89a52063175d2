"""One checkpoint judged on the images of a split: for the terminal, as tables and pictures, and every single answer."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lape import __version__
from lape.data.pictures import MODES
from lape.files import writing
from lape.files.characters import plural
from lape.report import plots
from lape.report.table import Table
from lape.tasks.answers import NamedClasses
from lape.tasks.measures import TITLES
from lape.training.by_class import ByClass, by_class, confused, worst
from lape.training.evaluation import Evaluation
from lape.training.provenance import provenance

if TYPE_CHECKING:
    from rich.console import Group

SHOWN = 20  # classes, where there are many
MISTAKES = 24  # on the sheet
ALWAYS = "evaluation.json"
OF_CLASSES = ("classes.csv", "confusion.csv", "confusion.png", "mistakes.png", "predictions.csv", "predictions.json")


def places(folder: Path) -> list[Path]:
    """Return all that `write` may replace in a folder."""
    return [folder / name for name in (ALWAYS, *OF_CLASSES)]


def line(evaluation: Evaluation) -> str:
    """Say what was measured on what."""
    scores = [f"{TITLES[name]} {value:.2f} %" for name, value in evaluation.metrics.items() if name in TITLES]
    where = f"{evaluation.images_in_words} of {evaluation.data} ({evaluation.checkpoint})"
    return f"{', '.join(scores)} on {where}"


def terminal(evaluation: Evaluation) -> "Group":
    """Return what the classes of a classifier come to, for rich; of other models nothing."""
    from rich.console import Group
    from rich.text import Text

    if evaluation.answers is None:
        return Group()
    measured = by_class(evaluation.answers, evaluation.source.classes)
    parts: list[Any] = [*map(Text, _summary(measured)), Text()]
    if len(measured.classes) > SHOWN:
        parts.append(Text(f"The {SHOWN} of {len(measured.classes)} classes with the lowest F1:"))
    parts.append(_table(measured, _worst_classes(measured)).terminal())
    if pairs := confused(measured)[:3]:
        named = "; ".join(f"{true} named {other}, {plural(count, 'time')}" for true, other, count in pairs)
        parts += [Text(), Text(f"Most often confused: {named}.")]
    return Group(*parts)


def _summary(measured: ByClass) -> list[str]:
    top = f"top-{measured.among} accuracy {measured.top:.2f} %, " if len(measured.classes) > measured.among else ""
    return [
        f"{top}mean recall of classes {measured.balanced:.2f} %, mean F1 {measured.f1:.2f} %",
        f"always naming {_largest(measured.largest)}: {measured.of_largest:.2f} %",
    ]


def _largest(names: Sequence[str]) -> str:
    return f"the largest class ({names[0]})" if len(names) == 1 else f"one of {len(names)} classes of equal size"


def _worst_classes(measured: ByClass) -> list[int]:
    """Return the places of all classes in their order, or of those with the lowest F1 where they are many."""
    order = range(len(measured.classes))
    if len(order) <= SHOWN:
        return list(order)
    return sorted(order, key=lambda at: math.inf if (f1 := measured.classes[at].f1) is None else f1)[:SHOWN]


def _table(measured: ByClass, shown: list[int]) -> Table:
    rows = [
        [one.name, one.images, *map(_percent, (one.precision, one.recall, one.f1))]
        for one in (measured.classes[at] for at in shown)
    ]
    return Table(["class", "images", "precision", "recall", "F1"], rows)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1f}"


def write(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write evaluation.json, and for a classifier tables, pictures and every answer, into a folder; return the paths.

    Raises UsageError where another's file is in the way, RunError where the disk refuses.
    """
    answers = evaluation.answers
    measured = None if answers is None else by_class(answers, evaluation.source.classes)
    contents: dict[str, str | bytes] = {ALWAYS: _as_json(evaluation, measured)}
    if answers is not None and measured is not None:
        names = evaluation.source.classes
        records = [_record(evaluation, answers, at) for at in range(len(answers.labels))]
        contents |= {
            "classes.csv": _classes(measured),
            "confusion.csv": _confusion(measured),
            "confusion.png": plots.png(plots.confusion(measured.confusion, names)),
            "mistakes.png": plots.png(plots.contact_sheet(*_mistakes(evaluation, answers)), dots_per_inch=150),
            "predictions.csv": _predictions(records),
            "predictions.json": _dumped({"predictions": records}),
        }
    writing.write_marked({folder / name: content for name, content in contents.items()})
    return [folder / name for name in contents]


def _classes(measured: ByClass) -> str:
    headings = ["class", "images", "named", "precision", "recall", "f1", writing.MARK]
    return Table(headings, [[*asdict(one).values(), __version__] for one in measured.classes]).csv()


def _confusion(measured: ByClass) -> str:
    """Return a row for each true class, a column for each that was named; the mark stands in the corner."""
    names = [one.name for one in measured.classes]
    rows = [[name, *row] for name, row in zip(names, measured.confusion.tolist(), strict=True)]
    return Table([f"true class ({writing.MARK})", *names], rows).csv()


def _record(evaluation: Evaluation, answers: NamedClasses, at: int) -> dict[str, Any]:
    names = evaluation.source.classes
    likely = answers.answer(at)
    label = int(answers.labels[at])
    return {
        "picture": evaluation.source.validation.title(at),
        "true_class": names[label],
        "right": label == int(likely.labels[0]),
        "probability_of_true_class": _finite(float(answers.of_truth[at])),
        "answers": likely.records(names),
    }


def _predictions(records: list[dict[str, Any]]) -> str:
    """Return a row for each image: what it is, what it was named, and the other likely classes by their rank."""
    rows = []
    for record in records:
        row = {name: value for name, value in record.items() if name != "answers"}
        for rank, answer in enumerate(record["answers"], start=1):
            row |= {name if rank == 1 else f"{name}_{rank}": value for name, value in answer.items()}
        rows.append(row | {writing.MARK: __version__})
    return Table(list(rows[0]), [list(row.values()) for row in rows]).csv()


def _mistakes(evaluation: Evaluation, answers: NamedClasses) -> tuple[str, list[plots.Tile]]:
    """Return the title of the contact sheet, and the worst mistakes for it."""
    split, names, wrong = evaluation.source.validation, evaluation.source.classes, worst(answers)
    shown = wrong[:MISTAKES]
    some = f"{len(wrong)} of {evaluation.images_in_words} named wrongly"
    if not wrong:
        return f"None of {evaluation.images_in_words} named wrongly", []
    title = some if shown == wrong else f"{some}; the {len(shown)} with the least probable true class"
    mode = MODES[3]
    tiles = []
    for at in shown:
        true, named = names[int(answers.labels[at])], names[int(answers.likeliest[at, 0])]
        said = f"named {named} ({float(answers.probabilities[at, 0]):.0%})"
        is_truly = f"is {true} ({float(answers.of_truth[at]):.0%})"
        picture = split.picture(at, evaluation.source.channels).convert(mode)
        tiles.append(plots.Tile(picture, (Path(split.title(at)).name, is_truly, said)))
    return title, tiles


def _as_json(evaluation: Evaluation, measured: ByClass | None) -> str:
    content: dict[str, Any] = {
        "checkpoint": str(evaluation.checkpoint),
        "data": evaluation.data,
        "split": evaluation.split,
        "images": evaluation.images,
        "metrics": {name: _finite(value) for name, value in evaluation.metrics.items()},
    }
    if measured is not None:
        content |= {
            f"top{measured.among}_accuracy": measured.top,
            "mean_recall": measured.balanced,
            "mean_f1": measured.f1,
            "always_naming_the_largest_class": {"classes": list(measured.largest), "accuracy": measured.of_largest},
            "classes": [asdict(one) for one in measured.classes],
            "confusion": measured.confusion.tolist(),
        }
    return _dumped(content | {"settings": evaluation.experiment.settings(), **provenance()})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _dumped(content: Mapping[str, Any]) -> str:
    return json.dumps({writing.MARK: __version__, **content}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

"""A study as a table: for the terminal, for Markdown, and with full precision as CSV and JSON."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from lape import __version__, writing
from lape.characters import in_markdown, visible
from lape.report import words
from lape.studies import paper
from lape.studies.claims import Finding, judged
from lape.studies.statistics import BASELINE, Row, Way
from lape.studies.study import VARIED, Study

if TYPE_CHECKING:
    from rich.console import Group

    from lape.studies.study import Analysis, Numbers


Columns = dict[str, Callable[[Row], str]]


def columns(study: Study) -> Columns:
    """Return what a table for people shows of a row, by heading; names first, numbers after."""
    return {
        "join": lambda row: str(row.way),
        "table": lambda row: row.pe,
        "seeds": lambda row: str(row.score.count),
        f"{study.measure}, %": lambda row: words.percent(row.score),
        f"minus {BASELINE}": _difference,
        "95 % interval": lambda row: words.interval(row.difference) if row.difference else "–",
        f"at {words.third_epoch(study)}, %": lambda row: words.percent(row.third),
        "parameters": lambda row: f"{row.parameters:,}",
        "time per step": lambda row: words.duration(row.seconds_per_step),
    }


def _difference(row: Row) -> str:
    if row.difference is not None:
        return words.signed(row.difference.mean)
    return "–" if row.way == BASELINE else "no pair"


OF_RECIPE, OTHER_MODEL = "paper, %", "paper’s DeiT-Ti, %"


def beside_the_paper(study: Study) -> Columns:
    """Return the paper's numbers for the same ways and tables: of the recipe that was run, else of Tables 7 and 8."""
    own = paper.of_recipe(study)
    if not own and study.measure != "accuracy":
        return {}
    expected = own or paper.joining()

    def number(row: Row) -> str:
        here, base = expected.get((row.way, row.pe)), expected.get((BASELINE, row.pe))
        if here is None:
            return "–"
        return f"{here:g}" if base is None or row.way == BASELINE else f"{here:g} ({words.signed(here - base)})"

    if all(number(row) == "–" for row in study.rows):
        return {}
    return {OF_RECIPE if own else OTHER_MODEL: number}


def cells(study: Study) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of text; the paper's numbers stand behind the runs'."""
    *names, parameters, time = columns(study).items()
    shown = dict([*names, *beside_the_paper(study).items(), parameters, time])
    return list(shown), [[cell(row) for cell in shown.values()] for row in study.rows]


def terminal(study: Study) -> "Group":
    """Return question, table, findings and remarks for rich; a position table's name stands above its joins."""
    from rich import box
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    shown = columns(study)
    for heading in ("join", "table", "seeds"):
        del shown[heading]
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("")  # a long name is broken rather than a number
    texts = {heading: [cell(row).replace(" ± ", "±") for row in study.rows] for heading, cell in shown.items()}
    for heading, column in texts.items():
        width = max(map(len, column + heading.split()))  # a heading is broken where it is wider than its numbers
        lines = Group(*(Text(part, justify="right") for part in wrap(heading, width)))
        table.add_column(lines, justify="right", vertical="bottom", no_wrap=True)
    above = None
    for row, line in zip(study.rows, zip(*texts.values(), strict=True), strict=True):
        if row.pe != above:
            table.add_row(Text(row.pe, style="bold"))
            above = row.pe
        table.add_row(Padding(str(row.way), (0, 0, 0, 1)), *map(Text, line))
    found = words.findings(study)
    sentences = [*found.main, *filter(None, [found.gap]), *found.remarks]
    return Group(Text(), Text(words.question(study)), Text(), table, Text(), *map(Text, sentences), Text())


def shapes(study: Study) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the analysis: the means over seeds, for each way and table that has them."""
    headings = ["join", "table", "seeds", "two-dimensionality", "half distance", "layer difference"]
    groups: dict[tuple[Way, str], list[Analysis]] = {}
    for (way, pe, _), analysis in study.analyses.items():
        groups.setdefault((way, pe), []).append(analysis)
    return headings, [
        [
            *(str(way), pe, str(len(some))),
            words.number(fmean(one.shape.two_dimensionality for one in some), 2),
            words.number(fmean(one.shape.half_distance for one in some), 1),
            words.number(fmean(one.shape.layer_difference for one in some), 3),
        ]
        for (way, pe), some in groups.items()
    ]


def weights(study: Study) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of λ1, λ2, λ3 by layer, the means over seeds, for each table with the default join."""
    by_table: dict[str, list[tuple[Numbers, ...]]] = {}
    for (way, pe, _), analysis in study.analyses.items():
        if way == BASELINE and analysis.weights is not None:
            by_table.setdefault(pe, []).append(analysis.weights)
    layers = max((len(one[0]) for some in by_table.values() for one in some), default=0)
    return ["table", "weight", *(f"layer {layer}" for layer in range(1, layers + 1))], [
        [pe, name, *(words.number(fmean(values), 3) for values in zip(*of_seeds, strict=True))]
        for pe, seeds in by_table.items()
        for name, of_seeds in zip(("λ1", "λ2", "λ3"), zip(*seeds, strict=True), strict=True)
    ]


def claims(studies: Sequence[Study]) -> "Group":
    """Return for each study what it is, the claims that it tests and how they went, for rich."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown: list[Any] = []
    for study in studies:
        found = words.judgement(study)
        shown += [Text(), Text(words.question(study)), Text()]
        if found.tested:
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
            table.add_column("claim of the paper")
            table.add_column("here", vertical="bottom")
            table.add_column("difference", justify="right", vertical="bottom", no_wrap=True)
            table.add_column("95 % interval", justify="right", vertical="bottom", no_wrap=True)
            for one in found.tested:
                sentence, outcome, mean, interval, *_ = words.claim_cells(one)
                table.add_row(*map(Text, (sentence, outcome, mean, interval)))
            shown += [table, Text()]
        shown.append(Text(found.summary))
    return Group(*shown, Text())


def markdown(study: Study) -> str:
    """Return question, findings, remarks and every table as Markdown: scores, claims, and what the analysis found."""
    found, judgement = words.findings(study), words.judgement(study)
    facts = "\n".join(
        f"- {in_markdown(sentence)}" for sentence in (*found.main, *filter(None, [found.gap]), *found.remarks)
    )
    parts = [in_markdown(words.question(study)), facts, words.as_markdown(*cells(study), left=2)]
    if judgement.tested:
        parts += [
            words.as_markdown(words.CLAIM_HEADINGS, map(words.claim_cells, judgement.tested), left=2),
            in_markdown(judgement.summary),
        ]
    parts += [words.as_markdown(headings, rows, left=2) for headings, rows in (shapes(study), weights(study)) if rows]
    command = "\n".join(f"    {visible(line)}" for line in study.command.split("\n"))
    return "\n\n".join([*parts, command]) + "\n"


def as_csv(study: Study) -> str:
    """Return one line for each join and table, numbers unrounded, empty where there is none."""
    out = io.StringIO()
    records = [_record(row) | {writing.MARK: __version__} for row in study.rows]
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def _record(row: Row) -> dict[str, Any]:
    found = row.difference
    low, high = (found.interval if found else None) or (None, None)
    return {
        "way": str(row.way),
        **row.way._asdict(),
        "pe": row.pe,
        "seeds": row.score.count,
        "measure": row.measure,
        "score_mean": row.score.mean,
        "score_std": row.score.std,
        "third_score_mean": row.third.mean,
        "third_score_std": row.third.std,
        "difference_mean": found and found.mean,
        "difference_low": low,
        "difference_high": high,
        "difference_pairs": len(found.by_seed) if found else 0,
        "verdict": found and found.verdict.value,
        "parameters": row.parameters,
        "seconds_per_step": row.seconds_per_step,
    }


def settings(study: Study) -> dict[str, Any]:
    """Return what all runs have in common."""
    return {name: value for name, value in study.experiment.settings().items() if name not in VARIED}


def _claim(found: Finding) -> dict[str, Any]:
    seen = found.difference
    return {
        "claim": found.claim.sentence,
        "place": found.claim.place,
        "outcome": found.outcome.value,
        "unit": found.claim.unit.name,
        "difference_mean": seen and seen.mean,
        "difference_interval": seen and seen.interval,
        "difference_by_seed": seen and dict(seen.by_seed),
    }


def as_json(study: Study) -> str:
    """Return rows, gaps, single runs, settings and provenance as JSON, with full precision."""
    found = words.findings(study)
    content = {
        writing.MARK: __version__,
        "question": words.question(study),
        "findings": [*found.main, *filter(None, [found.gap])],
        "remarks": found.remarks,
        "rows": [
            _record(row) | {"difference_by_seed": row.difference and dict(row.difference.by_seed)} for row in study.rows
        ],
        "gaps": [{**asdict(gap), "way": str(gap.way)} for gap in study.gaps],
        "claims": [_claim(found) for found in judged(study)],
        "runs": [
            {
                "way": str(combination.way),
                **combination.way._asdict(),
                "pe": combination.pe,
                "seed": combination.seed,
                "score": result.run.score,
                "third": result.run.third._asdict(),
                "parameters": result.run.parameters,
                "seconds_per_step": result.run.seconds_per_step,
                "folder": result.folder.name,
            }
            for combination, result in study.results.items()
        ],
        "failures": {str(combination): str(error) for combination, error in study.failures.items()},
        "left_out": words.left_out(study.left_out, "Left out:"),
        "settings": settings(study),
        "command": study.command,
        "jobs": study.jobs,
        "provenance": study.provenances(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

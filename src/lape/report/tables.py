"""A comparison as a table: for the terminal, for Markdown, and with full precision as CSV and JSON."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from textwrap import fill
from typing import TYPE_CHECKING, Any

from lape.comparison import Comparison
from lape.report import words
from lape.statistics import BASELINE, Row

if TYPE_CHECKING:
    from rich.console import Group

VARIED = ("join", "pe", "pe_norm", "seed")


def columns(comparison: Comparison) -> dict[str, Callable[[Row], str]]:
    """Return what a table for people shows of a row, by heading; names first, numbers after."""
    return {
        "join": lambda row: row.join,
        "table": lambda row: row.pe,
        "seeds": lambda row: str(row.score.count),
        f"{comparison.measure}, %": lambda row: words.percent(row.score),
        f"minus {BASELINE}": _difference,
        "95 % interval": lambda row: words.interval(row.difference) if row.difference else "–",
        f"at {words.third_epoch(comparison)}, %": lambda row: words.percent(row.third),
        "parameters": lambda row: f"{row.parameters:,}",
        "time per step": lambda row: words.duration(row.seconds_per_step),
    }


def _difference(row: Row) -> str:
    if row.difference is not None:
        return words.signed(row.difference.mean)
    return "–" if row.join == BASELINE else "no pair"


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of text."""
    shown = columns(comparison)
    return list(shown), [[cell(row) for cell in shown.values()] for row in comparison.rows]


def terminal(comparison: Comparison) -> "Group":
    """Return question, table, findings and remarks for rich; a position table's name stands above its joins."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = columns(comparison)
    for heading in ("join", "table", "seeds"):
        del shown[heading]
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("", no_wrap=True, overflow="fold")
    texts = {heading: [cell(row).replace(" ± ", "±") for row in comparison.rows] for heading, cell in shown.items()}
    for heading, column in texts.items():
        width = max(map(len, column + heading.split()))  # a heading is broken where it is wider than its numbers
        table.add_column(Text(fill(heading, width), justify="right"), justify="right", vertical="bottom")
    above = None
    for row, line in zip(comparison.rows, zip(*texts.values(), strict=True), strict=True):
        if row.pe != above:
            table.add_row(Text(row.pe, style="bold"))
            above = row.pe
        table.add_row(Text(f" {row.join}"), *map(Text, line))
    found = words.findings(comparison)
    sentences = [*found.main, *filter(None, [found.gap]), *found.remarks]
    return Group(Text(f"\n{words.question(comparison)}\n"), table, Text(), *map(Text, sentences), Text())


def markdown(comparison: Comparison) -> str:
    """Return question, findings, table and remarks as Markdown."""
    found = words.findings(comparison)
    headings, rows = cells(comparison)
    lines = [headings, ["---" if place < 2 else "---:" for place in range(len(headings))], *rows]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    facts = "\n".join(f"- {sentence}" for sentence in (*found.main, *filter(None, [found.gap]), *found.remarks))
    return f"{words.question(comparison)}\n\n{facts}\n\n{table}\n\n    {comparison.command}\n"


def as_csv(comparison: Comparison) -> str:
    """Return one line for each join and table, numbers unrounded, empty where there is none."""
    out = io.StringIO()
    records = [_record(row) for row in comparison.rows]
    writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return out.getvalue()


def _record(row: Row) -> dict[str, Any]:
    found = row.difference
    low, high = (found.interval if found else None) or (None, None)
    return {
        "join": row.join,
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


def settings(comparison: Comparison) -> dict[str, Any]:
    """Return what all runs have in common."""
    record = next(iter(comparison.results.values())).record["experiment"]
    return {name: value for name, value in record.items() if name not in VARIED}


def as_json(comparison: Comparison) -> str:
    """Return rows, gaps, single runs, settings and provenance as JSON, with full precision."""
    found = words.findings(comparison)
    content = {
        "question": words.question(comparison),
        "findings": [*found.main, *filter(None, [found.gap])],
        "remarks": found.remarks,
        "rows": [
            _record(row) | {"difference_by_seed": row.difference and dict(row.difference.by_seed)}
            for row in comparison.rows
        ],
        "gaps": [asdict(gap) for gap in comparison.gaps],
        "runs": [
            {
                **combination._asdict(),
                "score": result.run.score,
                "third": result.run.third._asdict(),
                "parameters": result.run.parameters,
                "seconds_per_step": result.run.seconds_per_step,
                "folder": result.folder.name,
            }
            for combination, result in comparison.results.items()
        ],
        "failures": {str(combination): str(error) for combination, error in comparison.failures.items()},
        "asked": {"joins": comparison.joins, "pe": comparison.pes, "seeds": comparison.seeds},
        "settings": settings(comparison),
        "command": comparison.command,
        "jobs": comparison.jobs,
        "provenance": comparison.provenances(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

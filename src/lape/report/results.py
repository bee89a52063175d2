"""Results of recipes beside the paper's: for the terminal, and as Markdown with what each number stands on."""

from typing import TYPE_CHECKING

from lape import writing
from lape.characters import as_code, in_markdown
from lape.report import words
from lape.studies.results import Results, Row
from lape.training.provenance import provenance

if TYPE_CHECKING:
    from rich.console import Group

HEADINGS = ("recipe", "join", "measure", "seeds", "here, %", "paper, %", "difference")


def cells(row: Row) -> tuple[str, ...]:
    """Return a row's text under each heading."""
    expected = "–" if row.expected is None else f"{row.expected:g}"
    apart = "–" if row.expected is None else words.signed(row.score.mean - row.expected)
    seeds = f"{len(row.seeds)}"
    return row.recipe.name, row.join, row.measure, seeds, words.percent(row.score), expected, apart


def remarks(results: Results) -> list[str]:
    """Say what keeps a number from standing beside the paper's."""
    said = []
    for row in results.rows:
        where = f"{row.recipe.name}, {row.join}"
        if row.changed:
            changes = ", ".join(f"{name} {value}" for name, value in row.changed.items())
            said.append(f"{where}: run with {changes}, so the paper's number is not set beside it.")
        elif row.expected is None:
            said.append(f"{where}: the paper has no such row.")
        elif len(row.seeds) < (seeds := row.recipe.paper.get("seeds", 1)):
            said.append(f"{where}: the paper's is the mean of {seeds} seeds, this of {len(row.seeds)}.")
    if results.others:
        first, more = results.others[0].parent, len(results.others) - 1
        said.append(f"Not of a recipe: {first}" + (f" and {more} more." if more else "."))
    return list(dict.fromkeys(said))  # once for all measures of a row


EXPLANATION = (
    "here: on the validation images after the last step, mean ± standard deviation over the seeds. paper: Yu et al., "
    "ICCV 2023 (one run a row on ImageNet, the mean of seeds 121 to 125 on CIFAR and COCO, of five rounds on ADE20K)."
)


def terminal(results: Results) -> "Group":
    """Return table and remarks for rich."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if place > 2 else "left", vertical="bottom")
    for row in results.rows:
        table.add_row(*map(Text, cells(row)))
    shown = [table, Text(), Text(EXPLANATION)] if results.rows else []
    return Group(*shown, *map(Text, remarks(results)))


def markdown(results: Results) -> str:
    """Return table, remarks and the folders of the runs as Markdown."""
    table = words.as_markdown(HEADINGS, map(cells, results.rows), left=3)
    runs = dict.fromkeys(
        f"- {in_markdown(f'{row.recipe.name}, {row.join}')}: "
        + ", ".join(f"seed {seed} in {as_code(str(place))}" for seed, place in zip(row.seeds, row.places, strict=True))
        for row in results.rows
    )
    parts = [table, EXPLANATION, *map(in_markdown, remarks(results)), "\n".join(runs), as_code(provenance()["command"])]
    return "\n\n".join(part for part in parts if part) + "\n" + writing.COMMENT

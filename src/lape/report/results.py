"""Results of recipes beside the paper's: for the terminal, and as Markdown with what each number stands on."""

from typing import TYPE_CHECKING

from lape.files import writing
from lape.files.characters import as_code, in_markdown
from lape.report import words
from lape.report.table import Table
from lape.studies.results import RecipeRow, Results
from lape.training.provenance import provenance

if TYPE_CHECKING:
    from rich.console import Group

HEADINGS = ("recipe", "join", "measure", "seeds", "here, %", "paper, %", "difference")


def table(results: Results) -> Table:
    """Return one row for each recipe, join and measure."""
    return Table(HEADINGS, list(map(cells, results.rows)), names=3)


def cells(row: RecipeRow) -> tuple[str, ...]:
    """Return a row's text under each heading."""
    expected = "–" if row.expected is None else f"{row.expected:g}"
    apart = "–" if row.expected is None else words.signed(row.score.mean - row.expected)
    seeds = f"{len(row.seeds)}"
    return row.recipe.name, row.join, row.measure, seeds, words.percent(row.score), expected, apart


def remarks(results: Results) -> list[str]:
    """Say what keeps a number from standing beside the paper's."""
    sentences = []
    for row in results.rows:
        where = f"{row.recipe.name}, {row.join}"
        if row.changed:
            changes = ", ".join(f"{name} {value}" for name, value in row.changed.items())
            sentences.append(f"{where}: run with {changes}, so the paper's number is not set beside it.")
        elif row.expected is None:
            sentences.append(f"{where}: the paper has no such row.")
        elif len(row.seeds) < (seeds := row.recipe.paper.get("seeds", 1)):
            sentences.append(f"{where}: the paper's number is the mean of {seeds} seeds, this one of {len(row.seeds)}.")
    if results.others:
        first, more = results.others[0].parent, len(results.others) - 1
        sentences.append(f"Not of a recipe: {first}" + (f" and {more} more." if more else "."))
    return list(dict.fromkeys(sentences))  # once for all measures of a row


EXPLANATION = (
    "here: on the validation images after the last step, mean ± standard deviation over the seeds. paper: Yu et al., "
    "ICCV 2023 (one run a row on ImageNet, the mean of seeds 121 to 125 on CIFAR and COCO, of five rounds on ADE20K)."
)


def terminal(results: Results) -> "Group":
    """Return table and remarks for rich."""
    from rich.console import Group
    from rich.text import Text

    shown = [table(results).terminal(), Text(), Text(EXPLANATION)] if results.rows else []
    return Group(*shown, *map(Text, remarks(results)))


def markdown(results: Results) -> str:
    """Return table, remarks and the folders of the runs as Markdown."""
    runs = dict.fromkeys(
        f"- {in_markdown(f'{row.recipe.name}, {row.join}')}: "
        + ", ".join(f"seed {seed} in {as_code(str(place))}" for seed, place in zip(row.seeds, row.places, strict=True))
        for row in results.rows
    )
    parts = [
        table(results).markdown(),
        EXPLANATION,
        *map(in_markdown, remarks(results)),
        "\n".join(runs),
        as_code(provenance()["command"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n" + writing.COMMENT

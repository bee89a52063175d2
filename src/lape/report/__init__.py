"""A comparison for people: tables, pictures and one page, written into a folder."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lape.comparison import Comparison
    from lape.report.plots import Maps


def maps(comparison: "Comparison") -> "dict[str, Maps]":
    """Return the position correlations of trained models by table, with the first seed that all joins have.

    Joins and models that position correlation is not defined for are left out.
    """
    from lape.analysis import correlation
    from lape.comparison import trained
    from lape.errors import UsageError
    from lape.method import POSITION_EMBEDDINGS
    from lape.report.plots import Maps

    found = {}
    for pe in comparison.pes:
        by_join = {join: comparison.of(join, pe) for join in comparison.joins}
        seeds = [{result.run.combination.seed for result in results} for results in by_join.values() if results]
        common = [seed for seed in comparison.seeds if seeds and all(seed in some for some in seeds)]
        if POSITION_EMBEDDINGS[pe].table is None or not common:
            continue
        shown = {}
        for join, results in by_join.items():
            for result in results:
                if result.run.combination.seed == common[0]:
                    with suppress(UsageError):
                        shown[join] = correlation(trained(result))
        if shown:
            found[pe] = Maps(common[0], shown)
    return found


def write(comparison: "Comparison", maps: "Mapping[str, Maps]", folder: Path) -> Path:
    """Write table.md, .csv and .json, the pictures and index.html into a folder; return the page's path.

    `maps` are by table. Raises RunError where the disk refuses.
    """
    from lape import checkpoints
    from lape.report import page, plots, tables

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "table.md": tables.markdown(comparison),
        "table.csv": tables.as_csv(comparison),
        "table.json": tables.as_json(comparison),
        "index.html": page.page(comparison, maps),
    }.items():
        checkpoints.write_text(folder / name, text)
    figures = {"learning-curves.png": plots.learning_curves(comparison)}
    if any(row.difference for row in comparison.rows):
        figures["differences.png"] = plots.differences(comparison)
    for pe, some in maps.items():
        figures[f"correlation-{pe}.png"] = plots.correlation_maps(some)
    for name, figure in figures.items():
        checkpoints.write(folder / name, lambda file, figure=figure: file.write(plots.png(figure)))
    return folder / "index.html"

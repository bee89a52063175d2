"""Studies for people: tables, pictures and pages, written into a folder."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lape.report.plots import Maps
    from lape.studies.study import Study


def maps(study: "Study") -> "dict[str, Maps]":
    """Return the position correlations of trained models by panel, with the first seed that all ways of it have.

    Ways and models that position correlation is not defined for are left out.
    """
    from lape.errors import RunError, UsageError
    from lape.method import POSITION_EMBEDDINGS
    from lape.report.plots import Maps, panels
    from lape.studies.analysis import correlation_of

    by_panel = {}
    for panel in panels(study):
        by_way = {way: study.of(way, panel.pe) for way in panel.ways}
        common = [seed for seed in study.seeds if all(seed in some for some in by_way.values())]
        if POSITION_EMBEDDINGS[panel.pe].table is None or not common:
            continue
        shown = {}
        for way, by_seed in by_way.items():
            with suppress(UsageError, RunError):  # told in `study.not_analysed`
                shown[str(way)] = correlation_of(by_seed[common[0]])
        if shown:
            by_panel[panel.title] = Maps(common[0], shown)
    return by_panel


def write(study: "Study", maps: "Mapping[str, Maps]", folder: Path) -> Path:
    """Write table.md, .csv and .json, the pictures and index.html into a folder; return the page's path.

    `maps` are by panel. Raises RunError where the disk refuses.
    """
    from lape.report import page, plots, tables
    from lape.training import checkpoints

    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {
        "table.md": tables.markdown(study),
        "table.csv": tables.as_csv(study),
        "table.json": tables.as_json(study),
        "index.html": page.page([page.Section(study, maps)]),
    }.items():
        checkpoints.write_text(folder / name, text)
    figures = {"learning-curves.png": plots.learning_curves(study)}
    if any(row.difference for row in study.rows):
        figures["differences.png"] = plots.differences(study)
    for title, some in maps.items():
        figures[f"correlation-{title.replace(', ', '-').replace(' ', '-')}.png"] = plots.correlation_maps(some)
    for name, figure in figures.items():
        checkpoints.write(folder / name, lambda file, figure=figure: file.write(plots.png(figure)))
    return folder / "index.html"


def write_page(studies: "Sequence[Study]", left_out: Mapping[Path, str], costs: Sequence[Path], path: Path) -> None:
    """Write studies, the `cost.json` of `costs`, and why runs are in no study, as one page; tables beside it, in a .md.

    Raises RunError where the disk refuses.
    """
    from lape.errors import RunError
    from lape.report import page, tables
    from lape.report.cost import filed
    from lape.training import checkpoints

    measured, missing = [], dict(left_out)
    for file in costs:
        try:
            measured.append(filed(file))
        except RunError as error:
            missing[file] = str(error)
    text = page.page([page.Section(study, maps(study)) for study in studies], measured, missing)
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_text(path, text)
    checkpoints.write_text(path.with_suffix(".md"), "\n".join(map(tables.markdown, studies)))

"""Studies for people: tables, pictures and pages, written into a folder."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lape.report.models import ModelTold
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
            with suppress(UsageError, RunError, OSError):  # told in `study.not_analysed`
                shown[str(way)] = correlation_of(by_seed[common[0]])
        if shown:
            by_panel[panel.title] = Maps(common[0], shown)
    return by_panel


PAGE, CURVES, DIFFERENCES = "index.html", "learning-curves.png", "differences.png"
TABLES = ("table.md", "table.csv", "table.json")
SIZES, SIZES_DRAWN = "sizes.csv", "sizes.png"


def places(folder: Path, at_sizes: bool = False) -> list[Path]:
    """Return all that `write` may replace in a folder, where runs are judged at sizes of images or not."""
    names = (PAGE, *TABLES, CURVES, DIFFERENCES, *((SIZES, SIZES_DRAWN) if at_sizes else ()))
    return [*(folder / name for name in names), *folder.glob("correlation-*.png")]


def write(study: "Study", maps: "Mapping[str, Maps]", folder: Path, left_out: Mapping[Path, str] | None = None) -> Path:
    """Write table.md, .csv and .json, the pictures and index.html into a folder; return the page's path.

    Where the runs are judged at sizes of images, sizes.csv and sizes.png too. `left_out` are runs that the page names
    with the reason.
    `maps` are by panel. Raises UsageError where another's file is in the way, RunError where the disk refuses.
    """
    from lape.files import writing
    from lape.report import page, plots, tables

    texts = tables.markdown([study]) + writing.COMMENT, tables.as_csv(study), tables.as_json(study)
    contents: dict[str, str | bytes] = dict(zip(TABLES, texts, strict=True))
    contents[PAGE] = page.page([page.Section(study, maps)], left_out=left_out)
    contents[CURVES] = plots.png(plots.learning_curves(study))
    if any(row.difference for row in study.rows):
        contents[DIFFERENCES] = plots.png(plots.differences(study))
    if study.sizes:
        contents[SIZES] = tables.sizes_as_csv(study)
        contents[SIZES_DRAWN] = plots.png(plots.score_by_size(study))
    for title, some in maps.items():
        name = f"correlation-{title.replace(', ', '-').replace(' ', '-')}.png"
        contents[name] = plots.png(plots.correlation_maps(some))
    writing.write_marked({folder / name: content for name, content in contents.items()})
    return folder / PAGE


def write_page(
    studies: "Sequence[Study]",
    left_out: Mapping[Path, str],
    costs: Sequence[Path],
    path: Path,
    models: "Sequence[ModelTold]" = (),
) -> None:
    """Write studies, models, the `cost.json` of `costs`, and why runs are in no study, as one page; tables in a .md.

    Raises UsageError where another's file is in the way, RunError where the disk refuses.
    """
    from lape.errors import RunError
    from lape.files import writing
    from lape.report import page, tables
    from lape.report.cost import filed

    measured, missing = [], dict(left_out)
    for file in costs:
        try:
            measured.append(filed(file))
        except RunError as error:
            missing[file] = str(error)
    text = page.page([page.Section(study, maps(study)) for study in studies], measured, missing, models)
    markdown = "\n".join([*([tables.markdown(studies)] if studies else []), *(one.markdown() for one in models)])
    writing.write_marked({path: text, path.with_suffix(".md"): markdown + writing.COMMENT})

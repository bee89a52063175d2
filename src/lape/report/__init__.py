"""Studies for people: tables, pictures and pages, written into a folder."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lape.report.figures import Encode
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


PAGE = "index.html"
TABLES = ("table.md", "table.csv", "table.json", "table.tex", "runs.csv", "methods.txt")
SIZES = "sizes.csv"
OF_PAGE = (".md", ".tex", ".runs.csv", ".methods.txt")  # in the place of a page's .html


def places(folder: Path, at_sizes: bool = False, formats: Iterable[str] = ("png",)) -> list[Path]:
    """Return all that `write` may replace in a folder, where runs are judged at sizes of images or not."""
    from lape.report import figures

    always = figures.CURVES, figures.DIFFERENCES, figures.POSITIONS, figures.WEIGHTS
    drawn = (*always, *((figures.SIZES,) if at_sizes else ()))
    names = [PAGE, *TABLES, *((SIZES,) if at_sizes else ())]
    there: list[Path] = []
    for suffix in formats:
        names += [f"{name}.{suffix}" for name in drawn]
        there += folder.glob(f"{figures.CORRELATION}*.{suffix}")
    return [*(folder / name for name in names), *there]


def places_beside(page: Path, formats: Iterable[str] = ()) -> list[Path]:
    """Return all that `write_page` may replace: the page, what stands beside it, and figures that are there."""
    there = [path for suffix in formats for path in page.parent.glob(f"{escape(page.stem)}.study-*.{suffix}")]
    return [page, *map(page.with_suffix, OF_PAGE), *there]


def write(
    study: "Study",
    maps: "Mapping[str, Maps]",
    folder: Path,
    left_out: Mapping[Path, str] | None = None,
    formats: "Mapping[str, Encode] | None" = None,
) -> Path:
    """Write tables, figures, single runs, methods and index.html into a folder; return the page's path.

    Where the runs are judged at sizes of images, sizes.csv and their figure too. `maps` are by panel. `left_out` are
    runs that the page names with the reason. `formats` are those of the figures (`figures.formats`), by default PNG.
    Raises UsageError where another's file is in the way, RunError where the disk refuses.
    """
    from lape.files import writing
    from lape.report import figures, methods, page, tables

    texts = (
        *(tables.markdown([study]) + writing.COMMENT, tables.as_csv(study), tables.as_json(study)),
        *(tables.latex([study]), tables.runs_as_csv([study]), methods.paragraph(study) + "\n" + methods.MARK),
    )
    contents: dict[str, str | bytes] = dict(zip(TABLES, texts, strict=True))
    if study.sizes:
        contents[SIZES] = tables.sizes_as_csv(study)
    contents |= figures.files(study, maps, formats or figures.formats(["png"]))
    contents[PAGE] = page.page([page.Section(study, maps)], left_out=left_out, files=list(contents))
    writing.write_marked({folder / name: content for name, content in contents.items()})
    return folder / PAGE


def write_page(
    studies: "Sequence[Study]",
    left_out: Mapping[Path, str],
    costs: Sequence[Path],
    path: Path,
    models: "Sequence[ModelTold]" = (),
    formats: "Mapping[str, Encode] | None" = None,
) -> None:
    """Write studies, models, the `cost.json` of `costs`, and why runs are in no study, as one page.

    Beside it: tables as .md and .tex, single runs as .runs.csv, methods as .methods.txt, and the figures of each study
    in every one of `formats`. Raises UsageError where another's file is in the way, RunError where the disk refuses.
    """
    from lape.errors import RunError
    from lape.files import writing
    from lape.report import figures, methods, page, tables
    from lape.report.cost import filed

    measured, missing = [], dict(left_out)
    for file in costs:
        try:
            measured.append(filed(file))
        except RunError as error:
            missing[file] = str(error)
    sections = [page.Section(study, maps(study)) for study in studies]
    markdown = "\n".join([*([tables.markdown(studies)] if studies else []), *(one.markdown() for one in models)])
    beside: dict[Path, str | bytes] = {path.with_suffix(".md"): markdown + writing.COMMENT}
    if studies:
        paragraphs = "\n\n".join(map(methods.paragraph, studies)) + "\n" + methods.MARK
        texts = tables.latex(studies), tables.runs_as_csv(studies), paragraphs
        beside |= dict(zip(map(path.with_suffix, OF_PAGE[1:]), texts, strict=True))
    for number, section in enumerate(sections, start=1):
        drawn = figures.files(section.study, section.maps, formats or {})
        beside |= {path.with_suffix(f".study-{number}.{name}"): content for name, content in drawn.items()}
    text = page.page(sections, measured, missing, models, files=[file.name for file in beside])
    writing.write_marked({path: text, **beside})

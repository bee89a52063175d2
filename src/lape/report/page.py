"""Studies as one HTML page that holds all it shows: no network, no script, and other files by their links alone."""

import json
import os
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files as resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from lape.files import writing
from lape.files.characters import plural, visible
from lape.report import cost, methods, plots, tables, words
from lape.report.models import ModelTold
from lape.studies.analysis import IMAGES
from lape.studies.statistics import BASELINE
from lape.studies.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[plots.Theme], "Figure"]
NARROW, DARK = "(max-width: 640px)", "(prefers-color-scheme: dark)"
DOTS = 130  # an inch; maps are coarse, and there are many
PARTS = {  # of a study's section, in their order: the last part of the address, and the title
    "claims": "The paper’s claims",
    "results": "Results",
    "positions": "Positions side by side",
    "curves": "Learning curves",
    "sizes": "Other sizes of images",
    "correlation": "Position correlation",
    "weights": "What a layer’s norm is made of",
    "methods": "Methods, ready to paste",
    "reproduce": "To reproduce",
}


@dataclass(frozen=True)
class Section:
    """A study, and the position correlation of its models by panel."""

    study: Study
    maps: Mapping[str, plots.Maps] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A picture as data URIs: one for light and wide screens, and those that take its place on others."""

    image: str
    others: tuple[tuple[str, str], ...]  # media query, image


def picture(wide: Draw, narrow: Draw | None = None) -> Picture:
    """Draw for light and for dark screens, and for narrow ones where these want another layout."""
    others = [(f"{NARROW} and {DARK}", _uri(narrow(plots.DARK))), (NARROW, _uri(narrow(plots.LIGHT)))] if narrow else []
    return Picture(_uri(wide(plots.LIGHT)), (*others, (DARK, _uri(wide(plots.DARK)))))


def _uri(figure: "Figure") -> str:
    return f"data:image/webp;base64,{b64encode(plots.webp(figure, DOTS)).decode()}"


def page(
    sections: Sequence[Section],
    costs: Sequence[cost.Filed] = (),
    left_out: Mapping[Path, str] | None = None,
    models: Sequence[ModelTold] = (),
    files: Sequence[str] = (),
) -> str:
    """Return the page of studies, models, filed costs, and of runs in no study with the reason.

    `files` are names of files in the page's folder, which it links to.
    """
    from jinja2 import Environment, StrictUndefined

    studies = [section.study for section in sections]
    source = resources("lape.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    runs = sum(len(section.study.results) for section in sections)
    content = {
        "mark": writing.MARK,
        "title": _title(sections, models, runs),
        "models": list(map(_of_model, models)),
        "studies": list(map(_content, sections, words.judgements(studies), words.apart(studies))),
        "baseline": BASELINE,
        "images": IMAGES,
        "costs": [(each.path, cost.table(each.costs), each.explanation) for each in costs],
        "left_out": left_out or {},
        "files": [(quote(os.fsencode(name)), visible(name)) for name in files],
    }
    return environment.from_string(source).render(content)


def _title(sections: Sequence[Section], models: Sequence[ModelTold], runs: int) -> str:
    if len(sections) == 1:
        return words.question(sections[0].study)
    return words.several(len(sections), runs) if sections else words.listed(one.name for one in models)


def _of_model(one: ModelTold) -> dict[str, Any]:
    found = one.correlation
    return {
        "name": one.name,
        "facts": one.facts,
        "layers": one.layers,
        "explanation": one.explanation,
        "maps": None if found is None else picture(lambda theme: plots.correlations({one.name: found}, theme)),
    }


def _content(section: Section, judgement: words.Judgement, apart: str) -> dict[str, Any]:
    study = section.study
    decomposed, shapes = tables.weights(study), tables.shapes(study)
    absent = {
        *(() if study.sizes else ("sizes",)),
        *(() if study.compares_positions else ("positions",)),
        *(() if shapes.rows or study.not_analysed or section.maps else ("correlation",)),
        *(() if decomposed.rows else ("weights",)),
    }
    return {
        "parts": {name: title for name, title in PARTS.items() if name not in absent},
        "methods": methods.paragraph(study),
        "question": words.question(study),
        "apart": apart,
        "findings": words.findings(study),
        "measure": study.measure,
        "scores": tables.scores(study),
        "beside_other": tables.OTHER_MODEL in tables.beside_the_paper(study),
        "third": words.third_epoch(study),
        "differences": picture(lambda theme: plots.differences(study, theme)) if _paired(study) else None,
        "positions": tables.positions(study),
        "about_marks": words.about_marks(study),
        "across_sizes": tables.across_sizes(study),
        "beside": words.beside(study) if study.compares_positions else "",
        "positions_drawn": picture(lambda theme: plots.beside(study, theme)) if study.compares_positions else None,
        "curves": picture(
            lambda theme: plots.learning_curves(study, theme),
            lambda theme: plots.learning_curves(study, theme, columns=1),
        ),
        "sizes": tables.sizes(study),
        "about_sizes": words.ABOUT_SIZES,
        "not_taken": words.not_taken(study),
        "sizes_drawn": picture(
            lambda theme: plots.score_by_size(study, theme),
            lambda theme: plots.score_by_size(study, theme, columns=1),
        )
        if study.sizes
        else None,
        "judgement": judgement,
        "claims": tables.claims(judgement),
        "untested": plural(len(judgement.untested), "claim"),
        "outcomes": [f"{one.outcome.name.lower()} corrected-{one.corrected.name.lower()}" for one in judgement.tested],
        "about_claims": words.ABOUT_CLAIMS,
        "shapes": shapes,
        "maps": {
            title: (some.seed, picture(lambda theme, some=some: plots.correlation_maps(some, theme)))
            for title, some in section.maps.items()
        },
        "weights": decomposed,
        "weights_drawn": picture(
            lambda theme: plots.weights_by_depth(study, theme),
            lambda theme: plots.weights_by_depth(study, theme, columns=1),
        )
        if decomposed.rows
        else None,
        "not_analysed": words.left_out(study.not_analysed, "Not analysed:"),
        "command": study.command,
        "seeds": study.seeds,
        "settings": {name: json.dumps(value, ensure_ascii=False) for name, value in tables.settings(study).items()},
        "provenances": study.provenances(),
    }


def _paired(study: Study) -> bool:
    return any(row.difference is not None for row in study.rows)

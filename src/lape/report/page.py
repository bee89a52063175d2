"""A comparison as one HTML page that holds all it shows: no network, no other file, no script."""

import json
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lape.comparison import Comparison
from lape.report import plots, tables, words
from lape.statistics import BASELINE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[plots.Theme], "Figure"]
NARROW, DARK = "(max-width: 640px)", "(prefers-color-scheme: dark)"


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
    return f"data:image/png;base64,{b64encode(plots.png(figure)).decode()}"


def page(comparison: Comparison, maps: Mapping[str, plots.Maps]) -> str:
    """Return the page; `maps` are by table."""
    from jinja2 import Environment, StrictUndefined

    source = files("lape.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    headings, rows = tables.cells(comparison)
    content: dict[str, Any] = {
        "comparison": comparison,
        "baseline": BASELINE,
        "question": words.question(comparison),
        "findings": words.findings(comparison),
        "headings": headings,
        "rows": rows,
        "third": words.third_epoch(comparison),
        "differences": picture(lambda theme: plots.differences(comparison, theme)) if _paired(comparison) else None,
        "curves": picture(
            lambda theme: plots.learning_curves(comparison, theme),
            lambda theme: plots.learning_curves(comparison, theme, columns=1),
        ),
        "maps": {
            pe: (some.seed, picture(lambda theme, some=some: plots.correlation_maps(some, theme)))
            for pe, some in maps.items()
        },
        "settings": {
            name: json.dumps(value, ensure_ascii=False) for name, value in tables.settings(comparison).items()
        },
        "provenances": comparison.provenances(),
    }
    return environment.from_string(source).render(content)


def _paired(comparison: Comparison) -> bool:
    return any(row.difference is not None for row in comparison.rows)

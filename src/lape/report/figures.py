"""The figures of a study as files: by their names, in the formats that are asked for."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from lape.errors import choose
from lape.report import plots, tables
from lape.studies.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Encode = Callable[["Figure"], bytes]
FORMATS: Mapping[str, Encode] = {"png": plots.png, "svg": plots.svg, "pdf": plots.pdf}
CURVES, DIFFERENCES, WEIGHTS, SIZES = "learning-curves", "differences", "layer-weights", "sizes"
POSITIONS = "positions"
CORRELATION = "correlation-"  # and a panel's title


def formats(names: Iterable[str]) -> dict[str, Encode]:
    """Return the formats of these names; raises UsageError for one that there is not."""
    return {name: choose(FORMATS, name, "a format of figures") for name in names}


def drawn(study: Study, maps: Mapping[str, plots.Maps]) -> "Iterator[tuple[str, Figure]]":
    """Draw all figures of a study, with their names."""
    yield CURVES, plots.learning_curves(study)
    if any(row.difference for row in study.rows):
        yield DIFFERENCES, plots.differences(study)
    if study.compares_positions:
        yield POSITIONS, plots.beside(study)
    if tables.weights(study).rows:
        yield WEIGHTS, plots.weights_by_depth(study)
    if study.sizes:
        yield SIZES, plots.score_by_size(study)
    for title, some in maps.items():
        yield f"{CORRELATION}{title.replace(', ', '-').replace(' ', '-')}", plots.correlation_maps(some)


def files(study: Study, maps: Mapping[str, plots.Maps], formats: Mapping[str, Encode]) -> dict[str, bytes]:
    """Return the figures of a study in every format, by the names of their files."""
    if not formats:
        return {}
    return {
        f"{name}.{suffix}": encode(figure) for name, figure in drawn(study, maps) for suffix, encode in formats.items()
    }

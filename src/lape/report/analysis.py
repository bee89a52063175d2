"""An analysis for people: tables for the terminal and as Markdown, a picture, and every number as JSON."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from lape import __version__, writing
from lape.analysis import Correlation, Decomposition
from lape.analysis.subjects import Specimen
from lape.characters import as_code, in_markdown, visible
from lape.errors import UsageError
from lape.report import plots
from lape.report.words import as_markdown
from lape.surgery.positions import by
from lape.training.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Group

Found = TypeVar("Found", Correlation, Decomposition)
Cells = tuple[str, ...]


@dataclass(frozen=True)
class Sheet(Generic[Found]):
    """How one kind of analysis is told: the cells of a model and of each of its layers, in numbers, as a picture."""

    name: str  # of its files
    title: str
    of_models: Cells  # headings, beside that of the model
    of_layers: Cells  # headings, beside those of model and layer
    model: Callable[[Found], Cells]
    layers: Callable[[Found], Sequence[Cells]]
    numbers: Callable[[Found], Mapping[str, Any]]
    draw: Callable[[Mapping[str, Found]], "Figure"]
    said: str

    def places(self, folder: Path) -> tuple[Path, Path, Path]:
        """Return where `write` puts picture, table and numbers."""
        return folder / f"{self.name}.png", folder / f"{self.name}.md", folder / f"{self.name}.json"

    def write(self, found: Sequence[tuple[Specimen, Found]], folder: Path) -> Path:
        """Write NAME.png, .md and .json into a folder; return the picture's path.

        Raises UsageError for models that cannot be told apart or drawn together and where another's file is in the way,
        RunError where the disk refuses.
        """
        figure = self.draw(dict(zip(_names(found), (one for _, one in found), strict=True)))
        picture, table, numbers = self.places(folder)
        drawn = plots.png(figure, dots_per_inch=150)
        writing.write_marked({picture: drawn, table: self.markdown(found), numbers: self.as_json(found)})
        return picture

    def tables(self, found: Sequence[tuple[Specimen, Found]]) -> list[list[Cells]]:
        """Return the table of models and that of layers, headings first."""
        models: list[Cells] = [("model", *self.of_models)]
        layers: list[Cells] = [("model", "layer", *self.of_layers)]
        for name, (_, one) in zip(_names(found), found, strict=True):
            models.append((name, *self.model(one)))
            layers += [(name, str(number), *cells) for number, cells in enumerate(self.layers(one), start=1)]
        return [models, layers]

    def explanation(self, found: Sequence[tuple[Specimen, Found]]) -> str:
        """Say what was looked at and how the numbers read."""
        looked = dict.fromkeys(specimen.data for specimen, _ in found if specimen.data)
        return " ".join([*(f"On {each}." for each in looked), self.said])

    def terminal(self, found: Sequence[tuple[Specimen, Found]]) -> "Group":
        """Return tables and explanation for rich."""
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        shown: list[Any] = []
        for headings, *lines in self.tables(found):
            table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
            for place, heading in enumerate(headings):
                table.add_column(heading, justify="right" if place else "left", vertical="bottom", overflow="fold")
            for before, line in zip([None, *lines], lines, strict=False):
                if before and before[0] != line[0] and "layer" in headings:
                    table.add_section()
                table.add_row(*map(Text, line))
            shown += [table, Text()]
        return Group(*shown, Text(self.explanation(found)))

    def markdown(self, found: Sequence[tuple[Specimen, Found]]) -> str:
        """Return tables, explanation and provenance as Markdown."""
        made = provenance()
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        parts = [
            f"# {self.title}",
            *(as_markdown(headings, rows) for headings, *rows in self.tables(found)),
            in_markdown(self.explanation(found)),
        ]
        picture = f"![{self.title}, layer by layer.]({self.name}.png)"
        signed = f"{as_code(made['command'])} at commit {made['commit']}, {made['machine']}, {versions}"
        return "\n\n".join([*parts, picture, signed]) + "\n" + writing.COMMENT

    def as_json(self, found: Sequence[tuple[Specimen, Found]]) -> str:
        """Return every number; null stands for one that is not defined, "inf" for one without bound."""
        models = [
            {"name": name, "data": specimen.data, "settings": specimen.settings, **_plain(self.numbers(one))}
            for name, (specimen, one) in zip(_names(found), found, strict=True)
        ]
        content = {writing.MARK: __version__, "explanation": self.explanation(found), **provenance(), "models": models}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _names(found: Sequence[tuple[Specimen, Any]]) -> list[str]:
    """Return short names of the models that tell them apart: the last part of each path, or as many as it takes.

    They are written on one line of pictures and tables, whatever a folder is called.
    """
    paths = [Path(visible(specimen.name)).parts for specimen, _ in found]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"Models are told apart by their names, and {found[0][0].name} is named twice. Leave one out.")


def _plain(value: Any) -> Any:
    """Return tensors, and numbers that JSON has none for, as plain values."""
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value > 0 else None
    return value


# --- Position correlation -----------------------------------------------------------------------------------------


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _distance(value: float, reach: float) -> str:
    return "–" if math.isnan(value) else f"> {reach:.1f}" if math.isinf(value) else f"{value:.2f}"


def _measured(measures: Sequence[float], reach: float) -> Cells:
    two_dimensionality, half_distance, layer_difference = measures
    return _number(two_dimensionality), _distance(half_distance, reach), _number(layer_difference)


def _layers_of(found: Correlation) -> list[Cells]:
    measures = torch.stack([found.two_dimensionality, found.half_distance, found.layer_difference], dim=1)
    return [_measured(layer, found.reach) for layer in measures.tolist()]


def _model_of(found: Correlation) -> Cells:
    return by(found.grid), *_measured(astuple(found.shape), found.reach)


def _correlations(found: Mapping[str, Correlation]) -> "Figure":
    if len(grids := {one.grid for one in found.values()}) > 1:
        raise UsageError(
            f"One picture shows models on one grid of patches; received {', '.join(map(by, sorted(grids)))}. Give "
            "--grid, or analyse them one by one."
        )
    return plots.correlations(found)


CORRELATION = Sheet[Correlation](
    name="correlation",
    title="Position correlation",
    of_models=("grid", "two-dimensionality", "half distance", "layer difference"),
    of_layers=("two-dimensionality", "half distance", "layer difference"),
    model=_model_of,
    layers=_layers_of,
    numbers=lambda found: {
        "grid": found.grid,
        "reach": found.reach,
        "two_dimensionality": found.two_dimensionality,
        "half_distance": found.half_distance,
        "layer_difference": found.layer_difference,
        "shape": asdict(found.shape),
        "token": divmod(found.token, found.grid[1]),
        "of_token": found.of_token,
    },
    draw=_correlations,
    said=(
        "Cosine similarity of what the positions of two patches bring to a layer's attention (equation 12). "
        "two-dimensionality: 1 where it falls off along columns as along rows, 0 where along one of them alone. half "
        "distance: in patches, where it has fallen to half; > where it has not in the whole grid. layer difference: "
        "between a layer and the others, mean of absolute differences. Of a model: mean, median and mean over layers."
    ),
)


# --- Decomposition ------------------------------------------------------------------------------------------------


def _spread(mean: float, spread: float) -> str:
    return f"{mean:.3f} ± {spread:.3f}".replace("-", "−")


def _weights_of(found: Decomposition) -> list[Cells]:
    pairs = zip(found.mean.T.tolist(), found.spread.T.tolist(), strict=True)
    return [tuple(map(_spread, means, spreads)) for means, spreads in pairs]


def _mean_weights_of(found: Decomposition) -> Cells:
    whole = found.of_patches.flatten(1)
    weights = map(_spread, whole.mean(1).tolist(), whole.std(1, correction=0).tolist())
    return *weights, f"{found.error:.1e}".replace("-", "−")


DECOMPOSITION = Sheet[Decomposition](
    name="decomposition",
    title="Weights of tokens, positions and bias",
    of_models=("λ₁, tokens", "λ₂, positions", "λ₃, bias", "error of (6)"),
    of_layers=("λ₁, tokens", "λ₂, positions", "λ₃, bias"),
    model=_mean_weights_of,
    layers=_weights_of,
    numbers=lambda found: {
        "grid": found.grid,
        "images": found.weights.shape[2],
        "mean": found.mean,
        "spread": found.spread,
        "prefix_mean": found.of_prefix.mean(2),
        "prefix_spread": found.of_prefix.std(2, correction=0),
        "second_by_patch": found.of_positions,
        "error": found.error,
    },
    draw=plots.decompositions,
    said=(
        "LN(x̃ + ω) = λ₁·LN(x̃) + λ₂·LN(ω) + λ₃·β (equation 6) in the norm before attention, mean ± standard deviation "
        "over images and patches. error of (6): largest difference between its sides in float64, beside their largest "
        "number."
    ),
)

SHEETS: Mapping[str, Sheet[Any]] = {sheet.name: sheet for sheet in (CORRELATION, DECOMPOSITION)}

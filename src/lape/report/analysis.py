"""An analysis for people: tables for the terminal and as Markdown, a picture, and every number as JSON."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from lape import __version__
from lape.analysis import Correlation, Decomposition
from lape.analysis.subjects import Subject
from lape.errors import UsageError
from lape.files import writing
from lape.files.characters import as_code, in_markdown, visible
from lape.report import plots
from lape.report.table import Table
from lape.surgery.layers import grid_text
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
    legend: str

    def places(self, folder: Path) -> tuple[Path, Path, Path]:
        """Return where `write` puts picture, table and numbers."""
        return folder / f"{self.name}.png", folder / f"{self.name}.md", folder / f"{self.name}.json"

    def write(self, results: Sequence[tuple[Subject, Found]], folder: Path) -> Path:
        """Write NAME.png, .md and .json into a folder; return the picture's path.

        Raises UsageError for models that cannot be told apart or drawn together and where another's file is in the way,
        RunError where the disk refuses.
        """
        figure = self.draw(dict(zip(_names(results), (one for _, one in results), strict=True)))
        picture, table, numbers = self.places(folder)
        drawn = plots.png(figure, dots_per_inch=150)
        writing.write_marked({picture: drawn, table: self.markdown(results), numbers: self.as_json(results)})
        return picture

    def tables(self, results: Sequence[tuple[Subject, Found]]) -> list[Table]:
        """Return the table of models and that of layers."""
        models: list[Cells] = []
        layers: list[Cells] = []
        for name, (_, one) in zip(_names(results), results, strict=True):
            models.append((name, *self.model(one)))
            layers += [(name, str(number), *cells) for number, cells in enumerate(self.layers(one), start=1)]
        return [
            Table(("model", *self.of_models), models),
            Table(("model", "layer", *self.of_layers), layers),
        ]

    def explanation(self, results: Sequence[tuple[Subject, Found]]) -> str:
        """Say what was looked at and how the numbers read."""
        looked = dict.fromkeys(subject.data for subject, _ in results if subject.data)
        return " ".join([*(f"On {each}." for each in looked), self.legend])

    def terminal(self, results: Sequence[tuple[Subject, Found]]) -> "Group":
        """Return tables and explanation for rich."""
        from rich.console import Group
        from rich.text import Text

        models, layers = self.tables(results)
        shown = [models.terminal(), Text(), layers.terminal(ruled=True), Text()]
        return Group(*shown, Text(self.explanation(results)))

    def markdown(self, results: Sequence[tuple[Subject, Found]]) -> str:
        """Return tables, explanation and provenance as Markdown."""
        origin = provenance()
        versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
        parts = [
            f"# {self.title}",
            *(table.markdown() for table in self.tables(results)),
            in_markdown(self.explanation(results)),
        ]
        picture = f"![{self.title}, layer by layer.]({self.name}.png)"
        signed = f"{as_code(origin['command'])} at commit {origin['commit']}, {origin['machine']}, {versions}"
        return "\n\n".join([*parts, picture, signed]) + "\n" + writing.COMMENT

    def as_json(self, results: Sequence[tuple[Subject, Found]]) -> str:
        """Return every number; null stands for one that is not defined, "inf" for one without bound."""
        models = [
            {"name": name, "data": subject.data, "settings": subject.settings, **_plain(self.numbers(one))}
            for name, (subject, one) in zip(_names(results), results, strict=True)
        ]
        explanation = self.explanation(results)
        content = {writing.MARK: __version__, "explanation": explanation, **provenance(), "models": models}
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _names(results: Sequence[tuple[Subject, Any]]) -> list[str]:
    """Return short names of the models that tell them apart: the last part of each path, or as many as it takes.

    They are written on one line of pictures and tables, whatever a folder is called.
    """
    paths = [Path(visible(subject.name)).parts for subject, _ in results]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    raise UsageError(f"Models are told apart by their names, and {results[0][0].name} is named twice. Leave one out.")


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


def _layers_of(correlations: Correlation) -> list[Cells]:
    measures = torch.stack(
        [correlations.two_dimensionality, correlations.half_distance, correlations.layer_difference], dim=1
    )
    return [_measured(layer, correlations.reach) for layer in measures.tolist()]


def _model_of(correlations: Correlation) -> Cells:
    return grid_text(correlations.grid), *_measured(astuple(correlations.shape), correlations.reach)


def _correlations(by_model: Mapping[str, Correlation]) -> "Figure":
    if len(grids := {one.grid for one in by_model.values()}) > 1:
        raise UsageError(
            f"One picture shows models on one grid of patches; received {', '.join(map(grid_text, sorted(grids)))}. "
            "Give --grid, or analyse them one by one."
        )
    return plots.correlations(by_model)


CORRELATION = Sheet[Correlation](
    name="correlation",
    title="Position correlation",
    of_models=("grid", "two-dimensionality", "half distance", "layer difference"),
    of_layers=("two-dimensionality", "half distance", "layer difference"),
    model=_model_of,
    layers=_layers_of,
    numbers=lambda one: {
        "grid": one.grid,
        "reach": one.reach,
        "two_dimensionality": one.two_dimensionality,
        "half_distance": one.half_distance,
        "layer_difference": one.layer_difference,
        "shape": asdict(one.shape),
        "token": divmod(one.token, one.grid[1]),
        "of_token": one.of_token,
    },
    draw=_correlations,
    legend=(
        "Cosine similarity of what the positions of two patches bring to a layer's attention (equation 12). "
        "two-dimensionality: 1 where it falls off along columns as along rows, 0 where along one of them alone. half "
        "distance: in patches, where it has fallen to half; > where it has not in the whole grid. layer difference: "
        "between a layer and the others, mean of absolute differences. Of a model: mean, median and mean over layers."
    ),
)


# --- Decomposition ------------------------------------------------------------------------------------------------


def _spread(mean: float, spread: float) -> str:
    return f"{mean:.3f} ± {spread:.3f}".replace("-", "−")


def _weights_of(weights: Decomposition) -> list[Cells]:
    pairs = zip(weights.mean.T.tolist(), weights.spread.T.tolist(), strict=True)
    return [tuple(map(_spread, means, spreads)) for means, spreads in pairs]


def _mean_weights_of(weights: Decomposition) -> Cells:
    whole = weights.of_patches.flatten(1)
    cells = map(_spread, whole.mean(1).tolist(), whole.std(1, correction=0).tolist())
    return *cells, f"{weights.error:.1e}".replace("-", "−")


DECOMPOSITION = Sheet[Decomposition](
    name="decomposition",
    title="Weights of tokens, positions and bias",
    of_models=("λ₁, tokens", "λ₂, positions", "λ₃, bias", "error of (6)"),
    of_layers=("λ₁, tokens", "λ₂, positions", "λ₃, bias"),
    model=_mean_weights_of,
    layers=_weights_of,
    numbers=lambda one: {
        "grid": one.grid,
        "images": one.weights.shape[2],
        "mean": one.mean,
        "spread": one.spread,
        "prefix_mean": one.of_prefix.mean(2),
        "prefix_spread": one.of_prefix.std(2, correction=0),
        "second_by_patch": one.of_positions,
        "error": one.error,
    },
    draw=plots.decompositions,
    legend=(
        "LN(x̃ + ω) = λ₁·LN(x̃) + λ₂·LN(ω) + λ₃·β (equation 6) in the norm before attention, mean ± standard deviation "
        "over images and patches. error of (6): largest difference between its sides in float64, beside their largest "
        "number."
    ),
)

SHEETS: Mapping[str, Sheet[Any]] = {sheet.name: sheet for sheet in (CORRELATION, DECOMPOSITION)}

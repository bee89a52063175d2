"""The pictures: learning curves, maps of position correlation, and the weights of equation 6 over the layers."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from lape.analysis import Correlation, Decomposition
from lape.data.sizes import Size
from lape.files import writing
from lape.files.characters import visible
from lape.report import words
from lape.studies.statistics import BASELINE, LAPE, Combination, Difference, FinishedRun, SummaryRow, Way
from lape.studies.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, which stay apart for colour-blind readers; the baseline is grey, and dashed besides.
HUES = {"lape": "#D55E00", "lape-sharing": "#CC79A7", "shared": "#0072B2", "unshared": "#009E73"}
SPARE = ("#E69F00", "#56B4E9")
WEIGHTS = {"λ₁, tokens": "#0072B2", "λ₂, positions": "#D55E00", "λ₃, bias": "#009E73"}
# Of LN_ω's stand-ins those without Norm are yellow to brown, those with it blue; the stroke tells the gain.
STAND_INS = {
    **{"identity": "#E8C500", "scalar": "#CFA000", "scale": "#B08040", "affine": "#94604A"},
    **{"norm": "#80C8F0", "scalar-norm": "#3A9BDC", "scale-norm": "#2070C0"},
}
STROKES = {"scalar": "--", "scalar-norm": "--", "scale": "-.", "scale-norm": "-.", "affine": ":"}
SIDE, HEAD = 0.92, 0.5  # inches: a map, and the titles above a block of maps


@dataclass(frozen=True)
class Theme:
    """The colours that follow the reader's light or dark setting."""

    name: str
    ink: str
    faint: str
    paper: str
    baseline: str


@dataclass(frozen=True)
class Maps:
    """The position correlation of one table under every join, in models trained with one seed."""

    seed: int
    by_join: Mapping[str, Correlation]


LIGHT = Theme("light", ink="#1d1f21", faint="#d5d8dc", paper="#ffffff", baseline="#6b7075")
DARK = Theme("dark", ink="#e6e6e3", faint="#3c4043", paper="#16181a", baseline="#a4a9ae")


@dataclass(frozen=True)
class Panel:
    """What is looked at together: ways of joining with one table."""

    title: str
    pe: str
    ways: tuple[Way, ...]


def panels(study: Study) -> list[Panel]:
    """Return a panel for each table, and one more where LN_ω has stand-ins or the start is another one."""
    shown = []
    for pe in study.pes:
        ways = tuple(row.way for row in study.rows if row.pe == pe)
        usual = tuple(way for way in ways if not way.other_than_usual)
        if usual:
            shown.append(Panel(pe, pe, usual))
        if len(usual) < len(ways):
            beside = tuple(way for way in ways if way.other_than_usual or way in (BASELINE, LAPE))
            shown.append(Panel(f"{pe}, in place of LN", pe, beside))
    return shown


def learning_curves(study: Study, theme: Theme = LIGHT, columns: int | None = None) -> "Figure":
    """Draw the validation score over the steps, a line per way of joining: mean, band from worst to best seed.

    A mark stands at one third of training. `columns` is how many panels stand side by side, by default three at most.
    """
    shown = panels(study)
    columns = min(columns or (3 if len(shown) != 4 else 2), len(shown))
    deep = -(-len(shown) // columns)
    palette = hues(study.ways, theme)
    beside = _beside(max(3.4 * columns + 0.4, 4.6), palette)
    figure = _figure(theme, max(3.4 * columns + 0.4, 4.6), 2.75 * deep + 0.4 + 0.17 * -(-len(palette) // beside))
    axes = figure.subplots(deep, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for spare in axes[len(shown) :]:
        spare.remove()
    for place, (axis, panel) in enumerate(zip(axes, shown, strict=False)):
        _style(axis, theme)
        axis.set_title(panel.title, loc="left", fontsize=10, color=theme.ink)
        axis.grid(axis="y", color=theme.faint, linewidth=0.6)
        if study.compares_positions and study.reference and panel.pe != study.reference[1]:
            _context(axis, _mean_curve([result.run for result in study.of(*study.reference).values()]), study, theme)
        for way in panel.ways:
            runs = [result.run for result in study.of(way, panel.pe).values()]
            _curve(axis, runs, way, palette[way], theme, band=min(0.2, 0.6 / len(panel.ways)))
        axis.set_xlim(left=0)
        _mark_third(axis, next(iter(study.results.values())).run.third.step, theme)
        if place % columns == 0:
            axis.set_ylabel(f"validation {study.measure}, %")
        if place + columns >= len(shown):
            axis.set_xlabel("training step")
            axis.tick_params(labelbottom=True)
    drawn = axes[: len(shown)]
    lines = {label: line for axis in drawn for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    labels = _in_order(study, lines)
    figure.legend(
        *([lines[label] for label in labels], labels), loc="outside upper left", ncols=beside, frameon=False,
        labelcolor=theme.ink, fontsize=9,
    )  # fmt: skip
    return figure


def _in_order(study: Study, labels: Iterable[str]) -> list[str]:
    """Sort the labels of a legend as the ways are sorted; the reference comes last."""
    ways = list(map(str, study.ways))
    return sorted(labels, key=lambda label: ways.index(label) if label in ways else len(ways))


def _beside(width: float, ways: Iterable[Way]) -> int:
    """How many entries of a legend stand side by side in so many inches."""
    return max(1, int(width / (0.65 + 0.075 * max(len(str(way)) for way in ways))))


def hues(ways: tuple[Way, ...], theme: Theme) -> dict[Way, str]:
    """Give every way of joining its colour, the same in every picture."""
    spare = cycle(SPARE)
    return {
        way: theme.baseline if way == BASELINE else STAND_INS.get(way.pe_norm) or HUES.get(str(way)) or next(spare)
        for way in ways
    }


def _stroke(way: Way) -> str:
    return "--" if way == BASELINE else STROKES.get(way.pe_norm, "-")


def _curve(axis: "Axes", runs: list[FinishedRun], way: Way, hue: str, theme: Theme, band: float) -> None:
    by_step: dict[int, list[float]] = {}
    for point in (point for run in runs for point in run.curve):
        by_step.setdefault(point.step, []).append(point.score)
    steps = sorted(by_step)
    lowest, means, highest = ([of(by_step[step]) for step in steps] for of in (min, fmean, max))
    axis.fill_between(steps, lowest, highest, color=hue, alpha=band, lw=0)
    axis.plot(steps, means, color=hue, linewidth=1.8, linestyle=_stroke(way), label=str(way))
    third = steps.index(runs[0].third.step)
    axis.plot(steps[third], means[third], "o", color=hue, markersize=6, markeredgecolor=theme.paper)


def _mean_curve(runs: list[FinishedRun]) -> list[tuple[float, float]]:
    by_step: dict[int, list[float]] = {}
    for point in (point for run in runs for point in run.curve):
        by_step.setdefault(point.step, []).append(point.score)
    return [(step, fmean(by_step[step])) for step in sorted(by_step)]


def _context(axis: "Axes", points: Sequence[tuple[float, float]], study: Study, theme: Theme) -> "dict[str, Line2D]":
    """Draw the reference behind the ways of another table, to be compared with; returns the line by its label."""
    label = f"{words.beside(study)}, in every panel"
    (line,) = axis.plot(*zip(*points, strict=True), color=theme.ink, linewidth=0.9, alpha=0.45, zorder=1, label=label)
    return {label: line}


def _mark_third(panel: "Axes", step: int, theme: Theme) -> None:
    panel.axvline(step, color=theme.ink, linewidth=0.7, linestyle=":", zorder=0)
    at = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    clear = {"facecolor": theme.paper, "edgecolor": "none", "alpha": 0.8, "pad": 1}
    panel.annotate("⅓ of training", (step, 0), (4, 4), fontsize=8, color=theme.ink, bbox=clear, **at)


def differences(study: Study, theme: Theme = LIGHT) -> "Figure":
    """Draw the score minus the baseline's: a stroke for the mean, a line for its 95 % interval, dots for the seeds."""
    return _differences(study, [(row, row.difference) for row in study.rows if row.difference], str(BASELINE), theme)


def beside(study: Study, theme: Theme = LIGHT) -> "Figure":
    """Draw the score of all positions minus the reference's, the best first, as `differences` does."""
    ranked = sorted(study.rows, key=lambda row: -row.score.mean)
    return _differences(study, [(row, row.beside) for row in ranked if row.beside], words.beside(study), theme)


def _differences(study: Study, rows: Sequence[tuple[SummaryRow, Difference]], base: str, theme: Theme) -> "Figure":
    labels = [f"{row.way}, {row.pe}" for row, _ in rows]
    figure = _figure(theme, 3.3 + 0.072 * max(map(len, labels)), 0.9 + 0.36 * len(rows))
    panel = figure.subplots()
    _style(panel, theme)
    panel.axvline(0, color=theme.ink, linewidth=0.8)
    palette = hues(study.ways, theme)
    for place, (row, difference) in enumerate(rows):
        hue, points = palette[row.way], list(difference.by_seed.values())
        if difference.interval is not None:
            panel.plot(difference.interval, (place, place), color=hue, linewidth=2, solid_capstyle="butt")
        panel.plot(points, [place + 0.24] * len(points), "o", color=hue, markersize=4.5, alpha=0.6, markeredgewidth=0)
        panel.plot(difference.mean, place, "|", color=hue, markersize=15, markeredgewidth=2.5)
    panel.set_yticks(range(len(rows)), labels)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0, labelsize=9)
    panel.grid(axis="x", color=theme.faint, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.set_xlabel(f"{study.measure} minus {base}, points")
    return figure


def score_by_size(study: Study, theme: Theme = LIGHT, columns: int | None = None) -> "Figure":
    """Draw the score over the sizes of images, a line per way of joining, a panel per table, as `learning_curves` does.

    Sizes stand in the order of their areas, equally far apart; a dotted line marks those of training.
    """
    shown = panels(study)
    sizes = sorted(study.sizes, key=lambda size: (size.height * size.width, size))
    columns = min(columns or (3 if len(shown) != 4 else 2), len(shown))
    deep = -(-len(shown) // columns)
    palette = hues(study.ways, theme)
    width = max(3.4 * columns + 0.4, 4.6)
    beside = _beside(width, palette)
    figure = _figure(theme, width, 2.75 * deep + 0.4 + 0.17 * -(-len(palette) // beside))
    axes = figure.subplots(deep, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for spare in axes[len(shown) :]:
        spare.remove()
    lines: dict[str, Any] = {}
    for place, (axis, panel) in enumerate(zip(axes, shown, strict=False)):
        _style(axis, theme)
        axis.set_title(panel.title, loc="left", fontsize=10, color=theme.ink)
        axis.grid(axis="y", color=theme.faint, linewidth=0.6)
        for number in (number for number, size in enumerate(sizes) if size in study.trained):
            axis.axvline(number, color=theme.ink, linewidth=0.7, linestyle=":", zorder=0)
        if study.compares_positions and study.reference and panel.pe != study.reference[1]:
            points = [(number, _scores(study, *study.reference, size)) for number, size in enumerate(sizes)]
            lines |= _context(axis, [(number, fmean(scores)) for number, scores in points if scores], study, theme)
        for way in panel.ways:
            by_size = {
                number: scores for number, size in enumerate(sizes) if (scores := _scores(study, way, panel.pe, size))
            }
            lowest, means, highest = ([of(scores) for scores in by_size.values()] for of in (min, fmean, max))
            axis.fill_between(
                [*by_size], lowest, highest, color=palette[way], alpha=min(0.2, 0.6 / len(panel.ways)), lw=0
            )
            (lines[str(way)],) = axis.plot(
                [*by_size], means, color=palette[way], linewidth=1.8, linestyle=_stroke(way), marker="o", markersize=3.5
            )
        axis.set_xticks(range(len(sizes)), list(map(str, sizes)), rotation=30 if len(sizes) > 4 else 0)
        axis.set_xlim(-0.3, len(sizes) - 0.7)
        if place % columns == 0:
            axis.set_ylabel(f"validation {study.measure}, %")
        if place + columns >= len(shown):
            axis.set_xlabel("size of the images")
            axis.tick_params(labelbottom=True)
    labels = _in_order(study, lines)
    figure.legend(
        *([lines[label] for label in labels], labels), loc="outside upper left", ncols=beside, frameon=False,
        labelcolor=theme.ink, fontsize=9,
    )  # fmt: skip
    return figure


def _scores(study: Study, way: Way, pe: str, size: Size) -> list[float]:
    """The scores of one way and table at a size, by seed; none where it is not taken."""
    judged = [
        (study.at_sizes[Combination(way, pe, seed)].by_size[size], one) for seed, one in study.of(way, pe).items()
    ]
    return [at.metrics[result.record["score"]] for at, result in judged if at.refusal is None]


def weights_by_depth(study: Study, theme: Theme = LIGHT, columns: int | None = None) -> "Figure":
    """Draw λ1, λ2, λ3 over the layers of models with the default join, a panel per table, as `learning_curves` does."""
    by_table: dict[str, list[Sequence[Sequence[float]]]] = {}
    for (way, pe, _), analysis in study.analyses.items():
        if way == BASELINE and analysis.weights is not None:
            by_table.setdefault(pe, []).append(analysis.weights)
    columns = min(columns or 3, len(by_table))
    deep = -(-len(by_table) // columns)
    figure = _figure(theme, max(3.4 * columns + 0.4, 4.6), 2.4 * deep + 0.45)
    axes = figure.subplots(deep, columns, sharex=True, sharey=True, squeeze=False).flatten().tolist()
    for spare in axes[len(by_table) :]:
        spare.remove()
    for place, (axis, (pe, seeds)) in enumerate(zip(axes, by_table.items(), strict=False)):
        _style(axis, theme)
        axis.set_title(pe, loc="left", fontsize=10, color=theme.ink)
        axis.grid(axis="y", color=theme.faint, linewidth=0.6)
        layers = range(1, len(seeds[0][0]) + 1)
        for label, hue, of_seeds in zip(WEIGHTS, WEIGHTS.values(), zip(*seeds, strict=True), strict=True):
            lowest, means, highest = ([of(layer) for layer in zip(*of_seeds, strict=True)] for of in (min, fmean, max))
            axis.fill_between(layers, lowest, highest, color=hue, alpha=0.2, lw=0)
            axis.plot(layers, means, color=hue, linewidth=1.8, marker="o", markersize=3.5, label=label)
        axis.set_xticks(layers)
        if place % columns == 0:
            axis.set_ylabel("weight in equation 6")
        if place + columns >= len(by_table):
            axis.set_xlabel("layer")
            axis.tick_params(labelbottom=True)
    lines, labels = axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper left", ncols=3, frameon=False, labelcolor=theme.ink, fontsize=9)
    return figure


def correlation_maps(maps: Maps, theme: Theme = LIGHT) -> "Figure":
    """Draw the position correlation of one table under each join, as `correlations` does."""
    return correlations(maps.by_join, theme)


def correlations(by_model: Mapping[str, Correlation], theme: Theme = LIGHT) -> "Figure":
    """Draw the position correlation of models on one grid: models from above down, layers from left to right.

    First the N×N maps of all models, then one token's row of each, folded to the grid, with a cross on the token. One
    colour scale serves all maps.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    scale = Normalize(-1, 1)
    some = next(iter(by_model.values()))
    depth, (height, width) = max(len(one.maps) for one in by_model.values()), some.grid
    heights = [SIDE * len(by_model) * share + HEAD for share in (1, min(1, height / width))]
    figure = _figure(theme, max(SIDE * depth + 0.9 + 0.085 * max(map(len, by_model)), 4.6), sum(heights))
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    token_row, token_column = divmod(some.token, width)
    for part, title in (
        (upper, f"every patch with every patch ({height * width} × {height * width})"),
        (lower, f"patch in row {token_row + 1}, column {token_column + 1} (×) with the {height} × {width} patches"),
    ):
        part.set_facecolor(theme.paper)
        part.suptitle(title, fontsize=9, color=theme.ink, x=0.01, ha="left")
        panels = part.subplots(len(by_model), depth, squeeze=False)
        for line, (name, one) in zip(panels, by_model.items(), strict=True):
            for spare in line[len(one.maps) :]:
                spare.set_visible(False)
            for layer, panel in enumerate(line[: len(one.maps)]):
                picture = one.maps[layer] if part is upper else one.of_token[layer]
                panel.imshow(picture.numpy(), cmap="RdBu_r", norm=scale, interpolation="auto")
                _style(panel, theme)
                panel.set(xticks=[], yticks=[])
                if part is lower:
                    for colour, weight in (("#000000", 2.6), ("#ffffff", 1.2)):
                        panel.plot(token_column, token_row, "x", color=colour, markersize=5, markeredgewidth=weight)
                if layer == 0:
                    panel.set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center", parse_math=False)
                if one is some:
                    panel.set_title(f"layer {layer + 1}" if layer == 0 else str(layer + 1), fontsize=8, color=theme.ink)
        bar = part.colorbar(ScalarMappable(scale, "RdBu_r"), ax=panels, fraction=0.04, pad=0.01, aspect=20)
        bar.set_ticks([-1, -0.5, 0, 0.5, 1])
        bar.set_label("cosine similarity", fontsize=8, color=theme.ink)
        bar.ax.tick_params(labelsize=7, colors=theme.ink)
        bar.outline.set_edgecolor(theme.faint)
    return figure


def decompositions(by_model: Mapping[str, Decomposition], theme: Theme = LIGHT) -> "Figure":
    """Draw λ1, λ2, λ3 of models over their layers, and beneath each layer its λ2 by patch.

    A line is the mean over images and patches, a band one standard deviation to each side. One axis and one colour
    scale serve all models.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    depth = max(one.mean.shape[1] for one in by_model.values())
    tallest = max(min(1, one.grid[0] / one.grid[1]) for one in by_model.values())
    scale = Normalize(0, max(float(one.of_positions.max()) for one in by_model.values()))
    figure = _figure(theme, max(SIDE * depth + 1.5, 4.6), (2.1 + SIDE * tallest + HEAD) * len(by_model) + 0.25)
    above: Axes | None = None
    parts = figure.subfigures(len(by_model), 1, squeeze=False)[:, 0]
    for part, (name, one) in zip(parts, by_model.items(), strict=True):
        part.set_facecolor(theme.paper)
        part.suptitle(name, fontsize=10, color=theme.ink, x=0.01, ha="left", parse_math=False)
        cells = part.add_gridspec(2, depth, height_ratios=(2.1, SIDE * tallest))
        above = lines = part.add_subplot(cells[0, :], sharex=above, sharey=above)
        _style(lines, theme)
        layers = range(1, one.mean.shape[1] + 1)
        for mean, spread, (label, hue) in zip(one.mean, one.spread, WEIGHTS.items(), strict=True):
            lines.fill_between(layers, mean - spread, mean + spread, color=hue, alpha=0.2, lw=0)
            lines.plot(layers, mean, color=hue, linewidth=1.8, marker="o", markersize=3.5, label=label)
        lines.set(xlim=(0.5, depth + 0.5), ylabel="weight in (6)")
        lines.set_xticks(layers, [f"layer {number}" if number == 1 else str(number) for number in layers])
        lines.grid(axis="y", color=theme.faint, linewidth=0.6)
        maps = [part.add_subplot(cells[1, layer]) for layer in range(len(layers))]
        for panel, picture in zip(maps, one.of_positions, strict=True):
            panel.imshow(picture.numpy(), cmap="viridis", norm=scale, interpolation="auto")
            _style(panel, theme)
            panel.set(xticks=[], yticks=[])
        maps[0].set_ylabel("λ₂ by patch", fontsize=9)
        bar = part.colorbar(ScalarMappable(scale, "viridis"), ax=maps, fraction=0.04, pad=0.01, aspect=12)
        bar.ax.tick_params(labelsize=7, colors=theme.ink)
        bar.outline.set_edgecolor(theme.faint)
    assert above is not None  # there is a model
    figure.legend(
        *above.get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False, labelcolor=theme.ink
    )
    return figure


# --- A classifier's answers


@dataclass(frozen=True)
class Tile:
    """A picture on a contact sheet, and the lines below it."""

    picture: Image.Image
    lines: tuple[str, ...]


NUMBERED, NAMED = 25, 60  # most classes of a confusion matrix whose counts, and whose names, can be read
TILE, ACROSS, LETTERS = 1.7, 4, 24  # inches, tiles side by side, letters that stand below one


def confusion(matrix: Tensor, names: Sequence[str], theme: Theme = LIGHT) -> "Figure":
    """Draw a confusion matrix (C, C), true classes from above down: counts, coloured by their share of the row."""
    count = len(names)
    side = min(max(0.36 * count, 2.4), 14)
    names = [_short(name) for name in names]
    margin = 0.9 + (0.07 * max(map(len, names)) if count <= NAMED else 0)
    figure = _figure(theme, side + margin + 0.4, side + margin)
    panel = figure.subplots()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    panel.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    _style(panel, theme)
    panel.set(xlabel="named", ylabel="true class")
    if count <= NAMED:
        panel.set_xticks(range(count), names, rotation=90, parse_math=False)
        panel.set_yticks(range(count), names, parse_math=False)
    if count <= NUMBERED:
        for true, named in matrix.nonzero().tolist():
            ink = "#ffffff" if shares[true, named] > 0.5 else "#1d1f21"
            panel.text(named, true, str(int(matrix[true, named])), ha="center", va="center", fontsize=8, color=ink)
    return figure


def contact_sheet(title: str, tiles: Sequence[Tile], theme: Theme = LIGHT) -> "Figure":
    """Draw pictures side by side, each with its lines below it."""
    deep = -(-len(tiles) // ACROSS)
    below = max((len(tile.lines) for tile in tiles), default=0) * 0.16 + 0.1
    figure = _figure(theme, ACROSS * TILE, deep * (TILE + below) + 0.5)
    figure.suptitle(title, fontsize=9, color=theme.ink, x=0.01, ha="left", parse_math=False)
    if not tiles:
        return figure
    panels = figure.subplots(deep, ACROSS, squeeze=False).flatten().tolist()
    for panel in panels:
        panel.set_axis_off()
    for panel, tile in zip(panels, tiles, strict=False):
        small = tile.picture.copy()
        small.thumbnail((320, 320))
        panel.imshow(small, interpolation="nearest")
        lines = "\n".join(map(_short, tile.lines))
        panel.text(0.5, -0.04, lines, transform=panel.transAxes, ha="center", va="top", fontsize=7, color=theme.ink,
                   parse_math=False)  # fmt: skip
    return figure


def _short(text: str) -> str:
    """Return a name on one line, cut where it is long."""
    text = visible(text)
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 1]}…"


def png(figure: "Figure", dots_per_inch: int = 200) -> bytes:
    """Return the figure as a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dots_per_inch, metadata={"Software": writing.MARK})
    return out.getvalue()


def svg(figure: "Figure") -> bytes:
    """Return the figure as an SVG whose letters are outlines: it looks alike where its font is not."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"svg.hashsalt": writing.MARK}):  # the same figure, the same file
        figure.savefig(out, format="svg", metadata={"Creator": writing.MARK, "Date": None})
    return out.getvalue()


def pdf(figure: "Figure") -> bytes:
    """Return the figure as a PDF with TrueType fonts, as publishers ask for."""
    from matplotlib import rc_context

    out = io.BytesIO()
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(out, format="pdf", metadata={"Creator": writing.MARK, "CreationDate": None})
    return out.getvalue()


def webp(figure: "Figure", dots_per_inch: int) -> bytes:
    """Return the figure as a WebP, for browsers: maps of many colours take a quarter of a PNG's bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="webp", dpi=dots_per_inch, pil_kwargs={"quality": 90})
    return out.getvalue()


def _figure(theme: Theme, width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor=theme.paper)


def _style(panel: "Axes", theme: Theme) -> None:
    panel.set_facecolor(theme.paper)
    panel.tick_params(colors=theme.ink, labelsize=8)
    panel.xaxis.label.set_color(theme.ink)
    panel.yaxis.label.set_color(theme.ink)
    for name, spine in panel.spines.items():
        spine.set_color(theme.faint)
        spine.set_visible(name in ("left", "bottom"))

"""Models and recipes as tables for the terminal, and a recipe as a note."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lape.catalogue import Entry
from lape.names import JOINS
from lape.recipes import Recipe
from lape.report.table import Table

if TYPE_CHECKING:
    from rich.console import Group


def models(entries: Iterable[Entry]) -> "Group":
    """Return one line a model for rich."""
    from rich.console import Group
    from rich.text import Text

    rows = [
        (
            entry.name,
            entry.paper or "–",
            "–" if entry.parameters is None else f"{entry.parameters:,}",
            "–" if entry.flops is None else f"{entry.flops / 1e9:.3g}",
            str(max(entry.size)),
            {0: "–", len(JOINS): "all"}.get(len(entry.joins), f"{len(entry.joins)} of {len(JOINS)}"),
        )
        for entry in entries
    ]
    table = Table(("name", "paper", "parameters", "GFLOPs", "size", "joins"), rows, names=2)
    legend = (
        f"joins: {', '.join(JOINS)}; a fixed sinusoid has no unshared (add --pe learnable), ViT-Adapter and Swin no "
        "mpvg. LaPE adds two parameters a channel and layer. size: of the square images that a model is made for; "
        "--img_size sets another. GFLOPs: of one image, an addition and a multiplication counted as two; a detector's "
        "depend on what it finds. UperNet is made with transformers: pip install 'lape[dense]'. Every pre-norm "
        "VisionTransformer of timm takes a join, too."
    )
    return Group(table.terminal(), Text(), Text(legend))


def recipes(chosen: Sequence[Recipe]) -> "Group":
    """Return one line a recipe for rich, below the number of its table."""
    from rich.console import Group
    from rich.text import Text

    groups, rows = [], []
    for recipe in chosen:
        heading = (
            f"Table {recipe.table}: {', below it '.join(recipe.expected)}" if recipe.paper else "None of the paper's"
        )
        for place, by_join in enumerate(recipe.expected.values() or [{}]):  # a line for each measure
            groups.append(heading)
            rows.append(("" if place else recipe.name, " / ".join(f"{number:g}" for number in by_join.values())))
    table = Table(("recipe", "expected, %"), rows)
    legend = (
        "expected: the paper's, or of what is none of the paper's its source's; of two numbers the first is of --join "
        "default, the second of --join lape.",
        "lape recipes NAME shows one as a whole.",
    )
    return Group(table.terminal(groups), Text(), *map(Text, legend))


def note(recipe: Recipe) -> list[str]:
    """Return the lines of a recipe's lab note: command, expectations, open choices and every setting."""
    expected = ", ".join(
        f"{measure} {number:g} % with join={join}"
        for measure, by_join in recipe.expected.items()
        for join, number in by_join.items()
    )
    early = ", ".join(f"{top1:g} % with join={join}" for join, top1 in recipe.at_epoch_100.items())
    lines = [recipe.name, ""]
    if recipe.paper:
        lines.append(f"Paper: Table {recipe.paper['table']}, {recipe.paper['model']}, {recipe.paper['pe']}.")
    lines += [f"Expected: {expected}."] if expected else []
    lines += [f"At epoch 100: {early}."] if early else []
    lines += [f"Command: {recipe.command}"] if recipe.command else []
    lines += [f"Hardware: {recipe.hardware}."] if recipe.hardware else []
    lines += ["", "Choices that its source leaves open:", *(f"- {text}" for text in recipe.open)] if recipe.open else []
    return [*lines, "", "Settings:", *(f"  {key}: {value}" for key, value in recipe.settings.items())]

"""Models and recipes as tables for the terminal, and a recipe as a note."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from lape.models.catalogue import Entry
from lape.recipes import Recipe

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


def models(entries: Iterable[Entry]) -> "Group":
    """Return one line a model for rich."""
    from rich.console import Group
    from rich.text import Text

    from lape.method import JOINS

    names: dict[str, Literal["left", "right"]] = {"name": "left", "paper": "left"}
    numbers: dict[str, Literal["left", "right"]] = {"parameters": "right", "GFLOPs": "right", "size": "right"}
    table = _table({**names, **numbers, "joins": "left"})
    for entry in entries:
        table.add_row(
            entry.name,
            entry.paper or "–",
            "–" if entry.parameters is None else f"{entry.parameters:,}",
            "–" if entry.flops is None else f"{entry.flops / 1e9:.3g}",
            str(max(entry.size)),
            {0: "–", len(JOINS): "all"}.get(len(entry.joins), f"{len(entry.joins)} of {len(JOINS)}"),
        )
    said = (
        f"joins: {', '.join(JOINS)}; a fixed sinusoid has no unshared (add --pe learnable). LaPE adds two parameters "
        "a channel and layer. size: of the square images that a model is made for; --img_size sets another. GFLOPs: of "
        "one image, an addition and a multiplication counted as two; a detector's depend on what it finds. UperNet is "
        "made with transformers: pip install 'lape[dense]'. Every pre-norm VisionTransformer of timm takes a join, too."
    )
    return Group(table, Text(), Text(said))


def recipes(chosen: Sequence[Recipe]) -> "Group":
    """Return one line a recipe for rich, below the number of its table."""
    from rich.console import Group
    from rich.text import Text

    table = _table({"recipe": "left", "expected, %": "right"})
    above = None
    for recipe in chosen:
        if recipe.table != above:
            above = recipe.table
            heading = f"Table {above}: {', below it '.join(recipe.expected)}" if recipe.paper else "None of the paper's"
            table.add_row(Text(heading, style="bold"), "")
        for place, by_join in enumerate(recipe.expected.values() or [{}]):  # a line for each measure
            table.add_row("" if place else f" {recipe.name}", " / ".join(f"{number:g}" for number in by_join.values()))
    said = (
        "expected: the paper's; of two numbers the first is of --join default, the second of --join lape.",
        "lape recipes NAME shows one as a whole.",
    )
    return Group(table, Text(), *map(Text, said))


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
    lines += ["", "Choices that the paper leaves open:", *(f"- {text}" for text in recipe.open)] if recipe.open else []
    return [*lines, "", "Settings:", *(f"  {key}: {value}" for key, value in recipe.settings.items())]


def _table(headings: Mapping[str, Literal["left", "right"]]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for heading, side in headings.items():
        table.add_column(heading, justify=side, no_wrap=True)
    return table

"""One table for every place: the terminal, Markdown, LaTeX and CSV; the page takes its headings and rows."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from lape.files.characters import in_latex, in_markdown, visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table as RichTable

SENTENCE = 40  # letters: LaTeX breaks the lines of longer cells


@dataclass(frozen=True)
class Table:
    """Rows of cells under headings; the first columns, `names` of them, hold words, and the others numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]
    names: int = 1

    def without(self, *headings: str) -> "Table":
        """Return the table without the columns of these headings."""
        return self._of([column for column, heading in enumerate(self.headings) if heading not in headings])

    def terminal(self, groups: Sequence[str] | None = None, ruled: bool = False) -> "Fitting":
        """Return the table for rich: a long name is broken rather than a number.

        `groups` names the group of each row, and each group gets a line with its name; `ruled` draws a line where the
        name in the first column changes.
        """
        return Fitting(self, groups, ruled)

    def cut(self, width: int) -> "Iterator[Table]":
        """Cut the table into tables of so many characters at most, each with the names and as many numbers as it holds.

        Names have half of the width where they need it; one column of numbers each table has in any case.
        """
        names = range(self.names)
        needed = [max((len(str(row[column])) for row in (self.headings, *self.rows)), default=0) for column in names]
        begin = min(sum(needed) + len(needed), width // 2)
        taken, left = [*names], width - begin
        for column in range(self.names, len(self.headings)):
            needs = self.width(column) + (column > 0)
            if needs > left and len(taken) > self.names:
                yield self._of(taken)
                taken, left = [*names], width - begin
            taken.append(column)
            left -= needs
        yield self._of(taken)

    def _of(self, columns: Sequence[int]) -> "Table":
        cut = [[line[column] for column in columns] for line in (self.headings, *self.rows)]
        return Table(cut[0], cut[1:], sum(column < self.names for column in columns))

    def width(self, column: int) -> int:
        """Return how wide a column of numbers is: a heading is broken where it is wider than they are."""
        return max(map(len, [*(str(row[column]) for row in self.rows), *self.headings[column].split(), " "]))

    def whole(self, groups: Sequence[str] | None, ruled: bool) -> "RichTable":
        """Return the table for rich with all its columns beside one another, as `terminal` says."""
        from rich import box
        from rich.console import Group
        from rich.padding import Padding
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
        for column, heading in enumerate(self.headings):
            if column < self.names:
                table.add_column(Text(heading), vertical="bottom", overflow="fold")
                continue
            lines = Group(*(Text(part, justify="right") for part in wrap(heading, self.width(column))))
            table.add_column(lines, justify="right", vertical="bottom", no_wrap=True)
        above: Sequence[Any] | None = None
        for place, row in enumerate(self.rows):
            if groups and (place == 0 or groups[place] != groups[place - 1]):
                table.add_row(Text(groups[place], style="bold"))
            if ruled and above and above[0] != row[0]:
                table.add_section()
            above = row
            first, *others = (Text(str(cell)) for cell in row)
            table.add_row(Padding(first, (0, 0, 0, 1)) if groups else first, *others)
        return table

    def markdown(self) -> str:
        """Return the table as Markdown."""
        rule = [*["---"] * self.names, *["---:"] * (len(self.headings) - self.names)]
        headings, *rows = ([in_markdown(str(cell)) for cell in line] for line in (self.headings, *self.rows))
        return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *rows))

    def latex(self, caption: str) -> str:
        """Return the table for LaTeX's packages booktabs and graphicx, made smaller where it is wider than the page.

        A column with a sentence in it breaks its lines.
        """
        kinds = ["l"] * self.names + ["r"] * (len(self.headings) - self.names)
        for column, cells in enumerate(zip(*self.rows, strict=True)):
            if max(len(str(cell)) for cell in cells) > SENTENCE:
                kinds[column] = r"p{0.3\linewidth}"
        headings = [*map(in_latex, self.headings[: self.names]), *map(self._stacked, range(self.names, len(kinds)))]
        top, *rows = (
            " & ".join(cells) + r" \\"
            for cells in (headings, *([in_latex(str(cell)) for cell in row] for row in self.rows))
        )
        lines = [
            *(r"\begin{table}", r"\centering", r"\footnotesize", r"\setlength{\tabcolsep}{4pt}"),
            *(f"\\caption{{{in_latex(caption)}}}", r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"),
            *(f"\\begin{{tabular}}{{@{{}}{''.join(kinds)}@{{}}}}", r"\toprule", top, r"\midrule"),
            *(*rows, r"\bottomrule", r"\end{tabular}}", r"\end{table}"),
        ]
        return "\n".join(lines) + "\n"

    def _stacked(self, column: int) -> str:
        """Return the heading of a column of numbers for LaTeX, in lines no longer than the numbers need."""
        lines = [in_latex(line) for line in wrap(self.headings[column], self.width(column))]
        return lines[0] if len(lines) == 1 else r"\shortstack[r]{" + r" \\ ".join(lines) + "}"

    def csv(self) -> str:
        """Return the table as CSV: a line for each row, numbers unrounded, and nothing for None."""
        text = io.StringIO()
        lines = (
            [visible(cell) if isinstance(cell, str) else cell for cell in line] for line in (self.headings, *self.rows)
        )
        csv.writer(text, lineterminator="\n").writerows(lines)
        return text.getvalue()


@dataclass(frozen=True)
class Fitting:
    """A table in the terminal: below one another, what has no room beside one another."""

    table: Table
    groups: Sequence[str] | None
    ruled: bool

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[RenderableType]":
        """Yield the tables that fit, as rich asks for them."""
        for number, part in enumerate(self.table.cut(options.max_width - bool(self.groups))):
            if number:
                yield ""
            yield part.whole(self.groups, self.ruled)

"""One table for every place: the terminal, Markdown, LaTeX and CSV; the page takes its headings and rows."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from lape.files.characters import in_latex, in_markdown, visible

if TYPE_CHECKING:
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
        kept = [column for column, heading in enumerate(self.headings) if heading not in headings]
        names = sum(column < self.names for column in kept)
        cut = [[line[column] for column in kept] for line in (self.headings, *self.rows)]
        return Table(cut[0], cut[1:], names)

    def terminal(self, groups: Sequence[str] | None = None, ruled: bool = False) -> "RichTable":
        """Return the table for rich: a long name is broken rather than a number.

        `groups` names the group of each row, and each group gets a line with its name; `ruled` draws a line where the
        name in the first column changes.
        """
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
            # A heading is broken where it is wider than its numbers.
            width = max(map(len, [*(str(row[column]) for row in self.rows), *heading.split(), ""]))
            lines = Group(*(Text(part, justify="right") for part in wrap(heading, max(width, 1))))
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
        """Return the table for LaTeX's package booktabs; a column with a sentence in it breaks its lines."""
        kinds = ["l"] * self.names + ["r"] * (len(self.headings) - self.names)
        for column, cells in enumerate(zip(*self.rows, strict=True)):
            if max(len(str(cell)) for cell in cells) > SENTENCE:
                kinds[column] = r"p{0.3\linewidth}"
        headings, *rows = (
            " & ".join(in_latex(str(cell)) for cell in line) + r" \\" for line in (self.headings, *self.rows)
        )
        lines = [
            *(r"\begin{table}", r"\centering", r"\small", f"\\caption{{{in_latex(caption)}}}"),
            *(f"\\begin{{tabular}}{{@{{}}{''.join(kinds)}@{{}}}}", r"\toprule", headings, r"\midrule"),
            *(*rows, r"\bottomrule", r"\end{tabular}", r"\end{table}"),
        ]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """Return the table as CSV: a line for each row, numbers unrounded, and nothing for None."""
        text = io.StringIO()
        lines = (
            [visible(cell) if isinstance(cell, str) else cell for cell in line] for line in (self.headings, *self.rows)
        )
        csv.writer(text, lineterminator="\n").writerows(lines)
        return text.getvalue()

"""The curve of a run, one row an epoch, as CSV and for TensorBoard."""

import csv
import io
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from lape.checkpoints import write_text

CSV, TENSORBOARD = "curve.csv", "tensorboard"

Row = Mapping[str, float]


class Curves:
    """Both files of a run. They are made anew from the rows of the checkpoint, so a run that was cut off has no gap."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / CSV
        shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)
        self.board = SummaryWriter(str(folder / TENSORBOARD))
        for row in rows:
            self._draw(row)
        self.write(rows)

    def write(self, rows: Sequence[Row]) -> None:
        """Replace the table."""
        text = io.StringIO()
        if rows:
            table = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        write_text(self.path, text.getvalue())

    def add(self, rows: Sequence[Row]) -> None:
        """Write the table, and draw its last row."""
        self.write(rows)
        self._draw(rows[-1])
        self.board.flush()

    def _draw(self, row: Row) -> None:
        for name, value in row.items():
            if name not in ("epoch", "step"):
                self.board.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """End TensorBoard's file."""
        self.board.close()

"""The curve of a run, one row an epoch, as CSV and, where the extra `tensorboard` is installed, for TensorBoard."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import time
from typing import Any

from lape.extras import installed
from lape.files import writing

CSV, TENSORBOARD = "curve.csv", "tensorboard"

CurveRow = Mapping[str, float]


class Curves:
    """Both files of a run. They are made anew from the rows of the checkpoint, so a run that was cut off has no gap.

    TensorBoard's own writer is a thread: where the disk is full it prints a traceback, and the run goes on. Raises
    UsageError where the folder for it is a link.
    """

    def __init__(self, folder: Path, rows: Sequence[CurveRow]) -> None:
        self.path, board = folder / CSV, folder / TENSORBOARD
        self.board: Path | None = None
        if installed("tensorboard"):
            self._begin(board, folder)
        for row in rows:
            self._draw(row)
        self._write(rows)

    def _begin(self, board: Path, folder: Path) -> None:
        writing.make_folder(board, below=folder)
        writing.remove([*writing.unfinished(board), *board.glob("events.out.tfevents.*.lape")])
        self.board = board / f"events.out.tfevents.{int(time())}.lape"
        self.events = io.BytesIO()  # all that `board` holds
        self._append(file_version="brain.Event:2")

    def add(self, rows: Sequence[CurveRow]) -> None:
        """Write both with one more row, the last."""
        self._draw(rows[-1])
        self._write(rows)

    def _draw(self, row: CurveRow) -> None:
        drawn = {name: value for name, value in row.items() if name not in ("epoch", "step")}
        values = [{"tag": name, "simple_value": value} for name, value in drawn.items()]
        self._append(step=int(row["step"]), summary={"value": values})

    def _append(self, **what: Any) -> None:
        if self.board is None:
            return
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        event: Any = event_pb2.Event(wall_time=time(), **what)  # pyright: ignore[reportAttributeAccessIssue]
        RecordWriter(self.events).write(event.SerializeToString())

    def _write(self, rows: Sequence[CurveRow]) -> None:
        text = io.StringIO()
        if rows:
            table = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
            table.writeheader()
            table.writerows(rows)
        writing.write_text(self.path, text.getvalue())
        if self.board is not None:
            writing.write(self.board, lambda file: file.write(self.events.getvalue()))

"""What a model says of pictures: what every kind's answer can do, and the answers of a classifier."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

IN_A_LINE = 3  # classes of a picture


class Sheet(Protocol):
    """A picture to be drawn on, each class in its colour."""

    def fill_pixels(self, labels: Tensor) -> None:
        """Veil every pixel in the colour of its class (H, W)."""
        ...

    def outline_objects(self, boxes: Tensor, masks: Tensor, labels: Sequence[int], captions: Sequence[str]) -> None:
        """Veil masks (n, H, W), and draw boxes (n, 4) as x0 y0 x1 y1 around them, with captions."""
        ...


class Answer(Protocol):
    """What a model says of a picture."""

    def line(self, classes: Sequence[str]) -> str:
        """Say it in a few words."""
        ...

    def records(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Return all of it in plain values, one record for each thing that is said."""
        ...

    def rows(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Return it as the rows of a table, of numbers and words alone."""
        ...

    def legend(self, classes: Sequence[str]) -> list[tuple[int, str]]:
        """Return the classes that there are, and what is to be said of each."""
        ...

    def draw(self, sheet: Sheet) -> None:
        """Draw it where it is."""
        ...


@dataclass(frozen=True)
class LikelyClasses:
    """The likeliest classes of a picture, labels (n,) and probabilities (n,), the first first."""

    labels: Tensor
    probabilities: Tensor

    def line(self, classes: Sequence[str]) -> str:
        """The likeliest, with their probabilities."""
        return ", ".join(text for _, text in self.legend(classes)[:IN_A_LINE])

    def legend(self, classes: Sequence[str]) -> list[tuple[int, str]]:
        """All of them, with their probabilities."""
        shares = zip(self.labels.tolist(), self.probabilities.tolist(), strict=True)
        return [(label, f"{classes[label]} {share:.1%}") for label, share in shares]

    def records(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """Each class with its probability; None where a model that diverged answers no number."""
        shares = zip(self.labels.tolist(), self.probabilities.tolist(), strict=True)
        return [
            {"class": classes[label], "probability": share if math.isfinite(share) else None} for label, share in shares
        ]

    def rows(self, classes: Sequence[str]) -> list[dict[str, Any]]:
        """One row: the likeliest class, and behind it the others by their rank."""
        ranked = enumerate(self.records(classes), start=1)
        return [
            {
                name if rank == 1 else f"{name}_{rank}": value
                for rank, record in ranked
                for name, value in record.items()
            }
        ]

    def draw(self, sheet: Sheet) -> None:
        """Draw nothing: it is said of the whole picture."""


@dataclass(frozen=True)
class NamedClasses:
    """What a classifier said of N images of known classes, the K likeliest classes of each first.

    `labels` (N,) are the true classes, `of_truth` (N,) their probabilities; `likeliest` and `probabilities` are (N, K).
    """

    labels: Tensor
    of_truth: Tensor
    likeliest: Tensor
    probabilities: Tensor

    def at(self, places: Tensor) -> "NamedClasses":
        """Return the same for the images at these places."""
        return NamedClasses(*(getattr(self, field.name)[places] for field in fields(self)))

    def answer(self, place: int) -> LikelyClasses:
        """Return what was said of the image at this place."""
        return LikelyClasses(self.likeliest[place], self.probabilities[place])

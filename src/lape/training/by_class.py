"""What a classifier's answers to known images come to, class by class."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from lape.tasks.answers import NamedClasses


@dataclass(frozen=True)
class OfClass:
    """A class: its images, how many were named so, and its measures in percent; None where one is not defined."""

    name: str
    images: int
    named: int
    precision: float | None  # of images that were named so, the share that are
    recall: float | None  # of images that are of it, the share that were named so
    f1: float | None


@dataclass(frozen=True)
class ByClass:
    """All classes, and what they come to together, in percent.

    `confusion` (C, C) counts images by their true class (rows) and the class that was named (columns). `top` is the
    share of images whose true class is among the `among` likeliest. `of_largest` is what naming always the `largest`
    class of these images reaches, or one of several that are equally large.
    """

    classes: tuple[OfClass, ...]
    confusion: Tensor
    among: int
    top: float
    balanced: float  # mean recall of the classes that have images
    f1: float  # mean F1 of the classes for which it is defined
    largest: tuple[str, ...]
    of_largest: float


def by_class(answers: NamedClasses, names: Sequence[str]) -> ByClass:
    """Count and measure the answers to images of at least one class."""
    from torchmetrics.functional.classification import (
        multiclass_confusion_matrix,
        multiclass_f1_score,
        multiclass_precision,
        multiclass_recall,
    )

    count = len(names)
    named, labels = answers.likeliest[:, 0], answers.labels
    confusion = multiclass_confusion_matrix(named, labels, count)
    precision, recall, f1 = (
        [100 * share for share in measure(named, labels, count, average=None).tolist()]
        for measure in (multiclass_precision, multiclass_recall, multiclass_f1_score)
    )
    images, times = confusion.sum(1).tolist(), confusion.sum(0).tolist()
    # torchmetrics has 0 where a share is of nothing.
    classes = tuple(
        OfClass(
            name,
            images[at],
            times[at],
            precision[at] if times[at] else None,
            recall[at] if images[at] else None,
            f1[at] if images[at] or times[at] else None,
        )
        for at, name in enumerate(names)
    )
    most = max(one.images for one in classes)
    return ByClass(
        classes,
        confusion,
        among=answers.likeliest.shape[1],
        top=100 * float((answers.likeliest == labels[:, None]).any(1).double().mean()),
        balanced=fmean(one.recall for one in classes if one.recall is not None),
        f1=fmean(one.f1 for one in classes if one.f1 is not None),
        largest=tuple(one.name for one in classes if one.images == most),
        of_largest=100 * most / len(labels),
    )


def confused(measured: ByClass) -> list[tuple[str, str, int]]:
    """Return pairs of classes, the true one and the one that was named in its place, and how often; the most first."""
    off = measured.confusion.clone().fill_diagonal_(0)
    pairs = off.nonzero().tolist()
    names = [one.name for one in measured.classes]
    return sorted(
        ((names[true], names[named], int(off[true, named])) for true, named in pairs), key=lambda one: -one[2]
    )


def worst(answers: NamedClasses) -> list[int]:
    """Return the places of the images that were named wrongly, those with the least probable true class first."""
    wrong = (answers.likeliest[:, 0] != answers.labels).nonzero()[:, 0]
    return wrong[torch.argsort(answers.of_truth[wrong], stable=True)].tolist()

"""What a run begins with, in lines that a person reads before it trains."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lape.data.classes import SHARE
from lape.files.characters import plural

if TYPE_CHECKING:
    from lape.training.start import Start

MOST_LISTED = 20  # classes
UNEVEN = 3  # so many times as many images as the smallest class has the largest, and more is worth a word


def lines(start: "Start") -> list[str]:
    """Return the lines: the set, the model, the schedule, and what is done to images."""
    return [*_set(start), _model(start), _schedule(start), _augmentation(start.resolved["augmentation"])]


def _set(start: "Start") -> list[str]:
    train, validation = start.images
    classes = start.resolved["classes"]
    both = f"{train:,} for training and {validation:,} for validation"
    told = [f"Data: {start.set}, {plural(len(classes), 'class', 'classes')}; {both}."]
    counts = {name: numbers for name, numbers in classes.items() if numbers}
    if counts:
        told.append(_classes(counts))
        told += _imbalance(counts, start.experiment.balance)
    if start.held_out:
        told.append(
            f"Held out for validation: {start.experiment.val_split or SHARE:.0%} of each class, drawn by split_seed "
            f"{start.experiment.split_seed}; start.json in the run's folder names them."
        )
    if start.left_out:
        told.append(f"Left out: {plural(len(start.left_out), 'image')} that cannot be read, named in start.json.")
    return told


def _classes(counts: Mapping[str, Mapping[str, int]]) -> str:
    listed = [f"{name} {number['train']}+{number['validation']}" for name, number in counts.items()]
    if len(listed) <= MOST_LISTED:
        return f"Images (training+validation): {', '.join(listed)}."
    sizes = [number["train"] for number in counts.values()]
    return f"Training images of a class: {min(sizes):,} to {max(sizes):,}."


def _imbalance(counts: Mapping[str, Mapping[str, int]], balance: str | None) -> list[str]:
    by_size = sorted(counts, key=lambda name: counts[name]["train"])
    least, most = by_size[0], by_size[-1]
    times = counts[most]["train"] / counts[least]["train"]
    if times < UNEVEN:
        return []
    told = f"{most} has {times:.1f} times the training images of {least}"
    return [
        f"Classes of different size: {told}; evened out by balance {balance}."
        if balance
        else f"Classes of different size: {told}. --balance weights or --balance sampling evens that out."
    ]


def _model(start: "Start") -> str:
    experiment, size = start.experiment, start.resolved["image_size"]
    seen = f"images of {size[0]}x{size[1]}" if size else "images of their own sizes"
    begins = (
        f"weights of {experiment.weights}"
        if experiment.weights
        else "random weights (pretrained ones need fewer images: --weights)"
    )
    return (
        f"Model: {experiment.model}, {seen}, join {experiment.join}, pe {experiment.pe}, "
        f"{start.parameters / 1e6:.2f} million parameters; {begins}."
    )


def _schedule(start: "Start") -> str:
    experiment, resolved = start.experiment, start.resolved
    epoch = resolved["steps_per_epoch"]
    decay = f", layer decay {experiment.layer_decay:g}" if experiment.layer_decay else ""
    recipe = f"recipe {experiment.recipe}; " if experiment.recipe else ""
    return (
        f"Training: {recipe}{plural(start.steps, 'step')} of {plural(experiment.batch_size, 'image')}, "
        f"{epoch:,} an epoch; {experiment.optimizer}, lr {resolved['lr']:g} after {resolved['warmup_steps']:g} steps "
        f"of warm-up, weight decay {experiment.weight_decay:g}{decay}."
    )


def _augmentation(chosen: Mapping[str, Any]) -> str:
    """Name what is not left as it is."""
    without = {} if chosen.get("reprob") else {"remode": None}  # what fills areas that are not erased
    said = {name: value for name, value in {**chosen, **without}.items() if value not in (None, 0, "", (), [])}
    named = [f"{name} {_typed(value)}" for name, value in said.items()]
    return f"Augmentation: {', '.join(named) or 'none'}."


def _typed(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_typed, value))
    return f"{value:g}" if isinstance(value, float) else str(value)

"""What the kinds of task have in common: a model for an experiment on a set, and settings that mean nothing there."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lape.data.classes import PHOTOGRAPHS
from lape.data.pipeline import reseed, seed_of, validation_transform
from lape.data.sources import Source
from lape.errors import UsageError
from lape.experiment import Augmentation, Dense, Experiment
from lape.hosts import find
from lape.models.rebuilding import Build
from lape.models.registry import create_model
from lape.surgery.layers import grid_text
from lape.surgery.operation import positions

Section = TypeVar("Section", Augmentation, Dense)

# Who sets what, in place of the keywords of a model.
SET_BY = {
    **dict.fromkeys(("num_classes", "in_chans"), "the set"),
    **{"drop_path_rate": "--drop_path", "min_size": "--short_side", "max_size": "--long_side"},
}
# The settings of pictures: each kind of task takes some of them.
OF_PICTURES = {
    *("train_images", "img_size", "teacher", "loss", "val_split", "skip_unreadable", "balance", "normalisation"),
    *(field.name for field in (*fields(Augmentation), *fields(Dense))),
}


def refuse_foreign(experiment: Experiment, source: Source, known: Set[str]) -> None:
    """Raise UsageError for a setting of pictures that means nothing to a kind of task, which takes those known."""
    for name in sorted(OF_PICTURES - known):
        if (value := getattr(experiment, name)) is not None:
            raise UsageError(f"{name} {value} means nothing for the pictures of {source.name}: leave it out.")


def filled(experiment: Experiment, default: Section) -> Section:
    """Return what an experiment says of the settings of a section, filled up with a set's own."""
    names = [field.name for field in fields(default)]
    return replace(default, **{name: value for name in names if (value := getattr(experiment, name)) is not None})


def build_model(experiment: Experiment, source: Source, build: Build, options: Mapping[str, Any]) -> Any:
    """Create the model of an experiment for the classes of a set, from its seed.

    Raises UsageError for a keyword that the set or an option sets, and as `create_model` does.
    """
    settings = {
        "num_classes": len(source.classes),
        "in_chans": source.channels,
        "drop_path_rate": experiment.drop_path,
        **options,
    }
    joined = experiment.names._asdict()
    refuse_keywords(experiment.model_args, {name: SET_BY.get(name, f"--{name}") for name in settings | joined})

    def make() -> nn.Module:
        reseed(seed_of(experiment.seed))
        return create_model(experiment.model, **joined, **settings, **experiment.model_args)

    module: Any = build(make, experiment.model_args)
    if experiment.grad_checkpointing:
        module.set_grad_checkpointing(True)
    return module


def refuse_keywords(model_args: Mapping[str, Any], set_by: Mapping[str, str]) -> None:
    """Raise UsageError for a keyword of a model that the set, or an option of its own, sets."""
    for name, value in model_args.items():
        if name in set_by:
            raise UsageError(f"model_args says {name} {value}, which {set_by[name]} says: leave it out.")


def refuse_a_table_of_no_patch(experiment: Experiment, module: nn.Module) -> None:
    """Raise UsageError for a model of pictures of any size whose own size is less than a patch."""
    stem: Any = find(module)[0].patch_embed
    if min(stem.grid_size) < 1:
        raise UsageError(
            f"{experiment.model} cuts images into patches of {grid_text(stem.patch_size)}, and with model_args "
            f"{experiment.model_args} its table is for less than one. Give an img_size of at least "
            f"{max(stem.patch_size)}."
        )


def cut_to_table(source: Source, module: nn.Module, count: int, at_once: int) -> tuple[nn.Module, Iterator[Tensor]]:
    """Return a model's transformer, and validation pictures cut at the centre to the size of its table.

    What is around the transformer has no positions.
    """
    vit: Any = find(module)[0]
    (rows, columns), (tall, wide) = positions(vit).own_grid(), vit.patch_embed.patch_size
    see = validation_transform(source, replace(PHOTOGRAPHS, crop_pct=1.0), (rows * tall, columns * wide))
    order = torch.randperm(len(source.validation), generator=torch.Generator().manual_seed(0))
    parts = order[:count].sort().values.split(at_once)
    return vit, (torch.stack([see(source.validation.picture(index)) for index in part.tolist()]) for part in parts)

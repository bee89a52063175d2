"""From the settings of an experiment to its parts: devices, model, optimiser, schedule."""

import inspect
import os
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer

import lape
from lape.data.pipeline import reseed, seed_of
from lape.data.sources import ImageSource
from lape.errors import UsageError, choose
from lape.experiment import Experiment

# Those of timm.scheduler that need nothing but the number of the step.
SCHEDULES: tuple[str, ...] = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")


def launch(experiment: Experiment) -> Fabric:
    """Start Fabric on the devices of an experiment, or on those that torchrun hands out."""
    devices, nodes = experiment.devices, experiment.nodes
    if torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    try:
        fabric = Fabric(
            accelerator=experiment.accelerator,
            devices=devices,
            num_nodes=nodes,
            precision=experiment.precision,  # pyright: ignore[reportArgumentType]  # Fabric checks the name
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise UsageError(f"Fabric does not take these settings: {error}") from error
    fabric.launch()
    return fabric


def model_of(experiment: Experiment, source: ImageSource) -> tuple[nn.Module, tuple[int, int]]:
    """Create the model of an experiment for a set of images, and return it with the size (H, W) of its images.

    Raises UsageError for names, keywords and sizes that do not fit.
    """
    side = experiment.img_size
    asked = (side, side) if side else source.size
    options: dict[str, Any] = {"num_classes": len(source.classes), "in_chans": source.channels}
    if experiment.drop_path:
        options["drop_path_rate"] = experiment.drop_path
    if asked:
        options["img_size"] = asked
    reseed(seed_of(experiment.seed))
    model: Any = lape.create_model(
        experiment.model,
        join=experiment.join,
        pe=experiment.pe,
        pe_norm=experiment.pe_norm,
        **options | experiment.model_args,
    )
    size = asked or tuple(model.pretrained_cfg["input_size"][-2:])
    patch = model.patch_embed.patch_size
    if any(length % step for length, step in zip(size, patch, strict=True)):
        raise UsageError(
            f"{experiment.model} cuts images into patches of {patch[0]}x{patch[1]}, which do not divide "
            f"{size[0]}x{size[1]} images of {source.name}. Give --img_size a multiple of {patch[0]}, or another model."
        )
    if experiment.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model, size


def optimizer_of(experiment: Experiment, model: nn.Module) -> Optimizer:
    """Create timm's optimiser of that name; what the model's `no_weight_decay` names does not decay."""
    import timm.optim

    optim: Any = timm.optim  # its names are imported from private modules

    choose(dict.fromkeys(optim.list_optimizers()), experiment.optimizer, "an optimiser of timm's")
    options: dict[str, Any] = {"betas": experiment.betas} if experiment.betas else {}
    # A fused step takes a tenth of the time for small models; Fabric cannot clip beneath one that unscales by itself.
    accepted = inspect.signature(optim.get_optimizer_class(experiment.optimizer, bind_defaults=False)).parameters
    if "fused" in accepted and not (experiment.clip_grad and experiment.precision == "16-mixed"):
        options["fused"] = True
    try:
        return optim.create_optimizer_v2(
            model,
            experiment.optimizer,
            lr=experiment.lr,
            weight_decay=experiment.weight_decay,
            momentum=experiment.momentum,
            layer_decay=experiment.layer_decay,
            **options,
        )
    except TypeError as error:
        raise UsageError(f"{experiment.optimizer} does not take these settings: {error}.") from error


def scheduler_of(experiment: Experiment, optimizer: Optimizer, steps: int) -> Any:
    """Create timm's schedule of that name over optimiser steps, of which an epoch has `steps`."""
    from timm.scheduler.scheduler_factory import create_scheduler_v2

    choose(dict.fromkeys(SCHEDULES), experiment.schedule, "a schedule")
    warmup = experiment.epochs / 10 if experiment.warmup_epochs is None else experiment.warmup_epochs
    if warmup > experiment.epochs:
        raise UsageError(f"warmup_epochs {warmup:g} must not be more than epochs {experiment.epochs}: lower it.")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        experiment.schedule,
        num_epochs=experiment.epochs,
        min_lr=experiment.min_lr,
        warmup_lr=experiment.warmup_lr,
        warmup_epochs=warmup,  # pyright: ignore[reportArgumentType]  # halves of epochs are steps
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler

"""From the settings of an experiment to its parts: devices, model, optimiser, schedule, task."""

import inspect
import os
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

import lape
from lape.checkpoints import load
from lape.data.pipeline import reseed, seed_of
from lape.data.sources import ImageSource
from lape.errors import RunError, UsageError, choose
from lape.experiment import Experiment
from lape.tasks.classification import Classification, Distillation
from lape.weights import read

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
    options: dict[str, Any] = {
        "num_classes": len(source.classes),
        "in_chans": source.channels,
        "drop_path_rate": experiment.drop_path,
    }
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
    patch = getattr(model.patch_embed, "multiple_of", model.patch_embed.patch_size)  # a stem may take any size
    if any(length % step for length, step in zip(size, patch, strict=True)):
        raise UsageError(
            f"{experiment.model} cuts images into patches of {patch[0]}x{patch[1]}, which do not divide "
            f"{size[0]}x{size[1]} images of {source.name}. Give --img_size a multiple of {patch[0]}, or another model."
        )
    if experiment.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return model, size


def optimizer_of(experiment: Experiment, model: nn.Module) -> Optimizer:
    """Create timm's optimiser of that name; what the model's `no_weight_decay` names does not decay, unless asked to.

    Raises UsageError for a name that timm does not know, and for an exempt parameter that there is not.
    """
    import timm.optim

    optim: Any = timm.optim  # its names are imported from private modules

    choose(dict.fromkeys(optim.list_optimizers()), experiment.optimizer, "an optimiser of timm's")
    options: dict[str, Any] = {"betas": experiment.betas} if experiment.betas else {}
    # A fused step takes a tenth of the time for small models; Fabric cannot clip beneath one that unscales by itself.
    accepted = inspect.signature(optim.get_optimizer_class(experiment.optimizer, bind_defaults=False)).parameters
    if "fused" in accepted and not (experiment.clip_grad and experiment.precision == "16-mixed"):
        options["fused"] = True
    decay = {"weight_decay": experiment.weight_decay, "no_weight_decay_list": _exempt(model, experiment.also_decay)}
    if experiment.layer_decay is None:
        groups = optim.param_groups_weight_decay(model, **decay)
    else:
        groups = optim.param_groups_layer_decay(model, layer_decay=experiment.layer_decay, **decay)
    lr = experiment.lr * _scale(experiment)
    try:
        return optim.create_optimizer_v2(groups, experiment.optimizer, lr=lr, momentum=experiment.momentum, **options)
    except TypeError as error:
        raise UsageError(f"{experiment.optimizer} does not take these settings: {error}.") from error


def _exempt(model: Any, also_decay: tuple[str, ...]) -> set[str]:
    """The names that the model exempts from decay, without those of which some part is in `also_decay`."""
    exempt = set(getattr(model, "no_weight_decay", set)())
    tables = {name for name, parameter in model.named_parameters() if name in exempt and parameter.ndim > 1}
    for part in also_decay:
        if not any(part in name.split(".") for name in tables):
            raise UsageError(
                f"also_decay names tables and tokens that would be exempt from weight decay; {part!r} is none of "
                f"{', '.join(sorted(tables)) or 'none'}. Leave it out."
            )
    return {name for name in exempt if not set(also_decay) & set(name.split("."))}


def _scale(experiment: Experiment) -> float:
    """What the learning rate is multiplied by."""
    return experiment.batch_size / (experiment.lr_batch or experiment.batch_size)


def schedule_of(experiment: Experiment, optimizer: Optimizer, steps: int) -> Callable[[int], None]:
    """Create timm's schedule of that name; called with the number of a step, it sets the optimiser's learning rates.

    An epoch has `steps`. Raises UsageError for a warm-up that leaves the schedule no time.
    """
    from timm.scheduler.scheduler_factory import create_scheduler_v2

    choose(dict.fromkeys(SCHEDULES), experiment.schedule, "a schedule")
    epochs = experiment.epochs
    warmup = epochs / 10 if experiment.warmup_epochs is None else experiment.warmup_epochs
    if warmup > epochs:
        raise UsageError(f"warmup_epochs {warmup:g} must not be more than epochs {epochs}: lower it.")
    if experiment.warmup_prefix and warmup == epochs:
        raise UsageError(
            f"warmup_prefix begins the schedule behind the warm-up, and {warmup:g} of {epochs} epochs leave it none: "
            "lower warmup_epochs."
        )
    scale = _scale(experiment) if experiment.scale_lr_ends else 1
    scheduler, _ = create_scheduler_v2(
        optimizer,
        experiment.schedule,
        num_epochs=epochs - warmup if experiment.warmup_prefix else epochs,  # pyright: ignore[reportArgumentType]
        min_lr=experiment.min_lr * scale,
        warmup_lr=experiment.warmup_lr * scale,
        warmup_epochs=warmup,  # pyright: ignore[reportArgumentType]  # halves of epochs are steps
        warmup_prefix=experiment.warmup_prefix,
        step_on_epochs=experiment.lr_by_epoch,
        updates_per_epoch=steps,
    )
    assert scheduler is not None  # only the schedule "none" makes none
    behind = experiment.lr_lag * steps
    if experiment.lr_by_epoch:
        return lambda step: scheduler.step(max(step - behind, 0) // steps)
    return lambda step: scheduler.step_update(max(step - behind, 0))


def task_of(experiment: Experiment, source: ImageSource, model: Any, fabric: Fabric) -> Classification:
    """Create what the model of an experiment learns: its images' classes, and where it has a teacher its answers.

    Raises UsageError for a student without a distillation head, and for a teacher of other classes or other colours.
    """
    if experiment.teacher is None:
        if experiment.teacher_weights:
            raise UsageError(f"teacher_weights {experiment.teacher_weights} are of no model: name it by --teacher.")
        return Classification(len(source.classes))
    if not hasattr(model, "set_distilled_training"):
        raise UsageError(
            f"{experiment.teacher} teaches a distillation head, and {experiment.model} has none. Take a distilled "
            "model, as deit_tiny_distilled_patch16_224, or no --teacher."
        )
    model.set_distilled_training(True)
    teacher = fabric.strategy.precision.convert_module(_teacher(experiment, source).to(fabric.device))

    @torch.no_grad()
    def answers(images: Tensor) -> Tensor:
        with fabric.autocast():
            return teacher(fabric.strategy.precision.convert_input(images)).argmax(1)

    return Distillation(len(source.classes), answers)


def _teacher(experiment: Experiment, source: ImageSource) -> nn.Module:
    """Create the teacher of an experiment, with its weights."""
    import timm

    name, path = str(experiment.teacher), experiment.teacher_weights
    choose(dict.fromkeys(timm.list_models()), name.partition(".")[0], "a model that timm knows")
    asked = len(source.classes)
    if path:
        teacher: Any = timm.create_model(name, num_classes=asked, in_chans=source.channels)
        weights = read(path)
        head = weights.get(f"{teacher.pretrained_cfg['classifier']}.bias")
        _refuse_other_classes(f"{name} in {path}", asked if head is None else len(head), source)
        load(teacher, weights, path)
        return teacher.eval()
    try:
        teacher = timm.create_model(name, pretrained=True, in_chans=source.channels)
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"timm's weights of {name} cannot be had ({error}). Give --teacher_weights the file that holds them."
        ) from error
    _refuse_other_classes(name, teacher.num_classes, source)
    mean, std = (tuple(teacher.pretrained_cfg[part]) for part in ("mean", "std"))
    if (mean, std) != (source.mean, source.std):
        raise UsageError(
            f"A teacher sees its student's images, and {name} knows them with mean {mean} and deviation {std}, where "
            f"those of {source.name} have {source.mean} and {source.std}. Take a teacher that was trained with these."
        )
    return teacher.eval()


def _refuse_other_classes(name: str, classes: int, source: ImageSource) -> None:
    if classes != len(source.classes):
        raise UsageError(
            f"The teacher {name} tells {classes} classes apart, and {source.name} has {len(source.classes)}: take one "
            "that was trained on these."
        )

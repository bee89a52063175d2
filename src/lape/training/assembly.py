"""From the settings of an experiment to what trains it: devices, optimiser, schedule."""

import inspect
import os
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer

from lape.errors import UsageError, choose
from lape.experiment import Experiment
from lape.names import CHOICES
from lape.training.acceleration import Card, choose_products, refuse_missing, without_advice

# Those of timm.scheduler that need nothing but the number of the step.
SCHEDULES: tuple[str, ...] = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")


def launch(experiment: Experiment) -> Fabric:
    """Start Fabric on the devices of an experiment, or on those that torchrun hands out."""
    refuse_missing(experiment.accelerator)
    CHOICES["precision"].refuse_other(experiment.precision)
    devices, nodes = experiment.devices, experiment.nodes
    if torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    try:
        fabric = Fabric(
            accelerator=experiment.accelerator,
            devices=devices,
            num_nodes=nodes,
            precision=experiment.precision,  # pyright: ignore[reportArgumentType]  # one of its names
        )
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        raise UsageError(f"Fabric does not take these settings: {error}") from error
    choose_products(Card.of(fabric.device), experiment)
    _meet_anew(fabric)
    with without_advice():
        fabric.launch()
    return fabric


def _meet_anew(fabric: Fabric) -> None:
    """Connect the processes that torchrun has started again, which Fabric then finds connected.

    The store in which they look each other up is that of the processes before, with their addresses in it: whoever is
    there first waits for one that has ended. Of several machines each counts its own starts; there it stays so.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ["GROUP_WORLD_SIZE"] != "1":
        return
    met: Any = torch.distributed  # it keeps the names of its stores to itself
    met.init_process_group(
        "nccl" if fabric.device.type == "cuda" else "gloo",
        store=met.PrefixStore(attempt, met.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


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
    if "eps" in accepted and experiment.precision == "16-true":
        options["eps"] = 1e-4  # of float16's numbers the usual 1e-8 is zero, as is the square of a gradient below 2e-4
    groups = _groups(experiment, model)
    lr = highest_rate(experiment)
    try:
        return optim.create_optimizer_v2(groups, experiment.optimizer, lr=lr, momentum=experiment.momentum, **options)
    except TypeError as error:
        raise UsageError(f"{experiment.optimizer} does not take these settings: {error}.") from error


def _groups(experiment: Experiment, model: nn.Module) -> list[dict[str, Any]]:
    """Group the parameters that learn by what they decay with, and by what their learning rate is multiplied by.

    Vectors, biases and what the model's `no_weight_decay` names do not decay, but for what `also_decay` names.
    """
    names: set[str] = getattr(model, "no_weight_decay", set)()  # type: ignore[operator]
    scales = _layer_scales(model, experiment.layer_decay) if experiment.layer_decay else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    matched: set[str] = set()
    exempt: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not any(fnmatch(name, pattern) for pattern in names)
        if not decays and not name.endswith("bias"):
            asked = set(experiment.also_decay) & set(name.split("."))
            matched |= asked
            exempt.append(name)
            decays = bool(asked)
        key = (experiment.weight_decay if decays else 0.0, scales.get(name, 1.0))
        groups.setdefault(key, []).append(parameter)
    for part in experiment.also_decay:
        if part not in matched:
            raise UsageError(
                f"also_decay names parts of parameters that would be exempt from weight decay; {part!r} is in none of "
                f"{', '.join(exempt) or 'none'}. Leave it out."
            )
    return [{"params": members, "weight_decay": decay, "lr_scale": scale} for (decay, scale), members in groups.items()]


def _layer_scales(model: Any, factor: float) -> dict[str, float]:
    """Return factor^(last - level) for each parameter, by the levels that timm's `group_matcher` tells."""
    from timm.models import group_parameters

    levels: Any = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(levels.values())
    return {name: factor ** (last - level) for name, level in levels.items()}


def highest_rate(experiment: Experiment) -> float:
    """Return the highest learning rate, for the batch size that there is."""
    return experiment.lr * _scale(experiment)


def _scale(experiment: Experiment) -> float:
    """What the learning rate is multiplied by."""
    return experiment.batch_size / (experiment.lr_batch or experiment.batch_size)


def schedule_of(experiment: Experiment, optimizer: Optimizer, steps: int) -> Callable[[int], None]:
    """Create timm's schedule of that name; called with the number of a step, it sets the optimiser's learning rates.

    An epoch has `steps`. Raises UsageError for a warm-up that leaves the schedule no time, and for settings that
    contradict each other.
    """
    from timm.scheduler.scheduler_factory import create_scheduler_v2

    choose(dict.fromkeys(SCHEDULES), experiment.schedule, "a schedule")
    by_epoch, factor = experiment.lr_by_epoch, experiment.warmup_factor
    if by_epoch and (experiment.steps or experiment.warmup_steps or factor):
        raise UsageError(
            "lr_by_epoch counts in epochs, and steps, warmup_steps and warmup_factor do not: leave it out, or them."
        )
    if (experiment.schedule == "multistep") != bool(experiment.decay_milestones):
        raise UsageError(
            f"multistep alone has milestones, and must have some; schedule is {experiment.schedule!r} and "
            f"decay_milestones {list(experiment.decay_milestones)}. Add or leave out one of them."
        )
    unit = 1 if by_epoch else steps  # in which the schedule counts: epochs or steps
    length = experiment.steps or experiment.epochs * unit
    warmup = warmup_of(experiment, length, unit)
    scale = _scale(experiment) if experiment.scale_lr_ends else 1
    # timm's milestones are one unit early, which it keeps for the sake of older runs.
    milestones = [epoch * unit + 1 for epoch in experiment.decay_milestones]
    interval: dict[str, Any] = {"step": {"decay_epochs": 90 * unit}}.get(experiment.schedule, {})
    scheduler, _ = create_scheduler_v2(
        optimizer,
        experiment.schedule,
        num_epochs=length - warmup if experiment.warmup_prefix else length,  # pyright: ignore[reportArgumentType]
        decay_rate=experiment.decay_rate,
        decay_milestones=milestones,
        min_lr=experiment.min_lr * scale,
        warmup_lr=experiment.warmup_lr * scale,
        warmup_epochs=0 if factor else warmup,  # pyright: ignore[reportArgumentType]  # halves of epochs are steps
        warmup_prefix=experiment.warmup_prefix,
        step_on_epochs=by_epoch,
        updates_per_epoch=1,
        **interval,
    )
    assert scheduler is not None  # only the schedule "none" makes none
    behind = experiment.lr_lag * steps
    if by_epoch:
        return lambda step: scheduler.step(max(step - behind, 0) // steps)

    def set_rates(step: int) -> None:
        step = max(step - behind, 0)
        scheduler.step_update(step)
        if factor and step < warmup:
            for group in optimizer.param_groups:
                group["lr"] *= factor + (1 - factor) * step / warmup

    return set_rates


def warmup_of(experiment: Experiment, length: float, unit: int) -> float:
    """Return how long the learning rate rises, in units of a schedule of that length; an epoch has `unit` of them.

    Raises UsageError for more than the schedule, and where two settings say it.
    """
    asked = experiment.warmup_epochs
    if asked is not None and experiment.warmup_steps is not None:
        raise UsageError("warmup_epochs and warmup_steps both say how long the learning rate rises: leave one out.")
    warmup = experiment.warmup_steps if asked is None else asked * unit
    if warmup is None:
        warmup = length / 10
    name, counted = ("warmup_epochs", unit) if experiment.warmup_steps is None else ("warmup_steps", 1)
    share = f"{warmup / counted:g} of {length / counted:g} {name.removeprefix('warmup_')}"
    if warmup > length:
        raise UsageError(f"A warm-up is no longer than the schedule that it begins; it is {share}: lower {name}.")
    if experiment.warmup_prefix and warmup == length:
        raise UsageError(
            f"warmup_prefix begins the schedule behind the warm-up, and {share} leave it none: lower {name}."
        )
    return warmup

"""The learning rate of every step, by the formula that the recipes state it in."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from lape.errors import UsageError
from lape.experiment import Experiment
from lape.training.assembly import optimizer_of, schedule_of

STEPS = 4  # in an epoch

BY_EPOCH = Experiment(epochs=300, warmup_epochs=5, warmup_lr=1e-6, min_lr=1e-5, lr_by_epoch=True, drop_path=0.0)
DEIT = replace(BY_EPOCH, lr=5e-4, lr_batch=512, batch_size=1024, lr_lag=1)
CEIT = DEIT  # the same schedule
T2T = replace(BY_EPOCH, lr=1e-3, batch_size=512, warmup_epochs=10, cooldown_epochs=10)
CIFAR10 = replace(T2T, lr=5.5e-4, batch_size=128, warmup_lr=1e-5)
CIFAR100 = replace(T2T, lr=6e-4, batch_size=128)
SWIN = Experiment(
    epochs=300, warmup_epochs=20, warmup_prefix=True, lr=5e-4, min_lr=5e-6, warmup_lr=5e-7,
    batch_size=1024, lr_batch=512, scale_lr_ends=True,
)  # fmt: skip


def rate(experiment, step, steps):
    """The cosine of the recipes, t epochs after the start of training."""
    t = max(step / steps - experiment.lr_lag, 0)
    if experiment.lr_by_epoch:
        t = math.floor(t)
    scale = experiment.batch_size / experiment.lr_batch if experiment.lr_batch else 1
    ends = scale if experiment.scale_lr_ends else 1
    top, least, first = experiment.lr * scale, experiment.min_lr * ends, experiment.warmup_lr * ends
    warmup, end = experiment.warmup_epochs, experiment.epochs
    if t < warmup:
        return first + t * (top - first) / warmup
    if t >= end:
        return least
    begin = warmup if experiment.warmup_prefix else 0
    return least + (top - least) * (1 + math.cos(math.pi * (t - begin) / (end - begin))) / 2


def rates(experiment, steps=STEPS):
    """The learning rate of every step of a run."""
    optimizer = optimizer_of(experiment, torch.nn.Linear(2, 2))
    set_rates = schedule_of(experiment, optimizer, steps)
    seen = []
    for step in range(experiment.all_steps(steps)):
        set_rates(step)
        (here,) = {group["lr"] for group in optimizer.param_groups}
        seen.append(here)
    return seen


@pytest.mark.parametrize(
    ("experiment", "epochs"),
    [(DEIT, 300), (CEIT, 300), (T2T, 310), (SWIN, 300), (CIFAR10, 310), (CIFAR100, 310), (replace(SWIN, lr_lag=2), 300),
     (replace(T2T, warmup_epochs=2.5, lr_by_epoch=False), 310)],
    ids=["deit", "ceit", "t2t", "swin", "cifar10", "cifar100", "lag-by-step", "half-epochs"],
)  # fmt: skip
def test_every_step_has_the_rate_of_the_formula(experiment, epochs):
    seen = rates(experiment)
    assert len(seen) == epochs * STEPS
    assert seen == pytest.approx([rate(experiment, step, STEPS) for step in range(len(seen))], rel=1e-9)


def test_the_rates_that_the_recipes_name():
    """Numbers, so that the formula above does not only agree with itself."""
    deit = rates(DEIT)[::STEPS]
    assert deit[:3] == pytest.approx([1e-6, 1e-6, 1e-6 + (1e-3 - 1e-6) / 5])
    assert deit[151] == pytest.approx((1e-3 + 1e-5) / 2)
    assert max(deit) < 1e-3  # the cosine runs beneath the warm-up
    t2t = rates(T2T)[::STEPS]
    assert t2t[150] == pytest.approx((1e-3 + 1e-5) / 2)
    assert t2t[299] > 1e-5
    assert t2t[300:] == [1e-5] * 10
    swin = rates(SWIN)
    assert swin[0] == pytest.approx(1e-6)
    assert swin[20 * STEPS] == max(swin) == pytest.approx(1e-3)
    assert swin[160 * STEPS] == pytest.approx((1e-3 + 1e-5) / 2)


def test_by_default_the_rate_changes_from_step_to_step_and_is_used_as_given():
    seen = rates(Experiment(epochs=10, warmup_epochs=2.0, lr=1.0, min_lr=0.1, warmup_lr=0.0), 2)
    assert seen[:4] == [0, 0.25, 0.5, 0.75]
    assert seen[4:] == [pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * step / 20))) for step in range(4, 20)]


def test_a_warm_up_that_leaves_the_schedule_no_time_is_refused():
    with pytest.raises(UsageError, match="20 of 20 epochs leave it none: lower warmup_epochs"):
        rates(replace(SWIN, epochs=20))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"lr_by_epoch": True, "steps": 8}, "lr_by_epoch counts in epochs"),
        ({"lr_by_epoch": True, "warmup_steps": 8}, "lr_by_epoch counts in epochs"),
        ({"lr_by_epoch": True, "warmup_factor": 0.1}, "lr_by_epoch counts in epochs"),
        ({"schedule": "multistep"}, r"schedule is 'multistep' and decay_milestones \[\]"),
        ({"decay_milestones": (2,)}, r"schedule is 'cosine' and decay_milestones \[2\]"),
        ({"warmup_epochs": 1.0, "warmup_steps": 4}, "warmup_epochs and warmup_steps both"),
        ({"steps": 8, "warmup_steps": 9}, "it is 9 of 8 steps: lower warmup_steps"),
        ({"epochs": 2, "warmup_epochs": 2.5}, "it is 2.5 of 2 epochs: lower warmup_epochs"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        rates(replace(Experiment(epochs=10), **changed))


def test_a_warm_up_is_a_tenth_unless_it_is_asked_for_in_epochs_or_steps() -> None:
    plain = Experiment(epochs=10, lr=1.0, min_lr=1.0, warmup_lr=0.0)
    for changed, length in (
        ({}, 4),
        ({"steps": 20}, 2),
        ({"warmup_epochs": 2.0}, 8),
        ({"warmup_steps": 3}, 3),
        ({"warmup_steps": 0}, 0),
    ):
        seen = rates(replace(plain, **changed))
        assert seen[:length] == pytest.approx([step / length for step in range(length)])
        assert set(seen[length:]) == {1.0}


def test_what_steps_leave_no_room_for_is_refused():
    with pytest.raises(UsageError, match="leave out cooldown_epochs 5"):
        Experiment(steps=10, cooldown_epochs=5)
    with pytest.raises(UsageError, match="warmup_epochs must be at least 0, not -1"):
        Experiment(warmup_epochs=-1.0)

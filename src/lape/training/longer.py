"""A run that goes on for longer than it was first asked for: allowed where that is what asking at once would have made.

What is compared is what was done: the learning rate of every step, and which steps were validated.
"""

from pathlib import Path

import torch
from torch.optim import SGD

from lape.errors import UsageError
from lape.experiment import Experiment
from lape.training.assembly import highest_rate, schedule_of

LENGTH = ("epochs", "steps", "cooldown_epochs")  # settings that may differ


def refuse_another_beginning(folder: Path, before: Experiment, asked: Experiment, epoch: int, done: int) -> None:
    """Raise UsageError where a run of `asked` would not be, after `done` steps, what the run of `before` is.

    An epoch has so many steps.
    """
    if all(getattr(before, name) == getattr(asked, name) for name in LENGTH):
        return
    there, here = before.all_steps(epoch), asked.all_steps(epoch)
    if here < done:
        raise UsageError(
            f"{folder} holds a run of {done} steps, and {here} are fewer: a run is not shortened. Ask for more, or "
            "give another --out."
        )
    why = _difference(before, asked, epoch, done)
    if why is None:
        return
    cooldown = "" if asked.steps else "ask for more --cooldown_epochs, which go on at the lowest rate; or "
    raise UsageError(
        f"{folder} holds {done} steps of a run of {there}, and they are not the first of one of {here}: {why}. To have "
        f"what asking at once would give, begin anew with another --out; or {cooldown}start another run from these "
        f"weights with --weights {folder / 'best.pt'}."
    )


def _difference(before: Experiment, asked: Experiment, epoch: int, done: int) -> str | None:
    for step, (rate, other) in enumerate(zip(_rates(before, epoch, done), _rates(asked, epoch, done), strict=True)):
        if rate != other:
            return (
                f"by the schedule {asked.schedule} and its warm-up the learning rate of step {step + 1} was "
                f"{rate:.3g}, and would be {other:.3g}"
            )
    if done and _is_validated(before, epoch, done) != _is_validated(asked, epoch, done):
        return (
            f"step {done} was validated as the last one, and validate_every {asked.validate_every} would pass it over"
        )
    return None


def _rates(experiment: Experiment, epoch: int, steps: int) -> list[float]:
    optimizer = SGD([torch.zeros(1)], lr=highest_rate(experiment))
    set_rates, rates = schedule_of(experiment, optimizer, epoch), []
    for step in range(steps):
        set_rates(step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def _is_validated(experiment: Experiment, epoch: int, step: int) -> bool:
    """Whether a run is validated after a step that is the last, or ends an epoch."""
    whole, rest = divmod(step, epoch)
    return step == experiment.all_steps(epoch) or (rest == 0 and whole % experiment.validate_every == 0)

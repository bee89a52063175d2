"""What a run asks of a CUDA card beyond torch's defaults, and what is said of it: TF32, bfloat16, CUDA graphs."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lape.errors import RunError
from lape.experiment import Experiment

AMPERE = (8, 0)  # the first cards with TF32 and bfloat16
# What bfloat16 has over other formats.
GAINS: Mapping[str, str] = {
    "32-true": "takes less time and memory than 32-true",
    "16-mixed": "needs no scaling of the gradient, and no step is left out for it",
}


@dataclass(frozen=True)
class Card:
    """A CUDA card: its name, and what it is capable of."""

    name: str
    capability: tuple[int, int]

    @classmethod
    def of(cls, device: torch.device) -> Self | None:
        """Return the card that a device is; None for another device."""
        if device.type != "cuda":
            return None
        return cls(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))

    @property
    def short_formats(self) -> bool:
        """Whether it computes in TF32 and bfloat16."""
        return self.capability >= AMPERE


def refuse_missing(accelerator: str) -> None:
    """Raise RunError for an accelerator that this machine, or its torch, has not."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    needed = {
        "cuda": (cuda, "a card of NVIDIA's, or of AMD's with its own torch"),
        "mps": (mps, "a Mac with a chip of Apple's"),
        "gpu": (cuda or mps, "a graphics card"),
    }
    there, what = needed.get(accelerator, (True, ""))
    if not there:
        raise RunError(
            f"--accelerator {accelerator} needs {what}, and torch {torch.__version__} finds none here. Leave it out, "
            "or give --accelerator cpu; where there is one, install its driver and the torch that is made for it."
        )


def choose_products(card: Card | None, experiment: Experiment) -> None:
    """Have a card compute float32 products as an experiment says, in this process; elsewhere nothing changes.

    Who has chosen between TF32 and less by torch's own means keeps what was chosen.
    """
    if card is None:
        return
    if not experiment.tf32:
        torch.set_float32_matmul_precision("highest")
    elif torch.get_float32_matmul_precision() == "highest":
        torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = experiment.tf32


@contextmanager
def without_advice() -> Iterator[None]:
    """Keep Fabric from advising what `choose_products` does: each process would say so."""

    def other(record: logging.LogRecord) -> bool:
        return "set_float32_matmul_precision" not in record.getMessage()

    log = logging.getLogger("lightning_fabric.utilities.rank_zero")
    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


def remarks(card: Card | None, experiment: Experiment, against_graphs: str | None) -> Iterator[str]:
    """Say what a person should know of how a card computes a run; of another device there is nothing to say."""
    if card is None:
        return
    if card.short_formats:
        if experiment.precision == "32-true" and experiment.tf32:
            yield (
                f"Float32 products are computed in TF32 on {card.name}, which keeps 10 bits of a fraction, not 23: "
                "--tf32 false computes them in full."
            )
        if gain := GAINS.get(experiment.precision):
            yield f"{card.name} computes in bfloat16: --precision bf16-mixed {gain}."
    if experiment.compile:
        yield (
            f"Compiled without CUDA graphs: {against_graphs}."
            if against_graphs
            else "Compiled, with CUDA graphs: a step's kernels are recorded once and replayed (--graphs false: not)."
        )


def against_graphs(card: Card | None, experiment: Experiment, *, one_size: bool, processes: int) -> str | None:
    """Return why the compiled model is not replayed as CUDA graphs; None where it is.

    A graph is for inputs of one shape, whose place in memory it knows, and for work that is the same in each step. The
    batches of a classifier's training all have one size: what an epoch leaves over is not used.
    """
    reasons = {
        "it is no CUDA card": card is None,
        "the model is not compiled": not experiment.compile,
        "--graphs is false": not experiment.graphs,
        "the pictures have many sizes": not one_size,
        "a teacher answers within a step": experiment.teacher is not None,
        f"a step has {experiment.accumulate} parts, whose gradients are added": experiment.accumulate > 1,
        "activations are computed again in the backward pass": experiment.grad_checkpointing,
        f"{processes} processes exchange gradients within a step": processes > 1,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class Readout:
    """Numbers of a device, on their way to the host from the moment they are asked for.

    Reading them waits for what was begun before that moment, and for nothing that was begun since.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.arrived = numbers, None
        if numbers.device.type == "cuda":
            self.numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.arrived = torch.cuda.current_stream(numbers.device).record_event()

    def read(self) -> list[float]:
        """Return them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers.tolist()

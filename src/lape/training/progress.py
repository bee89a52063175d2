"""How far a run is: what its process tells another, which learns it without loading what trains."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    epoch: int  # the last one that was validated, 0 before
    epochs: int
    step: int
    steps: int
    images_per_second: float
    seconds_left: float
    train_loss: float  # mean since the last validation, or at it over all since the one before
    measure: str  # what the task is scored by
    score: float | None  # of the last validation, in percent

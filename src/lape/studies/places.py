"""Where runs are trained side by side: so many at once on a CPU, and on each CUDA card what its memory has room for.

How much memory a run takes is measured on each card by the first run there; what then is free decides.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

from lape.errors import UsageError

CONTEXT = 1 << 30  # bytes that CUDA itself takes for a process, or fewer
SPARE = 0.1  # of a card's memory is left free: not all runs take the same
SETTLED = 5  # steps after which a run has taken what it will take


class Memory(NamedTuple):
    """Bytes of a card's memory, as a run on it sees them."""

    free: int
    total: int
    taken: int  # by this run, at most so far


def memory() -> Memory | None:
    """Measure the card on which this process computes; None where that is none of CUDA's."""
    import torch

    if not torch.cuda.is_initialized():
        return None
    return Memory(*torch.cuda.mem_get_info(), torch.cuda.max_memory_reserved() + CONTEXT)


class Places:
    """Cards, and how many runs go on at once: `most` in all, and on one card one until its memory is measured."""

    def __init__(self, cards: Sequence[str], most: int, measured: bool) -> None:
        self.most = most
        self.room = dict.fromkeys(cards, 1 if measured else most)
        self.waits_for = set(cards) if measured else set[str]()  # cards that nothing is known of yet

    @classmethod
    def of(cls, jobs: int | None, cards: Sequence[str], cores: int, processes: int) -> Self:
        """Return the places of a machine for runs of so many processes each; without cards all are one, the CPU.

        Raises UsageError for `jobs` that are no number of runs.
        """
        if jobs is not None and jobs < 1:
            raise UsageError(f"jobs is how many runs go on at once, 1 or more; {jobs} was received.")
        if not cards:
            return cls([""], jobs or cores, measured=False)
        return cls(cards, jobs or max(len(cards), cores // processes), measured=jobs is None)

    def free(self, busy: Iterable[str]) -> str | None:
        """Return the card for one more run beside those at work, the emptiest; None where there is no room."""
        at_work = Counter(busy)
        open_cards = [card for card, room in self.room.items() if at_work[card] < room]
        if at_work.total() >= self.most or not open_cards:
            return None
        return min(open_cards, key=at_work.__getitem__)

    def measure(self, card: str, memory: Memory | None, step: int) -> None:
        """Take note of what a run on a card sees after so many steps."""
        if memory is None or card not in self.waits_for or step < SETTLED:
            return
        self.waits_for.discard(card)
        beside = int((memory.free - SPARE * memory.total) // memory.taken)
        self.room[card] = 1 + max(beside, 0)


def cards() -> list[str]:
    """Return the CUDA cards that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    if not torch.cuda.is_available():
        return []
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else list(map(str, range(count)))

"""The two ways in which a request can fail, and the choice of an object by its name."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

Chosen = TypeVar("Chosen")


class UsageError(ValueError):
    """What was asked for breaks a rule; the message states the rule, the value received and the edit that mends it.

    The command line ends with status 2.
    """


class RunError(RuntimeError):
    """What was asked for is sound, and the world did not allow it (a file, a disk, a loss); the message names which.

    The command line ends with status 1.
    """


def choose(table: Mapping[str, Chosen], name: str, what: str) -> Chosen:
    """Return `table[name]`; raise UsageError with the nearest valid name where there is none.

    `what` says what is being chosen, with its article: "a join".
    """
    if name in table:
        return table[name]
    near = get_close_matches(name.lower(), table, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = f" Valid names: {', '.join(table)}." if len(table) < 40 else ""
    raise UsageError(f"{name!r} is not {what}.{hint}{listed}")

"""The two ways in which a request can fail, and the choice of an object by its name."""

from collections.abc import Mapping
from difflib import SequenceMatcher
from errno import ENOMEM
from typing import TypeVar

Chosen = TypeVar("Chosen")

# How torch says that there is no memory where it has no kind of error for it.
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "bad_alloc", "bad allocation")


class UsageError(ValueError):
    """What was asked for breaks a rule; the message states the rule, the value received and the edit that mends it.

    The command line ends with status 2.

    Example:
        >>> import lape
        >>> try:
        ...     lape.create_model("deit_tiny_patch16_224", join="lap")
        ... except lape.UsageError as error:
        ...     print(error)
        'lap' is not a join. Did you mean 'lape'? Valid names: default, shared, unshared, lape-sharing, lape, pvg, mpvg.
    """


class RunError(RuntimeError):
    """What was asked for is sound, and the machine or a file did not allow it; the message says what happened and
    where.

    The command line ends with status 1.

    Example:
        >>> import lape
        >>> try:
        ...     lape.from_pretrained("no-such-folder")
        ... except lape.RunError as error:
        ...     print(error)
        no-such-folder does not exist. Name a folder, a .safetensors file, or a repository as user/name.
    """


def first_line(error: BaseException) -> str:
    """Return what another library's error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def lacking(error: BaseException) -> RunError | None:
    """Return what a machine lacked, where another library's error says that: memory, or a process that was ended."""
    line = first_line(error).rstrip(". ")
    if "DataLoader worker" in line and not isinstance(error, OSError | MemoryError):
        return RunError(
            f"A process that prepares images was ended from outside ({line}), as a machine out of memory does it. Give "
            "fewer --workers or a lower --batch_size; a run goes on with --resume."
        )
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if memory or getattr(error, "errno", None) == ENOMEM or any(words in line for words in OUT_OF_MEMORY):
        return RunError(
            f"There is not enough memory ({line}). Give a lower --batch_size, fewer --workers or a smaller model; a "
            "run goes on with --resume."
        )
    return None


def choose(table: Mapping[str, Chosen], name: str, what: str) -> Chosen:
    """Return `table[name]`; raise UsageError with the nearest valid name where there is none.

    `what` says what is being chosen, with its article: "a join".
    """
    if name in table:
        return table[name]

    def likeness(other: str) -> tuple[float, float]:  # of its beginning first: names are cut short more often than not
        typed = name.lower()
        return SequenceMatcher(None, typed, other[: len(typed)]).ratio(), SequenceMatcher(None, typed, other).ratio()

    near = max(table, key=likeness)
    hint = f" Did you mean {near!r}?" if likeness(near)[0] >= 0.5 else ""
    listed = f" Valid names: {', '.join(table)}." if len(table) < 40 else ""
    raise UsageError(f"{name!r} is not {what}.{hint}{listed}")

"""What is asked of a model's positions, by the names that `lape.apply` takes."""

from typing import NamedTuple


class SchemeNames(NamedTuple):
    """The four choices: how positions are joined, which there are, what normalises them, and how training starts.

    `lape.method.scheme(*names)` is what they stand for, with all that each may be.
    """

    join: str = "lape"
    pe: str | None = None  # None: the model's own
    pe_norm: str = "layernorm"
    start: str = "fresh"

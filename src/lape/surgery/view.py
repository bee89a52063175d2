"""A module seen with some of its attributes replaced, for a method of its class to run on."""

from collections.abc import Mapping
from typing import Any

from torch import nn


class View:
    """`module` with `replaced` in place of what it has under those names; the module itself is left as it is.

    `asked` are those of the names that were read.
    """

    def __init__(self, module: nn.Module, replaced: Mapping[str, Any]) -> None:
        self._module, self._replaced = module, replaced
        self.asked: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name not in self._replaced:
            return getattr(self._module, name)
        self.asked.add(name)
        return self._replaced[name]

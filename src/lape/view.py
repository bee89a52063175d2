"""A module seen with some of its attributes replaced, for a method of its class to run on."""

from collections.abc import Mapping
from typing import Any

from torch import nn


class View:
    """`module` with `replaced` in place of what it has under those names; the module itself is left as it is."""

    def __init__(self, module: nn.Module, replaced: Mapping[str, Any]) -> None:
        self._module, self._replaced = module, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(self._module, name)

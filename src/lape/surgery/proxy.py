"""A module as a method of its own sees it with some attributes replaced, for the time of one call."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn


class Proxies:
    """Makes proxies of modules of one class, with other values under some names.

    A proxy is an instance of a subclass that shares the module's `__dict__`: what a method sets on it is set on the
    module, `super()`, `type(self)` and `isinstance` are as ever, and nobody else sees what is replaced.

    >>> class Counter(nn.Module):
    ...     step, calls = 1, 0
    ...     def forward(self):
    ...         self.calls += self.step
    >>> counter = Counter()
    >>> faster, read = Proxies(Counter, ["step"]).of(counter, {"step": 5})
    >>> faster()
    >>> counter.calls, counter.step, read
    (5, 1, {'step'})
    """

    def __init__(self, kind: type[nn.Module], names: Iterable[str]) -> None:
        self.base, self.names = kind, tuple(names)
        attributes: dict[str, Any] = {name: _Replaced(name) for name in self.names}
        # transformers keeps what a class can record by how the class prints.
        attributes |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        self.kind: Any = type(kind.__name__, (kind,), {"__slots__": ("lape_replaced",), **attributes})

    def __reduce__(self) -> tuple[Any, ...]:
        return Proxies, (self.base, self.names)  # a class that is made here cannot be pickled

    def of(self, module: nn.Module, replaced: Mapping[str, Any]) -> tuple[Any, set[str]]:
        """Return a proxy of a module, for which each name has another value, and the set of those that are read."""
        proxy = object.__new__(self.kind)
        read: set[str] = set()
        object.__setattr__(proxy, "__dict__", module.__dict__)
        object.__setattr__(proxy, "lape_replaced", (replaced, read))
        return proxy, read


class _Replaced:
    """An attribute that comes before what the module has under its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, proxy: Any, kind: type | None = None) -> Any:
        replaced, read = proxy.lape_replaced
        read.add(self.name)
        return replaced[self.name]

    def __set__(self, proxy: Any, value: Any) -> None:
        raise AttributeError(f"{self.name} is what joins the tokens while this method runs, and cannot be set.")

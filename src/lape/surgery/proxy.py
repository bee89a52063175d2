"""A module as a method of its own sees it with some attributes replaced, for the time of one call."""

from collections.abc import Callable, Iterable, Mapping
from inspect import getattr_static
from typing import Any

import torch
from torch import nn


class Proxies:
    """Makes proxies of modules of one class, with other values under some names.

    A proxy is an instance of a subclass that shares the module's `__dict__`: what a method sets on it is set on the
    module, `super()`, `type(self)` and `isinstance` are as ever, and nobody else sees what is replaced. In a compiled
    forward it asks the module for every attribute instead: older compilers do not follow an object to the `__dict__`
    of another.

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
        # What a module may have of its own before that of its class: a method that somebody set on it, a counter.
        self.instead = tuple(
            name
            for name in dir(kind)
            if not (name in self.names or name.startswith("__") or hasattr(getattr_static(kind, name), "__set__"))
        )
        # Properties, because torch 2.6 does not compile descriptors of another class.
        attributes: dict[str, Any] = {name: _property(name) for name in self.names}
        # transformers keeps what a class can record by how the class prints.
        attributes |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        sharing = {"__slots__": ("lape_replaced",), "__setattr__": _refusing(self.names, kind.__setattr__)}
        asking = {
            "__slots__": ("lape_replaced", "lape_module"),
            "__getattr__": _get,
            "__setattr__": _refusing(self.names, _setting(self.instead)),
        }
        self.sharing: Any = type(kind.__name__, (kind,), sharing | attributes)
        self.asking: Any = type(kind.__name__, (kind,), asking | attributes)

    def __reduce__(self) -> tuple[Any, ...]:
        return Proxies, (self.base, self.names)  # a class that is made here cannot be pickled

    def of(self, module: nn.Module, replaced: Mapping[str, Any]) -> tuple[Any, set[str]]:
        """Return a proxy of a module, for which each name has another value, and the set of those that are read."""
        read: set[str] = set()
        if torch.compiler.is_compiling():
            proxy = object.__new__(self.asking)
            object.__setattr__(proxy, "lape_module", module)
            for name in self.instead:
                if name in module.__dict__:
                    object.__setattr__(proxy, name, getattr(module, name))
        else:
            proxy = object.__new__(self.sharing)
            object.__setattr__(proxy, "__dict__", module.__dict__)
        object.__setattr__(proxy, "lape_replaced", (replaced, read))
        return proxy, read


def _property(name: str) -> property:
    """Return an attribute that comes before what the module has under its name."""

    def value(proxy: Any) -> Any:
        replaced, read = proxy.lape_replaced
        read.add(name)
        return replaced[name]

    return property(value)


def _get(proxy: Any, name: str) -> Any:
    if name in ("lape_replaced", "lape_module"):
        raise AttributeError(name)  # of a proxy that is not made yet, as the compiler looks at it
    return getattr(proxy.lape_module, name)


def _setting(instead: tuple[str, ...]) -> Callable[[Any, str, Any], None]:
    def set_on_module(proxy: Any, name: str, value: Any) -> None:
        setattr(proxy.lape_module, name, value)
        if name in instead:
            object.__setattr__(proxy, name, value)

    return set_on_module


def _refusing(names: tuple[str, ...], setting: Callable[[Any, str, Any], None]) -> Callable[[Any, str, Any], None]:
    def set_others(proxy: Any, name: str, value: Any) -> None:
        if name in names:
            raise AttributeError(f"{name} is what joins the tokens while this method runs, and cannot be set.")
        setting(proxy, name, value)

    return set_others

"""A reference to a module from what the module itself holds, so that neither waits for the garbage collector."""

import weakref
from typing import Any, Generic, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class Weak(Generic[Module]):
    """Refers to a module weakly; a copy, or a pickle, refers to the module's copy.

    >>> module = nn.Linear(2, 2)
    >>> Weak(module)() is module
    True
    """

    def __init__(self, module: Module) -> None:
        self.reference = weakref.ref(module)

    def __call__(self) -> Module:
        """Return the module."""
        module = self.reference()
        assert module is not None, "what belongs to a module is used after it"
        return module

    def __reduce__(self) -> tuple[Any, ...]:
        return Weak, (self(),)

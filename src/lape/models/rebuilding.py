"""A model that a file describes is no larger than the file's weights: a few words can ask for more than there is."""

import os
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from lape.errors import RunError, UsageError, first_line
from lape.weights import refuse_another

Make = Callable[[], nn.Module]
Build = Callable[[Make, Mapping[str, Any]], nn.Module]  # how a model comes from what makes it, with these keywords


MOST_PARAMETERS = 10_000  # tensors; a ViT has some twelve a layer
MOST_COUNTED = 1 << 20  # sum of the numbers in a model's keywords
BYTES_A_VALUE = 4


def as_asked(make: Make, keywords: Mapping[str, Any]) -> nn.Module:
    """Make the model that a user asks for; raise UsageError for one that no machine of this memory could hold.

    The user may not have read the settings: with a depth of ten million there would soon be no memory.
    """
    if not keywords:
        return make()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 50
    limit, values = Limit(MOST_PARAMETERS, memory // BYTES_A_VALUE), 0
    too_many = _counted(keywords) > MOST_COUNTED  # constructors list their layers before they make one
    if not too_many:
        with suppress(Exception), limit.kept(), torch.device("meta"):  # a constructor that needs values fails there
            values = sum(parameter.numel() for parameter in make().parameters())
    if too_many or limit.passed or values > limit.values:
        raise UsageError(
            f"model_args {dict(keywords)} make a model of more than {MOST_PARAMETERS:,} parameter tensors, or of more "
            "values than this machine's memory holds. Lower depth, width or size."
        )
    return make()


@dataclass(frozen=True)
class LikeItsFile:
    """Makes the model that a file describes, once it is seen without memory that it is the one of the file's weights.

    Raises RunError, naming the file, where it is not, and as what makes the model does.
    """

    weights: Mapping[str, Tensor]
    path: Path

    def __call__(self, make: Make, keywords: Mapping[str, Any]) -> nn.Module:
        """Make it."""
        values = sum(value.numel() for value in self.weights.values())
        # Constructors list their layers before they make one.
        if (counted := _counted(keywords)) > max(values, 1 << 16):
            raise RunError(
                f"{self.path} describes a model by numbers that add up to {counted}, and its weights are {values}. "
                "Give another file."
            )
        # Heads are made and replaced by others, tables too.
        limit = Limit(4 * len(self.weights) + 64, 4 * values + (1 << 24))
        try:
            with limit.kept(), torch.device("meta"):
                shape = make()
        except Exception as error:  # of the limit, or of a constructor that needs its values
            if limit.passed:
                raise RunError(f"{self.path}: {first_line(error)}") from error
        else:
            refuse_another(shape.state_dict(), self.weights, self.path)
        try:
            with limit.kept():
                return make()
        except RunError as error:
            raise RunError(f"{self.path}: {error}") from error


class Limit:
    """Counts the parameters that this thread makes, and raises RunError for more than so many, or than so many values.

    A module cannot be asked how large it will be: with a depth of ten million it takes memory before it is there.
    """

    def __init__(self, parameters: int, values: int) -> None:
        self.parameters, self.values = parameters, values
        self.passed = False

    @contextmanager
    def kept(self) -> Generator[None, None, None]:
        """Count anew, until the end."""
        mine = threading.get_ident()
        parameters = values = buffered = 0

        def weigh(module: nn.Module, name: str, buffer: Tensor | None) -> None:
            # Masks and angles are made anew, and in no file: those without memory too are as large as they will be.
            nonlocal buffered
            if threading.get_ident() != mine or buffer is None:
                return
            buffered += buffer.numel()
            if buffered > self.values:
                self.passed = True
                raise RunError("it describes a larger model than that of its weights. Give another file.")

        def count(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
            nonlocal parameters, values
            if threading.get_ident() != mine:
                return
            parameters, values = parameters + 1, values + parameter.numel()
            real = not parameter.is_meta  # those without memory may be as large as they like, and are compared
            if parameters > self.parameters or (real and values > self.values):
                self.passed = True
                raise RunError("it describes a larger model than that of its weights. Give another file.")

        handles = [
            register_module_parameter_registration_hook(count),
            register_module_buffer_registration_hook(weigh),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _counted(values: Any) -> int:
    """Return the sum of the whole numbers in keywords of a model."""
    if isinstance(values, Mapping):
        return _counted(list(values.values()))
    if isinstance(values, list | tuple):
        return sum(map(_counted, values))
    return abs(values) if isinstance(values, int) else 0

"""Weights from files: the authors' checkpoints, timm's and ours. The only room that opens weight files."""

import argparse
import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from operator import attrgetter
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from lape.errors import RunError
from lape.hosts import Host, find
from lape.method import POSITION_EMBEDDINGS
from lape.positions import BIAS_TABLE, Positions
from lape.surgery import RECORD

Weights = dict[str, Tensor]

_RECOMPUTED = re.compile(r"\.(relative_position_index|attn_mask)$")
_OF_A_JOIN = re.compile(rf"(^|\.)(pe_norm\.\w+|{BIAS_TABLE}|pos_embed|absolute_pos_embed)$")


@dataclass(frozen=True)
class Loaded:
    """What a file did not bring: the model's own initial values stand there."""

    missing: tuple[str, ...]

    def __str__(self) -> str:
        if not self.missing:
            return "Every parameter was loaded."
        return (
            f"{_named(self.missing)} not in the file: they keep their initial values, so the model does not compute "
            "what the file's did. Train it before use."
        )


def read(path: str | Path) -> Weights:
    """Return the tensors of a .safetensors file or of a checkpoint that torch.save wrote, without running its code.

    Raises RunError, naming the file, where it cannot be read, holds code, or holds no weights.
    """
    return _state(opened(Path(path)), Path(path))


def opened(path: Path) -> Any:
    """Return what a file of tensors and plain values holds, on the CPU; raises RunError, naming it, where it cannot."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # The authors' and DeiT's checkpoints hold their arguments, a plain namespace, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise RunError(
            f"{path} holds more than tensors and plain values, and reading it could run code; it was not read. "
            "Give a file that holds nothing else, best a .safetensors."
        ) from error
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist. Check the path.") from error
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"{path} cannot be read as a checkpoint ({reason}). Is it complete?") from error


def _state(stored: Any, path: Path) -> Weights:
    for name in ("model", "state_dict"):
        if isinstance(stored, Mapping) and isinstance(stored.get(name), Mapping):
            stored = stored[name]
    if not isinstance(stored, Mapping) or not all(isinstance(value, Tensor) for value in stored.values()) or not stored:
        raise RunError(f"{path} holds no weights: a mapping of names to tensors is expected, or one under 'model'.")
    return {name.removeprefix("module."): value for name, value in stored.items()}


def convert(weights: Mapping[str, Tensor], model: nn.Module) -> Weights:
    """Return weights under a model's own names and sizes, from its family's first authors', LaPE's authors' or timm's.

    Tables are resized to the model's grid. Raises RunError where a file's table is not the fixed table of the model.
    """
    vit, host = find(model)
    (path,) = (f"{name}." for name, part in model.named_modules() if part is vit)
    if path != "." and any(name.startswith(path) for name in weights):  # of the whole that the transformer is a part of
        inside = {name.removeprefix(path): value for name, value in weights.items() if name.startswith(path)}
        around = {name: value for name, value in weights.items() if not name.startswith(path)}
        converted = {f"{path}{name}": value for name, value in convert(inside, vit).items()}
        return converted | renamed(around, getattr(model, "names", ()))
    named = {name: value for name, value in renamed(weights, host.names).items() if not _RECOMPUTED.search(name)}
    own: nn.Parameter | None = getattr(vit, host.table, None)
    table = named.get(host.table)
    if table is not None and table.ndim == 2:  # the authors' 1-D sinusoid has no batch axis
        named[host.table] = table = table[None]
    if table is not None and own is not None:
        named[host.table] = _fitted(table, own, vit, host)
    given = import_module(host.filter).checkpoint_filter_fn
    options = {"adapt_layer_scale": True} if "adapt_layer_scale" in signature(given).parameters else {}
    return given(named, vit, **options)


def renamed(weights: Mapping[str, Tensor], patterns: Iterable[tuple[str, str]]) -> Weights:
    """Return weights with each pattern replaced in their names, one after the other."""
    found: Weights = {}
    for name, value in weights.items():
        for pattern, ours in patterns:
            name = re.sub(pattern, ours, name)
        found[name] = value
    return found


def _fitted(table: Tensor, own: nn.Parameter, vit: nn.Module, host: Host) -> Tensor:
    """Return a file's table as the model's kind of table, where timm's filter does not see to it."""
    prefix, rows = getattr(vit, host.prefix) if host.prefix else 0, table.shape[1]
    if prefix == 0 and not _square(rows) and _square(rows - 1):
        table = table[:, 1:]  # without the row of a class token that the model does not have
    record: Positions | None = vit.__dict__.get(RECORD)
    name = host.own if record is None else record.scheme.embedding.name
    kind = POSITION_EMBEDDINGS[name].table
    if kind is not None and not kind.learns:
        if table.shape != own.shape:
            return own.detach()  # a fixed table is made for the grid, not resized
        if not torch.allclose(table.to(own), own, atol=1e-4):
            raise RunError(
                f"The file's position table was learnt, and this model's is fixed (pe={name!r}). Use pe='learnable'."
            )
    elif host.behind is not None and table.shape != own.shape:
        if not _square(rows):
            raise RunError(
                f"{host.table} has {rows} rows, no square, so its grid is not known and it is not resized. "
                "Create the model with the img_size of the file, load it, then call set_input_size."
            )
        side = math.isqrt(rows)
        return host.resize(table, attrgetter(host.grid)(vit), (side, side), prefix)
    return table


def _square(count: int) -> bool:
    return math.isqrt(count) ** 2 == count


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> Loaded:
    """Load a file (or a state dict) of the authors', of timm or of ours into a vision transformer, in place.

    Returns what was missing, and warns of it: PE norms and tables of a join may be missing, nothing else. Raises
    RunError naming what does not fit.
    """
    where = str(source) if isinstance(source, str | Path) else "The state dict"
    vit, _ = find(model)
    weights = convert(read(source) if isinstance(source, str | Path) else source, vit)
    own = vit.state_dict()
    foreign = [name for name in weights if name not in own]
    missing = [name for name in own if name not in weights]
    if any(_OF_A_JOIN.search(name) for name in foreign):
        raise RunError(
            f"{where} was trained with another join or table than this model's: {_named(foreign)} not in the model. "
            "Apply that join first: lape.apply(model, join=..., pe=...)."
        )
    lacking = [name for name in missing if not _OF_A_JOIN.search(name)]
    if foreign or lacking:
        parts = [
            f"{_named(names)} not in the {place}" for names, place in ((foreign, "model"), (lacking, "file")) if names
        ]
        raise RunError(f"{where} is of another model: {'; '.join(parts)}. Create the model that it was saved from.")
    for name, parameter in own.items():
        if name in weights and weights[name].shape != parameter.shape:
            raise RunError(
                f"{where} is of another model: {name} is {tuple(weights[name].shape)} there and "
                f"{tuple(parameter.shape)} here. Create the model with the same sizes and number of classes."
            )
    vit.load_state_dict(weights, strict=False)
    loaded = Loaded(tuple(missing))
    if missing:
        warnings.warn(f"{where}: {loaded}", stacklevel=2)
    return loaded


def _named(names: list[str] | tuple[str, ...]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"

"""Weights from files: the authors' checkpoints, timm's and ours. The only room that opens weight files."""

import argparse
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from lape.errors import RunError
from lape.hosts import find
from lape.positions import BIAS_OWN, BIAS_TABLE, Positions
from lape.surgery import RECORD

Weights = dict[str, Tensor]

# The authors' names (github.com/Ingrid725/LaPE) and ours, where they differ.
_RENAMED = (
    (re.compile(r"^pos_embed(\d+)$"), r"blocks.\1.pos_embed"),
    (re.compile(rf"^(blocks\.\d+)\.attn\.({BIAS_TABLE})$"), r"\1.\2"),
    (re.compile(r"^(blocks\.\d+)\.attn\.(pe_norm\.\w+)$"), rf"\1.{BIAS_OWN}.\2"),
)
_RECOMPUTED = re.compile(r"\.relative_position_index$")
_OF_A_JOIN = re.compile(rf"\.(pe_norm\.\w+|{BIAS_TABLE}|pos_embed)$")


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
    """Return weights under a model's own names and sizes, from the authors' or timm's.

    Tables are resized to the model's grid. Raises RunError where a file's table is not the fixed table of the model.
    """
    vit, _ = find(model)
    named: Weights = {}
    for name, value in weights.items():
        for pattern, ours in _RENAMED:
            name = pattern.sub(ours, name)
        if not _RECOMPUTED.search(name):
            named[name] = value
    table = named.get("pos_embed")
    if table is not None and table.ndim == 2:  # the authors' 1-D sinusoid has no batch axis
        named["pos_embed"] = table = table[None]
    record: Positions | None = vit.__dict__.get(RECORD)
    kind = record and record.scheme.embedding.table
    if record is not None and kind is not None and not kind.learns and table is not None:
        own = vit.get_parameter("pos_embed")
        if table.shape != own.shape:
            named["pos_embed"] = own.detach()  # a fixed table is made for the grid, not resized
        elif not torch.allclose(table.to(own), own, atol=1e-4):
            raise RunError(
                f"The file's position table was learnt, and this model's is fixed (pe={record.scheme.embedding.name!r})"
                ". Use pe='learnable'."
            )
    from timm.models.vision_transformer import checkpoint_filter_fn

    return checkpoint_filter_fn(named, vit, adapt_layer_scale=True)  # pyright: ignore[reportArgumentType]


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
    lacking = [name for name in missing if not _OF_A_JOIN.search(f".{name}")]
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

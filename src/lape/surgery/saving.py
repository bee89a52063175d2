"""What files say of a join, and how a model of transformers writes it into the config.json beside its weights."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import currentframe, signature
from typing import Any, NamedTuple

from torch import Tensor, nn

from lape import __version__
from lape.errors import RunError, UsageError
from lape.hosts import class_name
from lape.hosts.registry import RECORD
from lape.method import Grid
from lape.names import SchemeNames
from lape.surgery.layers import grid_text
from lape.surgery.positions import FoldedRung, Positions
from lape.surgery.weak import Weak

SETTING = "lape"  # of a config.json of transformers, and of what is put on a configuration that was read from one
_THEIRS = "transformers.modeling_utils.PreTrainedModel"


class Applied(NamedTuple):
    """A join as it was applied: its names, the grid of its tables, and the grids that it was folded for."""

    names: SchemeNames
    grid: Grid
    folded_for: tuple[Grid, ...] = ()

    @classmethod
    def of(cls, record: Positions) -> "Applied":
        """Return what was applied to a model."""
        return cls(record.scheme.names, record.grid, record.folded_for)

    @classmethod
    def read(cls, values: Any, where: str) -> "Applied":
        """Return what a file says was applied; raise RunError, naming the file, where it says no such thing."""
        try:
            names = SchemeNames(*(str(values[name]) for name in SchemeNames._fields))
            return cls(names, _grid(values["grid"]), tuple(map(_grid, values.get("folded_for", ()))))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{where} does not say which join the model has ({type(error).__name__}: {error}). Is it complete?"
            ) from error

    @property
    def values(self) -> dict[str, Any]:
        """What `read` reads, as JSON holds it."""
        folded = {"folded_for": [list(grid) for grid in self.folded_for]} if self.folded_for else {}
        return {**self.names._asdict(), "grid": list(self.grid), **folded}

    def __str__(self) -> str:
        folded = f", folded for {', '.join(map(grid_text, self.folded_for))}" if self.folded_for else ""
        return ", ".join(f"{name}={value!r}" for name, value in self.names._asdict().items()) + folded


def _grid(sides: Any) -> Grid:
    rows, columns = sides
    if type(rows) is not int or type(columns) is not int or min(rows, columns) < 1:
        raise ValueError(f"{sides} is no grid")
    return rows, columns


def of_the_join(record: Positions, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of a model's state is of its join: what that added, the table, and what it was folded to."""
    folded = tuple(f"{name}." for name, part in record.model.named_modules() if isinstance(part, FoldedRung))
    names = {*record.added, record.host.table}
    return {name: value for name, value in state.items() if name in names or name.startswith(folded)}


def is_of_transformers(kind: type) -> bool:
    """Return whether models of a class are saved by their own `save_pretrained`."""
    return any(class_name(one) == _THEIRS for one in kind.__mro__)


def say_when_saved(record: Positions, model: nn.Module) -> None:
    """Have every model of transformers that holds the operated one, as far as it is known, say so when it is saved."""
    for part in model.modules():
        within = is_of_transformers(type(part)) and any(inner is record.model for inner in part.modules())
        if within and not _in_its_constructor(part):  # that class makes the join again by itself
            part.__dict__["save_pretrained"] = _SavePretrained(record, Weak(part))


def _in_its_constructor(model: nn.Module) -> bool:
    """Return whether the constructor of a model is running."""
    own = {constructor.__code__ for kind in type(model).__mro__ if hasattr(constructor := kind.__init__, "__code__")}
    frame = currentframe()
    while frame is not None:
        if frame.f_code in own and frame.f_locals.get(frame.f_code.co_varnames[0]) is model:
            return True
        frame = frame.f_back
    return False


def say_no_more(model: nn.Module) -> None:
    """Let models be saved as their classes do it."""
    for part in model.modules():
        if isinstance(part.__dict__.get("save_pretrained"), _SavePretrained):
            del part.__dict__["save_pretrained"]


@dataclass
class _SavePretrained:
    """`save_pretrained` of a model of transformers: the configuration that is written tells of the join."""

    record: Positions
    model: Weak[nn.Module]

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Save the model as its class does."""
        model: Any = self.model.reference()
        if model is None:
            raise UsageError(
                "The model that is to be saved is gone. Keep it: model = ..., then model.save_pretrained(...)."
            )
        kind: Any = type(model)
        if self.record.model.__dict__.get(RECORD) is not self.record:  # removed by way of a part of the model
            return kind.save_pretrained(model, *inputs, **options)
        if "save_original_format" in signature(kind.save_pretrained).parameters:
            # Names of an older version's files are for those who read them without lape, and nobody may; and Trainer
            # resumes by load_state_dict, which passes over what is named otherwise.
            options.setdefault("save_original_format", False)
        plain = model.config  # it may be another model's too
        telling = copy.copy(plain)
        telling.__class__ = _telling(type(plain), Applied.of(self.record), kind.__name__)
        model.config = telling
        try:
            return kind.save_pretrained(model, *inputs, **options)
        finally:
            model.config = plain


def _telling(kind: Any, applied: Applied, of: str) -> Any:
    """Return a class of configurations that is written with a join."""

    def to_json_string(self: Any, *inputs: Any, **options: Any) -> str:
        values = json.loads(kind.to_json_string(self, *inputs, **options))
        values = refusing(values, of) | {SETTING: applied.values | {"version": __version__}}
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    return type(kind.__name__, (kind,), {"to_json_string": to_json_string, "__module__": kind.__module__})


# transformers' own classes know no join, and would load the model without it. They refuse an attention that they do not
# know, and a fusion, by naming it: so what stands there is what they say. Their kernels' names have a slash.
_ATTENTION, _FUSION = "attn_implementation", "fusion_config"


def refusing(values: Mapping[str, Any], of: str) -> dict[str, Any]:
    """Return the settings of a model, and of the models inside of it, so that transformers alone refuses them."""
    inner = {
        name: refusing(value, of) for name, value in values.items() if isinstance(value, dict) and "model_type" in value
    }
    reason = f"not without its LaPE join, load it by lape.joined({of}).from_pretrained"
    return {**values, **inner, _ATTENTION: reason, _FUSION: {reason: True}}


def accepting(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that `refusing` was given."""
    return {
        name: accepting(value) if isinstance(value, dict) and "model_type" in value else value
        for name, value in values.items()
        if name not in (_ATTENTION, _FUSION)
    }

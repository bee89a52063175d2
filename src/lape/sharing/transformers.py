"""Models of Hugging Face transformers with a join, from the folders that their own `save_pretrained` writes.

Imports transformers nowhere: the class is the user's.
"""

import copy
from typing import Any

from torch import nn

from lape.errors import RunError, UsageError
from lape.hosts import table_of
from lape.surgery.operation import apply, fold, positions
from lape.surgery.saving import SETTING, Applied, accepting, is_of_transformers, of_the_join


def joined(kind: Any) -> Any:
    """Return a class of transformers whose `from_pretrained` gives models with the join that they were saved with.

    After `lape.apply(model)`, `model.save_pretrained(folder)` and the checkpoints of Trainer write the join into
    config.json, and transformers' own classes refuse the folder. `from_pretrained` of the class returned here takes
    all that transformers' does (`dtype`, `device_map`, `output_loading_info`, ...), and returns a model of `kind`
    itself, with its join and its weights, bit for bit. A model that was folded comes back folded. What config.json
    says of the join chooses nothing that is imported, fetched or opened.

    Args:
        kind: A class of transformers, as `transformers.ViTForImageClassification`; not one of its Auto classes, which
            would leave the choice to the file.

    Returns:
        A subclass of `kind`.

    Raises:
        UsageError: For a class that is not of transformers. And its `from_pretrained`, for a folder without a join.
        RunError: By its `from_pretrained`, for a folder whose join the model cannot have, and for one whose weights
            lack what the join needs.

    Example:
        >>> import tempfile
        >>> import lape, transformers
        >>> config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
        >>> model = lape.apply(transformers.ViTForImageClassification(config))
        >>> folder = tempfile.mkdtemp()
        >>> model.save_pretrained(folder)
        >>> again = lape.joined(transformers.ViTForImageClassification).from_pretrained(folder)
        >>> type(again).__name__, again.vit.layers[1].pe_norm
        ('ViTForImageClassification', PositionNorm(32, eps=1e-12, g⊙Norm(ω) + b))
    """
    if not (isinstance(kind, type) and is_of_transformers(kind)):
        raise UsageError(
            f"lape.joined takes a class of transformers, as transformers.ViTModel; received {kind!r}. Models of timm "
            "are loaded by lape.from_pretrained, and those of other classes by lape.from_pretrained(folder, build=...)."
        )
    plain: Any = kind

    def begin(self: Any, config: Any, *inputs: Any, **options: Any) -> None:
        config = copy.deepcopy(config)
        values = vars(config).pop(SETTING, None)
        for inner in vars(config).values():
            getattr(inner, "__dict__", {}).pop(SETTING, None)
        if values is None:
            raise UsageError(
                f"No join is saved for this {plain.__name__}: its config.json has no {SETTING!r}. Load it by "
                f"{plain.__name__}.from_pretrained, then lape.apply(model)."
            )
        applied = Applied.read(values, "config.json")
        if isinstance(config, plain.config_class):
            config.__class__ = plain.config_class
        plain.__init__(self, config, *inputs, **options)
        self.__class__ = plain  # what is loaded is pickled, copied and saved as every model of its class
        try:
            apply(self, *applied.names, grid=applied.grid)
        except UsageError as error:
            raise RunError(f"config.json tells of a join ({applied}) that cannot be made: {error}") from error
        if applied.folded_for:
            fold(self, applied.folded_for)

    def from_pretrained(cls: Any, *inputs: Any, output_loading_info: bool = False, **options: Any) -> Any:
        model, told = super(Joined, cls).from_pretrained(*inputs, output_loading_info=True, **options)
        _refuse_incomplete(model, told)
        _keep_fixed(model)
        return (model, told) if output_loading_info else model

    Joined: Any = type(
        plain.__name__,
        (plain,),
        {
            "__init__": begin,
            "__module__": plain.__module__,  # by it transformers tells a class whose names it converts from a user's
            "__doc__": f"{plain.__name__} with the join that it was saved with.",
            "config_class": _reading(plain.config_class),
            "from_pretrained": classmethod(from_pretrained),
        },
    )
    return Joined


def _reading(kind: Any) -> Any:
    """Return a class of configurations that reads what one with a join wrote."""

    def get_config_dict(cls: Any, *inputs: Any, **options: Any) -> Any:
        values, unused = super(Reading, cls).get_config_dict(*inputs, **options)
        if SETTING not in values:
            return values, unused
        join = values[SETTING]
        values = accepting(values)
        for inner in values.values():  # a tower of a larger model is read from the part that is its own
            if isinstance(inner, dict) and "model_type" in inner:
                inner[SETTING] = join
        return values, unused

    Reading: Any = type(
        kind.__name__, (kind,), {"__module__": kind.__module__, "get_config_dict": classmethod(get_config_dict)}
    )
    return Reading


def _keep_fixed(model: nn.Module) -> None:
    """Have nothing learn that did not: transformers makes new parameters of what it loads."""
    record = positions(model)
    table, stored = record.scheme.embedding.table, table_of(record.model, record.host)
    if record.folded_for:
        model.requires_grad_(False)
    elif table is not None and stored is not None and not table.learns:
        stored.requires_grad_(False)


def _refuse_incomplete(model: nn.Module, told: Any) -> None:
    """Raise RunError where a file lacked what is of the join: transformers gives that start values."""
    record = positions(model)
    (path,) = (f"{name}." if name else "" for name, part in model.named_modules() if part is record.model)
    needed = {f"{path}{name}" for name in of_the_join(record, record.model.state_dict())}
    begun = {*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])}
    lacking = sorted(needed & begun)
    if lacking:
        raise RunError(
            f"config.json tells of a join ({Applied.of(record)}), and {lacking[0]} is not in the weights beside it. "
            "Save the model again, both files at once."
        )

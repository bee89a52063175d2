"""Every position embedding by its name: one part, or a sum of parts, as `lape.apply(pe=...)` takes it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lape.embeddings.biases import BIASES, Alibi, LookHere, RelativeBias
from lape.embeddings.convolutions import CONVOLUTIONS, Convolution
from lape.embeddings.rotations import ROTATIONS, Rotation
from lape.embeddings.tables import TABLES, FourierTable, Table
from lape.errors import UsageError, choose

Part = Table | FourierTable | RelativeBias | Alibi | LookHere | Rotation | Convolution


@dataclass(frozen=True)
class PositionEmbedding:
    """What a model knows of positions: at most one part of each kind.

    Example:
        >>> from lape.embeddings import POSITION_EMBEDDINGS
        >>> POSITION_EMBEDDINGS["learnable+relative"].bias
        RelativeBias(normed=False)
    """

    name: str  # as `lape.apply(pe=...)` takes it
    table: Table | FourierTable | None = None  # joined with the tokens
    bias: RelativeBias | Alibi | LookHere | None = None  # added to the attention logits
    rotation: Rotation | None = None  # turns queries and keys
    convolution: Convolution | None = None  # stands behind the first blocks

    def __reduce__(self) -> tuple[Any, ...]:
        return position_embedding, (self.name,)  # of what a part is made, not all can be pickled

    @property
    def parts(self) -> tuple[Part, ...]:
        """What there is of the four."""
        return tuple(part for part in (self.table, self.bias, self.rotation, self.convolution) if part is not None)

    def beside(self, table: str) -> str:
        """Return the name of this embedding with another table."""
        others = self.name.split("+")[self.table is not None :] if self.parts else []
        return "+".join([table, *others])


@dataclass(frozen=True)
class _Kind:
    """One of the four fields, the parts that there are for it, and what two of them would do."""

    field: str
    parts: Mapping[str, Part]
    twice: str


_KINDS = (
    _Kind("table", TABLES, "two tables, and a token has one row"),
    _Kind("bias", BIASES, "two biases on the same logits"),
    _Kind("rotation", ROTATIONS, "two rotations, and queries and keys are turned once"),
    _Kind("convolution", CONVOLUTIONS, "two convolutions behind one block"),
)
_NONE = "none"
_PARTS: dict[str, Part] = {name: part for kind in _KINDS for name, part in kind.parts.items()}
_NAMES = {_NONE: None, **_PARTS}
_WHAT = "a position embedding (pe)"


def position_embedding(name: str) -> PositionEmbedding:
    """Return the position embedding of a name: parts with + between them, options of a part behind colons.

    Args:
        name: "none", or parts in the order table, bias, rotation, convolution: "learnable+rope-mixed". Some parts have
            options: "fourier:features=64:hidden=16", "lookhere-90:slope=2", "rope-mixed:grid=14".

    Raises:
        UsageError: For a name that does not exist, for two parts of one kind, and for a spelling that is not the one.

    Example:
        >>> from lape.embeddings import position_embedding
        >>> position_embedding("learnable+rope-axial").rotation
        AxialRotation(theta=100.0, grid=0)
        >>> position_embedding("rope-axial+rope-mixed")
        Traceback (most recent call last):
        lape.errors.UsageError: pe='rope-axial+rope-mixed' has two rotations, ...
    """
    texts = name.split("+")
    if name == _NONE:
        return PositionEmbedding(name)
    if _NONE in texts:
        rest = "+".join(text for text in texts if text != _NONE)
        raise UsageError(f"pe={name!r} adds something to nothing. Use pe={rest or _NONE!r}.")
    parts: dict[str, Part] = {}
    spelt: dict[str, str] = {}
    for text in texts:
        kind, part, spelling = _part(text)
        if kind.field in parts:
            nearest = " or ".join(f"pe={_joined(spelt | {kind.field: one})!r}" for one in (spelt[kind.field], spelling))
            raise UsageError(f"pe={name!r} has {kind.twice}. Use {nearest}.")
        parts[kind.field], spelt[kind.field] = part, spelling
    if name != (usual := _joined(spelt)):
        raise UsageError(f"pe={name!r} has another name here, so that it is one in every table. Use pe={usual!r}.")
    fitting: dict[str, Any] = parts
    return PositionEmbedding(name, **fitting)


def _joined(spelt: Mapping[str, str]) -> str:
    return "+".join(spelt[kind.field] for kind in _KINDS if kind.field in spelt)


def _part(text: str) -> tuple[_Kind, Part, str]:
    """Return the kind of a part, the part, and its usual spelling."""
    name, *settings = text.split(":")
    choose(_NAMES, name, _WHAT)
    kind = next(kind for kind in _KINDS if name in kind.parts)
    usual, options = kind.parts[name], {}
    for setting in settings:
        option, equals, value = setting.partition("=")
        if option not in usual.options or option in options or not equals:
            can = f"Its options: {', '.join(usual.options)}." if usual.options else "It has no options."
            raise UsageError(
                f"{setting!r} of pe={text!r} is not an option of {name}, written once as name=value. {can}"
            )
        options[option] = _value(text, option, value, getattr(usual, option))
    part = replace(usual, **options) if options else usual
    others = [field.name for field in fields(part) if getattr(part, field.name) != getattr(usual, field.name)]
    return kind, part, ":".join([name, *(f"{option}={_text(getattr(part, option))}" for option in others)])


def _value(text: str, option: str, value: str, usual: Any) -> Any:
    """Return the value of an option, of the type of the usual one."""
    words = {"true": True, "false": False}
    try:
        return words[value] if isinstance(usual, bool) else type(usual)(value)
    except (KeyError, ValueError) as error:
        like = " or ".join(words) if isinstance(usual, bool) else "a whole number" if type(usual) is int else "a number"
        raise UsageError(f"{option} of pe={text!r} takes {like}; received {value!r}.") from error


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}"


class _PositionEmbeddings(Mapping[str, PositionEmbedding]):
    """All position embeddings by name: it lists "none" and the parts, and finds their sums too."""

    def __getitem__(self, name: str) -> PositionEmbedding:
        try:
            return position_embedding(name)
        except UsageError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)


POSITION_EMBEDDINGS: Mapping[str, PositionEmbedding] = _PositionEmbeddings()


def place(name: str) -> list[int]:
    """Return where a position embedding stands in a list: beside those that begin with the same part."""
    names = list(_NAMES)
    return [names.index(part.partition(":")[0]) for part in name.split("+")]

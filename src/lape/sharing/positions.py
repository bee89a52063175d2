"""The positions of a model as a small file of their own, which is put on the same base model again."""

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lape import __version__
from lape.errors import RunError, UsageError, first_line
from lape.files import writing
from lape.hosts import Host, find
from lape.hosts.registry import RECORD
from lape.sharing.hub import header
from lape.surgery.operation import apply, fold, positions, remove
from lape.surgery.saving import Applied, of_the_join
from lape.weights import opened, refuse_another

HEADER = "lape-positions"  # the key of what is known of positions in the header of their file
MOST_GRIDS = 1000  # that a file may be folded for
Model = TypeVar("Model", bound=nn.Module)
Print = dict[str, list[Any]]  # of each tensor: shape, number format, digest of its values


def save_positions(model: nn.Module, path: str | Path) -> Path:
    """Write what `lape.apply` added to a model, and no more: position tables, PE norms, gains, or what they were folded
    to.

    For many models that share one base model, whose other parameters did not change. `lape.load_positions` puts them on
    that base model again. The file holds the join, and a digest of each tensor of the base model.

    Args:
        model: A model that a join is applied to, folded or not.
        path: A file that ends in .safetensors.

    Returns:
        The path.

    Raises:
        UsageError: For a model without a join, for one whose tensors are sharded, quantised or without values, and
            where a file that lape did not write is in the way.
        RunError: Where the disk refuses.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import lape
        >>> model = lape.create_model("vit_nano_patch2_8", depth=2)
        >>> lape.save_positions(model, Path(tempfile.mkdtemp()) / "positions.safetensors").name
        'positions.safetensors'
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"Positions are saved as one .safetensors file; received {path}. Name such a file.")
    record = positions(model)
    from safetensors.torch import save

    state = _values(record.model)
    added = of_the_join(record, state)
    base = {name: value for name, value in state.items() if name not in added}
    told = {**Applied.of(record).values, "base": _printed(base), writing.MARK: __version__}
    values = {name: value.detach().cpu().contiguous() for name, value in added.items()}
    writing.write_marked({path: save(values, {"format": "pt", HEADER: json.dumps(told)})})
    return path


def load_positions(model: Model, path: str | Path, *, besides: Iterable[str] = (), host: Host | None = None) -> Model:
    """Put positions that `lape.save_positions` wrote on their base model, in place: the join is applied, and its tables
    and norms are those of the file, bit for bit.

    Args:
        model: The base model, without a join: one that was removed by `lape.remove` is one too.
        path: The file.
        besides: Parts of the transformer that may be others than they were, as ["head"].
        host: Describes a model of a class of your own.

    Returns:
        The same model.

    Raises:
        UsageError: For a model that has a join, that carries none, or whose tensors are sharded, quantised or without
            values.
        RunError: For a file that cannot be read or is damaged, and for another base model: the message names the first
            tensor that differs. The model is then unchanged.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import lape, timm
        >>> base = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> model = lape.apply(base)
        >>> path = lape.save_positions(model, Path(tempfile.mkdtemp()) / "positions.safetensors")
        >>> base = lape.remove(model)
        >>> lape.load_positions(base, path).blocks[1].pe_norm
        PositionNorm(192, eps=1e-06, g⊙Norm(ω) + b)
    """
    path = Path(path)
    vit = find(model)[0] if host is None else model
    if RECORD in vit.__dict__:
        apply(model, host=host)  # which says so
    written, told = opened(path), _told(path)
    applied = Applied.read(told, str(path))
    if len(applied.folded_for) > MOST_GRIDS:
        raise RunError(
            f"{path} tells of {len(applied.folded_for)} grids, and a model is folded for a few. Give another."
        )
    state = _values(vit)
    try:
        with torch.device("meta"):  # as large as the file is, or not at all
            shape = _joined(_without_values(vit), applied, host)
            expected = of_the_join(positions(shape), shape.state_dict())
    except Exception as error:  # of a join that does not exist, of one that this model cannot carry, of torch for sizes
        raise RunError(
            f"{path} holds positions that this model cannot have ({first_line(error)}). Give the model that they were "
            "saved from, as it was before lape.apply."
        ) from error
    base = {name: state[name] for name in shape.state_dict() if name not in expected and name in state}
    _refuse_another_base(told.get("base"), _printed(base), tuple(besides), path)
    refuse_another(expected, written, path)
    broken = next((name for name, value in written.items() if not value.isfinite().all()), None)
    if broken:
        raise RunError(f"{path} is damaged: {broken} is not finite in it. Give another file.")
    _joined(model, applied, host)
    here = next(iter(base.values())).device
    try:
        vit.load_state_dict({name: value.to(here) for name, value in written.items()}, strict=False, assign=True)
    except RunError as error:  # of a fixed table that is another
        remove(model)
        raise RunError(f"{path} is damaged: {error}") from error
    return model


def _joined(model: Model, applied: Applied, host: Host | None) -> Model:
    """Apply a join to a model as it was applied before."""
    apply(model, *applied.names, host=host, grid=applied.grid)
    return fold(model, applied.folded_for) if applied.folded_for else model


def _without_values(vit: nn.Module) -> nn.Module:
    """Return a copy of a model whose tensors take no memory."""
    own = (*vit.parameters(), *vit.buffers())
    empty = {id(tensor): _empty(tensor) for tensor in own}
    return copy.deepcopy(vit, empty)


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _values(vit: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model by name; raise UsageError for one that is not wholly there."""
    state = {name: value for name, value in vit.state_dict().items() if isinstance(value, Tensor)}
    for name, value in state.items():
        if value.is_meta or value.layout is not torch.strided or type(value) not in (Tensor, nn.Parameter):
            kind = "on the device meta" if value.is_meta else f"a {type(value).__name__} ({value.layout})"
            raise UsageError(
                f"Positions belong to a model whose values are known, and {name} is {kind}. Save and load them while "
                "the model is whole: neither sharded nor quantised nor offloaded."
            )
    return state


def _printed(tensors: Mapping[str, Tensor]) -> Print:
    """Return what tells tensors from others."""
    return {
        name: [list(value.shape), str(value.dtype).removeprefix("torch."), _digest(value)]
        for name, value in tensors.items()
    }


def _digest(value: Tensor) -> str:
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


def _told(path: Path) -> Any:
    """Return what the header of a file tells of positions."""
    written = header(path)
    if HEADER not in written:
        raise RunError(
            f"{path} holds no positions that lape.save_positions wrote. A whole model is loaded by "
            "lape.from_pretrained, weights by lape.load_weights."
        )
    try:
        return json.loads(written[HEADER])
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({first_line(error)}). Is it complete?") from error


def _refuse_another_base(written: Any, own: Print, besides: tuple[str, ...], path: Path) -> None:
    """Raise RunError, naming the first difference, where positions were saved over another base model."""
    if not isinstance(written, dict):
        raise RunError(f"{path} does not say which base model its positions belong to. Give another file.")
    named = [name for name in {**own, **written} if not any(f"{name}.".startswith(f"{part}.") for part in besides)]
    pairs = [(name, there, here) for name in named if (there := written.get(name)) != (here := own.get(name))]
    if not pairs:
        return
    name, there, here = next((pair for pair in pairs if _of_another_shape(*pair[1:])), pairs[0])
    if here is None or not isinstance(there, list) or len(there) != len(here):
        difference = f"{name} is not in the {'model' if here is None else 'file'}"
    elif there[0] != here[0]:
        difference = f"{name} is {there[0]} there and {here[0]} here"
    elif there[1] != here[1]:
        difference = f"{name} is {there[1]} there and {here[1]} here; convert the model after loading"
    else:
        difference = f"{name} has other values"
    raise RunError(
        f"{path} was saved over another base model: {difference}. Load it over the model that its positions were "
        f"trained on; a part that may be another one is named, besides=[{name.rpartition('.')[0] or name!r}]."
    )


def _of_another_shape(there: Any, here: Any) -> bool:
    return not isinstance(there, list) or here is None or there[:1] != here[:1]

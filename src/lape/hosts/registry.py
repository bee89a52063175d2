"""The rows that are known, by class, and which of them a model is."""

import re
from reprlib import repr as brief
from typing import Any

from torch import nn

from lape.errors import UsageError
from lape.hosts.row import Host, Refusal, class_names, lacks

RECORD = "lape_positions"  # where an operated model keeps its Positions

_ROWS: dict[str, list[Host]] = {}  # by class: a class may have other paths in another version of its library
_REFUSALS: dict[str, list[Refusal]] = {}  # by class


def register(row: Host) -> Host:
    """Have `lape.apply` recognise the class that a row names, and all that inherit from it; returns the row.

    Of several rows that fit a model, that of its most specific class stands, and of one class the first whose paths
    lead somewhere.

    Args:
        row: Its `model` names the class: `lape.hosts.class_name(MyViT)`.

    Raises:
        UsageError: For a row that names no class.

    Example:
        >>> import lape
        >>> from lape.hosts import class_name, register
        >>> class MyViT: ...
        >>> row = register(lape.Host(name="my ViT", model=class_name(MyViT), table="pos", block=lape.Block("norm")))
        >>> row.name
        'my ViT'
    """
    if row.model is None:
        raise UsageError(f"A row is registered for a class, and that of {row.name!r} names none: Host(model=...).")
    _REFUSALS.pop(row.model, None)  # a row of the user's says how it is done
    rows = _ROWS.setdefault(row.model, [])
    if row not in rows:
        rows.append(row)
    return row


def refuse(refusal: Refusal) -> None:
    """Have `lape.apply` say of a class, and of all that inherit from it, why it carries no join."""
    _REFUSALS.setdefault(refusal.model, []).append(refusal)


def refuse_other_than_model(model: Any) -> None:
    """Raise UsageError for what is no module: a name, a class, None."""
    if isinstance(model, nn.Module):
        return
    name = repr(model) if isinstance(model, str) else '"vit_small_patch16_224"'
    name = name.replace("'", '"')
    what = f"{brief(model)} is a name" if isinstance(model, str) else f"{brief(model)} is none"
    raise UsageError(
        f"A join is for a model (a torch.nn.Module), and {what}. Create the model first, model = "
        f"timm.create_model({name}), and call lape.apply(model); or both at once: lape.create_model({name})."
    )


def registered() -> list[Host]:
    """Return all rows."""
    return [row for rows in _ROWS.values() for row in rows]


def find(model: nn.Module) -> tuple[nn.Module, Host]:
    """Return the transformer that `model` is, or the only one inside, and its row.

    Of one for images and one for text, as in CLIP, it is the one for images.

    Raises UsageError, saying why, where there is none or more than one.
    """
    refuse_other_than_model(model)
    transformers, misfits, reasons, kind = [], [], [], type(model).__name__
    for part in model.modules():
        rows = [row for name in class_names(part) for row in _ROWS.get(name, ())]
        refusals = [refusal for name in class_names(part) for refusal in _REFUSALS.get(name, ())]
        if reason := next((refusal.reason for refusal in refusals if refusal.concerns(part)), None):
            reasons.append(reason)
            continue
        fitting = (row for row in rows if lacks(part, row) is None)
        if RECORD in part.__dict__:
            transformers.append((part, part.__dict__[RECORD].host))
        elif (row := next(fitting, None)) is not None:
            transformers.append((part, row))
        else:
            misfits += [(part, row) for row in rows]
    of_images = [(part, row) for part, row in transformers if not row.sequence]
    if reasons and not of_images:
        raise UsageError(f"{kind} cannot carry a join: {reasons[0]} {_TAKEN}")
    transformers = of_images or transformers
    if len(transformers) == 1:
        return transformers[0]
    if transformers:
        raise UsageError(
            f"A join is applied to one vision transformer at a time; {kind} holds {len(transformers)}. "
            f"Call lape.apply on each of them."
        )
    if misfits:
        part, row = misfits[-1]
        raise UsageError(
            f"{kind} cannot carry a join: a {row.name} of this version has no {lacks(part, row)!r}. Use a version "
            "that lape knows, or give the row of this one: lape.apply(model, host=lape.Host(...))."
        )
    families = ", ".join(sorted({row.name for row in registered()}))
    raise UsageError(
        f"{kind} cannot carry a join: {_reason(model)} lape.apply takes: {families}; and a class of your own, with a "
        "row of its paths: lape.apply(model, host=lape.Host(...))."
    )


_TAKEN = "Which models can, and how to describe one of your own: docs/hosts.md."
# What a parameter is called that is a table of positions, and not of differences between them.
TABLE = re.compile(r"(?<![a-z])(?<!rel_)(?<!relative_)pos(ition(al)?)?(_?emb\w*|_?enc\w*)?(_\w+)?(\.weight)?$")


def _reason(model: nn.Module) -> str:
    table = next((name for name, value in model.named_parameters() if value.ndim > 1 and TABLE.search(name)), None)
    parts = [f"{name.rpartition('.')[2]} {type(part).__name__}".lower() for name, part in model.named_modules()]
    if table is not None:
        return f"it has a table ({table}), and lape does not know how its class adds it."
    if any("rotary" in part or "rope" in part for part in parts):
        return "its positions are rotations inside attention (RoPE), and it has no table to join."
    if not any("attention" in part or "attn" in part for part in parts):
        return "no part of it is called an attention, so there is nothing that could be told of positions."
    return "it is not of a known family."

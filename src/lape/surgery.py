"""LaPE on a foreign vision transformer, in place: apply, remove, fold.

The host's forward is left as it is. Its method that adds the table runs on a view of the model whose table is silent,
and every block takes its rung by hooks: one on the block (residual, bias), one on the norm before its attention.
Parameters keep the names that they have: the table stays `pos_embed`, the PE norm of block i is `blocks.{i}.pe_norm`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.errors import UsageError, choose
from lape.hosts import block_row, find, parts
from lape.method import Grid, PositionNorm, Rung, scheme
from lape.positions import BIAS_OWN, BIAS_TABLE, FoldedRung, Positions, by

Model = TypeVar("Model", bound=nn.Module)

RECORD = "lape_positions"  # where an operated model keeps its Positions


@dataclass
class _IntoBlock:
    """Adds the residual and the bias of a rung to what a block is called with."""

    positions: Positions
    layer: int

    def __call__(
        self, block: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        tokens, *others = inputs
        residual, _, bias = self.positions.rung(self.layer)
        if residual is not None:
            tokens = tokens + residual
        if bias is not None:
            mask = options.get("attn_mask")
            if mask is not None:
                bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
            options = options | {"attn_mask": bias.to(tokens.dtype)}
        return (tokens, *others), options


@dataclass
class _IntoAttention:
    """Adds the attention part of a rung to the output of the norm before attention."""

    positions: Positions
    layer: int

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        attention = self.positions.rung(self.layer).attention
        if attention is None:
            return output
        # LayerNorm's backward does not read its output, so the sum may take its place: an eighth of the time of a new
        # tensor (tokens of 16 images at DeiT-Ti's width, two CPU cores). Another norm may hand out its input.
        return output.add_(attention) if isinstance(norm, nn.LayerNorm) else output + attention


@dataclass
class _IntoProjection(_IntoAttention):
    """Adds it where a projection serves attention and MLP together: to the queries, keys and values alone."""

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        attention = self.positions.rung(self.layer).attention
        if attention is None:
            return output
        width = 3 * attention.shape[-1]
        projected = F.linear(attention, norm.get_parameter("weight")[-width:])
        return output + F.pad(projected, (output.shape[-1] - width, 0))


def apply(model: Model, join: str = "lape", pe: str | None = None, pe_norm: str = "layernorm") -> Model:
    """Join the position embedding of a pre-norm vision transformer with its tokens in another way, in place.

    MSA_l(LN_x|l(x_l) + LN_ω|l(ω_l)), ω_{l+1} = LN_ω|l(ω_l) for `lape` (9)-(11); the paper's Table 7 has the others.
    `pe` replaces the table; without it the model keeps its own. `pe_norm` is what stands in for LN_ω (Table 8).
    Returns the model. Raises UsageError for a model, a name or a combination that cannot be.
    """
    vit, host = find(model)
    if RECORD in vit.__dict__:
        record = positions(vit).scheme
        raise UsageError(
            f"A join is applied once: this model has join={record.join.name!r}. Call lape.remove(model) first."
        )
    table: nn.Parameter | None = getattr(vit, host.table)
    chosen = scheme(join, pe or ("none" if table is None else "learnable"), pe_norm)
    record = Positions(vit, host, chosen)
    rows = [block_row(host, block) for block in record.blocks]
    _build(record, table, keeps_own=pe is None)
    for layer, (block, row) in enumerate(zip(record.blocks, rows, strict=True)):
        if chosen.join.normed:
            places, hook = parts(block, row.norms), _IntoAttention(record, layer)
            if row.projection is not None:
                places, hook = parts(block, row.projection), _IntoProjection(record, layer)
            record.handles += [place.register_forward_hook(hook) for place in places]
        if not (chosen.join.normed or chosen.join.with_tokens) or chosen.embedding.bias is not None:
            record.handles.append(block.register_forward_pre_hook(_IntoBlock(record, layer), with_kwargs=True))
    # Bound methods, because copies and pickles of a model rebind them to the copy.
    vit.__dict__[RECORD] = record
    vit.__dict__[host.add_table] = record.embed
    vit.__dict__["no_weight_decay"] = record.no_weight_decay
    vit.__dict__["set_input_size"] = record.set_input_size
    if not isinstance(getattr(vit, host.patch_dropout), nn.Identity):
        getattr(vit, host.patch_dropout).forward = record.drop_patches
    return model


def create_model(
    name: str,
    join: str = "lape",
    pe: str | None = None,
    pe_norm: str = "layernorm",
    **options: Any,
) -> nn.Module:
    """Create a model of timm's registry, ours included, and apply a join to it; `options` are timm's.

    Raises UsageError for a name that timm does not know, with the nearest that it does, for options that the model does
    not take, and as `apply` does.
    """
    import timm

    import lape.models  # noqa: F401  registers our models with timm

    known = name.partition(".")[0]
    if "/" not in name and ":" not in name:
        choose(dict.fromkeys(timm.list_models()), known, "a model that timm knows")
    try:
        model = timm.create_model(name, **options)
    except TypeError as error:
        raise UsageError(f"{name} does not take these options: {error}. Leave them out, or name a ViT.") from error
    return apply(model, join, pe, pe_norm)


def _build(record: Positions, own: nn.Parameter | None, keeps_own: bool) -> None:
    """Give the model the tables and the PE norms of its scheme."""
    vit, host, chosen = record.model, record.host, record.scheme
    table, bias = chosen.embedding.table, chosen.embedding.bias
    some, width = next(vit.parameters()), record.width
    new = {"device": some.device, "dtype": some.dtype}
    rows, columns = record.grid

    def made() -> nn.Parameter | None:
        if table is None:
            return None
        return nn.Parameter(table.make(record.grid, record.prefix_rows, width).to(**new), requires_grad=table.learns)

    if chosen.join.table_per_layer:
        first = made() if own is None else nn.Parameter(own.detach().clone())
        for layer, block in enumerate(record.blocks):
            setattr(block, host.table, first if layer == 0 else made())
    if chosen.join.table_per_layer or not (keeps_own or (own is not None and table is not None and table.learns)):
        record.put_aside[host.table] = own
        setattr(vit, host.table, None if chosen.join.table_per_layer else made())
    for block in record.blocks:
        if bias is not None:
            logits = torch.empty((2 * rows - 1) * (2 * columns - 1), _heads(block), **new)
            setattr(block, BIAS_TABLE, nn.Parameter(nn.init.trunc_normal_(logits, std=0.02)))
        if bias is not None and bias.normed:
            block.add_module(BIAS_OWN, nn.ModuleDict({"pe_norm": nn.LayerNorm(rows * columns, **new)}))
        if chosen.join.normed:
            norm = parts(block, block_row(host, block).norms)[0]
            block.add_module("pe_norm", PositionNorm(width, getattr(norm, "eps", 1e-6), chosen.norm, **new))


def remove(model: Model) -> Model:
    """Give an operated model back its own way of joining its own table, in place; returns the model.

    Raises UsageError for a model that no join is applied to, and for a folded one.
    """
    record = positions(model)
    if record.folded_for:
        raise UsageError("A folded model has no table to give back. Fold a copy: lape.fold(copy.deepcopy(model)).")
    vit, host = record.model, record.host
    _take_out(record)
    for name, own in record.put_aside.items():
        some = next(vit.parameters())
        setattr(vit, name, own if own is None else nn.Parameter(own.to(some.device), requires_grad=own.requires_grad))
    for handle in record.handles:
        handle.remove()
    for name in (RECORD, host.add_table, "no_weight_decay", "set_input_size"):
        del vit.__dict__[name]
    getattr(vit, host.patch_dropout).__dict__.pop("forward", None)
    return model


def _take_out(record: Positions) -> None:
    """Take the tables and PE norms of a scheme out of the blocks."""
    for block in record.blocks:
        block._modules.pop("pe_norm", None)
        block._modules.pop(BIAS_OWN, None)
        block._parameters.pop(record.host.table, None)
        block._parameters.pop(BIAS_TABLE, None)


def fold(model: Model, grids: Iterable[Grid] | None = None) -> Model:
    """Freeze an operated model, in place, with every rung evaluated to a constant: no table and no PE norm is left.

    The p_l depend on parameters alone, so the outputs stay the same. `grids` are the (rows, columns) of patches that it
    will be given, its own if unsaid. Returns the model. Raises UsageError for a model that no join is applied to.
    """
    record = positions(model)
    if record.folded_for:
        raise UsageError(f"This model is folded already, for {', '.join(map(by, record.folded_for))} patches.")
    vit = record.model
    chosen = tuple((rows, columns) for rows, columns in grids or [record.own_grid()])
    with torch.no_grad():
        ladders = {grid: record.ladder(grid) for grid in chosen}
    _take_out(record)
    setattr(vit, record.host.table, None)
    for layer, block in enumerate(record.blocks):
        block.add_module("pe_folded", FoldedRung({grid: ladder[layer] for grid, ladder in ladders.items()}))
    record.folded_for = chosen
    record.put_aside.clear()
    model.eval().requires_grad_(False)
    vit.__dict__["train"] = record.train
    return model


def ladder(model: nn.Module, grid: Grid | None = None) -> list[Rung]:
    """Return the rungs of an operated model, one a layer, for its own grid of patches or another; parts (1, N, D)."""
    record = positions(model)
    return record.ladder(record.own_grid() if grid is None else grid)


def positions(model: nn.Module) -> Positions:
    """Return the record of an operated model; raise UsageError where no join is applied."""
    vit, _ = find(model)
    if RECORD not in vit.__dict__:
        raise UsageError("No join is applied to this model. Call lape.apply(model) first.")
    return vit.__dict__[RECORD]


def _heads(block: nn.Module) -> int:
    return next(part.num_heads for part in block.modules() if hasattr(part, "num_heads"))  # pyright: ignore

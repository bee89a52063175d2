"""LaPE on a foreign vision transformer, in place: apply, remove, fold.

The host's forward is left as it is. Its method that adds the table runs on a view of the model whose table is silent,
and every block takes its rung by hooks: one on the block (residual, bias), one on the norm before its attention.
Parameters keep the names that they have: the table stays `pos_embed`, the PE norm of block i is `blocks.{i}.pe_norm`.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.errors import UsageError, choose
from lape.hosts import Host, block_row, find, parts
from lape.method import JOINS, POSITION_EMBEDDINGS, Grid, PositionNorm, Rung, scheme
from lape.positions import BIAS_OWN, BIAS_TABLE, FoldedRung, Layer, Positions, by, place

Model = TypeVar("Model", bound=nn.Module)

RECORD = "lape_positions"  # where an operated model keeps its Positions


@dataclass
class _IntoEmbedding:
    """Starts a forward behind the module whose output (B, H, W, D) the table is added to."""

    positions: Positions

    def __call__(self, embedding: nn.Module, inputs: tuple[Tensor, ...], patches: Tensor) -> Tensor:
        position = self.positions.begin((patches.shape[1], patches.shape[2]))
        return patches if position is None else patches + _as(position, patches)


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
            tokens = tokens + _as(residual, tokens)
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
        attention = _as(attention, output)
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


def _as(rung: Tensor, tokens: Tensor) -> Tensor:
    """Return a rung (1, N, D) as tokens are laid out: (B, N, D), or (B, H, W, D)."""
    return rung.unflatten(1, tokens.shape[1:-1])


def apply(
    model: Model, join: str = "lape", pe: str | None = None, pe_norm: str = "layernorm", start: str = "fresh"
) -> Model:
    """Join the position embedding of a pre-norm vision transformer with its tokens in another way, in place.

    MSA_l(LN_x|l(x_l) + LN_ω|l(ω_l)), ω_{l+1} = LN_ω|l(ω_l) for `lape` (9)-(11); the paper's Table 7 has the others.
    `pe` replaces the table; without it the model keeps its own. `pe_norm` is what stands in for LN_ω (Table 8). With
    `start="preserve"` the model computes at first what it did before: ω stays in the stream, and MSA is fed
    LN_x|l(x_l) + s_l·p_l, s_l learnt from 0 on (not in the paper).
    Returns the model. Raises UsageError for a model, a name or a combination that cannot be.
    """
    vit, host = find(model)
    if RECORD in vit.__dict__:
        record = positions(vit).scheme
        raise UsageError(
            f"A join is applied once: this model has join={record.join.name!r}. Call lape.remove(model) first."
        )
    table: nn.Parameter | None = getattr(vit, host.table, None)
    chosen = scheme(join, pe or _own(host, table, join), pe_norm, start)
    own = _own(host, table, "default")
    if chosen.start.preserves and (table is None or chosen.embedding.name != own):
        raise UsageError(
            f"start={start!r} keeps what the model computes with its own position embedding, {own}; "
            f"{chosen.embedding.name} would be another. Leave pe or start out."
        )
    if host.window_bias is not None and chosen.embedding.bias is not None and chosen.embedding.bias.normed:
        raise UsageError(
            f"pe={chosen.embedding.name!r} normalises a bias over the whole grid, and a {host.name} has one in each "
            f"window. Use pe={chosen.embedding.name.replace('-layernorm', '')!r}."
        )
    record = Positions(vit, host, chosen)
    rows = [block_row(host, block) for block in record.blocks]
    _build(record, table)
    for layer, (block, row) in enumerate(zip(record.blocks, rows, strict=True)):
        if chosen.join.normed:
            places, hook = parts(block, row.norms), _IntoAttention(record, layer)
            if row.projection is not None:
                places, hook = parts(block, row.projection), _IntoProjection(record, layer)
            record.handles += [place.register_forward_hook(hook) for place in places]
        biased = chosen.embedding.bias is not None and host.window_bias is None
        if not (chosen.join.normed or chosen.join.with_tokens) or biased:
            record.handles.append(block.register_forward_pre_hook(_IntoBlock(record, layer), with_kwargs=True))
    # Bound methods, because copies and pickles of a model rebind them to the copy.
    vit.__dict__[RECORD] = record
    if host.add_table is not None:
        vit.__dict__[host.add_table] = record.embed
    if host.behind is not None:
        record.handles.append(vit.get_submodule(host.behind).register_forward_hook(_IntoEmbedding(record)))
    vit.__dict__["no_weight_decay"] = record.no_weight_decay
    vit.__dict__["set_input_size"] = record.set_input_size
    if host.patch_dropout is not None and not isinstance(getattr(vit, host.patch_dropout), nn.Identity):
        getattr(vit, host.patch_dropout).forward = record.drop_patches
    return model


def joins_of(model: nn.Module) -> tuple[str, ...]:
    """Return the joins that mean something for a model that none is applied to, with the position embedding it has."""
    vit, host = find(model)
    found = []
    for join in JOINS:
        with suppress(UsageError):
            scheme(join, _own(host, getattr(vit, host.table, None), join))
            found.append(join)
    return tuple(found)


def _own(host: Host, table: nn.Parameter | None, join: str) -> str:
    """Return the position embedding that a host keeps under a join."""
    if table is None and host.window_bias is None:
        return "none"
    return host.own if join in JOINS and JOINS[join].with_tokens else host.own_joined


def create_model(
    name: str,
    join: str = "lape",
    pe: str | None = None,
    pe_norm: str = "layernorm",
    start: str = "fresh",
    **options: Any,
) -> nn.Module:
    """Create a model of timm's registry, ours included, and apply a join to it; `options` are timm's.

    Raises UsageError for a name that timm does not know, with the nearest that it does, for options that the model does
    not take, and as `apply` does.
    """
    import timm

    from lape.models import MODELS

    known = name.partition(".")[0]
    if "/" not in name and ":" not in name:
        choose(dict.fromkeys(timm.list_models()), known, "a model that timm knows")
    joined = {"join": join, "pe": pe, "pe_norm": pe_norm, "start": start}
    try:
        model = timm.create_model(name, **options | joined if known in MODELS else options)
    except TypeError as error:
        raise UsageError(f"{name} does not take these options: {error}. Leave them out, or name a ViT.") from error
    return model if known in MODELS else apply(model, **joined)


def _build(record: Positions, own: nn.Parameter | None) -> None:
    """Give the model the tables, the biases and the PE norms of its scheme."""
    layers = record.layers(record.grid)
    widths = [record.width]
    for layer in layers[1:]:
        crossing: Any = layer.crossing
        widths.append(widths[-1] if crossing is None else crossing.reduction.out_features)
    _build_tables(record, own, layers, widths)
    _build_biases(record)
    if record.scheme.embedding.table is not None:
        _build_norms(record, layers, widths)


def _build_tables(record: Positions, own: nn.Parameter | None, layers: list[Layer], widths: list[int]) -> None:
    vit, host, join, table = record.model, record.host, record.scheme.join, record.scheme.embedding.table
    new = _kind(vit)

    def made(grid: Grid, width: int) -> nn.Parameter | None:
        if table is None:
            return None
        fresh = table.make(grid, record.prefix_rows, width) * (host.table_scale if table.learns else 1)
        return nn.Parameter(fresh.to(**new), requires_grad=table.learns)

    kept = own if table is POSITION_EMBEDDINGS[host.own].table else None
    if kept is not None and not join.table_per_layer:
        return
    record.put_aside[host.table] = own
    setattr(vit, host.table, None if join.table_per_layer else made(record.grid, record.width))
    for number, (layer, width) in enumerate(zip(layers, widths, strict=True) if join.table_per_layer else ()):
        fresh = made(layer.grid, width) if number or kept is None else nn.Parameter(kept.detach().clone())
        setattr(layer.block, host.table, fresh)


def _build_biases(record: Positions) -> None:
    vit, host, bias = record.model, record.host, record.scheme.embedding.bias
    new = _kind(vit)
    rows, columns = record.grid
    if host.window_bias is not None and bias is None:
        for name, attention in _attentions(record):
            record.put_aside[f"{name}.{BIAS_TABLE}"] = place(attention, BIAS_TABLE, None)
            attention.__dict__[host.window_bias.method] = record.no_bias
    elif host.window_bias is None and bias is not None:
        for block in record.blocks:
            logits = torch.empty((2 * rows - 1) * (2 * columns - 1), _heads(block), **new)
            setattr(block, BIAS_TABLE, nn.Parameter(nn.init.trunc_normal_(logits, std=0.02)))
            if bias.normed:
                block.add_module(BIAS_OWN, nn.ModuleDict({"pe_norm": nn.LayerNorm(rows * columns, **new)}))


def _build_norms(record: Positions, layers: list[Layer], widths: list[int]) -> None:
    join, new = record.scheme.join, _kind(record.model)
    for layer, width in zip(layers, widths, strict=True) if join.normed else ():
        norm = parts(layer.block, block_row(record.host, layer.block).norms)[0]
        amount = record.scheme.start.preserves
        norm_of_position = PositionNorm(width, getattr(norm, "eps", 1e-6), record.scheme.norm, **new, amount=amount)
        layer.block.add_module("pe_norm", norm_of_position)
    for crossing in record.crossings if join.normed or join.carries_table else ():
        norm: Any = crossing.norm
        crossing.add_module("pe_norm", PositionNorm(norm.normalized_shape[-1], norm.eps, **new))


def _kind(model: nn.Module) -> dict[str, Any]:
    some = next(model.parameters())
    return {"device": some.device, "dtype": some.dtype}


def _attentions(record: Positions) -> list[tuple[str, nn.Module]]:
    """The modules that add a relative bias of the host's own, with their names."""
    inside = {id(part) for block in record.blocks for part in parts(block, record.host.window_bias.attention)}  # pyright: ignore
    return [(name, part) for name, part in record.model.named_modules() if id(part) in inside]


def remove(model: Model) -> Model:
    """Give an operated model back its own way of joining its own table, in place; returns the model.

    Raises UsageError for a model that no join is applied to, and for a folded one.
    """
    record = positions(model)
    if record.folded_for:
        raise UsageError("A folded model has no table to give back. Fold a copy: lape.fold(copy.deepcopy(model)).")
    vit, host = record.model, record.host
    _take_out(record)
    some = next(vit.parameters())
    for name, own in record.put_aside.items():
        given_back = None if own is None else nn.Parameter(own.to(some.device), requires_grad=own.requires_grad)
        place(vit, name, given_back)
    if host.behind is not None:
        delattr(vit, host.table)  # it had no such attribute
    for handle in record.handles:
        handle.remove()
    for name in {RECORD, host.add_table, "no_weight_decay", "set_input_size"} - {None}:
        del vit.__dict__[name]
    if host.window_bias is not None:
        for _, attention in _attentions(record):
            attention.__dict__.pop(host.window_bias.method, None)
    if host.patch_dropout is not None:
        getattr(vit, host.patch_dropout).__dict__.pop("forward", None)
    return model


def _take_out(record: Positions) -> None:
    """Take the tables and PE norms of a scheme out of the blocks."""
    for part in (*record.blocks, *record.crossings):
        part._modules.pop("pe_norm", None)
        part._modules.pop(BIAS_OWN, None)
        part._parameters.pop(record.host.table, None)
        part._parameters.pop(BIAS_TABLE, None)


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

"""What a join adds to a model: tables, biases and PE norms, where their names will be; and taking them out again."""

from typing import Any

import torch
from torch import nn

from lape.errors import UsageError
from lape.hosts import as_rows, block_row, parts, table_of
from lape.method import POSITION_EMBEDDINGS, TABLES, Grid, PositionNorm
from lape.surgery.hooks import owner
from lape.surgery.layers import Layer, grid_text
from lape.surgery.positions import BIAS_OWN, BIAS_TABLE, Positions
from lape.surgery.standins import swap_parameter


def refuse_embedding(record: Positions) -> None:
    """Raise UsageError for a position embedding that means nothing to the host."""
    host, embedding = record.host, record.scheme.embedding
    if host.window_bias is not None and embedding.bias is not None and embedding.bias.normed:
        raise UsageError(
            f"pe={embedding.name!r} normalises a bias over the whole grid, and a {host.name} has one in each "
            f"window. Use pe={embedding.name.replace('-layernorm', '')!r}."
        )
    if embedding.bias is not None and host.window_bias is None and host.logits is None:
        raise UsageError(
            f"pe={embedding.name!r} is added to attention logits, and the blocks of a {host.name} take nothing to add "
            "there. Use a table alone, as pe='learnable'."
        )
    if host.sequence and record.grid[0] == 1 and embedding.table is TABLES["sinusoidal-2d"]:
        raise UsageError(
            f"pe={embedding.name!r} tells rows from columns, and a sequence has one row. Use pe='sinusoidal-1d'."
        )
    table = table_of(record.model, host)
    rows = record.prefix_rows + record.grid[0] * record.grid[1]
    other_map = table is not None and table.ndim == 4 and table.shape[1:3] != record.grid
    if table is not None and (other_map or as_rows(table).shape[1:] != (rows, record.width)):
        raise UsageError(
            f"The table of a {host.name} is {tuple(table.shape)}; {record.prefix_rows} prefix tokens and "
            f"{grid_text(record.grid)} patches of width {record.width} would have ({rows}, {record.width}). Mend "
            "the row: prefix, grid or width."
        )


def build(record: Positions, table_before: nn.Parameter | None) -> None:
    """Give the model the tables, the biases and the PE norms of its scheme."""
    layers = record.layers(record.grid)
    widths = [record.width]
    for layer in layers[1:]:
        crossing: Any = layer.crossing
        widths.append(widths[-1] if crossing is None else crossing.reduction.out_features)
    _build_tables(record, table_before, layers, widths)
    _build_biases(record)
    if record.scheme.embedding.table is not None:
        _build_norms(record, layers, widths)


def _build_tables(record: Positions, table_before: nn.Parameter | None, layers: list[Layer], widths: list[int]) -> None:
    vit, host, join, table = record.model, record.host, record.scheme.join, record.scheme.embedding.table
    new = dtype_and_device(vit)

    def new_table(grid: Grid, width: int) -> nn.Parameter | None:
        if table is None:
            return None
        fresh = table.make(grid, record.prefix_rows, width) * (host.embedding.scale if table.learns else 1)
        return nn.Parameter(fresh.to(**new), requires_grad=table.learns)

    kept = table_before if table is POSITION_EMBEDDINGS[host.embedding.own].table else None
    if kept is not None and not join.table_per_layer:
        return
    record.put_aside[host.table] = table_before
    swap_parameter(
        vit,
        host.table,
        None if join.table_per_layer else record.stored(new_table(record.grid, record.width), record.grid),
    )
    for number, (layer, width) in enumerate(zip(layers, widths, strict=True) if join.table_per_layer else ()):
        fresh = new_table(layer.grid, width) if number or kept is None else nn.Parameter(as_rows(kept.detach()).clone())
        setattr(layer.block, host.table_name, fresh)


def _build_biases(record: Positions) -> None:
    vit, host, bias = record.model, record.host, record.scheme.embedding.bias
    new = dtype_and_device(vit)
    rows, columns = record.grid
    if host.window_bias is not None and bias is None:
        for name, attention in attentions(record):
            record.put_aside[f"{name}.{BIAS_TABLE}"] = swap_parameter(attention, BIAS_TABLE, None)
    elif host.window_bias is None and bias is not None:
        for block in record.blocks:
            logits = torch.empty((2 * rows - 1) * (2 * columns - 1), _heads(block), **new)
            setattr(block, BIAS_TABLE, nn.Parameter(nn.init.trunc_normal_(logits, std=0.02)))
            if bias.normed:
                block.add_module(BIAS_OWN, nn.ModuleDict({"pe_norm": nn.LayerNorm(rows * columns, **new)}))


def _build_norms(record: Positions, layers: list[Layer], widths: list[int]) -> None:
    join, new = record.scheme.join, dtype_and_device(record.model)
    for layer, width in zip(layers, widths, strict=True) if join.normed else ():
        norm = parts(layer.block, block_row(record.host, layer.block).norms)[0]
        amount = record.scheme.start.preserves
        norm_of_position = PositionNorm(width, getattr(norm, "eps", 1e-6), record.scheme.norm, **new, amount=amount)
        owner(layer.block, block_row(record.host, layer.block)).add_module("pe_norm", norm_of_position)
    for crossing in record.crossings if join.hands_on else ():
        norm: Any = crossing.norm
        crossing.add_module("pe_norm", PositionNorm(norm.normalized_shape[-1], norm.eps, **new))


def dtype_and_device(model: nn.Module) -> dict[str, Any]:
    some = next(model.parameters())
    return {"device": some.device, "dtype": some.dtype}


def attentions(record: Positions) -> list[tuple[str, nn.Module]]:
    """The modules that add a relative bias of the host's own, with their names."""
    inside = {id(part) for block in record.blocks for part in parts(block, record.host.window_bias.attention)}  # pyright: ignore
    return [(name, part) for name, part in record.model.named_modules() if id(part) in inside]


def take_out(record: Positions) -> None:
    """Take the tables and PE norms of a scheme out of the blocks."""
    owners = [owner(block, block_row(record.host, block)) for block in record.blocks]
    for part in (*record.blocks, *owners, *record.crossings):
        part._modules.pop("pe_norm", None)
        part._modules.pop(BIAS_OWN, None)
        part._parameters.pop(BIAS_TABLE, None)
        if record.scheme.join.table_per_layer:
            part._parameters.pop(record.host.table_name, None)


def _heads(block: nn.Module) -> int:
    return next(part.num_heads for part in block.modules() if hasattr(part, "num_heads"))  # pyright: ignore

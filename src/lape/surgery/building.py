"""What a join adds to a model: tables, biases and PE norms, where their names will be; and taking them out again."""

from typing import Any

import torch
from torch import nn

from lape.embeddings import MixedRotation, PositionEncodingGenerator, RelativeBias
from lape.errors import UsageError
from lape.hosts import Host, as_rows, block_row, heads_of, parts, rotated_at, table_of, value_at
from lape.method import POSITION_EMBEDDINGS, Grid, Join, PositionNorm, Table
from lape.surgery.hooks import GENERATOR, owner
from lape.surgery.layers import Layer, grid_text
from lape.surgery.positions import BIAS_OWN, BIAS_TABLE, FOURIER, FREQUENCIES, Positions
from lape.surgery.standins import swap_parameter


def refuse_embedding(record: Positions) -> None:
    """Raise UsageError for a position embedding that means nothing to the host."""
    host, embedding = record.host, record.scheme.embedding
    bias = embedding.bias
    if host.window_bias is not None and bias is not None and (bias.normed or not bias.learns):
        table = "" if embedding.table is None else f"{embedding.name.split('+')[0]}+"
        raise UsageError(
            f"pe={embedding.name!r} makes a bias over the whole grid, and a {host.name} has one in each window. Use "
            f"pe='{table}relative'."
        )
    if embedding.bias is not None and host.window_bias is None and host.logits is None:
        raise UsageError(
            f"pe={embedding.name!r} is added to attention logits, and the blocks of a {host.name} take nothing to add "
            "there. Use a table alone, as pe='learnable'."
        )
    if host.sequence and record.grid[0] == 1 and any(part.planar for part in embedding.parts):
        raise UsageError(
            f"pe={embedding.name!r} tells rows from columns, and a sequence has one row. Use pe='sinusoidal-1d'."
        )
    _refuse_heads(record)
    _refuse_convolution(record)
    refuse_final_norm(record.model, host, record.scheme.join)
    table = table_of(record.model, host)
    rows = record.prefix_rows + record.grid[0] * record.grid[1]
    other_map = table is not None and table.ndim == 4 and table.shape[1:3] != record.grid
    if table is not None and (other_map or as_rows(table).shape[1:] != (rows, record.width)):
        raise UsageError(
            f"The table of a {host.name} is {tuple(table.shape)}; {record.prefix_rows} prefix tokens and "
            f"{grid_text(record.grid)} patches of width {record.width} would have ({rows}, {record.width}). Mend "
            "the row: prefix, grid or width."
        )


def _refuse_heads(record: Positions) -> None:
    """Raise UsageError where rotations or biases do not fit the heads of a block."""
    host, embedding = record.host, record.scheme.embedding
    if embedding.rotation is not None and value_at(record.model, host.rotary) is not None:
        raise UsageError(
            f"pe={embedding.name!r} turns queries and keys, and this {type(record.model).__name__} turns them already, "
            "by rotations of its own. They stay beside a table: pe='learnable'."
        )
    for block in record.blocks if embedding.rotation is not None else ():
        row = block_row(host, block)
        if host.stages is not None or rotated_at(row, block) is None:
            raise UsageError(
                f"pe={embedding.name!r} turns queries and keys, and in a {type(block).__name__} of a {host.name} no "
                "module puts them out where a hook could reach them (torch.nn.MultiheadAttention and windows make them "
                "within). Use a table, as pe='learnable'; for a class of your own name the modules: "
                "lape.Block(rotated=...)."
            )
        if record.head_dim(block) % 4:
            raise UsageError(
                f"pe={embedding.name!r} turns two pairs of channels and more, so 4 must divide a head's channels; this "
                f"model's heads have {record.head_dim(block)}. Use a model of other heads, or pe='alibi-2d'."
            )
    bias = embedding.bias
    for block in record.blocks if bias is not None and not isinstance(bias, RelativeBias) else ():
        bias.refuse(embedding.name, heads_of(block_row(host, block), block))  # pyright: ignore


def _refuse_convolution(record: Positions) -> None:
    """Raise UsageError for a convolution that a model has too few blocks for, or whose patches it drops."""
    embedding = record.scheme.embedding
    if embedding.convolution is None:
        return
    if record.depth < embedding.convolution.blocks:
        raise UsageError(
            f"pe={embedding.name!r} stands behind the first {embedding.convolution.blocks} blocks, and this model has "
            f"{record.depth}. Use pe={embedding.name.replace('peg-5', 'peg')!r}."
        )
    dropout = value_at(record.model, record.host.patch_dropout)
    if dropout is not None and not isinstance(dropout, nn.Identity):
        raise UsageError(
            f"pe={embedding.name!r} looks at the neighbours of every patch, and this model drops patches in training. "
            "Create it without (patch_drop_rate=0), or use another pe."
        )


def refuse_final_norm(model: nn.Module, host: Host, join: Join) -> None:
    """Raise UsageError for a join that needs a norm of all tokens behind the last block, where there is none."""
    if not join.final:
        return
    try:
        norms = [] if host.final_norm is None else parts(model, host.final_norm)
    except AttributeError:  # made without one
        norms = []
    if not norms or isinstance(norms[0], nn.Identity) or host.stages is not None:
        raise UsageError(
            f"join={join.name!r} adds to what the last norm puts out, and this {type(model).__name__} has none "
            "that every token goes through on the grid of the table (timm's norms after the mean, unless "
            "fc_norm=False is given with global_pool='avg'). Use join='pvg' or 'lape'."
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
    _build_rotations_and_convolutions(record, layers, widths)
    if record.scheme.embedding.table is not None:
        _build_norms(record, layers, widths)


def _build_tables(record: Positions, table_before: nn.Parameter | None, layers: list[Layer], widths: list[int]) -> None:
    vit, host, join, table = record.model, record.host, record.scheme.join, record.scheme.embedding.table
    new = dtype_and_device(vit)

    if table is not None and not isinstance(table, Table):
        record.put_aside[host.table] = table_before
        swap_parameter(vit, host.table, None)
        if not join.table_per_layer:
            record.holder.add_module(FOURIER, table.module(record.width, **new))
        for layer, width in zip(layers, widths, strict=True) if join.table_per_layer else ():
            layer.block.add_module(FOURIER, table.module(width, **new))
        return

    def new_table(grid: Grid, width: int) -> nn.Parameter | None:
        if table is None:
            return None
        fresh = table.make(grid, record.prefix_rows, width) * (host.embedding.scale if table.learns else 1)
        return nn.Parameter(fresh.to(**new), requires_grad=table.learns)

    kept = table_before if table == POSITION_EMBEDDINGS[host.embedding.own].table else None
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
    elif host.window_bias is None and isinstance(bias, RelativeBias):
        for block in record.blocks:
            logits = torch.empty((2 * rows - 1) * (2 * columns - 1), heads_of(block_row(host, block), block), **new)
            setattr(block, BIAS_TABLE, nn.Parameter(nn.init.trunc_normal_(logits, std=0.02)))
            if bias.normed:
                block.add_module(BIAS_OWN, nn.ModuleDict({"pe_norm": nn.LayerNorm(rows * columns, **new)}))


def _build_rotations_and_convolutions(record: Positions, layers: list[Layer], widths: list[int]) -> None:
    new, embedding = dtype_and_device(record.model), record.scheme.embedding
    for block in record.blocks if isinstance(embedding.rotation, MixedRotation) else ():
        heads = heads_of(block_row(record.host, block), block)
        frequencies = embedding.rotation.start(heads, record.head_dim(block))  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        setattr(block, FREQUENCIES, nn.Parameter(frequencies.to(**new)))
    count = 0 if embedding.convolution is None else embedding.convolution.blocks
    for layer, width in zip(layers[:count], widths, strict=False):
        layer.block.add_module(GENERATOR, PositionEncodingGenerator(width, **new))


def _build_norms(record: Positions, layers: list[Layer], widths: list[int]) -> None:
    join, new = record.scheme.join, dtype_and_device(record.model)
    for layer, width in list(zip(layers, widths, strict=True))[join.first :] if join.normed else ():
        norm = parts(layer.block, block_row(record.host, layer.block).norms)[0]
        amount = record.scheme.start.preserves
        norm_of_position = PositionNorm(width, getattr(norm, "eps", 1e-6), record.scheme.norm, **new, amount=amount)
        owner(layer.block, block_row(record.host, layer.block)).add_module("pe_norm", norm_of_position)
    for crossing in record.crossings if join.hands_on else ():
        norm: Any = crossing.norm
        crossing.add_module("pe_norm", PositionNorm(norm.normalized_shape[-1], norm.eps, **new))
    if join.final:
        norm: Any = parts(record.model, str(record.host.final_norm))[0]
        of_final = PositionNorm(
            record.width, getattr(norm, "eps", 1e-6), record.scheme.norm, **new, amount=record.scheme.start.preserves
        )
        record.around_the_final_norm.add_module("pe_norm", of_final)


def dtype_and_device(model: nn.Module) -> dict[str, Any]:
    some = next(model.parameters())
    return {"device": some.device, "dtype": some.dtype}


def attentions(record: Positions) -> list[tuple[str, nn.Module]]:
    """The modules that add a relative bias of the host's own, with their names."""
    inside = {id(part) for block in record.blocks for part in parts(block, record.host.window_bias.attention)}  # pyright: ignore
    return [(name, part) for name, part in record.model.named_modules() if id(part) in inside]


def take_out(record: Positions) -> None:
    """Take out the tables, frequencies and PE norms of a scheme, all but the host's own table."""
    owners = [owner(block, block_row(record.host, block)) for block in record.blocks]
    around = [record.around_the_final_norm] if record.scheme.join.final else []
    record.holder._modules.pop(FOURIER, None)
    for part in (*record.blocks, *owners, *record.crossings, *around):
        for name in ("pe_norm", BIAS_OWN, FOURIER):
            part._modules.pop(name, None)
        for name in (BIAS_TABLE, FREQUENCIES):
            part._parameters.pop(name, None)
        if record.scheme.join.table_per_layer:
            part._parameters.pop(record.host.table_name, None)

"""LaPE on a foreign vision transformer, in place: apply, remove, fold.

The host's forward is left as it is. Its method that adds the table runs on a view in which the table is what joins the
tokens, or zeros, and every block takes its rung by hooks: one on the block (residual, bias), one on the norm before
its attention. Parameters keep the names that they have: timm's table stays `pos_embed`, and the PE norm of its block i
is `blocks.{i}.pe_norm`.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lape.errors import UsageError
from lape.hosts import RECORD, Host, block_row, find, grid_of, lacks, parts, read, table_of
from lape.method import (
    JOINS,
    POSITION_EMBEDDINGS,
    PRESERVE_WITHOUT_TABLE,
    TABLES,
    Grid,
    PositionNorm,
    Rung,
    scheme,
)
from lape.surgery.hooks import hooks_of, owner
from lape.surgery.positions import BIAS_OWN, BIAS_TABLE, FoldedRung, Layer, Positions, by, place

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _IntoEmbedding:
    """Starts a forward behind the module whose output (B, H, W, D) the table is added to."""

    positions: Positions

    def __call__(self, embedding: nn.Module, inputs: tuple[Tensor, ...], patches: Tensor) -> Tensor:
        position = self.positions.begin((patches.shape[1], patches.shape[2]))
        return patches if position is None else patches + self.positions.laid_out(position, patches)


@dataclass
class _IntoSequence:
    """Starts a forward before the module to whose input, a sequence, the table is added."""

    positions: Positions

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens: Tensor = inputs[0] if inputs else next(iter(options.values()))
        if tokens.is_nested:
            raise UsageError("A nested tensor has no grid. Give a padded one, with src_key_padding_mask.")
        position = self.positions.begin(self.positions.grid_of(tokens))
        if position is not None:
            tokens = tokens + self.positions.laid_out(position, tokens)
        if inputs:
            return (tokens, *inputs[1:]), options
        return inputs, options | {next(iter(options)): tokens}


def apply(
    model: Model,
    join: str = "lape",
    pe: str | None = None,
    pe_norm: str = "layernorm",
    start: str = "fresh",
    *,
    host: Host | None = None,
    grid: Grid | None = None,
) -> Model:
    """Join the position embedding of a pre-norm vision transformer with its tokens in another way, in place.

    With `join="lape"` layer l computes MSA_l(LN_x|l(x_l) + p_l) with p_l = LN_ω|l(ω_l), ω_0 = ω and ω_{l+1} = p_l
    (9)-(11). Parameters keep their names, and every block gets a `pe_norm`. The function of the model changes, so train
    it afterwards; `start="preserve"` keeps the function at first.

    Args:
        model: A model that is, or contains, one vision transformer of a known library or of `host`.
        join: "default", "shared", "unshared", "lape-sharing" or "lape" (`lape.method.JOINS`, the paper's Table 7).
        pe: The position embedding, one of `lape.method.POSITION_EMBEDDINGS`; None keeps the model's own.
        pe_norm: What stands in the place of LN_ω, one of `lape.method.POSITION_NORMS` (Table 8).
        start: "fresh"; or "preserve": ω stays in the residual stream, and attention gets s_l·p_l with s_l learnt from 0
            on, so that the model first computes what it did before (not in the paper).
        host: Describes a model of a class of your own.
        grid: (rows, columns) of tokens, for a model that does not say it; (1, longest length) for sequences.

    Returns:
        The same model.

    Raises:
        UsageError: For a model that cannot carry a join or carries one already, for a name that does not exist, and for
            a combination that has no meaning.

    Example:
        >>> import torch
        >>> import lape, timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10)
        >>> model = lape.apply(model, pe="sinusoidal-1d")
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 10])
        >>> model.blocks[1].pe_norm
        PositionNorm(192, eps=1e-06, g⊙Norm(ω) + b)
    """
    vit, host = find(model) if host is None else _described(model, host)
    if RECORD in vit.__dict__:
        record = positions(vit).scheme
        raise UsageError(
            f"A join is applied once: this model has join={record.join.name!r}. Call lape.remove(model) first."
        )
    table = table_of(vit, host)
    chosen = scheme(join, pe or _own(vit, host, join), pe_norm, start)
    if chosen.start.preserves:
        own = POSITION_EMBEDDINGS[_own(vit, host, "default")]
        if chosen.embedding.bias is not own.bias or (table is not None and chosen.embedding.table is not own.table):
            raise UsageError(
                f"start={start!r} keeps what the model computes with its own position embedding, {own.name}; "
                f"{chosen.embedding.name} would be another. Leave pe or start out."
            )
        if table is None:
            chosen = replace(chosen, start=PRESERVE_WITHOUT_TABLE)
    record = Positions(vit, host, chosen, _grid(vit, host, grid))
    _refuse(record)
    _build(record, table)
    if host.behind is not None:
        record.handles.append(vit.get_submodule(host.behind).register_forward_hook(_IntoEmbedding(record)))
    if host.before is not None:
        before = vit.get_submodule(host.before)
        record.handles.append(before.register_forward_pre_hook(_IntoSequence(record), with_kwargs=True))
    vit.__dict__[RECORD] = record
    for part, name, method in _replaced(record):
        part.__dict__[name] = method
    try:
        record.hang()
    except UsageError:
        remove(model)
        raise
    return model


def _replaced(record: Positions) -> list[tuple[nn.Module, str, Any]]:
    """What stands in an operated model for methods of its class.

    Bound methods, because copies and pickles of a model rebind them to the copy.
    """
    vit, host = record.model, record.host
    replaced: list[tuple[nn.Module, str, Any]] = [(vit, "no_weight_decay", record.no_weight_decay)]
    if host.behind is None and host.before is None:
        replaced.append((record.holder, host.add_table, record.embed))
    if hasattr(type(vit), "set_input_size"):
        replaced.append((vit, "set_input_size", record.set_input_size))
    dropout = read(vit, host.patch_dropout)
    if dropout is not None and not isinstance(dropout, nn.Identity):
        replaced.append((dropout, "forward", record.drop_patches))
    return replaced


def _described(model: nn.Module, host: Host) -> tuple[nn.Module, Host]:
    """Return a model with the row that its user gave; raise UsageError where a path of it leads nowhere."""
    missing = lacks(model, host)
    if missing is not None:
        raise UsageError(
            f"The row of {host.name!r} names {missing!r}, and {type(model).__name__} has nothing there. A row's paths "
            "begin at the model that lape.apply is given."
        )
    for block in parts(model, f"{host.stages}.{host.blocks}".strip(".")):
        try:
            parts(block, block_row(host, block).norms)
        except AttributeError as error:
            raise UsageError(
                f"The row of {host.name!r} names {block_row(host, block).norms!r} as the norm before attention, and "
                f"{type(block).__name__} has nothing there. Give lape.Block the path from the block to that norm."
            ) from error
    return model, host


def _grid(vit: nn.Module, host: Host, given: Grid | None) -> Grid:
    """Return the grid of a model's table."""
    own = grid_of(vit, host)
    if own is not None and given is not None and own != tuple(given):
        raise UsageError(f"This model says that its grid is {by(own)}, and grid={given} is another. Leave grid out.")
    if own is None and given is None:
        raise UsageError(
            f"A {host.name} does not say how many tokens it is for. Give the (rows, columns) of its tokens: "
            "lape.apply(model, grid=(1, 512)) for sequences of at most 512."
        )
    if given is not None and min(given) < 1:
        raise UsageError(f"A grid has a row and a column of tokens at least; received grid={given}. Give a larger one.")
    rows, columns = own or given  # pyright: ignore[reportGeneralTypeIssues]
    return rows, columns


def _refuse(record: Positions) -> None:
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
    if table is not None and table.shape[-2:] != (rows, record.width):
        raise UsageError(
            f"The table of a {host.name} is {tuple(table.shape)}; {record.prefix_rows} prefix tokens and "
            f"{by(record.grid)} patches of width {record.width} would have ({rows}, {record.width}). Mend the row: "
            "prefix, grid or width."
        )


def joins_of(model: nn.Module) -> tuple[str, ...]:
    """Return the joins that mean something for a model that none is applied to, with the position embedding it has."""
    vit, host = find(model)
    found = []
    for join in JOINS:
        with suppress(UsageError):
            scheme(join, _own(vit, host, join))
            found.append(join)
    return tuple(found)


def _own(vit: nn.Module, host: Host, join: str) -> str:
    """Return the position embedding that a host keeps under a join."""
    with_tokens = join in JOINS and JOINS[join].with_tokens
    if table_of(vit, host) is not None or host.window_bias is not None:
        return host.own if with_tokens else host.own_joined
    if not with_tokens and read(vit, host.rotary) is not None:
        raise UsageError(
            f"The positions of this {type(vit).__name__} are rotations inside attention (RoPE), and it has no table to "
            "join. Give it one beside them: pe='learnable'."
        )
    return "none"


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
    place(vit, host.table, None if join.table_per_layer else record.stored(made(record.grid, record.width)))
    for number, (layer, width) in enumerate(zip(layers, widths, strict=True) if join.table_per_layer else ()):
        fresh = (
            made(layer.grid, width) if number or kept is None else record.batched(nn.Parameter(kept.detach().clone()))
        )
        setattr(layer.block, host.table_name, fresh)


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
        owner(layer.block, block_row(record.host, layer.block)).add_module("pe_norm", norm_of_position)
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
    """Undo `lape.apply`, in place: the model gets back its own table and its own way of joining it.

    Args:
        model: A model that `lape.apply` or `lape.create_model` gave a join. What it learnt in its other parameters
            stays.

    Returns:
        The same model.

    Raises:
        UsageError: For a model that no join is applied to, and for a folded one, which has no table any more.

    Example:
        >>> import lape, timm
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> names = list(model.state_dict())
        >>> list(lape.remove(lape.apply(model)).state_dict()) == names
        True
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
    if not record.had_table:
        delattr(record.holder, host.table_name)
    for handle in record.handles:
        handle.remove()
    for block in record.blocks:
        hooks = hooks_of(block)
        if hooks is not None:
            hooks.take_down()
    for part, name, _ in _replaced(record):
        del part.__dict__[name]
    del vit.__dict__[RECORD]
    if host.window_bias is not None:
        for _, attention in _attentions(record):
            attention.__dict__.pop(host.window_bias.method, None)
    return model


def _take_out(record: Positions) -> None:
    """Take the tables and PE norms of a scheme out of the blocks."""
    owners = [owner(block, block_row(record.host, block)) for block in record.blocks]
    for part in (*record.blocks, *owners, *record.crossings):
        part._modules.pop("pe_norm", None)
        part._modules.pop(BIAS_OWN, None)
        part._parameters.pop(BIAS_TABLE, None)
        if record.scheme.join.table_per_layer:
            part._parameters.pop(record.host.table_name, None)


def fold(model: Model, grids: Iterable[Grid] | None = None) -> Model:
    """Replace all positions by constants, in place, for inference: no table and no PE norm is left.

    The p_l depend on parameters alone, so with frozen parameters the outputs stay the same. The model is in evaluation
    mode afterwards, none of its parameters learns, and it can neither be trained nor removed from its join: fold a
    copy.

    Args:
        model: A model that a join is applied to.
        grids: The (rows, columns) of patches of the inputs to come; None stands for the model's own grid alone.

    Returns:
        The same model.

    Raises:
        UsageError: For a model that no join is applied to, and for one that is folded already.

    Example:
        >>> import copy, torch
        >>> import lape
        >>> model = lape.create_model("vit_nano_patch2_8", depth=2).eval()
        >>> images = torch.randn(1, 3, 8, 8)
        >>> folded = lape.fold(copy.deepcopy(model))
        >>> torch.equal(folded(images), model(images))
        True
        >>> [name for name in folded.state_dict() if "pe_norm" in name or "pos_embed" in name]
        []
    """
    record = positions(model)
    if record.folded_for:
        raise UsageError(f"This model is folded already, for {', '.join(map(by, record.folded_for))} patches.")
    vit = record.model
    chosen = tuple((rows, columns) for rows, columns in grids or [record.own_grid()])
    with torch.no_grad():
        ladders = {grid: record.ladder(grid) for grid in chosen}
    _take_out(record)
    place(vit, record.host.table, None)
    for layer, block in enumerate(record.blocks):
        held_by = owner(block, block_row(record.host, block))
        held_by.add_module("pe_folded", FoldedRung({grid: ladder[layer] for grid, ladder in ladders.items()}))
    record.folded_for = chosen
    record.put_aside.clear()
    model.eval().requires_grad_(False)
    vit.__dict__["train"] = record.train
    return model


def ladder(model: nn.Module, grid: Grid | None = None) -> list[Rung]:
    """Return what each layer gets of the positions: a list of `lape.method.Rung`, one a layer.

    Args:
        model: A model that a join is applied to.
        grid: (rows, columns) of patches; None stands for the model's own grid.

    Returns:
        The rungs; their parts have the shapes (1, N, D), a bias (1, heads, N, N), and are None where nothing is added.

    Raises:
        UsageError: For a model that no join is applied to, and for a grid that a folded model was not made for.

    Example:
        >>> import lape
        >>> rungs = lape.ladder(lape.create_model("vit_nano_patch2_8", depth=2))
        >>> rungs[0].attention.shape  # p_0: a class token and 4×4 patches, 48 channels
        torch.Size([1, 17, 48])
        >>> rungs[0].residual is None
        True
    """
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

"""LaPE on a foreign vision transformer, in place: apply, remove, fold.

The host's forward is left as it is. Its method that adds the table runs unchanged on a proxy whose table is what joins
the tokens: ω, or zeros. Every block takes its rung by hooks: one on the block (residual, bias), one on the norm before
its attention. Parameters keep the names that they have: timm's table stays `pos_embed`, and the PE norm of its block i
is `blocks.{i}.pe_norm`.
"""

import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from lape.errors import UsageError
from lape.hosts import Host, block_row, blocks_path, find, grid_of, lacks, pair, parts, table_of, value_at
from lape.hosts.registry import RECORD, refuse_other_than_model
from lape.method import JOINS, POSITION_EMBEDDINGS, PRESERVE_WITHOUT_TABLE, UNDER_POOLING, Grid, Rung, scheme
from lape.names import JoinName, PositionEmbeddingName, PositionNormName, StartName
from lape.surgery.building import attentions, build, dtype_and_device, refuse_embedding, refuse_final_norm, take_out
from lape.surgery.embedding import BeforeSequence, BehindEmbedding, PatchDropout, TableMethod
from lape.surgery.ending import BehindFinalNorm
from lape.surgery.fused import DEVICES
from lape.surgery.graphs import forget_graphs, refuse_parallel
from lape.surgery.hooks import GENERATOR, BlockHooks, hooks_of, owner, unhook
from lape.surgery.initialisation import initialisers, keep_fixed, release_fixed
from lape.surgery.layers import grid_text
from lape.surgery.positions import FoldedRung, Positions
from lape.surgery.probing import PatchGrid, cut_by, refuse_norms
from lape.surgery.saving import say_no_more, say_when_saved
from lape.surgery.standins import StandIns, swap_parameter

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    join: JoinName | str = "lape",
    pe: PositionEmbeddingName | str | None = None,
    pe_norm: PositionNormName | str = "layernorm",
    start: StartName | str = "fresh",
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
        join: "default", "shared", "unshared", "lape-sharing" or "lape" (the paper's Table 7), "pvg" or "mpvg"
            (`lape.method.JOINS`).
        pe: The position embedding; None keeps the model's own. "none"; a table: "learnable", "sinusoidal-1d",
            "sinusoidal-2d", "fourier"; a bias: "relative", "relative-layernorm", "alibi-2d", "lookhere-180",
            "lookhere-90", "lookhere-45"; a rotation: "rope-axial", "rope-mixed", "rope-dinov3", "rope-dinov3-max",
            "rope-dinov3-min"; a convolution: "peg", "peg-5"; or a sum in that order, as "learnable+rope-mixed"
            (`lape.embeddings.POSITION_EMBEDDINGS`).
        pe_norm: What stands in the place of LN_ω (Table 8): "identity", "scalar", "scale", "affine", "norm",
            "scalar-norm", "scale-norm" or "layernorm" (`lape.method.POSITION_NORMS`).
        start: "fresh"; or "preserve": ω stays in the residual stream, and attention gets s_l·p_l with s_l learnt from 0
            on, so that the model first computes what it did before (not in the paper).
        host: Describes a model of a class of your own.
        grid: (rows, columns) of tokens, for a model that does not say it; (1, longest length) for sequences.

    Returns:
        The same model.

    Raises:
        UsageError: For what is no model, for one that cannot carry a join or carries one already, for a name that does
            not exist, and for a combination that has no meaning.

    Warns:
        UserWarning: Where LaPE meets a model that pools its patches.

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
    described = host is not None
    vit, host = find(model) if host is None else _described(model, host)
    if RECORD in vit.__dict__:
        before = positions(vit).scheme.join.name
        raise UsageError(f"A join is applied once: this model has join={before!r}. Call lape.remove(model) first.")
    refuse_parallel(model, vit)
    table = table_of(vit, host)
    chosen = scheme(join, pe or _own_embedding(vit, host, join), pe_norm, start)
    if chosen.start.preserves:
        kept = POSITION_EMBEDDINGS[_own_embedding(vit, host, "default")]
        others = replace(chosen.embedding, name=kept.name, table=kept.table) != kept
        if others or (table is not None and chosen.embedding.table != kept.table):
            raise UsageError(
                f"start={start!r} keeps what the model computes with its own position embedding, {kept.name}; "
                f"{chosen.embedding.name} would be another. Leave pe or start out."
            )
        if table is None:
            chosen = replace(chosen, start=PRESERVE_WITHOUT_TABLE)
    record = Positions(vit, host, chosen, _grid(vit, host, grid))
    refuse_embedding(record)
    if described:
        refuse_norms(record)
    before = vit.state_dict().keys()
    build(record, table)
    record.added = frozenset(vit.state_dict().keys() - before)
    keep_fixed(record)
    vit.__dict__[RECORD] = record
    say_when_saved(record, model)
    _hang_on_the_model(record)
    if described and (patches := cut_by(record)) is not None:
        patches.register_forward_hook(PatchGrid(record))
    for part, name, method in _replaced(record):
        part.__dict__[name] = method
    try:
        _hang_on_the_blocks(record)
    except UsageError:
        remove(model)
        raise
    forget_graphs()
    if chosen.join.works_against_pooling and pools_patches(model):
        warnings.warn(f"This {type(vit).__name__} pools its patches. {UNDER_POOLING}", stacklevel=2)
    return model


def pools_patches(model: nn.Module) -> bool:
    """Return whether a model of a known family answers from the mean over its patches."""
    vit, host = find(model)
    return bool(value_at(vit, host.pools_patches))


def _hang_on_the_model(record: Positions) -> None:
    """Hang the hooks that begin a forward and end it."""
    vit, host = record.model, record.host
    vit.register_forward_pre_hook(record.forwards.enter_call, prepend=True)
    vit.register_forward_hook(record.forwards.leave_call, always_call=True)
    if host.joint_norm is not None:
        vit.get_submodule(host.joint_norm).register_forward_hook(record.forwards.follow)
    if host.behind is not None:
        vit.get_submodule(host.behind).register_forward_hook(BehindEmbedding(record))
    if record.scheme.join.final and host.final_norm is not None:
        vit.get_submodule(host.final_norm).register_forward_hook(BehindFinalNorm(record))
    if host.before is not None:
        vit.get_submodule(host.before).register_forward_pre_hook(BeforeSequence(record), with_kwargs=True)


def _hang_on_the_blocks(record: Positions) -> None:
    """Give every block its hooks, by what its rung holds."""
    with torch.no_grad():
        forward = record.forward(record.grid)
        rungs = [record.for_the_block(forward, layer) for layer in range(len(forward.layers))]
    for number, (block, rung) in enumerate(zip(record.blocks, rungs, strict=True)):
        BlockHooks(record, block, block_row(record.host, block), number).hang(rung)


def _replaced(record: Positions) -> list[tuple[nn.Module, str, Any]]:
    """What stands in an operated model for methods of its class."""
    vit, host, answers = record.model, record.host, StandIns(record)
    replaced: list[tuple[nn.Module, str, Any]] = [(vit, "no_weight_decay", answers.no_weight_decay)]
    replaced += [(record.holder, method, TableMethod(record, method)) for method in host.adding_methods]
    if hasattr(type(vit), "set_input_size"):
        replaced.append((vit, "set_input_size", answers.set_input_size))
    dropout = value_at(vit, host.patch_dropout)
    if dropout is not None and not isinstance(dropout, nn.Identity):
        replaced.append((dropout, "forward", PatchDropout(record)))
    if host.window_bias is not None and record.scheme.embedding.bias is None:
        replaced += [(part, host.window_bias.method, answers.no_bias) for _, part in attentions(record)]
    return replaced + initialisers(record)


def _described(model: nn.Module, host: Host) -> tuple[nn.Module, Host]:
    """Return a model with the row that its user gave; raise UsageError where a path of it leads nowhere."""
    refuse_other_than_model(model)
    missing = lacks(model, host)
    if missing is not None:
        raise UsageError(
            f"The row of {host.name!r} names {missing!r}, and {type(model).__name__} has nothing there. A row's paths "
            "begin at the model that lape.apply is given."
        )
    for block in parts(model, blocks_path(host)):
        try:
            parts(block, block_row(host, block).norms)
        except AttributeError as error:
            raise UsageError(
                f"The row of {host.name!r} names {block_row(host, block).norms!r} as the norm before attention, and "
                f"{type(block).__name__} has nothing there. Give lape.Block the path from the block to that norm."
            ) from error
    return model, host


def _grid(vit: nn.Module, host: Host, grid: Grid | None) -> Grid:
    """Return the grid of a model's table."""
    table = table_of(vit, host)
    of_map = pair(tuple(table.shape[1:3])) if table is not None and table.ndim == 4 else None
    set_to = grid_of(vit, host) or of_map
    if set_to is not None and grid is not None and set_to != tuple(grid):
        raise UsageError(
            f"This model says that its grid is {grid_text(set_to)}, and grid={grid} is another. Leave grid out."
        )
    if set_to is None and grid is None:
        raise UsageError(
            f"A {host.name} does not say how many tokens it is for. Give the (rows, columns) of its tokens: "
            "lape.apply(model, grid=(1, 512)) for sequences of at most 512."
        )
    if grid is not None and min(grid) < 1:
        raise UsageError(f"A grid has a row and a column of tokens at least; received grid={grid}. Give a larger one.")
    rows, columns = set_to or grid  # pyright: ignore[reportGeneralTypeIssues]
    return rows, columns


def joins_of(model: nn.Module) -> tuple[str, ...]:
    """Return the joins that mean something for a model that none is applied to, with the position embedding it has."""
    vit, host = find(model)
    names = []
    for join in JOINS:
        with suppress(UsageError):
            scheme(join, _own_embedding(vit, host, join))
            refuse_final_norm(vit, host, JOINS[join])
            names.append(join)
    return tuple(names)


def _own_embedding(vit: nn.Module, host: Host, join: str) -> str:
    """Return the position embedding that a host keeps under a join."""
    with_tokens = join in JOINS and JOINS[join].with_tokens
    if table_of(vit, host) is not None or host.window_bias is not None:
        return host.embedding.own if with_tokens else host.embedding.joined
    if not with_tokens and value_at(vit, host.rotary) is not None:
        raise UsageError(
            f"The positions of this {type(vit).__name__} are rotations inside attention (RoPE), and it has no table to "
            "join. Give it one beside them: pe='learnable'."
        )
    return "none"


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
    kind = dtype_and_device(vit)
    without_values = [name for name, own in record.put_aside.items() if own is not None and own.is_meta]
    if without_values and kind["device"].type != "meta":
        raise UsageError(
            f"{without_values[0]} of the untouched model was put aside while it had no values (device meta), so it "
            "cannot be given back. Create the untouched model, and load its weights into that."
        )
    take_out(record)
    for name, parameter in record.put_aside.items():
        if parameter is not None:
            parameter = nn.Parameter(parameter.to(**kind), requires_grad=parameter.requires_grad)
        swap_parameter(vit, name, parameter)
    if not record.had_table or record.without_table:
        delattr(record.holder, host.table_name)
    if record.without_table:
        setattr(record.holder, host.table_name, None)
    release_fixed(record)
    for path in ("", host.joint_norm, host.behind, host.before, host.final_norm if record.scheme.join.final else None):
        if path is not None:
            unhook(vit.get_submodule(path), record)
    if (patches := cut_by(record)) is not None:
        unhook(patches, record)
    for block in record.blocks:
        hooks = hooks_of(block)
        if hooks is not None:
            hooks.take_down()
        block._modules.pop(GENERATOR, None)
    for part, name, _ in _replaced(record):
        part.__dict__.pop(name, None)  # of a part that came into the model after the join, nothing
    del vit.__dict__[RECORD]
    say_no_more(model)
    forget_graphs()
    return model


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
        raise UsageError(f"This model is folded already, for {', '.join(map(grid_text, record.folded_for))} patches.")
    vit = record.model
    chosen = (record.own_grid(),) if grids is None else tuple((rows, columns) for rows, columns in grids)
    if not chosen:
        raise UsageError("A model is folded for one grid of patches at least, and grids= holds none. Leave grids out.")
    with torch.no_grad():
        ladders = {grid: record.ladder(grid) for grid in chosen}
        finals = {grid: record.final(record.forward(grid)) for grid in chosen if record.scheme.join.final}
    take_out(record)
    swap_parameter(vit, record.host.table, None)
    for layer, block in enumerate(record.blocks):
        held_by = owner(block, block_row(record.host, block))
        held_by.add_module("pe_folded", FoldedRung({grid: ladder[layer] for grid, ladder in ladders.items()}))
    if finals:
        record.around_the_final_norm.add_module("pe_folded", FoldedRung(finals))
    record.folded_for = chosen
    record.put_aside.clear()
    model.eval().requires_grad_(False)
    vit.__dict__["train"] = StandIns(record).train
    forget_graphs()
    return model


def set_fused(model: Model, enabled: bool = True) -> Model:
    """Let one kernel compute a layer's norm and its sum with p_l, LN_x|l(x_l) + p_l, or have them computed apart.

    A join begins with one kernel for tokens of 384 channels and more, because with fewer it was slower on an H100. It
    is used on CUDA devices with Triton, where the norm is a LayerNorm; elsewhere nothing changes. Its numbers are the
    same to rounding.

    Args:
        model: A model that a join is applied to, folded or not.
        enabled: Whether one kernel computes both, for tokens of any width.

    Returns:
        The same model.

    Raises:
        UsageError: For a model that no join is applied to.

    Example:
        >>> import lape
        >>> model = lape.set_fused(lape.create_model("vit_nano_patch2_8"), False)
    """
    record = positions(model)
    record.fused_on, record.fused_from = DEVICES if enabled else (), 1
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

"""LaPE on a foreign vision transformer, in place: apply, remove, fold.

The host's forward is left as it is. Its method that adds the table runs on a view of the model whose table is silent,
and every block takes its rung by hooks: one on the block (residual, bias), one on the norm before its attention.
Parameters keep the names that they have: the table stays `pos_embed`, the PE norm of block i is `blocks.{i}.pe_norm`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lape.errors import UsageError, choose
from lape.hosts import Host, block_row, find, parts
from lape.method import Grid, PositionNorm, Rung, Scheme, scheme

Model = TypeVar("Model", bound=nn.Module)

RECORD = "lape_positions"  # where an operated model keeps its Positions
BIAS_TABLE = "relative_position_bias_table"


class Positions:
    """The positions of one operated model: builds its ladder and hands the rungs to its blocks.

    What one forward hands over lives until the next, is no part of the model's state, and is left out of copies.
    """

    def __init__(self, model: nn.Module, host: Host, scheme: Scheme) -> None:
        self.model, self.host, self.scheme = model, host, scheme
        self.grid = self.own_grid()  # that of the stored tables
        self.put_aside: dict[str, nn.Parameter | None] = {}  # the host's table, where another took its place
        self.handles: list[RemovableHandle] = []
        self.folded_for: tuple[Grid, ...] = ()
        self._forget()

    def _forget(self) -> None:
        self.rungs: list[Rung] = []
        self.input_grid: Grid = self.grid
        self.kept: Tensor | None = None  # (B, K), the patches that patch dropout left to each image
        self.replays = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"rungs": [], "kept": None, "replays": False}

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that the model has now (feature extraction may have cut some off)."""
        return list(getattr(self.model, self.host.blocks))

    @property
    def prefix(self) -> int:
        """The number of tokens before the patches."""
        return getattr(self.model, self.host.prefix)

    @property
    def prefix_rows(self) -> int:
        """The number of those that have a row in the table."""
        return 0 if getattr(self.model, self.host.prefix_has_no_rows) else self.prefix

    @property
    def width(self) -> int:
        """D."""
        return getattr(self.model, self.host.width)

    def own_grid(self) -> Grid:
        """Return the grid of (rows, columns) that the model is set to."""
        rows, columns = attrgetter(self.host.grid)(self.model)
        return rows, columns

    # --- The ladder

    def ladder(self, grid: Grid) -> list[Rung]:
        """Return one rung a layer for a grid of (rows, columns) patches, over all N tokens.

        Raises UsageError for a grid that a folded model or a normalised bias was not made for.
        """
        if self.folded_for:
            return [self._folded(block, grid) for block in self.blocks]
        ladder = [Rung() for _ in self.blocks]
        if self.scheme.embedding.table is not None:
            norms = [block.pe_norm for block in self.blocks] if self.scheme.join.normed else []
            ladder = self.scheme.join.climb(self._tables(grid), norms)  # pyright: ignore[reportArgumentType]
            missing = self.prefix - self.prefix_rows
            ladder = [Rung(*(part if part is None else F.pad(part, (0, 0, missing, 0)) for part in r)) for r in ladder]
        if self.scheme.embedding.bias is not None:
            ladder = [r._replace(bias=self._bias(block, grid)) for r, block in zip(ladder, self.blocks, strict=True)]
        return ladder

    def _tables(self, grid: Grid) -> list[Tensor]:
        kind = self.scheme.embedding.table
        assert kind is not None
        if self.scheme.join.table_per_layer:
            return [self._resized(block.get_parameter(self.host.table), grid) for block in self.blocks]
        table = self.model.get_parameter(self.host.table)
        if kind.learns:
            table = self._resized(table, grid)
        elif grid != self.grid:
            table = kind.make(grid, self.prefix_rows, table.shape[-1]).to(table)
        return [table] * len(self.blocks)

    def _resized(self, table: Tensor, grid: Grid) -> Tensor:
        from timm.layers.pos_embed import resample_abs_pos_embed

        return resample_abs_pos_embed(table, list(grid), list(self.grid), num_prefix_tokens=self.prefix_rows)

    def _bias(self, block: nn.Module, grid: Grid) -> Tensor:
        relative = self.scheme.embedding.bias
        assert relative is not None
        if relative.normed and grid != self.grid:
            raise UsageError(
                f"pe={self.scheme.embedding.name!r} normalises over the {_by(self.grid)} patches that it was made for; "
                f"the input has {_by(grid)}. Use pe='relative', or inputs of one size."
            )
        table = _resized_bias_table(block.get_parameter(BIAS_TABLE), self.grid, grid)
        return relative(table, grid, self.prefix, block.get_submodule("pe_norm") if relative.normed else None)

    def _folded(self, block: nn.Module, grid: Grid) -> Rung:
        if grid not in self.folded_for:
            raise UsageError(
                f"This model is folded for {', '.join(map(_by, self.folded_for))} patches; the input has {_by(grid)}. "
                f"Resizing its constants would be another function: name the grid when folding, grids=[{grid}]."
            )
        return block.pe_folded(grid)  # pyright: ignore[reportCallIssue]

    # --- One forward, from the table to the blocks

    def embed(self, patches: Tensor) -> Tensor:
        """Stand in for the host's adding of its table: patches (B, H·W, D) or (B, H, W, D) to tokens (B, N, D)."""
        self._forget()
        if patches.ndim == 4:
            self.input_grid = patches.shape[1], patches.shape[2]
        ladder = self.ladder(self.input_grid)
        some = next(self.model.parameters())
        silence = torch.zeros(1, 1, patches.shape[-1], dtype=some.dtype, device=patches.device)
        view = _View(self.model, {**self.host.silent, self.host.table: silence})
        tokens = getattr(type(self.model), self.host.add_table)(view, patches.flatten(1, -2))
        if self.scheme.join.with_tokens and ladder[0].residual is not None:
            tokens = tokens + ladder[0].residual
        self.rungs = self._for_the_blocks(ladder)
        return getattr(self.model, self.host.table_dropout)(tokens)

    def _for_the_blocks(self, ladder: list[Rung]) -> list[Rung]:
        return [rung._replace(residual=None) for rung in ladder] if self.scheme.join.with_tokens else ladder

    def drop_patches(self, tokens: Tensor) -> Tensor:
        """Stand in for the forward of the host's patch dropout, noting which patches of each image it keeps."""
        from timm.layers.patch_dropout import patch_dropout_forward

        drop = getattr(self.model, self.host.patch_dropout)
        tokens, self.kept = patch_dropout_forward(
            tokens, drop.prob, drop.num_prefix_tokens, drop.ordered, drop.training
        )
        return tokens

    def rung(self, layer: int) -> Rung:
        """Return the rung of a layer in the running forward, without the rows that patch dropout took."""
        if not self.rungs:
            raise UsageError("This block's positions come from its model: call the model, not the block on its own.")
        rung = self.rungs[layer]
        # Re-entrant checkpointing runs a block without gradients and, in the backward pass, once more on a graph of its
        # own. That one must start at the parameters: what layers share can be walked back only once.
        if any(part is not None and part.requires_grad for part in rung):
            if not torch.is_grad_enabled():
                self.replays = True
            elif self.replays:
                rung = self._for_the_blocks(self.ladder(self.input_grid))[layer]
        return rung if self.kept is None else _rows(rung, self.kept, self.prefix)

    # --- What the host is asked about its parameters

    def no_weight_decay(self) -> set[str]:
        """Return the host's own set, and the names of every table and PE norm."""
        mine = {self.host.table, "pe_norm", BIAS_TABLE}
        named = {name for name, _ in self.model.named_parameters() if mine & set(name.split("."))}
        return type(self.model).no_weight_decay(self.model) | named  # pyright: ignore[reportAttributeAccessIssue]

    def set_input_size(self, *sizes: Any, **named_sizes: Any) -> None:
        """Set the host to another input size: learnt tables are resized, fixed ones made anew.

        Raises UsageError where the positions hold for one grid alone (folded, normalised bias).
        """
        type(self.model).set_input_size(self.model, *sizes, **named_sizes)  # pyright: ignore[reportAttributeAccessIssue]
        grid, table = self.own_grid(), self.scheme.embedding.table
        with torch.no_grad():
            if table is not None and not table.learns:
                fixed = self.model.get_parameter(self.host.table)
                made = table.make(grid, self.prefix_rows, fixed.shape[-1])
                setattr(self.model, self.host.table, nn.Parameter(made.to(fixed), requires_grad=False))
            if self.scheme.join.table_per_layer:
                for block in self.blocks:
                    resized = self._resized(block.get_parameter(self.host.table), grid)
                    setattr(block, self.host.table, nn.Parameter(resized))
            if self.scheme.embedding.bias is not None:
                for block in self.blocks:
                    resized = _resized_bias_table(block.get_parameter(BIAS_TABLE), self.grid, grid)
                    setattr(block, BIAS_TABLE, nn.Parameter(resized))
            for name, aside in self.put_aside.items():
                if aside is not None:
                    self.put_aside[name] = nn.Parameter(self._resized(aside, grid), requires_grad=aside.requires_grad)
        self.grid = grid

    def train(self, mode: bool = True) -> nn.Module:
        """Stand in for the `train` of a folded model, which has nothing left to learn its positions with."""
        if mode:
            raise UsageError(
                "A folded model is for inference: its positions are constants. Train the model, then fold."
            )
        return type(self.model).train(self.model, False)


class _View:
    """A model with some of its attributes replaced, for a method of its class to run on."""

    def __init__(self, model: nn.Module, replaced: Mapping[str, Any]) -> None:
        self._model, self._replaced = model, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(self._model, name)


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
        return output if attention is None else output + attention


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


class FoldedRung(nn.Module):
    """The rung of one layer as constants, for each grid that its model was folded for."""

    def __init__(self, rungs: Mapping[Grid, Rung]) -> None:
        super().__init__()
        for grid, rung in rungs.items():
            for part, constant in rung._asdict().items():
                if constant is not None:
                    self.register_buffer(f"{part}_{_by(grid)}", constant.detach().clone())

    def forward(self, grid: Grid) -> Rung:
        """Return the rung for a grid."""
        return Rung(*(self._buffers.get(f"{part}_{_by(grid)}") for part in Rung._fields))

    def extra_repr(self) -> str:
        return ", ".join(self._buffers)


def apply(model: Model, join: str = "lape", pe: str | None = None, pe_norm: str = "layernorm") -> Model:
    """Join the position embedding of a pre-norm vision transformer with its tokens in another way, in place.

    MSA_l(LN_x|l(x_l) + LN_ω|l(ω_l)), ω_{l+1} = LN_ω|l(ω_l) for `lape` (9)-(11); METHOD.md's Table 7 has the others.
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

    Raises UsageError for a name that timm does not know, with the nearest that it does, and as `apply` does.
    """
    import timm

    import lape.models  # noqa: F401  registers our models with timm

    known = name.partition(".")[0]
    if "/" not in name and ":" not in name:
        choose(dict.fromkeys(timm.list_models()), known, "a model that timm knows")
    return apply(timm.create_model(name, **options), join, pe, pe_norm)


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
            block.add_module("pe_norm", nn.LayerNorm(rows * columns, **new))
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
        block._parameters.pop(record.host.table, None)
        block._parameters.pop(BIAS_TABLE, None)


def fold(model: Model, grids: Iterable[Grid] | None = None) -> Model:
    """Freeze an operated model, in place, with every rung evaluated to a constant: no table and no PE norm is left.

    The p_l depend on parameters alone, so the outputs stay the same. `grids` are the (rows, columns) of patches that it
    will be given, its own if unsaid. Returns the model. Raises UsageError for a model that no join is applied to.
    """
    record = positions(model)
    if record.folded_for:
        raise UsageError(f"This model is folded already, for {', '.join(map(_by, record.folded_for))} patches.")
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


def _by(grid: Grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _rows(rung: Rung, kept: Tensor, prefix: int) -> Rung:
    """Return a rung (B, prefix + K, ...) with the rows of the prefix tokens and of the kept patches (B, K)."""
    leading = torch.arange(prefix, device=kept.device).expand(len(kept), -1)
    rows = torch.cat([leading, kept + prefix], dim=1)
    residual, attention, bias = rung
    return Rung(
        None if residual is None else residual[0][rows],
        None if attention is None else attention[0][rows],
        None if bias is None else bias[0][:, rows[:, :, None], rows[:, None, :]].movedim(1, 0),
    )


def _resized_bias_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Return a relative table ((2H-1)(2W-1), heads) for another grid, resized as a map of (2H-1, 2W-1)."""
    if old == new:
        return table
    before, after = ([2 * side - 1 for side in grid] for grid in (old, new))
    image = table.T.reshape(1, -1, *before)
    return F.interpolate(image, size=after, mode="bicubic", align_corners=False)[0].flatten(1).T

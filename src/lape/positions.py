"""The positions of an operated model: what it knows of its table, norms and host, and what it hands to its blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lape.errors import UsageError
from lape.hosts import Host, parts
from lape.method import Grid, PositionNorm, Rung, Scheme
from lape.view import View

BIAS_TABLE = "relative_position_bias_table"
BIAS_OWN = "relative_position"  # holds the bias's norm as `pe_norm`: a block may have one for its table too


@dataclass
class _Forward:
    """What one forward of a model hands from its table to its blocks."""

    grid: Grid
    rungs: list[Rung] = field(default_factory=list)
    kept: Tensor | None = None  # (B, K), the patches that patch dropout left to each image
    awaited: bool = False  # a backward pass, of this forward or of one before, is still to come
    others_awaited: bool = False  # ... of one that had other rungs
    first_without_gradient: bool = False  # a block ran without gradients although its rung has one


@dataclass(frozen=True)
class Layer:
    """One layer, the grid of its tokens, and what they came through from the stage before."""

    block: nn.Module
    grid: Grid
    crossing: nn.Module | None


@dataclass(frozen=True)
class _LastOfStage:
    """The PE norm of a stage's last layer: what it hands on goes through the crossing."""

    norm: PositionNorm
    crossing: nn.Module
    grid: Grid

    def __call__(self, position: Tensor) -> Tensor:
        return self.norm(position)

    @property
    def amount(self) -> nn.Parameter | None:
        return self.norm.amount

    def hand_on(self, position: Tensor) -> Tensor:
        return cross(self.crossing, self.norm.hand_on(position), self.grid)


class Positions:
    """The positions of one operated model: builds its ladder and hands the rungs to its blocks.

    What one forward hands over lives until the next, is no part of the model's state, and is left out of copies.
    """

    def __init__(self, model: nn.Module, host: Host, scheme: Scheme) -> None:
        self.model, self.host, self.scheme = model, host, scheme
        self.grid = self.own_grid()  # that of the stored tables
        self.put_aside: dict[str, nn.Parameter | None] = {}  # of the host, where another or nothing took their place
        self.handles: list[RemovableHandle] = []
        self.folded_for: tuple[Grid, ...] = ()
        self.forward = _Forward(self.grid)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"forward": _Forward(self.grid)}

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that the model has now (feature extraction may have cut some off)."""
        return [layer.block for layer in self.layers(self.grid)]

    @property
    def crossings(self) -> list[nn.Module]:
        """What takes the tokens from one stage to the next."""
        return [layer.crossing for layer in self.layers(self.grid) if layer.crossing is not None]

    def layers(self, grid: Grid) -> list[Layer]:
        """Return the layers for a grid of (rows, columns) patches, which every crossing halves."""
        layers: list[Layer] = []
        for stage in parts(self.model, self.host.stages):
            crossing = getattr(stage, self.host.crossing) if self.host.crossing else None
            if isinstance(crossing, nn.Identity):
                crossing = None
            if crossing is not None:
                grid = (grid[0] + 1) // 2, (grid[1] + 1) // 2
            for place, block in enumerate(parts(stage, self.host.blocks)):
                layers.append(Layer(block, grid, None if place else crossing))
        return layers

    @property
    def prefix(self) -> int:
        """The number of tokens before the patches."""
        return getattr(self.model, self.host.prefix) if self.host.prefix else 0

    @property
    def prefix_rows(self) -> int:
        """The number of those that have a row in the table."""
        without = self.host.prefix_has_no_rows is not None and getattr(self.model, self.host.prefix_has_no_rows)
        return 0 if without else self.prefix

    @property
    def width(self) -> int:
        """D, in the first stage."""
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
        layers = self.layers(grid)
        ladder = [Rung() for _ in layers]
        if self.scheme.embedding.table is not None:
            norms = self._norms(layers) if self.scheme.join.normed else []
            ladder = self.scheme.ladder(self._tables(layers, grid), norms)
            missing = self.prefix - self.prefix_rows
            ladder = [Rung(*(part if part is None else F.pad(part, (0, 0, missing, 0)) for part in r)) for r in ladder]
        if self.scheme.embedding.bias is not None and self.host.window_bias is None:
            ladder = [r._replace(bias=self._bias(layer, grid)) for r, layer in zip(ladder, layers, strict=True)]
        return ladder

    def _tables(self, layers: list[Layer], grid: Grid) -> list[Tensor]:
        kind, join = self.scheme.embedding.table, self.scheme.join
        assert kind is not None
        if join.table_per_layer:
            own = self.layers(self.grid)
            return [
                self._resized(layer.block.get_parameter(self.host.table), layer.grid, stored.grid)
                for layer, stored in zip(layers, own, strict=True)
            ]
        table = self.model.get_parameter(self.host.table)
        if kind.learns:
            table = self._resized(table, grid, self.grid)
        elif not same(grid, self.grid):
            table = kind.make(grid, self.prefix_rows, table.shape[-1]).to(table)
        tables = [table]
        for before, layer in pairwise(layers):
            if layer.crossing is not None and join.carries_table:
                table = cross(layer.crossing, table, before.grid)
            tables.append(table)
        return tables

    def _norms(self, layers: list[Layer]) -> list[Any]:
        norms: list[Any] = [layer.block.pe_norm for layer in layers]
        for place, (layer, following) in enumerate(pairwise(layers)):
            if following.crossing is not None:
                norms[place] = _LastOfStage(norms[place], following.crossing, layer.grid)
        return norms

    def _resized(self, table: Tensor, grid: Grid, old: Grid) -> Tensor:
        return table if same(grid, old) else self.host.resize(table, grid, old, self.prefix_rows)

    def _bias(self, layer: Layer, grid: Grid) -> Tensor:
        relative = self.scheme.embedding.bias
        assert relative is not None
        if relative.normed and not same(grid, self.grid):
            raise UsageError(
                f"pe={self.scheme.embedding.name!r} normalises over the {by(self.grid)} patches that it was made for; "
                f"the input has {by(grid)}. Use pe='relative', or inputs of one size."
            )
        table = resized_bias_table(layer.block.get_parameter(BIAS_TABLE), self.grid, grid)
        norm = layer.block.get_submodule(f"{BIAS_OWN}.pe_norm") if relative.normed else None
        return relative(table, grid, self.prefix, norm)

    def _folded(self, block: nn.Module, grid: Grid) -> Rung:
        if grid not in self.folded_for:
            raise UsageError(
                f"This model is folded for {', '.join(map(by, self.folded_for))} patches; the input has {by(grid)}. "
                f"Resizing its constants would be another function: name the grid when folding, grids=[{grid}]."
            )
        return block.pe_folded(grid)  # pyright: ignore[reportCallIssue]

    # --- One forward, from the table to the blocks

    def begin(self, grid: Grid) -> Tensor | None:
        """Make the ladder of a forward on a grid; return what joins the tokens before the first block (1, N, D)."""
        ladder = self.ladder(grid)
        last, self.forward = self.forward, _Forward(grid, self._for_the_blocks(ladder))
        self.forward.awaited = last.awaited or torch.is_grad_enabled()
        self.forward.others_awaited = last.awaited and (
            last.others_awaited or last.grid != grid or last.kept is not None
        )
        return ladder[0].residual if self.scheme.with_tokens else None

    def embed(self, patches: Tensor) -> Tensor:
        """Stand in for the host's adding of its table: patches (B, H·W, D) or (B, H, W, D) to tokens (B, N, D)."""
        position = self.begin((patches.shape[1], patches.shape[2]) if patches.ndim == 4 else self.own_grid())
        some = next(self.model.parameters())
        silence = torch.zeros(1, 1, patches.shape[-1], dtype=some.dtype, device=patches.device)
        view = View(self.model, {**self.host.silent, self.host.table: silence})
        assert self.host.add_table is not None
        tokens = getattr(type(self.model), self.host.add_table)(view, patches.flatten(1, -2))
        if position is not None:
            tokens = tokens + position
        return getattr(self.model, self.host.table_dropout)(tokens) if self.host.table_dropout else tokens

    def no_bias(self) -> Tensor:
        """Stand in for the method that makes a host's relative bias, where there is none: (1, 1, 1, 1)."""
        return next(self.model.parameters()).new_zeros(1, 1, 1, 1)

    def _for_the_blocks(self, ladder: list[Rung]) -> list[Rung]:
        return [rung._replace(residual=None) for rung in ladder] if self.scheme.with_tokens else ladder

    def drop_patches(self, tokens: Tensor) -> Tensor:
        """Stand in for the forward of the host's patch dropout, noting which patches of each image it keeps."""
        from timm.layers.patch_dropout import patch_dropout_forward

        assert self.host.patch_dropout is not None
        drop = getattr(self.model, self.host.patch_dropout)
        tokens, self.forward.kept = patch_dropout_forward(
            tokens, drop.prob, drop.num_prefix_tokens, drop.ordered, drop.training
        )
        return tokens

    def rung(self, layer: int) -> Rung:
        """Return the rung of a layer in the running forward, without the rows that patch dropout took."""
        forward = self.forward
        if not forward.rungs:
            raise UsageError("This block's positions come from its model: call the model, not the block on its own.")
        rung = forward.rungs[layer]
        if not torch.compiler.is_compiling():
            rung = self._under_checkpointing(rung, layer)
        return rung if forward.kept is None else _rows(rung, forward.kept, self.prefix)

    def _under_checkpointing(self, rung: Rung, layer: int) -> Rung:
        forward = self.forward
        if torch._C._current_graph_task_id() != -1:  # in a backward pass: a checkpoint runs its block again
            forward.awaited = False
            if forward.others_awaited:
                raise UsageError(
                    "Under activation checkpointing a block runs again in the backward pass, and takes the positions "
                    "of the last forward; one on another grid or with other dropped patches came before it. Call "
                    "backward() between the two, or switch checkpointing off."
                )
        # Re-entrant checkpointing runs it first without gradients, then on a graph of its own. That one must start at
        # the parameters: a graph that the layers share can be walked back only once.
        if any(part is not None and part.requires_grad for part in rung):
            if not torch.is_grad_enabled():
                forward.first_without_gradient = True
            elif forward.first_without_gradient:
                return self._for_the_blocks(self.ladder(forward.grid))[layer]
        return rung

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
        if self.folded_for:
            raise UsageError("A folded model keeps the grids that it was folded for: set the size, then fold.")
        if self.scheme.embedding.bias is not None and self.scheme.embedding.bias.normed:
            raise UsageError(
                f"pe={self.scheme.embedding.name!r} normalises over the {by(self.grid)} patches that it was made for. "
                "Use pe='relative', or set the size before lape.apply."
            )
        stored = self.layers(self.grid)
        with torch.no_grad():
            # The host resizes what is its own, so it gets back what was taken from its blocks.
            taken = [name for name in self.put_aside if name != self.host.table]
            for name in taken:
                place(self.model, name, self.put_aside[name])
            type(self.model).set_input_size(self.model, *sizes, **named_sizes)  # pyright: ignore[reportAttributeAccessIssue]
            for name in taken:
                self.put_aside[name] = place(self.model, name, None)
            grid, table = self.own_grid(), self.scheme.embedding.table
            own = self._own_table()
            if own is not None and table is not None and not table.learns:
                made = table.make(grid, self.prefix_rows, own.shape[-1])
                place(self.model, self.host.table, nn.Parameter(made.to(own), requires_grad=False))
            elif own is not None and self.host.behind is not None:  # the host does not know of it
                place(self.model, self.host.table, nn.Parameter(self._resized(own, grid, self.grid)))
            for before, layer in zip(stored, self.layers(grid), strict=True):
                if self.scheme.join.table_per_layer:
                    resized = self._resized(before.block.get_parameter(self.host.table), layer.grid, before.grid)
                    place(layer.block, self.host.table, nn.Parameter(resized))
                if self.scheme.embedding.bias is not None and self.host.window_bias is None:
                    resized = resized_bias_table(before.block.get_parameter(BIAS_TABLE), self.grid, grid)
                    place(layer.block, BIAS_TABLE, nn.Parameter(resized))
            aside = self.put_aside.get(self.host.table)
            if aside is not None:
                resized = self._resized(aside, grid, self.grid)
                self.put_aside[self.host.table] = nn.Parameter(resized, requires_grad=aside.requires_grad)
        self.grid = grid

    def _own_table(self) -> nn.Parameter | None:
        return getattr(self.model, self.host.table, None)

    def train(self, mode: bool = True) -> nn.Module:
        """Stand in for the `train` of a folded model, which has nothing left to learn its positions with."""
        if mode:
            raise UsageError(
                "A folded model is for inference: its positions are constants. Train the model, then fold."
            )
        return type(self.model).train(self.model, False)


class FoldedRung(nn.Module):
    """The rung of one layer as constants, for each grid that its model was folded for."""

    def __init__(self, rungs: Mapping[Grid, Rung]) -> None:
        super().__init__()
        for grid, rung in rungs.items():
            for part, constant in rung._asdict().items():
                if constant is not None:
                    self.register_buffer(f"{part}_{by(grid)}", constant.detach().clone())

    def forward(self, grid: Grid) -> Rung:
        """Return the rung for a grid."""
        return Rung(*(self._buffers.get(f"{part}_{by(grid)}") for part in Rung._fields))

    def extra_repr(self) -> str:
        return ", ".join(self._buffers)


def cross(merging: nn.Module, position: Tensor, grid: Grid) -> Tensor:
    """Take a position map (1, H·W, C) to the next stage (1, ⌈H/2⌉·⌈W/2⌉, C').

    It goes the tokens' road, the same 2×2 gather and the same linear reduction, around a norm of its own: this is our
    reading of the paper, which does not say how the PE crosses a stage of a Swin Transformer.
    """
    road = View(merging, {"norm": merging.pe_norm})
    return type(merging).forward(road, position.unflatten(1, grid)).flatten(1, 2)  # pyright: ignore


def place(model: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Set a parameter by its dotted name; return what was there."""
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    before = getattr(module, own, None)
    setattr(module, own, parameter)
    return before


def same(grid: Grid, other: Grid) -> bool:
    """Return whether two grids are equal. One that torch.export leaves open never is: its graph has to serve all."""
    return all(isinstance(side, int) for side in (*grid, *other)) and grid == other


def by(grid: Grid) -> str:
    """Return a grid as people write it."""
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


def resized_bias_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Return a relative table ((2H-1)(2W-1), heads) for another grid, resized as a map of (2H-1, 2W-1)."""
    if same(old, new):
        return table
    before, after = ([2 * side - 1 for side in grid] for grid in (old, new))
    image = table.T.reshape(1, -1, *before)
    return F.interpolate(image, size=after, mode="bicubic", align_corners=False)[0].flatten(1).T

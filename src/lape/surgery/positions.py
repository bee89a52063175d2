"""The positions of an operated model: what it knows of its table, norms and host, and what it hands to its blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lape.errors import UsageError
from lape.hosts import Host, block_row, grid_of, pair, parts, read, table_of
from lape.method import Grid, PositionNorm, Rung, Scheme
from lape.surgery.hooks import BlockHooks, hooks_of, owner
from lape.surgery.view import View

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

    def __init__(self, model: nn.Module, host: Host, scheme: Scheme, grid: Grid) -> None:
        self.model, self.host, self.scheme = model, host, scheme
        self.grid = grid  # that of the stored tables
        table = table_of(model, host)
        self.had_table = hasattr(self.holder, host.table_name)
        self.has_batch_axis = table is None or table.ndim == 3  # else the table is stored as (rows, D)
        self.put_aside: dict[str, nn.Parameter | None] = {}  # of the host, where another or nothing took their place
        self.handles: list[RemovableHandle] = []  # of hooks on modules that are no blocks
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
        return read(self.model, self.host.prefix)

    @property
    def prefix_rows(self) -> int:
        """The number of those that have a row in the table."""
        return 0 if read(self.model, self.host.prefix_has_no_rows) else self.prefix

    @property
    def width(self) -> int:
        """D, in the first stage."""
        return read(self.model, self.host.width)

    @property
    def holder(self) -> nn.Module:
        """The module that holds the table."""
        return self.model.get_submodule(self.host.holder)

    def own_grid(self) -> Grid:
        """Return the grid of (rows, columns) that the model is set to."""
        return grid_of(self.model, self.host) or self.grid

    def stored(self, table: nn.Parameter | None) -> nn.Parameter | None:
        """Return a table (1, rows, D) as the model stores its own."""
        if table is None or self.has_batch_axis:
            return table
        return nn.Parameter(table.detach()[0], requires_grad=table.requires_grad)

    def batched(self, table: nn.Parameter) -> nn.Parameter:
        """Return the model's own table as (1, rows, D)."""
        return table if self.has_batch_axis else nn.Parameter(table.detach()[None], requires_grad=table.requires_grad)

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
            ladder = [rung.padded(self.prefix - self.prefix_rows) for rung in ladder]
        if self.scheme.embedding.bias is not None and self.host.window_bias is None:
            ladder = [r._replace(bias=self._bias(layer, grid)) for r, layer in zip(ladder, layers, strict=True)]
        return ladder

    def _tables(self, layers: list[Layer], grid: Grid) -> list[Tensor]:
        kind, join = self.scheme.embedding.table, self.scheme.join
        assert kind is not None
        if join.table_per_layer:
            own = self.layers(self.grid)
            return [
                self._resized(layer.block.get_parameter(self.host.table_name), layer.grid, stored.grid)
                for layer, stored in zip(layers, own, strict=True)
            ]
        table = self._own_table()
        assert table is not None
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
        owners = [owner(layer.block, block_row(self.host, layer.block)) for layer in layers]
        for number, (one, layer) in enumerate(zip(owners, layers, strict=True)):
            if not hasattr(one, "pe_norm"):
                raise self._unknown(layer.block, number)
        norms: list[Any] = [one.pe_norm for one in owners]
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
        folded: Any = owner(block, block_row(self.host, block)).pe_folded
        for rows, columns in self.folded_for if self.host.sequence else ():
            if rows == grid[0] == 1 and columns > grid[1]:  # what is told of a token depends on its row alone
                longer: Rung = folded((rows, columns))
                return longer.first(self.prefix + grid[1])
        if grid not in self.folded_for:
            raise UsageError(
                f"This model is folded for {', '.join(map(by, self.folded_for))} patches; the input has {by(grid)}. "
                f"Resizing its constants would be another function: name the grid when folding, grids=[{grid}]."
            )
        return folded(grid)

    # --- One forward, from the table to the blocks

    def begin(self, grid: Grid) -> Tensor | None:
        """Make the ladder of a forward on a grid; return what joins the tokens before the first block (1, N, D)."""
        ladder = self.ladder(grid)
        rungs = self._for_the_blocks(ladder)
        if not torch.compiler.is_compiling():
            self._number_blocks(rungs)
        last, self.forward = self.forward, _Forward(grid, rungs)
        if not torch.compiler.is_compiling():  # a compiled graph would be made anew for what it reads of the last one
            self.forward.awaited = last.awaited or torch.is_grad_enabled()
            self.forward.others_awaited = last.awaited and (
                last.others_awaited or last.grid != grid or last.kept is not None
            )
        return ladder[0].residual if self.scheme.with_tokens else None

    def embed(self, *inputs: Any, **options: Any) -> Any:
        """Stand in for the method that adds the host's table: to it the table is what joins the tokens, or zeros."""
        host, holder = self.host, self.holder
        given, *others = (*inputs, *options.values())
        grid = self.grid_of(given)
        joining = self.begin(grid)
        if joining is None:
            some = next(self.model.parameters())
            rows = self.prefix_rows + grid[0] * grid[1]
            joining = torch.zeros(1, 1, self.width, dtype=some.dtype, device=given.device).expand(1, rows, -1)
        else:
            joining = joining[:, self.prefix - self.prefix_rows :]
        seen: dict[str, Any] = {host.table_name: joining if self.has_batch_axis else joining[0]}
        if host.table.endswith(".weight"):
            seen[host.table_name] = partial(F.embedding, weight=joining[0])
        if host.resize_table is not None:
            seen[host.resize_table] = partial(_constant, joining)
        if host.gives_map and given.ndim == 4:
            # Where the host would resize its table, it gets one of the right grid.
            inputs = (given.flatten(1, 2), *others)
            seen["dynamic_img_size"] = False
            rotary = read(self.model, host.rotary)
            if host.rotary is not None and rotary is not None:
                seen[host.rotary] = View(rotary, {"get_embed": partial(_constant, rotary.get_embed(shape=grid))})
        view = View(holder, seen)
        output = getattr(type(holder), host.add_table)(view, *inputs, **options)
        if not view.asked & {host.table_name, host.resize_table}:
            raise UsageError(
                f"{type(holder).__name__}.{host.add_table} does not read {host.table_name!r} itself: the table would "
                f"be added elsewhere, in spite of join={self.scheme.join.name!r}. Name the method that reads it: "
                "lape.Host(add_table=...)."
            )
        if host.resize_table is not None and host.resize_table not in view.asked and not same(grid, self.grid):
            raise UsageError(
                f"{type(holder).__name__}.{host.add_table} gave its table of {by(self.grid)} patches to {by(grid)} "
                "patches as it is, so most would have another's position. Ask the model to resize it (transformers: "
                "interpolate_pos_encoding=True), or give images of the table's size."
            )
        return output

    def grid_of(self, given: Tensor) -> Grid:
        """Return the grid of an input: of a sequence, of patches (B, H, W, D), of images (B, C, H, W), or the own."""
        if self.host.sequence:
            rows, columns = self.grid
            tokens = given.shape[1 if self.host.before is None else self.tokens_axis(given)]
            if rows != 1 and tokens != rows * columns:
                raise UsageError(
                    f"This model's positions are those of {by(self.grid)} patches, and the input has {tokens} tokens. "
                    f"Apply with the grid of the input, or with grid=(1, {tokens}) for a sequence."
                )
            return rows, tokens // rows
        if given.ndim == 4 and self.host.gives_map:
            return given.shape[1], given.shape[2]
        if given.ndim == 4 and isinstance(self.host.grid, tuple):
            height, width = pair(read(self.model, self.host.grid[1]))
            return given.shape[2] // height, given.shape[3] // width
        return self.own_grid()

    def tokens_axis(self, tokens: Tensor) -> int:
        """Return the axis of tokens (B, N, D), (B, H, W, D), (N, B, D) or (N, D)."""
        return 1 if tokens.ndim != 2 and read(self.model, self.host.batch_first) else 0

    def laid_out(self, part: Tensor, tokens: Tensor) -> Tensor:
        """Return a part (1, N, D) of a rung as tokens are: (B, N, D), (B, H, W, D), (N, B, D) or (N, D)."""
        if tokens.ndim == 2:
            return part[0]
        if self.tokens_axis(tokens) == 0:
            return part.transpose(0, 1)
        return part.unflatten(1, tokens.shape[1:-1])

    def no_bias(self) -> Tensor:
        """Stand in for the method that makes a host's relative bias, where there is none: (1, 1, 1, 1)."""
        return next(self.model.parameters()).new_zeros(1, 1, 1, 1)

    def _for_the_blocks(self, ladder: list[Rung]) -> list[Rung]:
        """Return the rungs without what joins the tokens before the first block."""
        return [ladder[0]._replace(residual=None), *ladder[1:]] if self.scheme.with_tokens else ladder

    def hang(self) -> None:
        """Hang hooks on every block that has something to take of its rung."""
        with torch.no_grad():
            rungs = self._for_the_blocks(self.ladder(self.grid))
        for number, (block, rung) in enumerate(zip(self.blocks, rungs, strict=True)):
            if not rung.empty:
                BlockHooks(self, block, block_row(self.host, block), number).hang(rung)

    def _number_blocks(self, rungs: list[Rung]) -> None:
        """Tell each block its number, which changes where blocks are cut; raise UsageError for one without hooks."""
        for number, (block, rung) in enumerate(zip(self.blocks, rungs, strict=True)):
            hooks = hooks_of(block)
            if hooks is not None and hooks.positions is self:
                hooks.layer = number
            elif not rung.empty:
                raise self._unknown(block, number)

    def _unknown(self, block: nn.Module, number: int) -> UsageError:
        return UsageError(
            f"Block {number} ({type(block).__name__}) came into the model after lape.apply and is told of no position. "
            "Call lape.remove(model), change the blocks, then lape.apply."
        )

    def drop_patches(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Stand in for the forward of the host's patch dropout, noting which patches of each image it keeps."""
        from timm.layers.patch_dropout import PatchDropout, patch_dropout_forward

        assert self.host.patch_dropout is not None
        drop = getattr(self.model, self.host.patch_dropout)
        tokens, kept = patch_dropout_forward(tokens, drop.prob, drop.num_prefix_tokens, drop.ordered, drop.training)
        self.forward.kept = kept
        return tokens if isinstance(drop, PatchDropout) else (tokens, kept)

    def rung(self, layer: int) -> Rung:
        """Return the rung of a layer in the running forward, without the rows that patch dropout took."""
        forward = self.forward
        if not forward.rungs:
            raise UsageError("This block's positions come from its model: call the model, not the block on its own.")
        rung = forward.rungs[layer]
        if not torch.compiler.is_compiling():
            rung = self._under_checkpointing(rung, layer)
        return rung if forward.kept is None else rung.kept(_rows(forward.kept, self.prefix))

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
        """Return the host's own set, where it has one, and the names of every table and PE norm."""
        mine = {self.host.table_name, "pe_norm", BIAS_TABLE}
        named = {name for name, _ in self.model.named_parameters() if mine & set(name.split("."))}
        own: Any = getattr(type(self.model), "no_weight_decay", lambda _: set())
        return own(self.model) | named

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
                place(self.model, self.host.table, self.stored(nn.Parameter(made.to(own), requires_grad=False)))
            elif own is not None and self.host.behind is not None:  # the host does not know of it
                place(self.model, self.host.table, self.stored(nn.Parameter(self._resized(own, grid, self.grid))))
            for before, layer in zip(stored, self.layers(grid), strict=True):
                if self.scheme.join.table_per_layer:
                    own = before.block.get_parameter(self.host.table_name)
                    place(layer.block, self.host.table_name, nn.Parameter(self._resized(own, layer.grid, before.grid)))
                if self.scheme.embedding.bias is not None and self.host.window_bias is None:
                    resized = resized_bias_table(before.block.get_parameter(BIAS_TABLE), self.grid, grid)
                    place(layer.block, BIAS_TABLE, nn.Parameter(resized))
            aside = self.put_aside.get(self.host.table)
            if aside is not None:
                resized = self._resized(aside, grid, self.grid)
                self.put_aside[self.host.table] = nn.Parameter(resized, requires_grad=aside.requires_grad)
        self.grid = grid

    def _own_table(self) -> Tensor | None:
        table = table_of(self.model, self.host)
        return table if table is None or self.has_batch_axis else table[None]

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


def _constant(value: Any, *_: Any, **__: Any) -> Any:
    return value


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


def _rows(kept: Tensor, prefix: int) -> Tensor:
    """Return the numbers of the tokens (B, prefix + K): of the prefix tokens, and of the kept patches (B, K)."""
    leading = torch.arange(prefix, device=kept.device).expand(len(kept), -1)
    return torch.cat([leading, kept + prefix], dim=1)


def resized_bias_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Return a relative table ((2H-1)(2W-1), heads) for another grid, resized as a map of (2H-1, 2W-1)."""
    if same(old, new):
        return table
    before, after = ([2 * side - 1 for side in grid] for grid in (old, new))
    image = table.T.reshape(1, -1, *before)
    return F.interpolate(image, size=after, mode="bicubic", align_corners=False)[0].flatten(1).T

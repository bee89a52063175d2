"""The positions of an operated model: where its tables, biases and norms are, and what each layer is told by them."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lape.embeddings import MixedRotation, RelativeBias
from lape.embeddings.rotations import cosine_and_sine
from lape.errors import UsageError
from lape.hosts import Host, as_rows, block_row, grid_of, heads_of, table_of, value_at
from lape.method import Grid, Rung, Scheme, Table
from lape.surgery.forwards import Forward, Forwards
from lape.surgery.fused import DEVICES, WIDE
from lape.surgery.hooks import hooks_of, owner
from lape.surgery.layers import Layer, cross_stage, grid_text, layers_of, same
from lape.surgery.proxy import Proxies
from lape.surgery.weak import Weak

BIAS_TABLE = "relative_position_bias_table"
FREQUENCIES = "freqs"  # of a block, with learnt rotations
FOURIER = "lff"  # makes a table, where that would be
BIAS_OWN = "relative_position"  # holds the bias's norm as `pe_norm`: a block may have one for its table too


class Positions:
    """The positions of one operated model: its scheme, its stored tables, and the rungs made of them."""

    def __init__(self, model: nn.Module, host: Host, scheme: Scheme, grid: Grid) -> None:
        self._model = Weak(model)
        self.host, self.scheme = host, scheme
        self.grid = grid  # that of the stored tables
        table = table_of(model, host)
        self.had_table = hasattr(self.holder, host.table_name)
        # It says None there, and no parameter is registered.
        self.without_table = vars(self.holder).get(host.table_name, ...) is None
        self.axes = 3 if table is None else table.ndim  # of the stored table: (1, rows, D), (rows, D), (1, H, W, D)
        self.put_aside: dict[str, nn.Parameter | None] = {}  # of the host, where another or nothing took their place
        self.added: frozenset[str] = frozenset()  # names of the model's state that it did not have before
        self.folded_for: tuple[Grid, ...] = ()
        self.depth = len(self.layers(grid))  # blocks may be cut off later
        self.forwards = Forwards()
        self.fused_on = DEVICES  # where a layer's norm and its sum with p_l are one kernel,
        self.fused_from = WIDE  # for tokens of so many channels and more
        crossings = self.crossings
        self.crossing_proxies = Proxies(type(crossings[0]), ["norm"]) if crossings else None

    @property
    def model(self) -> nn.Module:
        """The transformer that is operated on."""
        return self._model()

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks that the model has now (feature extraction may have cut some off)."""
        return [layer.block for layer in self.layers(self.grid)]

    @property
    def crossings(self) -> list[nn.Module]:
        """What takes the tokens from one stage to the next."""
        return [layer.crossing for layer in self.layers(self.grid) if layer.crossing is not None]

    @property
    def prefix(self) -> int:
        """The number of tokens before the patches."""
        return value_at(self.model, self.host.prefix)

    @property
    def prefix_rows(self) -> int:
        """The number of those that have a row in the table."""
        if value_at(self.model, self.host.prefix_has_no_rows):
            return 0
        return self.prefix - value_at(self.model, self.host.registers)

    @property
    def width(self) -> int:
        """D, in the first stage."""
        return value_at(self.model, self.host.width)

    @property
    def holder(self) -> nn.Module:
        """The module that holds the table."""
        return self.model.get_submodule(self.host.holder)

    def layers(self, grid: Grid) -> list[Layer]:
        """Return the layers for a grid of (rows, columns) patches."""
        return layers_of(self.model, self.host, grid)

    def whole_grid(self) -> Grid:
        """Return the grid of all rows that there are: of the stored table, or of the longest that is folded."""
        return max(self.folded_for or (self.grid,), key=math.prod)

    def own_grid(self) -> Grid:
        """Return the grid of (rows, columns) that the model is set to."""
        return grid_of(self.model, self.host) or self.grid

    @property
    def around_the_final_norm(self) -> nn.Module:
        """The module that holds the norm behind the last block, and beside it the PE norm of that."""
        assert self.host.final_norm is not None
        return self.model.get_submodule(self.host.final_norm.rpartition(".")[0])

    # --- The table, as it is stored

    def laid_as_stored(self, table: Tensor, grid: Grid) -> Tensor:
        """Return a table (1, rows, D) for a grid with the axes that the model's own has."""
        if self.axes == 4:
            return table.unflatten(1, grid)
        return table[0] if self.axes == 2 else table

    def stored(self, table: nn.Parameter | None, grid: Grid) -> nn.Parameter | None:
        """Return a table (1, rows, D) for a grid as the model stores its own."""
        if table is None or self.axes == 3:
            return table
        return nn.Parameter(self.laid_as_stored(table.detach(), grid), requires_grad=table.requires_grad)

    def table(self) -> Tensor | None:
        """Return the model's table, (1, rows, D)."""
        table = table_of(self.model, self.host)
        return None if table is None else as_rows(table)

    def with_rows(self, part: Tensor) -> Tensor:
        """Return of a part (1, N, D) what the tokens take that have a row in the table."""
        prefix, rows = self.prefix, self.prefix_rows
        if prefix == rows:
            return part
        return torch.cat([part[:, :rows], part[:, prefix:]], dim=1) if rows else part[:, prefix:]

    def resized(self, table: Tensor, grid: Grid, old: Grid) -> Tensor:
        """Return a learnt table (1, rows, D) of one grid for another, by the host's rule."""
        return table if same(grid, old) else self.host.resize(table, grid, old, self.prefix_rows)

    # --- Rungs

    def ladder(self, grid: Grid) -> list[Rung]:
        """Return one rung a layer for a grid of (rows, columns) patches, over all N tokens.

        Raises UsageError for a grid that a folded model or a normalised bias was not made for.
        """
        forward = self.forward(grid)
        return [forward.rung(layer) for layer in range(len(forward.layers))]

    def forward(self, grid: Grid, training: bool = False) -> Forward:
        """Return what makes the rungs of one forward on a grid, each as it is asked for."""
        return Forward(grid, self.layers(grid), self.step, self.start, training=training)

    def start(self, grid: Grid) -> Tensor | None:
        """Return ω_0 for a grid, (1, rows, D)."""
        kind = self.scheme.embedding.table
        if self.folded_for or kind is None or self.scheme.join.table_per_layer:
            return None
        if not isinstance(kind, Table):
            return self.holder.get_submodule(FOURIER)(grid, self.prefix_rows)
        table = self.table()
        if table is None or kind.learns:
            return None if table is None else self.resized(table, grid, self.grid)
        return table if same(grid, self.grid) else kind.make(grid, self.prefix_rows, table.shape[-1]).to(table)

    def final(self, forward: Forward) -> Rung:
        """Return the rung of the norm behind the last block."""
        position = forward.handed[0]
        if self.folded_for:
            rung: Rung = self._for_a_grid(self.around_the_final_norm, forward.grid)
        elif position is None:
            return Rung()
        else:
            norm: Any = self.around_the_final_norm.pe_norm
            rung = self._for_all_tokens(self.scheme.last(position, norm))
        return rung if forward.rows is None else rung.kept(forward.rows)

    def step(self, forward: Forward, number: int, position: Tensor | None) -> tuple[Rung, Tensor | None]:
        """Return the rung of a layer that is handed ω_l, and what it hands on."""
        layer = forward.layers[number]
        if self.folded_for:
            return self._folded(layer.block, forward.grid), None
        if self.scheme.join.table_per_layer:
            position = self._table_of(number, layer)
        if position is not None and layer.crossing is not None and self.scheme.join.hands_on:
            assert self.crossing_proxies is not None
            position = cross_stage(layer.crossing, position, forward.layers[number - 1].grid, self.crossing_proxies)
        normed = position is not None and self.scheme.join.normed and number >= self.scheme.join.first
        norm = self._norm(number, layer) if normed else None
        rung, following = self.scheme.step(number, position, norm)
        rung = self._for_all_tokens(rung)
        biased = self.scheme.embedding.bias is not None and self.host.window_bias is None
        bias = self._bias(forward, number) if biased else None
        rotation = None if self.scheme.embedding.rotation is None else self._rotation(forward, number)
        return rung.in_attention(bias, rotation), following

    def _table_of(self, number: int, layer: Layer) -> Tensor:
        if not isinstance(self.scheme.embedding.table, Table):
            return layer.block.get_submodule(FOURIER)(layer.grid, self.prefix_rows)
        stored_for = self.grid if self.host.stages is None else self.layers(self.grid)[number].grid
        return self.resized(layer.block.get_parameter(self.host.table_name), layer.grid, stored_for)

    def _norm(self, number: int, layer: Layer) -> Any:
        held_by = owner(layer.block, block_row(self.host, layer.block))
        if not hasattr(held_by, "pe_norm"):
            raise unknown_block(layer.block, number)
        if not hasattr(held_by.pe_norm, "hand_on"):
            raise UsageError(
                f"pe_norm of block {number} is a {type(held_by.pe_norm).__name__} now, which hands no position on "
                "to the next layer. To train PE norms beside an adapter, name them as they are: peft's "
                "modules_to_save=['pe_norm']."
            )
        return held_by.pe_norm

    def _bias(self, forward: Forward, number: int) -> Tensor:
        relative, layer, grid = self.scheme.embedding.bias, forward.layers[number], forward.grid
        assert relative is not None
        if not isinstance(relative, RelativeBias):
            made, some = relative, _floating(layer.block)
            heads = heads_of(block_row(self.host, layer.block), layer.block)
            shared = forward.once(
                ("bias", heads, some.device),
                lambda: made.make(grid, self.prefix, heads, some.device).to(some.dtype),
            )
            return relative.of_layer(shared, number, self.depth)
        if relative.normed and not same(grid, self.grid):
            raise UsageError(
                f"pe={self.scheme.embedding.name!r} normalises over the {grid_text(self.grid)} patches that it was "
                f"made for; the input has {grid_text(grid)}. Use pe='relative', or inputs of one size."
            )
        table = resized_bias_table(layer.block.get_parameter(BIAS_TABLE), self.grid, grid)
        norm = layer.block.get_submodule(f"{BIAS_OWN}.pe_norm") if relative.normed else None
        return relative(table, grid, self.prefix, norm)

    def _rotation(self, forward: Forward, number: int) -> Tensor:
        kind, block = self.scheme.embedding.rotation, forward.layers[number].block
        assert kind is not None
        if isinstance(kind, MixedRotation):
            frequencies = block.get_parameter(FREQUENCIES)
            return cosine_and_sine(kind.angles(frequencies, forward.grid), self.prefix).to(frequencies.dtype)
        fixed, some, head_dim = kind, _floating(block), self.head_dim(block)
        return forward.once(
            ("rotation", head_dim, some.device),
            lambda: cosine_and_sine(
                fixed.angles(forward.grid, head_dim, some.device, forward.training), self.prefix
            ).to(some.dtype),
        )

    def head_dim(self, block: nn.Module) -> int:
        """Return d, the channels of a head of a block's attention."""
        return self.width // heads_of(block_row(self.host, block), block)

    def _folded(self, block: nn.Module, grid: Grid) -> Rung:
        return self._for_a_grid(owner(block, block_row(self.host, block)), grid)

    def _for_a_grid(self, held_by: nn.Module, grid: Grid) -> Rung:
        folded: Any = held_by.pe_folded
        for rows, columns in self.folded_for if self.host.sequence else ():
            if rows == grid[0] == 1 and columns > grid[1]:  # what is told of a token depends on its row alone
                longer: Rung = folded((rows, columns))
                return longer.first(self.prefix + grid[1])
        if grid not in self.folded_for:
            raise UsageError(
                f"This model is folded for {', '.join(map(grid_text, self.folded_for))} patches; the input has "
                f"{grid_text(grid)}. Resizing its constants would be another function: name the grid when folding, "
                f"grids=[{grid}]."
            )
        return folded(grid)

    # --- One forward, from the table to the blocks

    def begin(self, grid: Grid) -> tuple[Forward, Tensor | None]:
        """Begin a forward on a grid; return it, and what joins the tokens before the first block (1, N, D)."""
        forward = self.forward(grid, self.model.training)
        joining = self.joining(forward) if self.scheme.with_tokens and forward.layers else None
        last = self._number_blocks(forward.layers)
        forward.last = len(forward.layers) if self.scheme.join.final else last
        self.forwards.begin(forward)
        return forward, joining

    def joining(self, forward: Forward) -> Tensor | None:
        """Return what joins the tokens before the first block, (1, N, D)."""
        if self.folded_for:
            return self._folded(forward.layers[0].block, forward.grid).residual
        position = forward.handed[0]
        return None if position is None else self._for_all_tokens(Rung(residual=position)).residual

    def _for_all_tokens(self, rung: Rung) -> Rung:
        return rung.padded(self.prefix - self.prefix_rows, self.prefix_rows)

    def for_the_block(self, forward: Forward, layer: int, again: bool = False) -> Rung:
        """Return the rung of a layer without what has joined the tokens.

        `again` says that a part of the block is computed again in a backward pass, and the block itself is not.
        """
        rung = forward.rung_again(layer) if again else forward.rung(layer)
        if layer == 0 and self.scheme.with_tokens:
            rung = Rung(None, rung.attention, rung.bias, rung.rotation)
        return rung

    def _number_blocks(self, layers: list[Layer]) -> int:
        """Tell each block its number, which changes where blocks are cut; return the last that takes something.

        Raises UsageError where some do and a block has come later.
        """
        last, unknown = -1, []
        for number, layer in enumerate(layers):
            hooks = hooks_of(layer.block)
            if hooks is None or hooks.positions is not self:
                unknown.append(unknown_block(layer.block, number))
                continue
            if hooks.layer != number:  # set, it would be set by every compiled forward
                hooks.layer = number
            last = number if hooks.hung else last
        if last >= 0 and unknown:
            raise unknown[0]
        return last

    def tokens_axis(self, tokens: Tensor) -> int:
        """Return the axis of tokens (B, N, D), (B, H, W, D), (N, B, D) or (N, D)."""
        return 1 if tokens.ndim != 2 and value_at(self.model, self.host.batch_first) else 0

    def laid_out(self, part: Tensor, tokens: Tensor) -> Tensor:
        """Return a part (1, N, D) of a rung as tokens are: (B, N, D), (B, H, W, D), (N, B, D) or (N, D)."""
        if tokens.ndim == 2:
            return part[0]
        if self.tokens_axis(tokens) == 0:
            return part.transpose(0, 1)
        return part.unflatten(1, tokens.shape[1:-1])

    def convolved(self, tokens: Tensor, forward: Forward, layer: int, generator: nn.Module) -> Tensor:
        """Return tokens, however they lie, behind the convolution of a block; raise UsageError where some are gone."""
        if forward.rows is not None and not _all_in_order(forward.rows, self.prefix + math.prod(forward.grid)):
            raise UsageError(
                f"pe={self.scheme.embedding.name!r} looks at the neighbours of every patch, and some are not in "
                "their places (dropped, shuffled). Create the model with patch_drop_rate=0, or use another pe."
            )
        if isinstance(tokens, fx.Proxy):  # (B, N, D): others are not traced
            return generator(tokens, forward.layers[layer].grid, self.prefix)
        lying = tokens.shape
        if tokens.ndim == 2:
            tokens = tokens[None]
        elif self.tokens_axis(tokens) == 0:
            tokens = tokens.transpose(0, 1)
        convolved: Tensor = generator(tokens.flatten(1, -2), forward.layers[layer].grid, self.prefix)
        if len(lying) == 3 and self.tokens_axis(tokens) == 0:
            return convolved.transpose(0, 1)
        return convolved.reshape(lying)


def _all_in_order(rows: Tensor, count: int) -> bool:
    """Return whether the tokens (B, N) of every sample have all rows, each its own; in a graph, whether they may."""
    if rows.shape[1] != count:
        return False
    return torch.compiler.is_compiling() or bool((rows == torch.arange(count, device=rows.device)).all())


def _floating(block: nn.Module) -> nn.Parameter:
    """Return a parameter of a block that is not quantised."""
    return next(parameter for parameter in block.parameters() if parameter.is_floating_point())


def unknown_block(block: nn.Module, number: int) -> UsageError:
    """Return the error for a block that came into the model after the operation."""
    return UsageError(
        f"Block {number} ({type(block).__name__}) came into the model after lape.apply and is told of no position. "
        "Call lape.remove(model), change the blocks, then lape.apply."
    )


class FoldedRung(nn.Module):
    """The rung of one layer as constants, for each grid that its model was folded for."""

    def __init__(self, rungs: Mapping[Grid, Rung]) -> None:
        super().__init__()
        for grid, rung in rungs.items():
            for part, constant in rung._asdict().items():
                if constant is not None:
                    self.register_buffer(f"{part}_{grid_text(grid)}", constant.detach().clone())

    def forward(self, grid: Grid) -> Rung:
        """Return the rung for a grid."""
        return Rung(*(self._buffers.get(f"{part}_{grid_text(grid)}") for part in Rung._fields))

    def extra_repr(self) -> str:
        return ", ".join(self._buffers)


def rows_behind(prefix: int, rows: Tensor) -> Tensor:
    """Return the numbers of the tokens (B, prefix + K): of that many before the others, and of those (B, K)."""
    if not prefix:
        return rows
    leading = torch.arange(prefix, device=rows.device).expand(len(rows), -1)
    return torch.cat([leading, rows + prefix], dim=1)


def resized_bias_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """Return a relative table ((2H-1)(2W-1), heads) for another grid, resized as a map of (2H-1, 2W-1)."""
    if same(old, new):
        return table
    before, after = ([2 * side - 1 for side in grid] for grid in (old, new))
    image = table.T.reshape(1, -1, *before)
    return F.interpolate(image, size=after, mode="bicubic", align_corners=False)[0].flatten(1).T

"""What an operated model answers in place of methods of its class: sizes, weight decay, training of a folded one."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from lape.embeddings import RelativeBias, Table
from lape.errors import UsageError
from lape.hosts import as_rows
from lape.surgery.hooks import GENERATOR
from lape.surgery.layers import grid_text
from lape.surgery.positions import BIAS_TABLE, FOURIER, FREQUENCIES, Positions, resized_bias_table


class StandIns:
    """Methods of an operated model; bound ones, because copies and pickles of a model rebind them to the copy."""

    def __init__(self, positions: Positions) -> None:
        self.positions = positions

    def no_weight_decay(self) -> set[str]:
        """Return the host's own set, where it has one, and the names of all that positions brought."""
        model = self.positions.model
        ours = {self.positions.host.table_name, "pe_norm", BIAS_TABLE, FREQUENCIES, FOURIER, GENERATOR}
        names = {name for name, _ in model.named_parameters() if ours & set(name.split("."))}
        theirs: Any = getattr(type(model), "no_weight_decay", lambda _: set())
        return theirs(model) | names

    def train(self, mode: bool = True) -> nn.Module:
        """Keep a folded model in evaluation mode, and warn: it has nothing left to learn its positions with."""
        model = self.positions.model
        if mode:  # refused, it would leave half of the modules around it in another mode
            warnings.warn(
                "A folded model is for inference and stays in evaluation mode: its positions are constants. To train "
                "it, train the model that was folded.",
                stacklevel=2,
            )
        return type(model).train(model, False)

    def no_bias(self) -> Tensor:
        """Return what stands for the host's relative bias where there is none: (1, 1, 1, 1)."""
        return next(self.positions.model.parameters()).new_zeros(1, 1, 1, 1)

    def set_input_size(self, *sizes: Any, **named_sizes: Any) -> None:
        """Set the host to another input size: learnt tables are resized, fixed ones made anew.

        Raises UsageError where the positions hold for one grid alone (folded, normalised bias).
        """
        positions = self.positions
        model, host, scheme = positions.model, positions.host, positions.scheme
        if positions.folded_for:
            raise UsageError("A folded model keeps the grids that it was folded for: set the size, then fold.")
        if scheme.embedding.bias is not None and scheme.embedding.bias.normed:
            raise UsageError(
                f"pe={scheme.embedding.name!r} normalises over the {grid_text(positions.grid)} patches that it was "
                "made for. Use pe='relative', or set the size before lape.apply."
            )
        stored = positions.layers(positions.grid)
        with torch.no_grad():
            # The host resizes what is its own, so it gets back what was taken from its blocks.
            taken = [name for name in positions.put_aside if name != host.table]
            for name in taken:
                swap_parameter(model, name, positions.put_aside[name])
            type(model).set_input_size(model, *sizes, **named_sizes)  # pyright: ignore[reportAttributeAccessIssue]
            for name in taken:
                positions.put_aside[name] = swap_parameter(model, name, None)
            grid, table = positions.own_grid(), positions.table()
            kind = scheme.embedding.table
            if table is not None and isinstance(kind, Table) and not kind.learns:
                fresh = kind.make(grid, positions.prefix_rows, table.shape[-1]).to(table)
                swap_parameter(model, host.table, positions.stored(nn.Parameter(fresh, requires_grad=False), grid))
            elif table is not None and host.behind is not None:  # the host does not know of it
                resized = positions.resized(table, grid, positions.grid)
                swap_parameter(model, host.table, positions.stored(nn.Parameter(resized), grid))
            for before, layer in zip(stored, positions.layers(grid), strict=True):
                if scheme.join.table_per_layer and isinstance(kind, Table):
                    stored_table = before.block.get_parameter(host.table_name)
                    resized = positions.resized(stored_table, layer.grid, before.grid)
                    swap_parameter(layer.block, host.table_name, nn.Parameter(resized))
                if isinstance(scheme.embedding.bias, RelativeBias) and host.window_bias is None:
                    stored_table = before.block.get_parameter(BIAS_TABLE)
                    resized = resized_bias_table(stored_table, positions.grid, grid)
                    swap_parameter(layer.block, BIAS_TABLE, nn.Parameter(resized))
            aside = positions.put_aside.get(host.table)
            if aside is not None:
                resized = positions.resized(as_rows(aside), grid, positions.grid)
                learns = aside.requires_grad
                positions.put_aside[host.table] = positions.stored(nn.Parameter(resized, requires_grad=learns), grid)
        positions.grid = grid


def swap_parameter(model: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Set a parameter by its dotted name; return what was there."""
    path, _, own_name = name.rpartition(".")
    module = model.get_submodule(path)
    before = getattr(module, own_name, None)
    setattr(module, own_name, parameter)
    return before

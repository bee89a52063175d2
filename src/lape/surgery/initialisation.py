"""Start values anew: what a join gave a model begins again where its host does, and a fixed table stays what it is.

PyTorch asks each module for `reset_parameters`, timm the model for `init_weights`, and transformers asks the model
about each module that a file did not fill. What stands in for them lets the host's class do its work first.
"""

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lape.embeddings import FourierFeatures, MixedRotation, PositionEncodingGenerator, RelativeBias, Table
from lape.errors import RunError
from lape.hosts import as_rows, table_of
from lape.method import SPREAD, PositionNorm
from lape.surgery.building import attentions
from lape.surgery.positions import BIAS_TABLE, FREQUENCIES, Positions
from lape.surgery.proxy import Proxies
from lape.surgery.standins import swap_parameter
from lape.surgery.weak import Weak


def initialisers(record: Positions) -> list[tuple[nn.Module, str, Any]]:
    """Return what stands in an operated model for its initialisers: module, name of the method, method."""
    vit, host, embedding = record.model, record.host, record.scheme.embedding
    replaced: list[tuple[nn.Module, str, Any]] = []
    stored = isinstance(embedding.table, Table)
    holding = [_table_module(record)] if stored and not record.scheme.join.table_per_layer else []
    if _blocks_hold_parameters(record):
        holding += record.blocks
    replaced += [(module, "reset_parameters", _Reset(record, Weak(module))) for module in holding]
    if host.window_bias is not None and embedding.bias is None:
        replaced += [(part, "reset_parameters", _ResetWithoutBias(Weak(part))) for _, part in attentions(record)]
    of_transformers = [part for part in vit.modules() if hasattr(type(part), "_initialize_weights")]
    replaced += [(part, "_initialize_weights", _InitializeEach(record, Weak(part))) for part in of_transformers]
    if not of_transformers and hasattr(type(vit), "init_weights"):
        replaced.append((vit, "init_weights", _InitWeights(record)))
    return replaced


@dataclass
class _Reset:
    """`reset_parameters` of a module that holds a table."""

    record: Positions
    module: Weak[nn.Module]

    def __call__(self) -> None:
        """Let the host initialise what is its own in the module, then begin the tables."""
        vit: Any = self.record.model
        module = self.module()
        kind: Any = type(module)
        by_host = hasattr(kind, "reset_parameters") or hasattr(type(vit), "_initialize_weights")
        if hasattr(kind, "reset_parameters"):
            kind.reset_parameters(module)
        elif by_host:
            type(vit)._init_weights(vit, module)
        else:
            others = {name for name, _ in module.named_parameters(recurse=False)} - _tables(self.record)
            if others:  # FSDP takes a module that has the method for one that is initialised by it
                warnings.warn(
                    f"reset_parameters begins the position table of {kind.__name__}; {', '.join(sorted(others))} "
                    "beside it stay as they are. Initialise them too, by init_weights() where the model has it.",
                    stacklevel=2,
                )
        _begin(self.record, module, by_host=by_host)


@dataclass
class _ResetWithoutBias:
    """`reset_parameters` of an attention whose relative bias the join took out."""

    attention: Weak[nn.Module]

    def __call__(self) -> None:
        """Let its class initialise all else."""
        attention = self.attention()
        kind: Any = type(attention)
        proxy, _ = Proxies(kind, [BIAS_TABLE]).of(attention, {BIAS_TABLE: torch.empty(0)})
        kind.reset_parameters(proxy)


@dataclass
class _InitWeights:
    """timm's `init_weights`, which knows every table as a learnt one."""

    record: Positions

    def __call__(self, *inputs: Any, **options: Any) -> None:
        """Initialise the model."""
        vit: Any = self.record.model
        type(vit).init_weights(vit, *inputs, **options)
        if isinstance(self.record.scheme.embedding.table, Table) and not self.record.scheme.join.table_per_layer:
            _begin(self.record, _table_module(self.record), by_host=True)
        for part in vit.modules():
            if isinstance(part, FourierFeatures | PositionEncodingGenerator):
                part.reset_parameters()
        for block in self.record.blocks:
            _begin_frequencies(self.record, block)


@dataclass
class _InitializeEach:
    """transformers' `_initialize_weights` of a model that is, or is part of, the transformer.

    While it runs, transformers keeps `torch.nn.init` off what was in the file.
    """

    record: Positions
    part: Weak[nn.Module]

    def __call__(self, module: nn.Module, *options: Any) -> None:
        """Initialise one module."""
        ready = getattr(module, "_is_hf_initialized", False)  # version 4 says of whole modules what was in the file
        part = self.part()
        kind: Any = type(part)
        with _a_row_for_the_host(self.record):
            kind._initialize_weights(part, module, *options)
        if isinstance(module, PositionNorm | FourierFeatures | PositionEncodingGenerator) and not ready:
            module.reset_parameters()
        elif module is self.record.holder:  # the class of what holds an nn.Embedding initialises that too
            _begin(self.record, _table_module(self.record), by_host=True)
        elif _blocks_hold_parameters(self.record) and not ready and module in self.record.blocks:
            _begin(self.record, module, by_host=True)


@contextmanager
def _a_row_for_the_host(record: Positions) -> Generator[None, None, None]:
    """Keep a row where a join took the host's table away: SigLIP begins its own without a look."""
    vit, name = record.model, record.host.table
    taken = table_of(vit, record.host) is None
    if taken:
        swap_parameter(vit, name, nn.Parameter(torch.empty(1, record.width)))
    try:
        yield
    finally:
        if taken:
            swap_parameter(vit, name, None)


def _blocks_hold_parameters(record: Positions) -> bool:
    """Return whether the blocks themselves hold parameters of the scheme: tables, biases, frequencies."""
    embedding = record.scheme.embedding
    tables = record.scheme.join.table_per_layer and isinstance(embedding.table, Table)
    biases = isinstance(embedding.bias, RelativeBias) and record.host.window_bias is None
    return tables or biases or isinstance(embedding.rotation, MixedRotation)


def _begin_frequencies(record: Positions, block: nn.Module) -> None:
    """Draw the frequencies of a block anew, where it has some that a file did not fill."""
    rotation, frequencies = record.scheme.embedding.rotation, block._parameters.get(FREQUENCIES)
    if isinstance(rotation, MixedRotation) and frequencies is not None:
        if getattr(frequencies, "_is_hf_initialized", False):
            return
        with torch.no_grad():
            frequencies.copy_(rotation.start(frequencies.shape[1], 2 * frequencies.shape[2]))


def _tables(record: Positions) -> set[str]:
    """Return the names that tables have in the modules that hold them."""
    return {record.host.table.rpartition(".")[2], record.host.table_name, BIAS_TABLE, FREQUENCIES}


def _table_module(record: Positions) -> nn.Module:
    """Return the module whose parameter the table is; of an nn.Embedding's, that is the Embedding."""
    return record.model.get_submodule(record.host.table.rpartition(".")[0])


def _begin(record: Positions, module: nn.Module, by_host: bool) -> None:
    """Give what a join put into a module its start values; `by_host` says that the host began what is its own."""
    host, table, join = record.host, record.scheme.embedding.table, record.scheme.join
    stored = table_of(record.model, host)
    _begin_frequencies(record, module)
    if stored is not None and isinstance(table, Table) and module is _table_module(record):
        if not table.learns:
            with torch.no_grad():
                stored.copy_(table.make(record.grid, record.prefix_rows, stored.shape[-1]).view_as(stored))
            stored.requires_grad_(False)  # transformers makes a new parameter of what it loads
        elif not by_host or host.table in record.put_aside:
            nn.init.trunc_normal_(stored, std=SPREAD * host.embedding.scale)
    learnt = module._parameters.get(host.table_name) if join.table_per_layer else None
    if learnt is not None:
        nn.init.trunc_normal_(learnt, std=SPREAD * host.embedding.scale)
    bias = module._parameters.get(BIAS_TABLE) if host.window_bias is None else None
    if bias is not None:
        nn.init.trunc_normal_(bias, std=SPREAD)


def keep_fixed(record: Positions) -> None:
    """Refuse, from now on, to load another table into a fixed one, whoever calls `load_state_dict`."""
    table = record.scheme.embedding.table
    if isinstance(table, Table) and not table.learns:
        _table_module(record).register_load_state_dict_pre_hook(_Fixed(record))


def release_fixed(record: Positions) -> None:
    """Let every table be loaded again."""
    hooks: dict[int, Any] = _table_module(record)._load_state_dict_pre_hooks
    for number in [number for number, hook in hooks.items() if isinstance(hook.hook, _Fixed)]:
        del hooks[number]


@dataclass
class _Fixed:
    record: Positions

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        record, table = self.record, self.record.scheme.embedding.table
        stored, values = (
            table_of(record.model, record.host),
            state.get(f"{prefix}{record.host.table.rpartition('.')[2]}"),
        )
        if (
            stored is None
            or not isinstance(table, Table)
            or values is None
            or values.is_meta
            or type(values) not in (Tensor, nn.Parameter)
        ):
            return  # a table that lies on several machines is in parts, which the same model saved
        if values.shape == stored.shape and not table.holds(as_rows(values), record.grid, record.prefix_rows):
            raise RunError(
                f"The position table to be loaded was learnt, and this model's is fixed "
                f"(pe={record.scheme.embedding.name!r}). Leave it out of the state dict, or use pe='learnable'."
            )

"""How a forward begins: the host adds its table, or what stands in its place, to the tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from lape.errors import UsageError
from lape.hosts import pair, value_at
from lape.method import Grid
from lape.surgery.forwards import Forward
from lape.surgery.layers import grid_text, same
from lape.surgery.positions import Positions, rows_behind
from lape.surgery.proxy import Proxies

TOKENS = (Tensor, fx.Proxy)  # a tuple, because torch 2.6 to 2.9 compile no union that is made in a forward
RESIZES_BY_ITSELF = "dynamic_img_size"  # timm's flag of a model that resizes its table in every forward


class TableMethod:
    """Stands in for a method of the host that adds its table.

    The host's method runs unchanged on a proxy whose table is what joins the tokens: ω, or zeros.
    """

    def __init__(self, positions: Positions, method: str) -> None:
        host, holder = positions.host, positions.holder
        self.positions, self.method = positions, method
        names = [host.table_name, host.resize_table]
        names += [RESIZES_BY_ITSELF, host.rotary] if host.gives_map else []
        self.proxies = Proxies(type(holder), [name for name in names if name is not None])
        rotary = value_at(positions.model, host.rotary)
        self.rotary_proxies = None if rotary is None else Proxies(type(rotary), ["get_embed"])
        looked_up = host.table.endswith(".weight")
        self.lookups = Lookups(type(holder.get_submodule(host.table_name))) if looked_up else None

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """Run the host's method; raise UsageError where it does not read the table that it is given."""
        positions, host, holder = self.positions, self.positions.host, self.positions.holder
        values = (*inputs, *options.values())
        image = next(value for value in values if isinstance(value, TOKENS))
        whole = self.lookups is not None and host.resize_table is None and not isinstance(image, fx.Proxy)
        grid = positions.whole_grid() if whole else grid_of_input(positions, image)
        forward, position = positions.begin(grid)
        table = self._zeros(grid, image) if position is None else positions.with_rows(position)
        replaced: dict[str, Any] = {host.table_name: positions.laid_as_stored(table, grid)}
        if self.lookups is not None:
            replaced[host.table_name] = self._looked_up(forward, table[0])
        if host.resize_table is not None:
            replaced[host.resize_table] = partial(_constant, table)
        if host.gives_map:
            as_map = not isinstance(image, fx.Proxy) and image.ndim == 4
            if as_map:  # where the host would resize its table, it has one of the right grid
                inputs, options = (image.flatten(1, 2), *values[1:]), {}
            replaced.update(self._of_a_map(grid, as_map))  # torch 2.6 does not compile |=
        proxy, read = self.proxies.of(holder, replaced)
        output = getattr(self.proxies.base, self.method)(proxy, *inputs, **options)
        self._check(read, grid)
        kept = None if host.kept is None else host.kept(output, *inputs, **options)
        if kept is not None:
            forward.rows = rows_behind(positions.prefix, kept)
        positions.forwards.hand(forward, output[0] if isinstance(output, tuple) else output)
        return output

    def _looked_up(self, forward: Forward, table: Tensor) -> Any:
        """Return what the method sees in place of an nn.Embedding: it looks rows up, and notes which."""
        assert self.lookups is not None
        positions = self.positions

        def note(ids: Tensor) -> None:
            if forward.rows is not None:
                raise UsageError(
                    f"{type(positions.model).__name__} looks positions up twice in one forward, so it is not known "
                    "which of them a token has. Name a method that looks them up once: lape.Host(add_table=...)."
                )
            count = table.shape[0]
            if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel() and ids.max() >= count:
                raise UsageError(
                    f"The position table is for {count} tokens, and the input asks for row {int(ids.max())}, counted "
                    "from 0. Give a shorter input, or apply to a model with a longer table."
                )
            rows = ids.flatten(1) if ids.ndim > 1 else ids[None]
            at, prefix = positions.prefix_rows, positions.prefix  # between them are the tokens without a row
            if at != prefix:
                rows = torch.cat([rows[:, :at], rows_behind(prefix - at, rows[:, at:] - at) + at], dim=1)
            forward.rows = rows

        embedding = positions.holder.get_submodule(positions.host.table_name)
        return self.lookups.of(embedding, {"weight": table, "note": note})[0]

    def _zeros(self, grid: Grid, image: Any) -> Tensor:
        positions = self.positions
        some, rows = next(positions.model.parameters()), positions.prefix_rows + grid[0] * grid[1]
        return torch.zeros(1, 1, positions.width, dtype=some.dtype, device=image.device).expand(1, rows, -1)

    def _of_a_map(self, grid: Grid, as_map: bool) -> dict[str, Any]:
        host, model = self.positions.host, self.positions.model
        resizes = not as_map and getattr(self.positions.holder, RESIZES_BY_ITSELF, False)
        replaced: dict[str, Any] = {RESIZES_BY_ITSELF: resizes}
        if host.rotary is not None:
            rotary: Any = value_at(model, host.rotary)
            if as_map and self.rotary_proxies is not None:
                turned = partial(_constant, rotary.get_embed(shape=grid))
                rotary, _ = self.rotary_proxies.of(rotary, {"get_embed": turned})
            replaced[host.rotary] = rotary
        return replaced

    def _check(self, read: set[str], grid: Grid) -> None:
        positions, host = self.positions, self.positions.host
        method = f"{self.proxies.base.__name__}.{self.method}"
        if not read & {host.table_name, host.resize_table}:
            raise UsageError(
                f"{method} does not read {host.table_name!r} itself: the table would be added elsewhere, in spite of "
                f"join={positions.scheme.join.name!r}. Name the method that reads it: lape.Host(add_table=...)."
            )
        if host.resize_table is not None and host.resize_table not in read and not same(grid, positions.grid):
            raise UsageError(
                f"{method} gave its table of {grid_text(positions.grid)} patches to {grid_text(grid)} patches as it "
                "is, so most would have another's position. Ask the model to resize it (transformers: "
                "interpolate_pos_encoding=True), or give images of the table's size."
            )


class Lookup(nn.Embedding):
    """An embedding of positions that looks up rows of another table than its own, and notes which."""

    note: Callable[[Tensor], None]

    def __call__(self, *inputs: Any, **options: Any) -> Tensor:
        """Run the method of the class: one of the module's own, as accelerate gives it, reads the module's table."""
        return type(self).forward(self, *inputs, **options)

    def forward(self, input: Tensor) -> Tensor:
        """Look up."""
        self.note(input)
        return F.embedding(input, self.weight)


class Lookups(Proxies):
    """Makes twins of an embedding, which are of its class too: OPT's adds to the ids before it looks them up."""

    def __init__(self, embedding: type[nn.Module]) -> None:
        self.embedding: Any = embedding
        kind = Lookup if issubclass(Lookup, embedding) else type(embedding.__name__, (self.embedding, Lookup), {})
        super().__init__(kind, ["weight", "note"])

    def __reduce__(self) -> tuple[Any, ...]:
        return Lookups, (self.embedding,)


@dataclass
class BehindEmbedding:
    """A hook that adds the table to the output of the host's patch embedding, (B, H, W, D) or (B, N, D)."""

    positions: Positions

    def __call__(self, embedding: nn.Module, inputs: tuple[Tensor, ...], patches: Tensor) -> Tensor:
        symbolic = isinstance(patches, fx.Proxy)
        if symbolic:
            grid = symbolic_grid(self.positions)
        else:
            grid = (patches.shape[1], patches.shape[2]) if patches.ndim == 4 else self.positions.own_grid()
        forward, position = self.positions.begin(grid)
        if position is not None:
            patches = patches + self.positions.laid_out(position[:, self.positions.prefix :], patches)
        self.positions.forwards.hand(forward, patches)
        return patches


@dataclass
class BeforeSequence:
    """A hook that adds the table to the input of a module, a sequence of tokens."""

    positions: Positions

    def __call__(
        self, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens: Tensor = inputs[0] if inputs else next(iter(options.values()))
        if not isinstance(tokens, fx.Proxy) and tokens.is_nested:
            raise UsageError("A nested tensor has no grid. Give a padded one, with src_key_padding_mask.")
        forward, position = self.positions.begin(grid_of_input(self.positions, tokens))
        if position is not None:
            tokens = tokens + self.positions.laid_out(position, tokens)
        self.positions.forwards.hand(forward, tokens)
        if inputs:
            return (tokens, *inputs[1:]), options
        return inputs, {**options, next(iter(options)): tokens}


@dataclass
class PatchDropout:
    """Stands in for the forward of the host's patch dropout, and notes which patches of each image it keeps."""

    positions: Positions

    def __call__(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        from timm.layers import patch_dropout

        positions = self.positions
        drop: Any = value_at(positions.model, positions.host.patch_dropout)
        options = drop.prob, drop.num_prefix_tokens, drop.ordered, drop.training
        dropped, kept = patch_dropout.patch_dropout_forward(tokens, *options)
        forwards = positions.forwards
        if forwards.latest is not None or not torch.compiler.is_compiling():  # else no block takes anything
            forward = forwards.find(0, tokens)
            forward.rows = None if kept is None else rows_behind(positions.prefix, kept)
            forwards.hand(forward, dropped)
        return dropped if isinstance(drop, patch_dropout.PatchDropout) else (dropped, kept)


def grid_of_input(positions: Positions, inputs: Tensor | fx.Proxy) -> Grid:
    """Return the grid of an input: of a sequence, of patches (B, H, W, D), of images (B, C, H, W), or the model's."""
    host = positions.host
    if isinstance(inputs, fx.Proxy):
        return symbolic_grid(positions)
    if host.sequence:
        rows, columns = positions.grid
        tokens = inputs.shape[1 if host.before is None else positions.tokens_axis(inputs)]
        if rows != 1 and tokens != rows * columns:
            raise UsageError(
                f"This model's positions are those of {grid_text(positions.grid)} patches, and the input has {tokens} "
                f"tokens. Apply with the grid of the input, or with grid=(1, {tokens}) for a sequence."
            )
        return rows, tokens // rows
    if inputs.ndim == 4 and host.gives_map:
        return inputs.shape[1], inputs.shape[2]
    if host.grid_of_image is not None:
        if inputs.ndim != 4:
            raise UsageError(
                f"The positions of a {host.name} are those of images (B, C, H, W), all of one size; this input has the "
                f"shape {tuple(inputs.shape)}. Patches of images of several sizes in one batch have no common grid: "
                "give images, those of each size in a batch of their own."
            )
        rows, columns = value_at(positions.model, host.grid_of_image)((inputs.shape[2], inputs.shape[3]))
        return rows, columns
    if inputs.ndim == 4 and isinstance(host.grid, tuple):
        height, width = pair(value_at(positions.model, host.grid[1]))
        return inputs.shape[2] // height, inputs.shape[3] // width
    return positions.own_grid()


def symbolic_grid(positions: Positions) -> Grid:
    """Return the grid of a symbolic trace, which does not know the shape of its input.

    Raises UsageError for a model that is not folded for one grid: its norms and tables would be left out of the graph.
    """
    host = positions.host
    if len(positions.folded_for) != 1 or host.stages is not None or host.batch_first is not True:
        raise UsageError(
            "A symbolic trace (torch.fx) does not see what hooks add, unless it is constant. Fold it first, for one "
            "grid: lape.fold(copy.deepcopy(model)); or use torch.export. Swin Transformers and "
            "torch.nn.TransformerEncoder cannot be traced so."
        )
    return positions.folded_for[0]


def _constant(value: Any, *_: Any, **__: Any) -> Any:
    return value

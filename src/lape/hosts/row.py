"""What a row says of a family of transformers, and how its entries are read from a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from lape.errors import UsageError
from lape.hosts.resizing import resize_as_timm
from lape.method import Grid

Resize = Callable[[Tensor, Grid, Grid, int], Tensor]  # table (1, rows, D), new grid, old grid, prefix rows


@dataclass(frozen=True)
class Rotated:
    """Where queries and keys can be turned: two modules that put them out, Rotated("attn.q_norm", "attn.k_norm").

    Example:
        >>> import lape
        >>> lape.Block("norm", rotated=(lape.hosts.Rotated("attn.q", "attn.k", axis=None),)).rotated[0].axis is None
        True
    """

    queries: str
    """Path from the block to the module whose output they are."""

    keys: str
    """Likewise."""

    axis: int | None = 1
    """The axis of heads there: 1 of (B, heads, N, d), 2 of (B, N, heads, d), None of (B, N, heads·d)."""


@dataclass(frozen=True)
class Block:
    """Where one kind of block normalises its tokens for attention.

    Example:
        >>> import lape
        >>> lape.Block("norm1")  # most ViTs: the output of block.norm1 enters attention, and nothing else
        Block(norms='norm1', projection=None, tokens=0, pre_norm=None, rotated=(), heads=None)
    """

    norms: str
    """Path from the block to the norm whose output enters attention; `*` stands for every child, `2:` for every child
    from number 2 on."""

    projection: str | None = None
    """Where the MLP reads that output too: path of the linear layer that serves both. Its last 3·D outputs are queries,
    keys and values, as in timm's ParallelScalingBlock ("in_proj")."""

    tokens: int = 0
    """Which argument of the block its tokens are, from 0 on, and which part of what it returns, where that is several:
    timm's TNT hands pixels on before them."""

    pre_norm: str | None = None
    """The attribute by which a class that can be pre-norm or post-norm says that it is pre-norm ("norm_first")."""

    rotated: tuple[Rotated, ...] = ()
    """Where rotations turn queries and keys: the first of these that the block has. Without one it takes none."""

    heads: str | int | None = None
    """The number of its attention's heads, value or path; None: what a part of it has as num_heads or
    num_attention_heads."""


@dataclass(frozen=True)
class WindowBias:
    """A relative bias of the host's own, as in Swin: WindowBias("attn", "_get_rel_pos_bias")."""

    attention: str
    """Path from a block to its attention."""

    method: str
    """The attention's method that makes the bias."""


@dataclass(frozen=True)
class Stages:
    """Blocks in several stages, as in Swin: Stages("layers.*", "downsample")."""

    path: str
    """Path from the model to its stages."""

    crossing: str
    """Attribute of a stage: what takes the tokens of the stage before to it, with half the rows and columns."""


@dataclass(frozen=True)
class Embedding:
    """The position embedding that a family comes with, by its names in `lape.apply(pe=...)`."""

    own: str = "learnable"
    """With the default join."""

    joined: str = "learnable"
    """What it gets for a join that needs a table."""

    scale: float = 1.0
    """How much wider than 0.02 the values of a new learnt table are spread."""


@dataclass(frozen=True)
class Files:
    """How files of weights by a family's first authors are read."""

    filter: str
    """The module of timm whose `checkpoint_filter_fn` converts them."""

    names: tuple[tuple[str, str], ...] = ()
    """Before that: patterns of parameter names in the files, and what stands for them here."""


@dataclass(frozen=True)
class Refusal:
    """Why a known class carries no join."""

    model: str
    """The class, as "package.module.Class"."""

    reason: str
    """The end of a sentence on "It cannot carry a join"."""

    where: tuple[str, Any] | None = None
    """A path from the model and the value there, where models of this class are refused with that value alone."""

    def concerns(self, model: nn.Module) -> bool:
        """Whether a model of the class is refused."""
        return self.where is None or value_at(model, self.where[0]) == self.where[1]


@dataclass(frozen=True, kw_only=True)
class Host:
    """One family of transformers, as paths from the model to what a join is hung on.

    The host's method that adds the table runs unchanged on a proxy of its module whose table is what joins the tokens:
    ω, or zeros where LaPE joins it elsewhere. Entries that say "value or path" take either.

    Example:
        >>> import lape
        >>> row = lape.Host(name="my ViT", table="pos_embed", block=lape.Block("norm1"), blocks="layers.*", prefix=1)
        >>> row.width, row.add_table
        ('embed_dim', 'forward')
    """

    name: str
    """What people call the family; it stands in messages."""

    model: str | None = None
    """The class, as "package.module.Class"; None in a row that `lape.apply` is given."""

    # --- The table, and how it joins the tokens

    table: str
    """Path of the parameter, (1, rows, D), (rows, D) or a map (1, H, W, D); of an nn.Embedding "path.weight". It need
    not be there."""

    width: str = "embed_dim"
    """Path to D, the width of tokens (in the first stage)."""

    add_table: str | tuple[str, ...] = "forward"
    """The method, of the module that holds the table, that reads it and adds it to the tokens; or each of them."""

    resize_table: str | None = None
    """The method that `add_table` has the table from where the input has another size."""

    behind: str | None = None
    """In place of `add_table`, where no method reads a table: the module to whose output it is added, the patches as
    (B, H, W, D) or (B, N, D)."""

    before: str | None = None
    """Likewise: the module to whose input, a sequence of tokens, it is added."""

    resize: Resize = resize_as_timm
    """How a learnt table follows another grid."""

    embedding: Embedding = field(default_factory=Embedding)
    """The position embedding that the family comes with."""

    # --- The blocks

    blocks: str = "blocks.*"
    """Path to the blocks, from the model or from a stage; `*` stands for every child."""

    block: Block | Mapping[str, Block]
    """Where a block normalises its tokens: of every block, or for each class of block by its qualified name."""

    stages: Stages | None = None
    """Where blocks are not all in one row on one grid."""

    logits: str | None = None
    """A block's keyword argument for what is added to its attention logits; None: it takes nothing there."""

    window_bias: WindowBias | None = None
    """The relative bias that the host brings in its windows."""

    # --- Tokens and their grid

    grid: str | tuple[str, str] | Callable[[Any], Grid] | None = "grid_size"
    """Path to the (rows, columns) of patches that the table is for, of a sequence to its length; or a function of the
    model that returns them; or the paths to the sizes of image and patch, each a number or a pair, where the input is
    images; None where the table, being a map, says it, or where only the user knows: `lape.apply(model, grid=...)`."""

    grid_of_image: str | None = None
    """Path of the method from an image's (height, width) to its (rows, columns), where images may have other sizes than
    the table's: "patch_embed.dynamic_feat_size"."""

    prefix: str | int | Callable[[Any], int] = 0
    """How many tokens stand before the patches (class token and others): value, path or function of the model."""

    prefix_has_no_rows: str | bool = False
    """Whether the table leaves those tokens out: value or path."""

    registers: str | int = 0
    """Where it leaves out only some of them: how many, the last before the patches (register tokens): value or path."""

    sequence: bool = False
    """N tokens in a row are of the grid (1, N)."""

    batch_first: str | bool = True
    """Whether tokens are (B, N, D) and not (N, B, D): value or path."""

    gives_map: bool = False
    """`add_table` is given patches as (B, H, W, D) where they may be of another grid than the host's own."""

    kept: Callable[..., Tensor | None] | None = None
    """Where `add_table` drops or shuffles patches: a function of what it returned and of all that it was given, which
    returns the numbers of those that are left of each image, (B, K); None: all, in their order."""

    patch_dropout: str | None = None
    """Path of the module that drops patches in training."""

    rotary: str | None = None
    """Path of what makes the rotations for a grid, `get_embed(shape)`: they stay the host's own."""

    # --- Norms

    joint_norm: str | None = None
    """Path of a norm of tokens and table together, before the first block; an nn.Identity there is none."""

    final_norm: str | None = None
    """Path of the norm of all tokens behind the last block; None: there is none that each token goes through."""

    pools_patches: str | bool | Callable[[Any], bool] = False
    """Whether the mean over patches is what a model answers from: value, path or function of the model."""

    stream_is_normed: bool = False
    """A norm stands on the residual stream itself."""

    # --- Files

    files: Files | None = None
    """How files of weights are read; None: by the host's own library."""

    @property
    def holder(self) -> str:
        """The path of the module that holds the table: an nn.Embedding's is the one that holds the Embedding."""
        return self.table.removesuffix(".weight").rpartition(".")[0]

    @property
    def table_name(self) -> str:
        """What that module calls the table, and a block its own."""
        return self.table.removesuffix(".weight").rpartition(".")[2]

    @property
    def adds_by_method(self) -> bool:
        """Whether a method of the host's adds the table."""
        return self.behind is None and self.before is None

    @property
    def adding_methods(self) -> tuple[str, ...]:
        """The names of the methods that add the table."""
        if not self.adds_by_method:
            return ()
        return (self.add_table,) if isinstance(self.add_table, str) else self.add_table


def value_at(model: nn.Module, entry: Any) -> Any:
    """Return what an entry says: the value at a path from the model, what a function returns, or the value itself."""
    if callable(entry):
        return entry(model)
    return attrgetter(entry)(model) if isinstance(entry, str) else entry


def table_of(model: nn.Module, host: Host) -> nn.Parameter | None:
    """Return the model's table; None where it has none now."""
    try:
        return attrgetter(host.table)(model)
    except AttributeError:
        return None


def as_rows(table: Tensor) -> Tensor:
    """Return a table (rows, D), (1, rows, D) or (1, H, W, D) as (1, rows, D).

    >>> as_rows(torch.zeros(1, 2, 3, 8)).shape
    torch.Size([1, 6, 8])
    """
    return table[None] if table.ndim == 2 else table.flatten(1, -2)


def pair(size: Any) -> Grid:
    """Return a size as (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def grid_of(model: nn.Module, host: Host) -> Grid | None:
    """Return the grid that a model is set to; None where it does not say."""
    if isinstance(host.grid, tuple):
        (height, width), (patch_height, patch_width) = (pair(value_at(model, path)) for path in host.grid)
        return height // patch_height, width // patch_width
    size = value_at(model, host.grid)
    if host.sequence and isinstance(size, int):
        return 1, size
    return None if size is None else pair(size)


def parts(module: nn.Module, path: str) -> list[nn.Module]:
    """Return the submodules at a dotted path, in which `*` stands for every child, `2:` for those from number 2 on."""
    if not path:
        return [module]
    head, _, rest = path.partition(".")
    every = "0:" if head == "*" else head
    children = list(module.children())[int(every[:-1]) :] if every.endswith(":") else [module.get_submodule(head)]
    return [part for child in children for part in parts(child, rest)]


def blocks_path(host: Host) -> str:
    """Return the path from a model to its blocks."""
    return f"{host.stages.path}.{host.blocks}" if host.stages else host.blocks


def lacks(model: nn.Module, host: Host) -> str | None:
    """Return the first path of a row that leads nowhere in a model."""
    for path in (blocks_path(host), host.holder, host.behind, host.before):
        try:
            there = path is None or bool(parts(model, path))
        except AttributeError:
            there = False
        if not there:
            return path
    paths = [host.width, host.prefix, host.prefix_has_no_rows, host.registers, host.batch_first, host.rotary]
    paths.append(host.pools_patches)
    paths += [host.patch_dropout, host.grid_of_image]
    paths += host.grid if isinstance(host.grid, tuple) else (host.grid,)
    if host.adds_by_method:
        methods = (*host.adding_methods, host.resize_table)
        paths += [f"{host.holder}.{method}".strip(".") for method in methods if method is not None]
        paths.append(host.table.removesuffix(".weight"))
    for path in paths:
        try:
            value_at(model, path)
        except AttributeError:
            return str(path)
    return None


def block_row(host: Host, block: nn.Module) -> Block:
    """Return the row of a block; raise UsageError where its kind cannot carry a join."""
    rows = {None: host.block} if isinstance(host.block, Block) else host.block
    for name in (*class_names(block), None):  # the most specific class first
        row = rows.get(name)  # pyright: ignore[reportArgumentType]
        if row is not None and (row.pre_norm is None or getattr(block, row.pre_norm)):
            return row
    known = (
        f"{name.rpartition('.')[2]}{f' with {row.pre_norm}=True' if row.pre_norm else ''}"
        for name, row in rows.items()
        if name
    )
    raise UsageError(
        f"{type(block).__name__} cannot carry a join: LaPE adds the position to what a norm hands to attention, and no "
        f"norm is known to stand before this block's (a post-norm block has it behind). Blocks that can: "
        f"{', '.join(known)}."
    )


def rotated_at(row: Block, block: nn.Module) -> Rotated | None:
    """Return where the queries and keys of a block can be turned."""

    def there(rotated: Rotated) -> bool:
        try:
            return bool(parts(block, rotated.queries)) and bool(parts(block, rotated.keys))
        except AttributeError:
            return False

    return next((rotated for rotated in row.rotated if there(rotated)), None)


def heads_of(row: Block, block: nn.Module) -> int:
    """Return how many heads the attention of a block has; raise UsageError where it does not say."""
    if row.heads is not None:
        return value_at(block, row.heads)
    for part in block.modules():
        for name in ("num_heads", "num_attention_heads"):
            if isinstance(heads := getattr(part, name, None), int):
                return heads
    raise UsageError(
        f"How many heads the attention of a {type(block).__name__} has is not known, and this position embedding "
        "differs from head to head. Say it in its row: lape.Block(heads=...)."
    )


def class_name(kind: type) -> str:
    """Return the qualified name of a class, as rows name it.

    Example:
        >>> from lape.hosts import class_name
        >>> class_name(dict)
        'builtins.dict'
    """
    return f"{kind.__module__}.{kind.__qualname__}"


def class_names(module: nn.Module) -> list[str]:
    """Return the qualified names of a module's class and of all that it inherits from, the most specific first."""
    return [class_name(kind) for kind in type(module).__mro__]

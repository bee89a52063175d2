"""The families of transformers that carry a join, one row each: where a family keeps what is operated on.

No family's library is imported here: a model is recognised by the names of its classes. A row for a class of one's own
needs no more than paths: `lape.apply(model, host=Host(...))`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.errors import UsageError
from lape.method import Grid

Resize = Callable[[Tensor, Grid, Grid, int], Tensor]  # table (1, rows, D), new grid, old grid, prefix rows

RECORD = "lape_positions"  # where an operated model keeps its Positions


def resize_as_timm(table: Tensor, new: Grid, old: Grid, prefix: int) -> Tensor:
    """Bicubic with antialiasing, as in timm; equal grids leave the table as it is."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=prefix)


def _interpolated(table: Tensor, new: Grid, old: Grid, prefix: int, mode: str) -> Tensor:
    patches = table[:, prefix:].mT.unflatten(2, old)
    patches = F.interpolate(patches, new, mode=mode, align_corners=False).flatten(2).mT
    return torch.cat([table[:, :prefix], patches], dim=1)


def resize_bicubic(table: Tensor, new: Grid, old: Grid, prefix: int) -> Tensor:
    """Bicubic without antialiasing (ViT-Adapter, transformers)."""
    return table if new == old else _interpolated(table, new, old, prefix, "bicubic")


def resize_by_count(table: Tensor, new: Grid, old: Grid, prefix: int) -> Tensor:
    """Bilinear without antialiasing, and not at all where another grid has as many patches (Segmenter)."""
    same = new[0] * new[1] == old[0] * old[1]
    return table if same else _interpolated(table, new, old, prefix, "bilinear")


def cut(table: Tensor, new: Grid, old: Grid, prefix: int) -> Tensor:
    """Return the first rows of a table for a shorter sequence: `lape.Host(resize=lape.hosts.cut)`.

    Args:
        table: (1, prefix + old length, D).
        new: (1, new length).
        old: (1, old length).
        prefix: The number of tokens before them that have a row.

    Raises:
        UsageError: For a longer sequence, for whose end there is no row.

    Example:
        >>> import torch
        >>> import lape.hosts
        >>> lape.hosts.cut(torch.zeros(1, 513, 8), new=(1, 20), old=(1, 512), prefix=1).shape
        torch.Size([1, 21, 8])
    """
    if new == old:
        return table
    if new[1] > old[1]:
        raise UsageError(
            f"The position table is for {old[1]} tokens, and the input has {new[1]}. Give the longest length: "
            f"lape.apply(model, grid=(1, {new[1]})), or take a sinusoid, pe='sinusoidal-1d'."
        )
    return table[:, : prefix + new[1]]


@dataclass(frozen=True)
class Block:
    """Where one kind of block normalises its tokens for attention.

    Args:
        norms: The path, from the block, of the norm whose output enters attention; `*` stands for every child.
        projection: Where the MLP reads that output too: the path of the linear layer that serves both. Its last 3·D
            outputs are queries, keys and values.
        pre_norm: The attribute by which a class that can be pre-norm or post-norm says which.

    Example:
        >>> import lape
        >>> lape.Block("norm1").norms
        'norm1'
    """

    norms: str
    projection: str | None = None
    pre_norm: str | None = None


@dataclass(frozen=True)
class WindowBias:
    """A relative bias of the host's own: the path of a block's attention, and its method that makes the bias."""

    attention: str
    method: str


@dataclass(frozen=True, kw_only=True)
class Host:
    """One family: the paths, from the model, of its blocks, of its table and of what handles it.

    The method `add_table` of the module that holds the table runs on a view in which the table is what joins the
    tokens, ω or zeros. Where no method reads a table, it is added `behind` one module or `before` another.

    Example:
        >>> import lape
        >>> row = lape.Host(name="my ViT", table="pos_embed", block=lape.Block("norm1"), blocks="layers.*", prefix=1)
        >>> row.width
        'embed_dim'
    """

    name: str
    # A parameter (1, rows, D) or (rows, D), which may be an nn.Embedding's weight; it need not be there.
    table: str
    block: Block | Mapping[str, Block]  # of every block, or by qualified class name
    model: str | None = None  # qualified class name; None is for a row that `lape.apply` is given
    width: str = "embed_dim"  # D, of the first stage
    # (rows, columns) of patches that the table is for; or the sizes of image and patch, each a number or a pair, where
    # the input is images; None where only the user knows: lape.apply(model, grid=...).
    grid: str | tuple[str, str] | None = "grid_size"
    # From the model to its stages, from a stage to its blocks, and to what takes tokens from the stage before to it.
    stages: str = ""
    blocks: str = "blocks.*"
    crossing: str | None = None
    add_table: str = "forward"
    resize_table: str | None = None  # a method that `add_table` has the table from where the input has another size
    behind: str | None = None
    before: str | None = None
    gives_map: bool = False  # `add_table` is given patches (B, H, W, D) where they are not of the host's own grid
    rotary: str | None = None  # makes the rotations for a grid, `get_embed(shape)`: they stay the host's own
    patch_dropout: str | None = None
    prefix: str | int = 0  # the number of prefix tokens, or the path to it
    prefix_has_no_rows: str | bool = False  # whether the table leaves the prefix tokens out, or the path to that
    sequence: bool = False  # N tokens in a row are of the grid (1, N)
    batch_first: str | bool = True  # whether tokens are (B, N, D) and not (N, B, D), or the path to that
    logits: str | None = None  # a block's keyword for what is added to its attention logits
    window_bias: WindowBias | None = None
    stream_is_normed: bool = False  # a norm stands on the residual stream itself
    joint_norm: str | None = None  # of tokens and table together, before the first block; an nn.Identity is none
    resize: Resize = resize_as_timm
    # The position embedding that it comes with, and what it gets for a join that needs a table.
    own: str = "learnable"
    own_joined: str = "learnable"
    table_scale: float = 1.0  # how much wider than 0.02 its learnt table starts
    # Patterns of parameter names in the files of the family's first authors, and what stands for them here; then the
    # module of timm whose `checkpoint_filter_fn` does the rest. Without one, files are the host's library's business.
    names: tuple[tuple[str, str], ...] = ()
    filter: str | None = None

    @property
    def holder(self) -> str:
        """The path of the module that holds the table: an nn.Embedding's is the one that holds the Embedding."""
        return self.table.removesuffix(".weight").rpartition(".")[0]

    @property
    def table_name(self) -> str:
        """What that module calls the table, and a block its own."""
        return self.table.removesuffix(".weight").rpartition(".")[2]


def read(model: nn.Module, entry: Any) -> Any:
    """Return what a row says: the value at a path from the model, or the value itself."""
    return attrgetter(entry)(model) if isinstance(entry, str) else entry


def table_of(model: nn.Module, host: Host) -> nn.Parameter | None:
    """Return the model's table; None where it has none now."""
    try:
        return attrgetter(host.table)(model)
    except AttributeError:
        return None


def pair(size: Any) -> Grid:
    """Return a size as (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def grid_of(model: nn.Module, host: Host) -> Grid | None:
    """Return the grid that a model is set to; None where it does not say."""
    if isinstance(host.grid, tuple):
        (height, width), (tall, wide) = (pair(read(model, path)) for path in host.grid)
        return height // tall, width // wide
    return None if host.grid is None else pair(read(model, host.grid))


_VIT = "timm.models.vision_transformer"
_EVA = "timm.models.eva"
_SWIN = "timm.models.swin_transformer"
_TORCHVISION = "torchvision.models.vision_transformer"
_TORCH = "torch.nn.modules.transformer"
_TRANSFORMERS = "transformers.models"

# LaPE's authors (github.com/Ingrid725/LaPE) name an unshared table and the parts of a relative bias otherwise.
_AUTHORS = (
    (r"^pos_embed(\d+)$", r"blocks.\1.pos_embed"),
    (r"^(blocks\.\d+)\.attn\.(relative_position_bias_table)$", r"\1.\2"),
    (r"^(blocks\.\d+)\.attn\.(pe_norm\.\w+)$", r"\1.relative_position.\2"),
)

TIMM = Host(
    name="timm VisionTransformer",
    model=f"{_VIT}.VisionTransformer",
    block={
        f"{_VIT}.Block": Block("norm1"),
        f"{_VIT}.ParallelScalingBlock": Block("in_norm", "in_proj"),
        f"{_VIT}.DiffParallelScalingBlock": Block("in_norm", "in_proj"),
        f"{_VIT}.ParallelThingsBlock": Block("attns.*.norm"),
    },
    table="pos_embed",
    grid="patch_embed.grid_size",
    add_table="_pos_embed",
    gives_map=True,
    patch_dropout="patch_drop",
    prefix="num_prefix_tokens",
    prefix_has_no_rows="no_embed_class",
    logits="attn_mask",
    joint_norm="norm_pre",
    names=_AUTHORS,
    filter=_VIT,
)

EVA = replace(
    TIMM,
    name="timm Eva",
    model=f"{_EVA}.Eva",
    block={f"{_EVA}.EvaBlock": Block("norm1")},
    rotary="rope",
    names=(),
    filter=_EVA,
)

SWIN = Host(
    name="timm SwinTransformer",
    model=f"{_SWIN}.SwinTransformer",
    block={f"{_SWIN}.SwinTransformerBlock": Block("norm1")},
    table="absolute_pos_embed",
    grid="patch_embed.grid_size",
    stages="layers.*",
    crossing="downsample",
    behind="patch_embed",
    window_bias=WindowBias("attn", "_get_rel_pos_bias"),
    own="relative",
    own_joined="learnable+relative",
    filter=_SWIN,
)

# Models of this project are VisionTransformers with parts of their own.
T2T_VIT = replace(
    TIMM,
    name="T2T-ViT",
    model="lape.models.t2t_vit.T2TViT",
    own="sinusoidal-1d",
    own_joined="sinusoidal-1d",
    names=((r"^tokens_to_token\.", "patch_embed."), *_AUTHORS),
)

CEIT = replace(
    TIMM,
    name="CeiT",
    model="lape.models.ceit.CeiT",
    names=(
        (r"^i2t\.backbone\.", "patch_embed."),
        (r"^i2t\.proj\.", "patch_embed.proj."),
        (r"^(blocks\.\d+)\.leff\.", r"\1.mlp."),
        (r"^lca\.feedforward\.", "lca.mlp."),
        *_AUTHORS,
    ),
)

COMPACT = replace(
    TIMM,
    name="Compact Transformer",
    model="lape.models.compact.CompactTransformer",
    stream_is_normed=True,
    table_scale=10.0,
    names=(
        (r"^tokenizer\.conv_layers\.(\d+)\.0\.", r"patch_embed.convs.\1."),
        (r"^classifier\.positional_emb(\d+)$", r"blocks.\1.pos_embed"),
        (r"^classifier\.positional_emb$", "pos_embed"),
        (r"^classifier\.class_emb$", "cls_token"),
        (r"^classifier\.attention_pool\.", "attn_pool.score."),
        (r"^classifier\.fc\.", "head."),
        # The norm that stands on the stream goes out of the way before the one before attention takes its name.
        (r"^classifier\.(blocks\.\d+)\.norm1\.", r"\1.norm2."),
        (r"^classifier\.(blocks\.\d+)\.pre_norm\.", r"\1.norm1."),
        (r"^classifier\.(blocks\.\d+)\.self_attn\.", r"\1.attn."),
        (r"^classifier\.(blocks\.\d+)\.linear(\d)\.", r"\1.mlp.fc\2."),
        (r"^classifier\.", ""),
    ),
)

VIT_ADAPTER = replace(
    TIMM,
    name="ViT-Adapter",
    model="lape.models.vit_adapter.ViTAdapter",
    resize=resize_bicubic,
    names=(
        (r"^(blocks\.\d+)\.gamma(\d)$", r"\1.ls\2.gamma"),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        *_AUTHORS,
    ),
)

SEGMENTER = replace(TIMM, name="Segmenter", model="lape.models.segmenter.SegmenterViT", resize=resize_by_count)

TORCHVISION = Host(
    name="torchvision VisionTransformer",
    model=f"{_TORCHVISION}.VisionTransformer",
    block={f"{_TORCHVISION}.EncoderBlock": Block("ln_1")},
    blocks="encoder.layers.*",
    table="encoder.pos_embedding",
    width="hidden_dim",
    grid=("image_size", "patch_size"),
    prefix=1,
)

# Version 5; version 4 has other paths, and other classes around its towers.
_VIT_5 = Host(
    name="transformers ViT",
    model=f"{_TRANSFORMERS}.vit.modeling_vit.ViTModel",
    block={f"{_TRANSFORMERS}.vit.modeling_vit.ViTLayer": Block("layernorm_before")},
    blocks="layers.*",
    table="embeddings.position_embeddings",
    width="config.hidden_size",
    grid=("config.image_size", "config.patch_size"),
    resize_table="interpolate_pos_encoding",
    prefix=1,
    resize=resize_bicubic,
)
_DEIT_5 = replace(
    _VIT_5,
    name="transformers DeiT",
    model=f"{_TRANSFORMERS}.deit.modeling_deit.DeiTModel",
    block={f"{_TRANSFORMERS}.deit.modeling_deit.DeiTLayer": Block("layernorm_before")},
    prefix=2,
)
_BEIT_5 = replace(
    _VIT_5,
    name="transformers BEiT",
    model=f"{_TRANSFORMERS}.beit.modeling_beit.BeitModel",
    block={f"{_TRANSFORMERS}.beit.modeling_beit.BeitLayer": Block("layernorm_before")},
)
# ω goes through the joint norm by default, as in the untouched model, and not where LaPE joins it.
_CLIP_5 = replace(
    _VIT_5,
    name="transformers CLIP",
    model=f"{_TRANSFORMERS}.clip.modeling_clip.CLIPVisionModel",
    block={f"{_TRANSFORMERS}.clip.modeling_clip.CLIPEncoderLayer": Block("layer_norm1")},
    blocks="encoder.layers.*",
    table="embeddings.position_embedding.weight",
    joint_norm="pre_layrnorm",
)
_SIGLIP_5 = replace(
    _CLIP_5,
    name="transformers SigLIP",
    model=f"{_TRANSFORMERS}.siglip.modeling_siglip.SiglipVisionModel",
    block={f"{_TRANSFORMERS}.siglip.modeling_siglip.SiglipEncoderLayer": Block("layer_norm1")},
    prefix=0,
    joint_norm=None,
)
DINOV2 = replace(  # in versions 4 and 5
    _VIT_5,
    name="transformers DINOv2",
    model=f"{_TRANSFORMERS}.dinov2.modeling_dinov2.Dinov2Model",
    block={f"{_TRANSFORMERS}.dinov2.modeling_dinov2.Dinov2Layer": Block("norm1")},
    blocks="encoder.layer.*",
)
TRANSFORMERS = (
    *(_VIT_5, _DEIT_5, _BEIT_5, _CLIP_5, _SIGLIP_5, DINOV2),
    replace(DINOV2, model=f"{_TRANSFORMERS}.dinov2.modeling_dinov2.Dinov2Backbone"),
)
TRANSFORMERS_4 = (
    *(replace(host, blocks="encoder.layer.*") for host in (_VIT_5, _DEIT_5, _BEIT_5)),
    replace(_CLIP_5, model=f"{_TRANSFORMERS}.clip.modeling_clip.CLIPVisionTransformer"),
    replace(_SIGLIP_5, model=f"{_TRANSFORMERS}.siglip.modeling_siglip.SiglipVisionTransformer"),
)

# It has no table of its own, and adds none: it is given one for sequences up to a length.
TORCH = Host(
    name="torch.nn.TransformerEncoder",
    model=f"{_TORCH}.TransformerEncoder",
    block={f"{_TORCH}.TransformerEncoderLayer": Block("norm1", pre_norm="norm_first")},
    blocks="layers.*",
    table="pos_embed",
    width="layers.0.self_attn.embed_dim",
    grid=None,
    before="",
    sequence=True,
    batch_first="layers.0.self_attn.batch_first",
    resize=cut,
)

# The first that fits a class stands.
HOSTS = (
    *(T2T_VIT, CEIT, COMPACT, VIT_ADAPTER, SEGMENTER, TIMM, EVA, SWIN),
    *(TORCHVISION, *TRANSFORMERS, *TRANSFORMERS_4, TORCH),
)


def class_names(model: nn.Module) -> set[str]:
    """Return the qualified names of a module's class and of all that it inherits from."""
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}


def find(model: nn.Module) -> tuple[nn.Module, Host]:
    """Return the transformer that `model` is, or the only one inside, and its row.

    Raises UsageError, saying why, where there is none or more than one.
    """
    found, unknown = [], []
    for part in model.modules():
        names = class_names(part)
        rows = [host for host in HOSTS if host.model in names]
        fitting = [host for host in rows if lacks(part, host) is None]
        if RECORD in part.__dict__:
            found.append((part, part.__dict__[RECORD].host))
        elif fitting:
            found.append((part, fitting[0]))
        else:
            unknown += [(part, host) for host in rows]
    if len(found) == 1:
        return found[0]
    what = type(model).__name__
    if found:
        raise UsageError(
            f"A join is applied to one vision transformer at a time; {what} holds {len(found)}. "
            f"Call lape.apply on each of them."
        )
    if unknown:
        part, host = unknown[-1]
        raise UsageError(
            f"{what} cannot carry a join: a {host.name} of this version has no {lacks(part, host)!r}. Use a version "
            "that lape knows, or give the row of this one: lape.apply(model, host=lape.Host(...))."
        )
    families = ", ".join(sorted({host.name for host in HOSTS}))
    raise UsageError(
        f"{what} cannot carry a join: {_reason(model)} lape.apply takes: {families}; and a class of your own, with a "
        "row of its paths: lape.apply(model, host=lape.Host(...))."
    )


def lacks(model: nn.Module, host: Host) -> str | None:
    """Return the first path of a row that leads nowhere in a model."""
    for path in (f"{host.stages}.{host.blocks}".strip("."), host.holder, host.behind, host.before):
        try:
            there = path is None or bool(parts(model, path))
        except AttributeError:
            there = False
        if not there:
            return path
    entries = (host.width, host.prefix, host.prefix_has_no_rows, host.batch_first, host.rotary, host.patch_dropout)
    grid = host.grid if isinstance(host.grid, tuple) else (host.grid,)
    adds = host.behind is None and host.before is None
    of_holder = [f"{host.holder}.{name}".strip(".") for name in (host.add_table, host.resize_table) if name and adds]
    table = [host.table.removesuffix(".weight")] if adds else []
    for path in (*entries, *grid, *of_holder, *table):
        try:
            read(model, path)
        except AttributeError:
            return str(path)
    return None


def _reason(model: nn.Module) -> str:
    kinds = [type(part).__name__.lower() for part in model.modules()]
    if any("rotary" in kind or "rope" in kind for kind in kinds) and getattr(model, "pos_embed", None) is None:
        return "its positions are rotations inside attention (RoPE), and it has no table to join."
    if not any("attention" in kind or "attn" in kind for kind in kinds):
        return "it has no attention, and so no positions to be told."
    return "it is not of a known family."


def block_row(host: Host, block: nn.Module) -> Block:
    """Return the row of a block; raise UsageError where its kind cannot carry a join."""
    names = class_names(block)
    rows = {None: host.block} if isinstance(host.block, Block) else host.block
    for name, row in rows.items():
        if (name is None or name in names) and (row.pre_norm is None or getattr(block, row.pre_norm)):
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


def parts(module: nn.Module, path: str) -> list[nn.Module]:
    """Return the submodules at a dotted path, in which `*` stands for every child."""
    if not path:
        return [module]
    head, _, rest = path.partition(".")
    children = list(module.children()) if head == "*" else [module.get_submodule(head)]
    return [part for child in children for part in parts(child, rest)]

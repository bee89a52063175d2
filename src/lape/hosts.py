"""The families of vision transformers that carry a join, one row each: where a family keeps what is operated on.

No family's library is imported here: a model is recognised by the names of its classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.errors import UsageError
from lape.method import Grid

Resize = Callable[[Tensor, Grid, Grid, int], Tensor]  # table (1, rows, D), new grid, old grid, prefix rows


def resize_as_timm(table: Tensor, new: Grid, old: Grid, prefix: int) -> Tensor:
    """Bicubic with antialiasing, as in timm; equal grids leave the table as it is."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    return resample_abs_pos_embed(table, list(new), list(old), num_prefix_tokens=prefix)


def _interpolated(table: Tensor, new: Grid, old: Grid, prefix: int, mode: str) -> Tensor:
    patches = table[:, prefix:].mT.unflatten(2, old)
    patches = F.interpolate(patches, new, mode=mode, align_corners=False).flatten(2).mT
    return torch.cat([table[:, :prefix], patches], dim=1)


def resize_bicubic(table: Tensor, new: Grid, old: Grid, prefix: int) -> Tensor:
    """Bicubic without antialiasing (ViT-Adapter)."""
    return table if new == old else _interpolated(table, new, old, prefix, "bicubic")


def resize_by_count(table: Tensor, new: Grid, old: Grid, prefix: int) -> Tensor:
    """Bilinear without antialiasing, and not at all where another grid has as many patches (Segmenter)."""
    same = new[0] * new[1] == old[0] * old[1]
    return table if same else _interpolated(table, new, old, prefix, "bilinear")


@dataclass(frozen=True)
class Block:
    """Where one kind of block normalises its tokens for attention.

    `norms` is the path of the norms whose output enters attention. Where the MLP reads that output too, `projection` is
    the path of the linear layer that serves both; its last 3·D outputs are queries, keys and values.
    """

    norms: str
    projection: str | None = None


@dataclass(frozen=True)
class WindowBias:
    """A relative bias of the host's own: the path of a block's attention, and its method that makes the bias."""

    attention: str
    method: str


@dataclass(frozen=True)
class Host:
    """One family: the class it is known by, its blocks by class, and the paths of blocks, table and what handles it."""

    name: str
    model: str  # qualified class name
    block: Mapping[str, Block]  # by qualified class name
    table: str
    width: str = "embed_dim"  # D, of the first stage
    grid: str = "patch_embed.grid_size"  # (rows, columns) of patches that the table is for
    # From the model to its stages, from a stage to its blocks, and to what takes tokens from the stage before to it.
    stages: str = ""
    blocks: str = "blocks.*"
    crossing: str | None = None
    # The table is added by a method, which puts the prefix tokens before the patches too, or behind a module.
    add_table: str | None = None
    behind: str | None = None
    silent: Mapping[str, Any] = field(default_factory=dict)  # what `add_table` sees while it must add and drop nothing
    table_dropout: str | None = None
    patch_dropout: str | None = None
    prefix: str | None = None  # the number of prefix tokens
    prefix_has_no_rows: str | None = None  # whether the table leaves the prefix tokens out
    window_bias: WindowBias | None = None
    stream_is_normed: bool = False  # a norm stands on the residual stream itself
    resize: Resize = resize_as_timm
    # The position embedding that it comes with, and what it gets for a join that needs a table.
    own: str = "learnable"
    own_joined: str = "learnable"
    table_scale: float = 1.0  # how much wider than 0.02 its learnt table starts
    # Patterns of parameter names in the files of the family's first authors, and what stands for them here; then the
    # module of timm whose `checkpoint_filter_fn` does the rest.
    names: tuple[tuple[str, str], ...] = ()
    filter: str = "timm.models.vision_transformer"


_VIT = "timm.models.vision_transformer"
_SWIN = "timm.models.swin_transformer"

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
    add_table="_pos_embed",
    silent={"dynamic_img_size": False, "pos_drop": nn.Identity()},
    table_dropout="pos_drop",
    patch_dropout="patch_drop",
    prefix="num_prefix_tokens",
    prefix_has_no_rows="no_embed_class",
    names=_AUTHORS,
)

SWIN = Host(
    name="timm SwinTransformer",
    model=f"{_SWIN}.SwinTransformer",
    block={f"{_SWIN}.SwinTransformerBlock": Block("norm1")},
    table="absolute_pos_embed",
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

HOSTS = (T2T_VIT, CEIT, COMPACT, VIT_ADAPTER, SEGMENTER, TIMM, SWIN)  # the first that fits a class stands


def class_names(model: nn.Module) -> set[str]:
    """Return the qualified names of a module's class and of all that it inherits from."""
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}


def find(model: nn.Module) -> tuple[nn.Module, Host]:
    """Return the vision transformer that `model` is, or the only one inside (timm's feature getters), and its row.

    Raises UsageError, saying why, where there is none or more than one.
    """
    rows = [(part, [host for host in HOSTS if host.model in class_names(part)]) for part in model.modules()]
    found = [(part, fitting[0]) for part, fitting in rows if fitting]
    if len(found) == 1:
        return found[0]
    what = type(model).__name__
    if found:
        raise UsageError(
            f"A join is applied to one vision transformer at a time; {what} holds {len(found)}. "
            f"Call lape.apply on each of them."
        )
    families = ", ".join(sorted(host.name for host in HOSTS))
    raise UsageError(f"{what} cannot carry a join: {_reason(model)} lape.apply takes: {families}.")


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
    for name, row in host.block.items():
        if name in names:
            return row
    known = ", ".join(name.rpartition(".")[2] for name in host.block)
    raise UsageError(
        f"{type(block).__name__} cannot carry a join: LaPE adds the position to what a norm hands to attention, and "
        f"no norm is known to stand before this block's (a post-norm block has it behind). Blocks that can: {known}."
    )


def parts(module: nn.Module, path: str) -> list[nn.Module]:
    """Return the submodules at a dotted path, in which `*` stands for every child."""
    if not path:
        return [module]
    head, _, rest = path.partition(".")
    children = list(module.children()) if head == "*" else [module.get_submodule(head)]
    return [part for child in children for part in parts(child, rest)]

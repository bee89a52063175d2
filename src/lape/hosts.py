"""The families of vision transformers that carry a join, one row each: where a family keeps what is operated on.

No family's library is imported here: a model is recognised by the names of its classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lape.errors import UsageError


@dataclass(frozen=True)
class Block:
    """Where one kind of block normalises its tokens for attention.

    `norms` is the path of the norms whose output enters attention. Where the MLP reads that output too, `projection` is
    the path of the linear layer that serves both; its last 3·D outputs are queries, keys and values.
    """

    norms: str
    projection: str | None = None


@dataclass(frozen=True)
class Host:
    """One family: the class it is known by, its blocks by class, and the paths of blocks, table and what handles it."""

    name: str
    model: str  # qualified class name
    block: Mapping[str, Block]  # by qualified class name
    blocks: str
    width: str  # D
    grid: str  # (rows, columns) of patches that the table is for
    table: str
    add_table: str  # the method that adds the table to the patches and puts the prefix tokens before them
    table_dropout: str
    patch_dropout: str
    prefix: str  # the number of prefix tokens
    prefix_has_no_rows: str  # whether the table leaves the prefix tokens out
    silent: Mapping[str, Any]  # what `add_table` sees while it must add no table and drop nothing


_VIT = "timm.models.vision_transformer"

TIMM = Host(
    name="timm VisionTransformer",
    model=f"{_VIT}.VisionTransformer",
    block={
        f"{_VIT}.Block": Block("norm1"),
        f"{_VIT}.ParallelScalingBlock": Block("in_norm", "in_proj"),
        f"{_VIT}.DiffParallelScalingBlock": Block("in_norm", "in_proj"),
        f"{_VIT}.ParallelThingsBlock": Block("attns.*.norm"),
    },
    blocks="blocks",
    width="embed_dim",
    grid="patch_embed.grid_size",
    table="pos_embed",
    add_table="_pos_embed",
    table_dropout="pos_drop",
    patch_dropout="patch_drop",
    prefix="num_prefix_tokens",
    prefix_has_no_rows="no_embed_class",
    silent={"dynamic_img_size": False, "pos_drop": nn.Identity()},
)

HOSTS = (TIMM,)


def class_names(model: nn.Module) -> set[str]:
    """Return the qualified names of a module's class and of all that it inherits from."""
    return {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}


def find(model: nn.Module) -> tuple[nn.Module, Host]:
    """Return the vision transformer that `model` is, or the only one inside (timm's feature getters), and its row.

    Raises UsageError, saying why, where there is none or more than one.
    """
    found = [(part, host) for part in model.modules() for host in HOSTS if host.model in class_names(part)]
    if len(found) == 1:
        return found[0]
    what = type(model).__name__
    if found:
        raise UsageError(
            f"A join is applied to one vision transformer at a time; {what} holds {len(found)}. "
            f"Call lape.apply on each of them."
        )
    families = ", ".join(host.name for host in HOSTS)
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

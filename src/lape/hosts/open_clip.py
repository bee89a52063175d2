"""Rows of open_clip's towers, in the versions with and without a method of its own for the vision tower's embedding."""

from dataclasses import replace
from typing import Any

from lape.errors import UsageError
from lape.hosts.resizing import cut
from lape.hosts.row import Block, Host
from lape.method import Grid

_MODULE = "open_clip.transformer"

# ω goes through the joint norm by default, as in the untouched model, and not where LaPE joins it.
VISION_TRANSFORMER = Host(
    name="open_clip VisionTransformer",
    model=f"{_MODULE}.VisionTransformer",
    table="positional_embedding",
    add_table="_embeds",
    width="transformer.width",
    blocks="transformer.resblocks.*",
    block={
        f"{_MODULE}.ResidualAttentionBlock": Block("ln_1"),
        f"{_MODULE}.CustomResidualAttentionBlock": Block("ln_1"),
    },
    grid="grid_size",
    prefix=1,
    batch_first="transformer.batch_first",
    joint_norm="ln_pre",
)


def _of_words(model: Any) -> Grid:
    if model.cls_emb is not None:
        raise UsageError(
            "TextTransformer with embed_cls=True is not known: its class token stands behind the words and has the row "
            "there, so the table is not a prefix and a grid."
        )
    return 1, model.num_pos


TEXT_TRANSFORMER = replace(
    VISION_TRANSFORMER,
    name="open_clip TextTransformer",
    model=f"{_MODULE}.TextTransformer",
    width="width",
    resize=cut,
    grid=_of_words,
    prefix=0,
    sequence=True,
    joint_norm=None,
)

ROWS = (
    VISION_TRANSFORMER,
    replace(VISION_TRANSFORMER, add_table="forward", batch_first=False),
    TEXT_TRANSFORMER,
)

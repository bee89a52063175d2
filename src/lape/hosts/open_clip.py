"""Rows of open_clip's vision tower, in the versions with and without a method of its own for the embedding.

Its text towers have none: a CLIP of open_clip is one model with two transformers, and a join is applied to one.
"""

from dataclasses import replace

from lape.hosts.row import Block, Host

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

ROWS = (VISION_TRANSFORMER, replace(VISION_TRANSFORMER, add_table="forward", batch_first=False))

"""Rows of timm's transformers, and why some of them carry no join."""

from dataclasses import replace
from typing import Any

from lape.hosts.row import Block, Embedding, Files, Host, Refusal, Rotated, Stages, WindowBias

_MODELS = "timm.models"
_VIT = f"{_MODELS}.vision_transformer"
_EVA = f"{_MODELS}.eva"
_SWIN = f"{_MODELS}.swin_transformer"
_FORWARDS = ("forward_features", "forward_intermediates")  # each adds the table in its own lines

# LaPE's authors (github.com/Ingrid725/LaPE) name an unshared table and the parts of a relative bias otherwise.
AUTHORS_NAMES = (
    (r"^pos_embed(\d+)$", r"blocks.\1.pos_embed"),
    (r"^(blocks\.\d+)\.attn\.(relative_position_bias_table)$", r"\1.\2"),
    (r"^(blocks\.\d+)\.attn\.(pe_norm\.\w+)$", r"\1.relative_position.\2"),
    (r"^pos_block\.(\d+)\.proj\.0\.(\w+)$", r"blocks.\1.peg.\2"),  # of Twins and CPVT
)

_NORMED = (Rotated("attn.q_norm", "attn.k_norm"),)  # stands there whether it norms or not

FILTER = _VIT  # whose `checkpoint_filter_fn` reads files of VisionTransformers


def _mean_over_patches(model: Any) -> bool:
    return getattr(model, "global_pool", None) == "avg"


VISION_TRANSFORMER = Host(
    name="timm VisionTransformer",
    model=f"{_VIT}.VisionTransformer",
    table="pos_embed",
    add_table="_pos_embed",
    block={
        f"{_VIT}.Block": Block("norm1", rotated=_NORMED),
        f"{_VIT}.ParallelScalingBlock": Block("in_norm", "in_proj", rotated=(Rotated("q_norm", "k_norm", axis=2),)),
        f"{_VIT}.DiffParallelScalingBlock": Block("in_norm", "in_proj"),
        f"{_VIT}.ParallelThingsBlock": Block(
            "attns.*.norm", rotated=(Rotated("attns.*.attn.q_norm", "attns.*.attn.k_norm"),)
        ),
    },
    logits="attn_mask",
    grid="patch_embed.grid_size",
    prefix="num_prefix_tokens",
    prefix_has_no_rows="no_embed_class",
    gives_map=True,
    patch_dropout="patch_drop",
    joint_norm="norm_pre",
    final_norm="norm",
    pools_patches=_mean_over_patches,
    files=Files(FILTER, AUTHORS_NAMES),
)

EVA = replace(
    VISION_TRANSFORMER,
    name="timm Eva",
    model=f"{_EVA}.Eva",
    block={f"{_EVA}.EvaBlock": Block("norm1", rotated=_NORMED)},
    rotary="rope",
    files=Files(_EVA),
)

SWIN_TRANSFORMER = Host(
    name="timm SwinTransformer",
    pools_patches=_mean_over_patches,
    model=f"{_SWIN}.SwinTransformer",
    table="absolute_pos_embed",
    behind="patch_embed",
    embedding=Embedding(own="relative", joined="learnable+relative"),
    block={f"{_SWIN}.SwinTransformerBlock": Block("norm1")},
    stages=Stages("layers.*", "downsample"),
    window_bias=WindowBias("attn", "_get_rel_pos_bias"),
    grid="patch_embed.grid_size",
    files=Files(_SWIN),
)

# Its relative bias stays as it is; timm's own variants have no table beside it.
BEIT = Host(
    name="timm Beit",
    pools_patches=_mean_over_patches,
    model=f"{_MODELS}.beit.Beit",
    table="pos_embed",
    add_table=_FORWARDS,
    block={f"{_MODELS}.beit.Block": Block("norm1")},
    grid="patch_embed.grid_size",
    prefix="num_prefix_tokens",
)

# The class token comes behind these blocks, in blocks of class attention, which are told of no position.
CAIT = Host(
    name="timm Cait",
    model=f"{_MODELS}.cait.Cait",
    table="pos_embed",
    add_table=_FORWARDS,
    block={f"{_MODELS}.cait.LayerScaleBlock": Block("norm1")},
    grid="patch_embed.grid_size",
)

# What is told is where a patch is; the table of the pixels inside one stays as it is.
TNT = Host(
    name="timm TNT",
    model=f"{_MODELS}.tnt.TNT",
    table="patch_pos",
    add_table=_FORWARDS,
    block={f"{_MODELS}.tnt.Block": Block("norm_out", tokens=1)},
    grid="pixel_embed.grid_size",
    prefix="num_prefix_tokens",
)

SAM = Host(
    name="timm VisionTransformerSAM",
    model=f"{_MODELS}.vision_transformer_sam.VisionTransformerSAM",
    table="pos_embed",
    add_table=_FORWARDS,
    block={f"{_MODELS}.vision_transformer_sam.Block": Block("norm1")},
    grid="patch_embed.grid_size",
    grid_of_image="patch_embed.dynamic_feat_size",
    joint_norm="norm_pre",
)

# The table is added behind the outlookers and the step to half as many rows and columns: number 2 is the first stage of
# transformers. The blocks of class attention behind them are told of no position.
VOLO = Host(
    name="timm VOLO",
    model=f"{_MODELS}.volo.VOLO",
    table="pos_embed",
    add_table=("forward_tokens", "forward_intermediates"),
    width="num_features",
    blocks="network.2:.*",
    block={f"{_MODELS}.volo.Transformer": Block("norm1")},
    grid=None,
)

# It has a relative bias, which stays as it is, and a table only by `lape.apply(model, pe=...)`.
RELATIVE = Host(
    name="timm VisionTransformerRelPos",
    pools_patches=_mean_over_patches,
    model=f"{_MODELS}.vision_transformer_relpos.VisionTransformerRelPos",
    table="pos_embed",
    behind="patch_embed",
    block={f"{_MODELS}.vision_transformer_relpos.RelPosBlock": Block("norm1")},
    grid="patch_embed.grid_size",
    prefix="num_prefix_tokens",
    prefix_has_no_rows=True,
)

NAFLEX = Host(
    name="timm NaFlexVit",
    pools_patches=_mean_over_patches,
    model=f"{_MODELS}.naflexvit.NaFlexVit",
    table="embeds.pos_embed",
    block={f"{_VIT}.Block": Block("norm1"), f"{_EVA}.EvaBlock": Block("norm1")},
    logits="attn_mask",
    grid="embeds.pos_embed_grid_size",
    grid_of_image="embeds.dynamic_feat_size",
    prefix="num_prefix_tokens",
    prefix_has_no_rows=True,
    patch_dropout="patch_drop",
    rotary="rope",
    joint_norm="norm_pre",
)

OLDER_VERSIONS = (  # of which some have no `forward_intermediates`
    *(replace(row, add_table="forward_features") for row in (BEIT, CAIT, TNT, SAM)),
    replace(VOLO, add_table="forward_tokens"),
)
ROWS = (VISION_TRANSFORMER, EVA, SWIN_TRANSFORMER, BEIT, CAIT, TNT, SAM, VOLO, RELATIVE, NAFLEX, *OLDER_VERSIONS)

REFUSALS = (
    Refusal(
        f"{_MODELS}.convit.ConVit",
        "its class token joins the patches between two blocks, so its layers do not all have the tokens of its table.",
    ),
    Refusal(
        f"{_MODELS}.hiera.Hiera",
        "behind its table it sorts the patches by windows and then pools them, and positions do not follow them there.",
    ),
    Refusal(
        f"{_MODELS}.hieradet_sam2.HieraDet",
        "its positions are the sum of two tables, one of them for each window, and its queries are pooled inside of "
        "attention.",
    ),
    Refusal(
        f"{_MODELS}.crossvit.CrossVit",
        "it has two branches of patches of two sizes, each with a table and blocks of its own.",
    ),
    Refusal(
        f"{_MODELS}.qwen3_vit.Qwen3VitEncoder",
        "its table belongs to a square grid and is resized for each input by a function outside of the model, where "
        "nothing can take the table's place.",
    ),
    Refusal(
        f"{_MODELS}.gemma4_vit.Gemma4VitEncoder",
        "its positions are the sum of a table for rows and one for columns, beside rotations inside attention.",
    ),
    Refusal(
        f"{_MODELS}.nest.Nest",
        "it has a table in each of its levels, over patches that are sorted by blocks of the image.",
    ),
    Refusal(
        f"{_MODELS}.visformer.Visformer",
        "it has a table in each of its stages, of which the first is all convolutions.",
    ),
    Refusal(
        f"{_MODELS}.pit.PoolingVisionTransformer",
        "its patches are pooled by convolutions between two stages, and how a position would cross these is not known.",
    ),
    Refusal(
        f"{_MODELS}.naflexvit.NaFlexVit",
        "its positions are the sum of a table for rows and one for columns (factorized).",
        where=("embeds.pos_embed_type", "factorized"),
    ),
    Refusal(
        f"{_MODELS}.naflexvit.NaFlexVit",
        "it was made without a table, and its class then adds none.",
        where=("embeds.pos_embed_type", "none"),
    ),
    Refusal(
        f"{_MODELS}.naflexvit.NaFlexVit",
        "it cuts the table for each image out of a square one (pos_embed_ar_preserving).",
        where=("embeds.pos_embed_ar_preserving", True),
    ),
)

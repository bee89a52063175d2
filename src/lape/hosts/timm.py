"""Rows of timm's transformers."""

from dataclasses import replace

from lape.hosts.row import Block, Embedding, Files, Host, Rotated, Stages, WindowBias

_VIT = "timm.models.vision_transformer"
_EVA = "timm.models.eva"
_SWIN = "timm.models.swin_transformer"

# LaPE's authors (github.com/Ingrid725/LaPE) name an unshared table and the parts of a relative bias otherwise.
AUTHORS_NAMES = (
    (r"^pos_embed(\d+)$", r"blocks.\1.pos_embed"),
    (r"^(blocks\.\d+)\.attn\.(relative_position_bias_table)$", r"\1.\2"),
    (r"^(blocks\.\d+)\.attn\.(pe_norm\.\w+)$", r"\1.relative_position.\2"),
    (r"^pos_block\.(\d+)\.proj\.0\.(\w+)$", r"blocks.\1.peg.\2"),  # of Twins and CPVT
)

_NORMED = (Rotated("attn.q_norm", "attn.k_norm"),)  # stands there whether it norms or not

FILTER = _VIT  # whose `checkpoint_filter_fn` reads files of VisionTransformers

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

ROWS = (VISION_TRANSFORMER, EVA, SWIN_TRANSFORMER)

"""Rows of Hugging Face transformers' towers, in its versions 5 and 4."""

from dataclasses import replace

from lape.hosts.resizing import resize_bicubic
from lape.hosts.row import Block, Host, Rotated

_MODELS = "transformers.models"
_PROJECTED = (
    Rotated("attention.q_proj", "attention.k_proj", axis=None),
    Rotated("attention.attention.query", "attention.attention.key", axis=None),  # version 4
)
_OF_CLIP = (Rotated("self_attn.q_proj", "self_attn.k_proj", axis=None),)

VIT = Host(
    name="transformers ViT",
    model=f"{_MODELS}.vit.modeling_vit.ViTModel",
    table="embeddings.position_embeddings",
    width="config.hidden_size",
    resize_table="interpolate_pos_encoding",
    resize=resize_bicubic,
    blocks="layers.*",
    block={f"{_MODELS}.vit.modeling_vit.ViTLayer": Block("layernorm_before", rotated=_PROJECTED)},
    grid=("config.image_size", "config.patch_size"),
    prefix=1,
    final_norm="layernorm",
)
DEIT = replace(
    VIT,
    name="transformers DeiT",
    model=f"{_MODELS}.deit.modeling_deit.DeiTModel",
    block={f"{_MODELS}.deit.modeling_deit.DeiTLayer": Block("layernorm_before", rotated=_PROJECTED)},
    prefix=2,
)
BEIT = replace(
    VIT,
    name="transformers BEiT",
    model=f"{_MODELS}.beit.modeling_beit.BeitModel",
    block={f"{_MODELS}.beit.modeling_beit.BeitLayer": Block("layernorm_before", rotated=_PROJECTED)},
)
# ω goes through the joint norm by default, as in the untouched model, and not where LaPE joins it.
CLIP = replace(
    VIT,
    name="transformers CLIP",
    model=f"{_MODELS}.clip.modeling_clip.CLIPVisionModel",
    table="embeddings.position_embedding.weight",
    blocks="encoder.layers.*",
    block={f"{_MODELS}.clip.modeling_clip.CLIPEncoderLayer": Block("layer_norm1", rotated=_OF_CLIP)},
    joint_norm="pre_layrnorm",
    final_norm=None,  # it norms the class token alone
)
SIGLIP = replace(
    CLIP,
    name="transformers SigLIP",
    model=f"{_MODELS}.siglip.modeling_siglip.SiglipVisionModel",
    block={f"{_MODELS}.siglip.modeling_siglip.SiglipEncoderLayer": Block("layer_norm1", rotated=_OF_CLIP)},
    prefix=0,
    joint_norm=None,
    final_norm="post_layernorm",
)
DINOV2 = replace(  # in both versions
    VIT,
    name="transformers DINOv2",
    model=f"{_MODELS}.dinov2.modeling_dinov2.Dinov2Model",
    blocks="encoder.layer.*",
    block={f"{_MODELS}.dinov2.modeling_dinov2.Dinov2Layer": Block("norm1", rotated=_PROJECTED)},
)

VERSION_4 = (  # other paths, and other classes around its towers
    *(replace(row, blocks="encoder.layer.*") for row in (VIT, DEIT, BEIT)),
    replace(CLIP, model=f"{_MODELS}.clip.modeling_clip.CLIPVisionTransformer"),
    replace(SIGLIP, model=f"{_MODELS}.siglip.modeling_siglip.SiglipVisionTransformer"),
)
ROWS = (
    *(VIT, DEIT, BEIT, CLIP, SIGLIP, DINOV2),
    replace(DINOV2, model=f"{_MODELS}.dinov2.modeling_dinov2.Dinov2Backbone"),
    *VERSION_4,
)

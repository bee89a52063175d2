"""Rows of Hugging Face transformers' towers, in its versions 5 and 4."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from lape.hosts.resizing import cut, resize_as_timm, resize_bicubic, resize_bilinear
from lape.hosts.row import Block, Host, Refusal, Rotated, pair
from lape.method import Grid

_PROJECTED = (
    Rotated("attention.q_proj", "attention.k_proj", axis=None),
    Rotated("attention.attention.query", "attention.attention.key", axis=None),  # version 4
)
_OF_CLIP = (Rotated("self_attn.q_proj", "self_attn.k_proj", axis=None),)


def _module(family: str) -> str:
    *folders, last = family.split(".")
    return ".".join(["transformers.models", *folders, *([] if folders else [last]), f"modeling_{last}"])


def _like(row: Host, name: str, family: str, model: str, layer: str, norm: str = "", **entries: Any) -> Host:
    """Return the row of a class whose parts have the paths of another's, but for some entries."""
    assert isinstance(row.block, dict)
    (block,) = row.block.values()
    at = _module(family)
    blocks = {f"{at}.{layer}": replace(block, norms=norm) if norm else block}
    return replace(row, name=f"transformers {name}", model=f"{at}.{model}", block=blocks, **entries)


def _in_version_4(row: Host) -> Host:
    """Return the row of a tower that version 5 took out of its wrapper."""
    assert row.model is not None
    return replace(row, model=row.model.removesuffix("Model") + "Transformer")


# --- Images

VIT = Host(
    name="transformers ViT",
    model=f"{_module('vit')}.ViTModel",
    table="embeddings.position_embeddings",
    width="config.hidden_size",
    resize_table="interpolate_pos_encoding",
    resize=resize_bicubic,
    blocks="layers.*",
    block={f"{_module('vit')}.ViTLayer": Block("layernorm_before", rotated=_PROJECTED)},
    grid=("config.image_size", "config.patch_size"),
    prefix=1,
    final_norm="layernorm",
)


def _left_by_vit_mae(output: Any, *_: Any, **__: Any) -> Tensor:
    tokens, _, place_of_each = output
    return place_of_each.argsort(dim=1)[:, : tokens.shape[1] - 1]


_VITS = (  # blocks at `layers.*` in version 5, at `encoder.layer.*` in version 4
    VIT,
    _like(VIT, "DeiT", "deit", "DeiTModel", "DeiTLayer", prefix=2),
    _like(VIT, "BEiT", "beit", "BeitModel", "BeitLayer"),
    _like(VIT, "ViT-MSN", "vit_msn", "ViTMSNModel", "ViTMSNLayer"),
    _like(VIT, "ViT-MAE", "vit_mae", "ViTMAEModel", "ViTMAELayer", kept=_left_by_vit_mae),
    _like(VIT, "I-JEPA", "ijepa", "IJepaModel", "IJepaLayer", prefix=0),
    _like(VIT, "Pixio", "pixio", "PixioModel", "PixioLayer", prefix="config.n_cls_tokens"),
)
DINOV2 = _like(VIT, "DINOv2", "dinov2", "Dinov2Model", "Dinov2Layer", "norm1", blocks="encoder.layer.*")


def _with_registers(model: Any) -> int:
    return 1 + model.config.num_register_tokens


_WITH_REGISTERS = _like(
    replace(DINOV2, prefix=_with_registers, registers="config.num_register_tokens", resize=resize_as_timm),
    *("DINOv2 with registers", "dinov2_with_registers", "Dinov2WithRegistersModel", "Dinov2WithRegistersLayer"),
)
_WITH_ENCODER = (  # blocks at `encoder.layer.*` in both versions
    DINOV2,
    replace(DINOV2, model=f"{_module('dinov2')}.Dinov2Backbone"),
    _WITH_REGISTERS,
    replace(_WITH_REGISTERS, model=f"{_module('dinov2_with_registers')}.Dinov2WithRegistersBackbone"),
    _like(
        replace(VIT, blocks="encoder.layer.*"),
        *("Data2Vec", "data2vec.data2vec_vision", "Data2VecVisionModel", "Data2VecVisionLayer"),
    ),
    _like(
        replace(VIT, blocks="encoder.layer.*"),
        *("InternVL", "internvl", "InternVLVisionModel", "InternVLVisionLayer"),
    ),
    _like(
        replace(VIT, blocks="encoder.layer.*", resize_table="_resize_pos_embed", resize=resize_bilinear),
        *("DPT", "dpt", "DPTModel", "DPTViTLayer"),
    ),
)

# ω goes through the joint norm by default, as in the untouched model, and not where LaPE joins it.
CLIP = _like(
    replace(VIT, block={"": Block("layer_norm1", rotated=_OF_CLIP)}),
    *("CLIP", "clip", "CLIPVisionModel", "CLIPEncoderLayer"),
    table="embeddings.position_embedding.weight",
    blocks="encoder.layers.*",
    joint_norm="pre_layrnorm",
    final_norm=None,  # it norms the class token alone
)
SIGLIP = _like(
    replace(CLIP, prefix=0, joint_norm=None, final_norm="post_layernorm"),
    *("SigLIP", "siglip", "SiglipVisionModel", "SiglipEncoderLayer"),
)
_CLIPS = (
    CLIP,
    SIGLIP,
    _like(CLIP, "AltCLIP", "altclip", "AltCLIPVisionModel", "AltCLIPEncoderLayer"),
    _like(CLIP, "Chinese CLIP", "chinese_clip", "ChineseCLIPVisionModel", "ChineseCLIPVisionLayer"),
    _like(CLIP, "CLIPSeg", "clipseg", "CLIPSegVisionModel", "CLIPSegEncoderLayer"),
    _like(CLIP, "MetaCLIP 2", "metaclip_2", "MetaClip2VisionModel", "MetaClip2EncoderLayer"),
)
_CLIPS_OF_BOTH_VERSIONS = (
    _like(  # turned queries and keys could not be checked in it
        replace(CLIP, block={"": Block("layer_norm1")}),
        *("GIT", "git", "GitVisionTransformer", "GitVisionEncoderLayer"),
    ),
    _like(CLIP, "KOSMOS-2", "kosmos2", "Kosmos2VisionTransformer", "Kosmos2VisionEncoderLayer"),
    *(
        _like(CLIP, name, family, f"{kind}VisionTransformer", f"{kind}EncoderLayer", joint_norm="pre_layernorm")
        for name, family, kind in (("OWL-ViT", "owlvit", "OwlViT"), ("OWLv2", "owlv2", "Owlv2"))
    ),
    _like(SIGLIP, "Janus", "janus", "JanusVisionModel", "JanusVisionEncoderLayer"),
    *(  # a table that no Embedding holds
        _like(
            replace(CLIP, table="embeddings.position_embedding", joint_norm=None),
            *(name, family, f"{kind}VisionModel", f"{kind}EncoderLayer"),
        )
        for name, family, kind in (
            ("BLIP", "blip", "Blip"),
            ("BLIP-2", "blip_2", "Blip2"),
            ("InstructBLIP", "instructblip", "InstructBlip"),
        )
    ),
    *(  # which row a patch has depends on the mask of its image
        _like(SIGLIP, name, family, f"{kind}VisionTransformer", f"{kind}EncoderLayer", resize_table=None)
        for name, family, kind in (
            ("Idefics2", "idefics2", "Idefics2"),
            ("Idefics3", "idefics3", "Idefics3"),
            ("SmolVLM", "smolvlm", "SmolVLM"),
        )
    ),
)

_SAMS = tuple(  # whose table is a map
    _like(
        replace(VIT, table="pos_embed", resize_table=None, prefix=0, final_norm=None),
        *(name, family, f"{kind}VisionEncoder", f"{kind}VisionLayer", "layer_norm1"),
    )
    for name, family, kind in (
        ("SAM", "sam", "Sam"),
        ("SAM-HQ", "sam_hq", "SamHQ"),
        ("GOT-OCR2", "got_ocr2", "GotOcr2"),
    )
)

# --- Sound and video: a grid of frequencies and times, and one of frames and the patches of a frame


def _of_a_spectrogram(model: Any) -> Grid:
    frequencies, times = model.embeddings.get_shape(model.config)
    return frequencies, times


def _of_a_video(model: Any) -> Grid:
    config = model.config
    frames, *patch = config.tubelet_size
    (height, width), (patch_height, patch_width) = pair(config.image_size), patch
    return config.num_frames // frames, (height // patch_height) * (width // patch_width)


_OTHERS = (
    _like(
        replace(VIT, resize_table=None, grid=_of_a_spectrogram, prefix=2),
        *("AST", "audio_spectrogram_transformer", "ASTModel", "ASTLayer"),
    ),
    _like(
        replace(VIT, resize_table=None, grid=_of_a_video),
        *("ViViT", "vivit", "VivitModel", "VivitLayer"),
    ),
)

# --- Text, and what is heard

CLIP_TEXT = replace(
    CLIP,
    name="transformers CLIP text",
    model=f"{_module('clip')}.CLIPTextModel",
    resize_table=None,
    resize=cut,
    grid="config.max_position_embeddings",
    prefix=0,
    sequence=True,
    joint_norm=None,
)
_CLIP_TEXTS = (
    CLIP_TEXT,
    *(
        _like(CLIP_TEXT, f"{name} text", family, f"{kind}TextModel", f"{kind}EncoderLayer")
        for name, family, kind in (
            ("SigLIP", "siglip", "Siglip"),
            ("SigLIP 2", "siglip2", "Siglip2"),
            ("CLIPSeg", "clipseg", "CLIPSeg"),
            ("X-CLIP", "x_clip", "XCLIP"),
            ("MetaCLIP 2", "metaclip_2", "MetaClip2"),
        )
    ),
)
_TEXTS = (
    *(
        _like(CLIP_TEXT, f"{name} text", family, f"{kind}TextTransformer", f"{kind}EncoderLayer")
        for name, family, kind in (("OWL-ViT", "owlvit", "OwlViT"), ("OWLv2", "owlv2", "Owlv2"))
    ),
    _like(CLIP_TEXT, "GPT-2", "gpt2", "GPT2Model", "GPT2Block", "ln_1", table="wpe.weight", blocks="h.*"),
    replace(
        _like(CLIP_TEXT, "OPT", "opt", "OPTDecoder", "OPTDecoderLayer", table="embed_positions.weight"),
        blocks="layers.*",
        block={f"{_module('opt')}.OPTDecoderLayer": Block("self_attn_layer_norm", pre_norm="do_layer_norm_before")},
        grid="embed_positions.num_embeddings",  # its first two are of no token
    ),
    _like(
        replace(CLIP_TEXT, table="embed_positions.weight", blocks="layers.*", grid="config.max_source_positions"),
        *("Whisper's encoder", "whisper", "WhisperEncoder", "WhisperEncoderLayer", "self_attn_layer_norm"),
    ),
)

VERSION_4 = tuple(_in_version_4(row) for row in (*_CLIPS, *_CLIP_TEXTS))  # classes that version 5 has no more
ROWS = (
    *(*_VITS, *_WITH_ENCODER, *_CLIPS, *_CLIPS_OF_BOTH_VERSIONS, *_SAMS, *_OTHERS, *_CLIP_TEXTS, *_TEXTS),
    *(replace(row, blocks="encoder.layer.*") for row in (*_VITS, *_OTHERS)),
    *VERSION_4,
)

# --- What carries no join

_POST_NORM = "its blocks normalise behind attention, and LaPE adds the position to what a norm hands to attention."
_OF_FRAMES = (
    "its table is for the patches of a frame, and its blocks take those of all frames and tell these by another."
)
_NO_GRADIENT = "its method cuts the table off from gradients before it adds it, so that no table could learn there."
_BEHIND = "its detection tokens stand behind the patches and have rows there, so the table is not a prefix and a grid."
_BY_IMAGE = (
    "it resizes its table for each image of a batch by itself, so that the images of a batch share no positions."
)
_MESSAGE = "each of its blocks adds a token of its own to those that attention is given, and that one has no position."
REFUSALS = tuple(
    Refusal(f"{_module(family)}.{model}", reason)
    for family, model, reason in (
        ("altclip", "AltRobertaModel", _POST_NORM),
        ("bert", "BertModel", _POST_NORM),
        ("chinese_clip", "ChineseCLIPTextModel", _POST_NORM),
        ("roberta", "RobertaModel", _POST_NORM),
        ("siglip2", "Siglip2VisionModel", _BY_IMAGE),
        ("siglip2", "Siglip2VisionTransformer", _BY_IMAGE),
        ("timesformer", "TimesformerModel", _OF_FRAMES),
        ("videomae", "VideoMAEModel", _NO_GRADIENT),
        ("x_clip", "XCLIPVisionModel", _MESSAGE),
        ("x_clip", "XCLIPVisionTransformer", _MESSAGE),
        ("yolos", "YolosModel", _BEHIND),
    )
)

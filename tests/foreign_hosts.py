"""Small models of every library that keeps its own forward, what they are given, and where their parts are."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import timm
import timm.layers
import torch
import transformers
from open_clip.transformer import TextTransformer as OpenClipText
from open_clip.transformer import VisionTransformer as OpenClipVision
from timm.models.eva import Eva
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import lape
from lape.hosts import cut, open_clip

D = 32
SMALL: dict[str, Any] = {
    "hidden_size": D,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attention_dropout": 0.0,
}


class Attend(nn.Module):
    """A pre-norm block from scratch."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 48), nn.GELU(), nn.Linear(48, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.after(x))


class Scratch(nn.Module):
    """A ViT whose table is part of a module of its own, has no batch axis, and leaves the class token out."""

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cut = nn.Conv2d(3, D, 8, 8)
            self.where = nn.Parameter(torch.zeros(16, D))
            self.token = nn.Parameter(torch.zeros(1, 1, D))

        def placed(self, patches: Tensor) -> Tensor:
            return torch.cat([patches[:, :4] + self.where[:4], patches[:, 4:] + self.where[4:]], dim=1)

        def forward(self, images: Tensor) -> Tensor:
            return torch.cat(
                [self.token.expand(len(images), -1, -1), self.placed(self.cut(images).flatten(2).mT)], dim=1
            )

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.side = D, (4, 4)
        self.stem, self.depths = Scratch.Stem(), nn.Sequential(Attend(), Attend(), Attend())

    def forward(self, images: Tensor) -> Tensor:
        return self.depths(self.stem(images))


class Reader(nn.Module):
    """A text encoder with an nn.Embedding of up to 12 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.dim = D
        self.words, self.places = nn.Embedding(50, D), nn.Embedding(12, D)
        self.depths = nn.ModuleList(Attend() for _ in range(3))

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        for block in self.depths:
            x = block(x)
        return x


class OlderOpenClipBlock(nn.Module):
    """What open_clip's block is called with, and the names of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.MultiheadAttention(D, 2)
        self.mlp = nn.Sequential(nn.Linear(D, 48), nn.GELU(), nn.Linear(48, D))

    def forward(self, q_x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        told = self.ln_1(q_x)
        x = q_x + self.attn(told, told, told, need_weights=False, attn_mask=attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class OlderOpenClipVision(nn.Module):
    """The interface of VisionTransformer in older versions of open_clip: no method that embeds, tokens (N, B, D)."""

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = D
            self.resblocks = nn.ModuleList(OlderOpenClipBlock() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1).contiguous()
            for block in self.resblocks:
                x = block(x, attn_mask=None)
            return x.transpose(0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.image_size, self.patch_size, self.grid_size = (32, 32), (8, 8), (4, 4)
        self.conv1 = nn.Conv2d(3, D, 8, 8, bias=False)
        self.class_embedding, self.positional_embedding = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(17, D))
        self.patch_dropout, self.ln_pre, self.ln_post = nn.Identity(), nn.LayerNorm(D), nn.LayerNorm(D)
        self.transformer = OlderOpenClipVision.Transformer()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).mT
        x = torch.cat([self.class_embedding.view(1, 1, -1).expand(len(x), -1, -1), x], dim=1)
        x = self.ln_pre(self.patch_dropout(x + self.positional_embedding.to(x.dtype)))
        return self.ln_post(self.transformer(x))


OLDER_OPEN_CLIP = replace(
    next(row for row in open_clip.ROWS if row.add_table == "forward"),
    name="older open_clip",
    model=lape.hosts.class_name(OlderOpenClipVision),
    block={lape.hosts.class_name(OlderOpenClipBlock): lape.Block("ln_1")},
)

SCRATCH = lape.Host(
    name="ViT from scratch",
    table="stem.where",
    add_table="placed",
    blocks="depths.*",
    block=lape.Block("before"),
    width="dim",
    grid="side",
    prefix=1,
    prefix_has_no_rows=True,
)
READER = lape.Host(
    name="reader",
    table="places.weight",
    blocks="depths.*",
    block=lape.Block("before"),
    width="dim",
    grid=None,
    sequence=True,
    resize=cut,
)


def _sequences(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(D, 2, 48, 0.0, "gelu", norm_first=True, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 3, nn.LayerNorm(D), enable_nested_tensor=False)


def _rotary(mixed: bool, **options: Any) -> Eva:
    name = f"vit_small_patch16_rope{'_mixed' if mixed else ''}_ape_224"
    return timm.create_model(name, img_size=64, embed_dim=D, depth=3, num_heads=2, num_classes=0, **options)


def _naflex(**options: Any) -> nn.Module:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    shape = {"patch_size": 8, "embed_dim": D, "depth": 3, "num_heads": 2, "class_token": True, "reg_tokens": 1}
    return NaFlexVit(
        NaFlexVitCfg(**shape | {"pos_embed_grid_size": (4, 4), "global_pool": "", **options}), num_classes=0
    )


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32)


@dataclass(frozen=True)
class Tiny:
    make: Callable[..., nn.Module]
    norms: str  # of a layer, before its attention
    table: str | None  # where the untouched model keeps its own
    inputs: Callable[[int], Tensor] = _images
    tokens_at: int = 1  # the axis of tokens
    tokens_argument: int = 0  # of a block
    options: dict[str, Any] = field(default_factory=dict)  # of lape.apply
    prefix_without_rows: int = 0
    unused: int = 0  # rows at the beginning of the table that no token has
    registers: int = 0  # tokens behind the first, which has a row, that have none
    resizes: dict[str, Any] | None = None  # what asks the untouched model to resize its table; None: it cannot


class Unshuffled(nn.Module):
    """ViT-MAE with all patches in their order."""

    def __init__(self, mae: nn.Module) -> None:
        super().__init__()
        self.mae = mae

    def forward(self, images: Tensor) -> Any:
        return self.mae(images, noise=torch.arange(16.0).expand(len(images), -1))


def of_transformers(name: str, family: str) -> Any:
    """Return a class of transformers, which does not hand out all of them at its top."""
    found = getattr(transformers, name, None)
    return found or getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


def _transformers(
    model: str,
    config: str,
    norms: str,
    table: str,
    family: str = "",
    inputs: Callable[[int], Tensor] = _images,
    resizes: dict[str, Any] | None = None,
    unused: int = 0,
    registers: int = 0,
    wrap: Callable[[nn.Module], nn.Module] = lambda made: made,
    **options: Any,
) -> Tiny:
    def make(**more: Any) -> nn.Module:
        return wrap(of_transformers(model, family)(getattr(transformers, config)(**{**SMALL, **options, **more})))

    return Tiny(make, norms, table, inputs, resizes=resizes, unused=unused, registers=registers)


def _timms(
    module: str, model: str, norms: str = "blocks.{}.norm1", table: str | None = "pos_embed", **options: Any
) -> Tiny:
    shape: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": 3, "num_heads": 2}
    shape |= {"num_classes": 0, "global_pool": ""}
    of_tiny = {name: options.pop(name) for name in ("tokens_argument", "prefix_without_rows") if name in options}
    of_tiny["options"] = {} if table else {"pe": "learnable"}

    def make(**more: Any) -> nn.Module:
        kind = getattr(importlib.import_module(f"timm.models.{module}"), model)
        given = {**shape, **options, **more}
        return kind(**{name: value for name, value in given.items() if value is not ...})

    return Tiny(make, norms, table, **of_tiny)


_V5 = int(transformers.__version__.partition(".")[0]) >= 5
_LAYERS, _TOWER = ("layers", "") if _V5 else ("encoder.layer", "vision_model.")
_PARAMETER, _EMBEDDING = "embeddings.position_embeddings", f"{_TOWER}embeddings.position_embedding.weight"
_NORM, _OF_CLIP = f"{_LAYERS}.{{}}.layernorm_before", f"{_TOWER}encoder.layers.{{}}.layer_norm1"
_ASKED = {"interpolate_pos_encoding": True}
_BEITS = {"use_absolute_position_embeddings": True, "drop_path_rate": 0.0}


def _words(count: int) -> Tensor:
    return torch.randint(3, 50, (count, 12))


_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_TEXT: dict[str, Any] = {"inputs": _words, "vocab_size": 50, "max_position_embeddings": 12}
FOREIGN: dict[str, Tiny] = {
    "torchvision": Tiny(
        lambda **more: VisionTransformer(32, 8, 3, 2, D, 48, num_classes=5, **more),
        "encoder.layers.encoder_layer_{}.ln_1",
        "encoder.pos_embedding",
    ),
    "vit": _transformers("ViTModel", "ViTConfig", _NORM, _PARAMETER, resizes=_ASKED),
    "deit": _transformers("DeiTModel", "DeiTConfig", _NORM, _PARAMETER, resizes=_ASKED),
    "dinov2": _transformers("Dinov2Model", "Dinov2Config", "encoder.layer.{}.norm1", _PARAMETER, resizes={}),
    "clip": _transformers("CLIPVisionModel", "CLIPVisionConfig", _OF_CLIP, _EMBEDDING, resizes=_ASKED),
    "siglip": _transformers("SiglipVisionModel", "SiglipVisionConfig", _OF_CLIP, _EMBEDDING, resizes=_ASKED),
    "beit": _transformers(
        "BeitModel",
        "BeitConfig",
        _NORM,
        _PARAMETER,
        resizes={},
        drop_path_rate=0.0,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=True,
    ),
    "vit-msn": _transformers("ViTMSNModel", "ViTMSNConfig", _NORM, _PARAMETER, resizes=_ASKED),
    "vit-mae": _transformers(
        "ViTMAEModel", "ViTMAEConfig", f"mae.{_NORM}", f"mae.{_PARAMETER}", wrap=Unshuffled, mask_ratio=0.0
    ),
    "ijepa": _transformers("IJepaModel", "IJepaConfig", _NORM, _PARAMETER, resizes=_ASKED),
    "pixio": _transformers(
        "PixioModel", "PixioConfig", _NORM, _PARAMETER, resizes={}, n_cls_tokens=3, mlp_ratio=2, drop_path_rate=0.0
    ),
    "data2vec": _transformers(
        *("Data2VecVisionModel", "Data2VecVisionConfig", "encoder.layer.{}.layernorm_before", _PARAMETER),
        resizes={},
        use_relative_position_bias=True,
        **_BEITS,
    ),
    "internvl": _transformers(
        *("InternVLVisionModel", "InternVLVisionConfig", "encoder.layer.{}.layernorm_before", _PARAMETER),
        resizes={},
        **{**_BEITS, "image_size": (32, 32), "patch_size": (8, 8)},
    ),
    "dpt": _transformers(
        "DPTModel", "DPTConfig", "encoder.layer.{}.layernorm_before", _PARAMETER, resizes={}, is_hybrid=False
    ),
    **{
        name: _transformers(
            *(f"{kind}VisionModel", f"{kind}VisionConfig", f"{tower}encoder.layers.{{}}.layer_norm1"),
            f"{tower}embeddings.position_embedding{suffix}",
            family,
            resizes={} if name == "clipseg" else _ASKED,
        )
        for name, kind, family, tower, suffix in (
            ("altclip", "AltCLIP", "altclip", _TOWER, ".weight"),
            ("chinese-clip", "ChineseCLIP", "chinese_clip", _TOWER, ".weight"),
            ("clipseg", "CLIPSeg", "clipseg", _TOWER, ".weight"),
            ("metaclip-2", "MetaClip2", "metaclip_2", _TOWER, ".weight"),
            ("git", "Git", "git", "vision_model.", ".weight"),
            ("kosmos-2", "Kosmos2", "kosmos2", "model.", ".weight"),
            ("owlvit", "OwlViT", "owlvit", "vision_model.", ".weight"),
            ("owlv2", "Owlv2", "owlv2", "vision_model.", ".weight"),
            ("janus", "Janus", "janus", "", ".weight"),
            ("blip", "Blip", "blip", "", ""),
            ("blip-2", "Blip2", "blip_2", "", ""),
            ("instructblip", "InstructBlip", "instructblip", "", ""),
        )
    },
    **{
        name: _transformers(
            *(f"{kind}VisionTransformer", f"{kind}VisionConfig", "encoder.layers.{}.layer_norm1"),
            *("embeddings.position_embedding.weight", name),
        )
        for name, kind in (("idefics2", "Idefics2"), ("idefics3", "Idefics3"), ("smolvlm", "SmolVLM"))
    },
    "registers": _transformers(
        *("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", "encoder.layer.{}.norm1", _PARAMETER),
        resizes={},
        registers=3,
        num_register_tokens=3,
    ),
    **{
        name: _transformers(
            *(f"{kind}VisionEncoder", f"{kind}VisionConfig", "layers.{}.layer_norm1", "pos_embed", family),
            **{"window_size": 3, "global_attn_indexes": [1], "output_channels": 16, "mlp_dim": 48},
        )
        for name, kind, family in (
            ("sam-of-transformers", "Sam", "sam"),
            ("sam-hq", "SamHQ", "sam_hq"),
            ("got-ocr2", "GotOcr2", "got_ocr2"),
        )
    },
    "ast": _transformers(
        *("ASTModel", "ASTConfig", _NORM, _PARAMETER),
        inputs=lambda count: torch.randn(count, 24, 16),
        **{"num_mel_bins": 16, "max_length": 24, "frequency_stride": 4, "time_stride": 4},
    ),
    "vivit": _transformers(
        *("VivitModel", "VivitConfig", _NORM, _PARAMETER),
        inputs=lambda count: torch.randn(count, 4, 3, 32, 32),
        **{"num_frames": 4, "tubelet_size": (2, 8, 8)},
    ),
    **{
        f"{name}-text": _transformers(
            *(f"{kind}TextModel", f"{kind}TextConfig", f"{tower}encoder.layers.{{}}.layer_norm1"),
            *(f"{tower}embeddings.position_embedding.weight", family),
            **_TEXT,
        )
        for name, kind, family, tower in (
            ("clip", "CLIP", "clip", "" if _V5 else "text_model."),
            ("siglip", "Siglip", "siglip", "" if _V5 else "text_model."),
            ("siglip2", "Siglip2", "siglip2", "" if _V5 else "text_model."),
            ("clipseg", "CLIPSeg", "clipseg", "" if _V5 else "text_model."),
            ("x-clip", "XCLIP", "x_clip", "" if _V5 else "text_model."),
            ("metaclip-2", "MetaClip2", "metaclip_2", "" if _V5 else "text_model."),
            ("owlvit", "OwlViT", "owlvit", "text_model."),
            ("owlv2", "Owlv2", "owlv2", "text_model."),
        )
    },
    "gpt2": _transformers("GPT2Model", "GPT2Config", "h.{}.ln_1", "wpe.weight", n_inner=48, **_TEXT, **_NO_DROPOUT),
    "opt": _transformers(
        *("OPTModel", "OPTConfig", "decoder.layers.{}.self_attn_layer_norm", "decoder.embed_positions.weight"),
        unused=2,
        **{"ffn_dim": 48, "word_embed_proj_dim": D, "dropout": 0.0},
        **_TEXT,
    ),
    "whisper": _transformers(
        *("WhisperEncoder", "WhisperConfig", "layers.{}.self_attn_layer_norm", "embed_positions.weight", "whisper"),
        inputs=lambda count: torch.randn(count, 8, 24),
        **{"d_model": D, "encoder_layers": 3, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "dropout": 0.0},
        **{"vocab_size": 50, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 12},
        **{"pad_token_id": 0, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48},
    ),
    "sequences": Tiny(
        lambda: _sequences(True),
        "layers.{}.norm1",
        None,
        lambda count: torch.randn(count, 6, D),
        options={"pe": "learnable", "grid": (1, 6)},
    ),
    "sequences-first": Tiny(
        lambda: _sequences(False),
        "layers.{}.norm1",
        None,
        lambda count: torch.randn(6, count, D),
        tokens_at=0,
        options={"pe": "learnable", "grid": (1, 6)},
    ),
    "scratch": Tiny(Scratch, "depths.{}.before", "stem.where", options={"host": SCRATCH}, prefix_without_rows=1),
    "reader": Tiny(
        Reader,
        "depths.{}.before",
        "places.weight",
        lambda count: torch.randint(50, (count, 12)),
        options={"host": READER, "grid": (1, 12)},
    ),
    "rope": Tiny(
        lambda **more: _rotary(False, **more),
        "blocks.{}.norm1",
        "pos_embed",
        lambda count: torch.randn(count, 3, 64, 64),
        prefix_without_rows=1,
    ),
    "rope-mixed": Tiny(
        lambda **more: _rotary(True, **more),
        "blocks.{}.norm1",
        "pos_embed",
        lambda count: torch.randn(count, 3, 64, 64),
        prefix_without_rows=1,
    ),
}
FOREIGN |= {
    "timm-beit": _timms("beit", "Beit", use_rel_pos_bias=True, init_values=0.1),
    "timm-beit-without": _timms("beit", "Beit", table=None, use_abs_pos_emb=False, use_shared_rel_pos_bias=True),
    "cait": _timms("cait", "Cait"),
    "tnt": _timms(
        "tnt", "TNT", "blocks.{}.norm_out", "patch_pos", num_heads=..., num_heads_inner=2, num_heads_outer=2,
        inner_dim=8, first_stride=4, tokens_argument=1,
    ),
    "sam": _timms(
        "vision_transformer_sam", "VisionTransformerSAM", use_rel_pos=True, window_size=3, global_attn_indexes=(1,),
        neck_chans=16,
    ),
    "volo": _timms(
        "volo", "VOLO", "network.2.{}.norm1", layers=[1, 3], embed_dims=[16, D], num_heads=[2, 2], depth=...,
        embed_dim=...,
        mlp_ratio=2.0, stem_hidden_dim=8, patch_size=4, downsamples=(True, False), outlook_attention=(True, False),
        use_aux_head=False,
    ),
    "relpos": _timms(
        "vision_transformer_relpos", "VisionTransformerRelPos", table=None, rel_pos_type="bias", class_token=True,
        prefix_without_rows=1,
    ),
    "open_clip": Tiny(
        lambda: OpenClipVision(32, 8, D, 3, 2, 2.0, pool_type="none"), "transformer.resblocks.{}.ln_1",
        "positional_embedding",
    ),
    "open_clip-text": Tiny(
        lambda: OpenClipText(12, 50, D, 2, 3, 2.0, output_dim=None, pool_type="none"),
        "transformer.resblocks.{}.ln_1", "positional_embedding", _words,
    ),
    "open_clip-older": Tiny(
        OlderOpenClipVision, "transformer.resblocks.{}.ln_1", "positional_embedding", tokens_at=0,
        options={"host": OLDER_OPEN_CLIP},
    ),
    "naflex": Tiny(
        lambda **more: _naflex(**more), "blocks.{}.norm1", "embeds.pos_embed", prefix_without_rows=2,
    ),
}  # fmt: skip
# Of all tokens, or not in the row.
WITHOUT_FINAL_NORM = {"clip", "beit", "blip", "sam-of-transformers", "clip-text", "gpt2", "opt", "whisper", "sequences"}
WITHOUT_FINAL_NORM |= {"sequences-first", "scratch", "reader", "timm-beit", "timm-beit-without", "cait", "tnt", "sam"}
WITHOUT_FINAL_NORM |= {
    "volo",
    "relpos",
    "open_clip",
    "open_clip-text",
    "open_clip-older",
    "naflex",
}  # of all tokens, or not in the row
EVERY_FOREIGN = pytest.mark.parametrize("name", FOREIGN)
# Classes whose row is that of another, by name: the laws of hosts hold for each, those of what uses hosts for one.
KIN = {"ijepa", "vit-msn", "clipseg", "altclip", "chinese-clip", "metaclip-2", "git", "kosmos-2", "owlvit", "owlv2"}
KIN |= {
    "open_clip-text",
    "janus",
    "blip-2",
    "instructblip",
    "idefics2",
    "smolvlm",
    "sam-hq",
    "got-ocr2",
    "data2vec",
    "internvl",
}
KIN |= {f"{kind}-text" for kind in ("siglip", "siglip2", "clipseg", "x-clip", "metaclip-2", "owlvit", "owlv2")}
KIN |= {"open_clip-text"}
KINDS = [name for name in FOREIGN if name not in KIN]
EVERY_KIND = pytest.mark.parametrize("name", KINDS)
SCHEMES: list[dict[str, str]] = [
    {"join": "default", "pe": "sinusoidal-1d"},
    {"join": "shared"},
    {"join": "unshared"},
    {"join": "lape-sharing", "pe": "sinusoidal-1d"},
    {"join": "lape"},
    {"join": "lape", "pe_norm": "scalar-norm"},
    {"join": "lape", "start": "preserve"},
]


def in_turn(names: str, choices: Sequence[tuple[Any, ...]], each: int = 3) -> pytest.MarkDecorator:
    """Give every host some of the choices in turn, and its kin one, so that each choice meets many hosts."""
    pairs, following = [], 0
    for name in FOREIGN:
        for _ in range(1 if name in KIN else each):
            choice = choices[following % len(choices)]
            told = [getattr(one, "__name__", one) for one in choice]
            words = [word for one in told for word in (one.values() if isinstance(one, dict) else [str(one)])]
            pairs.append(pytest.param(name, *choice, id="-".join([name, *words])))
            following += 1
    return pytest.mark.parametrize(f"name, {names}", pairs)


HOSTS_AND_SCHEMES = in_turn("names", [(names,) for names in SCHEMES])


def untouched(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = FOREIGN[name].make(**options)
    for parameter in model.parameters():  # nothing may hide behind a zero
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def applied(name: str, model: nn.Module | None = None, **names: str) -> nn.Module:
    return lape.apply(untouched(name) if model is None else model, **{**FOREIGN[name].options, **names})


def inputs(name: str, count: int = 2) -> Tensor:
    torch.manual_seed(1)
    return FOREIGN[name].inputs(count)


def tokens(model: nn.Module, x: Tensor) -> Tensor:
    """What a model says, as one tensor: transformers hand out records."""
    output = model(x)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def shaken(model: nn.Module) -> nn.Module:
    """Move every PE norm from where it starts."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "pe_norm" in name:
            nn.init.normal_(parameter)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

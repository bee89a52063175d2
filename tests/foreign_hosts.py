"""Small models of every library that keeps its own forward, what they are given, and where their parts are."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models.eva import Eva
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import lape
from lape.hosts import cut

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


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32)


@dataclass(frozen=True)
class Tiny:
    make: Callable[..., nn.Module]
    norms: str  # of a layer, before its attention
    table: str | None  # where the untouched model keeps its own
    inputs: Callable[[int], Tensor] = _images
    tokens_at: int = 1  # the axis of tokens
    options: dict[str, Any] = field(default_factory=dict)  # of lape.apply
    prefix_without_rows: int = 0


def _transformers(model: str, config: str, norms: str, table: str, **options: Any) -> Tiny:
    return Tiny(
        lambda **more: getattr(transformers, model)(getattr(transformers, config)(**{**SMALL, **options, **more})),
        norms,
        table,
    )


_V5 = int(transformers.__version__.partition(".")[0]) >= 5
_LAYERS, _TOWER = ("layers", "") if _V5 else ("encoder.layer", "vision_model.")
_PARAMETER, _EMBEDDING = "embeddings.position_embeddings", f"{_TOWER}embeddings.position_embedding.weight"
FOREIGN: dict[str, Tiny] = {
    "torchvision": Tiny(
        lambda **more: VisionTransformer(32, 8, 3, 2, D, 48, num_classes=5, **more),
        "encoder.layers.encoder_layer_{}.ln_1",
        "encoder.pos_embedding",
    ),
    "vit": _transformers("ViTModel", "ViTConfig", f"{_LAYERS}.{{}}.layernorm_before", _PARAMETER),
    "deit": _transformers("DeiTModel", "DeiTConfig", f"{_LAYERS}.{{}}.layernorm_before", _PARAMETER),
    "dinov2": _transformers("Dinov2Model", "Dinov2Config", "encoder.layer.{}.norm1", _PARAMETER),
    "clip": _transformers(
        "CLIPVisionModel", "CLIPVisionConfig", f"{_TOWER}encoder.layers.{{}}.layer_norm1", _EMBEDDING
    ),
    "siglip": _transformers(
        "SiglipVisionModel", "SiglipVisionConfig", f"{_TOWER}encoder.layers.{{}}.layer_norm1", _EMBEDDING
    ),
    "beit": _transformers(
        "BeitModel",
        "BeitConfig",
        f"{_LAYERS}.{{}}.layernorm_before",
        _PARAMETER,
        drop_path_rate=0.0,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=True,
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
WITHOUT_FINAL_NORM = ("clip", "beit", "sequences", "sequences-first", "scratch", "reader")  # of all tokens
EVERY_FOREIGN = pytest.mark.parametrize("name", FOREIGN)
SCHEMES: list[dict[str, str]] = [
    {"join": "default", "pe": "sinusoidal-1d"},
    {"join": "shared"},
    {"join": "unshared"},
    {"join": "lape-sharing", "pe": "sinusoidal-1d"},
    {"join": "lape"},
    {"join": "lape", "pe_norm": "scalar-norm"},
    {"join": "lape", "start": "preserve"},
]
EVERY_SCHEME = pytest.mark.parametrize("names", SCHEMES, ids=lambda names: "-".join(names.values()))


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

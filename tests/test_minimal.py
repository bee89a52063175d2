"""Law: the example that has LaPE written in computes what `lape.apply` makes of a ViT that has not."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lape

EXAMPLE = Path(__file__).parents[1] / "examples" / "minimal.py"
SIZES: dict[str, Any] = {"image": 32, "patch": 8, "dim": 24, "depth": 3, "heads": 2, "classes": 5}
# What timm calls the same parameters.
TIMM = {
    r"\.qkv\.": ".attn.qkv.",
    r"\.proj\.": ".attn.proj.",
    r"\.mlp\.0\.": ".mlp.fc1.",
    r"\.mlp\.2\.": ".mlp.fc2.",
    r"^patches\.": "patch_embed.proj.",
}


@pytest.fixture
def minimal(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "minimal", module)
    spec.loader.exec_module(module)
    return module


def shaken(model: nn.Module) -> nn.Module:
    """In float64, with no parameter where it starts, behind which something could hide."""
    torch.manual_seed(0)
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def without_lape(minimal: ModuleType) -> nn.Module:
    """The example's ViT as it would be without LaPE: the table joins the tokens, and no block has a PE norm."""

    class PlainBlock(minimal.Block):
        def __init__(self, dim: int, heads: int) -> None:
            super().__init__(dim, heads)
            del self.pe_norm

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class PlainViT(minimal.ViT):
        def forward(self, images: Tensor) -> Tensor:
            x = self.patches(images).flatten(2).mT
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
            x = x + self.pos_embed
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)[:, 0])

    model = PlainViT(**SIZES)
    model.blocks = nn.ModuleList(PlainBlock(SIZES["dim"], SIZES["heads"]) for _ in range(SIZES["depth"]))
    return model.double()


def outputs_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    images, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    model.zero_grad()
    logits = model(images)
    F.cross_entropy(logits, labels).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_lape_written_in_is_lape_applied(minimal: ModuleType) -> None:
    """Bit for bit, outputs and every gradient; and the weights of one are those of the other, under the same names."""
    written = shaken(minimal.ViT(**SIZES))
    row = lape.Host(
        name="minimal ViT", table="pos_embed", block=lape.Block("norm1"), width="head.in_features", prefix=1, grid=None
    )
    applied = lape.apply(without_lape(minimal), host=row, grid=(4, 4))
    applied.load_state_dict(written.state_dict())
    ours, of_ours = outputs_and_gradients(written)
    theirs, of_theirs = outputs_and_gradients(applied)
    assert torch.equal(ours, theirs)
    assert of_ours.keys() == of_theirs.keys() == dict(written.named_parameters()).keys()
    for name, gradient in of_ours.items():
        assert torch.equal(gradient, of_theirs[name]), name


def test_the_example_is_timms_vit_with_lape(minimal: ModuleType) -> None:
    """The ViT that LaPE is written into is a usual one: timm's, by other hands, with `lape.apply`."""
    written = shaken(minimal.ViT(**SIZES))
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=5
    )
    applied = lape.apply(vit).double()
    applied.load_state_dict({in_timm(name): value for name, value in written.state_dict().items()})
    ours, of_ours = outputs_and_gradients(written)
    theirs, of_theirs = outputs_and_gradients(applied)
    assert (ours - theirs).abs().max() < 1e-9
    assert len(of_ours) == len(of_theirs)
    for name, gradient in of_ours.items():
        assert (gradient - of_theirs[in_timm(name)]).abs().max() < 1e-9, name


def in_timm(name: str) -> str:
    for pattern, other in TIMM.items():
        name = re.sub(pattern, other, name)
    return name


def test_without_lape_it_computes_something_else(minimal: ModuleType) -> None:
    written, plain = shaken(minimal.ViT(**SIZES)), without_lape(minimal)
    plain.load_state_dict(written.state_dict(), strict=False)
    assert not torch.allclose(outputs_and_gradients(written)[0], outputs_and_gradients(plain)[0])


def test_the_example_fits_on_a_page() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 66

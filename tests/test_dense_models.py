"""Laws of the models for detection and segmentation: sizes, maps, windows, and what a join reaches in them."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers.norm import LayerNorm
from torch import Tensor, nn

import lape
from lape.errors import UsageError
from lape.models.deformable import DeformableAttention, sampled
from lape.models.segmenter import MaskTransformer, Segmenter, SegmenterViT
from lape.models.upernet import UperNet
from lape.models.vit_adapter import DETECTION, SEGMENTATION, VARIANTS, ViTAdapter

ROW_OF_THE_CLASS_TOKEN = {"tiny": 192, "small": 384}  # the original keeps it in its table and never reads it
SMALL: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 3,
    "deform_heads": 3,
    "prior_width": 6,
    "interactions": [(0, 0), (1, 1), (2, 2), (3, 3)],
}


def adapter(join: str = "lape", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = ViTAdapter(**SMALL | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return lape.apply(model, join).double().eval()


def image(height: int = 64, width: int = 96, count: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, height, width, dtype=torch.float64)


def counted(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("size", "backbone", "whole"), [("tiny", 7_966_640, 36_062_428), ("small", 27_503_888, 57_614_908)]
)
def test_parameters_are_as_many_as_the_originals(size: str, backbone: int, whole: int) -> None:
    row, norms = ROW_OF_THE_CLASS_TOKEN[size], 12 * 2 * ROW_OF_THE_CLASS_TOKEN[size]
    with torch.device("meta"):
        for form in (DETECTION, SEGMENTATION):
            assert counted(ViTAdapter(**VARIANTS[size], **form)) + row == backbone
        model = UperNet(lape.apply(ViTAdapter(**VARIANTS[size], **SEGMENTATION)), classes=150)
    assert counted(model) + row == whole + norms


@pytest.mark.parametrize(("dim", "heads", "parameters"), [(192, 3, 6_906_388), (384, 6, 26_418_964)])
def test_segmenters_parameters_are_as_many_as_the_originals(dim: int, heads: int, parameters: int) -> None:
    with torch.device("meta"):
        norm = partial(LayerNorm, eps=1e-5)
        encoder = SegmenterViT(img_size=512, embed_dim=dim, num_heads=heads, norm_layer=norm)
        plain = counted(Segmenter(encoder, MaskTransformer(150, dim, dim, 2, dim // 64)))
        lape.apply(encoder)
        joined = counted(Segmenter(encoder, MaskTransformer(150, dim, dim, 2, dim // 64)))
    assert (plain, joined) == (parameters, parameters + 12 * 2 * dim)


@pytest.mark.parametrize("options", [{}, {"token_map_of_group": True}, {"windows": [3, None, 2, None]}], ids=str)
@pytest.mark.parametrize("join", ["default", "shared", "unshared", "lape-sharing", "lape"])
def test_four_maps_come_out_and_every_parameter_learns(options: dict[str, Any], join: str) -> None:
    model = adapter(join, **options).train()
    maps = model(image(64, 96, count=2))
    assert [tuple(part.shape) for part in maps] == [(2, 24, 64 // s, 96 // s) for s in (4, 8, 16, 32)]
    torch.stack([part.square().sum() for part in maps]).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_checkpointing_changes_nothing() -> None:
    model = adapter().train()
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        torch.stack([part.square().sum() for part in model(image(count=2))]).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-9)


def test_folded_and_copied_it_gives_the_same_maps() -> None:
    model = adapter()
    x = image(64, 64)
    expected = model(x)
    for other in (copy.deepcopy(model), lape.fold(copy.deepcopy(model))):
        for one, same in zip(other(x), expected, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-11, atol=1e-11)


def test_windows_of_the_whole_grid_are_plain_attention() -> None:
    plain, windowed = adapter(), adapter(windows=[4, 4, 4, 4])
    windowed.load_state_dict(plain.state_dict())
    for one, same in zip(windowed(image(64, 64)), plain(image(64, 64)), strict=True):
        torch.testing.assert_close(one, same)
    assert not torch.allclose(windowed(image(64, 96))[2], plain(image(64, 96))[2])


def test_what_it_does_not_take_is_refused() -> None:
    with pytest.raises(UsageError, match=r"sides 32 must divide; 64x80 was received"):
        adapter()(image(64, 80))
    with pytest.raises(UsageError, match="2 groups were received"):
        adapter(interactions=[(0, 1), (2, 3)], token_map_of_group=True)


def test_a_bias_over_the_grid_is_refused_where_a_block_has_windows() -> None:
    torch.manual_seed(0)
    whole, windowed = ViTAdapter(**SMALL), ViTAdapter(**SMALL, windows=[2, None, None, None])
    assert len(lape.apply(whole, "default", "relative")(image().float())) == 4
    with pytest.raises(UsageError, match="windows of 2"):
        lape.apply(windowed, "default", "relative")(image().float())


def test_the_table_and_the_level_embedding_do_not_decay() -> None:
    assert {"pos_embed", "level_embed", "blocks.0.pe_norm.weight"} <= adapter().no_weight_decay()


def test_a_deits_table_loses_the_row_of_its_class_token() -> None:
    from lape.weights import convert

    table = torch.randn(1, 17, 24)
    assert torch.equal(convert({"pos_embed": table}, adapter())["pos_embed"], table[:, 1:])


# --- Deformable attention


def test_sampling_is_that_of_transformers() -> None:
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    torch.manual_seed(0)
    grids = [(5, 7), (3, 4)]
    values = torch.randn(2, 47, 3, 8, dtype=torch.float64)
    places = torch.rand(2, 11, 3, 2, 4, 2, dtype=torch.float64) * 1.4 - 0.2  # some lie outside
    weights = torch.rand(2, 11, 3, 2, 4, dtype=torch.float64)
    theirs = MultiScaleDeformableAttention()(values, torch.tensor(grids), grids, None, places, weights, 64)
    torch.testing.assert_close(sampled(values, grids, places, weights), theirs)


def test_a_query_that_looks_at_a_cells_centre_finds_its_value() -> None:
    grids = [(2, 3)]
    values = torch.arange(6, dtype=torch.float64).view(1, 6, 1, 1)
    centre = torch.tensor([2.5 / 3, 1.5 / 2], dtype=torch.float64).view(1, 1, 1, 1, 1, 2)  # (x, y) of row 1, column 2
    assert sampled(values, grids, centre, torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)).item() == 5


def test_deformable_attention_starts_on_rings_with_equal_weights() -> None:
    attention = DeformableAttention(24, heads=4, points=3, levels=2, ratio=0.5)
    offsets = attention.sampling_offsets.bias.view(4, 2, 3, 2)
    assert torch.allclose(offsets[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0]]))
    assert torch.allclose(offsets[:, 0], offsets[:, 1])
    assert attention.sampling_offsets.weight.count_nonzero() == attention.attention_weights.bias.count_nonzero() == 0
    assert attention.value_proj.out_features == 12


# --- Segmenter


def test_segmenter_takes_any_size_and_cuts_its_logits_to_it() -> None:
    encoder = lape.apply(SegmenterViT(img_size=64, embed_dim=24, depth=2, num_heads=3, dynamic_img_size=True))
    model = Segmenter(encoder, MaskTransformer(7, 24, 24, 2, 3)).eval()
    for size in ((64, 64), (50, 71), (16, 130)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 7, *size)


def test_a_join_reaches_the_encoder_alone() -> None:
    encoder = SegmenterViT(img_size=32, embed_dim=24, depth=2, num_heads=3)
    model = Segmenter(encoder, MaskTransformer(7, 24, 24, 2, 3))
    lape.apply(model)
    assert {name for name in model.state_dict() if "pe_norm" in name} == {
        f"encoder.blocks.{layer}.pe_norm.{part}" for layer in range(2) for part in ("weight", "bias")
    }

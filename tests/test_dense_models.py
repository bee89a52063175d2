"""Laws of the models for detection and segmentation: sizes, maps, windows, and what a join reaches in them."""

import copy
import sys
from typing import Any

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import lape
from lape.errors import RunError, UsageError
from lape.hosts import find
from lape.method import JOINS
from lape.models.counting import count
from lape.models.deformable import DeformableAttention, sampled
from lape.models.segmenter import MaskTransformer, Segmenter, SegmenterViT
from lape.models.vit_adapter import DETECTION, SEGMENTATION, VARIANTS, ViTAdapter

ROW_OF_THE_CLASS_TOKEN = {"tiny": 192, "small": 384}  # the original keeps it in its table and never reads it
RATES = {"tiny": 0.1, "small": 0.2}  # of dropped paths
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


@pytest.mark.parametrize(("size", "backbone"), [("tiny", 7_966_640), ("small", 27_503_888)])
def test_parameters_are_as_many_as_the_originals(size: str, backbone: int) -> None:
    with torch.device("meta"):
        for form in (DETECTION, SEGMENTATION):
            assert counted(ViTAdapter(**VARIANTS[size], **form)) + ROW_OF_THE_CLASS_TOKEN[size] == backbone


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
    with pytest.raises(UsageError, match="one 32x32 image has one"):
        adapter().train()(image(32, 32))
    assert len(adapter().train()(image(32, 32, count=2))) == 4
    with pytest.raises(UsageError, match="3 were received for 4 blocks"):
        adapter(windows=[2, None, 2])
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


# --- The whole models, by their names

NANO = ("upernet_vit_adapter_nano", "segmenter_nano_patch8")
EVERY_NANO = pytest.mark.parametrize("name", NANO)


def whole(name: str, join: str = "lape", **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, join=join, **{"img_size": 64, "drop_path_rate": 0.0, **options})


def logits(model: nn.Module, images: Tensor) -> list[Tensor]:
    answer = model(images)
    return list(answer) if isinstance(answer, tuple) else [answer]


@EVERY_NANO
@pytest.mark.parametrize("join", JOINS)
def test_under_every_join_every_parameter_of_a_whole_learns(name: str, join: str) -> None:
    if JOINS[join].final and name.startswith("upernet"):  # its maps are put out before a norm of all tokens
        with pytest.raises(UsageError, match="what the last norm puts out"):
            whole(name, join)
        return
    model = whole(name, join, num_classes=7).train()
    answers = logits(model, image(64, 96, count=2).float())
    assert answers[0].shape == (2, 7, 64, 96)
    torch.stack([answer.square().mean() for answer in answers]).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@EVERY_NANO
def test_a_whole_checkpoints_the_blocks_inside(name: str) -> None:
    model = whole(name)
    model.set_grad_checkpointing(True)
    assert find(model)[0].grad_checkpointing is True
    model.set_grad_checkpointing(False)
    assert find(model)[0].grad_checkpointing is False


@EVERY_NANO
def test_folded_and_copied_a_whole_gives_the_same_logits(name: str) -> None:
    model = whole(name).double().eval()
    nn.init.normal_(find(model)[0].pos_embed)
    x = image(64, 64)
    with torch.no_grad():
        expected = logits(model, x)
        for other in (copy.deepcopy(model), lape.fold(copy.deepcopy(model)), model.train().eval()):
            for one, same in zip(logits(other, x), expected, strict=True):
                torch.testing.assert_close(one, same, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("upernet_vit_adapter_nano", {"backbone.pos_embed", "backbone.level_embed"}),
        ("segmenter_nano_patch8", {"encoder.pos_embed", "encoder.cls_token", "decoder.cls_emb"}),
    ],
)
def test_tables_and_tokens_of_a_whole_do_not_decay(name: str, tables: set[str]) -> None:
    model = whole(name)
    exempt = model.no_weight_decay()
    own = {parameter_name for parameter_name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert exempt & own == tables


@pytest.mark.parametrize("join", ["default", "lape", "unshared"])
def test_the_levels_of_layer_wise_decay_are_the_originals(join: str) -> None:
    """Level 0 embeds patches and positions, level i + 1 is block i with its position's part, level 13 is the rest."""
    with torch.device("meta"):
        model = timm.create_model("upernet_vit_adapter_tiny", join=join)
    given = {}
    for group in param_groups_layer_decay(model, layer_decay=0.95):
        given |= {id(parameter): group["lr_scale"] for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        level = 13
        if name == "backbone.pos_embed" or name.startswith("backbone.patch_embed."):
            level = 0
        elif name.startswith("backbone.blocks."):
            level = 1 + int(name.split(".")[2])
        assert given[id(parameter)] == pytest.approx(0.95 ** (13 - level)), name
    assert len(set(given.values())) == 14


def test_drop_path_reaches_blocks_and_extractors_and_the_encoder_alone() -> None:
    upernet, segmenter = whole("upernet_vit_adapter_nano", drop_path_rate=0.3), whole(NANO[1], drop_path_rate=0.3)
    assert find(upernet)[0].blocks[3].drop_path1.drop_prob == pytest.approx(0.3)
    assert upernet.backbone.interactions[0].extractor.drop_path.drop_prob == pytest.approx(0.3)
    assert segmenter.encoder.blocks[3].drop_path1.drop_prob == pytest.approx(0.3)
    assert isinstance(segmenter.decoder.blocks[1].drop_path1, nn.Identity)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        *[(f"{head}_vit_adapter_{size}", rate) for head in ("mask_rcnn", "upernet") for size, rate in RATES.items()],
        ("segmenter_tiny_patch16", 0.1),
        ("segmenter_small_patch16", 0.1),
    ],
)
def test_models_of_the_paper_drop_paths_as_the_originals(name: str, rate: float) -> None:
    with torch.device("meta"):
        vit: Any = find(timm.create_model(name))[0]
    assert vit.blocks[11].drop_path1.drop_prob == pytest.approx(rate)


def test_segmenters_have_the_originals_epsilon_heads_and_dropout() -> None:
    with torch.device("meta"):
        model: Any = timm.create_model("segmenter_small_patch16")
    assert {part.eps for part in model.modules() if isinstance(part, nn.LayerNorm)} == {1e-5}
    assert [block.attn.num_heads for block in model.decoder.blocks] == [6, 6]
    assert {part.p for part in model.decoder.modules() if isinstance(part, nn.Dropout)} == {0.1}
    assert {part.p for part in model.encoder.modules() if isinstance(part, nn.Dropout)} == {0.0}
    assert model.encoder.pos_embed.shape == (1, 1025, 384)


def test_windows_are_those_of_detection_alone() -> None:
    with torch.device("meta"):
        detector, upernet = (timm.create_model(f"{head}_vit_adapter_tiny") for head in ("mask_rcnn", "upernet"))
    assert [block.window for block in find(detector)[0].blocks] == [14, 14, None] * 4
    assert {block.window for block in find(upernet)[0].blocks} == {None}


@EVERY_NANO
def test_a_whole_says_of_what_the_sides_of_images_are_multiples(name: str) -> None:
    model, images = whole(name).eval(), image(96, 160).float()
    step = model.multiple
    assert logits(model, images[..., : 2 * step, : 3 * step])[0].shape[2:] == (2 * step, 3 * step)
    if step > 1:
        with pytest.raises(UsageError, match=f"sides {step} must divide"):
            model(images[..., : 2 * step, : 3 * step + step // 2])


@pytest.mark.parametrize("name", ["segmenter_nano_patch8", "upernet_vit_adapter_nano", "mask_rcnn_vit_adapter_nano"])
@pytest.mark.parametrize("names", [{}, {"join": "lape"}], ids=str)
def test_a_whole_is_no_backbone(name: str, names: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"{name} is a whole model with its heads. Leave it out"):
        timm.create_model(name, features_only=True, **names)


def test_channels_and_the_tables_size_are_ones_own() -> None:
    for name in NANO:
        model = whole(name, in_chans=1, img_size=(32, 64))
        assert find(model)[0].patch_embed.grid_size == (4, 8)
        assert logits(model.eval(), image(32, 64)[:, :1].float())[0].shape == (1, 6, 32, 64)


def test_without_transformers_a_upernet_is_refused_and_still_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RunError, match=r"pip install 'lape\[dense\]'"):
        lape.create_model("upernet_vit_adapter_nano")
    (entry,) = count(["upernet_vit_adapter_nano"])
    assert (entry.parameters, entry.flops, entry.size, entry.joins) == (None, None, (128, 128), ())


def test_dense_models_are_listed_with_what_can_be_counted() -> None:
    detector, upernet, segmenter = count(["mask_rcnn_vit_adapter_nano", *NANO])
    assert (detector.flops, detector.size) == (None, (128, 128))
    assert upernet.flops
    assert segmenter.flops
    assert segmenter.joins == tuple(JOINS)
    assert {entry.joins for entry in (detector, upernet)} == {tuple(name for name in JOINS if name != "mpvg")}

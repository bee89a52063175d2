"""Laws of Mask R-CNN: what its losses are, where its regions lie, what it learns from nothing, and what a join does."""

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

import lape
from lape.errors import UsageError
from lape.method import JOINS
from lape.models.mask_rcnn import Anchors, BoxPredictor, MaskPredictor, RegionAlign, _masks

SMALL: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 24,
    "num_heads": 3,
    "deform_heads": 3,
    "prior_width": 6,
    "min_size": 64,
    "max_size": 96,
    "channels": 16,
    "box_width": 24,
    "candidates": 50,
    "candidates_in_evaluation": 50,
    "proposals": 20,
    "region_samples": 16,
}
LOSSES = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}


def detector(join: str | None = "lape", **options: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("mask_rcnn_vit_adapter_nano", join=join, num_classes=2, **SMALL | options)


def picture(height: int = 64, width: int = 96) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(3, height, width)


def target(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (64, 96)) -> dict[str, Tensor]:
    """Objects that fill their boxes, of the classes 1, 2, 1 ..."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    labels = torch.arange(len(boxes)) % 2 + 1
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4), "labels": labels, "masks": masks}


OBJECTS = target((8, 8, 40, 40), (50, 20, 90, 60))
NOTHING = target()


def loss(model: nn.Module, targets: list[dict[str, Tensor]]) -> Tensor:
    torch.manual_seed(2)
    return torch.stack(list(model([picture() for _ in targets], targets).values())).sum()


# --- Training


@pytest.mark.parametrize("join", JOINS)
def test_under_every_join_every_parameter_learns(join: str) -> None:
    if JOINS[join].final:  # its maps are put out without a norm of all tokens
        with pytest.raises(UsageError, match="what the last norm puts out"):
            detector(join)
        return
    model = detector(join).train()
    losses = model([picture(), picture(64, 64)], [OBJECTS, target((4, 4, 30, 30), size=(64, 64))])
    assert losses.keys() == LOSSES
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("targets", [[NOTHING], [NOTHING, OBJECTS]], ids=["no object", "one without"])
def test_from_images_without_objects_every_parameter_gets_a_finite_gradient(targets: list[Any]) -> None:
    """Processes that train together wait for the gradients of all."""
    model = detector().train()
    whole = loss(model, targets)
    assert whole.isfinite()
    whole.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.rpn.head.cls_logits.weight.grad.count_nonzero()
    assert (model.roi_heads.mask_head[0][0].weight.grad.count_nonzero() > 0) == (len(targets) > 1)


def test_a_step_makes_the_loss_smaller() -> None:
    model = detector(drop_path_rate=0.0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = loss(model, [OBJECTS])
    before.backward()
    optimizer.step()
    assert loss(model, [OBJECTS]) < before


def test_in_bfloat16_losses_are_finite_and_anchors_keep_their_places() -> None:
    model = detector().train()
    with torch.autocast("cpu", torch.bfloat16):
        whole = loss(model, [OBJECTS, NOTHING])
    whole.backward()
    assert whole.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    generator = Anchors(((9,),), ((1.0,),))
    for kind, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        generator.set_cell_anchors(kind, torch.device("cpu"))
        assert generator.cell_anchors[0].dtype == expected


def test_checkpointing_changes_nothing() -> None:
    model = detector().train()
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        assert model.backbone.body.grad_checkpointing is enabled
        model.zero_grad()
        loss(model, [OBJECTS]).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, same in zip(*gradients, strict=True):
        torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-5)


# --- Losses


def test_proposals_learn_by_the_distance_itself_over_all_samples() -> None:
    """Three positives of four, wrong by 2 in each of four numbers; and the cross-entropy of even odds."""
    proposer = detector().rpn
    labels = torch.tensor([1.0, 1.0, 1.0, 0.0, -1.0])
    corrections = torch.zeros(5, 4)
    corrections[3:] = torch.inf  # of what is no object nothing is learnt
    classes, boxes = proposer.compute_loss(torch.zeros(5, 1), torch.full((5, 4), 2.0), [labels], [corrections])
    assert boxes.item() == pytest.approx(3 * 4 * 2 / 4)
    assert classes.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())


class Given(nn.Module):
    """A part of the heads that answers what it was given, whatever it is asked."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *asked: Any) -> Any:
        return self.answer


def test_regions_learn_by_the_distance_itself_and_by_their_own_class_alone() -> None:
    """Two proposals of the background, then the two objects themselves; numbers of other classes are wild."""
    heads = detector().train().roi_heads
    background = torch.tensor([[45.0, 0, 49, 6], [0, 50, 6, 60]])
    corrections, masks = torch.full((4, 3, 4), 1e6), torch.full((2, 3, 28, 28), 1e6)
    own_masks = torch.randn(2, 28, 28)
    for row, own in enumerate(OBJECTS["labels"]):
        corrections[2 + row, own] = 0.5
        masks[row, own] = own_masks[row]
    heads.box_roi_pool, heads.box_head = Given(None), nn.Identity()
    heads.box_predictor = Given((torch.zeros(4, 3), corrections.flatten(1)))
    heads.mask_roi_pool, heads.mask_head, heads.mask_predictor = Given(None), nn.Identity(), Given(masks)
    _, losses = heads({}, [background], [(64, 96)], [OBJECTS])
    assert losses["loss_box_reg"].item() == pytest.approx(2 * 4 * 0.5 / 4)
    assert losses["loss_classifier"].item() == pytest.approx(torch.log(torch.tensor(3.0)).item())
    expected = F.binary_cross_entropy_with_logits(own_masks, torch.ones_like(own_masks))
    torch.testing.assert_close(losses["loss_mask"], expected)


def test_the_background_has_no_box_and_no_mask() -> None:
    scores, corrections = BoxPredictor(8, 3)(torch.randn(5, 8))
    masks = MaskPredictor(8, 8, 3)(torch.randn(5, 8, 14, 14))
    assert (scores.shape, corrections.shape, masks.shape) == ((5, 4), (5, 16), (5, 4, 28, 28))
    for part in (corrections[:, :4], masks[:, 0]):
        assert part.count_nonzero() == 0
    assert corrections[:, 4:].count_nonzero() == corrections[:, 4:].numel()


def test_heads_start_as_mmdetections() -> None:
    box = detector(box_width=512).roi_heads
    assert box.box_predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert box.box_predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert box.box_head.fc6.weight.std().item() == pytest.approx((2 / (16 * 49 + 512)) ** 0.5, rel=0.1)


# --- Regions


def test_a_region_has_the_values_of_its_place() -> None:
    """Each map holds the x of its cells' centres in pixels: a region holds the x of its own cells' centres."""
    widths = {str(level): 512 // stride for level, stride in enumerate((4, 8, 16, 32))}
    pyramid = {
        level: ((torch.arange(width) + 0.5) * 512 / width).expand(1, 1, width, width) for level, width in widths.items()
    }
    boxes = torch.tensor([[100.0, 64, 170, 134], [80, 64, 360, 400]])
    regions = RegionAlign(7)(pyramid, [boxes], [(512, 512)])
    for region, (left, _, right, _) in zip(regions, boxes, strict=True):
        centres = left + (torch.arange(7) + 0.5) * (right - left) / 7
        torch.testing.assert_close(region[0], centres.expand(7, 7), rtol=1e-5, atol=1e-3)


def test_a_region_comes_from_the_image_and_the_map_of_its_own() -> None:
    """A square of 224 pixels is cut out of the map of stride 16; half as large, one finer (eq. 1 of the FPN paper)."""
    pyramid = {
        str(level): torch.full((2, 1, 512 // stride, 512 // stride), 10.0 * level)
        for level, stride in enumerate((4, 8, 16, 32))
    }
    for maps in pyramid.values():
        maps[1] += 1
    sides = [torch.tensor([56.0, 112, 223, 224, 448]), torch.tensor([224.0, 20])]
    boxes = [torch.stack([0 * side, 0 * side, side, side], dim=1) for side in sides]
    regions = RegionAlign(7)(pyramid, boxes, [(512, 512)] * 2)
    assert regions.mean((1, 2, 3)).tolist() == pytest.approx([0, 10, 10, 20, 30, 21, 1])


def test_what_is_learnt_of_a_mask_is_what_lies_in_the_box() -> None:
    learnt = _masks(OBJECTS, torch.tensor([1, 1]), torch.tensor([[50.0, 20, 90, 60], [30, 20, 70, 60]]), 28)
    assert learnt.dtype == torch.bool
    assert learnt[0].all()
    assert torch.equal(learnt[1], (torch.arange(28) >= 14).expand(28, 28))


# --- Evaluation


@torch.no_grad()
def test_what_it_finds_is_of_the_images_own_size() -> None:
    model = detector().eval()
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    sizes = [(64, 96), (120, 50)]
    for found, size in zip(model([picture(*size) for size in sizes]), sizes, strict=True):
        count = len(found["boxes"])
        assert 0 < count <= 100
        assert found["masks"].shape == (count, 1, *size)
        assert found["masks"].min() >= 0
        assert found["masks"].max() <= 1
        assert found["boxes"].min() >= 0
        assert (found["boxes"][:, 2:] <= torch.tensor(size[::-1])).all()
        assert set(found["labels"].tolist()) <= {1, 2}
        assert (found["scores"] > 0.05).all()
        for label in (1, 2):
            own = found["labels"] == label
            assert len(nms(found["boxes"][own], found["scores"][own], 0.5)) == own.sum()


def test_it_resizes_in_evaluation_and_not_in_training() -> None:
    seen = []
    model = detector()
    model.backbone.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0].shape[2:]))
    model.train()([picture(40, 70)], [target((4, 4, 30, 30), size=(40, 70))])
    with torch.no_grad():
        model.eval()([picture(40, 70)])
        model.eval()([picture(30, 80)])
    assert seen == [(64, 96), (64, 96), (64, 96)]
    assert model.transform(  # the longer side is at most 96, the shorter 64 where that allows it
        [picture(40, 70), picture(30, 80)]
    )[0].image_sizes == [(54, 96), (36, 96)]
    assert model.train().transform([picture(40, 70)])[0].image_sizes == [(40, 70)]


def test_images_are_normalised_inside() -> None:
    image = torch.tensor([0.485, 0.456, 0.406])[:, None, None].expand(3, 64, 96)
    images, _ = detector().train().transform([image + torch.tensor([0.229, 0.224, 0.225])[:, None, None]])
    torch.testing.assert_close(images.tensors, torch.ones(1, 3, 64, 96))


def test_other_channels_need_their_own_means() -> None:
    with pytest.raises(UsageError, match="1 channels, 3 means and 3 deviations"):
        detector(in_chans=1)
    losses = detector(in_chans=1, mean=(0.5,), std=(0.5,)).train()([picture()[:1]], [OBJECTS])
    assert all(loss.isfinite() for loss in losses.values())


@torch.no_grad()
def test_folded_copied_and_loaded_it_finds_the_same() -> None:
    model = detector().double().eval()
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=1.0)
    nn.init.normal_(model.backbone.body.pos_embed)
    image = picture(64, 64).double()
    (expected,) = model([image])
    loaded = detector().double().eval()
    loaded.load_state_dict(model.state_dict())
    folded = lape.fold(copy.deepcopy(model))
    assert not any("pe_norm" in name for name in folded.state_dict())
    for other in (copy.deepcopy(model), loaded, folded, model.train().eval()):
        (found,) = other([image])
        for part, value in expected.items():
            torch.testing.assert_close(found[part], value, rtol=1e-9, atol=1e-9)


def test_tables_of_the_backbone_do_not_decay() -> None:
    model = detector()
    exempt = model.no_weight_decay()
    names = {name for name, _ in model.named_parameters()}
    assert exempt & names == {
        "backbone.body.pos_embed",
        "backbone.body.level_embed",
        *(f"backbone.body.blocks.{layer}.pe_norm.{part}" for layer in range(4) for part in ("weight", "bias")),
    }

"""Detection and segmentation as tasks: losses and metrics by hand, windows against brute force, processes alike."""

import json
import multiprocessing
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn

from lape.errors import RunError, UsageError
from lape.tasks.classification import Classification
from lape.tasks.detection import Detection
from lape.tasks.segmentation import Inference, Segmentation
from lape.training.evaluation import evaluate

CLASSES = 4


def whole(images):
    return images.float()


class ByColour(nn.Module):
    """Names a pixel's class by its red alone, 10 for class 1, 20 for class 2: what is around it changes nothing."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.colours = nn.Parameter(10 * torch.arange(classes).float()[:, None, None])
        self.seen = []

    def forward(self, images):
        assert images.dtype == self.colours.dtype
        assert not torch.is_grad_enabled()
        self.seen.append(tuple(images.shape))
        return -((images[:, :1] - self.colours).abs())


class BySurroundings(nn.Module):
    """Depends on neighbours, on the place in the window and on the whole window; has an output that trains beside."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, CLASSES, 3, padding=1, dtype=torch.float64)
        self.largest = 0

    def forward(self, images):
        self.largest = max(self.largest, len(images))
        x = images / 64
        down = torch.linspace(0, 1, x.shape[2], dtype=x.dtype)[:, None] * torch.arange(CLASSES)[:, None, None]
        across = torch.linspace(0, 1, x.shape[3], dtype=x.dtype) ** 2 * torch.arange(CLASSES).flip(0)[:, None, None]
        logits = self.conv(x) + down + across + x.mean((2, 3))[:, :1, None, None]
        return logits, logits[:, :, ::4, ::4]


def picture(height, width, seed=0):
    return torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed)).byte()


# Windows


def resized(x, size):
    """Bilinear, pixel centres aligned, in numpy: x (C, H, W)."""
    for axis, length in zip((1, 2), size, strict=True):
        old = x.shape[axis]
        at = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        high, share = np.minimum(low + 1, old - 1), at - low
        share = share.reshape([-1, 1] if axis == 1 else [1, -1])
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    return x


def by_force(inference, model, image):
    """The rules of both systems, one window and one pixel at a time."""
    _, height, width = image.shape
    answers = []
    for scale, mirrored in product(inference.scales, (False, True)[: 1 + inference.flip]):
        x = image.double().numpy()
        factor = min(
            int(inference.long_side * scale) / max(height, width),
            int(inference.short_side * scale) / min(height, width),
        )
        h, w = int(height * factor + 0.5), int(width * factor + 0.5)
        x = resized(x, (h, w))
        h, w = -(-h // inference.multiple) * inference.multiple, -(-w // inference.multiple) * inference.multiple
        x = resized(x, (h, w))
        if inference.grow and min(h, w) < inference.window:
            h, w = (int(side / min(h, w) * inference.window) for side in (h, w))
            x = resized(x, (h, w))
        if mirrored:
            x = x[:, :, ::-1].copy()
        tall, wide = min(inference.window, h), min(inference.window, w)
        downs = max(h - tall + inference.stride - 1, 0) // inference.stride + 1
        acrosses = max(w - wide + inference.stride - 1, 0) // inference.stride + 1
        parts = {}
        for down, across in product(range(downs), range(acrosses)):
            top, left = min(down * inference.stride, h - tall), min(across * inference.stride, w - wide)
            crop = torch.from_numpy(x[:, top : top + tall, left : left + wide].copy())
            parts[top, left] = model(crop[None])[0][0].detach().numpy()
        logits = np.zeros((CLASSES, h, w))
        for row, column in product(range(h), range(w)):
            over = [
                part[:, row - top, column - left]
                for (top, left), part in parts.items()
                if top <= row < top + tall and left <= column < left + wide
            ]
            logits[:, row, column] = np.mean(over, axis=0)
        logits = resized(logits, (height, width))
        if mirrored:
            logits = logits[:, :, ::-1]
        exponents = np.exp(logits - logits.max(0))
        answers.append(exponents / exponents.sum(0))
    return np.mean(answers, axis=0)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((20, 29), {}),
        ((20, 29), {"stride": 16}),
        ((29, 20), {"stride": 5, "flip": True}),
        ((31, 17), {"scales": (0.5, 1.0, 1.75), "flip": True, "multiple": 8}),
        ((17, 31), {"scales": (0.5, 1.25), "flip": True, "grow": True}),
        ((9, 40), {"long_side": 30, "grow": True, "stride": 16}),
        ((9, 40), {"long_side": 30, "multiple": 4}),
    ],
)
def test_windows_are_joined_as_by_force(size, options):
    torch.manual_seed(0)
    model = BySurroundings()
    inference = Inference(
        **{"normalise": torch.Tensor.double, "window": 16, "stride": 11, "short_side": 24, "long_side": 96} | options
    )
    image = picture(*size)
    with torch.no_grad():
        found = inference(model, image, CLASSES)
        expected = by_force(inference, model, image)
    assert found.shape == (CLASSES, *size)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)  # logits are added up in float32
    np.testing.assert_allclose(found.sum(0).numpy(), 1, atol=1e-6)


def test_windows_go_through_the_model_a_few_at_a_time():
    model = BySurroundings()
    with torch.no_grad():
        Inference(torch.Tensor.double, 8, 4, 32, 32, flip=True)(model, picture(32, 32), CLASSES)
    assert 1 < model.largest <= 8


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("window", "stride"), [(64, 64), (16, 16), (16, 5), (9, 2), (7, 1)])
def test_what_depends_on_a_pixel_alone_does_not_depend_on_windows(window, stride, flip):
    image = (10 * torch.randint(0, CLASSES, (3, 20, 27), generator=torch.Generator().manual_seed(1))).byte()
    task = Segmentation(CLASSES, Inference(whole, window, stride, 20, 100, flip=flip))
    assert torch.equal(task.predict(ByColour(), image), image[0].long() // 10)


@pytest.mark.parametrize(
    ("options", "windows"),
    [
        # UperNet: 480 x 640 becomes 512 x 683, then 512 x 704; at half of that 256 x 341, then 256 x 352.
        ({"stride": 341, "multiple": 32}, [(2, 3, 512, 512)]),
        ({"stride": 341, "multiple": 32, "scales": (0.5,)}, [(1, 3, 256, 352)]),
        # The longer side has its limit at that scale too: 512 of 1024 leave 384 x 512 of 480 x 640.
        ({"stride": 341, "long_side": 1024, "short_side": 1024, "scales": (0.5,)}, [(1, 3, 384, 512)]),
        # Segmenter: 512 x 683; at half 256 x 341, which grows to 512 x 682; at 1.75 896 x 1195 with its mirror image.
        ({"stride": 480, "grow": True}, [(2, 3, 512, 512)]),
        ({"stride": 480, "grow": True, "scales": (0.5,)}, [(2, 3, 512, 512)]),
        ({"stride": 480, "grow": True, "scales": (1.75,), "flip": True}, [(8, 3, 512, 512), (4, 3, 512, 512)]),
    ],
)
def test_a_photograph_is_cut_as_the_two_systems_cut_it(options, windows):
    model = ByColour(2)
    with torch.no_grad():
        Inference(**{"normalise": whole, "window": 512, "short_side": 512, "long_side": 2048} | options)(
            model, picture(480, 640), 2
        )
    assert model.seen == windows


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
def test_a_picture_may_have_any_sides(size):
    task = Segmentation(CLASSES, Inference(whole, 16, 11, 24, 96, multiple=4))
    assert task.predict(ByColour(), picture(*size)).shape == size


@pytest.mark.parametrize("options", [{"stride": 17}, {"stride": 0}, {"scales": ()}, {"scales": (1.0, 0.0)}])
def test_windows_that_leave_something_out_are_refused(options):
    with pytest.raises(UsageError, match=r"stride|test_scales"):
        Inference(**{"normalise": whole, "window": 16, "stride": 11, "short_side": 24, "long_side": 96} | options)


# Segmentation

INFERENCE = Inference(whole, 16, 11, 20, 100)


class Fixed(nn.Module):
    """Answers with its own logits, whatever it is shown."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = nn.ParameterList(outputs)

    def forward(self, images):
        return tuple(self.outputs) if len(self.outputs) > 1 else self.outputs[0]


def test_a_loss_is_the_mean_over_labelled_pixels_or_over_all():
    logits = torch.zeros(1, 2, 2, 2)
    logits[:, 1, 0] = torch.tensor(3.0).log()  # in the first row class 1 has 3/4
    maps = torch.tensor([[[1, 255], [0, 255]]])
    model, images = Fixed(logits), torch.zeros(1, 3, 2, 2)
    sum_ = -np.log(3 / 4) - np.log(1 / 2)
    assert Segmentation(2, INFERENCE).loss(model, images, maps).item() == pytest.approx(sum_ / 2)
    over_all = Segmentation(2, INFERENCE, unlabelled_count=True)
    assert over_all.loss(model, images, maps).item() == pytest.approx(sum_ / 4)


def test_what_trains_beside_is_enlarged_and_weighed():
    torch.manual_seed(0)
    logits, beside, maps = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 2, 2), torch.randint(0, 3, (2, 8, 8))
    enlarged = F.interpolate(beside, (8, 8), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(logits, maps) + 0.4 * F.cross_entropy(enlarged, maps)
    task = Segmentation(3, INFERENCE, weights=(1.0, 0.4))
    torch.testing.assert_close(task.loss(Fixed(logits, beside), torch.zeros(2, 3, 8, 8), maps), expected)


@pytest.mark.parametrize("unlabelled_count", [False, True])
def test_a_crop_without_a_label_teaches_nothing(unlabelled_count):
    model = Fixed(torch.randn(1, 3, 4, 4), torch.randn(1, 3, 2, 2))
    task = Segmentation(3, INFERENCE, (1.0, 0.4), unlabelled_count)
    loss = task.loss(model, torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert all(output.grad is not None and not output.grad.any() for output in model.outputs)


def judged(task, model, *batches):
    meter = task.meter()
    for batch in batches:
        meter.update(model, batch)
    return meter.compute()


def coloured(named):
    """An image (1, 3, H, W) for which `ByColour` names these classes."""
    return (10 * torch.tensor(named)).byte().expand(1, 3, -1, -1)


def test_miou_by_hand():
    """Class 3 is neither in the maps nor named and does not count; class 2 is named only, and counts as 0."""
    task = Segmentation(CLASSES, Inference(whole, 4, 4, 2, 4))
    first = coloured([[0, 0, 1, 2], [0, 1, 1, 2]]), torch.tensor([[[0, 0, 1, 255], [0, 0, 1, 255]]])
    second = coloured([[0, 0, 0, 0], [2, 1, 1, 1]]), torch.tensor([[[0, 0, 0, 0], [1, 1, 1, 255]]])
    result = judged(task, ByColour(), first, second)
    # class 0: 7 right, 1 left out; class 1: 4 right, 1 too many, 1 left out
    assert result == pytest.approx({"val_miou": 100 * (7 / 8 + 4 / 6 + 0) / 3, "val_pixel_accuracy": 100 * 11 / 13})
    assert all(type(value) is float for value in result.values())


def test_a_class_that_is_nowhere_does_not_count():
    task = Segmentation(CLASSES, Inference(whole, 4, 4, 2, 4))
    batch = coloured([[0, 0, 1, 1]] * 2), torch.tensor([[[0, 0, 1, 0]] * 2])
    assert judged(task, ByColour(), batch)["val_miou"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)


def test_maps_without_a_label_are_refused():
    with pytest.raises(RunError, match="labelled"):
        judged(Segmentation(CLASSES, INFERENCE), ByColour(), (coloured([[0, 0]] * 2), torch.full((1, 2, 2), 255)))


# Detection

SIDE = 40


class Canned(nn.Module):
    """A detector that has an answer ready for every image, which is painted with its number."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = answers
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        assert all(image.dtype == self.weight.dtype and image.max() <= 1 for image in images)
        answers = [self.answers[round(float(image[0, 0, 0]) * 255)] for image in images]
        return [one | {"boxes": one["boxes"] + self.weight} for one in answers]


def painted(number):
    return torch.full((3, SIDE, SIDE), number, dtype=torch.uint8)


def masks_of(boxes):
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    return masks


def objects(*boxes, labels=None, crowd=None, area=None, masks=None):
    size = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [1] * len(boxes), dtype=torch.int64),
        "masks": masks_of(boxes) if masks is None else masks,
        "iscrowd": torch.tensor(crowd or [0] * len(boxes), dtype=torch.int64),
        "area": torch.tensor(area or size, dtype=torch.float32),
    }


def answer(*boxes, scores, labels=None, masks=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [1] * len(boxes), dtype=torch.int64),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "masks": (masks_of(boxes) if masks is None else masks)[:, None] * 0.9,
    }


def found(*pairs):
    """The metrics of pairs of what is there and what is found."""
    model = Canned(*(answered for _, answered in pairs))
    return judged(Detection(), model, *(([painted(i)], [there]) for i, (there, _) in enumerate(pairs)))


A, B, C, D = (0, 0, 10, 10), (20, 20, 30, 30), (0, 20, 16, 30), (20, 0, 30, 10)


def both(value):
    return pytest.approx({"val_box_ap": value, "val_mask_ap": value})


def precision(*pairs):
    result = found(*pairs)
    return {name: result[name] for name in Detection.reported}


def test_whoever_finds_all_has_100():
    there = objects(A, B, C, labels=[1, 2, 2])
    result = found((there, answer(C, A, B, scores=[0.9, 0.8, 0.3], labels=[2, 1, 2])))
    assert result == pytest.approx(
        {f"val_{kind}_{name}": 100.0 for kind in ("box", "mask") for name in ("ap", "ap50", "ap75", "ap_small")}
    )
    assert all(type(value) is float for value in result.values())


def test_average_precision_by_hand():
    # One of two missed: precision 1 at the recalls 0, 0.01 ... 0.5 of 101, then 0.
    assert precision((objects(A, B), answer(A, scores=[0.9]))) == both(100 * 51 / 101)
    # A wrong one that is surer: precision 1/2 at all recalls. One that is less sure: no difference.
    assert precision((objects(A), answer(B, A, scores=[0.9, 0.8]))) == both(50)
    assert precision((objects(A), answer(A, B, scores=[0.9, 0.8]))) == both(100)
    # The mean over classes, of which one is missed; one that is only named does not count.
    assert precision((objects(A, B, labels=[1, 2]), answer(A, D, scores=[0.9, 0.9], labels=[1, 3]))) == both(50)
    # A class mistaken.
    assert precision((objects(A), answer(A, scores=[0.9], labels=[2]))) == both(0)


def test_boxes_and_masks_are_judged_apart():
    """A mask of 5/8 of the object: right at IoU 0.5, 0.55 and 0.6 of ten."""
    wide = masks_of([(0, 20, 10, 30)])
    there, answered = objects(C), answer(C, scores=[0.9], masks=wide)
    assert precision((there, answered)) == pytest.approx({"val_box_ap": 100, "val_mask_ap": 30})
    result = found((there, answered))
    assert (result["val_mask_ap50"], result["val_mask_ap75"]) == (100, 0)
    assert precision((there, answer((0, 20, 10, 30), scores=[0.9], masks=masks_of([C])))) == pytest.approx(
        {"val_box_ap": 30, "val_mask_ap": 100}
    )


def test_a_pixel_is_in_a_mask_from_one_half_on():
    there, answered = objects(C), answer(C, scores=[0.9])
    answered["masks"] = masks_of([C])[:, None] * 0.4 + masks_of([(0, 20, 10, 30)])[:, None] * 0.1
    assert precision((there, answered)) == pytest.approx({"val_box_ap": 100, "val_mask_ap": 30})


def test_a_crowd_takes_in_what_is_found_in_it():
    """Both surer findings lie in the region: they are neither right nor wrong."""
    region = (18, 18, 40, 40)
    answered = answer(B, (31, 31, 39, 39), A, scores=[0.9, 0.9, 0.8])
    assert precision((objects(A, region, crowd=[0, 1]), answered)) == both(100)
    assert precision((objects(A), answered)) == both(100 / 3)


def test_sizes_are_of_the_areas_that_the_set_states():
    result = found((objects(A, B, area=[2000.0, 10000.0]), answer(A, scores=[0.9])))
    assert result["val_box_ap_medium"] == result["val_mask_ap_medium"] == 100
    assert result["val_box_ap_large"] == result["val_mask_ap_large"] == 0
    assert not any("small" in name for name in result)


def test_pictures_without_objects():
    nothing, quiet = objects(), answer(scores=[])
    found_all = objects(A), answer(A, scores=[0.5])
    assert precision(found_all, (nothing, quiet)) == both(100)
    assert precision((nothing, quiet), found_all) == both(100)
    assert precision(found_all, (nothing, answer(B, scores=[0.9]))) == both(50)
    assert precision((nothing, answer(B, scores=[0.9])), found_all) == both(50)
    assert precision((objects(A), quiet)) == both(0)
    assert precision((objects(A), quiet), (nothing, quiet)) == both(0)


def test_the_metrics_of_a_set_have_the_same_names_whatever_is_found():
    """The rows of a curve have the same columns."""
    there = objects(A, B, area=[100.0, 10000.0])
    names = [set(found((there, one))) for one in (answer(scores=[]), answer(A, B, D, scores=[0.9, 0.8, 0.7]))]
    assert names[0] == names[1]


@pytest.mark.parametrize("there", [objects(), objects(A, crowd=[1])])
def test_a_set_without_single_objects_is_refused(there):
    with pytest.raises(RunError, match="single objects"):
        found((there, answer(A, scores=[0.9])))


def test_masks_are_not_kept_as_pixels():
    meter = Detection().meter()
    meter.update(Canned(answer(*[A] * 20, scores=[0.9] * 20)), ([painted(0)], [objects(*[B] * 20)]))
    kept = [entry for entries in meter.precision.metric_state.values() for entry in entries]
    assert max(entry.numel() for entry in kept if isinstance(entry, torch.Tensor)) == 20 * 4
    runs = [run for entry in kept if isinstance(entry, tuple) for _, run in entry]
    assert len(runs) == 40
    assert max(len(run) for run in runs) < 100


def test_the_meter_says_nothing(recwarn, capfd):
    many = answer(*[A] * 150, scores=[0.9] * 150)
    found((objects(A), many))
    assert not [str(warning.message) for warning in recwarn]
    assert capfd.readouterr() == ("", "")


def test_the_loss_is_the_sum_of_the_models():
    class Losing(nn.Module):
        def forward(self, images, targets):
            return {"a": images[0].sum(), "b": targets[0]["boxes"].sum(), "c": torch.tensor(0.5)}

    loss = Detection().loss(Losing(), [torch.ones(3, 2, 2)], [objects(A)])
    assert loss.item() == 12 + 20 + 0.5


def test_predictions_of_one_picture():
    model = Canned(answer(A, B, C, scores=[0.9, 0.7, 0.2], labels=[3, 1, 2]))
    one = Detection().predict(model, painted(0), threshold=0.7)
    assert one.boxes.tolist() == [list(A), list(B)]
    assert one.labels.tolist() == [2, 0]
    assert one.scores.tolist() == pytest.approx([0.9, 0.7])
    assert one.masks.dtype == torch.bool
    assert torch.equal(one.masks, masks_of([A, B]).bool())
    assert not any(value.requires_grad for value in (one.boxes, one.masks, one.scores))
    none = Detection().predict(model.double(), painted(0), threshold=0.95)
    assert none.boxes.shape == (0, 4)
    assert none.masks.shape == (0, SIDE, SIDE)


# Under Fabric


@pytest.mark.parametrize("precision_name", ["32-true", "64-true", "bf16-mixed"])
def test_both_are_judged_in_every_number_format(precision_name):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision_name)

    def run(task, model, batch):
        model = fabric.strategy.precision.convert_module(model).train()
        result = evaluate(fabric, task, model, (one for one in [batch]))
        assert model.training
        return result[task.score]

    segmentation = Segmentation(CLASSES, INFERENCE)
    batch = coloured([[0, 1, 1, 1]] * 2), torch.tensor([[[0, 0, 1, 1]] * 2])
    assert run(segmentation, ByColour(), batch) == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)
    assert run(Detection(), Canned(answer(A, scores=[0.9])), ([painted(0)], [objects(A, B)])) == pytest.approx(
        100 * 51 / 101
    )


@pytest.mark.parametrize("task", [Classification(3), Segmentation(3, INFERENCE), Detection()])
def test_what_is_reported_begins_with_the_score(task):
    assert task.reported[0] == task.score


# Two processes


def judge_shares(rank, processes):
    """Both tasks on five images, of which every second one is this process's: one has more than the other."""
    there = [objects(A, B), objects(C), objects(D, B, crowd=[0, 1])]
    # All are equally sure, so that the order of the images decides.
    answers = [answer(A, D, scores=[0.5, 0.5]), answer(C, scores=[0.5]), answer(A, D, scores=[0.5, 0.5])]
    detection = [([painted(i % 3)], [there[i % 3]]) for i in range(5)]
    images = torch.randint(0, 4, (5, 6, 6), generator=torch.Generator().manual_seed(0))
    maps = torch.randint(0, 3, (5, 1, 6, 6), generator=torch.Generator().manual_seed(1))
    segmentation = [(coloured(images[i].tolist()), maps[i]) for i in range(5)]
    results = []
    for task, model, batches in (
        (Detection(), Canned(*answers), detection),
        (Segmentation(CLASSES, Inference(whole, 4, 3, 6, 6)), ByColour(), segmentation),
    ):
        meter = task.meter()
        first, *rest = batches[rank::processes]
        meter.update(model, first)
        meter.compute()  # to look in between changes nothing
        for batch in rest:
            meter.update(model, batch)
        results.append(meter.compute())
    return results


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(judge_shares(rank, 2)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_know_what_one_knows(tmp_path):
    alone = judge_shares(0, 1)
    fork = multiprocessing.get_context("fork")  # torchmetrics takes seconds to import
    processes = [fork.Process(target=one_of_two, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    # gloo may abort when its processes leave, after all is written: what counts is the file.
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [alone, alone]

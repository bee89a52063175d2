"""Training pictures for detection and segmentation: what holds for every sample, however it was augmented."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from lape.data import dense as steps
from lape.data.instances import Instances, InstanceSource
from lape.data.maps import IGNORED, MapSource
from lape.data.pipeline import InOrder, Normalise, Order, Shares, Unreadable, load
from lape.errors import RunError
from lape.experiment import Augmentation, Dense

DETECTION = Dense(short_side=(48, 64), long_side=90, zoom=(40, 60), zoom_crop=(15, 50), crop=45)
SEGMENTATION = Dense(short_side=(32,), long_side=128, scale_jitter=(0.5, 2), crop=32, class_cap=0.75, photometric=True)
FLIPPED = Augmentation(hflip=0.5)
SIZES = [(40, 60), (60, 40), (33, 47), (90, 30), (21, 20), (64, 64)]


@dataclass(frozen=True)
class Scenes:
    """Coloured rectangles on a dark gradient, opened as a source's split: each has its own colour, box, mask and label.

    No rectangle hides another. `empty` pictures have none.
    """

    sizes: list[tuple[int, int]]
    empty: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    name: str = "scenes"

    def __len__(self):
        return len(self.sizes)

    def title(self, index):
        return f"scene {index}"

    def rectangles(self, index):
        """Two rectangles that fill most of the left and the right half: (x0, y0, x1, y1)."""
        height, width = self.sizes[index]
        if index in self.empty:
            return []
        half = width // 2
        return [(0, height // 8, half, height - height // 4), (half, 0, width, height // 2)]

    def picture(self, index):
        if index in self.missing:
            raise RunError(f"scene {index} cannot be read. Replace it.")
        height, width = self.sizes[index]
        colours = np.zeros((height, width, 3), np.uint8)
        colours[..., 2] = np.arange(width)[None] % 50
        for number, (x0, y0, x1, y1) in enumerate(self.rectangles(index)):
            colours[y0:y1, x0:x1, number] = 240
        return Image.fromarray(colours)

    def instances(self, index):
        height, width = self.sizes[index]
        boxes = torch.tensor(self.rectangles(index), dtype=torch.float32).view(-1, 4)
        masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
        for mask, (x0, y0, x1, y1) in zip(masks, self.rectangles(index), strict=True):
            mask[y0:y1, x0:x1] = 1
        crowd = torch.arange(len(boxes)) == 1
        return Instances(boxes, torch.arange(len(boxes)), masks, masks.sum((1, 2)).float(), crowd)

    def map(self, index):
        found = self.instances(index)
        labels = torch.zeros(self.sizes[index], dtype=torch.int64)
        for number, mask in enumerate(found.masks, 1):
            labels[mask.bool()] = number
        return labels

    def check(self, index):
        self.picture(index)


@dataclass(frozen=True)
class Painted:
    """One picture all of one colour with a map of its own."""

    labels: torch.Tensor
    colour: tuple[int, int, int] = (200, 100, 50)
    name: str = "painted"

    def __len__(self):
        return 1

    def title(self, index):
        return "painting"

    def picture(self, index):
        return Image.new("RGB", self.labels.shape[::-1], self.colour)

    def map(self, index):
        return self.labels

    def check(self, index):
        pass


def objects_of(split, dense=DETECTION) -> InstanceSource:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    settings: dict[str, Any] = {"channels": 3, "size": None, "mean": mean, "std": std}
    return InstanceSource(
        "scenes", ("left", "right"), train=split, validation=split, augmentation=FLIPPED, dense=dense, **settings
    )


def maps_of(split, dense=SEGMENTATION) -> MapSource:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    settings: dict[str, Any] = {"channels": 3, "size": None, "mean": mean, "std": std}
    return MapSource(
        "scenes",
        ("ground", "left", "right"),
        train=split,
        validation=split,
        augmentation=FLIPPED,
        dense=dense,
        **settings,
    )


def detecting(split, dense=DETECTION, augmentation=FLIPPED, seed=0):
    return steps.detection_training(objects_of(split), augmentation, dense, seed)


def segmenting(split, dense=SEGMENTATION, augmentation=FLIPPED, seed=0):
    return steps.segmentation_training(maps_of(split), augmentation, dense, seed)


def drawn(samples, epochs=12, batch=3):
    """Every sample of some epochs, one by one: (image, target)."""
    for epoch in range(epochs):
        for numbers in torch.arange(len(samples.split)).split(batch):
            yield from zip(*samples[epoch, numbers], strict=True)


def same(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())


def tightest(masks):
    """The boxes (n, 4) around masks (n, H, W)."""
    boxes = []
    for mask in masks:
        rows, columns = mask.nonzero().unbind(1)
        boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return torch.tensor(boxes, dtype=torch.float32).view(-1, 4)


# A sample depends on seed, epoch and number alone.


@pytest.mark.parametrize("training", [detecting, segmenting])
def test_a_sample_depends_on_seed_epoch_and_number_alone(training):
    samples, again = training(Scenes(SIZES)), training(Scenes(SIZES))
    images, targets = samples[3, torch.tensor([0, 1, 2, 3])]
    torch.rand(7)
    again[5, torch.tensor([4])]
    others, marked = again[3, torch.tensor([5, 3, 1])]
    assert same(images[3], others[1])
    assert same(targets[3], marked[1])
    assert same(images[1], others[2])
    assert same(targets[1], marked[2])


@pytest.mark.parametrize("training", [detecting, segmenting])
def test_another_epoch_number_or_seed_augments_anew(training):
    picture = [(60, 60)] * 4
    drawings = [
        training(Scenes(picture), seed=seed)[epoch, torch.tensor([number])][0][0]
        for seed, epoch, number in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0))
    ]
    assert not any(same(drawings[0], other) for other in drawings[1:])


@pytest.mark.parametrize("training", [detecting, segmenting])
def test_two_workers_give_what_none_does(training):
    samples = training(Scenes(SIZES, empty=(2,)))
    order = Order(seed=1, images=len(SIZES), batch=2)
    batches = [list(load(samples, Shares(order, 0, 0, 6), workers, pin=False)) for workers in (0, 2)]
    assert len(batches[0]) == 6
    for (images, targets), (others, marked) in zip(*batches, strict=True):
        assert all(same(*pair) for pair in zip(images, others, strict=True))
        assert all(same(*pair) for pair in zip(targets, marked, strict=True))


@pytest.mark.parametrize("training", [detecting, segmenting])
def test_a_picture_that_cannot_be_read_is_named(training):
    samples = training(Scenes(SIZES, missing=(4,)))
    assert isinstance(samples[0, torch.tensor([0, 4])], Unreadable)
    with pytest.raises(RunError, match="scene 4"):
        list(load(samples, InOrder(len(SIZES), 2), 0, pin=False))


# Detection


def test_detection_gives_what_the_detector_takes():
    images, targets = detecting(Scenes(SIZES))[0, torch.arange(6)]
    assert isinstance(images, list)
    assert isinstance(targets, list)
    for image, target in zip(images, targets, strict=True):
        assert type(image) is torch.Tensor
        assert (image.dtype, image.shape[0]) == (torch.uint8, 3)
        assert target.keys() == {"boxes", "labels", "masks"}
        assert all(type(values) is torch.Tensor for values in target.values())
        dtypes = [target[name].dtype for name in ("boxes", "labels", "masks")]
        assert dtypes == [torch.float32, torch.int64, torch.uint8]
        count = len(target["labels"])
        assert target["boxes"].shape == (count, 4)
        assert target["masks"].shape == (count, *image.shape[1:])
        assert set(target["masks"].unique().tolist()) <= {0, 1}


@pytest.mark.parametrize("zoom", [(), (40, 60)])
def test_boxes_masks_labels_and_colours_stay_together(zoom):
    lost = 0
    for image, target in drawn(detecting(Scenes(SIZES), replace(DETECTION, zoom=zoom))):
        lost += 2 - len(target["labels"])
        # The edge of a mask is within a pixel of its box's; resized again, that pixel grows 64 / 15 times at most.
        away = 1 + 64 / 15 if zoom else 1
        torch.testing.assert_close(target["boxes"], tightest(target["masks"]), atol=away, rtol=0)
        for label, mask in zip(target["labels"], target["masks"], strict=True):
            inside = image[:, mask.bool()].float().mean(1)
            assert inside.argmax() == label - 1
        extent = torch.tensor([image.shape[2], image.shape[1]] * 2)
        assert (target["boxes"] >= 0).all()
        assert (target["boxes"] <= extent).all()
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        assert target["masks"].flatten(1).any(1).all()
    assert lost or not zoom


def test_flips_and_windows_move_boxes_and_masks_exactly():
    """Without a change of size the box around a mask is the box."""
    dense = Dense(short_side=(60,), long_side=60, zoom=(60,), zoom_crop=(20, 50), crop=30)
    flip, window = v2.RandomHorizontalFlip(0.5), steps.Window(20, 50)
    shapes = set()
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = window(*flip(*steps.objects(Scenes([(60, 60)]), 0)))
        _, target = steps.visible(image, target)
        assert torch.equal(target["boxes"], tightest(target["masks"]))
        shapes.add(tuple(image.shape[1:]))
    assert all(20 <= side <= 50 for shape in shapes for side in shape)
    assert len(shapes) > 20
    for image, _ in drawn(detecting(Scenes([(60, 60)]), dense)):
        assert max(image.shape) <= 30


def test_a_window_may_lie_at_every_place():
    torch.manual_seed(0)
    places = [steps.Window(3, 3).make_params([torch.zeros(3, 5, 6)]) for _ in range(200)]
    assert {(place["top"], place["left"]) for place in places} == {(top, left) for top in range(3) for left in range(4)}


def test_every_picture_is_flipped_or_none():
    for hflip in (0, 1):
        samples = detecting(Scenes([(48, 72)]), replace(DETECTION, zoom=(), crop=90), Augmentation(hflip=hflip))
        for _, target in drawn(samples):
            left, right = target["boxes"]
            assert (left[0] < right[0]) == (hflip == 0)
        for _, labels in drawn(segmenting(Scenes([(32, 32)]), Dense((32,), 32, crop=32), Augmentation(hflip=hflip))):
            assert bool(labels[8, 0] < labels[8, -1]) == (hflip == 0)


def test_both_shorter_sides_and_both_ways_are_taken_and_limits_kept():
    """Of two equally likely things one is not missing from 80 draws."""
    uncut, picture = replace(DETECTION, crop=90), Scenes([(60, 70)])
    shorter = [min(image.shape[1:]) for image, _ in drawn(detecting(picture, replace(uncut, zoom=())), 80)]
    assert set(shorter) == {48, 64}
    shapes = [image.shape[1:] for image, _ in drawn(detecting(picture, uncut), 80)]
    assert 25 < sum(shape in ((48, 56), (64, 75)) for shape in shapes) < 55
    assert all(min(shape) in (48, 64) or max(shape) == 90 for shape in shapes)
    for image, _ in drawn(detecting(Scenes([(30, 300)]), replace(DETECTION, zoom=(), crop=90)), 3):
        assert max(image.shape) == 90
    for image, _ in drawn(detecting(Scenes(SIZES)), 20):
        assert max(image.shape) <= 45


@pytest.mark.parametrize(
    ("size", "shorter", "longer", "expected"),
    [
        ((427, 640), 427, 1333, (427, 640)),
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((100, 1000), 800, 1333, (133, 1333)),
        ((3000, 1), 800, 1333, (1333, 1)),
        ((1, 1), 800, 1333, (800, 800)),
    ],
)
def test_a_size_keeps_its_ratio_within_the_limits(size, shorter, longer, expected):
    assert steps.within(size, shorter, longer) == expected


def test_a_window_without_objects_is_a_sample():
    for image, target in drawn(detecting(Scenes([(60, 60), (40, 90)], empty=(0, 1)))):
        assert target["boxes"].shape == (0, 4)
        assert target["labels"].shape == (0,)
        assert target["masks"].shape == (0, *image.shape[1:])


def test_an_object_is_dropped_with_its_box_or_its_mask():
    image = tv_tensors.Image(torch.zeros(3, 4, 4, dtype=torch.uint8))
    masks = torch.zeros(4, 4, 4, dtype=torch.uint8)
    masks[[0, 1, 3], 0, 0] = 1
    boxes = torch.tensor([[0.0, 0, 0.5, 1], [0, 0, 0, 4], [0, 0, 1, 1], [0, 2, 1, 2]])
    _, target = steps.visible(image, {"boxes": boxes, "labels": torch.arange(1, 5), "masks": masks})
    assert target["labels"].tolist() == [1]
    assert len(target["boxes"]) == len(target["masks"]) == 1


def test_bilinear_is_not_antialiased():
    """Of four columns that become one, the middle two count and no other."""
    columns = torch.tensor([0, 100, 200, 255, 0, 20, 40, 255], dtype=torch.uint8).repeat(3, 4, 1)
    image = steps.Resized((1,), 2)(tv_tensors.Image(columns))
    assert image.tolist() == [[[150, 30]]] * 3


def test_validation_is_everything_as_it_is():
    split = Scenes(SIZES, empty=(2,))
    samples = steps.detection_validation(replace(objects_of(Scenes([])), validation=split))
    for index, ([image], [target]) in enumerate(load(samples, InOrder(len(split), 1), 0, pin=False)):
        assert torch.equal(image, torch.from_numpy(np.array(split.picture(index))).permute(2, 0, 1))
        found = split.instances(index)
        assert torch.equal(target["boxes"], found.boxes)
        assert torch.equal(target["labels"], found.labels + 1)
        assert torch.equal(target["masks"], found.masks)
        assert torch.equal(target["area"], found.areas)
        assert torch.equal(target["iscrowd"], found.crowd.long())
        assert target["iscrowd"].dtype == torch.int64
    samples = steps.segmentation_validation(replace(maps_of(Scenes([])), validation=split))
    for index, (images, maps) in enumerate(load(samples, InOrder(len(split), 1), 0, pin=False)):
        assert torch.equal(images[0], torch.from_numpy(np.array(split.picture(index))).permute(2, 0, 1))
        assert (maps.dtype, maps.shape[0]) == (torch.int64, 1)
        assert torch.equal(maps[0], split.map(index))


# Segmentation


def test_segmentation_gives_what_the_model_takes():
    images, maps = segmenting(Scenes(SIZES))[0, torch.arange(6)]
    assert (type(images), images.dtype, images.shape) == (torch.Tensor, torch.uint8, (6, 3, 32, 32))
    assert (type(maps), maps.dtype, maps.shape) == (torch.Tensor, torch.int64, (6, 32, 32))


def test_maps_stay_with_their_pictures():
    plain = replace(SEGMENTATION, photometric=False)
    for image, labels in drawn(segmenting(Scenes([(40, 60), (60, 40), (33, 47), (90, 30)]), plain)):
        for label in (1, 2):
            inside = image[:, labels == label].float().mean(1)
            assert label not in labels or inside.argmax() == label - 1


def test_what_is_filled_up_has_the_mean_colour_and_no_label():
    split, plain = Painted(torch.ones(20, 30, dtype=torch.int64)), Dense(short_side=(20,), long_side=30, crop=40)
    image, labels = next(drawn(segmenting(split, plain, Augmentation(hflip=1)), 1))
    assert (labels[:20, :30] == 1).all()
    assert (labels == IGNORED).sum() == 40 * 40 - 20 * 30
    assert (image[:, :20, :30].flatten(1) == torch.tensor([[200], [100], [50]])).all()
    outside = image[:, labels == IGNORED]
    assert (outside == torch.tensor([[124], [116], [104]])).all()
    normalised = Normalise(maps_of(split))(image[None])[0, :, labels == IGNORED]
    assert normalised.abs().max() < 0.5 / 255 / 0.22


def test_nothing_that_is_labelled_is_ignored():
    larger = [(40, 60), (64, 64), (50, 33)]
    for image, labels in drawn(segmenting(Scenes(larger), replace(SEGMENTATION, scale_jitter=(1, 2)))):
        assert (labels != IGNORED).all()
        assert image.shape == (3, 32, 32)


def test_a_scale_goes_from_its_smallest_to_its_largest():
    """Of a white picture on no ground, the filled up part tells the side: 32 times the factor."""
    split = Painted(torch.zeros(64, 64, dtype=torch.int64))
    dense = replace(SEGMENTATION, crop=64, photometric=False)
    sides = [int((labels != IGNORED).sum()) ** 0.5 for _, labels in drawn(segmenting(split, dense), 200)]
    assert 16 <= min(sides) < 18
    assert 61 < max(sides) <= 64
    assert 38 < np.mean(sides) < 42


def striped(width: int) -> torch.Tensor:
    """Class 1, but for a column of class 2 between columns without a label at the right: 40 × 80."""
    labels = torch.ones(40, 80, dtype=torch.int64)
    labels[:, 80 - width :] = 2
    return labels


def test_no_class_has_more_than_its_cap_where_that_can_be():
    """A window of 40 at a place of 41; 20 of the places keep the cap, and 1,000 windows miss them ten times over ~1."""
    settings = Dense(short_side=(40,), long_side=80, crop=40)
    share = []
    for cap in (0.75, None):
        samples = segmenting(Painted(striped(30)), replace(settings, class_cap=cap))
        share.append([float((labels == 1).float().mean()) for _, labels in drawn(samples, 200)])
    capped, free = (np.mean(np.array(part) >= 0.75) for part in share)
    assert capped < 0.01
    assert 0.3 < free < 0.7


def test_a_cap_counts_labelled_pixels_only():
    """Half of every window is without a label; of what has one, three quarters and more are of one class."""
    labels = torch.full((40, 40), IGNORED)
    labels[:20] = 1
    labels[:4] = 2
    step = steps.MixedWindow(40, 0.75)
    looked = []
    place = steps.Window.make_params
    try:
        steps.Window.make_params = lambda *given: looked.append(1) or place(*given)
        step(tv_tensors.Mask(labels.to(torch.uint8)))
        assert len(looked) == 11  # ten tries, and what is taken at last
        looked.clear()
        labels[:8] = 2
        step(tv_tensors.Mask(labels.to(torch.uint8)))
        assert len(looked) == 1
        looked.clear()
        step(tv_tensors.Mask(torch.full((40, 40), IGNORED, dtype=torch.uint8)))
        assert len(looked) == 11
    finally:
        steps.Window.make_params = place


# Colours, against numpy


COLOURS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
COLOURS[0] = np.arange(32)[:, None] * 8  # greys
COLOURS[1, :8] = 0
COLOURS[2] = [255, 0, 0]


def changed(step, params):
    image = tv_tensors.Image(torch.from_numpy(COLOURS).permute(2, 0, 1))
    out = step.transform(image, params)
    assert isinstance(out, tv_tensors.Image)
    assert out.dtype == torch.uint8
    return out.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("added", [-32.0, -0.6, 0.0, 7.3, 32.0])
def test_brightness_adds(added):
    expected = np.clip(COLOURS.astype(np.float32) + added, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(changed(steps.Brightness(32), {"added": added}), expected)


def test_brightness_and_saturation_are_drawn_between_their_limits():
    torch.manual_seed(0)
    added = [steps.Brightness(32).make_params([])["added"] for _ in range(200)]
    assert -32 <= min(added) < -30 < 30 < max(added) <= 32
    factors = [steps.Saturation(0.5, 1.5).make_params([])["factor"] for _ in range(200)]
    assert 0.5 <= min(factors) < 0.53 < 1.47 < max(factors) <= 1.5


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0, 1.3, 1.5])
def test_saturation_is_that_of_hsv(factor):
    hsv = rgb_to_hsv(COLOURS / 255)
    hsv[..., 1] = np.clip(hsv[..., 1] * factor, 0, 1)
    expected = hsv_to_rgb(hsv) * 255
    assert np.abs(changed(steps.Saturation(0.5, 1.5), {"factor": factor}) - expected).max() <= 0.51


def parts_of(distortion):
    """The chances, ranges and orders that a distortion is made of."""
    brightness, orders = distortion.transforms
    first, last = (order.transforms for order in orders.transforms)
    return brightness, first, last


def test_contrast_multiplies_and_hue_turns():
    _, (contrast, _, hue), _ = parts_of(steps.distortion())
    image = tv_tensors.Image(torch.from_numpy(COLOURS).permute(2, 0, 1))
    turns = []
    for seed in range(20):
        torch.manual_seed(seed)
        out = contrast.transforms[0](image).permute(1, 2, 0).numpy().astype(np.float64)
        fair = (COLOURS > 40) & (out < 255)
        factors = out[fair] / COLOURS[fair]
        assert np.ptp(factors) < 1 / 40
        assert 0.45 < factors.min() <= factors.max() <= 1.5
        turned = rgb_to_hsv(hue.transforms[0](image).permute(1, 2, 0).numpy() / 255)
        hsv = rgb_to_hsv(COLOURS / 255)
        vivid = hsv[..., 1] * hsv[..., 2] > 0.3
        by = (turned[..., 0] - hsv[..., 0] + 0.5)[vivid] % 1 - 0.5
        assert np.ptp(by) < 0.02
        turns.append(np.median(by))
        assert np.abs(turned[..., 2] - hsv[..., 2]).max() <= 1.01 / 255
    assert -0.101 < min(turns) < -0.06 < 0.06 < max(turns) < 0.101


def test_a_distortion_has_the_originals_chances_and_orders():
    """Half of all pictures get each of the four changes; contrast comes second or last."""
    happened: list[str] = []

    class Noted(v2.Transform):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def transform(self, inpt, params):
            happened.append(self.name)
            return inpt

    distortion = steps.distortion()
    brightness, first, last = parts_of(distortion)
    assert first[0] is last[-1]
    for part, name in zip([brightness, *first], ["brightness", "contrast", "saturation", "hue"], strict=True):
        part.transforms[0] = Noted(name)
    image, orders, counts = tv_tensors.Image(torch.zeros(3, 1, 1, dtype=torch.uint8)), set(), dict.fromkeys(range(5), 0)
    names: dict[str, int] = {}
    torch.manual_seed(0)
    for _ in range(2000):
        happened.clear()
        distortion(image)
        counts[len(happened)] += 1
        orders.add(tuple(happened))
        for name in happened:
            names[name] = names.get(name, 0) + 1
    assert all(900 < count < 1100 for count in names.values())
    assert 80 < counts[0] < 170  # one in sixteen
    whole = {order for order in orders if len(order) == 4}
    assert whole == {("brightness", "contrast", "saturation", "hue"), ("brightness", "saturation", "hue", "contrast")}


def test_colours_change_if_asked_and_what_is_filled_up_does_not():
    split, dense = Painted(torch.zeros(20, 20, dtype=torch.int64)), Dense(short_side=(20,), long_side=20, crop=24)
    seen = {False: set(), True: set()}
    for photometric, colours in seen.items():
        for image, labels in drawn(segmenting(split, replace(dense, photometric=photometric)), 40):
            colours.add(tuple(image[:, 0, 0].tolist()))
            assert image[:, labels == IGNORED].unique(dim=1).flatten().tolist() == [124, 116, 104]
    assert seen[False] == {(200, 100, 50)}
    assert len(seen[True]) > 30


# Extremes


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (1, 3000), (3000, 2), (5, 7)])
def test_the_smallest_pictures_pass(size):
    for image, target in drawn(detecting(Scenes([size])), 8):
        assert 1 <= min(image.shape[1:]) <= max(image.shape[1:]) <= 45
        assert target["masks"].shape[1:] == image.shape[1:]
    for image, labels in drawn(segmenting(Scenes([size])), 8):
        assert image.shape[1:] == labels.shape == (32, 32)
        assert (labels != IGNORED).any()


def test_scaled_is_from_0_to_1():
    image = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    expected = torch.tensor([0, 0.2, 1]).view(3, 1, 1)
    [listed] = steps.Scaled()([image])
    torch.testing.assert_close(listed, expected)
    torch.testing.assert_close(steps.Scaled()(image[None]), expected[None])

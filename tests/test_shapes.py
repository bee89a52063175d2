"""The drawn shapes: a fixed set, whose boxes, masks and maps say what its pictures show."""

import hashlib
import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, binary_erosion

from lape.data import shapes
from lape.data.instances import InstanceSource
from lape.data.maps import MapSource
from lape.data.shapes import SHAPES, Shapes, shapes_detection, shapes_segmentation
from lape.data.sources import find_set
from lape.errors import RunError

SOME = range(40)


@pytest.fixture(scope="module")
def detection():
    return shapes_detection(None)


@pytest.fixture(scope="module")
def segmentation():
    return shapes_segmentation(None)


@pytest.fixture(scope="module", params=["train", "validation"])
def split(request, detection):
    return getattr(detection, request.param)


@pytest.fixture(scope="module")
def seen(split):
    return [split.instances(index) for index in range(150)]


def digest(split, indices):
    found = hashlib.sha256()
    for index in indices:
        instances = split.instances(index)
        for array in (split.picture(index), instances.masks, instances.labels, split.map(index)):
            found.update(np.asarray(array).tobytes())
    return found.hexdigest()


def test_another_process_draws_the_same_in_another_order(detection):
    script = """
import sys, lape.data.shapes
assert not {"skimage", "timm", "torchvision"} & set(sys.modules)  # they are imported when they are needed
from test_shapes import digest, shapes_detection
drawn = shapes_detection(None)
for part in (drawn.validation, drawn.train):
    print(*(digest(part, [index]) for index in (70, 9, 2)))
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    there = ran.stdout.split()[::-1]
    here = [digest(part, [index]) for part in (detection.train, detection.validation) for index in (2, 9, 70)]
    assert there == here
    assert len(set(here)) == 6


def test_the_set_stays_what_it_is(detection):
    # Numbers reached on this set are kept and compared: a change of the set is a new set, under a new name.
    found = hashlib.sha256()
    for part in (detection.train, detection.validation):
        for index in SOME:
            found.update(part.map(index).numpy().astype("<i8").tobytes())
    assert found.hexdigest() == "4ccce988fd8241882ddf964552c158659e526d7b607cf1b69c6d30d1ac0d72c0"


def test_there_are_as_many_pictures_as_documented_all_of_one_size(detection, segmentation):
    for source in (detection, segmentation):
        assert (len(source.train), len(source.validation)) == (600, 150)
        for part in (source.train, source.validation):
            assert {(part.picture(index).size, part.picture(index).mode) for index in SOME} == {((128, 128), "RGB")}


def test_instances_have_the_types_of_a_detection_set(split, seen):
    for index in SOME:
        found, count = seen[index], len(seen[index].labels)
        assert (found.boxes.shape, found.boxes.dtype) == ((count, 4), torch.float32)
        assert (found.labels.shape, found.labels.dtype) == ((count,), torch.int64)
        assert (found.masks.shape, found.masks.dtype) == ((count, 128, 128), torch.uint8)
        assert (found.areas.shape, found.areas.dtype) == ((count,), torch.float32)
        assert (found.crowd.shape, found.crowd.dtype) == ((count,), torch.bool)
        assert not found.crowd.any()
        assert str(index) in split.title(index)
        assert split.check(index)


def test_a_picture_has_1_to_4_shapes_and_every_class_has_its_share(seen):
    assert {len(found.labels) for found in seen} == {1, 2, 3, 4}
    shares = torch.bincount(torch.cat([found.labels for found in seen]), minlength=len(SHAPES)).double()
    assert len(shares) == len(SHAPES) == 5
    assert (shares / shares.sum() > 0.15).all()


def test_boxes_are_tight_around_masks_and_areas_count_them(seen):
    for found in seen:
        assert (found.areas == found.masks.sum((1, 2))).all()
        assert (found.areas >= 12).all()
        for (left, top, right, bottom), mask in zip(found.boxes.int().tolist(), found.masks, strict=True):
            inside = mask[top:bottom, left:right]
            assert inside.sum() == mask.sum()
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_no_pixel_is_of_two_shapes(seen):
    assert all(found.masks.sum(0).max() == 1 for found in seen)


def test_some_pictures_have_shapes_that_overlap_or_leave_the_picture(seen):
    edges = [found.masks[:, [0, -1]].any() or found.masks[:, :, [0, -1]].any() for found in seen]
    boxes = [found.boxes for found in seen]
    overlaps = [
        any(
            (torch.minimum(a[2:], b[2:]) > torch.maximum(a[:2], b[:2])).all()
            for number, a in enumerate(of_one)
            for b in of_one[:number]
        )
        for of_one in boxes
    ]
    for happens in (edges, overlaps):
        assert 0.1 < np.mean(happens) < 0.6


def test_a_map_shows_the_masks_by_class_over_background(split, segmentation):
    maps = segmentation.train if len(split) == 600 else segmentation.validation
    for index in SOME:
        found = split.instances(index)
        expected = ((1 + found.labels)[:, None, None] * found.masks).sum(0)
        shown = maps.map(index)
        assert shown.dtype == torch.int64
        assert torch.equal(shown, expected)
        assert np.array_equal(np.asarray(maps.picture(index)), np.asarray(split.picture(index)))


def test_the_classes_are_the_shapes_and_the_background_before_them(detection, segmentation):
    assert detection.classes == tuple(SHAPES)
    assert segmentation.classes == ("background", *SHAPES)


def test_training_and_validation_are_other_shapes_on_other_photographs(detection):
    train, validation = (
        {photograph.tobytes() for photograph in part.photographs} for part in (detection.train, detection.validation)
    )
    assert (len(train), len(validation)) == (5, 3)
    assert not train & validation
    assert not any(torch.equal(detection.train.map(index), detection.validation.map(index)) for index in SOME)


def test_a_picture_shows_its_shapes_where_its_masks_are_and_the_photograph_elsewhere(split, monkeypatch):
    drawn = [np.asarray(split.picture(index), int) for index in SOME]
    stamp = shapes._stamp
    shades = itertools.cycle(range(0, 256, 15))

    def painted(*arguments):
        cover, colours = stamp(*arguments)
        return cover, np.full_like(colours, next(shades))

    monkeypatch.setattr(shapes, "_stamp", painted)
    for index, before in zip(SOME, drawn, strict=True):
        picture, masks = np.asarray(split.picture(index), int), split.instances(index).masks.numpy().astype(bool)
        near = binary_dilation(masks.any(0), np.ones((3, 3)), iterations=5)  # a star's points fade out
        assert np.array_equal(picture[~near], before[~near])
        found = [np.bincount(picture[binary_erosion(mask)][:, 0]) for mask in masks]
        assert all(counts.max() > 0.9 * counts.sum() for counts in found)  # but for the soft edges of others
        assert len({counts.argmax() for counts in found}) == len(masks)


def test_of_a_shape_at_least_a_third_is_seen(detection, monkeypatch):
    monkeypatch.setattr(shapes, "SHAPES", {"disc": SHAPES["disc"]})
    monkeypatch.setattr(shapes, "RADII", (0.25, 0.25))
    monkeypatch.setattr(shapes, "MOST", 12)  # a crowd
    areas = torch.cat([detection.train.instances(index).areas for index in SOME])
    whole = math.pi * 32**2
    smallest = 0.7 * whole / 3  # a disc at a slant has 0.7 of its pixels or more
    assert areas.min() > smallest * 0.98  # what is lost to the raster
    assert areas.min() < 0.5 * whole  # they do hide each other


def test_a_side_of_ones_own(detection):
    small = Shapes("small", detection.train.photographs, 10, seed=3, side=48)
    for index in range(10):
        assert small.picture(index).size == (48, 48)
        assert small.instances(index).masks.shape[1:] == small.map(index).shape == (48, 48)


@pytest.mark.parametrize(
    ("name", "area"),
    [
        ("disc", math.pi),
        ("ring", math.pi * (1 - 0.52**2)),
        ("square", 2),
        ("triangle", math.sqrt(27) / 4),
        ("star", 5 * 0.45 * math.sin(math.pi / 5)),
    ],
)
def test_an_outline_encloses_the_area_of_its_shape_within_radius_1(name, area):
    steps = np.linspace(-1.2, 1.2, 1201)
    x, y = np.meshgrid(steps, steps)
    inside = SHAPES[name](x, y) < 0
    assert inside.sum() * (steps[1] - steps[0]) ** 2 == pytest.approx(area, rel=5e-3)
    assert np.hypot(x, y)[inside].max() == pytest.approx(1, abs=5e-3)
    assert inside[600, 600] == (name != "ring")


@pytest.mark.parametrize("source", [shapes_detection, shapes_segmentation])
def test_without_scikit_image_one_is_told_how_to_install_it(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(RunError, match=r"pip install 'lape\[dense\]'"):
        source(None)


@pytest.mark.parametrize(("name", "kind"), [("shapes-detection", InstanceSource), ("shapes-segmentation", MapSource)])
def test_each_set_is_found_by_its_name(name: str, kind: type) -> None:
    source = find_set(name)
    assert isinstance(source, kind)
    assert source.name == name

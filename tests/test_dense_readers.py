"""Sets with masks or maps: what their files say is what is read, and what cannot be used is refused by name."""

import io
import json
import os
import pickle
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as coco_mask
from PIL import Image

from lape.data import instances as coco_layout
from lape.data import maps as ade_layout
from lape.data.files import check_files
from lape.data.maps import IGNORED
from lape.errors import RunError, UsageError

HEIGHT, WIDTH = 48, 64
NAMES = {18: "dog", 3: "car", 90: "brush"}  # ids with gaps, in no order


def square(left, top, side, **more):
    """An annotation of a square, by a polygon around it."""
    right, bottom = left + side, top + side
    polygon = [left, top, right, top, right, bottom, left, bottom]
    return {"bbox": [left, top, side, side], "area": side * side, "segmentation": [polygon], "category_id": 3, **more}


def filled(left, top, right, bottom, height=HEIGHT, width=WIDTH):
    """The mask of a rectangle (1, H, W)."""
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, top:bottom, left:right] = 1
    return mask


def photograph(path, size=(WIDTH, HEIGHT), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def content(annotations, images=None, categories=NAMES):
    """What an annotation file holds: `annotations` of image 7 where they name no other."""
    images = images or [{"id": 7, "file_name": "seven.jpg", "height": HEIGHT, "width": WIDTH}]
    return {
        "images": images,
        "annotations": [{"id": 40 + k, "image_id": 7, **annotation} for k, annotation in enumerate(annotations)],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }


def write(root, train=None, val=None, year="2017"):
    """Write a set with both files and the pictures that they tell of."""
    for part, held in (("train", train), ("val", val)):
        held = content([square(8, 4, 16)]) if held is None else held
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"instances_{part}{year}.json").write_text(json.dumps(held))
        for image in held["images"] if isinstance(held, dict) and isinstance(held.get("images"), list) else ():
            if isinstance(image, dict) and "file_name" in image:
                photograph(root / f"{part}{year}" / image["file_name"], (image["width"], image["height"]))
    return root


def validated(root, *annotations):
    """The objects of one validation picture."""
    return coco_layout.instances(write(root, val=content(annotations))).validation.instances(0)


def trained(root, *annotations):
    """Titles of the training pictures, and the objects of the first: image 7 has `annotations`, image 8 a square."""
    images = [{"id": n, "file_name": f"{n}.jpg", "height": HEIGHT, "width": WIDTH} for n in (7, 8)]
    rows = [*annotations, square(8, 4, 16, image_id=8)]
    split = coco_layout.instances(write(root, train=content(rows, images))).train
    return [os.path.basename(split.title(index)) for index in range(len(split))], split.instances(0)


# What instances are


def test_a_square_is_read_as_it_was_drawn(tmp_path):
    found = validated(tmp_path, square(8, 4, 16, category_id=18))
    assert found.boxes.tolist() == [[8, 4, 24, 20]]
    assert found.boxes.dtype == found.areas.dtype == torch.float32
    assert found.labels.tolist() == [1]
    assert found.labels.dtype == torch.int64
    assert torch.equal(found.masks, filled(8, 4, 24, 20))
    assert found.areas.tolist() == [256]
    assert found.crowd.tolist() == [False]


def test_classes_are_the_categories_by_rising_id(tmp_path):
    source = coco_layout.instances(write(tmp_path, val=content([square(8, 4, 16, category_id=n) for n in NAMES])))
    assert source.classes == ("car", "dog", "brush")
    labels = source.validation.instances(0).labels
    assert [source.classes[label] for label in labels] == [*NAMES.values()]


@pytest.mark.parametrize("compressed", [False, True])
def test_runs_are_read_as_the_mask_that_they_came_from(tmp_path, compressed):
    mask = np.asfortranarray(np.random.default_rng(1).random((HEIGHT, WIDTH)) < 0.3).astype(np.uint8)
    if compressed:
        counts = coco_mask.encode(mask)["counts"].decode()
    else:  # by columns, beginning with zeros
        ends = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=0, append=2))
        counts = np.diff(ends, prepend=0).tolist()
    found = validated(tmp_path, square(0, 0, 48, segmentation={"size": [HEIGHT, WIDTH], "counts": counts}))
    assert np.array_equal(found.masks[0].numpy(), mask)


def test_several_polygons_are_one_object(tmp_path):
    one, other = square(2, 2, 10), square(30, 20, 10)
    found = validated(tmp_path, {**one, "segmentation": one["segmentation"] + other["segmentation"]})
    assert torch.equal(found.masks, filled(2, 2, 12, 12) | filled(30, 20, 40, 30))


@pytest.mark.parametrize(
    ("corner", "box"),
    [
        ((-6, -4), (0, 0, 10, 12)),
        ((56, 40), (56, 40, 64, 48)),
        ((-6, 40), (0, 40, 10, 48)),
        ((56, -4), (56, 0, 64, 12)),
    ],
)
def test_of_an_object_partly_outside_what_lies_inside_is_read(tmp_path, corner, box):
    found = validated(tmp_path, square(*corner, 16))
    assert found.boxes.tolist() == [[*box]]
    assert torch.equal(found.masks, filled(*box))


@pytest.mark.parametrize(
    "left_out",
    [
        square(-20, 4, 16),
        square(64, 4, 16),
        square(8, -16, 16),
        square(8, 48, 16),
        square(8, 4, 16, area=0),
        square(8, 4, 16, bbox=[8, 4, 0.9, 16]),
        square(8, 4, 16, bbox=[8, 4, 16, 0.9]),
        square(8, 4, 16, ignore=1),
        square(70, 4, 16, bbox=[60, 4, 16, 16]),  # its mask is empty inside the picture
        square(8, 4, 16, bbox=[63.9999999, 4, 16, 16]),  # nothing wide in float32
    ],
)
def test_what_shows_nothing_is_left_out(tmp_path, left_out):
    assert validated(tmp_path / "val", left_out, square(30, 20, 10)).boxes.tolist() == [[30, 20, 40, 30]]
    titles, found = trained(tmp_path / "train", left_out)
    assert titles == ["8.jpg"]
    assert found.boxes.tolist() == [[8, 4, 24, 20]]


def test_a_crowd_is_for_validation_alone(tmp_path):
    runs = {"size": [HEIGHT, WIDTH], "counts": [0, 10 * HEIGHT, 54 * HEIGHT]}
    crowd = square(0, 0, 48, segmentation=runs, iscrowd=1)
    found = validated(tmp_path / "val", square(30, 20, 10), crowd)
    assert found.crowd.tolist() == [False, True]
    assert torch.equal(found.masks[1:], filled(0, 0, 10, HEIGHT))
    assert trained(tmp_path / "alone", crowd)[0] == ["8.jpg"]
    titles, found = trained(tmp_path / "beside", crowd, square(30, 20, 10))
    assert titles == ["7.jpg", "8.jpg"]
    assert found.boxes.tolist() == [[30, 20, 40, 30]]


def test_small_pictures_and_such_without_objects_are_for_validation_alone(tmp_path):
    sides = {1: (31, 64), 2: (64, 31), 3: (32, 32), 4: (64, 64)}
    images = [{"id": n, "file_name": f"{n}.png", "height": h, "width": w} for n, (h, w) in sides.items()]
    held = content([square(2, 2, 10, image_id=n) for n in (1, 2, 3)], images)
    source = coco_layout.instances(write(tmp_path, held, held))
    assert [source.train.title(k) for k in range(len(source.train))] == [str(tmp_path / "train2017" / "3.png")]
    assert len(source.validation) == 4
    nothing = source.validation.instances(3)
    assert nothing.boxes.shape == (0, 4)
    assert nothing.masks.shape == (0, 64, 64)
    assert nothing.labels.shape == nothing.areas.shape == nothing.crowd.shape == (0,)


def test_objects_stay_with_their_pictures(tmp_path):
    images = [{"id": n, "file_name": f"{n}.png", "height": 40 + n, "width": 50} for n in range(6)]
    owners = (4, 0, 4, 2, 5, 4)
    held = content([square(2 + k, 2, 10, image_id=n) for k, n in enumerate(owners)], images)
    split = coco_layout.instances(write(tmp_path, val=held)).validation
    for n in range(6):
        found = split.instances(n)
        assert found.boxes[:, 0].tolist() == [2 + k for k, owner in enumerate(owners) if owner == n]
        for box, mask in zip(found.boxes.int().tolist(), found.masks, strict=True):
            assert torch.equal(mask[None], filled(*box, height=40 + n, width=50))
        assert split.picture(n).size == (50, 40 + n)


def test_what_is_read_is_the_readers_own(tmp_path):
    split = coco_layout.instances(write(tmp_path)).train
    before = split.instances(0)
    for part in (before.boxes, before.labels, before.masks, before.areas):
        part += 1
    assert split.instances(0).boxes.tolist() == [[8, 4, 24, 20]]
    assert split.instances(0).masks.max() == 1


def test_a_missing_area_is_that_of_the_mask(tmp_path):
    without = square(8, 4, 16)
    del without["area"]
    assert validated(tmp_path, without).areas.tolist() == [256]


def test_a_split_reaches_another_process_whole(tmp_path):
    split = coco_layout.instances(write(tmp_path)).train
    again = pickle.loads(pickle.dumps(split))
    assert again.title(0) == split.title(0)
    assert torch.equal(again.instances(0).masks, split.instances(0).masks)


@pytest.mark.parametrize(
    ("year", "inside"), [("2017", ""), ("2017", "images"), ("", ""), ("", "images"), ("_mine", "")]
)
def test_pictures_lie_in_the_folder_of_the_files_ending(tmp_path, year, inside):
    write(tmp_path, year=year)
    if inside:
        (tmp_path / inside).mkdir()
        for part in ("train", "val"):
            (tmp_path / f"{part}{year}").rename(tmp_path / inside / f"{part}{year}")
    source = coco_layout.instances(tmp_path)
    assert source.name == tmp_path.name
    assert source.train.title(0) == str(tmp_path / inside / f"train{year}" / "seven.jpg")
    assert source.train.picture(0).size == (WIDTH, HEIGHT)
    check_files(source, lambda share: None)


def test_file_names_may_have_folders(tmp_path):
    images = [{"id": 7, "file_name": "a/b/seven.jpg", "height": HEIGHT, "width": WIDTH}]
    source = coco_layout.instances(write(tmp_path, val=content([square(8, 4, 16)], images)))
    assert source.validation.picture(0).size == (WIDTH, HEIGHT)
    (tmp_path / "val2017" / "a" / "b" / "seven.jpg").unlink()
    with pytest.raises(RunError, match=r"seven\.jpg"):
        coco_layout.instances(tmp_path)


def test_coco_is_the_set_of_2017_by_name(tmp_path):
    write(tmp_path)
    (tmp_path / "annotations" / "instances_train2014.json").write_text("other")
    source = coco_layout.coco(tmp_path)
    assert (source.name, source.channels, source.size) == ("coco", 3, None)
    assert source.augmentation.hflip == 0.5
    assert source.dense.short_side == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    with pytest.raises(UsageError, match="--data_dir"):
        coco_layout.coco(None)
    with pytest.raises(UsageError, match=r"instances_train2014.json and instances_train2017.json"):
        coco_layout.instances(tmp_path)


# What is refused of COCO's layout

SEVEN = {"id": 7, "file_name": "seven.jpg", "height": HEIGHT, "width": WIDTH}


def runs(counts, size=(HEIGHT, WIDTH)):
    return {"segmentation": {"size": [*size], "counts": counts}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_id": 8}, "no image 8"),
        ({"image_id": [7]}, "annotation 41"),
        ({"category_id": 4}, "no category 4"),
        ({"bbox": [1, 2, 3]}, "[1, 2, 3]"),
        ({"bbox": [*range(1000)]}, "[0, 1, 2, 3, 4, 5, ...]"),
        ({"bbox": None}, "None"),
        ({"bbox": [1, 2, 3, float("nan")]}, "nan"),
        ({"bbox": [1, 2, 3, float("inf")]}, "inf"),
        ({"bbox": [1, 2, 3, "4"]}, "'4'"),
        ({"bbox": [1, 2, 3, 10**400]}, "annotation 41"),
        ({"area": "9"}, "area takes finite numbers, not '9'"),
        ({"area": float("nan")}, "nan"),
        ({"iscrowd": "0"}, "iscrowd is 0 or 1, not '0'"),
        ({"segmentation": None}, "no segmentation"),
        ({"segmentation": []}, "no segmentation"),
        ({"segmentation": "1 2 3"}, "list of polygons"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "x y x y"),
        ({"segmentation": [[[1, 2], [3, 4], [5, 6]]]}, "x y x y"),
        ({"segmentation": [[8, 4, 24, 4, 24, 20, 8]]}, "x y x y"),
        ({"segmentation": [[8, 4, 24, 20]]}, "x y x y"),
        ({"segmentation": [[*range(61)]]}, "x y x y"),
        ({"segmentation": [[*range(60), 8, 1e12]]}, "not 1000000000000.0"),
        ({"segmentation": [[8, 4, 24, 4, 24, 20], []]}, "x y x y"),
        ({"segmentation": [[8, 4, 24, 4, 24, "far"]]}, "far"),
        ({"segmentation": [[8, 4, 24, 4, 24, float("nan")]]}, "nan"),
        ({"segmentation": [[8, 4, 24, 4, 24, None]]}, "finite"),
        ({"segmentation": [[8, 4, 24, 4, 24, 1e12]]}, "finite"),
        ({"segmentation": {"counts": [HEIGHT * WIDTH]}}, "runs with size and counts"),
        (runs([HEIGHT * WIDTH], (WIDTH, HEIGHT)), "[64, 48]"),
        (runs([HEIGHT * WIDTH - 1]), "do not add up"),
        (runs([-1, HEIGHT * WIDTH + 1]), "do not add up"),
        (runs([HEIGHT * WIDTH / 2] * 2), "do not add up"),
        (runs("04"), "do not add up"),
        (runs("zz!"), "malformed"),
        (runs("é"), "annotation 41"),
    ],
)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_broken_annotation_is_named(tmp_path, part, change, said):
    held = content([square(30, 20, 10), {**square(8, 4, 16), **change}])
    with pytest.raises(RunError) as refused:
        coco_layout.instances(write(tmp_path, **{part: held}))
    assert f"instances_{part}2017.json, annotation 41: " in str(refused.value)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value).removeprefix(str(tmp_path))) < 300


def test_a_box_alone_is_refused(tmp_path):
    without = square(8, 4, 16)
    del without["segmentation"]
    with pytest.raises(RunError, match=r"instances_train2017.json, annotation 40: it has no segmentation"):
        coco_layout.instances(write(tmp_path, train=content([without])))


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ([], '"images"'),
        ({"images": [], "annotations": []}, '"categories"'),
        ({"images": {}, "annotations": [], "categories": []}, '"images"'),
        ({"images": [], "annotations": [3], "categories": []}, '"annotations"'),
        (content([], [SEVEN, SEVEN]), "two of its images have the id 7"),
        (content([square(1, 1, 9, id=5), square(8, 4, 16, id=5)]), "two of its annotations have the id 5"),
        (content([square(1, 1, 9, id="5")]), "id of each of its annotations must be a whole number, not '5'"),
        (
            content([square(1, 1, 9)], [{"file_name": "a.jpg", "height": 9, "width": 9}]),
            "images must be a whole number",
        ),
        (content([], [{**SEVEN, "height": 0}]), "image 7"),
        (content([], [{**SEVEN, "width": 64.5}]), "64.5"),
        (content([], [{"id": 7, "height": 9, "width": 9}]), "file_name, not 9, 9 and None"),
        (content([square(8, 4, 16)], categories={3: None}), "category 3"),
    ],
)
def test_what_is_not_in_the_layout_is_named(tmp_path, held, said):
    write(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(held))
    with pytest.raises(RunError) as refused:
        coco_layout.instances(tmp_path)
    assert "instances_train2017.json" in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize("text", [b"", b'{"images": [', b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_json_is_named(tmp_path, text):
    write(tmp_path)
    (tmp_path / "annotations" / "instances_val2017.json").write_bytes(text)
    with pytest.raises(RunError, match=r"instances_val2017.json cannot be read as JSON"):
        coco_layout.instances(tmp_path)


@pytest.mark.parametrize(
    ("held", "counted"),
    [
        (content([]), "1 images and 0 annotations"),
        (content([square(8, 4, 16, area=0)]), "1 images and 1 annotations"),
        (content([square(2, 2, 9)], [{**SEVEN, "height": 31}]), "1 images and 1 annotations"),
    ],
)
def test_a_training_set_without_objects_is_refused(tmp_path, held, counted):
    with pytest.raises(UsageError, match=counted) as refused:
        coco_layout.instances(write(tmp_path, train=held))
    assert "instances_train2017.json" in str(refused.value)


def test_validation_needs_pictures_and_no_objects(tmp_path):
    assert len(coco_layout.instances(write(tmp_path, val=content([]))).validation) == 1
    with pytest.raises(UsageError, match=r"instances_val2017.json, of 0 images"):
        coco_layout.instances(write(tmp_path, val={**content([]), "images": []}))


@pytest.mark.parametrize("other", [{3: "car", 18: "cat", 90: "brush"}, {3: "car", 90: "brush"}, NAMES | {5: "cat"}])
def test_both_files_have_the_same_categories(tmp_path, other):
    with pytest.raises(UsageError, match="same categories") as refused:
        coco_layout.instances(write(tmp_path, val=content([square(8, 4, 16)], categories=other)))
    number = 5 if 5 in other else 18
    assert f"category {number} is {NAMES.get(number)!r} in the first and {other.get(number)!r}" in str(refused.value)


def test_missing_files_are_named_before_training(tmp_path):
    write(tmp_path, val=content([square(8, 4, 16)], [SEVEN, {**SEVEN, "id": 8, "file_name": "eight.jpg"}]))
    (tmp_path / "val2017" / "eight.jpg").unlink()
    with pytest.raises(RunError, match="1 of 2 are missing") as refused:
        coco_layout.instances(tmp_path)
    assert str(tmp_path / "val2017" / "eight.jpg") in str(refused.value)
    (tmp_path / "val2017").rename(tmp_path / "other")
    with pytest.raises(UsageError, match=r"no such folder") as refused:
        coco_layout.instances(tmp_path)
    assert str(tmp_path / "images" / "val2017") in str(refused.value)
    with pytest.raises(UsageError, match=re.escape("instances_train*.json, not none")):
        coco_layout.instances(tmp_path / "nowhere")


# Maps


def painted(path, values, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if mode == "P":
        image.putpalette([255 - k // 3 for k in range(768)])
    (image if mode == "P" else image.convert(mode)).save(path)


VALUES = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 4  # 0 to 3


def scenes(root, classes="wall\nsky\ntree\n", count=2, mode="L", values=VALUES):
    for part in ("training", "validation"):
        for number in range(count):
            photograph(root / "images" / part / f"{number}.jpg")
            painted(root / "annotations" / part / f"{number}.png", values, mode)
    if classes is not None:
        (root / "classes.txt").write_text(classes)
    return root


@pytest.mark.parametrize("mode", ["L", "P"])
def test_a_map_says_its_values_less_one_and_ignores_zero(tmp_path, mode):
    source = ade_layout.maps(scenes(tmp_path, mode=mode))
    found = source.train.map(0)
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.from_numpy(np.where(VALUES == 0, IGNORED, VALUES - 1)))
    assert source.classes == ("wall", "sky", "tree")
    assert source.train.picture(0).size == (WIDTH, HEIGHT)
    assert (source.name, source.channels, source.size) == (tmp_path.name, 3, None)
    assert (len(source.train), len(source.validation)) == (2, 2)
    check_files(source, lambda share: None)


def test_a_map_belongs_to_the_picture_of_its_name(tmp_path):
    scenes(tmp_path, count=12, classes="\n".join("abcdefghijkl"))
    for number in range(12):
        painted(tmp_path / "annotations" / "training" / f"{number}.png", np.full((HEIGHT, WIDTH), number + 1))
    split = ade_layout.maps(tmp_path).train
    for index in range(12):
        assert (split.map(index) == int(os.path.basename(split.title(index)).removesuffix(".jpg"))).all()


@pytest.mark.parametrize("inner", ["", "ADEChallengeData2016"])
def test_ade20k_lies_in_its_own_folder_or_one_above(tmp_path, inner):
    root = scenes(tmp_path / inner, classes=None)
    source = ade_layout.ade20k(tmp_path)
    assert source.name == "ade20k"
    assert source.classes == tuple(str(number) for number in range(1, 151))
    assert source.dense.crop == 512
    assert source.dense.scale_jitter == (0.5, 2.0)
    assert source.train.title(0) == str(root / "images" / "training" / "0.jpg")
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.1\t2\t3\t1\twall", '2\t0.1\t2\t3\t0\t"edifice" building']
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    (root / "classes.txt").write_text("another\n")
    assert ade_layout.ade20k(tmp_path).classes == ade_layout.maps(root).classes == ("wall", '"edifice" building')


def test_ade20k_has_to_be_somewhere():
    with pytest.raises(UsageError, match="--data_dir"):
        ade_layout.ade20k(None)


def test_ones_own_classes_have_names(tmp_path):
    with pytest.raises(UsageError, match=r"classes.txt"):
        ade_layout.maps(scenes(tmp_path, classes=None))
    for text, line in (("", 1), ("wall\n\ntree\n", 2)):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(RunError, match=f"classes.txt must name every class; line {line} "):
            ade_layout.maps(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RunError, match=r"classes.txt cannot be read"):
        ade_layout.maps(tmp_path)
    for text in ("Idx\tName\n1\twall\n3\tsky\n", "wall\nsky\n"):
        (tmp_path / "objectInfo150.txt").write_text(text)
        with pytest.raises(RunError, match=r"objectInfo150.txt must "):
            ade_layout.maps(tmp_path)


@pytest.mark.parametrize(
    ("alone", "what"), [("annotations/training/1.png", "no map"), ("images/validation/0.jpg", "no picture")]
)
def test_a_picture_or_a_map_alone_is_named(tmp_path, alone, what):
    (scenes(tmp_path) / alone).unlink()
    kind, part, name = alone.split("/")
    other = {"images": "annotations", "annotations": "images"}[kind]
    with pytest.raises(UsageError, match=what) as refused:
        ade_layout.maps(tmp_path)
    assert str(tmp_path / other / part / name.split(".")[0]) in str(refused.value)
    assert str(tmp_path / kind / part) in str(refused.value)


def test_a_set_without_pictures_is_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("wall\n")
    with pytest.raises(UsageError, match=r"images.training"):
        ade_layout.maps(tmp_path)


def test_two_pictures_of_one_name_are_refused(tmp_path):
    photograph(scenes(tmp_path) / "images" / "training" / "0.png")
    with pytest.raises(UsageError, match=r"0\.jpg and .*0\.png"):
        ade_layout.maps(tmp_path)


BAD_MAPS = {
    "another size": (lambda path: painted(path, VALUES[:-1]), "64×47"),
    "colours": (lambda path: painted(path, VALUES, "RGB"), "mode RGB"),
    "one bit": (lambda path: painted(path, VALUES, "1"), "mode 1"),
    "16 bits": (lambda path: Image.fromarray(VALUES.astype(np.uint16)).save(path), "mode I;16"),
    "no such class": (lambda path: painted(path, VALUES + 1), "the value 4, and there are 3 classes"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-40]), "cannot be read"),
    "no image": (lambda path: path.write_text("words"), "cannot be read"),
    "missing": (lambda path: path.unlink(), "cannot be read"),
}


@pytest.mark.parametrize("bad", BAD_MAPS)
def test_a_bad_map_is_named_wherever_it_is_read(tmp_path, bad):
    source = ade_layout.maps(scenes(tmp_path))
    path = tmp_path / "annotations" / "validation" / "1.png"
    spoil, said = BAD_MAPS[bad]
    spoil(path)
    for read in (source.validation.map, source.validation.check, lambda _: check_files(source, lambda share: None)):
        with pytest.raises(RunError) as refused:
            read(1)
        assert str(path) in str(refused.value)
        assert said in str(refused.value)
    source.validation.check(0)


# Pictures of either kind


def noisy(kind):
    """A larger picture, so that what is cut off at its end is not its end alone."""
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, kind)
    return written.getvalue()


BAD_PICTURES = {
    "cut off": lambda path: path.write_bytes(noisy("JPEG")[: len(noisy("JPEG")) * 3 // 4]),
    "a PNG cut off": lambda path: path.write_bytes(noisy("PNG")[:-40]),
    "no image": lambda path: path.write_text("words"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("bad", BAD_PICTURES)
@pytest.mark.parametrize("kind", ["instances", "maps"])
def test_a_bad_picture_is_named_wherever_it_is_read(tmp_path, kind, bad):
    if kind == "maps":
        source, path = ade_layout.maps(scenes(tmp_path, count=1)), tmp_path / "images" / "training" / "0.jpg"
    else:
        source, path = coco_layout.instances(write(tmp_path)), tmp_path / "train2017" / "seven.jpg"
    BAD_PICTURES[bad](path)
    for read in (source.train.picture, source.train.check, lambda _: check_files(source, lambda share: None)):
        with pytest.raises(RunError, match="cannot be read as an image") as refused:
            read(0)
        assert str(path) in str(refused.value)
    source.validation.check(0)


def test_a_picture_of_another_size_than_annotated_is_named(tmp_path):
    source = coco_layout.instances(write(tmp_path))
    photograph(tmp_path / "train2017" / "seven.jpg", (HEIGHT, WIDTH))
    for read in (source.train.picture, source.train.check, lambda _: check_files(source, lambda share: None)):
        with pytest.raises(RunError, match=r"48×64 pixels and 64×48") as refused:
            read(0)
        assert str(tmp_path / "train2017" / "seven.jpg") in str(refused.value)


def test_a_grey_picture_is_read_in_colour(tmp_path):
    photograph(scenes(tmp_path) / "images" / "training" / "0.jpg", mode="L")
    assert ade_layout.maps(tmp_path).train.picture(0).mode == "RGB"


def test_the_first_bad_file_in_the_order_of_the_set_is_named_and_all_are_counted(tmp_path):
    source = ade_layout.maps(scenes(tmp_path, count=5))
    for spoilt in ("images/validation/0.jpg", "images/training/3.jpg", "annotations/training/4.png"):
        (tmp_path / spoilt).write_text("words")
    shares = []
    with pytest.raises(RunError, match=r"3 of 10 pictures") as refused:
        check_files(source, shares.append)
    assert str(tmp_path / "images" / "training" / "3.jpg") in str(refused.value)
    assert shares == [done / 10 for done in range(1, 11)]


class Kept:
    """Pictures of which only the number and the checks are known."""

    name = "kept"
    remarks = ()

    def __init__(self, seconds=0.0):
        self.seconds, self.checked = seconds, []

    def __len__(self):
        return 200

    def check(self, index):
        time.sleep(self.seconds)
        self.checked.append(index)
        return True


def test_every_picture_of_both_splits_is_checked_once(tmp_path):
    kept = replace(ade_layout.maps(scenes(tmp_path)), train=Kept(), validation=Kept())
    check_files(kept, lambda share: None)
    assert sorted(kept.train.checked) == sorted(kept.validation.checked) == list(range(200))


def test_breaking_off_leaves_the_rest_unchecked(tmp_path):
    kept = replace(ade_layout.maps(scenes(tmp_path)), train=Kept(0.05), validation=Kept(0.05))

    def break_off(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_files(kept, break_off)
    assert len(kept.train.checked) < len(kept.train)
    assert not kept.validation.checked

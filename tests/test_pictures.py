"""Laws of what is read of pictures and annotations: as people see it, or refused; what looks wrong is said before."""

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dense_sets import HEIGHT, WIDTH, ade20k, coco
from numpy.typing import NDArray
from PIL import ExifTags, Image

from lape.data.classes import Split
from lape.data.files import check_files
from lape.data.pictures import TURNS, open_picture
from lape.data.sources import find_set
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.report.prediction import png as drawn_png
from lape.training import prediction
from lape.training.loop import train

Read = Callable[[Path], Any]


def of_class_folder(path: Path) -> Image.Image:
    return Split("a file", [path], torch.zeros(1)).picture(0, channels=3)


def replaced(root: Path, name: str, path: Path) -> None:
    """Put a file in the place of a picture of a set, whose ending may be another."""
    (root / name).write_bytes(path.read_bytes())


def of_coco(path: Path) -> Image.Image:
    root = coco(path.parent / "coco")
    replaced(root, "val2017/0.jpg", path)
    return find_set(str(root)).validation.picture(0)


def of_maps(path: Path) -> Image.Image:
    root = ade20k(path.parent / "maps")
    replaced(root, "images/validation/0.jpg", path)
    return find_set("ade20k", root).validation.picture(0)


def of_predict(path: Path) -> Image.Image:
    """The picture that a model is shown, and that is drawn on."""
    shown: list[Image.Image] = []
    drawn: list[Image.Image] = []
    answer = SimpleNamespace(draw=lambda sheet: drawn.append(sheet.picture), legend=lambda _: [])
    work = SimpleNamespace(
        view=lambda picture: shown.append(picture) or torch.zeros(1), answers=lambda *_: [answer],
        source=SimpleNamespace(classes=()), validation_batch=None,
    )  # fmt: skip
    precision = SimpleNamespace(convert_input=lambda views: views)
    fabric = SimpleNamespace(
        to_device=lambda views: views, autocast=lambda: torch.autocast("cpu", enabled=False),
        strategy=SimpleNamespace(precision=precision),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        model = SimpleNamespace(work=work, fabric=fabric, task=None)
        patch.setattr(prediction, "load_run", lambda *_, **__: model)
        (one,) = prediction.predict(Path("best.pt"), [path])
    if isinstance(one, prediction.Unread):
        raise RunError(one.reason)
    drawn_png(one)
    assert [*map(np.array_equal, shown, drawn)] == [True]
    return shown[0]


READERS = {"class folder": of_class_folder, "coco": of_coco, "maps": of_maps, "predict": of_predict}


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image)


def a_scene() -> Image.Image:
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


# --- How the camera was held

BACK = {turn: turn for turn in TURNS.values()} | {
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
}


def held(scene: Image.Image, number: int) -> tuple[Image.Image, Image.Exif]:
    """A scene as the sensor of a camera sees it that is held so, and what it notes of that."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    return (scene.transpose(BACK[TURNS[number]]) if number in TURNS else scene), exif


@pytest.mark.parametrize("form", ["png", "tiff", "webp"])
@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("reader", READERS)
def test_a_picture_is_seen_upright_however_the_camera_was_held(
    reader: str, number: int, form: str, tmp_path: Path
) -> None:
    seen, exif = held(a_scene(), number)
    seen.save(tmp_path / f"one.{form}", exif=exif, **({"lossless": True} if form == "webp" else {}))
    assert np.array_equal(pixels(READERS[reader](tmp_path / f"one.{form}")), pixels(a_scene()))


@pytest.mark.parametrize("number", [3, 6])
@pytest.mark.parametrize("kind", ["coco", "maps"])
def test_masks_and_maps_lie_over_what_they_are_of(kind: str, number: int, tmp_path: Path) -> None:
    """The rectangle of every picture is bright in one colour, and what surrounds it is not."""
    root = {"coco": coco, "maps": ade20k}[kind](tmp_path)
    for path in root.rglob("*.jpg"):
        with Image.open(path) as image:
            seen, exif = held(image.convert("RGB"), number)
        seen.save(path, exif=exif, quality=95)
    source = find_set(str(root) if kind == "coco" else "ade20k", root)
    check_files(source, lambda share: None)
    for split in (source.train, source.validation):
        for index in range(len(split)):
            brightest = pixels(split.picture(index)).max(2)
            inside = split.instances(index).masks[0] > 0 if kind == "coco" else split.map(index) % IGNORED_AND_WALL > 0
            assert brightest[inside.numpy()].mean() > 240
            assert brightest[~inside.numpy()].mean() < 160


IGNORED_AND_WALL = 255  # of a map, the classes 255 and 0


def test_a_picture_that_was_annotated_lying_on_its_side_is_told_so(tmp_path: Path) -> None:
    root = coco(tmp_path)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    a_scene().save(root / "train2017/0.jpg", exif=exif)
    with pytest.raises(
        RunError, match=r"0\.jpg was annotated lying on its side: people see 60×80 .* say 80×60\. Remove"
    ):
        check_files(find_set(str(root)), lambda share: None)


@pytest.mark.parametrize("block", [b"Exif\0\0MM\0*\0\0\0\x08\0\x09", b"Exif\0\0words", b"Exif\0\0"], ids=str)
def test_a_picture_with_a_broken_block_of_exif_is_read_as_it_is(block: bytes, tmp_path: Path) -> None:
    a_scene().save(tmp_path / "one.png", exif=block)
    assert np.array_equal(pixels(of_predict(tmp_path / "one.png")), pixels(a_scene()))


# --- More than 8 bits, more than there is memory

RAMP = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)


def plain_pgm(path: Path) -> None:
    values = (RAMP * 65535).astype(">u2")
    path.write_bytes(b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + values.tobytes())


DEEP: dict[str, tuple[str, Callable[[Path], None]]] = {
    "16 bits": ("png", lambda path: Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path)),
    "12 bits in 16": ("tiff", lambda path: Image.fromarray((RAMP * 4095).astype(np.uint16)).save(path)),
    "32 bits": ("tiff", lambda path: Image.fromarray((RAMP * 1e6).astype(np.int32)).save(path)),
    "floats": ("tiff", lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path)),
    "PGM of 16 bits": ("pgm", plain_pgm),
}


@pytest.mark.parametrize("depth", DEEP)
@pytest.mark.parametrize("reader", READERS)
def test_grey_of_more_than_8_bits_is_refused_and_not_made_white_or_black(
    reader: str, depth: str, tmp_path: Path
) -> None:
    ending, save = DEEP[depth]
    save(path := tmp_path / f"one.{ending}")
    with pytest.raises(RunError, match=r"has grey values of more than 8 bits \(mode .*\. Save it with 8 bits"):
        READERS[reader](path)


def test_colours_of_16_bits_are_colours(tmp_path: Path) -> None:
    values = (np.stack([RAMP, RAMP**2, 1 - RAMP], 2) * 65535).astype(">u2")
    (tmp_path / "one.ppm").write_bytes(b"P6 %d %d 65535\n" % (WIDTH, HEIGHT) + values.tobytes())
    seen = of_predict(tmp_path / "one.ppm")
    assert np.abs(pixels(seen).astype(float) - values / 257).max() <= 1


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int, rows: bytes) -> bytes:
    """A grey PNG of any depth, which Pillow does not write."""
    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("size", [(9_500, 9_500), (20_000, 10_000)], ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_a_picture_of_more_pixels_than_memory_is_for_is_refused_from_its_head(
    reader: str, size: tuple[int, int], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "one.png").write_bytes(png(*size, 8, b""))
    with pytest.raises(RunError, match=r"89,478,485 .*of a picture\. Make it smaller\.$"):
        READERS[reader](tmp_path / "one.png")


def test_a_picture_of_as_many_pixels_as_are_read_is_opened(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(png(9_000, 9_000, 8, b""))
    with open_picture(tmp_path / "one.png") as image:
        assert image.size == (9_000, 9_000)


# --- Maps


def lossy(path: Path) -> None:
    with Image.open(path) as image:
        image.convert("L").save(path, "JPEG")


def of_few_bits(path: Path, depth: int = 4) -> None:
    row = b"\0" + bytes(WIDTH * depth // 8)
    path.write_bytes(png(WIDTH, HEIGHT, depth, HEIGHT * row))


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    with Image.open(path) as image:
        again = image.copy()
    again.save(path, exif=exif)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (turned, "has the EXIF orientation 3"),
        (lossy, "is a JPEG whatever its name says, and maps are PNG"),
        (of_few_bits, "has fewer, which stand for shades of grey"),
        (lambda path: of_few_bits(path, 2), "has fewer, which stand for shades of grey"),
        (DEEP["16 bits"][1], r"must have one channel of 8 bits, whose value is the class"),
    ],
    ids=["turned", "lossy", "4 bits", "2 bits", "16 bits"],
)
def test_a_map_whose_values_are_changed_in_its_file_is_refused(spoil: Any, said: str, tmp_path: Path) -> None:
    root = ade20k(tmp_path)
    spoil(root / "annotations/training/1.png")
    with pytest.raises(RunError, match=rf"1\.png .*{said}"):
        check_files(find_set("ade20k", root), lambda share: None)


def test_a_map_with_a_palette_of_4_bits_has_its_own_values(tmp_path: Path) -> None:
    root = ade20k(tmp_path)
    values = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 16
    image = Image.fromarray(values.astype(np.uint8))
    image.putpalette([255 - k // 3 for k in range(48)])
    image.save(root / "annotations/training/1.png", bits=4)
    found = find_set("ade20k", root).train.map(1)
    assert torch.equal(found, torch.from_numpy(np.where(values == 0, 255, values - 1)))


# --- What is left out, and what looks wrong


def changed(root: Path, part: str, change: Callable[[list[dict[str, Any]]], Any]) -> Path:
    """Write a set, and change the annotations of one of its files."""
    (file,) = coco(root).glob(f"annotations/instances_{part}*.json")
    content = json.loads(file.read_text())
    change(content["annotations"])
    file.write_text(json.dumps(content))
    return root


def remarks(root: Path) -> list[str]:
    return check_files(find_set(str(root)), lambda share: None)


def without_an_object(rows: list[dict[str, Any]]) -> None:
    rows[0]["iscrowd"] = 1
    rows[1]["area"] = 0


def test_of_a_sound_set_nothing_is_remarked(tmp_path: Path) -> None:
    assert remarks(coco(tmp_path / "a")) == []
    assert check_files(find_set("ade20k", ade20k(tmp_path / "b")), lambda share: None) == []
    assert check_files(find_set("shapes-detection"), lambda share: None) == []


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    annotations, images = remarks(changed(tmp_path, "train", without_an_object))
    assert annotations.endswith(
        "instances_train2017.json leaves out annotations, 2 of 4 (crowds, which validation alone takes account of: 1; "
        "no area: 2)."
    )
    assert images.endswith("instances_train2017.json leaves out images, 2 of 4 (nothing to be learnt in them: 0, 1).")


def test_files_that_no_ending_tells_to_be_pictures_are_counted_and_named(tmp_path: Path) -> None:
    for part, name in ((part, name) for part in ("train", "val") for name in ("cat", "dog")):
        (folder := tmp_path / "classes" / part / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "1.png")
    for name in ("dog/b.heic", "cat/a.heic", "cat/.hidden"):
        (tmp_path / "classes/train" / name).touch()
    experiment = Experiment(data=str(tmp_path / "classes"), img_size=8, batch_size=2, epochs=1, accelerator="cpu")
    told = r"train leaves out 2 files that are not read: 2 \.heic \(\S*cat/a\.heic is the first\)\."
    with pytest.warns(UserWarning, match=told):
        train(replace(experiment, workers=0, warmup_epochs=0.0), tmp_path / "run")
    root = ade20k(tmp_path / "maps")
    for folder in ("images", "annotations"):
        (root / folder / "training/9.tga").touch()
    said = check_files(find_set("ade20k", root), lambda share: None)
    assert [remark.endswith("training/9.tga is the first.") for remark in said] == [True, True]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"iscrowd": 1}, "crowds, which validation alone takes account of: 1, 2, 3 ..."),
        ({"area": 0}, "no area: 1, 2, 3 ..."),
        ({"ignore": 1}, "marked to be ignored: 1, 2, 3 ..."),
        ({"bbox": [0.1, 0.1, 0.3, 0.5]}, "a box less than a pixel wide or high: 1, 2, 3 ..."),
        ({"bbox": [900, 900, 30, 40]}, "a box outside of its image: 1, 2, 3 ..."),
        ({"segmentation": [[900, 900, 930, 900, 930, 940]]}, "a mask outside of its image: 1, 2, 3 ..."),
    ],
    ids=str,
)
def test_where_all_objects_fall_out_the_reason_is_the_true_one(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    changed(tmp_path, "train", lambda rows: [row.update(change) for row in rows])
    with pytest.raises(UsageError) as refused:
        find_set(str(tmp_path))
    assert f"leaves out annotations, 4 of 4 ({reason})" in str(refused.value)
    assert "\n" not in str(refused.value)


def as_corners(row: dict[str, Any]) -> None:
    x, y, width, height = row["bbox"]
    row["bbox"] = [x, y, x + width, y + height]


def test_boxes_that_are_corners_are_refused(tmp_path: Path) -> None:
    changed(tmp_path, "train", lambda rows: [as_corners(row) for row in rows[1:]])
    with pytest.raises(
        RunError, match=r"train2017\.json: bbox is x y width height, .* 3 of 4 \(annotations: 2, 3, 4\)"
    ):
        find_set(str(tmp_path))


def test_a_few_boxes_that_are_corners_are_noticed(tmp_path: Path) -> None:
    (remark,) = remarks(changed(tmp_path, "train", lambda rows: as_corners(rows[3])))
    assert remark.endswith("boxes that fit their masks as two corners alone, 1 of 4 (annotations: 4).")


@pytest.mark.parametrize("box", [[50, 20, 20, 20], [40, 5, 10, 45], [-500, -500, 510, 510]], ids=str)
def test_a_box_far_from_its_mask_is_noticed(box: list[int], tmp_path: Path) -> None:
    (remark,) = remarks(changed(tmp_path, "val", lambda rows: rows[1].update(bbox=box)))
    assert remark.endswith("instances_val2017.json has boxes that are far from their masks, 1 of 2 (annotations: 2).")


@pytest.mark.parametrize("shift", [-3, 3])
def test_a_box_that_is_drawn_by_hand_is_not(shift: int, tmp_path: Path) -> None:
    def by_hand(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            x, y, width, height = row["bbox"]
            row["bbox"] = [x + shift, y - shift, width + 0.4, height - 0.4]

    assert remarks(changed(tmp_path, "train", by_hand)) == []


# --- Nothing to be learnt or measured

SMALL: dict[str, Any] = {
    "model": "segmenter_nano_patch8", "epochs": 1, "batch_size": 2, "accelerator": "cpu", "workers": 0, "crop": 64,
    "model_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}, "short_side": (64,), "stride": 48,
    "warmup_epochs": 0.0,
}  # fmt: skip


def unlabelled(root: Path, names: str) -> Path:
    for path in ade20k(root).glob(f"annotations/{names}.png"):
        Image.new("L", (WIDTH, HEIGHT)).save(path)
    return root


@pytest.mark.parametrize("part", ["training", "validation"])
def test_maps_without_a_label_end_a_run_before_its_first_step(part: str, tmp_path: Path) -> None:
    unlabelled(tmp_path / "set", f"{part}/*")
    with pytest.raises(RunError, match=rf"pictures of {part} none has a labelled pixel; .*0\.jpg is the first"):
        train(Experiment(data="ade20k", data_dir=tmp_path / "set", **SMALL), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_map_without_a_label_among_others_is_said_before_the_first_step(tmp_path: Path) -> None:
    unlabelled(tmp_path / "set", "training/2")
    with pytest.warns(
        UserWarning, match=r"1 of 4 pictures of training have not a labelled pixel; .*2\.jpg is the first"
    ):
        train(Experiment(data="ade20k", data_dir=tmp_path / "set", **SMALL), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: rows.clear(), r"change the set\.$"),
        (lambda rows: [row.update(iscrowd=1) for row in rows], r"change the set\.$"),
        (
            lambda rows: [row.update(area=0) for row in rows],
            r"change the set\. .*annotations, 2 of 2 \(no area: 1, 2\)\.$",
        ),
    ],
    ids=["no annotation", "crowds", "no area"],
)
def test_validation_without_an_object_is_refused_before_the_first_step(
    change: Any, reason: str, tmp_path: Path
) -> None:
    changed(tmp_path / "set", "val", change)
    size = {"embed_dim": 24, "depth": 2, "num_heads": 2, "interactions": [[0, 0], [1, 1]], "deform_heads": 2}
    experiment = Experiment(
        data=str(tmp_path / "set"), model="mask_rcnn_vit_adapter_nano", model_args={**size, "windows": [3, None]},
        batch_size=2, accelerator="cpu", workers=0,
    )  # fmt: skip
    with pytest.raises(RunError, match=f"pictures of val2017 none has an object that is no crowd; .*{reason}"):
        train(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()

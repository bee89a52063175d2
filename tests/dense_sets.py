"""A few pictures in the layouts of COCO and ADE20K: coloured rectangles on noise."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HEIGHT, WIDTH = 60, 80
Picture = tuple[NDArray[np.uint8], tuple[int, int, int, int]]


def picture(number: int) -> Picture:
    """Return pixels (H, W, 3) and the rectangle in them, x, y, width, height: red or, in odd ones, blue."""
    pixels = np.random.default_rng(number).integers(60, 140, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    x, y, width, height = 10 + 5 * number, 8, 30, 40
    pixels[y : y + height, x : x + width] = (20, 20, 255) if number % 2 else (255, 20, 20)
    return pixels, (x, y, width, height)


def coco(root: Path) -> Path:
    """Write four training pictures and two of them for validation, each with one object."""
    (root / "annotations").mkdir(parents=True)
    for part, count in (("train2017", 4), ("val2017", 2)):
        (root / part).mkdir()
        images, annotations = [], []
        for number in range(count):
            pixels, (x, y, width, height) = picture(number)
            Image.fromarray(pixels).save(root / part / f"{number}.jpg", quality=95)
            images.append({"id": number, "file_name": f"{number}.jpg", "width": WIDTH, "height": HEIGHT})
            polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append({
                "id": number + 1, "image_id": number, "category_id": 7 if number % 2 else 3, "iscrowd": 0,
                "bbox": [x, y, width, height], "area": width * height, "segmentation": [polygon],
            })  # fmt: skip
        categories = [{"id": 3, "name": "red"}, {"id": 7, "name": "blue"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{part}.json").write_text(json.dumps(content))
    return root


def ade20k(root: Path) -> Path:
    """Write four training pictures and two of them for validation, with the classes 1, 2 and 3 of ADE20K's maps."""
    for part, count in (("training", 4), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for number in range(count):
            pixels, (x, y, width, height) = picture(number)
            labels = np.ones((HEIGHT, WIDTH), dtype=np.uint8)
            labels[y : y + height, x : x + width] = 3 if number % 2 else 2
            labels[0] = 0  # unlabelled
            Image.fromarray(pixels).save(root / f"images/{part}/{number}.jpg", quality=95)
            Image.fromarray(labels).save(root / f"annotations/{part}/{number}.png")
    return root

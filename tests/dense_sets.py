"""A few pictures in the layouts of COCO and ADE20K."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def coco(root: Path) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train2017", 4), ("val2017", 2)):
        (root / part).mkdir(parents=True)
        images, annotations = [], []
        for number in range(count):
            Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(root / part / f"{number}.jpg")
            images.append({"id": number, "file_name": f"{number}.jpg", "width": 80, "height": 60})
            x, y = 10 + 5 * number, 8
            box = [x, y, 30, 40]
            polygon = [x, y, x + 30, y, x + 30, y + 40, x, y + 40]
            annotations.append({
                "id": number + 1, "image_id": number, "category_id": 3, "bbox": box, "area": 1200, "iscrowd": 0,
                "segmentation": [polygon],
            })  # fmt: skip
        content = {"images": images, "annotations": annotations, "categories": [{"id": 3, "name": "thing"}]}
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{part}.json").write_text(json.dumps(content))
    return root


def ade20k(root: Path) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("training", 4), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / kind / part).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"images/{part}/{number}.jpg")
            labels = random.integers(0, 151, (60, 80), dtype=np.uint8)
            Image.fromarray(labels).save(root / f"annotations/{part}/{number}.png")
    return root

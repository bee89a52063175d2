"""Datasets and transforms: the only package that opens images.

Imports nothing above experiment and errors. A set is added by a reader in one of these files and a line in `SETS`;
a layout of folders by a reader and a line in `LAYOUTS`.
"""

from collections.abc import Mapping
from types import MappingProxyType

# The readers of the sets that have names, loaded when they are asked for; any other data is a folder.
SETS: Mapping[str, str] = MappingProxyType(
    {
        "digits": "lape.data.classes:digits",
        "fashion-mnist": "lape.data.classes:fashion_mnist",
        "cifar10": "lape.data.classes:cifar10",
        "cifar100": "lape.data.classes:cifar100",
        "imagenet": "lape.data.classes:imagenet",
        "coco": "lape.data.instances:coco",
        "ade20k": "lape.data.maps:ade20k",
        "shapes-detection": "lape.data.shapes:shapes_detection",
        "shapes-segmentation": "lape.data.shapes:shapes_segmentation",
    }
)

CLASSES = "train/"  # the layout of all folders that have no part of another

# The readers of folders, by a part that a folder of such a layout has.
LAYOUTS: Mapping[str, str] = MappingProxyType(
    {
        "annotations/instances_*.json": "lape.data.instances:instances",
        "annotations/training/": "lape.data.maps:maps",
        CLASSES: "lape.data.classes:folder",
    }
)

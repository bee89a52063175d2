"""Datasets and transforms: the only package that opens images.

Imports nothing above experiment and errors. A set is added by a reader in one of these files and a line in `SETS`.
"""

from collections.abc import Mapping
from types import MappingProxyType

# The readers of the sets that have names, loaded when they are asked for; any other data is a folder.
SETS: Mapping[str, str] = MappingProxyType(
    {
        "digits": "lape.data.sources:digits",
        "fashion-mnist": "lape.data.sources:fashion_mnist",
        "cifar10": "lape.data.sources:cifar10",
        "cifar100": "lape.data.sources:cifar100",
        "imagenet": "lape.data.sources:imagenet",
        "coco": "lape.data.instances:coco",
        "ade20k": "lape.data.maps:ade20k",
        "shapes-detection": "lape.data.shapes:shapes_detection",
        "shapes-segmentation": "lape.data.shapes:shapes_segmentation",
    }
)

"""What detection and segmentation have in common: pictures of any size, whose files are all looked at first."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from lape.data.files import check_files
from lape.experiment import Augmentation, Dense
from lape.tasks.building import cut_to_table


class DenseWork:
    """Pictures of any size, and a model that tells of places in them."""

    one_size = False
    validation_batch: int | None = 1
    repeats = 1

    source: Any
    module: Any
    augmentation: Augmentation
    dense: Dense

    def resolved(self) -> dict[str, Any]:
        """Return the classes, and how pictures are resized and changed in training."""
        changed = asdict(self.augmentation) | asdict(self.dense)
        return {"image_size": None, "classes": dict.fromkeys(self.source.classes), "augmentation": changed}

    def check(self, report: Callable[[float], None]) -> None:
        """Open every file, and tell how many have been; raises RunError for a bad one, and where nothing is labelled.

        What a person should know of the set is said as warnings.
        """
        for remark in check_files(self.source, report):
            warnings.warn(remark, stacklevel=2)

    def input_config(self) -> dict[str, Any]:
        """Return what timm's models say of their images: their colours."""
        return {"mean": self.source.mean, "std": self.source.std}

    def view(self, picture: Image.Image) -> Tensor:
        """Return the picture (3, H, W), uint8."""
        return pil_to_tensor(picture)

    def transformer_images(self, count: int, at_once: int) -> tuple[nn.Module, Iterator[Tensor]]:
        """Return the model's transformer, and `count` validation pictures cut to the size of its table."""
        return cut_to_table(self.source, self.module, count, at_once)

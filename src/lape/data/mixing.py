"""Mixup and cutmix of a batch as one weighted sum, drawn as timm draws them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """Mixes each image of a batch with its partner, the first with the last, by one draw for all.

    Mixup is a weighted sum of all pixels, and cutmix one whose weights are 1 and 0: a device does the same for both,
    and where nothing is mixed any more. One of `mixup` and `cutmix` is above 0.
    """

    mixup: float  # alpha
    cutmix: float  # alpha
    epochs: int | None  # after which nothing is mixed

    def shares(self, epoch: int, size: tuple[int, int]) -> list[Any]:
        """Draw what an image has of itself and of its partner: of every pixel (2, H, W), and of the label (2,)."""
        from timm.data.mixup import cutmix_bbox_and_lam

        if self.epochs is not None and epoch >= self.epochs:
            return [_everywhere(1.0, size), _portions(1.0)]
        np.random.rand()  # timm asks first whether a batch is mixed at all, and here each is
        cut = np.random.rand() < 0.5 if self.mixup and self.cutmix else self.cutmix > 0
        alpha = self.cutmix if cut else self.mixup
        own = float(np.random.beta(alpha, alpha))
        if not cut or own == 1:
            return [_everywhere(own, size), _portions(own)]
        (top, bottom, left, right), own = cutmix_bbox_and_lam(size, own)
        pixels = _everywhere(1.0, size)
        pixels[:, top:bottom, left:right] = pixels[::-1, top:bottom, left:right]
        return [pixels, _portions(own)]

    def __call__(self, values: Tensor, shares: Tensor) -> Tensor:
        """Return values (B, ...) mixed with their partners' by shares (2, ...)."""
        own, other = shares.unbind()
        return values * own + values.flip(0) * other


def _portions(own: float) -> Any:
    return np.array((own, 1 - own), np.float32)


def _everywhere(own: float, size: tuple[int, int]) -> Any:
    return np.full((2, *size), _portions(own)[:, None, None])

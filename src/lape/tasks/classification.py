"""Image classification: cross-entropy with smoothing, mixup and cutmix; accuracy in percent."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lape.errors import UsageError
from lape.experiment import Augmentation

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W), labels (B,)


class Classification:
    """Names each image's class."""

    score = "val_accuracy"  # of what `Meter.compute` returns, the one by which the best weights are kept

    def __init__(self, classes: int, augmentation: Augmentation) -> None:
        self.classes = classes
        self.smoothing = augmentation.smoothing or 0.0
        self.mix = None
        if augmentation.mixup or augmentation.cutmix:
            from timm.data.mixup import Mixup

            self.mix = Mixup(
                augmentation.mixup or 0.0,
                augmentation.cutmix or 0.0,
                label_smoothing=self.smoothing,
                num_classes=classes,
            )

    def check(self, samples: int) -> None:
        """Raise UsageError where `samples` images, one process's part of a batch, cannot be trained on."""
        if self.mix and samples % 2:
            raise UsageError(
                f"mixup and cutmix pair the images of a part, and {samples} is odd: use an even number of images "
                "on each process (batch_size / accumulate / processes)."
            )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a training batch, a scalar."""
        images, labels = batch
        if self.mix:
            images, targets = self.mix(images, labels)  # targets (B, classes), smoothed
            return F.cross_entropy(model(images), targets)
        return F.cross_entropy(model(images), labels, label_smoothing=self.smoothing)

    def meter(self) -> "Meter":
        """A new account of validation results."""
        return Meter(self.classes)


class Meter(nn.Module):
    """Accuracy and loss over batches and processes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        from torchmetrics import MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

        self.accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self.loss = MeanMetric()

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Count a batch."""
        images, labels = batch
        logits = model(images).float()
        self.accuracy.update(logits, labels)
        self.loss.update(F.cross_entropy(logits, labels), weight=len(labels))

    def compute(self) -> dict[str, float]:
        """What is known of all batches of all processes: `val_loss`, and `val_accuracy` in percent."""
        result: dict[str, Any] = {"val_loss": self.loss.compute(), "val_accuracy": 100 * self.accuracy.compute()}
        return {name: float(value) for name, value in result.items()}

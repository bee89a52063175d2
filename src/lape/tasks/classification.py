"""Image classification: soft cross-entropy, with or without a teacher; accuracy in percent."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W), labels (B,)

NAMED = 5  # classes of a picture


@dataclass(frozen=True)
class Named:
    """The likeliest classes of a picture, labels (n,) and probabilities (n,), the first first."""

    labels: Tensor
    probabilities: Tensor


class Classification:
    """Names each image's class."""

    score = "val_accuracy"  # of what `Meter.compute` returns, the one by which the best weights are kept
    reported = ("val_accuracy", "val_loss")  # what is kept of a run's end, the score first

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of images (B, C, H, W) and the shares of their classes (B, classes), a scalar."""
        return F.cross_entropy(model(images), targets)

    def meter(self) -> "Meter":
        """A new account of validation results."""
        return Meter(self.classes)

    def predict(self, model: nn.Module, image: Tensor) -> "Named":
        """Return what is likeliest of an image (C, H, W), normalised; the model is in eval mode."""
        probabilities = model(image[None]).float().softmax(1)[0]
        likeliest = probabilities.topk(min(NAMED, self.classes))
        return Named(likeliest.indices, likeliest.values)


class Distillation(Classification):
    """Names each image's class, and by a second head the class that a teacher names: DeiT's hard distillation."""

    def __init__(self, classes: int, teacher: Callable[[Tensor], Tensor]) -> None:
        super().__init__(classes)
        self.teacher = teacher  # images (B, C, H, W) to its answers (B,)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """½ CE(class head, targets) + ½ CE(distillation head, teacher's answers), a scalar."""
        named, learnt = model(images)
        return (F.cross_entropy(named, targets) + F.cross_entropy(learnt, self.teacher(images))) / 2


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

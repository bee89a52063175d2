"""Image classification: cross-entropy of soft targets, with or without a teacher; accuracy in percent."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from lape.data import pipeline
from lape.data.classes import ImageSource
from lape.data.pictures import MODES
from lape.data.preparation import Preparation
from lape.data.sizes import Size
from lape.errors import RunError, UsageError, choose, first_line, lacking
from lape.experiment import Augmentation, Experiment
from lape.fetching import refuse_unreachable, timm_weights
from lape.hosts import find
from lape.models.rebuilding import Build
from lape.models.registry import learns_from
from lape.tasks.answers import LikelyClasses, NamedClasses
from lape.tasks.building import build_model, refuse_foreign
from lape.weights import fill, read

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W), labels (B,)
Loss = Callable[[Tensor, Tensor], Tensor]  # logits (B, classes) and the shares of classes (B, classes) to a scalar


def _cross_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    return F.cross_entropy(logits, shares)


def _binary_cross_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    """Each class for itself, as DeiT-III has it."""
    return F.binary_cross_entropy_with_logits(logits, shares)


CROSS_ENTROPY = "cross-entropy"
LOSSES: dict[str, Loss] = {CROSS_ENTROPY: _cross_entropy, "binary-cross-entropy": _binary_cross_entropy}

SETTINGS = {
    *("train_images", "img_size", "teacher", "loss", "val_split", "skip_unreadable", "balance", "normalisation"),
    *(field.name for field in fields(Augmentation)),
}
LIKELIEST = 5  # classes of a picture that are told


@dataclass(frozen=True)
class Balance:
    """How classes of different size are evened out in training; validation is of the images as they are."""

    weighs: bool = False  # the loss of an image by its class, so that all classes weigh the same
    repeats: bool = False  # images of smaller classes, until all are as large as the largest


NEITHER = Balance()
BALANCES: Mapping[str, Balance] = MappingProxyType({"weights": Balance(weighs=True), "sampling": Balance(repeats=True)})


def _as_the_model_knows(source: ImageSource, cfg: Mapping[str, Any]) -> ImageSource:
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    if len(mean) != source.channels:
        raise UsageError(
            f"normalisation model has {len(mean)} colours, and the images of {source.name} have "
            f"{source.channels}: leave it out."
        )
    return replace(source, mean=mean, std=std)


# From a set, and what timm says of a model, to the set with its mean and deviation.
NORMALISATIONS: Mapping[str, Callable[[ImageSource, Mapping[str, Any]], ImageSource]] = MappingProxyType(
    {"set": lambda source, cfg: source, "model": _as_the_model_knows}
)


class Classification:
    """Names each image's class; in the loss each class may have a weight of its own (classes,)."""

    score = "val_accuracy"  # of what `Meter.compute` returns, the one by which the best weights are kept
    reported = ("val_accuracy", "val_loss")  # what is kept of a run's end, the score first

    def __init__(
        self, classes: int, loss: Loss = _cross_entropy, compile: bool = False, weights: Tensor | None = None
    ) -> None:
        self.classes, self.weights = classes, weights
        self.loss_of_logits: Loss = torch.compile(loss, dynamic=False) if compile else loss

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of images (B, C, H, W) and the shares of their classes (B, classes), a scalar."""
        weighted = targets if self.weights is None else targets * self.weights
        return self.loss_of_logits(model(images), weighted)

    def meter(self, keep: bool = False) -> "ClassificationMeter":
        """A new account of validation results, which with `keep` has what was said of every image."""
        return ClassificationMeter(self.classes, keep)

    def predict(self, model: nn.Module, images: Tensor) -> list[LikelyClasses]:
        """Return what is likeliest of each of some images (B, C, H, W), normalised; the model is in eval mode."""
        return list(map(LikelyClasses, *_likeliest(model(images).float())))


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return labels and probabilities (B, K) of the likeliest classes; of equal logits the first, as in argmax."""
    labels = logits.argsort(dim=1, descending=True, stable=True)[:, :LIKELIEST]
    return labels, logits.softmax(1).gather(1, labels)


class Distillation(Classification):
    """Names each image's class, and by a second head the class that a teacher names: DeiT's hard distillation."""

    def __init__(self, classes: int, teacher: Callable[[Tensor], Tensor]) -> None:
        super().__init__(classes)
        self.teacher = teacher  # images (B, C, H, W) to its answers (B,)

    def loss(self, model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """½ CE(class head, targets) + ½ CE(distillation head, teacher's answers), a scalar."""
        named, learnt = model(images)
        return (F.cross_entropy(named, targets) + F.cross_entropy(learnt, self.teacher(images))) / 2


class ClassificationMeter(nn.Module):
    """Accuracy and loss over batches and processes, and with `keep` what was said of every image."""

    def __init__(self, classes: int, keep: bool = False) -> None:
        super().__init__()
        from torchmetrics import CatMetric, MeanMetric
        from torchmetrics.classification import MulticlassAccuracy

        self.accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False)
        self.loss = MeanMetric()
        self.kept = CatMetric(nan_strategy="disable") if keep else None  # a row of numbers for each image

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Count a batch."""
        images, labels = batch
        logits = model(images).float()
        self.accuracy.update(logits, labels)
        self.loss.update(F.cross_entropy(logits, labels), weight=len(labels))
        if self.kept is not None:
            of_truth = logits.softmax(1).gather(1, labels[:, None])
            self.kept.update(torch.cat([labels[:, None], of_truth, *_likeliest(logits)], dim=1))

    def compute(self) -> dict[str, float]:
        """What is known of all batches of all processes: `val_loss`, and `val_accuracy` in percent."""
        result: dict[str, Any] = {"val_loss": self.loss.compute(), "val_accuracy": 100 * self.accuracy.compute()}
        return {name: float(value) for name, value in result.items()}

    def answers(self) -> NamedClasses | None:
        """What was said of every image, process by process; None where it was not kept."""
        if self.kept is None:
            return None
        rows = self.kept.compute().cpu()
        likeliest, probabilities = rows[:, 2:].chunk(2, dim=1)
        return NamedClasses(rows[:, 0].long(), rows[:, 1], likeliest.long(), probabilities)


class ClassificationWork:
    """Images of one class each, and a classifier.

    `size` is the (H, W) at which the model sees them. Raises UsageError for names, keywords and sizes that do not fit.
    """

    source_type = ImageSource
    one_size = True
    validation_batch: int | None = None

    def __init__(self, experiment: Experiment, source: ImageSource, build: Build) -> None:
        refuse_foreign(experiment, source, SETTINGS)
        self.loss = choose(LOSSES, experiment.loss or CROSS_ENTROPY, "a loss")
        balance = choose(BALANCES, experiment.balance, "a balance of classes") if experiment.balance else NEITHER
        if balance.weighs and self.loss is not LOSSES[CROSS_ENTROPY]:
            raise UsageError(
                f"balance weighs the shares of classes, which {experiment.loss} takes for probabilities: take balance "
                "sampling, or leave out loss."
            )
        normalised = choose(NORMALISATIONS, experiment.normalisation or "set", "a normalisation")
        self.experiment, self.balance = experiment, balance
        self.chosen = pipeline.augmentation(experiment, source)
        self.repeats = self.chosen.repeats or 1
        side = experiment.img_size
        asked = (side, side) if side else source.size
        if learns_from(experiment.model) != source.kind:
            raise UsageError(
                f"{source.name} has a class for each image, and {experiment.model} tells more than that. Take a "
                "classifier, as deit_tiny_patch16_224, or a set for detection or segmentation."
            )
        self.module = module = build_model(experiment, source, build, {"img_size": asked})
        source = normalised(source, getattr(module, "pretrained_cfg", {}))
        self.unrepeated, self.source = source, source.evened() if balance.repeats else source
        self.size = Size(*(asked or module.pretrained_cfg["input_size"][-2:]))
        if patch := self._patch_that_does_not_divide(self.size):
            raise UsageError(
                f"{experiment.model} cuts images into patches of {patch}, which do not divide {self.size} images of "
                f"{source.name}. Give --img_size a multiple of {patch.height}, or another model."
            )
        if (answer := _answer_to_nothing(module.eval(), source.channels, self.size)) != (1, len(source.classes)):
            raise UsageError(
                f"{experiment.model} with model_args {experiment.model_args} is no classifier of "
                f"{len(source.classes)} classes: to an image of {self.size} it answers {answer}. Mend model_args, or "
                "take another model."
            )
        module.train()

    def _patch_that_does_not_divide(self, size: Size) -> Size | None:
        stem: Any = find(self.module)[0].patch_embed
        patch = Size(*getattr(stem, "multiple_of", stem.patch_size))  # a stem may take any size
        return patch if size.height % patch.height or size.width % patch.width else None

    def at(self, size: Size) -> "ClassificationWork":
        """Return the same for images of another size, with a copy of the model: the same weights, other positions.

        The model's own rule brings its positions to the size: learnt tables are resized, fixed ones made anew. Raises
        UsageError for a size that the model does not take.
        """
        if size == self.size:
            return self
        if patch := self._patch_that_does_not_divide(size):
            raise UsageError(f"Its patches of {patch} do not divide images of {size}.")
        there = copy(self)
        there.size, there.module = size, deepcopy(self.module).eval()
        set_size = getattr(find(there.module)[0], "set_input_size", None)  # without it, the forward is asked
        try:
            if set_size is not None:
                set_size(tuple(size))
        except Exception as error:  # whatever a part of timm's stumbles over
            raise lacking(error) or UsageError(first_line(error)) from error
        if (answer := _answer_to_nothing(there.module, self.source.channels, size)) != (1, len(self.source.classes)):
            raise UsageError(f"To an image of {size} it answers {answer}.")
        return there

    def task(self, fabric: Fabric) -> Classification:
        """Create what is learned: the classes, and where there is a teacher its answers.

        Raises UsageError for a student without a distillation head, and for a teacher of other classes or colours.
        """
        experiment, module = self.experiment, self.module
        if experiment.teacher is None:
            if experiment.teacher_weights:
                raise UsageError(f"teacher_weights {experiment.teacher_weights} are of no model: name it by --teacher.")
            classes, weights = len(self.source.classes), self._weights(fabric.device)
            return Classification(classes, self.loss, experiment.compile, weights)
        if experiment.loss is not None:
            raise UsageError(f"A distilled model learns by {CROSS_ENTROPY}: leave out loss {experiment.loss}.")
        if self.balance.weighs:
            raise UsageError(
                f"balance weighs labels, and half of the loss is of what {experiment.teacher} answers: take balance "
                "sampling, or no --teacher."
            )
        if not hasattr(module, "set_distilled_training"):
            raise UsageError(
                f"{experiment.teacher} teaches a distillation head, and {experiment.model} has none. Take a distilled "
                "model, as deit_tiny_distilled_patch16_224, or no --teacher."
            )
        module.set_distilled_training(True)
        teacher = fabric.strategy.precision.convert_module(_teacher(experiment, self.source).to(fabric.device))

        @torch.no_grad()
        def answers(images: Tensor) -> Tensor:
            with fabric.autocast():
                return teacher(fabric.strategy.precision.convert_input(images)).argmax(1)

        return Distillation(len(self.source.classes), answers)

    def _weights(self, device: torch.device) -> Tensor | None:
        """Return the weight of each class (classes,), N / (classes · N of the class): 1 in the mean of all N images."""
        if not self.balance.weighs:
            return None
        counts = torch.bincount(self.source.train.labels, minlength=len(self.source.classes))
        return (counts.sum() / (len(counts) * counts.clamp(min=1))).to(device)

    def resolved(self) -> dict[str, Any]:
        """Return the size of images, the images of each class, and what is done to them in training."""
        counts = self.unrepeated.counts()
        named = {name: {"train": train, "validation": held} for name, (train, held) in counts.items()}
        return {"image_size": list(self.size), "classes": named, "augmentation": asdict(self.chosen)}

    def check(self, report: Callable[[float], None]) -> None:
        """Say what a person should know of the set; its files have been looked at when it was divided."""
        for remark in (*self.source.train.remarks, *self.source.validation.remarks):
            warnings.warn(remark, stacklevel=2)

    def preparation(self, share: int, device: torch.device) -> Preparation:
        """Create what is left to do to a batch of `share` images on the device."""
        return Preparation(self.source, self.chosen, self.size, share, device, self.experiment.compile)

    def training(self) -> Dataset[Any]:
        """The training images, augmented."""
        return pipeline.training_images(self.source, self.experiment, self.size, self.experiment.seed)

    def validation(self) -> Dataset[Any]:
        """The validation images."""
        return pipeline.validation_images(self.source, self.experiment, self.size)

    def input_config(self) -> dict[str, Any]:
        """Return what timm's models say of their images: size, colours, and what validation does with pictures."""
        return {
            "input_size": (self.source.channels, *self.size),
            "mean": self.source.mean,
            "std": self.source.std,
            "interpolation": pipeline.settled(self.chosen),
            "crop_pct": self.chosen.crop_pct,
            "crop_mode": "center",
        }

    def view(self, picture: Image.Image) -> Tensor:
        """Return a picture as validation sees it: an image (C, H, W), normalised."""
        see = pipeline.validation_transform(self.source, self.chosen, self.size)
        return see(picture.convert(MODES[self.source.channels]))

    def answers(self, task: Classification, views: Sequence[Tensor], threshold: float) -> list[LikelyClasses]:
        """Name the classes of pictures, all at once."""
        return task.predict(self.module, torch.stack([*views]))

    def transformer_images(self, count: int, at_once: int) -> tuple[nn.Module, Iterator[Tensor]]:
        """Return the model, and `count` validation images as it takes them, drawn once and for all."""
        some = replace(self.source, validation=self.source.validation.some(count))
        images = pipeline.validation_images(some, self.experiment, self.size)
        batches = pipeline.load(images, pipeline.InOrder(count, at_once), workers=0, pin=False)
        return self.module, (images for images, *_ in batches)


@torch.no_grad()
def _answer_to_nothing(module: nn.Module, channels: int, size: Size) -> tuple[int, ...] | str:
    """Show a model in evaluation mode an empty image; return the shape of its answer, or what it stumbles over."""
    weight = next(module.parameters())
    try:
        answer = module(torch.zeros(1, channels, *size, dtype=weight.dtype, device=weight.device))
    except Exception as error:  # whatever a part of timm's stumbles over
        if lack := lacking(error):
            raise lack from error
        return first_line(error)
    return tuple(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"


def _teacher(experiment: Experiment, source: ImageSource) -> nn.Module:
    """Create the teacher of an experiment, with its weights."""
    import timm

    name, path = str(experiment.teacher), experiment.teacher_weights
    choose(dict.fromkeys(timm.list_models()), name.partition(".")[0], "a model that timm knows")
    asked = len(source.classes)
    if path:
        teacher: Any = timm.create_model(name, num_classes=asked, in_chans=source.channels)
        weights = read(path)
        head = weights.get(f"{teacher.pretrained_cfg['classifier']}.bias")
        _refuse_other_classes(f"{name} in {path}", asked if head is None else len(head), source)
        fill(teacher, weights, path)
        return teacher.eval()
    refuse_unreachable(timm_weights(name), f"timm's weights of {name}", "its path by --teacher_weights")
    try:
        teacher = timm.create_model(name, pretrained=True, in_chans=source.channels)
    except Exception as error:  # the Hub's client and its network library raise kinds of their own
        raise RunError(
            f"timm's weights of {name} could not be downloaded ({first_line(error)}). Give --teacher_weights the file "
            "that holds them."
        ) from error
    _refuse_other_classes(name, teacher.num_classes, source)
    mean, std = (tuple(teacher.pretrained_cfg[part]) for part in ("mean", "std"))
    if (mean, std) != (source.mean, source.std):
        raise UsageError(
            f"A teacher sees its student's images, and {name} knows them with mean {mean} and deviation {std}, where "
            f"those of {source.name} have {source.mean} and {source.std}. Take a teacher that was trained with these."
        )
    return teacher.eval()


def _refuse_other_classes(name: str, classes: int, source: ImageSource) -> None:
    if classes != len(source.classes):
        raise UsageError(
            f"The teacher {name} tells {classes} classes apart, and {source.name} has {len(source.classes)}: take one "
            "that was trained on these."
        )

"""What an experiment does with each kind of set: which models learn from it, what, and how images reach them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from lightning_fabric import Fabric
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from lape.data import dense, pipeline
from lape.data.files import check_files
from lape.data.instances import InstanceSource
from lape.data.maps import MapSource
from lape.data.pipeline import Normalise, reseed, seed_of
from lape.data.preparation import Finishing, Preparation
from lape.data.sources import MODES, ImageSource, PictureSource
from lape.errors import RunError, UsageError, choose, first_line
from lape.experiment import Augmentation, Dense, Experiment, parse
from lape.hosts import find
from lape.models.rebuilding import Build, as_asked
from lape.models.registry import DETECTORS, SEGMENTERS, create_model
from lape.surgery.layers import grid_text
from lape.tasks.classification import Classification, Distillation, Named
from lape.tasks.detection import Detection, Found
from lape.tasks.segmentation import Inference, Segmentation
from lape.weights import fill, read

Source = PictureSource[Any]
Task = Classification | Detection | Segmentation
Answer = Named | Found | Tensor  # a class for the whole, objects, or the class of every pixel (H, W)

# Who says what, in place of the keywords of a model.
SAID = {
    **dict.fromkeys(("num_classes", "in_chans"), "the set"),
    **{"drop_path_rate": "--drop_path", "min_size": "--short_side", "max_size": "--long_side"},
}
# What means something to which kind of set.
OF_CLASSIFICATION = {"train_images", "img_size", "teacher", *(field.name for field in fields(Augmentation))}
OF_DETECTION = {"hflip", "short_side", "long_side", "zoom", "zoom_crop", "crop"}
OF_SEGMENTATION = {
    *("hflip", "short_side", "long_side", "crop", "scale_jitter", "class_cap", "photometric"),
    *("stride", "test_scales", "test_flip"),
}


class ClassificationWork:
    """Images of one class each, and a classifier.

    `size` is the (H, W) at which the model sees them. Raises UsageError for names, keywords and sizes that do not fit.
    """

    validation_batch: int | None = None  # images at once; None: as many as in training

    def __init__(self, experiment: Experiment, source: ImageSource, build: Build) -> None:
        _refuse_foreign(experiment, source, OF_CLASSIFICATION)
        self.experiment, self.source = experiment, source
        self.chosen = pipeline.augmentation(experiment, source)
        self.repeats = self.chosen.repeats or 1
        side = experiment.img_size
        asked = (side, side) if side else source.size
        if experiment.model in DETECTORS | SEGMENTERS:
            raise UsageError(
                f"{source.name} has a class for each image, and {experiment.model} tells more than that. Take a "
                "classifier, as deit_tiny_patch16_224, or a set for detection or segmentation."
            )
        self.module = module = _created(experiment, source, build, {"img_size": asked})
        self.size: tuple[int, int] = asked or tuple(module.pretrained_cfg["input_size"][-2:])
        stem: Any = find(module)[0].patch_embed
        patch = getattr(stem, "multiple_of", stem.patch_size)  # a stem may take any size
        if any(length % step for length, step in zip(self.size, patch, strict=True)):
            raise UsageError(
                f"{experiment.model} cuts images into patches of {patch[0]}x{patch[1]}, which do not divide "
                f"{self.size[0]}x{self.size[1]} images of {source.name}. Give --img_size a multiple of {patch[0]}, or "
                "another model."
            )
        _refuse_another_answer(experiment, module, (1, source.channels, *self.size), len(source.classes))

    def task(self, fabric: Fabric) -> Classification:
        """Create what is learned: the classes, and where there is a teacher its answers.

        Raises UsageError for a student without a distillation head, and for a teacher of other classes or colours.
        """
        experiment, module = self.experiment, self.module
        if experiment.teacher is None:
            if experiment.teacher_weights:
                raise UsageError(f"teacher_weights {experiment.teacher_weights} are of no model: name it by --teacher.")
            return Classification(len(self.source.classes))
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

    def check(self, report: Callable[[float], None]) -> None:
        """Do nothing: there may be a million files, and each is told of when its turn comes."""

    def preparation(self, share: int, device: torch.device) -> Preparation:
        """Create what is left to do to a batch of `share` images on the device."""
        return Preparation(self.source, self.chosen, self.size, share, device)

    def training(self) -> Dataset[Any]:
        """The training images, augmented."""
        return pipeline.training_images(self.source, self.experiment, self.size, self.experiment.seed)

    def validation(self) -> Dataset[Any]:
        """The validation images."""
        return pipeline.validation_images(self.source, self.experiment, self.size)

    def answer(self, task: Classification, picture: Image.Image, device: torch.device, threshold: float) -> Named:
        """Name a picture's class."""
        see = pipeline.validation_transform(self.source, self.chosen, self.size)
        return task.predict(self.module, see(picture.convert(MODES[self.source.channels])).to(device))


class DetectionWork:
    """Pictures with objects, and a detector."""

    validation_batch = 1
    repeats = 1

    def __init__(self, experiment: Experiment, source: InstanceSource, build: Build) -> None:
        _refuse_foreign(experiment, source, OF_DETECTION)
        if experiment.precision.endswith("16-true"):
            raise UsageError(
                f"precision {experiment.precision} would round boxes to whole pixels and more: take bf16-mixed, "
                "16-mixed or 32-true."
            )
        self.experiment, self.source = experiment, source
        self.augmentation, self.dense = filled(experiment, source)
        sides = {"min_size": self.dense.short_side[-1], "max_size": self.dense.long_side}  # pyright: ignore
        if experiment.model not in DETECTORS:
            raise UsageError(
                f"{source.name} is a set for detection, and {experiment.model} is no detector. Take one of "
                f"{', '.join(sorted(DETECTORS))}, or another set."
            )
        self.module = _created(experiment, source, build, sides)
        _refuse_a_table_of_no_patch(experiment, self.module)

    def task(self, fabric: Fabric) -> Detection:
        """Create what is learned: boxes, classes and masks."""
        return Detection()

    def check(self, report: Callable[[float], None]) -> None:
        """Open every file, and tell how many have been; raises RunError for a bad one."""
        check_files(self.source, report)

    def preparation(self, share: int, device: torch.device) -> Finishing:
        """Create what is left to do to a batch on the device."""
        return Finishing(dense.Scaled())

    def training(self) -> Dataset[Any]:
        """The training pictures, augmented."""
        return dense.detection_training(self.source, self.augmentation, self.dense, self.experiment.seed)

    def validation(self) -> Dataset[Any]:
        """The validation pictures."""
        return dense.detection_validation(self.source)

    def answer(self, task: Detection, picture: Image.Image, device: torch.device, threshold: float) -> Found:
        """Find a picture's objects, those with a score of `threshold` or more."""
        return task.predict(self.module, pil_to_tensor(picture).to(device), threshold)


class SegmentationWork:
    """Pictures with a class for every pixel, and a model that tells it."""

    validation_batch = 1
    repeats = 1

    def __init__(self, experiment: Experiment, source: MapSource, build: Build) -> None:
        _refuse_foreign(experiment, source, OF_SEGMENTATION)
        self.experiment, self.source = experiment, source
        self.augmentation, self.dense = filled(experiment, source)
        if experiment.model not in SEGMENTERS:
            raise UsageError(
                f"{source.name} is a set for segmentation, and {experiment.model} does not tell the class of a pixel. "
                f"Take one of {', '.join(sorted(SEGMENTERS))}, or another set."
            )
        self.module = _created(experiment, source, build, {})
        _refuse_a_table_of_no_patch(experiment, self.module)

    def task(self, fabric: Fabric) -> Segmentation:
        """Create what is learned: the class of every pixel."""
        chosen: Any = self.dense
        inference = Inference(
            window=chosen.crop,
            stride=chosen.stride,
            short_side=chosen.short_side[-1],
            long_side=chosen.long_side,
            scales=chosen.test_scales,
            flip=chosen.test_flip,
            multiple=self.module.multiple,
            grow=self.module.grow,
            normalise=Normalise(self.source, fabric.device),
        )
        module = self.module
        return Segmentation(len(self.source.classes), inference, module.loss_weights, module.unlabelled_count)

    def check(self, report: Callable[[float], None]) -> None:
        """Open every file, and tell how many have been; raises RunError for a bad one."""
        check_files(self.source, report)

    def preparation(self, share: int, device: torch.device) -> Finishing:
        """Create what is left to do to a batch on the device."""
        return Finishing(Normalise(self.source, device))

    def training(self) -> Dataset[Any]:
        """The training pictures, augmented."""
        return dense.segmentation_training(self.source, self.augmentation, self.dense, self.experiment.seed)

    def validation(self) -> Dataset[Any]:
        """The validation pictures."""
        return dense.segmentation_validation(self.source)

    def answer(self, task: Segmentation, picture: Image.Image, device: torch.device, threshold: float) -> Tensor:
        """Name the class of every pixel (H, W)."""
        return task.predict(self.module, pil_to_tensor(picture).to(device))


Work = ClassificationWork | DetectionWork | SegmentationWork


@dataclass(frozen=True)
class Kind:
    """One kind of set, and the work on it."""

    source: type[Any]
    work: type[Any]


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "classes": Kind(ImageSource, ClassificationWork),
        "instances": Kind(InstanceSource, DetectionWork),
        "maps": Kind(MapSource, SegmentationWork),
    }
)


def work_of(experiment: Experiment, source: Source, build: Build = as_asked) -> Work:
    """Return the work of an experiment on a set, with its model, which is new, and built so.

    Raises UsageError for a model, a setting or a size that does not go with the set.
    """
    return KINDS[_kind(source)].work(experiment, source, build)


def _kind(source: Source) -> str:
    return next(name for name, kind in KINDS.items() if isinstance(source, kind.source))


def described(source: Source) -> dict[str, Any]:
    """Say in plain values what a checkpoint must know of a set: all but its pictures."""
    facts = {field.name: getattr(source, field.name) for field in fields(source)}
    plain = {key: asdict(value) if isinstance(value, Augmentation | Dense) else value for key, value in facts.items()}
    return {"kind": _kind(source)} | {key: value for key, value in plain.items() if key not in ("train", "validation")}


def without_pictures(described: Mapping[str, Any]) -> Source:
    """Return a set as `described` tells of it: enough to create its model and to ask that something.

    Raises UsageError where that is no set.
    """
    if not isinstance(described, Mapping):
        raise UsageError("a set is told of by names with their values")
    facts = dict(described)
    kind = choose(KINDS, str(facts.pop("kind", None)), "a kind of set")
    for name, section in (("augmentation", Augmentation), ("dense", Dense)):
        if name in facts:
            facts[name] = parse(section, facts[name])
    return parse(kind.source, facts, train=(), validation=())


def filled(experiment: Experiment, source: InstanceSource | MapSource) -> tuple[Augmentation, Dense]:
    """Return what was asked for, filled up with the set's own."""

    def own(default: Any) -> Any:
        names = [field.name for field in fields(default)]
        given = {name: value for name in names if (value := getattr(experiment, name)) is not None}
        return replace(default, **given)

    return own(source.augmentation), own(source.dense)


def _created(experiment: Experiment, source: Source, build: Build, options: Mapping[str, Any]) -> Any:
    """Create the model of an experiment for the classes of a set, from its seed."""
    given = {
        "num_classes": len(source.classes),
        "in_chans": source.channels,
        "drop_path_rate": experiment.drop_path,
        **options,
    }
    joined = {"join": experiment.join, "pe": experiment.pe, "pe_norm": experiment.pe_norm, "start": experiment.start}
    refuse_said(experiment.model_args, {name: SAID.get(name, f"--{name}") for name in given | joined})

    def make() -> nn.Module:
        reseed(seed_of(experiment.seed))
        return create_model(experiment.model, **joined, **given, **experiment.model_args)

    module: Any = build(make, experiment.model_args)
    if experiment.grad_checkpointing:
        module.set_grad_checkpointing(True)
    return module


def refuse_said(model_args: Mapping[str, Any], by_whom: Mapping[str, str]) -> None:
    """Raise UsageError for a keyword of a model that the set, or an option of its own, says."""
    for name, value in model_args.items():
        if name in by_whom:
            raise UsageError(f"model_args says {name} {value}, which {by_whom[name]} says: leave it out.")


def _refuse_a_table_of_no_patch(experiment: Experiment, module: nn.Module) -> None:
    stem: Any = find(module)[0].patch_embed
    if min(stem.grid_size) < 1:
        raise UsageError(
            f"{experiment.model} cuts images into patches of {grid_text(stem.patch_size)}, and with model_args "
            f"{experiment.model_args} its table is for less than one. Give an img_size of at least "
            f"{max(stem.patch_size)}."
        )


@torch.no_grad()
def _refuse_another_answer(experiment: Experiment, module: nn.Module, shape: tuple[int, ...], classes: int) -> None:
    """Show a model an empty image of a shape (1, C, H, W): its keywords may have made it no classifier."""
    try:
        answer = module.eval()(torch.zeros(shape))
        found = tuple(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
    except Exception as error:  # whatever a part of timm's stumbles over
        found = first_line(error)
    if found != (1, classes):
        raise UsageError(
            f"{experiment.model} with model_args {experiment.model_args} is no classifier of {classes} classes: to an "
            f"image of {shape[2]}x{shape[3]} it answers {found}. Mend model_args, or take another model."
        )
    module.train()


def _refuse_foreign(experiment: Experiment, source: Source, known: set[str]) -> None:
    """Refuse settings of images that mean nothing to a kind of set."""
    for name in sorted({*OF_CLASSIFICATION, *(field.name for field in fields(Dense))}):
        if name not in known and (value := getattr(experiment, name)) is not None:
            raise UsageError(f"{name} {value} means nothing for the pictures of {source.name}: leave it out.")


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
    try:
        teacher = timm.create_model(name, pretrained=True, in_chans=source.channels)
    except Exception as error:  # the Hub's client and its network library raise kinds of their own
        raise RunError(
            f"timm's weights of {name} cannot be had ({first_line(error)}). Give --teacher_weights the file that holds "
            "them."
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

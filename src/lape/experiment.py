"""All settings of one training run, as plain numbers and names. Imports no torch: the command line's help reads it."""

import dataclasses
import hashlib
import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as brief
from types import UnionType
from typing import Any, Self, TypeVar, get_args, get_origin

from lape.errors import UsageError
from lape.files.characters import LONE
from lape.names import SchemeNames

Parsed = TypeVar("Parsed")


def parse(kind: type[Parsed], facts: Any, **others: Any) -> Parsed:
    """Return a dataclass from what a file tells of it, and others; raises UsageError for what it cannot hold."""
    hints: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(kind)}  # pyright: ignore
    if not isinstance(facts, Mapping):
        raise UsageError(f"names with their values are expected, not {brief(facts)}")
    for name, value in facts.items():
        if name not in hints:
            raise UsageError(f"there is no {brief(name)}")
        if not _holds(hints[name], value):
            raise UsageError(f"{name} takes {getattr(hints[name], '__name__', hints[name])}, not {brief(value)}")
    if missing := [name for name in _required(kind) if name not in {*facts, *others}]:
        raise UsageError(f"{missing[0]} is missing")
    return kind(**facts, **others)


def _required(kind: Any) -> list[str]:
    nothing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(kind) if f.default is nothing and f.default_factory is nothing]


def _holds(hint: Any, value: Any) -> bool:
    """Whether a value is of a type."""
    kind: Any
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return True
    if kind is UnionType:
        return any(_holds(one, value) for one in inner)
    if kind is float:
        return type(value) in (int, float)
    if kind is int:
        return type(value) is int
    if not isinstance(value, kind):
        return False
    if kind is tuple:
        inner = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(inner) == len(value) and all(map(_holds, inner, value))
    if kind is list:
        return all(_holds(inner[0], item) for item in value)
    return not inner or all(_holds(inner[0], key) and _holds(inner[1], value[key]) for key in value)


# What keywords of timm's begin with that have other files fetched or opened.
FETCHING = ("pretrained", "checkpoint_path", "cache_dir")


MOST_VALUES = 10_000  # of the keywords of a model


def refuse_fetching(model: str, model_args: Mapping[str, Any]) -> None:
    """Raise UsageError for a model that is not plainly a name of timm's registry and numbers, words and lists for it.

    Settings come from files of others too, and what they name is never fetched, opened, imported or called.
    """
    if ":" in model or "/" in model:
        raise UsageError(
            f"model is a name of timm's registry, and {brief(model)} would be fetched or opened. Take its architecture "
            "for model, and its weights for weights."
        )
    for name in model_args:
        if str(name).startswith(FETCHING):
            raise UsageError(f"{name} in model_args would fetch or open other files. Use --weights in its place.")
    waiting: list[Any] = [model_args]
    for _ in range(MOST_VALUES):
        if not waiting:
            break
        part = waiting.pop()
        waiting += part.values() if isinstance(part, Mapping) else part if isinstance(part, list | tuple) else ()
    else:  # a list may stand in itself, or a million times in others
        raise UsageError(f"model_args are at most {MOST_VALUES} values, and these are more. Leave some out.")
    try:
        json.dumps(model_args)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"model_args are what JSON can hold, and {brief(model_args)} is not ({error}).") from error


@dataclass(frozen=True)
class Execution:
    """Where and how a run is computed (these leave its result as it is, up to rounding)

    Args:
        data_dir: Folder of a named set, which is downloaded to it if need be; default: the user's cache.
        workers: Processes that prepare images; default: none for sets held in memory, else one per core, at most 24.
        accelerator: What computes: auto, cpu, cuda, gpu, mps.
        devices: Devices on each machine; torchrun's number of processes takes its place.
        nodes: Machines; torchrun's number takes its place.
        graphs: Replay a compiled step on a CUDA card as CUDA graphs, where nothing forbids it.
        checkpoint_seconds: Shortest time between two checkpoints within an epoch; each epoch ends with one in any case.
    """

    data_dir: Path | None = None
    workers: int | None = None
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    graphs: bool = True
    checkpoint_seconds: float = 60.0


@dataclass(frozen=True)
class Optimisation:
    """Optimisation

    Args:
        epochs: Passes over the training images in which the schedule runs.
        steps: Optimiser steps in place of epochs; the last epoch may then be cut short; default: as epochs say.
        cooldown_epochs: More passes, at the learning rate that the schedule ends with.
        batch_size: Images in one optimiser step, over all processes and accumulated parts.
        accumulate: Parts in which each process computes its share of a batch.
        optimizer: One of timm.optim's names.
        lr: Highest learning rate.
        lr_batch: Batch size that lr is for, scaled in proportion to batch_size; default: lr is used as it is.
        scale_lr_ends: Scale min_lr and warmup_lr as lr is scaled.
        weight_decay: Weight decay; tables, tokens, PE norms, biases and norms are exempt.
        also_decay: Parts of names of exempt parameters that decay too, as in pos_embed,cls_token; biases never do.
        loss: Of classifiers: cross-entropy, or binary-cross-entropy (each class for itself, as in DeiT-III); default:
            cross-entropy.
        momentum: Momentum of those optimisers that have one.
        betas: Adam's two decay rates; default: the optimiser's own.
        layer_decay: Factor of the learning rate from a layer to the one before it; default: one rate for all layers.
        clip_grad: Largest norm of the gradient; default: no clipping.
        schedule: One of timm.scheduler's names (cosine, tanh, step, poly, wsd, constant ...).
        decay_rate: Factor of step and multistep, power of poly.
        decay_milestones: Epochs after which multistep lowers the learning rate.
        min_lr: Learning rate at the end of the schedule.
        warmup_epochs: Epochs in which the learning rate rises; default: a tenth of all.
        warmup_steps: Steps in which it rises; default: as warmup_epochs says.
        warmup_lr: Learning rate of the first step.
        warmup_factor: Warm up by a factor of the schedule, from this up to 1; default: warm up from warmup_lr.
        warmup_prefix: Begin the schedule after the warm-up; otherwise both begin together.
        lr_by_epoch: Change the learning rate from epoch to epoch, not from step to step.
        lr_lag: Epochs by which the learning rate runs behind.
        validate_every: Epochs from one validation to the next; the last epoch always has one.
        sync_batchnorm: Take BatchNorm's statistics over all processes (GPUs alone can).
        ema: Decay of a moving average of the weights; default: no average.
        ema_evaluated: Validate the average, if there is one, and keep it as best; otherwise the weights themselves.
        teacher: A timm model whose answers the second head of a distilled model learns; default: no teacher.
        teacher_weights: File of the teacher's weights; default: timm's pretrained ones.
        precision: Fabric's name of a number format: 32-true, bf16-mixed, 16-mixed, bf16-true, 16-true, 64-true,
            transformer-engine, transformer-engine-float16.
        tf32: Compute float32 products on a CUDA card in TF32, which keeps 10 bits of a fraction; elsewhere in full.
        compile: Compile the model, its loss, and what mixes and normalises a batch, with torch.compile.
        seed: Decides initial weights, order and augmentation.
    """

    epochs: int = 60
    steps: int | None = None
    cooldown_epochs: int = 0
    batch_size: int = 64
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 4e-3
    lr_batch: int | None = None
    scale_lr_ends: bool = False
    weight_decay: float = 0.3
    also_decay: tuple[str, ...] = ()
    loss: str | None = None
    momentum: float = 0.9
    betas: tuple[float, float] | None = None
    layer_decay: float | None = None
    clip_grad: float | None = None
    schedule: str = "cosine"
    decay_rate: float = 0.1
    decay_milestones: tuple[int, ...] = ()
    min_lr: float = 1e-5
    warmup_epochs: float | None = None
    warmup_steps: int | None = None
    warmup_lr: float = 1e-6
    warmup_factor: float | None = None
    warmup_prefix: bool = False
    lr_by_epoch: bool = False
    lr_lag: int = 0
    validate_every: int = 1
    sync_batchnorm: bool = False
    ema: float | None = None
    ema_evaluated: bool = True
    teacher: str | None = None
    teacher_weights: Path | None = None
    precision: str = "32-true"
    tf32: bool = True
    compile: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Augmentation:
    """Augmentation (by timm's names; default: what the set has of its own)

    Args:
        shift: Shift by up to this many pixels each way instead of a random resized crop.
        hflip: Probability of a mirror image.
        vflip: Probability of an image upside down.
        scale: Smallest and largest area of the random resized crop.
        ratio: Smallest and largest aspect of the random resized crop.
        interpolation: How images are resized: bilinear, bicubic, random.
        crop_pct: Share of the validation image that the centre crop keeps.
        auto_augment: timm's policy, as in rand-m9-mstd0.5-inc1, or 3a (DeiT-III's three).
        color_jitter: Strength of colour changes; has no effect beside a policy other than 3a.
        reprob: Probability of random erasing.
        remode: What erased areas are filled with: const, rand, pixel.
        mixup: Mixup's alpha; 0: no mixup.
        cutmix: Cutmix's alpha; 0: no cutmix.
        mix_epochs: Epochs after which mixup and cutmix end; default: they never end.
        smoothing: Label smoothing.
        erase_after_mix: Mix images of whole colour values, then normalise and erase; otherwise erase, then mix.
        repeats: How often an image is shown in a row, each time augmented anew; an epoch stays as long as it was.
        batched: Augment whole batches on the training device; for small images in memory.
    """

    shift: int | None = None
    hflip: float | None = None
    vflip: float | None = None
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    auto_augment: str | None = None
    color_jitter: float | None = None
    reprob: float | None = None
    remode: str | None = None
    mixup: float | None = None
    cutmix: float | None = None
    mix_epochs: int | None = None
    smoothing: float | None = None
    erase_after_mix: bool | None = None
    repeats: int | None = None
    batched: bool | None = None


@dataclass(frozen=True)
class Dense:
    """Detection and segmentation (default: what the set has of its own)

    Args:
        short_side: Shorter sides: in training an image is resized to a random one of these, in validation to the last.
        long_side: Limit of the longer side after that.
        zoom: Detection: shorter sides: every other image is resized to one of these, cropped, and resized again.
        zoom_crop: Detection: smallest and largest side of that crop.
        crop: Side of the last crop: exactly this in segmentation (where windows of validation are as large), at most
            this in detection.
        scale_jitter: Segmentation: smallest and largest factor by which an image is resized beside short_side.
        class_cap: Segmentation: largest share of a crop that one class may have, if ten attempts find such a crop.
        photometric: Segmentation: change brightness, contrast, saturation and hue at random.
        stride: Segmentation: distance from one window to the next in validation.
        test_scales: Segmentation: factors by which an image is resized for validation; predictions are averaged.
        test_flip: Segmentation: average the predictions for an image and its mirror image in validation.
    """

    short_side: tuple[int, ...] | None = None
    long_side: int | None = None
    zoom: tuple[int, ...] | None = None
    zoom_crop: tuple[int, int] | None = None
    crop: int | None = None
    scale_jitter: tuple[float, float] | None = None
    class_cap: float | None = None
    photometric: bool | None = None
    stride: int | None = None
    test_scales: tuple[float, ...] | None = None
    test_flip: bool | None = None


@dataclass(frozen=True)
class DataAndModel:
    """Data and model

    Args:
        recipe: One of the paper's experiments (lape recipes), or a YAML file: its settings replace the defaults;
            default: no recipe.
        data: A named set, as digits or cifar10 (another name is refused with all that there are), or a folder: with a
            folder for each class, in it or in its train/ and valid/, or COCO's or ADE20K's layout. A folder of classes
            has the defaults of the recipe own-pictures/scratch, or with weights own-pictures/finetune. Beside a recipe
            of a named set: the folder of that set.
        val_split: Share of each class that is held out for validation from a folder without valid/; default: 0.2.
        split_seed: Decides which images these are: the same ones for every seed.
        skip_unreadable: Leave out images that cannot be read, and name them; default: they are refused.
        balance: Even out classes of different size: weights weighs their losses, sampling shows the images of smaller
            classes more often; default: neither.
        normalisation: Mean and deviation of colours: set, its own; or model, those of its published weights; default:
            set.
        train_images: Train on this many images only, drawn once: the same ones for every seed; default: all.
        img_size: Side of the images as the model sees them; default: that of the set, for a folder that of the model.
        model: One that lape models lists, as vit_nano_patch4_32, or a VisionTransformer of timm's.
        model_args: More keywords for timm.create_model.
        weights: First weights of the vision transformer: a file of lape's, timm's or the authors', or a name of timm's;
            default: random ones.
        join: default, shared, unshared, lape-sharing, lape, pvg, mpvg.
        pe: none; a table: learnable, sinusoidal-1d, sinusoidal-2d, fourier; a bias: relative, relative-layernorm,
            alibi-2d, lookhere-180, lookhere-90, lookhere-45; a rotation: rope-axial, rope-mixed, rope-dinov3,
            rope-dinov3-max, rope-dinov3-min; a convolution: peg, peg-5; or a sum in that order, as
            learnable+rope-mixed.
        pe_norm: What normalises the position embedding of a layer: layernorm (LaPE's own), or what stands in
            its place in Table 8.
        start: fresh; or preserve: with weights of the default join the model first computes what it did with that join.
        drop_path: Rate of stochastic depth in the last block.
        grad_checkpointing: Recompute activations in the backward pass to save memory.
    """

    recipe: str | None = None
    data: str = "digits"
    val_split: float | None = None
    split_seed: int = 0
    skip_unreadable: bool | None = None
    balance: str | None = None
    normalisation: str | None = None
    train_images: int | None = None
    img_size: int | None = None
    model: str = "vit_nano_patch2_8"
    model_args: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    join: str = "lape"
    pe: str = "learnable"
    pe_norm: str = "layernorm"
    start: str = "fresh"
    drop_path: float = 0.1
    grad_checkpointing: bool = False

    @property
    def names(self) -> SchemeNames:
        """What is asked of the model's positions."""
        return SchemeNames(self.join, self.pe, self.pe_norm, self.start)


# Where numbers mean something.
LIMITS: tuple[tuple[str, Callable[[float, float], bool], int, tuple[str, ...]], ...] = (
    (
        "at least",
        operator.ge,
        0,
        (
            *(
                "seed",
                "split_seed",
                "cooldown_epochs",
                "warmup_epochs",
                "warmup_steps",
                "lr_lag",
                "workers",
                "checkpoint_seconds",
            ),
            *("lr", "min_lr", "warmup_lr", "weight_decay", "momentum", "betas", "ema", "drop_path"),
            *("shift", "hflip", "vflip", "reprob", "color_jitter", "mixup", "cutmix", "smoothing"),
        ),
    ),
    (
        "at least",
        operator.ge,
        1,
        (
            *("epochs", "steps", "validate_every", "batch_size", "accumulate", "lr_batch", "mix_epochs", "repeats"),
            *("devices", "nodes", "train_images", "img_size"),
            *("short_side", "long_side", "zoom", "zoom_crop", "crop", "stride"),
        ),
    ),
    (
        "above",
        operator.gt,
        0,
        (
            *("scale", "ratio", "scale_jitter", "test_scales", "crop_pct", "class_cap", "val_split"),
            *("clip_grad", "layer_decay", "decay_rate", "warmup_factor"),
        ),
    ),
    (
        "at most",
        operator.le,
        1,
        ("hflip", "vflip", "reprob", "crop_pct", "class_cap", "layer_decay", "warmup_factor"),
    ),
    ("at most", operator.le, 1024, ("workers", "devices", "nodes")),
    ("below", operator.lt, 1, ("momentum", "betas", "ema", "smoothing", "drop_path", "val_split")),
)
RANGES = ("scale", "ratio", "zoom_crop", "scale_jitter")


@dataclass(frozen=True)
class Experiment(Execution, Optimisation, Dense, Augmentation, DataAndModel):
    """One training run; the defaults were found for the digits, with the default join and a learnable table."""

    def __post_init__(self) -> None:
        refuse_fetching(self.model, self.model_args)
        for name, value in vars(self).items():
            if isinstance(value, str | Path) and LONE.search(str(value)):
                raise UsageError(f"{name} is Unicode text, and {str(value)!r} is not. Rename what it names.")
            if any(isinstance(number, float) and not math.isfinite(number) for number in _several(value)):
                raise UsageError(f"{name} is finite, not {value}.")
        for words, holds, limit, names in LIMITS:
            for name in names:
                for number in _several(getattr(self, name)):
                    if number is not None and not holds(number, limit):
                        raise UsageError(f"{name} must be {words} {limit}, not {number}.")
        if self.steps and self.cooldown_epochs:
            raise UsageError(f"steps {self.steps} are all of a run: leave out cooldown_epochs {self.cooldown_epochs}.")
        for name in RANGES:
            value = getattr(self, name)
            if value is not None and value[0] > value[1]:
                raise UsageError(f"{name} is a smallest and a largest value, not {value[0]} and {value[1]}: swap them.")

    def all_steps(self, epoch: int) -> int:
        """Return the optimiser steps of the run, of which an epoch has so many."""
        return self.steps or (self.epochs + self.cooldown_epochs) * epoch

    def settings(self) -> dict[str, Any]:
        """Every setting, as JSON can hold it."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The experiment of `settings()`, or of a part of it; raises UsageError for what is no setting."""
        if not isinstance(settings, Mapping):
            raise UsageError(f"settings are names with their values, not {brief(settings)}")
        lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
        path_fields = [f.name for f in dataclasses.fields(cls) if f.type == Path | None]
        paths = {name: Path(value) for name in path_fields if isinstance(value := settings.get(name), str)}
        return parse(cls, {**settings, **lists, **paths})

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result: two runs with equal identities are the same experiment."""
        place = {f.name for f in dataclasses.fields(Execution)} | {"recipe"}
        return {name: value for name, value in self.settings().items() if name not in place}

    def fingerprint(self) -> str:
        """A short name of what is not as by default, the same in every process, and where settings are added later."""
        usual = type(self)().identity()
        chosen = {name: value for name, value in self.identity().items() if value != usual[name]}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def _several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


SECTIONS = (DataAndModel, Augmentation, Dense, Optimisation, Execution)

"""All settings of one training run, as plain numbers and names. Imports no torch: the command line's help reads it."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from lape.errors import UsageError


@dataclass(frozen=True)
class Place:
    """Where and how a run is computed (these leave its result as it is, up to rounding)

    Args:
        data_dir: Where a named set lies, or is downloaded to; nothing: the cache of the user.
        workers: Processes that prepare images; nothing: none for sets held in memory, else one a core, at most 8.
        accelerator: What computes: auto, cpu, cuda, gpu, mps.
        devices: Devices on each machine; under torchrun its number of processes stands instead.
        nodes: Machines; under torchrun its own number.
        checkpoint_seconds: Least time between two checkpoints inside an epoch; each epoch ends with one anyway.
    """

    data_dir: Path | None = None
    workers: int | None = None
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    checkpoint_seconds: float = 60.0


@dataclass(frozen=True)
class Optimisation:
    """Optimisation

    Args:
        epochs: Passes over the training images.
        batch_size: Images in one optimiser step, over all processes and accumulated parts.
        accumulate: Parts in which each process computes its share of a batch.
        optimizer: One of timm.optim's names.
        lr: Highest learning rate, used as given.
        weight_decay: Weight decay; tables, PE norms, biases and norms are exempt.
        momentum: Momentum of those optimisers that have one.
        betas: Adam's two decay rates; nothing: the optimiser's own.
        layer_decay: Factor of the learning rate from a layer to the one before it; nothing: none.
        clip_grad: Largest norm of the gradient; nothing: no clipping.
        schedule: One of timm.scheduler's names (cosine, tanh, step, poly, wsd, constant ...).
        min_lr: Learning rate at the end of the schedule.
        warmup_epochs: Epochs in which the learning rate rises; nothing: a tenth of all.
        warmup_lr: Learning rate of the first step.
        ema: Decay of an average of the weights, which is then what is validated and kept as best; nothing: none.
        precision: Fabric's name of a number format: 32-true, bf16-mixed, 16-mixed, 64-true ...
        compile: Compile the model with torch.compile.
        seed: Decides initial weights, order and augmentation.
    """

    epochs: int = 30
    batch_size: int = 32
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 3e-3
    weight_decay: float = 0.3
    momentum: float = 0.9
    betas: tuple[float, float] | None = None
    layer_decay: float | None = None
    clip_grad: float | None = None
    schedule: str = "cosine"
    min_lr: float = 1e-5
    warmup_epochs: float | None = None
    warmup_lr: float = 1e-6
    ema: float | None = None
    precision: str = "32-true"
    compile: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Augmentation:
    """Augmentation (by timm's names; nothing: the set's own default)

    Args:
        shift: Shift by up to this many pixels each way instead of a random resized crop.
        hflip: Probability of a mirror image.
        vflip: Probability of an image upside down.
        scale: Smallest and largest area of the random resized crop.
        ratio: Smallest and largest aspect of the random resized crop.
        interpolation: How images are resized: bilinear, bicubic, random.
        crop_pct: Share of the validation image that the centre crop keeps.
        auto_augment: timm's policy, as in rand-m9-mstd0.5-inc1.
        color_jitter: Strength of colour changes; without effect beside a policy.
        reprob: Probability of random erasing.
        remode: What erased areas are filled with: const, rand, pixel.
        mixup: Mixup's alpha; 0: no mixup.
        cutmix: Cutmix's alpha; 0: no cutmix.
        smoothing: Label smoothing.
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
    smoothing: float | None = None


@dataclass(frozen=True)
class Subject:
    """Data and model

    Args:
        data: digits, fashion-mnist, cifar10, cifar100, or a folder with train/ and val/ of one folder per class.
        img_size: Side of the images as the model sees them; nothing: the set's own, for a folder the model's.
        model: A timm VisionTransformer, or one of vit_nano_patch2_8, vit_nano_patch4_28, vit_nano_patch4_32,
            vit_nano_patch8_64.
        model_args: More keywords for timm.create_model.
        join: default, shared, unshared, lape-sharing, lape.
        pe: learnable, sinusoidal-1d, sinusoidal-2d, none, relative, relative-layernorm.
        pe_norm: What normalises the position embedding of a layer: layernorm (LaPE's own) or a stand-in.
        drop_path: Rate of stochastic depth in the last block.
        grad_checkpointing: Recompute activations in the backward pass to save memory.
    """

    data: str = "digits"
    img_size: int | None = None
    model: str = "vit_nano_patch2_8"
    model_args: dict[str, Any] = field(default_factory=dict)
    join: str = "lape"
    pe: str = "learnable"
    pe_norm: str = "layernorm"
    drop_path: float = 0.1
    grad_checkpointing: bool = False


LEAST = {"epochs": 1, "batch_size": 1, "accumulate": 1, "devices": 1, "nodes": 1, "workers": 0, "img_size": 1, "lr": 0}


@dataclass(frozen=True)
class Experiment(Place, Augmentation, Optimisation, Subject):
    """One training run; the defaults were found for the digits, with the default join and a learnable table."""

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}, not {value}.")

    def settings(self) -> dict[str, Any]:
        """Every setting, as JSON can hold it."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """The experiment of `settings()`, or of a part of it."""
        lists = {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
        paths = {"data_dir": Path(settings["data_dir"])} if settings.get("data_dir") else {}
        return cls(**{**settings, **lists, **paths})

    def identity(self) -> dict[str, Any]:
        """The settings that decide the result: two runs with equal identities are the same experiment."""
        place = {f.name for f in dataclasses.fields(Place)}
        return {name: value for name, value in self.settings().items() if name not in place}

    def fingerprint(self) -> str:
        """A short name of the identity, the same in every process."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


SECTIONS = (Subject, Augmentation, Optimisation, Place)

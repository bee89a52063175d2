"""What is analysed: trained models or fresh ones, with real images where the analysis looks at some."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lape.analysis import Correlation, Decomposition, correlation, decomposition
from lape.data import pipeline
from lape.data.sources import Source, find_set, set_of
from lape.errors import RunError, UsageError
from lape.experiment import Experiment, refuse_fetching
from lape.files.characters import plural
from lape.method import Grid
from lape.models.registry import create_model
from lape.sharing import exporting, hub
from lape.surgery.operation import positions
from lape.tasks.building import refuse_keywords
from lape.tasks.work import Work, work_of
from lape.training.assembly import launch
from lape.training.checkpoints import BEST
from lape.training.evaluation import load_run
from lape.weights import load_backbone

BATCH = 8  # images at once, in float64


@dataclass(frozen=True)
class Subject:
    """A model to analyse: what a reader calls it, what it was made by, and batches of images for it."""

    name: str
    model: nn.Module
    settings: Mapping[str, Any]
    data: str | None = None
    batches: Iterable[Tensor] = ()


@dataclass(frozen=True)
class Request:
    """Which models are asked for, and what they are to look at; None stands for what was not said.

    `checkpoints` are files or folders, of runs or as `lape.save_pretrained` writes them; without them a fresh `model`
    is made for each of `joins`.
    """

    checkpoints: Sequence[Path] = ()
    model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    joins: Sequence[str] | None = None
    pe: str | None = None
    grid: Grid | None = None
    data: str | None = None
    data_dir: Path | None = None
    img_size: int | None = None
    images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if bool(self.checkpoints) == bool(self.model):
            received = "both" if self.model else "neither"
            raise UsageError(
                f"An analysis is of checkpoints or of a fresh --model; received {received}. Give, say, runs/first, or "
                "--model deit_tiny_patch16_224, and --weights with the file of its weights."
            )
        if self.checkpoints:
            self.refuse("model_args", "weights", "joins", "pe", "img_size", because="a checkpoint has its own")
        refuse_fetching(str(self.model or ""), self.model_args)
        refuse_keywords(self.model_args, {"join": "--joins", "pe": "--pe"})
        if self.images is not None and self.images < 1:
            raise UsageError(f"images must be at least 1, not {self.images}.")

    def joins_or(self, usual: Sequence[str]) -> Sequence[str]:
        """Return the joins that are asked for; weights are of one, the default where no other is named."""
        return self.joins or (("default",) if self.weights else usual)

    def refuse(self, *names: str, because: str) -> None:
        """Raise UsageError for the first of these that was asked for."""
        for name in names:
            if value := getattr(self, name):
                shown = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
                raise UsageError(f"{name} {shown} means nothing here: {because}. Leave it out.")


class Correlating:
    """Position correlation: of tables and norms alone."""

    joins = ("default", "lape")

    def analyse(self, request: Request) -> Iterator[tuple[Subject, Correlation]]:
        """Yield every model that is asked for, and its correlation; raises UsageError as `correlation` does."""
        because = "correlation is of tables and norms, and looks at no image"
        request.refuse("data", "data_dir", "img_size", "images", because=because)
        for subject in self.subjects(request):
            yield subject, correlation(subject.model, request.grid)

    def subjects(self, request: Request) -> Iterator[Subject]:
        """Yield the models, without images."""
        for path in request.checkpoints:
            if exporting.is_saved(path):
                yield _saved(path)
                continue
            run = load_run(path, lambda _, stored: stored, devices=1, nodes=1)
            yield Subject(_name_of(run.path), run.work.module, {"checkpoint": path, **run.experiment.settings()})
        for join in request.joins_or(self.joins) if request.model else ():
            yield _fresh(request, join)


class Decomposing:
    """The weights of equation 6, on validation images."""

    joins = ("default",)
    images = 64

    def analyse(self, request: Request) -> Iterator[tuple[Subject, Decomposition]]:
        """Yield every model that is asked for, and its weights; raises UsageError and RunError as `decomposition`."""
        request.refuse("grid", because="the grid is that of the images")
        for subject in self.subjects(request):
            yield subject, decomposition(subject.model, subject.batches)

    def subjects(self, request: Request) -> Iterator[Subject]:
        """Yield the models with images: of the set that a run validated on, or of the set that is asked for."""
        count = request.images or self.images

        def with_pictures(experiment: Experiment, stored: Source) -> Source:
            place = None if request.data else experiment.data_dir
            place = request.data_dir or place
            if request.data is None:
                return _of_the_same_kind(stored, set_of(replace(experiment, data_dir=place), not place, stored))
            return _of_the_same_kind(stored, find_set(request.data, place, download=not place))

        for path in request.checkpoints:
            if exporting.is_saved(path):
                yield _looking(_saved(path), request, count)
                continue
            run = load_run(path, with_pictures, devices=1, nodes=1)
            yield _with_images(_name_of(run.path), run.work, {"checkpoint": path, **run.experiment.settings()}, count)
        if request.weights:
            for join in request.joins_or(self.joins):
                yield _looking(_fresh(request, join), request, count)
        elif request.model:
            data = request.data or Experiment.data
            source = find_set(data, request.data_dir)
            for join in request.joins or self.joins:
                experiment = Experiment(
                    data=data,
                    data_dir=request.data_dir,
                    img_size=request.img_size,
                    model=request.model,
                    model_args=dict(request.model_args),
                    join=join,
                    pe=request.pe,  # pyright: ignore[reportArgumentType]  # None: the model's own
                    seed=request.seed,
                )
                work = work_of(experiment, source)
                work.module.to(launch(experiment).device)
                pe = positions(work.module).scheme.embedding.name
                yield _with_images(join, work, experiment.settings() | {"pe": pe}, count)


ANALYSES = {"decomposition": Decomposing(), "correlation": Correlating()}


def _saved(path: Path) -> Subject:
    """Return the model of a folder or file that `lape.save_pretrained` wrote, without images."""
    model, _ = exporting.load_model(path)
    return Subject(str(path.resolve()), model, {"checkpoint": path, **hub.configuration(model)})


def _fresh(request: Request, join: str) -> Subject:
    """Make a model, with the first weights that are asked for, and say what did not match; without images."""
    pipeline.reseed(pipeline.seed_of(request.seed))
    sized = {"img_size": request.img_size} if request.img_size else {}
    model = create_model(str(request.model), join=join, pe=request.pe, **sized, **request.model_args)
    if request.weights:
        warnings.warn(str(load_backbone(model, request.weights)), stacklevel=2)
    pe = positions(model).scheme.embedding.name
    settings = {"model": request.model, "model_args": dict(request.model_args), "join": join, "pe": pe}
    return Subject(join, model, settings | {"weights": request.weights, "seed": request.seed})


def _looking(subject: Subject, request: Request, count: int) -> Subject:
    """Return a model with validation images of the set that is asked for, prepared as the model knows images.

    Raises UsageError where no set is asked for, and for one of other images.
    """
    if request.data is None:
        raise UsageError(f"{subject.name} tells of no set to look at. Give --data a set, or a folder of images.")
    source: Any = find_set(request.data, request.data_dir)
    shape, known = _images_of(subject.model, source)
    if (source.kind, source.channels) != ("classes", shape[0]):
        raise UsageError(
            f"{subject.name} looks at images of {plural(shape[0], 'channel')}, each as a whole, and {source.name} has "
            "others. Give --data a set of such images."
        )
    count = min(count, len(source.validation))
    some = replace(known, validation=source.validation.some(count))
    images = pipeline.validation_images(some, some.augmentation, (shape[1], shape[2]))
    batches = pipeline.load(images, pipeline.InOrder(count, BATCH), workers=0, pin=False)
    shown = f"{plural(count, 'validation image')} of {source.name}"
    return replace(subject, data=shown, batches=(batch[0] for batch in batches))


def _images_of(model: nn.Module, source: Any) -> tuple[tuple[int, ...], Any]:
    """Return the shape (C, H, W) of a model's images, and a set whose pictures are prepared as the model knows them.

    Raises RunError for a model that does not tell.
    """
    shape = tuple(hub.random_images(model, 1).shape[1:])
    cfg: Any = model.pretrained_cfg
    try:
        mean, std = (tuple(map(float, cfg[name])) for name in ("mean", "std"))
        prepared = replace(
            source.augmentation, interpolation=str(cfg["interpolation"]), crop_pct=float(cfg["crop_pct"])
        )
        if not (len(mean) == len(std) == shape[0] and min(std) > 0 and 0 < prepared.crop_pct <= 1):
            raise ValueError("mean and deviation are of each channel, and crop_pct is a share")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"The model's configuration does not tell what its images are like ({error}). Mend input_size, mean, std, "
            "interpolation and crop_pct in it."
        ) from error
    return shape, replace(source, mean=mean, std=std, augmentation=prepared)


def _name_of(checkpoint: Path) -> str:
    """Name a run's best weights by its folder, and another file by its path."""
    path = checkpoint.resolve()
    return str(path.parent if path.name == BEST else path)


def _of_the_same_kind(stored: Source, other: Source) -> Source:
    """Return a model's own set with another's validation images; raises UsageError where they are nothing for it."""
    asked, known = ((source.kind, source.channels, source.size) for source in (other, stored))
    if asked[:2] != known[:2] or (asked[2] != known[2] and None not in (asked[2], known[2])):
        raise UsageError(
            f"The model looks at images like those of {stored.name}, and {other.name} has others, in kind, colours or "
            "size. Give --data a set of the same kind."
        )
    return replace(stored, name=other.name, validation=other.validation)  # pyright: ignore[reportArgumentType]


def _with_images(name: str, work: Work, settings: Mapping[str, Any], count: int) -> Subject:
    """Return a model with some of its set's validation images, drawn once and for all, or all where there are fewer."""
    count = min(count, len(work.source.validation))
    model, batches = work.transformer_images(count, BATCH)
    shown = f"{plural(count, 'validation image')} of {work.source.name}"
    return Subject(name, model, settings, shown, batches)

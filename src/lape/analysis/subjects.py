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
from lape.errors import UsageError
from lape.experiment import Experiment, refuse_fetching
from lape.files.characters import plural
from lape.method import Grid
from lape.models.registry import create_model
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

    `checkpoints` are files or run folders; without them a fresh `model` is made for each of `joins`.
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
                "--model deit_tiny_patch16_224."
            )
        if self.checkpoints:
            self.refuse("model_args", "weights", "joins", "pe", "img_size", because="a checkpoint has its own")
        refuse_fetching(str(self.model or ""), self.model_args)
        refuse_keywords(self.model_args, {"join": "--joins", "pe": "--pe"})
        if self.images is not None and self.images < 1:
            raise UsageError(f"images must be at least 1, not {self.images}.")

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
            run = load_run(path, lambda _, stored: stored, devices=1, nodes=1)
            yield Subject(_name_of(run.path), run.work.module, {"checkpoint": path, **run.experiment.settings()})
        for join in (request.joins or self.joins) if request.model else ():
            pipeline.reseed(pipeline.seed_of(request.seed))
            model = create_model(str(request.model), join=join, pe=request.pe, **request.model_args)
            _load_first_weights(model, request)
            pe = positions(model).scheme.embedding.name
            settings = {"model": request.model, "model_args": dict(request.model_args), "join": join, "pe": pe}
            yield Subject(join, model, settings | {"seed": request.seed})


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
            run = load_run(path, with_pictures, devices=1, nodes=1)
            yield _with_images(_name_of(run.path), run.work, {"checkpoint": path, **run.experiment.settings()}, count)
        if request.model:
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
                _load_first_weights(work.module, request)
                work.module.to(launch(experiment).device)
                pe = positions(work.module).scheme.embedding.name
                yield _with_images(join, work, experiment.settings() | {"pe": pe}, count)


ANALYSES = {"decomposition": Decomposing(), "correlation": Correlating()}


def _load_first_weights(model: nn.Module, request: Request) -> None:
    """Give a fresh model the weights that are asked for, and say what did not match."""
    if request.weights:
        warnings.warn(str(load_backbone(model, request.weights)), stacklevel=2)


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

"""One loop for every task: Fabric places it, timm gives its parts, and a checkpoint takes it up exactly.

Whatever is random in a step depends on the seed and the step alone, so a checkpoint needs no generator's state.
"""

import math
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from time import monotonic
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from lape import writing
from lape.data import pipeline
from lape.data.pipeline import Batch, Batches, InOrder, Key, Order, Shares, reseed, seed_of
from lape.data.sources import set_of
from lape.errors import RunError, UsageError, first_line
from lape.experiment import Experiment, told
from lape.models.rebuilding import LikeItsFile, as_asked
from lape.tasks.measures import TITLES
from lape.tasks.work import describe_set, work_of
from lape.training.assembly import launch, optimizer_of, schedule_of
from lape.training.checkpoints import BEST, BROKEN_BATCH, LAST, RESULT, SETTINGS, claim, read, refuse_other, save
from lape.training.curves import Curves
from lape.training.evaluation import evaluate
from lape.training.interruption import Stopped, signals
from lape.training.provenance import provenance
from lape.weights import fill, load_backbone

FIRST_STEPS = 5  # slower than the rest: memory is taken, kernels are chosen
SECONDS_BETWEEN_REPORTS = 0.1


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    epoch: int  # the last one that was validated, 0 before
    epochs: int
    step: int
    steps: int
    images_per_second: float
    seconds_left: float
    train_loss: float  # mean since the last validation, or at it over all since the one before
    measure: str  # what the task is scored by
    score: float | None  # of the last validation, in percent


@dataclass
class State:
    """Where a run is, beside its weights."""

    step: int = 0
    seconds: float = 0.0
    seconds_per_step: float = 0.0
    losses: list[float] = field(default_factory=list)  # of the steps of this epoch
    curve: list[dict[str, Any]] = field(default_factory=list)


def train(
    experiment: Experiment,
    folder: Path,
    *,
    resume: bool = False,
    report: Callable[[Progress], None] | None = None,
    checked: Callable[[float], None] | None = None,
) -> Path:
    """Train one model in a folder of its own and return the path of its `result.json`.

    With `resume` a run that was cut off goes on from its last checkpoint and ends with the weights, bit for bit, that
    it would have had; a finished one is left as it is, and a new one begins. `report` is told how it goes, and before
    that `checked` which share of the files of a set for detection or segmentation has been opened, both in the first
    process alone.

    Raises UsageError for settings that do not fit each other, the data or the folder; RunError for an unreadable
    image, a loss that is not finite, and a full disk; Stopped after SIGINT and SIGTERM.
    """
    fabric = launch(experiment)
    claim(folder, experiment, resume)
    if not (folder / RESULT).exists():
        run = Run(experiment, folder, fabric, resume)
        if resume:
            run.restore()
        if run.state.step == 0:
            run.check(checked or (lambda _: None))
        run.fit(report or (lambda _: None))
    if fabric.world_size > 1:  # gloo aborts where one process leaves while another still speaks
        fabric.barrier()
        torch.distributed.destroy_process_group()
    return folder / RESULT


class Run:
    """Everything that one training run holds."""

    def __init__(self, experiment: Experiment, folder: Path, fabric: Fabric, resume: bool = False) -> None:
        from timm.utils.model_ema import ModelEmaV3

        self.experiment, self.folder, self.fabric = experiment, folder, fabric
        with fabric.rank_zero_first(local=True):  # it may download
            self.source = set_of(experiment, download=not resume)
        self.saved = self._kept() if resume else None
        build = LikeItsFile(self.saved["model"], folder / LAST) if self.saved else as_asked
        self.work: Any = work_of(experiment, self.source, build)
        self.order = Order(
            experiment.seed,
            len(self.source.train),
            experiment.batch_size,
            experiment.accumulate,
            fabric.world_size,
            self.work.repeats,
        )
        self.preparation = self.work.preparation(self.order.share, fabric.device)
        with fabric.rank_zero_first(local=True):
            self.task = self.work.task(fabric)
            begins = experiment.weights if self.saved is None else None
            self.started = load_backbone(self.work.module, begins) if begins else None
        self.module = _synchronised(self.work.module, experiment, fabric)
        optimizer = optimizer_of(experiment, self.module)
        self.set_rates = schedule_of(experiment, optimizer, self.order.steps)
        compiled: Any = torch.compile(self.module) if experiment.compile else self.module
        self.model, self.optimizer = fabric.setup(compiled, optimizer)
        self.ema = ModelEmaV3(self.module, decay=experiment.ema) if experiment.ema else None
        self.judged = self.ema.module if self.ema and experiment.ema_evaluated else self.module
        self.steps = experiment.all_steps(self.order.steps)
        self.state = State()
        self.durations = deque[float](maxlen=1000)

    def check(self, checked: Callable[[float], None]) -> None:
        """Say what the model starts from, and open every file of a dense set once; raises RunError for a bad one."""
        if self.started and self.fabric.is_global_zero:
            warnings.warn(str(self.started), stacklevel=1)
        trouble = ""
        if self.fabric.is_global_zero:
            try:
                self.work.check(checked)
            except RunError as error:
                trouble = str(error)
        if trouble := self.fabric.broadcast(trouble):
            raise RunError(trouble)

    def fit(self, report: Callable[[Progress], None]) -> None:
        """Train from where the state is to the end."""
        self.curves = self._open_folder()
        batches = self._training_batches()
        saved = reported = monotonic()
        self.begun = saved - self.state.seconds
        waiting: tuple[int, Tensor] | None = None
        told_early = False
        prepared = self.preparation.ahead(batches, self.fabric.to_device)
        with closing(batches), signals() as heard:
            for step in range(self.state.step, self.steps):
                top = monotonic()
                news = self._step(step, prepared, stop=bool(heard))
                # Reading a number waits for the device: read the last step's while it computes this one.
                stop = told_early or (waiting is not None and self._settle(*waiting))
                waiting = step, news
                now = monotonic()
                self.durations.append(now - top)
                epoch_ends = (step + 1) % self.order.steps == 0 or step + 1 == self.steps
                if epoch_ends or stop or now - saved > self.experiment.checkpoint_seconds:
                    told_early, waiting = self._settle(*waiting), None
                    # All processes must stop at one step, and their clocks differ: those not here learn of it next.
                    stop = stop or (epoch_ends and told_early)
                    self.state.step = step + 1
                    self._refuse_broken_weights(step)
                    if epoch_ends and self._is_validated(step + 1):
                        self._validate()
                    self._save()
                    saved = monotonic()
                if self.curves and (epoch_ends or now - reported > SECONDS_BETWEEN_REPORTS):
                    reported = now
                    report(self._progress(step + 1))
                if stop:
                    place = f"step {step + 1} of {self.steps} is kept in {self.folder / LAST}"
                    raise Stopped(heard[0] if heard else signal.SIGTERM, f"Stopped: {place}. Go on with --resume.")
        if self.curves:
            writing.write_json(self.folder / RESULT, self._result())

    def _step(self, step: int, batches: Iterator[Batch], stop: bool) -> Tensor:
        """One optimiser step; returns (2,): its loss, and whether any process was told to stop."""
        settings, fabric = self.experiment, self.fabric
        self.set_rates(step)
        total = torch.zeros((), device=fabric.device)
        for part in range(settings.accumulate):
            batch = next(batches)
            seed = seed_of(settings.seed, step, part, fabric.global_rank)
            reseed(seed)
            if fabric.device.type == "cuda":
                torch.cuda.manual_seed(seed)
            images, targets = self.preparation(batch, step // self.order.steps)
            with fabric.no_backward_sync(self.model, enabled=part + 1 < settings.accumulate):
                loss = self.task.loss(self.model, images, targets) / settings.accumulate
                fabric.backward(loss)
            total += loss.detach()
        if settings.clip_grad:
            fabric.clip_gradients(self.model, self.optimizer, max_norm=settings.clip_grad, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.module)
        news = torch.stack([total, total.new_tensor(float(stop))])
        return news if fabric.world_size == 1 else fabric.all_reduce(news, reduce_op="mean")  # pyright: ignore

    def _settle(self, step: int, news: Tensor) -> bool:
        """Take note of the loss of a step; returns whether to stop."""
        loss, stop = news.tolist()
        if not math.isfinite(loss):
            self._refuse(step, f"The loss is {loss}")
        self.state.losses.append(loss)
        return stop > 0

    def _refuse_broken_weights(self, step: int) -> None:
        """Keep weights out of a checkpoint that are not finite: a gradient may overflow where the loss does not."""
        if not torch.nn.utils.get_total_norm(list(self.module.parameters())).isfinite():
            self._refuse(step, "The weights are no longer finite")

    def _refuse(self, step: int, what: str) -> None:
        """Raise RunError for a step that went wrong, naming its images and the last checkpoint before it."""
        epoch, place = divmod(step, self.order.steps)
        indices = self.order.epoch(epoch)[place].flatten() % len(self.source.train)
        titles = [self.source.train.title(index) for index in indices.tolist()]
        last = self.folder / LAST
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint before it"
        listed = self.folder / BROKEN_BATCH
        if not self.fabric.is_global_zero:
            raise SystemExit(1)  # one process tells
        writing.write_json(listed, {"epoch": epoch + 1, "step": step + 1, "images": titles})
        raise RunError(
            f"{what} in epoch {epoch + 1}, step {step + 1}; {kept}. Its images are {', '.join(titles[:3])} ... (all in "
            f"{listed}). Look at them, or start anew with a lower lr or with --clip_grad 1."
        )

    def _is_validated(self, step: int) -> bool:
        return step == self.steps or step // self.order.steps % self.experiment.validate_every == 0

    def _validate(self) -> None:
        """Validate, add a row to the curve, and keep the best weights."""
        state = self.state
        at_once = self.work.validation_batch or self.order.share
        share = InOrder(len(self.source.validation), at_once, self.fabric.global_rank, self.fabric.world_size)
        metrics = evaluate(self.fabric, self.task, self.judged, self._load(self.work.validation(), share))
        row = {
            "epoch": -(-state.step // self.order.steps),
            "step": state.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": fmean(state.losses),
            **metrics,
            "seconds": monotonic() - self.begun,
        }
        score = self.task.score
        best = all(row[score] > earlier[score] for earlier in state.curve)
        state.curve.append(row)
        state.losses.clear()
        if self.curves:
            if best:
                save(self.folder / BEST, self._named() | {"model": self.judged.state_dict(), "metrics": row})
            self.curves.add(state.curve)

    def _named(self) -> dict[str, Any]:
        return {"experiment": self.experiment.settings(), "set": describe_set(self.source)}

    def _save(self) -> None:
        """Replace the last checkpoint."""
        self.state.seconds = monotonic() - self.begun
        durations = list(self.durations)
        self.state.seconds_per_step = median(durations[FIRST_STEPS:] or durations)
        if self.fabric.is_global_zero:
            state = self._named() | {
                "state": asdict(self.state),
                "model": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),  # of the gradient scaler
                "ema": self.ema.module.state_dict() if self.ema else None,
            }
            save(self.folder / LAST, state)

    def _kept(self) -> dict[str, Any] | None:
        """Read the last checkpoint, where there is one."""
        path = self.folder / LAST
        if not path.exists():
            return None
        saved = read(path)
        refuse_other(path, saved["experiment"], self.experiment)
        return saved

    def restore(self) -> None:
        """Take up the last checkpoint, where there is one."""
        path, saved = self.folder / LAST, self.saved
        if saved is None:
            return
        self.saved = None  # it takes as much memory as all that is trained
        fill(self.module, saved["model"], path)
        if self.ema:
            fill(self.ema.module, saved.get("ema") or {}, path)
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.fabric.strategy.precision.load_state_dict(saved["precision"])
            self.state = told(State, saved["state"])
            if not 0 < self.state.step <= self.steps:
                raise UsageError(f"step {self.state.step} is none of {self.steps}")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise RunError(f"{path} cannot be gone on from ({first_line(error)}). Remove it to begin anew.") from error

    def _open_folder(self) -> Curves | None:
        """Claim the folder, once everything that could be refused has been made; None beside the first process."""
        self.fabric.barrier()  # all have looked whether the folder is free
        if not self.fabric.is_global_zero:
            return None
        writing.make_folder(self.folder)
        writing.remove(writing.unfinished(self.folder))
        writing.write_json(self.folder / SETTINGS, self.experiment.settings())
        return Curves(self.folder, self.state.curve)

    def _training_batches(self) -> Batches:
        share = Shares(self.order, self.fabric.global_rank, self.state.step, self.steps)
        return self._load(self.work.training(), share)

    def _load(self, images: Dataset[Any], keys: Sampler[Key]) -> Batches:
        workers = self.experiment.workers
        return pipeline.load(images, keys, workers, pin=self.fabric.device.type == "cuda")

    def _progress(self, step: int) -> Progress:
        state = self.state
        last = state.curve[-1] if state.curve else {}
        passed = monotonic() - self.begun
        return Progress(
            epoch=last.get("epoch", 0),
            epochs=-(-self.steps // self.order.steps),
            step=step,
            steps=self.steps,
            images_per_second=self.experiment.batch_size / fmean(list(self.durations)[-50:]),
            seconds_left=(self.steps - step) * passed / step,
            train_loss=fmean(state.losses) if state.losses else last.get("train_loss", math.nan),
            measure=TITLES[self.task.score],
            score=last.get(self.task.score),
        )

    def _result(self) -> dict[str, Any]:
        curve, score = self.state.curve, self.task.score
        return {
            "experiment": self.experiment.settings(),
            **provenance(),
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
            "steps": self.steps,
            "seconds_per_step": self.state.seconds_per_step,
            "score": score,
            "curve": curve,
            "final": {name: curve[-1][name] for name in self.task.reported},
            "best": max(curve, key=lambda row: row[score]),
        }


def _synchronised(module: nn.Module, experiment: Experiment, fabric: Fabric) -> nn.Module:
    """Let BatchNorm take its statistics over all processes, where that is asked for and there are several."""
    if not experiment.sync_batchnorm or fabric.world_size == 1:
        return module
    if fabric.device.type != "cuda":
        raise UsageError(
            f"sync_batchnorm takes statistics over processes on GPUs, and this one is on {fabric.device.type}: give "
            "--sync_batchnorm false, and each process takes its own."
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)

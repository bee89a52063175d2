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
from functools import reduce
from pathlib import Path
from statistics import fmean, median
from time import monotonic
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from lape.data import pipeline
from lape.data.files import left_out, refusal, unreadable
from lape.data.pipeline import Batch, Batches, InOrder, Key, Order, Shares, reseed, seed_of
from lape.data.sources import Source, set_of
from lape.errors import RunError, UsageError, first_line
from lape.experiment import Experiment, parse
from lape.files import writing
from lape.models.rebuilding import LikeItsFile, as_asked
from lape.surgery.operation import pools_patches
from lape.tasks.measures import TITLES
from lape.tasks.work import describe_set, set_without_pictures, work_of
from lape.training.acceleration import Card, Readout, against_graphs, remarks
from lape.training.assembly import launch, optimizer_of, schedule_of
from lape.training.checkpoints import (
    BEST,
    BROKEN_BATCH,
    LAST,
    RESULT,
    SETTINGS,
    TO_GO_ON,
    experiment_of,
    keep_for_evaluation,
    read,
    refuse_other,
    refuse_other_data,
    save,
)
from lape.training.contents import contents
from lape.training.curves import Curves
from lape.training.evaluation import evaluate
from lape.training.folder import claimed, is_finished
from lape.training.interruption import Stopped, signals
from lape.training.longer import LENGTH, refuse_another_beginning
from lape.training.progress import Progress
from lape.training.provenance import provenance
from lape.training.start import Start, keep, start_of
from lape.training.trackers import Tell, Tracker, tracking
from lape.weights import fill, load_backbone

FIRST_STEPS = 5  # slower than the rest: memory is taken, kernels are chosen
SECONDS_BETWEEN_REPORTS = 0.1


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
    lean: bool = False,
    begun: Callable[[Start], None] | None = None,
    tracker: Tracker | None = None,
) -> Path:
    """Train one model in a folder of its own and return the path of its `result.json`.

    With `resume` a run that was cut off goes on from its last checkpoint and ends with the weights, bit for bit, that
    it would have had; a finished one is left as it is, and a new one begins. More epochs or steps than before may be
    asked for, where the run is then the one that asking at once would have made. `report` is told how it goes, and
    before that `checked` which share of the files of a set has been opened, and `begun` what the run begins with; all
    in the first process alone. With `lean` the last checkpoint of a finished run holds what evaluation needs, and no
    more. A `tracker` (`lape.training.trackers`) is told of the settings and of every row of the curve.

    Raises UsageError for settings that do not fit each other, the data or the folder; RunError for an unreadable
    image, a loss that is not finite, a full disk, a tracker that does not begin, and a folder in which another process
    works; Stopped after SIGINT and SIGTERM.
    """
    fabric = launch(experiment)
    with claimed(folder, experiment, resume, fabric):
        if not is_finished(folder, experiment):
            run = TrainingRun(experiment, folder, fabric, resume, checked or (lambda _: None))
            if resume:
                run.restore()
            if run.state.step == 0:
                run.check(checked or (lambda _: None))
            with tracking(tracker, folder, experiment, run.state.curve, fabric) as tell:
                run.fit(report or (lambda _: None), begun or (lambda _: None), tell)
            if lean and fabric.is_global_zero:
                keep_for_evaluation(folder / LAST)
    if fabric.world_size > 1:  # gloo aborts where one process leaves while another still speaks
        fabric.barrier()
        torch.distributed.destroy_process_group()
    return folder / RESULT


class TrainingRun:
    """Everything that one training run holds."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        fabric: Fabric,
        resume: bool = False,
        checked: Callable[[float], None] = lambda _: None,
    ) -> None:
        from timm.utils.model_ema import ModelEmaV3

        self.experiment, self.folder, self.fabric, self.resume = experiment, folder, fabric, resume
        self.saved = self._last_checkpoint() if resume else None
        source = self._set(resume, checked)
        # The files of a large set are looked at by one process alone.
        self.contents = fabric.broadcast(contents(source) if fabric.is_global_zero else {})
        if self.saved:
            refuse_other_data(folder / LAST, self.saved, self.contents, experiment)
        build = LikeItsFile(self.saved["model"], folder / LAST) if self.saved else as_asked
        self.work: Any = work_of(experiment, source, build)
        self.whole, self.source = source, self.work.source  # of the second, images may stand several times
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
        card = Card.of(fabric.device)
        against = against_graphs(card, experiment, one_size=self.work.one_size, processes=fabric.world_size)
        self.replayed = against is None
        self.remarks = list(remarks(card, experiment, against))
        self.model, self.optimizer = fabric.setup(_compiled(self.module, experiment, self.replayed), optimizer)
        self.ema = ModelEmaV3(self.module, decay=experiment.ema) if experiment.ema else None
        self.judged = self.ema.module if self.ema and experiment.ema_evaluated else self.module
        self.steps = experiment.all_steps(self.order.steps)
        self.one = torch.ones(1, device=fabric.device)
        if self.saved:
            self._refuse_another_beginning(self.saved)
        self.state = State()
        self.durations = deque[float](maxlen=1000)
        self.start = start_of(experiment, self.whole, self.work, self.order.steps)

    def _set(self, resume: bool, checked: Callable[[float], None]) -> Source:
        """Return the set: of a run that goes on as it told of it; of a new one without images that cannot be read."""
        experiment, fabric = self.experiment, self.fabric
        try:
            stored = set_without_pictures(self.saved["set"]) if self.saved else None
        except UsageError as error:
            raise RunError(
                f"{self.folder / LAST} does not tell of its set ({error}). Remove it to begin anew."
            ) from error
        with fabric.rank_zero_first(local=True):  # it may download
            source = set_of(experiment, download=not resume, stored=stored)
        if stored is not None:
            return source
        names: tuple[str, ...] = ()
        trouble = ""
        if fabric.is_global_zero:
            faults = unreadable(source, checked)
            names = tuple(faults)
            if experiment.skip_unreadable:
                for remark in left_out(faults):
                    warnings.warn(remark, stacklevel=1)
            else:
                trouble = refusal(source, faults)
        names, trouble = fabric.broadcast((names, trouble))
        if trouble:
            raise RunError(trouble)
        return source.without(names)

    def check(self, checked: Callable[[float], None]) -> None:
        """Say what the model starts from and how a card computes it, and open every file of a dense set once.

        Raises RunError for a bad one.
        """
        if self.fabric.is_global_zero:
            for remark in [*([self.started] if self.started else []), *self.remarks]:
                warnings.warn(str(remark), stacklevel=1)
        trouble = ""
        if self.fabric.is_global_zero:
            try:
                self.work.check(checked)
            except RunError as error:
                trouble = str(error)
        if trouble := self.fabric.broadcast(trouble):
            raise RunError(trouble)

    def fit(
        self,
        report: Callable[[Progress], None],
        opened: Callable[[Start], None] = lambda _: None,
        tell: Tell = lambda _: None,
    ) -> None:
        """Train from where the state is to the end; `tell` hears of every new row of the curve."""
        self.tell = tell
        self.curves = self._open_folder()
        if self.curves:
            opened(self.start)
        batches = self._training_batches()
        saved = reported = monotonic()
        self.begun, self.noted = saved - self.state.seconds, self.state.step
        prepared = self.preparation.ahead(batches, self.fabric.to_device)
        before: tuple[int, Readout] | None = None  # the last step, and what it returned
        if self._validation_is_missing():
            self._validate_and_save()
        with closing(batches), signals() as heard:
            for step in range(self.state.step, self.steps):
                begun = monotonic()
                news = Readout(self._step(step, prepared, stop=bool(heard)))
                # Reading a number waits for the device: the loss of the step before is read while this one is computed.
                # All processes read it here, and so stop at one step.
                stop = before is not None and self._note_loss(*before)
                before = step, news
                self.durations.append(monotonic() - begun)
                epoch_ends = self._ends_epoch(step + 1)
                if epoch_ends or stop or monotonic() - saved > self.experiment.checkpoint_seconds:
                    # All processes stop at one step. Their clocks differ, so only at the end of an epoch do they all
                    # read this step's news here; the others' turn comes in the next step.
                    stop |= self._note_loss(*before) and epoch_ends
                    self._keep(step + 1)
                    if not stop and self._validation_is_missing():
                        self._validate_and_save()
                    saved = monotonic()
                if self.curves and (epoch_ends or monotonic() - reported > SECONDS_BETWEEN_REPORTS):
                    report(self._progress(step + 1))
                    reported = monotonic()
                if stop:
                    place = f"step {step + 1} of {self.steps} is kept in {self.folder / LAST}"
                    raise Stopped(heard[0] if heard else signal.SIGTERM, f"Stopped: {place}. Go on with --resume.")
        if self.curves:
            writing.write_json(self.folder / RESULT, self._result())

    def _step(self, step: int, batches: Iterator[Batch], stop: bool) -> Tensor:
        """One optimiser step; returns (3,): its loss, and whether any process was told to stop, or overflowed."""
        settings, fabric = self.experiment, self.fabric
        self.set_rates(step)
        losses: list[Tensor] = []
        if self.replayed:
            torch.compiler.cudagraph_mark_step_begin()
        for part in range(settings.accumulate):
            batch = next(batches)
            seed = seed_of(settings.seed, step, part, fabric.global_rank)
            reseed(seed)
            if fabric.device.type == "cuda":
                torch.cuda.manual_seed(seed)
            images, targets = self.preparation(batch, step // self.order.steps)
            with fabric.no_backward_sync(self.model, enabled=part + 1 < settings.accumulate):
                loss = self.task.loss(self.model, images, targets)
                if settings.accumulate > 1:
                    loss = loss / settings.accumulate
                fabric.backward(loss)
            losses.append(loss.detach())
        overflow = self._overflow()
        if settings.clip_grad:
            fabric.clip_gradients(self.model, self.optimizer, max_norm=settings.clip_grad, error_if_nonfinite=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.module)
        total = reduce(torch.add, losses)
        told = torch.full_like(total, stop)  # filled on the device: a copy from the host would wait for it
        news = torch.stack([total, told, overflow[0].to(total)])
        return news if fabric.world_size == 1 else fabric.all_reduce(news, reduce_op="mean")  # pyright: ignore

    def _overflow(self) -> Tensor:
        """Return (1,): 1 where the gradient is not finite, 0 where it is, or where a scaler looks for that itself."""
        device = self.fabric.device
        overflow = torch.zeros(1, device=device)
        if getattr(self.fabric.strategy.precision, "scaler", None) is not None:
            return overflow
        gradients = [value.grad for value in self.module.parameters() if value.grad is not None]
        if device.type in ("cpu", "cuda") and {gradient.dtype for gradient in gradients} == {torch.float32}:
            # The scaler's own look, multiplying by 1: one kernel, and a twentieth of the time of a norm.
            look: Any = torch._amp_foreach_non_finite_check_and_unscale_  # pyright: ignore[reportPrivateImportUsage]
            look(gradients, overflow, self.one)
            return overflow
        return self.one - torch.nn.utils.get_total_norm(gradients, norm_type=math.inf).isfinite().to(overflow)

    def _note_loss(self, step: int, news: Readout) -> bool:
        """Take note of the loss of a step, once; returns whether any process was told to stop."""
        loss, stop, overflow = news.read()
        if not math.isfinite(loss):
            self._refuse(step, f"The loss is {loss}", "" if self.experiment.clip_grad else " or with --clip_grad 1")
        if overflow:
            self._refuse(step, "The gradient is not finite, though the loss is,", self._finer())
        if step == self.noted:
            self.state.losses.append(loss)
            self.noted += 1
        return stop > 0

    def _finer(self) -> str:
        return "" if self.experiment.precision in ("32-true", "64-true") else " or with --precision 32-true"

    def _keep(self, step: int) -> None:
        """Write a checkpoint after so many steps; weights that are not finite never come into one."""
        self.state.step = step
        if not torch.nn.utils.get_total_norm(list(self.module.parameters())).isfinite():
            self._refuse(step - 1, "The weights are no longer finite", self._finer())
        self._save()

    def _refuse(self, step: int, what: str, advice: str) -> None:
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
            f"{listed}). Look at them, or start anew with a lower lr{advice}."
        )

    def _ends_epoch(self, step: int) -> bool:
        return step % self.order.steps == 0 or step == self.steps

    def _validation_is_missing(self) -> bool:
        """Whether the state is that of an epoch's end which is to be validated, and was not yet."""
        step, every = self.state.step, self.experiment.validate_every
        due = step == self.steps or (self._ends_epoch(step) and step // self.order.steps % every == 0)
        return step > 0 and due and all(row.get("step") != step for row in self.state.curve)

    def _validate_and_save(self) -> None:
        """Validate what a checkpoint has kept before, and keep the result: a validation may take longer than a kill."""
        self._validate()
        self._save()

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
                save(self.folder / BEST, self._description() | {"model": self.judged.state_dict(), "metrics": row})
            self.curves.add(state.curve)
            self.tell(row)

    def _description(self) -> dict[str, Any]:
        return {"experiment": self.experiment.settings(), "set": describe_set(self.source), "contents": self.contents}

    def _save(self) -> None:
        """Replace the last checkpoint."""
        self.state.seconds = monotonic() - self.begun
        if durations := list(self.durations):  # there is none where nothing but a validation was left
            self.state.seconds_per_step = median(durations[FIRST_STEPS:] or durations)
        if self.fabric.is_global_zero:
            state = self._description() | {
                "state": asdict(self.state),
                "model": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),  # of the gradient scaler
                "ema": self.ema.module.state_dict() if self.ema else None,
            }
            save(self.folder / LAST, state)

    def _last_checkpoint(self) -> dict[str, Any] | None:
        """Read the last checkpoint, where there is one."""
        path = self.folder / LAST
        if not path.exists():
            return None
        saved = read(path)
        refuse_other(path, saved["experiment"], self.experiment, but=LENGTH)
        if not saved.keys() >= {*TO_GO_ON}:
            raise RunError(
                f"{path} holds weights alone, as lape compare leaves them unless --prune false is given, so the run "
                "cannot be trained longer. Begin anew with another --out."
            )
        return saved

    def _refuse_another_beginning(self, saved: dict[str, Any]) -> None:
        path = self.folder / LAST
        before = experiment_of(saved["experiment"], path)
        done = saved["state"].get("step") if isinstance(saved.get("state"), dict) else None
        if isinstance(done, int):  # else it cannot be taken up, and is told then
            refuse_another_beginning(self.folder, before, self.experiment, self.order.steps, done)

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
            self.state = parse(State, saved["state"])
            if not 0 < self.state.step <= self.steps:
                raise UsageError(f"step {self.state.step} is none of {self.steps}")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise RunError(f"{path} cannot be continued ({first_line(error)}). Remove it to begin anew.") from error

    def _open_folder(self) -> Curves | None:
        """Tidy the folder, once everything that could be refused has been made; None beside the first process."""
        self.fabric.barrier()
        if not self.fabric.is_global_zero:
            return None
        writing.remove(writing.unfinished(self.folder))
        writing.write_json(self.folder / SETTINGS, self.experiment.settings())
        if (self.folder / RESULT).exists():  # of a shorter run, which this one goes on with
            writing.remove([self.folder / RESULT])
        self.command = keep(self.folder, self.start, self.resume)
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
            "contents": self.contents,
            **provenance(),
            "command": self.command,  # that began the run, whichever ended it
            "resolved": self.start.resolved,
            "pools_patches": pools_patches(self.module),
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
            "steps": self.steps,
            "seconds_per_step": self.state.seconds_per_step,
            "score": score,
            "curve": curve,
            "final": {name: curve[-1][name] for name in self.task.reported},
            "best": max(curve, key=lambda row: row[score]),
        }


def _compiled(module: nn.Module, experiment: Experiment, replayed: bool) -> Any:
    """Compile a module where that is asked for; `replayed`: its kernels are recorded as CUDA graphs."""
    if not experiment.compile:
        return module
    return torch.compile(module, mode="reduce-overhead", dynamic=False) if replayed else torch.compile(module)


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

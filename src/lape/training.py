"""One loop for every task: Fabric places it, timm gives its parts, and a checkpoint takes it up exactly.

Whatever is random in a step depends on the seed and the step alone, so a checkpoint needs no generator's state.
"""

import math
import signal
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
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from lape.assembly import launch, model_of, optimizer_of, schedule_of, task_of
from lape.checkpoints import BEST, LAST, RESULT, SETTINGS, claim, load, read, refuse_other, save, write_json
from lape.curves import Curves
from lape.data import pipeline
from lape.data.pipeline import Batch, Batches, Key, Order, Shares, Whole, reseed, seed_of
from lape.data.preparation import Preparation
from lape.data.sources import find
from lape.errors import RunError
from lape.evaluation import evaluate
from lape.experiment import Experiment
from lape.interruption import Stopped, signals
from lape.provenance import provenance

FIRST_STEPS = 5  # slower than the rest: memory is taken, kernels are chosen
SECONDS_BETWEEN_REPORTS = 0.1


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    epoch: int  # finished ones
    epochs: int
    step: int
    steps: int
    images_per_second: float
    seconds_left: float
    train_loss: float  # mean over this epoch so far, or over the last one at its end
    val_accuracy: float | None  # of the last finished epoch, in percent


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
) -> Path:
    """Train one model in a folder of its own and return the path of its `result.json`.

    With `resume` a run that was cut off goes on from its last checkpoint and ends with the weights, bit for bit, that
    it would have had; a finished one is left as it is, and a new one begins. `report` is told how it goes, in the
    first process alone.

    Raises UsageError for settings that do not fit each other, the data or the folder; RunError for an unreadable
    image, a loss that is not finite, and a full disk; Stopped after SIGINT and SIGTERM.
    """
    fabric = launch(experiment)
    claim(folder, experiment, resume)
    if not (folder / RESULT).exists():
        run = Run(experiment, folder, fabric)
        if resume:
            run.restore()
        run.fit(report or (lambda _: None))
    if fabric.world_size > 1:  # gloo aborts where one process leaves while another still speaks
        fabric.barrier()
        torch.distributed.destroy_process_group()
    return folder / RESULT


class Run:
    """Everything that one training run holds."""

    def __init__(self, experiment: Experiment, folder: Path, fabric: Fabric) -> None:
        from timm.utils.model_ema import ModelEmaV3

        self.experiment, self.folder, self.fabric = experiment, folder, fabric
        with fabric.rank_zero_first(local=True):  # it may download
            self.source = find(experiment.data, experiment.data_dir)
        chosen = pipeline.augmentation(experiment, self.source)
        self.order = Order(
            experiment.seed,
            len(self.source.train),
            experiment.batch_size,
            experiment.accumulate,
            fabric.world_size,
            chosen.repeats or 1,
        )
        self.module, self.size = model_of(experiment, self.source)
        self.preparation = Preparation(self.source, chosen, self.size, self.order.share, fabric.device)
        with fabric.rank_zero_first(local=True):
            self.task = task_of(experiment, self.source, self.module, fabric)
        optimizer = optimizer_of(experiment, self.module)
        self.set_rates = schedule_of(experiment, optimizer, self.order.steps)
        compiled: Any = torch.compile(self.module) if experiment.compile else self.module
        self.model, self.optimizer = fabric.setup(compiled, optimizer)
        self.ema = ModelEmaV3(self.module, decay=experiment.ema) if experiment.ema else None
        self.judged = self.ema.module if self.ema and experiment.ema_evaluated else self.module
        self.steps = experiment.passes * self.order.steps
        self.state = State()
        self.durations = deque[float](maxlen=1000)

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
                epoch_ends = (step + 1) % self.order.steps == 0
                if epoch_ends or stop or now - saved > self.experiment.checkpoint_seconds:
                    told_early, waiting = self._settle(*waiting), None
                    # All processes must stop at one step, and their clocks differ: those not here learn of it next.
                    stop = stop or (epoch_ends and told_early)
                    self.state.step = step + 1
                    self._refuse_broken_weights(step)
                    if epoch_ends:
                        self._end_epoch()
                    self._save()
                    saved = monotonic()
                if self.curves and (epoch_ends or now - reported > SECONDS_BETWEEN_REPORTS):
                    reported = now
                    report(self._progress(step + 1))
                if stop:
                    place = f"step {step + 1} of {self.steps} is kept in {self.folder / LAST}"
                    raise Stopped(heard[0] if heard else signal.SIGTERM, f"Stopped: {place}. Go on with --resume.")
        if self.curves:
            self.curves.close()
            write_json(self.folder / RESULT, self._result())

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
        listed = self.folder / "broken-batch.json"
        if not self.fabric.is_global_zero:
            raise SystemExit(1)  # one process tells
        write_json(listed, {"epoch": epoch + 1, "step": step + 1, "images": titles})
        raise RunError(
            f"{what} in epoch {epoch + 1}, step {step + 1}; {kept}. Its images are {', '.join(titles[:3])} ... (all in "
            f"{listed}). Look at them, or start anew with a lower lr or with --clip_grad 1."
        )

    def _end_epoch(self) -> None:
        """Validate, add a row to the curve, and keep the best weights."""
        state, settings = self.state, self.experiment
        images = pipeline.validation_images(self.source, settings, self.size)
        share = Whole(len(self.source.validation), self.order.share, self.fabric.global_rank, self.fabric.world_size)
        metrics = evaluate(self.fabric, self.task, self.judged, self._load(images, share))
        row = {
            "epoch": state.step // self.order.steps,
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
        return {"experiment": self.experiment.settings(), "classes": list(self.source.classes)}

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

    def restore(self) -> None:
        """Take up the last checkpoint, where there is one."""
        path = self.folder / LAST
        if not path.exists():
            return
        saved = read(path)
        refuse_other(path, saved["experiment"], self.experiment)
        load(self.module, saved["model"], path)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.fabric.strategy.precision.load_state_dict(saved["precision"])
        if self.ema:
            load(self.ema.module, saved["ema"], path)
        self.state = State(**saved["state"])

    def _open_folder(self) -> Curves | None:
        """Claim the folder, once everything that could be refused has been made; None beside the first process."""
        self.fabric.barrier()  # all have looked whether the folder is free
        if not self.fabric.is_global_zero:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob(".*.part"):  # of a process that was killed while it wrote
            part.unlink()
        write_json(self.folder / SETTINGS, self.experiment.settings())
        return Curves(self.folder, self.state.curve)

    def _training_batches(self) -> Batches:
        settings = self.experiment
        images = pipeline.training_images(self.source, settings, self.size, settings.seed)
        return self._load(images, Shares(self.order, self.fabric.global_rank, self.state.step, self.steps))

    def _load(self, images: Dataset[Any], keys: Sampler[Key]) -> Batches:
        workers = self.experiment.workers
        return pipeline.load(images, keys, workers, pin=self.fabric.device.type == "cuda")

    def _progress(self, step: int) -> Progress:
        state = self.state
        last = state.curve[-1] if state.curve else {}
        passed = monotonic() - self.begun
        return Progress(
            epoch=len(state.curve),
            epochs=self.experiment.passes,
            step=step,
            steps=self.steps,
            images_per_second=self.experiment.batch_size / fmean(list(self.durations)[-50:]),
            seconds_left=(self.steps - step) * passed / step,
            train_loss=fmean(state.losses) if state.losses else last.get("train_loss", math.nan),
            val_accuracy=last.get("val_accuracy"),
        )

    def _result(self) -> dict[str, Any]:
        curve, score = self.state.curve, self.task.score
        kept = ("val_accuracy", "val_loss")
        return {
            "experiment": self.experiment.settings(),
            **provenance(),
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
            "steps": self.steps,
            "seconds_per_step": self.state.seconds_per_step,
            "curve": curve,
            "final": {name: curve[-1][name] for name in kept},
            "best": max(curve, key=lambda row: row[score]),
        }

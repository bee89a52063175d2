"""What a join costs: parameters, FLOPs, memory and time beside the untouched model (the paper's Tables 5 and 6)."""

import copy
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lape.errors import UsageError, choose
from lape.hosts import find

Step = Callable[[], None]
# What products of matrices are computed in, by Fabric's names; None: as the weights are.
PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class Cost:
    """One way of joining: what is counted of it, and its times of every round in seconds."""

    name: str  # "untouched", "and again", a join, or "lape, folded"
    parameters: int  # of the whole model
    flops: int  # of one image's forward: products of matrices, twice their multiplications
    training_bytes: int | None  # at the peak of a training step; None where nothing learns
    training: list[float] = field(default_factory=list)  # of a training step, one number a round
    inference: list[float] = field(default_factory=list)  # of an inference step, one number a round


@dataclass(frozen=True)
class Ratio:
    """A time divided by that of the base in the same round: the median over rounds, and the quartiles around it."""

    median: float  # of the ratios
    low: float  # their lower quartile
    high: float  # their upper quartile

    def __str__(self) -> str:
        return f"{self.median:.3f}±{(self.high - self.low) / 2:.3f}"


def ratio(times: Sequence[float], base: Sequence[float]) -> Ratio:
    """Return the median, over rounds, of one model's times divided by another's, with its quartiles.

    Args:
        times: Seconds of each round, at least 2.
        base: Seconds of the same rounds.

    Example:
        >>> from lape.analysis.cost import ratio
        >>> print(ratio([2.0, 2.2, 2.1], [1.0, 1.1, 1.0]))
        2.000±0.025
    """
    low, median, high = statistics.quantiles((a / b for a, b in zip(times, base, strict=True)), method="inclusive")
    return Ratio(median, low, high)


def measure(
    model: str,
    joins: Sequence[str] | None,
    batch_size: int,
    rounds: int,
    device: str = "cpu",
    precision: str = "32-true",
    compile: bool = False,
    report: Callable[[float], None] = lambda fraction: None,
    pe: Sequence[str] | None = None,
) -> list[Cost]:
    """Measure the untouched model twice, then each join, then folded LaPE, all in turn in every round (`lape cost`).

    With position embeddings, each is measured with each join that means something with it, and nothing is folded.

    Of a detector or a segmenter the parameters are counted; FLOPs, memory and times are those of the transformer
    inside, for images of its table's size.

    Args:
        model: A name that `lape.create_model` takes.
        joins: Names of joins; None stands for all that have a meaning with the model's own table, and beside `pe` for
            "default" and "lape".
        batch_size: Images a step.
        rounds: At least 2; one more warms up and is not counted.
        device: As torch names it.
        precision: "32-true", "bf16-mixed" or "16-mixed"; for times alone.
        compile: Whether to compile the models; for times alone.
        report: Called with the fraction that is done.
        pe: Names of position embeddings; None stands for the model's own.

    Raises:
        UsageError: For a name that does not exist, and for a position embedding that no join means something with.

    Example:
        >>> from lape.analysis.cost import measure
        >>> costs = measure("vit_nano_patch2_8", ["lape"], batch_size=2, rounds=2)
        >>> [cost.name for cost in costs]
        ['untouched', 'and again', 'lape', 'lape, folded']
        >>> costs[2].parameters - costs[0].parameters  # 2·D in each of six layers
        576
    """
    low = choose(PRECISIONS, precision, "a precision whose cost is measured")
    if rounds < 2 or batch_size < 1:
        raise UsageError(f"A cost needs at least 2 rounds of 1 image; received {rounds} of {batch_size}.")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device={device!r} is not available on this machine ({reason}). Use 'cpu'.") from error
    contenders = dict(_contenders(model, joins, pe))
    costs = {name: counted(name, contender, batch_size) for name, contender in contenders.items()}
    inside = {name: find(contender)[0].to(device) for name, contender in contenders.items()}
    images = torch.randn(batch_size, *_shape(next(iter(inside.values()))), device=device)
    models: dict[str, Any] = {name: torch.compile(one) if compile else one for name, one in inside.items()}
    steps = {name: _steps(transformer, images, low) for name, transformer in models.items()}
    with _compiled(2 * len(steps)) if compile else nullcontext():
        for turn in range(rounds + 1):  # the first one warms up, and compiles
            for place in range(len(steps)):
                name = list(steps)[(turn + place) % len(steps)]  # nobody is always after the same neighbour
                train, infer = steps[name]
                seconds = [_seconds(step, device) for step in (train, infer) if step is not None]
                if turn:
                    costs[name].inference.append(seconds[-1])
                    costs[name].training += seconds[:-1]
                report((turn + (place + 1) / len(steps)) / (rounds + 1))
    return list(costs.values())


def _compiled(graphs: int) -> AbstractContextManager[object]:
    """Let torch make so many graphs of one class: beyond its usual eight it would compute uncompiled."""
    import torch._dynamo

    torch.compiler.reset()
    return torch._dynamo.config.patch(recompile_limit=graphs, fail_on_recompile_limit_hit=True)


def _contenders(
    model: str, joins: Sequence[str] | None, embeddings: Sequence[str] | None
) -> Iterator[tuple[str, nn.Module]]:
    import timm

    from lape.models.registry import create_model
    from lape.surgery.operation import apply, fold, joins_of, remove

    untouched = remove(create_model(model, join="default"))  # refuses names that are not known
    yield "untouched", untouched
    yield "and again", copy.deepcopy(untouched)
    if embeddings is not None:
        for join, pe in _sound(joins or ("default", "lape"), embeddings):
            yield f"{join} × {pe}", apply(timm.create_model(model), join, pe)
        return
    for join in joins or joins_of(untouched):
        yield join, apply(timm.create_model(model), join)
    yield "lape, folded", fold(apply(timm.create_model(model)))


def _sound(joins: Sequence[str], embeddings: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the pairs that mean something; raise UsageError for an embedding that is in none."""
    from lape.method import scheme

    for pe in embeddings:
        refused: list[UsageError] = []
        for join in joins:
            try:
                scheme(join, pe)
            except UsageError as error:
                refused.append(error)
            else:
                yield join, pe
        if len(refused) == len(joins):
            raise refused[0]


def _shape(transformer: Any) -> tuple[int, int, int]:
    """Return (C, H, W) of the images that a transformer's table is for."""
    return transformer.in_chans, *transformer.patch_embed.img_size


def counted(name: str, model: nn.Module, batch_size: int) -> Cost:
    """Return a model's cost but for its times: counted on the meta device, where nothing is computed.

    Parameters are those of the whole model, FLOPs those of one image's forward, and memory is that of a training step
    of `batch_size` images.
    """
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.utils.flop_counter import FlopCounterMode

    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = copy.deepcopy(find(model)[0]).to("meta")
    image = torch.empty(1, *_shape(model), device="meta")
    with FlopCounterMode(display=False) as counter:
        model.eval()(image)
    cost = Cost(name, parameters, counter.get_total_flops(), None)
    for frozen in (parameter for parameter in model.parameters() if not parameter.requires_grad):
        # The tracker hooks itself to the gradient of every parameter, and these have none.
        frozen.register_hook = lambda hook: RemovableHandle(OrderedDict())
        frozen.register_post_accumulate_grad_hook = frozen.register_hook
    train, _ = _steps(model, image.expand(batch_size, -1, -1, -1))
    if train is not None:
        train()  # the optimiser's state is there from its first step
        tracker = MemTracker()
        tracker.track_external(model, train.optimizer)
        with tracker:  # the fused optimiser of a real step takes no memory beyond its state
            train.gradients()
        cost.training_bytes = max(part["Total"] for part in tracker.get_tracker_snapshot("peak").values())
    return cost


@dataclass
class TrainingStep:
    """One step: forward, backward, AdamW (fused, as in training; the meta device has none)."""

    model: nn.Module
    images: Tensor
    low: torch.dtype | None

    def __post_init__(self) -> None:
        learns = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learns, fused=self.images.device.type != "meta")

    def __call__(self) -> None:
        self.gradients()
        self.optimizer.step()

    def gradients(self) -> None:
        """Compute them anew: forward and backward."""
        self.model.train()
        self.optimizer.zero_grad()
        with _autocast(self.images, self.low):
            logits = self.model(self.images)
            if isinstance(logits, Tensor):
                loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))
            else:  # maps (B, D, H, W) of several sizes
                loss = torch.stack([features.square().mean() for features in logits]).sum()
        loss.backward()


def _autocast(images: Tensor, low: torch.dtype | None) -> AbstractContextManager[object]:
    return torch.autocast(images.device.type, low) if low else nullcontext()


def _steps(model: nn.Module, images: Tensor, low: torch.dtype | None = None) -> tuple[TrainingStep | None, Step]:
    def infer() -> None:
        model.eval()
        with torch.inference_mode(), _autocast(images, low):
            model(images)

    learns = any(parameter.requires_grad for parameter in model.parameters())
    return TrainingStep(model, images, low) if learns else None, infer


def _seconds(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start

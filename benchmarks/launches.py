"""How many kernels a training step would launch on a card, by part: what it dispatches, counted on a CPU.

python benchmarks/launches.py --out benchmarks/results/launches

A compiled step is counted as the compiler plans it for a CPU: the kernels that it generates are called, and do nothing.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from jsonargparse import auto_cli
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.output_code import CompiledFxGraph
from torch.utils._python_dispatch import TorchDispatchMode
from turns import file

from lape import recipes
from lape.data.batched import Augmenter, Crop, Policy
from lape.data.classes import PHOTOGRAPHS, ImageSource, Split
from lape.data.erasing import Erasing
from lape.data.mixing import Mixing
from lape.data.preparation import ROWS_ON_A_CARD, Preparation
from lape.experiment import Experiment
from lape.tasks.classification import Classification
from lape.training import loop
from lape.training.assembly import launch

HOST, AUGMENTATION, FINISH, REST = "the host's own", "augmentation", "mixing and normalising", "the rest"
GRAPH, INSIDE = "graph", "inside: "
BATCH = 128  # images of a step of the recipe
ROWS = 512  # images that are augmented at once here: enough for each operation to have some
NO_KERNELS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::_unsafe_view"}

# Whose work a part of the step is; what is inside another is its own part. The host chooses, and loads.
OWNERS: tuple[tuple[Any, str, str], ...] = (
    (Crop, "__call__", HOST),
    (Policy, "chosen", HOST),
    (Augmenter, "__call__", AUGMENTATION),
    (Preparation, "__call__", FINISH),
    (Classification, "loss", "forward"),
    (Fabric, "backward", "backward"),
    (torch.amp.GradScaler, "scale", "scaler"),
    (torch.amp.GradScaler, "step", "scaler"),
    (torch.amp.GradScaler, "update", "scaler"),
    (torch.optim.AdamW, "step", "optimiser"),
)
# The compiler does not see who owns these: compiled, they are one with mixing and normalising.
OWNERS_EAGER = ((Erasing, "__call__", "erasing"), (Mixing, "__call__", FINISH))


class Launches(TorchDispatchMode):
    """Counts what is dispatched, by part and operation; views and memory that is only taken launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.prefix = HOST, ""
        self.counts: dict[str, Counter[str]] = {}

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let the compiler work as if nobody counted: what its code calls is counted when it runs."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if not func.is_view and name not in NO_KERNELS and not name.startswith("profiler::"):
            self.add(name)
        return func(*args, **(kwargs or {}))

    def add(self, name: str) -> None:
        """Count one more."""
        if self.part != HOST:
            self.counts.setdefault(self.part, Counter())[self.prefix + name] += 1

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count what follows for a part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same, and is counted for a part."""

        def counted(*args: Any, **options: Any) -> Any:
            with self.within(part):
                return function(*args, **options)

        return counted

    def generated(self, *args: Any) -> None:
        """Stand for a kernel of the compiler's: it is counted, and all that it is given becomes 0."""
        self.add("generated")
        with self.within(HOST):
            for value in args:
                if isinstance(value, torch.Tensor):
                    value.detach().zero_()


def made_up() -> ImageSource:
    """A set like CIFAR-10, of noise."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (2048, 3, 32, 32), generator=generator, dtype=torch.uint8)
    split = Split("training", pictures, torch.arange(2048) % 10)
    classes = tuple(map(str, range(10)))
    return ImageSource("noise", classes, 3, (32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), split, split, PHOTOGRAPHS)


def fabric_of(experiment: Experiment) -> Fabric:
    """Start Fabric on the CPU; of float16 it must be handed its part ready-made there."""
    if experiment.precision != "16-mixed":
        return launch(experiment)
    scaler = torch.amp.GradScaler("cpu")
    return Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])


def recipe(precision: str, compile: bool) -> Experiment:
    """CCT-7/3x1 on CIFAR-10 with the erasing of other recipes, narrow and in small batches: nothing depends on that.

    Attention drops nothing: with dropout a CPU computes it in parts, and a card does not.
    """
    experiment = recipes.load("cifar10/cct_7_3x1_32").experiment()
    narrow = {"embed_dim": 32, "num_heads": 2, "attn_drop_rate": 0.0}
    return replace(experiment, precision=precision, compile=compile, reprob=0.25, batch_size=16, model_args=narrow)


def count(experiment: Experiment) -> Mapping[str, Counter[str]]:
    """Return what a step dispatches, by part and operation.

    The samples of several steps are augmented at once, with as many operations for many as for few: a step's share is
    that of a batch of 128 on a card. What the compiler made of the model is `GRAPH`, and what that calls `INSIDE` it.
    """
    experiment = replace(experiment, accelerator="cpu", workers=0)
    launches = Launches()
    call = CompiledFxGraph.__call__

    def called(graph: CompiledFxGraph, inputs: Any) -> Any:
        if launches.part == FINISH:
            return call(graph, inputs)
        launches.add(GRAPH)
        launches.prefix = INSIDE
        try:
            return call(graph, inputs)
        finally:
            launches.prefix = ""

    with TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(patch.object(loop, "set_of", lambda *_, **__: made_up()))
        stack.enter_context(patch.object(AsyncCompile, "cpp_pybinding", lambda *_, **__: launches.generated))
        stack.enter_context(patch.object(CompiledFxGraph, "__call__", called))
        for owner, name, part in (*OWNERS, *(() if experiment.compile else OWNERS_EAGER)):
            stack.enter_context(patch.object(owner, name, launches.of(part, getattr(owner, name))))
        run = loop.TrainingRun(experiment, Path(folder) / "run", fabric_of(experiment))
        run.preparation.at_once = ROWS // experiment.batch_size

        def handed() -> Iterator[Any]:
            batches = run._training_batches()
            loaded = iter(lambda: launches.of(HOST, next)(batches), None)
            prepared = run.preparation.ahead(loaded, run.fabric.to_device)
            return iter(lambda: launches.of(AUGMENTATION, next)(prepared), None)

        run._step(0, handed(), stop=False)  # the optimiser takes its memory, and the compiler compiles
        launches.counts.clear()
        with launches, launches.within(REST):
            run._step(1, handed(), stop=False)
    shares = {AUGMENTATION: ROWS_ON_A_CARD // BATCH}
    return {
        part: Counter({name: number / shares.get(part, 1) for name, number in counts.items()})  # pyright: ignore
        for part, counts in launches.counts.items()
    }


def without(found: Mapping[str, Counter[str]], left_out: Callable[[str], bool]) -> dict[str, Counter[str]]:
    """Leave out some operations."""
    return {
        part: Counter({name: number for name, number in counts.items() if not left_out(name)})
        for part, counts in found.items()
    }


def main(out: Path | None = None) -> None:
    """Print the table

    Args:
        out: Folder for table.md and table.json.
    """
    compiled = count(recipe("bf16-mixed", compile=True))
    ways = {
        "16-mixed": count(recipe("16-mixed", compile=False)),
        "bf16-mixed": count(recipe("bf16-mixed", compile=False)),
        "compiled": without(compiled, lambda name: name == GRAPH),
        "replayed": without(compiled, lambda name: name.startswith(INSIDE)),
    }
    parts = list(dict.fromkeys(part for found in ways.values() for part in found))
    rows = [["part", *ways]]
    for part in parts:
        rows.append([part, *(f"{found[part].total():.0f}" if part in found else "" for found in ways.values())])
    rows.append(["all", *(f"{sum(counts.total() for counts in found.values()):.0f}" for found in ways.values())])
    said = (
        f"What a training step of CCT-7/3x1's recipe dispatches at batch {BATCH}, with LaPE and erasing, but for views "
        "and empty memory; on a card each is at least one kernel. Compiled, in bf16-mixed: kernels that the compiler "
        "generates for a CPU, and what it calls. Replayed: the same, where the forward and the backward of the model "
        "are one launch each, as CUDA graphs are, and those of the loss too. Attention is without dropout, one "
        "operation as on a card; the width is 32, the batch 16, and no operation depends on them. Augmentation: a "
        f"step's share on a card, where {ROWS_ON_A_CARD} images are augmented at once. Copies to a card, two of a "
        "batch and up to four of what was drawn, are not counted."
    )
    operations = {name: {part: dict(found.most_common()) for part, found in way.items()} for name, way in ways.items()}
    file(out, rows, said, operations=operations)


if __name__ == "__main__":
    auto_cli(main)

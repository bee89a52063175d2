"""How many models of timm and transformers take a join, and why the others are refused: every class, without weights.

Models are built on the device "meta". Of timm every name is built; of transformers every public class of a transformer
or of its towers, with the defaults of its configuration and two layers.

python benchmarks/hosts.py --out benchmarks/results/hosts
"""

import re
import signal
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from torch import nn
from turns import file

import lape
from lape.errors import UsageError
from lape.hosts.registry import TABLE

TAKES, TAKES_ONE, REFUSED = "takes a join", "takes a join with a table that it is given", "refused"
TOWERS = re.compile(r"(Vision|Text|Audio|Image)?(Model|Transformer|Encoder|Backbone)$")
SECONDS = 60  # for one class of transformers


def main(out: Path | None = None, libraries: tuple[str, ...] = ("timm", "transformers")) -> None:
    """Print a table for each library

    Args:
        out: Folder; in it a folder for each library, with table.md and table.json.
        libraries: timm, transformers.
    """
    warnings.simplefilter("ignore")
    for library in libraries:
        _file(library, out and out / library)


def _file(library: str, out: Path | None) -> None:
    outcomes: dict[tuple[str, str], list[str]] = defaultdict(list)
    with_table: set[str] = set()
    for name, model in BUILT[library]():
        if _has_table(model):
            with_table.add(name)
        outcomes[type(model).__name__, _outcome(model)].append(name)
    rows = [["class", "what becomes of it", "names", "with a table"]]
    counts: Counter[str] = Counter()
    for (kind, outcome), names in sorted(outcomes.items(), key=lambda one: (one[0][1].startswith(REFUSED), one)):
        tables = len(with_table.intersection(names))
        counts["names"] += len(names)
        counts[outcome.partition(":")[0]] += len(names)
        if outcome.startswith(REFUSED):
            counts["refused, with a table"] += tables
        rows.append([kind, outcome, str(len(names)), str(tables)])
    version = import_module(library).__version__
    said = (
        f"{library} {version}, {counts['names']} names: {counts[TAKES]} take a join, {counts[TAKES_ONE]} take one with "
        f"a table that they are given, {counts[REFUSED]} are refused, {counts['refused, with a table']} of them with a "
        "parameter that is called a position."
    )
    classes = [{"class": kind, "outcome": outcome, "names": names} for (kind, outcome), names in outcomes.items()]
    file(out, rows, said, words=2, library=library, version=version, counts=counts, classes=classes)


def _outcome(model: nn.Module) -> str:
    """Return what becomes of a model."""
    try:
        lape.apply(model)
        return TAKES
    except UsageError as error:
        refused = error
    if re.search(r"pe='none' has no table|pe='learnable'", str(refused)):
        with suppress(UsageError):
            lape.apply(model, pe="learnable")
            return TAKES_ONE
    _, _, reason = str(refused).partition("cannot carry a join: ")
    what, _, _ = re.sub(
        r" (Which models can|Blocks that can|lape.apply takes).*", "", reason or str(refused)
    ).partition("\n")
    return f"{REFUSED}: {re.sub(r' [(][^ ]*[.][^ ]*[)]', '', what)}"  # the table's path is another in every class


def _of_timm() -> Iterator[tuple[str, nn.Module]]:
    """Build every model that timm has a name for, but this project's."""
    for name in track(timm.list_models(), "timm", console=Console(stderr=True)):
        with torch.device("meta"):
            model = timm.create_model(name)
        if type(model).__module__.startswith("timm."):
            yield name, model


def _of_transformers() -> Iterator[tuple[str, nn.Module]]:
    """Build every public class of transformers' that is a transformer or a tower of one."""
    import transformers

    names = [name for name in dir(transformers) if TOWERS.search(name)]
    for name in track(names, "transformers", console=Console(stderr=True)):
        model = None
        with suppress(Exception), _at_most(SECONDS):  # what needs another library, or cannot be built without values
            kind: Any = getattr(transformers, name)
            if not issubclass(kind, transformers.PreTrainedModel) or kind.config_class is None:
                continue
            config = kind.config_class()
            for shorter in (config, *vars(config).values()):
                if hasattr(shorter, "num_hidden_layers"):
                    shorter.num_hidden_layers = 2
            with torch.device("meta"):
                model = kind(config)
        if model is not None and _has_table(model):
            yield name, model


def _has_table(model: nn.Module) -> bool:
    return any(TABLE.search(name) and value.ndim > 1 for name, value in model.named_parameters())


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


BUILT: dict[str, Callable[[], Iterator[tuple[str, nn.Module]]]] = {"timm": _of_timm, "transformers": _of_transformers}


if __name__ == "__main__":
    auto_cli(main)

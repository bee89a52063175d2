"""The models of the paper and their small relatives: what each counts, and which joins mean something in it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from lape.errors import UsageError


@dataclass(frozen=True)
class Entry:
    """One model as its authors made it."""

    name: str
    paper: str | None  # its name in the paper's Tables 1 and 2
    parameters: int
    flops: int  # of one image's forward, an addition and a multiplication counted as two
    size: tuple[int, int]
    joins: tuple[str, ...]  # that mean something with its own position embedding


def names(patterns: Sequence[str]) -> list[str]:
    """Return the models whose name fits one of the patterns, or all; UsageError where there is none."""
    from lape.models import MODELS

    found = [name for name in MODELS if not patterns or any(fnmatch(name, f"*{pattern}*") for pattern in patterns)]
    if not found:
        raise UsageError(f"No model's name has {' or '.join(patterns)} in it. `lape models` lists all {len(MODELS)}.")
    return found


def entries(chosen: Iterable[str]) -> Iterator[Entry]:
    """Describe models by name; nothing is computed, they are created without weights."""
    import timm
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lape.models import PAPER
    from lape.surgery import joins_of

    for name in chosen:
        with torch.device("meta"):
            model = timm.create_model(name).eval()
            stem: Any = model.patch_embed
            size: tuple[int, int] = stem.img_size
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, *size))
            parameters = sum(parameter.numel() for parameter in model.parameters())
        yield Entry(name, PAPER.get(name), parameters, counter.get_total_flops(), size, joins_of(model))

"""The models of the paper and their small relatives: what each counts, and which joins mean something in it."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from lape.errors import RunError, UsageError


@dataclass(frozen=True)
class Entry:
    """One model as its authors made it."""

    name: str
    paper: str | None  # its name in the paper's tables
    parameters: int | None  # None where a package that it is made with is not installed
    flops: int | None  # of one image's forward, an addition and a multiplication counted as two; None in a detector
    size: tuple[int, int]
    joins: tuple[str, ...]  # that mean something with its own position embedding


def names(patterns: Sequence[str]) -> list[str]:
    """Return the models whose name fits one of the patterns, or all; UsageError where there is none."""
    from lape.models.registry import MODELS

    names = [name for name in MODELS if not patterns or any(fnmatch(name, f"*{pattern}*") for pattern in patterns)]
    if not names:
        raise UsageError(f"No model's name has {' or '.join(patterns)} in it. `lape models` lists all {len(MODELS)}.")
    return names


def entries(chosen: Iterable[str]) -> Iterator[Entry]:
    """Describe models by name; nothing is computed, they are created without weights."""
    import timm
    import torch
    from timm.models import get_pretrained_cfg
    from torch.utils.flop_counter import FlopCounterMode

    from lape.models.mask_rcnn import MaskRCNN
    from lape.models.registry import PAPER
    from lape.surgery.operation import joins_of

    for name in chosen:
        cfg: Any = get_pretrained_cfg(name)
        size, paper = cfg.input_size[1:], PAPER.get(name)
        with torch.device("meta"):
            try:
                model = timm.create_model(name).eval()
            except (UsageError, RunError):
                yield Entry(name, paper, None, None, size, ())
                continue
            flops = None
            if not isinstance(model, MaskRCNN):  # whose work depends on what it finds
                with FlopCounterMode(display=False) as counter:
                    model(torch.empty(1, *cfg.input_size))
                flops = counter.get_total_flops()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        yield Entry(name, paper, parameters, flops, size, joins_of(model))

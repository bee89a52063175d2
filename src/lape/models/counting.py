"""What the models of the paper and their small relatives count, and which joins mean something in them."""

from collections.abc import Iterable, Iterator
from typing import Any

from lape.catalogue import Entry
from lape.errors import RunError, UsageError


def count(chosen: Iterable[str]) -> Iterator[Entry]:
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

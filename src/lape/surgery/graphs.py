"""Compiled graphs and sharded models: what has to be so before a model is operated on."""

import gc
import sys

import torch
from torch import nn

from lape.errors import UsageError

ORDER = "Call lape.apply on the plain model first, then wrap or shard it, then make the optimiser."


def forget_graphs() -> None:
    """Have every compiled function compiled anew: graphs of before do not see hooks that came since."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def refuse_parallel(model: nn.Module, vit: nn.Module) -> None:
    """Raise UsageError for a model that is inside of DDP or FSDP already.

    They have taken note of its parameters: those that a join adds would not be averaged over the processes, or sharded.
    """
    for part in model.modules():
        if (name := type(part).__name__) in ("DistributedDataParallel", "FullyShardedDataParallel"):
            raise UsageError(f"This model is inside {name}, which would not know what lape.apply adds. {ORDER}")
    if not torch.distributed.is_available():
        return
    if any(type(parameter).__name__ in ("DTensor", "FlatParameter") for parameter in vit.parameters()):
        raise UsageError(f"This model is sharded, and what lape.apply adds would not be. {ORDER}")
    if torch.distributed.is_initialized() and (wrapper := _wrapper_around(vit)) is not None:
        raise UsageError(
            f"This model is inside {type(wrapper).__name__}, which would not know what lape.apply adds. {ORDER}"
        )


def _wrapper_around(vit: nn.Module) -> nn.Module | None:
    """Return the DDP module that a model is inside of; a model does not know of it."""
    from torch.nn.parallel import DistributedDataParallel

    wrappers = (one for one in gc.get_objects() if type(one) is DistributedDataParallel)
    return next((one for one in wrappers if any(part is vit for part in one.modules())), None)

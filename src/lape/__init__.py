"""LaPE (Yu et al., ICCV 2023): a LayerNorm of its own for the position embedding, in every layer of a ViT.

model = timm.create_model("deit_small_patch16_224")
lape.apply(model)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lape.registration import register

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lape.errors import RunError, UsageError
    from lape.hosts import Block, Host
    from lape.models.registry import create_model
    from lape.report.doctor import check
    from lape.sharing.exporting import export
    from lape.sharing.hub import Known, from_pretrained, push_to_hub, save_pretrained
    from lape.sharing.positions import load_positions, save_positions
    from lape.sharing.transformers import joined
    from lape.surgery.operation import apply, fold, ladder, remove, set_fused
    from lape.weights import load_backbone, load_weights

# Each name is looked up when it is first used, so that `import lape` and `lape --help` load no torch.
_ROOMS = {
    "Block": "hosts",
    "Host": "hosts",
    "Known": "sharing.hub",
    "RunError": "errors",
    "UsageError": "errors",
    "apply": "surgery.operation",
    "check": "report.doctor",
    "create_model": "models.registry",
    "export": "sharing.exporting",
    "fold": "surgery.operation",
    "from_pretrained": "sharing.hub",
    "joined": "sharing.transformers",
    "ladder": "surgery.operation",
    "load_backbone": "weights",
    "load_positions": "sharing.positions",
    "load_weights": "weights",
    "push_to_hub": "sharing.hub",
    "remove": "surgery.operation",
    "save_positions": "sharing.positions",
    "save_pretrained": "sharing.hub",
    "set_fused": "surgery.operation",
}

__all__ = [
    "Block",
    "Host",
    "Known",
    "RunError",
    "UsageError",
    "apply",
    "check",
    "create_model",
    "export",
    "fold",
    "from_pretrained",
    "joined",
    "ladder",
    "load_backbone",
    "load_positions",
    "load_weights",
    "push_to_hub",
    "remove",
    "save_positions",
    "save_pretrained",
    "set_fused",
]


register()


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'lape' has no attribute {name!r}")
    return getattr(import_module(f"lape.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

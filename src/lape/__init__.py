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
    from lape.exporting import export
    from lape.hosts import Block, Host
    from lape.hub import Known, from_pretrained, push_to_hub, save_pretrained
    from lape.surgery import apply, create_model, fold, ladder, remove
    from lape.weights import load_backbone, load_weights

# Each name is looked up when it is first used, so that `import lape` and `lape --help` load no torch.
_ROOMS = {
    "Block": "hosts",
    "Host": "hosts",
    "Known": "hub",
    "RunError": "errors",
    "UsageError": "errors",
    "apply": "surgery",
    "create_model": "surgery",
    "export": "exporting",
    "fold": "surgery",
    "from_pretrained": "hub",
    "ladder": "surgery",
    "load_backbone": "weights",
    "load_weights": "weights",
    "push_to_hub": "hub",
    "remove": "surgery",
    "save_pretrained": "hub",
}

__all__ = [
    "Block",
    "Host",
    "Known",
    "RunError",
    "UsageError",
    "apply",
    "create_model",
    "export",
    "fold",
    "from_pretrained",
    "ladder",
    "load_backbone",
    "load_weights",
    "push_to_hub",
    "remove",
    "save_pretrained",
]


register()


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'lape' has no attribute {name!r}")
    return getattr(import_module(f"lape.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

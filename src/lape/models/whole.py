"""A model around one vision transformer: what timm asks of a model is answered by the transformer inside of it."""

import re
from typing import Any

from torch import nn

from lape.hosts import find


class Whole(nn.Module):
    """Base of models that hold one vision transformer."""

    def _inside(self) -> tuple[str, Any]:
        """Return the transformer and the path that its parameters' names begin with."""
        vit, _ = find(self)
        (path,) = (name for name, part in self.named_modules() if part is vit)
        return f"{path}.", vit

    def no_weight_decay(self) -> set[str]:
        """Return the names of tables and tokens."""
        path, vit = self._inside()
        return {f"{path}{name}" for name in vit.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Make the transformer's blocks compute their activations again in the backward pass, or keep them."""
        self._inside()[1].set_grad_checkpointing(enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return timm's levels of layer-wise decay: the embedding of patches, each block, and last all the rest."""
        path = re.escape(self._inside()[0])
        return {"stem": rf"{path}(?:cls_token|pos_embed|patch_embed)\b", "blocks": rf"{path}blocks\.(\d+)\."}

"""How a forward ends: what joins the output of the norm behind the last block (MPVG)."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lape.surgery.hooks import refuse_other_tokens
from lape.surgery.positions import Positions


@dataclass
class BehindFinalNorm:
    """A hook that adds the last rung to the output (B, N, D) of the norm behind the last block."""

    positions: Positions

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        positions = self.positions
        forward = positions.forwards.find(positions.depth, inputs[0])
        attention = positions.final(forward).attention
        if attention is None:
            return output
        if isinstance(output, fx.Proxy):  # (B, N, D): others are not traced
            return output + attention
        if torch.compiler.is_compiling():
            positions.forwards.close(forward)
        else:
            refuse_other_tokens(positions, "The last norm", attention, output)
        return output + positions.laid_out(attention, output)

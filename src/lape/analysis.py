"""What attention is told about positions, in numbers (section 3.4): any join, any table, any grid, trained or fresh."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lape.errors import UsageError
from lape.hosts import block_row, parts
from lape.method import Grid
from lape.surgery import positions


@dataclass(frozen=True)
class Correlation:
    """s_ij of equation 12, the cosine similarity of what the positions of patches i and j bring to attention."""

    maps: Tensor  # (layers, H·W, H·W), float64
    grid: Grid  # (H, W)

    @property
    def token(self) -> int:
        """The patch at (⌊H/2⌋, ⌊W/2⌋): the centre, or the patch below and right of it."""
        height, width = self.grid
        return height // 2 * width + width // 2

    @property
    def of_token(self) -> Tensor:
        """Its similarity to every patch, as images (layers, H, W)."""
        return self.maps[:, self.token].unflatten(-1, self.grid)


@torch.no_grad()
def entering(model: nn.Module, grid: Grid | None = None) -> Tensor:
    """Return what the position of each patch brings to the attention of each layer, (layers, H·W, D) in float64.

    Where LaPE or LaPE (sharing) joins ω, that is p_l itself. Where positions are in the residual stream, it is
    LN_l(s_l) with layer l's own norm before attention and s_l all that the rungs have put into the stream so far: ω for
    `default`, (l + 1)·ω for `shared`, ω^(0) + ... + ω^(l) for `unshared`. Equation 6 holds for s_l as it does for ω, so
    tokens meet λ2·LN_l(s_l), and λ2, one positive number per token, leaves the cosine as it is.

    Prefix tokens are left out. Raises UsageError where no join is applied, where no table is joined with tokens, and
    where the layers have no common grid or the stream does not keep what is put into it.
    """
    record = positions(model)
    if record.crossings:
        raise UsageError(f"Position correlation compares layers on one grid; a {record.host.name}'s have several.")
    if record.host.stream_is_normed and not record.scheme.join.normed:
        raise UsageError(
            f"A {record.host.name} puts a norm on its residual stream, so what join={record.scheme.join.name!r} adds "
            "there does not reach later layers as it was. Use join='lape' or 'lape-sharing'."
        )
    height, width = record.own_grid() if grid is None else grid
    stream, layers = torch.zeros((), dtype=torch.float64), []
    for rung, block in zip(record.ladder((height, width)), record.blocks, strict=True):
        if rung.residual is None and rung.attention is None and not stream.ndim:
            raise UsageError(
                f"Position correlation compares the rows of a table, and pe={record.scheme.embedding.name!r} joins no "
                "table with the tokens. Use a model with one, as pe='learnable'."
            )
        if rung.residual is not None:
            stream = stream + rung.residual.double().cpu()
        if rung.attention is not None:
            entered = rung.attention.double().cpu()
        else:
            norm = parts(block, block_row(record.host, block).norms)[0]
            state = {name: value.double().cpu() for name, value in norm.state_dict().items()}
            entered = functional_call(norm, state, (stream,))
        layers.append(entered[0, -height * width :])  # patches come after all prefix tokens
    return torch.stack(layers)


def correlation(model: nn.Module, grid: Grid | None = None) -> Correlation:
    """Return the position correlation of every layer of an operated model, for its own grid of patches or another.

    s_ij = cos(e_i, e_j), e = `entering(model, grid)`; a row of zeros has similarity 0 to all. Raises UsageError as
    `entering` does.
    """
    unit = F.normalize(entering(model, grid), dim=-1, eps=1e-30)
    return Correlation(unit @ unit.mT, positions(model).own_grid() if grid is None else grid)

"""Models whose layers can be set beside one another, and the norms that their positions meet."""

from torch import nn

from lape.errors import UsageError
from lape.hosts import block_row, parts
from lape.surgery.operation import positions
from lape.surgery.positions import Positions

# What float64 is trusted to: equation 6 may miss by so much beside the largest number that it makes, and a similarity
# that falls by less does not fall.
EXACT = 1e-9


def of_one_grid(model: nn.Module) -> Positions:
    """Return the positions of a model whose layers have one grid; raises UsageError where they have several."""
    record = positions(model)
    if record.crossings:
        raise UsageError(
            f"The analysis compares layers on one grid; a {record.host.name}'s have several. Take a model of one stage."
        )
    return record


def comparable(model: nn.Module) -> Positions:
    """Return the positions of a model whose layers can be set beside one another; raises UsageError as `entering`."""
    record = of_one_grid(model)
    scheme = record.scheme
    if record.host.stream_is_normed and not scheme.join.normed:
        raise UsageError(
            f"A {record.host.name} puts a norm on its residual stream, so what join={scheme.join.name!r} adds "
            "there does not reach later layers as it was. Use join='lape' or 'lape-sharing'."
        )
    if scheme.start.preserves or (scheme.with_tokens and scheme.join.normed):
        what, edit = (
            (f"start={scheme.start.name!r}", "start='fresh'")
            if scheme.start.preserves
            else (f"join={scheme.join.name!r}", "join='lape'")
        )
        raise UsageError(
            f"{what} brings positions to attention in two ways, and how they add up depends on the tokens. Take a "
            f"model with {edit}."
        )
    if scheme.embedding.table is None:
        raise UsageError(
            f"The analysis is about the rows of a table, and pe={scheme.embedding.name!r} joins no table with "
            "the tokens. Use a model with one, as pe='learnable'."
        )
    return record


def joint_norm(record: Positions) -> nn.Module | None:
    """Return the norm that ω goes through with the tokens before the first block, where there is one."""
    path = record.host.joint_norm
    norm = record.model.get_submodule(path) if path and record.scheme.with_tokens else None
    return None if isinstance(norm, nn.Identity) else norm


def norm_before_attention(record: Positions, block: nn.Module) -> nn.Module:
    """Return the norm before a block's attention."""
    return parts(block, block_row(record.host, block).norms)[0]

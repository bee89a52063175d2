"""LaPE (Yu et al., ICCV 2023, doi:10.1109/ICCV51070.2023.00541), top to bottom; equation numbers are the paper's.

Every way of joining a position embedding ω with the tokens x of a pre-norm encoder is one encoder fed from one
small record per layer, the `Rung`:

    x <- x + residual
    x <- x + MSA(LN_x(x) + attention, logits + bias, queries and keys turned by rotation)
    x <- x + MLP(LN(x))

What a model can know of positions, ω among it, is in `lape.embeddings`. A join says what layer l is told of the ω_l
that it is handed, its rung, and what it hands on as ω_{l+1}; the rungs of all layers are the ladder. B images, N tokens
(prefix tokens such as the class token first, then H·W patches row by row), D channels, d of them a head's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.embeddings import BIASES as BIASES
from lape.embeddings import POSITION_EMBEDDINGS as POSITION_EMBEDDINGS
from lape.embeddings import SPREAD as SPREAD
from lape.embeddings import TABLES as TABLES
from lape.embeddings import Grid as Grid
from lape.embeddings import PositionEmbedding as PositionEmbedding
from lape.embeddings import RelativeBias as RelativeBias
from lape.embeddings import Table as Table
from lape.embeddings import learnable as learnable
from lape.embeddings import position_embedding as position_embedding
from lape.embeddings import sinusoidal_1d as sinusoidal_1d
from lape.embeddings import sinusoidal_2d as sinusoidal_2d
from lape.errors import UsageError, choose
from lape.names import SchemeNames


class Rung(NamedTuple):
    """What one layer gets of the positions; a part that is None adds nothing.

    Example:
        >>> import torch
        >>> from lape.method import Rung
        >>> rung = Rung(attention=torch.ones(1, 4, 8))
        >>> rung.empty, rung.padded(1).attention.shape
        (False, torch.Size([1, 5, 8]))
    """

    residual: Tensor | None = None  # (1, N, D), joins the residual stream before the block
    attention: Tensor | None = None  # (1, N, D), joins the output of the norm before attention
    bias: Tensor | None = None  # (1, heads, N, N), joins the attention logits
    rotation: Tensor | None = None  # (2, 1, 1 or heads, N, d/2), cosine and sine of what turns queries and keys

    @property
    def empty(self) -> bool:
        """Whether there is nothing to take."""
        return all(part is None for part in self)

    def of_tokens(self, change: Callable[[Tensor], Tensor]) -> "Rung":
        """Return the rung with its parts over tokens (1, N, D) changed."""
        residual, attention = (part if part is None else change(part) for part in (self.residual, self.attention))
        return Rung(residual, attention, self.bias, self.rotation)

    def in_attention(self, bias: Tensor | None, rotation: Tensor | None) -> "Rung":
        """Return the rung with another bias and another rotation."""
        return Rung(self.residual, self.attention, bias, rotation)  # torch 2.6 does not compile _replace

    def padded(self, more: int, behind: int = 0) -> "Rung":
        """Return the rung with zeros for that many more tokens, behind some of its first, which a bias has already."""
        if not more:
            return self  # padding would copy

        def with_more(part: Tensor) -> Tensor:
            parts = part[:, :behind], part.new_zeros(len(part), more, part.shape[-1]), part[:, behind:]
            return torch.cat(parts, dim=1) if behind else F.pad(part, (0, 0, more, 0))

        return self.of_tokens(with_more)

    def first(self, count: int) -> "Rung":
        """Return the rung of the first tokens."""
        bias = None if self.bias is None else self.bias[..., :count, :count]
        rotation = None if self.rotation is None else self.rotation[..., :count, :]
        return self.of_tokens(lambda part: part[:, :count]).in_attention(bias, rotation)

    def kept(self, rows: Tensor) -> "Rung":
        """Return the rung (B, K, ...) of the tokens (B, K) that each sample has kept."""
        bias = None if self.bias is None else self.bias[0][:, rows[:, :, None], rows[:, None, :]].movedim(1, 0)
        rotation = None if self.rotation is None else self.rotation[:, 0][:, :, rows].movedim(2, 1)
        return self.of_tokens(lambda part: part[0][rows]).in_attention(bias, rotation)


# --- LN_ω and what may stand in for it (Table 8) ------------------------------------------------------------------


@dataclass(frozen=True)
class PositionNormKind:
    """A row of Table 8: normalise or not, then no gain, one gain or a gain per channel, then a shift or none.

    Example:
        >>> from lape.method import POSITION_NORMS
        >>> POSITION_NORMS["scale-norm"].formula
        'g⊙Norm(ω)'
    """

    formula: str  # the paper's
    normalise: bool  # whether mean and variance are taken out
    gain: Callable[[int], int] | None  # from D to the number of gains, 1 or D; None for no gain
    shift: bool  # whether a vector of D channels is added


def _one(dim: int) -> int:
    return 1


def _per_channel(dim: int) -> int:
    return dim


POSITION_NORMS = {
    "identity": PositionNormKind("ω", normalise=False, gain=None, shift=False),
    "scalar": PositionNormKind("g·ω", normalise=False, gain=_one, shift=False),
    "scale": PositionNormKind("g⊙ω", normalise=False, gain=_per_channel, shift=False),
    "affine": PositionNormKind("g⊙ω + b", normalise=False, gain=_per_channel, shift=True),
    "norm": PositionNormKind("Norm(ω)", normalise=True, gain=None, shift=False),
    "scalar-norm": PositionNormKind("g·Norm(ω)", normalise=True, gain=_one, shift=False),
    "scale-norm": PositionNormKind("g⊙Norm(ω)", normalise=True, gain=_per_channel, shift=False),
    "layernorm": PositionNormKind("g⊙Norm(ω) + b", normalise=True, gain=_per_channel, shift=True),
}


class PositionNorm(nn.Module):
    """LN_ω of one layer, or what stands in for it: (1, N, D) to (1, N, D); gains start at 1, shifts at 0.

    Args:
        dim: D, the number of channels.
        eps: Added to the variance.
        kind: One of `POSITION_NORMS`.
        device: Of its parameters.
        dtype: Of its parameters.
        amount: Whether it holds s_l of `weighed` too, from 0 on, which its own formula does not use.

    Example:
        >>> import torch
        >>> from lape.method import PositionNorm
        >>> norm = PositionNorm(8, eps=1e-6)
        >>> norm(torch.randn(1, 5, 8)).std(-1, correction=0).allclose(torch.ones(1, 5), atol=1e-3)
        True
    """

    def __init__(
        self,
        dim: int,
        eps: float,
        kind: PositionNormKind = POSITION_NORMS["layernorm"],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        amount: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.eps, self.kind = dim, eps, kind

        def parameter(size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, device=device, dtype=dtype))

        self.amount = parameter(1) if amount else None
        self.weight = None if kind.gain is None else parameter(kind.gain(dim))
        self.bias = parameter(dim) if kind.shift else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the gain to 1, the shift to 0 and s_l to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        for shift in (self.bias, self.amount):
            if shift is not None:
                nn.init.zeros_(shift)

    def forward(self, position: Tensor) -> Tensor:
        """Apply the kind's formula to ω of shape (1, N, D)."""
        if self.kind.normalise:
            gain = None if self.weight is None else self.weight.expand(self.dim)
            return F.layer_norm(position, (self.dim,), gain, self.bias, self.eps)
        if self.weight is not None:
            position = position * self.weight
        return position if self.bias is None else position + self.bias

    def hand_on(self, position: Tensor) -> Tensor:
        """Return ω_{l+1} = p_l (11), as a constant in the rows that the next norm could not normalise.

        In a row without variance (the class token of a 2-D sinusoid while its shift is zero) LN's Jacobian is
        1/sqrt(eps), a thousand a layer, and the gradient of the first norms at depth 12 would be 1e29. The value is
        p_l in any case; where the variance is below eps, no gradient passes on to the layers before.
        """
        # torch.jit traces a graph once with gradients and checks it without: the two must be the same.
        learns = (torch.is_grad_enabled() and position.requires_grad) or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        if not (self.kind.normalise and learns):
            return position
        constant = position.detach()
        # LN's own 1/sqrt(var + eps): var() would take ten times as long on a CPU.
        *_, scale = torch.native_layer_norm(constant, [self.dim], None, None, self.eps)
        return torch.where(scale > (2 * self.eps) ** -0.5, constant, position)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, {self.kind.formula}"


# --- Joins (Table 7): what layer l is told of the ω_l that it is handed, and what it hands on -----------------------

Step = tuple[Rung, Tensor | None]  # of layer l, and ω_{l+1}; None: nothing is handed on


def with_the_tokens(position: Tensor, norm: PositionNorm | None) -> Step:
    """x_0 = α + ω, then nothing (2): the join `default`.

    Example:
        >>> import torch
        >>> from lape.method import with_the_tokens
        >>> rung, following = with_the_tokens(torch.randn(1, 5, 8), None)
        >>> rung.residual.shape, following
        (torch.Size([1, 5, 8]), None)
    """
    return Rung(residual=position), None


def into_the_stream(position: Tensor, norm: PositionNorm | None) -> Step:
    """x_l = x_l + ω^(l) before every block; `shared` has one table for all layers, `unshared` one for each.

    Example:
        >>> import torch
        >>> from lape.method import into_the_stream
        >>> table = torch.randn(1, 5, 8)
        >>> rung, following = into_the_stream(table, None)
        >>> rung.residual is table, following is table
        (True, True)
    """
    return Rung(residual=position), position


def normed_alike(position: Tensor, norm: PositionNorm | None) -> Step:
    """MSA_l(LN_x|l(x_l) + LN_ω|l(ω)): LaPE (sharing), the join `lape-sharing`.

    Example:
        >>> import torch
        >>> from lape.method import PositionNorm, normed_alike
        >>> table, norm = torch.randn(1, 5, 8), PositionNorm(8, eps=1e-6)
        >>> rung, following = normed_alike(table, norm)
        >>> rung.attention.equal(norm(table)), following is table
        (True, True)
    """
    assert norm is not None
    return Rung(attention=norm(position)), position


def normed_in_turn(position: Tensor, norm: PositionNorm | None) -> Step:
    """MSA_l(LN_x|l(x_l) + LN_ω|l(ω_l)) with ω_0 = ω and ω_{l+1} = LN_ω|l(ω_l): LaPE (8)-(11), the join `lape`.

    Example:
        >>> import torch
        >>> from lape.method import PositionNorm, normed_in_turn
        >>> table, norm = torch.randn(1, 5, 8), PositionNorm(8, eps=1e-6)
        >>> rung, following = normed_in_turn(table, norm)
        >>> rung.attention.equal(norm(table)), following.equal(rung.attention)
        (True, True)
    """
    assert norm is not None
    normed = norm(position)
    return Rung(attention=normed), norm.hand_on(normed)


def normed_behind_the_first(position: Tensor, norm: PositionNorm | None) -> Step:
    """x_0 = α + ω, then MSA_l(LN_x|l(x_l) + ω_l) with ω_l = LN_ω|l(ω_{l-1}) from l = 1 on: PVG, the join `pvg`.

    Lee, Ham, Kim (AAAI 2025, arXiv 2502.02919), as read from accounts of their text by others. Layer 0 has no norm.

    Example:
        >>> import torch
        >>> from lape.method import PositionNorm, normed_behind_the_first
        >>> table, norm = torch.randn(1, 5, 8), PositionNorm(8, eps=1e-6)
        >>> first, following = normed_behind_the_first(table, None)
        >>> second, _ = normed_behind_the_first(following, norm)
        >>> first.residual is table, second.attention.equal(norm(table))
        (True, True)
    """
    return (Rung(residual=position), position) if norm is None else normed_in_turn(position, norm)


@dataclass(frozen=True)
class Join:
    """A way of joining ω with the tokens: one layer's step, and what the steps are made from.

    Example:
        >>> from lape.method import JOINS
        >>> JOINS["lape"].normed, JOINS["unshared"].table_per_layer
        (True, True)
    """

    name: str  # as `lape.apply(join=...)` takes it
    step: Callable[[Tensor, PositionNorm | None], Step]  # from ω_l and LN_ω|l to the rung, and ω_{l+1}
    normed: bool = False  # has a PositionNorm in every layer from `first` on
    first: int = 0
    final: bool = False  # has another, of ω_0, whose output joins that of the norm behind the last layer
    table_per_layer: bool = False  # layer l is handed a table of its own
    with_tokens: bool = False  # ω is part of x_0: it meets the tokens before their dropout
    hands_on: bool = False  # ω_{l+1} is made of ω_l, and so crosses from one stage of a model to the next

    @property
    def works_against_pooling(self) -> bool:
        """Whether Lee, Ham and Kim (AAAI 2025) found it so: tokens hear of normed positions, and none stays in them."""
        return self.normed and not self.with_tokens

    def ladder(self, tables: Sequence[Tensor], norms: Sequence[PositionNorm]) -> list[Rung]:
        """Return the rungs of all layers, from one table (1, N, D) or one a layer, and one norm a layer or none.

        Example:
            >>> import torch
            >>> from lape.method import JOINS, PositionNorm
            >>> norms = [PositionNorm(4, eps=1e-6) for _ in range(3)]
            >>> [tuple(rung.attention.shape) for rung in JOINS["lape"].ladder([torch.randn(1, 5, 4)], norms)]
            [(1, 5, 4), (1, 5, 4), (1, 5, 4)]
        """
        rungs, position = [], tables[0]
        for layer in range(max(len(tables), len(norms))):
            handed = tables[layer] if self.table_per_layer else position
            norm = norms[layer] if norms and layer >= self.first else None
            rung, position = (Rung(), None) if handed is None else self.step(handed, norm)
            rungs.append(rung)
        return rungs


JOINS = {
    join.name: join
    for join in (
        Join("default", with_the_tokens, with_tokens=True),
        Join("shared", into_the_stream, hands_on=True),
        Join("unshared", into_the_stream, table_per_layer=True),
        Join("lape-sharing", normed_alike, normed=True, hands_on=True),
        Join("lape", normed_in_turn, normed=True, hands_on=True),
        Join("pvg", normed_behind_the_first, normed=True, first=1, with_tokens=True, hands_on=True),
        Join("mpvg", normed_behind_the_first, normed=True, first=1, final=True, with_tokens=True, hands_on=True),
    )
}


UNDER_POOLING = (
    "Lee, Ham and Kim (AAAI 2025, arXiv 2502.02919) found that LaPE and the mean over patches work against each other, "
    "and made mpvg for it: DeiT-Ti without a class token reached 72.14 % by default, 72.94 % with LaPE and 73.51 % "
    "with mpvg. Compare with join='mpvg'."
)


# --- Starts: from nothing, or from a model that was trained with the default join (not in the paper) ---------------


def weighed(rung: Rung, norm: PositionNorm) -> Rung:
    """MSA_l(LN_x|l(x_l) + s_l·p_l): with s_l = 0, as at the start, nothing is added.

    Args:
        rung: That of a join with norms.
        norm: Its norm, with its `amount` s_l.

    Example:
        >>> import torch
        >>> from lape.method import PositionNorm, normed_in_turn, weighed
        >>> norm = PositionNorm(8, eps=1e-6, amount=True)
        >>> rung, _ = normed_in_turn(torch.randn(1, 5, 8), norm)
        >>> weighed(rung, norm).attention.abs().max().item()
        0.0
    """
    assert norm.amount is not None
    assert rung.attention is not None
    return Rung(attention=norm.amount * rung.attention)


@dataclass(frozen=True)
class Start:
    """How a model begins: with p_l as it is, or, to preserve its function, with p_l weighed by a gain from zero on.

    Example:
        >>> from lape.method import STARTS
        >>> list(STARTS)
        ['fresh', 'preserve']
    """

    name: str  # as `lape.apply(start=...)` takes it
    preserves: bool = False  # whether p_l is weighed by a gain from zero on
    table_stays: bool = False  # whether ω is part of x_0 as well


STARTS = {start.name: start for start in (Start("fresh"), Start("preserve", preserves=True, table_stays=True))}
PRESERVE_WITHOUT_TABLE = Start("preserve", preserves=True)  # for a model that had none


@dataclass(frozen=True)
class Scheme:
    """One valid choice of join, position embedding, PE norm and start; `scheme` makes it from their names.

    Example:
        >>> import torch
        >>> from lape.method import scheme
        >>> chosen = scheme("default", "learnable")
        >>> rung, following = chosen.step(0, torch.ones(1, 5, 8), None)
        >>> rung.residual.shape, following
        (torch.Size([1, 5, 8]), None)
    """

    join: Join  # of JOINS
    embedding: PositionEmbedding  # of POSITION_EMBEDDINGS
    norm: PositionNormKind  # of POSITION_NORMS
    start: Start  # of STARTS, or PRESERVE_WITHOUT_TABLE

    @property
    def with_tokens(self) -> bool:
        """Whether ω is part of x_0."""
        return self.join.with_tokens or self.start.table_stays

    @property
    def names(self) -> SchemeNames:
        """The names that it was chosen by."""
        norm = next(name for name, kind in POSITION_NORMS.items() if kind == self.norm)
        return SchemeNames(self.join.name, self.embedding.name, norm, self.start.name)

    def step(self, layer: int, position: Tensor | None, norm: PositionNorm | None) -> Step:
        """Return the rung of a layer that is handed ω_l, and ω_{l+1}."""
        if position is None:
            return Rung(), None
        rung, following = self.join.step(position, norm)
        if self.start.preserves and norm is not None:
            rung = weighed(rung, norm)
        if self.start.table_stays and layer == 0:
            rung = Rung(position, rung.attention, rung.bias, rung.rotation)
        return rung, following

    def last(self, position: Tensor, norm: PositionNorm) -> Rung:
        """Return the rung of the norm behind the last layer, LN(x_L) + LN'(ω_0), of a join that has one."""
        rung = Rung(attention=norm(position))
        return weighed(rung, norm) if self.start.preserves else rung


def scheme(join: str, pe: str, pe_norm: str = "layernorm", start: str = "fresh") -> Scheme:
    """Return the choice that four names stand for.

    Args:
        join: A name of `JOINS`.
        pe: A name of `POSITION_EMBEDDINGS`.
        pe_norm: A name of `POSITION_NORMS`.
        start: A name of `STARTS`.

    Raises:
        UsageError: For a misspelt name, and for a combination that has no meaning.

    Example:
        >>> from lape.method import scheme
        >>> scheme("lape", "learnable").join.normed
        True
        >>> scheme("lape", "none")
        Traceback (most recent call last):
        lape.errors.UsageError: pe='none' has no table, so join='lape' has nothing to join. ...
    """
    chosen = choose(JOINS, join, "a join")
    embedding = position_embedding(pe)
    norm = choose(POSITION_NORMS, pe_norm, "a PE norm (pe_norm)")
    if embedding.table is None and (chosen.normed or not chosen.with_tokens):
        where = {
            "is added to attention logits, not to tokens": embedding.bias,
            "turns queries and keys": embedding.rotation,
            "looks at the neighbours of a patch": embedding.convolution,
        }
        what = next((told for told, part in where.items() if part is not None), "has no table")
        edit = f"join='default', or pe={embedding.beside('learnable')!r}"
        raise UsageError(f"pe={pe!r} {what}, so join={join!r} has nothing to join. Use {edit}.")
    if chosen.table_per_layer and embedding.table is not None and not embedding.table.learns:
        raise UsageError(
            f"join={join!r} gives every layer a table of its own to learn, and pe={pe!r} is fixed: all would be alike. "
            "Use join='shared', or pe='learnable'."
        )
    if not chosen.normed and norm is not POSITION_NORMS["layernorm"]:
        raise UsageError(
            f"pe_norm={pe_norm!r} stands in for a PE norm, and join={join!r} has none. "
            "Use join='lape', or leave pe_norm out."
        )
    begun = choose(STARTS, start, "a start")
    if begun.preserves and not chosen.normed:
        raise UsageError(
            f"start={start!r} lets p_l in little by little, and join={join!r} has no p_l. Use join='lape', or leave "
            "start out."
        )
    return Scheme(chosen, embedding, norm, begun)


# --- What the default join does to ω (6)-(7) ----------------------------------------------------------------------


def decompose(tokens: Tensor, position: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return λ1, λ2, λ3 of LN(x̃ + ω) = λ1·LN(x̃) + λ2·LN(ω) + λ3·β (6)-(7), each (..., N).

    λ1 = σ(x̃) / σ(x̃ + ω), λ2 = σ(ω) / σ(x̃ + ω) and λ3 = 1 - λ1 - λ2, σ being the standard deviation over channels.

    Args:
        tokens: x̃, (..., N, D).
        position: ω, (..., N, D).
        eps: That of the LayerNorm; σ is then sqrt(variance + eps), and (6) stays exact.

    Example:
        >>> import torch
        >>> from lape.method import decompose
        >>> tokens = torch.tensor([[1.0, -1.0]])
        >>> decompose(tokens, 3 * tokens)
        (tensor([0.2500]), tensor([0.7500]), tensor([0.]))
    """

    def sigma(x: Tensor) -> Tensor:
        return (x.var(-1, correction=0) + eps).sqrt()

    whole = sigma(tokens + position)
    first, second = sigma(tokens) / whole, sigma(position) / whole
    return first, second, 1 - first - second

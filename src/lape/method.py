"""LaPE (Yu et al., ICCV 2023, doi:10.1109/ICCV51070.2023.00541), top to bottom; equation numbers are the paper's.

Every way of joining a position embedding ω with the tokens x of a pre-norm encoder is one encoder fed from one
small record per layer, the `Rung`:

    x <- x + residual
    x <- x + MSA(LN_x(x) + attention, logits + bias)
    x <- x + MLP(LN(x))

A join is a function from tables and PE norms to the list of rungs, the ladder. B images, N tokens (prefix tokens
such as the class token first, then H·W patches row by row), D channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.errors import UsageError, choose

Grid = tuple[int, int]


class Rung(NamedTuple):
    """What one layer is told about positions; None adds nothing."""

    residual: Tensor | None = None  # (1, N, D), joins the residual stream before the block
    attention: Tensor | None = None  # (1, N, D), joins the output of the norm before attention
    bias: Tensor | None = None  # (1, heads, N, N), joins the attention logits

    @property
    def empty(self) -> bool:
        """Whether there is nothing to take."""
        return all(part is None for part in self)

    def of_tokens(self, change: Callable[[Tensor], Tensor]) -> "Rung":
        """Return the rung with its parts over tokens (1, N, D) changed."""
        residual, attention = (part if part is None else change(part) for part in (self.residual, self.attention))
        return self._replace(residual=residual, attention=attention)

    def padded(self, prefix: int) -> "Rung":
        """Return the rung with zeros for that many more tokens before its first; a bias has all of them already."""
        return self.of_tokens(lambda part: F.pad(part, (0, 0, prefix, 0))) if prefix else self  # padding would copy

    def first(self, count: int) -> "Rung":
        """Return the rung of the first tokens."""
        bias = None if self.bias is None else self.bias[..., :count, :count]
        return self.of_tokens(lambda part: part[:, :count])._replace(bias=bias)

    def kept(self, rows: Tensor) -> "Rung":
        """Return the rung (B, K, ...) of the tokens (B, K) that each sample has kept."""
        bias = None if self.bias is None else self.bias[0][:, rows[:, :, None], rows[:, None, :]].movedim(1, 0)
        return self.of_tokens(lambda part: part[0][rows])._replace(bias=bias)


# --- Position tables ----------------------------------------------------------------------------------------------

SPREAD = 0.02  # the standard deviation with which what is learnt of positions begins


def learnable(grid: Grid, prefix: int, dim: int) -> Tensor:
    """Return a fresh table (1, prefix + H·W, D), truncated normal with standard deviation 0.02."""
    return nn.init.trunc_normal_(torch.empty(1, prefix + grid[0] * grid[1], dim), std=SPREAD)


def sinusoidal_1d(grid: Grid, prefix: int, dim: int) -> Tensor:
    """Return the table (1, prefix + H·W, D) whose row p is sin (even i) or cos (odd i) of p / 10000^(2⌊i/2⌋/D)."""
    return _sinusoid(torch.arange(prefix + grid[0] * grid[1]), dim)[None]


def sinusoidal_2d(grid: Grid, prefix: int, dim: int) -> Tensor:
    """Return the table (1, prefix + H·W, D): half the channels tell the column, half the row; prefix rows are zero.

    Raises UsageError where D is not a multiple of 4: each half interleaves a sine and a cosine.
    """
    if dim % 4:
        raise UsageError(f"A 2-D sinusoid needs a width that 4 divides; this model's is {dim}. Use pe='sinusoidal-1d'.")
    height, width = grid
    column = _sinusoid(torch.arange(width), dim // 2).expand(height, width, dim // 2)
    row = _sinusoid(torch.arange(height), dim // 2)[:, None].expand(height, width, dim // 2)
    patches = torch.cat([column, row], dim=-1).reshape(1, height * width, dim)
    return F.pad(patches, (0, 0, prefix, 0))


def _sinusoid(positions: Tensor, dim: int) -> Tensor:  # (P,) -> (P, dim)
    # The angle is rounded to float32 before its sine is taken, as the authors do.
    channel = torch.arange(dim, dtype=torch.float64)
    angle = (positions[:, None] / 10000 ** (2 * (channel // 2) / dim)).float()
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


@dataclass(frozen=True)
class Table:
    """A kind of (1, N, D) table: how it is made, and whether it learns.

    A learnable table follows a new grid by resizing, a fixed one by being made anew.
    """

    make: Callable[[Grid, int, int], Tensor]
    learns: bool

    def holds(self, values: Tensor, grid: Grid, prefix: int) -> bool:
        """Return whether values (..., N, D) can be of this kind: a fixed table has its own, up to half precision."""
        rows, dim = values.shape[-2:]
        if self.learns or rows != prefix + grid[0] * grid[1]:
            return self.learns
        fixed = self.make(grid, prefix, dim).to(values.device).view_as(values)
        return torch.allclose(values.float(), fixed, rtol=0, atol=5e-3)


TABLES = {
    "learnable": Table(learnable, learns=True),
    "sinusoidal-1d": Table(sinusoidal_1d, learns=False),
    "sinusoidal-2d": Table(sinusoidal_2d, learns=False),
}


@dataclass(frozen=True)
class RelativeBias:
    """A 2-D relative bias in every layer: a table ((2H-1)(2W-1), heads), with or without a LayerNorm of its own."""

    normed: bool

    def __call__(self, table: Tensor, grid: Grid, prefix: int, norm: nn.Module | None = None) -> Tensor:
        """Return the bias (1, heads, N, N), zero for prefix tokens.

        Query i and key j read entry (Δrow + H - 1)(2W - 1) + Δcolumn + W - 1 of the table, Δ being i's minus j's.
        """
        height, width = grid
        row = torch.arange(height, device=table.device).repeat_interleave(width)  # (H·W,)
        column = torch.arange(width, device=table.device).repeat(height)
        delta_row = row[:, None] - row + height - 1
        delta_column = column[:, None] - column + width - 1
        bias = table[delta_row * (2 * width - 1) + delta_column].movedim(-1, 0)[None]  # (1, heads, H·W, H·W)
        if norm is not None:
            bias = norm(bias)  # over the keys
        return F.pad(bias, (prefix, 0, prefix, 0))


BIASES = {"relative": RelativeBias(normed=False), "relative-layernorm": RelativeBias(normed=True)}


@dataclass(frozen=True)
class PositionEmbedding:
    """What a model knows of positions: a table, a bias, both or neither."""

    name: str
    table: Table | None = None
    bias: RelativeBias | None = None


POSITION_EMBEDDINGS = {
    "none": PositionEmbedding("none"),
    **{name: PositionEmbedding(name, table) for name, table in TABLES.items()},
    **{name: PositionEmbedding(name, None, bias) for name, bias in BIASES.items()},
    **{f"{t}+{b}": PositionEmbedding(f"{t}+{b}", TABLES[t], BIASES[b]) for t in TABLES for b in BIASES},
}


# --- LN_ω and what may stand in for it (Table 8) ------------------------------------------------------------------


@dataclass(frozen=True)
class PositionNormKind:
    """A row of Table 8: normalise or not, then no gain, one gain or a gain per channel, then a shift or none."""

    formula: str
    normalise: bool
    gain: Callable[[int], int] | None
    shift: bool


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

    With `amount` it holds s_l of `weighed` too, from 0 on, for which its own formula has no use.
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
        if not (self.kind.normalise and torch.is_grad_enabled() and position.requires_grad):
            return position
        constant = position.detach()
        # LN's own 1/sqrt(var + eps): var() would take ten times as long on a CPU.
        *_, scale = torch.native_layer_norm(constant, [self.dim], None, None, self.eps)
        return torch.where(scale > (2 * self.eps) ** -0.5, constant, position)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, {self.kind.formula}"


# --- Joins (Table 7): from tables ω^(l) and norms LN_ω|l, one of each a layer, to the ladder -----------------------


def with_the_tokens(tables: Sequence[Tensor], norms: Sequence[PositionNorm]) -> list[Rung]:
    """x_0 = α + ω, then nothing (2)."""
    return [Rung(residual=tables[0]), *(Rung() for _ in tables[1:])]


def into_the_stream(tables: Sequence[Tensor], norms: Sequence[PositionNorm]) -> list[Rung]:
    """x_l = x_l + ω^(l) before every block; `shared` has one table for all layers, `unshared` one for each."""
    return [Rung(residual=table) for table in tables]


def normed_alike(tables: Sequence[Tensor], norms: Sequence[PositionNorm]) -> list[Rung]:
    """MSA_l(LN_x|l(x_l) + LN_ω|l(ω)): LaPE (sharing)."""
    return [Rung(attention=norm(table)) for table, norm in zip(tables, norms, strict=True)]


def normed_in_turn(tables: Sequence[Tensor], norms: Sequence[PositionNorm]) -> list[Rung]:
    """MSA_l(LN_x|l(x_l) + LN_ω|l(ω_l)) with ω_0 = ω and ω_{l+1} = LN_ω|l(ω_l): LaPE (8)-(11)."""
    ladder, position = [], tables[0]
    for norm in norms:
        rung = norm(position)
        ladder.append(Rung(attention=rung))
        position = norm.hand_on(rung)
    return ladder


@dataclass(frozen=True)
class Join:
    """A way of joining ω with the tokens: its ladder, and what the ladder is made from."""

    name: str
    climb: Callable[[Sequence[Tensor], Sequence[PositionNorm]], list[Rung]]
    normed: bool = False  # has a PositionNorm in every layer
    table_per_layer: bool = False
    with_tokens: bool = False  # ω is part of x_0: it meets the tokens before their dropout
    carries_table: bool = False  # every layer is told ω itself, in all stages


JOINS = {
    join.name: join
    for join in (
        Join("default", with_the_tokens, with_tokens=True),
        Join("shared", into_the_stream, carries_table=True),
        Join("unshared", into_the_stream, table_per_layer=True),
        Join("lape-sharing", normed_alike, normed=True, carries_table=True),
        Join("lape", normed_in_turn, normed=True),
    )
}


# --- Starts: from nothing, or from a model that was trained with the default join (not in the paper) ---------------


def weighed(ladder: Sequence[Rung], norms: Sequence[PositionNorm]) -> list[Rung]:
    """MSA_l(LN_x|l(x_l) + s_l·p_l): with s_l = 0, as at the start, attention is told nothing."""
    return [
        Rung(attention=norm.amount * rung.attention)  # pyright: ignore[reportOperatorIssue]  # both are there
        for rung, norm in zip(ladder, norms, strict=True)
    ]


@dataclass(frozen=True)
class Start:
    """How a model begins: with p_l as it is, or, to preserve its function, with p_l weighed by a gain from zero on.

    Where the model had a table before, ω then stays part of x_0 as well.
    """

    name: str
    preserves: bool = False
    table_stays: bool = False


STARTS = {start.name: start for start in (Start("fresh"), Start("preserve", preserves=True, table_stays=True))}
PRESERVE_WITHOUT_TABLE = Start("preserve", preserves=True)  # for a model that had none


@dataclass(frozen=True)
class Scheme:
    """One sound choice of join, position embedding, PE norm and start."""

    join: Join
    embedding: PositionEmbedding
    norm: PositionNormKind
    start: Start

    @property
    def with_tokens(self) -> bool:
        """Whether ω is part of x_0."""
        return self.join.with_tokens or self.start.table_stays

    def ladder(self, tables: Sequence[Tensor], norms: Sequence[PositionNorm]) -> list[Rung]:
        """Return the rungs, from one table and, where the join has them, one norm a layer."""
        ladder = self.join.climb(tables, norms)
        if self.start.preserves:
            ladder = weighed(ladder, norms)
        if self.start.table_stays:
            ladder[0] = ladder[0]._replace(residual=tables[0])
        return ladder


def scheme(join: str, pe: str, pe_norm: str = "layernorm", start: str = "fresh") -> Scheme:
    """Return what the names stand for; raise UsageError for a misspelt name or a combination that means nothing."""
    chosen = choose(JOINS, join, "a join")
    embedding = choose(POSITION_EMBEDDINGS, pe, "a position embedding (pe)")
    norm = choose(POSITION_NORMS, pe_norm, "a PE norm (pe_norm)")
    if embedding.table is None and not chosen.with_tokens:
        what = "has no table" if embedding.bias is None else "is added to attention logits, not to tokens"
        edit = f"join='default', or pe={'learnable' if embedding.bias is None else f'learnable+{pe}'!r}"
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
    """Return λ1, λ2, λ3 of LN(x̃ + ω) = λ1·LN(x̃) + λ2·LN(ω) + λ3·β (6)-(7), each (..., N), from x̃ and ω (..., N, D).

    With eps > 0, σ stands for sqrt(var + eps), and (6) stays exact.
    """

    def sigma(x: Tensor) -> Tensor:
        return (x.var(-1, correction=0) + eps).sqrt()

    whole = sigma(tokens + position)
    first, second = sigma(tokens) / whole, sigma(position) / whole
    return first, second, 1 - first - second

"""LaPE (Yu et al., ICCV 2023, doi:10.1109/ICCV51070.2023.00541), top to bottom; equation numbers are the paper's.

Every way of joining a position embedding ω with the tokens x of a pre-norm encoder is one encoder fed from one
small record per layer, the `Rung`:

    x <- x + residual
    x <- x + MSA(LN_x(x) + attention, logits + bias)
    x <- x + MLP(LN(x))

A join says what layer l is told of the ω_l that it is handed, its rung, and what it hands on as ω_{l+1}; the rungs of
all layers are the ladder. B images, N tokens (prefix tokens such as the class token first, then H·W patches row by
row), D channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lape.errors import UsageError, choose
from lape.names import SchemeNames

Grid = tuple[int, int]


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

    @property
    def empty(self) -> bool:
        """Whether there is nothing to take."""
        return all(part is None for part in self)

    def of_tokens(self, change: Callable[[Tensor], Tensor]) -> "Rung":
        """Return the rung with its parts over tokens (1, N, D) changed."""
        residual, attention = (part if part is None else change(part) for part in (self.residual, self.attention))
        return self._replace(residual=residual, attention=attention)

    def padded(self, more: int, behind: int = 0) -> "Rung":
        """Return the rung with zeros for that many more tokens, behind some of its first; a bias has all already."""
        if not more:
            return self  # padding would copy

        def with_more(part: Tensor) -> Tensor:
            parts = part[:, :behind], part.new_zeros(len(part), more, part.shape[-1]), part[:, behind:]
            return torch.cat(parts, dim=1) if behind else F.pad(part, (0, 0, more, 0))

        return self.of_tokens(with_more)

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
    """Return a new table (1, prefix + H·W, D), truncated normal with standard deviation 0.02.

    Example:
        >>> from lape.method import learnable
        >>> learnable((2, 3), prefix=1, dim=8).shape
        torch.Size([1, 7, 8])
    """
    return nn.init.trunc_normal_(torch.empty(1, prefix + grid[0] * grid[1], dim), std=SPREAD)


def sinusoidal_1d(grid: Grid, prefix: int, dim: int) -> Tensor:
    """Return the table (1, prefix + H·W, D) whose row p is sin (even i) or cos (odd i) of p / 10000^(2⌊i/2⌋/D).

    Example:
        >>> from lape.method import sinusoidal_1d
        >>> sinusoidal_1d((1, 2), prefix=0, dim=2)
        tensor([[[0.0000, 1.0000],
                 [0.8415, 0.5403]]])
    """
    return _sinusoid(torch.arange(prefix + grid[0] * grid[1]), dim)[None]


def sinusoidal_2d(grid: Grid, prefix: int, dim: int) -> Tensor:
    """Return the table (1, prefix + H·W, D): half the channels for the column, half for the row; prefix rows are zero.

    Raises:
        UsageError: Where 4 does not divide D: each half interleaves a sine and a cosine.

    Example:
        >>> from lape.method import sinusoidal_2d
        >>> sinusoidal_2d((2, 2), prefix=1, dim=4)[0, 0]
        tensor([0., 0., 0., 0.])
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

    A learnable table is resized for a new grid, a fixed one is made anew.

    Example:
        >>> from lape.method import TABLES
        >>> TABLES["sinusoidal-1d"].learns, TABLES["learnable"].make((2, 2), 0, 8).shape
        (False, torch.Size([1, 4, 8]))
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
    """A 2-D relative bias in every layer: a table ((2H-1)(2W-1), heads), with or without a LayerNorm of its own.

    Example:
        >>> import torch
        >>> from lape.method import RelativeBias
        >>> table = torch.randn(3 * 3, 2)  # 2×2 patches, two heads
        >>> RelativeBias(normed=False)(table, grid=(2, 2), prefix=1).shape
        torch.Size([1, 2, 5, 5])
    """

    normed: bool  # whether a LayerNorm over the keys follows the table

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
    """What a model knows of positions: a table, a relative bias, both or neither.

    Example:
        >>> from lape.method import POSITION_EMBEDDINGS
        >>> POSITION_EMBEDDINGS["learnable+relative"].bias
        RelativeBias(normed=False)
    """

    name: str  # as `lape.apply(pe=...)` takes it
    table: Table | None = None  # joined with the tokens
    bias: RelativeBias | None = None  # added to the attention logits


POSITION_EMBEDDINGS = {
    "none": PositionEmbedding("none"),
    **{name: PositionEmbedding(name, table) for name, table in TABLES.items()},
    **{name: PositionEmbedding(name, None, bias) for name, bias in BIASES.items()},
    **{f"{t}+{b}": PositionEmbedding(f"{t}+{b}", TABLES[t], BIASES[b]) for t in TABLES for b in BIASES},
}


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
    normed: bool = False  # has a PositionNorm in every layer
    table_per_layer: bool = False  # layer l is handed a table of its own
    with_tokens: bool = False  # ω is part of x_0: it meets the tokens before their dropout
    hands_on: bool = False  # ω_{l+1} is made of ω_l, and so crosses from one stage of a model to the next

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
            rung, position = (Rung(), None) if handed is None else self.step(handed, norms[layer] if norms else None)
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
    )
}


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
        if self.start.preserves:
            assert norm is not None
            rung = weighed(rung, norm)
        if self.start.table_stays and layer == 0:
            rung = rung._replace(residual=position)
        return rung, following


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

"""Laws of METHOD over random architectures, grids, tokens, joins, tables, stand-ins and number formats.

What a law says exactly is compared exactly. Elsewhere the error is a norm beside that of the whole, and its bound is
ROUNDINGS machine epsilons of the number format: 7e-15, 4e-6 and 0.25. Two vectors that have nothing to do with each
other are apart by 1.4.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lape
from lape.embeddings import BIASES, CONVOLUTIONS, POSITION_EMBEDDINGS, ROTATIONS, TABLES, Grid, Table
from lape.errors import UsageError
from lape.method import JOINS, POSITION_NORMS, PositionNorm, scheme

ROUNDINGS = 32
PATCH = 2
EPS = 1e-6

few = settings(max_examples=25)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
grids = st.tuples(st.integers(1, 4), st.integers(1, 4))
NORMED = [name for name, join in JOINS.items() if join.normed and not join.first]  # lape-sharing, lape
STORED = [name for name, table in TABLES.items() if isinstance(table, Table)]
normed = st.sampled_from(NORMED)


@dataclass(frozen=True)
class Architecture:
    """A vision transformer of timm's, with weights from a seed."""

    grid: Grid
    heads: int
    head_dim: int
    depth: int
    class_token: bool
    registers: int
    no_embed_class: bool
    seed: int
    dtype: torch.dtype

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def prefix(self) -> int:
        return self.class_token + self.registers

    def model(self) -> VisionTransformer:
        torch.manual_seed(self.seed)
        model = VisionTransformer(
            img_size=(PATCH * self.grid[0], PATCH * self.grid[1]), patch_size=PATCH, num_classes=3,
            embed_dim=self.dim, depth=self.depth, num_heads=self.heads, mlp_ratio=2, class_token=self.class_token,
            reg_tokens=self.registers, no_embed_class=self.no_embed_class, dynamic_img_size=True,
            global_pool="token" if self.class_token else "avg", fc_norm=False,
        )  # fmt: skip
        return _shaken(model, 0.3).to(self.dtype).eval()

    def images(self, grid: Grid | None = None) -> Tensor:
        height, width = grid or self.grid
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(2, 3, PATCH * height, PATCH * width, generator=generator).to(self.dtype)


def _shaken(model: nn.Module, std: float = 1.0, only: str = "") -> Any:
    """Move parameters away from where they start: nothing may hide behind a zero."""
    for name, parameter in model.named_parameters():
        if only in name:
            nn.init.normal_(parameter, std=std)
    return model


architectures = st.builds(
    Architecture,
    grid=grids,
    heads=st.sampled_from([1, 2, 3, 4]),
    head_dim=st.sampled_from([4, 8]),
    depth=st.integers(1, 5),
    class_token=st.booleans(),
    registers=st.integers(0, 2),
    no_embed_class=st.booleans(),
    seed=st.integers(0, 1000),
    dtype=dtypes,
)


@st.composite
def schemes(draw: st.DrawFn) -> dict[str, str]:
    """Every sound choice of join, position embedding and stand-in."""
    parts = [draw(st.sampled_from([None, *kind])) for kind in (TABLES, BIASES, ROTATIONS, CONVOLUTIONS)]
    names = {"join": draw(st.sampled_from([*JOINS])), "pe": "+".join(filter(None, parts)) or "none"}
    if JOINS[names["join"]].normed:
        names["pe_norm"] = draw(st.sampled_from([*POSITION_NORMS]))
    try:
        scheme(**names)
    except UsageError:
        assume(False)
    return names


def _applied(architecture: Architecture, model: nn.Module | None = None, **names: str) -> VisionTransformer:
    """Apply a scheme, and move its norms away from where they start."""
    assume("lookhere" not in names.get("pe", "") or architecture.heads == 4)
    assume("peg-5" not in names.get("pe", "") or architecture.depth == 5)
    return _shaken(lape.apply(model or architecture.model(), **names), only="pe_norm").to(architecture.dtype)


def apart(one: Tensor, other: Tensor) -> float:
    """Distance of two tensors beside the length of the second."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm().clamp(min=1e-300))


def bound(dtype: torch.dtype) -> float:
    return ROUNDINGS * torch.finfo(dtype).eps


def rungs(model: nn.Module, grid: Grid | None = None) -> list[Tensor]:
    return [rung.attention for rung in lape.ladder(model, grid) if rung.attention is not None]


# Law 1


@few
@given(st.sampled_from(STORED), grids, st.integers(0, 3), st.sampled_from([4, 8, 48]), st.integers(1, 12), dtypes)
def test_at_initialisation_all_positions_are_alike_and_lape_is_lape_sharing(pe, grid, prefix, dim, depth, dtype):
    """With the variance v of a row, LN of LN is LN up to eps / v, and up to eps in every layer after that."""
    table = TABLES[pe].make(grid, prefix, dim).to(dtype)
    norms = [PositionNorm(dim, EPS, dtype=dtype) for _ in range(depth)]
    with torch.no_grad():
        alike, in_turn = ([rung.attention for rung in JOINS[name].ladder([table] * depth, norms)] for name in NORMED)
    variance = table.double().var(-1, correction=0, keepdim=True).clamp(min=1e-30)
    for layer, (one, other) in enumerate(zip(in_turn, alike, strict=True)):
        assert torch.equal(other, alike[0])
        allowed = other.double().abs() * (EPS / variance + layer * EPS) + (layer + 1) * bound(dtype)
        assert ((one.double() - other.double()).abs() <= allowed).all()


# Law 2


@few
@given(architectures, normed, st.data())
def test_scale_and_shift_of_every_token_are_forgotten(architecture, join, data):
    """Scales are powers of two and in float64 a shift is nearly exact: what is left is eps beside the variance."""
    architecture = Architecture(**vars(architecture) | {"dtype": torch.float64})
    model = _applied(architecture, join=join)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    with torch.no_grad():
        model.pos_embed.copy_(torch.randn(model.pos_embed.shape, generator=generator, dtype=torch.float64))
        before = model(architecture.images())
        ladder = rungs(model)
        rows = (1, model.pos_embed.shape[1], 1)
        scale = 2.0 ** torch.randint(1, 4, rows, generator=generator)
        model.pos_embed.mul_(scale).add_(torch.randn(rows, generator=generator))
        after = model(architecture.images())
    assert apart(rungs(model)[0], ladder[0]) < 1e-3
    assert apart(after, before) < 1e-3
    with torch.no_grad():
        model.pos_embed.add_(torch.randn(model.pos_embed.shape, generator=generator))  # within a token
    assert apart(rungs(model)[0], ladder[0]) > 1e-2


# Law 3


@few
@given(architectures, st.sampled_from([*JOINS]), st.data())
def test_tokens_and_rows_permuted_together_permute_the_features(architecture, join, data):
    model = _applied(architecture, join=join)
    height, width = architecture.grid
    order = torch.tensor(data.draw(st.permutations(range(height * width))))
    images = architecture.images()
    with torch.no_grad():
        before = model.forward_features(images)
        patches = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).flatten(2, 3)[:, :, order]
        rows = patches.unflatten(2, (height, width)).transpose(3, 4)  # (B, 3, H, p, W, p)
        for name, table in model.named_parameters():
            if name.endswith("pos_embed"):
                prefix = table.shape[1] - height * width
                table[:, prefix:] = table[:, prefix:][:, order]
        after = model.forward_features(rows.reshape(images.shape))
    prefix = architecture.prefix
    assert apart(after[:, :prefix], before[:, :prefix]) <= bound(architecture.dtype) if prefix else True
    assert apart(after[:, prefix:], before[:, prefix:][:, order]) <= bound(architecture.dtype)


# Law 4


@few
@given(architectures, schemes(), grids)
def test_a_folded_model_gives_the_same_outputs_on_every_grid_that_it_is_folded_for(architecture, names, other):
    if "layernorm" in names["pe"]:  # over the keys, so for one grid
        other = architecture.grid
    model = _applied(architecture, **names)
    folded = lape.fold(copy.deepcopy(model), grids={architecture.grid, other})
    for grid in (architecture.grid, other):
        images = architecture.images(grid)
        with torch.no_grad():
            assert apart(folded(images), model(images)) <= bound(architecture.dtype)
            tokens = architecture.prefix + grid[0] * grid[1]
            assert all(rung.shape == (1, tokens, architecture.dim) for rung in rungs(model, grid))
    assert not any("pe_norm" in name or "pos_embed" in name for name in folded.state_dict())


# Law 5


@few
@given(architectures, normed, st.sampled_from([*TABLES]))
def test_norms_of_zeros_are_the_model_without_positions(architecture, join, pe):
    model = lape.apply(architecture.model(), join=join, pe=pe)
    for name, parameter in model.named_parameters():
        if "pe_norm" in name:
            nn.init.zeros_(parameter)
    without = lape.apply(architecture.model(), join="default", pe="none")
    with torch.no_grad():
        assert torch.equal(model(architecture.images()), without(architecture.images()))


# Law 6


@few
@given(architectures, st.data())
def test_the_gradient_of_the_table_flows_through_the_norm_of_every_layer(architecture, data):
    """It reaches the table from every layer, and from none behind a norm whose gain is zero."""
    architecture = Architecture(**vars(architecture) | {"dtype": torch.float64})
    model = _applied(architecture, join="lape")
    closed = data.draw(st.integers(0, architecture.depth - 1))
    for gain in (None, closed):
        if gain is not None:
            nn.init.zeros_(model.blocks[gain].pe_norm.weight)
        for layer, rung in enumerate(rungs(model)):
            (gradient,) = torch.autograd.grad(
                (rung * torch.randn_like(rung)).sum(), [model.pos_embed], retain_graph=True
            )
            assert gradient.any() == (gain is None or layer < gain)


# Operating


@few
@given(architectures, schemes())
def test_default_is_what_there_was_and_removing_gives_it_back(architecture, names):
    model = architecture.model()
    images = architecture.images()
    with torch.no_grad():
        before = model(images)
        assert torch.equal(lape.apply(copy.deepcopy(model), join="default")(images), before)
        other = _applied(architecture, model, **names)(images)
        assert torch.equal(lape.remove(model)(images), before)
    assert other.shape == before.shape
    assert other.isfinite().all()


@few
@given(st.integers(1, 6), st.integers(1, 24), normed, st.integers(0, 1000), dtypes)
def test_the_identity_in_place_of_the_norm_hands_on_the_table_itself(depth, tokens, join, seed, dtype):
    table = torch.randn(1, tokens, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
    norms = [PositionNorm(8, EPS, POSITION_NORMS["identity"]) for _ in range(depth)]
    assert all(torch.equal(rung.attention, table) for rung in JOINS[join].ladder([table] * depth, norms))


@few
@given(architectures, grids, st.sampled_from(STORED), normed)
def test_a_fixed_table_is_made_for_a_grid_and_a_learnt_one_of_the_same_grid_is_itself(architecture, other, pe, join):
    model = lape.apply(architecture.model(), join=join, pe=pe, pe_norm="identity")
    learns = TABLES[pe].learns
    grid = architecture.grid if learns else other
    prefix = 0 if architecture.no_embed_class else architecture.prefix
    found = rungs(model, grid)[0][:, architecture.prefix - prefix :]
    expected = model.pos_embed if learns else TABLES[pe].make(grid, prefix, architecture.dim).to(architecture.dtype)
    assert torch.equal(found, expected)
    assert not rungs(model, grid)[0][:, : architecture.prefix - prefix].any()


def test_the_tables_and_biases_are_all_there_are():
    """What the strategies draw from is what the program offers."""
    assert [*POSITION_EMBEDDINGS] == ["none", *TABLES, *BIASES, *ROTATIONS, *CONVOLUTIONS]

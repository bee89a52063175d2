"""Laws of the method itself: tables, PE norms, ladders, equations (6)-(7), and what is refused."""

import math
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from lape.embeddings import CONVOLUTIONS, ROTATIONS, MixedRotation, position_embedding
from lape.embeddings.rotations import cosine_and_sine
from lape.errors import UsageError
from lape.method import (
    BIASES,
    JOINS,
    POSITION_EMBEDDINGS,
    POSITION_NORMS,
    TABLES,
    PositionNorm,
    decompose,
    learnable,
    scheme,
    sinusoidal_1d,
    sinusoidal_2d,
)

GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))
EPS = 1e-6


def chain(depth: int, dim: int = 16, kind: str = "layernorm") -> list[PositionNorm]:
    return [PositionNorm(dim, EPS, POSITION_NORMS[kind]) for _ in range(depth)]


def shake(norms: list[PositionNorm]) -> list[PositionNorm]:
    for norm in norms:
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
    return norms


# --- Tables


@given(GRIDS, st.integers(0, 3))
def test_the_1d_sinusoid_is_its_formula_at_every_entry(grid: tuple[int, int], prefix: int) -> None:
    table = sinusoidal_1d(grid, prefix, 6)
    assert table.shape == (1, prefix + grid[0] * grid[1], 6)
    for position in range(table.shape[1]):
        for channel in range(6):
            angle = position / 10000 ** (2 * (channel // 2) / 6)
            expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert table[0, position, channel] == pytest.approx(expected, abs=1e-5)


@given(GRIDS, st.integers(0, 3))
def test_the_2d_sinusoid_tells_column_then_row_and_nothing_to_prefix_tokens(grid: tuple[int, int], prefix: int) -> None:
    table = sinusoidal_2d(grid, prefix, 8)
    assert not table[:, :prefix].any()
    rows, columns = grid
    patches = table[0, prefix:].reshape(rows, columns, 8)
    for half, along in ((patches[..., :4], patches[:1, :, :4]), (patches[..., 4:], patches[:, :1, 4:])):
        assert torch.equal(half, along.expand_as(half))  # the same along the other axis
    for row in range(rows):
        assert patches[row, 0, 4] == pytest.approx(math.sin(row), abs=1e-6)
        assert patches[row, 0, 7] == pytest.approx(math.cos(row / 100), abs=1e-6)
    for column in range(columns):
        assert patches[0, column, 2] == pytest.approx(math.sin(column / 100), abs=1e-6)


def test_a_width_that_4_does_not_divide_has_no_2d_sinusoid() -> None:
    with pytest.raises(UsageError, match="4 divides; this model's is 6"):
        sinusoidal_2d((2, 2), 1, 6)


def test_a_learnable_table_starts_truncated_normal() -> None:
    table = learnable((32, 32), 1, 64)
    assert table.std() == pytest.approx(0.02, rel=0.02)
    assert table.abs().max() <= 2


@given(GRIDS, st.integers(0, 2))
def test_the_relative_bias_is_looked_up_by_query_minus_key(grid: tuple[int, int], prefix: int) -> None:
    rows, columns = grid
    table = torch.randn((2 * rows - 1) * (2 * columns - 1), 3)
    bias = BIASES["relative"](table, grid, prefix)
    tokens = prefix + rows * columns
    assert bias.shape == (1, 3, tokens, tokens)
    assert not bias[:, :, :prefix].any()
    assert not bias[..., :prefix].any()
    for query in range(rows * columns):
        for key in range(rows * columns):
            down, right = query // columns - key // columns, query % columns - key % columns
            entry = (down + rows - 1) * (2 * columns - 1) + right + columns - 1
            assert torch.equal(bias[0, :, prefix + query, prefix + key], table[entry])


# --- PE norms


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("identity", 0),
        ("scalar", 1),
        ("scale", 16),
        ("affine", 32),
        ("norm", 0),
        ("scalar-norm", 1),
        ("scale-norm", 16),
        ("layernorm", 32),
    ],
)
def test_each_stand_in_has_the_parameters_of_its_formula(kind: str, parameters: int) -> None:
    (norm,) = shake(chain(1, kind=kind))
    assert sum(p.numel() for p in norm.parameters()) == parameters
    omega = torch.randn(1, 5, 16)
    g = 1 if norm.weight is None else norm.weight
    b = 0 if norm.bias is None else norm.bias
    inner = F.layer_norm(omega, (16,), eps=EPS) if "norm" in kind else omega
    torch.testing.assert_close(norm(omega), g * inner + b)


# --- Joins


def test_the_ladders_are_those_of_table_7() -> None:
    tables, norms = [torch.randn(1, 5, 16) for _ in range(3)], shake(chain(3))
    same = [tables[0]] * 3
    default = JOINS["default"].ladder(same, [])
    assert default[0].residual is tables[0]
    assert all(part is None for rung in default[1:] for part in rung)
    assert [rung.residual for rung in JOINS["shared"].ladder(same, [])] == same
    assert [rung.residual for rung in JOINS["unshared"].ladder(tables, [])] == tables
    for rung, norm in zip(JOINS["lape-sharing"].ladder(same, norms), norms, strict=True):
        assert rung.attention is not None
        assert torch.equal(rung.attention, norm(tables[0]))
    omega = tables[0]
    for rung, norm in zip(JOINS["lape"].ladder(same, norms), norms, strict=True):
        omega = norm(omega)
        assert rung.attention is not None
        assert torch.equal(rung.attention, omega)
        assert rung.residual is None


def test_at_initialisation_lape_is_lape_sharing_because_layernorm_is_idempotent() -> None:
    same = [torch.randn(1, 5, 16, dtype=torch.float64)] * 4
    norms = [norm.double() for norm in chain(4)]
    for one, other in zip(JOINS["lape"].ladder(same, norms), JOINS["lape-sharing"].ladder(same, norms), strict=True):
        torch.testing.assert_close(one.attention, other.attention, rtol=0, atol=1e-5)  # up to eps


def test_lape_forgets_scale_and_shift_of_a_token() -> None:
    omega, norms = torch.randn(1, 5, 16, dtype=torch.float64), [norm.double() for norm in shake(chain(3))]
    moved = omega * (torch.rand(1, 5, 1) + 0.5) + torch.randn(1, 5, 1)
    for one, other in zip(JOINS["lape"].ladder([omega], norms), JOINS["lape"].ladder([moved], norms), strict=True):
        torch.testing.assert_close(one.attention, other.attention, rtol=0, atol=1e-4)  # up to eps


def test_the_gradient_of_the_table_flows_through_every_norm() -> None:
    omega, norms = torch.randn(1, 5, 16, requires_grad=True), shake(chain(3))
    ladder = JOINS["lape"].ladder([omega], norms)
    assert ladder[-1].attention is not None
    (through_all,) = torch.autograd.grad(ladder[-1].attention.square().sum(), [omega], retain_graph=True)
    assert through_all.abs().max() > 0
    with torch.no_grad():
        assert norms[1].weight is not None
        norms[1].weight.zero_()  # closes the chain at its second norm
    ladder = JOINS["lape"].ladder([omega], norms)
    assert ladder[-1].attention is not None
    (stopped,) = torch.autograd.grad(ladder[-1].attention.square().sum(), [omega])
    assert stopped.abs().max() == 0


def test_a_row_that_cannot_be_normalised_passes_no_gradient_back_and_all_others_do() -> None:
    norm = chain(1)[0]
    rows = torch.randn(1, 3, 16)
    rows[0, 1] = 7.0  # no variance
    rows.requires_grad_()
    handed = norm.hand_on(rows)
    assert torch.equal(handed, rows)
    handed.sum().backward()
    assert rows.grad is not None
    assert rows.grad[0, :, 0].tolist() == [1, 0, 1]


# --- (6)-(7)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
def test_equation_6_holds_with_the_lambdas_of_equation_7(eps: float) -> None:
    tokens, omega = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(1, 5, 16, dtype=torch.float64)
    gamma, beta = torch.randn(2, 16, dtype=torch.float64)
    norm = lambda x: F.layer_norm(x, (16,), gamma, beta, eps)  # noqa: E731
    first, second, third = decompose(tokens, omega, eps)
    assert first.shape == second.shape == third.shape == (2, 5)
    right = first[..., None] * norm(tokens) + second[..., None] * norm(omega) + third[..., None] * beta
    torch.testing.assert_close(norm(tokens + omega), right, rtol=1e-9, atol=1e-9)


# --- What is refused


@pytest.mark.parametrize(
    ("join", "pe", "pe_norm", "says"),
    [
        ("unshared", "sinusoidal-1d", "layernorm", "join='shared'"),
        ("unshared", "sinusoidal-2d", "layernorm", "join='shared'"),
        ("lape-sharing", "relative", "layernorm", "join='default'"),
        ("lape", "relative-layernorm", "layernorm", "learnable\\+relative-layernorm"),
        ("lape", "none", "layernorm", "join='default', or pe='learnable'"),
        ("shared", "none", "layernorm", "nothing to join"),
        ("default", "learnable", "scalar", "join='lape'"),
        ("laep", "learnable", "layernorm", "Did you mean 'lape'"),
        ("LaPE", "learnable", "layernorm", "Did you mean 'lape'"),
        ("lape", "learned", "layernorm", "Did you mean 'learnable'"),
        ("lape", "sinusoidal1d", "layernorm", "Did you mean 'sinusoidal-1d'"),
        ("lape", "learnable", "layer-norm", "Did you mean 'layernorm'"),
    ],
)
def test_what_means_nothing_or_is_misspelt_is_refused_with_the_nearest_choice(
    join: str, pe: str, pe_norm: str, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        scheme(join, pe, pe_norm)


def sums() -> list[str]:
    """Every sum of parts, and none."""
    kinds = ([None, *TABLES], [None, *BIASES], [None, *ROTATIONS], [None, *CONVOLUTIONS])
    return ["+".join(filter(None, parts)) or "none" for parts in product(*kinds)]


def test_every_other_combination_of_names_is_sound() -> None:
    sound, all_sums = dict.fromkeys(JOINS, 0), sums()
    for join, pe in product(JOINS, all_sums):
        try:
            assert scheme(join, pe).names[:2] == (join, pe)
        except UsageError:
            continue
        sound[join] += 1
    beside = (1 + len(BIASES)) * (1 + len(ROTATIONS)) * (1 + len(CONVOLUTIONS))
    learning = sum(table.learns for table in TABLES.values())
    assert len(set(all_sums)) == (1 + len(TABLES)) * beside
    for join, count in sound.items():
        tables = {"default": 1 + len(TABLES), "unshared": learning}.get(join, len(TABLES))
        assert count == tables * beside, join


@pytest.mark.parametrize(
    ("pe", "says"),
    [
        ("rope-axial+rope-mixed", "two rotations.*pe='rope-axial' or pe='rope-mixed'"),
        ("learnable+relative+alibi-2d", "two biases.*pe='learnable\\+relative' or pe='learnable\\+alibi-2d'"),
        ("learnable+fourier", "two tables"),
        ("peg+peg-5", "two convolutions"),
        ("rope-mixed+learnable", "Use pe='learnable\\+rope-mixed'"),
        ("none+peg", "adds something to nothing. Use pe='peg'"),
        ("learnable+rope-mixd", "Did you mean 'rope-mixed'"),
        ("lookhere-90:slope=1", "Use pe='lookhere-90'"),
        ("lookhere-90:slpe=2", "Its options: slope, rounded"),
        ("lookhere-90:slope=2:slope=3", "written once"),
        ("lookhere-90:rounded=yes", "true or false; received 'yes'"),
        ("fourier:features=1.5", "a whole number; received '1.5'"),
        ("fourier:features=15", "even number of features"),
        ("rope-dinov3:rescale=0.5", "factors of 1 and more"),
        ("rope-mixed:grid=-7", "grid.*1 or more; received -7.*pe='rope-mixed:grid=14'"),
        ("rope-axial:grid=7.5", "a whole number; received '7.5'"),
        ("peg:5", "It has no options"),
    ],
)
def test_a_sum_that_means_nothing_or_is_misspelt_is_refused(pe: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        scheme("default", pe)
    assert pe not in POSITION_EMBEDDINGS


@pytest.mark.parametrize(
    "pe", ["fourier:features=16:hidden=12", "learnable+lookhere-45:slope=2", "rope-dinov3:jitter=2"]
)
def test_an_embedding_with_options_is_pickled_by_its_name(pe: str) -> None:
    embedding = position_embedding(pe)
    assert pickle.loads(pickle.dumps(embedding)) == embedding == POSITION_EMBEDDINGS[pe]
    assert embedding != position_embedding(pe.partition(":")[0])


# --- Rotations and fixed biases


@given(GRIDS, st.sampled_from(list(ROTATIONS)), st.integers(0, 2))
def test_a_turned_query_and_key_know_the_offset_of_their_patches_alone(grid: Any, name: str, prefix: int) -> None:
    rotation, heads, channels = ROTATIONS[name], 2, 8
    torch.manual_seed(0)
    angles = (
        rotation.angles(rotation.start(heads, channels).double(), grid)
        if isinstance(rotation, MixedRotation)
        else rotation.angles(grid, channels, torch.device("cpu"))
    )
    turns = cosine_and_sine(angles, prefix)
    query, key = torch.randn(2, 1, heads, 1, channels, dtype=torch.float64)
    tokens = prefix + grid[0] * grid[1]
    queries, keys = (rotation.turn(one.expand(-1, -1, tokens, -1), turns) for one in (query, key))
    torch.testing.assert_close(queries.norm(dim=-1), query.norm(dim=-1).expand(-1, -1, tokens))
    assert torch.equal(queries[:, :, :prefix], query.expand(-1, -1, prefix, -1))  # prefix tokens are not turned
    products = (queries @ keys.mT)[0, :, prefix:, prefix:].unflatten(2, grid).unflatten(1, grid)
    moved = products[:, 1:, 1:, 1:, 1:] - products[:, :-1, :-1, :-1, :-1]  # both patches, by a row and a column
    assert moved.abs().max().item() < 1e-12 if moved.numel() else True


def test_new_mixed_frequencies_are_two_directions_at_right_angles() -> None:
    frequencies = MixedRotation().start(heads=3, head_dim=16).double()  # (2, heads, pairs)
    first, second = frequencies.unflatten(2, (2, 4)).unbind(2)
    lengths = torch.tensor([10 ** (-4 * k / 16) for k in range(4)], dtype=torch.float64)
    for one in (first, second):
        torch.testing.assert_close(one.norm(dim=0), lengths.expand(3, 4), rtol=1e-5, atol=0)
    assert (first * second).sum(0).abs().max() < 1e-6
    assert first[:, 0, 0].tolist() != first[:, 1, 0].tolist()  # a direction drawn for every head


@pytest.mark.parametrize("name", ["rope-axial", "rope-mixed"])
def test_a_rotation_with_a_grid_is_the_plain_one_there_and_lays_every_other_grid_over_it(name: str) -> None:
    torch.manual_seed(0)
    frequencies = ROTATIONS["rope-mixed"].start(2, 8).double()

    def angles(pe: str, grid: Any) -> Any:  # by row and column
        kind = position_embedding(pe).rotation
        found = kind.angles(frequencies, grid) if kind.learns else kind.angles(grid, 8, torch.device("cpu"))
        return found.unflatten(1, grid)

    trained = angles(name, (3, 3))
    assert torch.equal(angles(f"{name}:grid=3", (3, 3)), trained)
    finer = angles(f"{name}:grid=3", (6, 12))  # two by four patches in the place of one, whose centre is theirs
    torch.testing.assert_close(finer.unflatten(2, (3, 4)).unflatten(1, (3, 2)).mean((2, 4)), trained)


def test_dinov3s_coordinates_move_in_training_alone() -> None:
    cpu, grid = torch.device("cpu"), (3, 5)
    still = ROTATIONS["rope-dinov3"].angles(grid, 8, cpu)
    for option in ("shift=0.5", "jitter=2", "rescale=2"):
        kind = position_embedding(f"rope-dinov3:{option}").rotation
        torch.manual_seed(0)
        assert torch.equal(kind.angles(grid, 8, cpu), still)
        moved = kind.angles(grid, 8, cpu, training=True)
        drawn = [kind.angles(grid, 8, cpu, training=True) for _ in range(200)]
        if option == "shift=0.5":
            by = (moved - still)[0, :, 0] / (2 * math.pi)
            torch.testing.assert_close(by, by[0].expand_as(by))
            most = max((one - still).abs()[0, 0, 0].item() / (2 * math.pi) for one in drawn)
            assert most == pytest.approx(0.5, abs=0.05)
        else:
            ratios = torch.stack([(one / still)[0, 0, [0, 2]] for one in drawn])  # of the row, of the column
            assert ratios.min() == pytest.approx(0.5, abs=0.05)
            assert ratios.max() == pytest.approx(2, abs=0.1)
            assert torch.allclose(ratios[:, 0], ratios[:, 1]) == (option == "rescale=2")


def test_a_head_of_lookhere_sees_itself_and_half_a_quarter_or_an_eighth_of_the_plane() -> None:
    grid, cpu = (9, 9), torch.device("cpu")
    middle = 4 * 9 + 4
    for name, sees in (("lookhere-180", 45), ("lookhere-90", 25), ("lookhere-45", 15)):
        seen = BIASES[name].make(grid, 0, 4, cpu)[0].isfinite()  # (heads, queries, keys)
        assert seen[:, range(81), range(81)].all()
        assert seen[:, middle].sum(-1).tolist() == [sees] * 4

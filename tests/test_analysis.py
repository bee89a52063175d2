"""Position correlation and the weights of equation 6: laws first, then tables with known answers."""

import copy
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from foreign_hosts import EVERY_KIND, FOREIGN, applied, inputs
from hypothesis import given, settings
from hypothesis import strategies as st

import lape
from lape.analysis import Correlation, correlation, decomposition, entering
from lape.analysis.comparable import joint_norm
from lape.errors import RunError, UsageError
from lape.method import decompose, sinusoidal_2d
from lape.surgery.operation import positions

SMALL = {"img_size": (6, 10), "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2}
EVERY_JOIN = ["default", "shared", "unshared", "lape-sharing", "lape"]


def model_with(join, pe="learnable", **options):
    torch.manual_seed(0)
    model = lape.create_model("vit_tiny_patch16_224", join=join, pe=pe, **SMALL | options)
    for name, parameter in model.named_parameters():  # as after training: no norm is the identity
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.5)
    return model.eval()


def cosines(rows):  # (N, D) -> (N, N)
    return F.cosine_similarity(rows[:, None], rows[None], dim=-1)


# --- Laws


@pytest.mark.parametrize("join", EVERY_JOIN)
def test_maps_are_symmetric_with_ones_on_the_diagonal(join):
    found = correlation(model_with(join))
    assert found.maps.shape == (3, 15, 15)
    assert found.grid == (3, 5)
    torch.testing.assert_close(found.maps, found.maps.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.maps.diagonal(dim1=1, dim2=2), torch.ones(3, 15).double(), rtol=0, atol=1e-12)
    assert found.maps.abs().max() <= 1 + 1e-12


@pytest.mark.parametrize("join", EVERY_JOIN)
def test_prefix_rows_change_nothing(join):
    model = model_with(join, class_token=True, reg_tokens=2)
    before = correlation(model).maps
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("pos_embed"):
                parameter[:, :3] += 100.0
    torch.testing.assert_close(correlation(model).maps, before, rtol=0, atol=0)


def test_a_table_without_prefix_rows_is_read_from_its_first_patch():
    model = model_with("lape", no_embed_class=True)
    assert model.pos_embed.shape == (1, 15, 16)
    first = entering(model)[0]
    expected = model.blocks[0].pe_norm(model.pos_embed)[0].detach().double()
    torch.testing.assert_close(first, expected)


def test_tokens_that_lape_and_lape_sharing_do_not_normalise_apart_have_the_same_first_layer():
    alike = [correlation(model_with(join)).maps[0] for join in ("lape", "lape-sharing")]
    torch.testing.assert_close(*alike, rtol=0, atol=1e-7)


def test_the_model_is_left_as_it_was():
    model = model_with("default")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    correlation(model)
    assert model.blocks[0].norm1.weight.dtype == torch.float32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# --- What enters attention, by the formula of each join (METHOD 7)


def test_default_is_the_layers_own_norm_of_the_table():
    model = model_with("default")
    for layer, block in enumerate(model.blocks):
        norm = block.norm1
        table = model.pos_embed[0, 1:].double()
        expected = F.layer_norm(table, (16,), norm.weight.double(), norm.bias.double(), norm.eps)
        torch.testing.assert_close(entering(model)[layer], expected.detach(), rtol=0, atol=1e-12)


def test_shared_is_the_layers_own_norm_of_all_that_went_into_the_stream():
    model = model_with("shared")
    for layer, block in enumerate(model.blocks):
        norm = block.norm1
        stream = (layer + 1) * model.pos_embed[0, 1:].double()
        expected = F.layer_norm(stream, (16,), norm.weight.double(), norm.bias.double(), norm.eps)
        torch.testing.assert_close(entering(model)[layer], expected.detach(), rtol=0, atol=1e-12)


def test_unshared_is_the_layers_own_norm_of_the_sum_so_far():
    model = model_with("unshared")
    stream = torch.zeros(15, 16).double()
    for layer, block in enumerate(model.blocks):
        norm, stream = block.norm1, stream + block.pos_embed[0, 1:].double()
        expected = F.layer_norm(stream, (16,), norm.weight.double(), norm.bias.double(), norm.eps)
        torch.testing.assert_close(entering(model)[layer], expected.detach(), rtol=0, atol=1e-12)


def test_lape_is_the_chain_of_pe_norms():
    model = model_with("lape")
    position = model.pos_embed
    for layer, block in enumerate(model.blocks):
        position = block.pe_norm(position)
        torch.testing.assert_close(entering(model)[layer], position[0, 1:].detach().double(), rtol=0, atol=1e-6)


def test_lape_sharing_is_each_pe_norm_of_the_table():
    model = model_with("lape-sharing")
    for layer, block in enumerate(model.blocks):
        expected = block.pe_norm(model.pos_embed)[0, 1:].detach().double()
        torch.testing.assert_close(entering(model)[layer], expected, rtol=0, atol=1e-6)


# --- Known answers


def test_a_table_with_two_kinds_of_rows():
    """Rows ±v with v of mean zero: the norm without bias keeps the sign, so cosines are +1 and -1."""
    model = model_with("default")
    sign = torch.tensor([1.0, -1.0]).repeat(8)[:15]
    with torch.no_grad():
        model.pos_embed[0, 1:] = sign[:, None] * torch.tensor([1.0, -1.0]).repeat(8)
        for block in model.blocks:
            block.norm1.bias.zero_()
    expected = torch.outer(sign, sign).double().expand(3, -1, -1)
    torch.testing.assert_close(correlation(model).maps, expected, rtol=0, atol=1e-12)


def test_sinusoid_falls_off_with_the_distance_between_positions():
    model = model_with("lape", "sinusoidal-1d")
    torch.nn.init.ones_(model.blocks[0].pe_norm.weight)
    torch.nn.init.zeros_(model.blocks[0].pe_norm.bias)
    row = correlation(model).maps[0, 0]
    assert row[0] > row[1] > row[2] > row[3]


def test_one_token_is_folded_to_the_grid_row_by_row():
    maps = torch.arange(2 * 15 * 15).view(2, 15, 15).double()
    found = Correlation(maps, (3, 5))
    assert found.token == 1 * 5 + 2  # the centre of 3×5
    assert found.of_token.shape == (2, 3, 5)
    assert found.of_token[1, 2, 4] == maps[1, 7, 14]


def test_another_grid_than_the_models_own():
    found = correlation(model_with("lape"), grid=(4, 7))
    assert found.maps.shape == (3, 28, 28)
    assert found.grid == (4, 7)


def test_a_row_of_zeros_is_similar_to_nothing():
    model = model_with("lape")
    with torch.no_grad():
        for block in model.blocks:
            block.pe_norm.weight.zero_()
            block.pe_norm.bias.zero_()
    assert correlation(model).maps.abs().max() == 0


def by_offset(maps):
    """Whether similarity depends on the offset of two patches alone, in a grid of 3 by 5."""
    pairs = maps.unflatten(2, (3, 5)).unflatten(1, (3, 5))  # (layers, H, W, H, W)
    return torch.allclose(pairs[:, 1:, 1:, 1:, 1:], pairs[:, :-1, :-1, :-1, :-1], rtol=0, atol=1e-12)


def test_by_a_rotation_patches_are_as_alike_as_equal_queries_and_keys_turned_by_it() -> None:
    model = model_with("default", "rope-axial", embed_dim=32).double()
    maps = correlation(model).maps
    row, column = torch.arange(3.0).double().repeat_interleave(5), torch.arange(5.0).double().repeat(3)
    frequencies = 100.0 ** (-4 * torch.arange(4).double() / 16)
    angles = torch.cat([column[:, None] * frequencies, row[:, None] * frequencies], dim=1)  # (15, 8)
    expected = (angles[:, None] - angles[None]).cos().mean(-1)
    torch.testing.assert_close(maps, expected.expand(3, -1, -1), rtol=0, atol=1e-9)
    mixed = correlation(model_with("default", "rope-mixed", embed_dim=32).double())
    assert by_offset(mixed.maps)
    assert (mixed.layer_difference > 0).all()
    assert not by_offset(correlation(model_with("lape", "learnable+rope-axial", embed_dim=32)).maps)  # its table's


@pytest.mark.parametrize("pe", ["alibi-2d", "lookhere-180", "relative"])
def test_by_a_bias_patches_are_as_alike_as_the_attention_that_they_get(pe) -> None:
    model = model_with("default", pe, embed_dim=16, num_heads=4).double()
    if pe == "relative":
        for name, parameter in model.named_parameters():
            if "relative" in name:
                torch.nn.init.normal_(parameter)
    maps = correlation(model).maps
    biases = [rung.bias[0, :, 1:, 1:] for rung in lape.ladder(model)]
    assert by_offset(maps)
    for alike, bias in zip(maps, biases, strict=True):  # content of length 0: attention is the softmax of the bias
        weights = bias.softmax(-1)
        torch.testing.assert_close(alike, (weights / weights.diagonal(dim1=1, dim2=2)[..., None]).mean(0))


@pytest.mark.parametrize("pe", ["none", "peg", "alibi-2d+rope-axial"])
def test_without_a_table_there_is_nothing_to_correlate(pe):
    with pytest.raises(UsageError, match=re.escape(pe)):
        correlation(model_with("default", pe))


def test_an_untouched_model_is_refused():
    import timm

    with pytest.raises(UsageError, match=r"lape\.apply"):
        correlation(timm.create_model("vit_tiny_patch16_224", **SMALL))


def test_a_normed_stream_has_no_correlation_of_what_joined_it() -> None:
    for join in ("default", "shared", "unshared"):
        with pytest.raises(UsageError, match="a norm on its residual stream"):
            entering(lape.create_model("cct_2_3x2_32", join))
    assert entering(lape.create_model("cct_2_3x2_32", "lape")).isfinite().all()


def test_layers_on_several_grids_have_none_either() -> None:
    swin = lape.create_model("swin_tiny_patch4_window7_224", "lape", img_size=32, window_size=4, depths=(1, 1, 1, 1))
    with pytest.raises(UsageError, match="compares layers on one grid"):
        entering(swin)


def test_positions_that_enter_in_two_ways_have_none() -> None:
    with pytest.raises(UsageError, match="start='preserve'"):
        correlation(model_with("lape", start="preserve"))


def test_a_grid_without_patches_is_refused() -> None:
    with pytest.raises(UsageError, match=r"received \(0, 4\)"):
        correlation(model_with("lape"), grid=(0, 4))


def test_a_folded_model_has_the_correlation_that_it_had() -> None:
    for join in ("default", "lape"):
        model = model_with(join)
        before = correlation(model).maps
        torch.testing.assert_close(correlation(lape.fold(model)).maps, before, rtol=0, atol=0)


def test_the_table_goes_through_the_norm_that_it_shares_with_tokens_before_the_first_block() -> None:
    model = model_with("default", pre_norm=True)
    joint, table = model.norm_pre, model.pos_embed[0, 1:].detach().double()
    stream = F.layer_norm(table, (16,), joint.weight.double(), joint.bias.double(), joint.eps)
    for layer, block in enumerate(model.blocks):
        norm = block.norm1
        expected = F.layer_norm(stream, (16,), norm.weight.double(), norm.bias.double(), norm.eps).detach()
        torch.testing.assert_close(entering(model)[layer], expected, rtol=0, atol=1e-12)
    shared = model_with("shared", pre_norm=True)  # joins behind that norm
    norm = shared.blocks[0].norm1
    expected = F.layer_norm(table, (16,), norm.weight.double(), norm.bias.double(), norm.eps).detach()
    torch.testing.assert_close(entering(shared)[0], expected, rtol=0, atol=1e-12)
    assert correlation(applied("clip", join="default")).maps.isfinite().all()


# --- How two-dimensional, how local, how different from layer to layer


def of_rows(rows, grid):  # (H·W, D)
    return Correlation(cosines(rows.double())[None], grid)


def of_distance(profile, grid):
    """One layer whose similarity is a function of the distance of two patches."""
    row, column = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    places = torch.stack([row.flatten(), column.flatten()], dim=1).double()
    return Correlation(profile(torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist"))[None], grid)


def transposed(found):
    height, width = found.grid
    maps = found.maps.unflatten(2, found.grid).unflatten(1, found.grid).permute(0, 2, 1, 4, 3)
    return Correlation(maps.flatten(3).flatten(1, 2), (width, height))


@pytest.mark.parametrize("grid", [(5, 5), (4, 7), (6, 3)])
def test_a_table_of_rows_or_of_columns_alone_is_not_two_dimensional(grid) -> None:
    height, width = grid
    of_row = torch.randn(height, 1, 8).expand(-1, width, -1).reshape(height * width, 8)
    of_column = torch.randn(1, width, 8).expand(height, -1, -1).reshape(height * width, 8)
    for rows in (of_row, of_column):
        assert float(of_rows(rows, grid).two_dimensionality) == pytest.approx(0, abs=1e-12)


def test_the_two_dimensional_sinusoid_is_wholly_so_and_the_one_dimensional_is_not() -> None:
    grid = (6, 6)
    assert float(of_rows(sinusoidal_2d(grid, 0, 32)[0], grid).two_dimensionality) == pytest.approx(1, abs=1e-12)
    found = correlation(lape.create_model("deit_tiny_patch16_224", "default", pe="sinusoidal-1d", depth=1))
    assert float(found.two_dimensionality) == pytest.approx(0.467, abs=5e-4)
    assert float(found.half_distance) == pytest.approx(2.33, abs=5e-3)


def test_a_fall_is_known_by_hand() -> None:
    # In a row similarity is 1 - 0.1·d, in a column 1 - 0.4·d; on 2×3 patches the only distance that both have is 1.
    row, column = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    maps = 1 - 0.1 * (column[:, None] - column).abs() - 0.4 * (row[:, None] - row).abs()
    assert float(Correlation(maps[None].double(), (2, 3)).two_dimensionality) == pytest.approx(0.25)
    row, column = (torch.arange(9) // 3), torch.arange(9) % 3  # distances 1 and 2 count alike, whatever their pairs
    maps = 1 - torch.tensor([0, 0.1, 0.5])[(column[:, None] - column).abs()] - 0.4 * (row[:, None] - row).abs()
    assert float(Correlation(maps[None].double(), (3, 3)).two_dimensionality) == pytest.approx(0.3 / 0.6)


def test_transposing_the_grid_changes_no_number() -> None:
    found = of_rows(torch.randn(12, 8), (3, 4))
    other = transposed(found)
    assert other.grid == (4, 3)
    torch.testing.assert_close(other.two_dimensionality, found.two_dimensionality)
    torch.testing.assert_close(other.half_distance, found.half_distance)
    assert other.reach == found.reach == pytest.approx(13**0.5)


def test_what_falls_in_no_direction_and_what_lies_in_a_line_have_no_two_dimensionality() -> None:
    assert of_rows(torch.ones(9, 4), (3, 3)).two_dimensionality.isnan().all()
    assert of_rows(torch.randn(5, 4), (1, 5)).two_dimensionality.isnan().all()


def test_half_distance_of_known_profiles() -> None:
    assert float(of_distance(lambda d: 1 - d / 8, (4, 5)).half_distance) == pytest.approx(4)
    assert float(of_distance(lambda d: 1 - d / 8, (1, 9)).half_distance) == pytest.approx(4)
    steps = torch.tensor([1, 0.8, 0.2, 0.9])  # the first crossing counts: 0.8 to 0.2 passes 0.5 half-way
    assert float(of_distance(lambda d: steps[d.long()].double(), (1, 4)).half_distance) == pytest.approx(1.5)
    assert float(of_distance(lambda d: (d == 0).double(), (3, 3)).half_distance) == pytest.approx(0.5)
    assert float(of_distance(lambda d: 1 - 0.01 * d, (3, 3)).half_distance) == float("inf")
    assert of_distance(torch.zeros_like, (3, 3)).half_distance.isnan().all()


def test_layers_that_are_alike_do_not_differ() -> None:
    one = cosines(torch.randn(6, 4).double())
    assert Correlation(one.expand(3, -1, -1), (2, 3)).layer_difference.tolist() == [0, 0, 0]
    ones, alone = torch.ones(6, 6).double(), torch.eye(6).double()
    different = Correlation(torch.stack([ones, ones, alone]), (2, 3))  # every pair but a patch with itself by 1
    assert different.layer_difference.tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert Correlation(ones[None], (2, 3)).layer_difference.isnan().all()


def test_a_models_numbers_are_mean_median_and_mean_over_its_layers() -> None:
    found = correlation(model_with("lape", depth=4, pe="sinusoidal-1d"))
    assert found.shape.two_dimensionality == pytest.approx(float(found.two_dimensionality.mean()))
    assert found.shape.half_distance == sorted(found.half_distance.tolist())[1]
    assert found.shape.layer_difference == pytest.approx(float(found.layer_difference.mean()))


def test_a_fresh_learnable_table_is_two_dimensional_and_reaches_nowhere() -> None:
    torch.manual_seed(0)
    found = of_rows(torch.randn(196, 192), (14, 14))
    assert float(found.two_dimensionality) == pytest.approx(1, abs=0.02)
    assert float(found.half_distance) == pytest.approx(0.5, abs=0.02)


# --- Decomposition (6)-(7)


def images(*shape):
    torch.manual_seed(3)
    return torch.randn(*shape or (4, 1, 6, 10))


def by_hand(name, model, given):
    """λ2 of every layer (layers, B, N) by the definition, from what enters the norms of the model itself in float64."""
    model, entered = copy.deepcopy(model).double(), []
    for layer in range(3):
        norm = model.get_submodule(FOREIGN[name].norms.format(layer))
        norm.register_forward_hook(lambda norm, inputs, _: entered.append((norm, inputs[0])))
    with torch.no_grad():
        model(given.double() if given.is_floating_point() else given)
    stream, found = 0, []
    for rung, (norm, x) in zip(lape.ladder(model), entered, strict=True):
        x = x.transpose(0, 1) if FOREIGN[name].tokens_at == 0 else x.flatten(1, -2)
        stream = stream if rung.residual is None else stream + rung.residual[:, FOREIGN[name].unused :]
        sigma = [(part.var(-1, correction=0) + norm.eps).sqrt() for part in (stream + 0 * x, x)]
        found.append(sigma[0] / sigma[1])
    return torch.stack(found).detach()


@pytest.mark.parametrize("join", ["default", "shared", "unshared"])
@EVERY_KIND
def test_equation_6_holds_in_every_library(name, join) -> None:
    model, given = applied(name, join=join), inputs(name, 3)
    if join == "default" and joint_norm(positions(model)) is not None:
        with pytest.raises(UsageError, match="before its first block"):
            decomposition(model, [given])
        return
    found = decomposition(model, [given])
    assert found.error < 1e-9
    torch.testing.assert_close(found.weights[1], by_hand(name, model, given), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.weights.sum(0), torch.ones_like(found.weights[0]))
    rows, columns = found.grid
    assert found.of_patches.shape[2:] == (3, rows * columns)
    assert found.of_prefix.shape[-1] == found.weights.shape[-1] - rows * columns
    assert found.of_positions.shape == (3, rows, columns)


def test_patches_that_are_shuffled_have_no_place_to_be_weighed_at() -> None:
    shuffled = applied("vit-mae", join="default").mae
    with pytest.raises(UsageError, match="ViT-MAE shuffles its patches"):
        decomposition(shuffled, [inputs("vit-mae")])


@pytest.mark.parametrize(
    "options", [{"reg_tokens": 4}, {"no_embed_class": True}, {"reg_tokens": 2, "no_embed_class": True}, {"eps": 0.5}]
)
def test_prefix_tokens_stand_apart(options) -> None:
    eps = options.pop("eps", 1e-6)
    model = model_with("default", norm_layer=partial(torch.nn.LayerNorm, eps=eps), **options)
    found = decomposition(model, [images()])
    prefix = 1 + options.get("reg_tokens", 0)
    assert found.weights.shape == (3, 3, 4, prefix + 15)
    assert found.of_prefix.shape == (3, 3, 4, prefix)
    torch.testing.assert_close(torch.cat([found.of_prefix, found.of_patches], dim=-1), found.weights)
    torch.testing.assert_close(found.mean, found.weights[..., prefix:].mean((2, 3)))
    torch.testing.assert_close(found.spread, found.weights[..., prefix:].flatten(2).std(2, correction=0))
    whole = model.double().patch_embed(images().double()) + model.pos_embed[:, -15:]
    sigma = [(part.var(-1, correction=0) + eps).sqrt() for part in (model.pos_embed[:, -15:], whole)]
    torch.testing.assert_close(found.of_patches[1, 0], (sigma[0] / sigma[1]).detach())


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_weights_do_not_change_with_the_scale_of_both_and_obey_the_triangle(scale, seed) -> None:
    torch.manual_seed(seed)
    tokens, position = torch.randn(2, 5, 8).double()
    first, second, third = decompose(tokens, position)
    for one, other in zip((first, second, third), decompose(scale * tokens, scale * position), strict=True):
        torch.testing.assert_close(one, other)
    assert (third <= 1e-12).all()
    assert ((first - second).abs() <= 1 + 1e-12).all()
    swapped = decompose(position, tokens)
    torch.testing.assert_close(swapped[0], second)


@pytest.mark.parametrize(("scale", "second"), [(1e6, 1.0), (0.0, 0.0)])
def test_a_huge_table_is_all_that_the_first_layer_sees_and_a_table_of_zeros_is_nothing(scale, second) -> None:
    model = model_with("default", norm_layer=partial(torch.nn.LayerNorm, eps=1e-12))
    with torch.no_grad():
        model.pos_embed.normal_().mul_(scale)
    found = decomposition(model, [images()])
    expected = torch.full_like(found.of_patches[1, 0], second)
    torch.testing.assert_close(found.of_patches[1, 0], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.of_patches[0, 0], 1 - expected, rtol=0, atol=1e-4)


def test_the_division_into_batches_changes_nothing() -> None:
    model, given = model_with("default"), images()
    whole = decomposition(model, [given]).weights
    torch.testing.assert_close(decomposition(model, given.split(3)).weights, whole, rtol=1e-12, atol=1e-14)


def test_the_decomposed_model_is_left_as_it_was() -> None:
    model = model_with("default").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(part._forward_hooks) for part in model.modules()]
    decomposition(model, [images()])
    assert model.training
    assert model.pos_embed.dtype == torch.float32
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropout_has_no_say() -> None:
    model = model_with("default", drop_rate=0.5, pos_drop_rate=0.5, patch_drop_rate=0.5).train()
    first, second = (decomposition(model, [images()]).weights for _ in range(2))
    assert torch.equal(first, second)


class Inexact(torch.nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) * (1 + 1e-7)


def test_a_norm_that_does_something_else_is_found_out() -> None:
    with pytest.raises(RunError, match=r"Equation 6 is missed by 1\.0e-07"):
        decomposition(model_with("default", norm_layer=Inexact), [images()])


@pytest.mark.parametrize("join", ["lape", "lape-sharing"])
def test_a_join_without_a_shared_norm_has_no_weights(join) -> None:
    with pytest.raises(UsageError, match=f"join='{join}' gives positions one of their own"):
        decomposition(model_with(join), [images()])


def test_equation_6_needs_a_layer_norm_a_stream_that_keeps_the_table_and_images_of_one_size() -> None:
    from timm.layers import RmsNorm

    with pytest.raises(UsageError, match="RmsNorm in its place"):
        decomposition(model_with("default", norm_layer=RmsNorm), [images()])
    with pytest.raises(UsageError, match="a norm on its residual stream"):
        decomposition(lape.create_model("cct_2_3x2_32", "default"), [images(1, 3, 32, 32)])
    swin = lape.create_model("swin_tiny_patch4_window7_224", "default", pe="learnable", img_size=32, window_size=4)
    with pytest.raises(UsageError, match="have several"):
        decomposition(swin, [images(1, 3, 32, 32)])
    with pytest.raises(UsageError, match="before its first block"):
        decomposition(model_with("default", pre_norm=True), [images()])
    model = model_with("default", dynamic_img_size=True)
    with pytest.raises(UsageError, match="received 3x5, 4x5"):
        decomposition(model, [images(), images(1, 1, 8, 10)])
    with pytest.raises(UsageError, match="received no image at all"):
        decomposition(model, [])

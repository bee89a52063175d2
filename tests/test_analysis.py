"""Position correlation: laws first, then tables with known answers."""

import pytest
import torch
import torch.nn.functional as F

import lape
from lape.analysis import Correlation, correlation, entering
from lape.errors import UsageError

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


@pytest.mark.parametrize("pe", ["none", "relative"])
def test_without_a_table_there_is_nothing_to_correlate(pe):
    with pytest.raises(UsageError, match=pe):
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

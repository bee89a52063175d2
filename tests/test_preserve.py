"""Laws of a start that preserves what a model with the default join computes."""

import copy
from typing import Any

import pytest
import timm
import torch
from tiny_hosts import EVERY_HOST, TINY, gradients, host, images, shaken
from torch import Tensor, nn

import lape
from lape.errors import UsageError

JOINS = pytest.mark.parametrize("join", ["lape", "lape-sharing"])


def grown(model: nn.Module) -> nn.Module:
    """Let p_l in, in some layers more than in others."""
    shaken(model)
    for layer, block in enumerate(model.blocks):  # pyright: ignore
        nn.init.constant_(block.pe_norm.amount, 0.5 - layer)
    return model


@EVERY_HOST
@JOINS
def test_at_the_start_nothing_changes_bit_for_bit(name: str, join: str) -> None:
    model = host(name)
    x = images(model)
    before = model(x)
    assert torch.equal(lape.apply(model, join, start="preserve")(x), before)
    assert torch.equal(lape.remove(model)(x), before)


def test_dropout_meets_the_table_as_before() -> None:
    model = host(pos_drop_rate=0.5).train()
    joined = lape.apply(copy.deepcopy(model), start="preserve")
    x, outputs = images(model), []
    for each in (model, joined):
        torch.manual_seed(3)
        outputs.append(each(x))
    assert torch.equal(*outputs)


@JOINS
def test_the_amounts_learn_at_once_and_the_norms_after_them(join: str) -> None:
    model = lape.apply(host(), join, start="preserve")
    for step in range(2):
        model.zero_grad()
        model(images(model)).square().sum().backward()
        found = gradients(model)
        for layer in range(3):
            assert found[f"blocks.{layer}.pe_norm.amount"].abs() > 0
            assert bool(found[f"blocks.{layer}.pe_norm.weight"].any()) is (step == 1)
        grown(model)


def test_the_ladder_is_that_of_default_and_of_lape_weighed_by_the_amounts() -> None:
    model = grown(lape.apply(host(), start="preserve"))
    other: Any = lape.apply(host())
    shaken(other)
    other.load_state_dict({key: value for key, value in model.state_dict().items() if not key.endswith("amount")})
    for layer, (rung, plain) in enumerate(zip(lape.ladder(model), lape.ladder(other), strict=True)):
        assert isinstance(rung.attention, Tensor)
        assert isinstance(plain.attention, Tensor)
        torch.testing.assert_close(rung.attention, (0.5 - layer) * plain.attention)
        assert (rung.residual is None) is (layer > 0)
    assert torch.equal(lape.ladder(model)[0].residual, model.pos_embed)  # pyright: ignore


@EVERY_HOST
def test_folded_copied_and_saved_it_computes_the_same(name: str) -> None:
    model = grown(lape.apply(host(name), start="preserve")).double()
    x = images(model).double()
    expected = model(x)
    again = lape.apply(host(name), start="preserve").double()
    again.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), lape.fold(copy.deepcopy(model)), again):
        torch.testing.assert_close(other(x), expected, rtol=1e-11, atol=1e-11)


def test_on_another_grid_the_table_is_resized_as_before() -> None:
    options: dict[str, Any] = {**TINY, "img_size": 32, "dynamic_img_size": True}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    x = torch.randn(1, 3, 48, 64)
    before = model(x)
    assert torch.equal(lape.apply(model, start="preserve")(x), before)


def test_amounts_do_not_decay() -> None:
    model: Any = lape.apply(host(), start="preserve")
    assert {f"blocks.{layer}.pe_norm.amount" for layer in range(3)} <= model.no_weight_decay()


def test_a_file_of_the_default_join_gives_its_own_function() -> None:
    default = host()
    model = lape.create_model("vit_tiny_patch16_224", start="preserve", **TINY, img_size=(32, 64)).eval()
    with pytest.warns(UserWarning, match="amount"):
        lape.load_weights(model, default.state_dict())
    assert torch.equal(model(images(default)), default(images(default)))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ({"join": "shared"}, "join='shared' has no p_l"),
        ({"join": "default"}, "join='default' has no p_l"),
        ({"pe": "sinusoidal-1d"}, "sinusoidal-1d would be another"),
        ({"pe": "learnable+relative"}, "would be another"),
        ({"start": "preserved"}, "Did you mean 'preserve'"),
    ],
    ids=str,
)
def test_what_cannot_be_preserved_is_refused(names: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        lape.apply(host(), **{"start": "preserve", **names})


def test_a_swin_without_a_table_has_nothing_to_preserve() -> None:
    with torch.device("meta"), pytest.raises(UsageError, match="its own position embedding, relative"):
        lape.apply(timm.create_model("swin_tiny_patch4_window7_224"), start="preserve")

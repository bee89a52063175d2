"""Laws of a start that preserves what a model with the default join computes."""

import copy
from typing import Any

import pytest
import timm
import torch
from foreign_hosts import EVERY_KIND, applied, inputs, tokens, untouched
from tiny_hosts import EVERY_HOST, TINY, gradients, host, images, shaken
from torch import Tensor, nn

import lape
from lape.errors import UsageError
from lape.surgery.operation import positions

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


@EVERY_KIND
@JOINS
def test_at_the_start_no_host_of_another_library_changes_bit_for_bit(name: str, join: str) -> None:
    model, x = untouched(name), inputs(name)
    before = tokens(model, x)
    assert torch.equal(tokens(applied(name, model, join=join, start="preserve"), x), before)
    for block in positions(model).blocks:  # every layer's own gain, alone, changes what is computed
        nn.init.constant_(block.pe_norm.amount, 0.5)
        assert not torch.allclose(tokens(model, x), before)
        nn.init.zeros_(block.pe_norm.amount)
    assert torch.equal(tokens(model, x), before)


@EVERY_KIND
def test_in_every_library_the_amounts_learn_at_once(name: str) -> None:
    model, plain, x = applied(name, start="preserve").train(), untouched(name).train(), inputs(name)
    for part in (model, plain):
        tokens(part, x).square().sum().backward()
    found = gradients(model)
    for parameter, gradient in gradients(plain).items():  # and all others as in the untouched model
        torch.testing.assert_close(found.pop(parameter), gradient, rtol=1e-4, atol=1e-5)
    amounts = {parameter for parameter in found if parameter.endswith("pe_norm.amount")}
    assert len(amounts) == 3
    assert all(found[amount].abs() > 0 for amount in amounts)
    assert not any(found[parameter].any() for parameter in found.keys() - amounts)


@pytest.mark.parametrize("name", ["vit", "sequences"])
def test_compiled_it_computes_the_same(name: str) -> None:
    model, x = shaken(applied(name, start="preserve")), inputs(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tokens(compiled, x), tokens(model, x), rtol=1e-4, atol=1e-5)


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


# --- Models without a table of their own: they are given one, and it stays out of the stream


@pytest.mark.parametrize(
    ("name", "options", "names"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 2), "num_heads": (1, 2)}, {}),
        ("vit_small_patch16_rope_224", {**TINY, "img_size": 32}, {"pe": "learnable"}),
        ("vit_small_patch16_rope_224", {**TINY, "img_size": 32}, {"pe": "sinusoidal-1d", "join": "lape-sharing"}),
    ],
    ids=str,
)
def test_a_model_without_a_table_keeps_its_function_and_is_given_one(
    name: str, options: dict[str, Any], names: dict[str, str]
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 5, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    x = images(model.eval())
    before, again = model(x), copy.deepcopy(model)
    assert torch.equal(lape.apply(model, start="preserve", **names)(x), before)
    assert all(rung.residual is None for rung in lape.ladder(model))
    model(x).square().sum().backward()
    amounts = [value.grad for key, value in model.named_parameters() if key.endswith("amount")]
    assert len(amounts) == 3
    assert all(amount is not None and amount.abs() > 0 for amount in amounts)
    assert torch.equal(lape.remove(copy.deepcopy(model))(x), before)
    expected = shaken(model)(x)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(lape.fold(copy.deepcopy(model))(x), expected, rtol=1e-5, atol=1e-5)
    other = lape.apply(again, start="preserve", **names)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), expected)


def test_a_bias_that_the_model_did_not_have_is_no_part_of_its_function() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1,), num_heads=(1,))
    with pytest.raises(UsageError, match="its own position embedding, relative; learnable would be another"):
        lape.apply(swin, pe="learnable", start="preserve")
    with pytest.raises(UsageError, match="would be another"):
        lape.apply(timm.create_model("vit_small_patch16_rope_224", **TINY), pe="learnable+relative", start="preserve")

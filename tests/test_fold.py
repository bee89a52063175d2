"""Laws of folding: the same function with constants for positions, for the grids named and no other."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tiny_hosts import EVERY_HOST, EVERY_SCHEME, host, images, shaken

import lape
from lape.errors import UsageError


@EVERY_HOST
@EVERY_SCHEME
def test_a_folded_model_gives_the_same_outputs_without_norms_or_tables(name: str, names: dict[str, str]) -> None:
    model = shaken(lape.apply(host(name), **names)).double()
    x = images(model).double()
    with torch.no_grad():
        expected = model(x)
        folded = lape.fold(copy.deepcopy(model))
        assert (folded(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert not any("pe_norm" in n or "pos_embed" in n or "bias_table" in n for n in folded.state_dict())
    assert "PositionNorm" not in repr(folded)


def test_the_untouched_join_folds_too() -> None:
    model = lape.apply(host(), join="default")
    x = images(model)
    expected = model(x)
    torch.testing.assert_close(lape.fold(model)(x), expected)


@pytest.mark.parametrize("names", [{}, {"pe": "sinusoidal-2d"}, {"join": "default", "pe": "relative"}], ids=str)
def test_it_serves_the_grids_named_and_refuses_every_other(names: dict[str, Any]) -> None:
    model = shaken(lape.apply(host(img_size=32, dynamic_img_size=True), **names)).double()
    folded = lape.fold(copy.deepcopy(model), grids=[(2, 2), (3, 5)])
    for height, width in ((32, 32), (48, 80)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    with pytest.raises(UsageError, match=r"folded for 2x2, 3x5 patches; the input has 5x3.*grids=\[\(5, 3\)\]"):
        folded(torch.randn(1, 3, 80, 48, dtype=torch.float64))


def test_it_saves_and_loads() -> None:
    model = shaken(lape.apply(host()))
    x = images(model)
    expected = model(x)
    folded = lape.fold(copy.deepcopy(model))
    assert torch.equal(pickle.loads(pickle.dumps(folded))(x), expected)
    file = io.BytesIO()
    torch.save(folded.state_dict(), file)
    file.seek(0)
    fresh = lape.fold(lape.apply(host()))
    assert not torch.equal(fresh(x), expected)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(fresh(x), expected)


def test_it_stays_in_evaluation_mode() -> None:
    folded = lape.fold(lape.apply(host()))
    assert not folded.training
    assert folded.eval() is folded
    with pytest.warns(UserWarning, match="A folded model is for inference"):
        assert folded.train() is folded
    assert not any(part.training for part in folded.modules())
    with pytest.raises(RuntimeError, match="does not require grad"):
        folded(images(folded)).sum().backward()


def test_it_compiles_and_exports() -> None:
    folded = lape.fold(shaken(lape.apply(host(depth=2))))
    x = images(folded)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(folded, fullgraph=True, backend="aot_eager")(x), folded(x))
    torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), folded(x))


def test_what_cannot_be_folded_removed_or_resized_says_so() -> None:
    with pytest.raises(UsageError, match=r"Call lape\.apply"):
        lape.fold(host())
    folded = lape.fold(lape.apply(host()))
    with pytest.raises(UsageError, match="folded already, for 2x4 patches"):
        lape.fold(folded)
    with pytest.raises(UsageError, match="no table to give back"):
        lape.remove(folded)
    with pytest.raises(UsageError, match="set the size, then fold"):
        folded.set_input_size((64, 64))

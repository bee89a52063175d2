"""Laws of models that their user's own code makes: they come back by that code, and a file never chooses it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from foreign_hosts import FOREIGN, applied, inputs, untouched
from tiny_hosts import TINY
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import lape
from lape.errors import RunError, UsageError
from lape.sharing import hub

EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAME = "vit_tiny_patch16_224"


def torchvisions() -> nn.Module:
    return VisionTransformer(32, 8, 3, 2, 32, 48, num_classes=5)


def with_a_head() -> Any:
    model = timm.create_model(NAME, img_size=32, **TINY)
    model.head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 3))
    return model


def learnt(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def assert_same(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("make", [torchvisions, with_a_head])
@pytest.mark.parametrize("names", [None, {}, {"join": "unshared", "pe": "learnable"}], ids=str)
def test_a_model_comes_back_by_what_makes_it(
    make: Callable[[], nn.Module], names: dict[str, str] | None, tmp_path: Path
) -> None:
    model = make() if names is None else lape.apply(make(), **names)
    learnt(model)
    known = lape.Known(classes=["a", "b"], metrics={"accuracy, %": 90.0}, data="pets")
    for path in (tmp_path / "folder", tmp_path / "one.safetensors"):
        lape.save_pretrained(model, path, known, build=make, example=EXAMPLE)
        again = lape.from_pretrained(path, build=make)
        assert_same(again, model)
        assert torch.equal(again(EXAMPLE), model(EXAMPLE))
    card = (tmp_path / "folder" / hub.CARD).read_text()
    assert f"`test_built.{make.__name__}`" in card
    assert 'lape.from_pretrained("USER/folder", build=...)' in card
    assert "timm" not in card


@pytest.mark.parametrize("name", FOREIGN)
def test_every_host_does(name: str, tmp_path: Path) -> None:
    """A class with a row that is not registered has its join from what makes it."""

    def make() -> nn.Module:
        model = copy.deepcopy(plain)
        return applied(name, model) if "host" in FOREIGN[name].options else model

    plain = untouched(name)
    model = learnt(applied(name))
    lape.save_pretrained(model, tmp_path, build=make, example=(inputs(name),))
    assert_same(lape.from_pretrained(tmp_path, build=make), model)


def test_a_replaced_head_says_what_to_do_and_that_works(tmp_path: Path) -> None:
    model: Any = learnt(lape.apply(timm.create_model(NAME, img_size=32, **TINY)))
    model.head = nn.Linear(32, 3)
    with pytest.raises(UsageError, match=r"head\.weight is \(3, 32\).*save_pretrained\(model, folder, num_classes=3\)"):
        lape.save_pretrained(model, tmp_path)
    again = lape.from_pretrained(lape.save_pretrained(model, tmp_path, num_classes=3))
    assert_same(again, model)
    assert torch.equal(again(EXAMPLE), model(EXAMPLE))
    other = lape.apply(with_a_head())
    with pytest.raises(UsageError, match=r"head\.weight is missing.*build=make, example=images"):
        lape.save_pretrained(other, tmp_path)
    twice: Any = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, **TINY)
    twice.head = nn.Linear(32, 3)
    with pytest.raises(UsageError, match=r"build=make"):  # its other head tells five classes still
        lape.save_pretrained(twice, tmp_path)


def test_what_makes_another_model_is_refused(tmp_path: Path) -> None:
    model = learnt(lape.apply(torchvisions()))
    model.heads = nn.Linear(32, 2)
    with pytest.raises(UsageError, match=r"cannot be made again by build=:.*heads.*make the model as it is now"):
        lape.save_pretrained(model, tmp_path, build=torchvisions, example=EXAMPLE)
    other: Any = learnt(lape.apply(torchvisions()))
    other.encoder.layers[1].mlp[1] = nn.ReLU()
    with pytest.raises(UsageError, match="computes something else with them"):
        lape.save_pretrained(other, tmp_path, build=torchvisions, example=EXAMPLE)
    with pytest.raises(UsageError, match=r"with no join.*one with join='lape'"):
        lape.save_pretrained(torchvisions(), tmp_path, build=lambda: lape.apply(torchvisions()), example=EXAMPLE)
    with pytest.raises(UsageError, match=r"returned a int"):
        lape.save_pretrained(model, tmp_path, build=lambda: 3, example=EXAMPLE)  # pyright: ignore
    with pytest.raises(UsageError, match=r"both or neither"):
        lape.save_pretrained(model, tmp_path, build=torchvisions)
    with pytest.raises(UsageError, match=r"called without arguments; received depth"):
        lape.save_pretrained(model, tmp_path, build=torchvisions, example=EXAMPLE, depth=2)
    with pytest.raises(UsageError, match=r"Save it as it was before"):
        lape.save_pretrained(lape.fold(copy.deepcopy(other)), tmp_path, build=torchvisions, example=EXAMPLE)
    with pytest.raises(UsageError, match=r"was not made by one.*build=make, example=images"):
        lape.save_pretrained(other, tmp_path)
    with pytest.raises(
        UsageError, match=r"model\.save_pretrained\(folder\), then lape\.joined\(transformers\.ViTModel\)"
    ):
        lape.save_pretrained(applied("vit"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_chooses_nothing_that_is_made(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def make(**keywords: Any) -> nn.Module:
        asked.append(keywords)
        return torchvisions()

    model = learnt(lape.apply(torchvisions()))
    lape.save_pretrained(model, tmp_path, build=make, example=EXAMPLE)
    with pytest.raises(UsageError, match=r"with the code that made its model, test_built\..*make\. Give that"):
        lape.from_pretrained(tmp_path)
    path = tmp_path / hub.CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"built_by": "os.system", "model_args": {"weights": "DEFAULT"}}))
    assert_same(lape.from_pretrained(tmp_path, build=make), model)
    assert not any(asked)
    for change, reason in (
        ({"join": {"join": "lap", **{k: v for k, v in config["join"].items() if k != "join"}}}, "'lap' is not a join"),
        ({"join": 3}, "does not say which join"),
        ({"join": None}, "of another model"),
        ({"join": config["join"] | {"grid": [9, 9]}}, "grid is 4x4"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(RunError, match=reason):
            lape.from_pretrained(tmp_path, build=make)
    named = lape.save_pretrained(timm.create_model(NAME, img_size=32, **TINY), tmp_path / "named")
    with pytest.raises(UsageError, match=r"Leave build out"):
        lape.from_pretrained(named, build=make)
    (named / hub.CONFIG).write_text("[]")
    with pytest.raises(RunError, match="describes no model"):
        lape.from_pretrained(named)


def test_a_model_of_several_inputs_is_tried_with_them(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = torchvisions()

        def forward(self, images: Tensor, scale: Tensor) -> Tensor:
            return self.vit(images) * scale

    model = learnt(lape.apply(Masked()))
    example = (EXAMPLE, torch.tensor(2.0))
    again = lape.from_pretrained(lape.save_pretrained(model, tmp_path, build=Masked, example=example), build=Masked)
    assert torch.equal(again(*example), model(*example))

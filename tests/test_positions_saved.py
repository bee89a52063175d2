"""Laws of positions in a file of their own: on the same base model they give the same model, and on no other."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from foreign_hosts import FOREIGN, SCRATCH, applied, inputs, tokens, untouched
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_hosts import SCHEMES, TINY, host, images, shaken
from torch import nn

import lape
from lape.errors import RunError, UsageError
from lape.sharing.positions import HEADER
from lape.surgery.operation import positions

FILE = "positions.safetensors"


def learnt(model: nn.Module) -> nn.Module:
    """Move all that is of a join, the table too."""
    record = positions(model)
    (path,) = (name for name, part in model.named_modules() if part is record.model)
    before = lape.remove(copy.deepcopy(model)).get_submodule(path).state_dict().keys()
    for name, parameter in record.model.named_parameters():
        if parameter.requires_grad and (name not in before or name == record.host.table):
            nn.init.normal_(parameter)
    return model


def assert_same(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name
    learning = [{name for name, one in m.named_parameters() if one.requires_grad} for m in (model, other)]
    assert learning[0] == learning[1]


@pytest.mark.parametrize("folded", [False, True], ids=["whole", "folded"])
@pytest.mark.parametrize("names", [*SCHEMES, {"start": "preserve"}], ids=lambda names: "-".join(names.values()))
def test_positions_come_back_on_their_base_model(names: dict[str, str], folded: bool, tmp_path: Path) -> None:
    base = host()
    model = learnt(lape.apply(copy.deepcopy(base), **names)).eval()
    if folded:
        lape.fold(model, [(2, 4), (1, 2)] if "layernorm" not in names.get("pe", "") else None)
    path = lape.save_positions(model, tmp_path / "deep" / FILE)
    again = lape.load_positions(copy.deepcopy(base), path).eval()
    assert_same(again, model)
    assert torch.equal(again(images(model)), model(images(model)))
    saved = set(load_file(path))
    assert not saved - {"pos_embed"} & base.state_dict().keys()  # no more than positions


@pytest.mark.parametrize("name", [*FOREIGN, "swin"])
def test_they_do_so_on_every_host(name: str, tmp_path: Path) -> None:
    if name == "swin":
        base = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 2), num_heads=(1, 2))
        ask, options, x = type(base).__call__, {"pe": "learnable"}, torch.randn(1, 3, 224, 224)
        model = lape.apply(copy.deepcopy(base), **options).eval()
    else:
        base, ask, options, x = untouched(name), tokens, FOREIGN[name].options, inputs(name)
        model = applied(name, copy.deepcopy(base))
    learnt(model)
    described = {"host": SCRATCH} if name == "scratch" else {key: options[key] for key in ("host",) if key in options}
    path = lape.save_positions(model, tmp_path / FILE)
    again = lape.load_positions(copy.deepcopy(base), path, **described).eval()
    assert_same(again, model)
    assert torch.equal(ask(again, x), ask(model.eval(), x))


def test_many_positions_take_turns_on_one_base_model(tmp_path: Path) -> None:
    base = host()
    models = [learnt(lape.apply(copy.deepcopy(base), join=join)).eval() for join in ("lape", "shared", "unshared")]
    paths = [lape.save_positions(model, tmp_path / f"{number}.safetensors") for number, model in enumerate(models)]
    assert all(path.stat().st_size < 40_000 for path in paths)
    for model, path in [*zip(models, paths, strict=True)] * 2:
        again = lape.load_positions(base, path)
        assert torch.equal(again(images(model)), model(images(model)))
        lape.remove(base)


def test_precision_is_kept_and_the_part_around_a_transformer_is_its_users(tmp_path: Path) -> None:
    model = lape.apply(host()).bfloat16()
    for block in model.blocks:
        block.pe_norm.float()
    path = lape.save_positions(model, tmp_path / FILE)
    assert_same(lape.load_positions(host().bfloat16(), path), model)
    whole = nn.Sequential(host(), nn.Linear(5, 2))
    lape.save_positions(lape.apply(whole), tmp_path / "whole.safetensors")
    lape.load_positions(nn.Sequential(host(), nn.ReLU()), tmp_path / "whole.safetensors")


def _changed(name: str) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        with torch.no_grad():
            model.get_parameter(name)[0] += 1
        return model

    return change


def _with_head(model: Any) -> Any:
    model.head = nn.Linear(32, 3)
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_changed("blocks.1.attn.qkv.weight"), r"blocks\.1\.attn\.qkv\.weight has other values"),
        (_changed("cls_token"), "cls_token has other values"),
        (lambda model: model.bfloat16(), "is float32 there and bfloat16 here; convert the model after loading"),
        (_with_head, r"head\.weight is \[5, 32\] there and \[3, 32\] here.*besides=\['head'\]"),
        (lambda _: host(depth=2), r"blocks\.2\.norm1\.weight is not in the model"),
        (lambda _: host(img_size=(48, 64)), "grid is 3x4"),
        (
            lambda _: timm.create_model("deit3_small_patch16_224", img_size=(32, 64), **TINY),
            r"ls1\.gamma is not in the file",
        ),
    ],
)
def test_another_base_model_is_refused_and_stays_as_it_is(
    change: Callable[[Any], Any], reason: str, tmp_path: Path
) -> None:
    path = lape.save_positions(lape.apply(host()), tmp_path / FILE)
    other = change(host())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RunError, match=rf"{FILE} .*{reason}"):
        lape.load_positions(other, path)
    assert other.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    lape.apply(other)  # none is applied


def test_a_part_that_may_be_another_is_named(tmp_path: Path) -> None:
    path = lape.save_positions(shaken(lape.apply(host())), tmp_path / FILE)
    model = lape.load_positions(_with_head(host()), path, besides=["head"])
    assert model(images(model)).shape == (2, 3)
    assert torch.equal(model.blocks[2].pe_norm.weight, load_file(path)["blocks.2.pe_norm.weight"])


def test_what_cannot_be_saved_or_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No join is applied"):
        lape.save_positions(host(), tmp_path / FILE)
    model = lape.apply(host())
    with pytest.raises(UsageError, match=r"one \.safetensors file"):
        lape.save_positions(model, tmp_path / "positions.pt")
    (tmp_path / FILE).write_text("mine")
    with pytest.raises(UsageError, match="was not written by lape"):
        lape.save_positions(model, tmp_path / FILE)
    path = lape.save_positions(model, tmp_path / "saved.safetensors")
    lape.save_positions(model, path)  # its own file is replaced
    with pytest.raises(UsageError, match="applied once"):
        lape.load_positions(model, path)
    with pytest.raises(UsageError, match="on the device meta"):
        lape.load_positions(host().to("meta"), path)
    weights = lape.save_pretrained(lape.create_model("vit_nano_patch2_8", depth=1), tmp_path / "whole.safetensors")
    with pytest.raises(RunError, match=r"no positions that .* wrote.*lape\.from_pretrained"):
        lape.load_positions(host(), weights)
    with pytest.raises(RunError, match="no configuration"):
        lape.from_pretrained(path)


@pytest.mark.parametrize(
    "change",
    [
        {"join": "lap"},
        {"join": ["os.system"]},
        {"grid": [1 << 40, 1 << 40]},
        {"grid": [2, -4]},
        {"grid": "24"},
        {"folded_for": [[2, 4]] * 100_000},
        {"folded_for": [[1 << 20, 1 << 20]]},
        {"pe": "sinusoidal-1d"},
        {"join": "shared"},
        {"base": None},
        {"base": {"cls_token": 3}},
        {"base": {}},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_file_that_was_changed_is_refused_in_words(change: dict[str, Any], tmp_path: Path) -> None:
    model = host()
    path = lape.save_positions(lape.apply(copy.deepcopy(model)), tmp_path / FILE)
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()[HEADER])
    save_file(load_file(path), path, {HEADER: json.dumps(told | change)})
    with pytest.raises(RunError, match=FILE):
        lape.load_positions(model, path)
    lape.apply(model)


def test_positions_that_are_damaged_are_refused(tmp_path: Path) -> None:
    path = lape.save_positions(lape.apply(host()), tmp_path / FILE)
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    tensors = load_file(path)
    tensors["pos_embed"][0, 0, 0] = torch.nan
    save_file(tensors, path, told)
    with pytest.raises(RunError, match="pos_embed is not finite"):
        lape.load_positions(host(), path)
    fixed = lape.save_positions(lape.apply(host(), pe="sinusoidal-1d"), tmp_path / "fixed.safetensors")
    with safe_open(fixed, framework="pt") as file:
        told = file.metadata()
    save_file(load_file(fixed) | {"pos_embed": torch.randn(1, 9, 32)}, fixed, told)
    model = host()
    with pytest.raises(RunError, match="was learnt, and this model's is fixed"):
        lape.load_positions(model, fixed)
    lape.apply(model)
    save_file(load_file(path), path, {HEADER: "{"})
    with pytest.raises(RunError, match="cannot be read"):
        lape.load_positions(host(), path)

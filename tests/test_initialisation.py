"""Laws of a start made anew: every road of PyTorch, timm and transformers begins PE norms and tables."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from foreign_hosts import EVERY_KIND, SMALL, applied, inputs, tokens, untouched
from tiny_hosts import EVERY_SCHEME, TINY, host
from torch import nn

import lape
from lape.errors import RunError
from lape.method import POSITION_NORMS, PositionNorm, sinusoidal_1d
from lape.surgery.operation import positions

SINUSOID = {"pe": "sinusoidal-1d"}
MANY_POSITIONS = {"join": "mpvg", "pe": "fourier+rope-mixed+peg"}


def spoilt(model: nn.Module) -> nn.Module:
    """Fill every parameter as memory may be that was only asked for."""
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    return model


def reset(model: nn.Module) -> None:
    """Walk PyTorch's road."""
    for part in model.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()


def assert_at_start(model: nn.Module) -> None:
    norms = [part for part in model.modules() if isinstance(part, PositionNorm)]
    assert norms
    for norm in norms:
        for parameter, start in ((norm.weight, 1), (norm.bias, 0), (norm.amount, 0)):
            assert parameter is None or (parameter == start).all()


@pytest.mark.parametrize("kind", POSITION_NORMS)
@pytest.mark.parametrize("amount", [False, True])
def test_every_pe_norm_begins_anew(kind: str, amount: bool) -> None:
    norm = PositionNorm(8, 1e-6, POSITION_NORMS[kind], amount=amount)
    first = copy.deepcopy(norm.state_dict())
    spoilt(norm).reset_parameters()
    assert all(torch.equal(value, first[name]) for name, value in norm.state_dict().items())


# --- PyTorch: meta, to_empty, reset_parameters


@EVERY_SCHEME
@pytest.mark.parametrize("road", ["reset_parameters", "init_weights"])
def test_a_model_made_without_memory_begins_as_another_does(names: dict[str, str], road: str) -> None:
    def made() -> Any:
        return lape.apply(timm.create_model("vit_tiny_patch16_224", **TINY, img_size=(32, 64)), **names)

    with torch.device("meta"):
        model = made()
    model = spoilt(model.to_empty(device="cpu"))
    reset(model) if road == "reset_parameters" else model.init_weights()
    expected = made()
    for name, parameter in model.named_parameters():
        start = expected.get_parameter(name)
        assert parameter.requires_grad == start.requires_grad
        if "pe_norm" in name or not start.requires_grad:
            assert torch.equal(parameter, start), name
        elif "pos_embed" in name or "bias_table" in name:
            assert 0.01 < parameter.std() < 0.03, name


@pytest.mark.parametrize("pe", ["learnable", "learnable+relative"])
def test_swin_begins_anew_also_without_its_relative_bias(pe: str) -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 2), num_heads=(1, 2))
    model: Any = spoilt(lape.apply(swin, pe=pe))
    model.init_weights()
    assert_at_start(model)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@EVERY_KIND
def test_a_sinusoid_is_made_anew_in_every_library(name: str) -> None:
    model = applied(name, **SINUSOID)
    table = positions(model).host.table
    vit, after = positions(model).model, copy.deepcopy(model)
    first = vit.get_parameter(table).detach().clone()
    reset(spoilt(after))
    assert_at_start(after)
    assert torch.equal(positions(after).model.get_parameter(table), first)
    reset(spoilt(pickle.loads(pickle.dumps(model))))  # pyright: ignore
    assert torch.equal(vit.get_parameter(table), first)  # a copy begins by itself
    lape.remove(model)
    assert "reset_parameters" not in {name for part in model.modules() for name in part.__dict__}


def test_what_a_reset_does_not_begin_is_said() -> None:
    """PyTorch's FSDP takes a module with `reset_parameters` for one that is initialised by it."""
    model = lape.apply(host())
    with pytest.warns(UserWarning, match=r"position table of VisionTransformer; cls_token beside it stay"):
        model.reset_parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("vit", "torchvision", "sequences"):
            reset(applied(name, pe="sinusoidal-1d"))
        model.init_weights()


def test_a_table_of_a_module_that_has_no_initialiser_begins_by_the_hosts_scale() -> None:
    model = applied("sequences")
    nn.init.constant_(model.pos_embed, torch.nan)
    model.reset_parameters()
    assert 0.015 < model.pos_embed.std() < 0.025


# --- timm: init_weights


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_rope_ape_224", "t2t_vit_7", "ceit_tiny_patch16_224"]
)
@pytest.mark.parametrize("join", ["default", "lape"])
def test_timms_initialiser_leaves_a_sinusoid(name: str, join: str) -> None:
    model = timm.create_model(name, **{**TINY, "img_size": 32})
    model = lape.apply(model, join, **SINUSOID)
    before = model.pos_embed.clone()
    spoilt(model).init_weights()
    assert torch.equal(model.pos_embed, before)
    assert not model.pos_embed.requires_grad
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["t2t_vit_7", "ceit_tiny_patch16_224", "cct_2_3x2_32", "vit_2_4_32"])
def test_an_untouched_model_of_ours_begins_anew_as_it_began(name: str) -> None:
    model: Any = timm.create_model(name, num_classes=5, img_size=32)
    before = copy.deepcopy(model)
    spoilt(model).init_weights()
    for part, parameter in model.named_parameters():
        began = before.get_parameter(part)
        assert parameter.requires_grad == began.requires_grad
        if began.numel() == 1 or not began.std():
            assert torch.equal(parameter, began), part
        elif parameter.numel() > 100:
            assert 0.8 < parameter.std() / began.std() < 1.25, part
    if name == "t2t_vit_7":
        assert torch.equal(model.pos_embed, before.pos_embed)


# --- transformers: a class that applies in its constructor, loaded from a plain file


def of_transformers(name: str, **names: str) -> Any:
    """A class of transformers that applies a join in its constructor."""
    plain: Any = type(untouched(name))

    def begin(self: Any, config: Any) -> None:
        plain.__init__(self, config)
        lape.apply(self, **names)

    return type(f"Joined{plain.__name__}", (plain,), {"__init__": begin})


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "siglip", "beit", "clip"])
@pytest.mark.parametrize("names", [{}, {"start": "preserve"}, SINUSOID, {"join": "unshared"}], ids=str)
def test_a_class_that_applies_in_its_constructor_begins_right(name: str, names: dict[str, str], tmp_path: Path) -> None:
    joined = of_transformers(name, **names)
    saved = untouched(name)
    # A class of a user's own is given the file's names as they are.
    torch.save(saved.state_dict(), tmp_path / "pytorch_model.bin")
    saved.config.save_pretrained(tmp_path)
    for _ in range(3):  # memory that was just used is not zero
        torch.full((1 << 18,), torch.nan)
    model = joined.from_pretrained(tmp_path).eval()
    if names.get("join") != "unshared":
        assert_at_start(model)
        expected = lape.apply(copy.deepcopy(saved), **names)
        assert torch.equal(tokens(model, inputs(name)), tokens(expected, inputs(name)))
        for part, parameter in model.named_parameters():
            assert parameter.requires_grad == expected.get_parameter(part).requires_grad, part
    else:
        tables = [rung.residual for rung in lape.ladder(model)]
        assert all(table is not None and 0.01 < table.std() < 0.03 for table in tables)


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "siglip", "beit", "clip"])
def test_it_does_so_from_the_librarys_own_file_with_its_old_names(name: str, tmp_path: Path) -> None:
    saved = untouched(name)
    saved.save_pretrained(tmp_path)  # pyright: ignore
    joined = of_transformers(name, start="preserve")
    assert_at_start(joined.from_pretrained(tmp_path))
    model = joined(saved.config).eval()
    with pytest.warns(UserWarning, match="pe_norm"):
        lape.load_weights(model, tmp_path / "model.safetensors")
    assert torch.equal(tokens(model, inputs(name)), tokens(saved, inputs(name)))


@pytest.mark.parametrize("names", [{}, {"start": "preserve"}, SINUSOID, {"join": "unshared"}, MANY_POSITIONS], ids=str)
def test_what_such_a_class_saved_comes_back(names: dict[str, str], tmp_path: Path) -> None:
    joined = of_transformers("vit", **names)
    model = joined(transformers.ViTConfig(**SMALL)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    again = joined.from_pretrained(tmp_path).eval()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_classifier_that_applies_in_its_constructor_begins_right(tmp_path: Path) -> None:
    class Joined(transformers.ViTForImageClassification):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            lape.apply(self)

    plain = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL))
    torch.save(plain.state_dict(), tmp_path / "pytorch_model.bin")
    plain.config.save_pretrained(tmp_path)
    assert_at_start(Joined.from_pretrained(tmp_path))


# --- A fixed table is never another, whoever loads


@pytest.mark.parametrize("name", ["vit", "clip", "torchvision", "scratch", "sequences"])
def test_a_learnt_table_is_not_loaded_into_a_fixed_one(name: str) -> None:
    model = applied(name, **SINUSOID)
    table = positions(model).host.table
    before = model.get_parameter(table).clone()
    learnt = {table: torch.randn_like(before)}
    for loaded in (model, copy.deepcopy(model)):
        with pytest.raises(RunError, match=r"was learnt, and this model's is fixed.*pe='learnable'"):
            loaded.load_state_dict(learnt, strict=False)
        assert torch.equal(loaded.get_parameter(table), before)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # its own goes in, in every precision
        model.load_state_dict({table: before.to(dtype)}, strict=False)
        torch.testing.assert_close(model.get_parameter(table), before, rtol=0, atol=0.004)
    lape.remove(model)
    model.load_state_dict(learnt, strict=False)
    assert name == "sequences" or torch.equal(model.get_parameter(table), learnt[table])


def test_the_fixed_table_of_another_size_is_checked_too() -> None:
    model = lape.apply(host(img_size=(48, 80)), **SINUSOID)
    model.set_input_size((32, 64))
    with pytest.raises(RunError, match="is fixed"):
        model.load_state_dict({"pos_embed": torch.randn(1, 9, 32)}, strict=False)
    model.load_state_dict({"pos_embed": sinusoidal_1d((2, 4), 1, 32)}, strict=False)

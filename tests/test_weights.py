"""Laws of loading: the authors' and timm's files go in, what is missing is named, and no file runs code."""

import argparse
import copy
import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from foreign_hosts import FOREIGN, applied, inputs, tokens, untouched
from safetensors.torch import load_file, save_file
from tiny_hosts import host, images, shaken
from torch import Tensor

import lape
from lape.errors import RunError
from lape.experiment import Experiment
from lape.method import sinusoidal_1d, sinusoidal_2d
from lape.surgery.operation import positions
from lape.weights import convert, read


def test_a_checkpoint_of_the_authors_goes_in(tmp_path: Path) -> None:
    source = shaken(lape.apply(host()))
    file = tmp_path / "checkpoint.pth"
    # Theirs holds the arguments of the run beside the weights.
    torch.save({"model": source.state_dict(), "epoch": 299, "args": argparse.Namespace(join_type="LaPE")}, file)
    model = lape.apply(host())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = lape.load_weights(model, file)
    assert loaded.missing == ()
    assert str(loaded) == "Every parameter was loaded."
    assert torch.equal(model(images(model)), source(images(source)))


def test_their_unshared_and_relative_tables_go_to_their_blocks() -> None:
    model = lape.apply(host(), join="unshared")
    theirs = {f"pos_embed{i}": torch.randn(1, 9, 32) for i in range(3)}
    assert convert(theirs, model).keys() == {f"blocks.{i}.pos_embed" for i in range(3)}
    model = lape.apply(host(), join="default", pe="relative-layernorm")
    names = ("relative_position_bias_table", "relative_position_index", "pe_norm.weight")
    theirs = {f"blocks.1.attn.{name}": torch.zeros(1) for name in names}
    assert convert(theirs, model).keys() == {
        "blocks.1.relative_position_bias_table",
        "blocks.1.relative_position.pe_norm.weight",
    }


def test_their_1d_sinusoid_has_no_batch_axis() -> None:
    model = lape.apply(host(), pe="sinusoidal-1d")
    assert convert({"pos_embed": model.pos_embed[0]}, model)["pos_embed"].shape == (1, 9, 32)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_plain_timm_checkpoint_goes_in_and_what_is_missing_is_said(tmp_path: Path, suffix: str) -> None:
    source, file = host(), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), file)
    model = lape.apply(host())
    for parameter in model.parameters():
        parameter.data.normal_()
    with pytest.warns(UserWarning, match=r"blocks\.0\.pe_norm\.weight.* and 3 more are not in the file") as caught:
        loaded = lape.load_weights(model, file)
    assert str(file) in str(caught[0].message)
    assert len(loaded.missing) == 6
    lape.remove(model)
    assert torch.equal(model(images(model)), source(images(source)))


def test_tables_are_resized_to_the_model() -> None:
    source, model = lape.apply(host(img_size=32)), lape.apply(host(img_size=(48, 48)))
    lape.load_weights(model, source.state_dict())
    assert torch.equal(model.pos_embed, positions(source).resized(source.pos_embed, (3, 3), (2, 2)))
    fixed = lape.apply(host(img_size=48), pe="sinusoidal-2d")
    lape.load_weights(fixed, lape.apply(host(img_size=32), pe="sinusoidal-2d").state_dict())
    assert torch.equal(fixed.pos_embed, lape.apply(host(img_size=48), pe="sinusoidal-2d").pos_embed)


def test_a_learnt_table_does_not_go_into_a_fixed_one() -> None:
    with pytest.raises(RunError, match="Use pe='learnable'"):
        lape.load_weights(lape.apply(host(), pe="sinusoidal-1d"), lape.apply(host()).state_dict())


def test_a_file_with_pe_norms_does_not_go_into_another_join() -> None:
    with pytest.raises(RunError, match=r"another join.*pe_norm.*lape\.apply"):
        lape.load_weights(host(), lape.apply(host()).state_dict())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_classes": 7}, r"head\.weight is \(7, 32\) there and \(5, 32\) here"),
        ({"depth": 2}, r": blocks\.2\.norm1\.weight, .* not in the file"),
        ({"depth": 4}, "are not in the model"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(options: dict[str, int], says: str, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file(host(**options).state_dict(), file)
    model = lape.apply(host())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RunError, match=says) as caught:
        lape.load_weights(model, file)
    assert str(file) in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("sprung"),))


def test_a_file_with_code_is_refused_and_its_code_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Trap()))
    for name in ("trap.pth", "plain.pkl"):
        with pytest.raises(RunError, match=name):
            read(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 half a zip"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_damaged_file_is_named(content: bytes, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"damaged{suffix}"
    file.write_bytes(content)
    with pytest.raises(RunError, match=f"damaged{suffix}"):
        read(file)


def test_a_file_that_is_absent_or_holds_no_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent\.pth does not exist"):
        read(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(RunError, match=r"list\.pth holds no weights"):
        read(tmp_path / "list.pth")


# --- Tables


@pytest.mark.parametrize("size", [(32, 32), (80, 48), (80, 16), (16, 144)], ids=str)
@pytest.mark.parametrize("pe", ["relative", "learnable+relative", "learnable", "sinusoidal-2d"])
def test_a_table_that_has_the_models_shape_is_taken_as_it_is(size: tuple[int, int], pe: str) -> None:
    source = shaken(lape.apply(host(img_size=size), "default", pe))
    model = lape.apply(host(img_size=size), "default", pe)
    assert lape.load_weights(model, source.state_dict()).missing == ()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    again = lape.apply(host(img_size=size), "default", pe)
    assert lape.load_backbone(again, source.state_dict()).missing == ()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in again.state_dict().items())


def test_so_is_swins_own_for_a_window_that_is_no_square() -> None:
    options: dict[str, Any] = {"embed_dim": 12, "depths": (1, 2), "num_heads": (1, 2), "window_size": (4, 2)}
    source, model = (timm.create_model("swin_tiny_patch4_window7_224", **options, img_size=64) for _ in range(2))
    lape.apply(model, "lape", "learnable+relative")
    with pytest.warns(UserWarning, match="not in the file"):
        lape.load_weights(model, source.state_dict())
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert torch.equal(model.state_dict()[name], source.state_dict()[name])


def test_a_fixed_table_is_known_whatever_its_grid_and_precision() -> None:
    for pe, made in (("sinusoidal-1d", sinusoidal_1d), ("sinusoidal-2d", sinusoidal_2d)):
        model = lape.apply(host(img_size=(32, 64)), pe=pe)
        weights = model.state_dict()
        for grid in ((2, 4), (3, 5), (7, 1), (1, 7)):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                lape.load_weights(model, weights | {"pos_embed": made(grid, 1, 32).to(dtype)})
                torch.testing.assert_close(model.pos_embed, made((2, 4), 1, 32), rtol=0, atol=0.004)
        for rows in (9, 16, 17):  # of a grid that is no square, too
            with pytest.raises(RunError, match="was learnt"):
                lape.load_weights(model, weights | {"pos_embed": torch.randn(1, rows, 32)})


# --- Averages


@pytest.mark.parametrize("kept", ["state_dict_ema", "model_ema"])
@pytest.mark.parametrize("raw", ["state_dict", "model"])
def test_of_a_training_file_of_timm_the_average_is_taken_and_said(kept: str, raw: str, tmp_path: Path) -> None:
    source, average, model = lape.apply(host()), shaken(lape.apply(host())), lape.apply(host())
    torch.save({raw: source.state_dict(), kept: average.state_dict(), "epoch": 3}, tmp_path / "last.pth.tar")
    expected = timm.models.load_state_dict(str(tmp_path / "last.pth.tar"), use_ema=True)
    for loaded in (lape.load_weights(model, tmp_path / "last.pth.tar"), lape.load_weights(model, {kept: expected})):
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert loaded.average == kept
        assert f"running average was taken ({kept!r})" in str(loaded)
    again = lape.apply(host())
    started = lape.load_backbone(again, tmp_path / "last.pth.tar")
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert started.average == kept
    assert f"running average was taken ({kept!r})" in str(started)
    assert torch.equal(read(tmp_path / "last.pth.tar")["blocks.0.pe_norm.bias"], average.blocks[0].pe_norm.bias)


def test_an_average_that_is_none_is_passed_over(tmp_path: Path) -> None:
    source, model = shaken(lape.apply(host())), lape.apply(host())
    loaded = lape.load_weights(model, {"state_dict": source.state_dict(), "state_dict_ema": None})
    assert loaded.average is None
    assert torch.equal(model.blocks[0].pe_norm.bias, source.blocks[0].pe_norm.bias)


@pytest.mark.parametrize("evaluated", [True, False])
def test_of_a_run_of_ours_what_it_validates_is_taken(evaluated: bool, tmp_path: Path) -> None:
    source, average, model = lape.apply(host()), shaken(lape.apply(host())), lape.apply(host())
    settings = replace(Experiment(), ema=0.9, ema_evaluated=evaluated).settings()
    torch.save(
        {"experiment": settings, "model": source.state_dict(), "ema": average.state_dict()}, tmp_path / "last.pt"
    )
    loaded = lape.load_weights(model, tmp_path / "last.pt")
    expected = average if evaluated else source
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.average == ("ema" if evaluated else None)


@pytest.mark.parametrize("experiment", ["first", {"name": "first"}, None])
def test_a_strangers_file_may_name_its_experiment(experiment: Any) -> None:
    source, model = shaken(lape.apply(host())), lape.apply(host())
    assert lape.load_weights(model, {"experiment": experiment, "model": source.state_dict()}).missing == ()
    assert torch.equal(model.blocks[0].pe_norm.bias, source.blocks[0].pe_norm.bias)


# --- Prefixes

PREFIXES = ("_orig_mod.", "module.", "module._orig_mod.", "net.", "model.", "backbone.", "teacher.backbone.", "a.0.b.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("join", ["default", "lape"])
def test_what_a_program_puts_before_all_names_goes(prefix: str, join: str, tmp_path: Path) -> None:
    source = shaken(lape.apply(host(), join))
    torch.save({"model": {f"{prefix}{name}": value for name, value in source.state_dict().items()}}, tmp_path / "a.pth")
    for load in (lape.load_weights, lape.load_backbone):
        model = lape.apply(host(), join)
        assert load(model, tmp_path / "a.pth").missing == ()
        assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_compilation_and_sharding_put_between_names_goes() -> None:
    source, model = shaken(lape.apply(host())), lape.apply(host())
    wrapped = {
        name.replace("norm1", "_orig_mod.norm1").replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): value
        for name, value in source.state_dict().items()
    }
    assert lape.load_weights(model, wrapped).missing == ()
    assert torch.equal(model.blocks[1].norm1.weight, source.blocks[1].norm1.weight)


def test_a_prefix_is_not_the_authors_own() -> None:
    source = lape.apply(timm.create_model("cct_2_3x2_32", num_classes=5), "lape")
    model = lape.apply(timm.create_model("cct_2_3x2_32", num_classes=5), "lape")
    theirs: dict[str, Tensor] = {}
    for name, value in shaken(source).state_dict().items():
        name = {"cls_token": "classifier.class_emb", "pos_embed": "classifier.positional_emb"}.get(name, name)
        name = name.replace("attn_pool.score", "classifier.attention_pool").replace("head.", "classifier.fc.")
        if name.startswith("blocks."):
            name = "classifier." + name.replace("norm1", "pre_norm").replace("norm2", "norm1")
            name = name.replace(".attn.", ".self_attn.").replace("mlp.fc", "linear")
        elif name.startswith("norm."):
            name = f"classifier.{name}"
        elif name.startswith("patch_embed.convs."):
            kernel = name.removeprefix("patch_embed.convs.").split(".")
            name = f"tokenizer.conv_layers.{kernel[0]}.0.{kernel[1]}"
        theirs[f"net.{name}"] = value
    lape.load_weights(model, theirs)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())


def test_of_several_that_fit_none_is_taken() -> None:
    source, model = lape.apply(host()), lape.apply(host())
    both = {f"{who}.backbone.{n}": v for who in ("student", "teacher") for n, v in source.state_dict().items()}
    for load in (lape.load_weights, lape.load_backbone):
        with pytest.raises(RunError, match=r"2 such models.*'student\.backbone\.' and 'teacher\.backbone\.'"):
            load(model, both)
    with pytest.raises(RunError, match="It has some under 'student' and 'teacher'"):
        lape.load_weights(model, {who: source.state_dict() for who in ("student", "teacher")})


def test_a_backbone_starts_from_a_part_of_a_whole() -> None:
    source, model = host(), lape.apply(host())
    whole = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    started = lape.load_backbone(model, whole | {"decode_head.weight": torch.ones(3)})
    assert started.left == ("decode_head.weight",)
    assert torch.equal(model.blocks[2].mlp.fc1.weight, source.blocks[2].mlp.fc1.weight)


def test_another_model_with_pe_norms_is_not_said_to_have_another_join() -> None:
    with pytest.raises(RunError, match="is of another model") as caught:
        lape.load_weights(host(), lape.apply(host(depth=4)).state_dict())
    assert "another join" not in str(caught.value)


# --- Models of other libraries, with files of their libraries

OTHERS = ["vit", "deit", "dinov2", "clip", "siglip", "beit", "torchvision", "scratch", "reader"]


def saved(model: Any, folder: Path) -> Path:
    """Let a library write its file."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return folder / "model.safetensors"
    torch.save(model.state_dict(), folder / "model.pth")
    return folder / "model.pth"


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("names", [{}, {"start": "preserve"}], ids=str)
def test_a_file_of_the_untouched_model_goes_in_whole(name: str, names: dict[str, str], tmp_path: Path) -> None:
    source = untouched(name)
    file = saved(source, tmp_path)
    model = applied(name, FOREIGN[name].make().eval(), **names)
    with pytest.warns(UserWarning, match="pe_norm"):
        loaded = lape.load_weights(model, file)
    assert all("pe_norm" in part for part in loaded.missing)
    expected = applied(name, copy.deepcopy(source), **names)
    assert torch.equal(tokens(model, inputs(name)), tokens(expected, inputs(name)))
    lape.remove(model)
    assert torch.equal(tokens(model, inputs(name)), tokens(source, inputs(name)))


@pytest.mark.parametrize("name", [*OTHERS, "sequences", "sequences-first"])
@pytest.mark.parametrize("names", [{}, {"pe_norm": "scalar-norm"}, {"join": "unshared"}], ids=str)
def test_a_file_of_the_joined_model_comes_back_whole(name: str, names: dict[str, str], tmp_path: Path) -> None:
    source = applied(name, **names)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = applied(name, FOREIGN[name].make().eval(), **names)
    assert lape.load_weights(model, saved(source, tmp_path)).missing == ()
    assert all(torch.equal(value, source.state_dict()[part]) for part, value in model.state_dict().items())
    again = applied(name, FOREIGN[name].make().eval(), **names)
    assert lape.load_weights(again, {f"net.{part}": value for part, value in source.state_dict().items()}).missing == ()
    assert all(torch.equal(value, source.state_dict()[part]) for part, value in again.state_dict().items())


def test_the_part_that_a_classifier_of_transformers_has_around_goes_in_too(tmp_path: Path) -> None:
    config = untouched("vit").config
    source = transformers.ViTForImageClassification(config)
    model = lape.apply(transformers.ViTForImageClassification(config))
    with pytest.warns(UserWarning, match="pe_norm"):
        lape.load_weights(model, saved(source, tmp_path))
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    bare = lape.apply(transformers.ViTModel(config))
    before = copy.deepcopy(bare.state_dict())
    with pytest.raises(
        RunError, match=r"another model.*classifier\.weight.*not in the model.*pooler.* not in the file"
    ):
        lape.load_weights(bare, tmp_path / "model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in bare.state_dict().items())


class Holder(torch.nn.Module):
    """What a user builds around a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = applied("vit"), torch.nn.Linear(32, 3)


class TheirHolder(transformers.PreTrainedModel):
    """What a user builds so as transformers itself does."""

    config_class = transformers.ViTConfig
    _supports_sdpa = True

    def __init__(self) -> None:
        super().__init__(transformers.ViTConfig())
        self.inside, self.head = applied("vit"), torch.nn.Linear(32, 3)


@pytest.mark.parametrize("kind", [Holder, TheirHolder])
def test_a_file_of_what_holds_a_model_of_transformers_has_its_own_names(kind: Any) -> None:
    source, model = kind(), kind()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert lape.load_weights(model, source.state_dict()).missing == ()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    again = kind()
    lape.load_weights(again, source.inside.state_dict())  # of what it holds, too
    assert torch.equal(again.inside.layers[1].pe_norm.bias, source.inside.layers[1].pe_norm.bias)


def test_what_does_not_fit_a_model_of_transformers_is_named(tmp_path: Path) -> None:
    model = applied("vit")
    for options, says in (
        ({"num_hidden_layers": 2}, r"layers\.2\..* not in the file"),
        ({"num_hidden_layers": 4}, r"layers\.3\..* not in the model"),
        ({"image_size": 64}, r"position_embeddings is \(1, 65, 32\) there and \(1, 17, 32\) here"),
    ):
        with pytest.raises(RunError, match=says):
            lape.load_weights(model, saved(untouched("vit", **options), tmp_path))
    with pytest.raises(RunError, match=r"trained with another join.*pe_norm"):
        lape.load_weights(untouched("vit"), saved(applied("vit"), tmp_path))


@pytest.mark.parametrize("name", ["vit", "clip", "torchvision", "scratch"])
def test_their_learnt_tables_do_not_go_into_a_fixed_one(name: str, tmp_path: Path) -> None:
    source, model = untouched(name), applied(name, pe="sinusoidal-1d")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RunError, match="was learnt, and this model's is fixed"):
        lape.load_weights(model, saved(source, tmp_path))
    assert all(torch.equal(value, before[part]) for part, value in model.state_dict().items())


def test_the_reports_of_transformers_are_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    file = saved(untouched("vit"), tmp_path)
    capsys.readouterr()
    with pytest.warns(UserWarning, match="pe_norm"):
        lape.load_weights(applied("vit"), file)
    assert capsys.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_names_of_transformers_files_are_old_ones(tmp_path: Path) -> None:
    """Why a state dict of the file does not do: most of its names are not the model's."""
    source = untouched("vit")
    told = applied("vit").load_state_dict(load_file(saved(source, tmp_path)), strict=False)
    assert len(told.unexpected_keys) > len(source.state_dict()) / 2

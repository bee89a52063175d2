"""Laws of loading: the authors' and timm's files go in, what is missing is named, and no file runs code."""

import argparse
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_hosts import host, images, shaken

import lape
from lape.errors import RunError
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
    assert torch.equal(model.pos_embed, positions(source)._resized(source.pos_embed, (3, 3), (2, 2)))
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

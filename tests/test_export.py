"""Laws of exported files: what they compute is what the model computes, for every batch and size that they take."""

import json
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_models import images as images_of
from test_models import small
from tiny_hosts import host, images, shaken
from torch import Tensor, nn

import lape
from lape.cli import command_line as cli
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.files import writing
from lape.sharing import exporting, hub
from lape.surgery import operation as surgery
from lape.training.loop import train

onnx = pytest.importorskip("onnx")
BOTH = pytest.mark.parametrize("suffix", exporting.FORMATS)


def joined(depth: int = 2, dynamic: bool = False, **names: str) -> nn.Module:
    return shaken(lape.apply(host(depth=depth, dynamic_img_size=dynamic), **names))


def run(path: Path, x: Tensor) -> Tensor:
    (output,) = exporting.FORMATS[path.suffix].load(path.read_bytes())(x)
    return output


@BOTH
@pytest.mark.parametrize("fold", [False, True], ids=["as it is", "folded"])
def test_a_file_computes_what_the_model_does_for_any_number_of_images(suffix: str, fold: bool, tmp_path: Path) -> None:
    model = joined()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    written = lape.export(model, tmp_path / "deep" / f"model{suffix}", fold=fold)
    assert list(written.path.parent.iterdir()) == [written.path]
    assert written.difference <= 1e-5
    x = images(model, 5)
    with torch.no_grad():
        torch.testing.assert_close(run(written.path, x), model(x), rtol=1e-4, atol=1e-4)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_a_folded_file_has_the_work_of_an_exported_default_model(tmp_path: Path) -> None:
    """No norm and no table is left: the nodes of the graph are those of the default join, but for where ω is added."""

    def nodes(model: nn.Module, name: str, **options: bool) -> list[str]:
        path = lape.export(model, tmp_path / name, **options).path
        return [node.op_type for node in onnx.load(path).graph.node]

    default, folded = nodes(joined(join="default"), "default.onnx"), nodes(joined(), "folded.onnx", fold=True)
    assert folded.count("LayerNormalization") == default.count("LayerNormalization") == 2 * 2 + 1
    assert set(folded) <= set(default)
    assert (
        folded.count("Add") <= default.count("Add") + 2
    )  # where ω is added zeros are, and a rung in each of two layers


@BOTH
@pytest.mark.parametrize(
    "names",
    [{}, {"pe": "sinusoidal-1d"}, {"join": "unshared"}, {"pe": "fourier+alibi-2d+rope-mixed:grid=3+peg"}],
    ids=str,
)
def test_an_open_size_takes_every_grid(names: dict[str, str], suffix: str, tmp_path: Path) -> None:
    model = joined(depth=1, dynamic=True, **names)
    path = lape.export(model, tmp_path / f"model{suffix}", dynamic_size=True).path
    for size in ((32, 64), (64, 32), (48, 48), (112, 96)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(run(path, x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t2t_vit_7", "ceit_tiny_patch16_224", "cct_7_3x1_32", "swin_tiny_patch4_window7_224"])
def test_the_other_families_are_followed(name: str, tmp_path: Path) -> None:
    model = small(name, "lape", **({"depths": (1, 1), "num_heads": (1, 2)} if "swin" in name else {"depth": 1}))
    path = lape.export(model, tmp_path / "model.pt2", fold=True).path
    with torch.no_grad():
        torch.testing.assert_close(run(path, images_of(name)), model(images_of(name)), rtol=1e-4, atol=1e-4)


def test_a_segmenter_is_followed_and_a_detector_is_refused(tmp_path: Path) -> None:
    model = lape.create_model("segmenter_nano_patch8", num_classes=3, depth=1)
    assert lape.export(model, tmp_path / "model.pt2").difference <= 1e-5
    with pytest.raises(UsageError, match="A detector is not exported: how many regions"):
        lape.export(lape.create_model("mask_rcnn_vit_adapter_nano"), tmp_path / "model.onnx")


def test_a_model_without_a_join_is_exported_as_well(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=3).eval()
    with pytest.raises(UsageError, match="cannot carry a join"):
        lape.export(model, tmp_path / "model.pt2", fold=True)
    by_hand = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(2))
    with pytest.raises(UsageError, match=r"does not tell the size of its images\. Give input_size"):
        lape.export(by_hand, tmp_path / "model.pt2")
    assert lape.export(by_hand, tmp_path / "model.pt2", input_size=(3, 16, 16)).shapes[1] == (1, 3, 16, 16)


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    model = joined(depth=1)
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": ("cat", "dog"), "mean": (0.4, 0.4, 0.4)}
    path = lape.export(model, tmp_path / "model.onnx", fold=True).path
    proto = onnx.load(path)
    (told,) = (json.loads(entry.value) for entry in proto.metadata_props if entry.key == hub.HEADER)
    assert (told["label_names"], told["mean"], told["softmax"]) == (["cat", "dog"], [0.4, 0.4, 0.4], False)
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_version_of_operators_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    model = joined(depth=1)
    (version,) = onnx.load(lape.export(model, tmp_path / "model.onnx", opset=18).path).opset_import
    assert (version.domain, version.version) == ("", 18)
    with pytest.raises(UsageError, match=r"opset is a version .* 99 was received, and it wrote 18\. Give --opset 18"):
        lape.export(model, tmp_path / "other.onnx", opset=99)
    with pytest.raises(UsageError, match=r"opset 18 is a version of ONNX's operators, and a \.pt2 has none"):
        lape.export(model, tmp_path / "model.pt2", opset=18)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


# --- What differs is not left behind


def off_by(amount: float) -> Callable[[bytes], exporting.Runner]:
    def load_wrongly(content: bytes) -> exporting.Runner:
        opened = exporting._load_program(content)
        return lambda x: [output + amount * output.abs().max() for output in opened(x)]

    return load_wrongly


def test_a_model_is_left_as_it_is(tmp_path: Path) -> None:
    model = joined(depth=1).double().train()
    lape.export(model, tmp_path / "model.pt2")
    assert model.training
    assert model.head.weight.dtype == torch.float64


def test_a_folded_file_is_compared_with_the_model_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fold_wrongly(model: nn.Module) -> nn.Module:
        folded = surgery.fold(model)
        for constant in folded.blocks[0].pe_folded.buffers():
            constant.zero_()
        return folded

    monkeypatch.setattr("lape.sharing.exporting.folded", fold_wrongly)
    with pytest.raises(RunError, match="its outputs differ"):
        lape.export(joined(depth=1), tmp_path / "model.pt2", fold=True)


@pytest.mark.parametrize("amount", [1e-3, float("nan")])
def test_a_file_that_computes_something_else_is_refused(
    amount: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = exporting.Format(exporting._dump_program, off_by(amount))
    monkeypatch.setattr(exporting, "FORMATS", {".pt2": wrong})
    (tmp_path / "model.pt2").write_text(before := f"the one before, {writing.MARK}")
    with pytest.raises(RunError, match=r"was not written: its outputs differ .* by (1\.0e-03|nan)"):
        lape.export(joined(depth=1), tmp_path / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_text() == before


def test_a_difference_in_one_batch_alone_is_seen() -> None:
    same, other = [torch.ones(2)], [torch.tensor([1.0, float("nan")])]
    assert exporting._difference([same, same], [same, same]) == 0
    for place in range(3):
        found = [other if number == place else same for number in range(3)]
        assert not exporting._difference(found, [same] * 3) <= exporting.BOUND


# --- Refusals


def test_what_cannot_be_written_is_refused_with_its_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"the suffix says what is written, \.onnx or \.pt2"):
        lape.export(joined(), tmp_path / "model.onx")
    with pytest.raises(UsageError, match="export one folded file for each"):
        lape.export(joined(dynamic=True), tmp_path / "model.pt2", fold=True, dynamic_size=True)
    with pytest.raises(UsageError, match="Make it with dynamic_img_size=True"):
        lape.export(joined(), tmp_path / "model.pt2", dynamic_size=True)
    swin = small("swin_tiny_patch4_window7_224", "lape", strict_img_size=False)
    with pytest.raises(UsageError, match="cuts windows"):
        lape.export(swin, tmp_path / "model.pt2", dynamic_size=True)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RunError, match=r"needs onnxruntime, not installed.*pip install 'lape\[export\]'"):
        lape.export(joined(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_model_that_the_tracer_cannot_follow_is_refused(tmp_path: Path) -> None:
    class Wilful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale if x.sum() > 0 else x

    with pytest.raises(UsageError, match=r"torch\.export cannot follow Wilful as it is"):
        lape.export(Wilful(), tmp_path / "model.pt2", input_size=(3, 8, 8))
    assert not list(tmp_path.iterdir())


# --- The command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    small_one: dict[str, Any] = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    train(Experiment(epochs=1, batch_size=400, accelerator="cpu", model_args=small_one), folder)
    return folder


def test_the_command_takes_a_run_out_of_the_house(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lape_export(*words: object) -> tuple[int, str, str]:
        status = cli.main(["export", *map(str, words)])
        told = capsys.readouterr()
        return status, told.out, told.err

    status, out, err = lape_export(trained, "--out", tmp_path / "model.onnx", "--fold")
    assert (status, err) == (0, "")
    assert "largest difference from the model" in out
    assert "2x1x8x8, 1x1x8x8, 3x1x8x8" in out
    proto = onnx.load(tmp_path / "model.onnx")
    (told,) = (json.loads(entry.value) for entry in proto.metadata_props if entry.key == hub.HEADER)
    assert (told["label_names"], told["mean"]) == (list("0123456789"), [0.305])

    status, out, _ = lape_export(trained / "best.pt", "--out", tmp_path / "digits")
    assert (status, "to the last bit" in out) == (0, True)
    assert "on digits" in (tmp_path / "digits" / hub.CARD).read_text()
    assert lape_export(tmp_path / "digits", "--out", tmp_path / "model.safetensors")[0] == 0
    model = lape.from_pretrained(tmp_path / "model.safetensors")
    assert list(model.pretrained_cfg["label_names"]) == list("0123456789")
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "model.onnx", x), model(x), rtol=1e-4, atol=1e-4)

    words = ("--out", tmp_path / "open.pt2", "--dynamic_size", "--model_args", '{"dynamic_img_size": true}')
    for source in (trained, tmp_path / "digits"):
        assert lape_export(source, *words)[0] == 0
        assert run(tmp_path / "open.pt2", torch.randn(2, 1, 12, 14)).shape == (2, 10)
    status, out, err = lape_export(trained, "--out", tmp_path / "folder", "--fold")
    assert (status, out, err.count("\n")) == (cli.USAGE, "", 1)
    assert "fold, dynamic_size and opset mean nothing for" in err
    status, out, err = lape_export(trained, "--push", "user/digits", "--fold")
    assert (status, out, "mean nothing for user/digits, which holds weights" in err) == (cli.USAGE, "", True)
    status, out, err = lape_export(trained, "--push", "user/digits")
    assert (status, out, err.count("\n"), "Give --license with" in err) == (cli.USAGE, "", 1, True)
    status, out, err = lape_export(trained, "--license", "My Own")
    assert (status, out, "'My Own' was received" in err) == (cli.USAGE, "", True)
    monkeypatch.chdir(tmp_path / "digits")
    assert lape_export(trained)[0] == 0
    assert Path("model.onnx").exists()
    status, _, err = lape_export(tmp_path, "--out", tmp_path / "model.onnx")
    assert (status, err.count("\n")) == (cli.FAILURE, 1)


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2", "model.safetensors", "folder"])
def test_a_disk_that_is_full_ends_an_export_in_one_line(
    name: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write beyond the limit fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, most))
    try:
        status = cli.main(["export", str(trained), "--out", str(tmp_path / name)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (usual, most))
        signal.signal(signal.SIGXFSZ, before)
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (cli.FAILURE, "", 1), err
    assert "could not be written (File too large); nothing was written. Make room" in err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_memory_is_not_taken_for_a_model_that_cannot_be_followed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.export, "save", too_large)
    assert cli.main(["export", str(trained), "--out", str(tmp_path / "model.pt2")]) == cli.FAILURE
    err = capsys.readouterr().err
    assert err.startswith("lape: There is not enough memory ([enforce fail at alloc_cpu.cpp:117]")
    assert err.count("\n") == 1

"""`lape analyze` as a person types it: what is written, that it is what the analysis found, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import lape as library
from lape.analysis import Correlation, correlation, decomposition
from lape.analysis.subjects import ANALYSES, Subject
from lape.cli import command_line as cli
from lape.data.classes import digits
from lape.data.sources import find_set
from lape.models.registry import create_model
from lape.report import plots
from lape.report.analysis import SHEETS
from lape.training.evaluation import load_run

SMALL = ["--model-args", '{"depth": 3, "embed_dim": 16, "num_heads": 2}']


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with each join on digits, and one on pictures of pets."""
    root = tmp_path_factory.mktemp("runs")
    brief = ["--epochs", "1", "--accelerator", "cpu", *SMALL]
    for join in ("default", "lape"):
        words = ["train", "--join", join, "--batch-size", "400", "--pe", "sinusoidal-1d", *brief]
        assert cli.main([*words, "--out", str(root / join)]) == 0
    a_folder(root / "pets", "cat", "dog")
    of_folder = ["--data", str(root / "pets"), "--img-size", "16", "--batch-size", "4", "--workers", "0"]
    of_folder += ["--model", "vit_nano_patch2_8"]
    assert cli.main(["train", "--join", "default", *of_folder, *brief, "--out", str(root / "petted")]) == 0
    return root


def a_folder(root: Path, *classes: str) -> None:
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(3):
                Image.fromarray(generator.integers(0, 256, (20, 20, 3), np.uint8)).save(
                    root / part / name / f"{number}.png"
                )


@pytest.fixture
def lape(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder; returns status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words):
        status = cli.main(["analyze", *map(str, words)])
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


def refused(told, status=cli.USAGE):
    ended, out, err = told
    assert (ended, out) == (status, ""), told
    (line,) = err.splitlines()
    assert line.startswith("lape: ")
    assert not Path("analysis").exists()
    return line


def written(name: str, folder: str = "analysis"):
    assert Image.open(f"{folder}/{name}.png").size[0] > 400
    content = json.loads(Path(f"{folder}/{name}.json").read_text())
    assert {"command", "commit", "versions", "machine", "explanation"} <= content.keys()
    return content["models"], Path(f"{folder}/{name}.md").read_text()


# --- What is found is what is written


def test_correlation_of_runs(lape, runs) -> None:
    status, out, err = lape("correlation", runs / "default", runs / "lape" / "best.pt")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    models, table = written("correlation")
    assert [model["name"] for model in models] == ["default", "lape"]
    for model in models:
        expected = correlation(load_run(runs / model["name"], lambda _, own: own).work.module)
        assert model["settings"]["join"] == model["name"]
        assert model["two_dimensionality"] == expected.two_dimensionality.tolist()
        assert model["layer_difference"] == expected.layer_difference.tolist()
        assert model["of_token"] == expected.of_token.tolist()
        assert model["shape"]["layer_difference"] == expected.shape.layer_difference
        for layer, value in enumerate(expected.two_dimensionality.tolist(), start=1):
            assert f"| {model['name']} | {layer} | {value:.3f} | " in table
            assert f"{value:.3f}" in out


def test_correlation_of_fresh_models_on_another_grid(lape) -> None:
    words = ["--model", "vit_nano_patch2_8", *SMALL, "--pe", "sinusoidal-2d", "--grid", "3", "3", "--out", "here"]
    status, out, _ = lape("correlation", *words)
    assert status == 0
    models, _ = written("correlation", "here")
    assert [(model["name"], model["settings"]["pe"], model["grid"]) for model in models] == [
        ("default", "sinusoidal-2d", [3, 3]),
        ("lape", "sinusoidal-2d", [3, 3]),
    ]
    assert all(value == pytest.approx(1, abs=1e-5) for model in models for value in model["two_dimensionality"])
    assert "here/correlation.png" in out


def test_a_similarity_that_never_falls_by_half_is_told_by_the_grids_length(lape) -> None:
    found = [(Subject("flat", torch.nn.Identity(), {}), Correlation(torch.ones(2, 49, 49).double(), (7, 7)))]
    sheet = SHEETS["correlation"]
    assert list(sheet.tables(found)[1].rows) == [("flat", str(layer), "–", "> 8.5", "0.000") for layer in (1, 2)]
    (model,) = json.loads(sheet.as_json(found))["models"]
    assert (model["half_distance"], model["two_dimensionality"]) == (["inf", "inf"], [None, None])


def test_decomposition_of_a_run(lape, runs) -> None:
    status, out, err = lape("decomposition", runs / "default", "--images", "20")
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "On 20 validation images of digits." in " ".join(out.split())
    (model,), table = written("decomposition")
    found = load_run(runs / "default", lambda _, own: own)
    source = digits(None, True)
    images = (source.validation.some(20).pictures / 255 - source.mean[0]) / source.std[0]
    expected = decomposition(found.work.module, [images])
    assert model["images"] == 20
    assert model["error"] <= 1e-9
    for name, values in (("mean", expected.mean), ("spread", expected.spread), ("second_by_patch", None)):
        values = expected.of_positions if values is None else values
        torch.testing.assert_close(torch.tensor(model[name]).double(), values, rtol=1e-5, atol=1e-6)
    mean, spread = expected.mean[1, 0], expected.spread[1, 0]
    assert f"{mean:.3f} ± {spread:.3f}" in table
    assert f"{mean:.3f} ± {spread:.3f}" in out


def test_decomposition_of_a_fresh_model_on_digits(lape) -> None:
    words = ["decomposition", "--model", "vit_nano_patch2_8", *SMALL, "--joins", "default,shared", "--images", "5"]
    assert lape(*words)[0] == 0
    models, _ = written("decomposition")
    assert [(model["name"], model["settings"]["pe"]) for model in models] == [
        ("default", "learnable"),
        ("shared", "learnable"),
    ]
    prefix, (rows, columns) = len(models[0]["prefix_mean"][0][0]), models[0]["grid"]
    assert (prefix, rows, columns) == (1, 4, 4)
    first = Path("analysis/decomposition.json").read_text()
    assert lape(*words, "--seed", "1")[0] == 0
    assert written("decomposition")[0][0]["mean"] != models[0]["mean"]
    assert lape(*words)[0] == 0
    assert Path("analysis/decomposition.json").read_text() == first


def test_decomposition_on_another_set_of_the_same_kind(lape, runs, tmp_path) -> None:
    a_folder(tmp_path / "birds", "crow", "gull", "wren")
    status, out, _ = lape("decomposition", runs / "petted", "--data", tmp_path / "birds")
    assert status == 0
    assert "On 9 validation images of birds." in " ".join(out.split())  # it has no 64


@pytest.mark.parametrize(
    ("model", "data"),
    [("segmenter_nano_patch8", "shapes-segmentation"), ("mask_rcnn_vit_adapter_nano", "shapes-detection")],
)
def test_a_dense_model_is_analysed_by_its_transformer(lape, model, data) -> None:
    assert lape("decomposition", "--model", model, "--data", data, "--images", "2")[0] == 0
    (found,), _ = written("decomposition")
    assert found["images"] == 2
    assert found["error"] <= 1e-9
    assert lape("correlation", "--model", model)[0] == 0
    assert written("correlation")[0][0]["grid"] == found["grid"]


# --- Pictures


def test_models_of_different_depth_stand_in_one_picture() -> None:
    found = {
        str(depth): correlation(create_model("vit_nano_patch2_8", depth=depth, embed_dim=16, num_heads=2))
        for depth in (2, 3)
    }
    figure = plots.correlations(found)
    assert len([image for panel in figure.axes for image in panel.get_images()]) == 2 * (2 + 3)


def test_the_weights_picture_has_three_lines_with_bands_and_one_colour_scale() -> None:
    model = create_model("vit_nano_patch2_8", "default", depth=3, embed_dim=16, num_heads=2)
    one, other = (decomposition(model, [torch.randn(4, 3, 8, 8)]) for _ in range(2))
    figure = plots.decompositions({"one": one, "other": other})
    lines, *maps = figure.axes[:4]
    for drawn, mean, spread in zip(lines.get_lines(), one.mean, one.spread, strict=True):
        assert drawn.get_ydata().tolist() == mean.tolist()
        band = lines.collections[list(lines.get_lines()).index(drawn)].get_paths()[0].vertices[:, 1]
        assert band.min() == pytest.approx(float((mean - spread).min()))
        assert band.max() == pytest.approx(float((mean + spread).max()))
    assert [panel.get_images()[0].get_array().tolist() for panel in maps] == one.of_positions.tolist()
    every = [image for panel in figure.axes for image in panel.get_images()]
    assert len(every) == 2 * 3
    assert len({image.get_clim() for image in every}) == 1


# --- What is refused, in one line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["corelation"], "Did you mean 'correlation'?"),
        (["runs/first"], "is not an analysis"),
        ([], "lape analyze needs --what"),
        (["correlation"], "received neither"),
        (["correlation", "runs/no"], "runs/no"),
        (["correlation", "runs/no", "--model", "vit_nano_patch2_8"], "received both"),
        (["correlation", "--model", "vit_nano_patch2_8", "--model_args", '{"join": "lape"}'], "which --joins says"),
        (["correlation", "--model", "vit_nano_patch2_8", "--model_args", '{"join": null}'], "which --joins says"),
        (["decomposition", "--model", "vit_nano_patch2_8", "--model_args", '{"pe": "none"}'], "which --pe says"),
        (["correlation", "runs/no", "--joins", "lape"], "joins lape means nothing here"),
        (["correlation", "--model", "vit_nano_patch2_8", "--data", "digits"], "looks at no image"),
        (["correlation", "--model", "vit_nano_patch2_8", "--images", "3"], "looks at no image"),
        (["decomposition", "--model", "vit_nano_patch2_8", "--grid", "2", "2"], "the grid is that of the images"),
        (["decomposition", "--model", "vit_nano_patch2_8", "--images", "0"], "at least 1, not 0"),
        (["decomposition", "--model", "vit_nano_patch2_8", "--joins", "lape"], "one of their own"),
        (["decomposition", "--model", "deit_tiny_patch16_224"], "--img_size"),
        (["correlation", "--model", "vit_nano_patch2_8", "--joins", "lape,lape"], "named twice"),
        (["correlation", "--model", "vit_nano_patch2_8", "--grid", "2"], "grid"),
        (["correlation", "--model", "swin_tiny_patch4_window7_224"], "have several"),
        (["correlation", "--model", "cct_2_3x2_32"], "a norm on its residual stream"),
        (["correlation", "--model", "resnet18"], "cannot carry a join"),
    ],
)
def test_what_means_nothing_is_refused(lape, words, says) -> None:
    told = lape(*words)
    assert says in refused(told, cli.FAILURE if "runs/no does" in told[2] else cli.USAGE)


def test_images_of_another_kind_are_refused(lape, runs) -> None:
    assert "of the same kind" in refused(lape("decomposition", runs / "petted", "--data", "digits"))


def test_models_on_different_grids_need_a_common_one(lape, runs) -> None:
    line = refused(lape("correlation", runs / "default", runs / "petted"))
    assert "received 4x4, 8x8. Give --grid" in line
    assert lape("correlation", runs / "default", runs / "petted", "--grid", "5", "5")[0] == 0


def test_every_analysis_has_its_sheet() -> None:
    assert ANALYSES.keys() == SHEETS.keys()


def test_help_loads_no_torch() -> None:
    script = (
        "import sys; from lape.cli.command_line import main; main(['analyze', '--help']); print('torch' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "correlation" in told.stdout
    assert told.stdout.splitlines()[-1] == "False", told.stderr


# --- Models that were saved, and checkpoints of timm


@pytest.fixture(scope="module")
def saved(runs: Path) -> Path:
    """The run on pets as `lape export` writes it."""
    assert cli.main(["export", str(runs / "petted"), "--out", str(runs / "saved"), "--license", "mit"]) == 0
    return runs / "saved"


def test_a_saved_model_is_analysed_as_the_run_that_it_is_of(lape, runs, saved) -> None:
    assert lape("correlation", runs / "petted", saved, "--out", "maps")[0] == 0
    of_run, of_folder = written("correlation", "maps")[0]
    assert of_folder["name"] == "saved"
    assert of_folder["of_token"] == of_run["of_token"]
    words = ["--data", str(runs / "pets"), "--images", "4", "--out", "weights"]
    assert lape("decomposition", runs / "petted", saved, *words)[0] == 0
    of_run, of_folder = written("decomposition", "weights")[0]
    assert of_folder["data"] == of_run["data"] == "4 validation images of pets"
    assert np.allclose(of_folder["mean"], of_run["mean"], rtol=0, atol=1e-6)
    assert "tells of no set to look at. Give --data" in refused(lape("decomposition", saved, "--out", "none"))
    assert "looks at images of 3 channels" in refused(lape("decomposition", saved, "--data", "digits", "--out", "none"))


def test_weights_of_timm_are_analysed_with_the_images_that_they_know(lape, runs, monkeypatch) -> None:
    args = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 32}
    model: Any = timm.create_model("vit_tiny_patch16_224.augreg_in21k", **args)
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    with torch.no_grad():
        model.pos_embed.normal_()
    torch.save({"state_dict": model.state_dict()}, "timm.pth")
    words = ["--model", "vit_tiny_patch16_224.augreg_in21k", "--model-args", json.dumps(args), "--weights", "timm.pth"]
    assert lape("correlation", *words)[0] == 0
    (told,), _ = written("correlation")
    assert (told["name"], told["settings"]["weights"]) == ("default", "timm.pth")
    joined = library.apply(model.eval(), join="default")
    assert told["of_token"] == correlation(joined).of_token.tolist()
    assert lape("decomposition", *words, "--data", runs / "pets", "--images", "3", "--out", "weights")[0] == 0
    (told,), _ = written("decomposition", "weights")
    source = find_set(str(runs / "pets"))
    half = (0.5, 0.5, 0.5)
    see = timm.data.create_transform((3, 32, 32), mean=half, std=half, crop_pct=0.9, interpolation="bicubic")
    some = source.validation.some(3)
    images = torch.stack([see(some.picture(index, 3)) for index in range(3)])
    assert np.allclose(told["mean"], decomposition(joined, [images]).mean, rtol=0, atol=1e-6)


def test_a_page_tells_of_saved_models_and_of_weights(runs, saved, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(saved)]) == 0
    page, told = Path("report.html").read_text(), capsys.readouterr().out
    expected = correlation(library.from_pretrained(saved))
    for layer, value in enumerate(expected.two_dimensionality.tolist(), start=1):
        assert f'<th scope="row">{layer}</th><td>{value:.3f}</td>' in page
        assert f"| {layer} | {value:.3f} |" in Path("report.md").read_text()
    for text in (page, told):
        assert "cat, dog" in text
        assert "mit" in text
    assert "data:image/webp" in page
    assert not list(saved.glob("report*"))
    assert cli.main(["report", "--model", "vit_nano_patch2_8"]) == 2
    assert "give --model with the name and --weights with its file" in capsys.readouterr().err
    assert cli.main(["report", str(runs), str(saved), "--out", "all.html"]) == 0
    assert "<h2>saved</h2>" in Path("all.html").read_text()

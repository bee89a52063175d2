"""A file of a model tells enough of it: whoever reads that alone answers as `lape predict` does."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from test_evaluation import lape, run  # noqa: F401  (a fixture)

import lape as library
from lape.data.classes import digits
from lape.experiment import Experiment
from lape.sharing import exporting, hub
from lape.tasks.work import describe_set, work_of
from lape.training.checkpoints import save

pytest.importorskip("onnxruntime")
PAGE = Path(__file__).parents[1] / "docs" / "export.md"


def server() -> Any:
    """The function of the page that a server is made of."""
    names: dict[str, Any] = {}
    (block,) = re.findall(r"^```python\n(import json.*?)^```", PAGE.read_text(), flags=re.S | re.M)
    exec(compile(block, PAGE, "exec"), names)
    return names["classifier"]


def of_digits(folder: Path) -> Path:
    """A checkpoint with random weights, for images of one channel."""
    experiment = Experiment(model_args={"embed_dim": 16, "depth": 1, "num_heads": 2}, accelerator="cpu")
    source = digits(None, False)
    module = work_of(experiment, source).module
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.randn_like(value) * 0.4)
    described = {"experiment": experiment.settings(), "set": describe_set(source)}
    save(folder / "digits.pt", {**described, "model": module.state_dict()})
    return folder / "digits.pt"


def test_a_server_of_the_lines_on_the_page_answers_as_predict_does(run: Path, tmp_path: Path) -> None:  # noqa: F811
    pictures = run.parent / "set/val"
    for checkpoint in (run, of_digits(tmp_path)):
        assert lape_export(checkpoint, "--out", tmp_path / "model.onnx", "--fold", "--license", "mit") == 0
        assert lape("predict", checkpoint, pictures, "--no_draw", "--json", tmp_path / "all.json") == 0
        classify = server()(tmp_path / "model.onnx")
        told = json.loads((tmp_path / "all.json").read_text())["pictures"]
        assert len(told) == 12
        for one in told:
            served = classify(one["picture"])
            for answer in one["answers"]:
                assert served[answer["class"]] == pytest.approx(answer["probability"], rel=1e-3, abs=1e-6)
        spread = [one["answers"][0]["probability"] for one in told]
        assert max(spread) - min(spread) > 0.01  # pictures are told apart


def lape_export(*words: object) -> int:
    from lape.cli.command_line import main

    return main(["export", *map(str, words)])


def test_what_a_folder_says_of_images_is_what_validation_does_and_no_licence_is_assumed(
    run: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model: Any
    model, known = exporting.load_model(run)
    assert (known.license, model.pretrained_cfg["crop_pct"]) == (None, 0.875)
    assert lape_export(run, "--out", tmp_path / "pets") == 0
    assert "No license is said in it" in capsys.readouterr().out
    config = json.loads((tmp_path / "pets/config.json").read_text())
    cfg = config["pretrained_cfg"]
    assert (cfg["crop_pct"], cfg["interpolation"], cfg["input_size"]) == (0.875, "bicubic", [3, 16, 16])
    assert "license" not in json.dumps(config)
    assert lape_export(run, "--out", tmp_path / "pets", "--license", "cc-by-4.0") == 0
    assert lape_export(tmp_path / "pets", "--out", tmp_path / "again") == 0  # it stays
    assert "No license" not in capsys.readouterr().out
    front = yaml.safe_load((tmp_path / "again/README.md").read_text().split("---")[1])
    assert front["license"] == json.loads((tmp_path / "again/config.json").read_text())["license"] == "cc-by-4.0"
    theirs = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=1, embed_dim=16, num_heads=2)
    assert theirs.pretrained_cfg["license"] == "apache-2.0"  # of weights that this model does not have
    assert "apache" not in json.dumps(hub.configuration(library.apply(theirs)))


@pytest.mark.parametrize("size", [(32, 32), (32, 48)], ids=str)
def test_preprocessing_in_words_is_timms_transform(size: tuple[int, int]) -> None:
    cfg = {"crop_pct": 0.9, "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3}
    told = exporting.preprocessing(cfg, (3, *size))
    steps = timm.data.create_transform((3, *size), **cfg).transforms
    assert told["crop"] == list(steps[1].size) == list(size)
    resized = steps[0].size
    assert told["resize"] == (list(resized) if size[0] != size[1] else resized)

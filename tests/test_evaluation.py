"""What is told of a classifier: every number follows from the single answers, and these are those of prediction."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from lape.cli.command_line import main
from lape.data import classes as sets
from lape.data.pipeline import InOrder
from lape.data.sources import find_set
from lape.experiment import Experiment
from lape.report import evaluation as report
from lape.report import plots
from lape.tasks.answers import NamedClasses
from lape.tasks.work import describe_set, work_of
from lape.training.by_class import by_class, confused, worst
from lape.training.checkpoints import BEST, save
from lape.training.evaluation import dealt_out, evaluate_checkpoint

NAMES = ("ant", "bee", "cat")
SHADES = {"ant": 40, "bee": 128, "cat": 215}
COUNTS = {"train": (3, 2, 4), "val": (4, 2, 6), "test": (1, 1, 2)}


def photographs(folder: Path, counts: tuple[int, ...]) -> None:
    """Noise of three shades, held in all ways; brighter to one side, so that it matters how one is held."""
    random, exif = np.random.default_rng(sum(counts)), Image.Exif()
    for name, count in zip(NAMES, counts, strict=True):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            slope = np.linspace(-35, 35, 20)[:, None, None]
            grey = random.integers(-30, 30, (20, 28, 3)) + SHADES[name] + slope
            exif[ExifTags.Base.Orientation] = number + 2
            Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number}.png", exif=exif)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint of random weights, for three classes; its set lies in set/ beside it."""
    root = tmp_path_factory.mktemp("judged")
    for part, counts in COUNTS.items():
        photographs(root / "set" / part, counts)
    experiment = Experiment(
        data=str(root / "set"), img_size=16, batch_size=4, accelerator="cpu", workers=0,
        model_args={"depth": 1, "embed_dim": 16, "num_heads": 2},
    )  # fmt: skip
    source = find_set(experiment.data)
    torch.manual_seed(3)
    module = work_of(experiment, source).module
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.randn_like(value) * 0.4)
    (root / "run").mkdir()
    described = {"experiment": experiment.settings(), "set": describe_set(source)}
    save(root / "run" / BEST, {**described, "model": module.state_dict()})
    return root / "run"


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def lape(*words: object) -> int:
    return main([*map(str, words), "--accelerator", "cpu"])


def test_every_number_of_eval_follows_from_its_answers_and_these_are_those_of_predict(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    before = {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")}
    assert lape("eval", run, "--out", "judged") == 0
    out = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.parent.rglob("*")} == before
    assert sorted(path.name for path in Path("judged").iterdir()) == sorted(path.name for path in report.places(Path()))
    assert lape("predict", run, run.parent / "set/val", "--no_draw", "--csv", "p.csv", "--json", "p.json") == 0
    rows, said = rows_of(Path("judged/predictions.csv")), rows_of(Path("p.csv"))
    assert [row["picture"] for row in rows] == [row["picture"] for row in said]
    for row, one in zip(rows, said, strict=True):
        assert [row[f"class{at}"] for at in ("", "_2", "_3")] == [one[f"class{at}"] for at in ("", "_2", "_3")]
        shares = [[float(each[f"probability{at}"]) for at in ("", "_2", "_3")] for each in (row, one)]
        assert shares[0] == pytest.approx(shares[1], rel=1e-4)
        assert row["true_class"] == Path(row["picture"]).parent.name
        assert row["right"] == str(row["true_class"] == row["class"])
    single = json.loads(Path("judged/predictions.json").read_text())["predictions"]
    assert [one["probability_of_true_class"] for one in single] == [
        float(row["probability_of_true_class"]) for row in rows
    ]
    true, named = ([row[name] for row in rows] for name in ("true_class", "class"))
    told = json.loads(Path("judged/evaluation.json").read_text())
    assert told["images"] == len(rows) == 12
    matrix = confusion_matrix(true, named, labels=NAMES)
    assert 0 < matrix.trace() < 12  # there is something to be told
    assert told["confusion"] == matrix.tolist()
    filed = [list(row.values()) for row in rows_of(Path("judged/confusion.csv"))]
    assert filed == [[name, *map(str, row)] for name, row in zip(NAMES, matrix.tolist(), strict=True)]
    assert told["metrics"]["val_accuracy"] == pytest.approx(100 * matrix.trace() / 12)
    losses = [-math.log(one["probability_of_true_class"]) for one in single]
    assert told["metrics"]["val_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    sklearns = precision_recall_fscore_support(true, named, labels=NAMES, zero_division=np.nan)
    for name, measure in zip(("precision", "recall", "f1"), sklearns, strict=False):
        ours = [np.nan if one[name] is None else one[name] / 100 for one in told["classes"]]
        assert ours == pytest.approx(list(measure), nan_ok=True, abs=1e-6)
    assert [one["images"] for one in told["classes"]] == list(COUNTS["val"])
    assert told["always_naming_the_largest_class"] == {"classes": ["cat"], "accuracy": 50.0}
    assert f"accuracy {told['metrics']['val_accuracy']:.2f} % on 12 validation images of set" in out
    assert "always naming the largest class (cat): 50.00 %" in out
    assert max(map(len, out.splitlines()[1:-1])) <= 60
    for one in told["classes"]:
        (line,) = (line for line in out.splitlines() if line.startswith(f"{one['name']} "))
        cells = ["–" if one[name] is None else f"{one[name]:.1f}" for name in ("precision", "recall", "f1")]
        assert line.split() == [one["name"], str(one["images"]), *cells]


def test_the_split_that_is_judged_is_the_one_that_was_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = run.parent / "set"
    for split, words in (("train", "9 training images"), ("val", "12 validation images"), ("test", "4 test images")):
        assert lape("eval", run, "--split", split, "--out", tmp_path / split) == 0
        assert f"on {words} of set" in capsys.readouterr().out
        rows = rows_of(tmp_path / split / "predictions.csv")
        assert [row["picture"] for row in rows] == list(map(str, sorted(root.glob(f"{split}/*/*.png"))))
        assert json.loads((tmp_path / split / "evaluation.json").read_text())["split"] == split
    photographs(tmp_path / "other/train", (1, 1, 1))
    photographs(tmp_path / "other/val", (1, 1, 1))
    assert lape("eval", run, "--data", tmp_path / "other", "--split", "test") == 2
    assert "other has no split test that models are judged on, only train, val" in capsys.readouterr().err
    assert lape("eval", run, "--split", "valid") == 2
    assert "'valid' is not a split. Did you mean 'val'?" in capsys.readouterr().err


def test_of_a_folder_without_splits_all_pictures_are_judged_by_the_names_of_their_folders(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs(root := tmp_path / "new", (0, 2, 3))
    (root / "ant").rmdir()
    for name in ("bee/._0.png", ".cache/0.png", "cat/.ipynb_checkpoints/0.png", "__MACOSX/bee/0.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    assert lape("eval", run, "--data", root, "--out", tmp_path / "out") == 0
    assert "on 5 validation images of new" in capsys.readouterr().out
    rows = rows_of(tmp_path / "out/predictions.csv")
    assert [row["true_class"] for row in rows] == [*["bee"] * 2, *["cat"] * 3]
    first, *others = rows_of(tmp_path / "out/classes.csv")
    assert [one["images"] for one in (first, *others)] == ["0", "2", "3"]
    assert first["recall"] == ""
    assert lape("eval", run, "--data", root, "--split", "train") == 2
    assert "has no splits, and all of it is judged" in capsys.readouterr().err
    (root / "bee").rename(root / "wasp")
    assert lape("eval", run, "--data", root) == 2
    assert "new/wasp is no class that the model was trained to tell" in capsys.readouterr().err
    (root / "wasp").rename(tmp_path / "elsewhere")
    for path in root.rglob("*.png"):
        path.unlink()
    assert lape("eval", run, "--data", root) == 2
    assert "new/cat holds no image" in capsys.readouterr().err


def made_up(labels: list[int], named: list[list[int]], of_truth: list[float]) -> NamedClasses:
    likeliest = torch.tensor(named)
    return NamedClasses(torch.tensor(labels), torch.tensor(of_truth), likeliest, torch.ones_like(likeliest).double())


def test_the_true_class_counts_among_the_likeliest_and_mistakes_are_ordered_by_its_probability() -> None:
    answers = made_up([0, 0, 1, 2, 2], [[0, 1], [1, 0], [0, 2], [0, 1], [2, 0]], [0.9, 0.3, 0.01, 0.2, 0.8])
    measured = by_class(answers, NAMES)
    assert (measured.among, measured.top) == (2, 60.0)
    assert worst(answers) == [2, 3, 1]
    assert confused(measured) == [("ant", "bee", 1), ("bee", "ant", 1), ("cat", "ant", 1)]
    nothing = by_class(made_up([0, 0], [[0], [0]], [1.0, 1.0]), NAMES)
    assert [one.f1 for one in nothing.classes] == [100.0, None, None]
    assert (nothing.f1, nothing.balanced, nothing.of_largest) == (100.0, 100.0, 100.0)
    assert "the largest class (ant): 100.00 %" in report._summary(nothing)[1]
    assert "one of 2 classes of equal size: 40.00 %" in report._summary(measured)[1]


def test_the_contact_sheet_has_the_worst_mistakes_first_and_says_which_they_are(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MISTAKES", 2)
    judged = evaluate_checkpoint(run)
    assert judged.answers is not None
    title, tiles = report._mistakes(judged, judged.answers)
    wrong = worst(judged.answers)
    assert title == f"{len(wrong)} of 12 validation images named wrongly; the 2 with the least probable true class"
    for tile, at in zip(tiles, wrong, strict=False):
        name, is_truly, named = tile.lines
        path = Path(judged.source.validation.title(at))
        assert name == path.name
        assert is_truly.startswith(f"is {path.parent.name} (")
        assert named.startswith("named ")
        assert np.array_equal(np.asarray(tile.picture), np.asarray(judged.source.validation.picture(at, 3)))
    assert plots.png(plots.contact_sheet("None named wrongly", []), dots_per_inch=50)
    many = plots.confusion(torch.eye(70, dtype=torch.int64), [f"$class{number}" for number in range(70)])
    assert plots.png(many, dots_per_inch=50)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_answers_of_several_processes_come_back_in_the_order_of_the_images(processes: int) -> None:
    batches = [batch for process in range(processes) for batch in InOrder(7, 2, process, processes).batches]
    gathered = made_up(torch.cat(batches).tolist(), [[0]] * 7, [1.0] * 7)
    assert gathered.at(dealt_out(7, processes).argsort()).labels.tolist() == list(range(7))


def test_many_classes_are_cut_to_the_worst_on_the_screen_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = by_class(made_up([0, 1, 2, 2], [[0], [2], [1], [2]], [1.0] * 4), NAMES)
    assert report._worst_classes(measured) == [0, 1, 2]
    monkeypatch.setattr(report, "SHOWN", 2)
    assert report._worst_classes(measured) == [1, 2]


def test_a_set_in_memory_and_a_diverged_model_are_told_as_well(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    few = replace(whole := sets.digits(None, False), validation=whole.validation.some(30))
    monkeypatch.setattr("lape.data.classes.digits", lambda *_: few)
    experiment = Experiment(
        model_args={"embed_dim": 16, "depth": 1, "num_heads": 2}, batch_size=8, accelerator="cpu", workers=0
    )
    module = work_of(experiment, few).module
    for name, change in (("sound", 1.0), ("diverged", 1e25)):
        last = ("norm.weight", "head.weight")
        weights = {key: value * change if key in last else value for key, value in module.state_dict().items()}
        described = {"experiment": experiment.settings(), "set": describe_set(few)}
        save(tmp_path / f"{name}.pt", {**described, "model": weights})
        assert lape("eval", tmp_path / f"{name}.pt", "--out", tmp_path / name) == 0
    assert "top-5 accuracy" in capsys.readouterr().out
    rows = rows_of(tmp_path / "sound/predictions.csv")
    assert [row["picture"] for row in rows] == [few.validation.title(at) for at in range(30)]
    assert json.loads((tmp_path / "diverged/evaluation.json").read_text())["metrics"]["val_loss"] is None

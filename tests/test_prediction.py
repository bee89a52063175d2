"""What is said of pictures: the answers are those that were judged, and are drawn where they are, with their names."""

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_sets import ade20k, coco
from numpy.typing import NDArray
from PIL import ExifTags, Image

from lape.cli.command_line import main
from lape.experiment import Experiment
from lape.report import prediction
from lape.report.prediction import VEIL, colour, drawn, line
from lape.tasks.answers import Answer
from lape.tasks.classification import LikelyClasses
from lape.tasks.detection import DetectedObjects
from lape.tasks.segmentation import ClassMap
from lape.training import checkpoints, evaluation
from lape.training import loop as training
from lape.training.evaluation import evaluate_checkpoint
from lape.training.loop import train
from lape.training.prediction import Predicted, files_of, predict

CLASSES = ("ant", "bee", "cat", "dog", "emu", "fox")


def pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


def plain(width: int, height: int, shade: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    return Image.new("RGB", (width, height), shade)


def drawing(answer: Any, picture: Image.Image | None = None) -> Image.Image:
    return drawn(answer, picture or plain(128, 96), CLASSES)


def objects(*labels: int) -> DetectedObjects:
    """Objects of these classes, each a box of 20x30 pixels with a mask inside."""
    boxes, masks = torch.zeros(len(labels), 4), torch.zeros(len(labels), 96, 128, dtype=torch.bool)
    for number in range(len(labels)):
        left = 10 + 40 * number
        boxes[number] = torch.tensor([left, 20, left + 20, 50])
        masks[number, 30:45, left + 5 : left + 15] = True
    return DetectedObjects(boxes, torch.tensor(labels, dtype=torch.int64), masks, torch.linspace(0.9, 0.5, len(labels)))


def named(labels: list[int], shares: list[float]) -> LikelyClasses:
    return LikelyClasses(torch.tensor(labels), torch.tensor(shares))


# --- Drawing


def veiled(label: int, shade: int = 0) -> Any:
    return pytest.approx([VEIL * part + (1 - VEIL) * shade for part in colour(label)], abs=1)


def test_a_box_and_a_mask_lie_where_their_object_is_in_the_enlarged_picture() -> None:
    sheet = pixels(drawing(objects(2, 5)))
    seen = sheet[: 4 * 96, : 4 * 128]
    for label, left in ((2, 10), (5, 50)):
        mask = seen[4 * 30 : 4 * 45, 4 * (left + 5) : 4 * (left + 15)]
        assert mask.min((0, 1)).tolist() == mask.max((0, 1)).tolist() == veiled(label)
        for edge in (seen[4 * 48, 4 * left], seen[4 * 48, 4 * (left + 20)], seen[4 * 50, 4 * (left + 10)]):
            assert edge.tolist() == list(colour(label))
    rows, columns, _ = seen.nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4 * 20, 4 * 50, 4 * 10, 4 * 70)


def test_where_nothing_is_found_a_picture_stays_as_it_is(recwarn: pytest.WarningsRecorder) -> None:
    random = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8))
    nothing = replace(objects(), masks=torch.zeros(0, 400, 500, dtype=torch.bool))
    assert np.array_equal(pixels(drawing(nothing, random)), pixels(random))
    assert not recwarn.list


def test_picture_and_colour_both_show_through() -> None:
    assert 0.25 < VEIL < 0.75


def test_a_map_is_drawn_in_the_colours_of_its_classes_over_the_picture() -> None:
    answer = torch.zeros(400, 500, dtype=torch.int64)
    answer[:, 300:] = 3
    answer[350:] = 5
    seen = pixels(drawing(ClassMap(answer), plain(500, 400, (80, 80, 80))))
    for label in (0, 3, 5):
        part = seen[:400, :500][answer.numpy() == label]
        assert part.min(0).tolist() == part.max(0).tolist() == veiled(label, 80)


@pytest.mark.parametrize(
    ("size", "times"),
    [((32, 40), 12), ((128, 96), 4), ((384, 500), 1), ((900, 1000), 1), ((2000, 20), 1), ((300, 20), 2)],
    ids=str,
)
def test_a_small_picture_is_enlarged_and_a_large_one_is_not_made_smaller(size: tuple[int, int], times: int) -> None:
    sheet = drawing(named([0], [1.0]), plain(*size))
    assert sheet.width == times * size[0]
    assert pixels(sheet)[: times * size[1]].max() == 0
    assert pixels(sheet)[times * size[1]].min() == 255


@pytest.mark.parametrize(
    ("answer", "legend"),
    [
        (objects(5, 2, 5), [(5, "2 fox"), (2, "1 cat")]),
        (ClassMap(torch.tensor([[4, 4, 1, 4], [4, 3, 1, 1]]).repeat(48, 32)), [(4, None), (1, None), (3, None)]),
        (named([3, 1], [0.75, 0.25]), [(3, "dog 75.0%"), (1, "bee 25.0%")]),
        (objects(), []),
    ],
    ids=["objects", "map", "classes", "nothing"],
)
def test_the_legend_has_each_class_that_was_found_in_its_colour(
    answer: Answer, legend: list[tuple[int, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    monkeypatch.setattr(prediction, "_with_legend", lambda picture, names: told.extend(names) or picture)
    drawing(answer)
    assert told == [(colour(label), text or CLASSES[label]) for label, text in legend]


def test_below_a_picture_each_name_stands_behind_its_colour_and_none_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [(colour(label), f"class number {label}") for label in range(12)]
    written: list[tuple[float, float, str]] = []
    write = prediction.ImageDraw.ImageDraw.text

    def noted(pen: Any, place: tuple[float, float], text: str, **options: Any) -> None:
        written.append((*place, text))
        write(pen, place, text, **options)

    monkeypatch.setattr(prediction.ImageDraw.ImageDraw, "text", noted)
    sheet = pixels(prediction._with_legend(plain(400, 300), names))
    assert sheet[:300, :400].max() == 0
    assert [text for *_, text in written] == [text for _, text in names]
    assert len({(x, y) for x, y, _ in written}) == 12
    for (x, y, _), (shade, _) in zip(written, names, strict=True):
        swatch = sheet[round(y) + 4 : round(y) + 14, round(x) - 16 : round(x) - 8]
        assert swatch.min((0, 1)).tolist() == swatch.max((0, 1)).tolist() == list(shade)
        assert 300 <= y < len(sheet) - 14
        assert sheet[round(y) : round(y) + 17, round(x) : round(x) + 40].min() < 64
    assert (sheet[300:, -6:] == 255).all()


def test_no_two_classes_of_a_large_set_have_one_colour() -> None:
    assert len({colour(label) for label in range(150)}) == 150


# --- Lines


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (objects(5, 2, 5), "2 fox, 1 cat"),
        (objects(), "nothing found"),
        (
            ClassMap(torch.tensor([[4, 4, 1, 0], [4, 1, 3, 4], [4, 0, 1, 4], [4, 4, 4, 4]])),
            "emu 62.5%, bee 18.8%, ant 12.5%",
        ),
        (named([3, 1, 0, 2], [0.5, 0.25, 0.15, 0.1]), "dog 50.0%, bee 25.0%, ant 15.0%"),
    ],
    ids=["objects", "nothing", "map", "classes"],
)
def test_a_line_says_what_there_is_most_of(answer: Any, text: str) -> None:
    assert line(Predicted(Path("one.png"), answer, CLASSES)) == f"one.png: {text}"


# --- Pictures


def test_a_folder_stands_for_its_pictures_at_any_depth_and_other_files_are_left_out(tmp_path: Path) -> None:
    hidden = ("._d.jpeg", "__MACOSX/d.jpeg", ".ipynb_checkpoints/a.jpg", "deep/.trash/a.jpg")
    for name in ("b.PNG", "a.jpg", "c.txt", "d.jpeg", "first.png", "deep/er/c.jpg", "deep.png/e.png", *hidden):
        (tmp_path / ".many" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".many" / name).touch()
    given = [tmp_path / ".many/first.png", tmp_path / ".many", tmp_path / ".many/b.PNG"]
    names = ["first.png", "a.jpg", "b.PNG", "d.jpeg", "c.jpg", "e.png", "first.png", "b.PNG"]
    assert {path.name for path in files_of(given[1:2])} == set(names)
    names = ["first.png", *(path.name for path in files_of(given[1:2])), "b.PNG"]
    assert [path.name for path in files_of(given)] == names


# --- Answers

SMALL: dict[str, Any] = {"accelerator": "cpu", "workers": 0, "epochs": 1, "warmup_epochs": 0.0, "lr": 1e-2}


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photographs, whose set lies in set/ beside it."""
    root = tmp_path_factory.mktemp("maps")
    train(
        Experiment(
            data="ade20k", data_dir=ade20k(root / "set"), model="segmenter_nano_patch8", batch_size=2,
            model_args={"embed_dim": 64, "depth": 2, "num_heads": 2}, short_side=(64,), crop=64, stride=48, **SMALL,
        ),
        root / "run",
    )  # fmt: skip
    return root / "run"


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pictures with objects, so short that it finds many."""
    root = tmp_path_factory.mktemp("objects")
    size = {"embed_dim": 24, "depth": 2, "num_heads": 2, "interactions": [[0, 0], [1, 1]], "deform_heads": 2}
    train(
        Experiment(
            data=str(coco(root / "set")), model="mask_rcnn_vit_adapter_nano", batch_size=2, short_side=(64,),
            model_args={**size, "windows": [3, None], "candidates": 50, "proposals": 20, "region_samples": 8},
            long_side=96, crop=64, zoom=(48,), zoom_crop=(32, 40), **SMALL | {"lr": 1e-4},
        ),
        root / "run",
    )  # fmt: skip
    return root / "run"


def test_the_map_of_a_picture_is_the_one_that_was_judged(segmenter: Path) -> None:
    root = segmenter.parent / "set"
    right = labelled = 0
    found: Any
    for found in predict(segmenter, sorted(root.glob("images/validation/*.jpg"))):
        with Image.open(root / f"annotations/validation/{found.path.stem}.png") as file:
            truth = torch.from_numpy(np.array(file)).long() - 1
        right += int((found.answer.labels == truth).sum())
        labelled += int((truth >= 0).sum())
    judged = evaluate_checkpoint(segmenter).metrics["val_pixel_accuracy"]
    assert right
    assert 100 * right / labelled == pytest.approx(judged)


def test_what_is_found_at_a_threshold_is_what_has_that_score(detector: Path) -> None:
    pictures = sorted(detector.parent.glob("set/val2017/*.jpg"))

    def found(threshold: float) -> list[Any]:
        answers: list[Any] = list(predict(detector, pictures, threshold))
        return [one.answer for one in answers]

    everything = found(0.0)
    scores = torch.cat([answer.scores for answer in everything])
    assert len(scores) > 2
    middle = float(scores.median())
    for threshold in (middle, 1.1):
        for some, every in zip(found(threshold), everything, strict=True):
            sure = every.scores >= threshold
            for name in ("boxes", "labels", "masks", "scores"):
                assert torch.equal(getattr(some, name), getattr(every, name)[sure])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photographs held in all ways, whose set lies in set/ beside it."""
    root, random = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    exif = Image.Exif()
    for part, count in (("train", 4), ("val", 6)):
        for name, shade in (("dark", 60), ("light", 190)):
            (root / "set" / part / name).mkdir(parents=True)
            for number in range(count):
                exif[ExifTags.Base.Orientation] = number + 3
                grey = random.integers(shade - 60, shade + 60, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(grey).save(root / "set" / part / name / f"{number}.png", exif=exif)
    args = {"depth": 1, "embed_dim": 16, "num_heads": 2}
    train(Experiment(data=str(root / "set"), img_size=16, batch_size=4, model_args=args, **SMALL), root / "run")
    return root / "run"


@pytest.mark.parametrize("at_once", [None, 1, 5])
def test_the_class_of_a_picture_is_the_one_that_was_judged(at_once: int | None, classifier: Path) -> None:
    pictures = sorted(classifier.parent.glob("set/val/*/*.png"))
    found: list[Any] = list(predict(classifier, pictures, batch_size=at_once))
    assert [one.path for one in found] == pictures
    right = [one.classes[one.answer.labels[0]] == one.path.parent.name for one in found]
    judged = evaluate_checkpoint(classifier).metrics
    assert 100 * sum(right) / len(right) == pytest.approx(judged["val_accuracy"])
    of_truth = [
        record["probability"]
        for one in found
        for record in one.answer.records(one.classes)
        if record["class"] == one.path.parent.name
    ]
    assert -np.log(of_truth).mean() == pytest.approx(judged["val_loss"], rel=1e-5)


def test_pictures_are_looked_at_by_one_process_however_many_trained(
    segmenter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoints.read(segmenter / "best.pt")
    saved["experiment"] |= {"devices": 3, "nodes": 2}
    checkpoints.save(tmp_path / "best.pt", saved)
    asked: list[Experiment] = []
    launch = evaluation.launch
    monkeypatch.setattr(evaluation, "launch", lambda experiment: asked.append(experiment) or launch(experiment))
    picture = next(segmenter.parent.glob("set/images/validation/*.jpg"))
    assert len(list(predict(tmp_path / "best.pt", [picture]))) == 1
    assert [(experiment.devices, experiment.nodes) for experiment in asked] == [(1, 1)]


# --- From the command line


def noting(told: dict[str, Any], *order: str) -> Callable[..., Any]:
    def called(*given: Any, **options: Any) -> Any:
        told.update(zip(order, given, strict=False), **options)
        raise KeyboardInterrupt

    return called


def test_every_option_of_eval_reaches_the_judgement(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(evaluation, "evaluate_checkpoint", noting(told, "checkpoint"))
    words = [
        *("eval", "runs/a", "--data", "ade20k", "--data_dir", "pictures", "--batch_size", "3", "--workers", "2"),
        *("--accelerator", "cpu", "--stride", "32", "--test_scales", "0.5,1", "--test_flip"),
    ]
    main([*words, "--split", "test"])
    assert told == {
        "checkpoint": Path("runs/a"), "split": "test", "data": "ade20k", "data_dir": Path("pictures"),
        "batch_size": 3, "workers": 2, "accelerator": "cpu", "stride": 32, "test_scales": (0.5, 1.0), "test_flip": True,
    }  # fmt: skip


def test_eval_says_every_measure_by_its_title(
    segmenter: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, titles in (
        (segmenter, {"mIoU": "val_miou", "pixel accuracy": "val_pixel_accuracy"}),
        (detector, {"box AP": "val_box_ap", "mask AP": "val_mask_ap"}),
    ):
        judged = evaluate_checkpoint(run)
        assert main(["eval", str(run), "--out", str(tmp_path / run.parent.name)]) == 0
        found = ", ".join(f"{title} {judged.metrics[name]:.2f} %" for title, name in titles.items())
        told = f"{found} on 2 validation images of {judged.data} ({run / 'best.pt'})\n"
        (file,) = (tmp_path / run.parent.name).iterdir()
        assert capsys.readouterr().out == f"{told}\nWritten: {file}\n"
        assert json.loads(file.read_text())["metrics"] == judged.metrics
        assert main(["eval", str(run), "--split", "train"]) == 2
        assert "has no split train that models are judged on, only val" in capsys.readouterr().err


def test_every_option_of_predict_reaches_the_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lape.training.prediction.predict", noting(told, "checkpoint", "pictures", "threshold", "size"))
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    main(["predict", "runs/a", "b.png", "a.png"])
    pictures = [Path("b.png"), Path("a.png")]
    assert told == {
        "checkpoint": Path("runs/a"), "pictures": pictures, "threshold": 0.5, "size": None, "test_scales": None,
        "test_flip": None, "accelerator": None,
    }  # fmt: skip
    asked = ["--threshold", "0.3", "--test_scales", "0.5", "1", "--test_flip", "--accelerator", "cpu"]
    asked += ["--batch_size", "3"]
    main(["predict", "runs/a", "b.png", "a.png", *asked])
    assert told == {
        "checkpoint": Path("runs/a"), "pictures": pictures, "threshold": 0.3, "size": 3, "test_scales": (0.5, 1.0),
        "test_flip": True, "accelerator": "cpu",
    }  # fmt: skip


def test_a_run_tells_how_it_goes_and_how_its_files_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "train", noting(told, "experiment", "folder"))
    main(["train", "--data", "digits", "--out", "x", "--resume"])
    assert (told["folder"], told["resume"]) == (Path("x"), True)
    assert told["checked"] == told["report"].check


def test_pictures_are_kept_under_numbers_that_sort_in_their_order(
    segmenter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(next(segmenter.parent.glob("set/images/validation/0.jpg")))
    assert main(["predict", str(segmenter), *[picture] * 10, "--out", str(tmp_path), "--accelerator", "cpu"]) == 0
    names = [f"{number:02d}-0.png" for number in range(1, 11)]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    ends = [row.rsplit(" -> ", 1)[1] for row in capsys.readouterr().out.splitlines()]
    assert ends == [str(tmp_path / name) for name in names]


@pytest.mark.parametrize("name", ["a, b.png", "IMG #1.png", "[x].png", "a: b.png", "2019", "true", "null"])
def test_a_file_may_have_any_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lape.cli.command_line import parsed

    for words in (["predict", "runs/x", name], ["predict", "runs/x", "--pictures", name], ["results", name]):
        _, given = parsed(words)
        assert given["runs" if words[0] == "results" else "pictures"] == [Path(name)]


def test_nothing_is_left_of_a_prediction_that_could_not_begin(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    assert main(["predict", str(tmp_path / "no.pt"), str(tmp_path / "one.png"), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_broken_picture_is_reported_and_costs_no_other(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = sorted(classifier.parent.glob("set/val/light/*.png"))[:2]
    for place, content in {"a.png": files[0], "deep/er/c.png": files[1]}.items():
        (tmp_path / "some" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "some" / place).write_bytes(content.read_bytes())
    (tmp_path / "some/b.jpg").write_text("no picture")
    words = ["predict", str(classifier), "some", "--csv", "found/all.csv", "--json", "found/all.json"]
    assert main([*words, "--accelerator", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert [row.split(": ")[0] for row in out.splitlines()] == ["some/a.png", "some/deep/er/c.png"]
    first, last = filter(str.strip, err.splitlines())
    assert first.startswith("lape: some/b.jpg cannot be read as an image")
    assert last == "lape: 1 of 3 pictures could not be read, and are named above."
    assert sorted(path.name for path in Path("predictions").iterdir()) == ["1-a.png", "3-c.png"]
    told = json.loads(Path("found/all.json").read_text())["pictures"]
    rows = rows_of(Path("found/all.csv"))
    assert [one["picture"] for one in told] == [row["picture"] for row in rows] == [
        "some/a.png", "some/b.jpg", "some/deep/er/c.png",
    ]  # fmt: skip
    assert told[1]["error"] == rows[1]["error"] == first.removeprefix("lape: ")
    same: list[Any] = list(predict(classifier, files))
    for number, one in zip((0, 2), same, strict=True):
        records = one.answer.records(one.classes)
        assert told[number]["answers"] == [{**record, "probability": approx(record)} for record in records]
        ranked = [(rows[number][f"class{at}"], float(rows[number][f"probability{at}"])) for at in ("", "_2")]
        assert ranked == [(record["class"], approx(record)) for record in records]


def approx(record: dict[str, Any]) -> Any:
    return pytest.approx(record["probability"], rel=1e-5)


def test_nothing_is_drawn_where_that_is_asked_and_files_of_others_stay(
    segmenter: Path, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run, measure, count in ((segmenter, "share", 1), (detector, "score", 2)):
        picture = next((run.parent / "set").rglob("0.jpg"))
        words = ["predict", str(run), str(picture), "--no_draw", "--threshold", "0", "--accelerator", "cpu"]
        assert main([*words, "--csv", "found.csv"]) == 0
        assert capsys.readouterr().out.startswith(f"{picture}: ")
        found: Any
        (found,) = predict(run, [picture], threshold=0.0)
        records, rows = found.answer.records(found.classes), rows_of(Path("found.csv"))
        assert len(records) >= count
        assert [row["class"] for row in rows] == [record["class"] for record in records]
        assert [float(row[measure]) for row in rows] == pytest.approx([record[measure] for record in records])
        assert [path.name for path in tmp_path.iterdir()] == ["found.csv"]
    Path("found.csv").write_text("another's")
    assert main([*words, "--csv", "found.csv"]) == 2
    assert "found.csv is there and was not written by lape" in capsys.readouterr().err
    assert main([*words, "--batch_size", "0"]) == 2
    assert "batch_size must be at least 1, not 0" in capsys.readouterr().err

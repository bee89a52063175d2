"""One set of weights judged at many sizes of images: each number is that of a single evaluation at that size."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_up_runs import write_run
from test_cli import lape, refused  # noqa: F401  (a fixture)
from torch import nn

import lape as library
from lape import report
from lape.cli.command_line import _normal
from lape.data import classes, pipeline
from lape.data.sizes import Size, sizes_of
from lape.errors import UsageError
from lape.experiment import Experiment
from lape.models import segmenter
from lape.report import tables
from lape.studies import sizes
from lape.studies.comparison import Factors, plans
from lape.studies.statistics import Way, difference
from lape.studies.study import RunAtSizes, gather
from lape.tasks.work import describe_set, work_of
from lape.training.checkpoints import BEST, LAST, save
from lape.training.contents import contents
from lape.training.evaluation import AtSize, at_sizes, evaluate_at_sizes, evaluate_checkpoint, load_run

TINY = {"embed_dim": 16, "depth": 2, "num_heads": 2}
IMAGES = 120  # of the validation set
FEW = Experiment(model_args=TINY, batch_size=60, accelerator="cpu", workers=0)

WHOLE = classes.digits(None, False)
FEW_DIGITS = replace(WHOLE, validation=WHOLE.validation.some(IMAGES))


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch, tmp_path):
    """The first validation images of the digits stand for all of them."""
    monkeypatch.setattr("lape.data.classes.digits", lambda *_: FEW_DIGITS)
    monkeypatch.chdir(tmp_path)


def checkpoint(experiment: Experiment, folder: Path = Path("run")) -> Path:
    """Write the checkpoint of a run whose weights are random, and far enough from their start to tell sizes apart."""
    torch.manual_seed(experiment.seed)
    source = FEW_DIGITS
    module = work_of(experiment, source).module
    with torch.no_grad():
        for name, value in module.named_parameters():
            if value.requires_grad:  # fixed tables stay
                value.add_(torch.randn_like(value) * (0.5 if "pos_embed" in name else 0.1))
    folder.mkdir(parents=True, exist_ok=True)
    described = {"experiment": experiment.settings(), "set": describe_set(source)}
    save(folder / BEST, {**described, "model": module.state_dict()})
    return folder / BEST


def by_hand(path: Path, size: Size) -> dict[str, float]:
    """Judge a checkpoint in a model that is made at its size and set to another, on images prepared by hand."""
    stored = torch.load(path, weights_only=True)
    experiment, source = Experiment.of(stored["experiment"]), FEW_DIGITS
    options = {"img_size": source.size, "in_chans": source.channels, "num_classes": 10, **experiment.model_args}
    model = library.create_model(experiment.model, **experiment.names._asdict(), **options)  # pyright: ignore
    model.load_state_dict(stored["model"])
    model.eval().set_input_size(tuple(size))  # pyright: ignore[reportCallIssue]
    see = pipeline.validation_transform(source, pipeline.augmentation(experiment, source), size)
    split = source.validation
    images = torch.stack([see(split.picture(index, source.channels)) for index in range(len(split))])
    with torch.no_grad():
        answers = model(images)
    right = (answers.argmax(1) == split.labels).float().mean().item()
    return {"val_accuracy": 100 * right, "val_loss": F.cross_entropy(answers, split.labels).item()}


@pytest.mark.parametrize("names", [("lape", "learnable"), ("lape", "sinusoidal-2d"), ("default", "relative")])
def test_every_size_is_a_single_evaluation_of_a_model_set_to_it(names) -> None:
    path = checkpoint(replace(FEW, join=names[0], pe=names[1]))
    asked = sizes_of(["16", "8", "12", "8x16", "9", "2"])
    evaluation = evaluate_at_sizes(path, asked)
    assert (evaluation.images, evaluation.trained) == (IMAGES, (8, 8))
    by_size = {one.size: one for one in evaluation.results}
    assert list(by_size) == list(asked)
    assert by_size[Size(8, 8)].metrics == evaluate_checkpoint(path).metrics
    for size in (Size(16, 16), Size(12, 12), Size(8, 16), Size(2, 2)):
        assert by_size[size].metrics == pytest.approx(by_hand(path, size), rel=1e-5)
    assert len({one.metrics["val_loss"] for one in evaluation.results if one.metrics}) == 5
    assert by_size[Size(9, 9)].metrics == {}
    assert by_size[Size(9, 9)].refusal == "Its patches of 2x2 do not divide images of 9x9."
    again = evaluate_at_sizes(path, asked[::-1])  # no size leaves anything to the next
    assert {one.size: one for one in again.results} == by_size


def test_a_model_that_does_not_take_a_size_says_so_and_the_others_are_judged() -> None:
    run = load_run(checkpoint(FEW), lambda *_: FEW_DIGITS)
    both = sizes_of(["16", "8"])

    def refusals(change) -> list[str | None]:
        changed = load_run(run.path, lambda *_: FEW_DIGITS)
        changed.work.module = change(changed.work.module)
        return [one.refusal for one in at_sizes(changed, both)]

    assert refusals(lambda model: model) == [None, None]
    folded, as_trained = refusals(library.fold)
    assert "folded for: set the size, then fold" in str(folded)
    assert as_trained is None
    strict, as_trained = refusals(WithoutSizes)
    assert "(16) doesn't match model (8)" in str(strict)
    assert as_trained is None
    run.work.module = Careless(run.work.module)
    answers, as_trained = at_sizes(run, both)
    assert answers.refusal == "To an image of 16x16 it answers (1, 40)."
    assert as_trained.refusal is None


class Careless(nn.Module):
    """A model whose answer grows with the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] == 8:
            return self.model(images)
        return images.new_zeros(len(images), 10 * images.shape[-1] * images.shape[-2] // 64)


def WithoutSizes(model: nn.Module) -> nn.Module:
    """A model of strict size that has no method to set another."""
    model.set_input_size = None  # pyright: ignore[reportArgumentType]
    return model


# --- The command


def test_eval_at_sizes_prints_a_table_and_files_it(lape) -> None:  # noqa: F811
    checkpoint(FEW)
    status, out, err = lape("eval", "run", "--sizes", "8,9", "16", "8x16", "--out", "filed")
    assert (status, err) == (0, "")
    assert f"{IMAGES} validation images of digits, run/best.pt, trained at 8x8" in " ".join(out.split())
    filed = json.loads(Path("filed/sizes.json").read_text())
    assert [one["size"] for one in filed["sizes"]] == ["8x8", "9x9", "16x16", "8x16"]
    for one in filed["sizes"]:
        shown = "not taken" if one["refusal"] else f"{one['val_accuracy']:.2f}"
        assert any(line.startswith(one["size"]) and line.rstrip().endswith(shown) for line in out.splitlines()), out
    assert max(map(len, out.splitlines())) <= 80
    assert "9x9 is not taken. Its patches of 2x2 do not divide images of 9x9." in out
    rows = list(csv.DictReader(Path("filed/sizes.csv").read_text().splitlines()))
    assert [float(row["val_loss"]) if row["val_loss"] else None for row in rows] == [
        one["val_loss"] for one in filed["sizes"]
    ]
    assert (filed["sizes"][3]["height"], filed["sizes"][3]["width"]) == (8, 16)
    Path("filed/sizes.csv").write_text("another's")
    assert "filed/sizes.csv is there and was not written by lape" in refused(
        lape("eval", "run", "--sizes", "8", "--out", "filed")
    )


@pytest.mark.parametrize(
    "typed", ["28x", "0x10", "x28", "28x56x3", "28,28x28", "0", "-8", "1.5", "010", "8_0", "", "\uff11"]
)
@pytest.mark.parametrize("command", [["eval", "no-run"], ["compare"]])
def test_a_misspelt_size_is_refused_before_anything_is_read(lape, monkeypatch, typed, command) -> None:  # noqa: F811
    monkeypatch.delattr("lape.training.evaluation.load_run")
    monkeypatch.delattr("lape.data.sources.find_set")
    line = refused(lape(*command, "--sizes", *([typed] if typed else [])))
    assert "sizes lists" in line
    assert not list(Path().iterdir())


def test_words_that_yaml_reads_as_numbers_stay_words() -> None:
    assert _normal("eval", ["--sizes", "8,0x10"]) == ['--sizes=["8","0x10"]']
    assert _normal("models", ["--name", "224", "cct"]) == ['--name=["224",cct]']


def test_sizes_of_a_dense_model_are_refused(monkeypatch) -> None:
    checkpoint(FEW)
    run = load_run(Path("run"), lambda *_: FEW_DIGITS)
    monkeypatch.setattr(type(run.work), "one_size", False)
    with pytest.raises(UsageError, match="sizes are for classifiers"):
        list(at_sizes(run, [Size(8, 8)]))


# --- Comparisons

WAYS, SEEDS = (Way("default"), Way("lape")), (0, 1)
COMPARE = ["compare", "--model-args", json.dumps(TINY), "--batch-size", "60", "--accelerator", "cpu", "--workers", "0"]
COMPARE += ["--pe", "learnable", "--seeds", "2", "--out", "x"]


def finished_runs() -> dict[tuple[Way, int], Path]:
    """Write finished runs where `lape compare` keeps them, with random weights and made-up scores of training."""
    made, _ = plans(FEW, Factors(["default", "lape"], ["learnable"], SEEDS), Path("x"))
    for plan in made:
        checkpoint(plan.experiment, plan.folder).rename(plan.folder / LAST)
        write_run(
            plan.folder, plan.combination, [10.0, 20.0 + plan.combination.seed], FEW, contents=contents(FEW_DIGITS)
        )
    return {(plan.combination.way, plan.combination.seed): plan.folder for plan in made}


def scores_at(table, size: str) -> dict[tuple[str, int], Any]:
    return {(run["way"], run["seed"]): run["score"] for run in table["sizes"]["runs"] if run["size"] == size}


def test_a_comparison_at_sizes_is_that_of_single_evaluations_and_is_kept(lape, monkeypatch) -> None:  # noqa: F811
    folders = finished_runs()
    status, out, err = lape(*COMPARE, "--sizes", "16,9,8,8x16")
    assert (status, err.strip()) == (0, "4 finished runs kept.")
    assert max(map(len, out.splitlines())) <= 80
    table = json.loads(Path("x/table.json").read_text())
    for size in (Size(16, 16), Size(8, 8), Size(8, 16)):
        alone = {
            (str(way), seed): by_hand(folder / LAST, size)["val_accuracy"] for (way, seed), folder in folders.items()
        }
        scores = scores_at(table, str(size))
        assert scores == pytest.approx(alone, abs=1e-4)
        by_way = [{seed: scores[str(way), seed] for seed in SEEDS} for way in WAYS]
        paired = difference(by_way[1], by_way[0])
        assert paired is not None
        base, row = (one for one in table["sizes"]["rows"] if one["size"] == str(size))
        assert (base["way"], base["difference_mean"], base["trained"]) == ("default", None, size == (8, 8))
        assert (row["way"], row["seeds"], row["difference_pairs"]) == ("lape", 2, 2)
        assert row["score_mean"] == pytest.approx(sum(by_way[1].values()) / 2)
        assert [row[f"difference_{name}"] for name in ("mean", "low", "high")] == [paired.mean, *paired.interval]
        cells = f"{sum(by_way[1].values()) / 2:.2f}"
        assert cells in Path("x/index.html").read_text()
        assert cells in out
    told = "Not taken at 9x9: default × learnable and lape × learnable. Its patches of 2x2 do not divide images of 9x9."
    for text in (" ".join(out.split()), Path("x/index.html").read_text(), Path("x/table.md").read_text()):
        assert told in text
    rows = list(csv.DictReader(Path("x/sizes.csv").read_text().splitlines()))
    assert [(row["size"], row["way"], row["refusal"] != "") for row in rows] == [
        (size, way, size == "9x9") for size in ("16x16", "9x9", "8x8", "8x16") for way in ("default", "lape")
    ]
    assert [float(row["score_mean"] or "nan") for row in rows] == pytest.approx(
        [row.get("score_mean") or float("nan") for row in table["sizes"]["rows"]], nan_ok=True
    )
    assert Path("x/sizes.png").read_bytes().startswith(b"\x89PNG")
    (plain,) = gather([Path("x")]).studies
    assert Path("x/table.csv").read_text() == tables.as_csv(plain)
    assert table.keys() - {"sizes"} == json.loads(tables.as_json(plain)).keys()
    assert not {Path("x", report.SIZES), Path("x", "sizes.png")} & {*report.places(Path("x"))}

    # What is kept is not judged again, nor by a report; what is new is, and a checkpoint that has changed.
    asked = []
    judge = sizes.at_sizes
    kept = sizes.with_kept(plain)
    assert kept.sizes == tuple(sorted(sizes_of(["16", "9", "8", "8x16"])))
    assert lape("report", "x", "--out", "report.html")[0] == 0
    assert cells in Path("report.html").read_text()
    monkeypatch.setattr(sizes, "at_sizes", lambda run, some: judge(run, asked.append((run.path.parent, some)) or some))
    again = sizes.judged_at(plain, sizes_of(["8x16", "9"]), FEW)
    assert asked == []
    for one, judged in again.at_sizes.items():
        assert judged.by_size[Size(8, 16)].metrics["val_accuracy"] == scores_at(table, "8x16")[str(one.way), one.seed]
    changed, gone = folders[WAYS[0], 1], folders[WAYS[1], 1]
    checkpoint(replace(FEW, join="default", seed=5), changed).rename(changed / LAST)
    (gone / LAST).unlink()
    reported = sizes.with_kept(plain).at_sizes
    refused = {(one.way, one.seed): run.by_size[Size(16, 16)].refusal for one, run in reported.items()}
    told = "It was not judged there: lape compare --sizes 16x16."
    assert {folders[key] for key, why in refused.items() if why == told} == {changed}
    again = sizes.judged_at(plain, sizes_of(["16", "12"]), FEW)
    others = [(folder, [Size(12, 12)]) for folder in folders.values() if folder not in (changed, gone)]
    assert sorted(asked) == sorted([*others, (changed, [Size(16, 16), Size(12, 12)])])
    base, row = again.rows_at(Size(16, 16))
    other = {0: scores_at(table, "16x16")["default", 0], 1: by_hand(changed / LAST, Size(16, 16))["val_accuracy"]}
    assert base.score.mean == pytest.approx(sum(other.values()) / 2)
    assert row.difference is not None
    assert (row.score.count, list(row.difference.by_seed)) == (2, [0, 1])  # of what is gone the number is known
    ((reason, pairs),) = again.refused_at(Size(12, 12)).items()
    assert "last.pt cannot be read" in reason
    assert pairs == ((WAYS[1], "learnable"),)


@pytest.mark.parametrize("written", ["{}", "[", '{"checkpoint": 1}', '{"sizes": {"9": 3}}'])
def test_what_a_folder_keeps_is_computed_again_where_it_cannot_be_read(written) -> None:
    state = {"bytes": 1}
    Path("sizes.json").write_text(written)
    assert sizes._kept(Path("sizes.json"), state) == RunAtSizes(None, {})
    sizes._keep(Path("mine.json"), state, known := RunAtSizes(Size(8, 8), {Size(8, 4): AtSize(Size(8, 4), {"a": 1.0})}))
    assert sizes._kept(Path("mine.json"), state) == known
    assert sizes._kept(Path("mine.json"), {"bytes": 2}) == RunAtSizes(None, {})
    for spoilt in (("1.0", "NaN"), ('"refusal": null', '"refusal": 3'), ('"a": 1.0', ""), ("8x8", "8xx")):
        text = Path("mine.json").read_text()
        assert spoilt[0] in text
        Path("spoilt.json").write_text(text.replace(*spoilt))
        assert sizes._kept(Path("spoilt.json"), state) == RunAtSizes(None, {})


def test_a_comparison_of_dense_models_at_sizes_is_refused_before_it_begins(lape, monkeypatch) -> None:  # noqa: F811
    monkeypatch.delattr("lape.data.sources.find_set")
    typed = ["compare", "--data", "shapes-segmentation", "--model", next(iter(segmenter.NANO)), "--sizes", "64"]
    assert "sizes are for classifiers" in refused(lape(*typed))
    assert not list(Path().iterdir())

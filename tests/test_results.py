"""Laws of the tables: what stands beside the paper's number is what the paper ran, and all of it fits the terminal."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lape import recipes
from lape.catalogue import kept, named
from lape.cli.command_line import main
from lape.errors import UsageError
from lape.experiment import Experiment
from lape.models.counting import count
from lape.models.registry import MODELS
from lape.report.results import cells, markdown, remarks
from lape.studies import results

CCT = "cifar100/cct_7_3x1_32"


def finished(folder, experiment, accuracy):
    folder.mkdir(parents=True)
    row = {"epoch": 1, "step": 10, "val_accuracy": accuracy, "val_loss": 1.0, "train_loss": 1.0}
    record = {
        "experiment": experiment.settings(),
        "curve": [row],
        "score": "val_accuracy",
        "final": {"val_accuracy": accuracy, "val_loss": 1.0},
        "best": row,
        "parameters": 1,
        "seconds_per_step": 0.1,
    }
    (folder / "result.json").write_text(json.dumps(record))


def of(name, **changed):
    return replace(recipes.load(name).experiment(), **changed)


def test_seeds_of_one_row_stand_as_mean_and_deviation_beside_the_papers(tmp_path):
    for seed, accuracy in ((121, 81.0), (122, 82.0), (123, 83.0)):
        finished(tmp_path / str(seed), of(CCT, seed=seed), accuracy)
    (row,) = results.find_results([tmp_path]).rows
    assert cells(row) == (CCT, "lape", "accuracy", "3", "82.00 ± 1.00", "81.986", "+0.01")
    assert remarks(results.find_results([tmp_path])) == [
        f"{CCT}, lape: the paper's number is the mean of 5 seeds, this one of 3."
    ]


def test_what_was_run_otherwise_is_said_and_has_no_papers_number(tmp_path):
    finished(tmp_path / "short", of(CCT, epochs=2), 30.0)
    finished(tmp_path / "whole", of(CCT), 82.0)
    finished(tmp_path / "elsewhere", of(CCT, seed=122, workers=3, data_dir=tmp_path), 82.0)
    finished(tmp_path / "in parts", of(CCT, seed=123, accumulate=4), 82.0)
    whole, parts, short = results.find_results([tmp_path]).rows
    assert (parts.expected, parts.seeds) == (81.986, (123,))
    assert (whole.expected, whole.seeds, short.expected, dict(short.changed)) == (
        81.986,
        (121, 122),
        None,
        {"epochs": 2},
    )
    assert any("run with epochs 2" in said for said in remarks(results.find_results([tmp_path])))


def test_each_join_is_a_row_and_one_that_the_paper_has_not_says_so(tmp_path):
    for join in ("default", "lape", "shared"):
        finished(tmp_path / join, of(CCT, join=join), 80.0)
    found = results.find_results([tmp_path])
    assert [(row.join, row.expected) for row in found.rows] == [("default", 80.928), ("lape", 81.986), ("shared", None)]
    assert f"{CCT}, shared: the paper has no such row." in remarks(found)


def test_the_same_seed_twice_would_count_twice_and_counts_once(tmp_path):
    for place in ("a", "b"):
        finished(tmp_path / place, of(CCT), 80.0)
    found = results.find_results([tmp_path])
    assert found.rows[0].seeds == (121,)
    (reason,) = found.left_out.values()
    assert (list(found.left_out), reason) == (
        [tmp_path / "b"],
        f"Seed 121 of one experiment is there twice; {tmp_path / 'a'} stands for both.",
    )


def test_runs_of_no_recipe_are_named_apart(tmp_path):
    finished(tmp_path / "own", Experiment(), 97.0)
    found = results.find_results([tmp_path])
    assert found.rows == ()
    assert "Not of a recipe" in remarks(found)[0]


def test_nothing_there_is_refused_and_what_cannot_be_read_left_out(tmp_path, capsys):
    with pytest.raises(UsageError, match="No finished run"):
        results.find_results([tmp_path])
    finished(tmp_path / "a", of(CCT), 80.0)
    record = json.loads((tmp_path / "a/result.json").read_text())
    record["experiment"]["colour"] = "red"
    (tmp_path / "a/result.json").write_text(json.dumps(record))
    assert "colour" in results.find_results([tmp_path]).left_out[tmp_path / "a"]
    assert main(["results", str(tmp_path)]) == 1
    assert "lape: 1 run found, and none can be read" in capsys.readouterr().err


def test_the_file_of_a_table_names_its_runs(tmp_path, capsys):
    finished(tmp_path / "runs/a", of(CCT), 80.0)
    assert main(["results", str(tmp_path / "runs"), "--out", str(tmp_path / "out/table.md")]) == 0
    assert "80.00" in capsys.readouterr().out
    written = (tmp_path / "out/table.md").read_text()
    assert written.splitlines()[:3] == markdown(results.find_results([tmp_path / "runs"])).splitlines()[:3]
    assert f"seed 121 in `{tmp_path / 'runs/a'}`" in written


@pytest.mark.parametrize("words", [["models", "swin_tiny", "deit_small_distilled", "t2t"], ["recipes"]])
def test_tables_fit_eighty_columns_with_nothing_cut(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(words) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


def test_a_model_is_listed_with_all_that_one_chooses_by():
    t2t, cct = named(["cct_7_3x1_32", "t2t_vit_7"])
    assert (cct.name, cct.paper, cct.parameters, cct.size, len(cct.joins)) == (
        "cct_7_3x1_32", "CCT-7/3x1", 3_760_139, (32, 32), 7,
    )  # fmt: skip
    assert t2t.joins == ("default", "shared", "lape-sharing", "lape", "pvg", "mpvg")
    assert [entry.name for entry in kept()] == list(MODELS)
    with pytest.raises(UsageError, match="No model's name has resnet in it"):
        named(["resnet"])


def test_what_is_kept_of_the_models_is_what_they_count():
    """The small half of each; python docs/catalogue.py counts all."""
    small = [entry for entry in kept() if entry.parameters and entry.parameters < 5e6]
    assert len(small) > 15
    assert list(count([entry.name for entry in small])) == small


def test_a_recipe_is_shown_with_all_that_a_lab_note_has(capsys):
    assert main(["recipes", CCT]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in ("Table 2, CCT-7/3x1", "81.986 % with join=lape", "--recipe cifar100/cct_7_3x1_32", "lr: 0.0006"):
        assert part in out


def test_the_score_is_that_after_the_last_step_not_the_best(tmp_path) -> None:
    finished(tmp_path / "a", of("cifar100/cct_7_3x1_32"), 80.0)
    record = json.loads((tmp_path / "a/result.json").read_text())
    record["best"]["val_accuracy"] = 81.0
    (tmp_path / "a/result.json").write_text(json.dumps(record))
    (row,) = results.find_results([tmp_path]).rows
    assert row.score.mean == 80.0


def test_one_experiment_under_the_names_of_two_rows_is_two_rows(tmp_path) -> None:
    names = ["table7/learnable-lape", "table8/layernorm"]
    for name in names:
        finished(tmp_path / name, of(name), 73.0)
    assert [row.recipe.name for row in results.find_results([tmp_path]).rows] == names


def test_an_addition_and_a_multiplication_are_two_operations() -> None:
    (deit,) = named(["deit_tiny_patch16_224"])
    assert deit.flops == pytest.approx(2 * 1.25e9, rel=0.02)


OTHER = "cifar10/cct_7_3x1_32"
MASK_RCNN = "coco/mask_rcnn_vit_adapter_tiny"


def found_objects(folder: Path, experiment: Experiment, box: float, mask: float) -> None:
    finished(folder, experiment, 0.0)
    record = json.loads((folder / "result.json").read_text())
    final = {"val_box_ap": box, "val_mask_ap": mask}
    row = {"epoch": 36, "step": 10, "train_loss": 1.0, **final}
    record |= {"score": "val_box_ap", "final": final, "curve": [row], "best": row}
    (folder / "result.json").write_text(json.dumps(record))


def test_each_measure_of_a_run_is_a_row_with_its_own_number_and_what_is_said_is_said_once(tmp_path: Path) -> None:
    for seed, box, mask in ((121, 46.0, 41.0), (122, 48.0, 42.0)):
        found_objects(tmp_path / str(seed), of(MASK_RCNN, seed=seed, weights="deit_tiny.pth"), box, mask)
    found = results.find_results([tmp_path])
    assert [cells(row)[2:] for row in found.rows] == [
        ("box AP", "2", "47.00 ± 1.41", "46.3", "+0.70"),
        ("mask AP", "2", "41.50 ± 0.71", "41.2", "+0.30"),
    ]
    assert remarks(found) == [f"{MASK_RCNN}, lape: the paper's number is the mean of 5 seeds, this one of 2."]
    assert markdown(found).count(f"seed 122 in `{tmp_path / '122'}`") == 1


def test_a_start_at_random_is_not_the_papers_and_any_weights_are_its_own(tmp_path: Path) -> None:
    found_objects(tmp_path / "random", of(MASK_RCNN), 40.0, 35.0)
    found_objects(tmp_path / "started", of(MASK_RCNN, weights="deit_tiny.pth"), 46.0, 41.0)
    random, started = (
        {row.expected for row in results.find_results([tmp_path / name]).rows} for name in ("random", "started")
    )
    assert (random, started) == ({None}, {46.3, 41.2})
    assert remarks(results.find_results([tmp_path / "random"])) == [
        f"{MASK_RCNN}, lape: run with weights none, so the paper's number is not set beside it."
    ]
    assert recipes.load(CCT).changed(of(CCT)) == {}


def test_a_recipe_of_ones_own_that_expects_nothing_is_a_row_by_its_score(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"extends: {CCT}\nsettings: {{epochs: 20}}")
    finished(tmp_path / "runs", of(str(tmp_path / "own.yaml")), 70.0)
    (row,) = results.find_results([tmp_path / "runs"]).rows
    assert (row.measure, row.score.mean, row.expected, row.changed) == ("accuracy", 70.0, None, {})
    assert remarks(results.find_results([tmp_path / "runs"])) == [
        f"{row.recipe.name}, lape: the paper has no such row."
    ]


def test_rows_stand_in_the_order_of_the_tables(tmp_path: Path) -> None:
    found_objects(tmp_path / "a", of(MASK_RCNN), 40.0, 35.0)
    for place, (name, join) in enumerate([("table8/scale", "lape"), (CCT, "lape"), (CCT, "default"), (OTHER, "lape")]):
        finished(tmp_path / f"b{place}", of(name, join=join), 80.0)
    rows = [(row.recipe.name, row.join, row.measure) for row in results.find_results([tmp_path]).rows]
    assert rows == [
        (OTHER, "lape", "accuracy"),
        (CCT, "default", "accuracy"),
        (CCT, "lape", "accuracy"),
        (MASK_RCNN, "lape", "box AP"),
        (MASK_RCNN, "lape", "mask AP"),
        ("table8/scale", "lape", "accuracy"),
    ]


def test_one_seed_is_enough_where_the_papers_number_is_of_one_run(tmp_path: Path) -> None:
    finished(tmp_path / "a", of("imagenet/t2t_vit_7"), 70.0)
    (row,) = results.find_results([tmp_path]).rows
    assert row.expected is not None
    assert remarks(results.find_results([tmp_path])) == []


def test_a_run_whose_recipe_expects_what_it_does_not_measure_is_left_out(tmp_path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("expected: {mIoU: {lape: 40.0}}")
    finished(tmp_path / "a", Experiment(recipe=str(own)), 80.0)
    found = results.find_results([tmp_path])
    assert found.rows == ()
    assert "expects a number of mIoU, and the run in" in found.left_out[tmp_path / "a"]


def test_a_seed_with_fewer_measures_costs_the_others_nothing(tmp_path: Path) -> None:
    for seed in (1, 2):
        finished(tmp_path / str(seed), of(CCT, seed=seed), 80.0)
    record = json.loads((tmp_path / "2/result.json").read_text())
    record["final"] = {"val_accuracy": 80.0}
    (tmp_path / "2/result.json").write_text(json.dumps(record))
    assert sorted(row.seeds for row in results.find_results([tmp_path]).rows) == [(1,), (2,)]

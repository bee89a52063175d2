"""Laws of the tables: what stands beside the paper's number is what the paper ran, and all of it fits the terminal."""

import json
from dataclasses import replace

import pytest

from lape import recipes, results
from lape.catalogue import entries, names
from lape.cli import main
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.models import MODELS
from lape.report.results import cells, markdown, remarks

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
    (row,) = results.find([tmp_path]).rows
    assert cells(row) == (CCT, "lape", "accuracy", "3", "82.00 ± 1.00", "81.986", "+0.01")
    assert remarks(results.find([tmp_path])) == [f"{CCT}, lape: the paper's is the mean of 5 seeds, this of 3."]


def test_what_was_run_otherwise_is_said_and_has_no_papers_number(tmp_path):
    finished(tmp_path / "short", of(CCT, epochs=2), 30.0)
    finished(tmp_path / "whole", of(CCT), 82.0)
    finished(tmp_path / "elsewhere", of(CCT, seed=122, workers=3, data_dir=tmp_path), 82.0)
    finished(tmp_path / "in parts", of(CCT, seed=123, accumulate=4), 82.0)
    whole, parts, short = results.find([tmp_path]).rows
    assert (parts.expected, parts.seeds) == (81.986, (123,))
    assert (whole.expected, whole.seeds, short.expected, dict(short.changed)) == (
        81.986,
        (121, 122),
        None,
        {"epochs": 2},
    )
    assert any("run with epochs 2" in said for said in remarks(results.find([tmp_path])))


def test_each_join_is_a_row_and_one_that_the_paper_has_not_says_so(tmp_path):
    for join in ("default", "lape", "shared"):
        finished(tmp_path / join, of(CCT, join=join), 80.0)
    found = results.find([tmp_path])
    assert [(row.join, row.expected) for row in found.rows] == [("default", 80.928), ("lape", 81.986), ("shared", None)]
    assert f"{CCT}, shared: the paper has no such row." in remarks(found)


def test_the_same_seed_twice_would_count_twice_and_is_refused(tmp_path):
    for place in ("a", "b"):
        finished(tmp_path / place, of(CCT), 80.0)
    with pytest.raises(UsageError, match=r"Seed 121 of one experiment is there twice.*a/result\.json.*b/result\.json"):
        results.find([tmp_path])


def test_runs_of_no_recipe_are_named_apart(tmp_path):
    finished(tmp_path / "own", Experiment(), 97.0)
    found = results.find([tmp_path])
    assert found.rows == ()
    assert "Not of a recipe" in remarks(found)[0]


def test_nothing_there_and_what_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UsageError, match="No finished run"):
        results.find([tmp_path])
    finished(tmp_path / "a", of(CCT), 80.0)
    record = json.loads((tmp_path / "a/result.json").read_text())
    record["experiment"]["colour"] = "red"
    (tmp_path / "a/result.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="colour"):
        results.find([tmp_path])


def test_the_file_of_a_table_names_its_runs(tmp_path, capsys):
    finished(tmp_path / "runs/a", of(CCT), 80.0)
    assert main(["results", str(tmp_path / "runs"), "--out", str(tmp_path / "out/table.md")]) == 0
    assert "80.00" in capsys.readouterr().out
    written = (tmp_path / "out/table.md").read_text()
    assert written.splitlines()[:3] == markdown(results.find([tmp_path / "runs"])).splitlines()[:3]
    assert f"seed 121 in `{tmp_path / 'runs/a'}`" in written


@pytest.mark.parametrize("words", [["models", "swin_tiny", "deit_small_distilled", "t2t"], ["recipes"]])
def test_tables_fit_eighty_columns_with_nothing_cut(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(words) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


def test_a_model_is_listed_with_all_that_one_chooses_by():
    cct, t2t = entries(["cct_7_3x1_32", "t2t_vit_7"])
    assert (cct.name, cct.paper, cct.parameters, cct.size, len(cct.joins)) == (
        "cct_7_3x1_32", "CCT-7/3x1", 3_760_139, (32, 32), 5,
    )  # fmt: skip
    assert t2t.joins == ("default", "shared", "lape-sharing", "lape")
    assert names([]) == list(MODELS)
    with pytest.raises(UsageError, match="No model's name has resnet in it"):
        names(["resnet"])


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
    (row,) = results.find([tmp_path]).rows
    assert row.score.mean == 80.0


def test_one_experiment_under_the_names_of_two_rows_is_two_rows(tmp_path) -> None:
    names = ["table7/learnable-lape", "table8/layernorm"]
    for name in names:
        finished(tmp_path / name, of(name), 73.0)
    assert [row.recipe.name for row in results.find([tmp_path]).rows] == names


def test_an_addition_and_a_multiplication_are_two_operations() -> None:
    (deit,) = entries(["deit_tiny_patch16_224"])
    assert deit.flops == pytest.approx(2 * 1.25e9, rel=0.02)

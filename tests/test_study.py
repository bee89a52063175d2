"""Laws of gathering: runs that differ in way, table and seed alone are one study; what is left out is said."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_runs import BASE, study_of, write_run

from lape.analysis import correlation
from lape.cli.command_line import main
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.files.writing import MARK
from lape.studies import analysis as kept_analyses
from lape.studies.analysis import Kept, analysed, load_result
from lape.studies.statistics import Combination, Way
from lape.studies.study import gather, read_result
from lape.training.loop import train

LAPE, DEFAULT = Way("lape"), Way("default")
TINY = replace(BASE, epochs=1, batch_size=400, accelerator="cpu")


# --- Gathering


def test_runs_that_go_on_from_their_like_at_another_size_are_one_study(tmp_path: Path) -> None:
    joins = (("default", 0), ("default", 1), ("lape", 0), ("lape", 1))
    for join, seed in joins:
        one, base = Combination(Way(join), "learnable", seed), tmp_path / f"{join} {seed}"
        write_run(base, one, [10.0, 50.0 + seed])
        tuned = replace(BASE, epochs=2, img_size=16, weights=str(base if seed else base / "last.pt"))
        write_run(tmp_path / f"tuned {join} {seed}", one, [60.0, 70.0 + seed], tuned)
    another = replace(BASE, epochs=2, img_size=16, weights=str(tmp_path / "default 0"))  # another join goes on from it
    write_run(tmp_path / "odd", Combination(Way("lape"), "learnable", 0), [60.0, 70.0], another)
    gathered = gather([tmp_path])
    assert sorted(len(study.results) for study in gathered.studies) == [1, 4, 4]
    (tuned,) = (study for study in gathered.studies if len(study.results) == 4 and study.experiment.img_size)
    assert [list(row.difference.by_seed) for row in tuned.rows if row.difference] == [[0, 1]]


def test_way_table_and_seed_make_one_study_and_any_other_setting_another(tmp_path):
    varied = [
        Combination(DEFAULT, "learnable", 0),
        Combination(LAPE, "sinusoidal-1d", 3),
        Combination(Way("lape", "norm"), "learnable", 0),
        Combination(Way("lape", start="preserve"), "learnable", 1),
    ]
    for place, one in enumerate(varied):
        write_run(tmp_path / "deep" / str(place), one, [50.0])
    (study,) = gather([tmp_path]).studies
    assert set(study.results) == set(varied)
    for place, other in enumerate(
        ({"lr": 1.0}, {"epochs": 7}, {"data": "cifar10"}, {"model": "deit_tiny_patch16_224"})
    ):
        write_run(tmp_path / f"other{place}", varied[0], [50.0], replace(BASE, **other))
    assert sorted(len(study.results) for study in gather([tmp_path]).studies) == [1, 1, 1, 1, 4]


def test_where_a_run_was_computed_does_not_set_it_apart(tmp_path):
    write_run(tmp_path / "1", Combination(LAPE, "learnable", 0), [50.0])
    write_run(tmp_path / "2", Combination(LAPE, "learnable", 1), [50.0], replace(BASE, accelerator="cuda", workers=8))
    assert len(gather([tmp_path]).studies) == 1


def test_the_same_run_in_two_places_counts_once_and_this_is_said(tmp_path):
    for folder in ("a", "b"):
        write_run(tmp_path / folder, Combination(LAPE, "learnable", 0), [50.0])
    found = gather([tmp_path, tmp_path / "a"])  # a folder in another one is looked through once
    assert [len(study.results) for study in found.studies] == [1]
    assert list(found.left_out) == [tmp_path / "b"]
    assert "is there twice" in found.left_out[tmp_path / "b"]


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        "[]",
        "null",
        "{}",
        {"curve": []},
        {"curve": [{"epoch": 1}]},
        {"score": "nothing"},
        {"final": {"val_accuracy": "high"}},
        {"final": {"val_accuracy": math.nan}},
        {"parameters": None},
        {"experiment": {"join": "lape", "there_is_no": "such setting"}},
        {"experiment": {"join": "lap", "pe": "learnable"}},
        {"experiment": {"join": "unshared", "pe": "sinusoidal-1d"}},
    ],
    ids=str,
)
def test_what_is_no_result_is_left_out_with_the_reason(broken, tmp_path):
    write_run(tmp_path / "good", Combination(LAPE, "learnable", 0), [50.0])
    write_run(tmp_path / "bad", Combination(LAPE, "learnable", 1), [50.0])
    path = tmp_path / "bad" / "result.json"
    path.write_text(broken if isinstance(broken, str) else json.dumps(json.loads(path.read_text()) | broken))
    found = gather([tmp_path])
    assert [len(study.results) for study in found.studies] == [1]
    assert list(found.left_out) == [tmp_path / "bad"]


def test_without_a_run_there_is_nothing_to_gather(tmp_path):
    with pytest.raises(UsageError, match="No finished run"):
        gather([tmp_path])


def test_tables_ways_and_seeds_stand_in_the_order_of_the_paper_wherever_the_runs_lie(tmp_path):
    ways = [Way("lape", "affine"), LAPE, Way("lape", "identity"), DEFAULT]
    for place, (way, pe, seed) in enumerate(
        (way, pe, seed) for way in ways for pe in ("sinusoidal-1d", "learnable") for seed in (10, 2)
    ):
        write_run(tmp_path / str(place), Combination(way, pe, seed), [50.0])
    (study,) = gather([tmp_path]).studies
    assert study.pes == ("learnable", "sinusoidal-1d")
    assert study.ways == (DEFAULT, LAPE, Way("lape", "identity"), Way("lape", "affine"))
    assert study.seeds == (2, 10)


# --- Analysing


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two runs that were trained, of an epoch each."""
    folder = tmp_path_factory.mktemp("runs")
    for join in ("default", "lape"):
        train(replace(TINY, join=join), folder / join)
    return folder


@pytest.fixture
def runs(finished, tmp_path):
    """A copy of them that a test may break."""
    import shutil

    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


def test_an_analysis_is_that_of_the_trained_model(runs):
    (study,) = gather([runs]).studies
    found = analysed(study, Kept(runs / "page.html"))
    assert not found.not_analysed
    for one, result in study.results.items():
        expected = correlation(load_result(result).work.module)
        analysis = found.analyses[one]
        assert analysis.half_distance == tuple(expected.half_distance.tolist())
        assert analysis.shape == expected.shape
        assert analysis.width == 8
    default, lape = (found.analyses[Combination(way, "learnable", 0)] for way in (DEFAULT, LAPE))
    assert lape.weights is None
    assert default.weights is not None
    assert [sum(layer) for layer in zip(*default.weights, strict=True)] == pytest.approx([1.0, 1.0])


def test_a_rotation_alone_has_a_correlation_and_nothing_to_decompose(tmp_path):
    train(replace(TINY, join="default", pe="rope-axial"), tmp_path / "runs")
    (study,) = gather([tmp_path / "runs"]).studies
    found = analysed(study, Kept(tmp_path / "page.html"))
    assert not found.not_analysed
    (analysis,) = found.analyses.values()
    assert analysis.weights is None


def test_an_analysis_is_kept_until_its_checkpoint_changes(runs, monkeypatch):
    (study,) = gather([runs]).studies
    first = analysed(study, Kept(runs / "page.html")).analyses
    heard = []
    monkeypatch.setattr(
        kept_analyses, "load_run", lambda *args, **kinds: heard.append(args) or (_ for _ in ()).throw(RunError("no"))
    )
    assert analysed(study, Kept(runs / "page.html")).analyses == first
    assert heard == []
    (runs / "lape" / "last.pt").touch()
    again = analysed(study, Kept(runs / "page.html"))
    assert len(heard) == 1
    assert list(again.analyses) == [Combination(DEFAULT, "learnable", 0)]
    assert again.not_analysed == {"no": ((LAPE, "learnable"),)}


def test_kept_numbers_without_bound_or_meaning_come_back_as_they_were(runs, monkeypatch):
    (study,) = gather([runs]).studies
    one, result = next(iter(study.results.items()))
    kept = Kept(runs / "page.html")
    odd = replace(analysed(study, kept).analyses[one], half_distance=(math.inf, 1.0))
    kept.keep(result, odd)
    assert "Infinity" not in kept.path.read_text()
    assert Kept(runs / "page.html").of(result) == odd


def test_kept_analyses_may_be_moved_with_their_runs(runs):
    (study,) = gather([runs]).studies
    first = analysed(study, Kept(runs / "page.html")).analyses
    moved = runs.rename(runs.with_name("moved"))
    (study,) = gather([moved]).studies
    assert [Kept(moved / "page.html").of(result) for result in study.results.values()] == [*first.values()]


NO_ANALYSES = [
    "",
    "{MARK",
    '["MARK"]',
    '{"MARK": 1}',
    '{"MARK": 1, "analyses": 1}',
    '{"MARK": 1, "analyses": ["ab"]}',
    '{"MARK": 1, "analyses": {"NAME": 1}}',
    '{"MARK": 1, "analyses": {"NAME": {"checkpoint": {}}}}',
    '{"MARK": 1, "analyses": {"NAME": {"checkpoint": KEY}}}',
    f'{{"MARK": 1, "analyses": {{"NAME": {{"checkpoint": KEY, "two_dimensionality": [{10**400}]}}}}}}',
    "[" * 100_000 + "MARK",
]


@pytest.mark.parametrize("text", NO_ANALYSES, ids=range(len(NO_ANALYSES)))
def test_a_kept_analysis_that_is_none_is_made_again(text, runs):
    (study,) = gather([runs]).studies
    first = analysed(study, kept := Kept(runs / "page.html")).analyses
    name, entry = next(iter(kept.entries.items()))
    for word, stands_for in (("MARK", MARK), ("NAME", name), ("KEY", json.dumps(entry["checkpoint"]))):
        text = text.replace(word, stands_for)
    kept.path.write_text(text)
    assert analysed(study, Kept(runs / "page.html")).analyses == first


def test_without_images_there_is_no_decomposition_and_the_rest_is_there(runs, monkeypatch):
    def nowhere(*_, **__):
        raise UsageError("There is no such folder.")

    monkeypatch.setattr(kept_analyses, "set_of", nowhere)
    (study,) = gather([runs]).studies
    found = analysed(study, Kept(runs / "page.html"))
    assert len(found.analyses) == 2
    assert all(analysis.weights is None for analysis in found.analyses.values())
    assert found.not_analysed == {
        "The decomposition needs images of digits. There is no such folder.": ((DEFAULT, "learnable"),)
    }
    monkeypatch.undo()
    found = analysed(study, Kept(runs / "page.html"))
    assert found.analyses[Combination(DEFAULT, "learnable", 0)].weights is not None  # not kept as missing


# --- The command


@pytest.fixture
def lape(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = main(list(words))
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


def test_report_writes_one_page_and_says_claims_and_path(runs, lape):
    (runs / "default" / "last.pt").write_bytes(b"no checkpoint")
    (runs / "broken").mkdir()
    (runs / "broken" / "result.json").write_text("{")
    (runs / "broken" / "cost.json").write_text("{")
    status, out, err = lape("report", "runs")
    assert (status, out.splitlines()[-1]) == (0, "Report: runs/report.html")
    assert "LaPE is above the default join (learnable)" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    assert "left out: runs/broken" in err
    text = Path("runs/report.html").read_text(encoding="utf-8")
    for said in ("Not analysed: default × learnable.", "runs/broken: ", "runs/broken/cost.json"):
        assert said in text
    assert Experiment.of(json.loads(Path("runs/lape/result.json").read_text())["experiment"]).model in text


def test_report_out_is_where_the_page_goes(runs, lape):
    assert lape("report", "runs/lape", "--out", "pages/one.html")[0] == 0
    assert re.search("<h1>.*lape.*</h1>", Path("pages/one.html").read_text(encoding="utf-8"))
    assert re.search(r"\| lape \| learnable \| \d+\.\d\d \|", Path("pages/one.md").read_text(encoding="utf-8"))
    assert {path.name for path in Path("pages").iterdir()} == {
        f"one.{ending}" for ending in ("html", "md", "tex", "runs.csv", "methods.txt", "analysis.json")
    }


def test_report_of_nothing_is_refused_in_words(lape, tmp_path):
    assert lape("report", "runs", "--out", "page.md")[::2] == (
        2,
        "lape: The page is HTML, and page.md is no such name. Give --out page.html.\n",
    )
    assert lape("report", "nowhere")[0] == 2
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "result.json").write_text("{")
    status, _, err = lape("report", "runs")
    assert status == 1
    assert "none can be read" in err


def test_a_result_is_read_from_its_folder(runs):
    assert read_result(runs / "lape").experiment == replace(TINY, join="lape")


@pytest.mark.parametrize(
    "part",
    [
        {"versions": [1]},
        {"versions": {"torch": {}}},
        {"machine": 5},
        {"commit": {"hash": "0123abc"}},
        {"command": ["lape"]},
        {"final": {"val_accuracy": 90.0, "val_loss": math.inf}},
        {"final": {"val_accuracy": True}},
    ],
    ids=str,
)
def test_a_run_with_a_part_that_no_page_could_show_is_left_out_and_named(part, tmp_path):
    study_of(tmp_path, {("default", "learnable"): {0: 90.0}, ("lape", "learnable"): {0: 93.0}})
    bad, good = sorted(tmp_path.rglob("result.json"))
    bad.write_text(json.dumps(json.loads(bad.read_text()) | part))
    gathered = gather([tmp_path])
    assert [result.folder for study in gathered.studies for result in study.results.values()] == [good.parent]
    assert list(gathered.left_out) == [bad.parent]
    assert next(iter(part)).removesuffix("s") in gathered.left_out[bad.parent]

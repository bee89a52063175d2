"""Statistics on results whose answers are known by hand, and the running of many runs."""

import json
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from made_up_runs import BASE, write_run

from lape.cli.command_line import parsed
from lape.data.sources import set_of
from lape.errors import RunError, UsageError
from lape.files import writing
from lape.files.locks import LOCK, working_in
from lape.studies.analysis import load_result
from lape.studies.comparison import Factors, Watch, compare, plans, seeds_of, with_others, write_plan
from lape.studies.statistics import Combination, FinishedRun, Point, Sample, Verdict, Way, difference, gaps, rows
from lape.studies.study import Result, read_result
from lape.training.contents import contents

T_2 = 4.302652729911275  # Student's 97.5 % point with 2 degrees of freedom, from a printed table


def runs_of(join: str, pe: str, accuracies: dict[int, float]) -> list[FinishedRun]:
    return [
        FinishedRun(
            Combination(Way(join), pe, seed),
            "accuracy",
            value,
            (Point(1, 10, value / 2), Point(2, 20, value)),
            100,
            0.01 * (seed + 1),
        )
        for seed, value in accuracies.items()
    ]


# --- Samples and differences


def test_mean_and_sample_standard_deviation():
    assert Sample.of([1.0, 2.0, 3.0]) == Sample(mean=2.0, std=1.0, count=3)


def test_one_value_has_no_standard_deviation():
    assert Sample.of([5.0]) == Sample(mean=5.0, std=None, count=1)


def test_interval_of_three_paired_differences():
    """Differences 1, 2, 3: mean 2, s = 1, so 2 ± t·1/√3."""
    found = difference({0: 91.0, 1: 72.0, 2: 83.0}, {0: 90.0, 1: 70.0, 2: 80.0})
    assert found is not None
    assert found.interval is not None
    assert found.mean == pytest.approx(2.0)
    assert found.interval == pytest.approx((2 - T_2 / math.sqrt(3), 2 + T_2 / math.sqrt(3)))
    assert found.verdict is Verdict.UNDECIDED  # -0.48 to 4.48


def test_pairing_takes_away_what_the_seeds_share():
    """Seeds differ by tens of points, differences by tenths: the interval must be narrow."""
    found = difference({0: 91.1, 1: 51.0, 2: 70.9}, {0: 90.0, 1: 50.0, 2: 70.0})
    assert found is not None
    assert found.verdict is Verdict.ABOVE
    half = T_2 * 0.1 / math.sqrt(3)
    assert found.interval == pytest.approx((1 - half, 1 + half))


def test_difference_changes_sign_when_the_sides_change():
    better, worse = {0: 91.0, 1: 92.5, 2: 93.0}, {0: 88.0, 1: 89.0, 2: 90.5}
    there, back = difference(better, worse), difference(worse, better)
    assert there is not None
    assert back is not None
    assert (there.verdict, back.verdict) == (Verdict.ABOVE, Verdict.BELOW)
    assert there.interval is not None
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]))


def test_one_pair_has_a_difference_and_no_interval_and_two_have_no_verdict():
    found = difference({0: 93.0}, {0: 90.0})
    assert found is not None
    assert (found.mean, found.interval, found.verdict) == (3.0, None, Verdict.NONE)
    found = difference({0: 93.0, 1: 93.001}, {0: 90.0, 1: 90.0})
    assert found is not None
    assert found.interval is not None
    assert found.interval[0] > 0
    assert found.verdict is Verdict.NONE


def test_seeds_without_a_partner_are_left_out_and_told():
    found = difference({0: 93.0, 1: 95.0, 3: 1.0}, {0: 90.0, 1: 91.0, 2: 99.0})
    assert found is not None
    assert found.by_seed == {0: 3.0, 1: 4.0}
    assert found.unpaired == (2, 3)


def test_no_common_seed_is_no_difference():
    assert difference({0: 93.0}, {1: 90.0}) is None


# --- Rows and gaps


def test_rows_pair_each_join_with_the_default_of_the_same_table():
    found = rows(
        [
            *runs_of("default", "learnable", {0: 90.0, 1: 92.0}),
            *runs_of("default", "sinusoidal-1d", {0: 80.0, 1: 81.0}),
            *runs_of("lape", "learnable", {0: 89.0, 1: 91.0}),
            *runs_of("lape", "sinusoidal-1d", {0: 85.0, 1: 88.0}),
            *runs_of("shared", "learnable", {0: 90.0, 1: 93.0}),
        ]
    )
    assert [(row.pe, row.way.join) for row in found] == [
        ("learnable", "default"),
        ("learnable", "lape"),
        ("learnable", "shared"),
        ("sinusoidal-1d", "default"),
        ("sinusoidal-1d", "lape"),
    ]
    means = [row.difference and row.difference.mean for row in found]
    assert means == [None, -1.0, 0.5, None, 6.0]  # the loss of LaPE with the learnable table is a loss
    assert found[1].third.mean == 45.0  # step 10 of 20 is nearer to a third than step 20
    assert found[0].seconds_per_step == pytest.approx(0.015)


def test_rows_without_the_baseline_have_no_difference():
    assert [row.difference for row in rows(runs_of("lape", "learnable", {0: 90.0}))] == [None]


@pytest.mark.parametrize(
    ("steps", "epoch"),
    [([10, 20, 30], 1), ([10, 20], 1), ([10], 1), ([10 * e for e in range(1, 11)], 3), ([1, 7, 30], 2), ([1, 5, 9], 1)],
)
def test_third_is_the_nearest_evaluation_and_the_earlier_of_two(steps, epoch):
    curve = tuple(Point(place, step, 50.0) for place, step in enumerate(steps, start=1))
    assert FinishedRun(Combination(Way("lape"), "learnable", 0), "accuracy", 50.0, curve, 1, 1.0).third.epoch == epoch


def test_gap_is_best_minus_worst_mean_over_the_tables():
    found = gaps(
        rows(
            [
                *runs_of("default", "learnable", {0: 95.0, 1: 97.0}),
                *runs_of("default", "sinusoidal-1d", {0: 92.0, 1: 92.0}),
                *runs_of("default", "none", {0: 70.0, 1: 80.0}),
                *runs_of("lape", "learnable", {0: 97.0}),
                *runs_of("lape", "sinusoidal-1d", {0: 97.5}),
                *runs_of("shared", "learnable", {0: 90.0}),
            ]
        )
    )
    assert [(str(gap.way), gap.best, gap.worst, gap.points) for gap in found] == [
        ("default", "learnable", "none", 21.0),
        ("lape", "sinusoidal-1d", "learnable", 0.5),
    ]


# --- What is asked for


@pytest.mark.parametrize(("given", "seeds"), [([5], (0, 1, 2, 3, 4)), ([1], (0,)), ([7, 3], (7, 3))])
def test_one_number_counts_seeds_and_several_are_the_seeds(given, seeds):
    assert seeds_of(given) == seeds


@pytest.mark.parametrize("given", [[], [0], [-1], [3, 3], [1, -2]])
def test_seeds_that_mean_nothing_are_refused(given):
    with pytest.raises(UsageError, match="--seeds 3"):
        seeds_of(given)


def test_seeds_are_listed_also_one_alone_or_counted_and_not_both():
    assert (seeds_of(None, [7]), seeds_of(None, [7, 3]), seeds_of()) == ((7,), (7, 3), (0, 1, 2, 3, 4, 5, 6, 7))
    for listed in ([], [3, 3], [-1]):
        with pytest.raises(UsageError, match="seed_list is different seeds from 0 on"):
            seeds_of(None, listed)
    with pytest.raises(UsageError, match="seeds and seed_list both"):
        seeds_of([3], [7])


def planned(asked, out, base=BASE):
    return plans(base, asked, out)[0]


def test_runs_that_are_paired_are_trained_side_by_side(tmp_path):
    made = planned(Factors(["default", "lape"], ["learnable", "sinusoidal-1d"], [0, 1]), tmp_path)
    assert [tuple(plan.combination) for plan in made[:4]] == [
        (Way("default"), "learnable", 0),
        (Way("lape"), "learnable", 0),
        (Way("default"), "sinusoidal-1d", 0),
        (Way("lape"), "sinusoidal-1d", 0),
    ]
    assert len({plan.folder for plan in made}) == 8


def test_a_plan_trains_what_its_combination_says(tmp_path):
    asked = Factors(["default", "lape"], ["learnable"], [3], ["layernorm", "norm"], ["fresh", "preserve"])
    for plan in planned(asked, tmp_path):
        experiment = plan.experiment
        way = Way(experiment.join, experiment.pe_norm, experiment.start)
        assert plan.combination == Combination(way, experiment.pe, experiment.seed)


def test_other_settings_have_another_folder_and_another_place_has_the_same(tmp_path):
    asked = Factors(["lape"], ["learnable"], [0])
    folder = planned(asked, tmp_path)[0].folder
    assert planned(asked, tmp_path, replace(BASE, lr=1.0))[0].folder != folder
    assert planned(asked, tmp_path, replace(BASE, workers=3, accelerator="cpu"))[0].folder == folder


def test_a_folder_is_called_by_what_is_trained_and_the_usual_ones_as_ever(tmp_path):
    asked = Factors(["default", "lape"], ["learnable"], [0], ["layernorm", "norm"], ["fresh", "preserve"])
    names = [plan.folder.name for plan in planned(asked, tmp_path)]
    assert [name.rpartition("-")[0] for name in names] == [
        "default-learnable-seed0",
        "lape-learnable-seed0",
        "lape-norm-learnable-seed0",
        "lape-preserve-learnable-seed0",
        "lape-norm-preserve-learnable-seed0",
    ]
    kept = [replace(BASE, join=join, pe="learnable", seed=0).fingerprint()[:8] for join in ("default", "lape")]
    assert [name.rpartition("-")[2] for name in names[:2]] == kept


def test_stand_ins_are_given_to_the_joins_that_have_pe_norms_and_the_others_are_trained_once(tmp_path):
    asked = Factors(["default", "lape-sharing", "lape"], ["learnable"], [0], ["scale-norm", "layernorm"])
    assert [str(plan.combination.way) for plan in planned(asked, tmp_path)] == [
        "default",
        "lape-sharing with scale-norm",
        "lape-sharing",
        "lape with scale-norm",
        "lape",
    ]


def test_what_means_nothing_is_left_out_and_told_while_every_name_is_used(tmp_path):
    asked = Factors(["default", "unshared", "lape"], ["learnable", "sinusoidal-1d", "relative"], [0, 1])
    made, left_out = plans(BASE, asked, tmp_path)
    trained = {(plan.combination.way.join, plan.combination.pe) for plan in made}
    missing = {(way.join, pe) for pairs in left_out.values() for way, pe in pairs}
    assert missing == {("unshared", "sinusoidal-1d"), ("unshared", "relative"), ("lape", "relative")}
    assert not missing & trained
    assert len(missing | trained) == 9
    (alike,) = [reason for reason, pairs in left_out.items() if (Way("unshared"), "sinusoidal-1d") in pairs]
    assert "all would be alike" in alike


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (Factors(["default", "lap"], ["learnable"], [0]), "Did you mean 'lape'"),
        (Factors(["default"], ["learnabel"], [0]), "Did you mean 'learnable'"),
        (Factors(["default"], ["learnable"], [0], ["nrom"]), "is not a PE norm"),
        (Factors(["default"], ["learnable"], [0], starts=["presreve"]), "is not a start"),
        (Factors(["default", "unshared"], ["sinusoidal-1d"], [0]), "all would be alike"),
        (Factors(["shared", "lape"], ["learnable", "none"], [0]), "has no table"),
        (Factors(["default"], ["learnable"], [0], ["layernorm", "norm"]), "stands in for a PE norm"),
        (Factors(["shared"], ["learnable"], [0], starts=["preserve"]), "has no p_l"),
        (Factors(["lape", "lape"], ["learnable"], [0]), "none twice"),
        (Factors(["lape"], ["learnable"], [0], ["norm", "norm"]), "none twice"),
        (Factors([], ["learnable"], [0]), "at least one"),
        (Factors(["lape"], ["learnable"], [0], []), "at least one"),
    ],
)
def test_requests_that_mean_nothing_are_refused_before_anything_is_trained(asked, told, tmp_path):
    with pytest.raises(UsageError, match=told):
        compare(BASE, asked, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", [{"devices": 2}, {"nodes": 2}])
def test_a_run_on_several_devices_is_refused(changed, tmp_path):
    with pytest.raises(UsageError, match="one device"):
        compare(replace(BASE, **changed), Factors(["lape"], ["learnable"], [0]), tmp_path)


def test_no_jobs_are_refused(tmp_path):
    with pytest.raises(UsageError, match="0 was received"):
        compare(BASE, Factors(["lape"], ["learnable"], [0]), tmp_path, jobs=0)


def test_a_result_that_is_none_is_named(tmp_path):
    write_run(tmp_path, Combination(Way("lape"), "learnable", 0), [50.0])
    assert read_result(tmp_path).run.score == 50.0
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(RunError, match=r"result\.json is not the result of a finished run"):
        read_result(tmp_path)


# --- Training


TINY = replace(
    BASE, model_args={"embed_dim": 8, "depth": 1, "num_heads": 2}, epochs=2, batch_size=400, accelerator="cpu"
)


class Heard(Watch):
    """Keeps what it is told."""

    def __init__(self):
        self.kept, self.todo, self.moved, self.ended, self.left = [], [], [], {}, {}

    def elsewhere(self, combination, occupied):
        self.left[combination] = occupied

    def begins(self, kept, todo, jobs):
        self.kept, self.todo = kept, todo

    def moves(self, combination, progress):
        self.moved.append((combination, progress.step))

    def ends(self, combination, outcome):
        self.ended[combination] = outcome


@pytest.mark.slow
def test_finished_runs_are_kept_failed_ones_cost_no_other_and_what_is_missing_is_trained(tmp_path):
    asked = Factors(["default", "lape"], ["learnable"], [0, 1])
    broken = planned(asked, tmp_path, TINY)[3]
    broken.folder.parent.mkdir(parents=True)
    broken.folder.write_text("a file where the run's folder should be")

    first = Heard()
    study = compare(TINY, asked, tmp_path, jobs=2, watch=first)
    assert (first.kept, len(first.todo)) == ([], 4)
    assert {type(outcome) for outcome in first.ended.values()} == {Result, UsageError}
    assert list(study.failures) == [Combination(Way("lape"), "learnable", 1)]
    assert [row.score.count for row in study.rows] == [2, 1]
    assert study.jobs == 2
    with pytest.raises(UsageError, match="lape × learnable, seed 1"):
        study.raise_missing()

    broken.folder.unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    second = Heard()
    study = compare(TINY, asked, tmp_path, jobs=2, watch=second)
    assert (len(second.kept), second.todo) == (3, [Combination(Way("lape"), "learnable", 1)])
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert study.failures == {}
    assert [row.score.count for row in study.rows] == [2, 2]
    assert study.jobs is None  # what else went on while the kept runs were trained is not known
    assert study.images == (1198, 599)
    study.raise_missing()

    result = study.of(Way("lape"), "learnable")[0]
    model = load_result(result).work.module
    stored = torch.load(result.folder / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def finished(asked, out, base=TINY, **other):
    """Write finished runs of a comparison, as it would have trained them; returns their folders by combination."""
    made = planned(asked, out, base)
    other = {"contents": contents(set_of(base))} | other
    for plan in made:
        write_run(plan.folder, plan.combination, [50.0 + plan.combination.seed, 60.0], base, **other)
    return {plan.combination: plan.folder for plan in made}


def test_runs_of_the_same_settings_in_the_folder_join_the_study_and_others_are_named(tmp_path):
    asked = Factors(["default"], ["learnable"], [0])
    finished(asked, tmp_path)
    finished(Factors(["lape"], ["learnable"], [0, 7]), tmp_path)
    (longer,) = finished(asked, tmp_path, replace(TINY, epochs=9)).values()
    of_other_data = contents(set_of(TINY)) | {"classes": ["a"]}
    (changed,) = finished(Factors(["shared"], ["learnable"], [0]), tmp_path, contents=of_other_data).values()
    study, left_out = with_others(replace(compare(TINY, asked, tmp_path), jobs=2), tmp_path)
    assert [(one.way.join, one.seed) for one in study.results] == [("default", 0), ("lape", 0), ("lape", 7)]
    assert study.jobs is None
    assert left_out == {
        longer: f"epochs is 9 there, 2 here. lape report {tmp_path} shows it.",
        changed: f"it is of other data. lape report {tmp_path} shows it.",
    }


def test_what_others_work_on_is_left_to_them_and_told(tmp_path):
    asked = Factors(["default", "lape"], ["learnable"], [0])
    folders = finished(asked, tmp_path)
    lape = Combination(Way("lape"), "learnable", 0)
    (folders[lape] / "result.json").unlink()
    heard = Heard()
    with working_in(folders[lape]):
        study = compare(TINY, asked, tmp_path, watch=heard)
    assert list(heard.left) == list(study.elsewhere) == [lape]
    assert f"Somebody works in {folders[lape]}: process {os.getpid()} on " in str(study.elsewhere[lape])
    assert len(study.results) == 1
    with pytest.raises(RunError, match=r"1 of 2 runs are not finished, and others work on them.*lape × learnable"):
        study.raise_missing()


def test_what_another_finishes_meanwhile_is_among_the_results(tmp_path):
    asked = Factors(["default", "lape"], ["learnable"], [0])
    folders = finished(asked, tmp_path)
    result = folders[Combination(Way("lape"), "learnable", 0)] / "result.json"
    text = result.read_text()
    result.unlink()

    class Finishing(Heard):
        def elsewhere(self, combination, occupied):
            result.write_text(text)

    heard = Finishing()
    with working_in(result.parent):
        study = compare(TINY, asked, tmp_path, watch=heard)
    assert (len(study.results), study.elsewhere) == (2, {})
    assert len(heard.ended) == 1


def test_a_plan_has_a_command_for_each_run_that_is_not_finished_and_that_nobody_works_on(tmp_path):
    asked = Factors(["default", "lape", "shared"], ["learnable"], [0], pe_norms=["norm"])
    base = replace(TINY, weights="some vit.pt", epochs=1)
    first, second, third = planned(asked, tmp_path / "x", base)
    write_run(first.folder, first.combination, [50.0], base, contents=contents(set_of(base)))
    with working_in(third.folder):
        assert write_plan(base, asked, tmp_path / "x", tmp_path / "plan.txt") == 1
    line, mark = (tmp_path / "plan.txt").read_text().splitlines()
    assert mark == f"# {writing.MARK}"
    words = ["lape", "train", "--resume", "--out", str(second.folder), "--weights", "some vit.pt"]
    assert shlex.split(line) == words
    _, arguments = parsed(words[1:])
    assert (arguments["experiment"], arguments["resume"]) == (second.experiment, True)
    assert write_plan(base, asked, tmp_path / "x", tmp_path / "plan.txt") == 2  # it may be written again
    (tmp_path / "precious").write_text("theirs")
    with pytest.raises(UsageError, match="precious is there and was not written by lape"):
        write_plan(base, asked, tmp_path / "y", tmp_path / "precious")
    assert not (tmp_path / "y").exists()


class Interrupted(Heard):
    def moves(self, combination, progress):
        raise KeyboardInterrupt


@pytest.mark.slow
def test_ctrl_c_while_news_is_shown_ends_the_processes_too(tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught:
        compare(
            replace(TINY, epochs=1000), Factors(["lape"], ["learnable"], [0]), tmp_path, jobs=1, watch=Interrupted()
        )
    assert caught.tb is not None  # while it is held, so is the frame that walked the processes' news
    assert multiprocessing.active_children() == []
    assert not list(tmp_path.rglob("result.json"))


STOPPABLE = """
import json, sys
from pathlib import Path
from lape.studies.comparison import Factors, Watch, compare
from lape.experiment import Experiment
class Say(Watch):
    def elsewhere(self, combination, occupied):
        print("elsewhere", str(occupied).replace(" ", "_"), flush=True)
    def moves(self, combination, progress):
        print(combination.way.join, progress.step, flush=True)
if __name__ == "__main__":
    base = Experiment.of(json.loads(sys.argv[1]))
    asked = Factors(["default", "lape"], ["learnable"], [0])
    study = compare(base, asked, Path(sys.argv[2]), jobs=int(sys.argv[3]), watch=Say())
    print("finished", len(study.results))
"""


@pytest.mark.slow
def test_after_ctrl_c_the_same_call_goes_on(tmp_path):
    """That a run which goes on ends with the same weights is a law of training, and tested there."""
    script = tmp_path / "script.py"
    script.write_text(STOPPABLE)
    settings = replace(TINY, batch_size=40, epochs=8).settings()  # 240 steps, some seconds
    command = [sys.executable, str(script), json.dumps(settings), str(tmp_path / "out"), "2"]

    def started():
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)

    stopped = started()
    assert stopped.stdout is not None
    assert stopped.stdout.readline().split()[0] in ("default", "lape")
    os.killpg(stopped.pid, signal.SIGINT)  # as a terminal sends it: to the command and to its processes
    stopped.communicate(timeout=60)
    assert stopped.returncode not in (0, None)
    assert not list(tmp_path.rglob("result.json"))
    saved = [torch.load(path, weights_only=True) for path in tmp_path.rglob("last.pt")]
    kept = {one["experiment"]["join"]: one["state"]["step"] for one in saved}
    assert kept  # the other may not have begun
    assert max(kept.values()) < 240

    *news, end = started().communicate(timeout=300)[0].splitlines()
    first = {join: int(step) for join, step in map(str.split, reversed(news))}
    assert all(first[join] > step for join, step in kept.items())
    assert end == "finished 2"


def _lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_sigterm_keeps_what_there_is_and_ends_every_process(tmp_path):
    """As batch systems send it, to the command alone."""
    script = tmp_path / "script.py"
    script.write_text(STOPPABLE)
    settings = replace(TINY, batch_size=40, epochs=1000, checkpoint_seconds=1e6).settings()
    command = [sys.executable, str(script), json.dumps(settings), str(tmp_path / "out"), "2"]
    stopped = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    assert stopped.stdout is not None
    join, step = stopped.stdout.readline().split()
    stopped.terminate()
    stopped.communicate(timeout=300)
    assert stopped.returncode == 128 + signal.SIGTERM
    end = time.monotonic() + 10
    while _lives(stopped.pid):
        assert time.monotonic() < end
        time.sleep(0.05)
    (kept,) = (torch.load(path, weights_only=True) for path in tmp_path.rglob(f"{join}-*/last.pt"))
    assert kept["state"]["step"] >= int(step)
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.slow
def test_two_comparisons_share_a_folder_and_take_over_what_a_killed_one_leaves(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STOPPABLE)
    settings = replace(TINY, epochs=20).settings()
    command = [sys.executable, str(script), json.dumps(settings), str(tmp_path / "out"), "1"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    assert first.stdout is not None
    while not list(tmp_path.rglob("last.pt")):
        assert first.poll() is None
        time.sleep(0.001)
    os.killpg(first.pid, signal.SIGSTOP)  # it is there, and stays where it is
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    assert second.stdout is not None
    assert second.stdout.readline().startswith(f"elsewhere Somebody_works_in_{tmp_path}/out/runs/default-learnable")
    assert second.stdout.readline().split()[0] == "lape"
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    *news, end = second.communicate(timeout=300)[0].splitlines()
    assert end == "finished 2"
    moved = [int(line.split()[1]) for line in news if line.startswith("default ")]
    assert moved[0] > 2  # it went on from what the first had kept, an epoch of two steps at least
    assert not list(tmp_path.rglob(f"{LOCK}*"))

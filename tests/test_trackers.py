"""Weights & Biases and MLflow hear of a run once, whole, where they are asked for, and cost it nothing where they fail.

Both are stood in for here by a few lines that note what they are told: their packages are not installed for the tests.
"""

import json
import sys
from dataclasses import replace

import pytest

from lape.cli import command_line as cli
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.studies.comparison import Factors, compare, write_plan
from lape.training.loop import train
from lape.training.trackers import TRACKED, TRACKERS, tracker_of

WANDB = """
runs = {}  # by id
trouble = None
def Settings(**settings): return settings
class Run:
    def __init__(self, known): self.known, self.step = known, known["step"]
    def log(self, numbers, step):
        if trouble == "log": raise ConnectionError("the network is gone")
        assert step >= self.known["step"], "wandb drops it"
        self.known["rows"].append((step, numbers))
        self.known["step"] = step + 1
    def finish(self, exit_code): self.known["ends"].append(exit_code == 0)
def init(id, config, resume, dir, **others):
    if trouble == "init": raise ConnectionError("the network is gone\\n(twice)")
    assert resume == "allow"
    known = runs.setdefault(id, {"rows": [], "ends": [], "step": 0})
    known["settings"] = config
    return Run(known)
"""
MLFLOW = """
runs, tags, names = {}, {}, []
trouble = None
"""
MLFLOW_ENTITIES = """
from collections import namedtuple
Param, Metric = namedtuple("Param", "key value"), namedtuple("Metric", "key value timestamp step")
"""
MLFLOW_TRACKING = """
import mlflow
from types import SimpleNamespace as Some
class MlflowClient:
    def get_experiment_by_name(self, name): return Some(experiment_id="1") if name in mlflow.names else None
    def create_experiment(self, name):
        if mlflow.trouble == "init": raise ConnectionError("the network is gone\\n(twice)")
        mlflow.names.append(name)
        return "1"
    def search_runs(self, experiments, filter_string):
        number = filter_string.removeprefix("tags.`lape.run` = '").removesuffix("'")
        return [Some(info=Some(run_id=id)) for id, tagged in mlflow.tags.items() if tagged == {"lape.run": number}]
    def create_run(self, experiment, tags, run_name):
        id = f"run {len(mlflow.runs)}"
        mlflow.runs[id], mlflow.tags[id] = {"rows": [], "ends": [], "settings": {}}, tags
        return Some(info=Some(run_id=id))
    def update_run(self, id, status): assert status == "RUNNING"
    def get_metric_history(self, id, name): return [Some(step=step) for step, row in mlflow.runs[id]["rows"]]
    def log_batch(self, id, metrics=(), params=()):
        if metrics and mlflow.trouble == "log": raise ConnectionError("the network is gone")
        known = mlflow.runs[id]
        assert len(params) <= 100
        assert not {one.key for one in params} & known["settings"].keys(), "a parameter is never changed"
        known["settings"] |= {one.key: one.value for one in params}
        if metrics: known["rows"].append((metrics[0].step, {one.key: one.value for one in metrics}))
    def set_terminated(self, id, status): mlflow.runs[id]["ends"].append(status == "FINISHED")
"""
MODULES = {
    "wandb/__init__.py": WANDB,
    "mlflow/__init__.py": MLFLOW,
    "mlflow/entities.py": MLFLOW_ENTITIES,
    "mlflow/tracking.py": MLFLOW_TRACKING,
}
SHORT = Experiment(
    model_args={"depth": 2, "embed_dim": 16, "num_heads": 2},
    epochs=1,
    batch_size=400,
    schedule="constant",
    warmup_epochs=0,
    drop_path=0.0,
    accelerator="cpu",
)


@pytest.fixture(params=TRACKERS)
def stand_in(request, tmp_path, monkeypatch):
    """The name of a tracker, and the module that stands in for its package."""
    for path, text in MODULES.items():
        (tmp_path / "site" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / path).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.partition(".")[0] in TRACKERS]:
        monkeypatch.delitem(sys.modules, name)
    module = __import__(request.param)
    yield request.param, module
    for name in [name for name in sys.modules if name.partition(".")[0] in TRACKERS]:
        del sys.modules[name]


def test_a_run_is_told_once_also_when_it_goes_on(stand_in, tmp_path):
    name, module = stand_in
    run = tmp_path / "run"
    train(SHORT, run, tracker=tracker_of(name))
    train(replace(SHORT, epochs=2), run, resume=True, tracker=tracker_of(name))
    curve = json.loads((run / "result.json").read_text())["curve"]
    (known,) = module.runs.values()
    expected = [(row["step"], {key: row[key] for key in row if key != "step"}) for row in curve]
    assert known["rows"] == expected
    assert len(expected) == 2
    assert known["ends"] == [True, True]
    assert str(known["settings"]["data"]) == "digits"
    train(SHORT, tmp_path / "other", tracker=tracker_of(name))  # another folder is another run
    assert len(module.runs) == 2


@pytest.mark.parametrize("stand_in", ["wandb"], indirect=True)
def test_every_run_of_a_comparison_is_told(stand_in, tmp_path):
    name, _ = stand_in
    asked = Factors(["default", "lape"], ["learnable"], [0])
    study = compare(SHORT, asked, tmp_path / "out", tracker=name)
    study.raise_missing()
    told = [json.loads((result.folder / TRACKED).read_text()) for result in study.results.values()]
    assert len({str(one) for one in told}) == 2  # processes of their own: the numbers that they are known by stay
    file = tmp_path / "plan.txt"
    write_plan(SHORT, Factors(["lape"], ["learnable"], [1]), tmp_path / "out", file, tracker=name)
    assert f" --tracker {name}\n" in file.read_text()


def test_where_a_tracker_fails_later_the_run_goes_on_and_it_is_said_once(stand_in, tmp_path):
    name, module = stand_in
    module.trouble = "log"
    with pytest.warns(UserWarning, match="takes nothing more of this run .the network is gone") as heard:
        train(replace(SHORT, epochs=2), tmp_path / "run", tracker=tracker_of(name))
    assert len([one for one in heard if "takes nothing more" in str(one.message)]) == 1
    assert len(json.loads((tmp_path / "run/result.json").read_text())["curve"]) == 2
    (known,) = module.runs.values()
    assert known["ends"] == [False]


def test_a_tracker_that_does_not_begin_ends_the_command_before_the_first_step(stand_in, tmp_path):
    name, module = stand_in
    module.trouble = "init"
    with pytest.raises(RunError, match=rf"{name} does not begin \(the network is gone\)"):
        train(SHORT, tmp_path / "run", tracker=tracker_of(name))
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]  # it may begin again
    module.trouble = None
    train(SHORT, tmp_path / "run", tracker=tracker_of(name))
    (tmp_path / "run" / TRACKED).write_text('{"run": "../x"}')
    with pytest.raises(RunError, match=rf"{TRACKED} holds no number of a run"):
        train(replace(SHORT, epochs=2), tmp_path / "run", resume=True, tracker=tracker_of(name))


def test_a_run_that_is_cut_off_is_told_as_that(stand_in, tmp_path):
    name, module = stand_in
    with pytest.raises(RunError, match="The loss is"):
        train(replace(SHORT, lr=1e30, clip_grad=None), tmp_path / "run", tracker=tracker_of(name))
    (known,) = module.runs.values()
    assert known["ends"] == [False]


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_said_before_anything_is_read(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    words = ["train", "--data", str(tmp_path / "not there"), "--tracker", name, "--out", str(tmp_path / "run")]
    assert cli.main(words) == cli.FAILURE
    err = capsys.readouterr().err
    assert err.startswith(f"lape: --tracker {name} needs {name}, not installed here.")
    assert f"pip install 'lape[{name}]'" in err
    assert not (tmp_path / "run").exists()


def test_another_name_is_refused():
    with pytest.raises(UsageError, match=r"'wandbs' is not a tracker\. Did you mean 'wandb'"):
        tracker_of("wandbs")
    assert tracker_of(None) is None


def test_settings_of_a_run_name_no_tracker():
    """What a file says switches none on: it is no setting of a run."""
    assert "tracker" not in SHORT.settings()

"""A run that is cut off at any moment ends with the weights of one that was not, bit for bit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch

from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.files import writing
from lape.files.locks import LOCK, Occupied
from lape.training import checkpoints
from lape.training.folder import claimed
from lape.training.interruption import Stopped
from lape.training.loop import TrainingRun, train

# Whatever a checkpoint must carry is in use: dropout of paths, mixing, averaging, clipping, augmentation by timm.
EXPERIMENT = Experiment(
    model_args={"depth": 2, "embed_dim": 16, "num_heads": 2},
    epochs=3,
    batch_size=200,
    accumulate=2,
    lr=1e-2,
    clip_grad=1.0,
    ema=0.9,
    drop_path=0.3,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    auto_augment="rand-m9-mstd0.5-inc1",
    reprob=0.25,
    accelerator="cpu",
    checkpoint_seconds=0.0,
)
LONGER = replace(EXPERIMENT, epochs=8)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "a"
    train(EXPERIMENT, folder)
    return folder


def timeless(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_run(one, other):
    """Everything that a run leaves is equal, but for times."""
    for name in (checkpoints.LAST, checkpoints.BEST):
        left, right = (checkpoints.read(folder / name) for folder in (one, other))
        assert left.keys() == right.keys()
        for part in ("model", "ema"):
            for key, tensor in left.get(part, {}).items():
                assert torch.equal(tensor, right[part][key]), f"{name}: {part} {key}"
    left, right = (checkpoints.read(folder / checkpoints.LAST) for folder in (one, other))
    for number, state in left["optimizer"]["state"].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, right["optimizer"]["state"][number][key]), f"optimiser {number} {key}"
    curves = [json.loads((folder / "result.json").read_text())["curve"] for folder in (one, other)]
    assert timeless(curves[0]) == timeless(curves[1])
    assert timeless(checkpoints.read(other / checkpoints.LAST)["state"]["curve"]) == timeless(curves[0])
    tables = [[line.rpartition(",")[0] for line in (f / "curve.csv").read_text().splitlines()] for f in (one, other)]
    assert tables[0] == tables[1]


class Cut(BaseException):
    """Stands for the end of a process."""


def test_a_cut_at_any_write_loses_nothing(uninterrupted, tmp_path, monkeypatch):
    """Every replacement of every file of the run is once the first that does not happen."""
    replace_file = os.replace
    writes = 0

    def counted(source, target):
        nonlocal writes
        writes += 1
        if writes == cut:
            raise Cut
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", counted)
    cut, short = 0, replace(EXPERIMENT, checkpoint_seconds=60.0)
    while True:
        cut, writes = cut + 1, 0
        folder = tmp_path / str(cut)
        try:
            train(short, folder)
        except Cut:
            train(short, folder, resume=True)
            assert_same_run(uninterrupted, folder)
        else:
            break
    assert cut > 10  # settings, curve, three times best, curve and last, result


def test_a_kill_within_a_validation_loses_the_validation_alone(uninterrupted, tmp_path, monkeypatch):
    """At the end of an epoch, and of the last one."""
    whole, validations = TrainingRun._validate, []

    def cut_off(self):
        validations.append(self.state.step)
        if validations.count(self.state.step) == 1:
            raise Cut
        whole(self)

    monkeypatch.setattr(TrainingRun, "_validate", cut_off)
    for step in (5, 10, 15):
        with pytest.raises(Cut):
            train(replace(EXPERIMENT, checkpoint_seconds=60.0), tmp_path / "a", resume=True)
        assert checkpoints.read(tmp_path / "a" / checkpoints.LAST)["state"]["step"] == step
        assert not (tmp_path / "a" / "result.json").exists()
    train(replace(EXPERIMENT, checkpoint_seconds=60.0), tmp_path / "a", resume=True)
    assert validations == [5, 5, 10, 10, 15, 15]
    assert_same_run(uninterrupted, tmp_path / "a")


@pytest.mark.slow
def test_a_killed_process_is_taken_up_exactly(tmp_path):
    """SIGKILL, three times, at moments that the clock chooses; the second and third life begin where the last ended."""
    folder = tmp_path / "killed"
    writing.write_json(tmp_path / "run.json", LONGER.settings() | {"workers": 2})
    command = [sys.executable, "-m", "lape", "train", "--config", str(tmp_path / "run.json"), "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    begun = []
    for life, delay in enumerate((0.0, 0.013, 0.041)):
        process = subprocess.Popen(
            [*command, *["--resume"] * (life > 0)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        last, seen = folder / checkpoints.LAST, set()
        while len(seen) < 4:  # every step replaces the file
            assert process.poll() is None, process.stderr.read().decode()
            with contextlib.suppress(FileNotFoundError):
                seen.add(last.stat().st_mtime_ns)
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert process.returncode == -signal.SIGKILL
        begun.append(checkpoints.read(last)["state"]["step"])
    assert begun == sorted(set(begun))
    assert begun[-1] < 40
    train(replace(LONGER, workers=2), folder, resume=True)
    train(LONGER, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_the_step_that_it_came_in(uninterrupted, tmp_path, number):
    sent = []

    def interrupt(progress):
        if progress.step >= 5 and not sent:
            sent.append(os.kill(os.getpid(), number))

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Stopped) as stopped:
        train(EXPERIMENT, tmp_path / "a", report=interrupt)
    assert stopped.value.code == 128 + number
    assert "Go on with --resume" in stopped.value.message
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    kept = checkpoints.read(tmp_path / "a" / checkpoints.LAST)["state"]["step"]
    assert f"step {kept} of 15 is kept" in stopped.value.message
    assert 5 < kept < 15
    train(EXPERIMENT, tmp_path / "a", resume=True)
    assert_same_run(uninterrupted, tmp_path / "a")


def test_resuming_where_there_is_nothing_begins(uninterrupted, tmp_path):
    train(EXPERIMENT, tmp_path / "a", resume=True)
    assert_same_run(uninterrupted, tmp_path / "a")


def test_settings_are_there_before_anything_slow_and_a_refused_run_leaves_nothing(uninterrupted, tmp_path, monkeypatch):
    folder, before = tmp_path / "new" / "a", TrainingRun.__init__

    def killed(*_, **__):
        assert Experiment.of(json.loads((folder / "experiment.json").read_text())) == EXPERIMENT
        raise Cut

    monkeypatch.setattr(TrainingRun, "__init__", killed)
    with pytest.raises(Cut):
        train(EXPERIMENT, folder)
    assert [path.name for path in folder.iterdir()] == ["experiment.json"]
    monkeypatch.setattr(TrainingRun, "__init__", before)
    train(EXPERIMENT, folder, resume=True)
    assert_same_run(uninterrupted, folder)
    with pytest.raises(UsageError, match="optimiser"):
        train(replace(EXPERIMENT, optimizer="adamv"), tmp_path / "other" / "a")
    assert not (tmp_path / "other").exists()


# A length that was asked for later

STEADY = replace(EXPERIMENT, schedule="constant", warmup_epochs=1, epochs=2)


def test_a_run_that_is_asked_to_be_longer_is_what_asking_at_once_would_have_made(tmp_path, monkeypatch):
    longer, folder = replace(STEADY, epochs=3), tmp_path / "a"
    train(longer, tmp_path / "whole")
    train(STEADY, folder)
    fit = TrainingRun.fit
    for cut in (True, False):  # the first time it is cut off when all is written that a longer run writes first
        monkeypatch.setattr(TrainingRun, "fit", (lambda run, *_: run._open_folder() and 1 / 0) if cut else fit)
        with pytest.raises(ZeroDivisionError) if cut else contextlib.nullcontext():
            train(longer, folder, resume=True)
    assert_same_run(tmp_path / "whole", folder)
    assert json.loads((folder / "experiment.json").read_text())["epochs"] == 3


@pytest.mark.parametrize(
    ("before", "asked", "why"),
    [
        (EXPERIMENT, {"epochs": 4}, r"by the schedule cosine .* --cooldown_epochs, which go on at the lowest rate"),
        (replace(STEADY, warmup_epochs=None), {"epochs": 20}, "its warm-up the learning rate of step 2 was"),
        (STEADY, {"epochs": 1}, "holds a run of 10 steps, and 5 are fewer"),
        (replace(STEADY, validate_every=3), {"epochs": 3}, "validate_every 3 would pass it over"),
        (replace(STEADY, steps=8), {"steps": 10}, "step 8 was validated as the last one"),
        (STEADY, {"epochs": 3, "lr": 0.5}, "another experiment"),
    ],
    ids=["cosine", "warm-up", "shorter", "validation", "within an epoch", "other"],
)
def test_a_length_that_makes_another_run_is_refused_with_the_reason(tmp_path, before, asked, why):
    train(before, tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(UsageError, match=why):
        train(replace(before, **asked), tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == files


def test_a_cosine_goes_on_at_its_lowest_rate_and_a_lean_run_does_not_go_on(tmp_path):
    longer, folder = replace(EXPERIMENT, cooldown_epochs=1), tmp_path / "a"
    train(longer, tmp_path / "whole")
    train(EXPERIMENT, folder)
    train(longer, folder, resume=True, lean=True)
    with pytest.raises(RunError, match="holds weights alone"):
        train(replace(EXPERIMENT, cooldown_epochs=2), folder, resume=True)
    whole, lean = (checkpoints.read(place / checkpoints.LAST) for place in (tmp_path / "whole", folder))
    assert whole.keys() - lean.keys() == {"optimizer", "precision"}
    assert all(torch.equal(value, lean["model"][name]) for name, value in whole["model"].items())


# One at a time


def test_a_second_launch_into_a_folder_leaves_it_alone(tmp_path):
    def another(_):
        if (tmp_path / LOCK).exists():
            for resume in (True, False):
                with pytest.raises((Occupied, UsageError)) as told:
                    train(EXPERIMENT, tmp_path, resume=resume)
                assert ("Somebody works in" in str(told.value)) is resume
            seen.append(1)

    seen = []
    train(EXPERIMENT, tmp_path, report=another)
    assert seen
    assert not (tmp_path / LOCK).exists()


def test_the_scale_of_half_precision_is_taken_up(tmp_path, monkeypatch):
    """Fabric has float16 on a CPU only where its part is handed over ready-made; the scaler's state must survive."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins import MixedPrecision

    def launch(_):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
        return Fabric(accelerator="cpu", plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    monkeypatch.setattr("lape.training.loop.launch", launch)
    half = replace(EXPERIMENT, precision="16-mixed", workers=0)
    train(half, tmp_path / "whole")
    scale = checkpoints.read(tmp_path / "whole" / checkpoints.LAST)["precision"]
    assert scale["scale"] != 2.0**20

    sent = []

    def stop(progress):
        if progress.step >= 7 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    with pytest.raises(Stopped):
        train(half, tmp_path / "cut", report=stop)
    train(half, tmp_path / "cut", resume=True)
    assert checkpoints.read(tmp_path / "cut" / checkpoints.LAST)["precision"] == scale
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_signal_that_the_caller_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(EXPERIMENT, tmp_path / "a", report=lambda _: os.kill(os.getpid(), signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "a" / "result.json").exists()


@dataclass
class Rank:
    """A process of a launch, and what it hears from the first one."""

    is_global_zero: bool
    refused: bool = False

    def broadcast(self, said):
        return said if self.is_global_zero else self.refused


def test_a_process_that_comes_later_than_the_first_does_not_take_its_settings_for_another_run(tmp_path):
    folder, first, later = tmp_path / "a", Rank(True), Rank(False)
    with claimed(folder, LONGER, False, first):
        assert (folder / checkpoints.SETTINGS).exists()
        with claimed(folder, LONGER, False, later):
            pass
    with pytest.raises(UsageError, match="holds an unfinished run"), claimed(folder, LONGER, False, first):
        pytest.fail("a second run began in the folder")
    with pytest.raises(SystemExit), claimed(folder, LONGER, False, Rank(False, refused=True)):
        pytest.fail("a second run began in the folder")


@pytest.mark.slow
def test_two_processes_stop_at_one_step(tmp_path):
    """torchrun hands a signal on to both; the checkpoint is whole, and one process takes it up."""
    experiment = replace(LONGER, epochs=100, checkpoint_seconds=0.05, drop_path=0.0, mixup=0.0, cutmix=0.0)
    writing.write_json(tmp_path / "run.json", experiment.settings())
    folder = tmp_path / "a"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lape"]
    process = subprocess.Popen(
        [*command, "train", "--config", str(tmp_path / "run.json"), "--out", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (folder / checkpoints.LAST).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=60)
    step = checkpoints.read(folder / checkpoints.LAST)["state"]["step"]
    assert f"Stopped: step {step} of 500 is kept" in err
    assert err.count("Stopped: ") == 1

"""The loop: what it leaves in a folder, and that parts and processes change nothing."""

import csv
import errno
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lape.errors import RunError, UsageError
from lape.experiment import Execution, Experiment
from lape.files import writing
from lape.studies.analysis import load_result
from lape.studies.study import read_result
from lape.training import checkpoints
from lape.training.assembly import optimizer_of
from lape.training.evaluation import evaluate_checkpoint
from lape.training.interruption import Stopped
from lape.training.loop import TrainingRun, _synchronised, launch, train

TINY = Experiment(
    model_args={"depth": 2, "embed_dim": 16, "num_heads": 2},
    epochs=2,
    batch_size=400,
    lr=1e-2,
    drop_path=0.0,  # which image's path is dropped does depend on the parts of a batch
    accelerator="cpu",
    precision="32-true",
)


def weights(folder):
    return checkpoints.read(folder / "last.pt")["model"]


def assert_equal_weights(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "a"
    heard = []
    train(TINY, folder, report=heard.append)
    return folder, heard


# What a run leaves behind


def test_a_run_folder_tells_everything_about_the_run(finished):
    folder, heard = finished
    result = json.loads((folder / "result.json").read_text())
    assert result["experiment"] == json.loads((folder / "experiment.json").read_text()) == TINY.settings()
    rows = list(csv.DictReader((folder / "curve.csv").open()))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == result["curve"]
    assert [row["step"] for row in result["curve"]] == [2, 4]
    assert result["curve"][0].keys() == {
        "epoch", "step", "lr", "train_loss", "val_loss", "val_accuracy", "seconds",
    }  # fmt: skip
    assert result["final"] == {name: result["curve"][-1][name] for name in ("val_accuracy", "val_loss")}
    assert result["best"] == max(result["curve"], key=lambda row: row["val_accuracy"])
    assert result["steps"] == 4
    assert 0 < result["seconds_per_step"] < 10
    assert result["parameters"] == sum(tensor.numel() for tensor in weights(folder).values())
    assert result["versions"].keys() >= {"lape", "torch", "timm", "python"}
    assert heard[-1].epoch == heard[-1].epochs == 2
    assert heard[-1].score == result["final"]["val_accuracy"]
    assert heard[-1].seconds_left == 0
    assert heard[-1].images_per_second > 0


def test_tensorboard_shows_the_curve(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = finished
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    curve = json.loads((folder / "result.json").read_text())["curve"]
    seen = [(event.step, event.value) for event in events.Scalars("val_accuracy")]
    assert seen == [(row["step"], pytest.approx(row["val_accuracy"])) for row in curve]


def test_the_best_checkpoint_is_the_one_that_the_curve_says(finished):
    folder, _ = finished
    best = json.loads((folder / "result.json").read_text())["best"]
    judged = evaluate_checkpoint(folder)
    assert judged.metrics["val_accuracy"] == best["val_accuracy"]
    assert judged.metrics["val_loss"] == pytest.approx(best["val_loss"])
    assert judged.images == 599


def test_training_learns(tmp_path):
    experiment = replace(TINY, epochs=12, batch_size=64, shift=0, join="lape-sharing")
    curve = json.loads(train(experiment, tmp_path / "a").read_text())["curve"]
    assert curve[-1]["val_accuracy"] > 40
    assert curve[-1]["train_loss"] < curve[0]["train_loss"] - 0.5


# What does not change the result, and what does


def test_the_same_experiment_gives_the_same_weights(finished, tmp_path):
    train(TINY, tmp_path / "b")
    assert_equal_weights(weights(finished[0]), weights(tmp_path / "b"))
    train(replace(TINY, seed=1), tmp_path / "c")
    assert not torch.equal(weights(tmp_path / "c")["norm.weight"], weights(tmp_path / "b")["norm.weight"])


EVERYTHING = replace(
    TINY,
    batch_size=200, accumulate=2, cooldown_epochs=1, lr_by_epoch=True, lr_lag=1, lr_batch=100,
    also_decay=("pos_embed",), ema=0.9, ema_evaluated=False, drop_path=0.2, clip_grad=1.0,
    scale=(0.5, 1.0), interpolation="random", auto_augment="rand-m9-mstd0.5-inc1", reprob=0.25, mixup=0.8, cutmix=1.0,
    smoothing=0.1, mix_epochs=2, erase_after_mix=True, repeats=3,
)  # fmt: skip


@pytest.mark.parametrize("batched", [False, True])
def test_whatever_the_recipes_have_repeats_itself_and_resumes(tmp_path, batched):
    experiment = replace(EVERYTHING, batched=batched)
    train(experiment, tmp_path / "whole")
    train(replace(experiment, checkpoint_seconds=0.0, workers=0), tmp_path / "again")
    assert_equal_weights(weights(tmp_path / "whole"), weights(tmp_path / "again"))
    sent = []

    def stop(progress):
        if progress.step >= 7 and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    with pytest.raises(Stopped):
        train(replace(experiment, checkpoint_seconds=0.0), tmp_path / "cut", report=stop)
    train(experiment, tmp_path / "cut", resume=True)
    assert_equal_weights(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_workers_change_nothing(tmp_path):
    augmented = replace(TINY, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.25, mixup=0.8, cutmix=1.0, drop_path=0.2)
    for workers in (0, 2):
        train(replace(augmented, workers=workers), tmp_path / str(workers))
    assert_equal_weights(weights(tmp_path / "0"), weights(tmp_path / "2"))


def test_accumulated_parts_are_one_batch(tmp_path):
    plain = replace(TINY, optimizer="sgd", lr=0.1)  # Adam would hide a gradient of the wrong length
    for parts in (1, 4):
        train(replace(plain, accumulate=parts), tmp_path / str(parts))
    one, four = (json.loads((tmp_path / parts / "result.json").read_text())["curve"] for parts in "14")
    assert [row["train_loss"] for row in one] == pytest.approx([row["train_loss"] for row in four], rel=1e-6)
    whole, parts = weights(tmp_path / "1"), weights(tmp_path / "4")
    for name in whole:
        torch.testing.assert_close(
            whole[name], parts[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_two_processes_are_one(tmp_path):
    """A two-process gloo run ends with the weights of one process at the same global batch."""
    options = [
        "train", "--model-args", json.dumps(TINY.model_args), "--epochs", "2", "--batch-size", "400", "--lr", "1e-3",
        "--drop-path", "0", "--cooldown-epochs", "1", "--lr-by-epoch", "--warmup-epochs", "0",
        "--accelerator", "cpu", "--checkpoint-seconds", "0",
    ]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    told = subprocess.run(
        [*launcher, "-m", "lape", *options, "--out", str(tmp_path / "two")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    # gloo may abort when its processes leave, after all is written: what counts is the file.
    assert (tmp_path / "two" / "result.json").exists(), told.stderr
    train(replace(TINY, lr=1e-3, cooldown_epochs=1, lr_by_epoch=True, warmup_epochs=0.0), tmp_path / "one")
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert one["experiment"] | Execution().__dict__ == two["experiment"] | Execution().__dict__
    for left, right in zip(one["curve"], two["curve"], strict=True):
        assert left["train_loss"] == pytest.approx(right["train_loss"], rel=1e-5)
        assert left["val_accuracy"] == pytest.approx(right["val_accuracy"], abs=0.4)
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "two")[name], rtol=1e-3, atol=1e-4)


def test_what_decides_the_result_is_the_identity():
    same = [replace(TINY, workers=3), replace(TINY, devices=2), replace(TINY, data_dir=Path("/x"))]
    other = [replace(TINY, seed=1), replace(TINY, lr=1.0), replace(TINY, join="default"), replace(TINY, mixup=0.1)]
    assert {e.fingerprint() for e in same} == {TINY.fingerprint()}
    assert len({e.fingerprint() for e in [TINY, *other]}) == 5
    assert Experiment().fingerprint() == hashlib.sha256(b"{}").hexdigest()[:16]  # a setting to come changes no name
    again = Experiment.of(json.loads(json.dumps(replace(TINY, betas=(0.9, 0.95), data_dir=Path("x")).settings())))
    assert again == replace(TINY, betas=(0.9, 0.95), data_dir=Path("x"))
    with_names = replace(TINY, also_decay=("pos_embed",), repeats=3, batched=True)
    assert Experiment.of(json.loads(json.dumps(with_names.settings()))) == with_names


# The parts of a step


def test_the_average_is_what_is_judged_and_kept(tmp_path):
    train(replace(TINY, ema=0.5), tmp_path / "a")
    last, best = (checkpoints.read(tmp_path / "a" / name) for name in ("last.pt", "best.pt"))
    if best["metrics"]["epoch"] == 2:
        assert_equal_weights(best["model"], last["ema"])
    assert not torch.equal(last["ema"]["norm.weight"], last["model"]["norm.weight"])
    curve = last["state"]["curve"]
    assert evaluate_checkpoint(tmp_path / "a" / "last.pt").metrics["val_loss"] == pytest.approx(curve[-1]["val_loss"])


def test_the_weights_themselves_are_judged_and_kept_beside_an_average(tmp_path):
    train(replace(TINY, ema=0.5, ema_evaluated=False), tmp_path / "a")
    last, best = (checkpoints.read(tmp_path / "a" / name) for name in ("last.pt", "best.pt"))
    if best["metrics"]["epoch"] == 2:
        assert_equal_weights(best["model"], last["model"])
    assert not torch.equal(last["ema"]["norm.weight"], last["model"]["norm.weight"])
    loss = last["state"]["curve"][-1]["val_loss"]
    assert evaluate_checkpoint(tmp_path / "a" / "last.pt").metrics["val_loss"] == pytest.approx(loss)
    judged = load_result(read_result(tmp_path / "a")).work.module
    assert_equal_weights(judged.state_dict(), last["model"])


def test_a_cooldown_is_more_epochs_at_the_last_rate(tmp_path):
    heard = []
    result = json.loads(train(replace(TINY, cooldown_epochs=2), tmp_path / "a", report=heard.append).read_text())
    assert result["steps"] == 8
    assert [row["lr"] for row in result["curve"]][2:] == [TINY.min_lr] * 2
    assert heard[-1].epoch == heard[-1].epochs == 4


def test_clipping_bounds_the_gradient(tmp_path):
    run = TrainingRun(replace(TINY, clip_grad=1e-3), tmp_path, launch(TINY))
    seen = []
    run.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.nn.utils.get_total_norm([p.grad for p in run.module.parameters()]).item())
    )
    run.fit(lambda _: None)
    assert max(seen) <= 1e-3 * (1 + 1e-4)


def test_tables_and_pe_norms_do_not_decay(tmp_path):
    run = TrainingRun(TINY, tmp_path, launch(TINY))
    named = {parameter: name for name, parameter in run.module.named_parameters()}
    decayed = {named[p] for group in run.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert "blocks.0.attn.qkv.weight" in decayed
    assert not {name for name in decayed if "pe_norm" in name or "pos_embed" in name or "cls_token" in name}


def test_what_is_named_decays_all_the_same(tmp_path):
    asked = replace(TINY, also_decay=("pos_embed", "cls_token"))
    tables = {"lape": {"pos_embed"}, "unshared": {"blocks.0.pos_embed", "blocks.1.pos_embed"}}
    for join, layer_decay in (("lape", None), ("lape", 0.9), ("unshared", None)):
        run = TrainingRun(replace(asked, join=join, layer_decay=layer_decay), tmp_path, launch(TINY))
        named = {parameter: name for name, parameter in run.module.named_parameters()}
        decay = {named[p]: group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
        assert {decay[name] for name in {"cls_token", *tables[join]}} == {0.3}
        assert decay["norm.weight"] == decay["head.bias"] == 0
    for part in ("pos_embedd", "bias", "reg_token"):
        with pytest.raises(UsageError, match=f"'{part}' is in none of cls_token, pos_embed"):
            train(replace(TINY, also_decay=(part,)), tmp_path / "a")


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train_and_are_judged(tmp_path, precision):
    result = json.loads(train(replace(TINY, precision=precision, clip_grad=1.0), tmp_path / "a").read_text())
    assert result["curve"][-1]["train_loss"] < result["curve"][0]["train_loss"] + 0.1
    judged = evaluate_checkpoint(tmp_path / "a" / "last.pt")
    assert judged.metrics["val_accuracy"] == pytest.approx(result["final"]["val_accuracy"], abs=0.4)


@pytest.mark.parametrize(
    "changed", [{"grad_checkpointing": True}, {"optimizer": "sgd", "lr": 0.1}, {"layer_decay": 0.8}]
)
def test_other_ways_to_train(tmp_path, changed):
    result = json.loads(train(replace(TINY, **changed), tmp_path / "a").read_text())
    assert math.isfinite(result["final"]["val_loss"])


# Bad input


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"join": "lapee"}, "'lape'"),
        ({"pe": "learnabel"}, "'learnable'"),
        ({"model": "vit_nano_patch2_9"}, "'vit_nano_patch2_8'"),
        ({"data": "digit"}, "'digits'"),
        ({"optimizer": "adamx"}, "is not an optimiser of timm's"),
        ({"schedule": "cosin"}, "'cosine'"),
        ({"img_size": 9}, r"patches of 2x2, which do not divide 9x9 images of digits\. Give --img_size"),
        ({"model": "vit_tiny_patch16_224", "model_args": {}}, "patches of 16x16, which do not divide 8x8"),
        ({"model_args": {"dept": 3}}, r"does not take these options: .*'dept'"),
        ({"model_args": {"norm_layer": "none"}}, "does not take these options"),
        ({"model_args": {"num_classes": 5}}, r"model_args says num_classes 5, which the set says: leave it out"),
        ({"model_args": {"in_chans": 3}}, r"model_args says in_chans 3, which the set says: leave it out"),
        ({"model_args": {"img_size": 16}}, r"model_args says img_size 16, which --img_size says"),
        ({"model_args": {"drop_path_rate": 0.5}}, r"model_args says drop_path_rate 0\.5, which --drop_path says"),
        ({"model_args": {"join": "default"}}, r"model_args says join default, which --join says"),
        ({"model_args": {"features_only": True}}, "is no classifier of 10 classes"),
        ({"model_args": {"norm_layer": "batchnorm2d"}}, "is no classifier of 10 classes: .* answers expected 4D input"),
        ({"model_args": {"global_pool": ""}}, r"is no classifier of 10 classes: .* answers \(1, 17, 10\)"),
        ({"auto_augment": "xyz"}, r"auto_augment 'xyz' is no policy of timm's \(Unknown AA policy xyz\)"),
        ({"auto_augment": "rand-m-5"}, "auto_augment 'rand-m-5' is no policy of timm's"),
        ({"remode": "noise"}, "'noise' is not a filling"),
        ({"interpolation": "cubic"}, "'cubic' is not an interpolation.*'bicubic'"),
        ({"batch_size": 399, "accumulate": 2}, "must divide"),
        ({"batch_size": 401, "mixup": 0.8}, "401 is odd"),
        ({"warmup_epochs": 3.0}, "it is 3 of 2 epochs: lower warmup_epochs"),
        ({"precision": "15"}, "'15' is not a precision"),
        ({"precision": "32-true+16-mixed"}, "is not a precision"),
        ({"remode": "const:x"}, "'const:x' is not a filling"),
        ({"precision": "transformer-engine"}, "Fabric does not take .*not met"),
        ({"accelerator": "abacus"}, "Fabric does not take"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_a_folder_is_made(tmp_path, changed, told):
    with pytest.raises(UsageError, match=told):
        train(replace(TINY, **changed), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("name", "value"), [("epochs", 0), ("batch_size", 0), ("workers", -1), ("lr", -1.0)])
def test_numbers_below_their_least_are_refused(name, value):
    with pytest.raises(UsageError, match=f"{name} must be at least"):
        replace(TINY, **{name: value})


def test_what_decays_all_the_same_is_named_by_whole_parts_of_names() -> None:
    layers = torch.nn.ModuleDict({name: torch.nn.LayerNorm(2) for name in ("spm", "spms")})
    groups = optimizer_of(replace(TINY, also_decay=("spm",), weight_decay=0.5), layers).param_groups
    (decaying,) = (group["params"] for group in groups if group["weight_decay"])
    assert len(decaying) == 1
    assert decaying[0] is layers["spm"].weight


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("steps", 1), ("cooldown_epochs", 0), ("warmup_steps", 0), ("validate_every", 1), ("accumulate", 1),
        ("lr_batch", 1), ("lr_lag", 0), ("mix_epochs", 1), ("repeats", 1), ("devices", 1), ("nodes", 1),
        ("img_size", 1), ("short_side", 1), ("long_side", 1), ("zoom", 1), ("zoom_crop", 1), ("crop", 1), ("stride", 1),
    ],
)  # fmt: skip
def test_every_one_of_several_numbers_is_at_least_what_means_something(name: str, least: int) -> None:
    several = name in ("short_side", "zoom", "zoom_crop")
    replace(TINY, **{name: (least, least) if several else least})
    with pytest.raises(UsageError, match=f"{name} must be at least {least}, not {least - 1}"):
        replace(TINY, **{name: (least, least - 1) if several else least - 1})


@pytest.mark.parametrize(
    ("names", "allowed", "refused", "told"),
    [
        ("shift mixup cutmix color_jitter weight_decay min_lr warmup_lr", 0.0, -0.1, "at least 0, not -0.1"),
        ("hflip vflip reprob momentum ema smoothing drop_path", 0.0, -0.1, "at least 0, not -0.1"),
        ("hflip vflip reprob crop_pct class_cap layer_decay warmup_factor", 1.0, 1.1, "at most 1, not 1.1"),
        ("momentum ema smoothing drop_path", 0.9, 1.0, "below 1, not 1.0"),
        ("crop_pct class_cap clip_grad layer_decay decay_rate warmup_factor", 0.1, 0.0, "above 0, not 0.0"),
        ("scale ratio scale_jitter test_scales", (0.5, 1.0), (0.0, 1.0), "above 0, not 0.0"),
        ("betas", (0.0, 0.9), (-0.1, 0.9), "at least 0, not -0.1"),
        ("betas", (0.0, 0.9), (0.9, 1.0), "below 1, not 1.0"),
        ("checkpoint_seconds", 0.0, -1.0, "at least 0, not -1.0"),
    ],
)
def test_a_number_is_where_it_means_something(names: str, allowed: Any, refused: Any, told: str) -> None:
    """Beyond it is a traceback of another library, or worse a run that ends and means nothing."""
    for name in names.split():
        replace(TINY, **{name: allowed})
        with pytest.raises(UsageError, match=f"{name} must be {told}"):
            replace(TINY, **{name: refused})


@pytest.mark.parametrize("name", ["scale", "ratio", "zoom_crop", "scale_jitter"])
def test_a_range_is_from_the_smallest_to_the_largest(name: str) -> None:
    replace(TINY, **{name: (2, 2)})
    with pytest.raises(UsageError, match=f"{name} is a smallest and a largest value, not 3 and 2"):
        replace(TINY, **{name: (3, 2)})


def test_batchnorm_takes_its_statistics_over_all_processes_where_that_is_asked_for_and_can_be() -> None:
    asked, layers = replace(TINY, sync_batchnorm=True), torch.nn.Sequential(torch.nn.BatchNorm2d(2))

    def among(processes: int, device: str) -> Any:
        return SimpleNamespace(world_size=processes, device=torch.device(device))

    assert _synchronised(layers, TINY, among(2, "cuda")) is layers
    assert _synchronised(layers, asked, among(1, "cpu")) is layers
    with pytest.raises(UsageError, match="give --sync_batchnorm false"):
        _synchronised(layers, asked, among(2, "cpu"))
    assert isinstance(layers[0], torch.nn.BatchNorm2d)
    assert isinstance(_synchronised(layers, asked, among(2, "cuda"))[0], torch.nn.SyncBatchNorm)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    """The message names epoch, step, images and the last good checkpoint, which stays as it was."""
    whole = TrainingRun._step

    def break_step(self, step, batches, stop):
        if step == 3:
            with torch.no_grad():
                self.module.head.bias.fill_(math.nan)
        return whole(self, step, batches, stop)

    monkeypatch.setattr(TrainingRun, "_step", break_step)
    with pytest.raises(RunError) as caught:
        train(TINY, tmp_path / "a")
    listed = json.loads((tmp_path / "a" / "broken-batch.json").read_text())
    assert f"The loss is nan in epoch 2, step 4; the last good checkpoint is {tmp_path}/a/last.pt." in str(caught.value)
    assert ", ".join(listed["images"][:3]) in str(caught.value)
    assert (listed["epoch"], listed["step"], len(listed["images"])) == (2, 4, 400)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "a").values())
    assert checkpoints.read(tmp_path / "a" / "last.pt")["state"]["step"] == 2
    assert not (tmp_path / "a" / "result.json").exists()


def test_broken_weights_never_replace_good_ones(tmp_path, monkeypatch):
    """A gradient may overflow while the loss is still finite, in the last step before a checkpoint."""
    whole = TrainingRun._step

    def break_after(self, step, batches, stop):
        news = whole(self, step, batches, stop)
        if step == 3:
            with torch.no_grad():
                self.module.head.bias.fill_(math.inf)
        return news

    monkeypatch.setattr(TrainingRun, "_step", break_after)
    with pytest.raises(RunError, match="The weights are no longer finite in epoch 2, step 4"):
        train(TINY, tmp_path / "a")
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "a").values())


@pytest.mark.parametrize(("name", "time"), [("best.pt", 1), ("last.pt", 1), ("last.pt", 2), ("curve.csv", 3)])
def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path, monkeypatch, name, time):
    train(TINY, tmp_path / "whole")
    count = 0
    sync = os.fsync

    def full(descriptor):
        nonlocal count
        if name in writing.unfinished(Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent).values():
            count += 1
            if count == time:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=rf"a/{name} could not be written \(No space left on device\)"):
        train(TINY, tmp_path / "a")
    monkeypatch.undo()
    # What was there before is there, whole: an epoch is kept before it is validated, and again with its row.
    kept = {("best.pt", 1): 2, ("last.pt", 2): 2, ("curve.csv", 3): 4}
    if (name, time) in kept:
        assert checkpoints.read(tmp_path / "a" / "last.pt")["state"]["step"] == kept[name, time]
    assert not writing.unfinished(tmp_path / "a")
    train(TINY, tmp_path / "a", resume=True)
    assert_equal_weights(weights(tmp_path / "whole"), weights(tmp_path / "a"))


def test_a_disk_that_is_full_in_the_middle_of_a_write(tmp_path):
    """torch's writer turns the error of the file into others of its own. The kernel bounds files here."""
    path = tmp_path / "last.pt"
    checkpoints.save(path, {"experiment": {}, "set": {}, "model": {"a": torch.ones(3)}})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(RunError, match=r"File too large\); the one before it is whole"):
            checkpoints.save(path, {"experiment": {}, "set": {}, "model": {"a": torch.ones(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert torch.equal(checkpoints.read(path)["model"]["a"], torch.ones(3))


# Checkpoints of others


def test_a_folder_of_another_experiment_is_refused(finished):
    folder, _ = finished
    for resume in (False, True):
        with pytest.raises(UsageError, match=r"another experiment \(lr is 0\.01 there, 0\.5 here\)"):
            train(replace(TINY, lr=0.5), folder, resume=resume)


def test_a_used_folder_needs_resume(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(UsageError, match=r"holds a finished run of this experiment\. Add --resume"):
        train(TINY, folder)
    before = (folder / "result.json").stat().st_mtime_ns
    assert train(TINY, folder, resume=True) == folder / "result.json"
    assert (folder / "result.json").stat().st_mtime_ns == before
    writing.write_json(tmp_path / "experiment.json", TINY.settings())
    with pytest.raises(UsageError, match=r"holds an unfinished run"):
        train(TINY, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        train(TINY, tmp_path / "file")


def test_a_checkpoint_of_another_experiment_or_model_is_refused(finished, tmp_path):
    folder, _ = finished
    writing.write_json(tmp_path / "experiment.json", replace(TINY, seed=9).settings())
    (tmp_path / "last.pt").write_bytes((folder / "last.pt").read_bytes())
    with pytest.raises(UsageError, match=r"last\.pt belongs to another experiment \(seed is 0 there, 9 here\)"):
        train(replace(TINY, seed=9), tmp_path, resume=True)
    saved = checkpoints.read(folder / "last.pt")
    saved["model"]["head.weight"] = torch.zeros(5, 16)
    checkpoints.save(tmp_path / "best.pt", saved)
    with pytest.raises(
        RunError, match=r"best\.pt is of another model: head\.weight is \(5, 16\) in the file and \(10, 16\)"
    ):
        evaluate_checkpoint(tmp_path / "best.pt")


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_a_pickle_that_carries_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"experiment": {}, "model": Bomb()}, "bomb.pt")
    with pytest.raises(RunError, match=r"bomb\.pt holds more than tensors and plain values"):
        evaluate_checkpoint(Path("bomb.pt"))
    assert not Path("exploded").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02]q\x00.", None])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, finished, content):
    path = tmp_path / "x.pt"
    path.write_bytes((finished[0] / "last.pt").read_bytes()[:3000] if content is None else content)
    with pytest.raises(RunError, match=r"x\.pt (cannot be read as a checkpoint|is no checkpoint of a training run)"):
        evaluate_checkpoint(path)
    with pytest.raises(RunError, match=r"nowhere\.pt does not exist"):
        evaluate_checkpoint(tmp_path / "nowhere.pt")


def test_a_set_of_other_classes_is_refused(finished, tmp_path):
    for place in ("train/cat", "train/dog", "val/cat"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "0.png")
    with pytest.raises(UsageError, match=r"was trained to tell 10 classes \(0, 1, 2 \.\.\.\) apart"):
        evaluate_checkpoint(finished[0], data=str(tmp_path))

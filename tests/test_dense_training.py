"""Detection and segmentation from the command line to the result: training, resuming, judging, drawing, refusing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_sets import ade20k, coco
from PIL import Image

import lape
from lape import hosts
from lape.cli.command_line import main
from lape.data.sources import find_set
from lape.errors import RunError, UsageError
from lape.experiment import RANGES, Augmentation, Dense, Experiment
from lape.studies import results
from lape.tasks.work import describe_set, set_without_pictures, work_of
from lape.training import checkpoints
from lape.training.assembly import launch
from lape.training.evaluation import evaluate_checkpoint, load_run
from lape.training.interruption import Stopped
from lape.training.loop import Progress, train

PLAIN = {"accelerator": "cpu", "workers": 0, "weight_decay": 0.05, "warmup_epochs": 0.0, "drop_path": 0.0}
SMALL_PYRAMID = {"embed_dim": 24, "depth": 2, "num_heads": 2, "interactions": [[0, 0], [1, 1]], "deform_heads": 2}
DETECTOR = {**SMALL_PYRAMID, "windows": [3, None], "candidates": 50, "proposals": 20, "region_samples": 8}


def detection(root: Path, **changed: Any) -> Experiment:
    """Two steps of a small detector on four pictures."""
    settings: dict[str, Any] = {
        "data": str(coco(root)), "model": "mask_rcnn_vit_adapter_nano", "model_args": DETECTOR, "epochs": 1,
        "batch_size": 2, "short_side": (64,), "long_side": 96, "crop": 64, "zoom": (48,), "zoom_crop": (32, 40),
    }  # fmt: skip
    return Experiment(**PLAIN | settings | changed)


def segmentation(root: Path, **changed: Any) -> Experiment:
    """Two steps of a small Segmenter on four pictures."""
    settings: dict[str, Any] = {
        "data": "ade20k", "data_dir": ade20k(root), "model": "segmenter_nano_patch8", "epochs": 1, "batch_size": 2,
        "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 2}, "short_side": (64,), "crop": 64, "stride": 48,
    }  # fmt: skip
    return Experiment(**PLAIN | settings | changed)


KINDS = pytest.mark.parametrize("kind", [detection, segmentation])


def stopping_after(step: int) -> Callable[[Progress], None]:
    def report(now: Progress) -> None:
        if now.step >= step:
            raise Stopped(15, "stopped by the test")

    return report


# --- Training


@pytest.mark.parametrize(("kind", "steps", "lr", "score"), [(detection, 60, 2e-3, 40), (segmentation, 60, 3e-3, 60)])
def test_four_pictures_are_learnt_by_heart(kind: Any, steps: int, lr: float, score: float, tmp_path: Path) -> None:
    losses: list[float] = []
    experiment = kind(tmp_path / "set", steps=steps, lr=lr, batch_size=4, validate_every=steps, hflip=0.0)
    report = train(experiment, tmp_path / "run", report=lambda now: losses.append(now.train_loss))
    result = json.loads(report.read_text())
    assert result["curve"][-1]["train_loss"] < losses[1] / 1.5  # the mean over all steps, and the first
    assert result["final"][result["score"]] > score


@KINDS
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(kind: Any, tmp_path: Path) -> None:
    experiment = kind(tmp_path / "set", epochs=2, checkpoint_seconds=0.0)
    train(experiment, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(experiment, tmp_path / "cut", report=stopping_after(1))
    train(experiment, tmp_path / "cut", resume=True)
    whole, cut = (checkpoints.read(tmp_path / name / "last.pt")["model"] for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []


@KINDS
def test_a_checkpoint_is_judged_as_it_was_in_training(kind: Any, tmp_path: Path) -> None:
    train(kind(tmp_path / "set"), tmp_path / "run")
    final = json.loads((tmp_path / "run/result.json").read_text())["final"]
    judged = evaluate_checkpoint(tmp_path / "run/last.pt")
    assert {name: judged.metrics[name] for name in final} == pytest.approx(final)
    assert judged.images == 2


def test_several_scales_and_mirror_images_are_another_judgement(tmp_path: Path) -> None:
    train(segmentation(tmp_path / "set"), tmp_path / "run")
    plain, several = (
        evaluate_checkpoint(tmp_path / "run", test_scales=scales, test_flip=flip).metrics
        for scales, flip in (((1.0,), False), ((0.5, 1.0, 1.5), True))
    )
    assert plain != several


def test_validation_may_be_seldom_and_the_last_step_always_has_one(tmp_path: Path) -> None:
    experiment = segmentation(tmp_path / "set", epochs=5, validate_every=2)
    curve = json.loads(train(experiment, tmp_path / "run").read_text())["curve"]
    assert [(row["epoch"], row["step"]) for row in curve] == [(2, 4), (4, 8), (5, 10)]


def test_a_run_of_so_many_steps_may_end_within_an_epoch(tmp_path: Path) -> None:
    heard: list[Progress] = []
    experiment = segmentation(tmp_path / "set", steps=5, warmup_epochs=None, warmup_steps=2)
    result = json.loads(train(experiment, tmp_path / "run", report=heard.append).read_text())
    assert (result["steps"], result["curve"][-1]["step"], result["curve"][-1]["epoch"]) == (5, 5, 3)
    assert [row["step"] for row in result["curve"]] == [2, 4, 5]
    assert (heard[-1].epoch, heard[-1].epochs, heard[-1].step) == (3, 3, 5)


def test_two_processes_train_a_detector_some_of_whose_pictures_have_no_object(tmp_path: Path) -> None:
    """No parameter may be without a gradient in one process: the other would wait for it."""
    experiment = detection(tmp_path / "set")
    words = [
        "--model-args",
        json.dumps(DETECTOR),
        "--short_side",
        "64",
        "--crop",
        "40",
        "--zoom",
        "48",
        "--zoom_crop",
        "33,40",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = subprocess.run(
        [*launcher, "-m", "lape", "train", "--data", experiment.data, "--model", experiment.model, "--batch_size", "2",
         "--epochs", "3", "--accelerator", "cpu", "--workers", "0", "--out", str(tmp_path / "run"), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (tmp_path / "run/result.json").exists(), told.stderr


@KINDS
def test_it_starts_from_another_models_weights_and_says_what_did_not_match(
    kind: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    experiment = kind(tmp_path / "set")
    size = {
        "img_size": 128,
        "patch_size": 8,
        "embed_dim": experiment.model_args["embed_dim"],
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 4,
    }
    classifier: Any = lape.create_model("vit_nano_patch4_32", join="lape", num_classes=7, **size)
    torch.save(classifier.state_dict(), tmp_path / "vit.pt")
    train(replace(experiment, lr=0.0, min_lr=0.0, warmup_lr=0.0, weights=str(tmp_path / "vit.pt")), tmp_path / "run")
    weights = checkpoints.read(tmp_path / "run/last.pt")["model"]
    (loaded,) = (value for name, value in weights.items() if name.endswith("blocks.1.pe_norm.weight"))
    (projection,) = (
        value for name, value in weights.items() if name.endswith(".blocks.1.attn.qkv.weight") and "decoder" not in name
    )
    assert torch.equal(loaded, classifier.blocks[1].pe_norm.weight)
    assert torch.equal(projection, classifier.blocks[1].attn.qkv.weight)
    (told,) = (str(warning.message) for warning in recwarn if "vit.pt" in str(warning.message))
    assert "head" in told


def test_results_of_dense_recipes_stand_in_the_same_table(tmp_path: Path) -> None:
    experiment = replace(detection(tmp_path / "set"), recipe="coco/mask_rcnn_vit_adapter_tiny")
    train(experiment, tmp_path / "runs/a")
    rows = results.find_results([tmp_path / "runs"]).rows
    assert [(row.measure, row.expected, "weights" in row.changed) for row in rows] == [
        ("box AP", None, True),
        ("mask AP", None, True),
    ]


# --- From settings to what is done


def work(experiment: Experiment) -> Any:
    return work_of(experiment, find_set(experiment.data, experiment.data_dir))


JUDGED = {"short_side": (32, 48), "long_side": 100, "crop": 40, "stride": 24, "test_scales": (0.5, 1.0)}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("model", "own"),
    [  # sides are multiples of it, small pictures grow, weights of the outputs, unlabelled pixels count
        ("segmenter_nano_patch8", (1, True, (1.0,), False)),
        ("upernet_vit_adapter_nano", (32, False, (1.0, 0.4), True)),
    ],
)
def test_maps_are_judged_as_the_settings_and_the_model_say(model: str, own: Any, flip: bool, tmp_path: Path) -> None:
    experiment = segmentation(tmp_path, model=model, model_args={}, **JUDGED, test_flip=flip)
    task = work(experiment).task(launch(experiment))
    how = task.inference
    assert (how.window, how.stride, how.short_side, how.long_side) == (40, 24, 48, 100)
    assert (how.scales, how.flip) == ((0.5, 1.0), flip)
    assert (how.multiple, how.grow, task.weights, task.unlabelled_count) == own


def test_a_detector_sees_pictures_at_the_last_of_their_shorter_sides(tmp_path: Path) -> None:
    sizes = work(detection(tmp_path, short_side=(32, 48), long_side=100)).module.transform
    assert (sizes.min_size, sizes.max_size) == ((48,), 100)


@KINDS
@pytest.mark.parametrize(
    "asked",
    [{"join": "unshared"}, {"join": "default", "pe": "none"}, {"pe_norm": "identity"}, {"join": "default"}],
    ids=str,
)
def test_a_model_is_made_with_what_is_asked_of_it(kind: Any, asked: dict[str, Any], tmp_path: Path) -> None:
    experiment = kind(tmp_path, grad_checkpointing=True, drop_path=0.3, **asked)
    made = work(experiment)
    vit: Any = hosts.find(made.module)[0]
    assert vit.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert vit.grad_checkpointing
    options: Any = {"join": "lape", "num_classes": len(made.source.classes), **experiment.model_args, **asked}
    direct, usual = (
        {name: value.shape for name, value in lape.create_model(experiment.model, **each).state_dict().items()}
        for each in (options, options | {"join": "lape", "pe": None, "pe_norm": "layernorm"})
    )
    assert {name: value.shape for name, value in made.module.state_dict().items()} == direct != usual


FIRST = 0, torch.arange(4)  # of an epoch


@KINDS
def test_pictures_are_resized_cut_and_mirrored_as_is_asked_and_nothing_else_is_done(kind: Any, tmp_path: Path) -> None:
    """No zoom and a mirror image that never comes are asked for too: neither is the set's own."""
    plain = {"short_side": (30,), "long_side": 40, "crop": 30 if kind is segmentation else 40, "hflip": 0.0}
    plain |= {"zoom": ()} if kind is detection else {"scale_jitter": (1, 1), "class_cap": 1.0, "photometric": False}
    asked = kind(tmp_path, **plain)
    never, always = (work(replace(asked, hflip=chance)).training()[FIRST][0] for chance in (0.0, 1.0))
    assert {tuple(image.shape) for image in never} == {(3, 30, plain["crop"])}
    for image, mirrored in zip(never, always, strict=True):
        assert torch.equal(image.flip(2), mirrored)


@KINDS
def test_another_seed_is_another_augmentation_and_another_start(kind: Any, tmp_path: Path) -> None:
    experiment = kind(tmp_path)
    (one, again, other) = (work(replace(experiment, seed=seed)) for seed in (1, 1, 2))
    first, same, others = (
        torch.cat([image.flatten() for image in w.training()[FIRST][0]]) for w in (one, again, other)
    )
    assert torch.equal(first, same)
    assert first.shape != others.shape or not torch.equal(first, others)
    weights = [torch.cat([p.flatten() for p in w.module.parameters()]) for w in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_images_come_to_a_detector_between_0_and_1_and_to_a_segmenter_normalised(tmp_path: Path) -> None:
    whole = torch.tensor([0, 255], dtype=torch.uint8).expand(3, 1, 2)
    of_objects = work(detection(tmp_path / "a")).preparation(1, torch.device("cpu"))
    of_maps = work(segmentation(tmp_path / "b")).preparation(1, torch.device("cpu"))
    assert of_objects(([whole], None), 0)[0][0].tolist() == 3 * [[[0.0, 1.0]]]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    (seen,) = of_maps((whole[None], None), 0)[0]
    assert torch.allclose(seen[:, 0, 0], -mean / std, atol=1e-5)
    assert torch.allclose(seen[:, 0, 1], (1 - mean) / std, atol=1e-5)


def test_a_checkpoint_is_brought_back_with_its_settings_but_for_those_that_are_changed(tmp_path: Path) -> None:
    """False and 0 are values; None is none."""
    experiment = segmentation(tmp_path / "set", test_flip=True, test_scales=(1.0, 1.5), workers=1)
    train(experiment, tmp_path / "run")
    changed = {"test_flip": False, "workers": 0, "stride": 32, "test_scales": None}
    found = load_run(tmp_path / "run", lambda _, source: source, **changed)
    here = {"accelerator": "auto"}  # where the run was computed does not count
    assert found.experiment == replace(experiment, test_flip=False, workers=0, stride=32, **here)
    how: Any = found.task
    assert (how.inference.flip, how.inference.stride, how.inference.scales) == (False, 32, (1.0, 1.5))
    assert not found.work.module.training


def of_two_sizes(root: Path) -> None:
    for file in [*root.rglob("val*/1.jpg"), *root.rglob("annotations/validation/1.png")]:
        with Image.open(file) as picture:
            turned = picture.transpose(Image.Transpose.ROTATE_90)
        turned.save(file)
    for file in root.rglob("annotations/instances_val2017.json"):
        content = json.loads(file.read_text())
        content["images"][1] |= {"width": 60, "height": 80}
        file.write_text(json.dumps(content))


@KINDS
def test_pictures_that_are_validated_may_be_of_many_sizes_in_training_and_afterwards(kind: Any, tmp_path: Path) -> None:
    experiment = kind(tmp_path / "set", lr=0.0, min_lr=0.0, warmup_lr=0.0)
    of_two_sizes(tmp_path / "set")
    final = json.loads(train(experiment, tmp_path / "run").read_text())["final"]
    judged = evaluate_checkpoint(tmp_path / "run")
    assert judged.checkpoint == tmp_path / "run/best.pt"
    assert {name: judged.metrics[name] for name in final} == pytest.approx(final)


def test_as_many_classes_of_other_names_are_refused(tmp_path: Path) -> None:
    train(detection(tmp_path / "set"), tmp_path / "run")
    for file in coco(tmp_path / "other").glob("annotations/*.json"):
        file.write_text(file.read_text().replace('"blue"', '"green"'))
    with pytest.raises(UsageError, match=r"2 classes \(red, blue .*, and other has 2 classes \(red, green"):
        evaluate_checkpoint(tmp_path / "run", data=str(tmp_path / "other"))


@KINDS
def test_a_set_is_told_without_its_pictures(kind: Any, tmp_path: Path) -> None:
    source = work(kind(tmp_path)).source
    told = json.loads(json.dumps(describe_set(source)))
    assert set_without_pictures(describe_set(source)) == replace(source, train=(), validation=())
    assert not {"train", "validation"} & told.keys()


@KINDS
def test_files_are_looked_at_once_before_the_first_step_and_not_when_a_run_goes_on(kind: Any, tmp_path: Path) -> None:
    experiment, heard = kind(tmp_path / "set", checkpoint_seconds=0.0), list[float]()
    with pytest.raises(Stopped):
        train(experiment, tmp_path / "run", report=stopping_after(1), checked=heard.append)
    assert heard == pytest.approx([count / 6 for count in range(1, 7)])
    train(experiment, tmp_path / "run", resume=True, checked=heard.append)
    assert len(heard) == 6


# --- From the command line


def test_predictions_are_drawn_on_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(segmentation(tmp_path / "set"), tmp_path / "map")
    train(detection(tmp_path / "objects"), tmp_path / "boxes")
    train(
        Experiment(
            epochs=1, batch_size=400, model_args={"depth": 1, "embed_dim": 8, "num_heads": 1}, accelerator="cpu"
        ),
        tmp_path / "digit",
    )
    picture = tmp_path / "pictures/one.png"
    picture.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)).save(picture)
    for run in ("map", "boxes", "digit"):
        words = [
            "predict",
            str(tmp_path / run),
            str(picture),
            str(picture.parent),
            "--out",
            str(tmp_path / "out" / run),
        ]
        assert main([*words, "--threshold", "0.0", "--accelerator", "cpu"]) == 0
        drawn = sorted((tmp_path / "out" / run).iterdir())
        assert [file.name for file in drawn] == ["1-one.png", "2-one.png"]
        with Image.open(drawn[0]) as image:
            assert image.width >= 320
            assert len(image.getcolors(1 << 20) or []) > 100
        assert f"{picture}: " in capsys.readouterr().out


def test_pictures_that_there_are_not_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(segmentation(tmp_path / "set"), tmp_path / "run")
    (tmp_path / "none").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    for given, status, says in (
        ("nowhere.png", 2, "There is no picture or folder"),
        ("none", 2, "holds no picture"),
        ("text.png", 1, "cannot be read as an image"),
    ):
        assert main(["predict", str(tmp_path / "run"), str(tmp_path / given), "--out", str(tmp_path / "out")]) == status
        assert says in capsys.readouterr().err


# --- What is refused before training starts


def truncated(root: Path) -> None:
    for file in root.rglob("3.jpg"):
        file.write_bytes(file.read_bytes()[:400])


def another_size(root: Path) -> None:
    for file in [*root.rglob("train2017/3.jpg"), *root.rglob("annotations/training/3.png")]:
        Image.new("L" if file.suffix == ".png" else "RGB", (70, 60)).save(file)


def missing(root: Path) -> None:
    for file in root.rglob("3.jpg"):
        file.unlink()


@KINDS
@pytest.mark.parametrize("fault", [truncated, another_size, missing])
def test_a_bad_file_is_named_before_the_first_step(kind: Any, fault: Any, tmp_path: Path) -> None:
    experiment = kind(tmp_path / "set")
    fault(tmp_path / "set")
    heard: list[Progress] = []
    with pytest.raises((RunError, UsageError), match=r"3\.(jpg|png)"):
        train(experiment, tmp_path / "run", report=heard.append)
    assert heard == []
    assert not (tmp_path / "run/last.pt").exists()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": "segmenter_nano_patch8", "model_args": {}}, "is no detector"),
        ({"model": "vit_nano_patch2_8", "model_args": {}}, "is no detector"),
        ({"class_cap": 0.5}, "class_cap 0.5 means nothing"),
        ({"mixup": 0.8}, "mixup 0.8 means nothing"),
        ({"img_size": 64}, "img_size 64 means nothing"),
        ({"precision": "bf16-true"}, "would round boxes"),
        ({"zoom_crop": (40, 32)}, "swap them"),
        ({"short_side": (0,)}, "short_side must be at least 1, not 0"),
        ({"model_args": {"min_size": 3}}, "model_args says min_size 3, which --short_side says"),
        ({"model_args": {"img_size": 3}}, r"its table is for less than one\. Give an img_size of at least"),
    ],
    ids=str,
)
def test_what_does_not_go_with_detection_is_refused(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        train(replace(detection(tmp_path / "set"), **changed), tmp_path / "run")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"model": "mask_rcnn_vit_adapter_nano", "model_args": {}}, "does not tell the class of a pixel"),
        ({"zoom": (10,)}, "zoom .* means nothing"),
        ({"model_args": {"img_size": 3}}, r"its table is for less than one\. Give an img_size of at least"),
        ({"stride": 65}, "stride is at least 1 and at most the side of a window, 64"),
        ({"teacher": "resnet10t"}, "teacher resnet10t means nothing"),
    ],
    ids=str,
)
def test_what_does_not_go_with_segmentation_is_refused(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        train(replace(segmentation(tmp_path / "set"), **changed), tmp_path / "run")


MEANT = {
    detection: {"hflip", "short_side", "long_side", "zoom", "zoom_crop", "crop"},
    segmentation: {
        "hflip", "short_side", "long_side", "crop", "scale_jitter", "class_cap", "photometric", "stride",
        "test_scales", "test_flip",
    },
}  # fmt: skip


@KINDS
def test_every_setting_of_pictures_is_taken_or_refused(kind: Any, tmp_path: Path) -> None:
    experiment = kind(tmp_path)
    source: Any = find_set(experiment.data, experiment.data_dir)
    for part, own in ((Augmentation, source.augmentation), (Dense, source.dense)):
        for name in (field.name for field in fields(part)):
            value = getattr(own, name) or ((1, 2) if name in RANGES else 0.5 if name == "smoothing" else 1)
            asked = replace(experiment, **{name: value})
            if name in MEANT[kind]:
                made: Any = work_of(asked, source)
                assert getattr(made.augmentation if part is Augmentation else made.dense, name) == value
            else:
                with pytest.raises(UsageError, match=f"{name} .* means nothing for the pictures of"):
                    work_of(asked, source)


def test_a_classifier_and_a_dense_setting_are_refused_for_each_others_sets(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has a class for each image"):
        train(Experiment(model="segmenter_nano_patch8"), tmp_path / "run")
    with pytest.raises(UsageError, match="train_images 3 means nothing for"):
        train(Experiment(data="shapes-segmentation", model="segmenter_nano_patch8", train_images=3), tmp_path / "run")
    with pytest.raises(UsageError, match=r"class_cap 0\.5 means nothing for"):
        train(Experiment(class_cap=0.5), tmp_path / "run")

"""Laws of a folder of one's own pictures: how it is divided, what is told of it, and what a run keeps of that."""

import contextlib
import json
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from lape import fetching
from lape.cli import command_line as cli
from lape.data.files import unreadable
from lape.data.pipeline import Order, training_images
from lape.data.sources import find_set, set_of
from lape.errors import RunError, UsageError
from lape.experiment import Augmentation, Experiment
from lape.fetching import Wanted, refuse_unreachable, timm_weights
from lape.tasks.classification import Classification
from lape.tasks.work import describe_set, set_without_pictures, work_of
from lape.training import checkpoints
from lape.training.contents import contents
from lape.training.evaluation import evaluate_checkpoint
from lape.training.loop import TrainingRun, train

SIZES = {"cat": 10, "dog": 5, "emu": 2}


def pictures(root: Path, **sizes: int) -> Path:
    """Class folders of small pictures."""
    random = np.random.default_rng(0)
    for name, count in sizes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return pictures(tmp_path / "photos", **SIZES)


def experiment(root: Path, **settings: object) -> Experiment:
    tiny = {"embed_dim": 8, "depth": 1, "num_heads": 2}
    common = {"model": "vit_nano_patch4_32", "model_args": tiny, "img_size": 16, "batch_size": 4, "epochs": 2}
    return Experiment(**{"data": str(root), **common, "accelerator": "cpu", "workers": 0, **settings})  # pyright: ignore


# How it is divided


def test_a_share_of_every_class_is_held_out_once_for_all_seeds(photos: Path) -> None:
    source = set_of(experiment(photos))
    assert source.counts() == {"cat": (8, 2), "dog": (4, 1), "emu": (1, 1)}
    names = [split.names() for split in (source.train, source.validation)]
    assert sorted([*names[0], *names[1]]) == sorted(path.relative_to(photos).as_posix() for path in photos.glob("*/*"))
    assert source.held_out == tuple(names[1])
    for split in (source.train, source.validation):
        assert [source.classes[label] for label in split.labels.tolist()] == [
            Path(n).parent.name for n in split.names()
        ]
    assert set_of(experiment(photos, seed=7)).held_out == source.held_out
    assert set_of(experiment(photos, split_seed=1)).held_out != source.held_out
    assert set_of(experiment(photos, val_split=0.5)).counts() == {"cat": (5, 5), "dog": (3, 2), "emu": (1, 1)}
    whole = find_set(str(photos))  # to be judged on as a whole
    assert len(whole.validation) == len(whole.train) == 17


def test_what_cannot_be_divided_is_refused(photos: Path, tmp_path: Path) -> None:
    (photos / "emu/0.png").unlink()
    with pytest.raises(UsageError, match="The class emu of photos has 1 image, and two or more are needed"):
        set_of(experiment(photos))
    with pytest.raises(
        UsageError, match=r"val_split 0\.3 is of a set that nobody has divided, and digits has pictures"
    ):
        set_of(Experiment(val_split=0.3))
    with pytest.raises(UsageError, match="val_split must be below 1, not 1"):
        Experiment(val_split=1.0)
    with pytest.raises(UsageError, match="has one class, cat, and a classifier tells two or more apart"):
        find_set(str(pictures(tmp_path / "one", cat=3)))
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"one folder per class in \S*none; there is none"):
        find_set(str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["valid", "val", "validation", "dev"])
def test_best_weights_are_chosen_on_validation_and_test_is_left_alone(tmp_path: Path, name: str) -> None:
    root = tmp_path / "photos"
    for part, count in (("train", 4), (name, 3), ("test", 2)):
        pictures(root / part, cat=count, dog=count)
    (root / "test/emu").mkdir()  # nobody looks there
    source = set_of(experiment(root))
    assert (source.train.names()[0], source.validation.names()[0]) == ("train/cat/0.png", f"{name}/cat/0.png")
    assert source.counts() == {"cat": (4, 3), "dog": (4, 3)}
    assert source.held_out is None
    (root / "test/emu").rmdir()
    held = source.on_split("test").validation
    assert (held.names()[0], held.labels.tolist()) == ("test/cat/0.png", [0, 0, 1, 1])
    assert source.on_split("val").validation is source.validation
    with pytest.raises(UsageError, match="is a class that"):
        replace(source, classes=("cat",)).on_split("test")
    pictures(root / ("val" if name == "valid" else "valid"), cat=1)
    with pytest.raises(UsageError, match="and one of them is for validation"):
        find_set(str(root))


def test_without_validation_images_a_share_is_held_out_of_training_and_never_of_test(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for part, count in (("train", 5), ("test", 50)):
        pictures(root / part, cat=count, dog=count)
    source = set_of(experiment(root))
    assert source.counts() == {"cat": (4, 1), "dog": (4, 1)}
    assert all(name.startswith("train/") for name in source.held_out or ())
    shutil.rmtree(root / "test")
    with pytest.raises(UsageError, match=r"photos has no split test that models are judged on, only train, val "):
        source.on_split("test")


@pytest.mark.parametrize("name", ["test", "Test", "valid", "training", "Train"])
def test_a_part_of_a_set_is_never_taken_for_a_class(photos: Path, name: str) -> None:
    (photos / name).mkdir()
    with pytest.raises(UsageError, match=rf"{name} is called as a part of a set"):
        find_set(str(photos))


# What is told of it


def test_what_is_left_out_is_told_by_its_kind(photos: Path) -> None:
    for name in (
        *("cat/a.heic", "dog/b.HEIC", "cat/c.gif", "cat/._0.png", "cat/.DS_Store", "loose.jpg", "notes.txt"),
        *("cat/.ipynb_checkpoints/0-checkpoint.png", "__MACOSX/cat/._0.png", ".ipynb_checkpoints/x.png"),
    ):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).touch()
    source = find_set(str(photos))
    assert source.classes == tuple(SIZES)
    assert len(source.train) == 17
    (remark,) = source.train.remarks
    assert f"{photos} leaves out 8 files that are not read: " in remark
    kinds = ("2 .heic", "1 .gif", "1 ._* of macOS", "2 in .ipynb_checkpoints", "1 in __MACOSX")
    assert all(f"{kind} ({photos}" in remark for kind in kinds)
    assert remark.endswith("1 more kind. Save those that are pictures as JPEG or PNG.")
    divided = set_of(experiment(photos))
    assert (divided.train.remarks, divided.validation.remarks) == ((remark,), ())
    (photos / "cat").rename(photos.parent / "cat")
    (photos / "cat").mkdir()
    (photos / "cat/a.heic").touch()
    with pytest.raises(UsageError, match=r"photos/cat holds no image \(.*\) but 1 \.heic\. Put some there"):
        find_set(str(photos))


def test_remarks_are_no_part_of_what_is_in_a_set(photos: Path) -> None:
    before = contents(set_of(experiment(photos)))
    (photos / "cat/a.heic").touch()
    assert contents(set_of(experiment(photos))) == before


def test_files_that_cannot_be_read_are_found_before_the_first_step(photos: Path, tmp_path: Path) -> None:
    broken = [photos / "cat/3.png", photos / "dog/1.png"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    shares: list[float] = []
    faults = unreadable(set_of(experiment(photos)), shares.append)
    assert sorted(faults) == ["cat/3.png", "dog/1.png"]
    assert (shares[-1], len(shares)) == (1.0, 17)
    told = r"cat/3\.png cannot be read as an image .*\(2 of the 17 images of photos cannot be read; --skip_unreadable"
    with pytest.raises(RunError, match=told):
        train(experiment(photos), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(experiment(photos, skip_unreadable=True), tmp_path / "run")
    assert [str(path) in str(warning.message) for path, warning in zip(broken, said, strict=False)] == [True, True]
    kept = json.loads((tmp_path / "run/start.json").read_text())
    assert sorted(kept["left_out"]) == ["cat/3.png", "dog/1.png"]
    counts = kept["resolved"]["classes"].values()
    assert sum(number for both in counts for number in both.values()) == 15
    assert evaluate_checkpoint(tmp_path / "run").images == sum(both["validation"] for both in counts)
    for number in range(2):
        (photos / f"emu/{number}.png").write_bytes(b"")
    with pytest.raises(RunError, match="The class emu of photos has no training image that can be read"):
        train(experiment(photos, skip_unreadable=True), tmp_path / "other")


def test_pictures_are_seen_upright_and_where_that_is_asked_for_in_the_models_colours(photos: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)).save(photos / "cat/00.png", exif=exif)
    source = set_of(experiment(photos))
    (split,) = (part for part in (source.train, source.validation) if "cat/00.png" in part.names())
    assert split.picture(split.names().index("cat/00.png"), 3).size == (2, 3)
    plain = work_of(experiment(photos), source).source
    work = work_of(experiment(photos, normalisation="model"), source)
    assert plain.mean == (0.485, 0.456, 0.406)
    assert (work.source.mean, work.source.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(UsageError, match="normalisation model has 3 colours, and the images of digits have 1"):
        work_of(replace(experiment(photos), data="digits", img_size=8, normalisation="model"), find_set("digits"))


# What a run keeps


def test_a_run_that_goes_on_or_is_judged_has_the_same_images_whatever_draws_them(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = experiment(photos, checkpoint_seconds=0.0, hflip=0.5, balance="sampling", train_images=9)
    train(asked, tmp_path / "whole")

    class Cut(BaseException):
        """Stands for the end of a process."""

    save = TrainingRun._save

    def cut(self: TrainingRun) -> None:
        save(self)
        if self.state.step == 4:  # within an epoch
            raise Cut

    monkeypatch.setattr(sys, "argv", ["lape", "train", "--data", "photos"])
    monkeypatch.setattr(TrainingRun, "_save", cut)
    with pytest.raises(Cut):
        train(asked, tmp_path / "cut")
    monkeypatch.setattr(TrainingRun, "_save", save)
    monkeypatch.setattr("lape.data.classes.ImageSource.divided", lambda *_: pytest.fail("drawn again"))
    monkeypatch.setattr(sys, "argv", ["lape", "train", "--resume"])
    train(asked, tmp_path / "cut", resume=True)
    one, other = (checkpoints.read(tmp_path / name / "last.pt") for name in ("whole", "cut"))
    assert one["set"] == other["set"]
    assert len(one["set"]["held_out"]) == 4
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    result = json.loads((tmp_path / "cut/result.json").read_text())
    assert result["command"] == "lape train --data photos"
    resolved = result["resolved"]
    assert resolved["image_size"] == [16, 16]
    assert resolved["augmentation"]["hflip"] == 0.5
    assert resolved["warmup_steps"] == pytest.approx(0.1 * result["steps"])
    assert {name: both["validation"] for name, both in resolved["classes"].items()} == {"cat": 2, "dog": 1, "emu": 1}
    assert evaluate_checkpoint(tmp_path / "cut").images == 4
    (photos / one["set"]["held_out"][0]).unlink()
    with pytest.raises(RunError, match="1 of the 4 images that the run held out for validation are not in photos"):
        evaluate_checkpoint(tmp_path / "cut")


def test_a_set_is_divided_as_a_run_tells_though_it_has_grown(photos: Path) -> None:
    first = set_of(experiment(photos))
    stored = set_without_pictures(json.loads(json.dumps(describe_set(first)), object_hook=_with_tuples))
    assert stored.held_out == first.held_out
    Image.new("RGB", (16, 16)).save(photos / "cat/00.png")
    again = set_of(experiment(photos), stored=stored)
    assert again.validation.names() == first.validation.names()
    assert len(again.train) == len(first.train) + 1
    with pytest.raises(RunError, match="photos came with images for validation when the run was trained, and does not"):
        set_of(experiment(photos), stored=replace(stored, held_out=None))


def _with_tuples(facts: dict[str, object]) -> dict[str, object]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}


# Classes of different size


def test_sampling_shows_every_class_as_often_and_each_image_almost(photos: Path) -> None:
    source = set_of(experiment(photos, val_split=0.1))
    assert source.counts() == {"cat": (9, 1), "dog": (4, 1), "emu": (1, 1)}
    evened = source.evened()
    assert torch.bincount(evened.train.labels).tolist() == [9, 9, 9]
    names = evened.train.names()
    assert sorted(names.count(name) for name in {*names} if name.startswith("dog")) == [2, 2, 2, 3]
    made, _ = training_images(evened, Augmentation(), (16, 16), 0)[0, Order(0, 27, 27).epoch(0).flatten()]
    assert len(made.unique(dim=0)) > 14  # repetitions are augmented each by itself
    work = work_of(experiment(photos, balance="sampling"), source)
    assert len(work.source.train) == 27
    assert work.resolved()["classes"]["emu"] == {"train": 1, "validation": 1}


def test_weights_let_every_class_weigh_the_same(photos: Path) -> None:
    source = set_of(experiment(photos, val_split=0.1))
    work = work_of(experiment(photos, balance="weights"), source)
    weights = work._weights(torch.device("cpu"))  # pyright: ignore[reportAttributeAccessIssue]
    labels = source.train.labels
    totals = torch.zeros(3).index_add_(0, labels, weights[labels])
    torch.testing.assert_close(totals, torch.full((3,), 14 / 3))
    torch.manual_seed(0)
    logits, targets = torch.randn(14, 3), F.one_hot(labels, 3).float()
    expected = (F.cross_entropy(logits, labels, reduction="none") * weights[labels]).mean()
    torch.testing.assert_close(Classification(3, weights=weights).loss(lambda _: logits, targets, targets), expected)
    assert work_of(experiment(photos), source)._weights(torch.device("cpu")) is None  # pyright: ignore
    with pytest.raises(UsageError, match=r"'weigths' is not a balance of classes\. Did you mean 'weights'"):
        work_of(experiment(photos, balance="weigths"), source)
    with pytest.raises(UsageError, match="balance weights means nothing for the pictures of shapes"):
        work_of(replace(Experiment(balance="weights", data="shapes"), model="x"), _Objects())


class _Objects:
    """Stands for a set of objects."""

    kind, name = "instances", "shapes"


# What is typed


def asked(*words: str) -> Experiment:
    return cli.parsed(list(words))[1]["experiment"]


def test_a_folder_of_classes_has_defaults_for_pictures(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    plain = asked("train", "--data", "photos/")
    assert (plain.recipe, plain.model, plain.img_size) == ("own-pictures/scratch", "deit_tiny_patch16_224", None)
    assert plain.layer_decay is None
    named = asked("train", "--data", "photos", "--weights", "timm/vit_small_patch16_224.augreg_in1k")
    assert (named.recipe, named.model) == ("own-pictures/finetune", "vit_small_patch16_224")
    assert (named.layer_decay, named.weight_decay, named.start, named.epochs) == (0.75, 0.05, "preserve", 30)
    Path("vit.safetensors").touch()
    filed = asked("train", "--data", "photos", "--weights", "vit.safetensors", "--join", "default", "--lr", "1e-3")
    assert (filed.model, filed.join, filed.start, filed.lr) == ("deit_tiny_patch16_224", "default", "fresh", 1e-3)
    mine = asked("compare", "--data", "photos", "--model", "vit_nano_patch4_32", "--recipe", "cifar10/vit_7_4_32")
    assert (mine.recipe, mine.model) == ("cifar10/vit_7_4_32", "vit_nano_patch4_32")
    kept = replace(mine, recipe=None, data="photos").settings()
    del kept["normalisation"]  # of a version that had no such setting
    Path("run").mkdir()
    Path("run/experiment.json").write_text(json.dumps(kept))
    again = asked("train", "--data", "photos", "--resume", "--out", "run")
    assert (again.recipe, again.normalisation, again.model) == (None, None, "vit_nano_patch4_32")
    assert [asked("train", *words).recipe for words in ((), ("--data", "digits"))] == [None, None]


def test_a_run_says_what_it_begins_with(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photos.parent)
    small = ["--model", "vit_nano_patch4_32", "--model_args", '{"embed_dim": 8, "depth": 1, "num_heads": 2}']
    words = [*small, "--epochs", "1", "--batch_size", "4", "--workers", "0", "--accelerator", "cpu"]
    assert cli.main(["train", "--data", "photos/", *words]) == 0
    out = capsys.readouterr().out
    assert "Data: photos, 3 classes; 13 for training and 4 for validation.\n" in out
    assert "Images (training+validation): cat 8+2, dog 4+1, emu 1+1.\n" in out
    assert "cat has 8.0 times the training images of emu. --balance weights or --balance sampling" in out
    assert "Held out for validation: 20% of each class, drawn by split_seed 0; start.json" in out
    assert "Model: vit_nano_patch4_32, images of 32x32, join lape" in out
    assert "recipe own-pictures/scratch; 3 steps of 4 images, 3 an epoch" in out
    assert "Augmentation: " in out
    assert Path("runs/photos/lape-learnable-seed0/result.json").exists()


# What is fetched


def stands_in(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Let the files of the Hub be asked for here."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    address = property(lambda self: f"http://127.0.0.1:{port}/{self.repository}/resolve/main/{self.names[0]}")
    monkeypatch.setattr(Wanted, "address", address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that takes a call and never answers, where the Hub would be."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        stands_in(monkeypatch, server.getsockname()[1])
        yield


@pytest.mark.usefixtures("silent")
def test_weights_that_cannot_be_fetched_are_told_at_once_with_the_file_and_its_place(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetching.SECONDS < 9
    monkeypatch.setattr(fetching, "SECONDS", 0.2)
    begun = time.monotonic()
    told = (
        r"timm's weights of deit_tiny_patch16_224 could not be downloaded \(.*\), and not found on this machine\. The "
        r"file wanted is \S*/timm/deit_tiny_patch16_224\.fb_in1k/resolve/main/model\.safetensors\. Fetch it where"
    )
    with pytest.raises(RunError, match=told):
        train(experiment(photos, weights="deit_tiny_patch16_224"), tmp_path / "run")
    assert time.monotonic() - begun < 5
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("silent")
def test_what_is_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = timm_weights("deit_tiny_patch16_224")
    assert wanted == Wanted("timm/deit_tiny_patch16_224.fb_in1k")
    assert timm_weights("vit_nano_patch4_32") is None
    monkeypatch.setattr(fetching, "SECONDS", 0.2)
    with pytest.raises(RunError, match="It could not be downloaded"):
        refuse_unreachable(wanted, "It", "its path")
    kept = tmp_path / "model.safetensors"
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(kept))
    refuse_unreachable(wanted, "It", "its path")


@pytest.mark.parametrize("status", [404, 503])
def test_who_refuses_a_file_is_there_and_who_fails_is_not(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        stands_in(monkeypatch, server.server_address[1])
        outcome = contextlib.nullcontext() if status == 404 else pytest.raises(RunError, match=r"downloaded \(.*503")
        with outcome:
            refuse_unreachable(Wanted("user/model"), "It", "its path")
        server.shutdown()

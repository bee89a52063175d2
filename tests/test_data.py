"""What a batch holds is a pure function of seed, epoch and index."""

import gzip
import os
import struct
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from torchvision.datasets.folder import pil_loader

from lape.data.classes import ImageSource, Split
from lape.data.pipeline import (
    InOrder,
    Order,
    Pictures,
    Shares,
    Shifted,
    augmentation,
    load,
    training_images,
    validation_images,
)
from lape.data.sources import find_set, set_of
from lape.errors import RunError, UsageError
from lape.experiment import Augmentation, Experiment

PHOTOGRAPHIC = Augmentation(
    scale=(0.5, 1.0), hflip=0.5, auto_augment="rand-m9-mstd0.5-inc1", reprob=0.5, color_jitter=0.3
)


@pytest.fixture(scope="module")
def digits():
    return find_set("digits")


def image_folder(root, classes=("cat", "dog"), train=4, val=2, held_out="val"):
    random = np.random.default_rng(0)
    for part, count in (("train", train), (held_out, val)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def test_some_images_are_the_same_ones_for_every_seed_and_keep_their_labels(tmp_path):
    root = image_folder(tmp_path, train=6)
    whole = find_set(str(root)).train
    few = [set_of(Experiment(data=str(root), train_images=5, seed=seed)).train for seed in (0, 1)]
    assert few[0].pictures == few[1].pictures
    assert len(set(few[0].pictures)) == len(few[0]) == 5
    assert set(few[0].labels.tolist()) == {0, 1}
    known = dict(zip(whole.pictures, whole.labels.tolist(), strict=True))
    assert [known[path] for path in few[0].pictures] == few[0].labels.tolist()
    digits, some = find_set("digits"), set_of(Experiment(data="digits", train_images=1000))
    assert some.train.pictures.shape == (1000, 1, 8, 8)
    assert some.validation.labels.equal(digits.validation.labels)
    places = [int((digits.train.pictures == one).all(dim=(1, 2, 3)).nonzero()[0]) for one in some.train.pictures[:50]]
    assert digits.train.labels[places].equal(some.train.labels[:50])
    with pytest.raises(UsageError, match="There are 1198 images for training, and train_images is 1199"):
        set_of(Experiment(data="digits", train_images=1199))


def whole_epoch(images, order, epoch=0, workers=0, process=0, first=None):
    start = epoch * order.steps if first is None else first
    return list(load(images, Shares(order, process, start, (epoch + 1) * order.steps), workers, pin=False))


# The order of samples


def test_an_epoch_shows_every_sample_once_but_what_is_left_over():
    shown = Order(seed=3, images=103, batch=10, parts=1).epoch(5).flatten()
    assert len(shown) == len(set(shown.tolist())) == 100


def test_epochs_and_seeds_differ_and_each_repeats_itself():
    orders = [Order(seed, 64, 8).epoch(epoch).flatten().tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == Order(0, 64, 8).epoch(0).flatten().tolist()


@pytest.mark.parametrize(("parts", "processes"), [(2, 1), (1, 2), (2, 2), (4, 2)])
def test_parts_and_processes_share_the_same_steps(parts, processes):
    one, many = Order(0, 100, 16), Order(0, 100, 16, parts, processes)
    for step, shared in zip(one.epoch(2), many.epoch(2), strict=True):
        assert step.flatten().tolist() == shared.transpose(1, 2).flatten().tolist()


@pytest.mark.parametrize("first", [0, 1, 6, 7, 13, 20])
def test_starting_anywhere_gives_the_rest_of_the_same_stream(first):
    order = Order(0, 50, 7, parts=1)  # 7 steps an epoch
    whole = list(Shares(order, 0, 0, 21))
    rest = list(Shares(order, 0, first, 21))
    assert [(epoch, indices.tolist()) for epoch, indices in rest] == [
        (epoch, indices.tolist()) for epoch, indices in whole[first:]
    ]
    assert [epoch for epoch, _ in whole] == [step // 7 for step in range(21)]


def test_a_batch_that_cannot_be_shared_or_filled_is_refused():
    with pytest.raises(UsageError, match=r"batch_size 10 must divide .* multiple of 4"):
        Order(0, 100, 10, parts=2, processes=2)
    with pytest.raises(UsageError, match=r"batch_size 10 is more than the 9 training images"):
        Order(0, 9, 10)
    with pytest.raises(UsageError, match=r"batch_size 300 is more than the 256 training images of an epoch"):
        Order(0, 400, 300, repeats=3)


@pytest.mark.parametrize(("count", "processes"), [(600, 1), (600, 2), (600, 4), (100, 1)])
def test_repeated_augmentation_shows_the_images_that_timms_sampler_does(monkeypatch, count, processes):
    order = Order(0, count, 16, processes=processes, repeats=3)
    numbers = order.epoch(2)
    permutation = Order(0, count, 1).epoch(2).flatten()
    monkeypatch.setattr("timm.data.distributed_sampler.torch.randperm", lambda *_, **__: permutation)
    assert order.steps == (512 if count >= 256 else count) // 16
    for process in range(processes):
        theirs = list(RepeatAugSampler(range(count), processes, process, num_repeats=3))
        ours = (numbers[:, :, process].flatten() % count).tolist()
        assert ours == theirs[: len(ours)]
        assert len(theirs) - len(ours) < 16


def test_the_copies_of_an_image_are_samples_of_their_own(digits):
    numbers = Order(0, 300, 16, repeats=3).epoch(0).flatten()
    assert len(numbers.unique()) == len(numbers)
    assert numbers.max() < 3 * 300
    for asked in (Augmentation(shift=2), PHOTOGRAPHIC, Augmentation(batched=True, scale=(0.5, 1.0))):
        images = training_images(digits, replace(asked, repeats=3), (8, 8), seed=0)
        copies, labels, *draws = images[0, 5 + torch.arange(3) * len(digits.train)]
        assert labels.unique().tolist() == [digits.train.labels[5]]
        assert len((draws[0] if draws else copies).unique(dim=0)) == 3


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_validation_counts_every_sample_once_over_all_processes(processes):
    seen = [i for p in range(processes) for _, part in InOrder(11, 4, p, processes) for i in part.tolist()]
    assert sorted(seen) == list(range(11))


# Augmentation


@pytest.mark.parametrize("asked", [Augmentation(shift=2, hflip=0.5, vflip=0.5), PHOTOGRAPHIC], ids=["batch", "single"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_depends_on_seed_epoch_and_index_alone(digits, asked, workers):
    images = training_images(digits, asked, (8, 8), seed=7)
    order = Order(7, 96, 32)
    alone = {i: images[1, torch.tensor([i])][0][0] for i in order.epoch(1).flatten().tolist()}
    torch.manual_seed(workers)  # whatever the generators were left at
    for half in (order, Order(7, 96, 32, parts=2)):
        for (pictures, labels), indices in zip(
            whole_epoch(images, half, 1, workers), half.epoch(1).flatten(0, 2), strict=True
        ):
            assert torch.equal(labels, digits.train.labels[indices])
            for picture, index in zip(pictures, indices.tolist(), strict=True):
                assert torch.equal(picture, alone[index])


@pytest.mark.parametrize("asked", [Augmentation(shift=2), PHOTOGRAPHIC], ids=["batch", "single"])
def test_another_epoch_or_seed_augments_otherwise(digits, asked):
    indices = torch.arange(32)
    made = [training_images(digits, asked, (8, 8), seed)[epoch, indices][0] for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_shifts_and_mirrors_are_what_they_are_called(digits):
    """Every made image is the original moved by up to two pixels, mirrored or not; all of these occur, evenly."""
    images = training_images(digits, Augmentation(shift=2, hflip=0.5), (8, 8), seed=0)
    assert isinstance(images, Shifted)
    original = digits.train.pictures[5].float() / 255
    counts = {}
    for epoch in range(600):
        made = (images[epoch, torch.tensor([5])][0][0] * digits.std[0] + digits.mean[0]).squeeze(0)
        found = [
            (mirror, down, right)
            for mirror in (False, True)
            for down in range(5)
            for right in range(5)
            if torch.allclose(
                made,
                torch.nn.functional.pad(original.flip(2) if mirror else original, 4 * [2])[
                    0, down : down + 8, right : right + 8
                ],
                atol=1e-6,
            )
        ]
        assert len(found) == 1
        counts[found[0]] = counts.get(found[0], 0) + 1
    assert len(counts) == 50
    assert 230 < sum(count for (mirror, _, _), count in counts.items() if mirror) < 370


def test_validation_is_the_images_as_they_are(digits):
    images = validation_images(digits, Augmentation(), (8, 8))
    made, labels = images[0, torch.arange(10)]
    expected = (digits.validation.pictures[:10].float() / 255 - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(made, expected)
    assert torch.equal(labels, digits.validation.labels[:10])


def test_both_ways_to_an_unaugmented_batch_agree(digits):
    """A set in memory and the same pictures sent through timm's transform one by one."""
    by_batch = validation_images(digits, Augmentation(), (8, 8))
    one_by_one = validation_images(digits, Augmentation(crop_pct=0.999), (8, 8))
    assert isinstance(one_by_one, Pictures)
    torch.testing.assert_close(by_batch[0, torch.arange(9)][0], one_by_one[0, torch.arange(9)][0])


def test_what_is_not_asked_for_is_the_sets_own(digits):
    assert augmentation(Augmentation(), digits).hflip == 0
    assert augmentation(Augmentation(hflip=0.3), digits).hflip == 0.3
    assert augmentation(Augmentation(), digits).shift == 0
    assert augmentation(Augmentation(scale=(0.8, 1.0)), digits).shift is None
    shifted = augmentation(Augmentation(shift=1), digits)
    assert (shifted.scale, shifted.ratio) == (None, None)  # a run would say that it crops
    with pytest.raises(UsageError, match="leave out shift or scale"):
        augmentation(Augmentation(shift=1, scale=(0.8, 1.0)), digits)


def test_an_interpolation_by_chance_is_bicubic_in_validation(tmp_path):
    source = find_set(str(image_folder(tmp_path)))
    chance, bicubic, bilinear = (
        validation_images(source, Augmentation(interpolation=name), (16, 16))[0, torch.arange(4)][0]
        for name in ("random", "bicubic", "bilinear")
    )
    assert torch.equal(chance, bicubic)
    assert not torch.equal(chance, bilinear)
    with pytest.raises(UsageError, match=r"batched augments images in memory, and those of .* are files: leave it out"):
        training_images(source, Augmentation(batched=True), (16, 16), 0)


def test_an_experiment_is_its_own_augmentation(digits):
    assert augmentation(Experiment(mixup=0.8), digits).mixup == 0.8


# Sources


def test_the_split_of_the_digits_is_stratified_and_disjoint(digits):
    assert (len(digits.train), len(digits.validation)) == (1198, 599)
    counts = [torch.bincount(part.labels, minlength=10) for part in (digits.train, digits.validation)]
    assert (counts[0] - 2 * counts[1]).abs().max() <= 2
    everything = torch.cat([digits.train.pictures, digits.validation.pictures]).flatten(1)
    assert len(everything) == 1797
    assert digits.train.pictures.dtype == torch.uint8
    assert digits.train.pictures.max() == 255
    scaled = digits.train.pictures / 255
    assert scaled.mean().item() == pytest.approx(digits.mean[0], abs=1e-3)
    assert scaled.std().item() == pytest.approx(digits.std[0], abs=1e-3)


def idx(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("below", [".", "FashionMNIST/raw"])
def test_fashion_mnist_from_a_folder(tmp_path, packed, below):
    random = np.random.default_rng(0)
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "train-images-idx3-ubyte": random.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(6, dtype=np.uint8),
        "t10k-images-idx3-ubyte": random.integers(0, 256, (4, 28, 28), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(4, dtype=np.uint8),
    }
    for name, array in arrays.items():
        content = idx(array)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    source = find_set("fashion-mnist", tmp_path)
    np.testing.assert_array_equal(source.train.pictures[:, 0], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(source.validation.labels, arrays["t10k-labels-idx1-ubyte"])
    assert source.classes[9] == "Ankle boot"

    broken = next(folder.glob("t10k-images*"))
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(RunError, match="t10k-images-idx3-ubyte cannot be read as an IDX file"):
        find_set("fashion-mnist", tmp_path)


@pytest.mark.parametrize(("name", "labels", "count"), [("cifar10", b"labels", 10), ("cifar100", b"fine_labels", 100)])
def test_cifar_from_files_in_its_layout(tmp_path, monkeypatch, name, labels, count):
    import pickle

    from torchvision.datasets import CIFAR10, CIFAR100

    reader = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / reader.base_folder
    folder.mkdir()
    for number, (file, _) in enumerate(reader.train_list + reader.test_list):
        pixels = np.full((2, 3072), number, np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": pixels, labels.decode(): [number % count, 1]}))
    names = [f"class {i}" for i in range(count)]
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: names}))
    source = find_set(name, tmp_path)
    assert source.train.pictures.shape == (2 * len(reader.train_list), 3, 32, 32)
    assert source.validation.pictures.unique().tolist() == [len(reader.train_list)]
    assert source.classes == tuple(names)


def test_a_set_that_cannot_be_downloaded_says_so(tmp_path, monkeypatch):
    def refuse(self):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", refuse)
    with pytest.raises(RunError, match=rf"{tmp_path} does not hold cifar10 whole.* \(no network\)\. Give --data_dir"):
        find_set("cifar10", tmp_path)


@pytest.mark.parametrize("held_out", ["val", "valid"])
def test_a_folder_of_classes(tmp_path, held_out):
    root = image_folder(tmp_path / "pets", held_out=held_out)
    (root / "train" / ".cache").mkdir()
    source = find_set(str(root))
    assert (source.name, source.classes, source.size) == ("pets", ("cat", "dog"), None)
    assert source.train.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert source.train.title(4).endswith("train/dog/0.png")
    assert source.validation.title(0).endswith(f"{held_out}/cat/0.png")
    images = training_images(source, Augmentation(), (16, 16), 0)
    assert images[0, torch.arange(3)][0].shape == (3, 3, 16, 16)
    assert validation_images(source, Augmentation(), (16, 16))[0, torch.arange(4)][0].shape == (4, 3, 16, 16)


def test_validation_labels_follow_the_training_classes(tmp_path):
    root = image_folder(tmp_path, classes=("ant", "bee", "cat"))
    for image in (root / "val" / "bee").iterdir():
        image.unlink()
    (root / "val" / "bee").rmdir()
    assert find_set(str(root)).validation.labels.tolist() == [0, 0, 2, 2]


def test_files_of_another_layout_beside_the_classes_make_no_set_of_objects(tmp_path):
    root = image_folder(tmp_path)
    (root / "annotations").mkdir()
    (root / "annotations" / "notes.json").write_text("{}")
    assert isinstance(find_set(str(root)), ImageSource)


def test_folders_that_cannot_be_used_are_refused_by_name(tmp_path):
    root = image_folder(tmp_path / "a")
    (root / "val" / "emu").mkdir()
    with pytest.raises(UsageError, match=r"val/emu is a class that .*train does not have"):
        find_set(str(root))
    (root / "val" / "emu").rename(root / "train" / "emu")
    with pytest.raises(UsageError, match=r"train/emu holds no image"):
        find_set(str(root))
    (tmp_path / "b" / "train").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"one folder per class in .*b/train"):
        find_set(str(tmp_path / "b"))
    image_folder(tmp_path / "b", held_out="other")
    (tmp_path / "b" / "val").mkdir()
    with pytest.raises(UsageError, match=r"one folder per class in .*b/val"):
        find_set(str(tmp_path / "b"))


def test_a_misspelt_set_and_a_missing_folder_are_refused():
    with pytest.raises(UsageError, match="'cifar100'"):
        find_set("cifar-100")
    with pytest.raises(UsageError, match="There is no folder no/such/place"):
        find_set("no/such/place")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_an_image_that_cannot_be_read_is_named(tmp_path, workers, content):
    root = image_folder(tmp_path)
    broken = root / "train" / "dog" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200] if content is None else content)
    images = training_images(find_set(str(root)), Augmentation(), (16, 16), 0)
    with pytest.raises(RunError, match=r"^\S*train/dog/2\.png cannot be read as an image \(.*Replace or remove it\.$"):
        whole_epoch(images, Order(0, 8, 4), workers=workers)


# What a file shows


def halves(left, right):
    """A picture of 32×16 in two colours, as an array."""
    return np.concatenate([np.tile(np.array(colour), (16, 16, 1)) for colour in (left, right)], axis=1)


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
COLOURS = Image.fromarray(halves(RED, BLUE).astype(np.uint8))
GREY = Image.fromarray(halves(60, 200)[..., 0].astype(np.uint8))
FILES = {  # a picture, how it is saved, and the two colours that are seen
    "RGB": (COLOURS, {}, RED, BLUE),
    "CMYK": (COLOURS.convert("CMYK"), {}, RED, BLUE),
    "grey": (GREY, {}, (60, 60, 60), (200, 200, 200)),
    "PNG called JPEG": (COLOURS, {"format": "PNG"}, RED, BLUE),
    "transparent palette": (COLOURS.quantize(2), {"format": "PNG", "transparency": 0}, RED, BLUE),
    "transparent": (Image.merge("RGBA", [*COLOURS.split(), GREY]), {"format": "PNG"}, RED, BLUE),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_any_kind_shows_what_the_recipes_saw(tmp_path, kind):
    """Bit for bit torchvision's loader of class folders, which differs only where EXIF says how a camera was held."""
    picture, options, *colours = FILES[kind]
    path = tmp_path / "n01440764_18.JPEG"
    picture.save(path, **({"format": "JPEG", "subsampling": 0} | options))
    seen = Split("a file", [path], torch.zeros(1)).picture(0, channels=3)
    assert seen.size == (32, 16)
    np.testing.assert_allclose(seen, halves(*colours), atol=3)
    np.testing.assert_array_equal(seen, pil_loader(path))


def test_a_photograph_cut_short_is_named(tmp_path):
    path = tmp_path / "n01440764_18.JPEG"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(RunError, match=r"^\S*n01440764_18\.JPEG cannot be read as an image \(.*truncated"):
        Split("a file", [path], torch.zeros(1)).picture(0, channels=3)


SIGNALS_WHILE_WORKERS_START = """
import os, signal, torch
from lape.data.pipeline import InOrder, load, validation_images
from lape.data.sources import find_set
from lape.experiment import Augmentation

heard = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: heard.append(number))

def send(threads):
    if os.getpid() != run:  # a worker does this after it has set its handlers, and before it leaves the group
        os.killpg(0, signal.SIGINT)
        os.killpg(0, signal.SIGTERM)

run, torch.set_num_threads = os.getpid(), send
source = find_set("digits")
images = validation_images(source, Augmentation(), source.size)
labels = [label for _, batch in load(images, InOrder(64, 16), workers=2, pin=False) for label in batch.tolist()]
assert labels == source.validation.labels[:64].tolist(), labels
assert set(heard) == {signal.SIGINT, signal.SIGTERM}, heard
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers here do not share what a test replaced")
def test_a_signal_to_the_group_while_workers_start_is_for_the_run_alone():
    ended = subprocess.run(
        [sys.executable, "-c", SIGNALS_WHILE_WORKERS_START],
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr

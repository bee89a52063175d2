"""What happens to a batch on its device: the order of augmenting, mixing, normalising and erasing."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import random_erasing
from timm.data.mixup import FastCollateMixup, Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy

from lape.data import pipeline
from lape.data.erasing import FILLINGS, Erasing
from lape.data.mixing import Mixing
from lape.data.pipeline import Normalise, Shifted, reseed
from lape.data.preparation import Preparation
from lape.data.sources import find_set
from lape.experiment import Augmentation
from lape.tasks.classification import LOSSES, Classification

MIXED = Augmentation(mixup=0.8, cutmix=1.0, smoothing=0.1, reprob=0.5)


@pytest.fixture(scope="module")
def digits():
    return find_set("digits")


@pytest.fixture
def whole(digits):
    """Images of whole colour values, and their labels."""
    return digits.train.pictures[:8].clone(), digits.train.labels[:8]


def prepared(digits, asked, batch, seed=0, epoch=0):
    chosen = pipeline.augmentation(asked, digits)
    preparation = Preparation(digits, chosen, (8, 8), share=len(batch[0]))
    reseed(seed)
    return preparation([tensor.clone() for tensor in batch], epoch)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_unmixed_the_loss_is_plain_cross_entropy(digits, whole, smoothing):
    images = Normalise(digits)(whole[0])
    torch.manual_seed(0)
    logits = torch.randn(8, 10)
    same, targets = prepared(digits, Augmentation(smoothing=smoothing), (images, whole[1]))
    assert torch.equal(same, images)
    loss = Classification(10).loss(lambda _: logits, images, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits, whole[1], label_smoothing=smoothing))


def test_binary_cross_entropy_is_timms_over_all_classes(digits, whole):
    images = Normalise(digits)(whole[0])
    mixed, targets = prepared(digits, replace(MIXED, smoothing=0.0), (images, whole[1]))
    torch.manual_seed(0)
    logits = torch.randn(8, 10)
    loss = Classification(10, LOSSES["binary-cross-entropy"]).loss(lambda _: logits, mixed, targets)
    torch.testing.assert_close(loss, BinaryCrossEntropy()(logits, targets))
    assert loss < 2 < Classification(10).loss(lambda _: logits, mixed, targets)


@pytest.mark.parametrize("seed", range(4))  # of mixup and of cutmix
def test_what_the_workers_finished_is_only_mixed(digits, whole, seed):
    images = Normalise(digits)(whole[0])
    made, targets = prepared(digits, MIXED, (images, whole[1]), seed)
    reseed(seed)
    expected = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)(images, whole[1])
    assert torch.equal(made, expected[0])
    assert torch.equal(targets, expected[1])


def erased(images, seed, mode="pixel", probability=0.5):
    """What the preparation erases after its draws for mixup and cutmix, by timm's own code for one image."""
    reseed(seed)
    Mixing(0.8, 1.0, None).shares(0, (8, 8))
    draws = np.random.random_sample((len(images), Erasing.columns))
    colours = FILLINGS[mode](images).expand_as(images)
    erase = RandomErasing(probability, mode=mode, device="cpu")
    made = []
    for image, colour, row in zip(images, colours, draws, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(random_erasing, "_get_pixels", lambda *_, **__: torch.full((), math.nan))
            feed(patch, row)
            where = erase(image.clone()).isnan()
        made.append(torch.where(where, colour, image))
    return torch.stack(made)


def feed(patch, row):
    """Let timm's erasing draw the numbers of a row."""
    whether, tries, lies = row[0], iter(row[1:21].reshape(2, 10).T.ravel()), iter(row[21:])
    source = SimpleNamespace(
        random=lambda: whether,
        uniform=lambda low, high: low + (high - low) * next(tries),
        randint=lambda low, high: low + int(next(lies) * (high - low + 1)),
    )
    patch.setattr(random_erasing, "random", source)


@pytest.mark.parametrize("seed", range(4))
def test_mixed_before_they_are_erased_images_are_those_of_timms_loader(digits, whole, seed):
    """Whole colour values are mixed and rounded, then normalised, then erased."""
    made, targets = prepared(digits, replace(MIXED, erase_after_mix=True), whole, seed)
    reseed(seed)
    collate = FastCollateMixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)
    mixed, expected = collate([(image.numpy(), int(label)) for image, label in zip(*whole, strict=True)])
    assert mixed.dtype == torch.uint8
    unerased = Normalise(digits)(mixed)
    assert torch.equal(made, erased(unerased, seed))
    assert torch.equal(targets, expected)
    assert not torch.equal(made, unerased)


@pytest.mark.parametrize("seed", range(4))
def test_erased_before_they_are_mixed(digits, whole, monkeypatch, seed):
    batch = (*whole, torch.rand(8, 3))
    monkeypatch.setattr("lape.data.batched.Augmenter", lambda *_: lambda images, draws: images.flip(3))
    made, _ = prepared(digits, replace(MIXED, batched=True), batch, seed)
    first = erased(Normalise(digits)(whole[0].flip(3)), seed)
    reseed(seed)
    assert torch.equal(made, Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)(first, whole[1])[0])


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (3, 40)], ids=str)
def test_what_is_erased_is_what_timm_erases_by_the_same_draws(size):
    """Each of its tries, also those that do not fit, and images for which none does."""
    reseed(0)
    draws = np.random.random_sample((500, Erasing.columns))
    rows, columns = Erasing(0.7, torch.zeros_like).marks(draws, size)
    erase = RandomErasing(0.7, device="cpu")
    counts = []
    for row, down, right in zip(draws, rows, columns, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            feed(patch, row)
            expected = erase(torch.ones(1, *size))[0].numpy() == 0
        assert (expected == down[:, None] & right).all()
        counts.append(int(expected.sum()))
    assert 0.2 < np.mean(np.equal(counts, 0)) < 0.8  # some are erased, and some are not
    assert len(set(counts)) > 10


def test_erased_images_follow_the_law():
    """How many are erased, how large and how slim, where; each by its own row of draws."""
    reseed(0)
    erasing, draws = Erasing(0.25, torch.zeros_like), np.random.random_sample((20_000, Erasing.columns))
    rows, columns = erasing.marks(draws, (32, 32))
    hit = rows.any(1)
    height, width = rows[hit].sum(1), columns[hit].sum(1)
    assert abs(hit.mean() - 0.25) < 4 * (0.25 * 0.75 / len(draws)) ** 0.5
    area, aspect = height * width / 1024, np.log(height / width)
    assert 0.01 < area.min() < 0.03
    assert 0.30 < area.max() < 0.36
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, rel=0.05)  # but for what is as high as the image
    assert np.abs(aspect).max() == pytest.approx(-math.log(0.3), abs=0.3)
    assert abs(aspect.mean()) < 0.03
    assert rows[hit].mean(0)[[0, 31]] == pytest.approx(rows[hit].mean(0)[[31, 0]], abs=0.02)
    few = erasing.marks(draws[7:9], (32, 32))
    assert all((part == whole[7:9]).all() for part, whole in zip(few, (rows, columns), strict=True))


@pytest.mark.parametrize(("mode", "colours"), [("const", 1), ("rand", 3), ("pixel", 3 * 64)])
def test_what_is_erased_becomes_nothing_a_colour_or_noise(mode, colours):
    images = torch.full((400, 3, 8, 8), 5.0)
    marks = torch.zeros(400, 8, dtype=torch.bool)
    marks[::2] = True
    torch.manual_seed(0)
    made = Erasing(1.0, FILLINGS[mode])(images, marks, marks)
    assert torch.equal(made[1::2], images[1::2])
    assert all(len(image.unique()) == colours for image in made[::2])
    if mode != "const":
        assert abs(made[::2].mean()) < 0.1
        assert made[::2].std() == pytest.approx(1, abs=0.05)


def test_compiled_it_is_one_graph_whatever_is_drawn(digits, whole, monkeypatch):
    """Mixup, cutmix and nothing of them; the numbers are those of before."""
    graphs, compiler = [], torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compiler(f, backend=lambda g, _: graphs.append(g) or g, **options)
    )
    chosen = pipeline.augmentation(replace(MIXED, erase_after_mix=True, mix_epochs=4), digits)
    made = {}
    for compile in (False, True):
        preparation = Preparation(digits, chosen, (8, 8), share=8, compile=compile)
        for seed in range(5):
            reseed(seed)
            made[compile, seed] = preparation(whole, epoch=seed)
    assert len(graphs) == 1
    for seed in range(5):
        assert all(map(torch.equal, made[False, seed], made[True, seed]))


def test_mixing_ends_and_smoothing_does_not(digits, whole):
    images = Normalise(digits)(whole[0])
    asked = replace(MIXED, mix_epochs=2)
    for epoch in (0, 1):
        assert not torch.equal(prepared(digits, asked, (images, whole[1]), epoch=epoch)[0], images)
    same, targets = prepared(digits, asked, (images, whole[1]), epoch=2)
    assert torch.equal(same, images)
    torch.testing.assert_close(targets, 0.9 * F.one_hot(whole[1], 10) + 0.01)


@pytest.mark.parametrize("asked", [
    Augmentation(erase_after_mix=True),
    Augmentation(scale=(0.999, 1.0), ratio=(1.0, 1.0), erase_after_mix=True),
    Augmentation(batched=True),
    Augmentation(scale=(0.999, 1.0), ratio=(1.0, 1.0), batched=True),
], ids=["in memory", "one by one", "batched", "batched crop"])  # fmt: skip
def test_every_way_to_an_unaugmented_batch_agrees(digits, asked):
    """The workers leave what the device goes on with."""
    images = pipeline.training_images(digits, asked, (8, 8), 0)
    batch = images[0, torch.arange(9)]
    assert batch[0].dtype == torch.uint8
    made, _ = prepared(digits, asked, batch)
    plain = pipeline.training_images(digits, Augmentation(), (8, 8), 0)[0, torch.arange(9)][0]
    torch.testing.assert_close(made, plain)


def test_erasing_after_mixing_leaves_images_in_memory_to_be_moved_at_once(digits):
    asked = Augmentation(shift=2, reprob=0.5)
    assert isinstance(pipeline.training_images(digits, replace(asked, erase_after_mix=True), (8, 8), 0), Shifted)
    assert not isinstance(pipeline.training_images(digits, asked, (8, 8), 0), Shifted)


def test_draws_on_the_way_to_the_device_are_below_one(digits):
    images = pipeline.training_images(digits, Augmentation(batched=True), (8, 8), 0)
    *_, draws = images[0, torch.arange(1000)]
    assert draws.dtype == torch.float32
    assert 0 <= draws.min() < draws.max() < 1
    assert np.unique(draws[:, 0]).size > 900


@pytest.mark.parametrize("batches", [1, 3, 8])
def test_some_batches_augmented_at_once_are_what_each_is_alone(digits, monkeypatch, batches):
    monkeypatch.setattr("lape.data.preparation.ROWS", 12)
    asked = Augmentation(batched=True, scale=(0.5, 1.0), auto_augment="rand-m9-mstd0.5-inc1", smoothing=0.1)
    chosen = pipeline.augmentation(asked, digits)
    stored = pipeline.training_images(digits, asked, (8, 8), seed=3)
    preparation = Preparation(digits, chosen, (8, 8), share=4)
    assert preparation.at_once == 3
    alone = [stored[0, torch.arange(4) + 4 * number] for number in range(batches)]
    moved = []
    together = list(preparation.ahead(iter(alone), lambda batch: moved.append(len(moved)) or batch))
    assert moved == list(range(batches))
    for batch, other in zip(alone, together, strict=True):
        for one, same in zip(preparation(batch, 0), preparation(other, 0), strict=True):
            assert torch.equal(one, same)

"""What happens to a batch on its device: the order of augmenting, mixing, normalising and erasing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data.mixup import FastCollateMixup, Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import BinaryCrossEntropy

from lape.data import pipeline
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


@pytest.mark.parametrize("seed", range(4))
def test_mixed_before_they_are_erased_images_are_those_of_timms_loader(digits, whole, seed):
    """Whole colour values are mixed and rounded, then normalised, then erased."""
    made, targets = prepared(digits, replace(MIXED, erase_after_mix=True), whole, seed)
    reseed(seed)
    collate = FastCollateMixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)
    mixed, expected = collate([(image.numpy(), int(label)) for image, label in zip(*whole, strict=True)])
    assert mixed.dtype == torch.uint8
    unerased = Normalise(digits)(mixed)
    assert torch.equal(made, RandomErasing(0.5, mode="pixel", device="cpu")(unerased.clone()))
    assert torch.equal(targets, expected)
    assert not torch.equal(made, unerased)


@pytest.mark.parametrize("seed", range(4))
def test_erased_before_they_are_mixed(digits, whole, monkeypatch, seed):
    batch = (*whole, torch.rand(8, 3))
    monkeypatch.setattr("lape.data.batched.Augmenter", lambda *_: lambda images, draws: images.flip(3))
    made, _ = prepared(digits, replace(MIXED, batched=True), batch, seed)
    reseed(seed)
    erased = RandomErasing(0.5, mode="pixel", device="cpu")(Normalise(digits)(whole[0].flip(3)))
    assert torch.equal(made, Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=10)(erased, whole[1])[0])


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

"""A batch becomes what timm and Pillow make of each image, and what an image becomes depends on its own draws alone."""

import math
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment, transforms
from timm.data.auto_augment import AugmentOp, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms.functional import hflip, vflip

from lape.data.batched import OPERATIONS, Augmenter, Drawn
from lape.data.pipeline import Posterize
from lape.errors import UsageError
from lape.experiment import Augmentation

POLICY = "rand-m9-mstd0.5-inc1"
CHOSEN = Augmentation(
    scale=(0.8, 1.0), ratio=(3 / 4, 4 / 3), hflip=0.5, vflip=0.2, interpolation="random", auto_augment=POLICY
)
MEAN = (0.49, 0.45, 0.41)
LEVELS = [(0.0, 1, 0), (0.31, 1, 0), (0.5, -1, 1), (0.9, 1, 1), (0.937, -1, 0), (1.0, 1, 1)]  # signs and filters
INEXACT = ("AutoContrast", "Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")


def photographs(count, size=(32, 32), channels=3):
    """Parts of photographs, and noise: uint8 (count, C, H, W)."""
    random = np.random.default_rng(0)
    scenes = [Image.fromarray(scene) for scene in load_sample_images().images]
    parts = []
    for number in range(count):
        scene = scenes[number % 2]
        side = int(random.integers(32, 300))
        left, top = (int(random.integers(length - side)) for length in scene.size)
        parts.append(np.asarray(scene.resize(size[::-1], box=(left, top, left + side, top + side))))
    parts[-1] = random.integers(0, 256, parts[0].shape, dtype=np.uint8)
    parts[-2] = np.full_like(parts[0], 77)
    return torch.from_numpy(np.stack(parts))[..., :channels].permute(0, 3, 1, 2).contiguous()


def picture(image):
    return Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())


def tensor(pictures):
    return torch.stack([torch.from_numpy(np.array(one)).view(*one.size[::-1], -1).permute(2, 0, 1) for one in pictures])


def draws(count, augmenter, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, augmenter.columns, generator=generator, dtype=torch.float64)


def fill(channels):
    return tuple(round(255 * value) for value in MEAN[:channels])


def mended(operation):
    if operation.name.startswith("Posterize"):
        operation.aug_fn = Posterize(operation.aug_fn)
    return operation


# Against Pillow


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pillows(name, channels, monkeypatch):
    images = photographs(6, (32, 24), channels)
    distances = []
    for level, sign, bicubic in LEVELS + [(1.3, -1, 1)] * (not name.startswith("Posterize")):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: sign * value)
        resampling = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[bicubic]
        hparams = {"img_mean": fill(channels), "interpolation": resampling, "magnitude_max": 13}
        one_by_one = mended(AugmentOp(name, prob=1.0, magnitude=10 * level, hparams=hparams))
        wanted = tensor([one_by_one(picture(image)) for image in images])
        rows = torch.full((len(images), 1, 1, 1), level, dtype=torch.float64)
        drawn = Drawn(rows, sign * rows, torch.full_like(rows, bicubic), torch.tensor(fill(channels))[:, None, None])
        found = torch.empty_like(images).copy_(OPERATIONS[name](images, drawn))
        distances.append((found.int() - wanted.int()).abs())
    distance = torch.stack(distances).float()
    if name in INEXACT:  # where a whole number is meant, Pillow may find a little less, and keeps the one below
        assert distance.max() <= 1
        assert distance.mean() < 0.01
    else:
        assert distance.max() == 0


def fed(monkeypatch, module, uniforms=(), draws=(), place=(), filtering=0.0, magnitude=0.5):
    """Put given numbers in the place of what a module of timm draws."""
    uniforms, draws, place = iter(uniforms), iter(draws), iter(place)
    source = SimpleNamespace(
        uniform=lambda low, high: low + (high - low) * next(uniforms, magnitude),
        randint=lambda low, high: low + int(next(place) * (high - low + 1)),
        random=lambda: next(draws),
        gauss=lambda mean, deviation: NormalDist(mean, deviation).inv_cdf(magnitude),
        choice=lambda filters: filters[int(filtering < 0.5)],  # bilinear, bicubic
    )
    monkeypatch.setattr(module, "random", source)


def one_by_one(image, row, size, chosen, monkeypatch):
    """What timm makes of one image by the same draws."""
    areas, aspects, place, flips, filtering, layers = np.split(row.numpy(), [10, 20, 22, 24, 25])
    fed(monkeypatch, transforms, np.stack([areas, aspects], 1).ravel(), place=place, filtering=filtering[0])
    crop = RandomResizedCropAndInterpolation(size, chosen.scale, chosen.ratio, chosen.interpolation)
    image = crop(picture(image))
    for turn, draw, share in zip((vflip, hflip), flips, (chosen.vflip, chosen.hflip), strict=True):
        image = turn(image) if draw < share else image
    if chosen.auto_augment:
        channels = len(image.getbands())
        policy = rand_augment_transform(chosen.auto_augment, {"img_mean": fill(channels)})
        for which, whether, magnitude, sign, resampling in layers.reshape(-1, 5):
            operation = mended(policy.ops[int(which * len(policy.ops))])
            tossed = [whether, sign] if operation.prob < 1 else [sign]
            fed(monkeypatch, auto_augment, draws=tossed, filtering=resampling, magnitude=magnitude)
            image = operation(image)
    return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", ["", POLICY, "rand-m7-n3-mstd101", "rand-m9-mstd4-p1-inc1", "rand-m12-mmax12"])
@pytest.mark.parametrize(("old", "size"), [((32, 32), (32, 32)), ((28, 28), (28, 28)), ((20, 48), (64, 56))])
def test_a_sample_is_what_timm_makes_of_the_same_draws(old, size, policy, channels, monkeypatch):
    images = photographs(64, old, channels)
    chosen = Augmentation(**{**vars(CHOSEN), "auto_augment": policy})
    augmenter = Augmenter(size, MEAN[:channels], chosen)
    drawn = draws(len(images), augmenter)
    found = augmenter(images, drawn)
    assert found.shape == (len(images), channels, *size)
    assert found.dtype == torch.uint8
    wanted = tensor([one_by_one(*pair, size, chosen, monkeypatch) for pair in zip(images, drawn, strict=True)])
    distance = (found.int() - wanted.int()).abs()
    assert (distance > 1).float().mean() < (3e-3 if policy else 1e-9)  # later operations may widen a step of one
    assert (distance > 0).float().mean() < 0.01


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("old", "new"), [((28, 28), (32, 32)), ((32, 24), (48, 64)), ((64, 48), (32, 24))])
def test_without_a_shift_images_are_resized_as_pillow_does(old, new, interpolation):
    images = photographs(8, old)[:6]
    augmenter = Augmenter(new, MEAN, Augmentation(shift=0, interpolation=interpolation))
    resampling = Image.Resampling[interpolation.upper()]
    wanted = tensor([picture(image).resize(new[::-1], resampling) for image in images])
    distance = (augmenter(images, draws(len(images), augmenter)).int() - wanted.int()).abs()
    assert distance.max() <= 1
    assert distance.float().mean() < 0.05  # a half is rounded either way


@pytest.mark.parametrize("old", [(12, 9), (9, 8)])
def test_a_shift_takes_a_window_of_the_resized_image_with_a_black_margin(old):
    chosen = Augmentation(shift=2, hflip=0.5, vflip=0.3, interpolation="bicubic")
    images, augmenter = photographs(32, old), Augmenter((12, 9), MEAN, chosen)
    resized = tensor([picture(image).resize((9, 12), Image.Resampling.BICUBIC) for image in images])
    drawn = draws(32, augmenter)
    for image, row, found in zip(F.pad(resized, 4 * [2]), drawn.tolist(), augmenter(images, drawn), strict=True):
        down, right = (int(5 * draw) for draw in row[:2])
        turned = [axis for axis, share, draw in zip((1, 2), (0.3, 0.5), row[2:], strict=False) if draw < share]
        wanted = image[:, down : down + 12, right : right + 9].flip(turned)
        assert (found.int() - wanted.int()).abs().max() <= (old != (12, 9))


# What a sample depends on


@pytest.mark.parametrize("chosen", [CHOSEN, Augmentation(shift=3, interpolation="bicubic", auto_augment=POLICY)])
def test_a_sample_depends_on_its_own_draws_alone(chosen):
    images, augmenter = photographs(96), Augmenter((32, 32), MEAN, chosen)
    drawn = draws(96, augmenter)
    whole = augmenter(images, drawn)
    for size in (1, 7, 50):
        parts = [augmenter(*pair) for pair in zip(images.split(size), drawn.split(size), strict=True)]
        assert torch.equal(torch.cat(parts), whole)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augmenter(images[order], drawn[order]), whole[order])


def test_the_same_draws_give_the_same_images_and_what_was_given_stays():
    images, augmenter = photographs(64), Augmenter((32, 32), MEAN, CHOSEN)
    drawn = draws(64, augmenter)
    before = images.clone(), drawn.clone()
    assert torch.equal(augmenter(images, drawn), augmenter(images, drawn))
    assert torch.equal(images, before[0])
    assert torch.equal(drawn, before[1])


def test_no_generator_is_drawn_from():
    images, augmenter = photographs(8), Augmenter((32, 32), MEAN, CHOSEN)
    drawn, state = draws(8, augmenter), torch.get_rng_state()
    augmenter(images, drawn)
    assert torch.equal(torch.get_rng_state(), state)


def test_extreme_draws_are_in_range():
    images, augmenter = photographs(4), Augmenter((32, 32), MEAN, CHOSEN)
    for extreme in (0.0, math.nextafter(1.0, 0.0)):
        drawn = torch.full((4, augmenter.columns), extreme, dtype=torch.float64)
        assert augmenter(images, drawn).shape == images.shape


def test_single_precision_draws_are_enough():
    images, augmenter = photographs(64), Augmenter((32, 32), MEAN, CHOSEN)
    drawn = draws(64, augmenter).float()
    distance = (augmenter(images, drawn).int() - augmenter(images, drawn.double()).int()).abs()
    assert (distance > 1).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"auto_augment": "augmix-m5"}, "auto_augment"),
        ({"auto_augment": "original-mstd0.5"}, "auto_augment"),
        ({"auto_augment": "rand-m9-zz3"}, "auto_augment"),
        ({"auto_augment": "rand-m9-tweights"}, "weighs its operations"),
        ({"auto_augment": "rand-m9-t3a"}, "Desaturate"),
        ({"auto_augment": "", "color_jitter": 0.4}, "color_jitter"),
        ({"interpolation": "lanczos"}, "interpolation"),
    ],
)
def test_what_batches_cannot_do_is_refused(asked, named):
    with pytest.raises(UsageError, match=named):
        Augmenter((32, 32), MEAN, Augmentation(**{**vars(CHOSEN), **asked}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_where_there_is_one_makes_the_same_images():
    images, augmenter = photographs(96), Augmenter((32, 32), MEAN, CHOSEN)
    drawn = draws(96, augmenter)
    distance = (augmenter(images.cuda(), drawn.cuda()).cpu().int() - augmenter(images, drawn).int()).abs()
    assert (distance > 1).float().mean() < 1e-3

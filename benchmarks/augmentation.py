"""How many 32×32 images a second are augmented one by one, by timm and Pillow, and in batches, by `lape.data.batched`.

python benchmarks/augmentation.py --out benchmarks/results/augmentation
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from jsonargparse import auto_cli
from PIL import Image
from sklearn.datasets import load_sample_images
from turns import file, in_turns

from lape.data.batched import Augmenter
from lape.data.classes import PHOTOGRAPHS, ImageSource, Split
from lape.data.pipeline import Order, Shares, load, training_images
from lape.data.preparation import ROWS, ROWS_ON_A_CARD
from lape.experiment import Augmentation

SIZE = (32, 32)
STEP = 128  # images in a step of the recipes
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
CHOSEN = Augmentation(scale=(0.8, 1.0), hflip=0.5, interpolation="random", auto_augment="rand-m9-mstd0.5-inc1")


def photographs(count: int) -> torch.Tensor:
    """Return parts of two photographs (count, 3, 32, 32)."""
    random = np.random.default_rng(0)
    scenes = [Image.fromarray(scene) for scene in load_sample_images().images]
    parts = []
    for number in range(count):
        scene, side = scenes[number % 2], int(random.integers(64, 400))
        left, top = (int(random.integers(length - side)) for length in scene.size)
        part = scene.resize(SIZE, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        parts.append(torch.from_numpy(np.array(part)).permute(2, 0, 1))
    return torch.stack(parts)


def source(images: torch.Tensor) -> ImageSource:
    split = Split("training", images, torch.zeros(len(images), dtype=torch.long))
    return ImageSource("photographs", ("one",), 3, SIZE, MEAN, STD, split, split, PHOTOGRAPHS)


def one_by_one(images: torch.Tensor, batch: int, workers: int) -> Callable[[], float]:
    """Images a second through timm's transform, the start of the processes left out."""
    prepared = training_images(source(images), CHOSEN, SIZE, seed=0)
    order = Order(0, len(images), batch)

    def rate() -> float:
        torch.set_num_threads(1)
        batches = load(prepared, Shares(order, 0, 0, order.steps), workers, pin=False)
        for _ in range(workers * 2 + 1):  # what was prepared before the clock starts
            next(batches)
        start = time.perf_counter()
        count = sum(len(batch[0]) for batch in batches)
        return count / (time.perf_counter() - start)

    return rate


def batched(
    images: torch.Tensor, batch: int, threads: int, device: str = "cpu", chosen: Augmentation = CHOSEN
) -> Callable[[], float]:
    """Images a second through the Augmenter, normalised as timm's transform does."""
    augmenter = Augmenter(SIZE, MEAN, chosen)
    mean, std = (255 * torch.tensor(part, device=device).view(-1, 1, 1) for part in (MEAN, STD))
    images = images.to(device)
    draws = torch.rand(len(images), augmenter.columns)  # on the host, as in training
    parts = list(zip(images.split(batch), draws.split(batch), strict=True))

    def passed() -> None:
        for part in parts:
            (augmenter(*part) - mean) / std
        if device != "cpu":
            torch.cuda.synchronize()

    def rate() -> float:
        torch.set_num_threads(threads)
        passed()
        start = time.perf_counter()
        passed()
        return len(images) / (time.perf_counter() - start)

    return rate


def main(out: Path | None = None, images: int = 8192, rounds: int = 5) -> None:
    """Print the table

    Args:
        out: Folder for table.md and table.json.
        images: How many images each way goes through in a round.
        rounds: How often all ways take turns.
    """
    pictures = photographs(images)
    torch.empty(24 << 20, dtype=torch.uint8)  # once so much was freed, glibc keeps memory, as in a training process
    ways = {
        "one by one, 1 process": one_by_one(pictures, STEP, 0),
        "one by one, 2 processes": one_by_one(pictures, STEP, 2),
    }
    for batch, said in ((STEP, "one step"), (ROWS, "as in training")):
        for threads in (1, 2):
            ways[f"{batch} at once ({said}), {threads} threads"] = batched(pictures, batch, threads)
    plain = replace(CHOSEN, auto_augment="")
    ways[f"{ROWS} at once, 2 threads, crop and flip alone"] = batched(pictures, ROWS, 2, chosen=plain)
    if torch.cuda.is_available():
        ways[f"{ROWS_ON_A_CARD} at once, GPU"] = batched(pictures, ROWS_ON_A_CARD, 1, "cuda")
    rates = in_turns(ways, rounds)
    first, second, *_ = (median(found) for found in rates.values())
    rows = [["way", "images a second", "beside 1 process", "beside 2 processes"]]
    for name, found in rates.items():
        rate = median(found)
        rows.append([name, f"{rate:,.0f}", f"{rate / first:.1f}", f"{rate / second:.1f}"])
    said = f"{images} images of {SIZE[0]} pixels in a round, medians over {rounds} rounds."
    file(out, rows, said, images_per_second=rates)


if __name__ == "__main__":
    auto_cli(main)

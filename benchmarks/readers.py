"""How many images a second one core reads, augments and collates for ImageNet, and how many other readers would.

    python benchmarks/readers.py --out benchmarks/results/readers

DeiT's augmentation, on files as ImageNet's are, made anew from the two photographs that scikit-learn carries.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jsonargparse import auto_cli
from numpy.typing import NDArray
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_images
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from turns import file, in_turns

from lape.data.classes import ImageSource, Split, folder
from lape.data.pipeline import Order, Pictures, Shares, load, reseed, training_images
from lape.experiment import Augmentation

Work = Callable[[Any], Any]
Measure = Callable[[], float]  # seconds an image; every call has the draws of its own turn

SIDE = 224
BATCH = 128
BATCHES = 8  # in a round
DEIT = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", reprob=0.25)
CROP: Any = RandomResizedCropAndInterpolation(SIDE, interpolation="bicubic")
LABEL = torch.zeros(1, dtype=torch.long)
ALONE = "training_images, this process"
NEEDED = 5_000  # images a second that a GPU takes while it trains DeiT-Ti: an assumption


# The files


def photograph(number: int) -> Image.Image:
    """A piece of 500×375, cut at random; every sixteenth is four of them, 1000×750."""
    draw = random.Random(number)
    pictures = load_sample_images().images  # two of (427, 640, 3)

    def piece() -> NDArray[np.uint8]:
        picture = draw.choice(pictures)
        top, left = draw.randint(0, len(picture) - 375), draw.randint(0, len(picture[0]) - 500)
        return picture[top : top + 375, left : left + 500]

    return Image.fromarray(piece() if number % 16 else np.block([[[piece()], [piece()]], [[piece()], [piece()]]]))


def write(path: Path, number: int) -> None:
    """Save photograph `number`: of 50 one is grey, one CMYK, one a PNG that is called JPEG, one lies on its side."""
    lying = Image.Exif()
    lying[ExifTags.Base.Orientation] = 6
    special: dict[int, tuple[str, str, dict[str, Any]]] = {
        10: ("L", "JPEG", {}),
        20: ("CMYK", "JPEG", {}),
        30: ("RGB", "PNG", {}),
        40: ("RGB", "JPEG", {"exif": lying}),
    }
    mode, kind, options = special.get(number % 50, ("RGB", "JPEG", {}))
    photograph(number).convert(mode).save(path, kind, quality=95 + number % 4, **options)  # some 100 kB, as ImageNet's


def images(root: Path, count: int) -> ImageSource:
    """Write `count` training photographs and one for validation, as a folder of one class."""
    for part, numbers in (("train", range(count)), ("val", range(1))):
        (root / part / "class").mkdir(parents=True)
        for number in numbers:
            write(root / part / "class" / f"{number:05}.JPEG", number)
    return folder(root)


# Readers: a path becomes a picture


def pillow(path: Path) -> Image.Image:
    """What lape does."""
    return Split("a file", [path], LABEL).picture(0, channels=3)


def uncopied(path: Path) -> Image.Image:
    """Pillow converts a picture that has the right mode by a copy; here it is left out."""
    with Image.open(path) as image:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")


def whole_file(path: Path) -> Image.Image:
    """Pillow reads 64 KiB at a time; here the file is read at once."""
    with Image.open(BytesIO(path.read_bytes())) as image:
        return image.convert("RGB")


def eighth(path: Path) -> Image.Image:
    """Every coefficient is unpacked and one in 64 is used: what decoding a part of the picture would not save."""
    with Image.open(path) as image:
        image.draft("RGB", (1, 1))
        return image.convert("RGB")


def tensor(path: Path) -> Tensor:
    """torchvision's decoder, (3, H, W) of uint8."""
    return decode_image(str(path), ImageReadMode.RGB)


def tensor_to_pillow(path: Path) -> Image.Image:
    """torchvision's decoder before Pillow's transforms."""
    return Image.fromarray(array(tensor(path)))


READERS: Mapping[str, Work] = {
    "Pillow, as lape reads": pillow,
    "Pillow, once more": pillow,
    "Pillow without convert's copy": uncopied,
    "Pillow, the file in one go": whole_file,
    "Pillow, all shrunk by 8": eighth,
    "torchvision": tensor,
    "torchvision, then to Pillow": tensor_to_pillow,
}


# Readers that know the crop: a path becomes 224×224


def box(image: Image.Image | Tensor) -> tuple[int, int, int, int]:
    """Draw a crop (top, left, height, width), by the recipe's rule."""
    return CROP.get_params(image, CROP.scale, CROP.ratio)


def cropped(path: Path) -> Image.Image:
    """What lape does."""
    return CROP(pillow(path))


def drafted(path: Path) -> Image.Image:
    """The decoder shrinks by 2, 4 or 8 where the crop keeps at least 224 pixels each way."""
    with Image.open(path) as image:
        top, left, height, width = box(image)
        before = image.width
        image.draft("RGB", (math.ceil(image.width * SIDE / width), math.ceil(image.height * SIDE / height)))
        shrunk = before / image.width
        top, left, height, width = (round(length / shrunk) for length in (top, left, height, width))
        part = image.convert("RGB").crop((left, top, left + width, top + height))
        return part.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def tensor_crop(image: Tensor) -> Tensor:
    """torchvision's bicubic resize of bytes, with antialias, as Pillow's."""
    return v2.functional.resized_crop(image, *box(image), [SIDE, SIDE], v2.InterpolationMode.BICUBIC, antialias=True)


CROPPERS: Mapping[str, Work] = {
    "Pillow and crop": cropped,
    "Pillow shrunk for the crop": drafted,
    "torchvision and crop": lambda path: tensor_crop(tensor(path)),
}


# What is measured


def each(work: Work, inputs: Sequence[Any], count: int | None = None) -> Measure:
    """Time `work` on every input in turn; together they are `count` images."""
    turns = itertools.count()

    def seconds() -> float:
        reseed(next(turns))
        start = perf_counter()
        for value in inputs:
            work(value)
        return (perf_counter() - start) / (count or len(inputs))

    return seconds


def chain(kind: str, steps: Sequence[Work], inputs: Sequence[Any]) -> Iterator[tuple[str, Measure]]:
    """Yield every step of a transform, fed with what comes out of the one before it, and the collation of the last."""
    for step in steps:
        yield f"{kind}: {getattr(step, '__name__', type(step).__name__)}", each(step, inputs)
        inputs = [step(value) for value in inputs]
    batch = inputs[:BATCH]
    yield f"{kind}: a batch of {len(batch)} is stacked", each(torch.stack, [batch], len(batch))


def batches(training: Pictures, workers: int) -> Measure:
    """Time the batches of a training, from when every worker has made its first."""
    order = Order(0, len(training.split), min(BATCH, len(training.split)))
    firsts = itertools.count(step=BATCHES)

    def seconds() -> float:
        first = next(firsts)
        keys = Shares(order, process=0, first=first, last=first + BATCHES)
        made = load(training, keys, workers, pin=False)
        for _ in range(max(workers, 1)):
            next(made)
        start = perf_counter()
        rest = sum(len(labels) for _, labels in made)
        return (perf_counter() - start) / rest

    return seconds


def array(image: Image.Image | Tensor) -> NDArray[np.uint8]:
    """Return a picture as (H, W, 3)."""
    return image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.asarray(image)


def difference(reader: Work, reference: Work, paths: Sequence[Path]) -> str:
    """Say by how many of 256 levels a reader's pixels differ, after the same draws."""
    found = []
    for number, path in enumerate(paths):
        reseed(number)
        image = array(reader(path)).astype(int)
        reseed(number)
        found.append(np.abs(image - array(reference(path))))
    changed = [part for part in found if part.any()]
    if not changed:
        return "the same"
    mean, largest = np.mean([part.mean() for part in changed]), max(part.max() for part in changed)
    return f"other in {len(changed)} files: {mean:.2g} on average, {largest} at most"


def differences(paths: Sequence[Path]) -> dict[str, str]:
    """Compare every reader that is meant to give the same picture as lape's."""
    return {
        name: difference(reader, reference, paths)
        for readers, reference in ((READERS, pillow), (CROPPERS, cropped))
        for name, reader in readers.items()
        if reader not in (reference, eighth)
    }


def stages(source: ImageSource, paths: Sequence[Path]) -> dict[str, Measure]:
    """Every line of the table."""
    training: Any = training_images(source, DEIT, (SIDE, SIDE), seed=0)
    by_tensors = [
        tensor_crop,
        v2.RandomHorizontalFlip(),
        v2.RandAugment(),  # not quite timm's operations
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(source.mean, source.std),
        v2.RandomErasing(0.25),
    ]
    return {
        "bytes of a file": each(Path.read_bytes, paths),
        **{name: each(reader, paths) for name, reader in (*READERS.items(), *CROPPERS.items())},
        "generators seeded": each(reseed, range(len(paths))),
        **dict(chain("timm", training.transform.transforms, [pillow(path) for path in paths])),
        **dict(chain("v2", by_tensors, [tensor(path) for path in paths])),
        ALONE: batches(training, workers=0),
        "training_images, 2 workers": batches(training, workers=2),
    }


def explanation(paths: Sequence[Path], rounds: int, seconds: Mapping[str, Sequence[float]]) -> str:
    """Say what the numbers are, and what follows for a machine with a GPU."""
    reseed(0)
    images = [pillow(path) for path in paths]
    boxes = [(box(image), image.size) for image in images for _ in range(20)]
    covered = np.mean([height * width / math.prod(size) for (_, _, height, width), size in boxes])
    bottom = np.mean([(top + height) / size[1] for (top, _, height, _), size in boxes])
    kilobytes = np.mean([path.stat().st_size for path in paths]) / 1000
    cores = math.ceil(NEEDED * median(seconds[ALONE]))
    return (
        f"{len(paths)} files, {kilobytes:.0f} kB on average, most of 500×375; one thread; {rounds} rounds in which all "
        "take turns: the median, and the quarters around it. pixels: beside what lape reads, or reads and crops, in "
        f"levels of 256. On average a crop covers {covered:.0%} of its picture and ends at {bottom:.0%} of its height. "
        f"A GPU that takes {NEEDED:,} images/s to train DeiT-Ti, which is an assumption, is fed by {cores} such cores."
    )


def line(name: str, seconds: Sequence[float], pixels: str) -> list[str]:
    """Return a row of the table."""
    low, middle, high = (1e3 * quarter for quarter in quantiles(seconds, method="inclusive"))
    return [name, f"{1e3 / middle:,.0f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}", pixels]


def main(out: Path | None = None, pictures: int = 208, rounds: int = 9) -> None:
    """Print the table

    Args:
        out: Folder for table.md and table.json.
        pictures: How many files are made.
        rounds: How often everything is measured, at least 2.
    """
    torch.set_num_threads(1)
    with TemporaryDirectory() as root:
        source = images(Path(root), pictures)
        paths = sorted(Path(root, "train").glob("*/*"))
        others = differences(paths)
        seconds = in_turns(stages(source, paths), rounds)
        said = explanation(paths, rounds, seconds)
    lines = [line(name, taken, others.get(name, "")) for name, taken in seconds.items()]
    used = {name: version(name) for name in ("pillow", "torchvision")}
    rows = [["", "images/s", "ms an image", "quarters, ms", "pixels"], *lines]
    file(out, rows, said, pixels=others, seconds_per_image=seconds, versions=used)


if __name__ == "__main__":
    auto_cli(main)

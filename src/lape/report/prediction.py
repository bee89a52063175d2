"""What was found in a picture, drawn on it and as a line."""

import colorsys
import io
from functools import singledispatch

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lape import writing
from lape.characters import visible
from lape.tasks.classification import Named
from lape.tasks.detection import Found
from lape.training.prediction import Predicted

VEIL = 0.5  # share of its class's colour in a pixel
MARGIN = 6  # pixels
READABLE = 384  # pixels of the shorter side
LARGEST = 3  # so many parts of a picture are told in its line
GOLDEN = 0.618034  # hues that are so far apart do not meet again soon

Colour = tuple[int, int, int]


def colour(label: int) -> Colour:
    """Return the colour of a class, the same in every picture."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.75 if label % 2 else 0.95, 1.0 - 0.2 * (label % 3))
    return round(255 * red), round(255 * green), round(255 * blue)


def drawn(predicted: Predicted) -> Image.Image:
    """Return the picture with what was found in it, and below it what the colours mean."""
    return _drawn(predicted.answer, predicted)


def png(predicted: Predicted) -> bytes:
    """Return what `drawn` does as a PNG."""
    file, info = io.BytesIO(), PngInfo()
    info.add_text("Software", writing.MARK)
    drawn(predicted).save(file, "png", pnginfo=info)
    return file.getvalue()


def line(predicted: Predicted) -> str:
    """Say in a line what was found."""
    return f"{predicted.path}: {_line(predicted.answer, predicted.classes)}"


@singledispatch
def _drawn(answer: object, predicted: Predicted) -> Image.Image:
    raise TypeError(type(answer))


@singledispatch
def _line(answer: object, classes: tuple[str, ...]) -> str:
    raise TypeError(type(answer))


@_drawn.register
def _(answer: Named, predicted: Predicted) -> Image.Image:
    labels = answer.labels.tolist()
    shares = [
        f"{predicted.classes[label]} {share:.1%}"
        for label, share in zip(labels, answer.probabilities.tolist(), strict=True)
    ]
    picture = _enlarged(predicted.picture, _enlargement(predicted.picture))
    return _with_legend(picture, list(zip(map(colour, labels), shares, strict=True)))


@_line.register
def _(answer: Named, classes: tuple[str, ...]) -> str:
    found = zip(answer.labels.tolist(), answer.probabilities.tolist(), strict=True)
    return ", ".join(f"{classes[label]} {share:.1%}" for label, share in list(found)[:LARGEST])


@_drawn.register
def _(answer: Found, predicted: Predicted) -> Image.Image:
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    labels = answer.labels.tolist()
    colours: list[Colour | str] = [colour(label) for label in labels]
    times = _enlargement(predicted.picture)
    image = pil_to_tensor(_enlarged(predicted.picture, times))
    if labels:
        masks = answer.masks.cpu().repeat_interleave(times, 1).repeat_interleave(times, 2)
        image = draw_segmentation_masks(image, masks, alpha=VEIL, colors=colours)
        scores = [f"{score:.2f}" for score in answer.scores.tolist()]
        width = max(2, min(image.shape[1:]) // 200)
        image = draw_bounding_boxes(image, times * answer.boxes.cpu(), scores, colours, width=width)
    names = {label: f"{labels.count(label)} {predicted.classes[label]}" for label in labels}
    return _with_legend(to_pil_image(image), [(colour(label), name) for label, name in names.items()])


@_line.register
def _(answer: Found, classes: tuple[str, ...]) -> str:
    names = [classes[label] for label in answer.labels.tolist()]
    counts = [f"{names.count(name)} {name}" for name in dict.fromkeys(names)]
    return ", ".join(counts) or "nothing found"


@_drawn.register
def _(answer: Tensor, predicted: Predicted) -> Image.Image:
    answer = answer.cpu()
    palette = torch.tensor([colour(label) for label in range(len(predicted.classes))], dtype=torch.uint8)
    veil = Image.fromarray(palette[answer].numpy())
    labels = [label for label, _ in _shares(answer)]
    names = [(colour(label), predicted.classes[label]) for label in labels]
    blended = Image.blend(predicted.picture, veil, VEIL)
    return _with_legend(_enlarged(blended, _enlargement(blended)), names)


@_line.register
def _(answer: Tensor, classes: tuple[str, ...]) -> str:
    return ", ".join(f"{classes[label]} {share:.1%}" for label, share in _shares(answer)[:LARGEST])


def _shares(answer: Tensor) -> list[tuple[int, float]]:
    """Return the classes in a map and the share of each, the largest first."""
    counts = answer.flatten().bincount()
    order = counts.argsort(descending=True).tolist()
    return [(label, counts[label].item() / answer.numel()) for label in order if counts[label]]


def _enlargement(picture: Image.Image) -> int:
    """How many times a small picture is drawn as large, so that what is written on it can be read."""
    return max(1, min(round(READABLE / min(picture.size)), 2 * READABLE // max(picture.size)))


def _enlarged(picture: Image.Image, times: int) -> Image.Image:
    return picture.resize((times * picture.width, times * picture.height))


def _with_legend(picture: Image.Image, names: list[tuple[Colour, str]]) -> Image.Image:
    """Put a line for every colour below a picture."""
    font = ImageFont.load_default(14)
    names = [(shade, visible(name)) for shade, name in names]
    rows: list[list[tuple[Colour, str]]] = [[]]
    widths = [MARGIN]
    room = max(picture.width, 160)
    for entry in names:
        needed = round(font.getlength(entry[1])) + 3 * MARGIN + 12
        if rows[-1] and widths[-1] + needed > room:
            rows.append([])
            widths.append(MARGIN)
        rows[-1].append(entry)
        widths[-1] += needed
    height = 20 * len(rows) + MARGIN if names else 0
    sheet = Image.new("RGB", (max(room, *widths) if names else picture.width, picture.height + height), "white")
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for row, entries in enumerate(rows):
        x, y = MARGIN, picture.height + MARGIN + 20 * row
        for shade, text in entries:
            pen.rectangle((x, y, x + 12, y + 12), fill=shade)
            pen.text((x + 12 + MARGIN, y - 3), text, fill="black", font=font)
            x += round(font.getlength(text)) + 3 * MARGIN + 12
    return sheet

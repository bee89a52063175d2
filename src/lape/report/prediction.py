"""What was found in pictures: drawn on them, as lines, and as files for other programs."""

import colorsys
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from lape import __version__
from lape.data.pictures import read_picture
from lape.files import writing
from lape.files.characters import visible
from lape.report.table import Table
from lape.tasks.answers import Answer
from lape.training.prediction import Predicted, Unread
from lape.training.provenance import provenance

VEIL = 0.5  # share of its class's colour in a pixel
MARGIN = 6  # pixels
READABLE = 384  # pixels of the shorter side
GOLDEN = 0.618034  # hues that are so far apart do not meet again soon

Colour = tuple[int, int, int]


def colour(label: int) -> Colour:
    """Return the colour of a class, the same in every picture."""
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN % 1, 0.75 if label % 2 else 0.95, 1.0 - 0.2 * (label % 3))
    return round(255 * red), round(255 * green), round(255 * blue)


def drawn(answer: Answer, picture: Image.Image, classes: Sequence[str]) -> Image.Image:
    """Return a picture with what was found in it, and below it what the colours mean."""
    sheet = EnlargedPicture(picture)
    answer.draw(sheet)
    names = [(colour(label), text) for label, text in answer.legend(classes)]
    return _with_legend(sheet.image, names)


def png(predicted: Predicted) -> bytes:
    """Return what `drawn` does as a PNG; raises RunError for a picture that cannot be read any more."""
    return encoded(drawn(predicted.answer, read_picture(predicted.path), predicted.classes))


def encoded(sheet: Image.Image) -> bytes:
    """Return a picture of ours as a PNG."""
    file, info = io.BytesIO(), PngInfo()
    info.add_text("Software", writing.MARK)
    sheet.save(file, "png", pnginfo=info)
    return file.getvalue()


def line(predicted: Predicted) -> str:
    """Say in a line what was found."""
    return f"{predicted.path}: {predicted.answer.line(predicted.classes)}"


class Listing:
    """What was said of many pictures in plain values, so that none of the pictures is kept."""

    def __init__(self) -> None:
        self.pictures: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []

    def add(self, one: Predicted | Unread) -> None:
        """Note what was said of a picture, or that it could not be read."""
        place = {"picture": str(one.path)}
        if isinstance(one, Unread):
            self.pictures.append(place | {"error": one.reason})
            self.rows.append(place | {"error": one.reason})
            return
        self.pictures.append(place | {"answers": one.answer.records(one.classes)})
        self.rows += [place | row for row in one.answer.rows(one.classes) or [{}]]

    def as_csv(self) -> str:
        """Return a row for each picture, or for each thing found in one; numbers unrounded, the error at the end."""
        named = dict.fromkeys(name for row in self.rows for name in row if name != "error")
        headings = [*named, "error", writing.MARK]
        return Table(headings, [[*map((row | {writing.MARK: __version__}).get, headings)] for row in self.rows]).csv()

    def as_json(self, checkpoint: Path) -> str:
        """Return all of it with full precision, with what said it."""
        content = {
            writing.MARK: __version__,
            "checkpoint": str(checkpoint),
            **provenance(),
            "pictures": self.pictures,
        }
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


class EnlargedPicture:
    """A picture as large as that what is drawn on it can be read: a `lape.tasks.work.Sheet`."""

    def __init__(self, picture: Image.Image) -> None:
        self.picture = picture
        self.times = _enlargement(picture)
        self.image = self._enlarged(picture)

    def fill_pixels(self, labels: Tensor) -> None:
        """Veil every pixel in the colour of its class (H, W)."""
        labels = labels.cpu()
        palette = torch.tensor([colour(label) for label in range(int(labels.max()) + 1)], dtype=torch.uint8)
        veil = Image.fromarray(palette[labels].numpy())
        self.image = self._enlarged(Image.blend(self.picture, veil, VEIL))

    def outline_objects(self, boxes: Tensor, masks: Tensor, labels: Sequence[int], captions: Sequence[str]) -> None:
        """Veil masks (n, H, W), and draw boxes (n, 4) as x0 y0 x1 y1 around them, with captions."""
        from torchvision.transforms.functional import pil_to_tensor, to_pil_image
        from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

        if not labels:
            return
        colours: list[Colour | str] = [colour(label) for label in labels]
        larger = masks.cpu().repeat_interleave(self.times, 1).repeat_interleave(self.times, 2)
        image = draw_segmentation_masks(pil_to_tensor(self.image), larger, alpha=VEIL, colors=colours)
        width = max(2, min(image.shape[1:]) // 200)
        image = draw_bounding_boxes(image, self.times * boxes.cpu(), list(captions), colours, width=width)
        self.image = to_pil_image(image)

    def _enlarged(self, picture: Image.Image) -> Image.Image:
        return picture.resize((self.times * picture.width, self.times * picture.height))


def _enlargement(picture: Image.Image) -> int:
    """How many times a small picture is drawn as large, so that what is written on it can be read."""
    return max(1, min(round(READABLE / min(picture.size)), 2 * READABLE // max(picture.size)))


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

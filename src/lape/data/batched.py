"""Augmentation of a batch of small images at once, on any device: what timm and Pillow do to one image after the other.

All choices are made from each sample's own row of uniform draws. Images are bytes between two steps, as in Pillow.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lape.errors import UsageError, choose
from lape.experiment import Augmentation

BICUBIC_SHARE: Mapping[str, float] = MappingProxyType({"bilinear": 0.0, "bicubic": 1.0, "random": 0.5})


class Augmenter:
    """Random resized crop (or shift), flips and RandAugment of a whole batch of small images, on any device.

    What a sample becomes depends on its pixels and its draws alone. The draws of images on a card may be on the host:
    what they choose is then known there without waiting for the card. Random erasing and mixup are not done here.
    `mean` is the mean colour in [0, 1], which fills what a moved image leaves open. Raises UsageError for a policy
    other than RandAugment with OPERATIONS, and for color_jitter without a policy (beside one it has no effect).
    """

    def __init__(self, size: tuple[int, int], mean: tuple[float, ...], chosen: Augmentation) -> None:
        if chosen.color_jitter and not chosen.auto_augment:
            raise UsageError(
                f"Batches have no color_jitter, but {chosen.color_jitter} was asked for: set it to 0, or auto_augment."
            )
        self.size = size
        self.placing = Shift(chosen.shift) if chosen.shift is not None else Crop(chosen.scale, chosen.ratio)
        self.flips = chosen.vflip or 0.0, chosen.hflip or 0.0
        self.bicubic = choose(BICUBIC_SHARE, chosen.interpolation or "bilinear", "an interpolation in batches")
        self.policy = Policy(chosen.auto_augment, mean, self.bicubic) if chosen.auto_augment else None
        self.parts = [self.placing.columns, 3, self.policy.columns if self.policy else 0]

    @property
    def columns(self) -> int:
        """Uniform draws in [0, 1) that each sample needs."""
        return sum(self.parts)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return uint8 images (B, C, *size) of uint8 images (B, C, H, W) and draws (B, columns)."""
        placing, others, policy = draws.split(self.parts, 1)
        bicubic = sent(others[:, 2] < self.bicubic, images.device)
        rows, columns = (
            _weights(place, length, size, mirrored, bicubic)
            for place, length, size, mirrored in zip(
                (span.to(images.device) for span in self.placing(placing, *images.shape[-2:])),
                images.shape[-2:],
                self.size,
                (sent(others[:, axis] < share, images.device) for axis, share in enumerate(self.flips)),
                strict=True,
            )
        )
        # Columns first, as Pillow does but for boxes that are much higher than the new image.
        lines = images.transpose(1, 2).float().flatten(1, 2)  # (B, H·C, W)
        lines = _rounded(lines @ columns.mT).view(len(images), images.shape[2], -1)  # (B, H, C·W')
        lines = _rounded(rows @ lines).view(len(images), self.size[0], -1, self.size[1])  # (B, H', C, W')
        images = lines.transpose(1, 2).short().to(torch.uint8).contiguous()  # in two steps, it is faster
        return self.policy(images, policy) if self.policy else images


# Where a sample is taken from


@dataclass(frozen=True)
class Span:
    """A part of every sample's rows or columns: it begins at `start` and has `extent` pixels, (B,) each.

    It is stretched to the new size; of that the pixels from `offset` on are taken, and beyond the ends there is black.
    """

    start: Tensor
    extent: Tensor
    offset: Tensor

    def to(self, device: torch.device) -> "Span":
        """Return the same on a device."""
        return Span(*(sent(part, device) for part in (self.start, self.extent, self.offset)))


def sent(chosen: Tensor, device: torch.device) -> Tensor:
    """Bring what was chosen to a device, without waiting for a card."""
    return chosen.to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class Crop:
    """timm's random resized crop: ten tries, then as much of the centre as the aspect allows."""

    scale: tuple[float, float] | None
    ratio: tuple[float, float] | None
    tries: int = 10

    @property
    def columns(self) -> int:
        """Area and aspect of every try, and where the box lies."""
        return 2 * self.tries + 2

    def __call__(self, draws: Tensor, height: int, width: int) -> tuple[Span, Span]:
        """Return the rows and the columns of the box."""
        least, most = self.scale or (0.08, 1.0)
        flat, wide = self.ratio or (3 / 4, 4 / 3)
        area, aspect, lies = draws.split([self.tries, self.tries, 2], 1)
        area = height * width * (least + (most - least) * area)
        aspect = (math.log(flat) + math.log(wide / flat) * aspect).exp()
        sides = torch.stack(((area / aspect).sqrt(), (area * aspect).sqrt()), 2).round().clamp(min=1)  # (B, tries, 2)
        image = sides.new_tensor((height, width))
        centre = sides.new_tensor((min(height, round(width / flat)), min(width, round(height * wide))))
        sides = torch.cat((sides, centre.expand(len(sides), 1, 2)), 1)
        first = (sides <= image).all(2).int().argmax(1)  # the centre always fits
        sides = sides[torch.arange(len(sides), device=sides.device), first]  # (B, 2)
        free = image - sides
        starts = torch.where((first < self.tries)[:, None], lies * (free + 1), free / 2).floor()
        top, left = (Span(start, side, torch.zeros_like(start)) for start, side in zip(starts.T, sides.T, strict=True))
        return top, left


@dataclass(frozen=True)
class Shift:
    """A shift by up to `most` pixels each way."""

    most: int
    columns: int = 2

    def __call__(self, draws: Tensor, height: int, width: int) -> tuple[Span, Span]:
        """Return the rows and the columns."""
        down, right = ((2 * self.most + 1) * draws).floor().sub(self.most).unbind(1)
        zero = torch.zeros_like(down)
        return Span(zero, zero + height, down), Span(zero, zero + width, right)


def _weights(span: Span, length: int, size: int, mirrored: Tensor, bicubic: Tensor) -> Tensor:
    """Return (B, size, length): what each new pixel takes of each old one, as Pillow resizes (bicubic: a = -1/2)."""
    line = torch.arange(size, device=mirrored.device)
    start, extent, offset = (part.float()[:, None] for part in (span.start, span.extent, span.offset))
    new = torch.where(mirrored[:, None], line.flip(0), line) + offset  # (B, size)
    centre = start + (new + 0.5) * (extent / size)
    reach = math.ceil(2 * max(1, length / size))
    old = (centre - 0.5).floor() + torch.arange(1 - reach, reach + 1, device=line.device)[:, None, None]
    distance = (old + 0.5 - centre).div_((extent / size).clamp_(min=1)).abs_().clamp_(max=2)  # (2·reach, B, size)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    cubic = torch.where(distance < 1, near, far)
    weights = torch.where(bicubic[:, None], cubic, (1 - distance).clamp_(min=0))
    weights *= (old >= start) & (old < start + extent)
    there = (new >= 0) & (new < size)
    weights *= there / torch.where(there, weights.sum(0), 1)
    whole = weights.new_zeros(*new.shape, length)
    return whole.scatter_add_(2, *(part.permute(1, 2, 0) for part in (old.long().clamp_(0, length - 1), weights)))


def _rounded(values: Tensor) -> Tensor:
    return values.add_(0.5).floor_().clamp_(0, 255)


# RandAugment


@dataclass(frozen=True)
class Drawn:
    """What was drawn for images, (R, 1, 1, 1) each, and what fills the places that a move leaves open."""

    level: Tensor  # magnitude / 10
    signed: Tensor  # level or -level
    bicubic: Tensor  # 1: bicubic, 0: bilinear
    fill: Tensor  # (C, 1, 1)


Operation = Callable[[Tensor, Drawn], Tensor]


class Policy:
    """timm's RandAugment: in each layer one of its operations, or with some probability none."""

    def __init__(self, text: str, mean: tuple[float, ...], bicubic: float) -> None:
        from timm.data.auto_augment import rand_augment_transform

        try:
            policy: Any = rand_augment_transform(text)
        except (AssertionError, ValueError) as error:
            raise UsageError(
                f"auto_augment in batches is one of timm's rand-..., not {text!r}: use rand-m9-mstd0.5-inc1."
            ) from error
        foreign = [operation.name for operation in policy.ops if operation.name not in OPERATIONS]
        if foreign or policy.choice_weights is not None:
            what = f"has {foreign[0]}" if foreign else "weighs its operations"
            raise UsageError(f"auto_augment {text!r} {what}, which batches cannot do: leave its part t... out.")
        first = policy.ops[0]
        self.operations = [OPERATIONS[operation.name] for operation in policy.ops]
        self.layers, self.probability, self.bicubic = policy.num_layers, first.prob, bicubic
        self.magnitude, self.deviation, self.most = first.magnitude, first.magnitude_std, first.magnitude_max or 10
        self.fill = torch.tensor([min(255, round(255 * value)) for value in mean], dtype=torch.float)[:, None, None]
        self.columns = 5 * self.layers

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Return images (B, C, H, W) after all layers."""
        counts, *chosen = self.chosen(draws)
        orders, backwards, drawn, fill = (sent(part, images.device) for part in (*chosen, self.fill))
        for order, back, count, rows in zip(orders, backwards, counts, drawn, strict=True):
            images = images.index_select(0, order)
            parts = zip(self.operations, images.split(count), rows.split(count), strict=False)
            for operation, part, row in parts:
                if len(part):
                    level, signed, bicubic = row.unbind(1)
                    part.copy_(operation(part, Drawn(level, signed, bicubic, fill)))
            images = images.index_select(0, back)
        return images

    def chosen(self, draws: Tensor) -> tuple[list[list[int]], Tensor, Tensor, Tensor]:
        """Return for each layer how many images each operation has, and an order in which they stand together.

        That is the number of images of each operation, and of none; the order, and the one back (layers, B); what was
        drawn for each image, in the order (layers, B, 3, 1, 1, 1).
        """
        which, whether, magnitude, sign, resampling = draws.view(-1, self.layers, 5).permute(2, 1, 0)  # (layers, B)
        nothing = len(self.operations)
        kinds = torch.where(whether < self.probability, (nothing * which).long(), nothing)
        level = self._magnitude(magnitude).clamp(0, self.most) / 10
        signed = torch.where(sign < 0.5, level, -level)
        drawn = torch.stack((level, signed, (resampling < self.bicubic).to(level)), 2)
        counts = (kinds[..., None] == torch.arange(nothing + 1, device=kinds.device)).sum(1)
        orders = kinds.argsort(1)
        drawn = drawn.gather(1, orders[..., None].expand_as(drawn))[..., None, None, None]
        return counts.tolist(), orders, orders.argsort(1), drawn

    def _magnitude(self, draws: Tensor) -> Tensor:
        if math.isinf(self.deviation):
            return self.magnitude * draws
        return self.magnitude + self.deviation * math.sqrt(2) * (2 * draws - 1).erfinv()


# The operations: from bytes (R, C, H, W) to values from 0 to 255, of which the whole part is kept


def _looked_up(images: Tensor, tables: Tensor) -> Tensor:
    """Return for each value its entry in the table of its image and channel (R, C, 256)."""
    return tables.gather(2, images.flatten(2).long()).view_as(images)


def _auto_contrast(images: Tensor, drawn: Drawn) -> Tensor:
    low, high = (limit[..., None].int() for limit in (images.amin((2, 3)), images.amax((2, 3))))
    values = torch.arange(256, device=images.device)
    tables = (255 * (values - low) // (high - low).clamp(min=1)).clamp(0, 255)
    return _looked_up(images, torch.where(high > low, tables, values))


def _equalize(images: Tensor, drawn: Drawn) -> Tensor:
    values = images.flatten(2).long()
    counts = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    brightest = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - brightest) // 255
    tables = (step // 2 + counts.cumsum(2) - counts) // step.clamp(min=1)
    return _looked_up(images, torch.where(step > 0, tables, torch.arange(256, device=images.device)).clamp(max=255))


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    return images & (256 - 2 ** (8 - bits))


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images < threshold, images, 255 - images)


def _solarize_add(images: Tensor, more: Tensor) -> Tensor:
    return torch.where(images < 128, images + more, images).clamp(max=255)


def _black(images: Tensor) -> Tensor:
    return torch.zeros_like(images)


def _grey(images: Tensor) -> Tensor:
    """Return the luminance (R, 1, H, W), as Pillow weighs the colours."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().split(1, 1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _mean_grey(images: Tensor) -> Tensor:
    grey = _grey(images).flatten(1)
    mean = (2 * grey.sum(1) + grey.shape[1]) // (2 * grey.shape[1])
    return mean.view(-1, 1, 1, 1)


def _smooth(images: Tensor) -> Tensor:
    """Return the mean of 3×3 pixels of which the middle one counts five times; the border stays as it is."""
    values = images.short()
    lines = values[..., :-2] + values[..., 1:-1] + values[..., 2:]
    total = lines[..., :-2, :] + lines[..., 1:-1, :] + lines[..., 2:, :] + 4 * values[..., 1:-1, 1:-1]
    values[..., 1:-1, 1:-1] = (2 * total + 13) // 26
    return values


def _enhance(plain: Callable[[Tensor], Tensor], factor: Callable[[Drawn], Tensor]) -> Operation:
    def enhanced(images: Tensor, drawn: Drawn) -> Tensor:
        start = plain(images).float()
        return (start + factor(drawn).float() * (images - start)).clamp_(0, 255)

    return enhanced


def _slid(images: Tensor, slope: Tensor | float, share: Tensor | float, drawn: Drawn) -> Tensor:
    """Take pixel (y, x) from x + slope·y + share·W (measured at the pixels' centres)."""
    channels, height, width = images.shape[1:]
    lines = torch.arange(height, device=images.device)[:, None] + 0.5
    way = (slope * lines + share * width).float()  # (R, 1, H, 1)
    whole = way.floor()
    columns = torch.arange(-1, width + 2, device=images.device) + whole.long()  # (R, 1, H, W + 3)
    taken = images.gather(3, columns.clamp(0, width - 1).expand(-1, channels, -1, -1)).float()
    taps = enumerate(_taps(way - whole, drawn.bicubic))
    values = sum((tap * taken[..., begin : begin + width] for begin, tap in taps), taken.new_zeros(()))
    source = torch.arange(width, device=images.device) + 0.5 + way
    return _filled(values, (source >= 0) & (source < width), drawn.fill)


def _rotated(images: Tensor, degrees: Tensor, drawn: Drawn) -> Tensor:
    """Turn images anticlockwise about their middle."""
    channels, height, width = images.shape[1:]
    angle = torch.deg2rad(degrees)
    cosine, sine = angle.cos().float(), angle.sin().float()
    y = torch.arange(height, device=images.device)[:, None] + (0.5 - height / 2)
    x = torch.arange(width, device=images.device) + (0.5 - width / 2)
    down = sine * x + cosine * y + height / 2  # (R, 1, H, W)
    right = cosine * x - sine * y + width / 2
    inside = (down >= 0) & (down < height) & (right >= 0) & (right < width)
    top, row_taps = _neighbours(down, height, drawn.bicubic)
    left, column_taps = _neighbours(right, width, drawn.bicubic)
    side = torch.arange(4, device=images.device)
    square = ((width + 4) * side[:, None] + side).view(16, 1, 1)
    pixels = ((width + 4) * top + left + square).flatten(1)[:, None]  # (R, 1, 16·H·W)
    padded = F.pad(images.float(), 4 * [2], mode="replicate").flatten(2)
    taken = padded.gather(2, pixels.expand(-1, channels, -1)).view(-1, channels, 16, height, width)
    taps = (row_taps[:, :, None] * column_taps[:, None]).view(-1, 1, 16, height, width)
    return _filled(taken.mul_(taps).sum(2), inside, drawn.fill)


def _neighbours(source: Tensor, length: int, bicubic: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first of four pixels (of a line padded by two) about each place (R, 1, H, W), and their weights."""
    second = (source - 0.5).floor()
    return (second + 1).clamp_(0, length).long(), torch.cat(_taps(source - 0.5 - second, bicubic), 1)


def _taps(way: Tensor, bicubic: Tensor) -> tuple[Tensor, ...]:
    """Return the weights of four neighbours for a place that is `way` between the second and the third.

    Bicubic (as Pillow transforms: a = -1) is bilinear with a correction.
    """
    way, bicubic = way.float(), bicubic.float()
    rest = 1 - way
    bow = bicubic * way * rest
    near, far = bow * rest, bow * way
    return -near, rest + near, way + far, -far


def _filled(values: Tensor, inside: Tensor, fill: Tensor) -> Tensor:
    return torch.where(inside, values.add_(1e-3).clamp_(0, 255), fill)  # 7 must not be cut off as 6.9999


def _factor(drawn: Drawn) -> Tensor:
    return 0.1 + 1.8 * drawn.level


def _increasing(drawn: Drawn) -> Tensor:
    return (1 + 0.9 * drawn.signed).clamp(min=0.1)


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "AutoContrast": _auto_contrast,
        "Equalize": _equalize,
        "Invert": lambda images, drawn: 255 - images,
        "Rotate": lambda images, drawn: _rotated(images, 30 * drawn.signed, drawn),
        "Posterize": lambda images, drawn: _posterize(images, (4 * drawn.level).int()),
        "PosterizeIncreasing": lambda images, drawn: _posterize(images, 4 - (4 * drawn.level).int()),
        "Solarize": lambda images, drawn: _solarize(images, (256 * drawn.level).int()),
        "SolarizeIncreasing": lambda images, drawn: _solarize(images, 256 - (256 * drawn.level).int()),
        "SolarizeAdd": lambda images, drawn: _solarize_add(images, (110 * drawn.level).int().clamp(max=128)),
        "Color": _enhance(_grey, _factor),
        "ColorIncreasing": _enhance(_grey, _increasing),
        "Contrast": _enhance(_mean_grey, _factor),
        "ContrastIncreasing": _enhance(_mean_grey, _increasing),
        "Brightness": _enhance(_black, _factor),
        "BrightnessIncreasing": _enhance(_black, _increasing),
        "Sharpness": _enhance(_smooth, _factor),
        "SharpnessIncreasing": _enhance(_smooth, _increasing),
        "ShearX": lambda images, drawn: _slid(images, 0.3 * drawn.signed, 0.0, drawn),
        "ShearY": lambda images, drawn: _slid(images.mT, 0.3 * drawn.signed, 0.0, drawn).mT,
        "TranslateXRel": lambda images, drawn: _slid(images, 0.0, 0.45 * drawn.signed, drawn),
        "TranslateYRel": lambda images, drawn: _slid(images.mT, 0.0, 0.45 * drawn.signed, drawn).mT,
    }
)

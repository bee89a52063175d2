"""Models of the paper, and small ones; importing this module adds their names to timm's registry.

`timm.create_model(name, join="lape", pe=..., pe_norm=...)` creates one with a join applied; without `join`, `pe` and
`pe_norm` it is the model alone, as its first authors or timm made it.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, load_pretrained, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lape.errors import RunError, UsageError, choose, first_line
from lape.fetching import refuse_unreachable, timm_weights
from lape.hosts import find
from lape.models import ceit, compact, deit, mask_rcnn, segmenter, swin, t2t_vit, upernet, vit
from lape.models.ceit import CeiT
from lape.models.compact import CompactTransformer
from lape.models.t2t_vit import T2TViT
from lape.names import JoinName, PositionEmbeddingName, PositionNormName, SchemeNames, StartName
from lape.surgery.operation import apply
from lape.weights import convert

Build = Callable[..., nn.Module]


def _as_it_is(model: nn.Module) -> None:
    """Nothing differs."""


@dataclass(frozen=True)
class Family:
    """Models of one architecture: what makes them, with numbers for each name; or timm's, with what a recipe adds."""

    variants: Mapping[str, Mapping[str, Any]]
    kind: Build | None = None
    as_published: Callable[[nn.Module], None] = _as_it_is
    cfg: Mapping[str, Any] = field(default_factory=dict)  # what timm says of its models, beside `_cfg`
    learns_from: str = "classes"  # the kind of set (`lape.data.sources.PictureSource.kind`)


def _dense(learns_from: str, variants: Mapping[str, Mapping[str, Any]], kind: Build, classes: int, side: int) -> Family:
    """Return a family for detection or segmentation; `side` is that of images, its table may be of others."""
    cfg = {"num_classes": classes, "input_size": (3, side, side), "crop_pct": 1.0, "classifier": None}
    cfg |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return Family(variants, kind, cfg=cfg, learns_from=learns_from)


FAMILIES = (
    Family({name: {} for name in deit.NAMES}, as_published=deit.as_published),
    Family(t2t_vit.VARIANTS, T2TViT),
    Family(ceit.VARIANTS, CeiT),
    Family({name: {} for name in swin.NAMES}, as_published=swin.as_published),
    Family(compact.VARIANTS, CompactTransformer),
    Family(vit.VARIANTS, VisionTransformer),
    _dense("instances", mask_rcnn.VARIANTS, mask_rcnn.mask_rcnn, classes=80, side=800),
    _dense("instances", mask_rcnn.NANO, mask_rcnn.mask_rcnn, classes=5, side=128),
    _dense("maps", upernet.VARIANTS, upernet.upernet, classes=150, side=512),
    _dense("maps", upernet.NANO, upernet.upernet, classes=6, side=128),
    _dense("maps", segmenter.VARIANTS, segmenter.segmenter, classes=150, side=512),
    _dense("maps", segmenter.NANO, segmenter.segmenter, classes=6, side=128),
)
MODELS: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.variants}

# What the paper calls them.
PAPER = {
    "deit_tiny_patch16_224": "DeiT-Ti",
    "deit_small_patch16_224": "DeiT-S",
    "deit_base_patch16_224": "DeiT-B",
    "deit_tiny_distilled_patch16_224": "DeiT-Ti-distill",
    "deit_small_distilled_patch16_224": "DeiT-S-distill",
    "deit_base_distilled_patch16_224": "DeiT-B-distill",
    "t2t_vit_7": "T2T-ViT-7",
    "ceit_tiny_patch16_224": "CeiT-Ti",
    "ceit_small_patch16_224": "CeiT-S",
    "swin_tiny_patch4_window7_224": "Swin-Ti",
    "swin_small_patch4_window7_224": "Swin-S",
    "vit_7_4_32": "ViT-Lite-7/4",
    "cvt_7_4_32": "CVT-7/4",
    "cct_7_3x1_32": "CCT-7/3x1",
    "mask_rcnn_vit_adapter_tiny": "ViT-Adapter-Ti",
    "mask_rcnn_vit_adapter_small": "ViT-Adapter-S",
    "upernet_vit_adapter_tiny": "ViT-Adapter-Ti",
    "upernet_vit_adapter_small": "ViT-Adapter-S",
    "segmenter_tiny_patch16": "Seg-T-Mask/16",
    "segmenter_small_patch16": "Seg-S-Mask/16",
}


def _cfg(numbers: Mapping[str, Any]) -> dict[str, Any]:
    side = numbers["img_size"]
    photographs = side >= 224
    return {
        "input_size": (3, side, side),
        "num_classes": 1000 if photographs else 10,
        "crop_pct": 0.9 if photographs else 1.0,
        "mean": IMAGENET_DEFAULT_MEAN if photographs else (0.5, 0.5, 0.5),
        "std": IMAGENET_DEFAULT_STD if photographs else (0.5, 0.5, 0.5),
        "classifier": "head",
    }


def learns_from(model: str) -> str:
    """Return the kind of set that a model learns from; one that is not of ours is timm's, and a classifier."""
    return MODELS[model].learns_from if model in MODELS else Family.learns_from


def models_for(kind: str) -> list[str]:
    """Return the names of our models that learn from a kind of set."""
    return sorted(name for name, family in MODELS.items() if family.learns_from == kind)


# By this name `register_model` finds what is known of a model.
default_cfgs = generate_default_cfgs(
    {
        name: {**_cfg(numbers), **family.cfg}
        for family in FAMILIES
        if family.kind
        for name, numbers in family.variants.items()
    }
)


def _build(name: str, family: Family) -> Build:
    if family.kind is None:
        return timm.model_entrypoint(name)
    kind: Any = family.kind
    numbers = dict(family.variants[name])

    def build(pretrained: bool = False, **options: Any) -> nn.Module:  # timm hands over its own keywords
        classes: dict[str, Any] = {"num_classes": default_cfgs[name].default.num_classes}
        features = {"out_indices": 3, "feature_cls": "getter"}
        return build_model_with_cfg(kind, name, pretrained, feature_cfg=features, **classes | numbers | options)

    build.__name__ = name  # the name under which timm lists it
    return build


def _refuse_another(asked: SchemeNames, saved: Mapping[str, str]) -> None:
    if asked != tuple(saved.get(name) for name in asked._fields):
        theirs = ", ".join(f"{name}={saved.get(name)!r}" for name in asked._fields)
        raise UsageError(f"These weights were trained with {theirs}. Leave out join, pe, pe_norm, start.")


def _load_joined(model: Any, options: Mapping[str, Any]) -> None:
    """Load weights that were saved with their join, which timm would do before there is one."""
    classes = 0 if options.get("features_only") else options.get("num_classes", model.pretrained_cfg["num_classes"])
    channels = options.get("in_chans", 3)
    load_pretrained(model, model.pretrained_cfg, classes, channels, lambda weights, _: convert(weights, model))


def _register(name: str, family: Family) -> None:
    build = _build(name, family)

    @wraps(build)  # timm's names stay those of timm's modules
    def create(
        pretrained: bool = False,
        join: str | None = None,
        pe: str | None = None,
        pe_norm: str = "layernorm",
        start: str = "fresh",
        **options: Any,
    ) -> nn.Module:
        if options.get("features_only") and family.learns_from != Family.learns_from:
            raise UsageError(
                f"features_only takes the maps of a backbone, and {name} is a whole model with its heads. Leave it "
                "out, or name a classifier, as deit_tiny_patch16_224."
            )
        asked = SchemeNames(join or "default", pe, pe_norm, start)
        if join is None and asked == SchemeNames("default"):
            return build(pretrained=pretrained, **options)
        if options.get("features_only"):
            options = {"feature_cls": "getter"} | options  # it keeps the model whole
        saved = (options.get("pretrained_model_args") or {}) if pretrained else {}  # with weights that timm would read
        ready = pretrained and "join" not in saved
        model = build(pretrained=ready, **options)
        if not ready:
            family.as_published(find(model)[0])
        apply(model, *asked)
        if "join" in saved:
            _refuse_another(asked, saved)
            _load_joined(model.model if options.get("features_only") else model, options)
        return model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Overwriting")  # DeiT and Swin are timm's, and learn three keywords here
        register_model(create)


for _name, _family in MODELS.items():
    _register(_name, _family)


def create_model(
    name: str,
    join: JoinName | str = "lape",
    pe: PositionEmbeddingName | str | None = None,
    pe_norm: PositionNormName | str = "layernorm",
    start: StartName | str = "fresh",
    **options: Any,
) -> nn.Module:
    """Create a model by its name in timm's registry, which this project's models join, and apply a join to it.

    Args:
        name: As `timm.create_model` takes it, or one that `lape models` lists.
        join: As `lape.apply` takes it, and so are pe, pe_norm and start.
        pe: The position embedding; None keeps the model's own.
        pe_norm: What stands in the place of LN_ω.
        start: "fresh" or "preserve".
        options: Keywords of timm's, as num_classes, img_size and pretrained.

    Returns:
        The model, in training mode.

    Raises:
        UsageError: For a name that timm does not know (the message names the nearest), for options that the model does
            not take, and as `lape.apply` does.
        RunError: Where pretrained weights cannot be loaded.

    Example:
        >>> import torch
        >>> import lape
        >>> model = lape.create_model("vit_nano_patch2_8", join="lape", pe="sinusoidal-2d", num_classes=10)
        >>> model(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    if not isinstance(name, str):
        kind = type(name).__name__
        raise UsageError(f"lape.create_model takes a name of timm's, and this is a {kind}. A model: lape.apply(model).")
    asked = SchemeNames(join, pe, pe_norm, start)
    joins_itself = name.partition(".")[0] in MODELS
    model = build(name, **options | asked._asdict() if joins_itself else options)
    return model if joins_itself else apply(model, *asked)


def build(name: str, **options: Any) -> nn.Module:
    """Create a model by its name in timm's registry; raises what `create_model` does, but what `lape.apply` raises."""
    if "/" not in name and ":" not in name:
        choose(dict.fromkeys(timm.list_models()), name.partition(".")[0], "a model that timm knows")
        if options.get("pretrained") and not options.get("pretrained_cfg_overlay"):
            advice = "its path to lape.load_weights"
            refuse_unreachable(timm_weights(name), f"The weights of {name}", advice)
    try:
        return timm.create_model(name, **options)
    except (UsageError, RunError):
        raise
    except OSError as error:  # of the disk, of the network
        raise RunError(
            f"The weights of {name} could not be downloaded ({first_line(error)}). Create it without them."
        ) from error
    except Exception as error:  # whatever timm's constructors stumble over
        raise UsageError(
            f"{name} does not take these options: {first_line(error)}. Leave them out, or name a ViT."
        ) from error

"""Law: given a reference model's weights and input, ours computes its output and its gradients, in float64 to 1e-9.

Every *.json below the folder in LAPE_FIXTURES, or else below tests/fixtures, is a case. A case is built from it alone;
its weights come through the conversion that `lape.load_weights` makes of a reference project's file.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import LayerNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lape
from lape.models import swin as published_swin
from lape.models.ceit import CeiT
from lape.models.compact import CompactTransformer
from lape.models.segmenter import MaskTransformer, Segmenter, SegmenterViT
from lape.models.t2t_vit import T2TViT
from lape.models.upernet import NAMES, UperNet, fcn_head, uper_head
from lape.models.vit_adapter import ViTAdapter
from lape.weights import convert, renamed

FOLDER = Path(os.environ.get("LAPE_FIXTURES") or Path(__file__).parents[1] / "fixtures")
CASES = sorted(FOLDER.rglob("*.json"))
TOLERANCE = 1e-9

JOINS = {
    "basic": "default",
    "default": "default",
    "lape": "lape",
    "LN": "default",
    "share": "shared",
    "unshare": "unshared",
    "LaPE": "lape",
    "LaPE-sharing": "lape-sharing",
}
TABLES = {
    "learnable": "learnable",
    "1D_sin": "sinusoidal-1d",
    "2D_sin": "sinusoidal-2d",
    "2D_RPE": "relative",
    "none": "none",
    "rpe": "relative",
    "learnable+rpe": "learnable+relative",
}
NORMS = {
    "identity": "identity",
    "scale_scalar": "scalar",
    "scale": "scale",
    "affine": "affine",
    "norm": "norm",
    "norm_scalar": "scalar-norm",
    "norm_scale": "scale-norm",
    "layernorm": "layernorm",
}


SIZES = ("img_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")


def joined(model: nn.Module, case: dict[str, Any]) -> nn.Module:
    pe = TABLES[case["pe"]] + ("-layernorm" if case["join"] == "LN" else "")
    return lape.apply(model, JOINS[case["join"]], pe, NORMS[case["arch"].get("pe_norm_kind", "layernorm")])


def vit(case: dict[str, Any], kind: type[VisionTransformer], *renamed: tuple[str, str], **fixed: Any) -> nn.Module:
    """A VisionTransformer from the numbers that all have, and those that one kind calls by another name."""
    arch = case["arch"]
    options = {name: arch[name] for name in SIZES} | {ours: arch[theirs] for ours, theirs in renamed} | fixed
    return joined(kind(**options, norm_layer=partial(LayerNorm, eps=arch["norm_eps"])), case)


def swin(case: dict[str, Any]) -> nn.Module:
    arch = case["arch"]
    names = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depths", "num_heads", "window_size")
    options = {name: arch[name] for name in (*names, "mlp_ratio", "qkv_bias")}
    model = SwinTransformer(**options, norm_layer=partial(LayerNorm, eps=arch["ln_eps"]))
    published_swin.as_published(model)
    return joined(model, case)


def vit_adapter(case: dict[str, Any], arch: dict[str, Any] | None = None) -> nn.Module:
    arch = arch or case["arch"]
    names = (*SIZES[1:2], *SIZES[3:], "patch_size", "qkv_bias")
    adapter = ViTAdapter(
        **{name: arch[name] for name in names},
        img_size=arch["pretrain_size"],
        interactions=arch["interaction_indexes"],
        windows=arch["window_size"],
        token_map_of_group=arch["variant"] == "seg",
        prior_width=arch["conv_inplane"],
        deform_heads=arch["deform_num_heads"],
        deform_points=arch["n_points"],
        deform_ratio=arch["deform_ratio"],
        ffn_ratio=arch["cffn_ratio"],
        init_values=1.0 if arch["layer_scale"] else None,
        norm_layer=partial(LayerNorm, eps=arch["ln_eps"]),
    )
    return joined(adapter, case)


def vit_adapter_upernet(case: dict[str, Any]) -> nn.Module:
    arch = case["arch"]
    head, auxiliary = arch["decode_head"], arch["auxiliary_head"]
    backbone = vit_adapter({**case, "arch": arch["backbone"]})
    return UperNet(backbone, head["num_classes"], head["channels"], auxiliary["channels"])


def segmenter(case: dict[str, Any]) -> nn.Module:
    arch = case["arch"]
    encoder = SegmenterViT(
        img_size=arch["image_size"],
        patch_size=arch["patch_size"],
        in_chans=arch["in_chans"],
        embed_dim=arch["d_model"],
        depth=arch["n_layers"],
        num_heads=arch["n_heads"],
        mlp_ratio=arch["d_ff"] / arch["d_model"],
        num_classes=arch["encoder_n_cls"],
        dynamic_img_size=True,
        norm_layer=partial(LayerNorm, eps=arch["ln_eps"]),
    )
    decoder = MaskTransformer(
        arch["n_cls"], arch["d_model"], arch["dec_d_model"], arch["dec_n_layers"], arch["dec_n_heads"]
    )
    return Segmenter(joined(encoder, case), decoder)


PATCH, BIAS = ("patch_size", "patch_size"), ("qkv_bias", "qkv_bias")
KERNEL, CONVOLUTIONS = ("kernel", "kernel_size"), ("convolutions", "n_conv_layers")
BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "vit": lambda case: vit(case, VisionTransformer, PATCH, BIAS),
    "deit_distilled": lambda case: vit(case, VisionTransformerDistilled, PATCH, BIAS),
    "t2t_vit": lambda case: vit(case, T2TViT, BIAS, ("token_dim", "token_dim")),
    "ceit": lambda case: vit(case, CeiT, PATCH, BIAS, ("stem_dim", "stem_chans")),
    "vit_lite": lambda case: vit(case, CompactTransformer, KERNEL, class_token=True),
    "cvt": lambda case: vit(case, CompactTransformer, KERNEL),
    "cct": lambda case: vit(case, CompactTransformer, KERNEL, CONVOLUTIONS),
    "swin": swin,
    "vit_adapter": vit_adapter,
    "vit_adapter_upernet": vit_adapter_upernet,
    "segmenter": segmenter,
    "upernet_head": lambda case: uper_head(
        *(case["arch"][name] for name in ("in_channels", "channels", "num_classes"))
    ),
    "fcn_head": lambda case: fcn_head(
        *(case["arch"][name] for name in ("in_channels", "channels", "num_classes")), level=0
    ),
}
HEADS = ("upernet_head", "fcn_head")  # on maps, not on an image


def assert_close(ours: Tensor, reference: Tensor, what: str) -> None:
    error = (ours - reference).abs().max() / reference.abs().max().clamp(min=1e-30)
    assert ours.shape == reference.shape, f"{what}: {tuple(ours.shape)} against {tuple(reference.shape)}"
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def test_there_are_cases() -> None:
    assert CASES, f"no *.json below {FOLDER}"


def numbered(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    """`name`, or `name/0`, `name/1` and so on."""
    if name in tensors:
        return [tensors[name]]
    return [tensors[key] for key in sorted(tensors) if key.startswith(f"{name}/")]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_computes_what_the_reference_computes(path: Path) -> None:
    case = json.loads(path.read_text())
    tensors = load_file(path.with_suffix(".safetensors"))
    model = BUILDERS[case["family"]](case)
    head = case["family"] in HEADS
    state = {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}
    model.load_state_dict(renamed(state, NAMES) if head else convert(state, model), strict=True)
    model.double().eval()

    inputs = [given.double().requires_grad_() for given in numbered(tensors, "input")]
    given = model(inputs if head else inputs[0])
    outputs = [given] if isinstance(given, Tensor) else list(given)
    torch.stack([output.square().sum() for output in outputs]).sum().backward()

    for output, reference in zip(outputs, numbered(tensors, "output"), strict=True):
        assert_close(output.detach(), reference, "output")
    for image, reference in zip(inputs, numbered(tensors, "input_grad"), strict=True):
        assert image.grad is not None
        assert_close(image.grad, reference, "input gradient")
    # Gradients are filed under the reference's names, so they go through the same conversion as the weights.
    filed = {name.removeprefix("grad/"): value for name, value in tensors.items() if name.startswith("grad/")}
    assert set(filed) == set(case.get("grad_keys", filed))
    gradients = {} if head else convert(state | filed, model)
    among = {value.untyped_storage().data_ptr() for value in filed.values()}
    gradients = {name: value for name, value in gradients.items() if value.untyped_storage().data_ptr() in among}
    assert len(gradients) == len(filed)
    for name, reference in gradients.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None, f"{name} has no gradient"
        assert_close(gradient, reference, f"gradient of {name}")
    for layer, rung in enumerate([] if head else lape.ladder(model)):
        if f"aux/pe.{layer}" in tensors:
            assert rung.attention is not None
            reference = tensors[f"aux/pe.{layer}"]  # without its batch axis where the authors' table has none
            assert_close(rung.attention.detach(), reference.view_as(rung.attention), f"p_{layer}")

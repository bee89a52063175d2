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
from lape.models.t2t_vit import T2TViT
from lape.weights import convert

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
}


def assert_close(ours: Tensor, reference: Tensor, what: str) -> None:
    error = (ours - reference).abs().max() / reference.abs().max().clamp(min=1e-30)
    assert ours.shape == reference.shape, f"{what}: {tuple(ours.shape)} against {tuple(reference.shape)}"
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def test_there_are_cases() -> None:
    assert CASES, f"no *.json below {FOLDER}"


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_computes_what_the_reference_computes(path: Path) -> None:
    case = json.loads(path.read_text())
    tensors = load_file(path.with_suffix(".safetensors"))
    model = BUILDERS[case["family"]](case)
    state = {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}
    model.load_state_dict(convert(state, model), strict=True)
    model.double().eval()

    image = tensors["input"].double().requires_grad_()
    output = model(image)
    output.square().sum().backward()

    assert_close(output.detach(), tensors["output"], "output")
    assert image.grad is not None
    assert_close(image.grad, tensors["input_grad"], "input gradient")
    # Gradients are filed under the reference's names, so they go through the same conversion as the weights.
    filed = {name.removeprefix("grad/"): value for name, value in tensors.items() if name.startswith("grad/")}
    assert set(filed) == set(case.get("grad_keys", filed))
    among = {id(value) for value in filed.values()}
    gradients = {name: value for name, value in convert(state | filed, model).items() if id(value) in among}
    assert len(gradients) == len(filed)
    for name, reference in gradients.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None, f"{name} has no gradient"
        assert_close(gradient, reference, f"gradient of {name}")
    for layer, rung in enumerate(lape.ladder(model)):
        if f"aux/pe.{layer}" in tensors:
            assert rung.attention is not None
            reference = tensors[f"aux/pe.{layer}"]  # without its batch axis where the authors' table has none
            assert_close(rung.attention.detach(), reference.view_as(rung.attention), f"p_{layer}")

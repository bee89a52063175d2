"""Law: given a reference model's weights and input, ours computes its output and its gradients, in float64 to 1e-9.

Every *.json below the folder in LAPE_FIXTURES, or else below tests/fixtures, is a case; a case is built from it alone.
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
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lape
from lape.weights import convert

FOLDER = Path(os.environ.get("LAPE_FIXTURES") or Path(__file__).parents[1] / "fixtures")
CASES = sorted(FOLDER.rglob("*.json"))
TOLERANCE = 1e-9

JOINS = {
    "basic": "default",
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


def vit(case: dict[str, Any], kind: type[VisionTransformer] = VisionTransformer) -> nn.Module:
    arch = case["arch"]
    sizes = (
        "img_size",
        "patch_size",
        "in_chans",
        "num_classes",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "qkv_bias",
    )
    model = kind(**{name: arch[name] for name in sizes}, norm_layer=partial(LayerNorm, eps=arch["norm_eps"]))
    pe = TABLES[case["pe"]] + ("-layernorm" if case["join"] == "LN" else "")
    return lape.apply(model, JOINS[case["join"]], pe, NORMS[arch.get("pe_norm_kind", "layernorm")])


BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "vit": vit,
    "deit_distilled": partial(vit, kind=VisionTransformerDistilled),
}
# Their models are the work of the issue "The paper's classification models".
AWAITED = {"vit_lite", "cvt", "cct", "t2t_vit", "ceit"}


def cases() -> list[Any]:
    awaited = [path for path in CASES if json.loads(path.read_text())["family"] in AWAITED]
    mark = pytest.mark.xfail(reason="the paper's classification models have not landed", raises=KeyError, strict=True)
    return [pytest.param(path, id=path.stem, marks=[mark] if path in awaited else []) for path in CASES]


def assert_close(ours: Tensor, reference: Tensor, what: str) -> None:
    error = (ours - reference).abs().max() / reference.abs().max().clamp(min=1e-30)
    assert ours.shape == reference.shape, f"{what}: {tuple(ours.shape)} against {tuple(reference.shape)}"
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def test_there_are_cases() -> None:
    assert CASES, f"no *.json below {FOLDER}"


@pytest.mark.parametrize("path", cases())
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
    gradients = {name.removeprefix("grad/"): value for name, value in tensors.items() if name.startswith("grad/")}
    assert set(gradients) == set(case["grad_keys"])
    for name, reference in gradients.items():
        (ours,) = convert({name: reference}, model).keys()
        gradient = model.get_parameter(ours).grad
        assert gradient is not None, f"{ours} has no gradient"
        assert_close(gradient, reference, f"gradient of {ours}")
    for layer, rung in enumerate(lape.ladder(model)):
        if f"aux/pe.{layer}" in tensors:
            assert rung.attention is not None
            reference = tensors[f"aux/pe.{layer}"]  # without its batch axis where the authors' table has none
            assert_close(rung.attention.detach(), reference.view_as(rung.attention), f"p_{layer}")

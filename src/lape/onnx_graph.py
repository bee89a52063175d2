"""A folded model as ONNX adds no more than the default join does: its constants join the biases behind a product.

(x + p)·W + b = x·W + (p·W + b): where p is told of tokens that go into linear layers alone, one constant does for both.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def fuse(graph: Any) -> None:
    """Take out of a graph (onnx_ir's) the additions of constants that a bias can take up, and those of zeros."""
    for node in list(graph):
        if node.op_type == "Add" and (addition := _addition(node)):
            tokens, constant = addition
            if not constant.any() and tokens.shape == node.outputs[0].shape:
                _take_out(graph, node, tokens)
            elif products := _products(node.outputs[0]):
                for matrix, bias in products:
                    _add_to(graph, bias, constant.astype(np.float64) @ matrix)
                _take_out(graph, node, tokens)


def _addition(node: Any) -> tuple[Any, NDArray[Any]] | None:
    """Return the tokens and the constant (1, N, D) that a node adds to them."""
    for one, other in (node.inputs, node.inputs[::-1]):
        constant = _constant(other)
        if constant is not None and constant.ndim == 3 and _constant(one) is None:
            return one, constant
    return None


def _products(value: Any) -> list[tuple[NDArray[Any], Any]] | None:
    """Return the matrices that a value is multiplied with, each with the addition of its bias; None for other uses."""
    found = []
    for product, place in value.uses():
        users = product.outputs[0].uses()
        matrix = _constant(product.inputs[1]) if product.op_type == "MatMul" and place == 0 else None
        if matrix is None or len(users) != 1:
            return None
        bias = users[0].node
        if bias.op_type != "Add" or not any(
            part is not None and part.ndim == 1 for part in map(_constant, bias.inputs)
        ):
            return None
        found.append((matrix, bias))
    return None if value.is_graph_output() else found


def _add_to(graph: Any, bias: Any, more: NDArray[np.float64]) -> None:
    """Give an addition of a bias (D) a constant (1, N, D) in its place, the bias and more."""
    import onnx_ir

    ir: Any = onnx_ir  # its tensors and its protocols of tensors have types of their own
    place, own = next((place, value) for place, value in enumerate(bias.inputs) if _constant(value) is not None)
    vector = own.const_value.numpy()
    both = (more + vector).astype(vector.dtype)
    tensor = ir.tensor(both, name=f"{bias.outputs[0].name}_positions")
    value = ir.Value(name=tensor.name, shape=tensor.shape, type=own.type, const_value=tensor)
    graph.register_initializer(value)
    bias.replace_input_with(place, value)


def _take_out(graph: Any, node: Any, tokens: Any) -> None:
    from onnx_ir.convenience import replace_all_uses_with

    replace_all_uses_with(node.outputs[0], tokens)
    graph.remove(node, safe=True)


def _constant(value: Any) -> NDArray[Any] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()

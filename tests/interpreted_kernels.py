"""Laws of the kernel that norms tokens and adds positions, by Triton's interpreter on the CPU.

Triton must find TRITON_INTERPRET=1 when it is imported, so `test_fused.py` runs this file in a process of its own; by
hand: TRITON_INTERPRET=1 pytest tests/interpreted_kernels.py.
"""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fast_norm, set_reentrant_ckpt
from torch import Tensor, nn
from torch.autograd import forward_ad

import lape
from lape.surgery import kernels
from lape.surgery.operation import positions

STEPS = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # the interpreter cuts bfloat16 off


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "TILE", 256)  # so that small tensors have several
    monkeypatch.setattr(kernels, "PROGRAMS", 4)


def laid(tokens: Tensor, how: str) -> Tensor:
    """The same values on other strides."""
    if how == "channels before tokens":
        return tokens.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "sliced":
        return torch.cat([tokens, torch.randn_like(tokens)], dim=2)[:, :, : tokens.shape[2]]
    if how == "every second sample":
        return tokens.repeat_interleave(2, dim=0)[::2]
    return tokens


def drawn(shape: tuple[int, int, int], dtype: torch.dtype, held: torch.dtype) -> list[Tensor]:
    """x, γ, β and p."""
    _, count, channels = shape
    tokens = (3 * torch.randn(shape) + 1).to(dtype)
    return [tokens, *(torch.randn(size).to(held) for size in ((channels,), (channels,), (count, channels)))]


def exact(tokens: Tensor, gain: Tensor, shift: Tensor, position: Tensor) -> Tensor:
    """LN(x) + p as two operations, in float64."""
    return F.layer_norm(tokens, tokens.shape[-1:], gain, shift, 1e-6) + position


# Tokens, what γ, β and p are held in, and what is put out: as without autocast, and as with it.
@pytest.mark.parametrize(
    ("shape", "dtype", "held", "out"),
    [
        pytest.param((1, 1, 8), torch.float32, torch.float32, torch.float32, id="one token of one image"),
        pytest.param((5, 3, 48), torch.float32, torch.float32, torch.float32, id="a tail of samples"),
        pytest.param((9, 2, 100), torch.float32, torch.float32, torch.float16, id="several tiles, parts and a tail"),
        pytest.param((3, 2, 64), torch.bfloat16, torch.bfloat16, torch.bfloat16, id="a power of two"),
        pytest.param((2, 1, 1500), torch.float16, torch.float16, torch.float16, id="a wide token"),
        pytest.param((3, 2, 24), torch.bfloat16, torch.float32, torch.bfloat16, id="tokens of a product"),
    ],
)
def test_numbers_and_all_four_gradients_are_those_of_norm_and_sum(
    shape: tuple[int, int, int], dtype: torch.dtype, held: torch.dtype, out: torch.dtype
) -> None:
    inputs = [one.requires_grad_() for one in drawn(shape, dtype, held)]
    doubles = [one.detach().double().requires_grad_() for one in inputs]
    output, expected = kernels.layer_norm_plus(*inputs, 1e-6, out), exact(*doubles)
    assert output.dtype == out
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), expected, rtol=STEPS[out], atol=4 * STEPS[torch.float32])
    weight = torch.randn(shape).to(out)
    gradients = torch.autograd.grad(output, inputs, weight)
    for gradient, right, source in zip(
        gradients, torch.autograd.grad(expected, doubles, weight.double()), inputs, strict=True
    ):
        assert (gradient.dtype, gradient.shape) == (source.dtype, source.shape)
        most = right.abs().max().item()
        torch.testing.assert_close(
            gradient.double(), right, rtol=STEPS[source.dtype], atol=max(most, 1.0) * 2 * STEPS[torch.float32]
        )


@pytest.mark.parametrize("how", ["channels before tokens", "sliced", "every second sample"])
def test_tokens_and_gradients_may_lie_anyhow(how: str) -> None:
    tokens, *others = drawn((3, 2, 48), torch.float32, torch.float32)
    results = []
    for one in (tokens, laid(tokens, how)):
        inputs = [one.detach().requires_grad_(), *(other.clone().requires_grad_() for other in others)]
        output = kernels.layer_norm_plus(*inputs, 1e-6, torch.float32)
        weights = laid(torch.arange(3 * 2 * 48.0).view(3, 2, 48).sin(), how)
        results.append((output, *torch.autograd.grad(output, inputs, weights), *torch.autograd.grad(
            kernels.layer_norm_plus(*inputs, 1e-6, torch.float32).sum(), inputs  # a gradient of strides 0
        )))  # fmt: skip
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_gradients_are_those_of_differences() -> None:
    inputs = [one.requires_grad_() for one in drawn((3, 2, 5), torch.float32, torch.float32)]

    def normed(*inputs: Tensor) -> Tensor:
        return kernels.layer_norm_plus(*inputs, 1e-6, torch.float32)

    with warnings.catch_warnings(action="ignore"):  # gradcheck would have float64
        assert torch.autograd.gradcheck(normed, inputs, eps=1e-2, atol=2e-2, rtol=2e-2, fast_mode=True)


def test_a_token_without_variance_is_as_in_the_norm() -> None:
    inputs = [torch.full((3, 2, 8), 2.0), *drawn((3, 2, 8), torch.float32, torch.float32)[1:]]
    for eps in (1e-6, 0.0):
        output = kernels.layer_norm_plus(*inputs, eps, torch.float32)
        expected = F.layer_norm(inputs[0], (8,), inputs[1], inputs[2], eps) + inputs[3]
        torch.testing.assert_close(output, expected, equal_nan=True)


def test_without_eps_what_is_outside_of_the_tokens_adds_nothing_to_the_sums() -> None:
    inputs = [one.requires_grad_() for one in drawn((5, 2, 24), torch.float32, torch.float32)]
    kernels.layer_norm_plus(*inputs, 0.0, torch.float32).sum().backward()
    assert all(one.grad.isfinite().all() for one in inputs)


@pytest.mark.parametrize("which", [(0, 1, 2, 3), (0,), (1, 3)], ids=str)
def test_gradients_of_gradients_are_those_of_norm_and_sum(which: tuple[int, ...]) -> None:
    inputs = drawn((3, 2, 8), torch.float32, torch.float32)
    doubles = [one.double() for one in inputs]
    results = []
    for given, normed in ((inputs, kernels.layer_norm_plus), (doubles, lambda *of: exact(*of[:4]))):
        learns = [given[number].requires_grad_() for number in which]
        output = normed(*given, 1e-6, torch.float32)
        weight = torch.arange(48.0).view(3, 2, 8).sin().to(output.dtype)
        first = torch.autograd.grad((weight * output.square()).sum(), learns, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(one.square().sum() for one in first), learns)])
    for found, right in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4 * right.abs().max().item())


# --- In a model

TINY: dict[str, Any] = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}


def host(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY, **options})


def shaken(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():  # nothing may hide behind a zero
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


def on_cpu(model: nn.Module) -> nn.Module:
    """Force the kernel on: tests have no GPU."""
    positions(lape.set_fused(model)).fused_on = ("cpu",)
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """The dtypes of the tokens that the kernel was given."""
    heard, kernel = [], kernels.layer_norm_plus

    def listening(tokens: Tensor, *others: Any) -> Tensor:
        heard.append(tokens.dtype)
        return kernel(tokens, *others)

    monkeypatch.setattr(kernels, "layer_norm_plus", listening)
    return heard


def images(model: nn.Module, count: int = 3) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, *model.patch_embed.img_size)


MODELS = {
    "lape": (lambda: lape.apply(host()), 2),
    "lape, no class token": (lambda: lape.apply(host(class_token=False, global_pool="avg")), 2),
    "lape-sharing": (lambda: lape.apply(host(), "lape-sharing", "sinusoidal-2d"), 2),
    "preserve": (lambda: lape.apply(host(), start="preserve"), 2),
    "pvg": (lambda: lape.apply(host(), "pvg"), 1),
    "checkpoints": (lambda: lape.apply(host()), 2 * 2),
    "re-entrant checkpoints": (lambda: lape.apply(host()), 2 * 2),
    "maps of tokens": (lambda: lape.create_model(
        "swin_tiny_patch4_window7_224", img_size=16, window_size=2, embed_dim=12, depths=(1, 1), num_heads=(2, 2),
        num_classes=5, drop_path_rate=0.0, join="lape", pe="learnable"
    ), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_takes_it_and_learns_the_same(name: str, calls: list[torch.dtype]) -> None:
    make, due = MODELS[name]
    model = shaken(make()).train()
    x = images(model).requires_grad_()
    results = []
    for fused in (False, True):
        on_cpu(model) if fused else lape.set_fused(model, False)
        set_reentrant_ckpt(name == "re-entrant checkpoints")
        model.set_grad_checkpointing("checkpoints" in name)
        model.zero_grad()
        x.grad = None
        output = model(x)
        output.square().sum().backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
        results.append((output.detach(), x.grad, gradients))
        assert len(calls) == due * fused
    set_reentrant_ckpt(False)
    (plain, of_images, gradients), (output, *others) = results
    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
    for key, right in {"images": of_images, **gradients}.items():
        found = others[0] if key == "images" else others[1][key]
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4 * right.abs().max().item(), msg=key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_the_product_is_given_the_same_bits(dtype: torch.dtype, calls: list[torch.dtype]) -> None:
    model, given = shaken(lape.apply(host())).eval(), []
    model.blocks[0].attn.qkv.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        lape.set_fused(model, False)(images(model))
        on_cpu(model)(images(model))
    plain, fused = given
    assert calls == [torch.float32] * 2
    assert (plain.dtype, fused.dtype) == (torch.float32, dtype)
    if dtype == torch.float16:  # the interpreter cuts bfloat16 off where a card rounds
        assert (fused != plain.to(dtype)).float().mean() < 1e-3
    torch.testing.assert_close(fused.float(), plain, rtol=STEPS[dtype], atol=1e-6)


def test_a_folded_model_takes_it(calls: list[torch.dtype]) -> None:
    model = shaken(lape.apply(host())).eval()
    x = images(model)
    folded = lape.fold(copy.deepcopy(model))
    with torch.inference_mode(), torch.device("cpu"):  # a mode that every function passes through
        torch.testing.assert_close(on_cpu(folded)(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(calls) == 2
    assert positions(copy.deepcopy(folded)).fused_on == ("cpu",)
    lape.set_fused(folded, False)(x)
    assert len(calls) == 2


def watched(model: nn.Module) -> None:
    model.blocks[0].norm1.register_forward_hook(lambda *_: None)
    model.blocks[1].norm1.register_full_backward_hook(lambda *_: None)


def without_bias(model: nn.Module) -> None:
    for block in model.blocks:
        block.norm1.bias = None


def of_own_forward(model: nn.Module) -> None:
    for block in model.blocks:
        block.norm1.forward = block.norm1.forward


def double(model: nn.Module) -> None:
    model.double()


def in_parts(model: nn.Module) -> None:
    model.patch_drop = timm.layers.PatchDropout(0.5)


def fast(model: nn.Module) -> None:
    for block in model.blocks:
        block.norm1._fast_norm = True


def rms(model: nn.Module) -> None:
    for block in model.blocks:
        block.norm1 = timm.layers.RmsNorm(24)


@pytest.mark.parametrize("change", [watched, without_bias, of_own_forward, double, fast, rms])
def test_what_it_is_not_for_takes_the_plain_path(change: Any, calls: list[torch.dtype]) -> None:
    model = shaken(lape.apply(host())).eval()
    change(model)
    x = images(model).to(next(model.parameters()).dtype)
    expected = lape.set_fused(model, False)(x)
    assert torch.equal(on_cpu(model)(x), expected)
    assert calls == []


def test_by_itself_it_is_for_wide_tokens(calls: list[torch.dtype]) -> None:
    for width, count in ((360, 0), (384, 2)):
        model = lape.apply(host(embed_dim=width)).eval()
        positions(model).fused_on = ("cpu",)
        model(images(model))
        assert len(calls) == count


def test_positions_of_each_image_take_the_plain_path(calls: list[torch.dtype]) -> None:
    model = shaken(lape.apply(host(patch_drop_rate=0.5))).train()
    outputs = []
    for one in (lape.set_fused(model, False), on_cpu(model)):
        torch.manual_seed(2)
        outputs.append(one(images(model)))
    assert torch.equal(*outputs)
    assert calls == []


def test_hooks_on_a_norm_see_what_they_saw(calls: list[torch.dtype]) -> None:
    seen: list[Tensor] = []
    model = host()
    model.blocks[0].norm1.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    shaken(lape.apply(model)).eval()
    model.blocks[0].norm1.register_forward_hook(lambda _, __, output: seen.append(output.clone()))
    lape.set_fused(model, False)(images(model))
    on_cpu(model)(images(model))
    assert all(torch.equal(before, after) for before, after in zip(seen[:2], seen[2:], strict=True))
    assert len(calls) == 1  # the other layer's
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    model(images(model))
    handle.remove()
    assert len(calls) == 1


def test_traced_and_transformed_models_take_the_plain_path(calls: list[torch.dtype]) -> None:
    model = on_cpu(shaken(lape.apply(host(depth=1))).eval())
    model.blocks[0].attn.fused_attn = False  # torch's own has no forward gradient
    x, state = images(model), dict(model.named_parameters())

    def loss(state: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, state, (image[None],)).square().sum()

    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent is not None
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(model, x, check_trace=False)
    torch.export.export(model, (x,))
    torch.compile(model, fullgraph=True, backend="eager")(x)
    assert calls == []
    doubled = {key: 2 * value for key, value in state.items()}  # it is other weights that the norm calls with
    fused = loss(doubled, x[0])
    assert len(calls) == 1
    lape.set_fused(model, False)
    torch.testing.assert_close(fused, loss(doubled, x[0]))


def test_where_the_kernel_cannot_be_built_the_model_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shaken(lape.apply(host())).eval()
    x = images(model)
    expected = model(x)

    def failing(*_: Any) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nMore of it.")

    monkeypatch.setattr(kernels, "layer_norm_plus", failing)
    with pytest.warns(
        UserWarning, match=r"slower.*\(RuntimeError: Failed to find C compiler\.\)\. .*set_fused"
    ) as said:
        assert torch.equal(on_cpu(model)(x), expected)
    assert len(said) == 1
    assert positions(model).fused_on == ()
    monkeypatch.setitem(__import__("sys").modules, "lape.surgery.kernels", None)  # as without Triton
    with warnings.catch_warnings(action="error"):
        assert torch.equal(on_cpu(model)(x), expected)
    assert positions(model).fused_on == ()


def test_a_copy_of_a_norm_alone_is_a_norm(calls: list[torch.dtype]) -> None:
    model = on_cpu(shaken(lape.apply(host())).eval())
    norm, x = copy.deepcopy(model.blocks[0].norm1), torch.randn(2, 5, 24)
    assert torch.equal(norm(x), F.layer_norm(x, (24,), norm.weight, norm.bias, norm.eps))
    assert torch.equal(model.blocks[0].norm1(x), norm(x))  # and so is one that is called beside its model
    assert not any(part._forward_pre_hooks for part in lape.remove(model).modules())
    assert calls == []


def test_a_norm_that_was_replaced_keeps_no_hook_and_the_new_one_takes_part(calls: list[torch.dtype]) -> None:
    model = on_cpu(shaken(lape.apply(host())).eval())
    before, model.blocks[1].norm1 = model.blocks[1].norm1, nn.LayerNorm(24)
    model(images(model))
    assert len(calls) == 2
    assert not before._forward_hooks
    assert not before._forward_pre_hooks


def test_timms_fast_norm_is_known(calls: list[torch.dtype]) -> None:
    set_fast_norm(True)
    try:
        model = on_cpu(shaken(lape.apply(host())).eval())
    finally:
        set_fast_norm(False)
    model(images(model))
    assert calls == []

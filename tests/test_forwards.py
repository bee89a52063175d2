"""Laws of running models: a forward has rungs of its own, whatever runs beside it, within it or after it."""

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import foreign_hosts
import pytest
import torch
from timm import create_model
from timm.layers import set_reentrant_ckpt
from timm.models.vision_transformer import VisionTransformer as TimmViT
from tiny_hosts import TINY, gradients, host, images, shaken
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.vision_transformer import Encoder, VisionTransformer

import lape
from lape.errors import UsageError

WIDE, TALL = (2, 3, 32, 64), (2, 3, 64, 32)  # as many patches on another grid
JOINS = pytest.mark.parametrize("join", ["lape", "shared", "unshared", "lape-sharing"])


def resizing(join: str = "lape", **options: Any) -> Any:
    model = host(img_size=(32, 64), dynamic_img_size=True, **options)
    nn.init.normal_(model.pos_embed)
    return shaken(lape.apply(model, join))


def pictures(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape[2:]) + shape[2]))


# --- Forwards at the same time


@JOINS
@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("method", ["__call__", "forward_features"])
def test_threads_have_rungs_of_their_own(join, folded, method):
    model = resizing(join)
    model = lape.fold(model, [(2, 4), (4, 2), (2, 2)]) if folded else model
    inputs = [pictures(shape) for shape in (WIDE, TALL, (2, 3, 32, 32))]
    with torch.no_grad():
        expected, wrong = [getattr(model, method)(x) for x in inputs], []

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(30):
                wrong.append(not torch.equal(getattr(model, method)(inputs[number]), expected[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1, 2, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [False] * 120


@JOINS
@pytest.mark.parametrize("place", ["patch_embed", "norm_pre", "blocks.0", "blocks.1.norm1", "blocks.2"])
@pytest.mark.parametrize("inner", ["__call__", "forward_features", "stopped"])
@pytest.mark.parametrize("outer", ["__call__", "forward_features"])
def test_a_model_may_be_called_from_within_itself(join, place, inner, outer):
    model, wide, tall = resizing(join, pre_norm=True), pictures(WIDE), pictures(TALL)
    calls = {
        "__call__": lambda: model(tall),
        "forward_features": lambda: model.forward_features(tall),
        "stopped": lambda: model.forward_intermediates(tall, indices=[0], stop_early=True, intermediates_only=True)[0],
    }
    with torch.no_grad():
        expected, expected_inside = getattr(model, outer)(wide), calls[inner]()
        inside: list[Tensor] = []

        def again(module: nn.Module, given: Any, output: Any) -> None:
            if not inside:
                inside.append(torch.empty(0))
                inside.append(calls[inner]())

        handle = model.get_submodule(place).register_forward_hook(again)
        assert torch.equal(getattr(model, outer)(wide), expected)
        assert torch.equal(inside[1], expected_inside)
        handle.remove()
        assert torch.equal(getattr(model, outer)(wide), expected)


def _by_steps(model: Any, x: Tensor) -> Iterator[Tensor]:
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    yield tokens
    for block in list(model.blocks):
        tokens = block(tokens)
        yield tokens


@JOINS
def test_generators_may_take_turns(join):
    model, inputs = resizing(join), [pictures(WIDE), pictures(TALL)]
    with torch.no_grad():
        expected = [list(_by_steps(model, x)) for x in inputs]
        in_turn = [*zip(*(_by_steps(model, x) for x in inputs), strict=True)]
    for one, two in zip(expected, zip(*in_turn, strict=True), strict=True):
        assert all(map(torch.equal, one, two))


@contextmanager
def failing(block: nn.Module) -> Iterator[None]:
    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    handle = next(part for part in block.modules() if isinstance(part, nn.Linear)).register_forward_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        yield
    handle.remove()


@JOINS
def test_a_forward_that_failed_leaves_nothing_behind(join):
    model, wide, tall = resizing(join), pictures(WIDE), pictures(TALL)
    expected = model(wide)
    for method in (model.forward, model.__call__, model.forward_features):
        with failing(model.blocks[1]):
            method(tall)
        assert torch.equal(model(wide), expected)
        assert torch.equal(model.forward(wide), expected)
        with pytest.raises(UsageError, match="call the model"):
            model.blocks[0](torch.randn(2, 33, 32))


@JOINS
def test_rungs_end_with_their_forward(join):
    """A loop of one's own that adds the table itself would have it twice."""
    model, x = resizing(join), pictures(WIDE)

    def loop() -> None:
        tokens = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(x).flatten(1, 2)], dim=1)
        if hasattr(model, "pos_embed") and model.pos_embed is not None:
            tokens = tokens + model.pos_embed
        for block in model.blocks:
            tokens = block(tokens)

    for before in (
        lambda: None,
        lambda: model(x),
        lambda: model.forward_features(x),
        lambda: model.forward_intermediates(x, indices=[0], stop_early=True),
    ):
        before()
        with pytest.raises(UsageError, match="nor a loop of your own"):
            loop()
    with torch.no_grad():
        model(x)
        with pytest.raises(UsageError, match="nor a loop of your own"):
            loop()


@JOINS
@pytest.mark.parametrize("method", ["__call__", "forward_features"])
def test_tokens_of_a_forward_that_is_over_take_no_more_rungs(join, method):
    model, kept = resizing(join), []
    handle = model.blocks[1].register_forward_pre_hook(lambda block, inputs: kept.append(inputs[0]))
    output = getattr(model, method)(pictures(WIDE))  # with its graph, which keeps the tokens
    handle.remove()
    with pytest.raises(UsageError, match="nor a loop of your own"):
        model.blocks[1](kept[0])
    output.sum().backward()


# --- Recomputation


def _with_checkpoints(model: Any, reentrant: bool) -> None:
    set_reentrant_ckpt(reentrant)
    model.set_grad_checkpointing()


KINDS = pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "re-entrant"])


@pytest.fixture(autouse=True)
def _plain_checkpoints() -> Iterator[None]:
    yield
    set_reentrant_ckpt(False)


@JOINS
@KINDS
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "vit_base_patch16_xp_224"])
@pytest.mark.parametrize("between", ["validation", "inference", "another grid", "failed", "thrown away"])
def test_a_recomputation_belongs_to_its_own_forward(join, reentrant, name, between):
    model = shaken(lape.apply(host(name, img_size=(32, 64), dynamic_img_size=True), join)).train()
    wide, tall = pictures(WIDE).requires_grad_(), pictures(TALL).requires_grad_()
    model(wide).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    _with_checkpoints(model, reentrant)
    loss = model(wide).square().sum()
    if between == "validation":
        with torch.no_grad():
            model(wide), model(tall)
    elif between == "inference":
        with torch.inference_mode():
            model(wide.detach()), model.eval()(tall.detach()), model.train()
    elif between == "another grid":
        model(tall).square().sum().backward()
        model.zero_grad()
    elif between == "failed":
        with failing(model.blocks[1]):
            model(tall)
    else:
        model(tall)
    loss.backward()
    assert gradients(model).keys() == expected.keys()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-5, msg=parameter)


@JOINS
@KINDS
def test_two_grids_in_one_backward_pass_under_checkpointing(join, reentrant):
    model = resizing(join).train()
    wide, tall = pictures(WIDE).requires_grad_(), pictures(TALL).requires_grad_()
    (model(wide).square().sum() + model(tall).square().sum()).backward()
    expected = gradients(model)
    model.zero_grad()
    _with_checkpoints(model, reentrant)
    (model(wide).square().sum() + model(tall).square().sum()).backward()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-5, msg=parameter)


@JOINS
def test_dropped_patches_under_checkpoints_within_blocks(join):
    """The block itself is not run again, and its rung is made once."""
    model = shaken(lape.apply(host(patch_drop_rate=0.5), join)).train()
    x = images(model)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(7)
        model.forward_features(x).square().sum().backward()
        return gradients(model)

    expected = run()
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for parameter, gradient in run().items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-5, msg=parameter)


@JOINS
@KINDS
def test_segments_of_blocks_and_dropped_patches_under_checkpointing(join, reentrant):
    model = shaken(lape.apply(host(patch_drop_rate=0.5), join)).train()
    x, other = images(model).requires_grad_(), images(model, count=3)

    def run(segmented: bool) -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(7)
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        blocks = list(model.blocks)

        def first(tokens: Tensor) -> Tensor:
            return blocks[1](blocks[0](tokens))

        if segmented:
            tokens = checkpoint(first, tokens, use_reentrant=reentrant)
            tokens = checkpoint(blocks[2], tokens, use_reentrant=reentrant)
            model(other)
        else:
            tokens = blocks[2](first(tokens))
        tokens.square().sum().backward()
        return gradients(model)

    expected = run(False)
    for parameter, gradient in run(True).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-5, msg=parameter)


def test_tokens_that_were_copied_are_refused_and_not_guessed():
    model = resizing("lape").train()
    _with_checkpoints(model, False)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        loss = model(pictures(WIDE)).sum() + model(pictures(TALL)).sum()
    with pytest.raises(UsageError, match="Under activation checkpointing"):
        loss.backward()


# --- The host's own methods


class Counting(foreign_hosts.Scratch):
    """Counts and keeps what it does in the method that adds the table, and asks what it is."""

    class Stem(foreign_hosts.Scratch.Stem):
        seen = 0

        def placed(self, patches: Tensor) -> Tensor:
            self.seen += 1
            self.kept = patches.shape
            type(self).every = getattr(type(self), "every", 0) + 1
            assert isinstance(self, nn.Module)
            assert isinstance(self, Counting.Stem)
            return super().placed(patches)

    def __init__(self) -> None:
        super().__init__()
        self.stem = Counting.Stem()


@pytest.mark.parametrize("join", ["default", "lape"])
def test_a_method_of_the_host_runs_on_the_module_itself(join):
    model, x = Counting().eval(), torch.randn(2, 3, 32, 32)
    nn.init.normal_(model.stem.where)
    expected = model(x)
    lape.apply(model, join, host=foreign_hosts.SCRATCH)
    output = model(x)
    assert (model.stem.seen, model.stem.kept) == (2, (2, 16, foreign_hosts.D))
    assert type(model.stem) is Counting.Stem
    assert torch.equal(output, expected) is (join == "default")
    for other in (copy.deepcopy(model), lape.fold(copy.deepcopy(model))):
        torch.testing.assert_close(other(x), output)
        assert (other.stem.seen, model.stem.seen) == (3, 2)


class Overriding(TimmViT):
    """A subclass of timm's that adds something in the method that adds the table."""

    passed = 0

    def _pos_embed(self, x: Tensor) -> Tensor:
        self.passed += 1
        return super()._pos_embed(x) + 0


class OverridingEncoder(Encoder):
    """A subclass of torchvision's encoder."""

    passed = 0

    def forward(self, input: Tensor) -> Tensor:
        self.passed += 1
        return super().forward(input)


@pytest.mark.parametrize("join", ["default", "lape", "shared"])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_methods_of_subclasses_may_call_those_of_their_class(join, library):
    torch.manual_seed(0)
    model: Any = host(img_size=32) if library == "timm" else VisionTransformer(32, 8, 3, 2, 32, 48, num_classes=5)
    model.eval()
    plain = lape.apply(copy.deepcopy(model), join)
    counting = model if library == "timm" else model.encoder
    counting.__class__ = Overriding if library == "timm" else OverridingEncoder
    lape.apply(model, join)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), plain(x))
    assert counting.passed == 1


# --- Life and end of a model


@pytest.mark.parametrize("use", ["applied", "forward", "training", "checkpoints", "copied", "folded", "removed"])
def test_a_model_is_freed_without_the_garbage_collector(use):
    model = lape.apply(host()).train()
    if use == "copied":
        model = copy.deepcopy(model)
    elif use == "forward":
        with torch.no_grad():
            model(images(model))
    elif use in ("training", "checkpoints"):
        model.set_grad_checkpointing(use == "checkpoints")
        model(images(model)).sum().backward()
    elif use == "folded":
        lape.fold(model)(images(model))
    elif use == "removed":
        lape.remove(model)
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(model)
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_folding_for_no_grid_is_refused_and_the_model_stays():
    model = lape.apply(host())
    x, names = images(model), [*model.state_dict()]
    expected = model(x)
    with pytest.raises(UsageError, match="for one grid of patches at least"):
        lape.fold(model, iter([]))
    assert torch.equal(model(x), expected)
    assert [*model.state_dict()] == names


def test_training_what_holds_a_folded_model_reaches_all_the_rest():
    folded = lape.fold(lape.apply(host()))
    around = nn.ModuleDict({"before": nn.Dropout(), "vit": folded, "after": nn.Dropout()}).eval()
    with pytest.warns(UserWarning, match="stays in evaluation mode"):
        around.train()
    assert around.training
    assert around["before"].training
    assert around["after"].training
    assert not any(part.training for part in folded.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("names", [{"join": "unshared"}, {"pe": "sinusoidal-2d"}], ids=str)
def test_a_removed_table_is_as_the_model_is_now(dtype, names):
    model = host()
    table = model.pos_embed.detach().clone()
    lape.apply(model, **names)
    lape.remove(model.to(dtype))
    assert model.pos_embed.dtype == dtype
    assert torch.equal(model.pos_embed, table.to(dtype))


def test_a_table_is_removed_from_a_model_that_came_from_meta():
    model = lape.apply(host(), pe="sinusoidal-2d")
    state = {name: value.to(torch.float16) for name, value in model.state_dict().items()}
    model = model.to("meta")
    model.load_state_dict(state, assign=True)
    lape.remove(model)
    assert model.pos_embed.device.type == "cpu"
    assert model.pos_embed.dtype == torch.float16
    assert model.half()(images(model).half()).isfinite().all()


def test_a_table_that_never_had_values_is_not_given_back():
    with torch.device("meta"):
        model = create_model("vit_tiny_patch16_224", **TINY)
        lape.apply(model, pe="sinusoidal-2d")
    ready = lape.apply(host(img_size=224), pe="sinusoidal-2d")
    model.load_state_dict(ready.state_dict(), assign=True)
    with pytest.raises(UsageError, match="pos_embed of the untouched model was put aside while it had no values"):
        lape.remove(model)
    model.eval()
    assert torch.equal(model(images(ready)), ready(images(ready)))  # as it was


# --- Compiled and traced


def test_blocks_that_were_compiled_before_take_their_positions():
    model, x = host(depth=2), images(host())
    for block in model.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        model(x)
        shaken(lape.apply(model))
        compiled = model(x)
        for block in model.blocks:
            block._compiled_call_impl = None
        torch.testing.assert_close(compiled, model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_bias_leaves_attention_causal(causal, fused):
    model = host()
    with torch.no_grad():
        nn.init.zeros_(lape.apply(model, "default", "learnable+relative").blocks[0].relative_position_bias_table)
        for block in model.blocks:
            nn.init.zeros_(block.relative_position_bias_table)
            block.attn.fused_attn = fused
        plain = lape.remove(copy.deepcopy(model))
        for block in plain.blocks:
            block.attn.fused_attn = True
        tokens = torch.randn(2, 9, 32)
        expected = tokens
        for block in plain.blocks:
            expected = block(expected, is_causal=causal)
        model._pos_embed(model.patch_embed(images(model)))
        for block in list(model.blocks):
            tokens = block(tokens, is_causal=causal)
    torch.testing.assert_close(tokens, expected, rtol=1e-5, atol=1e-5)


VISION = {
    "torchvision": lambda: VisionTransformer(32, 8, 3, 2, 32, 48, num_classes=5),
    "timm": lambda: host(img_size=32),
}


@pytest.mark.parametrize("name", VISION)
@JOINS
def test_symbolic_traces_of_folded_models_are_right_and_others_refused(name, join):
    torch.manual_seed(0)
    model, x = VISION[name]().eval(), torch.randn(2, 3, 32, 32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))
    shaken(lape.apply(model, join))
    expected = model(x)
    with pytest.raises(UsageError, match="Fold it first"):
        fx.symbolic_trace(model)
    lape.fold(model)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), expected)
    last = "encoder.layers.encoder_layer_1" if name == "torchvision" else "blocks.2"
    features = []
    model.get_submodule(last).register_forward_hook(lambda block, given, output: features.append(output))
    model(x)
    torch.testing.assert_close(create_feature_extractor(model, [last])(x)[last], features[0])


@JOINS
@pytest.mark.parametrize("folded", [False, True], ids=["plain", "folded"])
def test_jit_traces_are_right_with_and_without_gradients(join, folded):
    model, x = shaken(lape.apply(host(), join)), images(host())
    model = lape.fold(model) if folded else model
    expected = model(x)
    for gradients_are_on in (True, False):
        with torch.set_grad_enabled(gradients_are_on):
            torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)
    if not folded:
        traced = torch.jit.trace(model, x)
        traced(x).square().sum().backward()
        through_trace = gradients(model)
        model.zero_grad()
        model(x).square().sum().backward()
        for parameter, gradient in gradients(model).items():
            torch.testing.assert_close(through_trace[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)

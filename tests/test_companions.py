"""Laws of living with everything else: copies, files, optimisers, averages, DDP, compilers and checkpointing."""

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
import torch.distributed
from timm.layers import set_reentrant_ckpt
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from tiny_hosts import EVERY_SCHEME, OF_EVERY_KIND, SCHEMES, gradients, host, images, shaken
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import lape
from lape.errors import UsageError
from lape.surgery.operation import positions
from lape.surgery.positions import BIAS_TABLE
from lape.surgery.proxy import Proxies

# --- Copies, files, optimisers


@EVERY_SCHEME
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_independent_of_its_original(names: dict[str, str], copied: Any) -> None:
    model = shaken(lape.apply(host(), **names)).train()
    x = images(model)
    model(x).sum().backward()  # a copy must not depend on what a forward left behind
    model.eval()
    before = model(x)
    other = copied(model)
    assert torch.equal(other(x), before)
    for parameter in other.parameters():
        parameter.data.normal_()
    assert torch.equal(model(x), before)
    assert not torch.equal(other(x), before)
    lape.remove(other)
    assert torch.equal(model(x), before)


@EVERY_SCHEME
def test_a_state_dict_makes_a_round_trip(names: dict[str, str]) -> None:
    model, other = shaken(lape.apply(host(), **names)), lape.apply(host(), **names)
    x = images(model)
    for parameter in other.parameters():
        parameter.data.normal_()
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x), other(x))


def test_names_are_those_of_the_authors() -> None:
    model = lape.apply(host())
    added = set(model.state_dict()) - set(host().state_dict())
    assert added == {f"blocks.{layer}.pe_norm.{part}" for layer in range(3) for part in ("weight", "bias")}
    assert repr(model.blocks[2]).count("(pe_norm): PositionNorm(32, eps=1e-06, g⊙Norm(ω) + b)") == 1


def test_lape_costs_2_d_parameters_a_layer() -> None:
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    model = timm.create_model("deit_tiny_patch16_224")
    assert count(model) == 5_717_416
    assert count(lape.apply(model)) == 5_722_024


@EVERY_SCHEME
def test_tables_and_norms_are_exempt_from_weight_decay(names: dict[str, str]) -> None:
    model = lape.apply(host(), **names)
    exempt = model.no_weight_decay()
    positional = {n for n, p in model.named_parameters() if "pos_embed" in n or "pe_norm" in n or BIAS_TABLE in n}
    assert positional <= exempt
    decayed, spared = sorted(
        param_groups_weight_decay(model, 0.05, no_weight_decay_list=exempt), key=lambda g: -g["weight_decay"]
    )
    spared_ids = {id(p) for p in spared["params"]}
    assert all(id(p) in spared_ids for n, p in model.named_parameters() if n in positional and p.requires_grad)
    assert decayed["params"]


def test_a_pe_norm_is_of_its_block_in_layer_decay() -> None:
    model = lape.apply(host())
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for layer, block in enumerate(model.blocks):
        assert scale[id(block.pe_norm.weight)] == scale[id(block.norm1.weight)] == 0.5 ** (3 - layer)
    assert scale[id(model.pos_embed)] == 0.5**4


def test_an_exponential_moving_average_follows() -> None:
    model = lape.apply(host())
    ema = ModelEmaV3(model, decay=0.5)
    x, before = images(model), model.blocks[1].pe_norm.weight.clone()
    shaken(model)
    ema.update(model)
    torch.testing.assert_close(ema.module.blocks[1].pe_norm.weight, (before + model.blocks[1].pe_norm.weight) / 2)
    assert not torch.equal(ema.module(x), model(x))


@EVERY_SCHEME
def test_distributed_training_finds_no_unused_parameter(names: dict[str, str]) -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = DistributedDataParallel(lape.apply(host(), **names))
        for _ in range(2):  # an unused parameter is an error at the second step
            model(images(model.module)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_training_takes_re_entrant_checkpoints_with_a_static_graph() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    set_reentrant_ckpt(True)
    try:
        alone, model = lape.apply(host()).train(), lape.apply(host()).train()
        x = images(model).requires_grad_()
        alone(x).sum().backward()
        model.set_grad_checkpointing()
        distributed = DistributedDataParallel(model, static_graph=True)
        for _ in range(2):
            model.zero_grad()
            distributed(x).sum().backward()
    finally:
        set_reentrant_ckpt(False)
        torch.distributed.destroy_process_group()
    for name, gradient in gradients(alone).items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-5, msg=name)


# --- Compilers and checkpointing


@pytest.mark.parametrize("names", [*SCHEMES[::2], *OF_EVERY_KIND], ids=lambda names: "-".join(names.values()))
def test_it_is_compiled_once_for_training_and_once_for_validation_without_a_graph_break(names: dict[str, str]) -> None:
    model = shaken(lape.apply(host(depth=2), **names)).train()
    x = images(model)
    expected = model(x)
    expected.square().sum().backward()
    eager = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(x)
    assert positions(model).forwards.latest is None  # what outlives a graph, it would make in every forward
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, eager[name], rtol=1e-3, atol=1e-4, msg=name)
    with torch.no_grad():
        compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x).square().mean().backward()
        with torch.no_grad():
            compiled(x)


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.offset = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain(x) + self.offset


class Counting(Scaling):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.calls += 1
        self.mean = x.mean(0)
        assert isinstance(self, Counting)
        assert not hasattr(self, "nothing")
        assert type(self).calls == 0
        return super().forward(x) * self.mean + self.beside()

    def beside(self) -> Any:
        return self.offset


def test_a_proxy_is_compiled_as_it_runs() -> None:
    module, proxies = Counting(), Proxies(Counting, ["offset"])
    before, offset, x = module.offset, torch.randn(4), torch.randn(3, 4)
    module.beside = lambda: 2.0  # of this instance, before that of its class

    def run(x: Tensor, offset: Tensor) -> tuple[Tensor, bool]:
        proxy, read = proxies.of(module, {"offset": offset})
        return Counting.forward(proxy, x), "offset" in read

    def setting(x: Tensor) -> None:
        proxy, _ = proxies.of(module, {"offset": x})
        proxy.offset = x

    torch._dynamo.reset()
    for number, called in enumerate((run, torch.compile(run, fullgraph=True, backend="eager")), start=1):
        module.mean = torch.zeros(4)
        output, read = called(x, offset)
        torch.testing.assert_close(output, (module.gain(x) + offset) * x.mean(0) + 2)
        assert (module.calls, read) == (2 * number, True)
        assert torch.equal(module.mean, x.mean(0))
        assert module.offset is before
    for called in (setting, torch.compile(setting, backend="eager")):
        with pytest.raises(AttributeError, match="offset is what joins the tokens"):
            called(x)
    assert module.offset is before


@pytest.mark.parametrize("names", [{"pe": "learnable+peg"}, {"pe": "learnable"}], ids=lambda names: names["pe"])
def test_no_compiled_forward_outlives_its_graph(names: dict[str, str]) -> None:
    model = lape.apply(host(depth=2, patch_drop_rate=0.0 if "peg" in names["pe"] else 0.5), "default", **names).train()
    torch._dynamo.reset()
    torch.compile(model.forward_features, fullgraph=True, backend="eager")(images(model))
    assert positions(model).forwards.latest is None  # what outlives a graph, it would make in every forward


@EVERY_SCHEME
def test_exports(names: dict[str, str]) -> None:
    model = shaken(lape.apply(host(depth=2), **names))
    x = images(model)
    expected = model(x)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    more = images(model, count=5)
    torch.testing.assert_close(program.module()(x), expected)
    torch.testing.assert_close(program.module()(more), model(more))


@EVERY_SCHEME
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "re-entrant"])
def test_checkpointing_changes_no_gradient(names: dict[str, str], reentrant: bool) -> None:
    model = shaken(lape.apply(host(), **names)).train()
    x = images(model).requires_grad_()  # re-entrant checkpoints ask for an input with a gradient
    model(x).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    set_reentrant_ckpt(reentrant)
    try:
        model.set_grad_checkpointing()
        for _ in range(2):  # twice: nothing may be left over from the first
            model.zero_grad()
            model(x).square().sum().backward()
    finally:
        set_reentrant_ckpt(False)
    assert gradients(model).keys() == expected.keys()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_block_on_its_own_is_refused_in_words() -> None:
    model = lape.apply(host())
    with pytest.raises(UsageError, match="call the model"):
        model.blocks[0](torch.randn(1, 9, 32))


def test_a_user_may_checkpoint_blocks_themselves() -> None:
    model = lape.apply(host()).train()
    x = images(model)
    model(x).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    blocks = list(model.blocks)
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    for block in blocks:
        tokens = checkpoint(block, tokens, use_reentrant=False)
    model.forward_head(model.norm(tokens)).sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)

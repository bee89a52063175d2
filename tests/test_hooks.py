"""Laws of the hooks: what a rung holds is hung, each part is taken once, and whoever changes a model is told."""

import copy
import threading
from typing import Any

import foreign_hosts
import pytest
import torch
from tiny_hosts import EVERY_HOST, host, images, shaken
from torch import Tensor, nn

import lape
import lape.method
import lape.surgery.operation
from lape.embeddings import ROTATIONS
from lape.errors import UsageError
from lape.method import BIASES, JOINS, TABLES, Join, Rung


def _like(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-6)


# --- What a rung holds decides


def both(position: Tensor, norm: Any) -> tuple[Rung, Tensor]:
    """A join whose rungs hold residual and attention in every layer."""
    return Rung(residual=position, attention=2 * position), position


def attention_alone(position: Tensor, norm: Any) -> tuple[Rung, Tensor]:
    """A join without norms whose rungs hold attention."""
    return Rung(attention=position), position


OWN_JOINS = {"both": Join("both", both), "attention": Join("attention", attention_alone)}


def _without(patch: pytest.MonkeyPatch, positions: Any, layer: int, part: str) -> None:
    """Have one part of one layer's rung be zeros."""
    taken, joining = positions.for_the_block, positions.joining

    def zeros(rung: Rung) -> Rung:
        value = getattr(rung, part)
        return rung if value is None else rung._replace(**{part: torch.zeros_like(value)})

    patch.setattr(positions, "for_the_block", lambda f, n, **_: zeros(taken(f, n)) if n == layer else taken(f, n))
    if layer == 0 and part == "residual":
        patch.setattr(positions, "joining", lambda f: None if (p := joining(f)) is None else torch.zeros_like(p))


def _changes_with_each_part(model: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def features() -> Tensor:  # of all tokens: what patches alone are told in the last layer never reaches a head
        return model.forward_features(x) if hasattr(model, "forward_features") else foreign_hosts.tokens(model, x)

    whole, positions = lape.ladder(model), lape.surgery.operation.positions(model)
    assert not all(rung.empty for rung in whole)
    with torch.no_grad():
        full = features()
        for layer, rung in enumerate(whole):
            for part, value in rung._asdict().items():
                if value is not None:
                    with monkeypatch.context() as patch:
                        _without(patch, positions, layer, part)
                        assert not _like(features(), full), f"{part} of layer {layer}"


@pytest.mark.parametrize("join", [*JOINS, *OWN_JOINS])
@foreign_hosts.EVERY_KIND
def test_each_part_of_each_rung_changes_the_output_of_every_host(join, name, monkeypatch):
    for own, step in OWN_JOINS.items():
        monkeypatch.setitem(JOINS, own, step)
    if JOINS[join].final and name in foreign_hosts.WITHOUT_FINAL_NORM:
        with pytest.raises(UsageError, match="what the last norm puts out"):
            foreign_hosts.applied(name, join=join)
        return
    model = foreign_hosts.shaken(foreign_hosts.applied(name, join=join)).eval()
    _changes_with_each_part(model, foreign_hosts.inputs(name), monkeypatch)


@pytest.mark.parametrize("join", [*JOINS, *OWN_JOINS])
@EVERY_HOST
def test_each_part_of_each_rung_changes_the_output_of_every_kind_of_timms(join, name, monkeypatch):
    for own, step in OWN_JOINS.items():
        monkeypatch.setitem(JOINS, own, step)
    if JOINS[join].final and isinstance(host(name).norm, nn.Identity):
        with pytest.raises(UsageError, match="fc_norm=False"):
            lape.apply(host(name), join, "learnable")
        return
    model = shaken(lape.apply(host(name), join, "learnable"))
    _changes_with_each_part(model, images(model), monkeypatch)


@pytest.mark.parametrize("join", [*JOINS, *OWN_JOINS])
@pytest.mark.parametrize("pe", [*TABLES, *BIASES, *ROTATIONS, "learnable+relative", "fourier+lookhere-90+rope-mixed"])
def test_each_part_of_each_rung_changes_the_output_with_every_embedding(join, pe, monkeypatch):
    for own, step in OWN_JOINS.items():
        monkeypatch.setitem(JOINS, own, step)
    try:
        lape.method.scheme(join, pe)
    except UsageError:
        return  # means nothing, and is refused
    model = shaken(lape.apply(host(num_heads=4), join, pe))
    _changes_with_each_part(model, images(model), monkeypatch)


def test_a_join_of_residual_and_attention_computes_both(monkeypatch):
    monkeypatch.setitem(JOINS, "both", OWN_JOINS["both"])
    model, x = lape.apply(host(), "both", "learnable"), images(host())
    with torch.no_grad():
        table, tokens = model.pos_embed, model.patch_embed(x)
        tokens = torch.cat([model.cls_token.expand(2, -1, -1), tokens], dim=1)
        plain = lape.remove(copy.deepcopy(model))
        for block in plain.blocks:
            tokens = tokens + table
            tokens = tokens + block.attn(block.norm1(tokens) + 2 * table)
            tokens = tokens + block.mlp(block.norm2(tokens))
        assert _like(model.forward_features(x), plain.norm(tokens))


# --- Each part exactly once


def _replaced(model: nn.Module, blocks: Any, name: str) -> None:
    for block in blocks:
        norm = getattr(block, name)
        fresh = nn.LayerNorm(norm.normalized_shape, norm.eps)
        fresh.load_state_dict(norm.state_dict())
        setattr(block, name, fresh)


@pytest.mark.parametrize("join", ["lape", "lape-sharing"])
@pytest.mark.parametrize("name", ["timm", "torchvision", "vit", "dinov2", "sequences"])
def test_a_norm_that_is_replaced_is_followed(name, join):
    if name == "timm":
        model, x = shaken(lape.apply(host(), join)), images(host())
    else:
        model, x = foreign_hosts.shaken(foreign_hosts.applied(name, join=join)), foreign_hosts.inputs(name)
    model.eval()
    positions = lape.surgery.operation.positions(model)
    norm = "norm1" if name == "timm" else foreign_hosts.FOREIGN[name].norms.split(".")[-1]
    with torch.no_grad():
        before = foreign_hosts.tokens(model, x)
        _replaced(model, positions.blocks, norm)
        assert torch.equal(foreign_hosts.tokens(model, x), before)
        assert torch.equal(foreign_hosts.tokens(copy.deepcopy(model), x), before)
        lape.remove(model)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


class Wrapped(nn.Module):
    """What adapters put around a module."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


@pytest.mark.parametrize("path", ["norm1", "in_proj"])
def test_a_wrapped_module_takes_its_part_once(path):
    name = "vit_tiny_patch16_224" if path == "norm1" else "vit_base_patch16_xp_224"
    model, x = shaken(lape.apply(host(name))), images(host(name))
    with torch.no_grad():
        before = model(x)
        for block in model.blocks:
            setattr(block, path, Wrapped(getattr(block, path)))
        wrapped = model(x)
        for block in model.blocks:
            setattr(block, path, getattr(block, path).base)
        assert _like(wrapped, before)
        assert torch.equal(model(x), before)


class Tuned(nn.Module):
    """What adapters that train norms put in place of one: the norm, and a copy that is called."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.trained = base, copy.deepcopy(base)

    def forward(self, x: Tensor) -> Tensor:
        return self.trained(x)


@pytest.mark.parametrize("join", ["lape", "lape-sharing"])
def test_a_copy_of_a_norm_stands_in_an_adapter(join):
    model, x = shaken(lape.apply(host(), join)), images(host())
    with torch.no_grad():
        before = model(x)
        for block in model.blocks:
            block.norm1 = Tuned(block.norm1)
        assert torch.equal(model(x), before)
        assert torch.equal(copy.deepcopy(model)(x), before)


def test_an_adapter_in_place_of_a_pe_norm_is_refused_with_what_to_do():
    model, x = lape.apply(host()), images(host())
    model.blocks[1].pe_norm = Tuned(model.blocks[1].pe_norm)
    with pytest.raises(UsageError, match=r"pe_norm of block 1 is a Tuned now.*modules_to_save=\['pe_norm'\]"):
        model(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_parallel_blocks_can_be_quantised():
    model, x = shaken(lape.apply(host("vit_base_patch16_xp_224"))), images(host("vit_base_patch16_xp_224"))
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    with torch.no_grad():
        assert (quantised(x) - model(x)).norm() < 0.2 * model(x).norm()


class Twice(foreign_hosts.Attend):
    """Normalises once more for its MLP, by the same norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.mlp(self.before(x))


class Never(foreign_hosts.Attend):
    """Has a norm, and does not call it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.after(x))


@pytest.mark.parametrize(("kind", "times"), [(Twice, "2 times"), (Never, "0 times")])
def test_a_norm_that_is_called_otherwise_than_once_is_named(kind, times):
    model = foreign_hosts.untouched("scratch")
    model.depths[1] = kind()
    lape.apply(model, host=foreign_hosts.SCRATCH)
    with pytest.raises(UsageError, match=rf"Block 1 \({kind.__name__}\) .* 'before', once; it called that {times}"):
        model(foreign_hosts.inputs("scratch"))


def test_one_norm_in_two_blocks_is_refused_and_the_model_stays_as_it_was():
    model = foreign_hosts.untouched("scratch")
    model.depths[2].before = model.depths[0].before
    x = foreign_hosts.inputs("scratch")
    before, names = model(x), [*model.state_dict()]
    with pytest.raises(UsageError, match="Give each block its own"):
        lape.apply(model, host=foreign_hosts.SCRATCH)
    assert torch.equal(model(x), before)
    assert [*model.state_dict()] == names
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("join", ["lape", "lape-sharing", "shared", "unshared"])
def test_blocks_whose_hooks_are_passed_by_are_named(join):
    model, x = lape.apply(host(), join), images(host())
    norm, tokens = model.blocks[1].norm1, torch.randn(2, 9, 32)
    alone = nn.functional.layer_norm(tokens, (32,), norm.weight, norm.bias, norm.eps)
    for block in model.blocks:
        block._slow_forward = block.forward
        block.__class__ = type("PassedBy", (type(block),), {"__call__": lambda self, x, **_: self.forward(x)})
    with pytest.raises(UsageError, match=r"Call block\(x\), not block\.forward\(x\)"):
        model(x)
    assert torch.equal(norm(tokens), alone)  # on its own a norm is what it was


# --- Blocks that are lists of their parts


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Listed(nn.Module):
    """A ViT of the widely copied kind, whose blocks are pairs of parts."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.side = 32, (4, 4)
        self.cut, self.pos_embedding = nn.Conv2d(3, 32, 8, 8), nn.Parameter(torch.randn(1, 16, 32))
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(), nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32))]) for _ in range(3)
        )

    def embedded(self, x: Tensor) -> Tensor:
        return x + self.pos_embedding

    def forward(self, images: Tensor) -> Tensor:
        x = self.embedded(self.cut(images).flatten(2).mT)
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return x


LISTED = lape.Host(
    name="listed",
    table="pos_embedding",
    add_table="embedded",
    blocks="layers.*",
    block=lape.Block("0.norm"),
    width="dim",
    grid="side",
)


def test_blocks_that_are_lists_take_what_attention_is_told():
    torch.manual_seed(0)
    model, x = Listed().eval(), torch.randn(2, 3, 32, 32)
    plain = model(x)
    lape.apply(model, host=LISTED)
    ladder = lape.ladder(model)
    expected = model.cut(x).flatten(2).mT
    for (attention, mlp), rung in zip(model.layers, ladder, strict=True):
        normed = attention.norm(expected) + rung.attention
        q, k, v = attention.qkv(normed).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        told = attention.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        expected = expected + told
        expected = mlp(expected) + expected
    assert _like(model(x), expected)
    folded = lape.fold(copy.deepcopy(model))
    assert _like(folded(x), expected)
    assert torch.equal(lape.remove(model)(x), plain)
    with pytest.raises(UsageError, match="whose parts the model calls one by one"):
        lape.apply(model, "shared", host=LISTED)
    assert torch.equal(model(x), plain)


# --- Blocks that come and go


@pytest.mark.parametrize("join", ["lape", "shared", "unshared"])
def test_blocks_may_be_cut_and_deleted(join):
    model, x = shaken(lape.apply(host(), join)), images(host())
    del model.blocks[1]
    model.blocks = model.blocks[:2]
    with torch.no_grad():
        out = model(x)
        assert len(lape.ladder(model)) == 2
        assert torch.equal(copy.deepcopy(model)(x), out)
        assert _like(lape.fold(copy.deepcopy(model))(x), out)
        lape.remove(model)(x)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("join", ["lape", "shared"])
def test_a_block_that_came_later_is_named(join):
    model, x = lape.apply(host(), join), images(host())
    model.blocks.append(lape.remove(copy.deepcopy(model)).blocks[0])
    with pytest.raises(UsageError, match=r"Block 3 \(Block\) came into the model after lape\.apply"):
        model(x)


def test_tokens_that_are_merged_are_refused():
    model, x = lape.apply(host()), images(host())
    model.blocks[0].register_forward_hook(lambda block, given, output: output[:, ::2])
    with pytest.raises(UsageError, match=r"Block 1 \(Block\) is given 5 tokens, and .* those of 9"):
        model(x)


def test_threads_do_not_count_for_each_other():
    model, x = lape.apply(host()), images(host())
    with torch.no_grad():
        expected, found = model(x), []
        threads = [
            threading.Thread(target=lambda: found.extend(torch.equal(model(x), expected) for _ in range(20)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 80

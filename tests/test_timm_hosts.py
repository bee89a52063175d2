"""Laws of timm's transformers of other classes, of rows that do not say what a model does, and of refusals."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from foreign_hosts import SCRATCH as ROW
from foreign_hosts import Attend, D, Scratch, applied, inputs, shaken, tokens, untouched
from test_hosts import told
from torch import Tensor, nn

import lape
from lape.errors import UsageError
from lape.hosts import Refusal, class_name, refuse, register, registry
from lape.surgery.operation import positions

INTERMEDIATES = ["timm-beit", "cait", "tnt", "sam", "relpos", "naflex"]


@pytest.mark.parametrize("name", INTERMEDIATES)
def test_intermediates_of_blocks_take_the_same_positions(name: str) -> None:
    model, x = untouched(name), inputs(name)
    expected = model.forward_intermediates(x, intermediates_only=True)
    assert len(expected) == 3
    names = {} if name != "relpos" else {"pe": "none"}
    same = applied(name, copy.deepcopy(model), join="default", **names)
    for one, other in zip(same.forward_intermediates(x, intermediates_only=True), expected, strict=True):
        assert torch.equal(one, other)
    shaken(applied(name, model))
    outputs: list[Tensor] = []
    for block in positions(model).blocks:
        block.register_forward_hook(lambda *given: outputs.append(given[2][1] if name == "tnt" else given[2]))
    model(x)
    in_forward, outputs = outputs, []
    taken = model.forward_intermediates(x, intermediates_only=True)
    for one, other, before in zip(taken, in_forward, expected, strict=True):
        patches = other.flatten(1, -2)[:, -16:].mT.unflatten(-1, (4, 4))
        assert torch.equal(one, patches)
        assert not torch.allclose(one, before, atol=1e-3)


def test_a_version_without_a_second_method_is_known_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = untouched("cait"), inputs("cait")
    expected = tokens(shaken(applied("cait", copy.deepcopy(model))), x)
    monkeypatch.delattr(type(model), "forward_intermediates")
    assert torch.equal(tokens(shaken(applied("cait", model)), x), expected)


@pytest.mark.parametrize("name", ["sam", "naflex"])
def test_images_of_another_size_get_the_map_as_timm_resizes_it(name: str) -> None:
    model, x = untouched(name), torch.randn(2, 3, 40, 56)
    expected = tokens(model, x)
    other = applied(name, copy.deepcopy(model), join="default")
    torch.testing.assert_close(tokens(other, x), expected, rtol=1e-5, atol=1e-5)
    shaken(applied(name, lape.remove(other)))
    chain = [rung.attention.detach() for rung in lape.ladder(other, (5, 7)) if rung.attention is not None]
    output = tokens(other, x)
    torch.testing.assert_close(output, tokens(told(name, model, chain), x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tokens(lape.fold(other, [(5, 7)]), x), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["timm-beit", "relpos"])
def test_a_new_input_size_takes_tables_along(name: str) -> None:
    names: dict[str, str] = {} if name != "relpos" else {"pe": "none"}
    model, x = untouched(name), torch.randn(2, 3, 48, 32)
    for join in ("default", "unshared", "lape"):
        other = applied(name, copy.deepcopy(model), join=join, **(names if join == "default" else {}))
        other.set_input_size((48, 32))
        assert lape.ladder(other)[2].attention is None or lape.ladder(other)[2].attention.shape == (1, 25, D)
        assert tokens(other, x).isfinite().all()
        if join == "default":
            resized = copy.deepcopy(model)
            resized.set_input_size((48, 32))
            torch.testing.assert_close(tokens(other, x), tokens(resized, x), rtol=1e-5, atol=1e-5)


def test_a_map_keeps_its_axes_whatever_stands_in_it() -> None:
    model, x = untouched("sam"), inputs("sam")
    assert model.pos_embed.shape == (1, 4, 4, D)
    for pe in ("learnable", "sinusoidal-2d"):
        other = applied("sam", copy.deepcopy(model), pe=pe)
        assert other.pos_embed.shape == (1, 4, 4, D)
        assert other.pos_embed.requires_grad is (pe == "learnable")
        again = applied("sam", copy.deepcopy(model), pe=pe)
        again.load_state_dict(shaken(other).state_dict())
        assert torch.equal(tokens(again, x), tokens(other, x))
    with pytest.raises(lape.RunError, match="this model's is fixed"):
        other.load_state_dict(applied("sam").state_dict())
    model.patch_embed.grid_size = (2, 8)
    with pytest.raises(UsageError, match=r"table of a timm VisionTransformerSAM is \(1, 4, 4, 32\).*2x8 patches"):
        lape.apply(model)


def test_every_stage_behind_the_table_of_a_volo_is_told() -> None:
    model = untouched("volo", layers=[1, 1, 2], embed_dims=[16, D, D], num_heads=[2] * 3, mlp_ratio=2.0,
                      downsamples=(True, False, False), outlook_attention=(True, False, False))  # fmt: skip
    plain, x = tokens(model, inputs("volo")), inputs("volo")
    shaken(lape.apply(model))
    owners = [name.removesuffix(".pe_norm.weight") for name in model.state_dict() if name.endswith("pe_norm.weight")]
    assert owners == ["network.2.0", "network.3.0", "network.3.1"]
    assert not torch.allclose(tokens(model, x), plain)
    assert torch.equal(tokens(lape.remove(model), x), plain)


def test_batches_of_several_sizes_are_refused() -> None:
    model = applied("naflex")
    patches, rows = torch.randn(2, 16, 192), torch.arange(16)
    coordinates = torch.stack([rows // 4, rows % 4], dim=-1).expand(2, -1, -1)
    valid = torch.ones(2, 16, dtype=torch.bool)
    with pytest.raises(UsageError, match=r"those of images \(B, C, H, W\), all of one size.*\(2, 16, 192\)"):
        model(patches, patch_coord=coordinates, patch_valid=valid)


# --- Tokens before the patches of which some have rows


class Registers(nn.Module):
    """A ViT whose table has a row for the class token, and none for the register tokens behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.side = D, (4, 4)
        self.cut = nn.Conv2d(3, D, 8, 8)
        self.table = nn.Parameter(torch.randn(1, 17, D))
        self.token, self.registers = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, 3, D))
        self.blocks = nn.ModuleList(Attend() for _ in range(3))

    def embed(self, images: Tensor) -> Tensor:
        patches = self.cut(images).flatten(2).mT
        x = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1) + self.table
        return torch.cat([x[:, :1], self.registers.expand(len(images), -1, -1), x[:, 1:]], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return x


REGISTERS = lape.Host(
    name="registers", table="table", add_table="embed", width="dim", grid="side", block=lape.Block("before"),
    prefix=4, registers=3,
)  # fmt: skip


@pytest.mark.parametrize(
    ("join", "pe"),
    [
        ("default", "learnable"),
        ("default", "sinusoidal-1d"),
        ("shared", "sinusoidal-1d"),
        ("unshared", "learnable"),
        ("lape-sharing", "learnable"),
        ("lape", "learnable"),
        ("lape", "sinusoidal-1d"),
    ],
)
def test_registers_have_no_position_and_the_class_token_its_row(join: str, pe: str) -> None:
    torch.manual_seed(0)
    model, x = Registers().eval(), torch.randn(2, 3, 32, 32)
    plain, by_hand = model(x), copy.deepcopy(model)
    shaken(lape.apply(model, join, pe, host=REGISTERS))
    output = model(x)
    assert torch.equal(output, plain) is (join == "default" and pe == "learnable")
    nn.init.zeros_(by_hand.table)
    for block, rung in zip(by_hand.blocks, lape.ladder(model), strict=True):
        for part in (rung.residual, rung.attention):
            if part is not None:
                assert part.shape == (1, 20, D)
                assert part[:, 0].any()
                assert not part[:, 1:4].any()
        if rung.residual is not None:
            block.register_forward_pre_hook(lambda module, given, part=rung.residual: given[0] + part)
        if rung.attention is not None:
            block.before.register_forward_hook(lambda module, given, out, part=rung.attention: out + part)
    torch.testing.assert_close(output, by_hand(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lape.fold(copy.deepcopy(model))(x), output, rtol=1e-4, atol=1e-5)
    assert torch.equal(lape.remove(model)(x), plain)


# --- Rows that do not say what the model does


class Behind(Attend):
    """A post-norm block."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = self.before(x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))
        return self.after(x + self.mlp(x))


@pytest.mark.parametrize(("kind", "norm"), [(Attend, "after"), (Behind, "before"), (Behind, "after")])
@pytest.mark.parametrize("training", [False, True])
def test_a_norm_that_does_not_stand_before_attention_is_refused(kind: Any, norm: str, training: bool) -> None:
    model = untouched("scratch")
    model.depths[1] = kind()
    model.train(training).depths[0].after.train(not training)
    modes = [part.training for part in model.modules()]
    parts, state = {name: set(vars(part)) for name, part in model.named_modules()}, copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    row = ROW if kind is Attend else replace(ROW, block={class_name(Attend): lape.Block("before")})
    row = replace(row, block={class_name(Attend): lape.Block("before"), class_name(kind): lape.Block(norm)})
    with pytest.raises(UsageError, match=rf"'{norm}'.*one token of a {kind.__name__} changes that token alone"):
        lape.apply(model, host=row)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: set(vars(part)) for name, part in model.named_modules()} == parts
    assert not any(part._forward_hooks for part in model.modules())
    assert [part.training for part in model.modules()] == modes


def test_blocks_that_cannot_be_tried_are_taken_at_their_word() -> None:
    model = untouched("scratch")
    for block in model.depths:
        nn.init.zeros_(block.out.weight)
        nn.init.zeros_(block.out.bias)
    lape.apply(model, host=ROW)  # attention that says nothing yet says nothing of its norm
    with torch.device("meta"):
        lape.apply(Scratch(), host=ROW)


class Wide(Scratch):
    """A ViT whose table has rows for its other tokens too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem.where = nn.Parameter(torch.randn(17, D))
        self.sides = {"side": (4, 4), "other": (2, 8), "fewer": (3, 5)}
        self.side, self.other, self.fewer = self.sides.values()

    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([self.stem.token.expand(len(images), -1, -1), self.stem.cut(images).flatten(2).mT], dim=1)
        return self.depths(x + self.stem.where)


class Adding(Wide):
    """One that adds it in a method of the module that holds it."""

    class Stem(Scratch.Stem):
        def forward(self, images: Tensor) -> Tensor:
            x = torch.cat([self.token.expand(len(images), -1, -1), self.cut(images).flatten(2).mT], dim=1)
            return x + self.where

    def __init__(self) -> None:
        super().__init__()
        self.stem.__class__ = Adding.Stem

    def forward(self, images: Tensor) -> Tensor:
        return self.depths(self.stem(images))


def test_a_grid_and_a_prefix_that_only_add_up_are_refused() -> None:
    x, row = inputs("scratch"), replace(ROW, add_table="forward", prefix_has_no_rows=False)
    model = Adding().eval()
    before = model(x)
    for grid, prefix in (("other", 1), ("fewer", 2)):
        lape.apply(model, host=replace(row, grid=grid, prefix=prefix))
        with pytest.raises(UsageError, match=r"grid (2x8 behind 1|3x5 behind 2) other tokens.*into 4x4.*Mend the row"):
            model(x)
        lape.remove(model)
        assert not any(part._forward_hooks for part in model.modules())
    assert torch.equal(model(x), before)
    assert not torch.equal(lape.apply(model, host=row)(x), before)


# --- Refusals


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convit_tiny", "its class token joins the patches between two blocks"),
        ("hiera_tiny_224", "sorts the patches by windows"),
        ("hieradet_small", "the sum of two tables"),
        ("crossvit_9_240", "two branches of patches of two sizes"),
        ("qwen3_vit_88m", "resized for each input by a function outside"),
        ("pit_ti_224", "pooled by convolutions between two stages"),
        ("nest_tiny", "a table in each of its levels"),
        ("visformer_tiny", "a table in each of its stages"),
        ("gemma4_vit_167m_enc", "a table for rows and one for columns"),
        ("naflexvit_base_patch16_par_gap", "cuts the table for each image out of a square one"),
        ("naflexvit_base_patch16_parfac_gap", r"\(factorized\)"),
        ("resnet18", "no part of it is called an attention"),
        ("swinv2_cr_tiny_224", "not of a known family"),
        ("deepseek_vit_412m_enc", r"rotations inside attention \(RoPE\), and it has no table"),
    ],
)
def test_a_class_that_carries_no_join_says_why(name: str, reason: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    before = set(vars(model))
    with pytest.raises(UsageError, match=reason):
        lape.apply(model)
    assert set(vars(model)) == before


def test_a_naflex_vit_without_a_table_adds_none() -> None:
    with pytest.raises(UsageError, match="made without a table, and its class then adds none"):
        lape.apply(untouched("naflex", pos_embed="none"), pe="learnable")


def test_a_table_that_is_there_is_not_denied() -> None:
    model = nn.ModuleDict({"embeddings": Scratch.Stem()})
    model["embeddings"].pos_embedding = nn.Parameter(torch.zeros(1, 16, D))
    with pytest.raises(UsageError, match=r"it has a table \(embeddings\.pos_embedding\), and lape does not know how"):
        lape.apply(model)


def test_a_row_of_the_users_stands_above_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ROWS", {name: [*rows] for name, rows in registry._ROWS.items()})
    monkeypatch.setattr(registry, "_REFUSALS", {})
    refuse(Refusal(class_name(Scratch), "it is from scratch.", where=("dim", D)))
    with pytest.raises(UsageError, match="Scratch cannot carry a join: it is from scratch"):
        lape.apply(Scratch())
    register(replace(ROW, model=class_name(Scratch)))
    lape.apply(Scratch())

"""Laws of operating on a foreign vision transformer: what may change, what must not, and what is refused."""

import copy
import warnings

import pytest
import timm
import torch
import torch.distributed
from tiny_hosts import EVERY_HOST, EVERY_SCHEME, TINY, host, images, shaken
from torch import Tensor, nn

import lape
from lape.errors import RunError, UsageError
from lape.hosts import class_name, registered, transformers
from lape.hosts.timm import VISION_TRANSFORMER
from lape.surgery.operation import positions

# --- Every pre-norm VisionTransformer


def test_every_pre_norm_vision_transformer_of_timm_is_taken() -> None:
    taken, refused = 0, []
    rooms = ("timm.models.vision_transformer", "timm.models.vision_transformer_hybrid", "timm.models.deit")
    for name in timm.list_models():
        if timm.model_entrypoint(name).__module__ not in rooms:
            continue
        with torch.device("meta"):
            model = timm.create_model(name, depth=1)
        try:
            lape.apply(model)
            taken += 1
        except UsageError:
            refused.append((name, type(model.blocks[0]).__name__))
    assert refused == [("vit_base_patch16_rpn_224", "ResPostBlock")]
    assert taken >= 192


@EVERY_HOST
def test_default_changes_nothing(name: str) -> None:
    model = host(name)
    x = images(model)
    before = model(x)
    assert torch.equal(lape.apply(model, join="default")(x), before)


@pytest.mark.parametrize("join", ["default", "lape"])
def test_timms_vit_compiled_whole_computes_the_same(join: str) -> None:  # on the oldest torch too
    model = shaken(lape.apply(host(depth=1), join))
    x = images(model)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@EVERY_HOST
@EVERY_SCHEME
def test_remove_gives_back_what_was_bit_for_bit(name: str, names: dict[str, str]) -> None:
    model = host(name)
    attributes, keys = set(model.__dict__), list(model.state_dict())
    state, x = copy.deepcopy(model.state_dict()), images(model)
    before = model(x)
    assert lape.apply(model, **names) is model
    assert not torch.equal(model(x), before)
    assert lape.remove(model) is model
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert set(model.__dict__) == attributes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all("forward" not in part.__dict__ for part in model.modules())


@EVERY_HOST
def test_neutral_norms_are_the_model_without_position(name: str) -> None:
    model = host(name).double()
    x = images(model).double()
    without = lape.apply(copy.deepcopy(model), join="default", pe="none")(x)
    lape.apply(model)
    assert not torch.allclose(model(x), without)
    for parameter_name, parameter in model.named_parameters():
        if "pe_norm" in parameter_name:
            nn.init.zeros_(parameter)
    assert torch.equal(model(x), without)


@EVERY_HOST
def test_the_position_reaches_attention_and_nothing_else(name: str) -> None:
    """What a block computes without its MLP is MSA(LN(x) + p); what its MLP adds knows no p."""
    model = lape.apply(host(name)).double()
    shaken(model)
    block, rung = model.blocks[1], lape.ladder(model)[1].attention
    plain = lape.remove(copy.deepcopy(model)).blocks[1]
    assert rung is not None
    passed: list[tuple[Tensor, Tensor]] = []
    block.register_forward_hook(lambda block, inputs, output: passed.append((inputs[0], output)))
    model(images(model).double())
    ((tokens, changed),) = passed
    if hasattr(plain, "attns"):
        middle = tokens + sum(a.drop_path(a.ls(a.attn(a.norm(tokens) + rung))) for a in plain.attns)
        expected = middle + sum(f(middle) for f in plain.ffns)
    elif hasattr(plain, "in_proj"):
        normed, q_k_v = plain.in_norm(tokens), 3 * 32
        weight = plain.in_proj.weight.clone()
        weight[:-q_k_v] = 0  # the MLP's part reads no p
        expected = parallel(plain, plain.in_proj(normed) + rung @ weight.T, tokens)
    else:
        middle = tokens + plain.ls1(plain.attn(plain.norm1(tokens) + rung))
        expected = middle + plain.ls2(plain.mlp(plain.norm2(middle)))
    torch.testing.assert_close(changed, expected, rtol=1e-10, atol=1e-10)


def parallel(block: nn.Module, projected: Tensor, tokens: Tensor) -> Tensor:
    mlp, q, k, v = projected.split([projected.shape[-1] - 96, 32, 32, 32], dim=-1)
    heads = lambda t: t.unflatten(-1, (2, 16)).transpose(1, 2)  # noqa: E731
    attended = nn.functional.scaled_dot_product_attention(block.q_norm(heads(q)), block.k_norm(heads(k)), heads(v))
    mlp = mlp if block.mlp_bias is None else mlp + block.mlp_bias
    out = block.attn_out_proj(attended.transpose(1, 2).flatten(2)) + block.mlp_out_proj(block.mlp_act(mlp))
    return tokens + block.ls(out)


def test_prefix_tokens_without_a_row_get_no_position() -> None:
    for name, prefix in (("deit3_small_patch16_224", 1), ("vit_small_patch14_reg4_dinov2", 5)):
        model = shaken(lape.apply(host(name)))
        for rung in lape.ladder(model):
            assert rung.attention is not None
            assert not rung.attention[:, :prefix].any()
            assert rung.attention[:, prefix:].any(-1).all()
    distilled = shaken(lape.apply(host("deit_tiny_distilled_patch16_224")))
    assert all(rung.attention is not None and rung.attention[:, :2].any() for rung in lape.ladder(distilled))


# --- What hosts do with their tokens


def test_features_and_intermediates_carry_positions() -> None:
    model = shaken(lape.apply(host()))
    x = images(model)
    final, between = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    assert len(between) == 3
    getter = timm.create_model(
        "vit_tiny_patch16_224", features_only=True, out_indices=[0, 1], img_size=(32, 64), **TINY
    )
    getter.model.load_state_dict(host().state_dict(), strict=False)
    lape.apply(getter)
    assert len(getter.model.blocks) == 2
    getter.model.load_state_dict({k: v for k, v in model.state_dict().items() if k in getter.model.state_dict()})
    for feature, expected in zip(getter.eval()(x), between, strict=False):
        torch.testing.assert_close(feature, expected)


@EVERY_SCHEME
def test_dropped_patches_take_their_positions_with_them(names: dict[str, str]) -> None:
    """A model that attends to the kept patches alone computes what the whole model does with the others masked."""
    names = {name: value.removesuffix("+peg") for name, value in names.items()}  # which needs every patch
    model = shaken(lape.apply(host(patch_drop_rate=0.5), **names)).train()
    x = images(model, count=3)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(positions(model).forwards.latest.rows))
    dropped, rows = model.forward_features(x), seen[0]
    assert rows.shape == (3, 5)
    assert not rows[:, 0].any()  # the class token's
    assert not torch.equal(rows[0].sort().values, rows[1].sort().values)  # sample by sample
    mask = torch.zeros(3, 1, 1, 9, dtype=torch.bool).scatter(-1, rows[:, None, None], True)
    model.eval()
    whole = model.forward_features(x, attn_mask=mask.expand(-1, -1, 9, -1))
    torch.testing.assert_close(dropped, whole.gather(1, rows[..., None].expand(-1, -1, 32)), rtol=1e-4, atol=1e-5)


def test_learnt_tables_are_resized_to_the_grid_of_each_input_and_fixed_ones_made_for_it() -> None:
    from timm.layers import resample_abs_pos_embed

    from lape.method import sinusoidal_2d

    model = lape.apply(host(img_size=(32, 64), dynamic_img_size=True))
    resized = resample_abs_pos_embed(model.pos_embed, [4, 2], [2, 4], num_prefix_tokens=1)
    expected = model.blocks[0].pe_norm(resized)
    assert torch.equal(lape.ladder(model, (4, 2))[0].attention, expected)  # the same count of tokens, another grid
    assert torch.equal(lape.ladder(model, (2, 4))[0].attention, model.blocks[0].pe_norm(model.pos_embed))
    passed = []
    model.blocks[0].norm1.register_forward_hook(lambda norm, given, out: passed.append((norm.forward(given[0]), out)))
    model(torch.randn(1, 3, 64, 32))
    ((normed, entered),) = passed
    assert torch.equal(entered, normed + expected)
    fixed = lape.apply(host(img_size=32, dynamic_img_size=True), pe="sinusoidal-2d", join="shared")
    assert torch.equal(lape.ladder(fixed, (3, 5))[0].residual, sinusoidal_2d((3, 5), 1, 32))


@EVERY_SCHEME
def test_a_new_input_size_gives_what_each_forward_would_have_resized(names: dict[str, str]) -> None:
    if names.get("pe", "").endswith("relative-layernorm"):
        model = lape.apply(host(img_size=32, dynamic_img_size=True), **names)
        with pytest.raises(UsageError, match="normalises over the 2x2 patches"):
            model(torch.randn(1, 3, 48, 64))
        with pytest.raises(UsageError, match=r"set the size before lape\.apply"):
            model.set_input_size((48, 64))
        return
    model = shaken(lape.apply(host(img_size=32, dynamic_img_size=True), **names))
    x = torch.randn(2, 3, 48, 64)
    expected = model(x)
    model.set_input_size((48, 64))
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)
    lape.remove(model)
    own = host(img_size=32, dynamic_img_size=True)
    torch.testing.assert_close(model(x), own(x), rtol=1e-5, atol=1e-6)


def test_dropout_of_the_table_takes_tokens_and_table_together_by_default_and_tokens_alone_otherwise() -> None:
    model = host(pos_drop_rate=0.5).train()
    x = images(model)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert torch.equal(lape.apply(model, join="default")(x), expected)
    lape.remove(model)
    lape.apply(model)
    torch.manual_seed(3)
    tokens = model._pos_embed(model.patch_embed(x))
    assert (tokens == 0).float().mean() == pytest.approx(0.5, abs=0.1)


# --- Gradients at initialisation


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("depth", [12, 24])
@pytest.mark.parametrize("join", ["lape", "lape-sharing"])
@pytest.mark.parametrize("pe", ["learnable", "sinusoidal-1d", "sinusoidal-2d", "zero"])
def test_gradients_are_bounded_at_initialisation(pe: str, join: str, depth: int, precision: torch.dtype) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, **TINY | {"depth": depth, "embed_dim": 48})
    lape.apply(model, join, pe="learnable" if pe == "zero" else pe)
    if pe == "zero":
        nn.init.zeros_(model.pos_embed)
    model.train()
    with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
        loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    largest = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    table = largest.pop("pos_embed", 0.0)
    assert max(largest.values()) < 100
    assert table < 1e4  # LN divides it by its standard deviation: 0.02, or sqrt(eps) where it starts at zero
    if pe == "zero":
        assert table > 0  # it learns all the same


# --- What is refused


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vit_base_patch16_rpn_224", "ResPostBlock cannot carry a join"),
        ("vit_small_patch16_dinov3", "RoPE"),
        ("resnet18", "no part of it is called an attention"),
    ],
)
def test_what_cannot_carry_a_join_is_refused_with_the_reason(name: str, says: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UsageError, match=says):
        lape.apply(model)


def test_a_second_application_and_a_removal_of_nothing_are_refused() -> None:
    model = lape.apply(host())
    with pytest.raises(UsageError, match=r"has join='lape'. Call lape.remove"):
        lape.apply(model)
    lape.remove(model)
    with pytest.raises(UsageError, match="No join is applied"):
        lape.remove(model)
    with pytest.raises(UsageError, match="No join is applied"):
        lape.ladder(model)


def test_two_transformers_in_one_model_are_refused() -> None:
    with pytest.raises(UsageError, match="holds 2"):
        lape.apply(nn.ModuleList([host(), host()]))


def test_a_refused_model_is_left_as_it_was() -> None:
    model = host("vit_tiny_patch16_224", embed_dim=30)
    keys = list(model.state_dict())
    with pytest.raises(UsageError, match="4 divides"):
        lape.apply(model, pe="sinusoidal-2d")
    assert list(model.state_dict()) == keys
    assert not set(model.__dict__) & {"lape_positions", "_pos_embed"}


def test_a_host_without_a_table_is_given_one_by_name() -> None:
    model = host(pos_embed="none")
    with pytest.raises(UsageError, match="pe='none' has no table"):
        lape.apply(model)
    lape.apply(model, pe="learnable")
    assert model.pos_embed.shape == (1, 9, 32)
    assert lape.remove(model).pos_embed is None


def test_weights_that_cannot_be_had_are_no_wrong_option() -> None:
    with pytest.raises(
        RunError, match=r"The weights of vit_tiny_patch16_224 could not be downloaded \(FileNotFoundError"
    ):
        lape.create_model("vit_tiny_patch16_224", checkpoint_path="nowhere.pth")


def test_create_model_is_timms_with_a_join() -> None:
    model = lape.create_model("deit_tiny_patch16_224", join="lape", pe="sinusoidal-1d", num_classes=10)
    assert model.head.out_features == 10
    assert not model.pos_embed.requires_grad
    with pytest.raises(UsageError, match="Did you mean 'deit_tiny_patch16_224'"):
        lape.create_model("deit_tiny_patch16_242")
    with pytest.raises(UsageError, match=r"resnet18 does not take these options: .*img_size"):
        lape.create_model("resnet18", img_size=32)


def test_every_host_row_names_classes_that_exist() -> None:
    for row in (row for row in registered() if row not in transformers.VERSION_4):
        if row.name.startswith(("my", "older")):  # classes of tests
            continue
        assert row.model is not None
        assert isinstance(row.block, dict)
        room, _, kind = row.model.rpartition(".")
        assert hasattr(__import__(room, fromlist=[kind]), kind)
        for block in row.block:
            room, _, kind = block.rpartition(".")
            assert hasattr(__import__(room, fromlist=[kind]), kind)
        assert row.files is None or hasattr(__import__(row.files.filter, fromlist=["_"]), "checkpoint_filter_fn")
    assert VISION_TRANSFORMER.model == class_name(type(host()))


def test_the_first_of_unshared_tables_is_the_models_own() -> None:
    model = host()
    own = model.pos_embed.detach().clone()
    assert torch.equal(lape.apply(model, join="unshared").blocks[0].pos_embed, own)


def test_a_grid_without_a_token_is_refused():
    encoder = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, norm_first=True), 1)
    with pytest.raises(UsageError, match=r"a row and a column of tokens at least; received grid=\(1, 0\)"):
        lape.apply(encoder, pe="learnable", grid=(1, 0))


@pytest.mark.parametrize(("join", "pooling", "said"), [
    ("lape", "avg", True), ("lape-sharing", "avg", True), ("mpvg", "avg", False), ("default", "avg", False),
    ("lape", "token", False),
])  # fmt: skip
def test_where_lape_meets_pooling_it_is_said_what_others_found(join: str, pooling: str, said: bool) -> None:
    model = host(global_pool=pooling, fc_norm=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lape.apply(model, join)
    assert [str(one.message).startswith("This VisionTransformer pools its patches.") for one in caught] == [True] * said
    assert all("join='mpvg'" in str(one.message) and one.filename == __file__ for one in caught)

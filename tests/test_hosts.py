"""Laws of every host that is not of the house: torchvision's, transformers', PyTorch's and a class of one's own."""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import timm.models
import torch
import torch.nn.functional as F
import transformers
from foreign_hosts import (
    EVERY_FOREIGN,
    FOREIGN,
    HOSTS_AND_SCHEMES,
    SCRATCH,
    SMALL,
    D,
    Scratch,
    applied,
    gradients,
    in_turn,
    inputs,
    shaken,
    tokens,
    untouched,
)
from open_clip.transformer import TextTransformer as OpenClipText
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lape
from lape.errors import UsageError
from lape.hosts import as_rows, class_name, find, register, registered, registry
from lape.hosts.timm import VISION_TRANSFORMER
from lape.surgery.operation import positions

FUSED = [  # of transformers; SAM's attention is chosen when it is built
    name for name in FOREIGN if getattr(untouched(name), "_supports_sdpa", False) and not name.startswith("sam")
]
WITH_TABLE = [name for name, tiny in FOREIGN.items() if tiny.table]
LAYERS = 3
# One of every kind: a graph takes seconds.
COMPILED = [
    "torchvision",
    "vit",
    "dinov2",
    "clip",
    "siglip",
    "beit",
    "vit-mae",
    "idefics3",
    "blip",
    "ast",
    "gpt2",
    "opt",
]
COMPILED += ["sequences", "sequences-first", "scratch", "reader", "rope", "rope-mixed"]


def own_table(name: str, model: nn.Module) -> Tensor:
    return as_rows(model.get_parameter(FOREIGN[name].table or "pos_embed"))


def by_hand(name: str, model: nn.Module) -> list[Tensor]:
    """p_l of an operated model, written out: ω_{l+1} = LN_ω|l(ω_l), zero for tokens without a row."""
    blocks = positions(model).blocks
    position, chain = own_table(name, model), []
    for block in blocks:
        norm = block.pe_norm
        position = F.layer_norm(position, (D,), norm.weight, norm.bias, norm.eps)
        chain.append(for_all_tokens(name, position))
    assert len(chain) == LAYERS
    return chain


def for_all_tokens(name: str, rows: Tensor) -> Tensor:
    """The rows of a table with zeros for the tokens that have none."""
    rows, tiny = F.pad(rows, (0, 0, FOREIGN[name].prefix_without_rows, 0)), FOREIGN[name]
    return torch.cat([rows[:, :1], rows.new_zeros(1, tiny.registers, D), rows[:, 1:]], dim=1)


def told(name: str, model: nn.Module, chain: list[Tensor], start: str = "fresh") -> nn.Module:
    """The untouched model, if fresh without its table, with p_l added behind the norm before attention of layer l."""
    if FOREIGN[name].table and start == "fresh":
        nn.init.zeros_(model.get_parameter(FOREIGN[name].table))
    for layer, rows in enumerate(chain):
        position = rows[:, FOREIGN[name].unused :]
        laid = position if FOREIGN[name].tokens_at == 1 else position.transpose(0, 1)
        norm = model.get_submodule(FOREIGN[name].norms.format(layer))
        norm.register_forward_hook(lambda module, given, output, laid=laid: output + as_tokens(laid, output))
    return model


def as_tokens(position: Tensor, tokens: Tensor) -> Tensor:
    """A position (1, N, D) beside tokens that may be a map (B, H, W, D)."""
    return position if tokens.ndim == 3 else position.unflatten(1, tokens.shape[1:-1])


# --- What changes and what does not


@EVERY_FOREIGN
def test_default_changes_nothing_in_training_or_out_of_it(name: str) -> None:
    model, x = untouched(name), inputs(name)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.3
    other = applied(name, copy.deepcopy(model), join="default", **({} if FOREIGN[name].table else {"pe": "none"}))
    assert torch.equal(tokens(other, x), tokens(model, x))
    torch.manual_seed(5)
    expected = tokens(model.train(), x)
    torch.manual_seed(5)
    assert torch.equal(tokens(other.train(), x), expected)


@HOSTS_AND_SCHEMES
def test_remove_gives_back_what_was_bit_for_bit(name: str, names: dict[str, str]) -> None:
    model, x = untouched(name), inputs(name)
    parts = {path: set(part.__dict__) for path, part in model.named_modules()}
    state, before = copy.deepcopy(model.state_dict()), tokens(model, x)
    assert applied(name, model, **names) is model
    assert not torch.equal(tokens(shaken(model), x), before)
    assert lape.remove(model) is model
    assert torch.equal(tokens(model, x), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {path: set(part.__dict__) for path, part in model.named_modules()} == parts
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in find_parts(model))


def find_parts(model: nn.Module) -> list[nn.Module]:
    """The parts that lape may have hooked: transformers hooks its own for what it records."""
    return [part for part in model.modules() if not type(part).__module__.startswith("transformers")]


@EVERY_FOREIGN
def test_neutral_norms_are_the_model_without_position(name: str) -> None:
    model, x = untouched(name), inputs(name)
    without = tokens(applied(name, copy.deepcopy(model), join="default", pe="none"), x)
    applied(name, model)
    assert not torch.allclose(tokens(model, x), without)
    for parameter_name, parameter in model.named_parameters():
        if "pe_norm" in parameter_name:
            nn.init.zeros_(parameter)
    assert torch.equal(tokens(model, x), without)


@EVERY_FOREIGN
@pytest.mark.parametrize("start", ["fresh", "preserve"])
def test_lape_tells_attention_the_chain_of_positions_and_nothing_else(name: str, start: str) -> None:
    model, x = shaken(applied(name, start=start)).double(), inputs(name)
    x = x.double() if x.is_floating_point() else x
    chain = by_hand(name, model)
    if start == "preserve":
        amounts = [block.pe_norm.amount for block in positions(model).blocks]
        chain = [amount * position for amount, position in zip(amounts, chain, strict=True)]
    for rung, position in zip(lape.ladder(model), chain, strict=True):
        torch.testing.assert_close(rung.attention, position, rtol=1e-12, atol=1e-12)
    expected = told(name, untouched(name).double(), chain, start)
    torch.testing.assert_close(tokens(model, x), tokens(expected, x), rtol=1e-10, atol=1e-10)


@EVERY_FOREIGN
def test_joins_by_the_stream_add_the_table_before_their_blocks(name: str) -> None:
    tiny, x = FOREIGN[name], inputs(name)
    for join, given in (("default", 1), ("shared", LAYERS)):
        model = applied(name, join=join, **({} if tiny.table else {"pe": "sinusoidal-1d"}))
        table = for_all_tokens(name, own_table(name, model)[:, tiny.unused :]).detach()
        expected = untouched(name)
        if join == "default" and tiny.table:
            torch.testing.assert_close(tokens(model, x), tokens(expected, x))
            continue
        if tiny.table:
            nn.init.zeros_(expected.get_parameter(tiny.table))
        laid = table if tiny.tokens_at == 1 else table.transpose(0, 1)
        for layer in range(given):
            block = expected.get_submodule(tiny.norms.format(layer).rpartition(".")[0])

            def before(module: nn.Module, given: Any, laid: Tensor = laid) -> Any:
                at = tiny.tokens_argument
                return *given[:at], given[at] + as_tokens(laid, given[at]), *given[at + 1 :]

            block.register_forward_pre_hook(before)
        torch.testing.assert_close(tokens(model, x), tokens(expected, x), rtol=1e-5, atol=1e-5)


# --- Fold, copies, files


@HOSTS_AND_SCHEMES
def test_a_folded_model_gives_the_same_outputs_without_norms_or_tables(name: str, names: dict[str, str]) -> None:
    model, x = shaken(applied(name, **names)).double(), inputs(name)
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        expected = tokens(model, x)
        folded = lape.fold(copy.deepcopy(model))
        assert (tokens(folded, x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    kept = list(folded.state_dict())
    assert not any("pe_norm" in key or key == FOREIGN[name].table for key in kept)
    with pytest.warns(UserWarning, match="for inference"):
        folded.train()
    assert not any(part.training for part in find(folded)[0].modules())
    with pytest.raises(UsageError, match="no table to give back"):
        lape.remove(folded)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@in_turn(
    "names, copied",
    list(product([{"join": "unshared"}, {"join": "lape"}, {"start": "preserve"}], [copy.deepcopy, pickled])),
    each=2,
)
def test_a_copy_is_independent_of_its_original(name: str, names: dict[str, str], copied: Any) -> None:
    model, x = shaken(applied(name, **names)), inputs(name)
    before = tokens(model, x)
    other = copied(model)
    assert torch.equal(tokens(other, x), before)
    for parameter in other.parameters():
        nn.init.normal_(parameter.detach())
    assert torch.equal(tokens(model, x), before)
    assert not torch.equal(tokens(other, x), before)
    lape.remove(other)
    assert torch.equal(tokens(model, x), before)


@EVERY_FOREIGN
def test_a_file_of_the_untouched_model_lacks_pe_norms_alone_and_files_make_a_round_trip(name: str) -> None:
    model, other, x = shaken(applied(name)), applied(name), inputs(name)
    missing, unexpected = other.load_state_dict(untouched(name).state_dict(), strict=False)
    of_layers = {FOREIGN[name].norms.format(layer).rpartition(".")[0] for layer in range(LAYERS)}
    added = {f"{block}.pe_norm.{part}" for block in of_layers for part in ("weight", "bias")}
    assert set(missing) == added | (set() if FOREIGN[name].table else {"pos_embed"})
    assert not unexpected
    assert not torch.equal(tokens(other, x), tokens(model, x))
    for names in ({}, {"start": "preserve"}):
        model, other = shaken(applied(name, **names)), applied(name, **names)
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(tokens(other, x), tokens(model, x))


@EVERY_FOREIGN
def test_every_parameter_learns_and_those_of_positions_are_exempt_from_decay(name: str) -> None:
    model, x = shaken(applied(name)).train(), inputs(name)
    plain = untouched(name).train()
    for part in (model, plain):
        tokens(part, x).square().sum().backward()
    silent = {parameter for parameter, value in plain.named_parameters() if value.grad is None}
    learnt = {parameter for parameter, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert silent | learnt >= {parameter for parameter, _ in model.named_parameters()} - still(plain)
    vit, _ = find(model)
    exempt = {parameter for parameter, _ in vit.named_parameters() if "pe_norm" in parameter}
    assert len(exempt) == 2 * LAYERS
    assert exempt < vit.no_weight_decay()
    assert positions(model).host.table in vit.no_weight_decay()


def still(model: nn.Module) -> set[str]:
    """Parameters whose gradient is zero in the untouched model too, as a key's bias."""
    return {name for name, value in model.named_parameters() if value.grad is not None and not value.grad.any()}


# --- Compilers and checkpointing


@pytest.mark.parametrize(("name", "join"), list(zip(COMPILED, cycle(("lape", "shared")), strict=False)))
def test_compiles_without_a_graph_break(name: str, join: str) -> None:
    model, x = shaken(applied(name, join=join)).train(), inputs(name)
    expected = tokens(model, x)
    expected.square().sum().backward()
    eager = gradients(model)
    model.zero_grad()
    torch._dynamo.reset()
    output = tokens(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    for parameter, gradient in gradients(model).items():
        # A compiled model gives outputs that the loss leaves out a gradient of zero.
        of_eager = eager.get(parameter, torch.zeros(()).expand_as(gradient))
        torch.testing.assert_close(gradient, of_eager, rtol=1e-3, atol=1e-4, msg=parameter)


@in_turn(
    "names, reentrant",
    list(product([{"join": "shared"}, {"join": "unshared"}, {"join": "lape"}, {"start": "preserve"}], [False, True])),
)
def test_checkpointing_changes_no_gradient(
    name: str, names: dict[str, str], reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = shaken(applied(name, **names)).train(), inputs(name)
    x = x.requires_grad_() if x.is_floating_point() else x  # re-entrant checkpoints ask for an input with a gradient
    tokens(model, x).square().sum().backward()
    expected = gradients(model)
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    elif FOREIGN[name].tokens_argument:  # attention is given what the block makes of them: checkpointed with it alone
        model.set_grad_checkpointing()
        monkeypatch.setattr(timm.models._manipulate, "use_reentrant_ckpt", lambda: reentrant)
    else:
        for block in positions(model).blocks:
            block.forward = partial(_checkpointed, block.forward, reentrant)
    for _ in range(2):  # twice: nothing may be left over from the first
        model.zero_grad()
        tokens(model, x).square().sum().backward()
    assert gradients(model).keys() == expected.keys()
    for parameter, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-5, msg=parameter)


def _checkpointed(forward: Any, reentrant: bool, *given: Any, **options: Any) -> Any:
    def positional(*values: Any) -> Any:  # re-entrant checkpoints take no keywords
        return forward(*values[: len(given)], **dict(zip(options, values[len(given) :], strict=True)))

    return checkpoint(positional, *given, *options.values(), use_reentrant=reentrant)


# --- The same weights in timm's model


def as_timm(name: str, model: nn.Module) -> VisionTransformer:
    """timm's VisionTransformer with the weights of a host, by the names of its parameters."""
    state = model.state_dict()
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": LAYERS, "num_heads": 2, "num_classes": 0}
    shape |= {"mlp_ratio": 1.5 if name != "dinov2" else 4.0, "global_pool": ""}
    found: dict[str, Tensor] = {}

    def take(ours: str, *theirs: str) -> None:
        for part in ("weight", "bias"):
            if f"{theirs[0]}.{part}" in state:
                found[f"{ours}.{part}"] = torch.cat([state[f"{one}.{part}"] for one in theirs])

    def layers(layer: str, norm1: str, norm2: str, qkv: tuple[str, ...], out: str, fc1: str, fc2: str) -> None:
        for i in range(LAYERS):
            at = layer.format(i)
            take(f"blocks.{i}.norm1", f"{at}.{norm1}")
            take(f"blocks.{i}.norm2", f"{at}.{norm2}")
            take(f"blocks.{i}.attn.qkv", *(f"{at}.{one}" for one in qkv))
            take(f"blocks.{i}.attn.proj", f"{at}.{out}")
            take(f"blocks.{i}.mlp.fc1", f"{at}.{fc1}")
            take(f"blocks.{i}.mlp.fc2", f"{at}.{fc2}")
            for number in (1, 2) if name == "dinov2" else ():
                found[f"blocks.{i}.ls{number}.gamma"] = state[f"{at}.layer_scale{number}.lambda1"]

    if name == "torchvision":
        take("patch_embed.proj", "conv_proj")
        take("norm", "encoder.ln")
        found |= {"cls_token": state["class_token"], "pos_embed": state["encoder.pos_embedding"]}
        for key, value in list(state.items()):  # in_proj_weight has no dot
            state[key.replace("in_proj_", "in_proj.")] = value
        mha = ("self_attention.in_proj",)
        where = "encoder.layers.encoder_layer_{}"
        layers(where, "ln_1", "ln_2", mha, "self_attention.out_proj", "mlp.0", "mlp.3")
    elif name in ("vit", "deit", "dinov2"):
        take("patch_embed.proj", "embeddings.patch_embeddings.projection")
        take("norm", "layernorm")
        found |= {"cls_token": state["embeddings.cls_token"], "pos_embed": state["embeddings.position_embeddings"]}
        norms = ("norm1", "norm2") if name == "dinov2" else ("layernorm_before", "layernorm_after")
        where = FOREIGN[name].norms.rpartition(".")[0]
        layers(where, *norms, *ATTENTION, *(("mlp.fc1", "mlp.fc2") if name == "dinov2" else MLP))
    else:
        tower = FOREIGN[name].norms.partition("encoder")[0]
        take("patch_embed.proj", f"{tower}embeddings.patch_embedding")
        take("norm", f"{tower}post_layernorm")
        found["pos_embed"] = state[FOREIGN[name].table or ""][None]
        if name == "clip":
            take("norm_pre", f"{tower}pre_layrnorm")
            found["cls_token"] = state[f"{tower}embeddings.class_embedding"][None, None]
        of_attention = tuple(f"self_attn.{one}_proj" for one in "qkv")
        where = FOREIGN[name].norms.rpartition(".")[0]
        layers(where, "layer_norm1", "layer_norm2", of_attention, "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
    of, _ = find(model)
    own: dict[str, Any] = {"act_layer": type(activation(of))} if name in ("clip", "siglip") else {}
    if name == "deit":
        from timm.models.deit import VisionTransformerDistilled

        found["dist_token"] = state["embeddings.distillation_token"]
        timms: VisionTransformer = VisionTransformerDistilled(**shape | {"global_pool": "token"})
    else:
        own |= {"init_values": 1.0} if name == "dinov2" else {}
        own |= {"pre_norm": True} if name == "clip" else {}
        own |= {"class_token": False} if name == "siglip" else {}
        timms = VisionTransformer(**shape | own)
    eps = {norm.eps for path, norm in of.named_modules() if isinstance(norm, nn.LayerNorm) and "head" not in path}
    for part in timms.modules():
        if isinstance(part, nn.LayerNorm):
            (part.eps,) = eps
    timms.load_state_dict(found, strict=True)
    return timms.eval()


_V5 = int(transformers.__version__.partition(".")[0]) >= 5
ATTENTION = (
    (tuple(f"attention.{one}_proj" for one in "qkv"), "attention.o_proj")
    if _V5
    else (tuple(f"attention.attention.{one}" for one in ("query", "key", "value")), "attention.output.dense")
)
MLP = ("mlp.fc1", "mlp.fc2") if _V5 else ("intermediate.dense", "output.dense")


def activation(model: nn.Module) -> nn.Module:
    return next(part for path, part in model.named_modules() if path.endswith("activation_fn"))


@pytest.mark.parametrize("names", [{"join": "default"}, {"join": "shared"}, {"join": "lape"}], ids=str)
@pytest.mark.parametrize("name", ["torchvision", "vit", "deit", "dinov2", "clip", "siglip"])
def test_the_same_weights_in_timms_model_give_the_same_features(name: str, names: dict[str, str]) -> None:
    model, x = untouched(name), inputs(name)
    timms = lape.apply(as_timm(name, model), **names).double()
    model = shaken(applied(name, model, **names)).double()
    for block, other in zip(positions(model).blocks, timms.blocks, strict=True):
        if names["join"] == "lape":
            other.pe_norm.load_state_dict(block.pe_norm.state_dict())
    x = x.double()
    expected = timms.forward_features(x)
    if name == "torchvision":
        found: list[Tensor] = []
        model.encoder.register_forward_hook(lambda module, given, output: found.append(output))
        model(x)
        (output,) = found
    else:
        output = tokens(model, x)
    if name == "clip":  # transformers norms the class token alone, behind the last hidden state
        expected = timms.norm(output)[:, 0], timms.forward_features(x)[:, 0]
        torch.testing.assert_close(model(x).pooler_output, expected[1], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(*expected, rtol=1e-9, atol=1e-9)
    else:
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


# --- What transformers' models do with their tokens


@pytest.mark.parametrize("name", FUSED)
def test_every_implementation_of_attention_is_told_the_same(name: str) -> None:
    model, x = shaken(applied(name)), inputs(name)
    found = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found.append(model(x, output_hidden_states=True, output_attentions=implementation == "eager"))
    eager, fused = found
    torch.testing.assert_close(eager.last_hidden_state, fused.last_hidden_state, rtol=1e-4, atol=1e-5)
    assert len(eager.hidden_states) == len(fused.hidden_states) == LAYERS + 1
    assert len(eager.attentions) == LAYERS
    for state, other in zip(eager.hidden_states, fused.hidden_states, strict=True):
        torch.testing.assert_close(state, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, tiny in FOREIGN.items() if tiny.resizes is not None])
def test_images_of_another_size_get_the_table_as_transformers_resize_it(name: str) -> None:
    model = untouched(name)
    x = torch.randn(2, 3, 40, 56)
    asked = FOREIGN[name].resizes or {}
    expected = model(x, **asked).last_hidden_state
    other = applied(name, copy.deepcopy(model), join="default")
    torch.testing.assert_close(other(x, **asked).last_hidden_state, expected, rtol=1e-5, atol=1e-6)
    lape.remove(other)
    shaken(applied(name, other))
    chain = [rung.attention for rung in lape.ladder(other, (5, 7))]
    silent = told(name, model, [position.detach() for position in chain if position is not None])
    torch.testing.assert_close(
        other(x, **asked).last_hidden_state, silent(x, **asked).last_hidden_state, rtol=1e-5, atol=1e-5
    )
    folded = lape.fold(copy.deepcopy(other), grids=[(5, 7)])
    torch.testing.assert_close(folded(x, **asked).last_hidden_state, other(x, **asked).last_hidden_state)
    with pytest.raises(UsageError, match="folded for 5x7 patches; the input has 4x4"):
        folded(inputs(name))


def test_a_size_that_the_host_refuses_is_still_refused_by_it() -> None:
    with pytest.raises(ValueError, match="doesn't match model"):
        applied("vit")(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("names", [{"join": "default"}, {"join": "lape"}, {"start": "preserve"}], ids=str)
@pytest.mark.parametrize("folded", [False, True], ids=["as-trained", "folded"])
def test_as_many_patches_in_another_shape_are_resized_for_or_refused(names: dict[str, str], folded: bool) -> None:
    """Untouched, SigLIP gives 2x8 patches the rows of 4x4, one after the other."""
    host, x = untouched("siglip"), torch.randn(1, 3, 16, 64)
    assert host(x).last_hidden_state.shape == (1, 16, D)
    model = applied("siglip", host, **names)
    model = lape.fold(model, grids=[(2, 8)]) if folded else model
    with pytest.raises(UsageError, match=r"of 4x4 patches to 2x8 patches as it is.*interpolate_pos_encoding=True"):
        model(x)
    assert model(x, interpolate_pos_encoding=True).last_hidden_state.shape == (1, 16, D)


def test_towers_are_found_inside_what_wraps_them() -> None:
    torch.manual_seed(0)
    classifier = lape.apply(transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL)))
    assert [name for name, _ in classifier.named_parameters() if name.endswith("pe_norm.weight")] == [
        f"vit.{FOREIGN['vit'].norms.format(layer).rpartition('.')[0]}.pe_norm.weight" for layer in range(LAYERS)
    ]
    assert classifier(inputs("vit")).logits.shape == (2, 2)
    clip = transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=SMALL))
    siglip = transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=SMALL))
    for both in (clip, siglip):
        lape.apply(both)
        names = [name for name, _ in both.named_parameters() if "pe_norm" in name]
        assert len(names) == 2 * LAYERS
        assert all(name.startswith("vision_model.") for name in names)
    lape.apply(clip.text_model)  # beside the one for images, which is what the whole is
    assert len([name for name, _ in clip.named_parameters() if "pe_norm" in name]) == 4 * LAYERS
    lape.remove(clip)
    names = [name for name, _ in clip.named_parameters() if "pe_norm" in name]
    assert names
    assert all(name.startswith("text_model.") for name in names)
    with pytest.raises(UsageError, match=r"BertModel cannot carry a join: its blocks normalise behind attention"):
        lape.apply(transformers.BertModel(transformers.BertConfig(**TEXT)))


REFUSED = [
    ("Bert", {}, "behind attention"),
    ("Roberta", {}, "behind attention"),
    ("Siglip2Vision", {"num_patches": 16}, "each image of a batch"),
    ("Timesformer", {"num_frames": 2}, "of all frames"),
    ("VideoMAE", {"num_frames": 2}, "cuts the table off from gradients"),
    ("XCLIPVision", {}, "adds a token of its own"),
    ("Yolos", {"image_size": (32, 32), "num_detection_tokens": 4}, "stand behind the patches"),
]


@pytest.mark.parametrize(("kind", "options", "reason"), REFUSED, ids=[kind for kind, *_ in REFUSED])
def test_what_cannot_be_done_right_is_refused_with_the_reason(kind: str, options: dict[str, Any], reason: str) -> None:
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **options})
    with pytest.raises(UsageError, match=f"{kind}Model cannot carry a join: .*{reason}"):
        lape.apply(getattr(transformers, f"{kind}Model")(config))


TEXT = {key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}


@pytest.mark.parametrize("kind", ["AltCLIP", "ChineseCLIP"])
def test_a_text_encoder_that_is_refused_does_not_stand_in_the_way_of_one_for_images(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(text_config={**TEXT, "vocab_size": 50}, vision_config=SMALL)
    both = lape.apply(getattr(transformers, f"{kind}Model")(config))
    names = [name for name, _ in both.named_parameters() if "pe_norm" in name]
    assert len(names) == 2 * LAYERS
    assert all(name.startswith("vision_model.") for name in names)


def test_a_text_encoder_does_not_stand_in_for_one_for_images_that_is_refused() -> None:
    config = transformers.XCLIPConfig(text_config=TEXT, vision_config={**SMALL, "mit_hidden_size": D})
    with pytest.raises(UsageError, match=r"XCLIPModel cannot carry a join: .*adds a token of its own"):
        lape.apply(transformers.XCLIPModel(config))


def test_what_transformers_save_is_not_read_without_its_join_and_a_state_dict_has_all(tmp_path: Path) -> None:
    model, other, x = shaken(applied("vit")), applied("vit"), inputs("vit")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lape\.joined\(ViTModel\)\.from_pretrained"):
        transformers.ViTModel.from_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "all.pt")
    other.load_state_dict(torch.load(tmp_path / "all.pt"), strict=True)
    assert torch.equal(tokens(other, x), tokens(model, x))


def test_a_beit_without_a_table_is_given_one_by_name() -> None:
    model = transformers.BeitModel(transformers.BeitConfig(**SMALL, drop_path_rate=0.0)).eval()
    with pytest.raises(UsageError, match="pe='none' has no table"):
        lape.apply(model)
    lape.apply(model, pe="learnable")
    assert model.embeddings.position_embeddings.shape == (1, 17, D)
    assert model(inputs("beit")).last_hidden_state.isfinite().all()
    assert lape.remove(model).embeddings.position_embeddings is None


# --- Rotations beside the table


def test_rotations_stay_as_they_are_and_patches_of_another_grid_have_their_own() -> None:
    for name in ("rope", "rope-mixed"):
        model = shaken(applied(name, untouched(name, dynamic_img_size=True)))
        fixed = untouched(name)
        fixed.load_state_dict(untouched(name, dynamic_img_size=True).state_dict())
        fixed = shaken(applied(name, fixed))
        torch.testing.assert_close(model(inputs(name)), fixed(inputs(name)))
        x = torch.randn(2, 3, 48, 96)
        resized = copy.deepcopy(fixed)
        resized.set_input_size((48, 96))
        torch.testing.assert_close(model(x), resized(x), rtol=1e-5, atol=1e-5)
        default = untouched(name, dynamic_img_size=True)
        expected = default(x)
        assert torch.equal(applied(name, default, join="default")(x), expected)


@pytest.mark.parametrize("name", ["rope", "rope-mixed"])
def test_dropped_patches_take_table_and_rotations_with_them(name: str) -> None:
    model = untouched(name, patch_drop_rate=0.5).train()
    default, x = applied(name, copy.deepcopy(model), join="default"), inputs(name, count=3)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    assert torch.equal(default(x), expected)
    assert set(vars(lape.remove(default).patch_drop)) == set(vars(model.patch_drop))
    shaken(applied(name, model))
    entered: list[Tensor] = []
    model.blocks[0].attn.register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    model.blocks[0].register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    seen: list[Any] = []
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append(positions(model).forwards.latest.rows))
    model(x)
    (rows,), rung = seen, lape.ladder(model)[0].attention
    assert rung is not None
    block, attended = entered
    assert rows.shape == (3, 9)
    assert not rows[:, 0].any()
    norm = model.blocks[0].norm1
    normed = F.layer_norm(block, (D,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(attended, normed + rung[0][rows], rtol=1e-5, atol=1e-5)


def test_a_rotary_model_without_a_table_says_so_and_is_given_one_by_name() -> None:
    from timm import create_model

    options = {"img_size": 64, "embed_dim": D, "depth": 2, "num_heads": 2}
    model = create_model("vit_small_patch16_rope_224", **options).eval()
    with pytest.raises(UsageError, match=r"rotations inside attention \(RoPE\).*Give it one.*pe='learnable'"):
        lape.apply(model)
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    assert torch.equal(lape.apply(model, join="default")(x), before)
    lape.apply(lape.remove(model), pe="learnable")
    assert not torch.equal(model(x), before)
    assert torch.equal(lape.remove(model)(x), before)


# --- Sequences


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch-first", "sequence-first"])
@pytest.mark.parametrize("folded", [False, True], ids=["as-trained", "folded"])
def test_a_shorter_sequence_gets_the_first_rows_and_a_longer_one_is_refused(batch_first: bool, folded: bool) -> None:
    name = "sequences" if batch_first else "sequences-first"
    model, x = shaken(applied(name)), inputs(name)
    short = x[:, :4] if batch_first else x[:4]
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[:, 4:] = True  # the whole sequence, whose last two tokens nobody looks at
    expected = model(x, mask=mask)
    expected = expected[:, :4] if batch_first else expected[:4]
    model = lape.fold(model) if folded else model
    torch.testing.assert_close(model(short), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(src=short), expected, rtol=1e-4, atol=1e-5)
    alone = short[0] if batch_first else short[:, 0]
    of_one = expected[0] if batch_first else expected[:, 0]
    torch.testing.assert_close(model(alone), of_one, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match=r"folded for 1x6|is for 6 tokens, and the input has 12.*grid=\(1, 12\)"):
        model(torch.cat([x, x], dim=1 if batch_first else 0))


def test_a_sinusoid_goes_on_for_any_length() -> None:
    model = applied("sequences", pe="sinusoidal-1d")
    longer = applied("sequences", pe="sinusoidal-1d", grid=(1, 40))
    longer.load_state_dict({**model.state_dict(), "pos_embed": longer.pos_embed})
    x = torch.randn(2, 30, D)
    torch.testing.assert_close(model(x), longer(x))


@pytest.mark.parametrize("join", ["default", "shared", "unshared", "lape-sharing", "lape"])
@pytest.mark.parametrize("name", ["sequences", "sequences-first", "torchvision"])
def test_the_fast_path_of_inference_is_told_what_training_is(name: str, join: str) -> None:
    """PyTorch's fused layer would go around the hooks of its norms; it does not where a layer has any."""
    model, x = shaken(applied(name, join=join)), inputs(name)
    with torch.no_grad():
        fast = model(x)
        trained = model.train()(x)
    torch.testing.assert_close(fast, trained, rtol=1e-4, atol=1e-5)


def test_padding_is_left_out_as_ever() -> None:
    model, x = shaken(applied("sequences")), inputs("sequences")
    padded = torch.zeros(2, 6, dtype=torch.bool)
    padded[1, 4:] = True
    with torch.no_grad():
        torch.testing.assert_close(
            model(x, src_key_padding_mask=padded)[1, :4], model(x[1:, :4])[0], rtol=1e-4, atol=1e-5
        )


def test_what_a_sequence_cannot_have_is_refused() -> None:
    encoder = FOREIGN["sequences"].make()
    with pytest.raises(UsageError, match=r"does not say how many tokens.*grid=\(1, 512\)"):
        lape.apply(encoder, pe="learnable")
    with pytest.raises(UsageError, match="pe='none' has no table"):
        lape.apply(encoder, grid=(1, 6))
    with pytest.raises(UsageError, match=r"a sequence has one row.*pe='sinusoidal-1d'"):
        lape.apply(encoder, pe="sinusoidal-2d", grid=(1, 6))
    with pytest.raises(UsageError, match="take nothing to add"):
        lape.apply(encoder, pe="learnable+relative", grid=(1, 6))
    post = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 48), 2, enable_nested_tensor=False)
    with pytest.raises(UsageError, match="TransformerEncoderLayer with norm_first=True"):
        lape.apply(post, pe="learnable", grid=(1, 6))
    model = applied("sequences")
    with pytest.raises(UsageError, match="Give a padded one"):
        model(torch.nested.nested_tensor([torch.randn(3, D), torch.randn(5, D)]))
    with pytest.raises(UsageError, match="A join is applied once"):
        applied("sequences", model)


def test_an_encoder_of_patches_may_have_rows_and_columns() -> None:
    model = lape.apply(FOREIGN["sequences"].make(), pe="sinusoidal-2d", grid=(2, 3))
    assert model(torch.randn(2, 6, D)).shape == (2, 6, D)
    with pytest.raises(UsageError, match="those of 2x3 patches, and the input has 5 tokens"):
        model(torch.randn(2, 5, D))


# --- A class of one's own


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"blocks": "layers.*"}, r"names 'layers\.\*', and Scratch has nothing there"),
        ({"table": "stem.table"}, r"names 'stem\.table'"),
        ({"table": "trunk.where"}, r"names 'trunk'"),
        ({"add_table": "place"}, r"names 'stem\.place'"),
        ({"width": "width"}, "names 'width'"),
        ({"grid": "grid"}, "names 'grid'"),
        ({"block": lape.Block("norm1")}, "'norm1' as the norm before attention, and Attend has nothing there"),
        (
            {"prefix_has_no_rows": False},
            r"is \(16, 32\); 1 prefix tokens and 4x4 patches of width 32 would have \(17, 32\)",
        ),
        ({"grid": None}, "does not say how many tokens"),
    ],
    ids=str,
)
def test_a_row_that_does_not_fit_is_refused_by_its_entry_and_leaves_the_model_alone(
    entry: dict[str, Any], says: str
) -> None:
    model = Scratch()
    before = list(model.state_dict())
    with pytest.raises(UsageError, match=says):
        lape.apply(model, host=replace(SCRATCH, **entry))
    assert list(model.state_dict()) == before
    assert "lape_positions" not in vars(model)


def test_a_method_may_read_the_table_by_another_of_its_own() -> None:
    model, other = untouched("scratch"), untouched("scratch")
    lape.apply(model, host=replace(SCRATCH, add_table="forward"))
    assert torch.equal(model(inputs("scratch")), lape.apply(other, host=SCRATCH)(inputs("scratch")))


def test_a_method_that_does_not_read_the_table_itself_is_refused_when_it_runs() -> None:
    model = untouched("scratch")
    original = copy.copy(model.stem)
    model.stem.__dict__["elsewhere"] = original.placed  # reads the table of the module as it was
    model.stem.__class__ = type("Apart", (Scratch.Stem,), {"placed": lambda self, patches: self.elsewhere(patches)})
    lape.apply(model, host=SCRATCH)
    with pytest.raises(UsageError, match=r"Apart.placed does not read 'where' itself.*Host\(add_table="):
        model(inputs("scratch"))


def test_a_grid_beside_the_models_own_is_refused() -> None:
    with pytest.raises(UsageError, match=r"says that its grid is 4x4, and grid=\(2, 8\) is another"):
        lape.apply(untouched("vit"), grid=(2, 8))


def test_a_text_encoder_of_ones_own_follows_the_length_of_each_input() -> None:
    model, words = shaken(applied("reader")), inputs("reader")
    by_hand = untouched("reader")
    nn.init.zeros_(by_hand.places.weight)
    for layer, rung in enumerate(lape.ladder(model)):
        by_hand.depths[layer].before.register_forward_hook(
            lambda module, given, output, position=rung.attention: output + position[:, : output.shape[1]]
        )
    for length in (12, 7, 1):
        torch.testing.assert_close(model(words[:, :length]), by_hand(words[:, :length]), rtol=1e-4, atol=1e-5)


# --- Files, versions, imports


@pytest.mark.parametrize("name", [name for name in FOREIGN if not name.startswith("rope")])
def test_parts_of_files_are_the_business_of_the_hosts_library(name: str) -> None:
    with pytest.raises(UsageError, match=r"timm's VisionTransformer, Eva.*Load the whole: lape\.load_weights"):
        lape.load_backbone(applied(name), untouched(name).state_dict())


def test_a_version_that_no_row_knows_is_named() -> None:
    model = untouched("vit")
    model.ladders = model._modules.pop("layers" if hasattr(model, "layers") else "encoder")
    with pytest.raises(UsageError, match=r"a transformers ViT of this version has no '(layers|encoder.layer).*'"):
        lape.apply(model)


def test_no_library_is_imported_that_the_model_is_not_of() -> None:
    code = (
        "import sys, torch, lape\n"
        "layer = torch.nn.TransformerEncoderLayer(8, 2, 8, norm_first=True, batch_first=True)\n"
        "model = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)\n"
        "lape.apply(model, pe='learnable', grid=(1, 5))(torch.randn(1, 3, 8))\n"
        "lape.fold(model)\n"
        "print([name for name in ('timm', 'torchvision', 'transformers') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


# --- Rows of classes of one's own


class Special(VisionTransformer):
    """A subclass with a row of its own."""


class MoreSpecial(Special):
    """One without."""


def test_the_row_of_the_most_specific_class_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ROWS", {name: [*rows] for name, rows in registry._ROWS.items()})
    shape = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 2}
    own = register(replace(VISION_TRANSFORMER, name="special", model=class_name(Special)))
    assert register(own) is own
    again = register(replace(VISION_TRANSFORMER, name="later"))  # of timm's class: the first that fits stays
    for kind, row in ((VisionTransformer, VISION_TRANSFORMER), (Special, own), (MoreSpecial, own)):
        assert find(kind(**shape))[1] is row
        assert find(nn.Sequential(kind(**shape)))[1] is row
    assert again in registered()
    with pytest.raises(UsageError, match=r"that of 'special' names none: Host\(model=\.\.\.\)"):
        register(replace(own, model=None))


def test_a_class_token_behind_the_words_is_refused() -> None:
    model = OpenClipText(12, 50, D, 2, 2, 2.0, embed_cls=True)
    with pytest.raises(UsageError, match=r"embed_cls=True is not known: its class token stands behind the words"):
        lape.apply(model)

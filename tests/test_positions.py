"""Laws of kinds of positions on hosts: rotations, fixed biases, Fourier tables, PEG, and the rung of the last norm."""

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import foreign_hosts
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_reentrant_ckpt
from tiny_hosts import EVERY_HOST, gradients, host, images
from torch import Tensor, fx, nn

import lape
from lape.embeddings import ROTATIONS, PositionEncodingGenerator
from lape.embeddings.rotations import cosine_and_sine
from lape.errors import UsageError
from lape.hosts import Rotated
from lape.models.segmenter import segmenter
from lape.models.vit_adapter import ViTAdapter
from lape.surgery.operation import positions

ATTEND = F.scaled_dot_product_attention
CPU = torch.device("cpu")
KINDS = "fourier+alibi-2d+rope-mixed+peg"  # one part of each
TRANSFORMERS = ("vit", "deit", "beit", "dinov2", "clip", "siglip", "vit-msn", "vit-mae", "ijepa", "pixio", "data2vec")
TRANSFORMERS += ("internvl", "dpt", "altclip", "chinese-clip", "clipseg", "metaclip-2", "kosmos-2", "owlvit", "owlv2")
TRANSFORMERS += ("janus", "idefics2", "idefics3", "smolvlm", "registers", "ast", "vivit")


@contextmanager
def turning(rotation: Tensor) -> Iterator[list[int]]:
    """Turn queries and keys where attention is computed; hand out how many of them there were."""
    calls: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *others: Any, **options: Any) -> Tensor:
        if q.shape[-2] == k.shape[-2] == rotation.shape[-2]:  # not the class tokens of all layers, nor a decoder's
            calls.append(q.shape[-2])
            q, k = (ROTATIONS["rope-axial"].turn(one, rotation) for one in (q, k))
        return ATTEND(q, k, v, *others, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        yield calls


def own(name: str) -> nn.Module:
    torch.manual_seed(0)
    small: dict[str, Any] = {"embed_dim": 32, "num_heads": 2, "depth": 3, "num_classes": 5}
    if name == "segmenter":
        return segmenter(patch_size=8, img_size=(32, 48), **(small | {"num_classes": 5}))
    return timm.create_model(name, img_size=(64, 96) if "ceit" in name or "t2t" in name else 32, **small)


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A model, and what it is given."""
    if name in foreign_hosts.FOREIGN:
        return foreign_hosts.untouched(name).double(), foreign_hosts.inputs(name).double()
    model = own(name) if name in OWN else host(name)
    if name in OWN:
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    size = {"segmenter": (32, 48), "ceit_tiny_patch16_224": (64, 96), "t2t_vit_7": (64, 96), "cct_2_3x2_32": (32, 32)}
    x = torch.randn(2, 3, *size[name]) if name in OWN else images(model)
    return model.double().eval(), x.double()


OWN = ("t2t_vit_7", "ceit_tiny_patch16_224", "cct_2_3x2_32", "segmenter")


@pytest.mark.parametrize("name", [*TRANSFORMERS, *OWN])
def test_queries_and_keys_are_turned_where_attention_is_computed(name: str) -> None:
    refuse_another_function(name)


@EVERY_HOST
def test_so_they_are_in_every_kind_of_timms(name: str) -> None:
    refuse_another_function(name)


def refuse_another_function(name: str) -> None:
    """Rotations by hooks are those that are done to what attention is given, and remove leaves nothing behind."""
    model, x = made(name)
    for part in model.modules():
        if isinstance(part, nn.Linear):  # attention that tells tokens apart
            nn.init.normal_(part.weight, std=0.4)
    plain = lape.apply(copy.deepcopy(model), "default", "none")
    record, before = positions(plain), foreign_hosts.tokens(model, x)
    angles = ROTATIONS["rope-axial"].angles(record.grid, record.head_dim(record.blocks[0]), CPU)
    with torch.no_grad():
        without = foreign_hosts.tokens(plain, x)
        with turning(cosine_and_sine(angles, record.prefix)) as calls:
            expected = foreign_hosts.tokens(plain, x)
        state = list(model.state_dict())
        rotated = lape.apply(model, "default", "rope-axial")
        found = foreign_hosts.tokens(rotated, x)
        without_hooks = lape.remove(copy.deepcopy(rotated))  # a copy that has not run since
        assert not any(module._forward_hooks for module in without_hooks.modules())
        again = pickle.loads(pickle.dumps(copy.deepcopy(rotated)))
        assert torch.equal(foreign_hosts.tokens(again, x), found)
        torch.testing.assert_close(foreign_hosts.tokens(lape.fold(again), x), found, rtol=1e-12, atol=1e-12)
    assert calls
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found - without).abs().max() > 1e-4 * without.abs().max()
    assert torch.equal(foreign_hosts.tokens(lape.remove(rotated), x), before)
    assert list(rotated.state_dict()) == state
    assert not any(module._forward_hooks for module in rotated.modules())


def test_the_fused_path_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lape.apply(host(), "lape", "learnable+rope-axial")
    assert all(block.attn.fused_attn for block in model.blocks)
    rotation = torch.zeros(2, 1, 1, 10**6, 8)  # for no tokens
    with turning(rotation):
        fused = model(images(model))
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(images(model)), fused)


@pytest.mark.parametrize(
    ("name", "pe", "says"),
    [
        ("torchvision", "learnable+rope-axial", "EncoderBlock.*no module puts them out.*pe='learnable'"),
        ("sequences", "learnable+rope-axial", "tells rows from columns, and a sequence has one row"),
        ("sequences", "fourier", "tells rows from columns"),
        ("scratch", "learnable+rope-mixed", r"Attend.*lape\.Block\(rotated=\.\.\.\)"),
        ("rope", "learnable+rope-axial", "this Eva turns them already"),
        ("vit", "learnable+alibi-2d", "take nothing to add there"),
    ],
)
def test_what_a_host_cannot_have_is_refused(name: str, pe: str, says: str) -> None:
    model = foreign_hosts.untouched(name)
    with pytest.raises(UsageError, match=says):
        foreign_hosts.applied(name, model, pe=pe)
    names = [part for part, _ in model.named_modules()]
    assert names == [part for part, _ in foreign_hosts.untouched(name).named_modules()]


def test_what_a_model_of_timms_cannot_have_is_refused() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 2), num_heads=(1, 2))
    for model, names, says in (
        (swin, {"join": "default", "pe": "rope-axial"}, "SwinTransformerBlock.*within"),
        (swin, {"pe": "learnable+alibi-2d"}, r"one in each window. Use pe='learnable\+relative'"),
        (swin, {"join": "mpvg", "pe": "learnable+relative"}, "what the last norm puts out"),
        (host(num_heads=3, embed_dim=48), {"pe": "learnable+lookhere-90"}, "4, 6, 12 heads; this model has 3"),
        (host(num_heads=16), {"pe": "learnable+rope-axial"}, "this model's heads have 2"),
        (host(), {"join": "default", "pe": "peg-5"}, "first 5 blocks, and this model has 3. Use pe='peg'"),
        (host(patch_drop_rate=0.5), {"pe": "learnable+peg"}, "drops patches in training"),
        (host(), {"pe": "learnable+rope-axial", "start": "preserve"}, "keeps what the model computes"),
        (host(class_token=False, global_pool="avg"), {"join": "mpvg"}, "fc_norm=False"),
    ):
        with pytest.raises(UsageError, match=says):
            lape.apply(model, **names)
    assert lape.apply(host(class_token=False, global_pool="avg", fc_norm=False), "mpvg").pe_norm.weight.shape == (32,)
    assert "mpvg" not in lape.surgery.operation.joins_of(swin)


class Attention(nn.Module):
    """Attention whose queries and keys have modules of their own, and heads that nobody counts."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(foreign_hosts.D, foreign_hosts.D) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (2, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.attention = nn.LayerNorm(foreign_hosts.D), Attention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.before(x))


def test_a_class_of_ones_own_names_its_queries_and_keys() -> None:
    model = foreign_hosts.Scratch().double()
    model.depths = nn.Sequential(Block(), Block()).double()
    rotated = (Rotated("attention.q", "attention.k", axis=None),)

    def row(**options: Any) -> lape.Host:
        from dataclasses import replace

        return replace(foreign_hosts.SCRATCH, block=lape.Block("before", **options))

    with pytest.raises(UsageError, match=r"heads .* is not known.*lape.Block\(heads=...\)"):
        lape.apply(copy.deepcopy(model), "default", "rope-axial", host=row(rotated=rotated))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = lape.apply(copy.deepcopy(model), "default", "none", host=foreign_hosts.SCRATCH)
    with turning(cosine_and_sine(ROTATIONS["rope-axial"].angles((4, 4), 16, CPU), 1)):
        expected = plain(x)
    found = lape.apply(copy.deepcopy(model), "default", "rope-axial", host=row(rotated=rotated, heads=2))(x)
    torch.testing.assert_close(found, expected)
    wrong = lape.apply(copy.deepcopy(model), "default", "rope-axial", host=row(rotated=rotated, heads=4))
    assert not torch.allclose(wrong(x), expected)  # heads of another width
    for names, says in ((("attention", "attention.k"), "of 17 tokens"), (("attention.q", "attention.v2"), "no module")):
        with pytest.raises(UsageError, match=says):
            lape.apply(
                copy.deepcopy(model), "default", "rope-axial",
                host=row(rotated=(Rotated(*names, axis=1 if "k" in names[1] else None),), heads=2),
            )(x)  # fmt: skip


def test_windows_turn_queries_and_keys_too() -> None:
    """One window over the whole grid is no window."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
    adapter = ViTAdapter(interactions=((0, 0), (1, 1)), windows=(4, 4), deform_heads=2, prior_width=8, **options)
    adapter = lape.apply(adapter, "lape", "learnable+rope-mixed").eval()
    x = torch.randn(1, 3, 64, 64)
    windowed = adapter(x)
    for block in adapter.blocks:
        block.window = None
    for one, other in zip(adapter(x), windowed, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", [*TRANSFORMERS, "torchvision", "scratch", "sequences-first"])
def test_peg_stands_behind_a_block_however_tokens_lie(name: str) -> None:
    torch.manual_seed(0)
    options = {"grid": (2, 3)} if "sequences" in name else {}
    model = foreign_hosts.applied(name, join="default", pe="peg", **options)  # pyright: ignore
    record = positions(model)
    generator = record.blocks[0].peg
    assert isinstance(generator, PositionEncodingGenerator)
    x = foreign_hosts.inputs(name)
    plain = foreign_hosts.applied(name, join="default", pe="none", **options)  # pyright: ignore

    def convolve(block: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return convolve(block, inputs, output[0]), *output[1:]
        tokens = output.transpose(0, 1) if name == "sequences-first" else output
        prefix, rows = record.prefix, F.conv2d(
            tokens[:, record.prefix :].mT.unflatten(2, record.grid),
            generator.weight, generator.bias, padding=1, groups=foreign_hosts.D,
        )  # fmt: skip
        tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:] + rows.flatten(2).mT], dim=1)
        return tokens.transpose(0, 1) if name == "sequences-first" else tokens

    with torch.no_grad():
        without = foreign_hosts.tokens(plain, x)
        positions(plain).blocks[0].register_forward_hook(convolve)
        expected, found = foreign_hosts.tokens(plain, x), foreign_hosts.tokens(model, x)
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, without, atol=1e-3)
        assert torch.equal(foreign_hosts.tokens(lape.fold(copy.deepcopy(model)), x), found)
        lape.remove(model)
        assert not any(isinstance(part, PositionEncodingGenerator) for part in model.modules())


def everything(join: str = "mpvg", pe: str = KINDS, **options: Any) -> Any:
    torch.manual_seed(0)
    model = lape.apply(host(img_size=(32, 64), dynamic_img_size=True, **options), join, pe)
    for name, parameter in model.named_parameters():
        if "pe_norm" in name or "peg" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("pe", [KINDS, "learnable+rope-dinov3:rescale=2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(pe: str, reentrant: bool) -> None:
    model = everything(pe=pe).double().train()
    height = 48 if pe is KINDS else 32  # a table is resized in float32
    x = torch.randn(2, 3, height, 64, dtype=torch.float64)

    def learnt() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        model(x).square().sum().backward()
        return gradients(model)

    plain = learnt()
    assert not set(dict(model.named_parameters())) - set(plain)  # each learns
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(reentrant)
    try:
        again = learnt()
    finally:
        set_reentrant_ckpt(False)
    assert set(again) == set(plain)
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("pe", "join"), [(KINDS, "mpvg"), ("learnable+lookhere-90+rope-dinov3", "lape")])
def test_it_compiles_whole_and_folds_for_several_grids(pe: str, join: str) -> None:
    model = everything(join, pe, num_heads=4, depth=2).double()
    folded = lape.fold(copy.deepcopy(model), [(2, 4), (3, 2)])
    left = [
        name for name in folded.state_dict() if any(part in name for part in ("pe_norm", "lff", "freqs", "pos_emb"))
    ]
    assert not left
    assert [name for name in folded.state_dict() if "peg" in name] == [
        f"blocks.0.peg.{n}" for n in ("weight", "bias")
    ] * ("peg" in pe)
    for size in ((32, 64), (48, 32)):
        x = torch.randn(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(folded(x), expected, rtol=1e-11, atol=1e-11)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(UsageError, match="folded for 2x4, 3x2 patches"):
        folded(torch.randn(1, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("pe", ["fourier+rope-mixed+peg", "learnable+rope-dinov3"])
def test_a_folded_model_is_traced_with_all_its_kinds(pe: str) -> None:
    folded = lape.fold(lape.apply(host(), "mpvg", pe))
    x = images(folded)
    graph = fx.symbolic_trace(folded)
    assert torch.equal(graph(x), folded(x))
    without = lape.apply(host(), "default", "none")
    assert not torch.allclose(graph(x), without(x), atol=1e-4)


def test_a_folded_model_with_a_bias_is_traced_without_a_mask() -> None:
    folded = lape.fold(lape.apply(host(), "lape", "learnable+alibi-2d+rope-mixed"))
    x = images(folded)
    graph = fx.symbolic_trace(folded, concrete_args={"attn_mask": None, "is_causal": False})
    assert torch.equal(graph(x), folded(x))
    with pytest.raises(UsageError, match=r"concrete_args=\{'attn_mask': None, 'is_causal': False\}"):
        fx.symbolic_trace(folded)


def test_a_folded_rope_model_is_exported_without_trigonometry(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = everything("lape", "fourier+alibi-2d+rope-mixed", depth=2).float()
    written = lape.export(model, tmp_path / "folded.onnx", fold=True)
    nodes = {node.op_type for node in onnx.load(written.path).graph.node}
    assert written.difference < 1e-5
    assert not nodes & {"Sin", "Cos", "Range"}
    assert "MatMul" in nodes


def test_coordinates_move_once_a_training_forward_and_never_in_a_ladder() -> None:
    model = everything("default", "rope-dinov3:shift=0.5:jitter=2:rescale=2").train()
    x = images(model)
    drawn: list[Tensor] = []
    taken = positions(model).for_the_block
    positions(model).for_the_block = lambda *inputs, **options: drawn.append(taken(*inputs, **options)) or drawn[-1]  # type: ignore
    model(x), model(x)
    first, second = [[rung.rotation for rung in drawn[start : start + 3]] for start in (0, 3)]
    assert all(one is first[0] for one in first)
    assert not torch.equal(first[0], second[0])
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert torch.equal(lape.ladder(model)[0].rotation, lape.ladder(model.eval())[0].rotation)
    assert torch.equal(lape.fold(copy.deepcopy(model.train()))(x), model.eval()(x))


@pytest.mark.parametrize("name", ["timm", "torchvision", "vit", "deit", "dinov2", "siglip"])
@pytest.mark.parametrize("pe", ["learnable", "sinusoidal-1d", "fourier"])
def test_mpvg_is_pvg_and_the_tables_norm_behind_the_last(name: str, pe: str) -> None:
    torch.manual_seed(0)
    plain, x = (host(num_classes=0, global_pool=""), images(host())) if name == "timm" else (
        foreign_hosts.untouched(name), foreign_hosts.inputs(name)
    )  # fmt: skip
    if name == "torchvision":
        plain.heads = nn.Identity()
    mpvg = lape.apply(plain, "mpvg", pe)
    pvg = copy.deepcopy(mpvg)
    nn.init.zeros_(positions(pvg).around_the_final_norm.pe_norm.weight)  # pyright: ignore
    record = positions(mpvg)
    norm: Any = record.around_the_final_norm.pe_norm
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    nn.init.zeros_(positions(pvg).around_the_final_norm.pe_norm.bias)  # pyright: ignore
    with torch.no_grad():
        last = record.final(record.forward(record.grid)).attention
        assert last is not None
        assert last.shape == (1, record.prefix + record.grid[0] * record.grid[1], record.width)
        difference = foreign_hosts.tokens(mpvg, x) - foreign_hosts.tokens(pvg, x)
        expected = (last[:, 0] if name == "torchvision" else last).expand_as(difference)
        torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-5)
        folded = lape.fold(copy.deepcopy(mpvg))
        assert torch.equal(foreign_hosts.tokens(folded, x), foreign_hosts.tokens(mpvg, x))
    lape.remove(mpvg)
    assert not hasattr(record.around_the_final_norm, "pe_norm")


def test_what_positions_brought_neither_decays_nor_stays_after_an_initialiser() -> None:
    model = everything()
    brought = {
        name for name, _ in model.named_parameters() if any(part in name for part in ("lff", "freqs", "peg", "pe_"))
    }
    assert brought <= model.no_weight_decay()
    assert {"blocks.2.freqs", "lff.Wr.weight", "blocks.0.peg.weight", "pe_norm.bias"} <= brought
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    assert all(
        model.get_parameter(name).isfinite().all()
        for name in brought - {"pe_norm.weight", "pe_norm.bias"}
        if "pe_norm" not in name
    )
    assert model.lff.Wr.weight.std() > 0.5
    assert 0.3 < model.blocks[0].peg.weight.std() < 0.6
    lengths = model.blocks[1].freqs.norm(dim=0)
    torch.testing.assert_close(lengths, torch.tensor([10 ** (-k / 4) for k in range(4)]).repeat(2).expand(2, 8))


def test_a_set_input_size_is_the_grid_that_things_are_made_for() -> None:
    model = everything(join="lape", pe=KINDS)
    x = torch.randn(1, 3, 48, 80)
    expected = model(x)
    model.set_input_size((48, 80))
    assert positions(model).grid == (3, 5)
    torch.testing.assert_close(model(x), expected)
    assert lape.ladder(model)[0].rotation.shape == (2, 1, 2, 16, 8)


def test_fixed_biases_know_the_depth_that_a_model_had() -> None:
    model = everything("default", "lookhere-180", num_heads=4)
    before = lape.ladder(model)[1].bias
    model.blocks = model.blocks[:2]
    assert torch.equal(lape.ladder(model)[1].bias, before)


def test_learnt_rotations_are_read_from_files_of_rope_vit_and_timm() -> None:
    model = everything("lape", "learnable+rope-mixed")
    state = {name: value for name, value in model.state_dict().items() if "freqs" not in name}
    whole = torch.randn(2, 3, 2, 8)
    for name, value in (("freqs", whole.flatten(2)), ("rope.freqs", whole)):
        lape.load_weights(model, {**state, name: value})
        assert torch.equal(torch.stack([block.freqs for block in model.blocks], dim=1), whole)
        nn.init.zeros_(model.blocks[0].freqs)

"""Laws of single families: what is peculiar to one, how it starts, and the files of its first authors."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_models import SMALL, SWIN, images, small
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

import lape
from lape.errors import RunError, UsageError
from lape.method import PositionNorm
from lape.models import swin
from lape.models.ceit import CeiTBlock, LocallyEnhancedFeedForward
from lape.models.compact import CompactBlock
from lape.weights import convert

# --- What is peculiar to one family


def test_a_compact_block_replaces_the_stream_by_its_norm() -> None:
    block = CompactBlock(16, 2).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 5, 16)
    stream = block.norm2(x + block.attn(block.norm1(x)))
    torch.testing.assert_close(block(x), stream + block.mlp(stream))


def test_swins_windows_are_the_originals_on_images_that_are_not_square() -> None:
    model = timm.create_model(SWIN, join="lape", **SMALL[SWIN])
    windows = [(block.window_size, block.shift_size) for stage in model.layers for block in stage.blocks]
    assert windows == [((4, 4), (0, 0)), ((4, 4), (2, 2)), ((4, 4), (0, 0)), ((4, 4), (0, 0)), ((2, 2), (0, 0))]


def test_on_square_images_swins_windows_are_timms() -> None:
    with torch.device("meta"):
        plain = timm.create_model("swin_tiny_patch4_window7_224")
        model = timm.create_model("swin_tiny_patch4_window7_224")
        swin.as_published(model)
    for stage, own in zip(plain.layers, model.layers, strict=True):
        for block, other in zip(stage.blocks, own.blocks, strict=True):
            assert (block.window_size, block.shift_size) == (other.window_size, other.shift_size)


def test_at_a_crossing_the_position_takes_the_tokens_road() -> None:
    """A model that is handed the tokens' norm at the crossings computes what the tokens' own merging would."""
    model = small(SWIN, "lape", "learnable").double()
    merging = model.layers[1].downsample
    merging.pe_norm.load_state_dict(merging.norm.state_dict())
    ladder = lape.ladder(model)
    before = ladder[1].attention
    assert before is not None
    expected = model.layers[1].blocks[0].pe_norm(merging(before.unflatten(1, (16, 8))).flatten(1, 2))
    torch.testing.assert_close(ladder[2].attention, expected)


def test_swin_has_no_bias_over_the_whole_grid() -> None:
    with pytest.raises(UsageError, match=r"pe='relative-layernorm' .* Use pe='relative'"):
        timm.create_model(SWIN, pe="relative-layernorm", **SMALL[SWIN])


@pytest.mark.parametrize("side", [1, 3, 5])
@pytest.mark.parametrize("with_bn", [True, False])
def test_ceits_feed_forward_is_three_convolutions_over_the_patches(side: int, with_bn: bool) -> None:
    forward = LocallyEnhancedFeedForward(4, 6, local_size=side, with_bn=with_bn).double().eval()
    for tensor in forward.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    assert any("bn" in name for name in forward.state_dict()) is with_bn
    x = torch.randn(2, 1 + 4 * 6, 4, dtype=torch.float64)

    def normed(image: torch.Tensor, number: int) -> torch.Tensor:
        bn = getattr(forward, f"bn{number}")
        if not with_bn:
            return image
        scale = bn.weight / (bn.running_var + 1e-5).sqrt()
        return (image - bn.running_mean) * scale + bn.bias

    def linear(image: torch.Tensor, convolution: nn.Module) -> torch.Tensor:  # (B, H, W, C)
        return image @ convolution.weight[:, :, 0, 0].T + convolution.bias

    image = nn.functional.gelu(normed(linear(x[:, 1:].unflatten(1, (4, 6)), forward.conv1), 1))
    around = nn.functional.pad(image, (0, 0, *2 * (side // 2,), *2 * (side // 2,)))
    image = sum(
        around[:, row : row + 4, column : column + 6] * forward.conv2.weight[:, 0, row, column]
        for row in range(side)
        for column in range(side)
    )
    image = nn.functional.gelu(normed(image + forward.conv2.bias, 2))
    expected = torch.cat([x[:, :1], normed(linear(image, forward.conv3), 3).flatten(1, 2)], dim=1)
    torch.testing.assert_close(forward(x, (4, 6)), expected)


def test_ceits_options_are_those_of_its_authors_and_their_files_go_in() -> None:
    options = {**SMALL["ceit_tiny_patch16_224"], "leff_local_size": 5, "leff_with_bn": False}
    source, model = (timm.create_model("ceit_tiny_patch16_224", join="lape", **options) for _ in range(2))
    assert source.blocks[0].mlp.conv2.weight.shape[2:] == (5, 5)
    assert not any(".mlp.bn" in name for name in source.state_dict())
    theirs = {re.sub(r"^(blocks\.\d+)\.mlp\.", r"\1.leff.", name): value for name, value in source.state_dict().items()}
    assert lape.load_weights(model, theirs).missing == ()
    x = images("ceit_tiny_patch16_224")
    assert torch.equal(model.eval()(x), source.eval()(x))


@pytest.mark.parametrize("side", [0, 2, 4])
def test_ceits_window_has_a_patch_in_its_middle(side: int) -> None:
    with pytest.raises(UsageError, match=rf"A window of {side} patches has none in its middle.*Give an odd number"):
        timm.create_model("ceit_tiny_patch16_224", leff_local_size=side)


def test_ceit_lets_no_patch_go() -> None:
    with pytest.raises(UsageError, match="patch_drop_rate"):
        timm.create_model("ceit_tiny_patch16_224", patch_drop_rate=0.1)


# --- Files of the families' first authors


def test_a_file_of_the_original_project_is_loaded_and_fitted(tmp_path: Path) -> None:
    """In its own names, and for another size of images."""
    golden = load_file(Path(__file__).parent / "fixtures/classification/cct_lape_learnable.safetensors")
    theirs = {name.removeprefix("state/"): value for name, value in golden.items() if name.startswith("state/")}
    save_file(theirs, tmp_path / "cct.safetensors")
    sizes: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("cct_7_3x1_32", join="lape", img_size=16, **sizes)
    assert lape.load_weights(model, tmp_path / "cct.safetensors").missing == ()
    assert torch.equal(model.pos_embed, theirs["classifier.positional_emb"])
    assert torch.equal(model.blocks[2].norm2.bias, theirs["classifier.blocks.2.norm1.bias"])
    larger = timm.create_model("cct_7_3x1_32", join="lape", **sizes)
    lape.load_weights(larger, theirs)
    assert larger.pos_embed.shape == (1, 256, 32)
    with pytest.raises(RunError, match=r"blocks\.0\.pe_norm\.\w+.* not in the model. Apply that join first"):
        lape.load_weights(timm.create_model("cct_7_3x1_32", img_size=16, **sizes), theirs)


def test_swins_table_is_fitted_and_never_dropped_silently() -> None:
    square = SMALL[SWIN] | {"img_size": 64}
    joined = timm.create_model(SWIN, join="lape", **square)
    with pytest.raises(RunError, match="trained with another join or table"):
        lape.load_weights(timm.create_model(SWIN, **square), joined.state_dict())
    larger = timm.create_model(SWIN, join="lape", **square | {"img_size": 96})
    lape.load_weights(larger, joined.state_dict())
    assert larger.absolute_pos_embed.shape == (1, 576, 16)
    oblong = timm.create_model(SWIN, join="lape", **SMALL[SWIN])
    with pytest.raises(RunError, match=r"absolute_pos_embed has 128 rows, no square"):
        lape.load_weights(joined, oblong.state_dict())


def test_t2ts_sinusoid_is_made_anew_for_a_turned_image() -> None:
    """As many tokens on another grid: rows are counted, not resampled."""
    model = small("t2t_vit_7").double()
    x = images("t2t_vit_7", size=(64, 32)).double()
    output = model(x)
    model.set_input_size((64, 32))
    torch.testing.assert_close(model(x), output, rtol=1e-12, atol=1e-12)


def test_what_the_originals_drop_is_dropped() -> None:
    t2t, cct = timm.create_model("t2t_vit_7"), timm.create_model("cct_7_3x1_32")
    assert [p.p for p in t2t.patch_embed.modules() if isinstance(p, nn.Dropout)] == [0.1] * 4
    assert (cct.blocks[6].attn.attn_drop.p, cct.blocks[6].drop_path1.drop_prob) == pytest.approx((0.1, 0.1))


EPSILONS = {
    "deit_tiny_patch16_224": 1e-6,
    "ceit_tiny_patch16_224": 1e-6,
    "t2t_vit_7": 1e-5,
    SWIN: 1e-5,
    "cct_7_3x1_32": 1e-5,
}


@pytest.mark.parametrize("name", EPSILONS)
def test_norms_have_the_originals_epsilon(name: str) -> None:
    model = timm.create_model(name, join="lape", pe="learnable", **SMALL[name])
    assert {part.eps for part in model.modules() if isinstance(part, nn.LayerNorm | PositionNorm)} == {EPSILONS[name]}


def test_ceits_class_token_starts_as_published() -> None:
    assert 0.01 < timm.create_model("ceit_tiny_patch16_224", **SMALL["ceit_tiny_patch16_224"]).cls_token.std() < 0.03


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("t2t_vit_7", "pos_embed"), ("ceit_tiny_patch16_224", "pos_embed"), ("cct_7_3x1_32", "classifier.positional_emb")],
)
def test_unshared_tables_of_every_family_go_to_their_blocks(name: str, theirs: str) -> None:
    model = small(name, "unshared", "learnable")
    given = {f"{theirs}{i}": block.pos_embed for i, block in enumerate(model.blocks)}
    assert convert(given, model).keys() == {f"blocks.{i}.pos_embed" for i in range(3)}


@pytest.mark.parametrize("name", SMALL)
def test_intermediate_patches_are_those_of_the_forward(name: str) -> None:
    model = small(name, "lape")
    final, _ = model.forward_intermediates(images(name))
    torch.testing.assert_close(final[:, 1:], model.forward_features(images(name))[:, 1:])


def test_ceits_last_attention_starts_as_its_blocks() -> None:
    lca = timm.create_model("ceit_tiny_patch16_224", **SMALL["ceit_tiny_patch16_224"]).lca
    for part in (lca.attn.qkv, lca.attn.proj):
        assert 0.015 < part.weight.std() < 0.025


def test_a_dropped_block_hands_the_stream_on() -> None:
    x = torch.randn(2, 7, 16)
    assert torch.equal(CeiTBlock(16, 2, mlp_layer=LocallyEnhancedFeedForward, drop_path=1.0)(x, (2, 3)), x)
    compact = CompactBlock(16, 2, drop_path=1.0)
    assert torch.equal(compact(x), compact.norm2(x))


def test_a_square_table_of_swins_is_fitted_to_an_oblong_grid() -> None:
    square = timm.create_model(SWIN, join="lape", **SMALL[SWIN] | {"img_size": 64})
    fitted = convert(square.state_dict(), small(SWIN, "lape"))["absolute_pos_embed"]
    expected = resample_abs_pos_embed(square.absolute_pos_embed, [16, 8], num_prefix_tokens=0)
    torch.testing.assert_close(fitted, expected)


def test_the_tokenizers_convolutions_start_as_kaimings() -> None:
    (conv,) = timm.create_model("cct_7_3x1_32").patch_embed.convs
    assert conv.weight.std().item() == pytest.approx((2 / 27) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("name", "side", "pixels"),
    [("vit_7_4_32", 8, 4), ("cct_7_3x1_32", 16, 2), ("cct_7_3x2_32", 8, 4), ("cct_7_7x2_224", 14, 16)],
)
def test_tokenizers_make_the_originals_grids(name: str, side: int, pixels: int) -> None:
    with torch.device("meta"):
        stem = timm.create_model(name).patch_embed
    assert (stem.grid_size, stem.feat_ratio()) == ((side, side), pixels)


def test_a_join_leaves_pretrained_weights_as_they_are(tmp_path) -> None:
    name = "deit_tiny_patch16_224"
    plain = timm.create_model(name)
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    model = timm.create_model(
        name, join="lape", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "weights.pt")}
    )
    assert torch.equal(model.cls_token, plain.cls_token)


def test_a_stem_has_one_patch_size() -> None:
    stem = small("t2t_vit_7").patch_embed
    stem.set_input_size((64, 64), patch_size=16)
    with pytest.raises(UsageError, match="Leave patch_size out"):
        stem.set_input_size((64, 64), patch_size=8)


@pytest.mark.parametrize("name", [name for name in SMALL if name != SWIN])
def test_a_mask_reaches_every_attention(name: str) -> None:
    model = small(name, "lape")
    plain = model.forward_features(images(name))
    whole = torch.ones(2, 1, plain.shape[1], plain.shape[1], dtype=torch.bool)
    torch.testing.assert_close(model.forward_features(images(name), attn_mask=whole), plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.forward_features(images(name), attn_mask=whole.tril()), plain, atol=1e-2)


def test_a_file_of_a_family_can_be_what_is_imported_first() -> None:
    """It imports timm, behind whose import all families are registered, of which it is one."""
    script = "import lape.models.mask_rcnn, timm; print(timm.is_model('mask_rcnn_vit_adapter_nano'))"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (told.stdout, told.returncode) == ("True\n", 0), told.stderr


def test_a_timm_that_cannot_change_swins_windows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fit(*_: Any, **__: Any) -> None:  # as before 1.0.31
        raise RuntimeError("shape '[4, 4]' is invalid for input of size 21")

    monkeypatch.setattr("timm.models.swin_transformer.resize_rel_pos_bias_table", fit)
    with pytest.raises(RunError, match=r"cannot change Swin's windows.*timm 1\.0\.31 or newer, or take square images"):
        timm.create_model(SWIN, join="lape", **SMALL[SWIN])

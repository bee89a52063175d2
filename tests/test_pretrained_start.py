"""Laws of a pretrained start: what a transformer is brings its weights, tables follow the grid, all else is listed."""

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_hosts import TINY, host, shaken
from torch import Tensor, nn

import lape
from lape.errors import RunError
from lape.experiment import Experiment
from lape.models.segmenter import MaskTransformer, Segmenter, SegmenterViT
from lape.models.upernet import UperNet
from lape.models.vit_adapter import ViTAdapter
from lape.weights import Started, convert

DISTILLED = "deit_tiny_distilled_patch16_224"
ADAPTER: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "deform_heads": 2,
    "prior_width": 4,
    "interactions": [(0, 0), (1, 1), (2, 2)],
}


def classifier(join: str = "default", name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    """Images of 64 pixels, a table of 4x4 patches."""
    return shaken(lape.apply(host(name, **{"img_size": 64, **options}), join))


def adapter(join: str = "default", img_size: Any = 64, **options: Any) -> Any:
    torch.manual_seed(3)
    return lape.apply(ViTAdapter(img_size=img_size, **ADAPTER | options), join)


def segmenter(join: str = "default", img_size: int = 96, classes: int = 7, **options: Any) -> Any:
    torch.manual_seed(3)
    encoder = SegmenterViT(img_size=img_size, dynamic_img_size=True, **TINY | options)
    return Segmenter(lape.apply(encoder, join), MaskTransformer(classes, 32, 32, 1, 2))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def resized(table: Tensor, side: int, mode: str) -> Tensor:
    """A table without prefix rows, (1, H·W, D), on another grid, by torch alone."""
    before = round(table.shape[1] ** 0.5)
    image = table.reshape(1, before, before, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(side, side), mode=mode, align_corners=False)
    return image.permute(0, 2, 3, 1).reshape(1, side * side, -1)


def assert_accounted(started: Started, model: nn.Module, before: dict[str, Tensor]) -> None:
    """Every parameter is listed once, and one that is listed as missing is as it was."""
    assert sorted((*started.loaded, *started.missing)) == sorted(before)
    for name in started.missing:
        assert torch.equal(model.state_dict()[name], before[name]), name


def of_blocks(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if name.startswith(("blocks.", "patch_embed."))}


# --- From a classifier into every kind of model


@pytest.mark.parametrize(("join", "side"), [("default", 4), ("lape", 6), ("lape-sharing", 6), ("shared", 4)])
def test_an_adapter_starts_from_the_classifier_of_its_join(join: str, side: int) -> None:
    source, model = classifier(join), adapter(join, 16 * side)
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        started = lape.load_backbone(model, source.state_dict())
    assert_accounted(started, model, before)
    given = of_blocks(source)
    assert {name for name in started.loaded if name != "pos_embed"} == given.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in given.items())
    patches = source.pos_embed[:, 1:]
    torch.testing.assert_close(model.pos_embed, patches if side == 4 else resized(patches, side, "bicubic"))
    kept = {name.split(".")[0] for name in started.missing if not re.search(r"^blocks\.\d\.ls\d\.gamma$", name)}
    assert kept == {"spm", "interactions", "up", "level_embed", "norm1", "norm2", "norm3", "norm4"}
    assert {name.split(".")[0] for name in started.left} == {"cls_token", "norm", "head"}


def test_a_started_adapter_computes_the_classifiers_tokens() -> None:
    """Without a class token in either: its injectors start at zero, so they hand the tokens on."""
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", **TINY, img_size=64, class_token=False, global_pool="avg")
    source, model = shaken(lape.apply(plain)).eval(), adapter("lape").eval()
    lape.load_backbone(model, source.state_dict())
    seen: list[Tensor] = []
    model.blocks[2].register_forward_hook(lambda block, inputs, output: seen.append(output))
    image = torch.randn(1, 3, 64, 64)
    model(image)
    expected = source.forward_intermediates(image, indices=[2], output_fmt="NLC", intermediates_only=True, norm=False)
    torch.testing.assert_close(seen[0], expected[0])


@pytest.mark.parametrize("join", ["default", "lape"])
def test_a_segmenters_encoder_starts_and_its_table_is_bilinear(join: str) -> None:
    source, model = classifier(join), segmenter(join)
    before = state(model)
    started = lape.load_backbone(model, source.state_dict())
    assert_accounted(started, model, before)
    table = model.encoder.pos_embed
    assert torch.equal(table[:, :1], source.pos_embed[:, :1])
    torch.testing.assert_close(table[:, 1:], resized(source.pos_embed[:, 1:], 6, "bilinear"))
    assert torch.equal(model.encoder.cls_token, source.cls_token)
    assert {name.split(".")[0] for name in started.missing} == {"decoder"}
    assert started.left == ()  # as many classes as the encoder's own head, so that goes over too


def test_a_classifier_of_other_classes_keeps_its_head() -> None:
    source, model = classifier("lape"), classifier("lape", num_classes=9)
    model.head.weight.data.zero_()
    started = lape.load_backbone(model, source.state_dict())
    assert set(started.missing) == set(started.left) == {"head.weight", "head.bias"}
    assert model.head.weight.count_nonzero() == 0
    same = classifier("lape")
    same.head.weight.data.zero_()
    assert lape.load_backbone(same, source.state_dict()).missing == ()
    assert torch.equal(same.head.weight, source.head.weight)


def test_a_default_file_starts_a_lape_model_and_its_norms_are_listed() -> None:
    source, model = classifier(), segmenter("lape", classes=5)
    started = lape.load_backbone(model, source.state_dict())
    norms = {f"encoder.blocks.{i}.pe_norm.{name}" for i in range(3) for name in ("weight", "bias")}
    assert {name for name in started.missing if not name.startswith("decoder.")} == norms
    assert "encoder.blocks.*.pe_norm.* (6), decoder.* (" in str(started)


def test_a_distilled_files_rows_go_but_for_the_class_tokens() -> None:
    source, model, without = classifier("lape", DISTILLED), segmenter("lape", img_size=64), adapter("lape")
    started = lape.load_backbone(model, source.state_dict())
    assert torch.equal(model.encoder.pos_embed[:, 0], source.pos_embed[:, 0])
    assert torch.equal(model.encoder.pos_embed[:, 1:], source.pos_embed[:, 2:])
    assert set(started.left) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    larger = segmenter("lape")
    lape.load_backbone(larger, source.state_dict())
    torch.testing.assert_close(larger.encoder.pos_embed[:, 1:], resized(source.pos_embed[:, 2:], 6, "bilinear"))
    lape.load_backbone(without, source.state_dict())
    assert torch.equal(without.pos_embed, source.pos_embed[:, 2:])


def test_layer_scales_of_a_file_go_over() -> None:
    source, model = classifier(init_values=0.3), adapter()
    started = lape.load_backbone(model, source.state_dict())
    assert torch.equal(model.blocks[1].ls2.gamma, source.blocks[1].ls2.gamma)
    assert not any("gamma" in name for name in started.missing if name.startswith("blocks."))


def test_a_relative_table_follows_the_grid() -> None:
    source, model = (shaken(lape.apply(host(img_size=side), "default", "learnable+relative")) for side in (64, 96))
    lape.load_backbone(model, source.state_dict())
    found = model.blocks[1].relative_position_bias_table  # (11·11, heads) from (7·7, heads)
    image = source.blocks[1].relative_position_bias_table.T.reshape(1, -1, 7, 7)
    image = F.interpolate(image, size=(11, 11), mode="bicubic", align_corners=False)
    torch.testing.assert_close(found, image[0].flatten(1).T)


# --- A checkpoint of the whole model


def test_a_trained_segmenter_starts_one_of_other_classes() -> None:
    source, model = segmenter("lape", 64), segmenter("lape", 96, classes=4)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    before = state(model)
    started = lape.load_backbone(model, source.state_dict())
    assert_accounted(started, model, before)
    others = {"decoder.cls_emb", "decoder.mask_norm.weight", "decoder.mask_norm.bias"}
    assert set(started.missing) == set(started.left) == others
    assert torch.equal(model.decoder.proj_patch, source.decoder.proj_patch)
    patches = source.encoder.pos_embed[:, 1:]
    torch.testing.assert_close(model.encoder.pos_embed[:, 1:], resized(patches, 6, "bilinear"))


def test_inside_upernet_the_backbone_starts_from_a_classifier_or_from_a_whole_checkpoint() -> None:
    def upernet(classes: int) -> Any:
        wide = {"interactions": [(0, 0), (1, 1), (2, 2), (3, 3)], "depth": 4}
        return UperNet(adapter("lape", **wide), classes, channels=8, auxiliary_channels=8)

    source, model = classifier("lape", depth=4), upernet(5)
    before = state(model)
    started = lape.load_backbone(model, source.state_dict())
    assert_accounted(started, model, before)
    assert torch.equal(model.backbone.blocks[3].pe_norm.weight, source.blocks[3].pe_norm.weight)
    text = str(started)
    for part in ("decode_head.* (", "auxiliary_head.* (", "backbone.spm.* (", "backbone.blocks.*.ls1.* (4)"):
        assert part in text
    other = upernet(6)
    again = lape.load_backbone(other, model.state_dict())
    classifiers = {
        f"{head}.classifier.1.{name}" for head in ("decode_head", "auxiliary_head") for name in ("weight", "bias")
    }
    assert set(again.missing) == set(again.left) == classifiers


# --- Kinds of source


def test_files_of_the_authors_and_of_timm_are_read(tmp_path: Path) -> None:
    source = classifier("lape")
    theirs = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save({"model": theirs, "epoch": 299}, tmp_path / "checkpoint.pth")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    for name in ("checkpoint.pth", "model.safetensors"):
        model = adapter("lape")
        started = lape.load_backbone(model, tmp_path / name)
        assert started.source == str(tmp_path / name)
        assert all(torch.equal(model.state_dict()[part], value) for part, value in of_blocks(source).items())


@pytest.mark.parametrize("ema_evaluated", [True, False])
def test_of_a_run_the_weights_that_it_validates_are_taken(ema_evaluated: bool, tmp_path: Path) -> None:
    source, averaged, model = classifier("lape"), classifier("lape"), adapter("lape")
    averaged.blocks[0].mlp.fc1.weight.data.fill_(0.5)
    experiment = replace(Experiment(), ema=0.9, ema_evaluated=ema_evaluated)
    saved = {"experiment": experiment.settings(), "model": source.state_dict(), "ema": averaged.state_dict()}
    torch.save(saved, tmp_path / "last.pt")
    lape.load_backbone(model, tmp_path / "last.pt")
    expected = averaged if ema_evaluated else source
    assert torch.equal(model.blocks[0].mlp.fc1.weight, expected.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("name", ["timm/deit_tiny_patch16_224.fb_in1k", "deit_tiny_patch16_224.fb_in1k"])
def test_a_name_of_timms_is_fetched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, asked = classifier(), []
    monkeypatch.setattr("lape.weights.refuse_unreachable", lambda *_: None)
    monkeypatch.setattr(timm, "create_model", lambda *names, **options: asked.append((names, options)) or source)
    model = adapter()
    started = lape.load_backbone(model, name)
    assert asked == [(("deit_tiny_patch16_224.fb_in1k",), {"pretrained": True})]
    assert started.source == name
    assert torch.equal(model.blocks[0].attn.qkv.weight, source.blocks[0].attn.qkv.weight)


def test_a_name_that_cannot_be_fetched_is_told_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: str, **options: bool) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("lape.weights.refuse_unreachable", lambda *_: None)
    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(
        RunError, match=r"deit_tiny_patch16_224 could not be downloaded \(no route to host\)\. Give the file"
    ):
        lape.load_backbone(adapter(), "timm/deit_tiny_patch16_224")


@pytest.mark.parametrize("source", ["runs/absent.pth", "deit_tinny_patch16_224"])
def test_what_is_neither_a_file_nor_a_name_is_refused(source: str) -> None:
    with pytest.raises(RunError, match=rf"{source} does not exist, and timm knows no model of that name"):
        lape.load_backbone(adapter(), source)


def test_a_mapping_without_weights_is_refused() -> None:
    with pytest.raises(RunError, match="The state dict holds no weights"):
        lape.load_backbone(adapter(), {"epoch": 3})


# --- What is refused, with the model as it was


def without(weights: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if part not in name}


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "a wider model": (
        lambda: classifier(embed_dim=48).state_dict(),
        adapter,
        r"of another model: \S+ is \(.*there and",
    ),
    "a deeper one": (
        lambda: classifier(depth=4).state_dict(),
        adapter,
        r"of another model: blocks\.3\.\S+, .*in the model",
    ),
    "a shallower one": (
        lambda: classifier(depth=2).state_dict(),
        adapter,
        r"of another model: blocks\.2\.\S+, .*in the file",
    ),
    "other patches": (
        lambda: classifier(patch_size=8, img_size=32).state_dict(),
        adapter,
        r"of another model: patch_embed\.proj\.weight is \(32, 3, 8, 8\) there and \(32, 3, 16, 16\) here",
    ),
    "a wider MLP": (lambda: classifier(mlp_ratio=2.0).state_dict(), adapter, r"of another model: blocks\.0\.mlp\.fc1"),
    "no queries' bias": (
        lambda: classifier(qkv_bias=False).state_dict(),
        adapter,
        r"attn\.qkv\.bias.* not in the file",
    ),
    "layer scales": (
        lambda: classifier(init_values=0.1).state_dict(),
        segmenter,
        r"another model: blocks\.0\.ls1\.gamma, .* not in the model",
    ),
    "no table": (lambda: without(classifier().state_dict(), "pos_embed"), adapter, r"pos_embed is not in the file"),
    "PE norms": (
        lambda: classifier("lape").state_dict(),
        adapter,
        r"another join or table than this model's: blocks\.0\.pe_norm\.weight, .* Apply that join first",
    ),
    "a table for a model with one in each layer": (
        lambda: classifier().state_dict(),
        lambda: adapter("unshared"),
        r"another join or table than this model's: pos_embed",
    ),
    "an oblong table": (
        lambda: classifier(img_size=(32, 96)).state_dict(),
        adapter,
        r"The state dict does not fit: pos_embed has 13 rows, no square",
    ),
    "no class token": (
        lambda: classifier(class_token=False, global_pool="avg").state_dict(),
        segmenter,
        r"pos_embed has rows for 0 tokens before the patches in the file, and for 1 in the model",
    ),
    "rows that a class token needs": (
        lambda: classifier().state_dict(),
        lambda: host(img_size=96, no_embed_class=True),
        r"pos_embed has rows for 1 tokens before the patches in the file, and for 0 in the model",
    ),
    "a learnt table for a sinusoid of another size": (
        lambda: classifier().state_dict(),
        lambda: lape.apply(host(img_size=96), "lape", "sinusoidal-2d"),
        "Use pe='learnable'",
    ),
    "a normed bias of another grid": (
        lambda: lape.apply(host(img_size=64), "default", "learnable+relative-layernorm").state_dict(),
        lambda: lape.apply(host(img_size=96), "default", "learnable+relative-layernorm"),
        r"another model: blocks\.0\.relative_position\.pe_norm\.weight is \(16,\) there and \(36,\) here",
    ),
    "nothing of a transformer": (
        lambda: {"fc.weight": torch.ones(2)},
        adapter,
        r"of another model: .* not in the file",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused_and_nothing_is_changed(name: str) -> None:
    weights, build, says = REFUSED[name]
    model = build()
    before = state(model)
    with pytest.raises(RunError, match=says):
        lape.load_backbone(model, weights())
    assert all(torch.equal(value, before[part]) for part, value in model.state_dict().items())


# --- Tables in `convert`, by each host's rule


def test_timms_own_models_resize_as_timm_does() -> None:
    from timm.layers.pos_embed import resample_abs_pos_embed

    source, model = classifier(), host(img_size=96)
    expected = resample_abs_pos_embed(source.pos_embed, [6, 6], [4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(convert(source.state_dict(), model)["pos_embed"], expected)


def test_tables_of_each_layer_are_resized() -> None:
    source, model = (lape.apply(host(img_size=side), "unshared") for side in (64, 96))
    assert lape.load_weights(model, source.state_dict()).missing == ()
    larger = lape.ladder(source, (6, 6))
    for rung, expected in zip(lape.ladder(model), larger, strict=True):
        torch.testing.assert_close(rung.residual, expected.residual)


def test_a_table_without_rows_for_its_tokens_is_resized_whole() -> None:
    source, model = (host("deit3_small_patch16_224", img_size=side) for side in (64, 96))
    found = convert(source.state_dict(), model)["pos_embed"]
    assert found.shape == model.pos_embed.shape == (1, 36, 32)
    assert torch.equal(convert(source.state_dict(), source)["pos_embed"], source.pos_embed)


def test_a_class_tokens_row_is_dropped_even_where_the_counts_agree() -> None:
    """7·7 patches and a class token have as many rows as 5·10 patches."""
    source, model = classifier(img_size=112), adapter(img_size=(80, 160))
    found = convert(source.state_dict(), model)["pos_embed"]
    patches = source.pos_embed[:, 1:].reshape(1, 7, 7, -1).permute(0, 3, 1, 2)
    expected = F.interpolate(patches, size=(5, 10), mode="bicubic", align_corners=False).flatten(2).mT
    torch.testing.assert_close(found, expected)
    assert torch.equal(convert(model.state_dict(), model)["pos_embed"], model.pos_embed)
    oblong = classifier(img_size=(80, 160))  # 1 + 5·10 rows are also 2 + 7·7
    assert torch.equal(convert(oblong.state_dict(), model)["pos_embed"], oblong.pos_embed[:, 1:])


# --- What a person reads


def test_the_lists_are_shown_by_parts() -> None:
    missing = ("spm.0.weight", "spm.0.bias", "level_embed", "blocks.0.pe_norm.weight", "blocks.1.pe_norm.weight")
    shown = str(Started("deit.pth", ("blocks.0.fc.weight", "blocks.1.fc.weight"), missing, ("head.weight",)))
    assert shown.splitlines() == [
        "deit.pth: 2 tensors loaded.",
        "Not in it, initial values stay: spm.* (2), level_embed, blocks.*.pe_norm.* (2).",
        "In it, and not taken: head.*.",
    ]
    assert str(Started("deit.pth", ("head.weight",), (), ())) == "deit.pth: 1 tensor loaded."

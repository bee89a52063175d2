"""Laws of the paper's models: sizes, what each join means in them, and what timm's users expect of a model."""

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
from tiny_hosts import gradients, shaken
from torch import Tensor, nn

import lape
from lape.errors import UsageError
from lape.method import JOINS
from lape.models.registry import MODELS, PAPER
from lape.surgery.operation import positions
from lape.surgery.positions import BIAS_TABLE

# One small model of every family, on images that are not square.
SMALL: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"img_size": (32, 64), "embed_dim": 32, "depth": 3, "num_heads": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": (32, 64), "embed_dim": 32, "depth": 3, "num_heads": 2},
    "t2t_vit_7": {"img_size": (32, 64), "embed_dim": 32, "depth": 3, "token_dim": 16},
    "ceit_tiny_patch16_224": {"img_size": (32, 64), "embed_dim": 32, "depth": 3, "num_heads": 2, "stem_dim": 8},
    "vit_7_4_32": {"img_size": (16, 24), "embed_dim": 32, "depth": 3},
    "cvt_7_4_32": {"img_size": (16, 24), "embed_dim": 32, "depth": 3},
    "cct_7_3x1_32": {"img_size": (16, 24), "embed_dim": 32, "depth": 3},
    "cct_6_3x2_32": {"img_size": (16, 24), "embed_dim": 32, "depth": 3},
    "swin_tiny_patch4_window7_224": {
        "img_size": (64, 32),
        "embed_dim": 16,
        "depths": (2, 2, 1),
        "num_heads": (1, 2, 4),
        "window_size": 4,
    },
}
SWIN = "swin_tiny_patch4_window7_224"
WITH_BIAS = "learnable+relative"
OWN_CASES = [(name, join, None) for name in SMALL for join in ("default", "shared", "lape-sharing", "lape")]
CASES = [
    *OWN_CASES,
    *[(name, "unshared", WITH_BIAS if name == SWIN else "learnable") for name in SMALL],
    *[(name, join, pe) for name in SMALL for join, pe in (("default", "none"), ("default", "relative"))],
    *[(name, join, None) for name in SMALL if name != SWIN for join in ("pvg", "mpvg")],
    *[(name, "lape", pe) for name in SMALL for pe in ("learnable", "sinusoidal-1d", "sinusoidal-2d", WITH_BIAS)],
]
# Each law meets every third case, so that each case meets one or two of five laws.
THIRDS = [
    pytest.mark.parametrize(("name", "join", "pe"), CASES[first::3], ids=lambda value: str(value or "own"))
    for first in range(3)
]
EVERY_NAME = pytest.mark.parametrize("name", SMALL)


def small(name: str, join: str | None = None, pe: str | None = None, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, join=join, pe=pe, num_classes=5, **SMALL[name] | options)
    for parameter in model.parameters():  # nothing may hide behind a zero
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return shaken(model).eval()


def images(name: str, count: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, 3, *(size or SMALL[name]["img_size"]))


# --- Sizes (RECIPES of the originals, counted there by creating their classes)

PARAMETERS: dict[str, tuple[int, int]] = {
    "deit_tiny_patch16_224": (5_717_416, 5_722_024),
    "deit_small_patch16_224": (22_050_664, 22_059_880),
    "deit_base_patch16_224": (86_567_656, 86_586_088),
    "deit_tiny_distilled_patch16_224": (5_910_800, 5_915_408),
    "deit_small_distilled_patch16_224": (22_436_432, 22_445_648),
    "deit_base_distilled_patch16_224": (87_338_192, 87_356_624),
    "t2t_vit_7": (4_310_222, 4_310_222 + 2 * 256 * 7),
    "ceit_tiny_patch16_224": (6_356_904, 6_356_904 + 4_608),
    "ceit_small_patch16_224": (24_204_840, 24_204_840 + 9_216),
    "swin_tiny_patch4_window7_224": (28_288_354, 28_603_618),
    "swin_small_patch4_window7_224": (49_606_258, 49_930_738),
    "vit_7_4_32": (3_716_874, 3_716_874 + 3_584),
    "cvt_7_4_32": (3_716_619, 3_716_619 + 3_584),
    "cct_7_3x1_32": (3_760_139, 3_760_139 + 3_584),
    # Less the row of the class token in a table, which the original never reads; less a head of 1000 classes.
    "mask_rcnn_vit_adapter_tiny": (28_068_512 - 192, 28_073_120 - 192),
    "mask_rcnn_vit_adapter_small": (47_802_368 - 384, 47_811_584 - 384),
    "upernet_vit_adapter_tiny": (36_062_428 - 192, 36_067_036 - 192),
    "upernet_vit_adapter_small": (57_614_908 - 384, 57_624_124 - 384),
    "segmenter_tiny_patch16": (6_906_388 - 193_000, 6_910_996 - 193_000),
    "segmenter_small_patch16": (26_418_964 - 385_000, 26_428_180 - 385_000),
}
SWIN_PARAMETERS = {
    ("tiny", "default", "learnable+relative"): 28_589_410,
    ("tiny", "default", "learnable"): 28_566_088,
    ("tiny", "default", "none"): 28_265_032,
    ("tiny", "lape", "learnable"): 28_580_296,
    ("small", "default", "learnable+relative"): 49_907_314,
    ("small", "default", "learnable"): 49_859_656,
    ("small", "default", "none"): 49_558_600,
    ("small", "lape", "learnable"): 49_883_080,
}
CIFAR100 = {"vit_7_4_32": 3_740_004, "cvt_7_4_32": 3_739_749, "cct_7_3x1_32": 3_783_269}


def counted(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_the_originals(name: str) -> None:
    with torch.device("meta"):
        assert (counted(timm.create_model(name)), counted(timm.create_model(name, join="lape"))) == PARAMETERS[name]
    assert PARAMETERS.keys() == PAPER.keys()


@pytest.mark.parametrize(("size", "join", "pe"), SWIN_PARAMETERS)
def test_swin_in_the_settings_of_the_paper_counts_right(size: str, join: str, pe: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"swin_{size}_patch4_window7_224", join=join, pe=pe)
    assert counted(model) == SWIN_PARAMETERS[size, join, pe]


@pytest.mark.parametrize("name", CIFAR100)
def test_another_number_of_classes_counts_right(name: str) -> None:
    with torch.device("meta"):
        assert counted(timm.create_model(name, num_classes=100)) == CIFAR100[name]


def test_what_is_frozen_in_t2t_vit_is_frozen() -> None:
    with torch.device("meta"):
        model = timm.create_model("t2t_vit_7")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4_255_694


# --- Names


def test_names_are_timms_after_import_lape_alone() -> None:
    """In both orders of import, and `import lape` loads neither timm nor torch."""
    for order in (
        "import lape, sys; assert not {'timm', 'torch'} & set(sys.modules); import timm",
        "import timm, lape",
    ):
        create = "print(timm.create_model('cct_7_3x1_32', join='lape').blocks[6].pe_norm)"
        told = subprocess.run([sys.executable, "-c", f"{order}; {create}"], capture_output=True, text=True, check=True)
        assert told.stdout.startswith("PositionNorm(256, eps=1e-05")
        assert told.stderr == ""


def test_timm_lists_all_and_keeps_what_it_knew_of_its_own() -> None:
    assert set(MODELS) <= set(timm.list_models())
    assert "deit_tiny_patch16_224.fb_in1k" in timm.list_pretrained("deit*")
    assert "deit_tiny_patch16_224" in timm.list_models("deit*", module="deit")
    assert timm.create_model("cct_14_7x2_384").pretrained_cfg["input_size"] == (3, 384, 384)


@EVERY_NAME
def test_without_a_join_timms_models_are_untouched(name: str) -> None:
    model = timm.create_model(name, **SMALL[name])
    assert "lape_positions" not in model.__dict__
    assert not any("pe_norm" in parameter for parameter, _ in model.named_parameters())


def test_a_pe_norm_without_a_norm_is_refused_by_timms_function_too() -> None:
    with pytest.raises(UsageError, match="pe_norm='scale'"):
        timm.create_model("cct_2_3x2_32", pe_norm="scale")


def test_without_a_class_token_it_is_made_too() -> None:
    options = {"class_token": False, "global_pool": "avg", "depth": 1, "img_size": 32, "num_classes": 3}
    model = timm.create_model("deit_tiny_patch16_224", join="lape", **options)
    assert model.cls_token is None
    assert lape.ladder(model)[0].attention.shape == (1, 4, 192)


def test_joined_models_start_as_the_recipes_say() -> None:
    torch.manual_seed(0)
    deit, cct = timm.create_model("deit_tiny_patch16_224", join="lape"), timm.create_model("cct_7_3x1_32", join="lape")
    assert 0.01 < deit.cls_token.std() < 0.03
    assert 0.15 < cct.pos_embed.std() < 0.25
    assert 0.15 < timm.create_model("cct_7_3x1_32", join="unshared").blocks[3].pos_embed.std() < 0.25
    vit_lite = timm.create_model("vit_7_4_32", join="default")
    assert vit_lite.cls_token.count_nonzero() == 0
    assert cct.attn_pool.score.weight.std() < 0.03
    assert timm.create_model("t2t_vit_7").cls_token.std() > 0.01


# --- What a join means in every one of them


@EVERY_NAME
def test_default_with_its_own_table_changes_nothing(name: str) -> None:
    model = small(name)
    x = images(name)
    assert torch.equal(lape.apply(copy.deepcopy(model), join="default")(x), model(x))


@THIRDS[0]
def test_remove_gives_back_what_was(name: str, join: str, pe: str | None) -> None:
    model = small(name)
    x, state, attributes = images(name), copy.deepcopy(model.state_dict()), set(model.__dict__)
    before = model(x)
    lape.apply(model, join, pe)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name not in state:
            nn.init.normal_(parameter)
    lape.remove(model)
    assert torch.equal(model(x), before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert set(model.__dict__) == attributes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@EVERY_NAME
def test_neutral_norms_are_the_model_without_position(name: str) -> None:
    pe = "learnable"
    model = small(name, "lape", pe).double()
    without = copy.deepcopy(model)
    lape.apply(lape.remove(without), "default", "none")
    for parameter_name, parameter in model.named_parameters():
        if "pe_norm" in parameter_name:
            nn.init.zeros_(parameter)
    x = images(name).double()
    assert torch.equal(model(x), without(x))


@EVERY_NAME
def test_at_initialisation_lape_and_sharing_are_alike_until_the_first_crossing(name: str) -> None:
    torch.manual_seed(0)
    table = None if name != "t2t_vit_7" else "learnable"
    model = timm.create_model(name, join="lape", pe=table, **SMALL[name]).double()
    sharing = timm.create_model(name, join="lape-sharing", pe=table, **SMALL[name]).double()
    nn.init.normal_(model.get_parameter("absolute_pos_embed" if name == SWIN else "pos_embed"), std=100)  # far from eps
    sharing.load_state_dict(model.state_dict())
    first = 2 if name == SWIN else 3
    for one, other in zip(lape.ladder(model)[:first], lape.ladder(sharing)[:first], strict=True):
        torch.testing.assert_close(one.attention, other.attention, rtol=0, atol=1e-4)


@THIRDS[1]
def test_a_folded_model_gives_the_same_outputs(name: str, join: str, pe: str | None) -> None:
    model = small(name, join, pe).double()
    x = images(name).double()
    with torch.no_grad():
        expected = model(x)
        folded = lape.fold(copy.deepcopy(model))
        assert (folded(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    own = {parameter for parameter in small(name).state_dict() if BIAS_TABLE in parameter or "layer" in parameter}
    left = {key for key in folded.state_dict() if "pe_norm" in key or "pos_embed" in key or BIAS_TABLE in key}
    assert left <= own


@THIRDS[2]
def test_copies_files_and_state_dicts_carry_all(name: str, join: str, pe: str | None) -> None:
    model = small(name, join, pe)
    x = images(name)
    model.train()(x)  # a copy must not depend on what a forward left behind
    before = model.eval()(x)
    fresh = timm.create_model(name, join=join, pe=pe, num_classes=5, **SMALL[name]).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other(x), before)
        for parameter in other.parameters():
            parameter.data.zero_()
    assert torch.equal(model(x), before)


@THIRDS[0]
def test_every_parameter_learns_and_checkpointing_changes_nothing(name: str, join: str, pe: str | None) -> None:
    model = small(name, join, pe, attn_drop_rate=0.0, drop_path_rate=0.0).double().train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    x = images(name, count=4).double()

    def learnt() -> dict[str, Tensor]:
        model.zero_grad()
        model(x).square().sum().backward()
        return gradients(model)

    plain = learnt()
    for parameter_name, parameter in model.named_parameters():
        assert parameter_name in plain or not parameter.requires_grad, parameter_name
    model.set_grad_checkpointing(True)
    again = learnt()
    assert plain.keys() == again.keys()
    for parameter_name, gradient in plain.items():
        torch.testing.assert_close(again[parameter_name], gradient, rtol=1e-9, atol=1e-9, msg=parameter_name)


@THIRDS[1]
def test_tables_and_norms_do_not_decay(name: str, join: str, pe: str | None) -> None:
    model = small(name, join, pe)
    exempt = model.no_weight_decay()
    for parameter_name, parameter in model.named_parameters():
        if "pe_norm" in parameter_name or "pos_" in parameter_name or BIAS_TABLE in parameter_name:
            assert parameter_name in exempt or parameter.ndim <= 1, parameter_name


# --- Inputs

OTHER_SIZES = {
    "t2t_vit_7": (40, 72),
    "ceit_tiny_patch16_224": (64, 32),
    "vit_7_4_32": (24, 16),
    "cvt_7_4_32": (20, 16),
    "cct_7_3x1_32": (13, 30),
    "cct_6_3x2_32": (24, 16),
}


@pytest.mark.parametrize("name", OTHER_SIZES)
@pytest.mark.parametrize("join", ["default", "lape", None])
def test_another_size_of_input_gives_what_a_model_set_to_it_gives(name: str, join: str | None) -> None:
    """Equal numbers of tokens on another grid included: the grid decides, not the count."""
    model = small(name, join).double()
    x = images(name, size=OTHER_SIZES[name]).double()
    output = model(x)
    model.set_input_size(OTHER_SIZES[name])
    torch.testing.assert_close(model(x), output, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(x.mT.contiguous()), output)


@pytest.mark.parametrize("join", ["default", "shared", "unshared", "lape-sharing", "lape"])
@pytest.mark.parametrize("pe", ["learnable", WITH_BIAS])
def test_swin_takes_another_size_and_keeps_its_crossings(join: str, pe: str) -> None:
    """The sides of odd maps are padded, as its tokens' are."""
    model = small(SWIN, join, pe, strict_img_size=False).double()
    for size in ((64, 32), (48, 80), (36, 52)):
        x = images(SWIN, size=size).double()
        assert model(x).isfinite().all()
        grid = size[0] // 4, size[1] // 4
        ladder = lape.ladder(model, grid)
        rows = (
            [grid[0] * grid[1]] * 2 + [-(-grid[0] // 2) * -(-grid[1] // 2)] * 2 + [-(-grid[0] // 4) * -(-grid[1] // 4)]
        )
        for rung, number in zip(ladder, rows, strict=True):
            assert all(part is None or part.shape[1] == number for part in rung)
    model.set_input_size((96, 96))
    assert model(images(SWIN, size=(96, 96)).double()).isfinite().all()
    lape.remove(model)
    assert model(images(SWIN, size=(96, 96)).double()).isfinite().all()


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("ceit_tiny_patch16_224", (40, 64), "sides that 16 divides; 40x64"),
        ("vit_7_4_32", (18, 16), "sides that 4 divides; 18x16"),
        ("t2t_vit_7", (0, 64), "must be larger; 0x64"),
    ],
)
def test_a_size_that_an_architecture_does_not_take_is_refused(name: str, size: tuple[int, int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        small(name)(images(name, size=size))
    with pytest.raises(UsageError, match=says):
        timm.create_model(name, img_size=size)


@EVERY_NAME
def test_channels_classes_features_and_drop_path(name: str) -> None:
    model = small(name, "lape", in_chans=1, drop_path_rate=0.5)
    x = images(name)[:, :1]
    features = model.forward_features(x)
    assert features.shape[-1] == model.num_features
    assert model.forward_head(features).shape == (2, 5)
    assert torch.equal(model.forward_head(features), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.train()
    torch.manual_seed(0)
    first = model(x)
    assert not torch.equal(model(x), first)


@EVERY_NAME
def test_intermediate_features_come_out(name: str) -> None:
    model = small(name, "lape")
    final, maps = model.forward_intermediates(images(name))
    rows, columns = positions(model).layers(positions(model).grid)[-1].grid
    assert maps[-1].shape[-2:] == (rows, columns)
    assert final.isfinite().all()


@EVERY_NAME
def test_features_only_is_for_joined_models_too(name: str) -> None:
    options = SMALL[name] | {"join": "lape", "features_only": True, "out_indices": (0,)}
    (features,) = timm.create_model(name, **options)(images(name))
    assert features.ndim == 4
    assert features.isfinite().all()


@pytest.mark.parametrize("name", ["t2t_vit_7", "ceit_tiny_patch16_224", "cct_7_3x1_32", SWIN])
def test_compiled_it_computes_the_same(name: str) -> None:
    model = small(name, "lape")
    x = images(name)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@EVERY_NAME
def test_it_trains_in_bfloat16(name: str) -> None:
    model = small(name, "lape").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images(name)).square().mean()
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_there_is_a_case_for_every_join() -> None:
    assert {join for _, join, _ in CASES} == JOINS.keys()

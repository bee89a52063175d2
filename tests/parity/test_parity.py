"""Law: given a reference model's weights and input, ours computes its output and its gradients, in float64 to 1e-9.

Every *.json below the folder in LAPE_FIXTURES, or else below tests/fixtures, is a case. A case is built from it alone;
its weights come through the conversion that `lape.load_weights` makes of a reference project's file. What a case says
and no builder asks for must hold of the model that was built, or the case fails: an option is not passed over.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.layers import LayerNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import lape
from lape.embeddings import ROTATIONS, biases, position_embedding, turn_halves, turn_pairs
from lape.embeddings.rotations import cosine_and_sine
from lape.method import BIASES, PositionNorm, Rung
from lape.models import swin as published_swin
from lape.models.ceit import CeiT
from lape.models.compact import BETWEEN, CompactTransformer
from lape.models.segmenter import MaskTransformer, Segmenter, SegmenterViT
from lape.models.t2t_vit import T2TViT
from lape.models.upernet import NAMES, UperNet, fcn_head, uper_head
from lape.models.vit_adapter import ViTAdapter
from lape.surgery.operation import positions
from lape.surgery.positions import BIAS_OWN
from lape.weights import convert, renamed

FOLDER = Path(os.environ.get("LAPE_FIXTURES") or Path(__file__).parents[1] / "fixtures")
# Readings of PVG and MPVG that are not built: what the blocks are handed, and which table the last norm gets, is known
# from accounts by others alone, and `fixtures/positions/README.md` says which reading stands.
NOT_BUILT = ("gap_pvg", "gap_mpvg", "gap_mpvg_progressive")
FILES = sorted(path for path in FOLDER.rglob("*.json") if path.stem not in NOT_BUILT)
TABLES_OF_POSITIONS = [path for path in FILES if path.stem.endswith("_3x5")]
CASES = [path for path in FILES if path not in TABLES_OF_POSITIONS]
TOLERANCE = 1e-9

JOINS = {
    "basic": "default",
    "default": "default",
    "lape": "lape",
    "LN": "default",
    "share": "shared",
    "unshare": "unshared",
    "LaPE": "lape",
    "LaPE-sharing": "lape-sharing",
    "PVG": "pvg",
    "MPVG": "mpvg",
}
TABLES = {
    "learnable": "learnable",
    "1D_sin": "sinusoidal-1d",
    "2D_sin": "sinusoidal-2d",
    "2D_RPE": "relative",
    "none": "none",
    "rpe": "relative",
    "learnable+rpe": "learnable+relative",
}
NORMS = {
    "identity": "identity",
    "scale_scalar": "scalar",
    "scale": "scale",
    "affine": "affine",
    "norm": "norm",
    "norm_scalar": "scalar-norm",
    "norm_scale": "scale-norm",
    "layernorm": "layernorm",
}


def fourier(asked: Mapping[str, Any]) -> str:
    return f"fourier:features={asked['fourier_dim']}:hidden={asked['hidden_dim']}"


def look_here(asked: Mapping[str, Any]) -> str:
    rounded = {"none": "", "bfloat16": ":rounded=true"}[asked["bias_rounding"]]
    slope = "" if asked["global_slope"] == 1 else f":slope={asked['global_slope']:g}"
    return f"lookhere-{asked['name'].removeprefix('LH-')}{slope}{rounded}"


DINOV3 = {"separate": "rope-dinov3", "max": "rope-dinov3-max", "min": "rope-dinov3-min"}
POSITIONS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "none": lambda asked: None,
    "rope_axial": lambda asked: "rope-axial",
    "rope_mixed": lambda asked: "rope-mixed",
    "rope_dinov3": lambda asked: DINOV3[asked["normalize_coords"]],
    "alibi_2d": lambda asked: "alibi-2d",
    "lookhere": look_here,
    "peg": lambda asked: {1: "peg", 5: "peg-5"}[len(asked["after_blocks"])],
}


def embedding(case: dict[str, Any]) -> str:
    """The name of what a case knows of positions."""
    arch, others = case["arch"], case["arch"].get("position")
    table = fourier(arch["lff"]) if case["pe"] == "learnable_fourier" else TABLES[case["pe"]]
    parts = [None if table == "none" else table, None if others is None else POSITIONS[others["kind"]](others)]
    return "+".join(part for part in parts if part is not None) or "none"


SIZES = ("img_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads", "mlp_ratio")


def joined(model: nn.Module, case: dict[str, Any]) -> nn.Module:
    pe = embedding(case) + ("-layernorm" if case["join"] == "LN" else "")
    return lape.apply(model, JOINS[case["join"]], pe, NORMS[case["arch"].get("pe_norm_kind", "layernorm")])


def vit(case: dict[str, Any], kind: type[VisionTransformer], *renamed: tuple[str, str], **fixed: Any) -> nn.Module:
    """A VisionTransformer from the numbers that all have, and those that one kind calls by another name."""
    arch = case["arch"]
    options = {name: arch[name] for name in SIZES} | {ours: arch[theirs] for ours, theirs in renamed} | fixed
    return joined(kind(**options, norm_layer=partial(LayerNorm, eps=arch["norm_eps"])), case)


def swin(case: dict[str, Any]) -> nn.Module:
    arch = case["arch"]
    names = ("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depths", "num_heads", "window_size")
    options = {name: arch[name] for name in (*names, "mlp_ratio", "qkv_bias")}
    model = SwinTransformer(**options, norm_layer=partial(LayerNorm, eps=arch["ln_eps"]))
    published_swin.as_published(model)
    return joined(model, case)


def vit_adapter(case: dict[str, Any], arch: dict[str, Any] | None = None) -> nn.Module:
    arch = arch or case["arch"]
    names = (*SIZES[1:2], *SIZES[3:], "patch_size", "qkv_bias")
    adapter = ViTAdapter(
        **{name: arch[name] for name in names},
        img_size=arch["pretrain_size"],
        interactions=arch["interaction_indexes"],
        windows=arch["window_size"],
        token_map_of_group=arch["variant"] == "seg",
        prior_width=arch["conv_inplane"],
        deform_heads=arch["deform_num_heads"],
        deform_points=arch["n_points"],
        deform_ratio=arch["deform_ratio"],
        ffn_ratio=arch["cffn_ratio"],
        init_values=1.0 if arch["layer_scale"] else None,
        norm_layer=partial(LayerNorm, eps=arch["ln_eps"]),
    )
    return joined(adapter, case)


def vit_adapter_upernet(case: dict[str, Any]) -> nn.Module:
    arch = case["arch"]
    head, auxiliary = arch["decode_head"], arch["auxiliary_head"]
    backbone = vit_adapter(case, arch["backbone"])
    return UperNet(backbone, head["num_classes"], head["channels"], auxiliary["channels"])


def segmenter(case: dict[str, Any]) -> nn.Module:
    arch = case["arch"]
    encoder = SegmenterViT(
        img_size=arch["image_size"],
        patch_size=arch["patch_size"],
        in_chans=arch["in_chans"],
        embed_dim=arch["d_model"],
        depth=arch["n_layers"],
        num_heads=arch["n_heads"],
        mlp_ratio=arch["d_ff"] / arch["d_model"],
        num_classes=arch["encoder_n_cls"],
        dynamic_img_size=True,
        norm_layer=partial(LayerNorm, eps=arch["ln_eps"]),
    )
    decoder = MaskTransformer(
        arch["n_cls"], arch["d_model"], arch["dec_d_model"], arch["dec_n_layers"], arch["dec_n_heads"]
    )
    return Segmenter(joined(encoder, case), decoder)


POOLED = {"cls": {}, "avg": {"global_pool": "avg"}}
NORMED_LAST: dict[str, dict[str, Any]] = {
    "norm on all tokens, before pooling": {"fc_norm": False},
    "fc_norm after pooling (no norm before)": {"fc_norm": True},
}


def plain_vit(case: dict[str, Any]) -> nn.Module:
    """A VisionTransformer; those of `positions` say more of tokens and pooling."""
    if "class_token" not in case["arch"]:
        return vit(case, VisionTransformer, PATCH, BIAS)
    arch = case["arch"]
    tokens = {"class_token": arch["class_token"], "reg_tokens": arch["reg_tokens"]}
    rows = {"no_embed_class": arch["pe_rows"] == "patch tokens only"} if "pe_rows" in arch else {}
    pooling: dict[str, Any] = POOLED[arch["pooling"]] | NORMED_LAST[arch["final_norm"]]
    return vit(case, VisionTransformer, PATCH, BIAS, **tokens, **rows, **pooling)


PATCH, BIAS = ("patch_size", "patch_size"), ("qkv_bias", "qkv_bias")
KERNEL, CONVOLUTIONS = ("kernel", "kernel_size"), ("convolutions", "n_conv_layers")
CEIT = (("stem_dim", "stem_chans"), ("leff_local_size", "leff_kernel"), ("leff_with_bn", "leff_with_bn"))
BUILDERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "vit": plain_vit,
    "deit_distilled": lambda case: vit(case, VisionTransformerDistilled, PATCH, BIAS),
    "t2t_vit": lambda case: vit(case, T2TViT, BIAS, ("token_dim", "token_dim")),
    "ceit": lambda case: vit(case, CeiT, PATCH, BIAS, *CEIT),
    "vit_lite": lambda case: vit(case, CompactTransformer, KERNEL, class_token=True),
    "cvt": lambda case: vit(case, CompactTransformer, KERNEL),
    "cct": lambda case: vit(case, CompactTransformer, KERNEL, CONVOLUTIONS),
    "swin": swin,
    "vit_adapter": vit_adapter,
    "vit_adapter_upernet": vit_adapter_upernet,
    "segmenter": segmenter,
    "upernet_head": lambda case: uper_head(
        *(case["arch"][name] for name in ("in_channels", "channels", "num_classes"))
    ),
    "fcn_head": lambda case: fcn_head(
        *(case["arch"][name] for name in ("in_channels", "channels", "num_classes")), level=0
    ),
}
HEADS = ("upernet_head", "fcn_head")  # on maps, not on an image


class Asked(Mapping[str, Any]):
    """The numbers of a case; knows which of them were asked for."""

    def __init__(self, numbers: dict[str, Any]) -> None:
        self.numbers = {name: Asked(value) if isinstance(value, dict) else value for name, value in numbers.items()}
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self.numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def left(self, path: str = "") -> dict[str, Any]:
        """Return what was not asked for, by its path."""
        found: dict[str, Any] = {}
        for name, value in self.numbers.items():
            if isinstance(value, Asked):
                found |= value.left(f"{path}{name}/")
            elif name not in self.asked:
                found[f"{path}{name}"] = value
        return found


# What cases say beside what builds them: in sentences, or of training alone.
SENTENCES = {
    *("pooling", "block", "lca_pe", "attention_scale_position", "rpe_norm_axis", "pe_norm_formula"),
    "positional_embedding_upstream",
    # Of positions: formulas, which the numbers hold us to.
    *("block", "pooling_formula", "join_formula", "pe_norm_formula", "lff/coords_formula", "lff/formula", "lff/keys"),
    *(f"position/{name}" for name in ("frequencies", "angles", "pair_layout", "applied_to", "periods", "coordinates")),
    *(f"position/{name}" for name in ("augmentation", "slope_rule", "bias", "views", "op", "keys")),
}
OF_TRAINING = {"drop_rate", "attn_drop_rate", "drop_path_rate", "dropout", "attention_dropout", "stochastic_depth"}
# What they say of the model, and what it is in ours.
ADAPTED: dict[str, Callable[[Any], Any]] = {
    "img_size": lambda model: model.patch_embed.img_size[0],
    "in_chans": lambda model: model.patch_embed.proj.in_channels,
    "with_cffn": lambda model: all(hasattr(part.extractor, "ffn") for part in model.interactions),
    "add_vit_feature": lambda model: True,
    "use_extra_extractor": lambda model: len(model.interactions[-1].extra_extractors) > 0,
    "window_attn": lambda model: [block.window is not None for block in model.blocks],
}
HEAD: dict[str, Callable[[Any], Any]] = {
    "bn_eps": lambda head: next(part.eps for part in head.modules() if isinstance(part, nn.BatchNorm2d)),
    "align_corners": lambda head: False,
    "num_convs": lambda head: sum(isinstance(part, nn.BatchNorm2d) for part in head.modules()),
    "concat_input": lambda head: False,
    "in_index": lambda head: 2,
    "pool_scales": lambda head: [1, 2, 3, 6],
}
COMPACT: dict[str, Callable[[Any], Any]] = {
    "patch_size": lambda model: model.patch_embed.convs[0].kernel_size[0],
    "stride": lambda model: model.patch_embed.convs[0].stride[0],
    "padding": lambda model: model.patch_embed.convs[0].padding[0],
    "n_conv_layers": lambda model: len(model.patch_embed.convs),
    "conv_bias": lambda model: model.patch_embed.convs[0].bias is not None,
    "conv_activation": lambda model: "relu" if model.patch_embed.pooled else None,
    "max_pool": lambda model: model.patch_embed.pooled,
    "pooling_kernel_size": lambda model: model.patch_embed.steps[1].kernel,
    "pooling_stride": lambda model: model.patch_embed.steps[1].stride,
    "pooling_padding": lambda model: model.patch_embed.steps[1].padding,
    "in_planes": lambda model: BETWEEN,
}
SAID: dict[str, Callable[[Any], Any]] = {
    "grid": lambda model: list(positions(model).grid),
    "extra_tokens": lambda model: model.num_prefix_tokens,
    "num_tokens": lambda model: model.num_prefix_tokens + model.patch_embed.num_patches,
    "qkv_bias": lambda model: model.blocks[0].attn.qkv.bias is not None,
    "qk_scale": lambda model: None,
    "act": lambda model: "gelu (erf)",
    "pe_norm_eps": lambda model: one(part.eps for part in model.modules() if isinstance(part, PositionNorm)),
    "progressive": lambda model: positions(model).scheme.join.name == "lape",
    "token_order": lambda model: [
        *(["cls"] if model.cls_token is not None else []),
        *(["registers"] if model.num_reg_tokens else []),
        "patches (row-major)",
    ],
    "pe_delivery": lambda model: "progressive" if positions(model).scheme.join.hands_on else "initial",
    "last_pe": lambda model: "initial",
    "lff/groups": lambda model: 1,
    "lff/gamma": lambda model: model.lff.Wr.gamma,
    "lff/coords": lambda model: "unit_centre",
    "lff/prefix_rows": lambda model: "zero",
    "position/theta": lambda model: positions(model).scheme.embedding.rotation.theta,
    "position/base": lambda model: positions(model).scheme.embedding.rotation.theta,
    "position/head_dim": lambda model: model.blocks[0].attn.head_dim,
    "position/slopes": lambda model: positions(model).scheme.embedding.bias.slopes(model.blocks[0].attn.num_heads),
    "position/layer_slopes": lambda model: [1.5, 0.5],
    "position/layer_scale": lambda model: [
        float(positions(model).scheme.embedding.bias.of_layer(torch.ones(()), layer, len(model.blocks)))
        for layer in range(len(model.blocks))
    ],
    "position/head_slopes": lambda model: [slope for _, slope in heads(model)],
    "rpe_norm_dim": lambda model: model.blocks[0].get_submodule(BIAS_OWN).pe_norm.normalized_shape[0],
    "rpe_norm_eps": lambda model: model.blocks[0].get_submodule(BIAS_OWN).pe_norm.eps,
}
SAID_OF: dict[str, dict[str, Callable[[Any], Any]]] = {
    "t2t_vit": {
        "tokens_type": lambda model: "performer",
        "soft_splits": lambda model: [step._asdict() for step in model.patch_embed.steps],
        "performer/kernel_ratio": lambda model: (
            len(model.patch_embed.attention1.w) / model.patch_embed.attention1.w.shape[1]
        ),
        "performer/m": lambda model: len(model.patch_embed.attention1.w),
        "performer/epsilon": lambda model: 1e-8,
        "performer/head_cnt": lambda model: 1,
        "performer/order": lambda model: "k,q,v",
        "performer/norm_eps": lambda model: model.patch_embed.attention1.norm1.eps,
        "performer/mlp_ratio": lambda model: ratio(model.patch_embed.attention1.mlp[0]),
    },
    "ceit": {
        "stem_kernel": lambda model: model.patch_embed.conv.kernel_size[0],
        "stem_stride": lambda model: model.patch_embed.conv.stride[0],
        "stem_padding": lambda model: model.patch_embed.conv.padding[0],
        "stem_conv_bias": lambda model: model.patch_embed.conv.bias is not None,
        **{
            f"stem_pool/{name}": partial(lambda name, model: getattr(model.patch_embed.steps[1], name), name)
            for name in ("kernel", "stride", "padding")
        },
        "bn_eps": lambda model: one(part.eps for part in model.modules() if isinstance(part, nn.BatchNorm2d)),
        "lca_mlp_ratio": lambda model: ratio(model.lca.mlp.fc1),
    },
    "swin": {
        "patch_norm": lambda model: isinstance(model.patch_embed.norm, nn.LayerNorm),
        "ape": lambda model: positions(model).scheme.embedding.table is not None,
        "rpe": lambda model: positions(model).scheme.embedding.bias is not None,
    },
    "segmenter": {
        "distilled": lambda model: False,
        "dec_d_ff": lambda model: model.decoder.blocks[0].mlp.fc1.out_features,
    },
    "vit_adapter": ADAPTED,
    "vit_adapter_upernet": {
        **{
            f"backbone/{name}": partial(lambda said, model: said(model.backbone), said)
            for name, said in ADAPTED.items()
        },
        **{
            f"{part}/{name}": partial(lambda part, said, model: said(getattr(model, part)), part, said)
            for part in ("decode_head", "auxiliary_head")
            for name, said in HEAD.items()
        },
        "decode_head/in_channels": lambda model: [model.backbone.embed_dim] * 4,
        "auxiliary_head/in_channels": lambda model: model.backbone.embed_dim,
        "auxiliary_head/num_classes": lambda model: model.auxiliary_head.classifier[-1].out_channels,
    },
    "upernet_head": HEAD,
    "fcn_head": HEAD,
    "vit_lite": COMPACT,
    "cvt": COMPACT,
    "cct": COMPACT,
}


def heads(model: nn.Module) -> tuple[tuple[Any, float], ...]:
    """The direction and the slope of every head."""
    scheme = positions(model).scheme
    return scheme.embedding.bias.heads[model.blocks[0].attn.num_heads]


# What is said in another form than the model has it, and whether it is so.
HOLDS: dict[str, Callable[[Any, Any], bool]] = {
    # The names of sets; the views themselves are compared beside them.
    "position/head_directions": lambda model, said: set(said.split("-")) <= {*SETS, "none"},
    "position/head_views": lambda model, said: all(
        torch.equal(seen(text, *APART), view(*APART)) for text, (view, _) in zip(said, heads(model), strict=True)
    ),
}
SETS = {
    "halves": biases.HALVES,
    "corners": biases.CORNERS,
    "triangles": biases.TRIANGLES,
    "eighths1": biases.EIGHTHS_1,
    "eighths2": biases.EIGHTHS_2,
}
APART = tuple(torch.meshgrid(torch.arange(-4.0, 5), torch.arange(-4.0, 5), indexing="ij"))


def seen(text: str, row: Tensor, column: Tensor) -> Tensor:
    """Which offsets a sentence such as "dr<=-abs(dc) and dc<=0" is true of."""
    names = {"dr": row, "dc": column, "abs": torch.abs, "True": torch.ones_like(row, dtype=torch.bool)}
    truths = [eval(part, {"__builtins__": {}}, names) for part in text.split(" and ")]
    return torch.stack([truth if isinstance(truth, Tensor) else names["True"] for truth in truths]).all(0)


def one(values: Iterator[Any]) -> Any:
    """What all of them are."""
    (value,) = set(values)
    return value


def ratio(layer: nn.Linear) -> float:
    return layer.out_features / layer.in_features


def built(case: dict[str, Any], state: dict[str, Tensor]) -> nn.Module:
    """The model of a case; fails where the case says what the model is not, or what nobody asked for."""
    arch = Asked(case["arch"])
    model = BUILDERS[case["family"]]({**case, "arch": arch})
    said = SAID | SAID_OF.get(case["family"], {})
    for name, value in arch.left().items():
        if name.startswith("pe_shapes/"):
            assert list(state[name.removeprefix("pe_shapes/")].shape) == value, name
        elif name in SENTENCES:
            assert isinstance(value, str), name
        elif name in HOLDS:
            assert HOLDS[name](model, value), f"{name}={value!r} is not so"
        elif name not in OF_TRAINING:
            assert name in said, f"nothing asks for {name}={value!r}"
            assert said[name](model) == value, f"{name}={value!r}, and the model has {said[name](model)!r}"
    return model


def assert_close(ours: Tensor, reference: Tensor, what: str) -> None:
    error = (ours - reference).abs().max() / reference.abs().max().clamp(min=1e-30)
    assert ours.shape == reference.shape, f"{what}: {tuple(ours.shape)} against {tuple(reference.shape)}"
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def test_there_are_cases() -> None:
    assert CASES, f"no *.json below {FOLDER}"


def an_example(family: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = next(path for path in CASES if json.loads(path.read_text())["family"] == family)
    tensors = load_file(path.with_suffix(".safetensors"))
    state = {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}
    return json.loads(path.read_text()), state


@pytest.mark.parametrize("family", BUILDERS)
def test_an_option_that_no_builder_knows_fails_the_case(family: str) -> None:
    case, state = an_example(family)
    built(case, state)
    inner = next((name for name, value in case["arch"].items() if isinstance(value, dict)), None)
    for where in (case["arch"], case["arch"][inner] if inner and inner != "pe_shapes" else case["arch"]):
        where["made_up"] = 3
        with pytest.raises(AssertionError, match=r"nothing asks for (\w+/)?made_up=3"):
            built(case, state)
        del where["made_up"]


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("ceit", "stem_kernel", 3),
        ("t2t_vit", "tokens_type", "transformer"),
        ("vit", "qk_scale", 0.5),
        ("swin", "ape", 7),
    ],
)
def test_an_option_that_the_model_has_otherwise_fails_the_case(family: str, name: str, value: Any) -> None:
    case, state = an_example(family)
    case["arch"][name] = value
    with pytest.raises(AssertionError, match=f"{name}={value!r}, and the model has"):
        built(case, state)


def numbered(tensors: dict[str, Tensor], name: str) -> list[Tensor]:
    """`name`, or `name/0`, `name/1` and so on."""
    if name in tensors:
        return [tensors[name]]
    return [tensors[key] for key in sorted(tensors) if key.startswith(f"{name}/")]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_computes_what_the_reference_computes(path: Path) -> None:
    case = json.loads(path.read_text())
    tensors = load_file(path.with_suffix(".safetensors"))
    head = case["family"] in HEADS
    state = {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}
    model = built(case, state)
    model.load_state_dict(renamed(state, NAMES) if head else convert(state, model), strict=True)
    model.double().eval()

    inputs = [given.double().requires_grad_() for given in numbered(tensors, "input")]
    given = model(inputs if head else inputs[0])
    outputs = [given] if isinstance(given, Tensor) else list(given)
    torch.stack([output.square().sum() for output in outputs]).sum().backward()

    for output, reference in zip(outputs, numbered(tensors, "output"), strict=True):
        assert_close(output.detach(), reference, "output")
    for image, reference in zip(inputs, numbered(tensors, "input_grad"), strict=True):
        assert image.grad is not None
        assert_close(image.grad, reference, "input gradient")
    # Gradients are filed under the reference's names, so they go through the same conversion as the weights.
    filed = {name.removeprefix("grad/"): value for name, value in tensors.items() if name.startswith("grad/")}
    assert set(filed) == set(case.get("grad_keys", filed))
    gradients = {} if head else convert(state | filed, model)
    among = {value.untyped_storage().data_ptr() for value in filed.values()}
    gradients = {name: value for name, value in gradients.items() if value.untyped_storage().data_ptr() in among}
    assert {value.untyped_storage().data_ptr() for value in gradients.values()} == among
    for name, reference in gradients.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None, f"{name} has no gradient"
        assert_close(gradient, reference, f"gradient of {name}")
    for layer, rung in enumerate([] if head else lape.ladder(model)):
        assert_angles_and_bias(rung, tensors, model, layer)
        if f"aux/pe.{layer}" in tensors and rung.attention is not None:
            reference = tensors[f"aux/pe.{layer}"]  # without its batch axis where the authors' table has none
            assert_close(rung.attention.detach(), reference.view_as(rung.attention), f"p_{layer}")


def assert_angles_and_bias(rung: Rung, tensors: dict[str, Tensor], model: nn.Module, layer: int) -> None:
    """The rotation and the bias of a layer are those of the case, and none of its prefix tokens'."""
    if "aux/angles" in tensors:
        angles = tensors["aux/angles"]
        of_layer = angles[layer] if angles.ndim == 4 else angles[None]
        assert rung.rotation is not None
        expected = cosine_and_sine(of_layer, model.num_prefix_tokens)  # pyright: ignore
        assert_close(rung.rotation.detach(), expected, f"rotation of layer {layer}")
    if "aux/bias" in tensors:
        assert rung.bias is not None
        prefix = model.num_prefix_tokens
        assert not rung.bias[..., :prefix].any()  # pyright: ignore
        assert not rung.bias[..., :prefix, :].any()  # pyright: ignore
        bias = rung.bias[0, :, prefix:, prefix:]  # pyright: ignore
        expected = tensors["aux/bias"] * (1.5 - layer / (positions(model).depth - 1) if "aux/visible" in tensors else 1)
        visible = tensors["aux/visible"].bool() if "aux/visible" in tensors else torch.ones_like(bias, dtype=torch.bool)
        assert torch.equal(bias.isfinite(), visible)
        if not (scheme := positions(model).scheme.embedding).name.endswith("rounded=true"):
            assert_close(bias[visible], expected[visible], f"bias of layer {layer}, {scheme.name}")


# --- Tables of positions without a model


def test_every_table_is_compared() -> None:
    names = {path.stem for path in TABLES_OF_POSITIONS}
    known = {*ANGLES, "angles_rope_mixed_3x5", "bias_alibi2d_3x5", "bias_lookhere_3x5"}
    assert names == known or (names <= known and "LAPE_FIXTURES" in os.environ)


ANGLES = {
    "angles_rope_axial_3x5": {"": "rope-axial"},
    "angles_rope_dinov3_3x5": {f".{ours}": name for ours, name in DINOV3.items()},
}


@pytest.mark.parametrize("path", TABLES_OF_POSITIONS, ids=lambda path: path.stem)
def test_tables_of_positions_are_the_references(path: Path) -> None:
    case, tensors, cpu = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors")), torch.device("cpu")
    grid = tuple(case["grid"])
    for suffix, name in ANGLES.get(path.stem, {}).items():
        kind = ROTATIONS[name]
        angles = kind.angles(grid, case["head_dim"], cpu)
        assert_close(angles[0], tensors[f"aux/angles{suffix}"], "angles")
        turned = kind.turn(tensors["aux/example_in"][None, None], cosine_and_sine(angles, 0))
        assert_close(turned[0, 0], tensors[f"aux/example_out{suffix}"], "a turned query")
        assert kind.turn is (turn_halves if "dinov3" in name else turn_pairs)
    if path.stem == "angles_rope_mixed_3x5":
        for layer, frequencies in enumerate(tensors["state/freqs"].double().unbind(1)):
            frequencies = frequencies.unflatten(1, (case["num_heads"], -1))
            angles = ROTATIONS["rope-mixed"].angles(frequencies, grid)
            assert_close(angles, tensors["aux/angles"][layer], "angles")
            turned = turn_pairs(tensors["aux/example_in"][None], cosine_and_sine(angles, 0))
            assert_close(turned[0], tensors["aux/example_out"][layer], "a turned query")
    for count, slopes in case.get("slopes", {}).items():
        alibi = BIASES["alibi-2d"]
        assert alibi.slopes(int(count)) == pytest.approx(slopes, rel=1e-12)
        if f"aux/bias.{count}" in tensors:
            bias = alibi.make(grid, 0, int(count), cpu)
            assert_close(bias[0], tensors[f"aux/bias.{count}"], "bias")
    for name, views in case.get("views", {}).items():
        assert [torch.equal(seen(text, *APART), view(*APART)) for text, view in zip(views, SETS[name], strict=True)]
        offsets = biases.offsets(grid, cpu)
        ours = torch.stack([view(*offsets) for view in SETS[name]])
        assert torch.equal(ours, tensors[f"aux/visible.{name}"].bool())
    for name, config in case.get("configs", {}).items():
        kind, count = name.removeprefix("LH-").split(".")
        ours = BIASES[f"lookhere-{kind}"].heads[int(count)]
        assert [slope for _, slope in ours] == config["head_slopes"]
        for text, (view, _) in zip(config["head_views"], ours, strict=True):
            assert torch.equal(seen(text, *APART), view(*APART))
    if "aux/ref_bias_bf16_lh90_layer0" in tensors:
        kind = position_embedding("lookhere-90:slope=2:rounded=true").bias
        bias = kind.of_layer(kind.make(grid, 0, 12, cpu), 0, 1)[0]
        reference = tensors["aux/ref_bias_bf16_lh90_layer0"].double()
        assert torch.equal(bias.where(bias.isfinite(), reference), reference)


def test_readings_that_are_not_built_are_there_by_name() -> None:
    """A reading is told from a case that is missing."""
    stems = {path.stem for path in FOLDER.rglob("*.json")}
    assert set(NOT_BUILT) <= stems or "LAPE_FIXTURES" in os.environ


# --- Parameters, as `fixtures/positions/README.md` has them (224 px, patch 16, 1000 classes)

COUNTS: list[tuple[dict[str, Any], dict[str, Any], tuple[int, int, int]]] = [
    ({}, {"join": "default"}, (5_717_416, 22_050_664, 86_567_656)),
    ({}, {"join": "lape"}, (5_722_024, 22_059_880, 86_586_088)),
    *(
        ({}, {"join": "default", "pe": pe}, (5_679_592, 21_975_016, 86_416_360))
        for pe in ("none", "rope-axial", "rope-dinov3", "alibi-2d")
    ),
    ({}, {"join": "default", "pe": "learnable+rope-axial"}, (5_717_416, 22_050_664, 86_567_656)),
    ({"no_embed_class": True}, {"join": "default", "pe": "learnable+alibi-2d"}, (5_717_224, 22_050_280, 86_566_888)),
    ({}, {"join": "lape", "pe": "learnable+rope-dinov3"}, (5_722_024, 22_059_880, 86_586_088)),
    ({}, {"join": "default", "pe": "rope-mixed"}, (5_681_896, 21_979_624, 86_425_576)),
    ({}, {"join": "default", "pe": "learnable+rope-mixed"}, (5_719_720, 22_055_272, 86_576_872)),
    ({}, {"join": "lape", "pe": "learnable+rope-mixed"}, (5_724_328, 22_064_488, 86_595_304)),
    ({}, {"join": "default", "pe": "peg"}, (5_681_512, 21_978_856, 86_424_040)),
    ({}, {"join": "default", "pe": "peg-5"}, (5_689_192, 21_994_216, 86_454_760)),
    ({}, {"join": "default", "pe": "fourier"}, (5_692_296, 22_000_392, 86_467_080)),
    ({}, {"join": "lape", "pe": "fourier"}, (5_696_904, 22_009_608, 86_485_512)),
]
GAP: dict[str, Any] = {"class_token": False, "global_pool": "avg", "fc_norm": False}
COUNTS += [
    (GAP, {"join": "default", "pe": "peg"}, (5_681_320, 21_978_472, 86_423_272)),
    (GAP, {"join": "default"}, (5_717_032, 22_049_896, 86_566_120)),
    (GAP, {"join": "lape"}, (5_721_640, 22_059_112, 86_584_552)),
    (GAP, {"join": "pvg"}, (5_721_256, 22_058_344, 86_583_016)),
    (GAP, {"join": "mpvg"}, (5_721_640, 22_059_112, 86_584_552)),
]


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12)], ids=["tiny", "small", "base"])
def test_parameters_are_as_many_as_published(width: int, heads: int) -> None:
    size = {192: 0, 384: 1, 768: 2}[width]
    for options, names, counts in COUNTS:
        with torch.device("meta"):
            model = VisionTransformer(embed_dim=width, num_heads=heads, weight_init="skip", **options)
            lape.apply(model, **names)
        assert sum(part.numel() for part in model.parameters()) == counts[size], (options, names)

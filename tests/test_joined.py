"""Laws of models of transformers in its own folders: they come back with their join, and never silently without it."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_hosts import SCHEMES, SMALL, applied, inputs, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, ViTConfig, ViTForImageClassification, ViTModel

import lape
from lape.errors import RunError, UsageError
from lape.surgery.operation import positions

OF_TRANSFORMERS = ["vit", "deit", "dinov2", "clip", "siglip", "beit"]
SETTINGS = {**SMALL, "num_hidden_layers": 2, "num_labels": 3}


def shaken(model: Any) -> Any:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def classifier(**names: Any) -> Any:
    torch.manual_seed(0)
    return shaken(lape.apply(ViTForImageClassification(ViTConfig(**SETTINGS)), **names))


def assert_same(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]) for name, value in ours.items())
    learning = [{name for name, one in m.named_parameters() if one.requires_grad} for m in (model, other)]
    assert learning[0] == learning[1]


def assert_refused(folder: Path, kind: Any, reason: str = r"load it by lape\.joined", **options: Any) -> None:
    with pytest.raises(ValueError, match=reason):
        kind.from_pretrained(folder, **options)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_every_host_comes_back_whole_and_folded_and_is_refused_without_its_join(name: str, tmp_path: Path) -> None:
    whole = shaken(applied(name))
    for model in (whole, lape.fold(copy.deepcopy(whole))):
        model.save_pretrained(tmp_path)
        model.load_state_dict(load_file(tmp_path / "model.safetensors"))  # so Trainer resumes, without a look at names
        kind = type(model)
        again, told = lape.joined(kind).from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is kind
        assert not any(told.values())
        assert_same(again, model)
        assert torch.equal(tokens(again, inputs(name)), tokens(model, inputs(name)))
        assert_same(pickle.loads(pickle.dumps(again)), model)
        for plain in (kind, AutoModel):
            assert_refused(tmp_path, plain)


@pytest.mark.parametrize("names", SCHEMES, ids=lambda names: "-".join(names.values()))
def test_every_join_comes_back_and_is_saved_again(names: dict[str, str], tmp_path: Path) -> None:
    model, loader = classifier(**names), lape.joined(ViTForImageClassification)
    model.save_pretrained(tmp_path / "first")
    again = loader.from_pretrained(tmp_path / "first")
    assert_same(again, model)
    again.save_pretrained(tmp_path / "second", max_shard_size="20KB")
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 1
    assert_same(loader.from_pretrained(tmp_path / "second"), model)
    first, second = ((tmp_path / place / "config.json").read_text() for place in ("first", "second"))
    assert first == second
    plain = type(model).config_class.from_dict(json.loads(first))
    assert type(again.config) is type(plain)
    assert vars(again.config).keys() == vars(plain).keys() - {"lape", "fusion_config"}
    if not positions(model).put_aside:  # the table that a join replaced is in no file
        assert_same(lape.remove(again), lape.remove(model))


def test_no_class_of_transformers_loads_it_without_its_join(tmp_path: Path) -> None:
    """Also where its user asks for an attention, which takes the place of one that is refused."""
    model = classifier()
    model.save_pretrained(tmp_path)
    for kind in (ViTForImageClassification, ViTModel, AutoModel, transformers.AutoModelForImageClassification):
        for options in ({}, {"attn_implementation": "eager"}, {"num_labels": 5, "ignore_mismatched_sizes": True}):
            assert_refused(tmp_path, kind, r"lape\.joined\(ViTForImageClassification\)\.from_pretrained", **options)
    with pytest.raises(RunError, match=r"lape\.joined\(transformers\.ViTForImageClassification\)"):
        lape.from_pretrained(tmp_path)
    model = lape.remove(classifier())
    model.save_pretrained(tmp_path)
    assert_same(ViTForImageClassification.from_pretrained(tmp_path), model)


def test_number_formats_places_and_settings_are_asked_for_as_ever(tmp_path: Path) -> None:
    model, loader = classifier().bfloat16(), lape.joined(ViTForImageClassification)
    model.save_pretrained(tmp_path)
    assert_same(loader.from_pretrained(tmp_path), model)
    assert_same(loader.from_pretrained(tmp_path, dtype=torch.float32, low_cpu_mem_usage=True), model.float())
    asked = loader.from_pretrained(
        tmp_path, num_labels=7, ignore_mismatched_sizes=True, attn_implementation="eager", output_attentions=True
    )
    assert asked.classifier.out_features == 7
    assert len(asked(torch.randn(1, 3, 32, 32).bfloat16()).attentions) == 2
    config = loader.config_class.from_pretrained(tmp_path)
    config.num_labels = 4
    assert loader.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True).classifier.out_features == 4
    model.bfloat16().save_pretrained(tmp_path, save_original_format=True)
    assert any("encoder.layer.0.pe_norm" in name for name in load_file(tmp_path / "model.safetensors"))
    assert_same(loader.from_pretrained(tmp_path), model)
    inside = lape.joined(ViTModel).from_pretrained(tmp_path, add_pooling_layer=False)
    assert_same(inside, model.vit)


def test_a_tower_comes_back_in_its_whole_and_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {**SMALL, "num_hidden_layers": 2}
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.CLIPConfig(text_config={**text, "vocab_size": 50}, vision_config=vision, projection_dim=8)
    model = shaken(lape.apply(transformers.CLIPModel(config)))
    model.save_pretrained(tmp_path)
    assert_same(lape.joined(transformers.CLIPModel).from_pretrained(tmp_path), model)
    tower = lape.joined(transformers.CLIPVisionModel).from_pretrained(tmp_path)
    assert torch.equal(
        tower(torch.ones(1, 3, 32, 32)).last_hidden_state,
        model.vision_model(torch.ones(1, 3, 32, 32)).last_hidden_state,
    )
    for kind in (transformers.CLIPModel, transformers.CLIPVisionModel, transformers.CLIPTextModel, AutoModel):
        assert_refused(tmp_path, kind)


def test_models_that_share_a_configuration_say_each_its_own(tmp_path: Path) -> None:
    config = ViTConfig(**SETTINGS)
    models = [ViTModel(config) for _ in range(3)]
    for model, join in zip(models, ("lape", "lape-sharing"), strict=False):
        shaken(lape.apply(model, join))
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
    loader = lape.joined(ViTModel)
    for number, model in enumerate(models[:2]):
        again = loader.from_pretrained(tmp_path / str(number))
        assert torch.equal(again(torch.ones(1, 3, 32, 32))[0], model(torch.ones(1, 3, 32, 32))[0])
    assert_same(ViTModel.from_pretrained(tmp_path / "2"), models[2])
    with pytest.raises(UsageError, match=r"No join is saved.*ViTModel\.from_pretrained, then lape\.apply"):
        loader.from_pretrained(tmp_path / "2")
    assert not hasattr(config, "lape")


def test_a_model_that_nobody_keeps_is_not_saved_as_another(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model = \.\.\., then model\.save_pretrained"):
        classifier().save_pretrained(tmp_path)


def test_a_join_that_is_removed_by_way_of_a_part_is_not_saved(tmp_path: Path) -> None:
    model = classifier()
    lape.remove(model.vit)
    model.save_pretrained(tmp_path)
    assert_same(ViTForImageClassification.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lape": 3}, "does not say which join"),
        (
            {"lape": {"join": {"class_path": "os.system"}, "pe": "", "pe_norm": "", "start": "", "grid": [4, 4]}},
            "is not",
        ),
        ({"lape": {"join": "lape", "pe": "learnable", "pe_norm": "layernorm", "start": "fresh"}}, "grid"),
        ({"lape": {"join": "lape", "pe": "x", "pe_norm": "layernorm", "start": "fresh", "grid": [4, 4]}}, "'x' is not"),
        (
            {"lape": {"join": "lape", "pe": "learnable", "pe_norm": "layernorm", "start": "fresh", "grid": [9, 9]}},
            "grid is 4x4",
        ),
        (
            {"lape": {"join": "lape", "pe": "learnable", "pe_norm": "layernorm", "start": "preserve", "grid": [4, 4]}},
            r"amount is not in the weights",
        ),
    ],
)
def test_a_config_that_tells_of_another_join_is_refused_in_words(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = classifier()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(RunError, match=reason):
        lape.joined(ViTForImageClassification).from_pretrained(tmp_path)


def test_weights_without_positions_are_refused_and_a_config_names_no_code(tmp_path: Path) -> None:
    model = classifier()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    changed = config | {"auto_map": {"AutoModel": "evil.Model"}, "attn_implementation": "user/kernel"}
    (tmp_path / "config.json").write_text(json.dumps(changed))
    assert_same(lape.joined(ViTForImageClassification).from_pretrained(tmp_path), model)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1.pe_norm" not in name}
    assert len(kept) == len(weights) - 2
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"layers\.1\.pe_norm\.bias is not in the weights"):
        lape.joined(ViTForImageClassification).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "kind", [nn.Linear, AutoModel, "ViTModel", None], ids=lambda kind: getattr(kind, "__name__", str(kind))
)
def test_what_is_no_class_of_transformers_is_refused(kind: Any) -> None:
    with pytest.raises(UsageError, match=r"takes a class of transformers"):
        lape.joined(kind)


def test_a_class_of_ones_own_that_was_applied_to_from_outside_is_refused_without_its_join(tmp_path: Path) -> None:
    class Own(ViTModel):
        pass

    model = lape.apply(Own(ViTConfig(**SMALL)))  # test_initialisation has a class that applies it itself
    model.save_pretrained(tmp_path)
    assert_refused(tmp_path, Own)

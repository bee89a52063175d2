"""The recipes of Tables 3 and 4 against the originals' numbers, and each at work in its set's layout."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_sets import ade20k, coco

import lape
from lape import recipes
from lape.experiment import Experiment
from lape.training import checkpoints
from lape.training.assembly import optimizer_of, schedule_of
from lape.training.loop import train

NAMES = [name for name in recipes.names() if name.startswith(("coco/", "ade20k/"))]
EVERY_RECIPE = pytest.mark.parametrize("name", NAMES)
IMAGES = {"coco": 118_287, "ade20k": 20_210}  # for training


def test_there_are_six() -> None:
    assert len(NAMES) == 6


def rates(experiment: Experiment, steps: int, at: list[int]) -> list[float]:
    """The learning rate of some steps, of which an epoch has so many."""
    plain = replace(experiment, also_decay=(), layer_decay=None)
    optimizer = optimizer_of(plain, torch.nn.Linear(2, 2))
    set_rates = schedule_of(plain, optimizer, steps)
    seen = []
    for step in at:
        set_rates(step)
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_mask_rcnn_falls_tenfold_after_epochs_27_and_33(size: str) -> None:
    """mmcv: lr · 0.1^(milestones reached), times 0.001 + 0.999 t/500 in the first 500 steps."""
    experiment = recipes.load(f"coco/mask_rcnn_vit_adapter_{size}").experiment()
    steps = IMAGES["coco"] // experiment.batch_size
    at = [0, 1, 250, 499, 500, 27 * steps - 1, 27 * steps, 33 * steps - 1, 33 * steps, 36 * steps - 1]
    factors = [0.001, 0.001 + 0.999 / 500, 0.5005, 0.001 + 0.999 * 499 / 500, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rates(experiment, steps, at) == pytest.approx([1e-4 * factor for factor in factors], rel=1e-9)
    assert experiment.all_steps(steps) == 36 * steps


@pytest.mark.parametrize(("size", "lr"), [("tiny", 1.2e-4), ("small", 6e-5)])
def test_upernet_falls_in_a_line_beneath_its_warm_up(size: str, lr: float) -> None:
    """mmcv: lr · (1 - t/160000), times 1e-6 + (1 - 1e-6) t/1500 in the first 1500 steps."""
    experiment = recipes.load(f"ade20k/upernet_vit_adapter_{size}").experiment()
    at = [0, 1, 750, 1499, 1500, 80_000, 159_999]
    expected = [lr * (1 - t / 160_000) * min(1, 1e-6 + (1 - 1e-6) * t / 1500) for t in at]
    assert rates(experiment, IMAGES["ade20k"] // 16, at) == pytest.approx(expected, rel=1e-9)
    assert experiment.all_steps(IMAGES["ade20k"] // 16) == 160_000


@pytest.mark.parametrize("size", ["tiny", "small"])
def test_segmenters_power_is_nine_tenths(size: str) -> None:
    experiment = recipes.load(f"ade20k/segmenter_{size}_patch16").experiment()
    steps = IMAGES["ade20k"] // 8
    whole = 64 * steps
    at = [0, 1, whole // 2, whole - 1]
    expected = [1e-5 + (1e-3 - 1e-5) * (1 - t / whole) ** 0.9 for t in at]
    assert rates(experiment, steps, at) == pytest.approx(expected, rel=1e-9)
    optimizer = optimizer_of(experiment, torch.nn.Linear(2, 2))
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0}


FACTS = {  # batch, weight decay, drop path, precision, short sides, crop
    "coco": (16, 0.05, "32-true", tuple(range(480, 801, 32)), 1024),
    "upernet": (16, 0.01, "16-mixed", (512,), 512),
    "segmenter": (8, 0.0, "32-true", (512,), 512),
}


@EVERY_RECIPE
def test_the_numbers_are_those_of_the_original(name: str) -> None:
    e = recipes.load(name).experiment()
    facts = FACTS["coco" if e.data == "coco" else e.model.partition("_")[0]]
    assert (e.batch_size, e.weight_decay, e.precision, e.short_side, e.crop) == facts
    assert e.drop_path == (0.2 if "adapter_small" in name else 0.1)
    assert (e.hflip, e.clip_grad, e.ema) == (0.5, None, None)
    if e.data == "coco":
        assert (e.long_side, e.zoom, e.zoom_crop, e.epochs) == (1333, (400, 500, 600), (384, 600), 36)
    else:
        assert (e.long_side, e.scale_jitter, e.class_cap, e.photometric) == (2048, (0.5, 2.0), 0.75, True)
        assert (e.test_scales, e.test_flip) == ((1.0,), False)
        assert e.stride == (341 if "upernet" in name else 512)


SYSTEMS = {  # optimiser, betas, steps or else epochs, epochs between validations, BatchNorm over all processes
    "mask": ("adamw", None, 36, 1, True),
    "upernet": ("adamw", (0.9, 0.999), 160_000, 12, True),
    "segmenter": ("sgd", None, 64, 2, False),
}


@EVERY_RECIPE
def test_a_system_learns_as_the_original_does(name: str) -> None:
    e = recipes.load(name).experiment()
    asked = e.optimizer, e.betas, e.steps or e.epochs, e.validate_every, e.sync_batchnorm
    assert asked == SYSTEMS[e.model.partition("_")[0]]
    assert e.data == name.partition("/")[0]
    assert e.model == name.partition("/")[2]


def model_of(name: str) -> tuple[Experiment, torch.nn.Module]:
    experiment = recipes.load(name).experiment()
    with torch.device("meta"):
        return experiment, lape.create_model(experiment.model, join="lape")


def groups(experiment: Experiment, model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    """What each parameter decays with, and the factor of its learning rate."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in optimizer_of(experiment, model).param_groups
        for parameter in group["params"]
    }


def test_mask_rcnn_decays_what_the_original_decays() -> None:
    """mmcv exempts by parts of the names that parameters have there: BatchNorm in the prior has none of them."""
    experiment, model = model_of("coco/mask_rcnn_vit_adapter_tiny")
    found = groups(experiment, model)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, (decay, scale) in found.items():
        exempt = any(part in name for part in ("level_embed", "pos_embed", "norm", "bias"))
        assert (decay, scale) == (0 if exempt else 0.05, 1), name


def test_upernet_has_fourteen_levels_and_decays_its_table() -> None:
    experiment, model = model_of("ade20k/upernet_vit_adapter_tiny")
    for name, (decay, scale) in groups(experiment, model).items():
        parts = name.split(".")
        level = 13
        if parts[0] == "backbone" and parts[1] in ("pos_embed", "patch_embed"):
            level = 0
        elif parts[0] == "backbone" and parts[1] == "blocks":
            level = int(parts[2]) + 1
        assert scale == pytest.approx(0.95 ** (13 - level)), name
        vector = dict(model.named_parameters())[name].ndim == 1 or name.endswith(".bias")
        assert decay == (0 if vector else 0.01), name


# --- Two steps of each on pictures in its set's layout

PYRAMID = {
    "embed_dim": 24,
    "depth": 4,
    "num_heads": 3,
    "deform_heads": 3,
    "interactions": [[0, 0], [1, 1], [2, 2], [3, 3]],
}
SMALLER = {
    "mask": PYRAMID | {"windows": [3, None, 3, None]},
    "upernet": PYRAMID,
    "segmenter": {"embed_dim": 64, "depth": 2, "num_heads": 2},
}
METRICS = {"coco": {"val_box_ap", "val_mask_ap"}, "ade20k": {"val_miou", "val_pixel_accuracy"}}


@pytest.mark.parametrize("name", [name for name in NAMES if "tiny" in name])
def test_it_trains_two_steps_on_pictures_in_its_sets_layout(name: str, tmp_path: Path) -> None:
    """The small models' recipes differ from these in numbers alone."""
    full = recipes.load(name).experiment()
    small = replace(
        full,
        model_args=SMALLER[full.model.partition("_")[0]],
        data_dir=coco(tmp_path / "set") if full.data == "coco" else ade20k(tmp_path / "set" / "ADEChallengeData2016"),
        epochs=1,
        steps=2 if full.steps else None,
        decay_milestones=full.decay_milestones and (1,),
        warmup_steps=1,
        batch_size=2,
        short_side=(64,),
        crop=64,
        stride=min(full.stride or 0, 48) or None,
        precision="32-true",  # a CPU computes in bfloat16 many times as slowly
        accelerator="cpu",
        workers=0,
    )
    result = json.loads(train(small, tmp_path / "run").read_text())
    assert (result["steps"], result["experiment"]["recipe"]) == (2, name)
    assert math.isfinite(result["curve"][-1]["train_loss"])
    assert result["final"].keys() == METRICS[full.data]
    assert all(value.isfinite().all() for value in checkpoints.read(tmp_path / "run/last.pt")["model"].values())

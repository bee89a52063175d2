"""Laws of the recipes: each row of the paper has one, with the paper's and its original's numbers, and it runs."""

import json
import math
import pickle
import shlex
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_schedule import rates

from lape import recipes
from lape.cli.command_line import parsed
from lape.data.sources import find_set
from lape.errors import UsageError
from lape.experiment import RANGES
from lape.models.registry import MODELS
from lape.tasks.work import work_of
from lape.training import checkpoints
from lape.training.loop import train

PAPER = json.loads((Path(__file__).parent / "paper_results.json").read_text())
NAMES = [name for name in recipes.names() if recipes.load(name).paper]
OF_OTHERS = [name for name in recipes.names() if recipes.load(name).expected and name not in NAMES]  # other papers
OF_CLASSIFIERS = [name for name in NAMES if not name.startswith(("coco/", "ade20k/"))]  # test_dense_recipes has these
OF_CLASSIFIERS += OF_OTHERS
EVERY_RECIPE = pytest.mark.parametrize("name", [*NAMES, *OF_OTHERS])
EVERY_CLASSIFIER = pytest.mark.parametrize("name", OF_CLASSIFIERS)


# --- What the paper says


def rows_of_the_paper():
    """(table, model, pe, join, pe_norm, measure) -> number; Table 2's models stand once for each data set."""
    rows = {}
    for model, _, pe, join, _, top1 in PAPER["table1_imagenet_top1"]["rows"]:
        rows[1, model, pe, join, "layernorm", "accuracy"] = top1
    for model, _, join, *both in PAPER["table2_cifar_top1"]["rows"]:
        for data, top1 in zip(("cifar10", "cifar100"), both, strict=True):
            rows[2, f"{model} {data}", "learnable", join, "layernorm", "accuracy"] = top1
    for model, pe, join, _, top1 in PAPER["table7_joining_methods"]["rows"]:
        rows[7, model, pe, join, "layernorm", "accuracy"] = top1
    for model, norm, top1 in PAPER["table8_ln_decomposition"]["rows"]:
        join, norm = ("default", "layernorm") if norm == "default" else ("lape", norm)
        rows[8, model, "learnable", join, norm, "accuracy"] = top1
    for model, _, join, _, box, mask in PAPER["table3_coco"]["rows"]:
        rows[3, model, "learnable", join, "layernorm", "box AP"] = box
        rows[3, model, "learnable", join, "layernorm", "mask AP"] = mask
    for model, _, join, _, miou in PAPER["table4_ade20k"]["rows"]:
        rows[4, model, "learnable", join, "layernorm", "mIoU"] = miou
    return rows


def rows_of_the_recipes():
    rows = {}
    for recipe in map(recipes.load, NAMES):
        experiment, paper = recipe.experiment(), recipe.paper
        model = f"{paper['model']} {experiment.data}" if paper["table"] == 2 else paper["model"]
        assert experiment.pe == paper["pe"]
        for measure, by_join in recipe.expected.items():
            for join, number in by_join.items():
                key = paper["table"], model, paper["pe"], join, experiment.pe_norm, measure
                assert key not in rows, f"{recipe.name} stands for a row that another one has"
                rows[key] = number
    return rows


def test_every_row_of_the_tables_has_its_recipe_and_its_number():
    assert rows_of_the_recipes() == rows_of_the_paper()


def test_the_accuracy_at_epoch_100_is_the_papers():
    early = {(model, pe, join): top1 for model, _, pe, join, top1, _ in PAPER["table1_imagenet_top1"]["rows"]}
    seen = {
        (recipe.paper["model"], recipe.paper["pe"], join): top1
        for recipe in map(recipes.load, NAMES)
        for join, top1 in recipe.at_epoch_100.items()
    }
    assert seen == early


@EVERY_RECIPE
def test_a_recipe_is_a_lab_note(name):
    recipe = recipes.load(name)
    assert recipe.open, "every recipe stands on a choice that its source leaves open"
    assert recipe.hardware
    words = shlex.split(recipe.command)
    _, given = parsed(words[words.index("lape") + 1 :])
    experiment = given["experiment"]
    assert experiment.recipe == name
    assert experiment.data_dir is not None
    assert recipe.changed(experiment) == {}
    assert experiment.model in MODELS or timm.is_model(experiment.model)
    assert all(experiment.join in by_join for by_join in recipe.expected.values())


# --- What the originals say (their code, as read at the commits that the recipes name)

DEIT = {"warmup": 5, "first": 1e-6, "top": 1e-3, "least": 1e-5, "end": 300, "passes": 300, "lag": 1}
DEIT3 = DEIT | {"top": 4e-3, "end": 400, "passes": 400}
T2T = {"warmup": 10, "first": 1e-6, "top": 1e-3, "least": 1e-5, "end": 300, "passes": 310, "lag": 0}
ORIGINALS = {
    "cpvt": DEIT | {"top": 2e-3},
    "deit3": DEIT3,
    "deit": DEIT,
    "ceit": DEIT,
    "t2t": T2T,
    "swin": {"warmup": 20, "first": 1e-6, "top": 1e-3, "least": 1e-5, "end": 300, "passes": 300},
    "cifar10": T2T | {"top": 5.5e-4, "first": 1e-5},
    "cifar100": T2T | {"top": 6e-4},
}


def family(name, experiment):
    """What a recipe's models are called, by which the tables here know them."""
    named = name.rpartition("/")[2] if name in OF_OTHERS else experiment.model
    return named.partition("_")[0]


def original(name, experiment):
    if experiment.data in ORIGINALS:
        return ORIGINALS[experiment.data]
    return ORIGINALS[family(name, experiment)]


def rate(numbers, epoch):
    """cos-timm, per epoch; without a lag given: per iteration, the warm-up standing before the cosine."""
    by_step = "lag" not in numbers
    t = epoch if by_step else max(epoch - numbers["lag"], 0)
    warmup, end, top, least = numbers["warmup"], numbers["end"], numbers["top"], numbers["least"]
    if t < warmup:
        return numbers["first"] + t * (top - numbers["first"]) / warmup
    if t >= end:
        return least
    part = (t - warmup) / (end - warmup) if by_step else t / end
    return least + (top - least) * (1 + math.cos(math.pi * part)) / 2


@EVERY_CLASSIFIER
def test_every_epoch_has_the_learning_rate_of_the_original(name):
    experiment = recipes.load(name).experiment()
    numbers = original(name, experiment)
    seen = rates(replace(experiment, also_decay=()), steps=2)[::2]
    assert len(seen) == numbers["passes"]
    assert seen == pytest.approx([rate(numbers, epoch) for epoch in range(numbers["passes"])], rel=1e-9)


FACTS = {  # batch, weight decay, drop path, repeats, erasing, mixing ends, crop, EMA, evaluated weights, clipping
    "cpvt": (2048, 0.05, 0.1, 3, 0.25, None, 0.875, 0.99996, "raw", None),
    "deit3": (2048, 0.03, 0.0, 3, 0.0, None, 1.0, 0.99996, "raw", None),
    "deit": (1024, 0.05, 0.1, 3, 0.25, None, 1.0, 0.99996, "raw", None),
    "ceit": (1024, 0.05, 0.1, 3, 0.25, None, 0.875, 0.99996, "raw", None),
    "t2t": (512, 0.03, 0.1, None, 0.25, None, 0.9, 0.99996, "ema", None),
    "swin_tiny": (1024, 0.05, 0.2, None, 0.25, None, 0.875, None, "raw", 5.0),
    "swin_small": (1024, 0.05, 0.3, None, 0.25, None, 0.875, None, "raw", 5.0),
    "cifar10": (128, 0.06, 0.1, None, 0.25, 175, 1.0, None, "raw", None),
    "cifar10 cct": (128, 0.06, 0.1, None, 0.0, 175, 1.0, None, "raw", None),
    "cifar100": (128, 0.06, 0.1, None, 0.25, None, 1.0, None, "raw", None),
}


@EVERY_CLASSIFIER
def test_the_numbers_are_those_of_the_original(name):
    e = recipes.load(name).experiment()
    keys = (
        *([] if name in OF_OTHERS else [f"{e.data} {e.model[:3]}", e.data, e.model[:10].rstrip("_")]),
        family(name, e),
    )
    facts = FACTS[next(key for key in keys if key in FACTS)]
    evaluated = "ema" if e.ema and e.ema_evaluated else "raw"
    seen = e.batch_size, e.weight_decay, e.drop_path, e.repeats, e.reprob, e.mix_epochs, e.crop_pct, e.ema, evaluated
    assert (*seen, e.clip_grad) == facts
    third = e.model.startswith("deit3")  # the third DeiT
    policy = (0.0, "3a", 0.3, "binary-cross-entropy") if third else (0.1, "rand-m9-mstd0.5-inc1", 0.0, None)
    assert (e.mixup, e.cutmix, e.hflip) == (0.8, 1.0, 0.5)
    assert (e.smoothing, e.auto_augment, e.color_jitter, e.loss) == policy
    assert e.scale == ((0.8, 1.0) if "cifar" in e.data else (0.08, 1.0))
    mixed_first = e.model.startswith("t2t") or "cifar" in e.data
    assert bool(e.erase_after_mix) is mixed_first
    assert e.interpolation == ("random" if mixed_first else "bicubic")
    assert e.teacher == ("regnety_160" if "distilled" in e.model else None)
    assert e.precision == "16-mixed"


# --- Two steps of each on images of its own shape

SMALLER = {  # depth and width of a model that trains here; all else is the recipe's
    "deit": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "cpvt": {"depth": 5, "embed_dim": 48, "num_heads": 3},
    "deit3": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "t2t": {"depth": 2, "embed_dim": 48, "num_heads": 4, "token_dim": 16},
    "ceit": {"depth": 2, "embed_dim": 48, "num_heads": 3, "stem_dim": 8},
    "swin": {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    "vit": {"depth": 2, "embed_dim": 64},
    "cvt": {"depth": 2, "embed_dim": 64},
    "cct": {"depth": 2, "embed_dim": 64},
}


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """Class folders with photographs' sizes."""
    root, random = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 2)):
        for number in range(2 * count):
            folder = root / part / f"n0000000{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (250, 300, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.JPEG")
    return root


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Files in CIFAR's layout."""
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    from torchvision.datasets import CIFAR10, CIFAR100

    random = np.random.default_rng(0)
    for reader, labels, count, each in ((CIFAR10, "labels", 10, 2), (CIFAR100, "fine_labels", 100, 10)):
        folder = tmp_path / reader.base_folder
        folder.mkdir()
        for file, _ in reader.train_list + reader.test_list:
            pixels = random.integers(0, 256, (each, 3072), dtype=np.uint8)
            (folder / file).write_bytes(pickle.dumps({"data": pixels, labels: list(range(each))}))
        names = [f"class {i}" for i in range(count)]
        (folder / reader.meta["filename"]).write_bytes(pickle.dumps({reader.meta["key"]: names}))
    return tmp_path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A small teacher's name and weights."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(timm.create_model("resnet10t", num_classes=2).state_dict(), path)
    return {"teacher": "resnet10t", "teacher_weights": path}


@pytest.fixture
def shrunk(imagenet, cifar, teacher):
    """A recipe on a small model and few images of its own shape; all else is the recipe's."""

    def shrink(name):
        full = recipes.load(name).experiment()
        return replace(
            full,
            model_args=SMALLER[family(name, full)],
            epochs=1,
            warmup_epochs=0,
            cooldown_epochs=0,
            batch_size=4,
            lr_batch=full.lr_batch and full.lr_batch * 4 // full.batch_size,
            data_dir=cifar if "cifar" in full.data else imagenet,
            accelerator="cpu",
            workers=0,
            **teacher if full.teacher else {},
        )

    return shrink


@EVERY_CLASSIFIER
def test_it_trains_two_steps_on_images_of_its_own_shape(name, shrunk, tmp_path):
    result = json.loads(train(shrunk(name), tmp_path / "run").read_text())
    assert result["steps"] >= 2
    assert result["experiment"]["recipe"] == name
    assert math.isfinite(result["curve"][-1]["train_loss"])
    assert all(value.isfinite().all() for value in checkpoints.read(tmp_path / "run/last.pt")["model"].values())


@pytest.mark.parametrize("name", ["imagenet/ceit_tiny_patch16_224", "cifar100/cct_7_3x1_32"])
def test_the_same_seed_gives_the_same_weights_twice_and_another_gives_others(name, shrunk, tmp_path):
    weights = []
    for place, seed in enumerate((7, 7, 8)):
        train(replace(shrunk(name), seed=seed), tmp_path / str(place))
        weights.append(checkpoints.read(tmp_path / str(place) / "last.pt")["model"])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert any(not torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


LEARNERS = {
    "deit_tiny_distilled_patch16_224": {"depth": 3, "embed_dim": 48, "num_heads": 3, "patch_size": 8},
    "t2t_vit_7": {"depth": 3, "embed_dim": 48, "token_dim": 32},
    "ceit_tiny_patch16_224": {"depth": 3, "embed_dim": 48, "num_heads": 3, "stem_dim": 16, "patch_size": 2},
    "cct_7_3x1_32": {"depth": 3, "embed_dim": 64},
    "swin_tiny_patch4_window7_224": {"depths": (1, 2), "num_heads": (2, 4), "embed_dim": 24, "window_size": 4},
}


@pytest.mark.parametrize("model", LEARNERS)
def test_one_model_of_each_family_learns_digits(model, tmp_path):
    """Until its loss has clearly fallen from that of guessing, ln 10 = 2.30.

    CVT and ViT-Lite are CCT without its convolutions, and DeiT without distillation is what other tests train.
    """
    pe = "learnable+relative" if model.startswith("swin") else "learnable"
    base = recipes.load("families/augmented").experiment()
    experiment = replace(
        base, recipe=None, data="digits", img_size=16 if model.endswith("_32") else 32, model=model,
        model_args=LEARNERS[model], join="lape", pe=pe,
        epochs=5, batch_size=32, lr=3e-3, warmup_epochs=1, precision="32-true", drop_path=0.0, accelerator="cpu",
        auto_augment="", reprob=0.0, mixup=0.0, cutmix=0.0, hflip=0.0, shift=0, workers=0, ratio=None,
    )  # fmt: skip
    curve = json.loads(train(experiment, tmp_path / "run").read_text())["curve"]
    assert curve[-1]["train_loss"] < 1.8, [row["train_loss"] for row in curve]
    assert curve[-1]["val_accuracy"] > 40


# --- What is refused, and how


def test_a_recipe_that_there_is_not_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"Did you mean 'cifar100/cct_7_3x1_32'\?"):
        recipes.load("cifar100/cct_7_3x1")
    with pytest.raises(UsageError, match="is not a recipe"):
        recipes.load("../experiment")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("settings: {learning_rate: 1}", "there is no setting 'learning_rate'"),
        ("setings: {}", "no part 'setings'"),
        ("settings: 3", "is no recipe"),
        ("[1, 2]", "is no recipe"),
        ("a: [", "cannot be read as a recipe"),
        ("!!python/object/apply:os.system ['true']", "cannot be read as a recipe"),
        ("open: [1]", "lists sentences"),
        ("extends: imagenet/nothing", "is not a recipe"),
        ("expected: {accuracy: 73.1}", "maps a measure to numbers by join"),
        ("expected: {top1: {lape: 73.1}}", "there is no measure 'top1', only accuracy, box AP"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_the_reason(tmp_path, text, says):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        recipes.load(str(path))


def test_recipes_in_a_circle_are_refused(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(f"extends: {two}")
    two.write_text(f"extends: {one}")
    with pytest.raises(UsageError, match="in a circle"):
        recipes.load(str(one))


def test_a_recipe_of_ones_own_extends_a_shipped_one(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("extends: cifar10/cvt_7_4_32\nsettings: {epochs: 20}\nopen: [Twenty epochs.]")
    recipe = recipes.load(str(path))
    assert recipe.experiment().epochs == 20
    assert recipe.experiment().lr == 5.5e-4
    assert recipe.open[-1] == "Twenty epochs."
    assert recipe.expected == {}


@pytest.mark.parametrize("number", ["1e-3", "+1e-03", "1E-3", "0.1e-2"])
def test_a_number_may_be_written_without_a_point(tmp_path, number):
    """YAML 1.1 takes 1e-3 for a word; whoever writes it means the number, as in --lr and in --config."""
    (tmp_path / "mine.yaml").write_text(f"settings: {{lr: {number}, model: vit_1e-3}}")
    settings = recipes.load(str(tmp_path / "mine.yaml")).settings
    assert settings == {"lr": 0.001, "model": "vit_1e-3"}


def test_on_the_command_line_the_recipe_stands_below_what_is_typed(tmp_path):
    words = [
        "train",
        "--recipe",
        "cifar100/cct_7_3x1_32",
        "--join",
        "default",
        "--seed",
        "122",
        "--data",
        str(tmp_path),
    ]
    _, given = parsed([*words, "--epochs", "2"])
    experiment = given["experiment"]
    assert (experiment.data, experiment.data_dir) == ("cifar100", tmp_path)
    assert (experiment.join, experiment.seed, experiment.epochs, experiment.lr) == ("default", 122, 2, 6e-4)
    assert recipes.load("cifar100/cct_7_3x1_32").changed(experiment) == {"epochs": 2}
    _, given = parsed(["compare", "--recipe", "cifar100/cct_7_3x1_32", "--joins", "default,lape", "--pe", "learnable"])
    assert given["experiment"].lr == 6e-4


def test_imagenet_without_its_folder_is_refused():
    with pytest.raises(UsageError, match="--data the folder that holds train/ and val/"):
        find_set("imagenet")


def test_every_name_of_a_set_has_its_reader():
    from lape.data import SETS

    assert all(callable(resolve_name(reader)) for reader in SETS.values())


def test_a_full_model_of_every_recipe_can_be_made():
    for name in OF_CLASSIFIERS:
        experiment = recipes.load(name).experiment()
        source = find_set("digits")
        with torch.device("meta"):
            work = work_of(replace(experiment, img_size=experiment.img_size or 32), source)
        assert work.module.num_classes == 10
        assert work.size in ((224, 224), (32, 32))


def test_whatever_decides_a_result_counts_as_changed() -> None:
    recipe = recipes.load("imagenet/swin_tiny_patch4_window7_224")
    own = recipe.experiment()
    yours = {"join", "seed", "weights", "accumulate", "grad_checkpointing", "compile", "tf32"}
    for name, value in own.identity().items():
        another = (
            (1, 2) if name in RANGES else (0.5, 0.9) if name == "betas" else 0.5 if name in ("ema", "val_split") else 1
        )
        if isinstance(value, str | dict):
            another = f"{value}0" if isinstance(value, str) else {"depth": 1}
        elif value is not None:
            another = None
        other = replace(own, **{name: another})
        assert recipe.changed(other).keys() == {name} - yours


def test_a_recipe_is_not_reached_by_another_way() -> None:
    with pytest.raises(UsageError, match="is not a recipe"):
        recipes.load("../recipes/cifar10/cct_7_3x1_32")


def test_recipes_are_listed_in_the_order_of_the_tables() -> None:
    tables = [recipes.load(name).table for name in recipes.names()]
    assert tables == sorted(tables)


def test_another_set_than_the_recipes_is_named_by_data() -> None:
    _, given = parsed(["train", "--recipe", "cifar100/cct_7_3x1_32", "--data", "cifar10"])
    assert (given["experiment"].data, given["experiment"].data_dir) == ("cifar10", None)


@EVERY_CLASSIFIER
def test_the_rest_is_as_in_the_original(name):
    e = recipes.load(name).experiment()
    small = "cifar" in e.data
    optimizer = "lamb" if e.model.startswith("deit3") else "adamw"
    assert (e.optimizer, e.remode, e.vflip, e.ratio) == (optimizer, "pixel", 0.0, (3 / 4, 4 / 3))
    assert (e.img_size or 32, bool(e.batched)) == ((32, True) if small else (224, False))
    assert e.seed == (121 if small else 42 if e.model.startswith("t2t") else 0)


ALSO_DECAY = {  # by the first pattern that fits; the originals exempt nothing of these
    "cifar*/vit*": ("pos_embed", "cls_token"),
    "cifar*": ("pos_embed",),
    "*/ceit*": ("pos_layer_embed",),
    "*_distilled_*": ("dist_token",),
    "table7/learnable-unshared": ("pos_embed",),
    "table7/relative-default": ("relative_position_bias_table",),
    "*": (),
}


@EVERY_CLASSIFIER
def test_what_decays_in_the_original_decays(name):
    found = next(parts for pattern, parts in ALSO_DECAY.items() if fnmatch(name, pattern))
    assert recipes.load(name).experiment().also_decay == found

"""Hard distillation: a second head learns what a teacher says of the same images."""

import math
from dataclasses import replace

import pytest
import timm
import torch

from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.tasks.classification import Distillation
from lape.training import checkpoints
from lape.training.evaluation import evaluate_checkpoint
from lape.training.loop import TrainingRun, launch, train

TEACHER = "test_efficientnet"
STUDENT = Experiment(
    model="deit_tiny_distilled_patch16_224",
    model_args={"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 2},
    img_size=8,
    epochs=1,
    batch_size=400,
    mixup=0.8,
    accelerator="cpu",
    teacher=TEACHER,
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher's file: it always answers 3."""
    torch.manual_seed(0)
    model = timm.create_model(TEACHER, num_classes=10, in_chans=1)
    model.classifier.bias.data[3] = 100.0
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(model.state_dict(), path)
    return path


def test_the_loss_is_half_the_targets_and_half_the_teachers_answers():
    named = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])  # probabilities ¼ ¾, ½ ½
    learnt = torch.tensor([[math.log(4), 0.0], [0.0, math.log(4)]])  # ⅘ ⅕, ⅕ ⅘
    targets = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    asked = []

    def answers(images):
        asked.append(images)
        return torch.tensor([0, 0])

    images = torch.zeros(2, 1, 4, 4)
    loss = Distillation(2, answers).loss(lambda _: (named, learnt), images, targets)
    by_target = -(0.5 * math.log(1 / 4) + 0.5 * math.log(3 / 4) + math.log(1 / 2)) / 2
    by_answer = -(math.log(4 / 5) + math.log(1 / 5)) / 2
    assert loss.item() == pytest.approx((by_target + by_answer) / 2)
    assert asked[0] is images


def test_the_second_head_learns_from_the_teacher(tmp_path, teacher):
    """The teacher's answers are 3 alone: so are, soon, those of the distillation head, and not those of the other."""
    run = TrainingRun(
        replace(STUDENT, teacher_weights=teacher, epochs=6, batch_size=64, lr=5e-3), tmp_path, launch(STUDENT)
    )
    run.fit(lambda _: None)
    named, learnt = run.module(run.source.validation.pictures[:64].float() / 255)
    assert (learnt.argmax(1) == 3).all()
    assert not (named.argmax(1) == 3).any()
    saved = checkpoints.read(tmp_path / "last.pt")
    assert saved["model"].keys() == run.module.state_dict().keys()
    judged = evaluate_checkpoint(tmp_path / "last.pt")  # by the mean of both heads, and without the teacher
    assert judged.metrics["val_loss"] == pytest.approx(saved["state"]["curve"][-1]["val_loss"])


def test_a_teachers_batch_norm_and_weights_stay(tmp_path, teacher, monkeypatch):
    made = []
    create = timm.create_model

    def kept(name, **options):
        made.append(create(name, **options))
        return made[-1]

    monkeypatch.setattr(timm, "create_model", kept)
    run = TrainingRun(replace(STUDENT, teacher_weights=teacher, precision="bf16-true"), tmp_path, launch(STUDENT))
    # Sizes are tried on the meta device first.
    built = [model for model in made if not next(model.parameters()).is_meta]
    (model,) = (model for model in built if model is not run.module)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run.fit(lambda _: None)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_settings_of_a_teacher_survive(teacher):
    experiment = replace(STUDENT, teacher_weights=teacher)
    assert Experiment.of(experiment.settings()) == experiment


def test_what_cannot_teach_or_be_taught_is_refused(tmp_path, teacher):
    taught = replace(STUDENT, teacher_weights=teacher)
    plain = {"model": "vit_nano_patch2_8", "model_args": {}, "img_size": None}
    torch.save(timm.create_model(TEACHER, num_classes=7, in_chans=1).state_dict(), tmp_path / "seven.pt")
    for changed, told in (
        (plain, "teaches a distillation head, and vit_nano_patch2_8 has none"),
        ({"teacher_weights": tmp_path / "seven.pt"}, "tells 7 classes apart, and digits has 10"),
        ({"teacher": None}, "are of no model: name it by --teacher"),
        ({"teacher": "test_efficientnett"}, "'test_efficientnet'"),
    ):
        with pytest.raises(UsageError, match=told):
            train(replace(taught, **changed), tmp_path / "a")
    for changed, told in (
        ({"teacher": "test_resnet"}, r"teacher\.pt is of another model"),
        ({"teacher_weights": tmp_path / "none.pt"}, r"none\.pt does not exist"),
    ):
        with pytest.raises(RunError, match=told):
            train(replace(taught, **changed), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_timms_own_weights_must_be_of_these_classes_and_colours(tmp_path, monkeypatch):
    create = timm.create_model

    def downloaded(name, pretrained=False, **options):
        return create(name, **options)

    monkeypatch.setattr("lape.tasks.classification.refuse_unreachable", lambda *_: None)
    monkeypatch.setattr(timm, "create_model", downloaded)
    with pytest.raises(UsageError, match="tells 1000 classes apart, and digits has 10"):
        train(STUDENT, tmp_path / "a")

    def of_ten(name, pretrained=False, **options):
        return create(name, **{"num_classes": 10, **options})

    monkeypatch.setattr(timm, "create_model", of_ten)
    with pytest.raises(UsageError, match=r"knows them with mean \(0\.485, .* digits have \(0\.305,\)"):
        train(STUDENT, tmp_path / "a")

    class NotOfPython(Exception):
        """As the Hub's client and its network library have them."""

    for kind in (OSError, NotOfPython):

        def refused(name, pretrained=False, kind=kind, **options):
            if pretrained:
                raise kind("no network\nand more of it")
            return create(name, **options)

        monkeypatch.setattr(timm, "create_model", refused)
        with pytest.raises(RunError, match=r"could not be downloaded \(no network\)\. Give --teacher_weights"):
            train(STUDENT, tmp_path / "a")

"""The doctor, on a sound model, on rows that do not say what a model does, and on a model that carries no join."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from foreign_hosts import FOREIGN, SCRATCH, D, Scratch, inputs, untouched
from torch import Tensor, nn

import lape
from lape.cli import command_line
from lape.errors import UsageError
from lape.report import doctor
from lape.report.doctor import CHECKS, FAILED, NOT_CHECKED, PASSED
from lape.surgery import positions


def results(examination: Any) -> dict[str, str]:
    return {finding.check: finding.result for finding in examination.findings}


def failures(examination: Any) -> dict[str, str]:
    return {finding.check: finding.says for finding in examination.findings if finding.result == FAILED}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """All checks but that of the compiler, which takes longer than the others together."""
    monkeypatch.setattr(doctor, "CHECKS", {name: run for name, run in CHECKS.items() if name != "torch.compile"})


@pytest.mark.parametrize("name", ["vit", "tnt", "relpos", "sequences-first", "sam"])
def test_a_sound_model_passes_and_stays_as_it_was(name: str, request: pytest.FixtureRequest) -> None:
    if name != "sam":
        request.getfixturevalue("uncompiled")
    model, x = untouched(name).train(), inputs(name)
    state, keys = copy.deepcopy(model.state_dict()), {path: set(vars(part)) for path, part in model.named_modules()}
    random = torch.get_rng_state()
    options = {key: value for key, value in FOREIGN[name].options.items() if key in ("host", "grid", "pe")}
    found = lape.check(model, **options, inputs=x if name == "vit" else None)
    assert failures(found) == {}
    assert found.passed
    assert [finding.check for finding in found.findings] == [*doctor.CHECKS]
    unseen = {check for check, result in results(found).items() if result == NOT_CHECKED}
    assert unseen <= {"grid of patches", "other sizes"}
    assert ("other sizes" in unseen) is (name not in ("sam", "relpos"))
    row = found.findings[0].says
    assert "3 layers" in row
    assert f"width {D}" in row
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert {path: set(vars(part)) for path, part in model.named_modules()} == keys
    assert all(part.training for part in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert str(found).count("\n") == len(doctor.CHECKS) + 1


@pytest.mark.usefixtures("uncompiled")
def test_a_model_with_a_join_is_examined_without_it_and_keeps_it() -> None:
    model, x = lape.apply(untouched("vit"), "shared"), inputs("vit")
    before = model(x).last_hidden_state
    assert lape.check(model).passed
    assert torch.equal(model(x).last_hidden_state, before)
    with pytest.raises(UsageError, match="A folded model"):
        lape.check(lape.fold(model))


@pytest.mark.usefixtures("uncompiled")
def test_weights_that_are_zero_are_no_fault_of_the_row() -> None:
    model = untouched("scratch")
    for parameter in model.depths[1].out.parameters():
        nn.init.zeros_(parameter)
    found = lape.check(model, host=SCRATCH, inputs=inputs("scratch"))
    assert failures(found) == {}
    seen = results(found)
    assert seen["norm before attention"] == seen["every rung is heard"] == NOT_CHECKED
    assert "layers 1 " in {finding.check: finding.says for finding in found.findings}["every rung is heard"]


class Deaf(Scratch):
    """A ViT that leaves its second block out of what it computes."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for number, block in enumerate(self.depths):
            x = x if number == 1 else block(x)
        return x


@pytest.mark.usefixtures("uncompiled")
def test_a_block_that_is_not_called_is_named() -> None:
    model = Deaf().eval()
    nn.init.normal_(model.stem.where)
    found = failures(lape.check(model, host=SCRATCH, inputs=inputs("scratch")))
    assert "Block 1 (Attend) is not called" in found["norm before attention"]


def test_a_row_with_another_norm_is_refused_as_apply_refuses_it() -> None:
    model = untouched("scratch")
    found = lape.check(model, host=replace(SCRATCH, block=lape.Block("after")), inputs=inputs("scratch"))
    assert results(found) == {"host row": FAILED}
    assert "changes that token alone" in found.findings[0].says
    assert not found.passed


@pytest.mark.usefixtures("uncompiled")
def test_a_row_that_says_another_grid_fails_by_its_grid() -> None:
    model = untouched("scratch")
    model.side = (2, 8)
    found = failures(lape.check(model, host=SCRATCH, inputs=inputs("scratch")))
    assert "into 4x4. Mend the row's grid and prefix." in found["grid of patches"]


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("lape.fold", lambda record, rung: rung if record.folded_for else rung._replace(attention=2 * rung.attention)),
        ("every rung is heard", lambda record, rung: rung._replace(attention=torch.zeros_like(rung.attention))),
    ],
)
@pytest.mark.usefixtures("uncompiled")
def test_a_fault_of_lape_itself_would_be_seen(check: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = positions.Positions.for_the_block
    monkeypatch.setattr(
        positions.Positions,
        "for_the_block",
        lambda self, *given, **named: (
            rung if (rung := sound(self, *given, **named)).attention is None else fault(self, rung)
        ),
    )
    assert check in failures(lape.check(untouched("vit")))


@pytest.mark.usefixtures("uncompiled")
def test_what_is_not_taken_back_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "remove", lambda model: model)
    monkeypatch.setattr(doctor, "fold", lambda model: lape.remove(model))
    found = failures(lape.check(untouched("vit")))
    assert found.keys() == {"lape.remove", "lape.fold"}
    assert "other parameters: ['" in found["lape.remove"]


def test_a_class_that_carries_no_join_gets_the_reason() -> None:
    found = lape.check(timm.create_model("hiera_tiny_224", embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)))
    assert results(found) == {"host row": FAILED}
    assert "sorts the patches by windows" in found.findings[0].says


@pytest.mark.usefixtures("uncompiled")
def test_the_command_shows_the_table_and_ends_with_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    small = '{"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32, "num_classes": 3}'
    assert command_line.main(["check", "cait_xxs24_224", "--model-args", small]) == 0
    shown = capsys.readouterr()
    assert "Cait" in shown.out
    assert "timm Cait: 1 layer, 2x2" in " ".join(shown.out.split())
    assert shown.out.count(PASSED) == len(doctor.CHECKS) - 1
    assert shown.err == ""
    assert command_line.main(["check", "convit_tiny"]) == 1
    shown = capsys.readouterr()
    assert "class token joins the patches" in " ".join(shown.out.split())
    assert shown.err == "lape: 1 of 1 check failed for convit_tiny. The table says why.\n"
    assert command_line.main(["check", "cait_xxs24_225"]) == 2
    assert "Did you mean 'cait_xxs24_224'?" in capsys.readouterr().err

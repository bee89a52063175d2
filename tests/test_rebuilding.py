"""Law: what a file describes is built once it is seen to be the model of the file's weights, and no larger."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import timm
import torch
from test_models import SMALL, small
from torch import nn

import lape
from lape.errors import RunError, UsageError
from lape.models import rebuilding
from lape.models.rebuilding import LikeItsFile, Limit, as_asked

PATH = Path("x.pt")
OTHERS = ("segmenter_nano_patch8", "mask_rcnn_vit_adapter_nano")


class Counted:
    """Makes a model, and counts how often it was asked to, and where."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.make = make
        self.devices: list[str] = []

    def __call__(self) -> nn.Module:
        made = self.make()
        self.devices.append(next(made.parameters()).device.type)
        return made


@pytest.mark.parametrize("name", [*SMALL, *OTHERS])
def test_a_model_of_every_family_is_seen_without_memory_first(name: str) -> None:
    make = Counted((lambda: lape.create_model(name)) if name in OTHERS else (lambda: small(name, "lape")))
    weights = make.make().state_dict()
    made = LikeItsFile(weights, PATH)(make, {})
    assert make.devices == ["meta", "cpu"]
    assert {key: value.shape for key, value in made.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    assert not any(value.is_meta for value in [*made.parameters(), *made.buffers()])


def test_one_of_another_shape_is_not_made() -> None:
    make = Counted(lambda: nn.Linear(7, 3))
    with pytest.raises(RunError, match=r"^x\.pt is of another model: weight is \(3, 8\) in the file and \(3, 7\)"):
        LikeItsFile(nn.Linear(8, 3).state_dict(), PATH)(make, {})
    assert make.devices == ["meta"]


def test_one_whose_constructor_needs_values_is_made_under_the_limit_alone() -> None:
    def deep(depth: int) -> nn.Module:
        assert torch.ones(1).item() == 1  # without memory there is no value
        return nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))

    like = LikeItsFile(deep(10).state_dict(), PATH)
    assert len(list(like(lambda: deep(10), {}).parameters())) == 20
    with pytest.raises(RunError, match=r"^x\.pt: it describes a larger model than that of its weights"):
        like(lambda: deep(10**7), {})
    with pytest.raises(RunError, match=r"^x\.pt: it describes a larger model than that of its weights"):
        like(lambda: nn.Sequential(deep(1), nn.Linear(5000, 5000)), {})


def test_keywords_that_add_up_to_more_than_there_are_weights_are_refused_before() -> None:
    make = Counted(lambda: nn.Linear(7, 3))
    with pytest.raises(RunError, match=r"^x\.pt describes a model by numbers that add up to 600000, and its weights"):
        LikeItsFile(make.make().state_dict(), PATH)(make, {"depths": [[60_000] * 5, 300_000], "rate": 0.5})
    assert make.devices == []


def test_a_limit_counts_its_own_thread_and_ends() -> None:
    limit = Limit(2, 100)
    with limit.kept():
        other = Thread(target=lambda: nn.Sequential(*(nn.Linear(20, 20) for _ in range(20))))
        other.start()
        other.join()
        assert not limit.passed
        nn.Linear(2, 2)
        with pytest.raises(RunError, match="larger model"):
            nn.Linear(2, 2)
    assert limit.passed
    timm.create_model("vit_tiny_patch16_224", depth=1)  # nobody counts any more


def test_what_is_in_no_file_is_no_larger_either() -> None:
    class Masked(nn.Module):
        def __init__(self, side: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.register_buffer("mask", torch.zeros(side, side), persistent=False)

    like = LikeItsFile(Masked(2).state_dict(), PATH)
    assert like(lambda: Masked(100), {}).mask.shape == (100, 100)
    with pytest.raises(RunError, match=r"^x\.pt: it describes a larger model than that of its weights"):
        like(lambda: Masked(100_000), {})


@pytest.mark.parametrize(
    "keywords", [{"depth": 10_000_000}, {"depth": 100}, {"embed_dim": 900_000}, {"depth": 100, "embed_dim": 30_000}]
)
def test_what_no_machine_could_hold_is_not_begun(keywords: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebuilding, "MOST_PARAMETERS", 200)  # each takes a millisecond
    make = Counted(lambda: timm.create_model("vit_tiny_patch16_224", **keywords))
    with pytest.raises(UsageError, match=r"make a model of more than 200 parameter tensors, or of more values than"):
        as_asked(make, keywords)
    assert "cpu" not in make.devices


def test_what_a_user_asks_for_is_made() -> None:
    make = Counted(lambda: timm.create_model("vit_tiny_patch16_224", depth=2))
    as_asked(make, {"depth": 2})
    assert make.devices == ["meta", "cpu"]
    as_asked(make, {})
    assert make.devices == ["meta", "cpu", "cpu"]

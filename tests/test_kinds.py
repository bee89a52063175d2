"""Laws of the two tables: every set has a kind, every kind one file, and both are all that a new one needs."""

from dataclasses import fields
from pkgutil import resolve_name
from typing import Any

import pytest

from lape.cli.command_line import main
from lape.data import LAYOUTS
from lape.experiment import Augmentation, Dense
from lape.models.registry import learns_from, models_for
from lape.tasks import KINDS
from lape.tasks.building import OF_PICTURES
from lape.tasks.measures import TITLES


def work_class(kind: str) -> Any:
    return resolve_name(KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_its_sets_its_settings_its_models_and_its_measures(kind: str) -> None:
    work = work_class(kind)
    assert work.source_type.kind == kind
    home = __import__(work.__module__, fromlist=["SETTINGS"])
    assert OF_PICTURES >= home.SETTINGS
    assert all(learns_from(name) == kind for name in models_for(kind))
    tasks = [value for value in vars(home).values() if isinstance(value, type) and hasattr(value, "reported")]
    for task in (task for task in tasks if task.__module__ == work.__module__):
        assert task.score in TITLES
        assert task.reported[0] == task.score


def test_every_setting_of_pictures_means_something_to_a_kind() -> None:
    homes = [__import__(work_class(kind).__module__, fromlist=["SETTINGS"]) for kind in KINDS]
    assert set().union(*(home.SETTINGS for home in homes)) == OF_PICTURES
    assert {field.name for section in (Augmentation, Dense) for field in fields(section)} < OF_PICTURES


def test_every_layout_of_folders_has_its_reader() -> None:
    assert all(callable(resolve_name(reader)) for reader in LAYOUTS.values())


def test_a_name_of_no_set_is_refused_with_all_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    from lape.data import SETS

    assert main(["train", "--data", "digit"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in SETS)


def test_timms_models_learn_classes() -> None:
    assert learns_from("resnet10t") == "classes"

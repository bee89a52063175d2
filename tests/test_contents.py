"""Laws of what is in a set: a run does not go on with other data than it began with, or stand beside one of others."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_runs import study_of
from PIL import Image

from lape.data.classes import Split, folder
from lape.data.sources import find_set
from lape.errors import UsageError
from lape.experiment import Experiment
from lape.report import words
from lape.studies.comparison import Factors, compare
from lape.studies.study import gather
from lape.training import checkpoints
from lape.training.contents import contents, differences
from lape.training.loop import train


def pets(root: Path, *names: str) -> Path:
    for part in ("train", "val"):
        for number, name in enumerate(names):
            (root / part / name).mkdir(parents=True)
            for index in range(4):
                pixels = np.full((16, 16, 3), 40 * index + 100 * number, np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


def test_what_is_in_a_set_stays_where_it_is_moved_and_changes_with_names_and_sizes(tmp_path):
    root = pets(tmp_path / "pets", "cat", "dog")
    before = contents(folder(root))
    assert before == contents(folder(shutil.copytree(root, tmp_path / "elsewhere")))
    assert before["classes"] == ["cat", "dog"]
    assert before["train"]["pictures"] == 8
    assert json.loads(json.dumps(before)) == before
    (root / "train/cat/0.png").rename(root / "train/cat/9.png")
    renamed = contents(folder(root))
    assert differences(before, renamed) == ["its training pictures have other names, sizes or labels"]
    with (root / "val/dog/3.png").open("ab") as file:
        file.write(b"\0")
    assert differences(renamed, contents(folder(root))) == ["its validation pictures have other names, sizes or labels"]
    (root / "train/dog/0.png").unlink()
    assert "it has 7 training pictures now, and had 8" in differences(before, contents(folder(root)))


def test_what_is_in_memory_is_known_by_all_of_it():
    labels = torch.tensor([0, 1])
    source = replace(folder_in_memory(), train=Split("training", torch.zeros(2, 1, 8, 8, dtype=torch.uint8), labels))
    others = [
        replace(source, train=replace(source.train, labels=labels.flip(0))),
        replace(source, train=replace(source.train, pictures=source.train.pictures + 1)),
    ]
    assert all(differences(contents(source), contents(other)) for other in others)


def folder_in_memory():
    return find_set("digits")


@pytest.mark.parametrize("stored", [[], {}, {"classes": 3}, {"classes": ["cat"], "train": 5}, "x"])
def test_whatever_a_file_tells_of_a_set_is_compared(tmp_path, stored):
    here = contents(folder(pets(tmp_path, "cat", "dog")))
    assert differences(stored, here)
    assert differences(None, here) == []


class Cut(BaseException):
    """Stands for the end of a process."""


def _tiny(root: Path) -> Experiment:
    return Experiment(
        data=str(root), model="vit_nano_patch4_32", model_args={"embed_dim": 8, "depth": 1, "num_heads": 2},
        img_size=16, epochs=2, batch_size=4, workers=0, accelerator="cpu",
    )  # fmt: skip


def _rename(root: Path, old: str, new: str) -> None:
    for part in ("train", "val"):
        (root / part / old).rename(root / part / new)


def test_a_run_does_not_go_on_with_other_data(tmp_path):
    root = pets(tmp_path / "pets", "cat", "dog")

    def cut(progress):
        if progress.epoch == 1:  # and there is a checkpoint
            raise Cut

    with pytest.raises(Cut):
        train(_tiny(root), tmp_path / "run", report=cut)
    _rename(root, "cat", "zebra")  # the labels of all pictures change places
    match = (
        r"last\.pt was made from other data than .*/pets holds now: its classes are dog, zebra now, and were cat, dog"
    )
    with pytest.raises(UsageError, match=match):
        train(_tiny(root), tmp_path / "run", resume=True)
    _rename(root, "zebra", "cat")
    train(_tiny(root), tmp_path / "run", resume=True)
    here = contents(folder(root))
    assert json.loads((tmp_path / "run/result.json").read_text())["contents"] == here
    assert checkpoints.read(tmp_path / "run/best.pt")["contents"] == here


@pytest.mark.slow
def test_a_finished_run_is_not_compared_with_one_of_other_data(tmp_path):
    root = pets(tmp_path / "pets", "cat", "dog")
    first = Factors(["default"], ["learnable"], [0])
    compare(_tiny(root), first, tmp_path / "out", jobs=1)
    _rename(root, "cat", "zebra")
    with pytest.raises(UsageError, match=r"result\.json was made from other data .* dog, zebra now, and were cat, dog"):
        compare(_tiny(root), replace(first, joins=["default", "lape"]), tmp_path / "out", jobs=1)


def test_runs_of_other_data_are_another_study_and_the_page_tells_them_apart(tmp_path):
    finals = {("default", "learnable"): {0: 90.0}, ("lape", "learnable"): {0: 93.0}}
    for name, classes in (("old", ["cat", "dog"]), ("new", ["dog", "zebra"])):
        study_of(tmp_path / name, finals)
        for path in (tmp_path / name).rglob("result.json"):
            record = json.loads(path.read_text())
            contents = {"classes": classes, "train": {"pictures": 20}, "validation": {"pictures": 10}}
            path.write_text(json.dumps(record | {"contents": contents}))
    gathered = gather([tmp_path])
    assert [len(study.results) for study in gathered.studies] == [2, 2]
    assert gathered.left_out == {}
    apart = words.apart(gathered.studies)
    assert len(set(apart)) == 2
    assert all(text.startswith("data of digest ") for text in apart)

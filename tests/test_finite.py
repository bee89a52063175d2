"""What is not finite stops a run and says where; in half precision every join and table stays finite."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, product, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lape.errors import RunError
from lape.experiment import Experiment
from lape.method import JOINS, POSITION_EMBEDDINGS
from lape.training import checkpoints
from lape.training.loop import TrainingRun, launch, train


@pytest.fixture
def pets(tmp_path) -> Path:
    for part, name, index in product(("train", "val"), ("cat", "dog"), range(4)):
        path = tmp_path / "pets" / part / name / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), 30 * index, np.uint8)).save(path)
    return tmp_path / "pets"


@pytest.mark.parametrize("broken", ["loss", "weights"])
@pytest.mark.parametrize("step", [0, 5], ids=["first step", "second epoch"])
def test_a_run_of_files_names_the_step_its_files_and_the_last_good_checkpoint(pets, monkeypatch, broken, step):
    """A weight becomes infinite before the step that is told, where the loss sees it, or after it."""
    experiment = Experiment(
        data=str(pets), model="vit_nano_patch4_32", model_args={"embed_dim": 8, "depth": 1, "num_heads": 2},
        img_size=16, epochs=2, batch_size=2, workers=0, accelerator="cpu",
    )  # fmt: skip
    whole = TrainingRun._step

    def breaks(self: TrainingRun, number: int, batches: Iterator[Any], stop: bool) -> torch.Tensor:
        if broken == "weights":
            news = whole(self, number, batches, stop)
        if number == step:
            with torch.no_grad():
                self.module.head.weight.fill_(math.inf)
        return news if broken == "weights" else whole(self, number, batches, stop)

    # The weights are looked at where they are kept: after every step.
    monkeypatch.setattr(TrainingRun, "_step", breaks)
    folder = pets.parent / "run"
    with pytest.raises(RunError) as caught:
        train(experiment if broken == "loss" else Experiment(**vars(experiment) | {"checkpoint_seconds": 0.0}), folder)
    epoch, place = divmod(step, 4)
    what = r"The weights are no longer finite" if broken == "weights" else "The loss is nan"
    kept = f"the last good checkpoint is {folder}/last.pt" if step else "there is no checkpoint before it"
    assert str(caught.value).startswith(f"{what} in epoch {epoch + 1}, step {step + 1}; {kept}. Its images are ")
    listed = json.loads((folder / "broken-batch.json").read_text())
    assert (listed["epoch"], listed["step"]) == (epoch + 1, step + 1)
    expected = TrainingRun(experiment, folder, launch(experiment)).order.epoch(epoch)[place].flatten()
    files = sorted(pets.glob("train/*/*.png"))
    assert listed["images"] == [str(files[index]) for index in expected.tolist()]
    assert all(path in str(caught.value) for path in listed["images"])
    if step:
        saved = checkpoints.read(folder / "last.pt")
        assert saved["state"]["step"] in (4, 5)
        assert all(tensor.isfinite().all() for tensor in saved["model"].values())
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize("changed", [{}, {"clip_grad": 1.0}, {"precision": "bf16-true"}], ids=str)
@pytest.mark.parametrize("step", [1, 3], ids=["within an epoch", "at its end"])
def test_a_gradient_that_is_not_finite_is_told_with_the_images_of_its_own_step(pets, monkeypatch, changed, step):
    """The loss is finite until the next step, and a gradient that is infinite cannot be clipped."""
    asked: dict[str, Any] = {
        "data": str(pets), "model": "vit_nano_patch4_32", "model_args": {"embed_dim": 8, "depth": 1, "num_heads": 2},
        "img_size": 16, "epochs": 2, "batch_size": 2, "workers": 0, "accelerator": "cpu",
    }  # fmt: skip
    experiment = Experiment(**asked, **changed)
    whole = TrainingRun._step

    def breaks(self: TrainingRun, number: int, batches: Iterator[Any], stop: bool) -> torch.Tensor:
        if number != step:
            return whole(self, number, batches, stop)
        handle = self.module.head.weight.register_hook(lambda gradient: gradient * math.inf)
        try:
            return whole(self, number, batches, stop)
        finally:
            handle.remove()

    monkeypatch.setattr(TrainingRun, "_step", breaks)
    folder = pets.parent / "run"
    with pytest.raises(RunError) as caught:
        train(experiment, folder)
    line = str(caught.value)
    assert line.startswith(f"The gradient is not finite, though the loss is, in epoch 1, step {step + 1}; ")
    expected = TrainingRun(experiment, folder, launch(experiment)).order.epoch(0)[step].flatten()
    files = sorted(pets.glob("train/*/*.png"))
    listed = json.loads((folder / "broken-batch.json").read_text())
    assert listed["images"] == [str(files[index]) for index in expected.tolist()]
    assert "--clip_grad" not in line
    assert ("--precision 32-true" in line) == ("precision" in changed)


def test_clipping_is_advised_where_it_may_help(pets, monkeypatch):
    whole = TrainingRun._step

    def breaks(self: TrainingRun, number: int, batches: Iterator[Any], stop: bool) -> torch.Tensor:
        with torch.no_grad():
            self.module.head.weight.fill_(math.inf)
        return whole(self, number, batches, stop)

    monkeypatch.setattr(TrainingRun, "_step", breaks)
    experiment = Experiment(
        data=str(pets), model="vit_nano_patch4_32", model_args={"embed_dim": 8, "depth": 1, "num_heads": 2},
        img_size=16, epochs=2, batch_size=2, workers=0, accelerator="cpu",
    )  # fmt: skip
    for number, (clip, advised) in enumerate(((None, True), (1.0, False))):
        with pytest.raises(RunError) as caught:
            train(replace(experiment, clip_grad=clip), pets.parent / str(number))
        assert ("--clip_grad 1" in str(caught.value)) == advised


PRECISIONS = ("bf16-true", "16-true")


def _cases() -> Iterator[tuple[str, str, str]]:
    """Every join with a learnt table, and every other kind of positions; the precisions in turn."""
    precisions = cycle(PRECISIONS)
    yield from zip(JOINS, repeat("learnable"), precisions, strict=False)
    others = [pe for pe in POSITION_EMBEDDINGS if pe not in ("none", "learnable") and "+" not in pe]
    for pe, precision in zip(others, precisions, strict=False):
        yield "lape" if POSITION_EMBEDDINGS[pe].table else "default", pe, precision


@pytest.mark.slow
@pytest.mark.parametrize(("join", "pe", "precision"), list(_cases()))
def test_200_steps_at_depth_12_stay_finite(tmp_path, join, pe, precision):
    """Weights too are of 16 bits: the mixed forms round less."""
    experiment = Experiment(
        join=join, pe=pe, precision=precision, model="vit_nano_patch4_32", img_size=8, batch_size=4, steps=200, lr=1e-3,
        model_args={"embed_dim": 16, "depth": 12, "num_heads": 4}, drop_path=0.0, accelerator="cpu", workers=0,
    )  # fmt: skip
    run = TrainingRun(experiment, tmp_path, launch(experiment))
    batches = run._training_batches()
    prepared = run.preparation.ahead(batches, run.fabric.to_device)
    losses = [run._step(step, prepared, stop=False)[0].item() for step in range(200)]
    batches.close()
    assert all(map(math.isfinite, losses))
    assert all(parameter.isfinite().all() for parameter in run.module.parameters())
    moments = [value for state in run.optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    assert moments
    assert all(moment.isfinite().all() for moment in moments)

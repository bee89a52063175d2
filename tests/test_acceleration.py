"""What is asked of a CUDA card, decided here by cards that are made up; and when the loop waits for a device."""

import logging
from dataclasses import replace

import pytest
import torch
from lightning_fabric.accelerators import cuda

from lape.experiment import Experiment
from lape.training import loop
from lape.training.acceleration import Card, Readout, against_graphs, choose_products, remarks, without_advice
from lape.training.loop import TrainingRun, train

CARD, OLD = Card("NVIDIA H100", (9, 0)), Card("Tesla V100", (7, 0))
COMPILED = Experiment(compile=True)
TINY = Experiment(
    model_args={"depth": 1, "embed_dim": 16, "num_heads": 2}, epochs=1, batch_size=300, accelerator="cpu", workers=0
)


@pytest.fixture
def products():
    """The precision of float32 products of this process, which is put back."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield torch.get_float32_matmul_precision
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(
    ("card", "tf32", "before", "after", "convolutions"),
    [
        (CARD, True, "highest", "high", True),
        (CARD, True, "medium", "medium", True),
        (CARD, False, "high", "highest", False),
        (None, True, "highest", "highest", True),
        (None, False, "high", "high", True),
    ],
)
def test_products_are_in_tf32_on_a_card_unless_asked_otherwise(products, card, tf32, before, after, convolutions):
    torch.set_float32_matmul_precision(before)
    torch.backends.cudnn.allow_tf32 = True
    choose_products(card, Experiment(tf32=tf32))
    assert products() == after
    assert torch.backends.cudnn.allow_tf32 is convolutions


def test_fabrics_advice_is_kept_from_every_process(products, monkeypatch, caplog):
    """And nothing else that it says."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")
    caplog.set_level(logging.INFO, "lightning_fabric.utilities.rank_zero")
    for quiet in (True, False):
        cuda._check_cuda_matmul_precision.cache_clear()
        if quiet:
            with without_advice():
                cuda._check_cuda_matmul_precision(torch.device("cuda"))
                cuda.rank_zero_info("something else")
        else:
            cuda._check_cuda_matmul_precision(torch.device("cuda"))
    cuda._check_cuda_matmul_precision.cache_clear()
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "something else"
    assert "you should set `torch.set_float32_matmul_precision" in said[1]


@pytest.mark.parametrize(
    ("card", "experiment", "against", "said"),
    [
        (None, COMPILED, None, []),
        (CARD, Experiment(), None, ["in TF32 on NVIDIA H100", "bf16-mixed takes less time and memory than 32-true"]),
        (CARD, Experiment(tf32=False), None, ["bf16-mixed takes less time"]),
        (CARD, Experiment(precision="16-mixed"), None, ["bf16-mixed needs no scaling"]),
        (CARD, Experiment(precision="bf16-mixed"), None, []),
        (OLD, Experiment(), None, []),
        (OLD, COMPILED, None, ["Compiled, with CUDA graphs"]),
        (OLD, COMPILED, "a teacher answers", ["Compiled without CUDA graphs: a teacher answers."]),
    ],
)
def test_what_a_card_does_is_said(card, experiment, against, said):
    lines = list(remarks(card, experiment, against))
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))


@pytest.mark.parametrize(
    ("changed", "one_size", "processes", "reason"),
    [
        ({}, True, 1, None),
        ({"compile": False}, True, 1, "not compiled"),
        ({"graphs": False}, True, 1, "--graphs is false"),
        ({}, False, 1, "many sizes"),
        ({"teacher": "regnety_160"}, True, 1, "a teacher"),
        ({"accumulate": 2}, True, 1, "a step has 2 parts"),
        ({"grad_checkpointing": True}, True, 1, "computed again"),
        ({}, True, 2, "2 processes"),
    ],
)
def test_graphs_are_off_where_something_forbids_them(changed, one_size, processes, reason):
    told = against_graphs(CARD, replace(COMPILED, **changed), one_size=one_size, processes=processes)
    assert told is None if reason is None else reason in str(told)
    assert against_graphs(None, replace(COMPILED, **changed), one_size=one_size, processes=processes) is not None


@pytest.mark.parametrize("changed", [{}, {"graphs": False}], ids=str)
def test_a_run_on_a_card_records_its_compiled_model(products, tmp_path, monkeypatch, recwarn, changed):
    """The card is made up: what is compiled is asked for, and not done; it is said in the log.

    That is what finishes a batch, the loss and the model, which alone is recorded.
    """
    modes = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: modes.append(options) or module)
    monkeypatch.setattr(Card, "of", lambda device: CARD)
    experiment = replace(TINY, compile=True, **changed)
    run = TrainingRun(experiment, tmp_path, loop.launch(TINY))
    assert run.replayed == (not changed)
    assert [options.get("mode") for options in modes] == [None, None, "reduce-overhead" if run.replayed else None]
    run.check(lambda _: None)
    said = [str(warning.message) for warning in recwarn]
    assert any(line.startswith("Compiled") and ("--graphs is false" in line) == bool(changed) for line in said)


def test_a_loss_sets_out_for_the_host_at_once_and_is_read_behind_the_next_step(tmp_path, monkeypatch):
    """So the wait is for a step that a device has done while the next one was handed to it."""
    events = []

    class Noted(Readout):
        def __init__(self, numbers):
            super().__init__(numbers)
            self.step = sum(event.startswith("sent") for event in events)
            events.append(f"sent {self.step}")

        def read(self):
            events.append(f"read {self.step}")
            return super().read()

    monkeypatch.setattr(loop, "Readout", Noted)
    train(TINY, tmp_path / "a")  # three steps
    assert events == ["sent 0", "sent 1", "read 0", "sent 2", "read 1", "read 2"]

"""Laws of measuring cost: exact counts, and times beside a base that is timed twice in the same rounds."""

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch

from lape.analysis.cost import Cost, measure, ratio
from lape.errors import UsageError
from lape.report.cost import explanation
from lape.studies.paper import COSTS


@pytest.fixture(scope="module")
def costs() -> dict[str, Cost]:
    joins = ["default", "unshared", "lape-sharing", "lape"]
    heard: list[float] = []
    found = measure("deit_tiny_patch16_224", joins, batch_size=1, rounds=2, report=heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == 1
    return {cost.name: cost for cost in found}


def test_parameters_are_those_of_the_paper(costs: dict[str, Cost]) -> None:
    table, norms, depth = 197 * 192, 2 * 192, 12
    assert {name: cost.parameters for name, cost in costs.items()} == {
        "untouched": 5_717_416,
        "and again": 5_717_416,
        "default": 5_717_416,
        "unshared": 5_717_416 + (depth - 1) * table,
        "lape-sharing": 5_722_024,
        "lape": 5_722_024,
        "lape, folded": 5_717_416 - table,
    }
    assert costs["lape"].parameters - costs["untouched"].parameters == depth * norms


def test_no_join_multiplies_anything_more(costs: dict[str, Cost]) -> None:
    # DeiT-Ti: 1.25 G multiplications with additions an image.
    assert {cost.flops for cost in costs.values()} == {2_507_366_400}


def test_memory_is_the_bases_and_a_ladder(costs: dict[str, Cost]) -> None:
    base, lape = costs["untouched"].training_bytes, costs["lape"].training_bytes
    assert base is not None
    assert lape is not None
    assert costs["and again"].training_bytes == base
    rungs = 12 * 197 * 192 * 4
    # p_l, the last of which no backward pass asks for, and ω_{l+1} where it is not the same tensor.
    assert 11 / 12 * rungs <= lape - base <= 2.1 * rungs
    assert costs["lape, folded"].training_bytes is None


def test_every_contender_is_timed_in_every_round(costs: dict[str, Cost]) -> None:
    assert {len(cost.inference) for cost in costs.values()} == {2}
    assert {len(cost.training) for cost in costs.values()} == {0, 2}
    assert all(seconds > 0 for cost in costs.values() for seconds in cost.training + cost.inference)


def test_a_ratio_is_taken_round_by_round() -> None:
    assert ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]).median == 3.0  # 2, 3 and 4 times the base's


def test_too_few_rounds_and_an_unknown_model_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 2 rounds"):
        measure("deit_tiny_patch16_224", [], batch_size=1, rounds=1)
    with pytest.raises(UsageError, match="device='warp' is not available on this machine"):
        measure("deit_tiny_patch16_224", [], batch_size=1, rounds=2, device="warp")
    with pytest.raises(UsageError, match="Did you mean 'deit_tiny_patch16_224'"):
        measure("deit_tiny_patch16_22", [], batch_size=1, rounds=2)
    with pytest.raises(UsageError, match=r"'bf16' is not a precision.*Did you mean 'bf16-mixed'"):
        measure("deit_tiny_patch16_224", [], batch_size=1, rounds=2, precision="bf16")


def test_a_model_with_a_fixed_table_is_measured_in_the_joins_that_mean_something_in_it() -> None:
    found = {cost.name: cost for cost in measure("t2t_vit_7", None, batch_size=1, rounds=2)}
    assert list(found)[2:] == ["default", "shared", "lape-sharing", "lape", "pvg", "mpvg", "lape, folded"]
    assert found["lape"].parameters - found["untouched"].parameters == 2 * 256 * 7
    assert found["untouched"].training_bytes is not None


@pytest.mark.parametrize("model", ["upernet_vit_adapter_nano", "segmenter_nano_patch8"])
def test_in_a_dense_model_the_transformer_inside_is_measured_and_the_whole_counted(model: str) -> None:
    found = {cost.name: cost for cost in measure(model, ["lape"], batch_size=2, rounds=2)}
    depth, width = 4, 64
    whole = sum(parameter.numel() for parameter in timm.create_model(model).parameters())
    assert found["untouched"].parameters == whole
    assert found["lape"].parameters - whole == depth * 2 * width
    assert found["lape"].flops == found["untouched"].flops > 0
    assert found["lape"].training_bytes > found["untouched"].training_bytes
    assert len(found["lape"].training) == len(found["lape, folded"].inference) == 2


def test_the_papers_cost_stands_beside_that_of_its_models() -> None:
    paper = json.loads((Path(__file__).parent / "paper_results.json").read_text())
    names = {"DeiT-Ti": "deit_tiny_patch16_224", "DeiT-S": "deit_small_patch16_224", "DeiT-B": "deit_base_patch16_224"}
    parameters = {names[name]: (default, lape) for name, default, lape, *_ in paper["table5_parameters"]["rows"]}
    cost = {names[name]: ((m, more), (s, longer)) for name, m, more, s, longer in paper["table6_training_cost"]["rows"]}
    assert {model: tuple(row) for model, row in COSTS.items()} == {m: (parameters[m], *cost[m]) for m in names.values()}
    said = explanation("deit_tiny_patch16_224", 16, 20)
    assert said.endswith(
        "The paper, on V100: 5.717 and 5.722 million parameters (default and lape), 1.0021 of the memory, 1.0049 of "
        "the time of an epoch."
    )
    assert "V100" not in explanation("cct_7_3x1_32", 16, 20)


def test_low_precision_and_compilation_are_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    def compiled(model: torch.nn.Module) -> torch.nn.Module:
        model.head.register_forward_hook(lambda _, __, logits: seen.append((logits.dtype, model.training)))
        return model

    monkeypatch.setattr(torch, "compile", compiled)
    measure("vit_nano_patch2_8", ["lape"], batch_size=1, rounds=2, precision="bf16-mixed", compile=True)
    contenders, turns = 4, 3
    trained = [dtype for dtype, training in seen if training]
    assert trained == [torch.bfloat16] * ((contenders - 1) * turns)
    assert len(seen) - len(trained) == contenders * turns
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}


def test_every_contender_is_compiled_once_for_each_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # Beyond a number of graphs of one class torch computes uncompiled: by itself beyond eight, here beyond two.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=2):
        found = measure("vit_nano_patch2_8", ["lape"], batch_size=1, rounds=2, compile=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert graphs == 2 * (len(found) - 1) - 1  # the untouched model again has its graphs; LaPE folded does not train


def test_position_embeddings_are_measured_with_the_joins_that_mean_something() -> None:
    found = measure("vit_nano_patch2_8", None, batch_size=1, rounds=2, pe=["none", "rope-mixed", "learnable+alibi-2d"])
    names = ["default × none", "default × rope-mixed", "default × learnable+alibi-2d", "lape × learnable+alibi-2d"]
    assert [cost.name for cost in found] == ["untouched", "and again", *names]
    none, mixed, summed, joined = (cost.parameters for cost in found[2:])
    assert (mixed - none, summed - found[0].parameters, joined - summed) == (6 * 48, 0, 6 * 2 * 48)
    with pytest.raises(UsageError, match="has nothing to join"):
        measure("vit_nano_patch2_8", ["lape"], batch_size=1, rounds=2, pe=["rope-axial"])

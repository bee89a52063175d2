"""Laws of many processes: one step of a model that is sharded by blocks is one process's; too late is refused."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from tiny_hosts import host
from torch import Tensor, nn

import lape
from lape.errors import UsageError

# Join, activation checkpointing, and the type in which blocks compute.
CASES = [("lape", False, None), ("unshared", True, None), ("lape", True, torch.bfloat16)]


def _step(model: nn.Module, x: Tensor) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimiser.step()


def _one_of_two(rank: int, folder: str) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    x, results = torch.randn(4, 3, 32, 64, generator=torch.Generator().manual_seed(1)), []
    for join, checkpoints, dtype in CASES:
        model = lape.apply(host(), join).train()
        alone = copy.deepcopy(model)
        _step(alone, x)
        model.set_grad_checkpointing(checkpoints)
        shard: Any = partial(fully_shard, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
        for block in model.blocks:
            shard(block)
        _step(shard(model), x.chunk(2)[rank])
        results.append(
            (alone.state_dict(), get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
        )
    try:
        lape.remove(model)
        lape.apply(model)
    except UsageError as error:
        results.append(str(error))
    if rank == 0:
        torch.save(results, f"{folder}/results")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_step_of_a_model_sharded_by_blocks_is_that_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_one_of_two, (str(tmp_path),), nprocs=2)
    *results, refusal = torch.load(tmp_path / "results")
    for (alone, sharded), (*_, dtype) in zip(results, CASES, strict=True):
        assert alone.keys() == sharded.keys()
        for name, value in sharded.items():
            torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-6 if dtype is None else 1e-3, msg=name)
        learnt = {name: value for name, value in sharded.items() if name.endswith("pe_norm.weight")}
        assert all(not torch.equal(value, torch.ones_like(value)) for value in learnt.values())
    assert "This model is sharded" in refusal
    assert "lape.apply on the plain model first" in refusal


@pytest.mark.parametrize("given", ["inside", "whole"])
def test_a_model_inside_of_ddp_is_refused_and_stays_as_it_was(given: str) -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(host())
        names = [*wrapped.state_dict()]
        with pytest.raises(UsageError, match=r"inside DistributedDataParallel.* lape\.apply on the plain model first"):
            lape.apply(wrapped if given == "whole" else wrapped.module)
        assert [*wrapped.state_dict()] == names
        lape.apply(host())  # another model, beside it
    finally:
        torch.distributed.destroy_process_group()

"""One kernel for a layer's norm and its sum with p_l: interpreted, compiled for a card, and not loaded without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from tiny_hosts import host, images
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import lape
from lape.errors import UsageError
from lape.surgery.operation import positions

HERE = Path(__file__).parent


def test_by_tritons_interpreter_it_computes_what_norm_and_sum_do() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(HERE / "interpreted_kernels.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:]


def test_no_kernel_is_loaded_before_there_is_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "lape.surgery.kernels", raising=False)
    model = lape.apply(host())
    model.train()(images(model)).sum().backward()
    lape.fold(model)(images(model))
    assert positions(model).fused_on == ("cuda",)
    assert "lape.surgery.kernels" not in sys.modules


def test_it_is_switched_off_and_on_for_a_model() -> None:
    model = lape.apply(host())
    assert lape.set_fused(model, False) is model
    assert positions(model).fused_on == ()
    assert positions(lape.set_fused(model)).fused_on == ("cuda",)
    assert positions(model).fused_from == 1
    with pytest.raises(UsageError, match="No join is applied"):
        lape.set_fused(host())


@pytest.mark.parametrize(("channels", "capability"), [(192, 90), (3200, 80)])
def test_the_kernels_compile_for_a_card(
    channels: int, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lape.surgery import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tile = kernels.tile_of(torch.empty(64, 1, channels, device="meta"))
    options = {name: tile.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    for kernel in (kernels.forward_kernel, kernels.backward_kernel):
        once = {name: 1 for name in kernel.arg_names if name.endswith("to_channel")}
        constants = {(kernel.arg_names.index(name),): value for name, value in (tile | once).items()}
        pointers = dict.fromkeys(("tokens", "gain", "shift", "position", "of_tokens", "sums"), "*fp32")
        kinds = (
            pointers | {"gradient": "*bf16", "output": "*bf16", "eps": "fp32"} | dict.fromkeys(tile | once, "constexpr")
        )
        aligned = set(pointers) | {"gradient", "output", "channels"}
        even = [name for name in kernel.arg_names if name in aligned or name.endswith(("to_sample", "to_token"))]
        source = ASTSource(
            kernel,
            {name: kinds.get(name, "i32") for name in kernel.arg_names},
            constants,
            {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even},
        )
        ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
        assert ".v4.b32" in ptx  # four channels of float32 at a time
        assert ".local" not in ptx  # everything that a program holds is in registers

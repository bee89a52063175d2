"""Exported models in onnxruntime, in turns: the default join, LaPE, and LaPE folded; the first one is timed twice.

python benchmarks/export.py --out benchmarks/results/export
"""

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import onnx
import onnxruntime
import torch
from jsonargparse import auto_cli
from turns import file, seconds

import lape
from lape.analysis.cost import ratio

# The join, and whether it is folded.
CONTENDERS = {
    "default": ("default", False),
    "default, again": ("default", False),
    "lape": ("lape", False),
    "lape, folded": ("lape", True),
}


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a file for inference."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def main(
    out: Path | None = None,
    model: str = "deit_tiny_patch16_224",
    batches: Sequence[int] = (1, 8),
    rounds: int = 30,
    threads: int = 1,
) -> None:
    """Print the table

    Args:
        out: Folder for table.md and table.json.
        model: One that lape models lists.
        batches: Images at once.
        rounds: How often all take turns.
        threads: Threads of onnxruntime.
    """
    sessions, sizes, nodes = {}, {}, {}
    with TemporaryDirectory() as folder:
        for name, (join, fold) in CONTENDERS.items():
            torch.manual_seed(0)
            path = lape.export(lape.create_model(model, join=join), Path(folder) / f"{name}.onnx", fold=fold).path
            sessions[name] = session(path, threads)
            sizes[name], nodes[name] = path.stat().st_size, len(onnx.load(path).graph.node)
    times: dict[str, list[float]] = {}
    rows = [["images, exported", "nodes", "MB", "milliseconds", "beside default"]]
    for batch in batches:
        images = torch.randn(batch, *sessions["default"].get_inputs()[0].shape[1:]).numpy()
        runs = {name: partial(one.run, None, {"images": images}) for name, one in sessions.items()}
        taken = seconds(runs, rounds)
        for name, own in taken.items():
            beside = "1" if name == "default" else str(ratio(own, taken["default"]))
            rows.append([f"{batch}, {name}", str(nodes[name]), f"{sizes[name] / 1e6:.1f}"])
            rows[-1] += [f"{1e3 * median(own):.2f}", beside]
            times[f"{batch}, {name}"] = own
    used = {package: version(package) for package in ("onnx", "onnxscript", "onnxruntime")}
    said = (
        f"{model}: medians over {rounds} rounds, and of the ratios in each round with half the distance of their "
        f"quarters; onnxruntime {used['onnxruntime']}, {threads} thread{'s' if threads > 1 else ''}."
    )
    file(out, rows, said, versions=used, seconds=times)


if __name__ == "__main__":
    auto_cli(main)

"""Exported models in onnxruntime, in turns: the default join, LaPE, and LaPE folded; the first one is timed twice.

python benchmarks/export.py --out benchmarks/results/export
"""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import onnx
import onnxruntime
import torch
from jsonargparse import auto_cli

import lape
from lape.cost import ratio
from lape.provenance import provenance

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
    seconds: dict[str, list[float]] = {}
    lines = [
        "| images | exported | nodes | MB | milliseconds | beside default |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for batch in batches:
        images = torch.randn(batch, *sessions["default"].get_inputs()[0].shape[1:]).numpy()
        for turn in range(rounds + 1):  # the first one warms up
            for place in range(len(sessions)):
                name = list(sessions)[(turn + place) % len(sessions)]  # nobody is always after the same neighbour
                start = perf_counter()
                sessions[name].run(None, {"images": images})
                if turn:
                    seconds.setdefault(f"{batch}, {name}", []).append(perf_counter() - start)
        base = seconds[f"{batch}, default"]
        for name in sessions:
            own = seconds[f"{batch}, {name}"]
            beside = "1" if own is base else str(ratio(own, base))
            told = f"{nodes[name]} | {sizes[name] / 1e6:.1f} | {1e3 * median(own):.2f} | {beside}"
            lines.append(f"| {batch} | {name} | {told} |")
    record = provenance()
    record["versions"] |= {package: version(package) for package in ("onnx", "onnxscript", "onnxruntime")}
    said = (
        f"{model}: medians over {rounds} rounds, and of the ratios in each round with half the distance of their "
        f"quarters; onnxruntime {record['versions']['onnxruntime']}, {threads} thread{'s' if threads > 1 else ''}. "
        f"`{record['command']}` at commit {record['commit']}, {record['machine']}"
    )
    text = "\n".join([*lines, "", said]) + "\n"
    print(text, end="")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(text)
        (out / "table.json").write_text(json.dumps({"provenance": record, "seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    auto_cli(main)

"""What LaPE costs in each of the paper's models, eager and compiled, in float32 and bfloat16, beside timm's own model.

Of every model and manner all contenders take turns in one run, and the first is timed twice. What is measured is kept:
the same command goes on.

python benchmarks/speed.py --out benchmarks/results/speed
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from turns import file

from lape.analysis.cost import Cost, Ratio, counted, measure, ratio
from lape.models.registry import create_model
from lape.training.provenance import provenance

MODELS = (
    "deit_tiny_patch16_224", "deit_small_patch16_224", "t2t_vit_7", "ceit_tiny_patch16_224", "vit_7_4_32", "cvt_7_4_32",
    "cct_7_3x1_32", "swin_tiny_patch4_window7_224", "upernet_vit_adapter_tiny", "segmenter_tiny_patch16",
)  # fmt: skip
IMAGES = 128  # whose memory is counted: LaPE's part does not grow with their number
# The contender, that which it stands beside, and the times that are compared.
SHOWN = {
    "again, training": ("and again", "untouched", "training"),
    "default / untouched, training": ("default", "untouched", "training"),
    "lape / default, training": ("lape", "default", "training"),
    "again, inference": ("and again", "untouched", "inference"),
    "default / untouched, inference": ("default", "untouched", "inference"),
    "lape / default, inference": ("lape", "default", "inference"),
    "folded / default, inference": ("lape, folded", "default", "inference"),
}


def ratios(costs: dict[str, Cost]) -> list[Ratio]:
    """The ratios of one model in one manner."""
    return [ratio(getattr(costs[one], times), getattr(costs[base], times)) for one, base, times in SHOWN.values()]


def over_all(found: Sequence[Ratio]) -> str:
    """The median of the ratios of several models, the least and the greatest."""
    medians = [one.median for one in found]
    return f"{median(medians):.3f} ({min(medians):.3f} to {max(medians):.3f})"


def memory(model: str) -> float:
    """What a training step of LaPE holds at its peak beside one of the default join, in 32-true, eager."""
    own, base = (counted(join, create_model(model, join=join), IMAGES).training_bytes for join in ("lape", "default"))
    assert own
    assert base
    return own / base


def main(
    out: Path = Path("speed"),
    models: Sequence[str] = MODELS,
    precisions: Sequence[str] = ("32-true", "bf16-mixed"),
    compiled: Sequence[bool] = (False, True),
    batch_size: int = 8,
    rounds: int = 12,
    device: str = "cpu",
) -> None:
    """Print the table

    Args:
        out: Folder for the table, and one file of times for each model and manner.
        models: Models that lape models lists.
        precisions: Fabric's names of number formats.
        compiled: Whether models are compiled.
        batch_size: Images in a step.
        rounds: How often each contender takes its turn.
        device: What computes: cpu, cuda.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = [["model", "precision", "compiled", "images × rounds", *SHOWN, f"memory of {IMAGES} images, lape / default"]]
    asked = list(product(models, precisions, compiled))
    of_all: dict[bool, list[list[Ratio]]] = {compile: [] for compile in compiled}
    held = {model: f"{memory(model):.5f}" for model in models}
    for model, precision, compile in track(asked, "measuring", console=Console(stderr=True)):
        manner = "compiled" if compile else "eager"
        kept = out / f"{model}-{precision}-{manner}.json"
        if not kept.exists():
            costs = measure(model, ["default", "lape"], batch_size, rounds, device, precision, compile)
            content: dict[str, Any] = {**provenance(), "batch_size": batch_size, "costs": [asdict(c) for c in costs]}
            kept.write_text(json.dumps(content, indent=1) + "\n")
        record = json.loads(kept.read_text())
        costs = {given["name"]: Cost(**given) for given in record["costs"]}
        size = f"{record['batch_size']} × {len(costs['default'].inference)}"
        of_all[compile].append(ratios(costs))
        rows.append([model, precision, "yes" if compile else "no", size, *map(str, ratios(costs)), held[model]])
    said = (
        "Medians over all rounds of the ratios in each round, ± half the distance of their quarters; untouched: timm's "
        "model, or ours where timm has none; again: it is timed twice, which is the noise. The files beside this one "
        "hold each model's times, command and commit."
    )
    file(out, rows, said)
    columns = [[over_all(column) for column in zip(*of_all[compile], strict=True)] for compile in compiled]
    heading = ["", *("compiled" if compile else "eager" for compile in compiled)]
    said = f"{len(models)} models in {' and '.join(precisions)}: medians of the ratios, the least and the greatest."
    file(out / "over_all", [heading, *map(list, zip(SHOWN, *columns, strict=True))], said)


if __name__ == "__main__":
    auto_cli(main)

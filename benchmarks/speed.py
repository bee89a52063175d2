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
from typing import Any

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track

from lape.cost import Cost, measure, ratio
from lape.provenance import provenance

MODELS = (
    "deit_tiny_patch16_224", "deit_small_patch16_224", "t2t_vit_7", "ceit_tiny_patch16_224", "vit_7_4_32", "cvt_7_4_32",
    "cct_7_3x1_32", "swin_tiny_patch4_window7_224", "upernet_vit_adapter_tiny", "segmenter_tiny_patch16",
)  # fmt: skip
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


def cells(costs: dict[str, Cost]) -> list[str]:
    """The ratios of one model in one manner, and that of memory."""
    found = [ratio(getattr(costs[one], times), getattr(costs[base], times)) for one, base, times in SHOWN.values()]
    memory = (costs["lape"].training_bytes or 0) / (costs["default"].training_bytes or 1)
    return [*map(str, found), f"{memory:.4f}"]


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
        out: Folder for table.md, and one file of times for each model and manner.
        models: Models that lape models lists.
        precisions: Fabric's names of number formats.
        compiled: Whether models are compiled.
        batch_size: Images in a step.
        rounds: How often each contender takes its turn.
        device: What computes: cpu, cuda.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = [["model", "precision", "compiled", *SHOWN, "memory, lape / default"]]
    lines.append(["---"] * 3 + ["---:"] * (len(SHOWN) + 1))
    asked = list(product(models, precisions, compiled))
    for model, precision, compile in track(asked, "measuring", console=Console(stderr=True)):
        kept = out / f"{model}-{precision}-{'compiled' if compile else 'eager'}.json"
        if not kept.exists():
            costs = measure(model, ["default", "lape"], batch_size, rounds, device, precision, compile)
            content: dict[str, Any] = {**provenance(), "batch_size": batch_size, "costs": [asdict(c) for c in costs]}
            kept.write_text(json.dumps(content, indent=1) + "\n")
        record = json.loads(kept.read_text())
        costs = {given["name"]: Cost(**given) for given in record["costs"]}
        lines.append([model, precision, "yes" if compile else "no", *cells(costs)])
    made = provenance()
    said = (
        f"{batch_size} images a step; medians over {rounds} rounds of the ratios in each round, ± half the width of "
        "their middle half; untouched: timm's model, or ours where timm has none; again: it is timed twice, which is "
        f"the noise. `{made['command']}` at commit {made['commit']}, {made['machine']}"
    )
    text = "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", said]) + "\n"
    print(text, end="")
    (out / "table.md").write_text(text)


if __name__ == "__main__":
    auto_cli(main)

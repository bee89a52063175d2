"""The core of deformable attention beside that of transformers: time of a forward and backward pass, in turns.

python benchmarks/deformable.py --out benchmarks/results/deformable
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from jsonargparse import auto_cli
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
from turns import file, seconds

from lape.analysis.cost import ratio
from lape.models.deformable import sampled

HEADS, POINTS, DIM = 6, 4, 192
# What ViT-Adapter-Ti does with an image of 512 pixels: tokens look at the pyramid, and the pyramid at tokens.
SHAPES = {"injector": (32 * 32, [(64, 64), (32, 32), (16, 16)]), "extractor": (64 * 64 + 32 * 32 + 16 * 16, [(32, 32)])}


def pass_of(core: Callable[..., Tensor], queries: int, grids: list[tuple[int, int]], device: str) -> Callable[[], None]:
    """One forward and backward pass of a core."""
    torch.manual_seed(0)
    new = {"device": device, "requires_grad": True}
    values = torch.randn(2, sum(h * w for h, w in grids), HEADS, DIM // HEADS, **new)
    places = torch.rand(2, queries, HEADS, len(grids), POINTS, 2, **new)
    weights = torch.rand(2, queries, HEADS, len(grids), POINTS, **new)

    def passed() -> None:
        core(values, grids, places, weights).sum().backward()
        if device != "cpu":
            torch.cuda.synchronize()

    return passed


def main(out: Path | None = None, rounds: int = 15, device: str = "cpu") -> None:
    """Print the table

    Args:
        out: Folder for table.md and table.json.
        rounds: How often all take turns.
        device: What computes.
    """
    theirs = MultiScaleDeformableAttention()

    def of_transformers(values: Tensor, grids: list[tuple[int, int]], places: Tensor, weights: Tensor) -> Tensor:
        return theirs(values, torch.tensor(grids), grids, None, places, weights, 64)

    cores = {"transformers": of_transformers, "transformers, again": of_transformers, "lape": sampled}
    times: dict[str, list[float]] = {}
    rows = [["", "milliseconds", "beside transformers"]]
    for place, (queries, grids) in SHAPES.items():
        taken = seconds({name: pass_of(core, queries, grids, device) for name, core in cores.items()}, rounds)
        for name, own in taken.items():
            beside = "1" if name == "transformers" else str(ratio(own, taken["transformers"]))
            rows.append([f"{place}, {name}", f"{1e3 * median(own):.1f}", beside])
            times[f"{place}, {name}"] = own
    said = f"Medians over {rounds} rounds, and of the ratios in each round with half the distance of their quarters."
    file(out, rows, said, seconds=times)


if __name__ == "__main__":
    auto_cli(main)

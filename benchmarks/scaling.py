"""How much faster two processes train than one, with the same images in a step, and one thread each.

python benchmarks/scaling.py --out benchmarks/results/scaling
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from jsonargparse import auto_cli
from turns import file, in_turns

from lape.analysis.cost import ratio

# Processes, and threads of each.
WAYS = {
    "one process": (1, 1),
    "one process, again": (1, 1),
    "one process of two threads": (1, 2),
    "two processes": (2, 1),
}


def main(
    out: Path | None = None, model: str = "vit_7_4_32", batch_size: int = 64, steps: int = 15, rounds: int = 5
) -> None:
    """Print the table

    Args:
        out: Folder for table.md and table.json.
        model: A model for images of 32 pixels.
        batch_size: Images in a step of all processes together.
        steps: Optimiser steps of a run; its median step counts.
        rounds: How often all take turns.
    """

    def step(processes: int, threads: int) -> float:
        with TemporaryDirectory() as folder:
            settings = {
                "data": "digits", "img_size": 32, "model": model, "batch_size": batch_size, "steps": steps,
                "accelerator": "cpu", "devices": processes, "workers": 0, "out": f"{folder}/run",
            }  # fmt: skip
            typed = [f"--{name}={value}" for name, value in settings.items()]
            subprocess.run(
                [sys.executable, "-m", "lape", "train", *typed],
                check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            )  # fmt: skip
            return json.loads(Path(folder, "run", "result.json").read_text())["seconds_per_step"]

    times = in_turns({name: lambda way=way: step(*way) for name, way in WAYS.items()}, rounds)
    first = times["one process"]
    rows = [["", "milliseconds a step", "images a second", "beside one process"]]
    rows += [
        [name, f"{1e3 * median(own):.0f}", f"{batch_size / median(own):.0f}", str(ratio(own, first))]
        for name, own in times.items()
    ]
    said = (
        f"{model}, LaPE, {batch_size} images a step in all; medians over {rounds} rounds of a run's median step, and "
        "of the ratios in each round with half the distance of their quarters."
    )
    file(out, rows, said, seconds_per_step=times)


if __name__ == "__main__":
    auto_cli(main)

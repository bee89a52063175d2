"""Tables 7 and 8 on Fashion-MNIST: every join with every table, and every stand-in for LN, seed after seed.

What is finished is kept: the same command goes on, and `lape report runs/joins` shows what there is.

python benchmarks/joins.py --out runs/joins
"""

from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console

from lape.experiment import Experiment
from lape.method import JOINS, POSITION_NORMS, TABLES
from lape.report.progress import Display
from lape.studies.comparison import Factors, compare

# The learning rate is the best of 1e-3, 2e-3, 4e-3 and 8e-3 for the default join with a learnable table and seed 0.
BASE = Experiment(
    data="fashion-mnist", train_images=10_000, model="vit_nano_patch4_28", epochs=6, batch_size=64, lr=2e-3,
    weight_decay=0.05, accelerator="cpu", workers=0,
)  # fmt: skip
EMBEDDINGS = (*TABLES, "none", "relative", "relative-layernorm")


def main(out: Path = Path("runs/joins"), seeds: int = 5, jobs: int = 2) -> None:
    """Train what is not finished

    Args:
        out: Folder of the runs.
        seeds: How many.
        jobs: Runs at once.
    """
    for count in range(1, seeds + 1):
        table_7 = Factors([*JOINS], EMBEDDINGS, range(count))
        table_8 = Factors(["lape"], ["learnable"], range(count), [*POSITION_NORMS])
        for asked in (table_7, table_8):
            with Display(Console(stderr=True)) as display:
                compare(BASE, asked, out, jobs, display).raise_missing()


if __name__ == "__main__":
    auto_cli(main)

"""Tables 7 and 8 on Fashion-MNIST: every join with every table, and every stand-in for LN, seed after seed.

What is finished is kept: the same command goes on, and `lape report runs/joins` shows what there is.

python benchmarks/joins.py --out runs/joins
"""

from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path

from jsonargparse import auto_cli

from lape.comparison import plans, read, train_one
from lape.experiment import Experiment
from lape.method import JOINS, POSITION_NORMS, TABLES
from lape.parallel import Done, side_by_side

# The learning rate is the best of 1e-3, 2e-3, 4e-3 and 8e-3 for the default join with a learnable table and seed 0.
BASE = Experiment(
    data="fashion-mnist", train_images=10_000, model="vit_nano_patch4_28", epochs=6, batch_size=64, lr=2e-3,
    weight_decay=0.05, accelerator="cpu", workers=0,
)  # fmt: skip

# (join, table, PE norm)
TABLE_7 = [
    *((join, table, "layernorm") for table in TABLES for join in JOINS if table == "learnable" or join != "unshared"),
    *(("default", embedding, "layernorm") for embedding in ("none", "relative", "relative-layernorm")),
]
TABLE_8 = [("lape", "learnable", norm) for norm in POSITION_NORMS if norm != "layernorm"]  # which Table 7 has


def main(out: Path = Path("runs/joins"), seeds: int = 5, jobs: int = 2) -> None:
    """Train what is not finished

    Args:
        out: Folder of the runs.
        seeds: How many.
        jobs: Runs at once.
    """
    asked = [
        plans(replace(BASE, pe_norm=norm), [join], [pe], [seed], out)
        for seed in range(seeds)
        for join, pe, norm in [*TABLE_7, *TABLE_8]
    ]
    todo = [plan for plan in chain(*asked) if not (plan.folder / "result.json").exists()]
    with closing(side_by_side(train_one, todo, jobs, 1)) as events:
        for event in events:
            if isinstance(event, Done):
                if event.error:
                    raise event.error
                print(f"{event.task.folder.name}: {read(event.task.folder).run.score:.2f} %", flush=True)


if __name__ == "__main__":
    auto_cli(main)

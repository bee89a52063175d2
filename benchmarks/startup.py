"""How long it takes to import lape and to ask for its help, beside the import of torch; that is timed twice.

python benchmarks/startup.py --out benchmarks/results/startup
"""

import subprocess
import sys
from pathlib import Path
from statistics import median

from jsonargparse import auto_cli
from turns import file, seconds

from lape.analysis.cost import ratio

BASE = "import torch"
CODE = {
    "nothing": "",
    BASE: BASE,
    "import torch, again": BASE,
    "import torch, timm": "import torch, timm",
    "import lape": "import lape",
    "from lape import apply": "from lape import apply",
}
HELP = ("--help", "train --help", "compare --help", "analyze --help")


def main(out: Path | None = None, rounds: int = 15) -> None:
    """Print the table

    Args:
        out: Folder for table.md and table.json.
        rounds: How often all take turns.
    """
    commands = {name: [sys.executable, "-c", code] for name, code in CODE.items()}
    commands |= {f"lape {words}": [sys.executable, "-m", "lape", *words.split()] for words in HELP}
    works = {
        name: lambda command=command: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        for name, command in commands.items()
    }
    times = seconds(works, rounds)
    rows = [["a new process", "seconds", "beside import torch"]]
    rows += [[name, f"{median(own):.2f}", str(ratio(own, times[BASE]))] for name, own in times.items()]
    said = (
        f"Medians over {rounds} rounds, and of the ratios in each round with half the distance of their quarters; "
        "Python's own start is part of all."
    )
    file(out, rows, said, seconds=times)


if __name__ == "__main__":
    auto_cli(main)

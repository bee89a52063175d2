"""What SIGKILL costs: a run is killed at random moments, its writes among them, and goes on each time.

    python benchmarks/kills.py --out benchmarks/results/kills

Then the same for one of two processes under torchrun, which starts both again.
"""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jsonargparse import auto_cli

from lape.experiment import Experiment
from lape.files.writing import unfinished, write_json
from lape.training.checkpoints import BEST, LAST, RESULT, SETTINGS, read
from lape.training.curves import CSV
from lape.training.provenance import provenance

# Whatever a checkpoint must carry is in use, and every step writes one.
EXPERIMENT = Experiment(
    model_args={"depth": 2, "embed_dim": 16, "num_heads": 2}, epochs=80, batch_size=64, accumulate=2, shift=1,
    lr=1e-2, clip_grad=1.0, ema=0.9, drop_path=0.3, mixup=0.8, cutmix=1.0, accelerator="cpu", workers=0,
    checkpoint_seconds=0.0,
)  # fmt: skip
TWO = replace(EXPERIMENT, epochs=20, accumulate=1)
LAPE = (sys.executable, "-m", "lape")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lape")

Moment = Callable[[float], bool]  # seconds since its first checkpoint: whether to kill a process here


@dataclass(frozen=True)
class Kill:
    """Where a run was killed: the file that was being written, if any, and the step that its last checkpoint holds."""

    writing: str
    step: int


@contextmanager
def begun(experiment: Experiment, folder: Path, launcher: Sequence[str] = LAPE) -> Iterator[subprocess.Popen[str]]:
    """Start a run, or go on with it; at the end it is told to leave if it is still there."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder.with_suffix(".json")
    write_json(config, experiment.settings())
    process = subprocess.Popen(
        [*launcher, "train", "--config", str(config), "--resume", "--out", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()  # torchrun ends its processes too
        process.wait(60)
        process.stderr.close()


def finished(experiment: Experiment, folder: Path, launcher: Sequence[str] = LAPE) -> Path:
    """Train to the end; returns the folder."""
    with begun(experiment, folder, launcher) as process:
        _, told = process.communicate()
    if not (folder / RESULT).exists():
        raise RuntimeError(told)
    return folder


def looked_at(process: subprocess.Popen[str], folder: Path, moment: Moment, victim: int = 0) -> None:
    """Look at a run, or at one process of it, until it is a moment after the first checkpoint that it writes.

    It stands still at each look: what is then seen of its files is what it leaves if it is killed.
    """
    before, pid = _written(folder / LAST), victim or process.pid
    while _written(folder / LAST) == before:
        _alive(process)
        time.sleep(0.001)
    first = time.monotonic()
    while True:
        _alive(process)
        os.kill(pid, signal.SIGSTOP)
        while _state(pid) not in "Tt":
            time.sleep(0.0001)
        if moment(time.monotonic() - first):
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.0005)


def killed(process: subprocess.Popen[str], folder: Path, moment: Moment, victim: int = 0) -> Kill:
    """Kill a run, or one process of it, at a moment after the first checkpoint that it writes."""
    looked_at(process, folder, moment, victim)
    writing = ", ".join(unfinished(folder).values())
    os.kill(victim or process.pid, signal.SIGKILL)
    return Kill(writing, step(folder))


def after(seconds: float) -> Moment:
    """When that time has passed."""
    return lambda passed: passed >= seconds


def within_a_write(folder: Path, name: str = LAST, share: float = 0.0) -> Moment:
    """When more than that share of a file, beside the one that it replaces, is written."""

    def moment(_: float) -> bool:
        least = share * (folder / name).stat().st_size if share else 0
        return any(part.stat().st_size >= least for part, of in unfinished(folder).items() if of == name)

    return moment


def readable(folder: Path) -> None:
    """See that every file of a run is whole; raises where one is not."""
    for name in (LAST, BEST):
        if (folder / name).exists():
            read(folder / name)
    json.loads((folder / SETTINGS).read_text())
    rows = list(csv.reader((folder / CSV).open()))
    assert all(len(row) == len(rows[0]) for row in rows)


def step(folder: Path) -> int:
    """The step that the last checkpoint of a run holds."""
    return read(folder / LAST)["state"]["step"]


def left(folder: Path) -> dict[str, Any]:
    """Return everything that a finished run leaves, but for times; floats to the last bit."""
    readable(folder)
    found: dict[str, Any] = {"files": sorted(path.name for path in folder.iterdir())}
    for name in (LAST, BEST):
        found[name] = _timeless(read(folder / name))
    result = _timeless(json.loads((folder / RESULT).read_text()))
    found[RESULT] = {name: value for name, value in result.items() if name != "command"}
    found[CSV] = [row[:-1] for row in csv.reader((folder / CSV).open())]
    return found


def _timeless(content: Any) -> Any:
    match content:
        case dict():
            return {
                key: _timeless(value) for key, value in content.items() if key not in ("seconds", "seconds_per_step")
            }
        case list() | tuple():
            return [_timeless(value) for value in content]
        case torch.Tensor():
            return str(content.dtype), tuple(content.shape), content.contiguous().view(-1).view(torch.uint8).tolist()
        case _:
            return content


def ranked(process: subprocess.Popen[str], rank: int) -> int:
    """Return the id of the process with a rank beneath torchrun."""
    while True:
        _alive(process)
        with suppress(OSError):  # it may end while it is looked at
            for children in Path(f"/proc/{process.pid}/task").glob("*/children"):
                for pid in children.read_text().split():
                    if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                        return int(pid)
        time.sleep(0.01)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _alive(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        raise RuntimeError(process.stderr.read() if process.stderr else "")


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def lives(experiment: Experiment, folder: Path, moments: Sequence[Moment]) -> list[Kill]:
    """Kill a run at each of these moments, each in a life of its own, then train to the end."""
    kills: list[Kill] = []
    for moment in moments:
        with begun(experiment, folder) as process:
            kills.append(killed(process, folder, moment))
        readable(folder)
        print(kills[-1], flush=True)
    finished(experiment, folder)
    return kills


def restarts(experiment: Experiment, folder: Path, moments: Sequence[Moment]) -> list[Kill]:
    """Kill the second of two processes under torchrun at each of these moments; torchrun starts both again."""
    launcher = [*TORCHRUN[:-2], f"--max-restarts={len(moments)}", *TORCHRUN[-2:]]
    kills: list[Kill] = []
    with begun(experiment, folder, launcher) as process:
        for moment in moments:
            victim = ranked(process, 1)
            kills.append(killed(process, folder, moment, victim))
            while Path(f"/proc/{victim}").exists():
                _alive(process)
                time.sleep(0.01)
            print(kills[-1], flush=True)
        _, told = process.communicate()
    if not (folder / RESULT).exists():
        raise RuntimeError(told)
    return kills


def main(out: Path | None = None, kills: int = 20, seed: int = 0) -> None:
    """Print the table

    Args:
        out: Folder for table.md.
        kills: How often the run of one process is killed: every fourth time within the write of a checkpoint.
        seed: Decides the moments.
    """
    draw = random.Random(seed)
    with TemporaryDirectory() as room:
        one, two = Path(room) / "one", Path(room) / "two"
        moments = [
            after(draw.uniform(0, 1.5)) if number % 4 else within_a_write(one, share=draw.random())
            for number in range(kills)
        ]
        of_one = lives(EXPERIMENT, one, moments)
        of_two = restarts(TWO, two, [after(draw.uniform(0, 1)) for _ in range(3)])
        alike = {
            "one process": left(one) == left(finished(EXPERIMENT, Path(room) / "one, whole")),
            "one of two under torchrun": left(two) == left(finished(TWO, Path(room) / "two, whole", TORCHRUN)),
        }
    lines = ["| | kill | at step | while writing |", "| --- | ---: | ---: | --- |"]
    for name, some in zip(alike, (of_one, of_two), strict=True):
        lines += [f"| {name} | {number} | {kill.step} | {kill.writing} |" for number, kill in enumerate(some, start=1)]
    lines += ["", "After every kill all files were whole. At the end, beside a run that was left alone:", ""]
    lines += [f"- {name}: {'the same to the last bit' if same else 'NOT THE SAME'}" for name, same in alike.items()]
    record = provenance()
    lines += ["", f"`{record['command']}` at commit {record['commit']}, {record['machine']}"]
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(text)
    if not all(alike.values()):
        sys.exit(1)


if __name__ == "__main__":
    auto_cli(main)

"""Law: what is written is whole or not there, goes through one door and no link, replaces nothing of others'.

The sweep goes over every command that writes. It learns from a first run what the command writes, and then puts links
and files of others in all these places.
"""

import ast
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lape
from lape.cli import command_line as cli
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.files import writing
from lape.training import curves
from lape.training.loop import train

SOURCE = Path(lape.__file__).parent
SMALL = ["--model-args", '{"depth": 1, "embed_dim": 8, "num_heads": 2}', "--batch-size", "400", "--epochs", "1"]
SMALL += ["--accelerator", "cpu"]
TINY = Experiment(
    join="default", model_args={"depth": 1, "embed_dim": 8, "num_heads": 2}, batch_size=400, epochs=1, workers=0,
    accelerator="cpu",
)  # fmt: skip


def tree(folder: Path) -> dict[str, bytes | str]:
    """Return all that a folder holds, by path: contents of files, and where links point."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        else:
            found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else "folder"
    return found


def text(content: str) -> Callable[..., object]:
    return lambda file: file.write(content.encode())


# --- One file


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "dangling"])
def test_a_link_is_replaced_and_not_followed(tmp_path, there):
    victim = tmp_path / "victim"
    if there:
        victim.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(victim)
    writing.write(link, text("new"))
    assert (link.read_text(), link.is_symlink()) == ("new", False)
    assert victim.exists() == there
    assert not there or victim.read_text() == "precious"


def test_the_name_of_an_unfinished_file_is_another_each_time_and_it_is_made_anew(tmp_path, monkeypatch):
    seen = [name for _ in range(2) for name in _part(tmp_path / "a")]
    assert len(set(seen)) == 2
    assert all(name.startswith(".lape-") and name.endswith("-a.part") for name in seen)
    monkeypatch.setattr(writing, "token_hex", lambda count: "0" * 2 * count)
    (part,) = _part(tmp_path / "a")
    (tmp_path / part).symlink_to(tmp_path / "victim")
    with pytest.raises(RunError, match="File exists"):
        writing.write(tmp_path / "a", text("new"))
    assert not (tmp_path / "victim").exists()


def _part(path: Path) -> list[str]:
    seen = []
    writing.write(path, lambda _: seen.extend(part.name for part in writing.unfinished(path.parent)))
    return seen


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_usual_rights(tmp_path, mask):
    before = os.umask(mask)
    try:
        writing.write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, OSError(28, "No space left on device")])
def test_what_was_begun_is_taken_away_whatever_ends_it(tmp_path, error):
    def fails(file):
        file.write(b"half")
        raise error

    (tmp_path / "a").write_text("old")
    with pytest.raises((RunError, KeyboardInterrupt, ZeroDivisionError)):
        writing.write(tmp_path / "a", fails)
    assert tree(tmp_path) == {"a": b"old"}


def test_left_over_files_are_known_and_others_stay(tmp_path):
    part = ".lape-01234567-last.pt.part"
    others = ("last.pt", ".last.pt.part", ".lape-short-last.pt.part", part.upper(), f"{part}s")
    for name in (part, *others):
        (tmp_path / name).write_text("")
    (tmp_path / "victim").write_text("")
    link, folder = (tmp_path / part.replace("0", digit) for digit in "ef")
    link.symlink_to(tmp_path / "victim")
    folder.mkdir()
    assert writing.unfinished(tmp_path) == dict.fromkeys((tmp_path / part, link, folder), "last.pt")
    writing.remove(writing.unfinished(tmp_path))
    assert set(tree(tmp_path)) == {*others, "victim", link.name, folder.name}


# --- Files of others


def test_only_what_bears_the_mark_or_is_empty_may_go(tmp_path):
    (tmp_path / "ours").write_bytes(b"\xff" * 10_000 + writing.MARK.encode() + b"\0" * 10_000)
    (tmp_path / "empty").touch()
    (tmp_path / "theirs").write_text("lape")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    writing.refuse_others(tmp_path / name for name in ("ours", "empty", "nothing", "nowhere/nothing", "ours/nothing"))
    for name in ("theirs", "folder", "link", "dangling", "pipe"):
        with pytest.raises(UsageError, match=f"{name} is there and was not written by lape"):
            writing.refuse_others([tmp_path / "ours", tmp_path / name])


def test_of_several_files_none_is_written_where_one_is_of_others(tmp_path):
    (tmp_path / "b").write_text("theirs")
    with pytest.raises(UsageError, match=f"{tmp_path}/b is there"):
        writing.write_marked({tmp_path / name: writing.MARK for name in "abc"})
    assert tree(tmp_path) == {"b": b"theirs"}


def test_what_would_be_refused_the_next_time_is_a_mistake(tmp_path):
    with pytest.raises(AssertionError, match="would not be known again"):
        writing.write_marked({tmp_path / "a": "no mark"})
    assert not list(tmp_path.iterdir())


def test_a_linked_folder_is_refused_below_the_one_that_was_named(tmp_path):
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "named").symlink_to(tmp_path / "real")
    writing.refuse_links(tmp_path / "named", tmp_path / "named" / "inner" / "new")
    (tmp_path / "real" / "link").symlink_to(tmp_path)
    for path in ("link", "link/new", "link/new/deep"):
        with pytest.raises(UsageError, match="named/link is a link"):
            writing.refuse_links(tmp_path / "named", tmp_path / "named" / path)


# --- One door


WRITES = {
    *("write_text", "write_bytes", "touch", "unlink", "rename", "symlink_to", "hardlink_to", "rmdir", "mkdir"),
    *("tofile", "save", "savefig", "save_file", "TemporaryDirectory"),
}
OF_OS = {
    *("os.open", "os.replace", "os.rename", "os.renames", "os.remove", "os.removedirs", "os.makedirs", "os.link"),
    *("os.symlink", "os.truncate", "os.mkfifo", "os.unlink", "os.rmdir", "os.mkdir"),
}
ELSEWHERE = {
    ("files/reading.py", "os.open"): "to read",
    ("cli/terminal.py", "os.open"): "nowhere, for what nobody reads any more",
    ("training/checkpoints.py", "torch.save"): "into a file that writing has opened",
    ("training/checkpoints.py", "save"): "a checkpoint, as the line above",
    ("training/loop.py", "save"): "a checkpoint",
    ("report/plots.py", "figure.savefig"): "into memory",
    ("report/prediction.py", "sheet.save"): "into memory",
    ("sharing/hub.py", "TemporaryDirectory"): "a folder of a name that nobody knows, for this process alone",
    ("sharing/hub.py", "save"): "into memory",
    ("sharing/positions.py", "save"): "into memory",
    ("report/doctor.py", "torch.save"): "into memory",
    ("sharing/exporting.py", "torch.export.save"): "into memory",
}


def written_by(code: str) -> Iterator[str]:
    """Name the calls in a module that write, make, rename or remove files, but for those of `writing`, and imports."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import(names=names) if any(name.name == "shutil" for name in names):
                yield "shutil"
            case ast.ImportFrom(module="os", names=names):
                yield from (name.name for name in names if f"os.{name.name}" in OF_OS)
            case ast.ImportFrom(module="shutil" | "tempfile", names=names):
                yield from (name.name for name in names if name.name != "TemporaryDirectory")
            case ast.ImportFrom(module="lape.files.writing"):  # it is called by its name, so that it is seen
                yield "lape.files.writing"
            case ast.Call() if _writes(node):
                yield ast.unparse(node.func)


def _writes(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    if last == "open" and name != "os.open":
        parts = (*call.args, *(word.value for word in call.keywords))
        modes = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        return any({*mode} <= {*"rwaxbt+"} and {*mode} & {*"wax+"} for mode in modes)
    if last == "replace" and name != "os.replace":  # of a path: a text's takes two
        return len(call.args) == 1 and not call.keywords
    return (last in WRITES or name in OF_OS) and not name.startswith("writing.")


def test_files_are_written_through_one_door() -> None:
    found = {
        (path.relative_to(SOURCE).as_posix(), name)
        for path in SOURCE.rglob("*.py")
        if path != Path(writing.__file__)
        for name in written_by(path.read_text())
    }
    assert found == set(ELSEWHERE)


@pytest.mark.parametrize(
    "code",
    [
        "open(path, 'w')", "open(path, mode='xb')", "path.open('ab')", "io.open(path, 'r+')", "path.write_text(text)",
        "path.write_bytes(content)", "figure.savefig(path)", "torch.save(state, path)", "picture.save(path, 'png')",
        "save_file(tensors, path)", "safetensors.torch.save_file(tensors, path)", "import shutil",
        "from shutil import rmtree", "from os import replace", "os.replace(part, path)", "part.replace(path)",
        "path.unlink(missing_ok=True)", "os.open(path, flags)", "path.touch()", "path.rename(other)",
        "from tempfile import mkstemp", "array.tofile(path)", "path.mkdir(parents=True)", "os.makedirs(path)",
        "from lape.files.writing import write_text", "from os import unlink",
    ],
)  # fmt: skip
def test_the_guard_sees_what_writes(code: str) -> None:
    assert len(list(written_by(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "open(path)", "path.open('rb')", "Image.open(path, formats=FORMATS)", "name.replace('a', 'b')",
        "replace(way, pe=1)", "writing.write_text(path, text)", "import os, tempfile", "reading.opened(path)",
    ],
)  # fmt: skip
def test_the_guard_lets_the_others_pass(code: str) -> None:
    assert not list(written_by(code))


# --- Every command


@dataclass(frozen=True)
class Inputs:
    """What the commands read."""

    runs: Path  # holds the run `one`
    picture: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Inputs:
    root = tmp_path_factory.mktemp("inputs")
    train(TINY, root / "runs" / "one")
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "picture.png")
    return Inputs(root / "runs", root / "picture.png")


COMMANDS: dict[str, Callable[[Inputs], list[object]]] = {
    "train": lambda _: ["train", *SMALL, "--workers", "0", "--out", "out"],
    "predict": lambda i: ["predict", i.runs / "one", i.picture, i.picture, "--out", "out"],
    "compare": lambda _: [
        *("compare", *SMALL, "--joins", "default", "--pe", "learnable", "--seeds", "1", "--jobs", "1"),
        *("--workers", "0", "--out", "out"),
    ],
    "report": lambda i: ["report", i.runs, "--out", "out/page.html"],
    "sizes": lambda i: ["eval", i.runs / "one", "--sizes", "8", "--accelerator", "cpu", "--out", "out"],
    "cost": lambda _: [
        *("cost", "--model", "vit_nano_patch2_8", "--joins", "default", "--batch-size", "1", "--rounds", "2"),
        *("--out", "out"),
    ],
    "results": lambda i: ["results", i.runs, "--out", "out/results.md"],
    "correlation": lambda i: ["analyze", "correlation", i.runs / "one", "--out", "out"],
    "decomposition": lambda i: ["analyze", "decomposition", i.runs / "one", "--images", "4", "--out", "out"],
    "ONNX": lambda i: ["export", i.runs / "one", "--out", "out/model.onnx"],
    "torch.export": lambda i: ["export", i.runs / "one", "--out", "out/model.pt2"],
    "weights": lambda i: ["export", i.runs / "one", "--out", "out/model.safetensors"],
    "folder": lambda i: ["export", i.runs / "one", "--out", "out"],
}
BARE = {"recipes", "models", "check"}  # these write nothing


@dataclass(frozen=True)
class Ended:
    status: int
    told: str


@pytest.fixture
def called(capfd, monkeypatch) -> Callable[[list[object]], Ended]:
    """Run a command; TensorBoard's file, named by the time, has one name."""
    monkeypatch.setattr(curves, "time", lambda: 1e9)

    def run(words: list[object]) -> Ended:
        status = cli.main(list(map(str, words)))
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return Ended(status, err)

    return run


@pytest.fixture
def rooms(tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Make an empty folder and go there."""

    def enter(name: str) -> Path:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        return tmp_path / name / "out"

    return enter


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def test_every_command_that_writes_is_swept(inputs):
    assert {make(inputs)[0] for make in COMMANDS.values()} == cli.COMMANDS.keys() - BARE


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_not_the_commands_own_is_left_as_it_is(name, inputs, called, rooms, tmp_path):
    words, before = COMMANDS[name](inputs), tree(inputs.runs)
    out = rooms("first")
    assert called(words).status == 0
    written = {place: content for place, content in tree(out).items() if content != "folder"}
    assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert tree(inputs.runs) == before  # a folder of runs is read and not written to
    again = called(words)
    assert again.status == 0 or (name == "train" and "holds a finished run" in again.told)

    victims = tmp_path / "victims"
    for number, content in enumerate(written.values()):  # they bear the mark: a link is none of ours all the same
        _made(victims / str(number)).write_bytes(content)
    untouched = tree(victims)
    for room, target in (("links", lambda number: victims / str(number)), ("dangling", lambda _: victims / "new")):
        out = rooms(room)
        for number, place in enumerate(written):
            path = _made(out / place)
            path.symlink_to(target(number))
            for part in (f".{path.name}.part", f".{path.stem}.part{path.suffix}"):
                path.with_name(part).symlink_to(target(number))
        planted = tree(out)
        assert called(words).status == cli.USAGE
        assert tree(victims) == untouched
        assert tree(out) == planted

    of_runs = [place for place in written if place.startswith("runs/")]  # of compare; those of train stand for them
    for number, place in enumerate(place for place in written if place not in of_runs[1:]):
        out = rooms(f"foreign {number}")
        _made(out / place).write_text("theirs")
        ended = called(words)
        assert ended.status in (cli.USAGE, cli.FAILURE)
        assert place.split("/")[-1] in ended.told or place.split("/")[-2] in ended.told
        assert (out / place).read_text() == "theirs"
        assert place in of_runs or set(tree(out)) == {place, *map(str, Path(place).parents)} - {"."}


# --- A run


@pytest.fixture
def strange(inputs, tmp_path) -> Path:
    """A run of somebody who has put links where it goes on to write."""
    run = Path(shutil.copytree(inputs.runs / "one", tmp_path / "strange"))
    for path in [path for path in run.rglob("*") if path.is_file() and path.name != "experiment.json"]:
        path.rename(victim := _made(tmp_path / "victims" / path.name))
        path.symlink_to(victim)
        path.with_name(f".{path.name}.part").symlink_to(victim)
    (tmp_path / "victims" / "last.pt").unlink()  # it begins anew
    (tmp_path / "victims" / "result.json").unlink()
    return run


def test_a_strangers_run_goes_on_in_its_own_folder(strange, tmp_path):
    victims = tree(tmp_path / "victims")
    train(TINY, strange, resume=True)
    assert tree(tmp_path / "victims") == victims
    assert not any((strange / name).is_symlink() for name in ("last.pt", "best.pt", "curve.csv", "result.json"))


def test_a_strangers_run_that_breaks_lists_its_images_in_its_own_folder(tmp_path):
    broken = [*SMALL, "--workers", "0", "--optimizer", "sgd", "--lr", "1e30", "--warmup-epochs", "0"]
    words = ["train", *broken, "--out", str(tmp_path / "run"), "--resume"]
    assert cli.main(words) == cli.FAILURE
    listed = tmp_path / "run" / "broken-batch.json"
    listed.rename(tmp_path / "victim")
    listed.symlink_to(tmp_path / "victim")
    (tmp_path / "victim").write_text("precious")
    assert cli.main(words) == cli.FAILURE
    assert (tmp_path / "victim").read_text() == "precious"
    assert "images" in json.loads(listed.read_text())


def test_a_run_does_not_go_through_a_linked_folder(inputs, tmp_path):
    run = Path(shutil.copytree(inputs.runs / "one", tmp_path / "run"))
    (run / "result.json").unlink()
    (run / "tensorboard").rename(victims := tmp_path / "victims")
    (victims / "precious").write_text("")
    (run / "tensorboard").symlink_to(victims)
    before = tree(victims)
    with pytest.raises(UsageError, match="run/tensorboard is a link"):
        train(TINY, run, resume=True)
    assert tree(victims) == before


@pytest.mark.parametrize("whole", [True, False], ids=["all runs", "one run"])
def test_a_comparison_does_not_go_through_a_linked_folder(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "victims").mkdir()
    link = Path("out/runs")
    if not whole:
        from lape.studies.comparison import Factors, plans

        (plan,), _ = plans(TINY, Factors(["default"], ["learnable"], [0]), Path("out"))
        link = plan.folder
    _made(link).symlink_to(tmp_path / "victims")
    words = ["compare", *SMALL, "--workers", "0", "--joins", "default", "--pe", "learnable", "--seeds", "1"]
    assert cli.main([*words, "--out", "out"]) == cli.USAGE
    assert f"{link} is a link" in capsys.readouterr().err
    assert not list((tmp_path / "victims").iterdir())


def test_of_the_curves_folder_only_our_own_files_are_removed(inputs, tmp_path):
    run = Path(shutil.copytree(inputs.runs / "one", tmp_path / "run"))
    board = run / "tensorboard"
    (ours,) = board.iterdir()
    part = board / f".lape-01234567-{ours.name}.part"
    theirs = {board / "notes.txt", board / "events.out.tfevents.1.host", board / "deep" / "events.out.tfevents.1.lape"}
    for path in (part, *theirs):
        _made(path).write_text("theirs")
    (board / "events.out.tfevents.2.lape").symlink_to(board / "notes.txt")
    before = ours.rename(ours.with_name("events.out.tfevents.1.lape"))
    Path(run / "result.json").unlink()
    train(TINY, run, resume=True)
    assert not before.exists()
    assert not part.exists()
    assert all(path.read_text() == "theirs" for path in theirs)
    assert (board / "events.out.tfevents.2.lape").is_symlink()
    assert len([path for path in board.iterdir() if not path.is_symlink() and path.name.endswith(".lape")]) == 1


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("name", ["best.pt", "last.pt", "curve.csv", "tensorboard", "result.json", "broken-batch.json"])
def test_a_folder_with_files_of_another_program_is_refused(name, kind, resume, tmp_path):
    {
        "file": lambda path: path.write_text("theirs"),
        "folder": lambda path: path.mkdir(),
        "link": lambda path: path.symlink_to("nowhere"),
    }[kind](tmp_path / name)
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=rf"would replace {name} in .*Give another --out\."):
        train(TINY, tmp_path, resume=resume)
    assert tree(tmp_path) == before


def test_a_folder_with_other_files_may_hold_a_run(tmp_path):
    (tmp_path / "README.md").write_text("theirs")
    train(TINY, tmp_path)
    assert (tmp_path / "result.json").exists()
    assert (tmp_path / "README.md").read_text() == "theirs"

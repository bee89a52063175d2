"""Laws of what is printed: whatever a file, folder, set or class is called, its name can do nothing but be read."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.table import Table
from rich.text import Text

from lape.cli.command_line import main
from lape.cli.terminal import NOBODY_READS, console, open_streams, say
from lape.errors import RunError, UsageError
from lape.experiment import Experiment
from lape.files.characters import as_code, in_markdown, plural, visible
from lape.report.table import Table as Cells

# The title of the window, a wiped screen, another line, a line written over, a command of one byte, text turned round,
# a style of rich's, a table's border, and a formula.
HOSTILE = "\x1b]0;x\x07\x1b[2J\n\r\x9b2K\u202e[red]|$\\frac$"
UNDECODABLE = os.fsdecode(b"\xff\x9b2J")  # in some locales Python gives such bytes back as they are
ACTS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
STYLED = re.compile(r"\x1b\[[\d;]*m")

MODEL = ["--model", "vit_nano_patch4_32", "--model-args", '{"depth": 1, "embed_dim": 8, "num_heads": 2}']
SMALL = [*MODEL, "--img-size", "16", "--batch-size", "2", "--epochs", "1", "--workers", "0", "--accelerator", "cpu"]


def pets(root: Path, *classes: str) -> Path:
    for part in ("train", "val"):
        for number, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            pixels = np.full((16, 16, 3), 200 * number, np.uint8)
            for index in range(2):
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run on a set and classes with hostile names."""
    root = tmp_path_factory.mktemp("run")
    data = pets(root / f"pets{HOSTILE}", f"cat{HOSTILE}", f"dog{HOSTILE}")
    assert main(["train", *SMALL, "--data", str(data), "--out", str(root / "run")]) == 0
    return root / "run"


@pytest.fixture
def room(run, tmp_path, monkeypatch) -> Callable[[str], Path]:
    """Make a folder whose name ends so, with the run and a picture whose names end so."""
    monkeypatch.chdir(tmp_path)

    def made(ending: str) -> Path:
        root = Path(f"room{ending}")
        shutil.copytree(run, root / f"run{ending}")
        Image.new("RGB", (16, 16)).save(root / f"picture{ending}.png")
        return root

    return made


def _only_run(room: Path) -> Path:
    (found,) = room.glob("run*")
    return found


Words = Callable[[Path], list[str]]
COMMANDS: dict[str, tuple[int, Words]] = {
    "eval": (0, lambda room: ["eval", str(_only_run(room)), "--accelerator", "cpu", "--workers", "0"]),
    "predict": (
        0,
        lambda room: ["predict", str(_only_run(room)), *map(str, room.glob("*.png")), "--out", str(room / "out")],
    ),
    "report": (0, lambda room: ["report", str(room)]),
    "results": (0, lambda room: ["results", str(room), "--out", str(room / "results.md")]),
    "analyze": (0, lambda room: ["analyze", "correlation", str(_only_run(room)), "--out", str(room / "out")]),
    "export": (0, lambda room: ["export", str(_only_run(room)), "--out", str(room / "out.safetensors")]),
    "no checkpoint": (1, lambda room: ["eval", *map(str, room.glob("*.png"))]),
    "no file": (1, lambda room: ["eval", str(room / "nothing")]),
    "no data": (2, lambda room: ["train", *SMALL, "--data", str(room)]),
    "no recipe": (2, lambda room: ["train", "--recipe", str(room / "own.yaml")]),
    "no command": (2, lambda room: [str(room)]),
    "no option": (2, lambda room: ["train", f"--{room}"]),
    "no settings": (2, lambda room: ["train", "--config", str(room / "own.yaml")]),
    "no number": (2, lambda room: ["train", "--epochs", str(room)]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_name_acts_on_the_terminal_or_forges_a_line(command, room, capfd):
    expected, words = COMMANDS[command]
    status = main(words(room(HOSTILE)))
    out, err = capfd.readouterr()
    assert status == expected, err
    assert not ACTS.search(out + err), ascii(out + err)
    assert [line for line in (out + err).splitlines() if line.startswith(("[red]", "2K"))] == []
    assert "\\x1b]0;x" in (out + err).replace("\\\\", "\\")  # it is told, some of it as Python writes texts
    if status:
        assert len(err.splitlines()) == 1
        assert err.startswith("lape: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_typed_and_no_text_is_refused_in_a_line_that_names_it(command, room, capfd):
    _, words = COMMANDS[command]
    assert main(words(room(UNDECODABLE))) == 2
    out, err = capfd.readouterr()
    assert re.fullmatch(r"lape: What is typed is Unicode text, and .*room\\udcff\\udc9b2J.* is not\. .*\n", out + err)


BELOW: dict[str, list[str]] = {
    "report": ["report", "."],
    "results": ["results", "."],
    "predict": ["predict", "run", "pictures", "--out", "found"],
}


@pytest.mark.parametrize("command", BELOW)
def test_what_lies_in_a_folder_that_is_named_may_be_called_anything(command, run, room, tmp_path, capfd):
    (tmp_path / "run").symlink_to(run)
    room(UNDECODABLE).rename("pictures")
    assert main(BELOW[command]) == 0
    out, err = capfd.readouterr()
    assert not ACTS.search(out + err), ascii(out + err)
    assert "lape: " not in err
    if command == "predict":
        assert "picture\\udcff\\udc9b2J.png: " in out


def test_in_a_terminal_the_style_is_richs_and_the_names_do_nothing(run, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    shutil.copytree(run, tmp_path / f"run{HOSTILE}")
    assert main(["analyze", "correlation", str(tmp_path / f"run{HOSTILE}"), "--out", str(tmp_path / "out")]) == 0
    out, _ = capfd.readouterr()
    assert STYLED.search(out)
    assert not ACTS.search(STYLED.sub("", out)), ascii(out)


@given(st.text())
def test_what_is_visible_is_one_line_and_all_of_it_can_be_written(text):
    shown = visible(text)
    assert len(shown.splitlines()) <= 1
    assert not ACTS.search(shown)
    shown.encode()
    assert visible(shown) == shown


def test_a_count_agrees_with_its_noun():
    assert [plural(count, "epoch") for count in (0, 1, 2, 1200)] == ["0 epochs", "1 epoch", "2 epochs", "1,200 epochs"]
    assert [plural(count, "class", "classes") for count in (1, 2)] == ["1 class", "2 classes"]


def test_a_console_reads_no_markup_and_keeps_a_name_on_its_line(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    table = Table("name")
    table.add_row(f"string {HOSTILE}")
    table.add_row(Text(f"text {HOSTILE}"))
    console().print(f"printed {HOSTILE}", table)
    out = capsys.readouterr().out
    told = [line for line in out.splitlines() if "[red]" in line]
    assert [word for line in told for word in line.split() if word in ("printed", "string", "text")] == [
        "printed", "string", "text"
    ]  # fmt: skip
    assert len(told) == 3
    assert not ACTS.search(out)


def test_a_warning_is_one_line(capsys, monkeypatch):
    def warn(**_: object) -> None:
        warnings.warn(f"beware of {HOSTILE}\nand more", stacklevel=1)

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        assert main(["recipes", "cifar100/cct_7_3x1_32"]) == 0
        capsys.readouterr()
        warnings.simplefilter("always")
        warn()
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert not ACTS.search(err)


def test_a_bars_terminal_does_not_take_what_goes_into_a_file(monkeypatch):
    from rich.file_proxy import FileProxy

    terminal, file = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", FileProxy(console(stderr=True), file))
    monkeypatch.setattr(sys, "stderr", terminal)
    say("found")
    assert (file.getvalue(), terminal.getvalue()) == ("found\n", "")


def test_a_cell_of_markdown_is_one_cell():
    lines = Cells(("name", "number"), [("a|b\\|c\nd", "1"), ("plain", "2")]).markdown().splitlines()
    assert lines[2] == "| a\\|b\\\\\\|c\\\\nd | 1 |"
    assert [len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<img src=x> & *a* [b](c) `d` ~e~ $f$", r"\<img src=x> \& \*a\* \[b\](c) \`d\` \~e\~ \$f\$"),
        ("vit_nano __init__ _a_", r"vit_nano \_\_init\_\_ \_a\_"),
        ("    # a", r"\# a"),
        ("- a", r"\- a"),
        ("> a", r"\> a"),
        ("12. a", r"12\. a"),
        ("+0.17", "+0.17"),
        ("a\n\n# b", r"a\\n\\n\# b"),
    ],
)
def test_markdown_shows_text_as_it_is(text, expected):
    assert in_markdown(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("a b", "`a b`"), ("a`b", "`` a`b ``"), ("``", "``` `` ```"), ("a\nb", r"`a\nb`")]
)
def test_code_ends_where_it_ends(text, expected):
    assert as_code(text) == expected


FORGED = "x\n\n# forged `<img src=y>` | *z*"


@pytest.mark.parametrize("command", ["report", "results"])
def test_no_name_forges_a_part_of_a_page_in_markdown(command, run, tmp_path):
    folder = _changed(run, tmp_path / FORGED.replace("/", ""), data=FORGED.replace("/", ""))
    record = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(record | {"command": FORGED}))
    page = tmp_path / ("page.html" if command == "report" else "page.md")
    assert main([command, str(folder), "--out", str(page)]) == 0
    text = page.with_suffix(".md").read_text()
    assert "forged" in text
    bare = re.sub(r"(`+) ?.*?[^`]\1(?!`)", "", "\n".join(x for x in text.split("\n") if not x.startswith("    ")))
    assert not re.search(r"^# |(?<!\\)(<img|\*z|`)", bare, flags=re.M), bare


# Bad runs


def _changed(folder: Path, target: Path, **settings: object) -> Path:
    shutil.copytree(folder, target)
    record = json.loads((target / "result.json").read_text())
    record["experiment"] |= settings
    (target / "result.json").write_text(json.dumps(record))
    return target


@pytest.mark.parametrize("command", ["report", "results"])
def test_a_bad_run_is_named_and_costs_no_other(command, run, tmp_path, capsys):
    _changed(run, tmp_path / "good", seed=1)
    _changed(run, tmp_path / "moved", seed=2, recipe=str(tmp_path / "moved.yaml"))
    lone = _changed(run, tmp_path / f"lone{HOSTILE}", seed=3)
    record = json.loads((lone / "result.json").read_text())
    (lone / "result.json").write_text(json.dumps(record | {"machine": "\ud800"}))
    endless = _changed(run, tmp_path / "endless", seed=4)
    (endless / "result.json").write_text("[" * 100_000)
    _changed(run, tmp_path / "long", seed=5, recipe="x" * 5_000)
    _changed(run, tmp_path / "out of range", seed=6, recipe="../recipes/cifar100/cct_7_3x1_32")
    odd = {"versions": ["lape"], "commit": math.inf, "machine": {}, "command": 1}
    for number, (name, value) in enumerate(odd.items(), start=7):
        record = json.loads((_changed(run, tmp_path / f"odd {name}", seed=number) / "result.json").read_text())
        (tmp_path / f"odd {name}" / "result.json").write_text(json.dumps(record | {name: value}))
    assert main([command, str(tmp_path)]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert len(told) == 9, told
    expected = {
        "endless": "too deep",
        "lone\\x1b]0;x": "'\\ud800' in it is no character",
        "moved": "moved.yaml",
        "long": "is not a recipe",
        "out of range": "is not a recipe",
        "odd versions": "its versions are no texts by name",
        **{f"odd {name}": f"its {name} is no text" for name in ("commit", "machine", "command")},
    }
    for folder, reason in expected.items():
        (line,) = (line for line in told if f"/{folder}" in line.partition(": ")[2].partition(": ")[0])
        assert reason in line


@pytest.mark.parametrize("command", ["report", "results"])
def test_bad_runs_alone_are_one_error(command, run, tmp_path, capsys):
    _changed(run, tmp_path / "moved", recipe=str(tmp_path / "moved.yaml"))
    assert main([command, str(tmp_path)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lape: 1 run found, and none can be read.")
    assert "moved.yaml" in last


# Names that are no text, encodings with few characters, readers that leave


def test_settings_and_classes_are_text(tmp_path):
    from lape.data.classes import folder

    with pytest.raises(UsageError, match=r"data_dir is Unicode text, and '.*\\udcff.*' is not"):
        Experiment(data_dir=tmp_path / UNDECODABLE)
    with pytest.raises(UsageError, match=r"A class is named by Unicode text, and the folder '.*\\udcff"):
        folder(pets(tmp_path, "cat", UNDECODABLE))


def test_a_run_in_a_folder_whose_name_is_no_text_is_trained_and_reported(tmp_path, monkeypatch, capsys):
    pets(tmp_path / UNDECODABLE / "pets", "cat", "dog")
    monkeypatch.chdir(tmp_path / UNDECODABLE)
    monkeypatch.setattr(sys, "argv", [f"train{UNDECODABLE}.py"])
    assert main(["train", *SMALL, "--data", "pets", "--out", "run"]) == 0
    assert main(["report", "."]) == 0
    assert "left out" not in capsys.readouterr().err
    assert "train\\udcff" in Path("report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_character_that_the_encoding_has_not_has_a_stand_in(encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert main(["recipes", "cifar100/cct_7_3x1_32"]) == 0
    say("α × 名")
    console().print(Text("名"))
    assert b"\\u03b1" in written.getvalue()
    assert written.getvalue().count(b"\\u540d") == 2


@pytest.mark.parametrize(("encoding", "times"), [("ascii", rb"\xd7"), ("cp1252", b"\xd7")])
def test_bars_too_have_stand_ins(encoding, times, monkeypatch):
    from lape.report.progress import Display
    from lape.report.run import Bar
    from lape.studies.statistics import Combination, Way
    from lape.training.progress import Progress

    monkeypatch.setenv("FORCE_COLOR", "1")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    open_streams()
    now = Progress(1, 2, 5, 10, 9.0, 9.0, 0.5, "measure \u540d", 50.0)
    with Bar(console(stderr=True)) as bar:
        bar(now)
    one = Combination(Way("default"), "learnable", 0)
    with Display(console(stderr=True)) as display:
        display.begins([], [one], 1)
        display.moves(one, now)
        display.bars.refresh()
        display.ends(one, RunError("no \u540d"))
    told = written.getvalue()
    assert b"default " + times + b" learnable, seed 0: failed. no \\u540d" in told
    assert b"epoch 1/2: measure \\u540d 50.00 %" in told
    assert b"\x1b[2K" in told  # it was a bar


def test_in_a_locale_of_ascii_a_command_goes_on(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "lape", "results", "µ名"],
        cwd=tmp_path, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii:strict"}, check=False,
    )  # fmt: skip
    assert ended.returncode == 2
    assert rb"below \xb5\u540d" in ended.stderr
    assert ended.stderr.count(b"\n") == 1


def test_a_reader_that_leaves_ends_a_command_in_silence():
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "lape", "recipes"]
    ended = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (NOBODY_READS, b"")

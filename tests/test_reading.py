"""Law: every file is opened in one place, which waits for no pipe, reads no device and no text beyond a bound."""

import ast
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lape
from lape.errors import RunError
from lape.files import reading

HERE = Path(lape.__file__).parent
OPENING = {"open", "fdopen", "read_text", "read_bytes", "load_file", "safe_open", "fromfile", "loadtxt", "imread"}
LOADING = {"torch.load", "np.load", "numpy.load", "pickle.load", "json.load", "gzip.decompress"}
ELSEWHERE = {
    ("data/pictures.py", "Image.open"): "of what reading opened",
    ("weights.py", "torch.load"): "of what reading opened",
    ("weights.py", "load_file"): "takes a path, which reading has opened before",
    ("sharing/hub.py", "safe_open"): "takes a path, which reading has opened before",
    ("sharing/hub.py", "(Path(room) / name).read_bytes"): "of a folder that it has just made",
    ("files/writing.py", "part.open"): "to write",
    ("files/writing.py", "path.open"): "to write, where there are no links",
    ("cli/terminal.py", "os.open"): "nowhere, for what nobody reads any more",
    ("report/doctor.py", "torch.load"): "of what it has just written to memory",
    ("report/page.py", "resources('lape.report').joinpath('page.html.j2').read_text"): "of the package",
}


def opening(path: Path) -> Iterator[str]:
    """Name the calls in a module that open a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.rpartition(".")[2] in OPENING or name in LOADING:
                yield name


def test_files_are_opened_in_one_place() -> None:
    found = {
        (path.relative_to(HERE).as_posix(), name)
        for path in HERE.rglob("*.py")
        if path != Path(reading.__file__)
        for name in opening(path)
        if name != "reading.opened"
    }
    assert found == set(ELSEWHERE)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the address of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "a pipe": _pipe,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": _socket,
    "a folder": Path.mkdir,
}


@pytest.mark.parametrize("through_link", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_regular_file_is_refused_at_once(kind: str, through_link: bool, tmp_path: Path) -> None:
    path = tmp_path / "x"
    KINDS[kind](path)
    if through_link:
        (tmp_path / "link").symlink_to(path)
        path = tmp_path / "link"
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(RunError, match=f"^{path} is {kind}, and only regular files are read"):
        reading.opened(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_text_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbf" + b"7" * 97)
    assert reading.text(path, 100) == "7" * 97
    assert reading.content(path, 100) == path.read_bytes()
    with path.open("ab") as file:
        file.write(b"7")
    with pytest.raises(RunError, match=f"^{path} is larger than 0 MB"):
        reading.content(path, 100)
    with path.open("wb") as file:
        file.truncate(reading.ANNOTATIONS + 1)  # takes no room on the disk
    with pytest.raises(RunError, match=f"^{path} is larger than 2 GB"):
        reading.values(path, reading.ANNOTATIONS)


def test_what_is_not_there_is_told_by_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        reading.opened(tmp_path / "x")
    (tmp_path / "x").symlink_to(tmp_path / "y")
    with pytest.raises(FileNotFoundError):
        reading.opened(tmp_path / "x")


def test_values_that_lie_too_deep_are_no_values(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"[" * 100_000)
    with pytest.raises(ValueError, match="too deep"):
        reading.values(tmp_path / "x", reading.RECORD)

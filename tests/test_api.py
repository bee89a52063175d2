"""Law: docs/api.md is what the docstrings say; every public name is on it, and every example in a docstring runs."""

import ast
import doctest
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
import torch
from test_hub import stand_in  # noqa: F401  # a Hub on this machine

import lape

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "api.md").read_text()
# What is described as the inside of the project, for those who change it.
INSIDE = {"architecture.md"}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api", DOCS / "api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


api = load()
PUBLIC: dict[str, Any] = dict(api.objects())
FUNCTIONS = [name for name, thing in PUBLIC.items() if inspect.isfunction(thing)]
CALLED = [
    name
    for name, thing in PUBLIC.items()
    if inspect.isfunction(thing) or (inspect.isclass(thing) and not issubclass(thing, Exception))
]


def test_the_page_is_made_from_the_docstrings() -> None:
    assert api.page() == PAGE, "python docs/api.py writes it anew"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_on_the_page(name: str) -> None:
    assert f"### `{name}`\n" in PAGE


def test_all_of_lape_and_of_its_method_is_public() -> None:
    assert {f"lape.{name}" for name in lape.__all__} <= PUBLIC.keys()
    assert {f"lape.analysis.{name}" for name in sys.modules["lape.analysis"].__all__} <= PUBLIC.keys()
    method = sys.modules["lape.method"]
    made_there = {name for name, thing in vars(method).items() if getattr(thing, "__module__", "") == "lape.method"}
    assert {f"lape.method.{name}" for name in made_there if not name.startswith("_")} <= PUBLIC.keys()


def test_what_the_other_pages_name_is_on_this_one() -> None:
    """The name, or what it is an attribute of; or the module of such names."""
    for page in (DOCS.parent / "README.md", *DOCS.glob("*.md")):
        for name in re.findall(r"`(lape(?:\.\w+)+)[`(]", page.read_text()):
            on_the_page = name in api.PUBLIC or any(name == one or name.startswith(f"{one}.") for one in PUBLIC)
            assert on_the_page or page.name in INSIDE, f"{page.name} names {name}"


@pytest.mark.parametrize("name", CALLED)
def test_a_signature_on_the_page_is_pythons(name: str) -> None:
    """Names, kinds and defaults, read from the page as Python reads them."""
    shown = re.search(rf"^### `{re.escape(name)}`\n\n```py\n(.*?)\n```", PAGE, flags=re.M | re.S)
    assert shown is not None
    (function,) = ast.parse(f"def {shown[1]}: ...").body
    assert isinstance(function, ast.FunctionDef)
    written, true = function.args, inspect.signature(PUBLIC[name]).parameters.values()
    assert function.name == name.rpartition(".")[2]
    assert [one.arg for one in written.args] == [one.name for one in true if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert [one.arg for one in written.kwonlyargs] == [one.name for one in true if one.kind is one.KEYWORD_ONLY]
    defaults = [*written.defaults, *(one for one in written.kw_defaults if one is not None)]
    expected = [one.default for one in true if one.default is not one.empty]
    assert len(defaults) == len(expected)
    for shown_default, default in zip(defaults, expected, strict=True):
        if isinstance(shown_default, ast.Constant) and shown_default.value is not ...:
            assert shown_default.value == default


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty folder to be in, and equal random numbers for all."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def failures(name: str) -> int:
    """Run the example of a docstring; what went wrong is printed."""
    text = inspect.getdoc(PUBLIC[name]) or ""
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    assert example.examples or name not in FUNCTIONS, f"{name} has no example"
    assert not any(doctest.SKIP in one.options for one in example.examples)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    return runner.run(example).failed


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "lape.push_to_hub"])
def test_the_example_of_a_docstring_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failures(name) == 0, capsys.readouterr().out


@pytest.mark.usefixtures("surroundings")
def test_the_example_of_the_hub_runs(
    stand_in: tuple[str, Path, list[str]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    address, *_ = stand_in
    hub = huggingface_hub.constants
    monkeypatch.setattr(
        hub, "HUGGINGFACE_CO_URL_TEMPLATE", hub.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.ENDPOINT, address)
    )
    monkeypatch.setattr(hub, "ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert failures("lape.push_to_hub") == 0, capsys.readouterr().out

"""Writes docs/api.md from the docstrings of the public names: python docs/api.py."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

PAGE = Path(__file__).with_suffix(".md")
ROOT = PAGE.parents[1]

# Every module that is meant to be imported from, and what of it; None: all that it defines without an underscore.
PUBLIC: Mapping[str, tuple[str, ...] | None] = {
    "lape": None,
    "lape.method": None,
    "lape.embeddings": None,
    "lape.analysis": None,
    "lape.analysis.cost": ("measure", "Cost", "ratio", "Ratio"),
    "lape.studies.statistics": ("difference",),
    "lape.recipes": ("load", "names", "Recipe"),
    "lape.hosts": ("cut", "register", "class_name", "Rotated", "Stages", "WindowBias", "Embedding", "Files"),
}

HEAD = """# API

Every public name of `lape`, with its signature, arguments and an example. This page is made from the docstrings by
`python docs/api.py`; `help(lape.apply)` shows the same.

```python
import lape

print(lape.__version__, lape.__all__)
```

Two kinds of error are raised on purpose: `lape.UsageError`, a ValueError, where what was asked for breaks a rule, and
`lape.RunError`, a RuntimeError, where a file, a disk or a network did not allow it.

| module | names |
| --- | --- |"""


def names(module: ModuleType) -> tuple[str, ...]:
    """Return the public names of a module: its `__all__`, or what its source defines at its top, in that order."""
    chosen = PUBLIC[module.__name__] or getattr(module, "__all__", None)
    if chosen is not None:
        return tuple(chosen)
    found: list[str] = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign):
            found += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return tuple(name for name in found if not name.startswith("_"))


def objects() -> Iterator[tuple[str, Any]]:
    """Yield every public name, qualified, with what it stands for."""
    for place in PUBLIC:
        module = import_module(place)
        for name in names(module):
            yield f"{place}.{name}", getattr(module, name)


def _names(union: re.Match[str]) -> str:
    return "str | None" if union[1] else "str"


def signature(thing: Any) -> str:
    """Return a signature as a person would write it: types without the modules that they are from."""
    text = str(inspect.signature(thing))
    # What is offered of names in an editor is a list in the docstring.
    text = re.sub(r"(?:typing\.)?Union\[(?:typing\.)?Literal\[[^\]]*\], str(, NoneType)?\]", _names, text)
    text = re.sub(r"<function <lambda> at 0x[0-9a-f]+>|<factory>", "...", text)
    text = re.sub(r"<function (\w+) at 0x[0-9a-f]+>", r"\1", text)
    return re.sub(r"~|\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", text)


def wrapped(name: str, thing: Any) -> str:
    """Return a call as code, one parameter a line where it is long."""
    text = name + signature(thing).removesuffix(" -> None")
    if len(text) <= 100:
        return text
    given, _, result = text.partition(") -> ") if ") -> " in text else (text[:-1], "", "")
    given = re.sub(r"(?<=[(,]) ?(?=\*{0,2}\w+: |\*, )", "\n    ", given)
    return f"{given},\n)" + (f" -> {result}" if result else "")


def fields(kind: type) -> list[tuple[str, str]]:
    """Return the fields that a class says something of: in a string below, in comments above or on the line itself."""
    source = textwrap.dedent(inspect.getsource(kind))
    lines, found = source.splitlines(), []
    (declared,) = ast.parse(source).body
    assert isinstance(declared, ast.ClassDef)
    for node, below in zip(declared.body, [*declared.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above, first = [], node.lineno - 2
            while lines[first].strip().startswith("#"):
                above.insert(0, lines[first].strip().removeprefix("#").strip())
                first -= 1
            behind = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0 :].partition("#")[2].strip()
            said = below.value if isinstance(below, ast.Expr) else None
            text = said.value if isinstance(said, ast.Constant) and isinstance(said.value, str) else ""
            if comment := " ".join(" ".join([*above, behind, text]).split()):
                found.append((node.target.id, comment))
    return found


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class defines itself."""
    own = getattr(kind, "__dataclass_fields__", {})
    for name, member in vars(kind).items():
        shown = name == "__call__" or not (name.startswith("_") or name in own)
        if shown and (inspect.isfunction(member) or isinstance(member, property | cached_property)):
            yield name, member


def called(member: Any) -> str:
    """Return what a method is called with; nothing for a property."""
    return "" if not inspect.isfunction(member) else re.sub(r"\(self(, )?", "(", signature(member))


def first_sentence(thing: Any) -> str:
    """Return the first paragraph of a docstring, in one line."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def prose(text: str) -> str:
    """Return the sections of a docstring as Markdown."""
    parts = re.split(r"^(Args|Returns|Raises|Warns|Example):\n", text, flags=re.M)
    written = [parts[0].strip()]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        body = textwrap.dedent(body).strip()
        if title == "Example":
            written.append(f"```pycon\n{body}\n```")
        elif title == "Returns":
            written.append(f"Returns: {' '.join(body.split())}")
        else:
            entries = re.split(r"^(?=\*{0,2}\w+: )", body, flags=re.M)
            items = [re.sub(r"^(\w+): ", r"`\1`: ", " ".join(entry.split())) for entry in entries if entry.strip()]
            title = "" if title == "Args" else f"{title}:\n\n"
            written.append(title + "\n".join(f"- {item}" for item in items))
    return "\n\n".join(written)


def entry(name: str, thing: Any) -> str:
    """Return the part of the page about one name."""
    head = f"### `{name}`\n\n"
    if isinstance(thing, Mapping):
        return f"{head}Keys: {', '.join(f'`{key}`' for key in thing)}.\n"
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return f"{head}`{thing!r}`\n"
    short = name.rpartition(".")[2]
    written = [head.strip()]
    if not (inspect.isclass(thing) and issubclass(thing, Exception)):
        written.append(f"```py\n{wrapped(short, thing)}\n```")
    text = inspect.getdoc(thing) or ""
    if (dataclasses.is_dataclass(thing) or hasattr(thing, "_fields")) and "Args:\n" not in text:
        listed = "".join(f"    {field}: {comment}\n" for field, comment in fields(thing))
        before, mark, after = text.partition("Example:\n")
        text = f"{before}\n" + (f"Args:\n{listed}\n" if listed else "") + mark + after
    written.append(prose(text))
    if inspect.isclass(thing):
        members = [f"- `.{member}{called(of)}`: {first_sentence(of)}" for member, of in methods(thing)]
        written += ["\n".join(members)] if members else []
    return "\n\n".join(written) + "\n"


def page() -> str:
    """Return the whole page."""
    modules = {place: import_module(place) for place in PUBLIC}
    rows = [
        f"| [{place}](#{place.replace('.', '')}) | {', '.join(f'`{name}`' for name in names(module))} |"
        for place, module in modules.items()
    ]
    written = ["\n".join([HEAD, *rows]) + "\n"]
    for place, module in modules.items():
        written.append(f"## {place}\n\n{first_sentence(module)}\n")
        written += [entry(f"{place}.{name}", getattr(module, name)) for name in names(module)]
    return "\n".join(written)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

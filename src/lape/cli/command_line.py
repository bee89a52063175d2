"""The command line: what is typed becomes the arguments of a command, and an error a line and an exit status."""

import argparse
import dataclasses
import inspect
import json
import re
import sys
import typing
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lape.cli.commands import COMMANDS, Command, first_process, folder_of
from lape.cli.terminal import close_streams, open_streams, say
from lape.errors import RunError, UsageError, lacking
from lape.experiment import DataAndModel, Experiment
from lape.extras import EXTRAS, require
from lape.files import reading
from lape.files.characters import LONE
from lape.names import CHOICES

USAGE, FAILURE, INTERRUPTED = 2, 1, 130  # exit statuses

_NAME = re.compile(r"[^\W\d][\w+./-]*")  # what YAML reads as it is typed, unlike 0x10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, return its exit status: 0; 1 for a failure; 2 for a wrong request; 128 + a signal's number."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    open_streams()
    warnings.showwarning = lambda message, *_: say(f"lape: {' '.join(str(message).splitlines())}", error=True)
    for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.simplefilter("ignore", category)
    warnings.filterwarnings("ignore", module="lightning_fabric|torch|timm")
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")  # such pictures are refused in lape.data.pictures
    status = _status(words)
    close_streams()
    return status


def _status(words: list[str]) -> int:
    try:
        return _run(words)
    except UsageError as error:
        if first_process():  # all refuse the same
            say(f"lape: {error}", error=True)
        return USAGE
    except RunError as error:
        say(f"lape: {error}", error=True)
    except UnicodeEncodeError as error:  # a name with bytes that are no UTF-8, where text alone can be
        say(f"lape: {error.object} cannot be written here: it is not Unicode text. Choose another name.", error=True)
    except (OSError, MemoryError, RuntimeError) as error:
        if lack := lacking(error):
            say(f"lape: {lack}", error=True)
        elif isinstance(error, OSError):
            say(f"lape: {error.filename or 'a file'}: {error.strerror or error}.", error=True)
        else:
            raise
    except KeyboardInterrupt:
        say("lape: stopped.", error=True)
        return INTERRUPTED
    except SystemExit as error:
        message = getattr(error, "message", None)  # lape.training.interruption.Stopped has one
        if message and first_process():
            say(f"lape: {message}", error=True)
        return error.code if isinstance(error.code, int) else FAILURE
    return FAILURE


def _run(words: list[str]) -> int:
    command, arguments = parsed(words or ["--help"])
    require(f"lape {words[0]}", *(package for extra in command.extras for package in EXTRAS[extra]))
    command.run(**arguments)
    return 0


def parsed(words: list[str]) -> tuple[Command, dict[str, Any]]:
    """Return the command that is asked for and its arguments; raises UsageError for what there is not."""
    if words[0] == "help":
        words = [*words[1:2], "--help"]
    name = words[0]
    if lone := next(filter(LONE.search, words), None):
        raise UsageError(f"What is typed is Unicode text, and {lone} is not. Rename it, or name the folder it is in.")
    if name in COMMANDS:
        words = [name, *_with_recipe(name, _with_kept_settings(_normal(name, words[1:])))]
        for word in words:
            option, _, value = word.removeprefix("--").partition("=")
            _refuse_misspelt(option, [one.strip('"') for one in value.strip("[]").split(",")])
    elif not name.startswith("-"):
        near = get_close_matches(name, COMMANDS, n=1)
        raise UsageError(f"{name!r} is no command{_did_you_mean(near)}. There are {', '.join(COMMANDS)}.")
    from lape.cli.parsing import parser_of

    try:
        chosen = parser_of({name: COMMANDS[name]} if name in COMMANDS else COMMANDS).parse_args(words)
    except argparse.ArgumentError as error:
        raise UsageError(f"{_refusal(name, words, str(error))} (lape {name} --help says more)") from error
    arguments = {key: value for key, value in vars(chosen[name]).items() if key != "config"}
    return COMMANDS[name], _arguments(COMMANDS[name], arguments)


def _arguments(command: Command, typed: dict[str, Any]) -> dict[str, Any]:
    """Gather the settings of a run into an Experiment where the command takes one; refuse misspelt names."""
    for option, value in typed.items():
        _refuse_misspelt(option, value if isinstance(value, list) else [value])
    parameters = inspect.signature(command.run).parameters
    if "experiment" not in parameters:
        return typed
    settings = {field.name for field in dataclasses.fields(Experiment)} - parameters.keys()
    others = {name: value for name, value in typed.items() if name not in settings}
    return others | {"experiment": Experiment(**{name: typed[name] for name in settings & typed.keys()})}


def _hints(command: Command) -> dict[str, Any]:
    """The types of a command's options."""
    hints = {
        name: hint for name, hint in typing.get_type_hints(command.run).items() if name not in ("experiment", "return")
    }
    for section, skipped in command.sections:
        hints |= {name: hint for name, hint in typing.get_type_hints(section).items() if name not in skipped}
    return hints


def _refuse_misspelt(option: str, names: Sequence[Any]) -> None:
    """Raise UsageError for a name that is in no table, of an option that takes one of a table, or none."""
    if option in CHOICES:
        for name in names:
            if name not in (None, "", "null"):
                CHOICES[option].refuse_other(str(name))


# What jsonargparse says of a value that has not the type of its option, of an option without one, of a missing option.
_WRONG = re.compile(r'Parser key "([\w.]+)":(?:.*(?:Given|Got) value: (.*))?', re.DOTALL)
_WITHOUT = re.compile(r"argument --(\w+): expected one argument")
_MISSING = re.compile(r"arguments are required: (?:\w+\.)?(\w+)")


def _refusal(name: str, words: list[str], told: str) -> str:
    """Say in words what is wrong with what is typed, or stands in a file, by what jsonargparse told."""
    hints = _hints(COMMANDS[name]) if name in COMMANDS else {}
    files = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    if missing := _MISSING.search(told):
        return f"lape {name} needs --{missing[1]}"
    if (without := _WITHOUT.search(told)) and without[1] in hints:
        return f"--{without[1]} takes {_in_words(hints[without[1]])}; nothing was given"
    if (wrong := _WRONG.search(told)) and (option := wrong[1].partition(".")[0]) in hints:
        typed = [word.partition("=")[2] for word in words if word.startswith(f"--{option}=")]
        in_files = f"{' '.join((wrong[2] or 'another value').split())}, in {' or '.join(files)},"
        value = (typed[-1].strip("[]") or "nothing") if typed else in_files
        return f"--{option} takes {_in_words(hints[option])}; {value} was given"
    place = " or in ".join(["typed", *files]) + ": " if files else ""
    return place + " ".join(told.split())


_WORDS: dict[Any, tuple[str, str]] = {  # of one, and of several
    bool: ("true or false", "true or false several times"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("a word", "words"),
    Path: ("a path", "paths"),
}
_COUNTS = {1: "one", 2: "two", 3: "three"}


def _in_words(hint: Any) -> str:
    """Say what an option of a type takes: "a whole number"."""
    inner = [one for one in typing.get_args(hint) if one not in (type(None), Ellipsis)]
    kind = typing.get_origin(hint)
    if hint in _WORDS:
        return _WORDS[hint][0]
    if kind is list or (kind is tuple and len(inner) == 1):
        return f"{_WORDS[inner[0]][1]}, as A,B,C"
    if kind is tuple:
        return f"{_COUNTS[len(inner)]} {_WORDS[inner[0]][1]}, as {','.join('ABC'[: len(inner)])}"
    if kind is dict:
        return """names with their values, as '{"depth": 6}'"""
    return " or ".join(map(_in_words, inner))


def _takes_several(hint: Any) -> bool:
    return typing.get_origin(hint) in (list, tuple) or any(map(_takes_several, typing.get_args(hint)))


def _normal(name: str, words: list[str]) -> list[str]:
    """Rewrite what a person types into what jsonargparse reads.

    `--joins default lape` and `--joins default,lape` become `--joins=[default,lape]`, `--resume` becomes
    `--resume=true`, and dashes inside names underscores. Raises UsageError for an option that there is not.
    """
    hints = _hints(COMMANDS[name])
    known = {*hints, "config", "print_config", "help"}
    normal: list[str] = []
    rest = list(words)
    places = [place for place, word in enumerate(rest) if word.startswith("-")]
    bare, rest = rest[: min(places, default=len(rest))], rest[min(places, default=len(rest)) :]
    *single, last = COMMANDS[name].bare or ("",)
    for option, word in zip(single, bare, strict=False):
        normal.append(f"--{option}={word}")
    if bare[len(single) :]:
        rest = [*([f"--{last}"] if last else []), *bare[len(single) :], *rest]
    while rest:
        word = rest.pop(0)
        if word == "-h":
            normal.append(word)
            continue
        if not word.startswith("--"):
            raise UsageError(
                f"{word!r} belongs to no option of lape {name}. Put the option before it: lape {name} --help lists all."
            )
        option, equals, value = word[2:].partition("=")
        option = option.replace("-", "_")
        if option.partition(".")[0] not in known:
            near = get_close_matches(option, known, n=1)
            meant = _did_you_mean([f"--{other}" for other in near])
            raise UsageError(f"lape {name} has no option --{option}{meant}. lape {name} --help lists them.")
        hint = hints.get(option)
        if bool in (hint, *typing.get_args(hint)) and not equals and (not rest or rest[0].startswith("-")):
            normal.append(f"--{option}=true")
        elif _takes_several(hint):
            items = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                items.append(rest.pop(0))
            if typing.get_args(hint) == (Path,):  # a name of a file is taken as it is
                items = [json.dumps(item) for item in items]
            else:
                items = [item.strip() for part in items for item in part.strip("[]").split(",") if item.strip()]
                if not _takes_numbers(hint):
                    items = [item if _NAME.fullmatch(item) else json.dumps(item) for item in items]
            normal.append(f"--{option}=[{','.join(items)}]")
        else:
            if not equals and rest and not rest[0].startswith("--"):
                equals, value = "=", rest.pop(0)
            normal.append(f"--{option}{equals}{value}")
        if _takes_numbers(hint):
            _refuse_misreading(normal[-1])
    return normal


def _takes_numbers(hint: Any) -> bool:
    return hint in (int, float, Any) or any(map(_takes_numbers, typing.get_args(hint)))


def _refuse_misreading(word: str) -> None:
    """Raise UsageError for an option whose value, which is read as YAML, stands for another one than it looks like."""
    import yaml

    from lape.recipes import Misreading, refuse_misreadings, refuse_monsters

    option, _, value = word.partition("=")
    try:
        refuse_monsters(value)
        refuse_misreadings(value)
    except Misreading as error:
        raise UsageError(f"{option} {value}: {str(error).partition(': ')[2]}.") from error
    except yaml.YAMLError:
        return  # told when it is read


def _with_kept_settings(words: list[str]) -> list[str]:
    """Let `lape train --resume --out FOLDER` take its settings from the folder; raises UsageError where it has none."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--out", type=Path)
    options.add_argument("--config", type=Path, action="append", default=[])
    options.add_argument("--resume", default="false")
    options.add_argument("--seed", default="0")
    seen, others = options.parse_known_args(words)
    for config in seen.config:
        _refuse_unsound(config)
    if seen.resume != "true" or seen.config:
        return words
    typed = {word[2:].partition("=")[0].partition(".")[0] for word in others}
    named = typed & ({field.name for field in dataclasses.fields(DataAndModel)} - {"weights"})
    folder = seen.out
    if folder is None and not named and seen.seed.isdecimal():
        folder = folder_of(Experiment(seed=int(seen.seed)))
    if folder and (kept := folder / "experiment.json").exists():
        from lape.training.checkpoints import kept_settings

        _refuse_opening(kept, kept_settings(kept), words)
        return [f"--config={kept}", *words]
    if folder and not named:
        raise UsageError(
            f"{folder} holds no run to go on with (no experiment.json). Name the folder of a run by --out; or say what "
            "is to be trained, as with --data, and a new run begins there."
        )
    return words


def _refuse_opening(kept: Path, settings: dict[str, Any], words: list[str]) -> None:
    """Raise UsageError where a run's own settings name what would be fetched or opened: its user says that again."""
    begun = (kept.parent / "last.pt").exists()  # then the weights that it began with are not needed
    for name in ("teacher", "teacher_weights", *(() if begun else ("weights",))):
        value = settings.get(name)
        if value and not any(word.startswith(f"--{name}=") for word in words):
            raise UsageError(
                f"{kept} names {name} {value}, and what a file names is not fetched or opened unasked. If it is yours, "
                f"add --{name} {value}"
            )


def _refuse_unsound(config: Path) -> None:
    """Raise UsageError for a file of settings that could not be read in time, or would be read otherwise than it looks.

    What else it is, is told later.
    """
    import yaml

    from lape.recipes import refuse_misreadings, refuse_monsters

    try:
        text = reading.text(config, reading.SETTINGS)
        refuse_monsters(text)
        refuse_misreadings(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{config} cannot be read as settings ({' '.join(str(error).split())}).") from error


def _with_recipe(name: str, words: list[str]) -> list[str]:
    """Put a recipe's settings before what is typed; `--data FOLDER` says where its set lies."""
    from lape import recipes
    from lape.data import SETS

    typed = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    if "recipe" not in typed and "recipe" in _hints(COMMANDS[name]):
        fitting = _for_own_pictures(typed)
        words, typed = [*(f"--{option}={value}" for option, value in fitting.items()), *words], fitting | typed
    if "recipe" not in typed:
        return words
    settings = dict(recipes.load(typed["recipe"]).settings)
    if typed.get("join", settings.get("join")) != settings.get("join"):
        settings.pop("start", None)  # a start is that of a join
    if "data" in settings and typed.get("data", settings["data"]) not in SETS:
        words = [word.replace("--data=", "--data_dir=", 1) if word.startswith("--data=") else word for word in words]
    known = _hints(COMMANDS[name])
    return [*_normal(name, [_typed(*setting) for setting in settings.items() if setting[0] in known]), *words]


def _for_own_pictures(typed: dict[str, str]) -> dict[str, str]:
    """Return what fits a folder of classes where nothing else is typed: a recipe, and the model of weights by name."""
    from lape.data.sources import holds_classes

    gone_on_with = typed.get("resume") == "true" and "config" in typed  # by all of its own settings
    if gone_on_with or "data" not in typed or not holds_classes(typed["data"]):
        return {}
    weights = typed.get("weights")
    if weights in (None, "null"):
        return {"recipe": "own-pictures/scratch"}
    fitting = {"recipe": "own-pictures/finetune"}
    if not Path(weights).exists():  # a name of timm's is that of a model, and behind a point of one of its weights
        fitting["model"] = weights.removeprefix("timm/").partition(".")[0]
    return fitting


def _typed(name: str, value: Any) -> str:
    """Write a setting as a person types it."""
    return f"--{name}=" + (",".join(map(str, value)) if isinstance(value, list) else json.dumps(value).strip('"'))


def _did_you_mean(near: Sequence[str]) -> str:
    return f" (did you mean {near[0]}?)" if near else ""

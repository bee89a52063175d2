"""The rows of the paper's tables as experiments: what to type, what to expect, which choices were open.

Imports no torch. A recipe is a YAML file, of this package or of the user's. `extends` names another one, whose settings
it takes first.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from lape.errors import UsageError, choose
from lape.experiment import Experiment, parse
from lape.files import reading
from lape.tasks.measures import TITLES

HERE = Path(__file__).parent
SHARED = "families"  # parts of recipes, no rows
PARTS = ("extends", "paper", "expected", "at_epoch_100", "command", "hardware", "open", "settings")

DEEPEST = 50  # parts of YAML within each other
YOURS = (
    "join",
    "seed",
    "weights",
    "accumulate",
    "grad_checkpointing",
    "compile",
    "tf32",
)  # it stays the same experiment


class Numbers(yaml.SafeLoader):
    """Reads 1e-3 as the number that it is in YAML 1.2, in Python and on the command line; YAML 1.1 has a word there."""


Numbers.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


@dataclass(frozen=True)
class Recipe:
    """An experiment of the paper.

    Example:
        >>> from lape import recipes
        >>> recipes.load("imagenet/swin_tiny_patch4_window7_224_learnable").expected
        {'accuracy': {'default': 80.92, 'lape': 81.25}}
    """

    name: str  # as `load` takes it
    settings: Mapping[str, Any]  # of `lape train`, where they differ from its defaults
    paper: Mapping[str, Any] = field(default_factory=dict)  # table, model, pe; where there are, seeds and the start
    expected: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by measure and join, in percent
    at_epoch_100: Mapping[str, float] = field(default_factory=dict)  # accuracy by join, in percent
    command: str = ""  # what runs it
    hardware: str = ""  # of the paper, and how long it took where that is known
    open: tuple[str, ...] = ()  # choices that its source leaves open, a sentence each

    @property
    def table(self) -> float:
        """The number of the paper's table that it is a row of; infinite where it is of none."""
        return self.paper.get("table", math.inf)

    def experiment(self) -> Experiment:
        """Return the experiment as the recipe has it."""
        return Experiment.of({**self.settings, "recipe": self.name})

    def changed(self, experiment: Experiment) -> dict[str, Any]:
        """Return the settings that decide a result and that an experiment has otherwise, but for YOURS."""
        own, asked = self.experiment().identity(), experiment.identity()
        changed = {name: value for name, value in asked.items() if value != own[name] and name not in YOURS}
        return changed | ({"weights": "none"} if "start" in self.paper and not experiment.weights else {})


def names() -> list[str]:
    """Return the names of all recipes, in the order of the paper's tables; after them those of no table.

    Example:
        >>> from lape import recipes
        >>> "cifar100/cct_7_3x1_32" in recipes.names()
        True
    """
    files = [path.relative_to(HERE).with_suffix("").as_posix() for path in HERE.rglob("*.yaml")]
    rows = [load(name) for name in files if not name.startswith(f"{SHARED}/")]
    return [recipe.name for recipe in sorted(rows, key=lambda recipe: (recipe.table, recipe.name))]


def load(name: str, below: tuple[str, ...] = ()) -> Recipe:
    """Return a recipe by its name, or from a YAML file of your own.

    Args:
        name: One of `names()`, or a path that ends in .yaml or .yml.
        below: The recipes that extend this one; not for callers.

    Raises:
        UsageError: For a name that does not exist (the message names the nearest), and for a file that is not a recipe.

    Example:
        >>> from lape import recipes
        >>> recipe = recipes.load("cifar100/cct_7_3x1_32")
        >>> recipe.experiment().model, recipe.table
        ('cct_7_3x1_32', 2)
    """
    if name in below:
        raise UsageError(f"Recipes extend each other in a circle: {' -> '.join((*below, name))}. Break it.")
    own = Path(name)
    if own.suffix in (".yaml", ".yml"):
        return _recipe(name, _read(own), own, below)
    path = HERE / f"{name}.yaml"
    if path not in HERE.rglob("*.yaml"):  # a name is looked up, whatever a file system would make of it
        choose(dict.fromkeys(names()), name, "a recipe (lape recipes lists them; a file of your own ends in .yaml)")
    return _recipe(name, _read(path), path, below)


def _recipe(name: str, parts: dict[str, Any], path: Path, below: tuple[str, ...]) -> Recipe:
    """Join a file's parts with what it extends: settings under its own, open choices before its own."""
    above = Recipe("", {})
    if "extends" in parts:
        try:
            above = load(parts.pop("extends"), (*below, name))
        except UsageError as error:
            raise UsageError(f"{path} extends another: {error}") from error
    settings = {**above.settings, **parts.pop("settings", {})}
    options = {option.name for option in dataclasses.fields(Experiment)} - {"recipe"}
    for setting in settings:
        if setting not in options:
            near = get_close_matches(str(setting), options, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UsageError(f"{path}: there is no setting {setting!r}{hint}. `lape train --help` lists them.")
    try:
        Experiment.of(settings)
        json.dumps([settings, parts])
    except (TypeError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise UsageError(f"{path}: {reason}. Write it as the shipped recipes do.") from error
    chosen = tuple(" ".join(text.split()) for text in parts.pop("open", []))
    try:
        recipe = parse(Recipe, parts, name=name, settings=settings, open=(*above.open, *chosen))
        if not isinstance(recipe.table, int | float):
            raise UsageError(f"the table of its paper is a number, not {recipe.table!r}")
        return recipe
    except UsageError as error:
        raise UsageError(f"{path} is no recipe: {error}.") from error


def refuse_monsters(text: str) -> None:
    """Raise YAMLError for YAML of a few lines that would take more time or memory than there is.

    A part may stand for others (an alias), and those for others; and parts within parts are read in quadratic time.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            what = f"more than {DEEPEST} parts within each other" if depth > DEEPEST else f"an alias, *{event.anchor}"
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: {what}; write out what is meant")


# Plain words that YAML 1.1 reads as another number than was typed: 010 as 8, 1:30 as 90.
OCTAL = re.compile(r"[-+]?0[0-7]+")
SEXAGESIMAL = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")


class Misreading(yaml.YAMLError):
    """A text would be read otherwise than it looks."""


def refuse_misreadings(text: str) -> None:
    """Raise Misreading for YAML that would be read otherwise than it looks: a key twice, a number in eights or sixties.

    What `refuse_monsters` refuses must have been refused before.
    """
    waiting = [yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if (name := str(key.value)) in keys:
                    raise Misreading(f"line {key.start_mark.line + 1}: {name} is set twice; leave one")
                keys.add(name)
                waiting += (key, value)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.ScalarNode) and not node.style:  # it is not in quotes
            word = node.value.replace("_", "")
            if SEXAGESIMAL.fullmatch(word) or (OCTAL.fullmatch(word) and int(word) != int(word, 8)):
                line = node.start_mark.line + 1
                raise Misreading(f"line {line}: {node.value} would be read as {yaml.safe_load(word)}; write the number")


def _read(path: Path) -> dict[str, Any]:
    try:
        text = reading.text(path, reading.SETTINGS)
        refuse_monsters(text)
        refuse_misreadings(text)
        parts = yaml.load(text, Numbers)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path} cannot be read as a recipe ({reason}). It is a YAML file.") from error
    kinds = {"extends": str, "command": str, "hardware": str, "open": list}
    sound = isinstance(parts, dict) and all(isinstance(v, kinds.get(k, dict)) for k, v in parts.items() if k in PARTS)
    if not sound:
        raise UsageError(f"{path} is no recipe: it maps {', '.join(PARTS)} to what they are; see the shipped ones.")
    if foreign := [str(part) for part in parts if part not in PARTS]:
        raise UsageError(f"{path}: a recipe has no part {foreign[0]!r}, only {', '.join(PARTS)}. Mend its name.")
    expected, measures = parts.get("expected", {}), list(TITLES.values())
    if not all(isinstance(by_join, dict) for by_join in expected.values()):
        raise UsageError(f"{path}: `expected` maps a measure to numbers by join. Write {{accuracy: {{lape: 73.1}}}}.")
    if foreign := [str(measure) for measure in expected if measure not in measures]:
        raise UsageError(f"{path}: there is no measure {foreign[0]!r}, only {', '.join(measures)}. Mend its name.")
    if not all(isinstance(text, str) for text in parts.get("open", [])):
        raise UsageError(f"{path}: `open` lists sentences. Write each as one string.")
    return parts

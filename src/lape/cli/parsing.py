"""The options of the commands, as jsonargparse reads them; its import takes longer than to refuse a misspelt name."""

import argparse
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from lape import __version__
from lape.cli.commands import COMMANDS, Command

EPILOG = """examples:
  {examples}

Lists are typed `default lape` or `default,lape`. Settings can be kept in a file: --print_config writes one, and
--config reads it. Completion by Tab: eval "$(lape --print_completion shtab-bash)"."""


class Help(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves the lines of the examples as they are, and default values of "null" to the texts, which say more."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        return text if action.default is not None else text.replace(", default: %(default)s)", ")")


def parser_of(shown: Mapping[str, Command]) -> ArgumentParser:
    """Return the parser of these commands: those of all take a while to be made."""
    # Settings are values: none is imported or called, whatever a file of theirs names.
    set_parsing_settings(
        add_print_completion_argument=True, import_path_denylist=["*"], instantiate_subclass_spec_in_any=False
    )
    kind: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False, "formatter_class": Help}
    parser = ArgumentParser(
        prog="lape",
        version=__version__,
        description="Layer-adaptive position embedding for vision transformers (Yu et al., ICCV 2023).",
        epilog=EPILOG.format(examples="\n  ".join(command.example for command in COMMANDS.values())),
        **kind,
    )
    commands = parser.add_subcommands(required=False, dest="command", title="commands", metavar="COMMAND")
    for name, command in shown.items():
        subparser = ArgumentParser(
            usage=f"lape {name} [options]", description=command.does, epilog=f"example:\n  {command.example}", **kind
        )
        subparser.add_argument("--config", action="config", help="Read settings from a YAML or JSON file.")
        # jsonargparse looks a function's name up in every package above it, where `lape.export` would load torch.
        command.run.__qualname__ = f"command_{name}"
        subparser.add_argument_group("This command").add_function_arguments(
            command.run, as_group=False, skip={"experiment"}
        )
        for section, skipped in command.sections:
            subparser.add_class_arguments(section, nested_key=None, as_group=True, skip=skipped)
        commands.add_subcommand(name, subparser, help=f"{command.does[0].lower()}{command.does[1:].removesuffix('.')}")
    return parser

"""`lape`, `python -m lape` and `torchrun -m lape`."""

import sys

from lape.errors import RunError
from lape.extras import require


def main() -> int:
    """Run the command line; say which packages it needs where they are not installed."""
    try:
        require("The command line", "jsonargparse", "rich")
    except RunError as error:
        print(f"lape: {error}", file=sys.stderr)
        return 1
    from lape.cli.command_line import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())

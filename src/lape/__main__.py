"""`python -m lape`, and `torchrun -m lape`."""

import sys

from lape.cli.command_line import main

sys.exit(main())

"""`python -m lape`, and `torchrun -m lape`."""

import sys

from lape.cli import main

sys.exit(main())

"""What attention is told of positions, in numbers (3.2 to 3.4), and what that costs.

`correlation` and `decomposition` are for any model that carries a join; `subjects` finds the models that a person asks
about; `cost` counts and times. Imports nothing of studies, report and cli.
"""

from lape.analysis.comparable import EXACT
from lape.analysis.correlation import Correlation, Shape, correlation, entering
from lape.analysis.decomposition import Decomposition, decomposition

__all__ = ["EXACT", "Correlation", "Decomposition", "Shape", "correlation", "decomposition", "entering"]

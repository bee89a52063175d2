"""The models of the paper and small ones, a file a family; importing this package adds their names to timm's registry.

Imports nothing of recipes, tasks, training and what stands on them.
"""

from lape.models import registry as registry  # first: each of the other files is a part of it

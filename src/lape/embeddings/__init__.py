"""What a model can know of positions, a file a kind; `sums` has them all by name, as `lape.apply(pe=...)` takes them.

`tables` join the tokens, `biases` the attention logits, `rotations` turn queries and keys, and `convolutions` stand
behind blocks and look at the neighbours of each patch. What is fixed is made anew for every grid, from float64.

Imports errors alone.
"""

from lape.embeddings.biases import BIASES, Alibi, LookHere, RelativeBias, View
from lape.embeddings.convolutions import CONVOLUTIONS, Convolution, PositionEncodingGenerator
from lape.embeddings.grid import Grid
from lape.embeddings.rotations import (
    ROTATIONS,
    AxialRotation,
    CentredRotation,
    MixedRotation,
    Rotation,
    turn_halves,
    turn_pairs,
)
from lape.embeddings.sums import POSITION_EMBEDDINGS, PositionEmbedding, position_embedding
from lape.embeddings.tables import (
    SPREAD,
    TABLES,
    FourierFeatures,
    FourierTable,
    Table,
    learnable,
    sinusoidal_1d,
    sinusoidal_2d,
)

__all__ = [
    "BIASES",
    "CONVOLUTIONS",
    "POSITION_EMBEDDINGS",
    "ROTATIONS",
    "SPREAD",
    "TABLES",
    "Alibi",
    "AxialRotation",
    "CentredRotation",
    "Convolution",
    "FourierFeatures",
    "FourierTable",
    "Grid",
    "LookHere",
    "MixedRotation",
    "PositionEmbedding",
    "PositionEncodingGenerator",
    "RelativeBias",
    "Rotation",
    "Table",
    "View",
    "learnable",
    "position_embedding",
    "sinusoidal_1d",
    "sinusoidal_2d",
    "turn_halves",
    "turn_pairs",
]

"""Which models carry a join: a row of paths for each family of transformers, and how the row of a model is found.

`row` says what a row is; `timm`, `torchvision`, `transformers`, `open_clip` and `torch` hold the rows of their library,
but import none of these libraries: a model is recognised by the name of its class. A family of this project brings its
row in its own file and registers it, as a user may for a class of theirs: `lape.hosts.register(row)`.

Imports method and errors alone.
"""

from lape.hosts import open_clip, timm, torch, torchvision, transformers
from lape.hosts.registry import find, refuse, register, registered
from lape.hosts.resizing import cut, resize_as_timm, resize_bicubic, resize_bilinear, resize_by_count
from lape.hosts.row import (
    Block,
    Embedding,
    Files,
    Host,
    Refusal,
    Rotated,
    Stages,
    WindowBias,
    as_rows,
    block_row,
    blocks_path,
    class_name,
    class_names,
    grid_of,
    heads_of,
    lacks,
    pair,
    parts,
    rotated_at,
    table_of,
    value_at,
)

for _row in (*timm.ROWS, *torchvision.ROWS, *transformers.ROWS, *torch.ROWS, *open_clip.ROWS):
    register(_row)
for _refusal in (*timm.REFUSALS, *transformers.REFUSALS):
    refuse(_refusal)

__all__ = [
    "Block",
    "Embedding",
    "Files",
    "Host",
    "Refusal",
    "Rotated",
    "Stages",
    "WindowBias",
    "as_rows",
    "block_row",
    "blocks_path",
    "class_name",
    "class_names",
    "cut",
    "find",
    "grid_of",
    "heads_of",
    "lacks",
    "pair",
    "parts",
    "refuse",
    "register",
    "registered",
    "resize_as_timm",
    "resize_bicubic",
    "resize_bilinear",
    "resize_by_count",
    "rotated_at",
    "table_of",
    "value_at",
]

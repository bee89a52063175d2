"""The names that `lape.apply` and the command line take, without torch, which knows what they stand for.

Those of `lape.method` and `lape.embeddings` are the same, which a test holds them to.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from lape.errors import choose

JoinName = Literal["default", "shared", "unshared", "lape-sharing", "lape", "pvg", "mpvg"]
PositionEmbeddingName = Literal[
    "none",
    "learnable",
    "sinusoidal-1d",
    "sinusoidal-2d",
    "fourier",
    "relative",
    "relative-layernorm",
    "alibi-2d",
    "lookhere-180",
    "lookhere-90",
    "lookhere-45",
    "rope-axial",
    "rope-mixed",
    "rope-dinov3",
    "rope-dinov3-max",
    "rope-dinov3-min",
    "peg",
    "peg-5",
]
PositionNormName = Literal["identity", "scalar", "scale", "affine", "norm", "scalar-norm", "scale-norm", "layernorm"]
StartName = Literal["fresh", "preserve"]

JOINS: tuple[str, ...] = get_args(JoinName)


class SchemeNames(NamedTuple):
    """The four choices: how positions are joined, which there are, what normalises them, and how training starts.

    `lape.method.scheme(*names)` is what they stand for, with all that each may be.
    """

    join: str = "lape"
    pe: str | None = None  # None: the model's own
    pe_norm: str = "layernorm"
    start: str = "fresh"


class Names(NamedTuple):
    """The names of a fixed table, and what one of them is, with its article; with `sums` they may be added."""

    what: str
    names: tuple[str, ...]
    sums: bool = False

    def refuse_other(self, name: str) -> None:
        """Raise UsageError, with the nearest that there is, for a name of which a part is not in the table.

        Parts of a sum have + between them, and options behind colons, which are not looked at.
        """
        parts = [part.partition(":")[0] for part in name.split("+")] if self.sums else [name]
        for part in parts:
            choose(dict.fromkeys(self.names), part, self.what)


# By the option of the command line that takes one, or several.
CHOICES: Mapping[str, Names] = {
    "join": Names("a join", JOINS),
    "joins": Names("a join", JOINS),
    "pe": Names("a position embedding (pe)", get_args(PositionEmbeddingName), sums=True),
    "pe_norm": Names("a PE norm (pe_norm)", get_args(PositionNormName)),
    "start": Names("a start", get_args(StartName)),
    "schedule": Names("a schedule", ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant")),
    "loss": Names("a loss", ("cross-entropy", "binary-cross-entropy")),
    "split": Names("a split", ("train", "val", "test")),
    "what": Names("an analysis", ("correlation", "decomposition")),
    "balance": Names("a balance of classes", ("weights", "sampling")),
    "normalisation": Names("a normalisation", ("set", "model")),
    "interpolation": Names(
        "an interpolation", ("bilinear", "bicubic", "random", "nearest", "box", "hamming", "lanczos")
    ),
    "remode": Names("a filling of what is erased (remode)", ("const", "rand", "pixel")),
    "tracker": Names("a tracker", ("wandb", "mlflow")),
    "precision": Names(
        "a precision",
        (
            *("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"),
            *("transformer-engine", "transformer-engine-float16"),
        ),
    ),
    "accelerator": Names("an accelerator", ("auto", "cpu", "cuda", "gpu", "mps", "tpu")),
}

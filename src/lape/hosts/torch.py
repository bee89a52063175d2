"""The row of PyTorch's own encoder."""

from lape.hosts.resizing import cut
from lape.hosts.row import Block, Host

_MODULE = "torch.nn.modules.transformer"

# It has no table of its own, and adds none: it is given one for sequences up to a length.
TRANSFORMER_ENCODER = Host(
    name="torch.nn.TransformerEncoder",
    model=f"{_MODULE}.TransformerEncoder",
    table="pos_embed",
    width="layers.0.self_attn.embed_dim",
    before="",
    resize=cut,
    blocks="layers.*",
    block={f"{_MODULE}.TransformerEncoderLayer": Block("norm1", pre_norm="norm_first")},
    grid=None,
    sequence=True,
    batch_first="layers.0.self_attn.batch_first",
)

ROWS = (TRANSFORMER_ENCODER,)

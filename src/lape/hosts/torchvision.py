"""The row of torchvision's VisionTransformer."""

from lape.hosts.row import Block, Host

_MODULE = "torchvision.models.vision_transformer"

VISION_TRANSFORMER = Host(
    name="torchvision VisionTransformer",
    model=f"{_MODULE}.VisionTransformer",
    table="encoder.pos_embedding",
    width="hidden_dim",
    blocks="encoder.layers.*",
    block={f"{_MODULE}.EncoderBlock": Block("ln_1")},
    grid=("image_size", "patch_size"),
    prefix=1,
    final_norm="encoder.ln",
)

ROWS = (VISION_TRANSFORMER,)

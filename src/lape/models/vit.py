"""Small ViTs for small images: plain timm VisionTransformers under names of their own.

The names say patch and image, as timm's do; the table holds the numbers that differ.
"""

from typing import Any

NANO = {"embed_dim": 48, "depth": 6, "num_heads": 3, "mlp_ratio": 2.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "vit_nano_patch2_8": {"img_size": 8, "patch_size": 2, **NANO},
    "vit_nano_patch4_28": {"img_size": 28, "patch_size": 4, **NANO},
    "vit_nano_patch4_32": {"img_size": 32, "patch_size": 4, **NANO},
    "vit_nano_patch8_64": {"img_size": 64, "patch_size": 8, **NANO},
}

"""Small ViTs for small images: plain timm VisionTransformers under names of their own.

The names say patch and image, as timm's do; the table holds the numbers that differ.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

NANO = {"embed_dim": 48, "depth": 6, "num_heads": 3, "mlp_ratio": 2.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "vit_nano_patch2_8": {"img_size": 8, "patch_size": 2, **NANO},
    "vit_nano_patch4_28": {"img_size": 28, "patch_size": 4, **NANO},
    "vit_nano_patch4_32": {"img_size": 32, "patch_size": 4, **NANO},
    "vit_nano_patch8_64": {"img_size": 64, "patch_size": 8, **NANO},
}

default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, numbers["img_size"], numbers["img_size"]),
            "num_classes": 10,
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name, numbers in VARIANTS.items()
    }
)


def _register(name: str) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:  # timm hands over its own keywords
        return build_model_with_cfg(VisionTransformer, name, pretrained, **(VARIANTS[name] | kwargs))

    build.__name__ = name  # the name under which timm lists it
    register_model(build)


for _name in VARIANTS:
    _register(_name)

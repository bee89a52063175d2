"""LaPE (Yu et al., ICCV 2023): a LayerNorm of its own for the position embedding, in every layer of a ViT."""

__version__ = "0.1.0"

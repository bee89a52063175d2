"""Models of this project; importing this package adds their names to timm's registry."""

from lape.models import vit as vit

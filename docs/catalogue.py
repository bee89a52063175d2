"""Counts all models and writes what `lape models` lists, src/lape/catalogue.json: python docs/catalogue.py."""

from lape import catalogue
from lape.models.counting import count
from lape.models.registry import MODELS

if __name__ == "__main__":
    catalogue.FILE.write_text(catalogue.as_json(count(MODELS)), encoding="utf-8")

"""Datasets and transforms: the only room that opens images."""
